"""The error for a tie of a parameter that is not held, with those that may have been meant."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from torch import Tensor
from torch.nn import Module

from tieopt.errors import shown

# So that the error can be read.
_MOST_NEAREST = 3
_MOST_LISTED = 20


def not_held(key: Any, held: Sequence[tuple[str, Tensor]], holder: str, *, named: bool) -> str:
    """Say that a tie is for a parameter that is not held, and what to do.

    Args:
        key: what the user gave for a parameter.
        held: the parameters that there are, with their names or what is shown for names.
        holder: what has these parameters, ``"optimizer"`` or ``"model"``.
        named: whether they have names.
    """
    near, why = _nearest(key, held, named)
    rest = [one for one in held if not any(one is other for other in near)]
    more = f" and {len(rest) - _MOST_LISTED} more" if len(rest) > _MOST_LISTED else ""
    choices = [f"{' or '.join(map(_with_shape, near))}, {why}"] if near else []
    choices += [f"one of {', '.join(map(_with_shape, rest[:_MOST_LISTED]))}{more}"] if rest else []
    lines = [
        f"A tie is for a parameter that the {holder} does not hold.",
        f"  Expected: {'; or '.join(choices) or f'no ties, because the {holder} has no parameters'}",
        f"  Got:      {shown(key)}{_hint(key, holder, named)}",
    ]
    if holder == "optimizer" and (isinstance(key, Tensor) or (isinstance(key, str) and named)):
        lines.append(
            "  One optimizer has to hold all members of a tie: build it from all of their parameters, in several "
            "groups if need be, or call add_param_group() first."
        )
    return "\n".join(lines)


def _hint(key: Any, holder: str, named: bool) -> str:
    if isinstance(key, str) and not named:
        return " (names need an optimizer that was built from model.named_parameters())"
    if isinstance(key, str):
        return " (a parameter that several modules share has one name, the first)"
    if isinstance(key, Tensor):
        where = "in no parameter group" if holder == "optimizer" else "no parameter of the model"
        return f" ({where}; copies, .data and buffers are other tensors than the parameter)"
    if isinstance(key, Module):
        return " (tie its parameters, such as its .weight)"
    return ""


def _with_shape(one: tuple[str, Tensor]) -> str:
    return f"{one[0]} {tuple(one[1].shape)}"


def _nearest(key: Any, held: Sequence[tuple[str, Tensor]], named: bool) -> tuple[list[tuple[str, Tensor]], str]:
    """The parameters that a key may stand for, the most likely first, and what they are."""
    if isinstance(key, str) and named:
        by_name = {one[0]: one for one in held}
        near = [by_name[name] for name in nearest_names(key, list(by_name))]
        return near, "the nearest name" if len(near) == 1 else "the nearest names"
    if isinstance(key, Module):
        own = set(map(id, key.parameters()))
        return [one for one in held if id(one[1]) in own][:_MOST_NEAREST], "of this module"
    if isinstance(key, Tensor):
        return [one for one in held if one[1].shape == key.shape][:_MOST_NEAREST], "of the same shape"
    return [], ""


def nearest_names(wanted: str, names: Sequence[str]) -> list[str]:
    """Return the names that resemble a wanted one, the most similar first.

    In this order: names that differ in upper and lower case alone, names that have a prefix more or less, names that
    are spelt similarly, and names with the same last two components.
    """
    ends = wanted.lower().split(".")
    components = {name: name.lower().split(".") for name in names}

    def with_the_same(last: Sequence[int]) -> list[str]:
        alike = [name for name, count in zip(names, last, strict=True) if components[name][-count:] == ends[-count:]]
        return sorted(alike, key=lambda name: -SequenceMatcher(None, wanted.lower(), name.lower()).ratio())

    same = [name for name in names if name.lower() == wanted.lower()]
    prefixed = with_the_same([min(len(own), len(ends)) for own in components.values()])
    similar = get_close_matches(wanted.lower(), {name.lower(): None for name in names}, _MOST_NEAREST)
    spelt = [name for lowered in similar for name in names if name.lower() == lowered]
    related = with_the_same([2] * len(names))
    return list(dict.fromkeys([*same, *prefixed, *spelt, *related]))[:_MOST_NEAREST]
