r"""Regular ties: members that correspond as views of whole tensors, so that there is no index.

The members of joined parameters, and of a tensor with symmetries, are where other ones are once dimensions are permuted
and flipped. The mean over such a group of moves :math:`G` is the mean over the orbit of each entry,

.. math:: (P w)_x = \frac{1}{|G|} \sum_{g \in G} \varepsilon_g\, w_{g x}

(the Reynolds operator), also where several moves take an entry to the same place. Tensors are cut into tiles that stay
in the caches, the moves take tiles to tiles, and the values that are computed for one tile are written to its images.
Nothing is kept for each entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations, product
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.numbers import devices
from tieopt.tensors import transposed_copy, wide_dtype
from tieopt.ties.slices import Slices

# Entries that are gathered at a time, and the fewest of one member: what the caches hold, yet enough of each of several
# members for two threads, to which torch gives 2^15 entries each; or what fills an accelerator.
_CPU_ENTRIES, _CPU_TILE = 2**20, 2**14
_ACCELERATOR_ENTRIES, _ACCELERATOR_TILE = 2**22, 2**20

# Labels of more dimensions are looked at for flips alone, or not at all: there are too many permutations, and flips.
_PERMUTED, _FLIPPED = 4, 8

# Dimensions of this size are cut in the middle where they are mirrored.
_WIDE = 128

# torch transposes a contiguous matrix of as many entries several times as fast as a part of a matrix.
_TRANSPOSED = 60 * 60


class Move(NamedTuple):
    """A permutation of dimensions, and then a flip of some of them.

    Attributes:
        dims: for each dimension of the result, which one it was.
        flips: the dimensions of the result that are flipped.
        sign: of the scales of what is moved, 1 or -1.
    """

    dims: tuple[int, ...]
    flips: tuple[int, ...]
    sign: int = 1

    @property
    def permutes(self) -> bool:
        """Whether the dimensions change their order."""
        return self.dims != tuple(range(len(self.dims)))

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a moved tensor; a view if nothing is flipped."""
        moved = tensor.permute(self.dims)
        return moved.flip(self.flips) if self.flips else moved

    def after(self, first: Move) -> Move:
        """Return what another move and then this one do."""
        flips = (dim for dim, before in enumerate(self.dims) if (before in first.flips) != (dim in self.flips))
        return Move(tuple(first.dims[dim] for dim in self.dims), tuple(flips), self.sign * first.sign)

    def extended(self, dims: int) -> Move:
        """Return the move of tensors that have further dimensions, which stay."""
        return self._replace(dims=(*self.dims, *range(len(self.dims), dims)))

    def region(self, tile: Sequence[slice], shape: Sequence[int]) -> tuple[slice, ...]:
        """Return where in a tensor the entries are that a tile of the moved tensor has, of the given shape."""
        region = list(tile)
        for dim, (before, part) in enumerate(zip(self.dims, tile, strict=True)):
            flipped = slice(shape[dim] - part.stop, shape[dim] - part.start)
            region[before] = flipped if dim in self.flips else part
        return tuple(region)


