"""The mode in which the inner optimizer trains every member: gradients are tied before its step, weights after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tieopt.engine.compiled import is_under_compiler
from tieopt.engine.engine import Pairs
from tieopt.engine.graphs import between_graphs, is_capturing, untraced
from tieopt.errors import users_level
from tieopt.modes.gradients import gradients_of, tie_gradients, with_gradients
from tieopt.modes.mode import Binding
from tieopt.modes.twin import held_optimizers
from tieopt.tensors import is_sharded, traces
from tieopt.ties.places import BoundTie, ParamGroups


class FullStep:
    """One step in the full mode.

    ``torch.compile`` is to see what ties the gradients, the inner step and what ties the weights, each in a graph of
    its own: in one of all of them it has whole copies of both.

    Args:
        optimizer: the tied one.
        gradients: whether gradients are tied, too.
    """

    def __init__(self, optimizer: Any, *, gradients: bool = True) -> None:
        self._optimizer = optimizer
        self._binding: Binding = optimizer._tieopt
        self._ties_gradients = gradients and not self._binding.relaxed
        # Whether a closure or another method than step() may have made others, which is what these are for.
        self._makes_gradients = False
        self._undo: list[Callable[[], None]] = []
        self._took_part: dict[BoundTie, list[Tensor]] = {}

    @between_graphs
    def step(self, inner_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Steps on the gradients that are there, tied."""
        self._begin()
        if is_under_compiler():
            inner_step = self._binding.inner_copies.of(inner_step)
        held, given = held_optimizers(self._optimizer), self._gradients()
        if not held:
            result = inner_step(self._optimizer, *args, **kwargs)
            self._check_gradients(given)
            return result
        with self._tied_within(held):
            return inner_step(self._optimizer, *args, **kwargs)

    @untraced
    def _gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(param, param.grad) for params in self._took_part.values() for param in params]

    @untraced
    def _check_gradients(self, given: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Warns of gradients that an optimizer has made within its step, after those that were there were tied."""
        if not self._ties_gradients or self._makes_gradients:
            return
        if any(param.grad is not grad and param.grad is not None for param, grad in given):
            warnings.warn(
                f"{type(self._optimizer).__name__} made gradients within its step, and these are not tied.\n"
                "  Expected: gradients that are made before step() or in its closure; or an optimizer that makes them "
                "and holds another one that steps, which sees them tied",
                stacklevel=users_level(),
            )

    @contextmanager
    def _tied_within(self, held: Sequence[Optimizer]) -> Iterator[None]:
        """Ties gradients once more where an optimizer has replaced them before one that it holds steps on them."""
        tied = self._gradient_traces()

        def tie_again(*_: object) -> None:
            if self._gradient_traces() != tied:
                self._restore()
                self._begin()

        hooks = [one.register_step_pre_hook(tie_again) for one in held if hasattr(one, "_optimizer_step_pre_hooks")]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @untraced
    def _gradient_traces(self) -> list[tuple[object, ...]]:
        pairs = self._binding.parameters(self._optimizer.param_groups)
        return [trace for _, params in pairs for trace in traces(gradients_of(params))]

    @untraced
    def _check_weights(self, pairs: Pairs) -> None:
        """Ties weights that something else has written since the last step; each tie as it begins to take part."""
        trained = [(tie, params) for tie, params in pairs if tie not in self._took_part and params[0].requires_grad]
        written = self._binding.written(trained, self._optimizer.param_groups)
        if not self._binding.relaxed:
            self._binding.tie_weights(written, differentiable=is_differentiable(self._optimizer))

    @between_graphs
    def _begin(self) -> None:
        """Ties the gradients that are there, and remembers whose they are."""
        pairs = self._with_gradients()
        if self._ties_gradients:
            tie_gradients(pairs, self._binding.batches, self._binding.reduction, self._undo)

    @untraced
    def _with_gradients(self) -> Pairs:
        pairs = with_gradients(self._binding.parameters(self._optimizer.param_groups))
        self._check_weights(pairs)
        self._took_part.update(pairs)
        return pairs

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls another method than ``step()``, which may write weights that have no gradients."""
        pairs = self._binding.of_calls(self._binding.parameters(self._optimizer.param_groups), self._optimizer.state)
        self._check_weights(pairs)
        self._took_part, self._makes_gradients = dict(pairs), True
        return self.step(method, *args, **kwargs)

    @untraced
    def finish(self) -> None:
        """Pulls relaxed members together, every so many steps."""
        if self._binding.relaxed and not _is_at_rest(self._optimizer.param_groups):
            self._binding.steps += 1
            if self._binding.steps % self._binding.every == 0:
                self._tie_weights(self._binding.strength)

    def __enter__(self) -> None:
        pass

    @between_graphs
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leaves the mean in ``.grad``, so that the next backward adds to the mean, and ties the weights."""
        self._restore()
        if kind is not None:
            self._leave_sharded()
        if not self._binding.relaxed:
            self._tie_weights()
        self._binding.note(self._took_part.items())

    @untraced
    def _leave_sharded(self) -> None:
        """Leaves sharded weights as they are after an error, which may be that of one rank alone.

        What it sent to others now, they would take for what they wait for.
        """
        self._took_part = {tie: params for tie, params in self._took_part.items() if not any(map(is_sharded, params))}

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, with the gradients that it leaves tied after each call."""

        @wraps(closure)
        @between_graphs
        def tied_closure(*args: Any, **kwargs: Any) -> Any:
            self._restore()
            loss = closure(*args, **kwargs)
            self._makes_gradients = True
            self._begin()
            return loss

        return tied_closure

    @untraced
    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    @between_graphs
    def _tie_weights(self, strength: float = 1.0) -> None:
        pairs = list(self._took_part.items())
        self._binding.tie_weights(
            pairs, differentiable=is_differentiable(self._optimizer), strength=strength, stepped=True
        )


def _is_at_rest(param_groups: ParamGroups) -> bool:
    """Whether all learning rates are zero, as in the step by which torch.distributed.checkpoint begins a state."""
    return all(_is_zero(settings.get("lr")) for settings in param_groups)


def _is_zero(rate: Any) -> bool:
    if not isinstance(rate, Tensor):
        return bool(rate == 0)
    return not is_capturing() and not bool(rate.any())


def is_differentiable(optimizer: Any) -> bool:
    """Whether an optimizer makes its step part of a graph."""
    return bool(getattr(optimizer, "defaults", {}).get("differentiable", False))
