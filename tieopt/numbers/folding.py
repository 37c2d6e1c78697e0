"""One row for each group and for each free slice: what is left of tied tensors without the repetitions.

A *compact* tensor has the shared values of groups first, sorted as an :class:`~tieopt.numbers.index.Index` sorts
groups, and then the free slices in their order. Where tensors are joined, a shared value is in the compact tensor of
the tensor that the group's lead is in, so that some compact tensors may have no rows. Pinned slices are in none.

With scales a compact tensor has the shared value itself; the lead is a positive multiple of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tieopt.numbers.index import MANY, Index, Pieces, Run, Views, compressed, consecutive, rows_of
from tieopt.numbers.members import members_of
from tieopt.numbers.reduction import (
    Workspace,
    group_means,
    pass_over_,
    pin_,
    times_counts,
    write_slices_,
    write_values,
)
from tieopt.numbers.rounding import rounded, signed_
from tieopt.numbers.views import Tile
from tieopt.tensors import bits, column, in_front, movable, real, wide_dtype
from tieopt.ties.options import Reduction
from tieopt.ties.slices import FREE, Slices, are_scaled, narrow


class CompactRows(NamedTuple):
    """The rows of the compact tensor of a tensor, and the row that each slice of the tensor is a multiple of.

    This answers which shared value a slice has. Slices are counted in the order of their labels.

    Attributes:
        kept: for each row of the compact tensor the slice that it is made of, int32 or int64, shape ``[n]``.
        groups: how many of the rows are shared values of groups; these come first, and then the free slices.
        rows: for each slice the row that it is a multiple of, counted through the compact tensors of all tensors; -1
            for a pinned slice; int32, or int64 if there are more, shape ``[labels]``.
        scale: for each slice its multiple of that row, shape ``[labels]``; float64, or int8 if all are 1 or -1.
        first: the number of the first row of this compact tensor, counted as in ``rows``.
    """

    kept: Tensor
    groups: int
    rows: Tensor
    scale: Tensor
    first: int


@torch.inference_mode(False)  # They are to be used outside as well.
def compact_rows_of(
    slices: Sequence[Slices], labels: Tensor | None = None, ties: Sequence[int] = ()
) -> tuple[CompactRows, ...]:
    """Return the rows of the compact tensors of several tensors; on the CPU.

    Args:
        slices: of each tensor. The same label is the same shared value, whichever tensor it is in.
        labels: as for :func:`~tieopt.numbers.members.members_of`.
        ties: how many of the tensors are of one tie, and then of the next one, through whose compact tensors alone rows
            are counted then.
    """
    members, pinned = members_of(slices, labels=labels)
    sizes = [labelled.labels.numel() for labelled in slices]
    ends = torch.tensor(sizes, device="cpu").cumsum(0)
    count, starts = sum(sizes), [0, *ends.tolist()[:-1]]
    firsts = members.firsts
    numbers, zeros = members.position, pinned.position
    if len(slices) > 1:
        # Slices are counted through all tensors.
        numbers, zeros = (torch.tensor(starts, device="cpu")[part.tensor] + part.position for part in (members, pinned))
    leads = numbers.index_select(0, firsts)
    is_free = torch.ones(count, dtype=torch.bool, device="cpu").index_fill_(0, numbers, False)
    kept = torch.cat([leads, is_free.index_fill_(0, zeros, False).nonzero().squeeze(1)])
    lengths, groups = [len(kept)], [len(leads)]
    if len(slices) > 1:
        owners = torch.bucketize(kept, ends, right=True)
        lengths, groups = (
            torch.bincount(part, minlength=len(slices)).tolist() for part in (owners, owners[: len(leads)])
        )
        kept = kept[owners.argsort(stable=True)]
    rows = torch.full((count,), FREE, dtype=torch.int64, device="cpu")
    rows.index_copy_(0, kept, torch.arange(len(kept), device="cpu"))
    rows.index_copy_(0, numbers, rows.index_select(0, leads).index_select(0, members.group))
    first_rows = list(accumulate(lengths, initial=0))[:-1]
    if len(ties) > 1:
        first_tensors = accumulate(ties, initial=0)
        # For each tensor, how many rows the compact tensors of the ties before have.
        before = [first_rows[first] for first, count in zip(first_tensors, ties, strict=False) for _ in range(count)]
        first_rows = list(map(int.__sub__, first_rows, before))
        of_slices, counts = (torch.tensor(numbers_of, device="cpu") for numbers_of in (before, sizes))
        rows = torch.where(rows == FREE, FREE, rows - of_slices.repeat_interleave(counts))
    scale = torch.ones((), dtype=torch.float64, device="cpu").expand(count)
    if are_scaled(slices):
        # The lead is a positive multiple, so that turning the signs of a whole group makes no difference.
        multiples = members.scale * members.scale[firsts].sign()[members.group]
        if bool((multiples.abs() == 1).all()):
            multiples = multiples.to(torch.int8)
        scale = torch.ones(count, dtype=multiples.dtype, device="cpu").index_copy_(0, numbers, multiples)
    kept_of = map(compressed, map(torch.sub, kept.split_with_sizes(lengths), starts))
    rows_of_slices = narrow(rows).split_with_sizes(sizes)
    return tuple(map(CompactRows, kept_of, groups, rows_of_slices, scale.split_with_sizes(sizes), first_rows))


# Numbers of rows, or what may be a stretch of them.
_Numbers = TypeVar("_Numbers", Tensor, Tensor | slice)

# Shared values of a run: the number of the tensor, the groups of the run, and the rows of the compact tensor.
_Shared = tuple[int, Tensor | slice, slice]


@dataclass(frozen=True, eq=False)
class Folding:
    """Folds tensors of one layout on one device, and unfolds them; compiled, so that a step only runs through it.

    Attributes:
        index: the members of all groups.
        slices: of the tensors, and then of the compact tensors.
        kept: for each compact tensor the rows of the tensor that it is made of, int32 or int64, shape ``[n]``.
        free: the last of these, which are free slices in no run.
        groups: how many the others are, which are leads in the runs.
        shared: for each run of the index its shared values, compact tensor by compact tensor.
        scales: for each run the multiples of the shared values that the leads are, before their offsets are added; None
            if all are 1.
        sources: for each tensor the row of its compact tensor that each row is a copy of, and the signs of the rows if
            not all are 1; None if a row has none, or is another multiple, or has it in the compact tensor of another
            tensor.
    """

    index: Index
    slices: tuple[Slices, ...]
    kept: tuple[Tensor, ...]
    free: tuple[Tensor, ...]
    groups: tuple[int, ...]
    shared: tuple[tuple[_Shared, ...], ...]
    scales: tuple[Tensor | None, ...]
    sources: tuple[tuple[Tensor, Tensor | None], ...] | None

    @classmethod
    @torch.inference_mode(False)
    def compile(cls, index: Index, compact: Sequence[CompactRows]) -> Folding:
        """Compile a folding for tensors of one layout.

        Args:
            index: of the tensors.
            compact: the rows of the compact tensors.
        """
        device, ends = index.layout.device, [0] * len(compact)
        is_scaled = are_scaled(index.slices)
        shared, scales = [], []
        for run in index.runs:
            values: list[_Shared] = []
            scale = torch.ones(len(run.norms), dtype=torch.float64, device="cpu")
            pieces = run.lead_members.pieces
            assert isinstance(pieces, Pieces)
            groups_of_tensor = consecutive(run.lead_members.group_of_each.cpu(), pieces.lengths)
            for number, count, groups in zip(pieces.tensors, pieces.lengths, groups_of_tensor, strict=True):
                rows = slice(ends[number], ends[number] + count)
                ends[number] = rows.stop
                if is_scaled:
                    scale[groups] = compact[number].scale[compact[number].kept[rows]].double()
                values.append((number, groups if isinstance(groups, slice) else groups.to(device), rows))
            shared.append(tuple(values))
            is_multiple = run.offsets is not None or not bool((scale == 1).all())
            scales.append(scale.to(device, wide_dtype(device)) if is_multiple else None)
        # Most slices are rows in their order, whose positions are their numbers.
        positions = [
            None if labelled.are_rows(steps) else labelled.positions(steps).flatten()
            for labelled, steps in zip(index.slices, index.layout.steps, strict=True)
        ]
        kept = tuple(
            [
                (rows.kept if at is None else compressed(at.index_select(0, rows.kept))).to(device)
                for at, rows in zip(positions, compact, strict=True)
            ]
        )
        sources = _sources(compact, positions, device) if all(run.offsets is None for run in index.runs) else None
        # Replaced as a whole, and not written to: another thread may be reading the old ones.
        index.runs = tuple(
            [_stored_once(run, of_run, kept, sources) for run, of_run in zip(index.runs, shared, strict=True)]
        )
        return cls(
            index,
            (*index.slices, *map(compact_slices, index.slices)),
            kept,
            tuple([rows[groups:] for rows, groups in zip(kept, ends, strict=True)]),
            tuple(ends),
            tuple(shared),
            tuple(scales),
            sources,
        )

    def rows(self, tensors: Sequence[Tensor], compacts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """View tensors and their compact tensors as rows, see :func:`~tieopt.numbers.index.rows_of`."""
        rows = rows_of(self.slices, [*tensors, *compacts])
        return rows[: len(self.kept)], rows[len(self.kept) :]


class _TileRows(NamedTuple):
    """The rows of the compact tensor that the slices of a tile are multiples of.

    Attributes:
        rows: their numbers, int32 or int64, shape ``[slices]``.
        signs: of the slices, int8, shape ``[slices]``; None if all are 1.
        pinned: which slices of the tile are zero, int64; None if no one is.
    """

    rows: Tensor
    signs: Tensor | None
    pinned: Tensor | None


@dataclass(frozen=True, eq=False)
class ViewFolding:
    """Folds tensors of a regular tie; all shared values are in the compact tensor of the first one.

    Slices are counted in the order of their labels.

    Attributes:
        index: the members of all groups.
        box: the shape of the slices if the compact tensor has those of the first tensor from the start of each
            dimension to some end, as half of a matrix that is mirrored; otherwise None.
        kept: the slices of the first tensor that the compact one is made of, int32 or int64, shape ``[n]``; None if
            they are a box.
        sources: for each tile where its values are in the compact tensor; nothing if they are a box.
    """

    index: Views
    box: tuple[int, ...] | None
    kept: Tensor | None
    sources: tuple[_TileRows, ...]

    @classmethod
    @torch.inference_mode(False)
    def compile(cls, index: Views, compact: CompactRows) -> ViewFolding:
        """Compile a folding for tensors of one layout.

        Args:
            index: of the tensors.
            compact: the rows of the first compact tensor.
        """
        device, shape, tiles = index.layout.device, index.slices[0].labels.shape, index.tiles
        leads, entries = index.leads_of(compact.kept), torch.arange(shape.numel(), device="cpu").view(shape)
        regions = [tile.views[0].region[: len(shape)] for tile in tiles]
        box = tuple([max(region[dim].stop for region in regions) for dim in range(len(shape))])
        if all(tile.orbits is None for tile in tiles) and torch.equal(leads, _corner(entries, box).flatten()):
            return cls(index, box, None, ())
        rows, scale = compact.rows.view(shape), compact.scale.view(shape)
        # Tiles of other entries of the same slices have the same rows.
        sources = {
            key: _tile_rows(rows[region].flatten(), scale[region].flatten(), device)
            for key, region in {str(region): region for region in regions}.items()
        }
        return cls(index, None, compressed(leads).to(device), tuple([sources[str(region)] for region in regions]))

    def fold_(self, tensors: Sequence[Tensor], compacts: Sequence[Tensor]) -> None:
        """See :func:`fold_`."""
        grid, compact = self.index.rows(tensors)[0], self._front(compacts[0])
        if self.box is None:
            self._select(grid, compact)
        else:
            self._boxed(compact).copy_(_corner(grid, self.box))

    def fold_gradients_(
        self, grads: Sequence[Tensor], compacts: Sequence[Tensor], workspace: Workspace, reduction: Reduction
    ) -> None:
        """See :func:`fold_gradients_`."""
        grids, compact = self.index.rows(grads), self._front(compacts[0])
        shape, device = grids[0].shape, compact.device
        grid = workspace["grid", shape, compact.dtype, device] if self.box is None else self._boxed(compact)
        for run, tile in zip(self.index.runs, self.index.tiles, strict=True):
            values = rounded(_group_gradients(grids, run, workspace, reduction), grid.dtype)
            tile.views[0].write([grid], values.view(*tile.shape, *values.shape[1:]))
        if self.box is None:
            self._select(grid, compact)

    def unfold_(self, tensors: Sequence[Tensor], compacts: Sequence[Tensor], workspace: Workspace) -> None:
        """See :func:`unfold_`."""
        grids, compact = self.index.rows(tensors), self._front(compacts[0])
        grid = None if self.box is None else self._boxed(compact)
        for number, tile in enumerate(self.index.tiles):
            if grid is None:
                values = self._spread(compact, tile, self.sources[number], workspace)
            else:
                values = grid[tile.views[0].region]
                if not values.is_contiguous():
                    values = workspace["leads", values.shape, values.dtype, values.device].copy_(values)
            tile.write_values(grids, values.view(-1, *values.shape[len(tile.shape) :]))

    def _spread(self, compact: Tensor, tile: Tile, source: _TileRows, workspace: Workspace) -> Tensor:
        """Return the multiples of the rows of the compact tensor that a tile has, in the shape of the tile."""
        depth = self.index.slices[0].labels.dim()
        part = compact[(slice(None), *tile.views[0].region[depth:])]
        shape = *tile.shape[:depth], *part.shape[1:]
        values = workspace["leads", shape, part.dtype, part.device]
        slices = values.flatten(0, depth - 1)
        torch.index_select(bits(part), 0, source.rows, out=bits(slices))
        if source.signs is not None:
            signed_(slices, source.signs)
        if source.pinned is not None:
            bits(slices).index_fill_(0, source.pinned, 0)
        return values

    def _select(self, grid: Tensor, compact: Tensor) -> None:
        assert self.kept is not None
        # Of one that is not contiguous this may be a copy.
        slices = grid.flatten(0, self.index.slices[0].labels.dim() - 1)
        rows, out = movable([slices, compact])
        torch.index_select(rows, 0, self.kept, out=out)

    def _boxed(self, compact: Tensor) -> Tensor:
        """View the rows of a compact tensor as the box that they are of the first tensor."""
        assert self.box is not None
        return compact.view(*self.box, *compact.shape[1:])

    def _front(self, compact: Tensor) -> Tensor:
        """View a compact tensor as real rows, their dimensions in their order."""
        return real(compact.detach()).movedim(compact_slices(self.index.slices[0]).dim, 0)


def _corner(grid: Tensor, shape: Sequence[int]) -> Tensor:
    """View the part of a grid from the start of each dimension to some end."""
    return grid[tuple(map(slice, shape))]


def _tile_rows(rows: Tensor, scale: Tensor, device: torch.device) -> _TileRows:
    pinned = (rows == FREE).nonzero().squeeze(1)
    signs = None if bool((scale == 1).all()) else scale.to(device, torch.int8)
    return _TileRows(rows.clamp(min=0).to(device), signs, pinned.to(device) if len(pinned) else None)


def _sources(
    compact: Sequence[CompactRows], positions: Sequence[Tensor | None], device: torch.device
) -> tuple[tuple[Tensor, Tensor | None], ...] | None:
    sources: list[tuple[Tensor, Tensor | None]] = []
    for (kept, _, all_rows, scale, first), at in zip(compact, positions, strict=True):
        if not len(kept):
            return None
        rows = all_rows - first if first else all_rows
        least, largest = map(int, rows.aminmax())
        if least < 0:
            is_pinned = all_rows == FREE
            # Pinned rows are overwritten afterwards; where most are pinned, that is no gain.
            rows = rows.masked_fill(is_pinned, 0)
            if int(rows.min()) < 0 or 2 * int(is_pinned.sum()) > len(rows):
                return None
        is_one = bool((scale == 1).all())
        # If the slices of several dimensions are rows with gaps, not every row is a slice.
        has_gaps = at is not None and int(at.max()) + 1 != len(at)
        if largest >= len(kept) or has_gaps or not (is_one or bool((scale.abs() == 1).all())):
            return None
        signs = None if is_one else scale.to(torch.int8)
        if at is not None:
            rows = torch.empty_like(rows).index_put_((at,), rows)
            signs = signs if signs is None else torch.empty_like(signs).index_put_((at,), signs)
        sources.append((rows.to(device), signs if signs is None else signs.to(device)))
    return tuple(sources)


def _stored_once(
    run: Run,
    shared: Sequence[_Shared],
    kept: Sequence[Tensor],
    sources: Sequence[tuple[Tensor, Tensor | None]] | None,
) -> Run:
    """Return a run that has no numbers of its own where its folding has the same."""
    leads, between, chunks = run.lead_members.pieces, run.between, []
    assert isinstance(leads, Pieces)
    rows = [_view_of(kept[number], part, own) for own, (number, _, part) in zip(leads.rows, shared, strict=True)]
    if between is not None:
        (number,), (free,), (count,) = between
        between = between._replace(rows=(_view_of(kept[number], slice(-count, None), free),))
    for chunk in run.chunks:
        assert isinstance(chunk.pieces, Pieces)
        (number, *others), (members, *_) = chunk.pieces.tensors, chunk.pieces.rows
        if sources is not None and not others and isinstance(members, slice):
            groups = _view_of(sources[number][0], members, chunk.groups)
            sums = chunk.sums
            if sums is not None and sums.groups is chunk.groups:
                sums = sums._replace(groups=groups)
            chunk = chunk._replace(groups=groups, sums=sums)
        chunks.append(chunk)
    lead_members = run.lead_members._replace(pieces=leads._replace(rows=tuple(rows)))
    return run._replace(lead_members=lead_members, between=between, chunks=tuple(chunks))


def _view_of(others: Tensor, part: slice, numbers: _Numbers) -> _Numbers:
    """Return a part of others if it has the same numbers, and many of them; otherwise the numbers."""
    if isinstance(numbers, Tensor) and len(numbers) >= MANY and numbers.dtype == others.dtype:
        return others[part] if torch.equal(numbers, others[part]) else numbers
    return numbers


def compact_slices(slices: Slices) -> Slices:
    """Return the slices of a compact tensor, which are its rows."""
    return Slices(slices.labels.flatten(), dim=slices.dim if slices.labels.dim() == 1 else 0)


def compact_like(slices: Slices, tensor: Tensor, count: int) -> Tensor:
    """Return an uninitialised compact tensor of ``count`` rows, its dimensions in the order that a tensor's have."""
    shape, strides = list(slices.slice_shape(tensor.shape)), list(in_front(tensor, slices.dim).stride())
    if slices.labels.dim() > 1:
        # They become the outermost dimension: LBFGS needs that what is compact of a contiguous tensor is contiguous.
        strides[: slices.labels.dim()] = [max(strides) + 1]
    dim = compact_slices(slices).dim
    shape.insert(dim, count)
    strides.insert(dim, strides.pop(0))
    order = sorted(range(len(shape)), key=strides.__getitem__, reverse=True)
    return torch.empty_permuted(shape, order, dtype=tensor.dtype, device=tensor.device)


