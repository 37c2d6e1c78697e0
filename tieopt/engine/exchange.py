"""Who sends what to whom: the groups of sharded tensors that have members on several ranks.

A group *spans* ranks if several have members of it. One of them owns it: every rank sends the owner the mean of the
members that it has, and the owner sends back the mean of all. So the result is computed once, and has the same bits
everywhere; a rank moves what it has members of, and nothing else. Together the ranks move no more than a ring
all-reduce of ``[spanning groups, D]`` does, and less where not every rank has members of every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Holdings(NamedTuple):
    """Which ranks have members of the groups that span ranks, one entry for each group and rank that has.

    Attributes:
        groups: the label of each spanning group, ascending, int64, shape ``[g]``.
        sizes: how many members each has on all ranks, int64, shape ``[g]``.
        owners: the rank that owns each, int64, shape ``[g]``.
        number: which of these groups an entry is of, ascending, int64, shape ``[e]``.
        rank: who has the members, ascending within a group, int64, shape ``[e]``.
        members: how many, int64, shape ``[e]``.
    """

    groups: Tensor
    sizes: Tensor
    owners: Tensor
    number: Tensor
    rank: Tensor
    members: Tensor

    @classmethod
    def of(cls, labels: Sequence[Tensor]) -> Holdings:
        """Holdings of what each rank has.

        Args:
            labels: of the members on each rank, without those of free slices; int64 on the CPU.
        """
        held = [torch.unique(own, return_counts=True) for own in labels]
        names, count = (torch.cat(column) for column in zip(*held, strict=True))
        rank = torch.arange(len(held), device="cpu").repeat_interleave(
            torch.tensor([len(own) for own, _ in held], device="cpu")
        )
        order = names.argsort(stable=True)
        names, rank, count = names[order], rank[order], count[order]
        _, number, holders = torch.unique_consecutive(names, return_inverse=True, return_counts=True)
        spans = holders[number] > 1
        names, rank, count = names[spans], rank[spans], count[spans]
        groups, number, holders = torch.unique_consecutive(names, return_inverse=True, return_counts=True)
        sizes = torch.zeros_like(groups).index_add_(0, number, count)
        # Those who have members take turns, so that none owns much more than the others.
        owners = rank[holders.cumsum(0) - holders + torch.arange(len(groups), device="cpu") % holders]
        return cls(groups, sizes, owners, number, rank, count)


class Plan(NamedTuple):
    """What one rank sends and receives.

    Rows are sorted by the rank that they go to or come from, and then by group.

    Attributes:
        groups: the labels of the spanning groups that it has members of, in the order in which it sends
            their means, int64, shape ``[s]``.
        sizes: how many members each has on all ranks, int64, shape ``[s]``.
        sent: how many of them go to each rank, itself included.
        received: how many rows of its own groups come from each rank, itself included.
        slots: which of its own groups each received row is of, int64, shape ``[r]``.
        weights: which share of the group's members a received row stands for, float64, shape ``[r]``.
        firsts: the first received row of each of its own groups, int64, shape ``[o]``.
    """

    groups: Tensor
    sizes: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    slots: Tensor
    weights: Tensor
    firsts: Tensor

    @classmethod
    def of(cls, holdings: Holdings, rank: int, ranks: int) -> Plan:
        """The plan of one of so many ranks."""
        mine = holdings.number[holdings.rank == rank]
        mine = mine[holdings.owners[mine].argsort(stable=True)]
        entries = (holdings.owners[holdings.number] == rank).nonzero().squeeze(1)
        entries = entries[holdings.rank[entries].argsort(stable=True)]
        own, slots = torch.unique(holdings.number[entries], return_inverse=True)
        weights = holdings.members[entries].double() / holdings.sizes[holdings.number[entries]]
        firsts = torch.full((len(own),), len(slots), device="cpu")
        firsts.scatter_reduce_(0, slots, torch.arange(len(slots), device="cpu"), "amin")
        return cls(
            holdings.groups[mine],
            holdings.sizes[mine],
            tuple(torch.bincount(holdings.owners[mine], minlength=ranks).tolist()),
            tuple(torch.bincount(holdings.rank[entries], minlength=ranks).tolist()),
            slots,
            weights,
            firsts,
        )

    def to(self, device: torch.device) -> Plan:
        """The same on another device."""
        return self._replace(
            groups=self.groups.to(device),
            sizes=self.sizes.to(device),
            slots=self.slots.to(device),
            weights=self.weights.to(device),
            firsts=self.firsts.to(device),
        )

    def rows_moved(self, rank: int) -> int:
        """How many rows this rank sends to others in one projection: its means, and the replies to those of others."""
        return sum(self.sent) - self.sent[rank] + sum(self.received) - self.received[rank]

    @property
    def nbytes(self) -> int:
        """What its tensors take, in bytes."""
        return sum(column.nbytes for column in self if isinstance(column, Tensor))
