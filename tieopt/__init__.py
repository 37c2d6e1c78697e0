"""Keep entries of a model's weights equal, through the optimizer."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from tieopt.functional import is_tied, tie_
from tieopt.layers import neurons
from tieopt.optimizer import TiedOptimizer
from tieopt.shared import split_shared_
from tieopt.ties.tie import Tie, frozen

if TYPE_CHECKING:
    from tieopt import export as export
    from tieopt import patterns as patterns
    from tieopt import plot as plot
    from tieopt import testing as testing

__all__ = ["Tie", "TiedOptimizer", "frozen", "is_tied", "neurons", "split_shared_", "tie_"]
# setup.cfg reads it from here without importing anything, so it has to be a literal.
__version__ = "2.0.0"

# Imported when they are first asked for.
_SUBMODULES = ("export", "patterns", "plot", "testing")


# Type checkers would take any name for a module.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        if name in _SUBMODULES:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])
