"""The ties of an optimizer in words: a table, and a line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tieopt.modes.mode import Mode
from tieopt.ties.places import ParamGroups, name_of
from tieopt.ties.slices import FREE, Slices, counted, groups_of_members

_HEADINGS = ("parameter", "shape", "slices", "groups", "members", "free", "distinct", "drift")


def table(mode: Mode, param_groups: ParamGroups) -> str:
    """Return a table with a line for each tied parameter, and lines below that say what joins or relaxes them."""
    rows: list[tuple[str, ...]] = [_HEADINGS]
    notes = []
    for tie, params in mode.parameters(param_groups):
        drift = f"{mode.engine.drift([(tie, params)]):.3g}"
        names = [name_of(param_groups, place) for place in tie.places]
        for name, place, slices in zip(names, tie.places, tie.slices, strict=True):
            rows.append((name, str(tuple(place.shape)), *map(str, _counts([slices])), drift))
        if len(names) > 1:
            notes.append(f"Joined: {', '.join(names)}, {_counts(tie.slices)[-1]} distinct in all")
        if mode.engine.is_regular(tie, params):
            notes.append(f"Regular: {', '.join(names)}, computed as views, without an index")
    if mode.relaxed and mode.ties:
        notes.append(f"Ties are {_relaxation(mode)}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justified = ([*map(str.ljust, cells[:2], widths[:2]), *map(str.rjust, cells[2:], widths[2:])] for cells in rows)
    return "\n".join([*map("  ".join, justified), *notes])


def line(mode: Mode) -> str:
    """Return how much is tied, and how. It looks at no parameter, so that it can be asked for at any time."""
    if not mode.ties:
        return "no ties"
    _, groups, members, *_ = map(sum, zip(*(_counts(tie.slices) for tie in mode.ties), strict=True))
    parameters = len({place for tie in mode.ties for place in tie.places})
    how = _relaxation(mode) if mode.relaxed else f"reduction={mode.options.reduction!r}"
    counts = f"{groups_of_members(groups, members)}, in {counted(parameters, 'parameter')}"
    return f"{counts}, {how}{', compact=True' * mode.compact}"


def _counts(slices: Sequence[Slices]) -> tuple[int, int, int, int, int]:
    """Return how many slices, groups, members, free and distinct slices there are; those pinned at zero are not."""
    labels = torch.cat([labelled.labels.flatten() for labelled in slices])
    scales = torch.cat([labelled.scales.flatten() for labelled in slices])
    members, trained = labels[labels != FREE], labels[(labels != FREE) & (scales != 0)]
    free = len(labels) - len(members)
    return len(labels), len(torch.unique(members)), len(members), free, len(torch.unique(trained)) + free


def _relaxation(mode: Mode) -> str:
    return f"approximate: strength {mode.options.strength}, every {counted(mode.options.every, 'step')}"
