"""The mode in which the inner optimizer trains every member: gradients are tied before its step, weights after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from tieopt.binding import Binding
from tieopt.gradients import tie_gradients, with_gradients
from tieopt.places import BoundTie


class FullStep:
    """One step in the full mode.

    Attributes:
        optimizer: whose step is to be called.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._binding: Binding = optimizer._tieopt
        self._undo: list[Callable[[], None]] = []
        self._took_part: dict[BoundTie, list[Tensor]] = {}

    def begin(self) -> None:
        """Ties the gradients that are there, and remembers whose they are; relaxed ties leave them alone."""
        pairs = with_gradients(self._binding.parameters(self.optimizer.param_groups))
        self._took_part.update(pairs)
        if not self._binding.relaxed:
            tie_gradients(pairs, self._binding.batches, self._binding.reduction, self._undo)

    def finish(self) -> None:
        """Pulls relaxed members together, every so many steps."""
        if self._binding.relaxed:
            self._binding.steps += 1
            if self._binding.steps % self._binding.every == 0:
                self._tie_weights(self._binding.strength)

    def close(self) -> None:
        """Leaves the mean in ``.grad``, so that the next backward adds to the mean, and ties the weights."""
        self._restore()
        # A closure may have changed the ties.
        if self._binding is self.optimizer._tieopt and not self._binding.relaxed:
            self._tie_weights()

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, with the gradients that it leaves tied after each call."""

        @wraps(closure)
        def tied_closure(*args: Any, **kwargs: Any) -> Any:
            self._restore()
            loss = closure(*args, **kwargs)
            self.begin()
            return loss

        return tied_closure

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _tie_weights(self, strength: float = 1.0) -> None:
        pairs = list(self._took_part.items())
        self._binding.tie_weights(pairs, differentiable=is_differentiable(self.optimizer), strength=strength)


def is_differentiable(optimizer: Any) -> bool:
    """Whether an optimizer makes its step part of a graph."""
    return bool(getattr(optimizer, "defaults", {}).get("differentiable", False))
