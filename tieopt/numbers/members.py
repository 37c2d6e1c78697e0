"""Members of groups: the group and the scale of each slice.

Everybody who asks gets the same answer here, so that groups are numbered alike, and led by the same member, wherever
something is kept for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.ties.slices import FREE, Slices, are_scaled, concatenated, firsts_of, flat_labels, flat_scales, narrow

# A member of a larger scale leads its group even where there is one of scale 1.
_MUCH_LARGER = 256.0


class Members(NamedTuple):
    """Members of groups, each a multiple of the shared value of its group.

    Attributes:
        tensor: the number of the tensor that each is in, int64, shape ``[m]``.
        position: which slice of that tensor it is, int64, shape ``[m]``.
        group: its group, int64, shape ``[m]``.
        scale: its multiple of the group's shared value, shape ``[m]``.
    """

    tensor: Tensor
    position: Tensor
    group: Tensor
    scale: Tensor

    @property
    def by_group(self) -> Members:
        """The same members sorted by group, those of a group in their order."""
        # Twice as fast as int64.
        group, order = narrow(self.group).sort(stable=True)
        return Members(
            _at(self.tensor, order), self.position.index_select(0, order), group.long(), _at(self.scale, order)
        )

    @property
    def firsts(self) -> Tensor:
        """Which member is the first of each group; see :func:`~tieopt.ties.slices.firsts_of`."""
        return firsts_of(self.group, 1 + int(self.group.max()) if len(self.group) else 0)

    @property
    def leads(self) -> Members:
        """The first member of each group."""
        return self.at(self.firsts)

    def at(self, chosen: Tensor | slice) -> Members:
        """Return some of them: a slice, or numbers."""
        return Members(*(_at(column, chosen) for column in self))

    def among(self, others: Tensor) -> Members:
        """Return these members of a single tensor and all its other slices, each as a group of its own after these.

        Args:
            others: the positions of the other slices, int64. The members are in the order of theirs.
        """
        if not len(others):
            return self
        count, first = len(self.position) + len(others), 1 + int(self.group.max())
        group, scale = torch.empty(count, dtype=torch.int64, device="cpu"), self.scale[:1].expand(count)
        group.index_copy_(0, self.position, self.group)
        group.index_copy_(0, others, torch.arange(first, first + len(others), device="cpu"))
        if not bool((self.scale == 1).all()):
            scale = torch.ones(count, dtype=scale.dtype, device="cpu").index_copy_(0, self.position, self.scale)
        return Members(self.tensor[:1].expand(count), torch.arange(count, device="cpu"), group, scale)

    def where(self, condition: Tensor) -> Members:
        """Return the members for which a condition holds."""
        return self if bool(condition.all()) else self.at(condition.nonzero().squeeze(1))


def _at(column: Tensor, chosen: Tensor | slice) -> Tensor:
    if isinstance(chosen, slice):
        return column[chosen]
    # What is the same number everywhere is stored once.
    if len(column) and column.stride() == (0,):
        return column[:1].expand(len(chosen))
    # Several times as fast as indexing, and there may be millions.
    return column.index_select(0, chosen)


def members_of(
    slices: Sequence[Slices],
    steps: Sequence[tuple[int, ...]] | None = None,
    labels: Tensor | None = None,
    *,
    singles: bool = False,
) -> tuple[Members, Members]:
    """Return the members of groups, each group's lead before its other members, and the pinned members. On the CPU.

    This decides which slice is what multiple of which shared value, for all who ask. Groups are numbered by their
    size, so that groups of one size can be reduced as a matrix, then by the tensor that their lead is in, then by
    their first members. Those of a group need not stand together: members are in the order of their slices, unless
    a scale is neither 1 nor -1, or an offset has precedences.

    Args:
        slices: of each tensor.
        steps: with which the slices of each tensor are counted; None to count them in the order of their labels.
        labels: of all slices, tensor by tensor, in place of their own.
        singles: whether groups of one member are groups, and not free slices.
    """
    group, is_scaled = flat_labels(slices) if labels is None else labels, are_scaled(slices)
    # One number each, as long as it is the same everywhere.
    tensor = torch.zeros((), dtype=torch.int64, device="cpu").expand(len(group))
    scale = torch.ones((), dtype=torch.float64, device="cpu").expand(len(group))
    if len(slices) > 1:
        counts = torch.tensor([labelled.labels.numel() for labelled in slices], device="cpu")
        tensor = torch.arange(len(slices), device="cpu").repeat_interleave(counts)
    walked = () if steps is None else tuple(zip(slices, steps, strict=True))
    if not all(labelled.are_rows(own_steps) for labelled, own_steps in walked):
        position = concatenated([labelled.positions(own_steps).flatten() for labelled, own_steps in walked])
    else:
        position = torch.arange(len(group), device="cpu")
        if len(slices) > 1:
            position -= (counts.cumsum(0) - counts).index_select(0, tensor)
    if is_scaled:
        scale = flat_scales(slices)
    members = Members(tensor, position, group, scale)
    is_labelled = members.group != FREE
    members = members.where(is_labelled)
    pinned = members.at(slice(0))
    is_trained = members.scale != 0 if is_scaled else None
    if is_trained is not None:
        pinned, members = members.where(~is_trained), members.where(is_trained)
    if any(labelled.offset is not None and not labelled.is_frozen for labelled in slices):
        ranks = torch.cat([_precedence(labelled) for labelled in slices])[is_labelled]
        members = members.at((ranks if is_trained is None else ranks[is_trained]).argsort(stable=True))
    if is_scaled:
        size = members.scale.abs()
        if not bool((size == 1).all()):
            # A member of scale 1 or -1 leads, so that the others are its multiples, rounded once. If there is none, or
            # a much larger one, the largest leads: a value that is too small for the lead would be lost to all.
            members = members.at(torch.where(size == 1, _MUCH_LARGER, size).argsort(descending=True, stable=True))

    sizes = torch.bincount(members.group)
    is_group = sizes > (0 if singles else 1)
    if is_scaled:
        # The sum of a single gradient is not the gradient itself where its scale is another.
        is_group[members.group[members.scale.abs() != 1]] = True
    order = is_group.nonzero().squeeze(1)
    keys = sizes.index_select(0, order)
    if len(slices) > 1:
        keys = keys * len(slices) + members.tensor[members.firsts[order]]
    if bool((keys[1:] < keys[:-1]).any()):
        order = order.index_select(0, narrow(keys).argsort(stable=True))
    elif len(order) == len(sizes):
        return members, pinned
    rank = torch.full_like(sizes, FREE).index_copy_(0, order, torch.arange(len(order), device="cpu"))
    members = members._replace(group=rank.index_select(0, members.group))
    return members.where(members.group != FREE), pinned


def _precedence(slices: Slices) -> Tensor:
    if slices.offset is None or slices.offset.precedence is None:
        return torch.zeros(slices.labels.numel(), dtype=torch.float64, device="cpu")
    return slices.offset.precedence.flatten()
