"""Sparse gradients of tensors that are tied by rows: groups of which a row is stored, and nothing else.

What depends on the tie alone is compiled once. A step waits for an accelerator once, to learn how many groups of each
size are touched; no tensor has a size that follows from anything else that is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.numbers import devices
from tieopt.numbers.folding import CompactRows
from tieopt.numbers.index import (
    Chunk,
    Index,
    Layout,
    Pieces,
    Run,
    are_one_run,
    capacity_for,
    norms_of,
    stretches_of,
)
from tieopt.numbers.members import members_of
from tieopt.numbers.reduction import projected
from tieopt.numbers.rounding import rounded
from tieopt.numbers.sums import Sums
from tieopt.tensors import column, wide_dtype
from tieopt.ties.options import Reduction
from tieopt.ties.slices import FREE, Slices

# Stands for the group of a pinned row.
_PINNED = FREE - 1


@dataclass(frozen=True, eq=False)
class TiedRows:
    """A tie of rows as sparse gradients need it, compiled for a device.

    Groups are sorted by their size, and members by their group, each group's lead first.

    Attributes:
        group: of each row, -1 for a free one, -2 for a pinned one, int64, shape ``[n]``.
        rank: of each row among the members of its group, int64, shape ``[n]``.
        members: the row of each member, int64, shape ``[m]``.
        starts: where in ``members`` each group begins, and where the last one ends, int64, shape ``[g + 1]``.
        sizes: the sizes that groups have.
        bounds: -1, 0, and for each of these sizes the end of its groups, int64.
        norms: of each group, see :class:`~tieopt.numbers.index.Run`.
        squares: of each group, the ``counts`` of a :class:`~tieopt.numbers.index.Run`.
        headroom: for all groups, see :class:`~tieopt.numbers.index.Run`.
        multiples: of its group's lead, for each member, see :class:`~tieopt.numbers.index.Chunk`.
        compact: for each row the row of the compact tensor that it is a multiple of, int64, shape ``[n]``; None without
            a compact tensor.
        scales: for each group the multiple of the shared value that its lead is; None if all are 1.
    """

    group: Tensor
    rank: Tensor
    members: Tensor
    starts: Tensor
    sizes: tuple[int, ...]
    bounds: Tensor
    norms: Tensor
    squares: Tensor
    headroom: float
    multiples: Tensor | None
    compact: Tensor | None
    scales: Tensor | None

    @classmethod
    @torch.inference_mode(False)
    def compile(cls, slices: Slices, device: torch.device, compact: CompactRows | None = None) -> TiedRows:
        """Compile a tie.

        Args:
            slices: the rows.
            device: of the gradients.
            compact: the rows of the compact tensor, if gradients are to be those of one.
        """
        wide = wide_dtype(device)
        members, pinned = members_of([slices])
        members = members.by_group
        lengths = torch.bincount(members.group)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        sizes, counts = (column.tolist() for column in torch.unique_consecutive(lengths, return_counts=True))
        group = torch.full((slices.labels.numel(),), FREE, device="cpu")
        rank = torch.zeros_like(group)
        group[members.position] = members.group
        group[pinned.position] = _PINNED
        rank[members.position] = torch.arange(len(members.group), device="cpu") - starts[members.group]

        leads = members.position[starts[:-1]]
        multiples = members.scale / members.scale[starts[:-1]][members.group]
        norms, squares, bounds = norms_of(members.group, multiples, members.scale)
        is_signed = bool((multiples.abs() == 1).all())
        scales = None if compact is None else compact.scale[compact.kept[compact.rows[leads].long()]]
        return cls(
            group.to(device),
            rank.to(device),
            members.position.to(device),
            starts.to(device),
            tuple(sizes),
            torch.tensor([FREE, *accumulate(counts, initial=0)], device=device),
            norms.to(device, wide),
            squares.to(device, wide),
            0.5 ** math.ceil(math.log2(bounds.max())) if len(bounds) else 1.0,
            None if bool((multiples == 1).all()) else multiples.to(device, torch.int8 if is_signed else wide),
            None if compact is None else compact.rows.to(device, torch.int64),
            None if scales is None or bool((scales == 1).all()) else scales.to(device, wide),
        )


class _Touched(NamedTuple):
    """The groups of which a row is stored in a sparse tensor; in sparse dimensions after the first, entry by entry.

    Attributes:
        untied: the stored entries that are of no group, the pinned ones first, int64.
        pinned: how many of these are pinned.
        group: of each touched one, sorted, int64, shape ``[t]``.
        inner: where in its rows its entries stand, counted through the other sparse dimensions, int64, shape ``[t]``.
        counts: how many of the groups of each size are touched.
        starts: where in ``values`` each begins, int64, shape ``[t]``.
        labels: which of the touched ones each row of ``values`` is of, int64, shape ``[m]``.
        members: which member of the tie each row of ``values`` is, int64, shape ``[m]``.
        values: of all their members, zeros for those that are not stored, shape ``[m, ...]``.
    """

    untied: Tensor
    pinned: int
    group: Tensor
    inner: Tensor
    counts: tuple[int, ...]
    starts: Tensor
    labels: Tensor
    members: Tensor
    values: Tensor


def projected_sparse(tensor: Tensor, tied: TiedRows, reduction: Reduction = "mean") -> Tensor:
    """Return the projection of a sparse COO tensor, out of place and differentiable.

    Where a member is stored, the whole group is afterwards, and no other groups are. Free entries stay as they are, not
    even coalesced, because an optimizer may add them up in another order.
    """
    indices, values = _entries(tensor)
    touched = _projected(indices, values, tensor, tied, reduction)
    members = _indices(tied.members[touched.members], touched.inner[touched.labels], tensor)
    untied, is_pinned = touched.untied.sort().values, column(tied.group[indices[0]] == _PINNED, values)
    indices = torch.cat([indices[:, untied], members], dim=1)
    values = torch.cat([values.masked_fill(is_pinned, 0)[untied], touched.values])
    if not (tensor.is_coalesced() or tensor.requires_grad):
        return torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=False)
    # Where nothing is stored twice, to coalesce is to sort, for which no accelerator is waited for.
    indices, values = _sorted(indices, values, tensor.shape)
    return torch.sparse_coo_tensor(indices, values, tensor.shape, is_coalesced=True, check_invariants=False)


def folded_sparse(grad: Tensor, compact: Tensor, tied: TiedRows, reduction: Reduction) -> Tensor:
    """Return the sparse gradient of a compact tensor, from a sparse COO gradient of a tensor that is tied by rows."""
    assert tied.compact is not None
    indices, values = _entries(grad.detach())
    touched = _projected(indices, values, grad, tied, reduction)
    shared, free = touched.values[touched.starts], touched.untied[touched.pinned :]
    if tied.scales is not None:
        shared = rounded(shared / column(tied.scales[touched.group], shared), shared.dtype)
    leads = _indices(tied.members[tied.starts[touched.group]], touched.inner, grad)
    indices, values = torch.cat([indices[:, free], leads], dim=1), torch.cat([values[free], shared])
    if grad.is_coalesced():
        indices, values = _sorted(indices, values, grad.shape)
    indices[0] = tied.compact[indices[0]]
    return torch.sparse_coo_tensor(indices, values, compact.shape, check_invariants=False)


def _entries(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values of a sparse tensor; with a graph, only those of a coalesced one are part of it."""
    if tensor.requires_grad:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    return tensor._indices(), tensor._values()


