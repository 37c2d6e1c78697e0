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

from tieopt.numbers.index import Index, Run, consecutive, in_one_order, sorted_members
from tieopt.numbers.reduction import Reduction, Workspace, group_means, pin_, projected, rounded, write_values
from tieopt.tensors import bits, column, in_memory, wide_dtype
from tieopt.ties.slices import FREE, Slices


class Folded(NamedTuple):
    """Which of the slices of a tensor are kept, counted as its labels are.

    Attributes:
        kept: the slice that each row of the compact tensor is, int64, shape ``[n]``.
        groups: how many of them stand for groups.
        rows: for each slice the row that it is a multiple of, counted through all compact tensors; -1 for a pinned
            one; int64, shape ``[labels]``.
        scale: what multiple of its row each slice is, float64, shape ``[labels]``.
    """

    kept: Tensor
    groups: int
    rows: Tensor
    scale: Tensor


def folded(slices: Sequence[Slices]) -> tuple[Folded, ...]:
    """What is kept of each of several tensors; on the CPU."""
    members, pins = sorted_members(slices, [_steps(each) for each in slices])
    sizes = torch.bincount(members.group)
    leads = members.at(sizes.cumsum(0) - sizes)
    # The lead is a positive multiple: which sign a group is written with makes no difference.
    scale = members.scale * leads.scale.sign().index_select(0, members.group)
    members = members._replace(scale=scale)
    row_of = torch.empty_like(leads.group)
    parts, before = [], 0
    for part, each in enumerate(slices):
        home = leads.where(leads.part == part)
        free = torch.ones(each.labels.numel(), dtype=torch.bool, device="cpu")
        for own in (members, pins):
            free.index_fill_(0, own.where(own.part == part).position, False)
        kept = torch.cat([home.position, free.nonzero().squeeze(1)])
        row_of[home.group] = before + torch.arange(len(home.group), device="cpu")
        rows = torch.full((len(free),), FREE, device="cpu")
        rows[kept] = before + torch.arange(len(kept), device="cpu")
        parts.append(Folded(kept, len(home.group), rows, torch.ones(len(free), dtype=torch.float64, device="cpu")))
        before += len(kept)
    for part, whole in enumerate(parts):
        own = members.where(members.part == part)
        whole.rows.index_copy_(0, own.position, row_of.index_select(0, own.group))
        whole.scale.index_copy_(0, own.position, own.scale)
    return tuple(parts)


def _steps(slices: Slices) -> tuple[int, ...]:
    """Steps with which the slices are counted in the order of their labels."""
    steps = [1]
    for size in reversed(slices.labels.shape[1:]):
        steps.append(steps[-1] * size)
    return tuple(reversed(steps))


class _Home(NamedTuple):
    """Groups of a run that stand in one compact tensor.

    Attributes:
        part: the number of the tensor.
        slots: which groups of the run.
        place: their rows in the compact tensor.
    """

    part: int
    slots: Tensor | slice
    place: slice


