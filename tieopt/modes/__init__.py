"""What a step does: one class for each mode, of one shape."""

from typing import Any

from tieopt.errors import refusal, shown
from tieopt.modes.compact import CompactMode
from tieopt.modes.full import FullMode
from tieopt.modes.mode import Mode


def mode_class(compact: Any) -> type[Mode]:
    """Return the class of a mode.

    Args:
        compact: whether it is the compact mode.

    Raises:
        TypeError: it is neither True nor False.
    """
    if not isinstance(compact, bool):
        raise refusal(TypeError, "compact says which mode it is.", expected="True or False", got=shown(compact))
    return CompactMode if compact else FullMode
