"""A tie compiled to index tensors: which slices to gather, and where to add them up.

Compiled once for tensors of one layout on one device, so that a step only runs through it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.tensors import in_memory, real, wide_dtype
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

# The longest plain running sum of float64. Sums of more are built from the sums of blocks.
_BLOCK = 32


class Members(NamedTuple):
    """Members of groups.

    Attributes:
        part: the number of the tensor that each is in, int64, shape ``[m]``.
        position: its place among the rows of that tensor, int64, shape ``[m]``.
        group: its group, int64, shape ``[m]``.
        scale: what multiple of its group's shared value it is, shape ``[m]``.
    """

    part: Tensor
    position: Tensor
    group: Tensor
    scale: Tensor

    def at(self, chosen: Tensor | slice) -> Members:
        """Some of them: a slice, or numbers."""
        if isinstance(chosen, slice):
            return Members(*(column[chosen] for column in self))
        # Several times as fast as indexing, and there may be millions.
        return Members(*(column.index_select(0, chosen) for column in self))

    def where(self, condition: Tensor) -> Members:
        """Those for which it holds."""
        return self if bool(condition.all()) else self.at(condition.nonzero().squeeze(1))

    def to(self, device: torch.device) -> Members:
        """The same on another device."""
        return self._replace(
            part=self.part.to(device),
            position=self.position.to(device),
            group=self.group.to(device),
            scale=self.scale.to(device, wide_dtype(device)),
        )


class Piece(NamedTuple):
    """Members in one tensor.

    Attributes:
        part: the number of the tensor.
        members: their positions among its rows, int64, shape ``[m]``; a slice where they follow each other.
        length: how many they are.
    """

    part: int
    members: Tensor | slice
    length: int


class Round(NamedTuple):
    """Members that are gathered at once.

    Attributes:
        pieces: the members by the tensor that they are in, which they stand in the order of.
        size: of every group, if all are of one size and their members stand group by group; else 0.
        slots: the group of each, counted from the first group of the run, int64, shape ``[m]``.
        multiples: what each is of its group's lead, shape ``[m]``; None if all are 1.
        blocks: the block of each, int64, shape ``[m]``; None if no group needs blocks.
        block_slots: the slot of each block, int64, shape ``[b]``.
    """

    pieces: tuple[Piece, ...]
    size: int
    slots: Tensor
    multiples: Tensor | None
    blocks: Tensor | None
    block_slots: Tensor

    @property
    def length(self) -> int:
        """How many members it has."""
        return len(self.slots)


class Run(NamedTuple):
    """Whole groups that are reduced at once: as many as fit into one round, or large ones in several.

    Every group has a *lead*, the member whose value stands for the group's: the others are its multiples.

    Attributes:
        leads: the leads by the tensor that they are in: its number, their rows, their slots.
        norms: the sum of the squared multiples of each group, which is its size if all are 1; ``[g]``.
        counts: what makes the sum out of the mean: the sum of the squared scales of each group; ``[g]``.
        signed: whether all multiples are 1 or -1, so that multiplying by them rounds nothing.
        scale: a power of two, so small that no sum over a group overflows.
        rounds: all the members of these groups.
    """

    leads: tuple[tuple[int, Tensor, Tensor], ...]
    norms: Tensor
    counts: Tensor
    signed: bool
    scale: float
    rounds: tuple[Round, ...]


class Layout(NamedTuple):
    """What an index depends on beside the labels.

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
        """The layout of tensors that are sliced so."""
        steps = (each.steps(tensor) for each, tensor in zip(slices, tensors, strict=True))
        double = tensors[0].dtype in (torch.float64, torch.complex128)
        return cls(tensors[0].device, double, tuple(steps))


