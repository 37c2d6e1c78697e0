"""Keep entries of a model's weights equal, through the optimizer."""

from importlib.metadata import version

from tieopt.functional import is_tied, tie_
from tieopt.layers import neurons
from tieopt.optimizer import TiedOptimizer
from tieopt.ties import Tie

__all__ = ["Tie", "TiedOptimizer", "is_tied", "neurons", "tie_"]
__version__ = version("tieopt")
