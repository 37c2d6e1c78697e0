"""Who sends what to whom: the means of groups that have members on several ranks.

A group *spans* ranks if several have members of it. One of them owns it: every rank sends the owner the mean of the
members that it has, and the owner sends back the mean of all. So the result is computed once, and has the same bits
everywhere; a rank moves what it has members of, and nothing else. Together the ranks move no more than a ring
all-reduce of ``[spanning groups, D]`` does, and less where not every rank has members of every group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tieopt.numbers import devices
from tieopt.numbers.index import Index, Run, memory_order
from tieopt.numbers.members import members_of
from tieopt.numbers.reduction import (
    ValuesOf,
    Workspace,
    add_by_group_,
    group_means,
    is_narrow,
    means_after_step,
    stored_leads,
    towards_leads_,
)
from tieopt.numbers.rounding import rounded
from tieopt.numbers.sums import Sums
from tieopt.tensors import bits, column, in_memory, wide_dtype
from tieopt.ties.slices import Slices, firsts_of, flat_labels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Entries whose means are computed at a time: what the caches hold, or what fills an accelerator.
_CPU_ENTRIES = 2**17
_ACCELERATOR_ENTRIES = 2**22


class Exchange:
    """The exchange of the means of spanning groups, as one rank takes part in it with shards of one layout.

    Args:
        slices: of the shards; the label of a member is the row that is sent for its group.
        shards: of this rank.
        plan: of this rank.
        process_group: the ranks that exchange.

    Attributes:
        index: of the members of spanning groups in the shards.
    """

    @torch.inference_mode(False)  # Its tensors are to be used outside as well.
    def __init__(
        self, slices: Sequence[Slices], shards: Sequence[Tensor], plan: Plan, process_group: ProcessGroup | None
    ) -> None:
        index = Index.compile(slices, shards, singles=True)
        device = index.layout.device
        leads = members_of(slices, singles=True)[0].leads
        before = torch.tensor([0, *accumulate(part.labels.numel() for part in slices)], device="cpu")
        rows = flat_labels(slices)[before[leads.tensor] + leads.position]
        sizes = [len(run.norms) for run in index.runs]
        rows_of, signs_of = rows.split_with_sizes(sizes), leads.scale.split_with_sizes(sizes)
        runs = []
        # By the identity of a run, which has no hash: the row that is sent for each of its groups, and what the lead of
        # each is of the shared value, 1 or -1; None if all are 1.
        self._sent: dict[int, tuple[Tensor, Tensor | None]] = {}
        for run, row, sign in zip(index.runs, rows_of, signs_of, strict=True):
            # The sum is that over the members on all ranks.
            runs.append(run._replace(counts=plan.sizes[row].to(device)))
            signs = None if bool((sign == 1).all()) else sign.to(device, wide_dtype(device))
            self._sent[id(runs[-1])] = row.to(device), signs
        self.index = replace(index, runs=tuple(runs))
        self._plan = plan
        self._blocks = list(_blocks(plan, slices[0].slice_shape(shards[0].shape).numel(), device))
        self._process_group = process_group

    @torch.no_grad()
    def means_of(
        self, shards: Sequence[Tensor], workspace: Workspace, stepped: bool, *, of_first: bool = False
    ) -> ValuesOf:
        """Exchange the means, and return what gives those of the groups of each run.

        Args:
            shards: of this rank.
            workspace: buffers to work in.
            stepped: whether a step has just written the tensors, see
                :func:`~tieopt.numbers.reduction.means_after_step`.
            of_first: whether the mean of the lowest rank stands for that of all.
        """
        rows, plan = self.index.rows(shards), self._plan
        stored, device = rows[0].dtype, rows[0].device
        # Dimensions are sent in an order that does not depend on how a rank has its shard in memory.
        raw = self.index.slices[0].rows(in_memory(shards[0]))
        back = [0, *memory_order(raw), *range(raw.dim(), rows[0].dim())]
        order = sorted(range(len(back)), key=back.__getitem__)
        shape = tuple(rows[0].shape[dim] for dim in order[1:])
        # A mean of a few members in half precision has digits that the mean of all needs.
        wire = stored if stored.itemsize >= 4 else torch.float32

        def to_be_sent(values_of: ValuesOf, name: str) -> Tensor:
            values = workspace[name, (len(plan.groups), *shape), wire, device]
            for run in self.index.runs:
                sent, signs = self._sent[id(run)]
                # The mean of one member is that member.
                of_run = (stored_leads if run.chunks[0].size == 1 else values_of)(rows, run, workspace)
                values.index_copy_(0, sent, _signed(of_run.permute(order).to(wire), signs))
            return values

        means = to_be_sent(group_means, "sent")
        received = workspace["received", (len(plan.slots), *shape), wire, device]
        dist.all_to_all_single(received, means, plan.received, plan.sent, group=self._process_group)
        leads = None
        if stepped and is_narrow(stored):
            # An owner has members of its groups: what these make of their own mean stands for the lead, on every rank.
            leads = to_be_sent(means_after_step, "settled").split_with_sizes(plan.sent)[plan.rank]
        replies = workspace["replies", received.shape, stored, device]
        for block in self._blocks:
            sent = received.index_select(0, block.rows)
            owned = block.firsts_of(sent) if of_first else _weighted_means(sent, block, workspace)
            if leads is not None:
                towards_leads_(owned, leads[block.groups].to(stored).to(owned.dtype), stored, workspace)
            bits(replies).index_copy_(0, block.rows, bits(rounded(owned, stored)).index_select(0, block.slots))
        shared = workspace["shared", means.shape, stored, device]
        dist.all_to_all_single(bits(shared), bits(replies), plan.sent, plan.received, group=self._process_group)

        def values_of(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
            sent, signs = self._sent[id(run)]
            values = bits(shared).index_select(0, sent).view(stored).permute(back)
            return _signed(values.to(wide_dtype(device)), signs)

        return values_of


def _signed(values: Tensor, signs: Tensor | None) -> Tensor:
    return values if signs is None else values * column(signs.to(values.dtype), values)


class _Block(NamedTuple):
    """Consecutive groups that a rank owns, whose means are computed at once.

    Attributes:
        groups: the numbers of these groups.
        rows: the numbers of the received rows of these groups, ascending, int64, shape ``[b]``.
        slots: the group of each row, counted from the first of the block, int64, shape ``[b]``.
        firsts: where in the block the first row of each group is, int64.
        weights: the share of its group that each row stands for, in the wide dtype, shape ``[b]``.
        sums: how the rows are added up.
    """

    groups: slice
    rows: Tensor
    slots: Tensor
    firsts: Tensor
    weights: Tensor
    sums: Sums

    def firsts_of(self, rows: Tensor) -> Tensor:
        """Return what the lowest rank has sent for each group, in the wide dtype; rows are sorted by rank."""
        return rows.index_select(0, self.firsts).to(self.weights.dtype)


def _blocks(plan: Plan, slice_entries: int, device: torch.device) -> Iterator[_Block]:
    """Cut the groups that a rank owns into blocks; each has at most one row from every rank for a group."""
    entries = _ACCELERATOR_ENTRIES if devices.is_accelerator(device) else _CPU_ENTRIES
    count = max(entries // (len(plan.sent) * max(slice_entries, 1)), 1)
    block_of = plan.slots // count
    for number, rows in enumerate(block_of.argsort(stable=True).split_with_sizes(torch.bincount(block_of).tolist())):
        groups = slice(number * count, (number + 1) * count)
        slots, weights = plan.slots[rows] - groups.start, plan.weights[rows].to(device, wide_dtype(device))
        firsts = torch.searchsorted(rows, plan.firsts[groups]).to(device)
        yield _Block(groups, rows.to(device), slots.to(device), firsts, weights, Sums.of(slots, device))


def _weighted_means(rows: Tensor, block: _Block, workspace: Workspace) -> Tensor:
    """Return the mean of each group of a block, rows counted by their weights.

    The mean of equal rows, rounded to their dtype, is the row itself, bit for bit.
    """
    weights = column(block.weights, rows)
    if rows.dtype != weights.dtype:
        # No correction is needed: each row adds an error of 2**-53 or so, and was itself rounded by up to 2**-24.
        terms = workspace["wide", rows.shape, weights.dtype, rows.device].copy_(rows).mul_(weights)
        means = workspace["means", (len(block.firsts), *rows.shape[1:]), terms.dtype, rows.device].fill_(-0.0)
        add_by_group_(means, block.sums, terms, workspace)
        return means
    means = block.firsts_of(rows)
    # As in tieopt.numbers.reduction: an estimate far from the mean costs digits; the mean around it is near.
    for _ in range(2):
        pivots = torch.nan_to_num(means, nan=0.0, posinf=0.0, neginf=0.0)
        # In halves, because the distance of two large numbers may overflow.
        differences = rows.mul(0.5).sub_(pivots.index_select(0, block.slots), alpha=0.5).mul_(weights)
        halves = torch.zeros_like(means)
        add_by_group_(halves, block.sums, differences, workspace)
        corrected = halves.add(pivots, alpha=0.5).mul_(2)
        largest = torch.finfo(means.dtype).max
        corrected = torch.where(halves.isfinite(), corrected.clamp(-largest, largest), corrected)
        means = torch.where(halves == 0, means, corrected)
    return means


# --- who sends what ---


class Plan(NamedTuple):
    """What one rank sends and receives.

    Rows are sorted by the rank that they go to or come from, and then by group.

    Attributes:
        rank: whose plan it is.
        groups: the labels of the spanning groups that it has members of, in the order in which it sends
            their means, int64, shape ``[s]``.
        sizes: how many members each has on all ranks, int64, shape ``[s]``.
        sent: how many of them go to each rank, itself included.
        received: how many rows of the groups that it owns come from each rank, itself included.
        slots: which of the groups that it owns each received row is of, int64, shape ``[r]``.
        weights: which share of the group's members a received row stands for, float64, shape ``[r]``.
        firsts: the first received row of each group that it owns, int64, shape ``[o]``.
    """

    rank: int
    groups: Tensor
    sizes: Tensor
    sent: list[int]
    received: list[int]
    slots: Tensor
    weights: Tensor
    firsts: Tensor

    @property
    def rows_moved(self) -> int:
        """How many rows it sends to other ranks in a projection: its means, and the replies to those of others."""
        return sum(self.sent) - self.sent[self.rank] + sum(self.received) - self.received[self.rank]


def plan_exchange(labels: Sequence[Tensor], rank: int) -> tuple[Plan, Tensor]:
    """Plan what one rank sends and receives.

    Args:
        labels: of the members on each rank, from 0 on; int64 on the CPU.
        rank: whose plan it is.

    Returns:
        The plan, and the labels of all groups that span ranks, ascending.
    """
    ranks = len(labels)
    # An entry for each group and each rank that has members of it, sorted by group and then by rank.
    entries = torch.cat([of_rank * ranks + number for number, of_rank in enumerate(labels)])
    entries, members = torch.unique(entries, return_counts=True)
    _, number, holders = torch.unique_consecutive(entries // ranks, return_inverse=True, return_counts=True)
    spans = holders[number] > 1
    entries, members = entries[spans], members[spans]
    groups, number, holders = torch.unique_consecutive(entries // ranks, return_inverse=True, return_counts=True)
    holder, sizes = entries % ranks, torch.zeros_like(groups).index_add_(0, number, members)
    # Those who have members take turns, so that none owns much more than the others.
    owners = holder[holders.cumsum(0) - holders + torch.arange(len(groups), device="cpu") % holders]
    sent = number[holder == rank]
    sent = sent[owners[sent].argsort(stable=True)]
    received = (owners[number] == rank).nonzero().squeeze(1)
    received = received[holder[received].argsort(stable=True)]
    owned, slots = torch.unique(number[received], return_inverse=True)
    plan = Plan(
        rank=rank,
        groups=groups[sent],
        sizes=sizes[sent],
        sent=torch.bincount(owners[sent], minlength=ranks).tolist(),
        received=torch.bincount(holder[received], minlength=ranks).tolist(),
        slots=slots,
        weights=members[received].double() / sizes[number[received]],
        firsts=firsts_of(slots, len(owned)),
    )
    return plan, groups
