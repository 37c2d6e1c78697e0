"""The warning for ties that tie nothing, with what was probably meant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tieopt.errors import users_level
from tieopt.ties.slices import FREE, Slices, described

# Of many parameters, so that the warning can be read.
_SHOWN_PARTS = 4


class IdleTie(NamedTuple):
    """A tie each of whose groups has one member.

    Attributes:
        names: of its parameters.
        written: the same as an expression in Python.
        slices: of each parameter, with the labels that the user gave.
        slice_shape: of all its slices.
    """

    names: list[str]
    written: list[str]
    slices: list[Slices]
    slice_shape: torch.Size

    def labels(self) -> list[int]:
        """The labels that the user gave."""
        return [label for each in self.slices for label in each.labels[each.labels != FREE].tolist()]

    def parts(self, groups: str = "...") -> list[str]:
        """The calls of ``Tie`` that name its parameters."""
        return [
            f"Tie({written}, {groups}{f', dim={each.dim}' * (each.dim != 0)})"
            for written, each in zip(self.written, self.slices, strict=True)
        ]


def warn_of_idle(ties: Sequence[IdleTie]) -> None:
    """Warn, at the user's call, of each tie that ties nothing; of several with labels in common at once."""
    for alike in _with_labels_in_common(ties):
        message = _of_one(alike[0]) if len(alike) == 1 else _of_several(alike)
        # What has a single slice cannot be tied otherwise.
        if len(alike) > 1 or sum(each.labels.numel() for each in alike[0].slices) > 1:
            warnings.warn(message, UserWarning, stacklevel=users_level())


def _with_labels_in_common(ties: Sequence[IdleTie]) -> list[list[IdleTie]]:
    """The ties, those together that could be joined because they have slices of one shape and a label in common."""
    sets: list[list[IdleTie]] = []
    met: dict[tuple[torch.Size, int], list[IdleTie]] = {}
    for tie in ties:
        keys = [(tie.slice_shape, label) for label in tie.labels()]
        own = next((met[key] for key in keys if key in met), None)
        if own is None:
            own = []
            sets.append(own)
        own.append(tie)
        for key in keys:
            met.setdefault(key, own)
    return sets


def _of_several(ties: Sequence[IdleTie]) -> str:
    joined = _cut([part for tie in ties for part in tie.parts()])
    return (
        "These ties tie nothing: the same label in two ties is two groups, of one member each.\n"
        f"  Parameters: {_listed([name for tie in ties for name in tie.names])}\n"
        f"  Expected:   Tie.join({', '.join(joined)}), in which the same label is one group\n"
        f"  Got:        {'; '.join(_cut([described(tie.slices) for tie in ties]))}"
    )


def _of_one(tie: IdleTie) -> str:
    if len(tie.slices) > 1:
        expected = f"a label that occurs twice, as in Tie.join({', '.join(_cut(tie.parts('labels')))})"
    else:
        expected = f"a group of two or more members, as in {tie.parts(_one_group(tie.slices[0]))[0]}"
    return (
        "A tie ties nothing: each of its groups has one member.\n"
        f"  Parameter: {_listed(tie.names)}\n"
        f"  Expected:  {expected}\n"
        f"  Got:       {described(tie.slices)}"
    )


def _one_group(slices: Slices, limit: int = 3) -> str:
    """All that is labelled in one group, as the user would write it."""
    if slices.labels.dim() > 1:
        return "torch.where(labels < 0, -1, 0)"
    indices = (slices.labels != FREE).nonzero().squeeze(1).tolist()
    more = ["..."] if len(indices) > limit or len(indices) == 1 else []
    return f"[[{', '.join([*map(str, indices[:limit]), *more])}]]"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_cut(list(dict.fromkeys(names))))


def _cut(texts: Sequence[str]) -> list[str]:
    more = [f"and {len(texts) - _SHOWN_PARTS} more"] if len(texts) > _SHOWN_PARTS else []
    return [*texts[:_SHOWN_PARTS], *more]
