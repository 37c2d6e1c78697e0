"""The ties of an optimizer in words: a table of them, and a line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tieopt.modes.mode import Mode
from tieopt.ties.places import ParamGroups, name_of
from tieopt.ties.slices import FREE, Slices, counted, groups_of_members

_HEADINGS = ("parameter", "shape", "slices", "groups", "members", "free", "distinct", "drift")


def table(mode: Mode, param_groups: ParamGroups) -> str:
    """A table with a line for each tied parameter, and below it what joins and what relaxes them."""
    lines, notes = [list(_HEADINGS)], []
    for tie, params in mode.parameters(param_groups):
        drift = f"{mode.engine.drift([(tie, params)]):.3g}"
        names = [name_of(param_groups, place) for place in tie.places]
        for name, place, slices in zip(names, tie.places, tie.slices, strict=True):
            free = int((slices.labels == FREE).sum())
            total, shared = slices.labels.numel(), _shared([slices])
            counts = map(str, (total, _shared([slices], pinned=True), total - free, free, shared + free))
            lines.append([name, str(tuple(place.shape)), *counts, drift])
        if len(names) > 1:
            distinct = _shared(tie.slices) + sum(int((slices.labels == FREE).sum()) for slices in tie.slices)
            notes.append(f"Joined: {', '.join(names)}, {distinct} distinct in all")
    if mode.relaxed and mode.ties:
        notes.append(f"Ties are {_relaxation(mode)}")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justified = ([*map(str.ljust, cells[:2], widths[:2]), *map(str.rjust, cells[2:], widths[2:])] for cells in lines)
    return "\n".join([*map("  ".join, justified), *notes])


def line(mode: Mode) -> str:
    """How much is tied, and how. It looks at no parameter, so that it can be asked for at any time."""
    if not mode.ties:
        return "no ties"
    # They are numbered in each tie.
    largest = (
        max((int(own.labels.max()) for own in tie.slices if own.labels.numel()), default=FREE) for tie in mode.ties
    )
    groups = sum(number + 1 for number in largest)
    members = sum(int((slices.labels != FREE).sum()) for tie in mode.ties for slices in tie.slices)
    parameters = len({place for tie in mode.ties for place in tie.places})
    counts = f"{groups_of_members(groups, members)}, in {counted(parameters, 'parameter')}"
    how = _relaxation(mode) if mode.relaxed else f"reduction={mode.reduction!r}"
    return f"{counts}, {how}{', compact=True' * (mode.compact)}"


def _shared(slices: Sequence[Slices], *, pinned: bool = False) -> int:
    """How many groups there are, with or without those that are pinned at zero."""
    members = [each.labels[(each.labels != FREE) & (pinned | (each.scales != 0))] for each in slices]
    return len(torch.unique(torch.cat(members)))


def _relaxation(mode: Mode) -> str:
    return f"approximate: strength {mode.strength}, every {counted(mode.every, 'step')}"
