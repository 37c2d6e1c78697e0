r"""The numbers: group means, in place, dense and sparse, in any precision.

All members of a group are replaced by their mean: the orthogonal projection :math:`P` onto the tied
tensors. If they are equal, they must come out as they went in, bit for bit, so that tying what is tied
is no change. A plain mean rounds. There are two ways out:

- Types of up to 32 bits are added up in float64, where the sum of equal members is exact.
- For float64 there is no wider type. There the mean is computed around an estimate :math:`p`, first the
  first member and then the mean around that,

  .. math:: m = p + \frac{1}{K} \sum_{i=1}^{K} (w_i - p)

  and all differences of equal members are zero.

Only functions of tensors stand here. They run through an :class:`~tieopt.numbers.index.Index`, gather a piece
of it into a kept workspace, add it up with ``scatter_reduce`` and write it back: no Python per group
and no memory that grows with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tieopt.numbers.index import Index, Round, Run
from tieopt.tensors import bits, column, wide_dtype

Reduction = Literal["mean", "sum"]
IndexFor = Callable[[Sequence[Tensor]], Index]

# The bits of a float64 that numbers of 16 bits have no use for, but for whether they are zero.
_CUT_OFF = 2**40 - 1

# What gives the values of the leads of a run, shape ``[g, ...]``.
ValuesOf = Callable[[list[Tensor], Run, "Workspace"], Tensor]


class Workspace:
    """Buffers that are kept from call to call, because allocation costs more than the arithmetic.

    They are as large as the largest piece of an index, whatever the size of the tied tensors.
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


class Operation:
    """An operation on the members of groups: one of the functions below, with its options.

    Args:
        function: takes tensors, their index, and a workspace.
        stepped: whether it is for weights that a step has just written, see :func:`means_after_step`.
        **options: of the function.

    Attributes:
        needs_means: whether it has an option ``means_of``, what gives the means of groups that have members elsewhere.
    """

    def __init__(self, function: Callable[..., Any], *, stepped: bool = False, **options: Any) -> None:
        self.function = function
        self.stepped = stepped
        self.options = {**options, "means_of": means_after_step} if stepped else options
        self.needs_means = function not in (divide_, lead_)


def tied(tensors: Sequence[Tensor], index: Index, workspace: Workspace, means_of: ValuesOf | None = None) -> bool:
    """Whether dense tensors are what the leads of their groups say.

    Args:
        tensors: as for :func:`project_`.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
        means_of: what gives the values of leads that have members elsewhere, too; by default their own.
    """
    compared = _compared(index.rows(tensors), index, means_of or _leads, workspace)
    return all(torch.equal(members, expected) for _, _, members, expected in compared)


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
        write_values(rows, run, _leads(rows, run, workspace).to(rows[0].dtype), workspace)
    pin_(rows, index)


@torch.no_grad()
def project_(
    tensors: Sequence[Tensor],
    index: Index,
    workspace: Workspace,
    reduction: Reduction = "mean",
    means_of: ValuesOf | None = None,
) -> None:
    """Writes to all members of each group their mean, or their sum; with scales, multiples of it.

    The sum is the size of the group (with scales, the sum of their squares) times the mean *as it is
    stored*, so that projecting to the mean first changes nothing.

    Args:
        tensors: those that the index is for: dense, no two entries in one memory location.
        index: which slices to tie.
        workspace: buffers to work in.
        reduction: ``"mean"`` or ``"sum"``.
        means_of: what gives the means of groups that have members elsewhere, too; by default :func:`group_means`.
    """
    rows, means_of = index.rows(tensors), means_of or group_means
    for run in index.runs:
        values = rounded(means_of(rows, run, workspace), rows[0].dtype)
        if reduction == "sum":
            values = rounded(values.to(wide_dtype(values.device)) * column(run.counts, values), values.dtype)
        write_values(rows, run, values, workspace)
    pin_(rows, index)


@torch.no_grad()
def relax_(
    tensors: Sequence[Tensor], index: Index, workspace: Workspace, strength: float, means_of: ValuesOf | None = None
) -> None:
    """Moves all members towards the mean of their group, and what is pinned towards zero.

    Args:
        tensors: as for :func:`project_`.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
        strength: how far, from more than 0 to 1, which is as :func:`project_` but for the rounding.
        means_of: as for :func:`project_`.
    """
    rows = index.rows(tensors)
    for part, positions, members, expected in _compared(rows, index, means_of or group_means, workspace):
        # Equal infinities have no difference; and the difference of two large numbers may be infinite.
        moved = members * (1 - strength) + expected * strength
        moved = rounded(torch.where(members == expected, members, moved), rows[part].dtype)
        _put(rows[part], positions, moved)


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
        write_values(rows, run, rounded(sums / column(run.counts, sums), rows[0].dtype), workspace)


