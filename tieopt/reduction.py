r"""The numbers: group means, in place, dense and sparse, in any precision.

All members of a group are replaced by their mean: the orthogonal projection :math:`P` onto the tied
tensors. If they are equal, they must come out as they went in, bit for bit, so that tying what is tied
is no change. A plain mean rounds. There are two ways out:

- Types of up to 32 bits are added up in float64, where the sum of equal members is exact.
- For float64 there is no wider type. There the mean is computed around an estimate :math:`p`, first the
  first member and then the mean around that,

  .. math:: m = p + \frac{1}{K} \sum_{i=1}^{K} (w_i - p)

  and all differences of equal members are zero.

Only functions of tensors stand here. They run through an :class:`~tieopt.index.Index`, gather a piece
of it into a kept workspace, add it up with ``scatter_reduce`` and write it back: no Python per group
and no memory that grows with the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tieopt.index import Index, Piece, Run, wide_dtype
from tieopt.slices import Slices, numbered
from tieopt.ties import check_writable, slices_for

Reduction = Literal["mean", "sum"]


class Workspace:
    """Buffers that are kept from call to call, because allocation costs more than the arithmetic.

    They are as large as the largest piece of an index, whatever the size of the tied tensors. A
    workspace carries nothing from one call to the next: its copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, valid until the same name is taken again."""
        entries = torch.Size(shape).numel()
        buffer = self._buffers.get((name, dtype, device))
        if buffer is None or buffer.numel() < entries:
            # Outside inference mode, where a buffer could not be written to any more afterwards.
            with torch.inference_mode(False):
                buffer = self._buffers[name, dtype, device] = torch.empty(entries, dtype=dtype, device=device)
        return buffer[:entries].view(shape)

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()


def tie_(tensor: Tensor, groups: Any, *, dim: int = 0, scale: Any = None) -> Tensor:
    r"""Replaces the members of each group by their mean, in place.

    Idempotent bit for bit; free slices are not touched. Not recorded by autograd, as the functions of
    ``torch.nn.init``. With scales :math:`s` a member becomes :math:`s_i w_0`, where
    :math:`w_0 = \sum_i s_i w_i / \sum_i s_i^2`: the orthogonal projection.

    Args:
        tensor: any floating or complex dtype, any memory layout.
        groups: a list of lists of indices along ``dim``, or integer labels with -1 for free slices, as for
            :class:`~tieopt.Tie`.
        dim: the dimension along which the slices lie.
        scale: what multiple of its group's shared value each slice is, as for :class:`~tieopt.Tie`.

    Returns:
        ``tensor``.

    Raises:
        TypeError, IndexError, ValueError: ``groups``, ``dim`` or ``scale`` do not fit, as for
            :class:`~tieopt.Tie`. Nothing is written then.

    Example:
        >>> import torch
        >>> from tieopt import is_tied, tie_
        >>> weight = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 6.0]])
        >>> tie_(weight, [[1, 2]])
        tensor([[0., 0.],
                [2., 4.],
                [2., 4.]])
        >>> is_tied(weight, [[1, 2]])
        True
        >>> tie_(torch.tensor([1.0, -3.0, 5.0]), [[0, 1, 2]], scale=torch.tensor([1.0, -1.0, 0.0]))
        tensor([ 2., -2.,  0.])
    """
    slices = numbered([slices_for(tensor, groups, dim, scale, "the tensor")])
    check_writable(tensor, "the tensor")
    project_([tensor], Index.compile(slices, [tensor]), Workspace())
    return tensor


def is_tied(tensor: Tensor, groups: Any, *, dim: int = 0, scale: Any = None) -> bool:
    """Whether all the members of each group are equal, exactly; with scales, what :func:`tie_` would write.

    Equal means ``==`` as in :func:`torch.equal`: a group that holds a NaN is not tied.

    Args:
        tensor: as for :func:`tie_`.
        groups: as for :func:`tie_`.
        dim: as for :func:`tie_`.
        scale: as for :func:`tie_`.

    Raises:
        TypeError, IndexError, ValueError: as for :func:`tie_`.

    Example:
        >>> import torch
        >>> from tieopt import is_tied
        >>> is_tied(torch.tensor([1.0, 2.0, 1.0]), [[0, 2]])
        True
        >>> is_tied(torch.tensor([1.0, 2.0, 1.0]), [[0, 1]])
        False
    """
    slices = numbered([slices_for(tensor, groups, dim, scale, "the tensor")])
    return tied([tensor.detach()], Index.compile(slices, [tensor]), Workspace())


def tied(tensors: Sequence[Tensor], index: Index, workspace: Workspace) -> bool:
    """Whether dense tensors are tied, as :func:`is_tied`."""
    rows = index.rows(tensors)
    return all(
        torch.equal(
            _gathered(rows[piece.part], piece.members, workspace, "members"),
            _expected(leads, piece, rows[0].dtype, workspace),
        )
        for run in index.runs
        for leads in [_leads(rows, run, workspace)]
        for piece in run.pieces
    ) and all(
        bool((_gathered(rows[part], pins, workspace, "members") == 0).all()) for part, pins in index.pinned.items()
    )


@torch.no_grad()
def lead_(tensors: Sequence[Tensor], index: Index, workspace: Workspace) -> None:
    """Writes to all members of each group what its lead says they are.

    Args:
        tensors: as for :func:`project_`.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
    """
    rows = index.rows(tensors)
    for run in index.runs:
        _write(rows, run, _leads(rows, run, workspace).to(rows[0].dtype), workspace)
    _pin(rows, index)


@torch.no_grad()
def project_(tensors: Sequence[Tensor], index: Index, workspace: Workspace, reduction: Reduction = "mean") -> None:
    """Writes to all members of each group their mean, or their sum; with scales, multiples of it.

    The sum is the size of the group (with scales, the sum of their squares) times the mean *as it is
    stored*, so that projecting to the mean first changes nothing.

    Args:
        tensors: those that the index is for: dense, no two entries in one memory location.
        index: which slices to tie.
        workspace: buffers to work in.
        reduction: ``"mean"`` or ``"sum"``.
    """
    rows = index.rows(tensors)
    for run in index.runs:
        values = _means(rows, run, workspace).to(rows[0].dtype)
        if reduction == "sum":
            values = (values.to(_wide(values)) * _column(run.counts, values)).to(values.dtype)
        _write(rows, run, values, workspace)
    _pin(rows, index)


@torch.no_grad()
def relax_(tensors: Sequence[Tensor], index: Index, workspace: Workspace, strength: float) -> None:
    """Moves all members towards the mean of their group, and what is pinned towards zero.

    Args:
        tensors: as for :func:`project_`.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
        strength: how far, from 0, not at all, to 1, as :func:`project_` but for the rounding.
    """
    rows = index.rows(tensors)

    def move(part: int, positions: Tensor, members: Tensor, goal: Tensor) -> None:
        # Equal infinities have no difference.
        moved = torch.where(members == goal, members, members.lerp(goal, strength)).to(rows[part].dtype)
        _bits(rows[part]).index_copy_(0, positions, _bits(moved))

    for run in index.runs:
        means = _means(rows, run, workspace)
        for piece in run.pieces:
            members = _gathered(rows[piece.part], piece.members, workspace, "members")
            move(piece.part, piece.members, members, _expected(means, piece, rows[0].dtype, workspace))
    for part, pins in index.pinned.items():
        members = _gathered(rows[part], pins, workspace, "members")
        move(part, pins, members, torch.zeros_like(members))


@torch.no_grad()
def divide_(tensors: Sequence[Tensor], index: Index, workspace: Workspace) -> None:
    """From the sum back to the mean.

    Args:
        tensors: as for :func:`project_`, and projected to the sum.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
    """
    rows = index.rows(tensors)
    for run in index.runs:
        sums = _leads(rows, run, workspace)
        _write(rows, run, (sums / _column(run.counts, sums)).to(rows[0].dtype), workspace)


class _Projection(torch.autograd.Function):
    """``project_`` out of place; linear and symmetric, also to the sum, so it is its own backward."""

    @staticmethod
    def forward(ctx: Any, index: Index, reduction: Reduction, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.index, ctx.reduction = index, reduction
        results = tuple(tensor.clone() for tensor in tensors)
        project_(results, index, Workspace(), reduction)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *projected(grads, ctx.index, ctx.reduction)


def projected(tensors: Sequence[Tensor], index: Index, reduction: Reduction = "mean") -> tuple[Tensor, ...]:
    """The projection of dense tensors, or of one sparse COO tensor by rows, out of place and differentiable."""
    if tensors[0].layout == torch.sparse_coo:
        return (_projected_sparse(tensors[0], index, reduction),)
    return _Projection.apply(index, reduction, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def _projected_sparse(tensor: Tensor, index: Index, reduction: Reduction) -> Tensor:
    """If any member of a group is stored, every member is, afterwards; other groups stay unstored.

    The members to be are laid out densely, group by group, the stored ones are added up in their places,
    the rest is zero, and the dense projection does the arithmetic. Free entries stay as they are, not even
    coalesced, because an optimizer may add them up in another order.
    """
    indices, values = _entries(tensor)
    group = index.group_of[indices[0]]
    tied = group >= 0
    if index.pinned:
        values = torch.where(_column(torch.isin(indices[0], index.pinned[0]), values), 0, values)

    # Sparse dimensions after the first say where in its slice an entry stands.
    widths = tensor.shape[1 : tensor.sparse_dim()]
    inner = indices.new_zeros(indices.shape[1])
    for position, width in zip(indices[1:], widths, strict=True):
        inner = inner * width + position
    touched, owner = torch.unique(torch.stack([group[tied], inner[tied]]), dim=1, return_inverse=True)
    sizes = index.sizes[touched[0]]
    starts = sizes.cumsum(0) - sizes

    labels = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    ranks = torch.arange(len(labels), device=sizes.device) - starts[labels]
    members = index.members.at(index.starts[touched[0][labels]] + ranks)
    columns = [touched[1][labels]]
    for width in reversed(widths):
        columns[:1] = [columns[0] // width, columns[0] % width]
    columns[0] = members.position

    places = starts[owner] + index.rank_of[indices[0][tied]]
    dense = values.new_zeros(len(labels), *values.shape[1:]).index_put((places,), values[tied], accumulate=True)
    slices = Slices(labels.cpu(), members.scale.cpu())
    (dense,) = projected([dense], Index.compile([slices], [dense]), reduction)
    return _sparse(
        torch.cat([indices[:, ~tied], torch.stack(columns)], dim=1), torch.cat([values[~tied], dense]), tensor
    )


def _entries(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse tensor; with a graph, only those of a coalesced one are part of it."""
    if tensor.requires_grad:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    return tensor._indices(), tensor._values()


