"""What errors and warnings say, and at which call they point."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

_PASSED_OVER = tuple(os.path.dirname(str(file)) + os.sep for file in (__file__, torch.__file__))


def users_level() -> int:
    """Return the level, as for ``warnings.warn`` in the caller, of the first call from outside tieopt and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        level, frame = level + 1, frame.f_back
    return level


def refusal(what: str, /, **lines: object) -> str:
    """Write the message of an error or a warning.

    Args:
        what: a sentence.
        **lines: what stands behind "Expected:", "Got:" and, where it helps, "Parameter:" and the like, in this order.

    Example:
        >>> print(refusal("Unknown reduction.", expected="'mean' or 'sum'", got=shown("max")))
        Unknown reduction.
          Expected: 'mean' or 'sum'
          Got:      'max' (str)
    """
    width = max(map(len, lines)) + 1
    return "\n".join([what, *(f"  {f'{name.capitalize()}:':{width}} {line}" for name, line in lines.items())])


def shown_position(position: tuple[int, ...]) -> str:
    """A position, without brackets where it is a single number."""
    return str(position[0] if len(position) == 1 else position)


def shown(value: Any, limit: int = 80) -> str:
    """A value and its type, short enough for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= limit else text[: limit - 3] + '...'} ({type(value).__name__})"