def fold_(
    tensors: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding | ViewFolding, workspace: Workspace
) -> None:
    """Write the shared values and the free slices of tensors to compact tensors.

    Args:
        tensors: tied ones.
        compacts: to write to.
        folding: of the tensors.
        workspace: buffers to work in.
    """
    if isinstance(folding, ViewFolding):
        folding.fold_(tensors, compacts)
        return
    rows, compact_rows = folding.rows(tensors, compacts)
    for source, kept, compact in zip(movable(rows), folding.kept, movable(compact_rows), strict=True):
        torch.index_select(source, 0, kept, out=compact)
    for run, shared, scales in zip(folding.index.runs, folding.shared, folding.scales, strict=True):
        if scales is not None:
            for number, groups, rows_of_groups in shared:
                compact = compact_rows[number][rows_of_groups]
                offsets = None if run.offsets is None else run.offsets[groups]
                compact.copy_(_shared_values(compact, column(scales[groups], compact), offsets))


def fold_gradients_(
    grads: Sequence[Tensor],
    compacts: Sequence[Tensor],
    folding: Folding | ViewFolding,
    workspace: Workspace,
    reduction: Reduction,
) -> None:
    """Write the gradients of the shared values and of the free slices to compact tensors.

    Args:
        grads: dense gradients of the members.
        compacts: to write to.
        folding: of the gradients.
        workspace: buffers to work in.
        reduction: ``"mean"`` or ``"sum"``.
    """
    if isinstance(folding, ViewFolding):
        folding.fold_gradients_(grads, compacts, workspace, reduction)
        return
    rows, compact_rows = folding.rows(grads, compacts)
    for run, shared, scales in zip(folding.index.runs, folding.shared, folding.scales, strict=True):
        values = _group_gradients(rows, run, workspace, reduction)
        if scales is not None:
            values = values.to(scales.dtype) / column(scales, values)
        if values.dtype != compact_rows[0].dtype:
            values = rounded(values, compact_rows[0].dtype)
        if values.dtype == rows[0].dtype:
            pass_over_(values, rows, run, workspace)
        targets, sources = [], []
        for number, groups, kept in shared:
            targets.append(compact_rows[number][kept])
            sources.append(values[groups])
        torch._foreach_copy_(targets, sources)
    _fold_free_(rows, compact_rows, folding)


