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

from typing import Any

import torch
from torch import Tensor

from tieopt.index import Index, Piece, Run
from tieopt.ties import canonical_labels, check_writable


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


def tie_(tensor: Tensor, groups: Any) -> Tensor:
    r"""Replaces the members of each group by their mean, in place.

    Idempotent bit for bit; free slices are not touched. Not recorded by autograd, as the functions of
    ``torch.nn.init``.

    Args:
        tensor: shape ``[n, ...]``, any floating or complex dtype, any memory layout.
        groups: a list of lists of indices along dimension 0, or integer labels of shape ``[n]`` with
            -1 for free slices, as for :class:`~tieopt.Tie`.

    Returns:
        ``tensor``.

    Raises:
        TypeError, IndexError, ValueError: ``groups`` do not fit, as for :class:`~tieopt.Tie`. Nothing is
            written then.

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
    """
    index = _compiled(tensor, groups)
    check_writable(tensor, "the tensor")
    project_(tensor, index, Workspace())
    return tensor


def is_tied(tensor: Tensor, groups: Any) -> bool:
    """Whether all the members of each group are equal, exactly.

    Equal means ``==`` as in :func:`torch.equal`: a group that holds a NaN is not tied.

    Args:
        tensor: as for :func:`tie_`.
        groups: as for :func:`tie_`.

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
    index = _compiled(tensor, groups)
    rows = _rows(tensor.detach())
    workspace = Workspace()
    return all(
        torch.equal(
            _gathered(rows, piece.members, workspace, "members"),
            _gathered(rows, run.leads, workspace, "leads")[piece.slots],
        )
        for run in index.runs
        for piece in run.pieces
    )


def _compiled(tensor: Tensor, groups: Any) -> Index:
    labels = canonical_labels(groups, tensor, "the tensor")
    return Index.compile(labels, tensor.shape[1:].numel(), tensor.device)


@torch.no_grad()
def project_(tensor: Tensor, index: Index, workspace: Workspace, reduction: str = "mean") -> None:
    """Writes to all members of each group their mean, or their sum.

    The sum is the size of the group times the mean *as it is stored*, so that projecting to the mean
    first changes nothing.

    Args:
        tensor: dense, shape ``[index.length, ...]``, no two entries in one memory location.
        index: which slices to tie, on the device of the tensor.
        workspace: buffers to work in.
        reduction: ``"mean"`` or ``"sum"``.
    """
    rows = _rows(tensor)
    for run in index.runs:
        values = _means(rows, run, workspace).to(rows.dtype)
        if reduction == "sum":
            values = _multiplied(values, run.sizes)
        _write(rows, run, values, workspace)


@torch.no_grad()
def divide_(tensor: Tensor, index: Index, workspace: Workspace) -> None:
    """Divides the members of each group by its size: from the sum back to the mean.

    Args:
        tensor: as for :func:`project_`, and tied.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
    """
    rows = _rows(tensor)
    for run in index.runs:
        sums = _gathered(rows, run.leads, workspace, "leads")
        _write(rows, run, (sums / _column(run.sizes, sums)).to(rows.dtype), workspace)


class _Projection(torch.autograd.Function):
    """``project_`` out of place; linear and symmetric, so it is its own backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Index) -> Tensor:
        ctx.index = index
        result = tensor.clone()
        project_(result, index, Workspace())
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return projected(grads[0], ctx.index), None


def projected(tensor: Tensor, index: Index) -> Tensor:
    """The projection of a dense or sparse COO tensor, out of place and differentiable."""
    if tensor.layout == torch.sparse_coo:
        return _projected_sparse(tensor, index)
    return _Projection.apply(tensor, index)  # type: ignore[no-any-return, no-untyped-call]


def multiplied(tensor: Tensor, index: Index) -> Tensor:
    """Every member times the size of its group, out of place and differentiable: from mean to sum."""
    if tensor.layout == torch.sparse_coo:
        indices, values = _entries(tensor)
        return _sparse(indices, _multiplied(values, index.size_of[indices[0]]), tensor)
    return _multiplied(tensor, index.size_of)


def _multiplied(slices: Tensor, sizes: Tensor) -> Tensor:
    return (slices.to(_accumulation(slices)) * _column(sizes, slices)).to(slices.dtype)


