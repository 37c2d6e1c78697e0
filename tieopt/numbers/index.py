"""A tie compiled to index tensors: which slices to gather, and where to add them up.

Compiled once for tensors of one layout on one device, so that a step only runs through it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.tensors import in_memory, wide_dtype
from tieopt.ties.slices import FREE, Slices

# Entries that are gathered at a time: what the caches hold, or what fills an accelerator.
_CPU_ENTRIES = 2**19
_ACCELERATOR_ENTRIES = 2**22

# Shared values whose sums are kept all at once, so that members can be walked in the order of memory.
TOTALS = 2**20

# Slices of fewer entries are narrow: it is their number that counts, not what they hold.
_NARROW = 16

# The fewest entries for which groups of one size are worth a run of their own.
EVEN_ENTRIES = 2**15

# A multiple of the shared value by which another member leads a group than one of scale 1.
_MUCH_LARGER = 256.0

# In the place of a number of a row that is pinned.
PINNED = FREE - 1

# The longest plain running sum of float64. Sums of more are built from the sums of blocks.
_BLOCK = 32


class Members(NamedTuple):
    """Members of groups: which slices are multiples of which shared value.

    Attributes:
        part: the number of the tensor that each is in, int64, shape ``[m]``.
        position: which slice of that tensor it is, int64, shape ``[m]``.
        group: its group, int64, shape ``[m]``.
        scale: what multiple of its group's shared value it is, shape ``[m]``.
    """

    part: Tensor
    position: Tensor
    group: Tensor
    scale: Tensor

    @property
    def leads(self) -> Members:
        """The first member of each group, of members that are sorted by group."""
        sizes = torch.bincount(self.group)
        return self.at(sizes.cumsum(0) - sizes)

    def at(self, chosen: Tensor | slice) -> Members:
        """Return some of them: a slice, or numbers."""
        if isinstance(chosen, slice):
            return Members(*(column[chosen] for column in self))
        # Several times as fast as indexing, and there may be millions.
        return Members(*(column.index_select(0, chosen) for column in self))

    def where(self, condition: Tensor) -> Members:
        """Return the members for which a condition holds."""
        return self if bool(condition.all()) else self.at(condition.nonzero().squeeze(1))


class Pieces(NamedTuple):
    """Members by the tensor that they are in.

    Attributes:
        parts: the number of each tensor.
        rows: which of its rows the members are, int64, shape ``[m]``; a slice where they follow each other.
        lengths: how many they are.
    """

    parts: tuple[int, ...]
    rows: tuple[Tensor | slice, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, members: Members, device: torch.device) -> Pieces:
        """Return members that stand together by the tensor that they are in."""
        parts, lengths = (column.tolist() for column in torch.unique_consecutive(members.part, return_counts=True))
        rows = [consecutive(positions) for positions in members.position.split_with_sizes(lengths)]
        on_device = [own if isinstance(own, slice) else own.to(device) for own in rows]
        return cls(tuple(parts), tuple(on_device), tuple(lengths))


class Round(NamedTuple):
    """Members that are gathered at once.

    Attributes:
        pieces: the members, tensor by tensor.
        size: of every group, if all are of one size and their members stand group by group; else 0.
        groups: the group of each member, counted from the first group of the run, int64, shape ``[m]``.
        multiples: the multiple of its group's lead that each member is, shape ``[m]``; None if all are 1.
        blocks: the block of each member, int64, shape ``[m]``; None if no group needs blocks.
        block_groups: the group of each block, int64, shape ``[b]``.
    """

    pieces: Pieces
    size: int
    groups: Tensor
    multiples: Tensor | None
    blocks: Tensor | None
    block_groups: Tensor

    def by_part(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of each tensor, and the rows and the groups of its members."""
        parts, all_rows, lengths = self.pieces
        for part, rows, groups in zip(parts, all_rows, self.groups.split_with_sizes(lengths), strict=True):
            if isinstance(rows, slice):
                rows = torch.arange(rows.start, rows.stop, device=groups.device)
            yield part, rows, groups


