"""Guesses at what was meant: a warning for ties that tie nothing, an error for parameters that are not held."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from tieopt.errors import message, shown, shown_list, users_level
from tieopt.ties.names import has_wildcards
from tieopt.ties.slices import FREE, Slices, described, flat_labels

# --- ties that tie nothing ---


class IdleTie(NamedTuple):
    """A tie in which each group has one member.

    Attributes:
        names: the names of its parameters.
        written: the same as expressions in Python.
        slices: for each parameter, with the labels that the user gave.
        slice_shape: the shape that all its slices have.
    """

    names: list[str]
    written: list[str]
    slices: list[Slices]
    slice_shape: torch.Size

    def calls(self, groups: str = "...") -> list[str]:
        """Return the calls of ``Tie`` for its parameters, with these groups."""
        return [
            f"Tie({written}, {groups}{f', dim={part.dim}' * (part.dim != 0)})"
            for written, part in zip(self.written, self.slices, strict=True)
        ]


def warn_of_idle(ties: Sequence[IdleTie]) -> None:
    """Warn, at the user's call, of ties that tie nothing.

    Ties that could be joined, because they have slices of one shape and a label in common, get one warning.
    """
    joinable: dict[tuple[torch.Size, int], list[IdleTie]] = {}
    for tie in ties:
        labels = flat_labels(tie.slices)
        keys = [(tie.slice_shape, label) for label in labels[labels != FREE].tolist()]
        alike = next((joinable[key] for key in keys if key in joinable), [])
        alike.append(tie)
        for key in keys:
            joinable.setdefault(key, alike)
    for alike in {id(alike): alike for alike in joinable.values()}.values():
        # A single slice cannot be tied in another way.
        if len(alike) > 1 or sum(part.labels.numel() for part in alike[0].slices) > 1:
            warnings.warn(_nothing_is_tied(alike), UserWarning, stacklevel=users_level())


def _nothing_is_tied(ties: Sequence[IdleTie]) -> str:
    names = shown_list(list(dict.fromkeys(name for tie in ties for name in tie.names)))
    got = shown_list([described(tie.slices) for tie in ties], separator="; ")
    if len(ties) > 1:
        what = "These ties tie nothing: the same label in two ties is two groups, of one member each."
        calls = shown_list([call for tie in ties for call in tie.calls()])
        expected = f"Tie.join({calls}), in which the same label is one group"
        return message(what, parameters=names, expected=expected, got=got)
    what, tie = "A tie ties nothing: each of its groups has one member.", ties[0]
    if len(tie.slices) > 1:
        expected = f"a label that occurs twice, as in Tie.join({shown_list(tie.calls('labels'))})"
    else:
        expected = f"a group of two or more members, as in {tie.calls(_one_group(tie.slices[0]))[0]}"
    return message(what, parameter=names, expected=expected, got=got)


def _one_group(slices: Slices) -> str:
    """Return all labelled slices as one group, as the user would write it."""
    if slices.labels.dim() > 1:
        return "torch.where(labels < 0, -1, 0)"
    indices = [str(index) for index in (slices.labels != FREE).nonzero().flatten().tolist()]
    more = ["..."] if len(indices) == 1 or len(indices) > 3 else []
    return f"[[{', '.join([*indices[:3], *more])}]]"


# --- parameters that are not held ---

# So that the error can be read.
_MOST_GUESSES = 3
_MOST_LISTED = 20


def not_held(key: Any, params: dict[str, Tensor], holder: str, *, named: bool) -> str:
    """Return the error for a tie of a parameter that is not held, with the parameters that may have been meant.

    Args:
        key: the parameter that the user gave.
        params: the parameters that there are, by their names or what is shown for names.
        holder: ``"optimizer"`` or ``"model"``, whichever has these parameters.
        named: whether they have names.
    """
    likely, kind, hint = _guess(key, params, holder, named)
    listed = {name: f"{name} {tuple(param.shape)}" for name, param in params.items()}
    guesses = [f"{' or '.join(listed.pop(name) for name in likely[:_MOST_GUESSES])}, {kind}"] if likely else []
    others = [f"one of {shown_list(list(listed.values()), _MOST_LISTED)}"] if listed else []
    expected = "; or ".join(guesses + others) or f"no ties, because the {holder} has no parameters"
    what = f"A tie is for a parameter that the {holder} does not hold."
    if named and isinstance(key, str) and has_wildcards(key):
        what = f"No parameter name in the {holder} matches the pattern of a tie."
    text = message(what, hint, expected=expected, got=shown(key))
    if holder == "optimizer" and (isinstance(key, Tensor) or (isinstance(key, str) and named)):
        text += (
            "\n  One optimizer has to hold all members of a tie: build it from all of their parameters, in several "
            "groups if need be, or call add_param_group() first."
        )
    return text


def _guess(key: Any, params: dict[str, Tensor], holder: str, named: bool) -> tuple[list[str], str, str]:
    """Return the names of the parameters that may have been meant, the likeliest first; what they are; and a hint."""
    if isinstance(key, str) and named:
        likely = _nearest_names(key, list(params))
        kind = f"the nearest name{'s' * (len(likely) > 1)}"
        hint = "a parameter that several modules share has one name, the first; buffers are not tied"
        return likely, kind, hint
    if isinstance(key, str):
        return [], "", "names need an optimizer that was built from model.named_parameters()"
    if isinstance(key, Tensor):
        likely = [name for name, param in params.items() if param.shape == key.shape]
        where = "in no parameter group" if holder == "optimizer" else "no parameter of the model"
        hint = f"{where}; copies, .data and buffers are other tensors than the parameter"
        return likely, "of the same shape", hint
    if isinstance(key, Module):
        inside = set(map(id, key.parameters()))
        likely = [name for name, param in params.items() if id(param) in inside]
        return likely, "of this module", "tie its parameters, such as its .weight"
    return [], "", ""


def _nearest_names(wanted: str, names: Sequence[str]) -> list[str]:
    """Return the names that resemble a wanted one.

    In this order: names that differ in upper and lower case alone, names that have a prefix more or less, names that
    are spelt similarly, and names with the same last two components; of each kind the most similar first.
    """
    wanted, ranked = wanted.lower(), []
    for name in names:
        lower = name.lower()
        similarity = SequenceMatcher(None, lower, wanted).ratio()
        has_prefix = f".{lower}".endswith(f".{wanted}") or f".{wanted}".endswith(f".{lower}")
        kinds = [lower == wanted, has_prefix, similarity >= 0.6, lower.split(".")[-2:] == wanted.split(".")[-2:]]
        if any(kinds):
            ranked.append((kinds.index(True), -similarity, name))
    return [name for *_, name in sorted(ranked, key=lambda rank: rank[:2])]