class _Projection(torch.autograd.Function):
    """``project_`` out of place; linear and symmetric, also to the sum, so it is its own backward."""

    @staticmethod
    def forward(
        ctx: Any, index_for: IndexFor, reduction: Reduction, which: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.arguments = index_for, reduction, which
        results = tuple(tensor.clone() for tensor in tensors)
        parts = [results[number] for number in which]
        project_(parts, index_for(parts), Workspace(), reduction)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        results: tuple[Tensor, ...] = _Projection.apply(*ctx.arguments, *grads)  # type: ignore[no-untyped-call]
        return None, None, None, *results


def projected(tensors: Sequence[Tensor], index_for: IndexFor, reduction: Reduction = "mean") -> tuple[Tensor, ...]:
    """The projection of dense tensors, or of one sparse COO tensor by rows, out of place and differentiable.

    Args:
        tensors: as for :func:`project_`; a tensor that occurs twice has one result, twice.
        index_for: returns the index for tensors of any layout.
        reduction: as for :func:`project_`.
    """
    if tensors[0].layout == torch.sparse_coo:
        return (_projected_sparse(tensors[0], index_for(tensors), reduction),)
    distinct = list({id(tensor): tensor for tensor in tensors}.values())
    which = tuple(next(n for n, one in enumerate(distinct) if one is tensor) for tensor in tensors)
    results = _Projection.apply(index_for, reduction, which, *distinct)  # type: ignore[no-untyped-call]
    return tuple(results[number] for number in which)


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
        values = torch.where(column(torch.isin(indices[0], index.pinned[0]), values), 0, values)

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
    laid_out = members._replace(position=torch.arange(len(labels), device=sizes.device), group=labels)
    (dense,) = projected([dense], partial(Index.of_groups, laid_out), reduction)
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
def drift(tensors: Sequence[Tensor], index: Index, workspace: Workspace, means_of: ValuesOf | None = None) -> float:
    """The largest distance of a member from what its group's mean makes of it, NaN if there is one.

    Args:
        tensors: as for :func:`project_`; of complex entries the modulus counts.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
        means_of: as for :func:`project_`.
    """
    rows = index.rows(tensors)
    distances = [rows[0].new_zeros((), dtype=wide_dtype(rows[0].device))]
    for _, _, members, expected in _compared(rows, index, means_of or group_means, workspace):
        # Equal infinities have no difference.
        distance = torch.where(members == expected, 0.0, members - expected)
        if tensors[0].is_complex():
            distance = torch.linalg.vector_norm(distance, dim=-1)
        if distance.numel():
            distances.append(distance.abs().max())
    return float(torch.stack(distances).max())


def _compared(
    rows: list[Tensor],
    index: Index,
    values_of: ValuesOf,
    workspace: Workspace,
) -> Iterator[tuple[int, Tensor | slice, Tensor, Tensor]]:
    """Piece by piece the number of a tensor, rows, what stands there, and what should by some value of the leads."""
    for run in index.runs:
        values = values_of(rows, run, workspace)
        for each in run.rounds:
            members = _widened(_members(rows, each, workspace), workspace)
            expected = _expected(values, each, rows[0].dtype, workspace)
            for piece, got, own in zip(each.pieces, _split(members, each), _split(expected, each), strict=True):
                yield piece.part, piece.members, got, own
    for part, pins in index.pinned.items():
        members = _widened(_gathered(rows[part], pins, workspace, "members"), workspace)
        yield part, pins, members, torch.zeros_like(members)


# --- what stands for a group ---


def group_means(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """The mean of each group, as the value of its lead; shape ``[g, ...]``, at least as wide as the rows."""
    wide = wide_dtype(rows[0].device)
    if run.signed and wide == torch.float64 and rows[0].dtype != wide:
        # Halves of 16 bits are not: there a sum may cancel to less than what float32 has lost of it.
        if run.rounds[0].size and rows[0].device.type == "cpu" and rows[0].dtype == torch.float32:
            means = _pairwise_means(rows, run.rounds[0], workspace)
            # An accelerator would have to be waited for to tell.
            if math.isfinite(means.sum().item()):
                return means
            # A sum may leave the range of float32; what has not stays as it is, whatever it is worked on with.
            exact = _sums(rows, run, workspace).div_(column(run.norms, rows[0]))
            return torch.where(means.isfinite(), means.to(exact.dtype), exact)
        return _sums(rows, run, workspace).div_(column(run.norms, rows[0]))
    if wide != rows[0].dtype and wide == torch.float64:
        return _scaled_means(rows, run, workspace)
    means = _leads(rows, run, workspace)
    # An estimate far from the mean costs digits; the mean around it is near.
    for _ in range(2):
        means = _means_around(means, rows, run, workspace)
    return means


def means_after_step(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """As :func:`group_means`, of weights that an optimizer has just written: of 16 bits or less, without a bias.

    An optimizer may round such weights at random, so that small updates add up on the average. If the members of a
    group went to two neighbouring numbers, the number nearest to their mean is the one to which most of them went, in
    every step: small updates are lost. A single member went to each of the two as often as the mean says. So where the
    lead is one of the two numbers next to the mean, it stands for the group.
    """
    means = group_means(rows, run, workspace)
    if is_narrow(rows[0].dtype):
        towards_leads_(means, _leads(rows, run, workspace), rows[0].dtype, workspace)
    return means


def is_narrow(stored: torch.dtype) -> bool:
    """Whether means of weights of this dtype depend on whether an optimizer has just written these."""
    return torch.finfo(stored).bits <= 16


def towards_leads_(means: Tensor, leads: Tensor, stored: torch.dtype, workspace: Workspace) -> None:
    """Replaces means that are to be stored by their leads, where these are one of the two stored numbers next to them.

    Args:
        means: in the wide dtype.
        leads: of the same groups, in the wide dtype.
        stored: the dtype that they are to be stored in.
        workspace: buffers to work in.
    """
    # To find out on an accelerator, one would have to wait for it.
    if means.device.type == "cpu" and torch.equal(means, leads):
        return

    def taken(name: str, dtype: torch.dtype, values: Tensor) -> Tensor:
        return workspace.take(name, values.shape, dtype, values.device).copy_(values)

    # Numbers of 16 bits, and what lies in the middle of two neighbours, are exact in float32.
    mean, lead = taken("mean", torch.float32, means), taken("lead", torch.float32, leads)
    nearest = taken("nearest", torch.float32, taken("rounded", stored, mean))
    # What lies in the middle of two numbers is rounded to one of them only if there is none between them.
    middle = torch.lerp(nearest, lead, 0.5, out=workspace.take("middle", mean.shape, mean.dtype, mean.device))
    middle.copy_(taken("rounded", stored, middle))
    are_neighbours = (middle == nearest).logical_or_(middle == lead)
    is_between = (nearest > mean).logical_xor_(lead > mean).logical_and_(nearest != mean)
    torch.where(are_neighbours.logical_and_(is_between), leads, means, out=means)


def _sums(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """The sum of each group, its members times 1 or -1; shape ``[g, ...]``, in float64."""
    shape, device = (len(run.norms), *rows[0].shape[1:]), rows[0].device
    # -0.0 is what adds nothing to any number; 0.0 would turn -0.0 into 0.0.
    totals = workspace.take("totals", shape, torch.float64, device).fill_(-0.0)
    for each in run.rounds:
        members = workspace.take("wide", (each.length, *shape[1:]), torch.float64, device)
        _add_up(totals, each, _times(members.copy_(_members(rows, each, workspace)), each))
    return totals


def _pairwise_means(rows: list[Tensor], each: Round, workspace: Workspace) -> Tensor:
    """The means of groups of one size, added up by pairs in float32 as long as their number is even.

    The sum of two equal numbers is exact, but not that of three: an odd number of sums is added up in float64. The
    error of pairwise summation grows like the logarithm of the size (Higham, section 4.2).
    """
    members, device = _members(rows, each, workspace), rows[0].device
    if each.multiples is not None:
        members = workspace.take("narrow", members.shape, torch.float32, device).copy_(members)
    size, groups = each.size, each.length // each.size
    sums = _times(members, each).view(groups, size, *members.shape[1:])
    names = "halves", "quarters"
    while size % 2 == 0:
        size //= 2
        halved = workspace.take(names[0], (groups, size, *sums.shape[2:]), torch.float32, device)
        sums, names = torch.add(sums[:, :size], sums[:, size:], out=halved), names[::-1]
    if size > 1:
        sums = workspace.take("odd", sums.shape, torch.float64, device).copy_(sums)
    # A single member may be in the rows themselves, which are not to be written.
    return _folded(sums).div_(each.size) if each.size > 1 else sums[:, 0]


def _folded(values: Tensor) -> Tensor:
    """The sums over the second dimension, in place, from sums of halves."""
    size = values.shape[1]
    while size > 1:
        size, odd = divmod(size, 2)
        values[:, :size].add_(values[:, size : 2 * size])
        if odd:
            values[:, 0].add_(values[:, 2 * size])
    return values[:, 0]


def _scaled_means(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """The leads of groups that are tied already, and of the others the mean, which multiples were rounded for."""
    leads = _leads(rows, run, workspace).clone()
    totals, distances = torch.zeros_like(leads), torch.zeros_like(leads)
    for each in run.rounds:
        members = workspace.take("wide", (each.length, *leads.shape[1:]), leads.dtype, leads.device)
        members.copy_(_members(rows, each, workspace))
        differences = _expected(leads, each, rows[0].dtype, workspace)
        # Equal infinities have no difference.
        differences.copy_(members != differences)
        _add_up(distances, each, differences)
        _add_up(totals, each, _times(members, each))
    means = totals.div_(column(run.norms, totals))
    # What is finite has a finite mean, but perhaps beyond the range of the lead.
    largest = torch.finfo(rows[0].dtype).max
    means = torch.where(means.isfinite(), means.clamp(-largest, largest), means)
    return torch.where(distances == 0, leads, means)


def _means_around(estimates: Tensor, rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """The estimates, corrected by the mean difference of the members from them."""
    # The difference of two infinities is NaN, where their mean may well be infinite.
    pivots = torch.nan_to_num(estimates, nan=0.0, posinf=0.0, neginf=0.0)
    totals = torch.zeros_like(estimates)
    for each in run.rounds:
        members = _widened(_members(rows, each, workspace), workspace)
        differences = _expected(pivots, each, rows[0].dtype, workspace)
        # Scaled by a power of two, so that no sum overflows where the mean is finite.
        differences.mul_(-run.scale).add_(members, alpha=run.scale)
        _add_up(totals, each, _times(differences, each))
    # Half the distance from the pivot, because the distance itself may overflow.
    halves = totals.div_(column(run.norms * (2 * run.scale), totals))
    means = halves.add(pivots, alpha=0.5).mul_(2)
    # The mean of finite members is finite, whatever the last rounding says.
    largest = torch.finfo(means.dtype).max
    means = torch.where(halves.isfinite(), means.clamp(-largest, largest), means)
    # Adding a zero would turn -0.0 into 0.0.
    return torch.where(halves == 0, estimates, means)


def _leads(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """The lead of each group, in the wide dtype."""
    if len(run.leads) == 1:
        part, members, _ = run.leads[0]
        return _widened(_gathered(rows[part], members, workspace, "leads"), workspace, "leads")
    shape, wide = (len(run.norms), *rows[0].shape[1:]), wide_dtype(rows[0].device)
    leads = workspace.take("leads", shape, wide, rows[0].device)
    for part, members, slots in run.leads:
        leads.index_copy_(0, slots, _widened(_gathered(rows[part], members, workspace, "members"), workspace))
    return leads


# --- from the members to their groups, and back ---


def _add_up(totals: Tensor, each: Round, values: Tensor) -> None:
    """Adds the values of the members to the totals of their groups; the values are lost."""
    if each.size:
        totals.add_(_folded(values.view(len(totals), each.size, *values.shape[1:])))
    elif each.blocks is None:
        scatter_add_(totals, each.slots, values)
    else:
        partial = values.new_full((len(each.block_slots), *values.shape[1:]), -0.0)
        scatter_add_(partial, each.blocks, values)
        scatter_add_(totals, each.block_slots, partial)


def scatter_add_(totals: Tensor, slots: Tensor, values: Tensor) -> None:
    """Adds values to the totals of their groups, in the same order on every run."""
    if totals.device.type == "cpu":
        totals.scatter_reduce_(0, column(slots, values).expand_as(values), values, "sum")
    else:
        # On CUDA scatter_reduce adds with atomics, in an order that changes from run to run: replicas
        # of one model would drift apart. This sorts first and always adds in the same order.
        totals.index_put_((slots,), values, accumulate=True)


def _expected(values: Tensor, each: Round, stored: torch.dtype, workspace: Workspace) -> Tensor:
    """What the members of a round are if these are the values of their leads, in the dtype of the values.

    A multiple is rounded as it will be when it is stored: only then is tying idempotent.
    """
    spread = workspace.take("expected", (each.length, *values.shape[1:]), values.dtype, values.device)
    _spread(values, each, spread)
    if each.multiples is None:
        return spread
    wide = spread.to(wide_dtype(values.device))
    multiples = wide * column(each.multiples, wide)
    # A multiple of what is finite is finite, too.
    largest = torch.finfo(stored).max
    multiples = torch.where(wide.isfinite(), multiples.clamp(-largest, largest), multiples)
    return spread.copy_(rounded(multiples, stored))


def _spread(values: Tensor, each: Round, members: Tensor) -> None:
    """Writes the value of its group to each member."""
    if each.size:
        members.view(len(values), each.size, *members.shape[1:]).copy_(values.unsqueeze(1))
    else:
        torch.index_select(bits(values), 0, each.slots, out=bits(members))


def _times(members: Tensor, each: Round) -> Tensor:
    """Members times their multiples, in place."""
    if each.multiples is None:
        return members
    return members.mul_(column(each.multiples.to(members.dtype), members))


def _members(rows: list[Tensor], each: Round, workspace: Workspace) -> Tensor:
    """The members of a round, as they are stored: a buffer, or the rows themselves where they follow each other."""
    if len(each.pieces) == 1:
        return _gathered(rows[each.pieces[0].part], each.pieces[0].members, workspace, "members")
    members = workspace.take("members", (each.length, *rows[0].shape[1:]), rows[0].dtype, rows[0].device)
    for piece, target in zip(each.pieces, _split(bits(members), each), strict=True):
        if isinstance(piece.members, slice):
            target.copy_(bits(rows[piece.part])[piece.members])
        else:
            torch.index_select(bits(rows[piece.part]), 0, piece.members, out=target)
    return members


def _split(members: Tensor, each: Round) -> tuple[Tensor, ...]:
    """The members of a round piece by piece."""
    return torch.split(members, [piece.length for piece in each.pieces])


def _gathered(rows: Tensor, positions: Tensor | slice, workspace: Workspace, name: str) -> Tensor:
    """``rows[positions]``, in the buffer of that name; of a slice a view."""
    if isinstance(positions, slice):
        return rows[positions]
    gathered = workspace.take(name, (len(positions), *rows.shape[1:]), rows.dtype, rows.device)
    torch.index_select(bits(rows), 0, positions, out=bits(gathered))
    return gathered


def _widened(members: Tensor, workspace: Workspace, name: str = "wide") -> Tensor:
    """Members in the wide dtype, to be read."""
    wide = wide_dtype(members.device)
    return (
        members if members.dtype == wide else workspace.take(name, members.shape, wide, members.device).copy_(members)
    )


def write_values(rows: list[Tensor], run: Run, values: Tensor, workspace: Workspace) -> None:
    """Every member of a group gets the group's value."""
    for each in run.rounds:
        if len(each.pieces) > 1 or each.multiples is not None:
            expected = _expected(values, each, values.dtype, workspace)
            for piece, own in zip(each.pieces, _split(expected, each), strict=True):
                _put(rows[piece.part], piece.members, own)
            continue
        part, positions, _ = each.pieces[0]
        target = bits(rows[part])
        if isinstance(positions, slice):
            _spread(values, each, rows[part][positions])
        elif each.size:
            target[positions.view(-1, each.size)] = bits(values).unsqueeze(1)
        else:
            target.index_copy_(0, positions, bits(_expected(values, each, values.dtype, workspace)))


def _put(rows: Tensor, positions: Tensor | slice, values: Tensor) -> None:
    """``rows[positions] = values``."""
    if isinstance(positions, slice):
        rows[positions].copy_(values)
    else:
        bits(rows).index_copy_(0, positions, bits(values))


def pin_(rows: list[Tensor], index: Index) -> None:
    """What is pinned is zero."""
    for part, pins in index.pinned.items():
        bits(rows[part]).index_fill_(0, pins, 0)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype, rounded once.

    torch takes float64 to 8 and 16 bits by way of float32. What it rounds to the middle between two numbers there, it
    may then round to the wrong one. So first all but 13 significant bits, which float32 has exactly, are cut off, and
    the last of those is set if anything was lost. With two bits more than float16 has it is known on which side of the
    middle a value is (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    if values.is_complex():
        return torch.view_as_complex(rounded(torch.view_as_real(values), dtype.to_real()))
    if values.dtype != torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    pattern = values.view(torch.int64)
    # A carry goes into the last bit that is kept, unless all that are cut off are zero.
    odd = pattern.bitwise_and(_CUT_OFF).add_(_CUT_OFF).bitwise_or_(pattern).bitwise_and_(~_CUT_OFF)
    return odd.view(torch.float64).to(dtype)


def times(slices: Tensor, factors: Tensor) -> Tensor:
    """Slices times a factor each, rounded once."""
    if bool((factors == 1).all()):
        return slices
    wide = wide_dtype(slices.device)
    factors = factors.to(slices.device, wide)
    return rounded(
        slices.to(wide.to_complex() if slices.is_complex() else wide) * column(factors, slices), slices.dtype
    )
