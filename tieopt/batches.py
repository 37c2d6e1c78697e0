"""Many small ties worked on as one, lest each of them cost a round of Python.

Rows of several parameters that are equally long are gathered into one buffer, reduced together, and written back;
what is left for each parameter is to gather and to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tieopt.index import Indices
from tieopt.places import BoundTie
from tieopt.reduction import Reduction, Workspace, divide_, project_, relax_
from tieopt.slices import FREE
from tieopt.traced import divide_traced_, project_traced_, relax_traced_

Pairs = Sequence[tuple[BoundTie, list[Tensor]]]

# Ties of more entries are worth a run of their own.
_SMALL = 2**17

# Which ties take part in a step may change. So many selections are remembered, and others are not merged.
_SELECTIONS = 8


class Batches:
    """Applies ties to tensors, the small ones together, with buffers that are kept from call to call.

    It carries nothing from one call to the next: its copies and pickles are empty.

    Attributes:
        workspace: the buffers.
    """

    def __init__(self) -> None:
        self.workspace = Workspace()
        self._merged: dict[tuple[BoundTie, ...], Indices] = {}

    def project_(self, pairs: Pairs, reduction: Reduction = "mean") -> None:
        """Projects the tensors of each tie; see :func:`~tieopt.reduction.project_`."""
        if torch.compiler.is_compiling():
            for tie, tensors in pairs:
                project_traced_(tie, tensors, reduction)
            return
        for ties, tensors in self.of(pairs):
            project_(tensors, ties.index_for(tensors), self.workspace, reduction)

    def divide_(self, pairs: Pairs) -> None:
        """Divides the tensors of each tie; see :func:`~tieopt.reduction.divide_`."""
        if torch.compiler.is_compiling():
            for tie, tensors in pairs:
                divide_traced_(tie, tensors)
            return
        for ties, tensors in self.of(pairs):
            divide_(tensors, ties.index_for(tensors), self.workspace)

    def relax_(self, pairs: Pairs, strength: float) -> None:
        """Relaxes the tensors of each tie; see :func:`~tieopt.reduction.relax_`."""
        if torch.compiler.is_compiling():
            for tie, tensors in pairs:
                relax_traced_(tie, tensors, strength)
            return
        for ties, tensors in self.of(pairs):
            relax_(tensors, ties.index_for(tensors), self.workspace, strength)

    def of(self, pairs: Pairs) -> Iterator[tuple[Indices, list[Tensor]]]:
        """The same ties and tensors, those that can be worked on together as one."""
        alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[tuple[BoundTie, list[Tensor]]]] = {}
        for tie, tensors in pairs:
            first = tensors[0]
            if tie.is_of_rows and first.numel() <= _SMALL and first.is_contiguous():
                alike.setdefault((first.shape[1:], first.dtype, first.device), []).append((tie, tensors))
            else:
                yield tie, tensors
        for batch in alike.values():
            ties = tuple(tie for tie, _ in batch)
            if len(ties) > 1 and ties not in self._merged and len(self._merged) < _SELECTIONS:
                self._merged[ties] = merged(ties)
            if ties in self._merged:
                yield self._merged[ties], [tensor for _, tensors in batch for tensor in tensors]
            else:
                yield from batch

    def __reduce__(self) -> tuple[type[Batches], tuple[()]]:
        return Batches, ()


def merged(ties: Iterable[BoundTie]) -> Indices:
    """One tie of all the parameters of several ties, with the groups of each."""
    slices, count = [], 0
    for tie in ties:
        for each in tie.slices:
            labels = torch.where(each.labels == FREE, FREE, each.labels + count)
            slices.append(each._replace(labels=labels))
        count += 1 + max(int(each.labels.max()) for each in tie.slices)
    return Indices(slices)