@dataclass(frozen=True, eq=False)
class Index:
    """The members of every group of one or several tensors, sorted by group and cut into runs.

    Groups of one member are left out, as a rule: they are their own mean. Members whose scale is zero are
    *pinned*: they are zero, and belong to no sum.

    Attributes:
        slices: what is labelled in each tensor.
        layout: of the tensors that it is for, and of no others.
        runs: all groups, to be worked on one run after the other.
        pinned: the rows that are zero, int64, shape ``[p]``, by the number of the tensor that they are in.
    """

    slices: tuple[Slices, ...]
    layout: Layout
    runs: tuple[Run, ...]
    pinned: dict[int, Tensor]

    @classmethod
    @torch.inference_mode(False)  # Its tensors are to be used outside as well.
    def compile(
        cls, slices: Sequence[Slices], tensors: Sequence[Tensor], *, even: bool = True, singles: bool = False
    ) -> Index:
        """Compiles labels for tensors.

        Args:
            slices: for each tensor, numbered. Slices with the same label are members of one group, whichever
                tensor they are in.
            tensors: dense ones; their layout and device matter, and not their entries.
            even: whether many groups of one size may be worked on together, which rounds otherwise.
            singles: whether groups of one member are kept, because they have others elsewhere.
        """
        layout = Layout.of(slices, tensors)
        members, pins = sorted_members(slices, layout.steps, singles=singles)
        runs = _runs(members, slices[0].slice_shape(tensors[0]).numel(), layout, even=even)
        parts = torch.unique(pins.part).tolist() if len(pins.part) else []
        pinned = {part: pins.position[pins.part == part].to(layout.device) for part in parts}
        return cls(tuple(slices), layout, tuple(runs), pinned)

    @classmethod
    @torch.inference_mode(False)
    def of_groups(cls, members: Members, tensors: Sequence[Tensor]) -> Index:
        """An index of the rows of one tensor, all of them members, in the order of their groups."""
        slices = (Slices(members.group),)
        layout = Layout.of(slices, tensors)
        runs = _runs(members, slices[0].slice_shape(tensors[0]).numel(), layout)
        return cls(slices, layout, tuple(runs), {})

    def keeping(self, slices: Sequence[Slices]) -> Index:
        """The same index, which keeps other slices of the same shapes."""
        return replace(self, slices=tuple(slices))

    def rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as they are in memory: real rows, their entries in the order of the first one's.

        Tensors that torch negates or conjugates when it reads them are so all or none, which then makes no
        difference to what is linear.
        """
        return in_one_order([each.rows(in_memory(tensor)) for each, tensor in zip(self.slices, tensors, strict=True)])

    @cached_property
    def members_of_groups(self) -> Tensor:
        """The members of the groups of a single tensor, all of one size, int64, shape ``[g, size]``."""
        size = self.runs[0].rounds[0].size
        pieces = [run.rounds[0].pieces[0].members for run in self.runs]
        with torch.inference_mode(False):
            columns = [
                torch.arange(piece.start, piece.stop, device=self.layout.device) if isinstance(piece, slice) else piece
                for piece in pieces
            ]
            return torch.cat([column.view(-1, size) for column in columns])

    @cached_property
    def members(self) -> Members:
        """All of them but the pinned ones, sorted by group, each group's lead first; for sparse gradients."""
        with torch.inference_mode(False):
            return sorted_members(self.slices, self.layout.steps)[0].to(self.layout.device)

    @cached_property
    def sizes(self) -> Tensor:
        """The number of members of each group, int64, shape ``[g]``."""
        return torch.bincount(self.members.group)

    @cached_property
    def starts(self) -> Tensor:
        """Where in ``members`` each group begins, int64, shape ``[g]``."""
        return self.sizes.cumsum(0) - self.sizes

    @cached_property
    def group_of(self) -> Tensor:
        """The group of each row of a single tensor, -1 for a free or pinned one, int64, shape ``[n]``."""
        return self._for_rows(FREE, self.members.group)

    @cached_property
    def rank_of(self) -> Tensor:
        """The place of each row of a single tensor among the members of its group, int64, shape ``[n]``."""
        ranks = torch.arange(len(self.members.group), device=self.sizes.device) - self.starts[self.members.group]
        return self._for_rows(0, ranks)

    def _for_rows(self, free: int, values: Tensor) -> Tensor:
        rows = torch.full((self.slices[0].labels.numel(),), free, device=self.sizes.device)
        return rows.index_put_((self.members.position,), values)


def in_one_order(rows: list[Tensor]) -> list[Tensor]:
    """Real rows, their entries in the order of the first one's in memory."""
    if rows[0].dim() > 2:
        inner = order_within(rows[0])
        rows = [each.permute(0, *inner) for each in rows]
    return [real(each) for each in rows]


