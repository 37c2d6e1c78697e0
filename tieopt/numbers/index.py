"""A tie compiled to index tensors: which slices to gather, and where to add them up.

Compiled once for tensors of one layout on one device, so that a step only runs through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.numbers import devices
from tieopt.numbers.members import Members, members_of
from tieopt.numbers.sums import Sums
from tieopt.numbers.views import Correspondence, Tile, correspondence_of, first_members, tiles
from tieopt.tensors import column, in_front, in_memory, real, wide_dtype
from tieopt.ties.offsets import Offset
from tieopt.ties.slices import Slices, narrow

# Entries that are gathered at a time: what the caches hold, or what fills an accelerator.
_CPU_ENTRIES = 2**19
_ACCELERATOR_ENTRIES = 2**22

# The most entries of shared values whose sums are kept all at once, so that members can be gathered in the order of
# memory: of single entries on a CPU, for which that order counts most, and of other narrow slices.
_SINGLE_TOTALS = 2**23
_NARROW_TOTALS = 2**20

# Slices of fewer entries are narrow: it is their number that counts, not what they hold.
_NARROW = 16

# The fewest entries for which groups of one size are worth a run of their own.
EVEN_ENTRIES = 2**15

# Slices in no group are read and written with the members around them if at most every eighth is one.
_FEW = 8

# The fewest numbers that are kept in half of the memory: an operator more in each step, which fewer are not worth.
MANY = 2**14

# What many numbers are kept in if they are integers and fit.
_INTEGERS = (torch.uint8, torch.int32)


class Pieces(NamedTuple):
    """Members by the tensor that they are in.

    Attributes:
        tensors: the number of each tensor.
        rows: which of its rows the members are, int32 or int64, shape ``[m]``; a slice where they follow each other.
        lengths: how many they are.
    """

    tensors: tuple[int, ...]
    rows: tuple[Tensor | slice, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, members: Members, device: torch.device) -> Pieces:
        """Return members that are sorted by tensor."""
        numbers = members.tensor
        if len(numbers) and numbers.stride() == (0,):
            tensors, lengths = [int(numbers[0])], [len(numbers)]
        else:
            tensors, lengths = (part.tolist() for part in torch.unique_consecutive(numbers, return_counts=True))
        parts = consecutive(members.position, lengths)
        rows = tuple([part if isinstance(part, slice) else compressed(part).to(device) for part in parts])
        return cls(tuple(tensors), rows, tuple(lengths))


class Chunk(NamedTuple):
    """Members that are gathered at once.

    Attributes:
        pieces: the members, tensor by tensor, or a tile.
        size: of every group, if all are of one size and the members are sorted by group, or are tiles; else 0.
        groups: the group of each member, counted from the first group of the run, int32 or int64, shape ``[m]``;
            nothing if all groups are of one size.
        multiples: of its group's lead, for each member, shape ``[m]``; None if all are 1, and int8 if some are -1.
        sums: how the members are added up; None if all groups are of one size.
        shifts: what is added to the multiples, in the wide dtype, of a shape that broadcasts to ``[m, ...]``; None if
            it is 0 everywhere.
    """

    pieces: Pieces | Tile
    size: int
    groups: Tensor
    multiples: Tensor | None
    sums: Sums | None
    shifts: Tensor | None = None

    @property
    def group_of_each(self) -> Tensor:
        """The group of each member, also where all are of one size; int64, shape ``[m]``."""
        assert isinstance(self.pieces, Pieces)
        if not self.size:
            return self.groups.long()
        return torch.arange(sum(self.pieces.lengths), device=self.groups.device) // self.size


class Run(NamedTuple):
    """Consecutive groups that are reduced at once: as many as fit into one chunk, or a large group in several.

    Every group has a *lead*, the member whose value stands for the group's: the others are its multiples, plus what
    their offsets differ by.

    Attributes:
        lead_members: the leads, sorted by group if their size is 1.
        norms: the sum of the squared multiples of each group, which is its size if all are 1; ``[g]``, in the wide
            dtype, or many integers as uint8 or int32.
        counts: the sum of the squared scales of each group, by which the mean is multiplied for the sum; as ``norms``.
        signed: whether members are their leads times 1 or -1, so that computing them rounds nothing.
        headroom: a power of two by which terms are multiplied, so small that no sum over a group overflows.
        chunks: all members of these groups.
        tile: all members, if they are those of a tile.
        offsets: of the leads, in the wide dtype, of a shape that broadcasts to ``[g, ...]``; None if no member has
            one.
        between: slices in no group that lie between members, so that these need not be looked up one by one. Each is
            the only member of one of the last groups, and stays as it is, bit for bit. None if there are none.
    """

    lead_members: Chunk
    norms: Tensor
    counts: Tensor
    signed: bool
    headroom: float
    chunks: tuple[Chunk, ...]
    tile: Tile | None = None
    offsets: Tensor | None = None
    between: Pieces | None = None


class Layout(NamedTuple):
    """The properties of tensors that an index depends on.

    Attributes:
        device: where the tensors are.
        double: whether their entries are float64, so that sums of them are rounded.
        steps: of the slices of each, see :meth:`~tieopt.ties.slices.Slices.steps`.
        memory: the dtypes and strides of tensors with offsets.
    """

    device: torch.device
    double: bool
    steps: tuple[tuple[int, ...], ...]
    memory: tuple[tuple[object, ...], ...] = ()

    @classmethod
    def of(cls, slices: Sequence[Slices], tensors: Sequence[Tensor]) -> Layout:
        """Return the layout of tensors that are sliced so."""
        steps = tuple([labelled.steps(tensor) for labelled, tensor in zip(slices, tensors, strict=True)])
        double = tensors[0].dtype in (torch.float64, torch.complex128)
        memory: tuple[tuple[object, ...], ...] = ()
        if any(labelled.offset is not None for labelled in slices):
            memory = tuple([(tensor.dtype, tensor.stride()) for tensor in tensors])
        return cls(tensors[0].device, double, steps, memory)


@dataclass(eq=False)
class Index:
    """The members of every group of one or several tensors, cut into runs of consecutive groups.

    Groups of one member are left out, as a rule: they are their own mean. Members whose scale is zero are
    *pinned*: they are zero, and belong to no sum.

    Attributes:
        slices: of each tensor, with their labels.
        layout: of the tensors. For tensors of another layout the index is wrong.
        runs: all groups.
        pinned: the members that are pinned.
        pinned_at: for each tensor that has some, their offsets as they are stored, of a shape that broadcasts to
            ``[m, ...]``; nothing if all are 0.
    """

    slices: tuple[Slices, ...]
    layout: Layout
    runs: tuple[Run, ...]
    pinned: Pieces
    pinned_at: tuple[Tensor, ...]

    @classmethod
    @torch.inference_mode(False)  # Its tensors are to be used outside as well.
    def compile(
        cls,
        slices: Sequence[Slices],
        tensors: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        even: bool = True,
        singles: bool = False,
        linear: bool = False,
    ) -> Index:
        """Compile labels for tensors.

        Args:
            slices: for each tensor, numbered. Slices with the same label are members of one group, whichever
                tensor they are in.
            tensors: dense ones; their layout and device matter, and not their entries.
            labels: as for :func:`members_of`.
            even: whether many groups of one size may be reduced as a matrix, which rounds in another way.
            singles: whether groups of one member are kept, because they have members in other tensors.
            linear: whether offsets do not count.
        """
        layout = Layout.of(slices, tensors)
        members, pinned = members_of(slices, layout.steps, labels, singles=singles)
        offsets = None if linear or not layout.memory else _Offsets(slices, tensors, layout.steps)
        entries = slices[0].slice_shape(tensors[0].shape).numel()
        passed_over = () if singles or offsets or len(pinned.group) else slices
        runs = _runs(members, entries, layout, offsets, even=even, passed_over=passed_over)
        pinned_at = () if offsets is None else offsets.stored_at(pinned)
        return cls(tuple(slices), layout, tuple(runs), Pieces.of(pinned, layout.device), pinned_at)

    @property
    def has_offsets(self) -> bool:
        """Whether members are more than multiples of shared values, or pinned at something other than zero."""
        return bool(self.pinned_at) or any(run.offsets is not None for run in self.runs)

    @cached_property
    def rows(self) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """:func:`rows_of` for the slices."""
        return partial(rows_of, self.slices)

    @cached_property
    @torch.inference_mode(False)
    def members_of_groups(self) -> Tensor:
        """The rows of the groups of a single tensor, all of one size, int64, shape ``[g, size]``."""
        rows_of_runs = []
        for chunk in (run.chunks[0] for run in self.runs):
            assert isinstance(chunk.pieces, Pieces)
            (rows,) = chunk.pieces.rows
            if isinstance(rows, slice):
                rows = torch.arange(rows.start, rows.stop, device=self.layout.device)
            rows_of_runs.append(rows)
        return torch.cat(rows_of_runs).view(-1, self.runs[0].chunks[0].size).long()


@dataclass(eq=False)
class Views(Index):
    """The members of a regular tie. Its runs are tiles, and its rows whole tensors.

    Attributes:
        correspondence: of the members.
    """

    correspondence: Correspondence

    @classmethod
    @torch.inference_mode(False)
    def of(cls, slices: Sequence[Slices], tensors: Sequence[Tensor]) -> Views | None:
        """Return the views of a regular tie; None of another one. Arguments are as for :meth:`Index.compile`."""
        layout = Layout.of(slices, tensors)
        correspondence = None if layout.memory else correspondence_of(slices)
        if correspondence is None or not tensors[0].numel():
            return None
        # Of float64 the mean of such a number of members is worked out around one of them.
        is_around_one = layout.double and len(slices).bit_count() > 1
        if is_around_one and len(correspondence.symmetries) > 1:
            return None
        grids = [in_front(tensor, labelled.dim) for labelled, tensor in zip(slices, tensors, strict=True)]
        runs = tuple(_run_of_tile(tile, layout.device) for tile in tiles(correspondence, grids))
        views = cls(tuple(slices), layout, runs, Pieces((), (), ()), (), correspondence)
        if any(move.sign < 0 for move in correspondence.symmetries):
            # A shared value has the sign of the first member of its group, which therefore has to lead.
            leads = views._leads()
            if not torch.equal(first_members(slices[0], correspondence)[leads], leads):
                return None
        return views

    @cached_property
    def rows(self) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """View tensors without a graph, as they are in memory, the slices of their labels in front."""
        return partial(_grids, self.slices)

    @cached_property
    def tiles(self) -> list[Tile]:
        """The tiles of the runs."""
        return [run.tile for run in self.runs if run.tile is not None]

    def leads_of(self, firsts: Tensor) -> Tensor:
        """Return which slices of the first tensor lead groups, whose first members there are given; int64."""
        if len(self.correspondence.symmetries) == 1:
            return firsts
        first, leads = first_members(self.slices[0], self.correspondence), self._leads()
        return torch.empty_like(first).index_copy_(0, first[leads], leads)[firsts]

    def _leads(self) -> Tensor:
        shape = self.slices[0].labels.shape
        entries, leads = torch.arange(shape.numel(), device="cpu").view(shape), []
        for tile in self.tiles:
            region, inner = tile.views[0].region[: len(shape)], tile.views[0].region[len(shape) :]
            # All entries of a slice are alike.
            if any(part.start for part in inner):
                continue
            here = entries[region].flatten()
            if tile.orbits is not None:
                here = here[torch.unique(tile.orbits.first.cpu() // math.prod(part.stop for part in inner))]
            leads.append(here)
        return torch.cat(leads)


def _grids(slices: Sequence[Slices], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [
        real(in_front(in_memory(tensor.detach()), labelled.dim))
        for labelled, tensor in zip(slices, tensors, strict=True)
    ]


def _run_of_tile(tile: Tile, device: torch.device) -> Run:
    size, entries, nothing = len(tile.views), math.prod(tile.shape), torch.empty(0, dtype=torch.int64, device=device)
    sizes = torch.full((1,), size, dtype=wide_dtype(device), device=device).expand(entries)
    chunk = Chunk(tile, size, nothing, None, None)
    leads = chunk._replace(pieces=tile.lead, size=1)
    counts = sizes if tile.counts is None else tile.counts
    return Run(leads, sizes, counts, True, 0.5 ** math.ceil(math.log2(2 * size)), (chunk,), tile)


def rows_of(slices: Sequence[Slices], tensors: Sequence[Tensor]) -> list[Tensor]:
    """View tensors as real rows without a graph, as they are in memory, entries in the order of the first tensor's.

    Tensors that torch negates or conjugates when it reads them are so all or none, which then makes no
    difference to what is linear. For a tensor that is tied by rows no Python function is called.
    """
    rows, may_have_graph = [], torch.is_grad_enabled()
    for labelled, tensor in zip(slices, tensors, strict=True):
        if tensor.is_conj() or tensor.is_neg():
            tensor = in_memory(tensor)
        if labelled.dim or labelled.labels.dim() > 1 or not tensor.dim():
            tensor = labelled.rows(tensor)
        rows.append(tensor.detach() if may_have_graph else tensor)
    if rows[0].dim() > 2:
        inner = memory_order(rows[0])
        rows = [tensor.permute(0, *inner) for tensor in rows]
    return [torch.view_as_real(tensor) for tensor in rows] if rows[0].is_complex() else rows


def memory_order(rows: Tensor) -> list[int]:
    """Return the dimensions of rows but the first, as they are in memory from the outermost to the innermost."""
    return sorted(range(1, rows.dim()), key=rows.stride, reverse=True)


class _Offsets:
    """The offsets of tensors, by the rows that :func:`rows_of` views."""

    def __init__(self, slices: Sequence[Slices], tensors: Sequence[Tensor], steps: Sequence[tuple[int, ...]]) -> None:
        self._slices = slices
        self._tensors = tensors
        self._steps = steps
        self._inner = memory_order(slices[0].rows(tensors[0]))
        self._offsets = [self._in_rows(number, wide_dtype(tensors[0].device)) for number in range(len(slices))]

    def at(self, members: Members) -> Tensor:
        """Return the offsets of members, see :func:`offsets_of`."""
        return offsets_of(members, self._offsets)

    def stored_at(self, members: Members) -> tuple[Tensor, ...]:
        """Return the offsets of members that are sorted by tensor, for each of these as they are stored."""
        numbers, lengths = (column.tolist() for column in torch.unique_consecutive(members.tensor, return_counts=True))
        stored = []
        for number, positions in zip(numbers, members.position.split_with_sizes(lengths), strict=True):
            offset = self._in_rows(number, self._tensors[number].dtype.to_real())
            stored.append(
                offset.at(consecutive(offset.rows[positions], [len(positions)])[0]).to(self._tensors[0].device)
            )
        return tuple(stored)

    def _in_rows(self, number: int, dtype: torch.dtype) -> Offset:
        labelled, steps = self._slices[number], self._steps[number]
        offset = offset_in_memory(labelled, self._tensors[number], dtype)
        rows = offset.rows
        if not labelled.are_rows(steps) and len(rows):
            positions = labelled.positions(steps).flatten()
            rows = rows.new_zeros(1 + int(positions.max())).index_copy_(0, positions, rows)
        last = range(1 + len(self._inner), offset.values.dim())
        return offset._replace(rows=rows, values=offset.values.permute(0, *self._inner, *last))


def offset_in_memory(slices: Slices, tensor: Tensor, dtype: torch.dtype) -> Offset:
    """Return the offset of slices in a real dtype, as the tensor is in memory, its rows as a vector; also one of 0.

    Args:
        slices: of the tensor.
        tensor: that torch does not negate or conjugate when it reads it.
        dtype: of the values; those of complex ones stand in a last dimension.
    """
    offset = slices.offset
    if offset is None:
        values = torch.zeros((1,) * (1 + len(slices.slice_shape(tensor.shape))), device="cpu")
        offset = Offset(torch.zeros((), dtype=torch.int64, device="cpu").expand(slices.labels.shape), values, None)
    values = offset.values
    if tensor.is_complex():
        values = torch.view_as_real(values.to(values.dtype.to_complex()))
    # As torch converts it, and with it the values of frozen slices.
    return offset._replace(rows=offset.rows.flatten(), values=values.to(dtype))


def offsets_of(members: Members, offsets: Sequence[Offset]) -> Tensor:
    """Return the offsets of members, shape ``[m, ...]``, with 1 in place of sizes along which nothing changes.

    Args:
        members: whose positions are those of the rows of the offsets.
        offsets: of each tensor, in one dtype.
    """
    shape = torch.broadcast_shapes(*(offset.values.shape[1:] for offset in offsets))  # type: ignore[no-untyped-call]
    values = offsets[0].values.new_empty(len(members.position), *shape)
    for number, offset in enumerate(offsets):
        here = (members.tensor == number).nonzero().squeeze(1)
        values[here] = offset.values[offset.rows[members.position[here]]]
    return values


def _others(members: Members, slices: Sequence[Slices], layout: Layout) -> Tensor:
    """Return the positions of the slices of a single tensor that are in no group, if they may be read with the members.

    For that they have to be few, the members in the order of the positions of all slices, and their scales 1 or -1, so
    that nothing is rounded.
    """
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    if len(slices) != 1:
        return nothing
    count = slices[0].labels.numel()
    if not 0 < _FEW * (count - len(members.position)) <= count or not slices[0].are_rows(layout.steps[0]):
        return nothing
    if not bool((members.position[1:] > members.position[:-1]).all()) or not bool((members.scale.abs() == 1).all()):
        return nothing
    is_other = torch.ones(count, dtype=torch.bool, device="cpu").index_fill_(0, members.position, False)
    return is_other.nonzero().squeeze(1)


def _runs(
    members: Members,
    slice_entries: int,
    layout: Layout,
    offsets: _Offsets | None,
    *,
    even: bool,
    passed_over: Sequence[Slices],
) -> Iterator[Run]:
    """Cut the members of groups into runs of about as many as are gathered at once.

    Args:
        members: of groups.
        slice_entries: of each member.
        layout: of the tensors.
        offsets: of the tensors; None if they do not count.
        even: as for :meth:`Index.compile`.
        passed_over: all slices, if those in no group may be read with the members; otherwise nothing.
    """
    if not len(members.group):
        return
    is_one = are_one_run(1 + int(members.group.max()), slice_entries, layout)
    if not is_one:
        members = members.by_group
    # Of sorted groups this is several times as fast.
    sizes = torch.bincount(members.group)
    capacity = capacity_for(layout.device, slice_entries, int(sizes.max()))
    if is_one:
        others = _others(members, passed_over, layout)
        whole = members.among(others)
        sizes = torch.cat([sizes, torch.ones_like(others)])
        run = _run(whole, sizes, _by_memory(whole, layout), 0, capacity, layout, offsets)
        between = whole.at(others)
        yield run._replace(between=Pieces.of(between, layout.device)) if len(others) else run
        return
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    for first, last, size in _stretches(members, sizes, capacity, slice_entries) if even else [(0, len(sizes), 0)]:
        while first < last:
            fitting = torch.searchsorted(starts[: last + 1], starts[first] + capacity, right=True)
            end = max(int(fitting) - 1, first + 1)
            chosen = members.at(slice(int(starts[first]), int(starts[end])))
            chosen = chosen._replace(group=chosen.group - first)
            order = None if size else _by_tensor(chosen, layout)
            yield _run(chosen, sizes[first:end], order, size, capacity, layout, offsets)
            first = end


def capacity_for(device: torch.device, slice_entries: int, largest: int) -> int:
    """Return how many members are gathered at once, where the largest group has so many."""
    entries = _ACCELERATOR_ENTRIES if devices.is_accelerator(device) else _CPU_ENTRIES
    # At least sqrt(largest), so that the sums of no more than sqrt(largest) chunks are added up.
    return max(entries // max(slice_entries, 1), math.isqrt(largest), 1)


def are_one_run(groups: int, slice_entries: int, layout: Layout) -> bool:
    """Return whether so many groups are one run: to gather single entries takes longer than to add them up."""
    is_single = slice_entries == 1 and not devices.is_accelerator(layout.device)
    most = _SINGLE_TOTALS if is_single else _NARROW_TOTALS
    return slice_entries < _NARROW and groups * slice_entries <= most and not layout.double


def _stretches(members: Members, sizes: Tensor, capacity: int, slice_entries: int) -> Iterator[tuple[int, int, int]]:
    """Return the stretches of groups that are sorted by their sizes; see :func:`stretches_of`."""
    values, counts = (column.tolist() for column in torch.unique_consecutive(sizes, return_counts=True))
    # A group that is in several tensors has a neighbour that is in another.
    same_group = members.group[1:] == members.group[:-1]
    whole = not bool((same_group & (members.tensor[1:] != members.tensor[:-1])).any())
    return stretches_of(values, counts, capacity if whole else 0, slice_entries)


def stretches_of(
    sizes: Sequence[int], counts: Sequence[int], capacity: int, slice_entries: int
) -> Iterator[tuple[int, int, int]]:
    """Yield groups that are cut into runs together: the first, the end, and the size of all, 0 if sizes are mixed.

    Args:
        sizes: of groups, from the smallest on.
        counts: how many groups are of each size.
        capacity: how many members are gathered at once; larger groups count as mixed.
        slice_entries: of a member.
    """
    first = mixed = 0
    for size, count in zip(sizes, counts, strict=True):
        enough = len(sizes) == 1 or size * count * slice_entries >= EVEN_ENTRIES
        if enough and size <= capacity:
            if mixed < first:
                yield mixed, first, 0
            yield first, first + count, size
            mixed = first + count
        first += count
    if mixed < first:
        yield mixed, first, 0


def norms_of(group: Tensor, multiples: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``norms`` and the ``counts`` of a :class:`Run`, and what its ``headroom`` has to hold, by group.

    Args:
        group: of each member.
        multiples: of its group's lead, for each member.
        scale: of each member.
    """
    norms, counts = (torch.bincount(group, values.square()) for values in (multiples, scale))
    # |sum_i r_i (w_i - r_i w)| <= sum_i (|r_i| + r_i^2) max |w|
    return norms, counts, norms + torch.bincount(group, multiples.abs())