def _projected_sparse(tensor: Tensor, index: Index) -> Tensor:
    """If any member of a group is stored, every member is, afterwards; other groups stay unstored.

    The members to be are laid out densely, group by group, the stored ones are added up in their places,
    the rest is zero, and the dense projection does the arithmetic. Free entries stay as they are, not even
    coalesced, because an optimizer may add them up in another order.
    """
    indices, values = _entries(tensor)
    group = index.group_of[indices[0]]
    tied = group >= 0

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
    columns = [touched[1][labels]]
    for width in reversed(widths):
        columns[:1] = [columns[0] // width, columns[0] % width]
    columns[0] = index.members[index.starts[touched[0][labels]] + ranks]

    places = starts[owner] + index.rank_of[indices[0][tied]]
    dense = values.new_zeros(len(labels), *values.shape[1:]).index_put((places,), values[tied], accumulate=True)
    dense = projected(dense, Index.compile(labels, values.shape[1:].numel(), labels.device))
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
def drift(tensor: Tensor, index: Index, workspace: Workspace) -> float:
    """The largest distance of a member from the mean of its group, NaN if there is one.

    Args:
        tensor: as for :func:`project_`; of complex entries the modulus counts.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
    """
    rows = _rows(tensor)
    distances = [rows.new_zeros((), dtype=_accumulation(rows))]
    for run in index.runs:
        means = _means(rows, run, workspace)
        for piece in run.pieces:
            members, mean = _gathered(rows, piece.members, workspace, "members"), means[piece.slots]
            # Equal infinities have no difference.
            distance = torch.where(members == mean, 0.0, members - mean)
            if tensor.is_complex():
                distance = torch.linalg.vector_norm(distance, dim=-1)
            if distance.numel():
                distances.append(distance.abs().max())
    return float(torch.stack(distances).max())


def _means(rows: Tensor, run: Run, workspace: Workspace) -> Tensor:
    """The mean of each group, shape ``[g, ...]``, in the dtype of the accumulation."""
    wide = _accumulation(rows)
    if wide == torch.float64 and rows.dtype != wide:
        totals = torch.full((len(run.leads), *rows.shape[1:]), -0.0, dtype=wide, device=rows.device)
        for piece in run.pieces:
            _add_up(totals, piece, _gathered(rows, piece.members, workspace, "members"))
        return totals.div_(_column(run.sizes, totals))
    means = _gathered(rows, run.leads, workspace, "leads")
    # An estimate far from the mean costs digits; the mean around it is near.
    for _ in range(2):
        means = _means_around(means, rows, run, workspace)
    return means


def _means_around(estimates: Tensor, rows: Tensor, run: Run, workspace: Workspace) -> Tensor:
    """The estimates, corrected by the mean difference of the members from them."""
    # The difference of two infinities is NaN, where their mean may well be infinite.
    pivots = torch.nan_to_num(estimates, nan=0.0, posinf=0.0, neginf=0.0)
    offsets = pivots * -run.scale
    totals = torch.zeros_like(estimates)
    for piece in run.pieces:
        members = _gathered(rows, piece.members, workspace, "members")
        differences = workspace.take("differences", members.shape, members.dtype, members.device)
        torch.index_select(offsets, 0, piece.slots, out=differences)
        # Scaled by a power of two, so that no sum overflows where the mean is finite.
        _add_up(totals, piece, differences.add_(members, alpha=run.scale))
    # Half the distance from the pivot, because the distance itself may overflow.
    halves = totals.div_(_column(run.sizes.to(totals.dtype) * (2 * run.scale), totals))
    means = halves.add(pivots, alpha=0.5).mul_(2)
    # The mean of finite members is finite, whatever the last rounding says.
    largest = torch.finfo(means.dtype).max
    means = torch.where(halves.isfinite(), means.clamp(-largest, largest), means)
    # Adding a zero would turn -0.0 into 0.0.
    return torch.where(halves == 0, estimates, means)


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


def _gathered(rows: Tensor, positions: Tensor, workspace: Workspace, name: str) -> Tensor:
    """``rows[positions]`` in the dtype of the accumulation, in the buffer of that name."""
    shape, wide = (len(positions), *rows.shape[1:]), _accumulation(rows)
    stored = workspace.take(name, shape, rows.dtype, rows.device)
    torch.index_select(_bits(rows), 0, positions, out=_bits(stored))
    return stored if wide == rows.dtype else workspace.take(name, shape, wide, rows.device).copy_(stored)


def _write(rows: Tensor, run: Run, values: Tensor, workspace: Workspace) -> None:
    """Every member of a group gets the group's value."""
    for piece in run.pieces:
        spread = workspace.take("members", (len(piece.slots), *values.shape[1:]), rows.dtype, rows.device)
        torch.index_select(_bits(values), 0, piece.slots, out=_bits(spread))
        _bits(rows).index_copy_(0, piece.members, _bits(spread))


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as real slices along dimension 0, their entries in the order of memory."""
    inner = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
    tensor = tensor.permute(0, *inner)
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor) if tensor.is_complex() else tensor


def _bits(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes: torch moves those, but not them."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _accumulation(tensor: Tensor) -> torch.dtype:
    """The dtype to add in: twice the digits and more, where there is one."""
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    return wide.to_complex() if tensor.is_complex() else wide


def _column(vector: Tensor, like: Tensor) -> Tensor:
    """A vector over slices, shaped to broadcast against them."""
    return vector.view(-1, *[1] * (like.dim() - 1))