@dataclass(frozen=True, eq=False)
class Folding:
    """Folds tensors of one layout on one device, and unfolds them; compiled, so that a step only runs through it.

    Attributes:
        index: the members of all groups.
        kept: for each tensor the rows that its compact one consists of, int64, shape ``[n]``.
        groups: how many of these are of groups.
        homes: for each run of the index where its groups stand.
        scales: for each run what multiple of the shared value the lead is; None if it is the value itself.
        places: for each tensor the row of its compact one that each row is; None if for some there is no such row, or
            it is a multiple, or one that stands elsewhere.
    """

    index: Index
    kept: tuple[Tensor, ...]
    groups: tuple[int, ...]
    homes: tuple[tuple[_Home, ...], ...]
    scales: tuple[Tensor | None, ...]
    places: tuple[Tensor, ...] | None

    @classmethod
    @torch.inference_mode(False)
    def compile(cls, index: Index, parts: Sequence[Folded]) -> Folding:
        """Compiles a folding for tensors of one layout.

        Args:
            index: of the tensors.
            parts: what is kept of each, as :func:`folded` says.
        """
        slices, device = index.slices, index.layout.device
        positions = [each.positions(steps).flatten() for each, steps in zip(slices, index.layout.steps, strict=True)]
        kept = tuple(own[part.kept].to(device) for own, part in zip(positions, parts, strict=True))
        ends = [0] * len(slices)
        homes, scales = [], []
        for run in index.runs:
            own = []
            for part, _, slots in run.leads:
                start, ends[part] = ends[part], ends[part] + len(slots)
                own.append(_Home(part, consecutive(slots), slice(start, ends[part])))
            homes.append(tuple(own))
            scales.append(_lead_scales(run, own, parts, device))
        places = _places(parts, positions, device)
        return cls(index, kept, tuple(part.groups for part in parts), tuple(homes), tuple(scales), places)

    def rows(self, tensors: Sequence[Tensor], compacts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The rows of tensors and of their compact ones, in one order of what is within them."""
        slices = self.index.slices
        rows = [each.rows(in_memory(tensor)) for each, tensor in zip(slices, tensors, strict=True)]
        for each, compact in zip(slices, compacts, strict=True):
            rows.append(compact.movedim(each.dim, 0) if each.dim and each.labels.dim() == 1 else compact)
        rows = in_one_order(rows)
        return rows[: len(slices)], rows[len(slices) :]


def _places(parts: Sequence[Folded], positions: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...] | None:
    places, before = [], 0
    for part, own in zip(parts, positions, strict=True):
        rows, count = part.rows - before, len(part.kept)
        before += count
        rows[part.rows == FREE] = 0  # Pinned ones are written over afterwards.
        here = count > 0 and int(rows.min()) >= 0 and int(rows.max()) < count
        # Where slices of several dimensions are walked with gaps, not every row is one.
        if not here or int(own.max()) + 1 != len(own) or not bool((part.scale == 1).all()):
            return None
        by_position = torch.empty_like(rows).index_put_((own,), rows)
        places.append(by_position.to(device, torch.int32 if count < 2**31 else torch.int64))
    return tuple(places)


def compact_slices(slices: Slices) -> Slices:
    """How the rows of a compact tensor are sliced."""
    return Slices(slices.labels.flatten(), dim=slices.dim if slices.labels.dim() == 1 else 0)


def compact_like(slices: Slices, tensor: Tensor, count: int) -> Tensor:
    """An uninitialised compact tensor of so many rows, in the order of memory that a tensor has."""
    shape, strides = list(slices.slice_shape(tensor)), list(tensor.movedim(slices.dim, 0).stride())
    if slices.labels.dim() > 1:
        # They become the first dimension. That of a contiguous tensor is to be contiguous as well: LBFGS needs it.
        strides[: slices.labels.dim()] = [max(strides) + 1]
    dim = compact_slices(slices).dim
    shape.insert(dim, count)
    strides.insert(dim, strides.pop(0))
    order = sorted(range(len(shape)), key=strides.__getitem__, reverse=True)
    return torch.empty_permuted(shape, order, dtype=tensor.dtype, device=tensor.device)


def _lead_scales(run: Run, homes: Sequence[_Home], parts: Sequence[Folded], device: torch.device) -> Tensor | None:
    scales = torch.empty(len(run.norms), dtype=torch.float64, device="cpu")
    for home in homes:
        slots = home.slots if isinstance(home.slots, slice) else home.slots.cpu()
        scales[slots] = parts[home.part].scale[parts[home.part].kept[home.place]]
    return None if bool((scales == 1).all()) else scales.to(device, wide_dtype(device))


@torch.no_grad()
def fold_(tensors: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding, workspace: Workspace) -> None:
    """Writes to compact tensors what the leads and the free slices of tensors are.

    Args:
        tensors: tied ones.
        compacts: to write to.
        folding: of the tensors.
        workspace: buffers to work in.
    """
    rows, compact_rows = folding.rows(tensors, compacts)
    for own, kept, compact in zip(rows, folding.kept, compact_rows, strict=True):
        torch.index_select(bits(own), 0, kept, out=bits(compact))
    for homes, scales in zip(folding.homes, folding.scales, strict=True):
        if scales is not None:
            for home in homes:
                compact = compact_rows[home.part][home.place]
                # torch promotes no 8-bit floats.
                values = compact.to(scales.dtype) / column(scales[home.slots], compact)
                compact.copy_(rounded(values, compact.dtype))


@torch.no_grad()
def fold_gradients_(
    grads: Sequence[Tensor],
    compacts: Sequence[Tensor],
    folding: Folding,
    workspace: Workspace,
    reduction: Reduction,
) -> None:
    """Writes the gradients of the shared values and of the free slices to compact tensors.

    Args:
        grads: dense gradients of the members.
        compacts: to write to.
        folding: of the gradients.
        workspace: buffers to work in.
        reduction: ``"mean"`` or ``"sum"``.
    """
    rows, compact_rows = folding.rows(grads, compacts)
    for run, homes, scales in zip(folding.index.runs, folding.homes, folding.scales, strict=True):
        values = rounded(group_means(rows, run, workspace), rows[0].dtype)
        if reduction == "sum":
            # Of the mean as it is stored, so that tying the gradients before changes nothing.
            values = values.to(wide_dtype(values.device)) * column(run.counts, values)
        if scales is not None:
            values = values.to(scales.dtype) / column(scales, values)
        targets = [compact_rows[home.part][home.place] for home in homes]
        values = rounded(values, targets[0].dtype)
        torch._foreach_copy_(targets, [values[home.slots] for home in homes])
    fold_free_gradients_(grads, compacts, folding)


@torch.no_grad()
def fold_free_gradients_(grads: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding) -> None:
    """Writes the gradients of the free slices alone; see :func:`fold_gradients_`."""
    rows, compact_rows = folding.rows(grads, compacts)
    for own, kept, groups, compact in zip(rows, folding.kept, folding.groups, compact_rows, strict=True):
        if groups < len(kept) and own.dtype == compact.dtype:
            torch.index_select(bits(own), 0, kept[groups:], out=bits(compact[groups:]))
        elif groups < len(kept):
            # With `param.grad_dtype` a gradient may be of another dtype.
            compact[groups:].copy_(own.index_select(0, kept[groups:]))


def folded_sparse(grad: Tensor, compact: Tensor, folding: Folding, reduction: Reduction) -> Tensor:
    """The compact one of a sparse COO gradient of a tensor that is tied by rows, sparse as well."""
    (tied,) = projected([grad.detach()], lambda _: folding.index, reduction)
    kept = folding.kept[0]
    row_of = torch.full((len(grad),), FREE, device=kept.device).index_put_(
        (kept,), torch.arange(len(kept), device=kept.device)
    )
    indices, values = tied._indices(), tied._values()
    rows = row_of[indices[0]]
    chosen = rows >= 0
    rows, values = rows[chosen], values[chosen]
    scales = torch.ones(len(kept), dtype=wide_dtype(kept.device), device=kept.device)
    for homes, own in zip(folding.homes, folding.scales, strict=True):
        if own is not None:
            for home in homes:
                scales[home.place] = own[home.slots]
    values = rounded(values / column(scales[rows], values), values.dtype)
    indices = torch.cat([rows[None], indices[1:, chosen]])
    return torch.sparse_coo_tensor(indices, values, compact.shape, check_invariants=False)


@torch.no_grad()
def unfold_(tensors: Sequence[Tensor], compacts: Sequence[Tensor], folding: Folding, workspace: Workspace) -> None:
    """Writes to tied tensors what compact ones say; the inverse of :func:`fold_`.

    Args:
        tensors: to write to.
        compacts: the shared values and the free slices.
        folding: of the tensors.
        workspace: buffers to work in.
    """
    rows, compact_rows = folding.rows(tensors, compacts)
    if folding.places is not None:
        for own, places, compact in zip(rows, folding.places, compact_rows, strict=True):
            torch.index_select(bits(compact), 0, places, out=bits(own))
    else:
        for run, homes, scales in zip(folding.index.runs, folding.homes, folding.scales, strict=True):
            values = workspace.take("values", (len(run.norms), *rows[0].shape[1:]), rows[0].dtype, rows[0].device)
            for home in homes:
                values[home.slots] = _leads(rows, compact_rows, home, scales, folding)
            write_values(rows, run, values, workspace)
        for own, kept, groups, compact in zip(rows, folding.kept, folding.groups, compact_rows, strict=True):
            bits(own).index_copy_(0, kept[groups:], bits(compact[groups:]))
    pin_(rows, folding.index)


def _leads(
    rows: list[Tensor], compact_rows: list[Tensor], home: _Home, scales: Tensor | None, folding: Folding
) -> Tensor:
    """What the leads are; where the shared value is what :func:`fold_` made of one, that one, bit for bit."""
    values = compact_rows[home.part][home.place]
    if scales is None:
        return values
    own = column(scales[home.slots], values)
    kept = folding.kept[home.part][home.place]
    leads = bits(rows[home.part])[kept].view(values.dtype).to(own.dtype)
    wide = values.to(own.dtype)
    folded_again = rounded(leads / own, values.dtype).to(own.dtype)
    return rounded(torch.where(folded_again == wide, leads, wide * own), values.dtype)
