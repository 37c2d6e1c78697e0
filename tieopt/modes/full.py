"""The full mode: the inner optimizer trains every member. Gradients are tied before its step, weights after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from tieopt.engine.agreement import tell_of_failure
from tieopt.engine.graphs import between_graphs, is_capturing, untraced
from tieopt.errors import message, users_level
from tieopt.modes.gradients import check_gradients, grad_of, gradients_of, tie_gradients
from tieopt.modes.mode import Mode, Pairs, Step, by_strength
from tieopt.modes.state import held_optimizers
from tieopt.tensors import traces
from tieopt.ties.places import BoundTie, ParamGroups, all_parameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FullStep(Step):
    """One step in the full mode; arguments as for :class:`~tieopt.modes.mode.Step`."""

    _took_part: Mapping[BoundTie, list[Tensor]] = {}
    # Parameters with the gradients that they had before the step, unless a closure has made others.
    _given: Sequence[tuple[Tensor, Tensor | None]] = ()
    # Whether other ranks know which ties take part.
    _has_begun = False

    @between_graphs
    def _run(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        held = held_optimizers(self._optimizer)
        if held:
            with self._tied_for(held):
                return inner(self._optimizer, *args, **kwargs)
        if self._is_step and self._ties_gradients:
            params = list(chain.from_iterable(map(itemgetter(1), self._exact(self._took_part.items()))))
            self._given = list(zip(params, map(grad_of, params), strict=True))
        result = inner(self._optimizer, *args, **kwargs)
        for param, grad in self._given:
            if param.grad is not grad and param.grad is not None:
                self._warn_of_gradients()
                break
        return result

    @untraced
    def _prepared(self, pairs: Pairs | None, compiled: bool) -> Sequence[Callable[[], None]]:
        param_groups = self._optimizer.param_groups
        self._mode.check_still_apart(param_groups)
        if pairs is not None:
            self._check_weights(pairs)
        pairs = self._mode.applied_to(param_groups)
        if self._ties_gradients:
            check_gradients(self._exact(pairs))
        pairs = self._mode.taking_part(pairs, param_groups, stepped=self._took_part)
        self._has_begun = True
        self._check_weights(pairs)
        if not self._ties_gradients:
            return ()
        params = all_parameters(param_groups)
        return tie_gradients(self._exact(pairs), params, self._mode.engine, self._undo, compiled=compiled)

    def _exact(self, pairs: Iterable[tuple[BoundTie, list[Tensor]]]) -> Pairs:
        """Return the ties that are not relaxed."""
        return [pair for pair in pairs if not pair[0].options.relaxed] if self._mode.relaxed else list(pairs)

    def _check_weights(self, pairs: Pairs) -> None:
        """Tie weights that something else has written since the last step; each tie as it begins to take part."""
        took_part = self._took_part
        trained = [pair for pair in pairs if pair[1][0].requires_grad and pair[0] not in took_part]
        written = self._mode.written(trained, self._optimizer.param_groups)
        if written:
            # Those across ranks are tied by all of them, as they begin to take part.
            self._mode.tie_weights([pair for pair in self._exact(written) if pair[0].across is None])
        self._took_part = {**took_part, **dict(pairs)}

    @between_graphs
    def _warn_of_gradients(self) -> None:
        warnings.warn(
            message(
                f"{type(self._optimizer).__name__} made gradients within its step, and these are not tied.",
                expected="gradients that are made before step() or in its closure; or an optimizer that makes "
                "them and holds another one that steps, which sees them tied",
            ),
            stacklevel=users_level(),
        )

    def _tied_for(self, held: Sequence[Optimizer]) -> ExitStack:
        """Tie gradients once more where an optimizer has replaced them before one that it holds steps on them."""
        tied, hooks = self._gradient_traces(), ExitStack()

        def tie_again(*_: object) -> None:
            if self._gradient_traces() != tied:
                self._restore()
                self._prepare()

        for inner in held:
            if hasattr(inner, "_optimizer_step_pre_hooks"):
                hooks.enter_context(inner.register_step_pre_hook(tie_again))
        return hooks

    @untraced
    def _gradient_traces(self) -> dict[BoundTie, list[tuple[object, ...]]]:
        pairs = self._mode.applied_to(self._optimizer.param_groups)
        return traces((tie, gradients_of(params)) for tie, params in pairs)

    @between_graphs
    def _pause(self) -> None:
        self._restore()
        self._given = ()
        self._has_begun = False

    @between_graphs
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Leave the mean in ``.grad``, so that the next backward adds to the mean, and tie the weights."""
        mode, pairs = self._mode, list(self._took_part.items())
        mode.running = self._was_running
        if self._undo:
            self._restore()
        if kind is not None:
            # An error may be that of one rank alone: what it sent now, the others would take for what they wait for.
            pairs = mode.engine.whole(pairs)
            if isinstance(error, Exception):
                tell_of_failure(self._waiting(), error)
        try:
            self._tie(pairs, is_over=kind is None)
        except Exception as failure:
            tell_of_failure(mode.process_groups, failure)
            raise

    @between_graphs
    def _tie(self, pairs: Pairs, *, is_over: bool) -> None:
        """Tie the weights once the optimizer has written them; ``is_over`` if it has done so without an error."""
        mode = self._mode
        mode.tie_weights(self._exact(pairs), stepped=True)
        if mode.relaxed and is_over and self._is_step:
            param_groups = self._optimizer.param_groups
            is_at_rest = _is_at_rest(param_groups)
            mode.steps += not is_at_rest

            def is_due(tie: BoundTie) -> bool:
                if tie.across is None:
                    return not is_at_rest and not mode.steps % tie.options.every
                # Other parameter groups may differ from rank to rank.
                return not _is_at_rest([param_groups[place.group] for place in tie.places])

            due = [(tie, params) for tie, params in pairs if tie.options.relaxed and is_due(tie)]
            for strength, pulled in by_strength(due):
                mode.tie_weights(pulled, strength=strength, stepped=True)
        mode.note(pairs)

    def _waiting(self) -> list[ProcessGroup]:
        """The process groups whose ranks wait for this one in the middle of a step."""
        waits = not self._has_begun or any(tie.across is not None for tie in self._took_part)
        return self._mode.process_groups if waits else []


class FullMode(Mode):
    """The ties of an optimizer that trains every member; arguments as for :class:`~tieopt.modes.mode.Mode`."""

    compact = False
    # Of a direction in which all members move together.
    true_reduction = "mean"
    step_class = FullStep


def _is_at_rest(param_groups: ParamGroups) -> bool:
    """Whether all learning rates are zero, as in the step by which torch.distributed.checkpoint begins a state."""
    return all(_is_zero(settings.get("lr")) for settings in param_groups)


def _is_zero(rate: Any) -> bool:
    if not isinstance(rate, Tensor):
        return bool(rate == 0)
    return not is_capturing() and not bool(rate.any())