class View(NamedTuple):
    """One member of all groups of a tile.

    Attributes:
        tensor: the number of the tensor that it is in.
        region: where in the tensor.
        move: takes the region to the tile; its sign is the scale relative to that of the tile.
        is_plain: whether it is the region as it is.
    """

    tensor: int
    region: tuple[slice, ...]
    move: Move
    is_plain: bool

    @classmethod
    def of(cls, tensor: int, tile: Sequence[slice], shape: Sequence[int], move: Move) -> View:
        """Return the view that a move takes to a tile of a tensor of the given shape."""
        is_plain = not move.permutes and not move.flips and move.sign == 1
        return cls(tensor, move.region(tile, shape), move, is_plain)

    def unsigned(self, tensors: Sequence[Tensor], buffer: Tensor) -> Tensor:
        """Return the member as the tile has it, but for its sign: a view, or a copy that may be in the buffer.

        Args:
            tensors: to read from.
            buffer: contiguous, of the shape of the tile; it may be overwritten.
        """
        part, (dims, flips, _) = tensors[self.tensor][self.region], self.move
        if self.transposes(part):
            if flips:
                part = _flipped(part, tuple([dims[dim] for dim in flips])).contiguous()
            else:
                part = buffer.view(part.shape).copy_(part)
            return transposed_copy(part)
        if self.move.permutes:
            part = buffer.copy_(part.permute(*dims, *range(len(dims), part.dim())))
        return _flipped(part, flips)

    def read(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Write the member, as the tile has it, to a contiguous tensor of the shape of the tile."""
        member = self.unsigned(tensors, out)
        if self.move.sign < 0:
            _copy_negated_(out, member)
        elif member is not out:
            out.copy_(member)

    def write(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Write the values of a tile, contiguous, to the member."""
        part, (dims, flips, sign) = tensors[self.tensor][self.region], self.move
        if self.is_plain:
            part.copy_(values)
            return
        values = _flipped(values, flips)
        if self.transposes(part):
            values = transposed_copy(values)
        else:
            part = part.permute(*dims, *range(len(dims), part.dim()))
        if sign < 0:
            _copy_negated_(part, values)
        else:
            part.copy_(values)

    def transposes(self, region: Tensor) -> bool:
        """Return whether the region is a matrix that is faster transposed once it is contiguous."""
        return self.move.dims == (1, 0) and region.dim() == 2 and region.numel() >= _TRANSPOSED


def _flipped(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not dims:
        return tensor
    # torch flips no 8-bit floats.
    return tensor.view(torch.uint8).flip(dims).view(tensor.dtype) if tensor.element_size() == 1 else tensor.flip(dims)


def _copy_negated_(target: Tensor, values: Tensor) -> None:
    # torch negates no 8-bit floats, and of a NaN of 16 bits it may make another one.
    if values.element_size() == 1:
        target.copy_(values.float().neg_())
    elif values.element_size() == 2:
        torch.bitwise_xor(values.view(torch.int16), torch.iinfo(torch.int16).min, out=target.view(torch.int16))
    else:
        torch.neg(values, out=target)


class Orbits(NamedTuple):
    """For each entry the first one of its orbit under some symmetries.

    Attributes:
        first: its number, int64, shape ``[g]``.
        is_negative: whether the entry is the negative of the first, bool, shape ``[g]``; None if no move has a sign.
        is_zero: whether it is its own negative, likewise.
    """

    first: Tensor
    is_negative: Tensor | None = None
    is_zero: Tensor | None = None


class Tile(NamedTuple):
    """All members of the groups of a tile.

    Attributes:
        views: the members; where a move takes the tile to itself, some of them are the same region.
        distinct: the views of distinct regions.
        shape: of the tile.
        is_plain: whether all members are regions as they are.
        orbits: of the entries, if a move takes the tile to itself.
        counts: how many members each group has then, shape ``[entries]``.
    """

    views: tuple[View, ...]
    distinct: tuple[View, ...]
    shape: tuple[int, ...]
    is_plain: bool
    orbits: Orbits | None = None
    counts: Tensor | None = None

    @property
    def lead(self) -> Tile:
        """The tile of the first members alone."""
        return Tile(self.views[:1], self.views[:1], self.shape, self.views[0].is_plain)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many entries each view has."""
        return (math.prod(self.shape),) * len(self.views)

    def read(self, tensors: Sequence[Tensor], members: Tensor) -> None:
        """Write all members, view by view, to a contiguous tensor, shape ``[views * entries, ...]``."""
        for view, out in zip(self.views, members.view(len(self.views), *self.shape, *members.shape[1:]), strict=True):
            view.read(tensors, out)

    def write_members(self, tensors: Sequence[Tensor], members: Tensor) -> None:
        """Write members, as :meth:`read` returns them, to the tensors."""
        for view, own in zip(self.views, members.view(len(self.views), *self.shape, *members.shape[1:]), strict=True):
            view.write(tensors, own)

    def write_values(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Write the values of groups, contiguous, shape ``[entries, ...]``, to all their members."""
        values = values.view(*self.shape, *values.shape[1:])
        if self.is_plain:
            regions = [tensors[view.tensor][view.region] for view in self.distinct]
            torch._foreach_copy_(regions, [values] * len(regions))
            return
        for view in self.distinct:
            view.write(tensors, values)

    def add_halves(self, tensors: Sequence[Tensor], sums: Tensor) -> None:
        """Add the first half of the members to the second; shape ``[views / 2, entries, ...]``."""
        half = len(self.views) // 2
        for first, second, out in zip(self.views[:half], self.views[half:], sums, strict=True):
            out = out.view(*self.shape, *out.shape[1:])
            member = first.unsigned(tensors, out if first.is_plain else torch.empty_like(out))
            if first.move.sign < 0:
                member = -member
            torch.add(member, second.unsigned(tensors, out), alpha=second.move.sign, out=out)


class Correspondence(NamedTuple):
    """How the members of all groups correspond.

    Attributes:
        to_first: for each tensor the move that takes it to the first one.
        symmetries: of the first tensor, the identity among them.
    """

    to_first: tuple[Move, ...]
    symmetries: tuple[Move, ...]


def correspondence_of(slices: Sequence[Slices]) -> Correspondence | None:
    """Return how the members of a tie correspond, from the labels alone; None if it is not regular.

    Args:
        slices: of each tensor; the same label is the same group.
    """
    first, dims = slices[0], slices[0].labels.dim()
    if len(slices) == 1 and dims == 1:
        # Rows of one tensor are moved whole by an index, too.
        return None
    sizes = sorted(first.labels.shape)
    if not first.labels.numel() or any(
        sorted(other.labels.shape) != sizes or int(other.labels.min()) < 0 for other in slices
    ):
        return None
    to_first = tuple(next(_symmetries(other, first), None) for other in slices)
    if None in to_first:
        return None
    symmetries = _chained(tuple(_symmetries(first, first)))
    if not symmetries or len(symmetries) * len(slices) == 1 or not _are_orbits(first, symmetries):
        return None
    return Correspondence(to_first, symmetries)  # type: ignore[arg-type]


def _symmetries(moved: Slices, fixed: Slices) -> Iterator[Move]:
    """Yield the moves of labels that make them other labels."""
    shape = moved.labels.shape
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    if len(wide) > _FLIPPED:
        return
    for order in permutations(wide) if len(wide) <= _PERMUTED else [wide]:
        dims = list(range(len(shape)))
        for dim, before in zip(wide, order, strict=True):
            dims[dim] = before
        if tuple(shape[dim] for dim in dims) != tuple(fixed.labels.shape):
            continue
        for count in range(len(wide) + 1):
            for flips in combinations(wide, count):
                move = Move(tuple(dims), flips)
                sign = _sign(moved, fixed, move)
                if sign:
                    yield move._replace(sign=sign)


def _chained(symmetries: tuple[Move, ...]) -> tuple[Move, ...]:
    """Return a group of symmetries so that pairwise sums over an orbit are the same from each of its entries.

    The first half of the moves and the second are the cosets of a subgroup of index two, and so on along a chain of
    normal subgroups: sums of two commute. Of a group without such a chain nothing is returned.
    """
    chain = symmetries[:1]
    while len(chain) < len(symmetries):
        cosets = {move: {move.after(other) for other in chain} for move in symmetries if move not in chain}
        for move, coset in cosets.items():
            is_normal = all(other.after(move) in {part.after(other) for part in coset} for other in symmetries)
            if move.after(move) in chain and is_normal:
                chain = tuple(part for other in chain for part in (other, move.after(other)))
                break
        else:
            return ()
    return chain


def _sign(moved: Slices, fixed: Slices, move: Move) -> int:
    """Return the sign by which a move takes slices to other ones, 0 if it does not."""
    if not torch.equal(_edge(moved.labels, move), fixed.labels[0]) or not torch.equal(move(moved.labels), fixed.labels):
        return 0
    if moved.scale is None and fixed.scale is None:
        return 1
    scales, others = move(moved.scales), fixed.scales
    return next((sign for sign in (1, -1) if torch.equal(scales * sign, others)), 0)


def _edge(labels: Tensor, move: Move) -> Tensor:
    """Return the first slice of moved labels; most moves are told from symmetries by it."""
    edge = labels.permute(move.dims).select(0, -1 if 0 in move.flips else 0)
    return edge.flip([dim - 1 for dim in move.flips if dim > 0])


def _are_orbits(slices: Slices, symmetries: Sequence[Move]) -> bool:
    """Return whether groups are orbits of symmetries, of scale 1 or -1, and 0 where the symmetries leave no other."""
    labels, count = slices.labels.flatten(), slices.labels.numel()
    # There are at least as many orbits, and the labels need not be numbered.
    if int(labels.max()) >= count or int(labels.max()) < count // len(symmetries) - 1:
        return False
    entries = torch.arange(count, device="cpu").view(slices.labels.shape)
    first, _, is_zero = _orbits_of(entries, symmetries)
    if int((first == entries.view(-1)).sum()) != int((torch.bincount(labels) > 0).sum()):
        return False
    is_pinned = torch.zeros_like(labels) if is_zero is None else is_zero
    return slices.scale is None or torch.equal(slices.scale.flatten().abs(), 1.0 - is_pinned.double())


def first_members(slices: Slices, correspondence: Correspondence) -> Tensor:
    """Return the first member of the group of each slice of the first tensor, int64."""
    entries = torch.arange(slices.labels.numel(), device="cpu").view(slices.labels.shape)
    return _orbits_of(entries, correspondence.symmetries).first


def _orbits_of(entries: Tensor, symmetries: Sequence[Move]) -> Orbits:
    """Return what symmetries of a tensor leave of its entries.

    Args:
        entries: their numbers, int64, of the shape of the tensor.
        symmetries: a group.
    """
    first = entries
    if all(move.sign == 1 for move in symmetries):
        for move in symmetries[1:]:
            first = torch.minimum(first, move(entries))
        return Orbits(first.flatten())
    signs = torch.ones_like(entries)
    for move in symmetries:
        moved, sign = move(entries), move.sign
        # Of an entry that is its own negative nothing is left.
        signs = torch.where(moved < first, sign, torch.where((moved == first) & (signs != sign), 0, signs))
        first = torch.minimum(first, moved)
    return Orbits(first.flatten(), signs.flatten() < 0, signs.flatten() == 0)


def tiles(correspondence: Correspondence, grids: Sequence[Tensor]) -> Iterator[Tile]:
    """Yield one tile of the first tensor from each orbit of tiles.

    Args:
        correspondence: of the members.
        grids: the tensors, the slices of their labels in front; their layout and device matter, and not their entries.
    """
    shape, dims = grids[0].shape, grids[0].dim()
    symmetries, to_first = ([move.extended(dims) for move in moves] for moves in reversed(correspondence))
    moves = [(number, symmetry.after(move)) for symmetry in symmetries for number, move in enumerate(to_first)]
    # The dimension along which neighbours in memory lie, member by member.
    fast = {
        min(range(dims), key=lambda dim: (shape[dim] == 1, grids[number].stride(move.dims[dim]), -dim))
        for number, move in moves
    }
    is_accelerator = devices.is_accelerator(grids[0].device)
    most, least = (_ACCELERATOR_ENTRIES, _ACCELERATOR_TILE) if is_accelerator else (_CPU_ENTRIES, _CPU_TILE)
    if len(symmetries) > 1:
        # Numbers are kept for the entries of a tile that is taken to itself.
        most //= 4
    most = max(most // len(moves), least)
    linked = [{move.dims[dim] for move in symmetries} for dim in range(dims)]
    mirrors = [] if any(move.permutes for move in symmetries) else [move.flips for move in symmetries[1:]]
    block = _block(shape, fast, linked, most, mirrors)
    cuts = [_cuts(*sizes) for sizes in zip(shape, block, strict=True)]
    known: dict[tuple[tuple[int, ...], tuple[Move, ...]], tuple[Orbits, Tensor]] = {}
    for at in product(*(range(len(cut)) for cut in cuts)):
        images = [_image(at, move, cuts) for move in symmetries]
        if min(images) != at:
            continue
        tile = tuple(cut[number] for cut, number in zip(cuts, at, strict=True))
        tile_shape = tuple(part.stop - part.start for part in tile)
        views = [View.of(number, tile, shape, move) for number, move in moves]
        # Of entries that are their own negatives there are views of both signs. The positive ones write 0.0, not -0.0.
        # Views of one region write the same values; a plain one need not transpose them.
        best_last = sorted(views, key=lambda view: (view.move.sign, view.is_plain))
        distinct = {(view.tensor, str(view.region)): view for view in best_last}
        stabilizers = tuple(move for move, image in zip(symmetries, images, strict=True) if image == at)
        orbits, counts = None, None
        if len(stabilizers) > 1:
            key = tile_shape, stabilizers
            if key not in known:
                known[key] = _stabilized(*key, len(distinct), grids[0].device)
            orbits, counts = known[key]
        is_plain = all(view.is_plain for view in views)
        yield Tile(tuple(views), tuple(distinct.values()), tile_shape, is_plain, orbits, counts)


def _stabilized(
    shape: tuple[int, ...], stabilizers: Sequence[Move], images: int, device: torch.device
) -> tuple[Orbits, Tensor]:
    """Return what is left of a tile that symmetries take to itself, and how many members each of its entries has."""
    entries = torch.arange(math.prod(shape), device="cpu").view(shape)
    orbits = _orbits_of(entries, stabilizers)
    places = torch.stack([move(entries).flatten() for move in stabilizers]).sort(dim=0).values
    counts = images * (1 + (places.diff(dim=0) != 0).sum(0))
    orbits = Orbits._make(part if part is None else part.to(device) for part in orbits)
    return orbits, counts.to(device, wide_dtype(device))


def _block(
    shape: Sequence[int], fast: set[int], linked: Sequence[set[int]], most: int, mirrors: Sequence[tuple[int, ...]]
) -> list[int]:
    """Return the shape of tiles: of no more entries, as long as can be where some member has neighbours in memory.

    Args:
        shape: what is cut.
        fast: the dimensions along which some member has neighbours in memory.
        linked: for each dimension those that symmetries take it to, which are cut alike.
        most: entries.
        mirrors: the dimensions that each symmetry flips, if they do nothing else.
    """
    block = list(shape)

    def halve(dim: int) -> None:
        size = -(-block[dim] // 2)
        for other in linked[dim]:
            block[other] = size

    for flips in mirrors:
        # A tile that is taken to itself is computed twice. Along the first dimension, so that the first members lead.
        is_whole = all(block[dim] == shape[dim] for dim in flips)
        if is_whole and shape[flips[0]] >= _WIDE:
            halve(flips[0])
    while math.prod(block) > most:
        slow_dims = [dim for dim, size in enumerate(block) if size > 1 and dim not in fast]
        halve(max(slow_dims or range(len(block)), key=block.__getitem__))
    return block


def _cuts(size: int, block: int) -> list[slice]:
    """Cut a dimension into parts of about one size, which are the same from either end."""
    count = -(-size // block)
    # In the middle of an odd number there is a part, and in that of an even one a cut.
    count += count > 1 and count % 2 != size % 2
    bounds = [number * size // count for number in range((count + 1) // 2)]
    if count % 2 == 0:
        bounds.append(size // 2)
    bounds += [size - bound for bound in reversed(bounds[: count + 1 - len(bounds)])]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _image(at: Sequence[int], move: Move, cuts: Sequence[Sequence[slice]]) -> tuple[int, ...]:
    """Return the tile that the entries come from that a move takes to a tile."""
    image = list(at)
    for dim, before in enumerate(move.dims):
        image[before] = len(cuts[dim]) - 1 - at[dim] if dim in move.flips else at[dim]
    return tuple(image)
