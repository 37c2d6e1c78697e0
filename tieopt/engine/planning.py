"""The plan of an exchange, made by ranks of which each has the labels of its own slices alone.

Each label has a *home*, a rank that hears of the members from all ranks that have some, and answers what these need to
know of the whole group. So a rank has its own labels and its share of the groups, and none has all labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tieopt.engine.exchange import Plan
from tieopt.ties.slices import FREE, Totals, firsts_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Peers(NamedTuple):
    """The ranks among which the slices of a parameter are divided.

    Attributes:
        process_group: in which they are, maybe among others; None if this rank is alone.
        ranks: their numbers in it, in the order of their slices, int64.
        rank: the number of this one.
        size: how many ranks the process group has.
        device: from which they send.
    """

    process_group: ProcessGroup | None
    ranks: Tensor
    rank: int
    size: int
    device: torch.device

    @classmethod
    def alone(cls) -> Peers:
        """Return this rank alone."""
        return cls(None, torch.zeros(1, dtype=torch.int64, device="cpu"), 0, 1, torch.device("cpu"))

    def moved(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send so many rows to each rank of the process group, and return those that come from each."""
        if self.process_group is None:
            return rows
        arrived = torch.empty((sum(received), *rows.shape[1:]), dtype=rows.dtype, device=self.device)
        dist.all_to_all_single(arrived, rows.contiguous().to(self.device), received, sent, group=self.process_group)
        return arrived.cpu()

    def gathered(self, values: Tensor) -> Tensor:
        """Return the values of all of these ranks, stacked."""
        if self.process_group is None:
            return values[None]
        parts = [torch.empty_like(values, device=self.device) for _ in range(self.size)]
        dist.all_gather(parts, values.to(self.device), group=self.process_group)
        return torch.stack(parts).cpu()[self.ranks]


class _Mail:
    """Rows that go from each rank to others, and are answered row by row.

    Args:
        receivers: the rank that each row goes to.
        peers: the ranks.
    """

    def __init__(self, receivers: Tensor, peers: Peers) -> None:
        self._peers = peers
        self._order = receivers.argsort(stable=True)
        ones, counts = [1] * peers.size, torch.bincount(receivers, minlength=peers.size)
        self.sent: list[int] = counts.tolist()
        self.received: list[int] = peers.moved(counts, ones, ones).tolist()

    def delivered(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Send rows, given as columns, and return the columns of what has come, sorted by rank."""
        rows = torch.stack(columns, 1)[self._order]
        return self._peers.moved(rows, self.sent, self.received).unbind(1)

    def answered(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Answer all rows that have come, and return the answers to those that were sent."""
        answers = self._peers.moved(torch.stack(columns, 1), self.received, self.sent)
        return torch.empty_like(answers).index_copy_(0, self._order, answers).unbind(1)

    @property
    def senders(self) -> Tensor:
        """The rank that each row has come from."""
        counts = torch.tensor(self.received, device="cpu")
        return torch.arange(len(counts), device="cpu").repeat_interleave(counts)


class PlannedTogether(NamedTuple):
    """What a rank knows once the ranks have planned an exchange together.

    Attributes:
        plan: of this rank.
        spanning: how many groups span ranks.
        members_across: for each group of this rank, in the order of their first members here, whether a lower rank has
            members of it, and how many members it has on all ranks.
        totals: of the tie on all ranks.
    """

    plan: Plan
    spanning: int
    members_across: tuple[Tensor, Tensor]
    totals: Totals


def plan_together(labels: Tensor, peers: Peers) -> PlannedTogether:
    """Plan what :func:`~tieopt.engine.exchange.plan_exchange` plans with the labels of all ranks; a collective.

    Args:
        labels: of the slices that this rank has, int64 on the CPU.
        peers: the ranks.
    """
    place = int((peers.ranks < peers.rank).sum())
    start = peers.gathered(torch.tensor([len(labels)], device="cpu"))[:place].sum()
    members = (labels != FREE).nonzero().squeeze(1)
    known, number, counts = torch.unique(labels[members], return_inverse=True, return_counts=True)
    slices = start + members
    firsts = slices[firsts_of(number, len(known))]

    homes = _Mail(peers.ranks[_mixed(known).remainder(len(peers.ranks))], peers)
    labels_told, counts_told, firsts_told = homes.delivered(known, counts, firsts)
    held, group = torch.unique(labels_told, return_inverse=True)
    sizes_held = torch.zeros_like(held).index_add_(0, group, counts_told)
    # What has come is sorted by rank, and so are the slices.
    lowest = firsts_of(group, len(held))
    sizes, leads = homes.answered(sizes_held[group], firsts_told[lowest][group])

    # A group counts on the rank that has its first member.
    begins, spans = leads == firsts, sizes > counts
    digest = _mixed(_mixed(slices) + leads[number])[sizes[number] > 1].sum()
    counted = [begins & spans, labels >= FREE, begins, labels != FREE, sizes == 1]
    gathered = peers.gathered(torch.stack([*map(torch.count_nonzero, counted), digest]))
    spanning, *totals = gathered.sum(0).tolist()

    # Spanning groups are numbered in the order of their first members.
    turns, begun = torch.full_like(known, -1), (begins & spans).nonzero().squeeze(1)
    turns[begun[firsts[begun].argsort()]] = gathered[:place, 0].sum() + torch.arange(len(begun), device="cpu")
    turns_held = homes.delivered(turns)[0][lowest]
    turns, owners = homes.answered(turns_held[group], _in_turns(homes.senders, group, turns_held)[group])

    sent = spans.nonzero().squeeze(1)
    sent = sent[turns[sent].argsort()]
    sent = sent[owners[sent].argsort(stable=True)]
    plan = _plan_of(known[sent], owners[sent], turns[sent], counts[sent], sizes[sent], peers)
    order = firsts.argsort()
    return PlannedTogether(plan, spanning, (~begins[order], sizes[order]), Totals(*totals))


def _in_turns(holders: Tensor, group: Tensor, turns: Tensor) -> Tensor:
    """Return the owner of each group: those who have members take turns, so that none owns much more than the others.

    Args:
        holders: ranks that have members, ascending.
        group: the number of the group that each of them has members of.
        turns: whose turn it is, for each group.
    """
    counts = torch.bincount(group, minlength=len(turns))
    by_group = holders[group.argsort(stable=True)]
    return by_group[counts.cumsum(0) - counts + turns.remainder(counts)]


def _plan_of(groups: Tensor, owners: Tensor, turns: Tensor, counts: Tensor, sizes: Tensor, peers: Peers) -> Plan:
    """Return the plan of a rank, once the owners have heard which means they will receive.

    Args:
        groups: the labels of the groups whose means this rank sends, in this order.
        owners: of these groups.
        turns: the numbers of the groups.
        counts: how many members this rank has.
        sizes: how many members there are on all ranks.
        peers: the ranks.
    """
    mail = _Mail(owners, peers)
    arrived, counts_arrived, sizes_arrived = mail.delivered(turns, counts, sizes)
    owned, slots = torch.unique(arrived, return_inverse=True)
    weights, firsts = counts_arrived.double() / sizes_arrived, firsts_of(slots, len(owned))
    return Plan(peers.rank, groups, sizes, mail.sent, mail.received, slots, weights, firsts)


def _mixed(numbers: Tensor) -> Tensor:
    """Return int64 numbers scattered over all of int64, each always to the same place (the mixer of SplitMix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ _shifted(numbers, shift)) * factor
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, shift: int) -> Tensor:
    """Return the bits of numbers shifted to the right, with zeros in front."""
    return (numbers >> shift) & ((1 << (64 - shift)) - 1)