def _group_gradients(rows: list[Tensor], run: Run, workspace: Workspace, reduction: Reduction) -> Tensor:
    """Return the mean or the sum of the gradients of each group."""
    values = rounded(group_means(rows, run, workspace), rows[0].dtype)
    # Of the mean as it is stored, so that tying the gradients before changes nothing.
    return values if reduction == "mean" else times_counts(values, run)


def fold_free_gradients_(grads: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding) -> None:
    """Write the gradients of the free slices alone; see :func:`fold_gradients_`."""
    _fold_free_(*folding.rows(grads, compacts), folding)


def _fold_free_(rows: list[Tensor], compact_rows: list[Tensor], folding: Folding) -> None:
    # With `param.grad_dtype` gradients may be of another dtype.
    is_alike = rows[0].dtype == compact_rows[0].dtype
    if is_alike and rows[0].element_size() == 1:
        rows, compact_rows = movable(rows), movable(compact_rows)
    for source, free, groups, compact in zip(rows, folding.free, folding.groups, compact_rows, strict=True):
        if free.shape[0] and is_alike:
            torch.index_select(source, 0, free, out=compact[groups:])
        elif free.shape[0]:
            compact[groups:].copy_(source.index_select(0, free))


def unfold_(
    tensors: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding | ViewFolding, workspace: Workspace
) -> None:
    """Write the multiples of shared values, and the free slices, to tied tensors; the inverse of :func:`fold_`.

    Args:
        tensors: to write to.
        compacts: the shared values and the free slices.
        folding: of the tensors.
        workspace: buffers to work in.
    """
    if isinstance(folding, ViewFolding):
        folding.unfold_(tensors, compacts, workspace)
        return
    rows, compact_rows = folding.rows(tensors, compacts)
    moved, moved_compacts = movable(rows), movable(compact_rows)
    if folding.sources is not None:
        for row, target, (sources, signs), compact in zip(rows, moved, folding.sources, moved_compacts, strict=True):
            torch.index_select(compact, 0, sources, out=target)
            if signs is not None:
                signed_(row, signs)
    else:
        for run, shared, scales in zip(folding.index.runs, folding.shared, folding.scales, strict=True):
            values = workspace["values", (run.norms.shape[0], *rows[0].shape[1:]), rows[0].dtype, rows[0].device]
            for number, groups, kept in shared:
                leads = compact_rows[number][kept]
                if scales is not None:
                    before = moved[number].index_select(0, folding.kept[number][kept]).view(leads.dtype)
                    offsets = None if run.offsets is None else run.offsets[groups]
                    leads = _leads(leads, before, column(scales[groups], leads), offsets)
                values[groups] = leads
            write_values(rows, run, values, workspace)
        for target, free, count, compact in zip(moved, folding.free, folding.groups, moved_compacts, strict=True):
            write_slices_(target, free, compact[count:], workspace)
    if folding.index.pinned.tensors:
        pin_(rows, folding.index, workspace)


def _shared_values(leads: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the shared values that leads are multiples of, plus offsets."""
    # torch promotes no 8-bit floats.
    wide = leads.to(scales.dtype)
    return rounded((wide if offsets is None else wide - offsets) / scales, leads.dtype)


def _leads(values: Tensor, before: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Return leads, which are multiples of shared values; where :func:`fold_` made a value of a lead, that lead.

    Args:
        values: shared values.
        before: the leads as they are.
        scales: the multiples.
        offsets: what is added to these; None for nothing.
    """
    wide_values, wide_before = values.to(scales.dtype), before.to(scales.dtype)
    is_same = _shared_values(before, scales, offsets).to(scales.dtype) == wide_values
    # To add 0.0 would turn -0.0 into 0.0; to subtract it does not.
    leads = wide_values * scales if offsets is None else wide_values * scales - (0.0 - offsets)
    return rounded(torch.where(is_same, wide_before, leads), values.dtype)
