r"""The numbers: group means, in place, in any precision.

All members of a group are replaced by their mean: the orthogonal projection :math:`P` onto the tied
tensors. If they are equal, they must come out as they went in, bit for bit, so that tying what is tied
is no change. A plain mean rounds. There are three ways out:

- Types of up to 32 bits are added up in float64, where the sum of equal members is exact.
- Pairs of equal numbers are added up exactly in any type, and so are pairs of such sums.
- For other groups of float64 there is no wider type. There the mean is computed around an estimate :math:`p`, first the
  first member and then the mean around that,

  .. math:: m = p + \frac{1}{K} \sum_{i=1}^{K} (w_i - p)

  and all differences of equal members are zero.

These are functions of tensors alone. They run through an :class:`~tieopt.numbers.index.Index`, gather some of the
members at a time into kept buffers, add them up, by pairs or with ``scatter_reduce``, and write the results back: no
Python for each group, and no memory that grows with the number of rows. No gradients flow through what they write,
except through :func:`projected`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tieopt.numbers import devices
from tieopt.numbers.index import Chunk, Index, Pieces, Run
from tieopt.numbers.rounding import INTEGERS, clamped, multiplied, rounded, signed_
from tieopt.numbers.sums import Level, Sums
from tieopt.numbers.views import Tile
from tieopt.tensors import bits, column, movable, wide_dtype
from tieopt.ties.options import Reduction

IndexFor = Callable[[Sequence[Tensor]], Index]

# How many numbers are widened at once: as many as members of single entries are gathered.
_WIDENED = 2**19

# Of a run with more single entries of a tensor several parts are added up, so that several threads can work; their
# totals together fit into the caches. How many parts there are depends on the tie alone, and not on the number of
# threads, nor on ties that are merged with it, which have no more entries: nor do the bits of the sums.
ONE_PART = 2**17
_PARTS = 8
_TOTALS_OF_PARTS = 2**19

# Returns the values of the leads of a run, shape ``[g, ...]``.
ValuesOf = Callable[[list[Tensor], Run, "Workspace"], Tensor]


class Workspace(dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor]):
    """Buffers that are kept from call to call, because allocation costs more than the arithmetic.

    ``workspace[name, shape, dtype, device]`` is an uninitialised tensor, valid until the same name is asked for again.
    The buffers are as large as the largest chunk of members that is gathered, whatever the size of the tensors, but for
    those of single entries, which have the totals and the values of all groups of a run, and those of the compact
    gradients of a symmetric tensor, and the like, whose means are written to a buffer like the tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    # A buffer that is made in inference mode could not be written to afterwards.
    @torch.inference_mode(False)
    def __missing__(self, key: tuple[str, tuple[int, ...], torch.dtype, torch.device]) -> Tensor:
        name, shape, dtype, device = key
        entries = math.prod(shape)
        buffer = self._buffers.get((name, dtype, device))
        if buffer is None or buffer.numel() < entries:
            buffer = self._buffers[name, dtype, device] = torch.empty(entries, dtype=dtype, device=device)
            # Views of the smaller buffer would keep its memory.
            for outdated in [other for other in self if (other[0], *other[2:]) == (name, dtype, device)]:
                del self[outdated]
        self[key] = view = buffer[:entries].view(shape)
        return view


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
    """Return whether all members are multiples of their group's lead, rounded as they are stored.

    Args:
        tensors: as for :func:`project_`.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
        means_of: returns the values of the leads of a run; by default the leads themselves.
    """
    compared = _compared(index.rows(tensors), index, means_of or _leads, workspace)
    return all(torch.equal(members, expected) for _, members, expected in compared)


