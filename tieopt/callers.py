"""Whose call a warning is about."""

from __future__ import annotations

import os
import sys

import torch

_PASSED_OVER = tuple(os.path.dirname(str(file)) + os.sep for file in (__file__, torch.__file__))


def users_level() -> int:
    """Return the level, as for ``warnings.warn`` in the caller, of the first call from outside tieopt and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        level, frame = level + 1, frame.f_back
    return level
