"""Labelled slices of tensors: which there are, what tells one labelling from another, where they lie in memory."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from tieopt.tensors import in_front, of_shards, raw_bytes
from tieopt.ties.offsets import Offset

if TYPE_CHECKING:
    from tieopt.ties.across import Across

FREE = -1

# Ties of so many slices at the most, and with labels up to this one, are numbered together.
_FEW, _SMALL = 2**14, 2**40

T = TypeVar("T")


class Slices(NamedTuple):
    """Labelled slices of one tensor.

    Attributes:
        labels: the group of each slice, -1 for a free one; int64 on the CPU. Their shape is how the shape
            of the tensor begins, once dimension ``dim`` was moved to the front.
        scale: what multiple of its group's shared value each slice is, float64 on the CPU, the shape of
            ``labels``; None if all are 1.
        dim: the dimension along which the slices lie.
        offset: what is added to the multiples; None if it is 0 everywhere.
        sharding: the mesh and the placements of the labels, if these are of the slices that this rank has, and other
            ranks have the others; else None.
    """

    labels: Tensor
    scale: Tensor | None = None
    dim: int = 0
    offset: Offset | None = None
    sharding: tuple[Any, Any] | None = None

    def __str__(self) -> str:
        dim, scaled = f", dim={self.dim}" * (self.dim != 0), ", scaled" * (self.scale is not None)
        here = " on this rank" * (self.sharding is not None)
        return f"{described([self])}{here}{dim}{scaled}{', with an offset' * (self.offset is not None)}"

    @property
    def scales(self) -> Tensor:
        """``scale``, also where it is None; not to be written to."""
        if self.scale is not None:
            return self.scale
        return torch.ones((), dtype=torch.float64, device="cpu").expand(self.labels.shape)

    def labels_for(self, tensor: Tensor) -> Tensor:
        """Return one label for each slice of a tensor that has these slices; a ``DTensor`` if they are sharded."""
        if self.sharding is None:
            return self.labels
        return of_shards(self.labels.clone(), *self.sharding, tensor.shape[self.dim])

    def slice_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of one slice of a tensor of a shape."""
        return torch.Size(
            (*shape[self.dim : self.dim + 1], *shape[: self.dim], *shape[self.dim + 1 :])[self.labels.dim() :]
        )

    def steps(self, tensor: Tensor) -> tuple[int, ...]:
        """For each dimension of the labels, how many of :meth:`rows` lie between neighbours."""
        return (1,) if self.labels.dim() == 1 else self._walk(tensor)[1]

    def are_rows(self, steps: tuple[int, ...]) -> bool:
        """Whether :meth:`rows` are the slices in the order of their labels, and no others."""
        count = 1
        for step, size in zip(reversed(steps), reversed(self.labels.shape), strict=True):
            if step != count and size > 1:
                return False
            count *= size
        return True

    def positions(self, steps: tuple[int, ...]) -> Tensor:
        """Which of :meth:`rows` each slice is, int64, the shape of ``labels``."""
        positions = torch.zeros((), dtype=torch.int64, device="cpu")
        for step, size in zip(steps, self.labels.shape, strict=True):
            positions = positions[..., None] + step * torch.arange(size, device="cpu")
        return positions

    def rows(self, tensor: Tensor) -> Tensor:
        """A view with the slices along its first dimension.

        One label dimension is moved to the front. Several are walked as one, in steps of what their
        strides have in common, whatever the layout; so not every row needs to be a slice, and rows may
        overlap, but the slices among them do not.
        """
        rows, depth = in_front(tensor, self.dim), self.labels.dim()
        if depth == 1:
            return rows
        stride, steps = self._walk(tensor)
        last = sum(step * (size - 1) for step, size in zip(steps, self.labels.shape, strict=True))
        count = last + 1 if self.labels.numel() else 0
        return rows.as_strided((count, *rows.shape[depth:]), (stride, *rows.stride()[depth:]))

    def by_entry(self, shape: torch.Size) -> Slices:
        """Return the same with a label for each entry of a tensor of a shape."""
        if not shape:
            return self
        numbers, scales = self.entries(shape)
        return Slices(numbers, scales, 0, self.offset and self.offset.by_entry(self.slice_shape(shape), self.dim))

    def frozen_at(self, tensor: Tensor) -> Slices:
        """Return the slices pinned at the values that they have in a tensor."""
        is_frozen = self.labels != FREE
        return self._replace(offset=Offset.of_frozen(tensor, is_frozen, self.dim)) if bool(is_frozen.any()) else self

    def frozen_in(self, dtype: torch.dtype) -> Slices:
        """Return the slices; frozen ones with values of another dtype, as converting the tensor makes them."""
        if self.offset is None or not self.is_frozen:
            return self
        return self._replace(offset=self.offset._replace(values=self.offset.values.to(dtype)))

    @property
    def is_frozen(self) -> bool:
        """Whether the slices are pinned at the values that they had."""
        return self.offset is not None and self.offset.precedence is None

    def without_offset(self) -> Slices:
        """Return the slices, free where they have an offset."""
        if self.offset is None:
            return self
        return Slices(self.labels.masked_fill(self.offset.is_nonzero(), FREE), self.scale, self.dim)

    def offset_of(self, tensor: Tensor) -> Tensor | None:
        """Return the offset of each entry of a tensor, in its shape; of entries in no group it may be any."""
        if self.offset is None:
            return None
        front = self.offset.at(self.offset.rows)
        return front.expand(in_front(tensor, self.dim).shape).movedim(0, self.dim).reshape(tensor.shape)

    def entries(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the slices written out entry by entry, for a tensor of a shape.

        Returns:
            For each entry of the tensor the number of the shared value that it is a multiple of, -1 for a
            free one, int64; and its scale, float64. Both have the shape of the tensor.
        """
        inner = self.slice_shape(shape)
        labels, scales = (values.reshape(*values.shape, *[1] * len(inner)) for values in (self.labels, self.scales))
        within = torch.arange(inner.numel(), device="cpu").view(inner)
        numbers = torch.where(labels == FREE, FREE, labels * inner.numel() + within)
        scales = scales.expand(numbers.shape)
        return numbers.movedim(0, self.dim).view(shape), scales.movedim(0, self.dim).view(shape)

    def _walk(self, tensor: Tensor) -> tuple[int, tuple[int, ...]]:
        """Return the stride of :meth:`rows`, and :meth:`steps`."""
        strides = tensor.movedim(self.dim, 0).stride()
        # The stride of a dimension of one entry means nothing.
        used = [stride if size > 1 else 0 for stride, size in zip(strides, self.labels.shape, strict=False)]
        unit = math.gcd(*used) or 1
        return unit, tuple([stride // unit for stride in used])


class Partition:
    """Labelled slices of one or several tensors: the same label is the same group, whichever tensor it is in.

    Args:
        slices: of each tensor.
        names: how errors call the tensors.
        is_linear: whether offsets do not count: members are multiples of the shared value, as gradients and states are.
        across: the ranks that have members of the same groups in tensors of their own; None if this one is alone.

    Attributes:
        is_of_rows: whether it is of rows of one tensor, so that sparse gradients can be tied as they are.
        labels_are_sharded: whether labels are of the slices that this rank has, and other ranks have the others.
    """

    def __init__(
        self,
        slices: Sequence[Slices],
        names: Sequence[str] | None = None,
        *,
        is_linear: bool = False,
        across: Across | None = None,
    ) -> None:
        self.slices = tuple(slices)
        self.is_linear = is_linear or all(part.offset is None for part in self.slices)
        self.names = tuple(names or [f"tensor {number}" for number in range(len(self.slices))])
        self.across = across
        self.labels_are_sharded = any(part.sharding is not None for part in self.slices)
        is_of_rows = len(self.slices) == 1 and self.slices[0].dim == 0 and self.slices[0].labels.dim() == 1
        self.is_of_rows = is_of_rows and across is None

    @cached_property
    def linear(self) -> Self:
        """The tie of the gradients and the states of the tensors."""
        if self.is_linear:
            return self
        linear = copy.copy(self)
        linear.is_linear = True
        return linear


def are_scaled(slices: Iterable[Slices]) -> bool:
    """Return whether slices of a tensor have scales."""
    return any(part.scale is not None for part in slices)


def flat_labels(slices: Sequence[Slices]) -> Tensor:
    """Return the labels of all slices, tensor by tensor."""
    return concatenated([part.labels.flatten() for part in slices])


def flat_scales(slices: Sequence[Slices]) -> Tensor:
    """Return the scales of all slices, tensor by tensor; not to be written to."""
    return concatenated([part.scales.flatten() for part in slices])


def concatenated(vectors: list[Tensor]) -> Tensor:
    """Return vectors as one; a single one as it is, because it may be long."""
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def with_labels(slices: Sequence[Slices], labels: Iterable[Tensor]) -> tuple[Slices, ...]:
    """Return slices with other labels, given in any shape."""
    return tuple([part._replace(labels=new.view(part.labels.shape)) for part, new in zip(slices, labels, strict=True)])


def numbered(slices: Sequence[Slices]) -> tuple[Slices, ...]:
    """Groups numbered 0, 1, ... in the order of their first members.

    Two ways to write one partition give equal labels then. Sharded labels stay, because other ranks know the groups by
    them.
    """
    flat = flat_labels(slices)
    if not len(flat) or any(part.sharding is not None for part in slices):
        return tuple(slices)
    largest = int(flat.max())
    # Most labels that are written by hand are numbered so.
    if largest < len(flat) and int(flat[0]) <= 0 and bool((flat.cummax(0).values.diff() <= 1).all()):
        return tuple(slices)
    # Free slices are group 0 here.
    if largest < 4 * len(flat):
        names = flat + 1
    else:
        names = torch.unique(flat, return_inverse=True)[1] + int(flat.min() != FREE)
    first = firsts_of(names, int(names.max()) + 1)
    # Names without members have the last entry as their first one.
    is_first = torch.zeros(len(flat) + 1, dtype=torch.bool, device="cpu").index_fill_(0, first[1:], True)
    rank = (is_first.cumsum(0) - 1).index_select(0, first)
    rank[0] = FREE
    return _with_labels_of([slices], rank.index_select(0, names))[0]


def all_numbered(ties: Sequence[Sequence[Slices]]) -> list[tuple[Slices, ...]]:
    """Number the groups of each of several ties, as :func:`numbered` does."""
    # Several operators for each of thousands of small ties take longer than a copy of their labels.
    few = [number for number, slices in enumerate(ties) if _have_few_labels(slices)]
    together = dict(zip(few, _numbered_together([ties[number] for number in few]), strict=True))
    return [together[number] if number in together else numbered(slices) for number, slices in enumerate(ties)]


def _have_few_labels(slices: Sequence[Slices]) -> bool:
    """Return whether there are few slices, and labels that are small enough to add thousands of them up."""
    is_known = all(part.sharding is None for part in slices)
    return is_known and sum(part.labels.numel() for part in slices) <= _FEW and _bound_of(slices) <= _SMALL


def _numbered_together(ties: Sequence[Sequence[Slices]]) -> list[tuple[Slices, ...]]:
    if not ties:
        return []
    apart, _ = _labels_apart(ties)
    (whole,) = numbered([Slices(apart)])
    if whole.labels is apart:
        return list(map(tuple, ties))
    # Each tie has the groups that follow those of the ties before it.
    counts = _counts_of(ties)
    ends = torch.nn.functional.pad(_bounds_of(whole.labels, counts).cummax(0).values, (1, 0))
    return _with_labels_of(ties, _shifted(whole.labels, counts, -ends[:-1]))


def labels_before(slices: Sequence[Slices], before: Sequence[Slices]) -> Tensor:
    """Return for each group the label that it had before it was numbered anew, int64."""
    now, then = flat_labels(slices), flat_labels(before)
    members = (now != FREE).nonzero().squeeze(1)
    count = 1 + int(now.max()) if len(now) else 0
    return torch.empty(count, dtype=torch.int64, device="cpu").index_copy_(0, now[members], then[members])


def in_order(slices: Sequence[Slices]) -> tuple[Slices, ...]:
    """Return slices in which no two members with an offset have the same precedence, so that it holds in any order."""
    offsets = [part.offset for part in slices if part.offset is not None and not part.is_frozen]
    if not offsets:
        return tuple(slices)
    before = torch.cat([offset.precedence.flatten() for offset in offsets if offset.precedence is not None])
    ranks = torch.empty_like(before)
    ranks[before.argsort(stable=True)] = torch.arange(1.0, len(before) + 1, dtype=before.dtype, device="cpu")
    ranks = torch.where(before == 0, 0, ranks)
    parts = iter(torch.split(ranks, [offset.rows.numel() for offset in offsets]))
    return tuple(
        part
        if part.offset is None or part.is_frozen
        else part._replace(offset=part.offset._replace(precedence=next(parts).view(part.labels.shape)))
        for part in slices
    )


def firsts_of(groups: Tensor, count: int) -> Tensor:
    """Return the first member of each of ``count`` groups, from the group of each; if it has none, their number."""
    numbers = torch.arange(len(groups), device="cpu")
    return torch.full((count,), len(groups), device="cpu").scatter_reduce_(0, groups, numbers, "amin")


def narrow(numbers: Tensor) -> Tensor:
    """Return whole numbers as int32 if they fit, which torch sorts in half of the time."""
    return numbers.int() if not len(numbers) or int(numbers.max()) < 2**31 else numbers


def counted(number: int, noun: str) -> str:
    """A number of things, with the noun in the singular or the plural."""
    return f"{number} {noun}{'s' * (number != 1)}"


def groups_of_members(groups: int, members: int) -> str:
    """How many groups there are, and how many members they have together, in words."""
    if groups == 0:
        return "no groups"
    return f"{counted(groups, 'group')} of {counted(members, 'member')}{' in all' * (groups > 1)}"


def described(slices: Sequence[Slices]) -> str:
    """How many groups, members and free slices there are, in words."""
    groups, members, free = _counts(slices)
    return f"{groups_of_members(groups, members)}, {free} free"


def _counts(slices: Sequence[Slices]) -> tuple[int, int, int]:
    """The numbers of groups, members and free slices."""
    labels = flat_labels(slices)
    free = int((labels == FREE).sum())
    return len(torch.unique(labels[labels != FREE])), labels.numel() - free, free


def is_idle(slices: Sequence[Slices]) -> bool:
    """Return whether labelled slices tie nothing: each is alone in its group, and none is pinned or scaled.

    Args:
        slices: with groups numbered from 0 on without gaps, as by :func:`numbered`.
    """
    members = int((flat_labels(slices) != FREE).sum())
    return 0 < members == _bound_of(slices) and all(
        part.scale is None or bool((part.scale.abs() == 1)[part.labels != FREE].all()) for part in slices
    )


def sizes_of_groups(ties: Sequence[Sequence[Slices]]) -> list[int]:
    """Return for each of several ties the size of its groups that have two trained members or more.

    Args:
        ties: with groups numbered from 0 on without gaps, as by :func:`numbered`.

    Returns:
        The sizes; 0 for a tie without such a group, or with groups of several sizes.
    """
    labels, counts = _labels_apart(ties)
    is_trained = labels != FREE
    if any(map(are_scaled, ties)):
        is_trained &= flat_scales([*chain.from_iterable(ties)]) != 0
    sizes = torch.bincount(labels[is_trained], minlength=int(counts.sum()))
    is_group, tie = sizes > 1, torch.arange(len(ties), device="cpu").repeat_interleave(counts)
    tie, sizes = tie[is_group], sizes[is_group]
    largest = torch.zeros_like(counts).scatter_reduce_(0, tie, sizes, "amax")
    smallest = torch.zeros_like(counts).scatter_reduce_(0, tie, sizes, "amin", include_self=False)
    return torch.where(smallest == largest, largest, 0).tolist()


def has_shared_values(slices: Sequence[Slices]) -> bool:
    """Return whether a slice is in a group, and not pinned."""
    return any(bool(((part.labels != FREE) & (part.scales != 0)).any()) for part in slices)


def fingerprint(
    slices: Sequence[Slices], numbers: Sequence[int], shapes: Sequence[torch.Size], across: Across | None = None
) -> str:
    """What a checkpoint says of a tie: readable, and the same for the same tie.

    A group of one member ties nothing, and counts as a free slice. All that is pinned at zero is one. It
    does not matter which sign the first member of a group has.

    Args:
        slices: of each parameter.
        numbers: of the parameters in the ``state_dict``.
        shapes: of the parameters.
        across: as for :class:`Partition`.
    """
    flat, scale = flat_labels(slices), flat_scales(slices)
    tied, pinned = (flat != FREE) & (scale != 0), (flat != FREE) & (scale == 0)
    _, number, sizes = torch.unique(torch.where(tied, flat, FREE), return_inverse=True, return_counts=True)
    kept = tied & ((sizes[number] > 1) | (scale.abs() != 1) | (across is not None))
    (canonical,) = numbered([Slices(torch.where(kept, flat, FREE))])
    labels = canonical.labels
    leads = firsts_of(labels + 1, len(flat) + 1)
    signs = torch.where(kept, scale[leads[labels + 1]].sign(), 1.0)
    places = [(number, part.dim, tuple(part.labels.shape)) for number, part in zip(numbers, slices, strict=True)]
    digest = hashlib.sha256(repr(places).encode())
    for column in (torch.where(pinned, FREE - 1, labels), torch.where(kept, scale * signs, 1.0)):
        digest.update(raw_bytes(column))
    notes = f", {int(pinned.sum())} at zero" if pinned.any() else ""
    if across is not None:
        # Which groups of other ranks these are.
        digest.update(raw_bytes(across.labels))
        notes += ", across ranks"
    present = (kept | pinned).split([part.labels.numel() for part in slices])
    for number, (part, where, shape) in enumerate(zip(slices, present, shapes, strict=True)):
        chosen = where.view(part.labels.shape)
        if part.offset is not None and bool((part.offset.is_nonzero() & chosen).any()):
            digest.update(f"offset {number}".encode())
            for values in part.offset.written_out(chosen, part.slice_shape(shape)):
                digest.update(raw_bytes(values))
            notes = notes.replace("zero", "their offsets")
    groups, members, free = _counts([canonical])
    # Checkpoints are compared by these words: they stay as they are, whatever other messages say.
    return f"{counted(groups, 'group')} of {members} members, {free} free{notes}, sha256 {digest.hexdigest()}"


class Totals(NamedTuple):
    """Counts of a tie whose labels are sharded, over all ranks.

    Attributes:
        slices: how many slices there are.
        groups: how many groups they are in.
        members: how many members these have.
        alone: how many groups have one member.
        digest: a number that depends on which slices are tied to each other, and not on who has them.
    """

    slices: int
    groups: int
    members: int
    alone: int
    digest: int

    @property
    def free(self) -> int:
        """How many slices are in no group."""
        return self.slices - self.members

    def fingerprint(self, number: int, dim: int) -> str:
        """Return what a checkpoint says of the tie, as :func:`fingerprint` does of labels that are not sharded.

        Args:
            number: of the parameter in the ``state_dict``.
            dim: along which the slices lie.
        """
        digest = hashlib.sha256(repr((number, dim, self.slices, self.digest)).encode()).hexdigest()
        # A group of one member ties nothing, and counts as a free slice.
        groups, members = counted(self.groups - self.alone, "group"), self.members - self.alone
        return f"{groups} of {members} members, {self.free + self.alone} free, sharded labels, sha256 {digest}"


def of_one_kind(
    ties: Iterable[Sequence[tuple[T, Slices]]], shape_of: Callable[[T], torch.Size]
) -> list[tuple[T, Slices]]:
    """Return the slices of several ties, with labels that no two of the ties share, of one kind for each key.

    Args:
        ties: the keys of tensors, and their slices.
        shape_of: returns the shape of the tensor of a key.
    """
    listed = list(ties)
    kinds = {(key, slices.dim, slices.labels.shape) for tie in listed for key, slices in tie}
    # Where a tensor is tied in slices of several kinds, everything is tied entry by entry.
    if len(kinds) > len({key for key, *_ in kinds}):
        # Before labels are told apart: a group of slices is as many groups as a slice has entries.
        listed = [[(key, slices.by_entry(shape_of(key))) for key, slices in tie] for tie in listed]
    apart = told_apart([slices for _, slices in tie] for tie in listed)
    keys = [key for tie in listed for key, _ in tie]
    return list(zip(keys, chain.from_iterable(apart), strict=True))


def told_apart(ties: Iterable[Sequence[Slices]]) -> list[tuple[Slices, ...]]:
    """Return the slices of several ties, with labels that no two of the ties share."""
    listed = list(ties)
    return _with_labels_of(listed, _labels_apart(listed)[0])


def joined(ties: Sequence[Partition]) -> tuple[list[Slices], Tensor | None]:
    """Return the slices of all ties, and labels of these, tensor by tensor, that no two of the ties share.

    The labels are None for a single tie, whose own are distinct already.
    """
    slices_of = [tie.slices for tie in ties]
    labels = None if len(ties) == 1 else _labels_apart(slices_of)[0]
    return list(chain.from_iterable(slices_of)), labels


def _labels_apart(ties: Sequence[Sequence[Slices]]) -> tuple[Tensor, Tensor]:
    """Return the labels of all slices of several ties, so that no two of the ties share one, and the bound of each."""
    labels, counts = flat_labels([*chain.from_iterable(ties)]), _counts_of(ties)
    bounds = _bounds_of(labels, counts)
    return _shifted(labels, counts, bounds.cumsum(0) - bounds), bounds


def _bounds_of(labels: Tensor, counts: Tensor) -> Tensor:
    """Return, for each tie, one more than its largest label.

    Args:
        labels: of all ties, one after the other.
        counts: how many each tie has.
    """
    tie = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    return torch.full_like(counts, FREE).scatter_reduce_(0, tie, labels, "amax") + 1


def _shifted(labels: Tensor, counts: Tensor, shifts: Tensor) -> Tensor:
    """Return labels plus the shift of their tie; free ones stay. Arguments are as for :func:`_bounds_of`."""
    return shifts.repeat_interleave(counts).masked_fill_(labels == FREE, 0).add_(labels)


def _counts_of(ties: Sequence[Sequence[Slices]]) -> Tensor:
    """Return how many slices each of several ties has."""
    counts = [sum([part.labels.numel() for part in slices]) for slices in ties]
    return torch.tensor(counts, dtype=torch.int64, device="cpu")


def _with_labels_of(ties: Sequence[Sequence[Slices]], labels: Tensor) -> list[tuple[Slices, ...]]:
    """Return the slices of each tie with the labels replaced by those given, of all ties one after the other."""
    parts = labels.split_with_sizes([part.labels.numel() for slices in ties for part in slices])
    # Copies, because a pickle has the whole vector once for each of its views.
    own = iter(parts) if len(parts) == 1 else map(torch.clone, parts)
    return [with_labels(slices, islice(own, len(slices))) for slices in ties]


def _bound_of(slices: Sequence[Slices]) -> int:
    """Return one more than the largest label, which is the number of groups if these are numbered."""
    return 1 + max([int(part.labels.max()) if part.labels.numel() else FREE for part in slices])