def project_(
    tensors: Sequence[Tensor],
    index: Index,
    workspace: Workspace,
    reduction: Reduction = "mean",
    means_of: ValuesOf | None = None,
) -> None:
    """Write to all members of each group their mean, or their sum; with scales, multiples of it.

    The sum is the size of the group (with scales, the sum of their squares) times the mean *as it is
    stored*, so that projecting to the mean first changes nothing.

    Args:
        tensors: dense, no two entries in one memory location.
        index: of the tensors.
        workspace: buffers to work in.
        reduction: ``"mean"`` or ``"sum"``.
        means_of: returns the means of the groups of a run; by default :func:`group_means`.
    """
    rows, means_of = index.rows(tensors), means_of or group_means
    for run in index.runs:
        # Steps leave most members equal, and to read them costs less than to write them.
        if means_of is means_after_step and _is_tied(rows, run, workspace):
            continue
        values = rounded(means_of(rows, run, workspace), rows[0].dtype)
        if reduction == "sum":
            values = rounded(times_counts(values, run), values.dtype)
        if is_narrow(values.dtype):
            # Where torch rounds several numbers at once, a NaN has other bits.
            values = canonical(values, run)
        pass_over_(values, rows, run, workspace)
        write_values(rows, run, values, workspace)
    if index.pinned.tensors:
        pin_(rows, index, workspace)


def pass_over_(values: Tensor, rows: list[Tensor], run: Run, workspace: Workspace) -> None:
    """Replace the values of slices between members by these slices, bit for bit."""
    if run.between is not None:
        between = _gathered(rows, run.between, workspace, "between")
        values[len(values) - len(between) :] = between


def lead_(tensors: Sequence[Tensor], index: Index, workspace: Workspace) -> None:
    """Make all members multiples of their group's lead; otherwise as :func:`project_`."""
    # Leads that follow each other would be a view of what is written.
    project_(tensors, index, workspace, means_of=lambda *run: _leads(*run).clone())


def divide_(tensors: Sequence[Tensor], index: Index, workspace: Workspace) -> None:
    """Take tensors that :func:`project_` has left as the sum back to the mean."""
    project_(tensors, index, workspace, means_of=_divided_leads)


def relax_(
    tensors: Sequence[Tensor], index: Index, workspace: Workspace, strength: float, means_of: ValuesOf | None = None
) -> None:
    """Move all members towards the mean of their group, and what is pinned towards its offset.

    Args:
        tensors: as for :func:`project_`.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
        strength: how far, more than 0 and at most 1; with 1 as :func:`project_`, except for the rounding.
        means_of: as for :func:`project_`.
    """
    rows = index.rows(tensors)
    between = [run.between for run in index.runs if run.between is not None]
    kept = [_gathered(rows, pieces, workspace, "between").clone() for pieces in between]
    for pieces, members, expected in _compared(rows, index, means_of or group_means, workspace):
        # Equal infinities have no difference; and the difference of two large numbers may be infinite.
        moved = members * (1 - strength) + expected * strength
        _put(rows, pieces, rounded(torch.where(members == expected, members, moved), rows[0].dtype), workspace)
    for pieces, slices in zip(between, kept, strict=True):
        _put(rows, pieces, slices, workspace)


