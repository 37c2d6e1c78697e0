"""The ties of an optimizer in words and numbers: a table, and a line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tieopt.modes.mode import Mode
from tieopt.modes.state import states_of
from tieopt.ties.options import Options
from tieopt.ties.places import all_places, name_of
from tieopt.ties.slices import FREE, Slices, Totals, counted, flat_labels, flat_scales, groups_of_members


class SummaryRow(NamedTuple):
    """A tied parameter, as :class:`TieSummary` has it.

    Attributes:
        parameter: its name.
        shape: its shape.
        slices: the number of its slices.
        groups: the number of groups.
        members: the number of slices in groups.
        free: the number of slices in no group.
        distinct: the number of values that are left: those of the groups and of the free slices.
        drift: the largest distance of a member from its group's mean, over all parameters of the tie.
    """

    parameter: str
    shape: tuple[int, ...]
    slices: int
    groups: int
    members: int
    free: int
    distinct: int
    drift: float


class TieSummary(str):
    """A table of ties, with its numbers. It prints as the table, and so does its ``repr``.

    Attributes:
        rows: the lines of the table, as named tuples.
        entries: the number of entries of all parameters of the optimizer, tied or not.
        distinct: the number of values to train: shared values and free entries, without pinned ones.
        state_bytes: the memory of the tensors in the optimizer's state now; of sharded ones, on all ranks.

    Example:
        >>> import torch
        >>> from tieopt import TiedOptimizer
        >>> layer = torch.nn.Linear(3, 6)
        >>> summary = TiedOptimizer(torch.optim.SGD(layer.parameters()), {layer.weight: [[0, 2, 3]]}).tie_summary()
        >>> summary.entries, summary.distinct, summary.ratio
        (24, 18, 0.75)
        >>> summary.rows[0].members
        3
    """

    rows: tuple[SummaryRow, ...]
    entries: int
    distinct: int
    state_bytes: int

    @property
    def ratio(self) -> float:
        """The number of distinct values divided by that of entries; 1.0 if nothing is tied."""
        return self.distinct / self.entries if self.entries else 1.0

    def __repr__(self) -> str:
        return str(self)


def summarized(mode: Mode, optimizer: Any) -> TieSummary:
    """Return a table with a line for each tied parameter, and lines below that say what joins or relaxes them."""
    param_groups = mode.param_groups_of(optimizer)
    places = {param_groups[place.group]["params"][place.position]: place for place in all_places(param_groups)}
    entries = distinct = sum(math.prod(place.shape) for place in places.values())
    rows, notes = [], []
    for tie, params in mode.parameters(param_groups):
        drift = mode.engine.drift([(tie, params)])
        names = [name_of(param_groups, place) for place in tie.places]
        # Slices of joined parameters have one shape.
        width = tie.slices[0].slice_shape(tie.places[0].shape).numel()
        for name, place, slices in zip(names, tie.places, tie.slices, strict=True):
            number, groups, members, free, left = _counts([slices], mode.totals.get(tie))
            rows.append(SummaryRow(name, tuple(place.shape), number, groups, members, free, left * width, drift))
        number, *_, left = _counts(tie.slices, mode.totals.get(tie))
        distinct -= (number - left) * width
        if len(names) > 1:
            notes.append(f"Joined: {', '.join(names)}, {left * width} distinct in all")
        if mode.engine.is_regular(tie, params):
            notes.append(f"Regular: {', '.join(names)}, computed as views, without an index")
    for options in dict.fromkeys(tie.options for tie in mode.ties):
        alike = [tie for tie in mode.ties if tie.options == options]
        tied_names = ", ".join(name_of(param_groups, place) for tie in alike for place in tie.places)
        if options.relaxed or len(alike) < len(mode.ties):
            whose = "" if len(alike) == len(mode.ties) else f" of {tied_names}"
            notes.append(f"Ties{whose} {'are' if options.relaxed else 'have'} {_how(options)}")
    summary = TieSummary("\n".join([*_table(rows), *notes]))
    summary.rows, summary.entries, summary.distinct = tuple(rows), entries, distinct
    tensors = {id(tensor): tensor for tensor in _tensors_in(states_of(optimizer))}
    summary.state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return summary


def _table(rows: Sequence[SummaryRow]) -> list[str]:
    cells = [SummaryRow._fields, *((row.parameter, *map(str, row[1:-1]), f"{row.drift:.3g}") for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([*map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:])]) for line in cells]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a state, however deep they lie."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def line(mode: Mode) -> str:
    """Return how much is tied, and how. It looks at no parameter, so that it can be asked for at any time."""
    if not mode.ties:
        return "no ties"
    counts_of_ties = [_counts(tie.slices, mode.totals.get(tie)) for tie in mode.ties]
    _, groups, members, *_ = map(sum, zip(*counts_of_ties, strict=True))
    parameters = len({place for tie in mode.ties for place in tie.places})
    how = " and ".join(dict.fromkeys(_how(tie.options) for tie in mode.ties))
    counts = f"{groups_of_members(groups, members)}, in {counted(parameters, 'parameter')}"
    return f"{counts}, {how}{', compact=True' * mode.compact}"


def _counts(slices: Sequence[Slices], totals: Totals | None) -> tuple[int, int, int, int, int]:
    """Return how many slices, groups, members, free and distinct slices there are; those pinned at zero are not.

    Args:
        slices: that are counted.
        totals: over all ranks, if the labels of the slices are sharded.
    """
    if totals is not None:
        return totals.slices, totals.groups, totals.members, totals.free, totals.groups + totals.free
    labels, scales = flat_labels(slices), flat_scales(slices)
    members, trained = labels[labels != FREE], labels[(labels != FREE) & (scales != 0)]
    free = len(labels) - len(members)
    return len(labels), len(torch.unique(members)), len(members), free, len(torch.unique(trained)) + free


def _how(options: Options) -> str:
    if not options.relaxed:
        return f"reduction={options.reduction!r}"
    return f"approximate: strength {options.strength}, every {counted(options.every, 'step')}"