def _run(
    members: Members,
    sizes: Tensor,
    order: Tensor | None,
    size: int,
    capacity: int,
    layout: Layout,
    offsets: _Offsets | None,
) -> Run:
    """Compile groups.

    Args:
        members: of groups that are numbered from 0 on, each group's lead first.
        sizes: of the groups, int64.
        order: in which they are gathered, tensor by tensor; None if as they are.
        size: of all groups, if members are sorted by group and gathered so; else 0.
        capacity: how many are gathered at once.
        layout: of the tensors.
        offsets: of the tensors; None if they do not count.
    """
    device, scale = layout.device, members.scale
    own_offsets = None if offsets is None else offsets.at(members)
    firsts = slice(None, None, size) if size else members.firsts
    leads = members.at(firsts)
    if bool((scale == 1).all()):
        norms = counts = sizes
        signed, bound = True, 2 * float(norms.max())
    else:
        multiples = scale / leads.scale[members.group]
        members, leads = members._replace(scale=multiples), leads._replace(scale=torch.ones_like(leads.scale))
        norms, counts, bounds = norms_of(members.group, multiples, scale)
        signed, bound = bool((multiples.abs() == 1).all()), float(bounds.max())
    lead_offsets = shifts = None
    if own_offsets is not None and bool(own_offsets.any()):
        # A copy, which does not keep those of all members in memory.
        lead_offsets = own_offsets[firsts].clone()
        shifts = own_offsets - column(members.scale, own_offsets) * lead_offsets[members.group]
        # To add 0.0 would turn -0.0 into 0.0.
        shifts.masked_fill_(shifts == 0, -0.0)
        # What is expected of a member is limited to the range of its dtype: |r_i (w_i - e_i)| <= 2 |r_i| max |w|
        signed, bound = False, max(bound, 2 * float(torch.bincount(members.group, members.scale.abs()).max()))
    gathered = members if order is None else members.at(order)
    shifts = shifts if order is None or shifts is None else shifts[order]
    chunks = tuple(
        _chunk(gathered.at(slice(start, start + capacity)), size, layout)._replace(
            shifts=None if shifts is None else shifts[start : start + capacity].to(device)
        )
        for start in range(0, len(scale), capacity)
    )
    in_order, by_tensor = int((leads.tensor.diff() >= 0).all()), _by_tensor(leads, layout)
    lead_members = _chunk(leads if by_tensor is None else leads.at(by_tensor), in_order, layout)
    stored = _stored(norms, device)
    return Run(
        lead_members=lead_members if not size else _viewed(lead_members, chunks[0]),
        norms=stored,
        counts=stored if torch.equal(counts, norms) else _stored(counts, device),
        signed=signed,
        headroom=0.5 ** math.ceil(math.log2(bound)),
        chunks=chunks,
        offsets=None if lead_offsets is None else lead_offsets.to(device),
    )