class _Projection(torch.autograd.Function):
    """``project_`` out of place; but for offsets linear and symmetric, also to the sum, so it is its own backward."""

    @staticmethod
    def forward(
        ctx: Any, index_for: IndexFor, linear: IndexFor, reduction: Reduction, which: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.arguments = linear, linear, reduction, which
        results = tuple(tensor.clone() for tensor in tensors)
        tied = [results[number] for number in which]
        project_(tied, index_for(tied), Workspace(), reduction)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        results: tuple[Tensor, ...] = _Projection.apply(*ctx.arguments, *grads)  # type: ignore[no-untyped-call]
        return None, None, None, None, *results


def projected(
    tensors: Sequence[Tensor], index_for: IndexFor, reduction: Reduction = "mean", linear: IndexFor | None = None
) -> tuple[Tensor, ...]:
    """Return the projection of dense tensors, out of place and differentiable.

    Args:
        tensors: as for :func:`project_`; a tensor that occurs twice has one result, twice.
        index_for: returns the index for tensors of any layout.
        reduction: as for :func:`project_`.
        linear: returns the index for gradients, where offsets make that another one.
    """
    distinct = {id(tensor): tensor for tensor in tensors}
    which = tuple(list(distinct).index(id(tensor)) for tensor in tensors)
    results = _Projection.apply(index_for, linear or index_for, reduction, which, *distinct.values())  # type: ignore[no-untyped-call]
    return tuple(results[number] for number in which)


def drift(tensors: Sequence[Tensor], index: Index, workspace: Workspace, means_of: ValuesOf | None = None) -> float:
    """Return the largest distance of a member from its multiple of the group's mean; NaN if any distance is.

    Args:
        tensors: as for :func:`project_`; the distance of complex entries is the modulus.
        index: as for :func:`project_`.
        workspace: as for :func:`project_`.
        means_of: as for :func:`project_`.
    """
    rows = index.rows(tensors)
    distances = [rows[0].new_zeros((), dtype=wide_dtype(rows[0].device))]
    for _, members, expected in _compared(rows, index, means_of or group_means, workspace):
        # Equal infinities have no difference.
        distance = torch.where(members == expected, 0.0, members - expected)
        if tensors[0].is_complex():
            distance = torch.linalg.vector_norm(distance, dim=-1)
        if distance.numel():
            distances.append(distance.abs().max())
    return float(torch.stack(distances).max())


def _compared(
    rows: list[Tensor], index: Index, values_of: ValuesOf, workspace: Workspace
) -> Iterator[tuple[Pieces | Tile, Tensor, Tensor]]:
    """Yield members, their values, and the values that they should have by those of their leads."""
    for run in index.runs:
        values = values_of(rows, run, workspace)
        for chunk in run.chunks:
            members = _widened(_gathered(rows, chunk.pieces, workspace), workspace)
            expected = _expected(values, chunk, rows[0].dtype, workspace)
            if run.between is not None:
                # A NaN that is passed over would be another value than itself.
                is_between = column(chunk.groups >= len(run.norms) - sum(run.between.lengths), members)
                is_nan = members.isnan().logical_and_(is_between)
                members, expected = members.masked_fill(is_nan, 0), expected.masked_fill(is_nan, 0)
            yield chunk.pieces, members, expected
    offsets = index.pinned_at or (None,) * len(index.pinned.tensors)
    for number, pinned, length, offset in zip(*index.pinned, offsets, strict=True):
        pieces = Pieces((number,), (pinned,), (length,))
        members = _widened(_gathered(rows, pieces, workspace), workspace)
        if offset is None:
            yield pieces, members, torch.zeros_like(members)
            continue
        expected = offset.to(members.dtype).expand_as(members)
        # NaN is no other value for what is pinned at NaN.
        is_there = members.isnan() & expected.isnan()
        yield pieces, members.masked_fill(is_there, 0), expected.masked_fill(is_there, 0)


# --- the values of groups ---


def times_counts(means: Tensor, run: Run) -> Tensor:
    """Return the sums of groups that have these means, in the wide dtype."""
    return means.to(wide_dtype(means.device)) * column(run.counts, means)


def group_means(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """Return the mean of each group, as the value of its lead; shape ``[g, ...]``, at least as wide as the rows."""
    stored, wide, size = rows[0].dtype, wide_dtype(rows[0].device), run.chunks[0].size
    # Of the widest dtype the sums of equal numbers are exact if they are added up by pairs alone. Numbers of 16 bits
    # are not added up in float32: a sum may cancel to less than what float32 has lost of it.
    by_pairs = size.bit_count() == 1 if stored == wide else size > 0 and stored == torch.float32
    if not (by_pairs and run.signed and can_be_asked(rows[0])):
        return _careful_means(rows, run, workspace)
    means = _pairwise_means(rows, run.chunks[0], workspace)
    if math.isfinite(means.sum().item()):
        # Sums of pairs commute: those of an orbit are equal, or each other's negatives. But x - x is 0.0, and not -0.0.
        is_negative = run.tile and run.tile.orbits and run.tile.orbits.is_negative
        if is_negative is None or not bool((means == 0).logical_and_(column(is_negative, means)).any()):
            return means
        return canonical(means, run)
    # Sums beyond the range are added up again; the others keep their bits, whatever groups are beside them.
    exact = _careful_means(rows, run, workspace)
    return canonical(torch.where(means.isfinite(), means.to(exact.dtype), exact), run)


def _careful_means(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    if wide_dtype(rows[0].device) == torch.float64 and rows[0].dtype != torch.float64:
        if not run.signed:
            return _scaled_means(rows, run, workspace)
        sums = _sums(rows, run, workspace)
        return canonical(sums.div_(column(run.norms, sums)), run)
    means = _leads(rows, run, workspace)
    # An estimate far from the mean costs digits; the mean around it is near.
    for _ in range(2):
        means = _means_around(means, rows, run, workspace)
    return canonical(means, run)


def _is_tied(rows: list[Tensor], run: Run, workspace: Workspace) -> bool:
    """Return whether the members of groups are known to be tied, bit for bit."""
    if not can_be_asked(rows[0]):
        return False
    if run.tile is not None:
        return _is_tile_tied(rows, run.tile, workspace)
    leads = None
    for chunk in run.chunks:
        members = _gathered(rows, chunk.pieces, workspace)
        if chunk.size and chunk.multiples is None and chunk.shifts is None:
            by_member = _by_member(members, chunk)
            expected, members = by_member[:-1], by_member[1:]
        else:
            leads = stored_leads(rows, run, workspace) if leads is None else leads
            expected = _expected(leads, chunk, leads.dtype, workspace)
        if not have_same_bits(members, expected):
            return False
    return True


def _is_tile_tied(rows: list[Tensor], tile: Tile, workspace: Workspace) -> bool:
    lead, is_zero = rows[0][tile.views[0].region], tile.orbits and tile.orbits.is_zero
    buffer = workspace["members", lead.shape, lead.dtype, lead.device]
    for view in tile.views[1:]:
        if view.move.sign > 0:
            member = view.unsigned(rows, buffer)
        else:
            view.read(rows, buffer)
            member = buffer
            if is_zero is not None:
                # What is its own negative is 0.0, and not -0.0.
                entries = bits(member).flatten(0, len(tile.shape) - 1)
                entries.masked_fill_(column(is_zero, entries), 0)
        if not have_same_bits(lead, member):
            return False
    return True


def have_same_bits(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit."""
    # It takes as long for each number, however wide it is.
    dtype = torch.int64 if _is_viewable(tensor) and _is_viewable(other) else INTEGERS[tensor.element_size()]
    return torch.equal(tensor.view(dtype), other.view(dtype))


def _is_viewable(tensor: Tensor) -> bool:
    """Return whether each few neighbouring entries can be viewed as one number of 8 bytes."""
    count = 8 // tensor.element_size()
    if not tensor.dim() or tensor.stride(-1) != 1:
        return count == 1
    return math.gcd(tensor.storage_offset(), tensor.shape[-1], *tensor.stride()[:-1]) % count == 0


def can_be_asked(tensor: Tensor) -> bool:
    """Return whether Python may depend on the entries of a tensor: an accelerator would have to be waited for."""
    return not devices.is_accelerator(tensor.device)


def canonical(values: Tensor, run: Run) -> Tensor:
    """Return the values of groups, all those of one group made from one of them."""
    if run.tile is None or run.tile.orbits is None:
        return values
    first, is_negative, is_zero = run.tile.orbits
    if values.element_size() == 1:
        return canonical(values.float(), run).to(values.dtype)
    values = values.index_select(0, first)
    if is_negative is None or is_zero is None:
        return values
    # Negated bit for bit, as members are: the product of a NaN and -1 keeps its sign, and so may what torch negates.
    integers = values.view(INTEGERS[values.element_size()])
    negated = integers.bitwise_xor(torch.iinfo(integers.dtype).min)
    values = torch.where(column(is_negative, values), negated, integers).view(values.dtype)
    return values.masked_fill_(column(is_zero, values), 0)


def means_after_step(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """Return the means of weights that an optimizer has just written, without a bias where these have few bits.

    An optimizer may round weights of 16 bits or less at random, so that small updates add up on the average. If the
    members of a group were rounded to two neighbouring numbers, the number nearest to their mean is always the one to
    which most of them were rounded: small updates are lost. A single member was rounded to each of the two as often as
    the mean says. So where the lead is one of the two numbers next to the mean, it stands for the group.
    """
    means = group_means(rows, run, workspace)
    if is_narrow(rows[0].dtype):
        towards_leads_(means, _leads(rows, run, workspace), rows[0].dtype, workspace)
    return means


def is_narrow(stored: torch.dtype) -> bool:
    """Return whether :func:`means_after_step` and :func:`group_means` differ for a dtype."""
    return torch.finfo(stored).bits <= 16


def towards_leads_(means: Tensor, leads: Tensor, stored: torch.dtype, workspace: Workspace) -> None:
    """Replace means by leads that are one of the two numbers next to the mean in the dtype in which they are stored.

    Args:
        means: in the wide dtype.
        leads: of the same groups, in the wide dtype.
        stored: the dtype that the means will be stored in.
        workspace: buffers to work in.
    """
    if can_be_asked(means) and torch.equal(means, leads):
        return
    shape, device = means.shape, means.device
    # Numbers of 16 bits, and what lies in the middle of two neighbours, are exact in float32.
    names = "mean", "lead", "nearest", "middle"
    mean, lead, nearest, middle = [workspace[name, shape, torch.float32, device] for name in names]
    narrow = workspace["rounded", shape, stored, device]
    mean.copy_(means)
    lead.copy_(leads)
    nearest.copy_(narrow.copy_(mean))
    # The middle of two numbers is rounded to one of them only if there is no number between them.
    torch.lerp(nearest, lead, 0.5, out=middle)
    middle.copy_(narrow.copy_(middle))
    are_neighbours = (middle == nearest).logical_or_(middle == lead)
    is_between = (nearest > mean).logical_xor_(lead > mean).logical_and_(nearest != mean)
    torch.where(are_neighbours.logical_and_(is_between), leads, means, out=means)


def _sums(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """Return the sum of each group, its members times 1 or -1; shape ``[g, ...]``, in float64."""
    inner = rows[0].shape[len(run.tile.shape) if run.tile else 1 :]
    groups = run.norms.shape[0]
    parts = _parts(run, groups) if inner.numel() == 1 else 1
    # Adding -0.0 changes no number; adding 0.0 would turn -0.0 into 0.0.
    totals = workspace["totals", (parts, groups, *inner), torch.float64, rows[0].device].fill_(-0.0)
    for chunk in run.chunks:
        members = _gathered(rows, chunk.pieces, workspace)
        # Levels widen what they add up, but torch promotes no 8-bit floats.
        if not (chunk.sums and chunk.sums.levels) or chunk.multiples is not None or members.element_size() == 1:
            members = workspace["wide", members.shape, torch.float64, members.device].copy_(members)
        if parts == 1:
            _add_up(totals[0], chunk, members, workspace)
        else:
            _add_up_parts(totals.view(parts, groups), chunk, members.view(-1), workspace)
    for others in totals[1:]:
        totals[0].add_(others)
    return totals[0]


def _parts(run: Run, groups: int) -> int:
    """Return in how many parts the single entries of a run are added up."""
    pieces, sums = run.chunks[0].pieces, run.chunks[0].sums
    if sums is None or sums.levels is not None or isinstance(pieces, Tile):
        return 1
    if len(pieces.tensors) > 1 or pieces.lengths[0] <= ONE_PART:
        return 1
    return max(min(_PARTS, _TOTALS_OF_PARTS // groups), 1)


def _add_up_parts(totals: Tensor, chunk: Chunk, values: Tensor, workspace: Workspace) -> None:
    """Add each part of a vector to totals of its own, as :func:`_add_up` does.

    One thread adds up a vector, but several the rows of a matrix.

    Args:
        totals: shape ``[parts, g]``.
        chunk: of single entries.
        values: of its members, shape ``[m]``; they may be overwritten.
        workspace: buffers to work in.
    """
    assert chunk.sums is not None
    if chunk.multiples is not None:
        values.mul_(chunk.multiples)
    groups = widened_numbers(chunk.sums.groups, workspace)
    count = len(values) // len(totals) * len(totals)
    parts = groups[:count].view(len(totals), -1)
    totals.scatter_reduce_(1, parts, values[:count].view(parts.shape), "sum")
    _scatter_add_(totals[0], groups[count:], values[count:])


def _pairwise_means(rows: list[Tensor], chunk: Chunk, workspace: Workspace) -> Tensor:
    """Return the means of groups of one size, added up by pairs in float32 as long as their number is even.

    The sum of two equal numbers is exact, but not that of three: an odd number of sums is added up in float64. The
    error of pairwise summation grows like the logarithm of the size (Higham, section 4.2).
    """
    device, size, names = rows[0].device, chunk.size, ("halves", "quarters")
    if isinstance(chunk.pieces, Tile) and size % 2 == 0:
        size //= 2
        shape = size, math.prod(chunk.pieces.shape), *rows[0].shape[len(chunk.pieces.shape) :]
        sums = workspace[names[1], shape, rows[0].dtype, device]
        chunk.pieces.add_halves(rows, sums)
    else:
        members = _gathered(rows, chunk.pieces, workspace)
        if chunk.multiples is not None:
            members = workspace["narrow", members.shape, members.dtype, device].copy_(members)
            members.mul_(column(chunk.multiples.to(members.dtype), members))
        sums = _by_member(members, chunk)
    if size == chunk.size == 1:
        # This may be a view of the rows, which are written from it.
        return sums[0].clone()
    while size % 2 == 0:
        size //= 2
        halved = workspace[names[0], (size, *sums.shape[1:]), sums.dtype, device]
        sums, names = torch.add(sums[:size], sums[size:], out=halved), names[::-1]
    if size > 1:
        sums = workspace["odd", sums.shape, torch.float64, device].copy_(sums)
    return _pairwise_sums(sums).div_(chunk.size)


def _by_member(values: Tensor, chunk: Chunk) -> Tensor:
    """View the values of members as those of the first ones of all groups, of the second ones, and so on.

    Args:
        values: of members, shape ``[m, ...]``.
        chunk: of members of groups of one size, group by group, or of a tile, member by member.

    Returns:
        Shape ``[size, g, ...]``.
    """
    size, groups = chunk.size, len(values) // chunk.size
    if isinstance(chunk.pieces, Tile):
        return values.view(size, groups, *values.shape[1:])
    return values.view(groups, size, *values.shape[1:]).transpose(0, 1)


def _pairwise_sums(values: Tensor) -> Tensor:
    """Return the sums over the first dimension, in place, from sums of halves."""
    size = values.shape[0]
    while size > 1:
        size, odd = divmod(size, 2)
        values[:size].add_(values[size : 2 * size])
        if odd:
            values[0].add_(values[2 * size])
    return values[0]


def _scaled_means(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """Return the leads of groups that are tied already, and the means of others; where multiples are rounded."""
    leads = _leads(rows, run, workspace)
    totals, distances = torch.zeros_like(leads), torch.zeros_like(leads)
    for chunk in run.chunks:
        members = workspace["wide", (sum(chunk.pieces.lengths), *leads.shape[1:]), leads.dtype, leads.device]
        members.copy_(_gathered(rows, chunk.pieces, workspace))
        differences = _expected(leads, chunk, rows[0].dtype, workspace)
        # Equal infinities have no difference.
        differences.copy_(members != differences)
        _add_up(distances, chunk, differences, workspace, weighted=False)
        if chunk.shifts is not None:
            members.sub_(chunk.shifts)
        _add_up(totals, chunk, members, workspace)
    means = totals.div_(column(run.norms, totals))
    # The mean of finite members is finite, but perhaps beyond the range of the lead.
    return torch.where(distances == 0, leads, clamped(means, means, rows[0].dtype))


def _means_around(estimates: Tensor, rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """Return the estimates, corrected by the mean difference of the members from them."""
    # The difference of two infinities is NaN, where their mean may well be infinite.
    pivots = torch.nan_to_num(estimates, nan=0.0, posinf=0.0, neginf=0.0)
    totals = torch.zeros_like(estimates)
    for chunk in run.chunks:
        members = _widened(_gathered(rows, chunk.pieces, workspace), workspace)
        differences = _expected(pivots, chunk, rows[0].dtype, workspace)
        # Scaled by a power of two, so that no sum overflows where the mean is finite.
        differences.mul_(-run.headroom).add_(members, alpha=run.headroom)
        _add_up(totals, chunk, differences, workspace)
    # Half the distance from the pivot, because the distance itself may overflow.
    halves = totals.div_(column(run.norms.to(totals.dtype) * (2 * run.headroom), totals))
    means = halves.add(pivots, alpha=0.5).mul_(2)
    # The mean of finite members is finite, whatever the last rounding says.
    means = clamped(means, halves, means.dtype)
    # Adding a zero would turn -0.0 into 0.0.
    return torch.where(halves == 0, estimates, means)


def _leads(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """Return the lead of each group, in the wide dtype."""
    return canonical(_widened(stored_leads(rows, run, workspace), workspace, "wide leads"), run)


def stored_leads(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    """Return the lead of each group as it is stored."""
    leads = _gathered(rows, run.lead_members.pieces, workspace, "leads")
    if run.lead_members.size:
        return leads
    in_order = workspace["leads in order", leads.shape, leads.dtype, leads.device]
    bits(in_order).index_copy_(0, widened_numbers(run.lead_members.groups, workspace), bits(leads))
    return in_order


def _divided_leads(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
    sums = _leads(rows, run, workspace)
    return sums / column(run.counts, sums)


# --- from the members to their groups, and back ---


def _add_up(totals: Tensor, chunk: Chunk, values: Tensor, workspace: Workspace, *, weighted: bool = True) -> None:
    """Add the values of members, by default times their multiples, to the totals; the values may be overwritten."""
    if weighted and chunk.multiples is not None:
        values.mul_(column(chunk.multiples, values))
    if chunk.sums is None:
        totals.add_(_pairwise_sums(_by_member(values, chunk)))
    else:
        add_by_group_(totals, chunk.sums, values, workspace)


def add_by_group_(totals: Tensor, sums: Sums, values: Tensor, workspace: Workspace) -> None:
    """Add values to the totals of their groups, in the same order on every run."""
    if sums.levels is not None:
        for level in sums.levels:
            values = _reduced(values, level, totals.dtype, workspace)
        groups = widened_numbers(sums.groups, workspace)
        totals.index_copy_(0, groups, totals.index_select(0, groups).add_(values))
        return
    if sums.blocks is not None:
        partial = values.new_full((sums.groups.shape[0], *values.shape[1:]), -0.0)
        _scatter_add_(partial, widened_numbers(sums.blocks, workspace), values)
        values = partial
    _scatter_add_(totals, widened_numbers(sums.groups, workspace), values)


def _scatter_add_(totals: Tensor, groups: Tensor, values: Tensor) -> None:
    totals.scatter_reduce_(0, column(groups, values).expand_as(values), values, "sum")


def _reduced(values: Tensor, level: Level, wide: torch.dtype, workspace: Workspace) -> Tensor:
    """Return the values that a level leaves as they are, and then the sums of its columns, added up by pairs.

    Float64 costs no time here even on a GPU that has a 64th of the units for it: it adds several times as many numbers
    as it reads.
    """
    (order, rows, columns), inner, device = level, values.shape[1:], values.device
    ordered = workspace["ordered", (order.shape[0], *inner), values.dtype, device]
    torch.index_select(values, 0, order, out=ordered)
    half = order.shape[0] - rows // 2 * columns
    # Accelerators convert the other half as they add it.
    reduced = workspace["reduced", (half, *inner), wide, device].copy_(ordered[:half])
    left = half - rows // 2 * columns
    sums = reduced[left:].add_(ordered[half:])
    _pairwise_sums(sums.view(rows // 2, columns, *inner))
    return reduced[: left + columns]


def _expected(
    values: Tensor, chunk: Chunk, stored: torch.dtype, workspace: Workspace, out: Tensor | None = None
) -> Tensor:
    """Return the values of members by those of their leads, in the dtype of the latter.

    They are rounded as they will be when they are stored: only then is tying idempotent.
    """
    if out is None:
        out = workspace["expected", (sum(chunk.pieces.lengths), *values.shape[1:]), values.dtype, values.device]
    if chunk.size:
        _by_member(out, chunk).copy_(values.unsqueeze(0))
    elif values.element_size() == 1:
        torch.index_select(bits(values), 0, chunk.groups, out=bits(out))
    else:
        torch.index_select(values, 0, chunk.groups, out=out)
    if chunk.shifts is None and chunk.multiples is None:
        return out
    if chunk.shifts is None and chunk.multiples is not None and chunk.multiples.dtype == torch.int8:
        return signed_(out, chunk.multiples)
    return out.copy_(multiplied(out, chunk.multiples, chunk.shifts, stored))


def _gathered(rows: list[Tensor], pieces: Pieces | Tile, workspace: Workspace, name: str = "members") -> Tensor:
    """Return members as they are stored, in a buffer; a view of the rows where they follow each other."""
    if isinstance(pieces, Tile):
        inner = rows[0].shape[len(pieces.shape) :]
        members = workspace[name, (sum(pieces.lengths), *inner), rows[0].dtype, rows[0].device]
        pieces.read(rows, members)
        return members
    is_single = len(pieces.tensors) == 1
    if is_single and isinstance(pieces.rows[0], slice):
        return rows[pieces.tensors[0]][pieces.rows[0]]
    members = workspace[name, (sum(pieces.lengths), *rows[0].shape[1:]), rows[0].dtype, rows[0].device]
    moved = members
    if members.element_size() == 1:
        rows, (moved,) = movable(rows), movable([members])
    if set(map(type, pieces.rows)) == {slice}:
        torch.cat([rows[number][chosen] for number, chosen in zip(pieces.tensors, pieces.rows, strict=True)], out=moved)
        return members
    targets = (moved,) if is_single else moved.split_with_sizes(pieces.lengths)
    for number, chosen, target in zip(pieces.tensors, pieces.rows, targets, strict=True):
        if isinstance(chosen, slice):
            target.copy_(rows[number][chosen])
        else:
            torch.index_select(rows[number], 0, chosen, out=target)
    return members


def widened_numbers(kept: Tensor, workspace: Workspace) -> Tensor:
    """Return the numbers of an index in int64: torch reads by those of int32, and writes by these alone."""
    if kept.dtype == torch.int64:
        return kept
    return workspace["numbers", kept.shape, torch.int64, kept.device].copy_(kept)


def write_slices_(target: Tensor, numbers: Tensor, values: Tensor | None, workspace: Workspace) -> None:
    """Write values, or zeros, to the slices with the given numbers, so many at a time as numbers are widened."""
    count = len(numbers) if numbers.dtype == torch.int64 else _WIDENED
    for start in range(0, len(numbers), max(count, 1)):
        part = slice(start, start + count)
        chosen = widened_numbers(numbers[part], workspace)
        if values is None:
            target.index_fill_(0, chosen, 0)
        else:
            target.index_copy_(0, chosen, values[part])


def _put(rows: list[Tensor], pieces: Pieces | Tile, members: Tensor, workspace: Workspace) -> None:
    """Write members to their rows."""
    if isinstance(pieces, Tile):
        pieces.write_members(rows, members)
        return
    if members.element_size() == 1:
        rows, (members,) = movable(rows), movable([members])
    sources = (members,) if len(pieces.tensors) == 1 else members.split_with_sizes(pieces.lengths)
    slices, values = [], []
    for number, chosen, source in zip(pieces.tensors, pieces.rows, sources, strict=True):
        if isinstance(chosen, slice):
            slices.append(rows[number][chosen])
            values.append(source)
        else:
            rows[number].index_copy_(0, widened_numbers(chosen, workspace), source)
    if slices:
        torch._foreach_copy_(slices, values)


def _widened(members: Tensor, workspace: Workspace, name: str = "wide") -> Tensor:
    """Return members in the wide dtype; they are read only."""
    wide = wide_dtype(members.device)
    return members if members.dtype == wide else workspace[name, members.shape, wide, members.device].copy_(members)


def write_values(rows: list[Tensor], run: Run, values: Tensor, workspace: Workspace) -> None:
    """Write to every member what the value of its group's lead says."""
    for chunk in run.chunks:
        if isinstance(chunk.pieces, Tile):
            chunk.pieces.write_values(rows, values)
            continue
        (target, *_), (chosen, *others) = chunk.pieces.tensors, chunk.pieces.rows
        is_copied = chunk.multiples is None and chunk.shifts is None
        if isinstance(chosen, slice) and not others:
            _expected(values, chunk, values.dtype, workspace, rows[target][chosen])
        elif isinstance(chosen, Tensor) and not others and chunk.size and is_copied:
            bits(rows[target])[widened_numbers(chosen, workspace).view(-1, chunk.size)] = bits(values).unsqueeze(1)
        else:
            _put(rows, chunk.pieces, _expected(values, chunk, values.dtype, workspace), workspace)


def pin_(rows: list[Tensor], index: Index, workspace: Workspace) -> None:
    """Write their offsets, or zeros, to what is pinned."""
    offsets = index.pinned_at or (None,) * len(index.pinned.tensors)
    for number, pinned, offset in zip(index.pinned.tensors, index.pinned.rows, offsets, strict=True):
        target = bits(rows[number])
        if isinstance(pinned, slice):
            target[pinned] = 0 if offset is None else bits(offset)
        else:
            values = None if offset is None else bits(offset).expand(-1, *target.shape[1:])
            write_slices_(target, pinned, values, workspace)