def _sparse(indices: Tensor, values: Tensor, like: Tensor) -> Tensor:
    result = torch.sparse_coo_tensor(indices, values, like.shape, check_invariants=False)
    return result.coalesce() if like.is_coalesced() or like.requires_grad else result


@torch.no_grad()
def drift(tensors: Sequence[Tensor], index: Index, workspace: Workspace) -> float:
    """The largest distance of a member from what its group's mean makes of it, NaN if there is one.

    Args:
        tensors: as for :func:`project_`; of complex entries the modulus counts.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
    """
    rows = index.rows(tensors)
    distances = [rows[0].new_zeros((), dtype=_wide(rows[0]))]

    def measure(members: Tensor, expected: Tensor | float) -> None:
        # Equal infinities have no difference.
        distance = torch.where(members == expected, 0.0, members - expected)
        if tensors[0].is_complex():
            distance = torch.linalg.vector_norm(distance, dim=-1)
        if distance.numel():
            distances.append(distance.abs().max())

    for run in index.runs:
        means = _means(rows, run, workspace)
        for piece in run.pieces:
            members = _gathered(rows[piece.part], piece.members, workspace, "members")
            measure(members, _expected(means, piece, rows[0].dtype, workspace))
    for part, pins in index.pinned.items():
        measure(_gathered(rows[part], pins, workspace, "members"), 0.0)
    return float(torch.stack(distances).max())


