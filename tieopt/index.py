"""A tie compiled to index tensors: which slices to gather, and where to add them up.

Compiled once for the tensors of one shape on one device, so that a step only runs through it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.ties import FREE

# Entries that are gathered at a time: what a core's cache holds, or what fills an accelerator.
_CPU_ENTRIES = 2**18
_ACCELERATOR_ENTRIES = 2**22

# The longest plain running sum. Sums of more are built from the sums of blocks.
_BLOCK = 32


class Piece(NamedTuple):
    """Members that are gathered at once.

    Attributes:
        members: their positions along dimension 0 of the tied tensor, int64, shape ``[m]``.
        slots: the group of each, counted from the first group of the run, int64, shape ``[m]``.
        blocks: the block of each, int64, shape ``[m]``, or None if no group needs blocks.
        block_slots: the slot of each block, int64, shape ``[b]``.
    """

    members: Tensor
    slots: Tensor
    blocks: Tensor | None
    block_slots: Tensor


class Run(NamedTuple):
    """Whole groups that are reduced at once: as many as fit into one piece, or a large one in several.

    Attributes:
        leads: the first member of each group, int64, shape ``[g]``.
        sizes: the number of members of each group, int64, shape ``[g]``.
        scale: a power of two, at most half the inverse of the largest size.
        pieces: all the members of these groups.
    """

    leads: Tensor
    sizes: Tensor
    scale: float
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, eq=False)
class Index:
    """The members of every group, sorted by group and cut into runs.

    Groups of one member are left out: they are their own mean.

    Attributes:
        length: the length of dimension 0 of the tensors it is for.
        members: position of each member, sorted by group, then by position; int64, shape ``[m]``.
        groups: the group of each member, int64, shape ``[m]``.
        sizes: the number of members of each group, int64, shape ``[g]``.
        runs: the same, cut to be worked on one after the other; sparse gradients need the whole.
    """

    length: int
    members: Tensor
    groups: Tensor
    sizes: Tensor
    runs: tuple[Run, ...]

    @classmethod
    @torch.inference_mode(False)  # Its tensors are to be used outside as well.
    def compile(cls, labels: Tensor, slice_entries: int, device: torch.device) -> Index:
        """Compiles labels for tensors whose slices have ``slice_entries`` entries.

        Args:
            labels: int64, shape ``[n]``, -1 is free.
            slice_entries: the number of entries of one slice.
            device: where the tensors are.
        """
        labels = labels.to(device)
        members = (labels != FREE).nonzero().squeeze(1)
        sizes = torch.bincount(labels[members])
        members = members[sizes[labels[members]] > 1]
        _, groups, sizes = torch.unique(labels[members], return_inverse=True, return_counts=True)
        order = torch.argsort(groups, stable=True)
        members, groups = members[order], groups[order]

        largest = int(sizes.max()) if len(sizes) else 0
        entries = _CPU_ENTRIES if device.type == "cpu" else _ACCELERATOR_ENTRIES
        # At least sqrt(largest), so that the sums of no more than sqrt(largest) pieces are added up.
        capacity = max(entries // max(slice_entries, 1), math.isqrt(largest), 1)
        runs = tuple(_runs(members, groups, sizes, capacity))
        return cls(len(labels), members, groups, sizes, runs)

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.members.device

    @cached_property
    def starts(self) -> Tensor:
        """Where in ``members`` each group begins, int64, shape ``[g]``."""
        return self.sizes.cumsum(0) - self.sizes

    @cached_property
    def group_of(self) -> Tensor:
        """The group of each slice, -1 for a free one, int64, shape ``[n]``."""
        return self._for_slices(FREE, self.groups)

    @cached_property
    def rank_of(self) -> Tensor:
        """The place of each slice among the members of its group, int64, shape ``[n]``."""
        ranks = torch.arange(len(self.members), device=self.device) - self.starts[self.groups]
        return self._for_slices(0, ranks)

    @cached_property
    def size_of(self) -> Tensor:
        """The size of the group of each slice, 1 for a free one, int64, shape ``[n]``."""
        return self._for_slices(1, self.sizes[self.groups])

    def _for_slices(self, free: int, values: Tensor) -> Tensor:
        return torch.full((self.length,), free, device=self.device).index_put_((self.members,), values)


def _runs(members: Tensor, groups: Tensor, sizes: Tensor, capacity: int) -> Iterator[Run]:
    ends = sizes.cumsum(0).tolist()
    starts = [0, *ends]
    leads = members[sizes.cumsum(0) - sizes]
    first = 0
    while first < len(ends):
        last = max(bisect_right(ends, starts[first] + capacity), first + 1)
        slots = groups[starts[first] : ends[last - 1]] - first
        parts = zip(
            torch.split(members[starts[first] : ends[last - 1]], capacity), torch.split(slots, capacity), strict=True
        )
        scale = 0.5 ** (2 * int(sizes[first:last].max()) - 1).bit_length()
        yield Run(leads[first:last], sizes[first:last], scale, tuple(_piece(*part) for part in parts))
        first = last


def _piece(members: Tensor, slots: Tensor) -> Piece:
    """Cuts groups of more than ``_BLOCK`` members into blocks of about the square root of their size.

    The error of a running sum of ``K`` terms can grow like ``K``; that of a sum of ``sqrt(K)`` sums of
    ``sqrt(K)`` terms like ``sqrt(K)`` (blocked summation, Higham, "Accuracy and Stability of Numerical
    Algorithms", section 4.2).
    """
    _, counts = torch.unique_consecutive(slots, return_counts=True)
    if int(counts.max()) <= _BLOCK:
        return Piece(members, slots, None, slots[:0])
    lengths = counts.double().sqrt().long().clamp(min=_BLOCK)
    ranks = torch.arange(len(slots), device=slots.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    opens = ranks % lengths.repeat_interleave(counts) == 0
    return Piece(members, slots, opens.cumsum(0) - 1, slots[opens])
