"""Many small ties worked on as one, so that not each of them costs a round of Python.

Rows of several parameters that are equally long are gathered into one buffer, reduced together, and written back;
what is left for each parameter is to gather and to write.

The results are those of one tie after the other, to the last bit: whether ties are merged depends on which of them
took part in earlier steps, which a checkpoint does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tieopt.engine.compiled import Call, is_under_compiler, projections
from tieopt.engine.graphs import Copies, between_graphs, untraced
from tieopt.engine.sharded import Shards, shards_for
from tieopt.numbers.index import EVEN_ENTRIES, TOTALS, Indices
from tieopt.numbers.reduction import Reduction, Workspace, divide_, means_for, project_, relax_
from tieopt.tensors import is_sharded, wide_dtype
from tieopt.ties.places import BoundTie
from tieopt.ties.slices import FREE, Slices, told_apart

Pairs = Sequence[tuple[BoundTie, list[Tensor]]]

# Ties of more entries are worth a run of their own.
_SMALL = 2**17

# Which ties take part in a step may change. So many selections are remembered, and others are not merged.
_SELECTIONS = 32


class Batches:
    """Applies ties to tensors, the small ones together, with buffers that are kept from call to call.

    It carries nothing from one call to the next: its copies and pickles are empty.

    Attributes:
        workspace: the buffers.
        copies: of the functions that ``torch.compile`` gets.
    """

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.copies = Copies()
        self._merged: dict[tuple[BoundTie, ...], Indices] = {}
        self._sizes: dict[BoundTie, int | None] = {}

    @between_graphs
    def project_(self, pairs: Pairs, reduction: Reduction = "mean", *, stepped: bool = False) -> None:
        """Projects the tensors of each tie; see :func:`~tieopt.numbers.reduction.project_`.

        Args:
            pairs: ties and their tensors.
            reduction: ``"mean"`` or ``"sum"``.
            stepped: whether they are weights that a step has just written, see
                :func:`~tieopt.numbers.reduction.means_after_step`.
        """
        for function, arguments in self._project_(pairs, reduction, stepped, is_under_compiler()):
            function(*arguments)

    @untraced
    def _project_(self, pairs: Pairs, reduction: Reduction, stepped: bool, compiled: bool) -> Sequence[Call]:
        """Projects what is not to be compiled, and returns the calls that do the rest."""
        calls: Sequence[Call] = ()
        pairs, sharded = _parted(pairs)
        for shards, tensors in sharded:
            shards.project_(tensors, self.workspace, reduction, stepped=stepped)
        if compiled:
            calls, pairs = projections(pairs, reduction, self.copies, stepped=stepped)
        for ties, tensors in self.of(pairs):
            project_(tensors, ties.index_for(tensors), self.workspace, reduction, means_for(stepped))
        return calls

    @untraced
    def divide_(self, pairs: Pairs) -> None:
        """Divides the tensors of each tie; see :func:`~tieopt.numbers.reduction.divide_`."""
        pairs, sharded = _parted(pairs)
        for shards, tensors in sharded:
            shards.divide_(tensors, self.workspace)
        for ties, tensors in self.of(pairs):
            divide_(tensors, ties.index_for(tensors), self.workspace)

    @untraced
    def relax_(self, pairs: Pairs, strength: float, *, stepped: bool = False) -> None:
        """Relaxes the tensors of each tie; see :func:`~tieopt.numbers.reduction.relax_`, and :meth:`project_`."""
        pairs, sharded = _parted(pairs)
        for shards, tensors in sharded:
            shards.relax_(tensors, self.workspace, strength, stepped=stepped)
        for ties, tensors in self.of(pairs):
            relax_(tensors, ties.index_for(tensors), self.workspace, strength, means_for(stepped))

    def of(self, pairs: Pairs) -> Iterator[tuple[Indices, list[Tensor]]]:
        """The same ties and tensors, those that can be worked on together as one."""
        alike: dict[tuple[Any, ...], list[tuple[BoundTie, list[Tensor]]]] = {}
        entries: dict[tuple[Any, ...], int] = {}
        for tie, tensors in pairs:
            first, size = tensors[0], self._size(tie)
            # Sums that are as wide as their terms are scaled by the largest group of a run, and round by that.
            double = first.dtype.to_real() == wide_dtype(first.device)
            if (
                size is None
                or double
                or first.numel() > (_SMALL if size else EVEN_ENTRIES - 1)
                or not first.is_contiguous()
            ):
                yield tie, tensors
                continue
            kind = size, first.shape[1:], first.dtype, first.device
            entries[kind] = entries.get(kind, 0) + first.numel()
            alike.setdefault((*kind, entries[kind] // (TOTALS - _SMALL)), []).append((tie, tensors))
        for (size, *_), batch in alike.items():
            ties = tuple(tie for tie, _ in batch)
            if len(ties) > 1 and ties not in self._merged and len(self._merged) < _SELECTIONS:
                self._merged[ties] = Merged(ties, even=bool(size))
            if ties in self._merged:
                yield self._merged[ties], [tensor for _, tensors in batch for tensor in tensors]
            else:
                yield from batch

    def _size(self, tie: BoundTie) -> int | None:
        """The size of all groups of a tie, 0 if there are several; None if it cannot be merged."""
        if tie not in self._sizes:
            self._sizes[tie] = _common_size(tie)
        return self._sizes[tie]

    def __reduce__(self) -> tuple[type[Batches], tuple[()]]:
        return Batches, ()


def _parted(pairs: Pairs) -> tuple[Pairs, list[tuple[Shards, list[Tensor]]]]:
    """The ties of plain tensors, and those of sharded ones."""
    sharded = [
        # Sharded ones may have taken the places of whole ones since they were tied.
        (shards_for(tie, tensors, list(map(str, tie.places))), tensors)
        for tie, tensors in pairs
        if any(map(is_sharded, tensors))
    ]
    return [pair for pair in pairs if not any(map(is_sharded, pair[1]))] if sharded else pairs, sharded


def _common_size(tie: BoundTie) -> int | None:
    labels, scales = tie.slices[0].labels, tie.slices[0].scales.abs()
    # Multiples that are rounded have a run take another way, and all groups in it.
    if not tie.is_of_rows or not labels.numel() or not bool(((scales == 0) | (scales == 1)).all()):
        return None
    sizes = torch.bincount(labels[(labels != FREE) & (scales == 1)])
    several = torch.unique(sizes[sizes > 1])
    return int(several[0]) if len(several) == 1 else 0


class Merged(Indices):
    """One tie of all the parameters of several ties, with the groups of each.

    It has the labels of these ties, and tells them apart only while it is compiled: of many ties of a large parameter
    others would take much memory.

    Args:
        ties: of rows.
        even: whether all their groups are of one size, so that they are worked on as they would be each by itself.
    """

    def __init__(self, ties: Iterable[BoundTie], *, even: bool = True) -> None:
        super().__init__([tie.slices[0] for tie in ties], even=even)

    def told_apart(self) -> tuple[Slices, ...]:
        """The slices of all ties, with labels that no two of the ties share."""
        return tuple(each for (each,) in told_apart([each] for each in self.slices))