def _viewed(leads: Chunk, members: Chunk) -> Chunk:
    """Return leads that take no memory of their own where each is the first of its group among the members."""
    pieces, of_members = leads.pieces, members.pieces
    assert isinstance(pieces, Pieces)
    assert isinstance(of_members, Pieces)
    (chosen, *others) = of_members.rows
    if others or isinstance(chosen, slice) or isinstance(pieces.rows[0], slice):
        return leads
    return leads._replace(pieces=pieces._replace(rows=(chosen[:: members.size],)))


def _stored(column: Tensor, device: torch.device) -> Tensor:
    """Return positive numbers on a device, in the wide dtype, but many as bytes or int32 if they are small integers.

    What is the same number everywhere is stored as one, expanded.
    """
    wide = wide_dtype(device)
    if bool((column == column[0]).all()):
        return column[:1].to(device, wide, copy=True).expand(len(column))
    if len(column) < MANY or bool((column != column.round()).any()):
        return column.to(device, wide)
    largest = float(column.max())
    return column.to(device, next((dtype for dtype in _INTEGERS if largest <= torch.iinfo(dtype).max), wide))


def _by_memory(members: Members, layout: Layout) -> Tensor | None:
    """Return the order in which members are in memory, tensor by tensor; None if they stand in it."""
    places = members.position
    if len(layout.steps) > 1:
        places = members.tensor * (int(places.max()) + 1) + places
    return None if bool((places[1:] > places[:-1]).all()) else narrow(places).argsort()


