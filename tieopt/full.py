"""The mode in which the inner optimizer trains every member: gradients are tied before its step, weights after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from tieopt.binding import Binding
from tieopt.gradients import tie_gradients, with_gradients
from tieopt.places import BoundTie, ParamGroups
from tieopt.sharded import is_sharded
from tieopt.state import with_state
from tieopt.traced import between_graphs, untraced


class FullStep:
    """One step in the full mode.

    ``torch.compile`` is to see what ties the gradients, the inner step and what ties the weights, each in a graph of
    its own: in one of all of them it has whole copies of both. It passes by functions that do not name torch.

    Args:
        optimizer: the tied one.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._binding: Binding = optimizer._tieopt
        self._undo: list[Callable[[], None]] = []
        self._took_part: dict[BoundTie, list[Tensor]] = {}

    @between_graphs
    def step(self, inner_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Steps on the gradients that are there, tied."""
        self._begin()
        return inner_step(self._optimizer, *args, **kwargs)

    def _begin(self) -> None:
        """Ties the gradients that are there, and remembers whose they are; relaxed ties leave them alone."""
        torch.compiler.is_compiling()
        pairs = with_gradients(self._binding.parameters(self._optimizer.param_groups))
        self._took_part.update(pairs)
        if not self._binding.relaxed:
            tie_gradients(pairs, self._binding.batches, self._binding.reduction, self._undo)

    def switch(self, inner_switch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls what exchanges the weights, as ``train()`` and ``eval()`` of some optimizers do."""
        pairs = self._binding.parameters(self._optimizer.param_groups)
        self._took_part = dict(with_state(pairs, self._optimizer.state))
        try:
            result = inner_switch(self._optimizer, *args, **kwargs)
        except BaseException:
            self.close(failed=True)
            raise
        self.close()
        return result

    def finish(self) -> None:
        """Pulls relaxed members together, every so many steps."""
        if self._binding.relaxed and not _is_at_rest(self._optimizer.param_groups):
            self._binding.steps += 1
            if self._binding.steps % self._binding.every == 0:
                self._tie_weights(self._binding.strength)

    def close(self, *, failed: bool = False) -> None:
        """Leaves the mean in ``.grad``, so that the next backward adds to the mean, and ties the weights.

        Args:
            failed: whether there was an error. It may be that of one rank alone: what it sent to others then, they
                would take for what they wait for. So sharded weights stay as they are.
        """
        torch.compiler.is_compiling()
        self._restore()
        if failed:
            self._took_part = {
                tie: params for tie, params in self._took_part.items() if not any(map(is_sharded, params))
            }
        if not self._binding.relaxed:
            self._tie_weights()

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, with the gradients that it leaves tied after each call."""

        @wraps(closure)
        def tied_closure(*args: Any, **kwargs: Any) -> Any:
            self._restore()
            loss = closure(*args, **kwargs)
            self._begin()
            return loss

        return tied_closure

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _tie_weights(self, strength: float = 1.0) -> None:
        pairs = list(self._took_part.items())
        self._binding.tie_weights(pairs, differentiable=is_differentiable(self._optimizer), strength=strength)


@untraced
def _is_at_rest(param_groups: ParamGroups) -> bool:
    """Whether all learning rates are zero, as in the step by which torch.distributed.checkpoint begins a state."""
    rates = [settings.get("lr") for settings in param_groups]
    # One on an accelerator would have to be waited for.
    return all(
        rate.device.type == "cpu" and not rate.any() if isinstance(rate, Tensor) else rate == 0 for rate in rates
    )


def is_differentiable(optimizer: Any) -> bool:
    """Whether an optimizer makes its step part of a graph."""
    return bool(getattr(optimizer, "defaults", {}).get("differentiable", False))