def _numbers(indices: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the numbers of entries, counted through dimensions of these widths."""
    numbers = indices.new_zeros(indices.shape[1])
    for position, width in zip(indices, widths, strict=False):
        numbers = numbers * width + position
    return numbers


def _sorted(indices: Tensor, values: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the entries of a tensor of this shape in the order of their indices."""
    order = _numbers(indices, shape).argsort()
    return indices[:, order], values[order]


def _indices(rows: Tensor, inner: Tensor, like: Tensor) -> Tensor:
    """Return the indices of entries, from their rows and their numbers within these."""
    columns = [inner]
    for width in reversed(like.shape[1 : like.sparse_dim()]):
        columns[:1] = [columns[0] // width, columns[0] % width]
    return torch.stack([rows, *columns[1:]])


def _projected(indices: Tensor, values: Tensor, like: Tensor, tied: TiedRows, reduction: Reduction) -> _Touched:
    """Return the touched groups of a sparse tensor, projected."""
    touched = _touched(indices, values, like.shape[1 : like.sparse_dim()], tied)
    slices = (Slices(touched.labels),)
    layout = Layout.of(slices, [touched.values])
    index = Index(slices, layout, tuple(_runs(touched, tied, layout)), Pieces((), (), ()), ())
    (projection,) = projected([touched.values], lambda _: index, reduction)
    return touched._replace(values=projection)


def _touched(indices: Tensor, values: Tensor, widths: Sequence[int], tied: TiedRows) -> _Touched:
    """Lay out the touched groups one after the other, and add up in their places what is stored."""
    width, group = math.prod(widths), tied.group[indices[0]]
    # A stable sort: entries of one member are added up in the order in which they are stored.
    numbers, order = torch.where(group < 0, group, group * width + _numbers(indices[1:], widths)).sort(stable=True)
    is_first = numbers >= 0
    is_first[1:] &= numbers[1:] != numbers[:-1]
    before = torch.nn.functional.pad(is_first.cumsum(0), (1, 0))
    ends = torch.searchsorted(numbers, (tied.bounds * width).clamp(min=FREE))
    # The only line that waits for an accelerator.
    pinned, untied, *touched = torch.cat([ends[:2], before[ends[1:]]]).tolist()
    counts = tuple(end - start for start, end in pairwise(touched))
    length = sum(map(math.prod, zip(tied.sizes, counts, strict=True)))

    of_none, stored = order.split_with_sizes((untied, len(order) - untied))
    owner = before[1 + untied :] - 1
    firsts = numbers[untied:][torch.searchsorted(owner, torch.arange(touched[-1], device=owner.device))]
    group, inner = firsts // max(width, 1), firsts % max(width, 1)
    sizes = tied.starts[group + 1] - tied.starts[group]
    starts = sizes.cumsum(0) - sizes
    labels = torch.repeat_interleave(sizes, output_size=length)
    members = torch.arange(length, device=labels.device) + (tied.starts[group] - starts)[labels]
    places = starts[owner] + tied.rank[indices[0, stored]]
    laid_out = values.new_zeros(length, *values.shape[1:]).index_put((places,), values[stored], accumulate=True)
    return _Touched(of_none, pinned, group, inner, counts, starts, labels, members, laid_out)


def _runs(touched: _Touched, tied: TiedRows, layout: Layout) -> Iterator[Run]:
    """Cut the touched groups into runs, by what Python knows of them: how many there are of each size."""
    present = {size: count for size, count in zip(tied.sizes, touched.counts, strict=True) if count}
    if not present:
        return
    entries, ends = touched.values.shape[1:].numel(), list(accumulate(present.values(), initial=0))
    capacity = capacity_for(layout.device, entries, max(present))
    stretches: Iterable[tuple[int, int, int]]
    if devices.is_accelerator(layout.device):
        # Groups of different sizes are added up in an order that would have to be compiled, see Sums.
        capacity, stretches = max(capacity, *present), zip(ends, ends[1:], present, strict=False)
    elif are_one_run(ends[-1], entries, layout):
        stretches = [(0, ends[-1], 0)]
    else:
        stretches = stretches_of(list(present), list(present.values()), capacity, entries)
    member_at = dict(zip(ends, accumulate((size * count for size, count in present.items()), initial=0), strict=True))
    for first, last, size in stretches:
        step = capacity // size if size else last - first
        for begin in range(first, last, step):
            end = min(begin + step, last)
            start = member_at[first] + (begin - first) * size
            stop = start + (end - begin) * size if size else member_at[last]
            yield Run(
                Chunk(Pieces((0,), (touched.starts[begin:end],), (end - begin,)), 1, touched.group[:0], None, None),
                tied.norms[touched.group[begin:end]],
                tied.squares[touched.group[begin:end]],
                tied.multiples is None or tied.multiples.dtype == torch.int8,
                tied.headroom,
                tuple(
                    _chunk(touched, tied, slice(at, min(at + capacity, stop)), begin, size, layout)
                    for at in range(start, stop, capacity)
                ),
            )


def _chunk(touched: _Touched, tied: TiedRows, rows: slice, first: int, size: int, layout: Layout) -> Chunk:
    """Return rows of the touched groups as a chunk of a run that begins with the first of these groups."""
    pieces = Pieces((0,), (rows,), (rows.stop - rows.start,))
    multiples = None if tied.multiples is None else tied.multiples[touched.members[rows]]
    if size:
        return Chunk(pieces, size, touched.group[:0], multiples, None)
    groups = touched.labels[rows] - first
    return Chunk(pieces, 0, groups, multiples, Sums.of(groups, layout.device, in_blocks=layout.double))
