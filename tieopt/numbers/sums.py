"""Sums of groups, compiled: in which order values are added up, the same on every run.

On the CPU ``scatter_reduce`` adds one value after the other. On accelerators it adds with atomics, in an order that
changes from run to run, so that replicas of a model would drift apart; and ``index_put_`` sorts in every call and adds
up a group one by one. There values are sorted when the sums are compiled, and a step adds up the columns of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.numbers import devices

# The longest plain running sum of float64 on the CPU. Longer sums are built from the sums of blocks.
_BLOCK = 32


class Level(NamedTuple):
    """Leaves some values as they are, and replaces the others, a matrix of them, by the sums of its columns.

    Attributes:
        order: the values that are left, and then the matrix, row by row; a column is of one group; int32, ``[n]``.
        rows: how many rows the matrix has, a power of two.
        columns: how many columns it has.
    """

    order: Tensor
    rows: int
    columns: int


class Sums(NamedTuple):
    """How values are added up to the sums of their groups.

    Attributes:
        groups: the group of each value; of each sum, if there are blocks or levels; int64.
        blocks: the block of each value, int64; None if no group needs blocks.
        levels: from the values to one sum for each group; None where ``scatter_reduce`` adds in order.
    """

    groups: Tensor
    blocks: Tensor | None = None
    levels: tuple[Level, ...] | None = None

    @classmethod
    def of(cls, groups: Tensor, device: torch.device, *, in_blocks: bool = False) -> Sums:
        """Compile the sums of values.

        Args:
            groups: the group of each value, int64, on the CPU.
            device: where the values are.
            in_blocks: whether sums are rounded; the values have to be sorted by group within each tensor.
        """
        # There scatter_reduce adds in another order on every run.
        if devices.is_accelerator(device):
            return cls._in_levels(groups, device)
        return cls._in_blocks(groups, device) if in_blocks else cls(groups.to(device))

    @classmethod
    def _in_blocks(cls, groups: Tensor, device: torch.device) -> Sums:
        """Cut groups of more than ``_BLOCK`` values into blocks of about the square root of their size.

        The error of a running sum of ``K`` terms can grow like ``K``; that of a sum of ``sqrt(K)`` sums of ``sqrt(K)``
        terms like ``sqrt(K)`` (blocked summation, Higham, "Accuracy and Stability of Numerical Algorithms", section
        4.2).
        """
        _, counts = torch.unique_consecutive(groups, return_counts=True)
        if int(counts.max()) <= _BLOCK:
            return cls(groups.to(device))
        lengths = counts.double().sqrt().long().clamp(min=_BLOCK)
        ranks = torch.arange(len(groups), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)
        opens = ranks % lengths.repeat_interleave(counts) == 0
        return cls(groups[opens].to(device), (opens.cumsum(0) - 1).to(device))

    @classmethod
    def _in_levels(cls, groups: Tensor, device: torch.device) -> Sums:
        """Cut groups into columns of one length, again and again, until one sum of each is left."""
        levels: list[Level] = []
        while True:
            by_group = groups.argsort(stable=True)
            _, number, sizes = torch.unique_consecutive(groups[by_group], return_inverse=True, return_counts=True)
            if len(sizes) == len(groups):
                return cls(groups.to(device), levels=tuple(levels))
            rows = _rows(sizes)
            columns = sizes // rows
            rank = torch.arange(len(groups), device="cpu") - (sizes.cumsum(0) - sizes)[number]
            # Neighbours are in neighbouring columns, so that they are read together.
            row = rank // columns.clamp(min=1)[number]
            row[rank >= (rows * columns)[number]] = -1
            order, count = by_group[row.argsort(stable=True)], int(columns.sum())
            levels.append(Level(order.to(device, torch.int32), rows, count))
            groups = groups[order[: len(order) - (rows - 1) * count]]


def _rows(sizes: Tensor) -> int:
    """Return which power of two leaves the fewest values and sums of groups of these sizes."""
    powers = (1 << power for power in range(1, int(sizes.max()).bit_length()))
    return min(powers, key=lambda rows: int((sizes // rows + sizes % rows).sum()))
