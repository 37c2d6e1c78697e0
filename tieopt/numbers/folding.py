"""One row for each group and for each free slice: what is left of tied tensors without the repetitions.

A *compact* tensor has the groups' shared values first, sorted as an :class:`~tieopt.numbers.index.Index` sorts groups,
and then the free slices in their order. Where tensors are joined, a group stands in the compact tensor of the
one that its lead is in, so that of some nothing may be left. What is pinned stands nowhere.

With scales a compact tensor has the shared value itself, of which the lead is a positive multiple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.numbers.index import Index, consecutive, rows_of, sorted_members
from tieopt.numbers.reduction import Reduction, Workspace, group_means, pin_, projected, rounded, write_values
from tieopt.tensors import column, movable, wide_dtype
from tieopt.ties.slices import FREE, Slices


class Folded(NamedTuple):
    """The rows of the compact tensor of a tensor, and which row each of its slices is a multiple of.

    Slices are counted in the order of their labels.

    Attributes:
        kept: the slice that each row of the compact tensor is, int64, shape ``[n]``.
        groups: how many of them are shared values of groups; these are the first.
        rows: for each slice the row that it is a multiple of, counted through all compact tensors; -1 for a pinned
            one; int64, shape ``[labels]``.
        scale: what multiple of its row each slice is, float64, shape ``[labels]``.
    """

    kept: Tensor
    groups: int
    rows: Tensor
    scale: Tensor


def folded(slices: Sequence[Slices]) -> tuple[Folded, ...]:
    """Return the rows of the compact tensors of several tensors; on the CPU.

    Args:
        slices: of each tensor. The same label is the same shared value, whichever tensor it is in.
    """
    members, pinned = sorted_members(slices)
    leads = members.leads
    # The lead is a positive multiple: which sign a group is written with makes no difference.
    members = members._replace(scale=members.scale * leads.scale.sign().index_select(0, members.group))
    row_of = torch.empty_like(leads.group)
    parts, before = [], 0
    for part, own in enumerate(slices):
        led = leads.where(leads.part == part)
        is_free = torch.ones(own.labels.numel(), dtype=torch.bool, device="cpu")
        for labelled in (members, pinned):
            is_free.index_fill_(0, labelled.where(labelled.part == part).position, False)
        kept = torch.cat([led.position, is_free.nonzero().squeeze(1)])
        row_of[led.group] = before + torch.arange(len(led.group), device="cpu")
        rows = torch.full((len(is_free),), FREE, device="cpu")
        rows[kept] = before + torch.arange(len(kept), device="cpu")
        parts.append(Folded(kept, len(led.group), rows, torch.ones(len(rows), dtype=torch.float64, device="cpu")))
        before += len(kept)
    for part, whole in enumerate(parts):
        here = members.where(members.part == part)
        whole.rows.index_copy_(0, here.position, row_of.index_select(0, here.group))
        whole.scale.index_copy_(0, here.position, here.scale)
    return tuple(parts)


class _Shared(NamedTuple):
    """Shared values of a run that stand together in a compact tensor.

    Attributes:
        part: the number of the tensor.
        groups: which groups of the run they are of.
        place: the rows of the compact tensor that they are.
    """

    part: int
    groups: Tensor | slice
    place: slice


@dataclass(frozen=True, eq=False)
class Folding:
    """Folds tensors of one layout on one device, and unfolds them; compiled, so that a step only runs through it.

    Attributes:
        index: the members of all groups.
        slices: of the tensors, and then of their compact ones.
        kept: for each tensor the rows that its compact one consists of, int64, shape ``[n]``.
        free: the last of these, which are no shared values of groups.
        groups: how many the others are.
        shared: for each run of the index where its shared values stand.
        scales: for each run what multiple of the shared value each lead is; None if it is the value itself.
        places: for each tensor the row of its compact one that each row is; None if for some there is no such row, or
            it is a multiple, or one that stands elsewhere.
    """

    index: Index
    slices: tuple[Slices, ...]
    kept: tuple[Tensor, ...]
    free: tuple[Tensor, ...]
    groups: tuple[int, ...]
    shared: tuple[tuple[_Shared, ...], ...]
    scales: tuple[Tensor | None, ...]
    places: tuple[Tensor, ...] | None

    @classmethod
    @torch.inference_mode(False)
    def compile(cls, index: Index, parts: Sequence[Folded]) -> Folding:
        """Compile a folding for tensors of one layout.

        Args:
            index: of the tensors.
            parts: the rows of their compact tensors.
        """
        slices, device = index.slices, index.layout.device
        positions = [own.positions(steps).flatten() for own, steps in zip(slices, index.layout.steps, strict=True)]
        kept = [own[part.kept].to(device) for own, part in zip(positions, parts, strict=True)]
        groups = [part.groups for part in parts]
        ends = [0] * len(slices)
        shared, scales = [], []
        for run in index.runs:
            values, scale = [], torch.empty(len(run.norms), dtype=torch.float64, device="cpu")
            for part, _, own in run.leads:
                place = slice(ends[part], ends[part] + len(own))
                ends[part] = place.stop
                scale[own.cpu()] = parts[part].scale[parts[part].kept[place]]
                values.append(_Shared(part, consecutive(own), place))
            shared.append(tuple(values))
            scales.append(None if bool((scale == 1).all()) else scale.to(device, wide_dtype(device)))
        return cls(
            index,
            (*slices, *map(compact_slices, slices)),
            tuple(kept),
            tuple(own[count:] for own, count in zip(kept, groups, strict=True)),
            tuple(groups),
            tuple(shared),
            tuple(scales),
            _places(parts, positions, device),
        )

    def rows(self, tensors: Sequence[Tensor], compacts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """View tensors and their compact ones as rows, see :func:`~tieopt.numbers.index.rows_of`."""
        rows = rows_of(self.slices, [*tensors, *compacts])
        return rows[: len(self.kept)], rows[len(self.kept) :]


def _places(parts: Sequence[Folded], positions: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...] | None:
    places, before = [], 0
    for part, own in zip(parts, positions, strict=True):
        rows, count = part.rows - before, len(part.kept)
        before += count
        rows[part.rows == FREE] = 0  # Pinned ones are written over afterwards.
        is_here = count > 0 and int(rows.min()) >= 0 and int(rows.max()) < count
        # Where slices of several dimensions are walked with gaps, not every row is one.
        if not is_here or int(own.max()) + 1 != len(own) or not bool((part.scale == 1).all()):
            return None
        by_position = torch.empty_like(rows).index_put_((own,), rows)
        places.append(by_position.to(device, torch.int32 if count < 2**31 else torch.int64))
    return tuple(places)


def compact_slices(slices: Slices) -> Slices:
    """Return how the rows of a compact tensor are sliced."""
    return Slices(slices.labels.flatten(), dim=slices.dim if slices.labels.dim() == 1 else 0)


def compact_like(slices: Slices, tensor: Tensor, count: int) -> Tensor:
    """Return an uninitialised compact tensor of so many rows, in the order of memory that a tensor has."""
    shape, strides = list(slices.slice_shape(tensor)), list(tensor.movedim(slices.dim, 0).stride())
    if slices.labels.dim() > 1:
        # They become the first dimension. That of a contiguous tensor is to be contiguous as well: LBFGS needs it.
        strides[: slices.labels.dim()] = [max(strides) + 1]
    dim = compact_slices(slices).dim
    shape.insert(dim, count)
    strides.insert(dim, strides.pop(0))
    order = sorted(range(len(shape)), key=strides.__getitem__, reverse=True)
    return torch.empty_permuted(shape, order, dtype=tensor.dtype, device=tensor.device)


def fold_(tensors: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding, workspace: Workspace) -> None:
    """Write the shared values and the free slices of tensors to compact tensors.

    Args:
        tensors: tied ones.
        compacts: to write to.
        folding: of the tensors.
        workspace: buffers to work in.
    """
    rows, compact_rows = folding.rows(tensors, compacts)
    for own, kept, compact in zip(movable(rows), folding.kept, movable(compact_rows), strict=True):
        torch.index_select(own, 0, kept, out=compact)
    for shared, scales in zip(folding.shared, folding.scales, strict=True):
        if scales is not None:
            for part, groups, place in shared:
                compact = compact_rows[part][place]
                # torch promotes no 8-bit floats.
                values = compact.to(scales.dtype) / column(scales[groups], compact)
                compact.copy_(rounded(values, compact.dtype))


def fold_gradients_(
    grads: Sequence[Tensor],
    compacts: Sequence[Tensor],
    folding: Folding,
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
    rows, compact_rows = folding.rows(grads, compacts)
    for run, shared, scales in zip(folding.index.runs, folding.shared, folding.scales, strict=True):
        values = rounded(group_means(rows, run, workspace), rows[0].dtype)
        if reduction == "sum":
            # Of the mean as it is stored, so that tying the gradients before changes nothing.
            values = values.to(run.counts.dtype) * column(run.counts, values)
        if scales is not None:
            values = values.to(scales.dtype) / column(scales, values)
        if values.dtype != compact_rows[0].dtype:
            values = rounded(values, compact_rows[0].dtype)
        targets, sources = [], []
        for part, groups, place in shared:
            targets.append(compact_rows[part][place])
            sources.append(values[groups])
        torch._foreach_copy_(targets, sources)
    _fold_free_(rows, compact_rows, folding)


def fold_free_gradients_(grads: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding) -> None:
    """Write the gradients of the free slices alone; see :func:`fold_gradients_`."""
    _fold_free_(*folding.rows(grads, compacts), folding)


def _fold_free_(rows: list[Tensor], compact_rows: list[Tensor], folding: Folding) -> None:
    # With `param.grad_dtype` gradients may be of another dtype.
    is_alike = rows[0].dtype == compact_rows[0].dtype
    if is_alike and rows[0].element_size() == 1:
        rows, compact_rows = movable(rows), movable(compact_rows)
    for own, free, count, compact in zip(rows, folding.free, folding.groups, compact_rows, strict=True):
        if free.shape[0] and is_alike:
            torch.index_select(own, 0, free, out=compact[count:])
        elif free.shape[0]:
            compact[count:].copy_(own.index_select(0, free))


def folded_sparse(grad: Tensor, compact: Tensor, folding: Folding, reduction: Reduction) -> Tensor:
    """Return the compact one of a sparse COO gradient of a tensor that is tied by rows, sparse as well."""
    (tied,) = projected([grad.detach()], lambda _: folding.index, reduction)
    kept = folding.kept[0]
    row_of = torch.full((len(grad),), FREE, device=kept.device)
    row_of[kept] = torch.arange(len(kept), device=kept.device)
    indices, values = tied._indices(), tied._values()
    rows = row_of[indices[0]]
    chosen = rows >= 0
    rows, values = rows[chosen], values[chosen]
    scale = torch.ones(len(kept), dtype=wide_dtype(kept.device), device=kept.device)
    for shared, scales in zip(folding.shared, folding.scales, strict=True):
        if scales is not None:
            for _, groups, place in shared:
                scale[place] = scales[groups]
    values = rounded(values / column(scale[rows], values), values.dtype)
    indices = torch.cat([rows[None], indices[1:, chosen]])
    return torch.sparse_coo_tensor(indices, values, compact.shape, check_invariants=False)


def unfold_(tensors: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding, workspace: Workspace) -> None:
    """Write the multiples of shared values, and the free slices, to tied tensors; the inverse of :func:`fold_`.

    Args:
        tensors: to write to.
        compacts: the shared values and the free slices.
        folding: of the tensors.
        workspace: buffers to work in.
    """
    rows, compact_rows = folding.rows(tensors, compacts)
    moved, moved_compacts = movable(rows), movable(compact_rows)
    if folding.places is not None:
        for own, places, compact in zip(moved, folding.places, moved_compacts, strict=True):
            torch.index_select(compact, 0, places, out=own)
    else:
        for run, shared, scales in zip(folding.index.runs, folding.shared, folding.scales, strict=True):
            values = workspace["values", (run.norms.shape[0], *rows[0].shape[1:]), rows[0].dtype, rows[0].device]
            for part, groups, place in shared:
                leads = compact_rows[part][place]
                if scales is not None:
                    kept = moved[part].index_select(0, folding.kept[part][place]).view(leads.dtype)
                    leads = _leads(leads, kept, column(scales[groups], leads))
                values[groups] = leads
            write_values(rows, run, values, workspace)
        for own, free, count, compact in zip(moved, folding.free, folding.groups, moved_compacts, strict=True):
            own.index_copy_(0, free, compact[count:])
    if folding.index.pinned.parts:
        pin_(rows, folding.index)


def _leads(values: Tensor, leads: Tensor, scales: Tensor) -> Tensor:
    """Return leads, which are multiples of shared values; of values that :func:`fold_` made of leads, those.

    Args:
        values: shared values.
        leads: what the leads were before.
        scales: the multiples.
    """
    wide_values, wide_leads = values.to(scales.dtype), leads.to(scales.dtype)
    is_kept = rounded(wide_leads / scales, values.dtype).to(scales.dtype) == wide_values
    return rounded(torch.where(is_kept, wide_leads, wide_values * scales), values.dtype)