def _means(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """The mean of each group, as the value of its lead; shape ``[g, ...]``, in the wide dtype."""
    wide = _wide(rows[0])
    if run.signed and wide == torch.float64 and rows[0].dtype != wide:
        totals = torch.full((len(run.norms), *rows[0].shape[1:]), -0.0, dtype=wide, device=rows[0].device)
        for piece in run.pieces:
            members = _gathered(rows[piece.part], piece.members, workspace, "members")
            _add_up(totals, piece, _times(members, piece))
        return totals.div_(_column(run.norms, totals))
    means = _leads(rows, run, workspace)
    # An estimate far from the mean costs digits; the mean around it is near.
    for _ in range(2):
        means = _means_around(means, rows, run, workspace)
    return means


def _means_around(estimates: Tensor, rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """The estimates, corrected by the mean difference of the members from them."""
    # The difference of two infinities is NaN, where their mean may well be infinite.
    pivots = torch.nan_to_num(estimates, nan=0.0, posinf=0.0, neginf=0.0)
    totals = torch.zeros_like(estimates)
    for piece in run.pieces:
        members = _gathered(rows[piece.part], piece.members, workspace, "members")
        differences = _expected(pivots, piece, rows[0].dtype, workspace)
        # Scaled by a power of two, so that no sum overflows where the mean is finite.
        differences.mul_(-run.scale).add_(members, alpha=run.scale)
        _add_up(totals, piece, _times(differences, piece))
    # Half the distance from the pivot, because the distance itself may overflow.
    halves = totals.div_(_column(run.norms * (2 * run.scale), totals))
    means = halves.add(pivots, alpha=0.5).mul_(2)
    # The mean of finite members is finite, whatever the last rounding says.
    largest = torch.finfo(means.dtype).max
    means = torch.where(halves.isfinite(), means.clamp(-largest, largest), means)
    # Adding a zero would turn -0.0 into 0.0.
    return torch.where(halves == 0, estimates, means)


def _expected(values: Tensor, piece: Piece, stored: torch.dtype, workspace: Workspace) -> Tensor:
    """What the members of a piece are if these are the values of their leads, in the dtype of the values.

    A multiple is rounded as it will be when it is stored: only then is tying idempotent.
    """
    spread = workspace.take("expected", (len(piece.slots), *values.shape[1:]), values.dtype, values.device)
    torch.index_select(_bits(values), 0, piece.slots, out=_bits(spread))
    if piece.multiples is None:
        return spread
    if values.dtype != _wide(values):
        return spread.copy_(_times(spread.to(_wide(spread)), piece))
    return _times(spread, piece) if stored == values.dtype else spread.copy_(_times(spread, piece).to(stored))


def _times(members: Tensor, piece: Piece) -> Tensor:
    """Members times their multiples, in place."""
    return members if piece.multiples is None else members.mul_(_column(piece.multiples, members))


def _add_up(totals: Tensor, piece: Piece, values: Tensor) -> None:
    """Adds the values of the members to the totals of their groups."""
    if piece.blocks is None:
        _scatter_add_(totals, piece.slots, values)
    else:
        # -0.0 is what adds nothing to any number; 0.0 would turn -0.0 into 0.0.
        partial = values.new_full((len(piece.block_slots), *values.shape[1:]), -0.0)
        _scatter_add_(partial, piece.blocks, values)
        _scatter_add_(totals, piece.block_slots, partial)


def _scatter_add_(totals: Tensor, slots: Tensor, values: Tensor) -> None:
    if totals.device.type == "cpu":
        totals.scatter_reduce_(0, _column(slots, values).expand_as(values), values, "sum")
    else:
        # On CUDA scatter_reduce adds with atomics, in an order that changes from run to run: replicas
        # of one model would drift apart. This sorts first and always adds in the same order.
        totals.index_put_((slots,), values, accumulate=True)


def _leads(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """The lead of each group, in the wide dtype."""
    if len(run.leads) == 1:
        part, members, _ = run.leads[0]
        return _gathered(rows[part], members, workspace, "leads")
    leads = workspace.take("leads", (len(run.norms), *rows[0].shape[1:]), _wide(rows[0]), rows[0].device)
    for part, members, slots in run.leads:
        leads.index_copy_(0, slots, _gathered(rows[part], members, workspace, "members"))
    return leads


def _gathered(rows: Tensor, positions: Tensor, workspace: Workspace, name: str) -> Tensor:
    """``rows[positions]`` in the wide dtype, in the buffer of that name."""
    shape, wide = (len(positions), *rows.shape[1:]), _wide(rows)
    stored = workspace.take(name, shape, rows.dtype, rows.device)
    torch.index_select(_bits(rows), 0, positions, out=_bits(stored))
    return stored if wide == rows.dtype else workspace.take(name, shape, wide, rows.device).copy_(stored)


def _write(rows: list[Tensor], run: Run, values: Tensor, workspace: Workspace) -> None:
    """Every member of a group gets the group's value."""
    for piece in run.pieces:
        expected = _expected(values, piece, values.dtype, workspace)
        _bits(rows[piece.part]).index_copy_(0, piece.members, _bits(expected))


def _pin(rows: list[Tensor], index: Index) -> None:
    """What is pinned is zero."""
    for part, pins in index.pinned.items():
        _bits(rows[part]).index_fill_(0, pins, 0)


def _bits(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes: torch moves those, but not them."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to add in: twice the digits and more, where there is one."""
    return wide_dtype(tensor.device)


def _column(vector: Tensor, like: Tensor) -> Tensor:
    """A vector over slices, shaped to broadcast against them."""
    return vector.view(-1, *[1] * (like.dim() - 1))