def order_within(rows: Tensor) -> list[int]:
    """The dimensions of rows but the first, as they are in memory from the outermost to the innermost."""
    return sorted(range(1, rows.dim()), key=rows.stride, reverse=True)


def sorted_members(
    slices: Sequence[Slices], steps: Sequence[tuple[int, ...]], *, singles: bool = False
) -> tuple[Members, Members]:
    """The members of groups, sorted by group, each group's lead first; and those that are pinned. On the CPU.

    Groups are numbered by their size, then by the tensor that their lead is in, then by their first members:
    groups of one size can be reduced as a matrix.
    """
    columns = []
    for part, (each, own) in enumerate(zip(slices, steps, strict=True)):
        tied = (each.labels != FREE).flatten()
        labels, scale, position = (one.flatten()[tied] for one in (each.labels, each.scales, each.positions(own)))
        columns.append(Members(torch.full_like(labels, part), position, labels, scale))
    members = Members(*(torch.cat(column) for column in zip(*columns, strict=True)))
    pins, members = members.where(members.scale == 0), members.where(members.scale != 0)

    size = members.scale.abs()
    if not singles:
        # The sum of a single gradient is not the gradient itself where its scale is another.
        members = members.where((torch.bincount(members.group).index_select(0, members.group) > 1) | (size != 1))
    size = members.scale.abs()
    if not bool((size == 1).all()):
        # A member of scale 1 or -1 leads: the others are its multiples, rounded once. If there is none, or a much
        # larger one, that does: what is too small for the lead would be lost to all.
        rank = torch.where(size == 1, _MUCH_LARGER, size)
        members = members.at(rank.argsort(descending=True, stable=True))

    sizes, count = torch.bincount(members.group), len(members.group)
    leads = torch.full_like(sizes, count)
    leads.scatter_reduce_(0, members.group, torch.arange(count, device="cpu"), "amin")
    used = sizes.nonzero().squeeze(1)
    order = used[(sizes[used] * len(slices) + members.part[leads[used]]).argsort(stable=True)]
    number = torch.empty_like(sizes).index_put_((order,), torch.arange(len(order), device="cpu"))
    members = members._replace(group=number.index_select(0, members.group))
    return members.at(members.group.argsort(stable=True)), pins


