"""Messages of errors and warnings, and the call that a warning points to."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from operator import index
from typing import Any, TypeVar

import torch
from torch import Tensor

E = TypeVar("E", bound=Exception)

_PASSED_OVER = tuple(os.path.dirname(str(file)) + os.sep for file in (__file__, torch.__file__))


def users_level() -> int:
    """Return the level, as for ``warnings.warn`` in the caller, of the first call from outside tieopt and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        level, frame = level + 1, frame.f_back
    return level


def refusal(kind: type[E], what: str, hint: str = "", /, **lines: object) -> E:
    """Return an error with a message as :func:`message` writes it.

    Args:
        kind: the class of the error.
        what: as for :func:`message`.
        hint: as for :func:`message`.
        **lines: as for :func:`message`.
    """
    return kind(message(what, hint, **lines))


def message(what: str, hint: str = "", /, **lines: object) -> str:
    """Write the message of an error or a warning.

    Args:
        what: a sentence that says what is wrong.
        hint: a way out, shown in brackets after the last line, if there is one.
        **lines: the texts after "Expected:", "Got:" and, where it helps, "Parameter:" and the like, in this order.

    Example:
        >>> print(message("Unknown reduction.", expected="'mean' or 'sum'", got=shown("max")))
        Unknown reduction.
          Expected: 'mean' or 'sum'
          Got:      'max' (str)
    """
    width = max(map(len, lines), default=0) + 1
    rows = [f"  {f'{name.capitalize()}:':{width}} {text}" for name, text in lines.items()]
    return "\n".join([what, *rows]) + (f" ({hint})" if hint else "")


def imported(module: str, what: str, extra: str) -> Any:
    """Import a module that only an extra of tieopt needs; without it, raise an ImportError that names the extra.

    Args:
        module: the name of the module.
        what: as for :func:`message`.
        extra: as in ``pip install 'tieopt[extra]'``.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise refusal(ImportError, what, expected=f"pip install 'tieopt[{extra}]'", got=error) from None


def shown_entry(tensor: Tensor, marked: Tensor) -> str:
    """Return the first entry of a tensor that a mask marks, and its position, as text."""
    position = tuple(marked.nonzero()[0].tolist())
    return f"{tensor[position].item()} at position {position[0] if len(position) == 1 else position}"


def shown_list(texts: Sequence[str], limit: int = 4, separator: str = ", ") -> str:
    """Return texts joined into one, with a count in place of those after the limit."""
    more = [f"and {len(texts) - limit} more"] if len(texts) > limit else []
    return separator.join([*texts[:limit], *more])


def shown(value: Any, limit: int = 80) -> str:
    """Return a value and its type as text, short enough for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= limit else text[: limit - 3] + '...'} ({type(value).__name__})"


def as_integer(value: Any, what: str, /, **lines: object) -> int:
    """Return a value as an integer; raise a TypeError with these lines for anything else, and for a bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise refusal(TypeError, f"{what} is not an integer.", **lines, got=shown(value)) from None


def integer_between(
    value: Any, what: str, low: int, high: int, /, error: type[Exception] = ValueError, **lines: object
) -> int:
    """Return a value as an integer, as :func:`as_integer`; raise ``error`` unless it is from ``low`` to ``high``."""
    lines["expected"] = f"an integer from {low} to {high}"
    number = as_integer(value, what, **lines)
    if not low <= number <= high:
        raise refusal(error, f"{what} is out of range.", **lines, got=number)
    return number
