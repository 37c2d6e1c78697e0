"""Names with wildcards, and modules, in place of parameters: which parameters are meant, and which are counterparts.

A name with wildcards is read as by :mod:`fnmatch`: ``*`` stands for any text, also one with dots, ``?`` for one
character, ``[2-4]`` for one of several. Where a name can be read in several ways, the first wildcards stand for the
shortest texts. These texts tell which parameters are counterparts, as ``encoder.3.weight`` and ``decoder.3.weight`` are
for ``encoder.*.weight`` and ``decoder.*.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from tieopt.errors import refusal, shown_list
from tieopt.ties.part import Part, Whole

_WILDCARD = re.compile(r"(\*|\?|\[!?.[^\]]*\])")
# What `translate` writes around a pattern.
_BEFORE, _AFTER = translate("x").split("x")

_MOST_SHOWN = 8


class Held(NamedTuple):
    """Where a parameter is found, because hosts replace Parameter objects.

    Attributes:
        module: that has the parameter.
        attribute: its name there.
        name: its name in the model.
    """

    module: Module
    attribute: str
    name: str

    def __repr__(self) -> str:
        return repr(self.name)

    def __str__(self) -> str:
        return self.name


class _Match(NamedTuple):
    """A parameter that is meant.

    Attributes:
        param: the parameter, or its name.
        tensor: the parameter, or whatever was given for one; None if there is none of this name.
        texts: that the wildcards stand for; of a parameter of a module its name there.
    """

    param: Tensor | str
    tensor: Any
    texts: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = self.param if isinstance(self.param, str) else ".".join(self.texts) or "a parameter"
        return name if self.tensor is None or is_lazy(self.tensor) else f"{name} {tuple(self.tensor.shape)}"


def expanded(parts: tuple[Part, ...], named: Mapping[str, Tensor]) -> list[tuple[Part, ...]]:
    """Return the ties that one tie stands for, without wildcards and modules: one for each set of counterparts.

    A name that is held by a parameter, or matches none, is left as it is.

    Args:
        parts: of the tie.
        named: the parameters that have names.

    Raises:
        ValueError: a parameter has no counterpart, or parameters that are to be equal differ in shape.
    """
    is_equal, is_alone = parts[0].groups is Whole, len(parts) == 1
    if is_alone and not is_equal and isinstance(parts[0].param, Tensor):
        return [parts]
    matches = [_matches(part.param, named, modules=is_equal) for part in parts]
    unknown = tuple(part for part, found in zip(parts, matches, strict=True) if any(m.tensor is None for m in found))
    if unknown:
        return [unknown]
    counterparts: dict[tuple[str, ...], list[_Match]] = {}
    for match in (match for found in matches for match in found):
        # What a single name matches is equal if it differs in the first wildcard alone.
        key = match.texts[1:] if is_equal and is_alone and isinstance(match.param, str) else match.texts
        counterparts.setdefault(key, []).append(match)
    sets = list(counterparts.values())
    if not is_alone:
        _check_found_by_all(sets, len(parts))
    if not is_equal:
        return [
            tuple(part._replace(param=match.param) for part, match in zip(parts, found, strict=True)) for found in sets
        ]
    return [tuple(parts[0]._replace(param=match.param) for match in found) for found in _equal(sets, is_alone)]


def has_wildcards(name: str) -> bool:
    """Return whether a name is a pattern."""
    return _WILDCARD.search(name) is not None


def _matches(param: Any, named: Mapping[str, Tensor], *, modules: bool) -> list[_Match]:
    if modules and isinstance(param, Module):
        return [_Match(tensor, tensor, (name,)) for name, tensor in param.named_parameters()]
    if isinstance(param, Held):
        tensor = getattr(param.module, param.attribute, None)
        return [_Match(param.name if tensor is None else tensor, tensor)]
    if not isinstance(param, str) or param in named:
        return [_Match(param, named[param] if isinstance(param, str) else param)]
    pieces = [translate(piece).removeprefix(_BEFORE).removesuffix(_AFTER) for piece in _WILDCARD.split(param)]
    # Every second piece is a wildcard.
    pieces[1::2] = [f"({piece}{'?' * (piece == '.*')})" for piece in pieces[1::2]]
    pattern = re.compile("".join(pieces), re.DOTALL)
    found = [_Match(name, named[name], match.groups()) for name in named if (match := pattern.fullmatch(name))]
    return found or [_Match(param, None)]


def _check_found_by_all(sets: Sequence[Sequence[_Match]], count: int) -> None:
    lacking = [match for found in sets if len(found) < count for match in found]
    if lacking:
        raise refusal(
            ValueError,
            "Parameters of one tie have no counterparts.",
            expected="wildcards that stand for the same texts in each name, or the same parameters in each module",
            got=f"{_shown(lacking)} without a counterpart",
        )


def _equal(sets: Sequence[Sequence[_Match]], is_alone: bool) -> list[list[_Match]]:
    """Return parameters that are to be equal, each once; leave out a single one that all modules share.

    Args:
        sets: of counterparts.
        is_alone: whether they were all given by one argument.
    """
    distinct = [list({id(match.tensor): match for match in found}.values()) for found in sets]
    alone = [found[0] for found in distinct if len(found) == 1]
    if len(alone) == len(sets) or (alone and is_alone):
        expected = "two parameters or more; all that a single name matches have to differ in its first wildcard"
        got = f"{_shown(alone)} alone" if alone else "modules without parameters"
        raise refusal(ValueError, "Tie.equal has nothing to join.", expected=expected, got=got)
    for found in distinct:
        first_of_shape = {match.tensor.shape: match for match in reversed(found) if not is_lazy(match.tensor)}
        if len(first_of_shape) > 1:
            what, got = "Parameters that are to be equal differ in shape.", _shown(list(first_of_shape.values())[::-1])
            raise refusal(ValueError, what, expected="parameters of one shape", got=got)
    return [found for found in distinct if len(found) > 1]


def _shown(matches: Sequence[_Match]) -> str:
    return shown_list(list(map(str, matches)), _MOST_SHOWN)