class Run(NamedTuple):
    """Consecutive whole groups that are reduced at once: as many as fit into one round, or a large one in several.

    Every group has a *lead*, the member whose value stands for the group's: the others are its multiples.

    Attributes:
        lead_members: the leads, in the order of their groups if its size is 1.
        norms: the sum of the squared multiples of each group, which is its size if all are 1; ``[g]``.
        counts: what makes the sum out of the mean: the sum of the squared scales of each group; ``[g]``.
        signed: whether all multiples are 1 or -1, so that multiplying by them rounds nothing.
        scale: a power of two, so small that no sum over a group overflows.
        rounds: all the members of these groups.
    """

    lead_members: Round
    norms: Tensor
    counts: Tensor
    signed: bool
    scale: float
    rounds: tuple[Round, ...]

    @property
    def leads(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The number of each tensor with leads, and their rows and groups."""
        return self.lead_members.by_part()


class Layout(NamedTuple):
    """The properties of tensors that an index depends on.

    Attributes:
        device: where the tensors are.
        double: whether their entries are as wide as the sums of them, which then round.
        steps: of the slices of each, see :meth:`~tieopt.ties.slices.Slices.steps`.
    """

    device: torch.device
    double: bool
    steps: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, slices: Sequence[Slices], tensors: Sequence[Tensor]) -> Layout:
        """Return the layout of tensors that are sliced so."""
        steps = tuple([own.steps(tensor) for own, tensor in zip(slices, tensors, strict=True)])
        return cls(tensors[0].device, tensors[0].dtype in (torch.float64, torch.complex128), steps)


@dataclass(frozen=True, eq=False)
class Index:
    """The members of every group of one or several tensors, sorted by group and cut into runs.

    Groups of one member are left out, as a rule: they are their own mean. Members whose scale is zero are
    *pinned*: they are zero, and belong to no sum.

    Attributes:
        slices: what is labelled in each tensor.
        layout: of the tensors that it is for, and of no others.
        runs: all groups, to be worked on one run after the other.
        pinned: the members that are zero.
    """

    slices: tuple[Slices, ...]
    layout: Layout
    runs: tuple[Run, ...]
    pinned: Pieces

    @classmethod
    @torch.inference_mode(False)  # Its tensors are to be used outside as well.
    def compile(
        cls, slices: Sequence[Slices], tensors: Sequence[Tensor], *, even: bool = True, singles: bool = False
    ) -> Index:
        """Compile labels for tensors.

        Args:
            slices: for each tensor, numbered. Slices with the same label are members of one group, whichever
                tensor they are in.
            tensors: dense ones; their layout and device matter, and not their entries.
            even: whether many groups of one size may be worked on together, which rounds otherwise.
            singles: whether groups of one member are kept, because they have others elsewhere.
        """
        layout = Layout.of(slices, tensors)
        members, pinned = sorted_members(slices, layout.steps, singles=singles)
        runs = _runs(members, slices[0].slice_shape(tensors[0]).numel(), layout, even=even)
        return cls(tuple(slices), layout, tuple(runs), Pieces.of(pinned, layout.device))

    @classmethod
    @torch.inference_mode(False)
    def of_groups(cls, members: Members, tensors: Sequence[Tensor]) -> Index:
        """Return the index of one tensor whose rows are all members, in the order of their groups."""
        slices = (Slices(members.group),)
        layout = Layout.of(slices, tensors)
        return cls(slices, layout, tuple(_runs(members, tensors[0].shape[1:].numel(), layout)), Pieces((), (), ()))

    def keeping(self, slices: Sequence[Slices]) -> Index:
        """Return the same index, which keeps other slices of the same shapes."""
        return replace(self, slices=tuple(slices))

    @cached_property
    def rows(self) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """Views tensors as rows, see :func:`rows_of`."""
        return partial(rows_of, self.slices)

    @cached_property
    def members_of_groups(self) -> Tensor:
        """The rows of the groups of a single tensor, all of one size, int64, shape ``[g, size]``."""
        size = self.runs[0].rounds[0].size
        with torch.inference_mode(False):
            return torch.cat([rows.view(-1, size) for run in self.runs for _, rows, _ in run.rounds[0].by_part()])

    @cached_property
    def members(self) -> Members:
        """All members of a single tensor but the pinned ones, sorted by group; for sparse gradients."""
        device = self.layout.device
        with torch.inference_mode(False):
            members, _ = sorted_members(self.slices, self.layout.steps)
            part, position, group = (column.to(device) for column in members[:3])
            return Members(part, position, group, members.scale.to(device, wide_dtype(device)))

    @cached_property
    def starts(self) -> Tensor:
        """Where in ``members`` each group begins, and where the last one ends, int64, shape ``[g + 1]``."""
        return torch.nn.functional.pad(torch.bincount(self.members.group).cumsum(0), (1, 0))

    @cached_property
    def numbers(self) -> Tensor:
        """Which of ``members`` each row is, -1 for a free one, -2 for a pinned one, int64, shape ``[n]``."""
        numbers = torch.full((self.slices[0].labels.numel(),), FREE, device=self.layout.device)
        numbers[self.members.position] = torch.arange(len(self.members.position), device=numbers.device)
        for rows in self.pinned.rows:
            numbers[rows] = PINNED
        return numbers


def rows_of(slices: Sequence[Slices], tensors: Sequence[Tensor]) -> list[Tensor]:
    """View tensors as they are in memory, as real rows without a graph, their entries in the order of the first one's.

    Tensors that torch negates or conjugates when it reads them are so all or none, which then makes no
    difference to what is linear. No Python function is called for a tensor that is contiguous and tied by rows.
    """
    rows, may_have_graph = [], torch.is_grad_enabled()
    for own, tensor in zip(slices, tensors, strict=True):
        if tensor.is_conj() or tensor.is_neg():
            tensor = in_memory(tensor)
        if own.dim or own.labels.dim() > 1:
            tensor = own.rows(tensor)
        rows.append(tensor.detach() if may_have_graph else tensor)
    if rows[0].dim() > 2:
        inner = order_within(rows[0])
        rows = [tensor.permute(0, *inner) for tensor in rows]
    return [torch.view_as_real(tensor) for tensor in rows] if rows[0].is_complex() else rows


def order_within(rows: Tensor) -> list[int]:
    """Return the dimensions of rows but the first, as they are in memory from the outermost to the innermost."""
    return sorted(range(1, rows.dim()), key=rows.stride, reverse=True)


def sorted_members(
    slices: Sequence[Slices], steps: Sequence[tuple[int, ...]] | None = None, *, singles: bool = False
) -> tuple[Members, Members]:
    """Return the members of groups, sorted by group, each group's lead first; and the pinned ones. On the CPU.

    This is the answer to which slice is what multiple of which shared value. Groups are numbered by their size, then
    by the tensor that their lead is in, then by their first members: groups of one size can be reduced as a matrix.

    Args:
        slices: of each tensor.
        steps: with which the slices of each tensor are counted; None to count them in the order of their labels.
        singles: whether groups of one member are groups, and not free slices.
    """
    columns = []
    for part, own in enumerate(slices):
        tied = (own.labels != FREE).flatten()
        position = own.positions(steps[part]).flatten() if steps else torch.arange(len(tied), device="cpu")
        label, position, scale = (column[tied] for column in (own.labels.flatten(), position, own.scales.flatten()))
        columns.append(Members(torch.full_like(label, part), position, label, scale))
    members = Members(*(torch.cat(column) for column in zip(*columns, strict=True)))
    pinned, members = members.where(members.scale == 0), members.where(members.scale != 0)

    if not singles:
        # The sum of a single gradient is not the gradient itself where its scale is another.
        is_alone = torch.bincount(members.group).index_select(0, members.group) == 1
        members = members.where(~is_alone | (members.scale.abs() != 1))
    size = members.scale.abs()
    if not bool((size == 1).all()):
        # A member of scale 1 or -1 leads: the others are its multiples, rounded once. If there is none, or a much
        # larger one, that does: what is too small for the lead would be lost to all.
        members = members.at(torch.where(size == 1, _MUCH_LARGER, size).argsort(descending=True, stable=True))

    sizes, count = torch.bincount(members.group), len(members.group)
    leads = torch.full_like(sizes, count)
    leads.scatter_reduce_(0, members.group, torch.arange(count, device="cpu"), "amin")
    used = sizes.nonzero().squeeze(1)
    order = used[(sizes[used] * len(slices) + members.part[leads[used]]).argsort(stable=True)]
    number = torch.empty_like(sizes).index_put_((order,), torch.arange(len(order), device="cpu"))
    members = members._replace(group=number.index_select(0, members.group))
    return members.at(members.group.argsort(stable=True)), pinned


def _runs(members: Members, slice_entries: int, layout: Layout, *, even: bool = True) -> Iterator[Run]:
    """Cut members that are sorted by group into runs of so many as are gathered at once."""
    sizes = torch.bincount(members.group)
    if not len(sizes):
        return
    entries = _CPU_ENTRIES if layout.device.type == "cpu" else _ACCELERATOR_ENTRIES
    # At least sqrt(largest), so that the sums of no more than sqrt(largest) rounds are added up.
    capacity = max(entries // max(slice_entries, 1), math.isqrt(int(sizes.max())), 1)
    if slice_entries < _NARROW and len(sizes) * slice_entries <= TOTALS and not layout.double:
        # To gather single entries takes longer than to add them up where they are.
        in_order = (members.part * (int(members.position.max()) + 1) + members.position).argsort()
        yield _run(members, in_order, 0, capacity, layout)
        return
    starts = (sizes.cumsum(0) - sizes).tolist()
    starts.append(len(members.group))
    for first, last, size in _stretches(members, sizes, capacity, slice_entries) if even else [(0, len(sizes), 0)]:
        while first < last:
            end = max(bisect_right(starts, starts[first] + capacity, hi=last + 1) - 1, first + 1)
            run = members.at(slice(starts[first], starts[end]))
            # Members of one tensor stand together.
            yield _run(run, None if size else run.part.argsort(stable=True), size, capacity, layout)
            first = end


def _stretches(members: Members, sizes: Tensor, capacity: int, slice_entries: int) -> Iterator[tuple[int, int, int]]:
    """Yield groups that are cut into runs together: the first, the last, and the size of all, 0 if that is mixed."""
    values, counts = (column.tolist() for column in torch.unique_consecutive(sizes, return_counts=True))
    whole = bool((members.part == members.leads.part[members.group]).all())
    first = mixed = 0
    for size, count in zip(values, counts, strict=True):
        enough = len(values) == 1 or size * count * slice_entries >= EVEN_ENTRIES
        if whole and enough and size <= capacity:
            if mixed < first:
                yield mixed, first, 0
            yield first, first + count, size
            mixed = first + count
        first += count
    if mixed < first:
        yield mixed, first, 0


def _run(members: Members, order: Tensor | None, size: int, capacity: int, layout: Layout) -> Run:
    """Compile whole groups.

    Args:
        members: sorted by group, each group's lead first.
        order: in which they are gathered, those of one tensor together; None if they are as they are sorted.
        size: of all groups, if they are gathered as they are sorted; else 0.
        capacity: how many are gathered at once.
        layout: of the tensors.
    """
    device, scale = (layout.device, wide_dtype(layout.device)), members.scale
    members = members._replace(group=members.group - members.group[0])
    members = members._replace(scale=scale / members.leads.scale[members.group])
    leads, multiples = members.leads, members.scale
    # |sum_i r_i (w_i - r_i w)| <= sum_i (|r_i| + r_i^2) max |w|
    bound = float(_group_sums(members.group, multiples.abs() + multiples.square()).max())
    gathered = members if order is None else members.at(order)
    return Run(
        lead_members=_round(leads.at(leads.part.argsort(stable=True)), int((leads.part.diff() >= 0).all()), layout),
        norms=_group_sums(members.group, multiples.square()).to(*device),
        counts=_group_sums(members.group, scale.square()).to(*device),
        signed=bool((multiples.abs() == 1).all()),
        scale=0.5 ** math.ceil(math.log2(bound)),
        rounds=tuple(
            _round(gathered.at(slice(start, start + capacity)), size, layout)
            for start in range(0, len(multiples), capacity)
        ),
    )


def _group_sums(group: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(int(group[-1]) + 1).index_put_((group,), values, accumulate=True)


def consecutive(positions: Tensor) -> Tensor | slice:
    """Return positions as a slice, where they follow each other."""
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions) and bool((positions.diff() == 1).all()):
        return slice(first, last + 1)
    return positions


def _round(members: Members, size: int, layout: Layout) -> Round:
    """Compile members that stand together by the tensor that they are in.

    In float64 groups of more than ``_BLOCK`` members are cut into blocks of about the square root of their
    size. The error of a running sum of ``K`` terms can grow like ``K``; that of a sum of ``sqrt(K)`` sums of
    ``sqrt(K)`` terms like ``sqrt(K)`` (blocked summation, Higham, "Accuracy and Stability of Numerical
    Algorithms", section 4.2).
    """
    device, groups = layout.device, members.group
    multiples = None if bool((members.scale == 1).all()) else members.scale.to(device, wide_dtype(device))
    chunk = Round(Pieces.of(members, device), size, groups.to(device), multiples, None, groups[:0].to(device))
    if size or not layout.double:
        return chunk
    _, counts = torch.unique_consecutive(groups, return_counts=True)
    if int(counts.max()) <= _BLOCK:
        return chunk
    lengths = counts.double().sqrt().long().clamp(min=_BLOCK)
    ranks = torch.arange(len(groups), device=groups.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    opens = ranks % lengths.repeat_interleave(counts) == 0
    return chunk._replace(blocks=(opens.cumsum(0) - 1).to(device), block_groups=groups[opens].to(device))