def _by_tensor(members: Members, layout: Layout) -> Tensor | None:
    """Return the order in which members of one tensor stand together; None if there is only one."""
    return members.tensor.argsort(stable=True) if len(layout.steps) > 1 else None


def compressed(numbers: Tensor) -> Tensor:
    """Return numbers of rows or groups as an index keeps them: a copy, many of them in int32.

    What is given may be a part of millions, or labels that were made in inference mode.
    """
    return narrow(numbers) if len(numbers) >= MANY else numbers.clone()


def consecutive(positions: Tensor, lengths: Sequence[int]) -> list[Tensor | slice]:
    """Return parts of positions, none of which is empty, as slices, where those of a part follow each other."""
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    ends = counts.cumsum(0)
    firsts, lasts = positions[ends - counts], positions[ends - 1]
    follow = lasts - firsts + 1 == counts
    if bool(follow.any()):
        # Where a position is not larger than the one before it.
        falls = (positions[1:] <= positions[:-1]).nonzero().squeeze(1)
        follow &= torch.searchsorted(falls, ends - 1) == torch.searchsorted(falls, ends - counts)
    parts = positions.split_with_sizes(lengths)
    columns = zip(parts, follow.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
    return [slice(first, last + 1) if is_slice else part for part, is_slice, first, last in columns]


def _chunk(members: Members, size: int, layout: Layout) -> Chunk:
    """Compile members that are sorted by tensor."""
    device, groups = layout.device, members.group
    multiples = None
    if not bool((members.scale == 1).all()):
        is_signed = bool((members.scale.abs() == 1).all())
        multiples = members.scale.to(device, torch.int8 if is_signed else wide_dtype(device))
    pieces = Pieces.of(members, device)
    if size:
        return Chunk(pieces, size, torch.empty(0, dtype=torch.int64, device=device), multiples, None)
    groups = compressed(groups)
    return Chunk(pieces, 0, groups.to(device), multiples, Sums.of(groups, device, in_blocks=layout.double))