def _runs(members: Members, slice_entries: int, layout: Layout, *, even: bool = True) -> Iterator[Run]:
    """Cuts members that are sorted by group into runs of so many as are gathered at once."""
    sizes = torch.bincount(members.group)
    if not len(sizes):
        return
    entries = _CPU_ENTRIES if layout.device.type == "cpu" else _ACCELERATOR_ENTRIES
    # At least sqrt(largest), so that the sums of no more than sqrt(largest) rounds are added up.
    capacity = max(entries // max(slice_entries, 1), math.isqrt(int(sizes.max())), 1)
    if slice_entries < _NARROW and len(sizes) * slice_entries <= TOTALS and not layout.double:
        # To gather single entries takes longer than to add them up where they are.
        in_order = members.at((members.part * (int(members.position.max()) + 1) + members.position).argsort())
        yield _run(members, in_order, 0, capacity, layout)
        return
    starts = (sizes.cumsum(0) - sizes).tolist()
    starts.append(len(members.group))
    stretches = _stretches(members, sizes, capacity, slice_entries) if even else [(0, len(sizes), 0)]
    for first, last, size in stretches:
        while first < last:
            end = max(bisect_right(starts, starts[first] + capacity, hi=last + 1) - 1, first + 1)
            run = members.at(slice(starts[first], starts[end]))
            # Members of one tensor stand together.
            by_part = run if size else run.at(run.part.argsort(stable=True))
            yield _run(run, by_part, size, capacity, layout)
            first = end


def _stretches(members: Members, sizes: Tensor, capacity: int, slice_entries: int) -> Iterator[tuple[int, int, int]]:
    """Groups that are cut into runs together: the first, the last, and the size of all of them, 0 if that is mixed."""
    values, counts = (column.tolist() for column in torch.unique_consecutive(sizes, return_counts=True))
    whole = bool((members.part == members.part[(sizes.cumsum(0) - sizes)[members.group]]).all())
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


def _run(members: Members, in_order: Members, size: int, capacity: int, layout: Layout) -> Run:
    """Whole groups.

    Args:
        members: sorted by group, each group's lead first.
        in_order: the same as they are to be gathered, those of one tensor together.
        size: of all groups, if they are gathered as they are sorted; else 0.
        capacity: how many are gathered at once.
        layout: of the tensors.
    """
    device, wide = layout.device, wide_dtype(layout.device)
    first = int(members.group[0])
    members = members._replace(group=members.group - first)
    sizes = torch.bincount(members.group)
    leads = members.at(sizes.cumsum(0) - sizes)
    multiples = members.scale / leads.scale[members.group]
    # |sum_i r_i (w_i - r_i w)| <= sum_i (|r_i| + r_i^2) max |w|
    bound = float(_group_sums(members.group, multiples.abs() + multiples.square()).max())
    slots = in_order.group - first
    related = in_order._replace(group=slots, scale=in_order.scale / leads.scale[slots])
    return Run(
        leads=tuple(
            (part, leads.position[own].to(device), leads.group[own].to(device)) for part, own in _by_part(leads)
        ),
        norms=_group_sums(members.group, multiples.square()).to(device, wide),
        counts=_group_sums(members.group, members.scale.square()).to(device, wide),
        signed=bool((multiples.abs() == 1).all()),
        scale=0.5 ** math.ceil(math.log2(bound)),
        rounds=tuple(
            _round(related.at(slice(start, start + capacity)), size, layout) for start in range(0, len(slots), capacity)
        ),
    )


def _group_sums(group: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(int(group[-1]) + 1).index_put_((group,), values, accumulate=True)


def _by_part(members: Members) -> Iterator[tuple[int, Tensor]]:
    """The numbers of the tensors that members are in, and which of the members are in each."""
    if bool((members.part == members.part[0]).all()):
        yield int(members.part[0]), torch.arange(len(members.part), device=members.part.device)
        return
    parts = torch.unique(members.part).tolist()
    order = members.part.argsort(stable=True)
    ends = torch.bincount(members.part).cumsum(0).tolist()
    for part in parts:
        yield part, order[ends[part - 1] if part else 0 : ends[part]]


def consecutive(positions: Tensor) -> Tensor | slice:
    """Positions as a slice, where they follow each other."""
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions) and bool((positions.diff() == 1).all()):
        return slice(first, last + 1)
    return positions


def _round(members: Members, size: int, layout: Layout) -> Round:
    """Members that stand together by the tensor that they are in.

    In float64 groups of more than ``_BLOCK`` members are cut into blocks of about the square root of their
    size. The error of a running sum of ``K`` terms can grow like ``K``; that of a sum of ``sqrt(K)`` sums of
    ``sqrt(K)`` terms like ``sqrt(K)`` (blocked summation, Higham, "Accuracy and Stability of Numerical
    Algorithms", section 4.2).
    """
    device, slots = layout.device, members.group
    pieces = []
    parts, counts = torch.unique_consecutive(members.part, return_counts=True)
    ends = counts.cumsum(0).tolist()
    for part, start, end in zip(parts.tolist(), [0, *ends], ends, strict=False):
        positions = consecutive(members.position[start:end])
        at = positions if isinstance(positions, slice) else positions.to(device)
        pieces.append(Piece(part, at, end - start))
    multiples = None if bool((members.scale == 1).all()) else members.scale.to(device, wide_dtype(device))
    whole = Round(tuple(pieces), size, slots.to(device), multiples, None, slots[:0].to(device))
    if size or not layout.double:
        return whole
    _, counts = torch.unique_consecutive(slots, return_counts=True)
    if int(counts.max()) <= _BLOCK:
        return whole
    lengths = counts.double().sqrt().long().clamp(min=_BLOCK)
    ranks = torch.arange(len(slots), device=slots.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    opens = ranks % lengths.repeat_interleave(counts) == 0
    return whole._replace(blocks=(opens.cumsum(0) - 1).to(device), block_slots=slots[opens].to(device))
