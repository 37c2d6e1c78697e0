"""The full mode: the inner optimizer trains every member. Gradients are tied before its step, weights after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tieopt.engine.graphs import between_graphs, is_capturing, is_under_compiler, untraced
from tieopt.engine.sharded import spans_ranks
from tieopt.errors import message, users_level
from tieopt.modes.gradients import grad_of, gradients_of, tie_gradients, with_gradients
from tieopt.modes.mode import Mode, Pairs, is_differentiable
from tieopt.tensors import traces
from tieopt.ties.places import BoundTie, ParamGroups


class FullMode(Mode):
    """The ties of an optimizer that trains every member; arguments as for :class:`~tieopt.modes.mode.Mode`."""

    compact = False
    # Of a direction in which all members move together.
    true_reduction = "mean"

    def stepping(self, optimizer: Any, *, reads_gradients: bool = True) -> FullStep:
        """Return what runs one step, see :class:`FullStep`."""
        return FullStep(self, optimizer, ties_gradients=reads_gradients and not self.relaxed)


class FullStep:
    """One step in the full mode.

    ``torch.compile`` is to see what ties the gradients, the inner step and what ties the weights, each in a graph of
    its own: in one of all of them it has whole copies of both.

    Args:
        mode: the ties.
        optimizer: the tied one.
        ties_gradients: whether gradients are tied, too.

    Attributes:
        differentiable: whether the step may be part of a graph.
    """

    def __init__(self, mode: Mode, optimizer: Any, *, ties_gradients: bool) -> None:
        self._mode = mode
        self._optimizer = optimizer
        self._ties_gradients = ties_gradients
        # Whether a closure or another method than step() may have made others, which is what these are for.
        self._makes_gradients = False
        # What turns the sums that the inner optimizer reads into the means that accumulate.
        self._undo: list[Callable[[], None]] = []
        self._took_part: dict[BoundTie, list[Tensor]] = {}
        self._given: list[tuple[Tensor, Tensor | None]] = []
        self.differentiable = is_differentiable(optimizer)

    @between_graphs
    def step(self, inner_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Step on the gradients that are there, tied."""
        compiled = is_under_compiler()
        for call in self._begin(compiled):
            call()
        if compiled:
            inner_step = self._mode.inner_copies.of(inner_step)
        held = self._mode.held(self._optimizer)
        if held:
            with self._tied_for(held):
                return inner_step(self._optimizer, *args, **kwargs)
        result = inner_step(self._optimizer, *args, **kwargs)
        self._check_gradients()
        return result

    @untraced
    def _begin(self, compiled: bool) -> Sequence[Callable[[], None]]:
        """Tie the weights and gradients that are there, and return the calls that do the rest."""
        pairs = with_gradients(self._mode.applied_to(self._optimizer.param_groups))
        self._check_weights(pairs)
        self._took_part.update(pairs)
        if not self._ties_gradients:
            return ()
        calls = tie_gradients(pairs, self._mode.engine, self._mode.reduction, self._undo, compiled=compiled)
        for _, params in pairs:
            self._given.extend(zip(params, map(grad_of, params), strict=True))
        return calls

    def _check_weights(self, pairs: Pairs[BoundTie]) -> None:
        """Tie weights that something else has written since the last step; each tie as it begins to take part."""
        trained = []
        for tie, params in pairs:
            if params[0].requires_grad and tie not in self._took_part:
                trained.append((tie, params))
        written = self._mode.written(trained, self._optimizer.param_groups)
        if written and not self._mode.relaxed:
            self._mode.tie_weights(written, differentiable=self.differentiable)

    @between_graphs
    def _check_gradients(self) -> None:
        """Warn of gradients that an optimizer has made within its step, after those that were there were tied."""
        if self._makes_gradients:
            return
        for param, grad in self._given:
            if param.grad is not grad and param.grad is not None:
                warnings.warn(
                    message(
                        f"{type(self._optimizer).__name__} made gradients within its step, and these are not tied.",
                        expected="gradients that are made before step() or in its closure; or an optimizer that makes "
                        "them and holds another one that steps, which sees them tied",
                    ),
                    stacklevel=users_level(),
                )
                return

    @contextmanager
    def _tied_for(self, held: Sequence[Optimizer]) -> Iterator[None]:
        """Tie gradients once more where an optimizer has replaced them before one that it holds steps on them."""
        tied = self._gradient_traces()

        def tie_again(*_: object) -> None:
            if self._gradient_traces() != tied:
                self._restore()
                for call in self._begin(compiled=False):
                    call()

        hooks = [
            inner.register_step_pre_hook(tie_again) for inner in held if hasattr(inner, "_optimizer_step_pre_hooks")
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @untraced
    def _gradient_traces(self) -> dict[BoundTie, list[tuple[object, ...]]]:
        pairs = self._mode.applied_to(self._optimizer.param_groups)
        return traces((tie, gradients_of(params)) for tie, params in pairs)

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call another method than ``step()``, which may write weights that have no gradients."""
        pairs = self._mode.pairs_of_calls(self._optimizer.param_groups, self._optimizer.state)
        self._check_weights(pairs)
        self._took_part, self._makes_gradients = dict(pairs), True
        return self.step(method, *args, **kwargs)

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return the closure, with the gradients that it leaves tied after each call."""

        @wraps(closure)
        @between_graphs
        def tied_closure(*args: Any, **kwargs: Any) -> Any:
            self._restore()
            loss = closure(*args, **kwargs)
            self._makes_gradients = True
            for call in self._begin(is_under_compiler()):
                call()
            return loss

        return tied_closure

    @between_graphs
    def finish(self) -> None:
        """Pull relaxed members together, every so many steps."""
        if self._mode.relaxed and not _is_at_rest(self._optimizer.param_groups):
            self._mode.steps += 1
            if self._mode.steps % self._mode.every == 0:
                pairs, strength = list(self._took_part.items()), self._mode.strength
                self._mode.tie_weights(pairs, differentiable=self.differentiable, strength=strength, stepped=True)

    @between_graphs
    def __enter__(self) -> None:
        self._was_running = self._mode.begin()

    @between_graphs
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the mean in ``.grad``, so that the next backward adds to the mean, and tie the weights."""
        self._mode.running = self._was_running
        if self._undo:
            self._restore()
        if kind is not None:
            # An error may be that of one rank alone: what it sent now, the others would take for what they wait for.
            self._took_part = {tie: params for tie, params in self._took_part.items() if not spans_ranks(params)}
        pairs = list(self._took_part.items())
        if not self._mode.relaxed:
            self._mode.tie_weights(pairs, differentiable=self.differentiable, stepped=True)
        self._mode.note(pairs)

    @untraced
    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()


def _is_at_rest(param_groups: ParamGroups) -> bool:
    """Whether all learning rates are zero, as in the step by which torch.distributed.checkpoint begins a state."""
    return all(_is_zero(settings.get("lr")) for settings in param_groups)


def _is_zero(rate: Any) -> bool:
    if not isinstance(rate, Tensor):
        return bool(rate == 0)
    return not is_capturing() and not bool(rate.any())
