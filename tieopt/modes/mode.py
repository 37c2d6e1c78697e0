"""Ties bound to an optimizer: how they are applied to the parameters that stand there now.

Every method takes the parameter groups as they are at the moment.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tieopt.engine.engine import Batches, Pairs
from tieopt.engine.graphs import Copies, between_graphs, is_capturing, untraced
from tieopt.engine.sharded import shards_for
from tieopt.errors import shown, users_level
from tieopt.modes.compact import Compact
from tieopt.modes.state import with_state
from tieopt.numbers.index import Indices
from tieopt.numbers.reduction import Reduction, Workspace, drift, projected, tied
from tieopt.tensors import is_sharded, traces
from tieopt.ties.places import BoundTie, ParamGroups, T, all_places, check_apart, found, name_of, parameters_of
from tieopt.ties.tie import check_writable


class Binding:
    """All the ties of an optimizer, and how to apply them.

    Args:
        param_groups: of the optimizer.
        ties: a mapping ``{parameter or name: groups}``, a :class:`Tie`, or an iterable of them.
        reduction: ``"mean"`` or ``"sum"``, what the inner optimizer is to see of the gradients.
        strength: how far a projection moves the weights, from 0 to 1.
        every: they are projected after every so many steps.
        compact: whether the inner optimizer trains one entry for each group.
        holder: what has these parameter groups, as errors call it.

    Attributes:
        running: whether a step, or another method of the optimizer, is running.

    Raises:
        TypeError, IndexError, ValueError: as :class:`~tieopt.TiedOptimizer` says.
    """

    running = False

    def __init__(
        self,
        param_groups: ParamGroups,
        ties: Any,
        reduction: Reduction,
        strength: float = 1.0,
        every: int = 1,
        compact: bool = False,
        holder: str = "optimizer",
    ) -> None:
        _check_options(reduction, strength, every, compact)
        self.reduction = reduction
        self.strength = strength
        self.every = every
        self.steps = 0
        self.ties = found(param_groups, ties, holder)
        self.compact = Compact(self.ties, param_groups) if compact else None
        self.batches = Batches()
        self.inner_copies = Copies()
        self._captured = False
        self._replaced: Binding | None = None
        self._seen: dict[BoundTie, list[tuple[object, ...]]] = {}
        # Compiled now, and not while a step is captured.
        pairs = self.parameters(param_groups)
        for tie, params in pairs:
            if any(map(is_sharded, params)):
                shards_for(tie, params, [name_of(param_groups, place) for place in tie.places])
        pairs = [pair for pair in pairs if not any(map(is_sharded, pair[1]))]
        for ties, params in (*pairs, *self.batches.of(pairs)):
            ties.index_for(params)

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made in the middle of a step takes no part in it.
        kept = {key: value for key, value in vars(self).items() if key != "running"}
        return {**kept, "_seen": {}, "_captured": False, "_replaced": None}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Marks that a step is running; a step may run within another one."""
        before, self.running = self.running, True
        self._captured = self._captured or is_capturing()
        try:
            yield
        finally:
            self.running = before

    def replace(self, other: Binding) -> None:
        """Takes the place of the ties that an optimizer had.

        A CUDA graph that has captured one of their steps goes on to use their tensors, which therefore stay.
        """
        self.steps = other.steps
        self._replaced = other if other._captured else other._replaced

    @property
    def relaxed(self) -> bool:
        """Whether the ties are approximate: gradients stay as they are, and weights may drift apart."""
        return self.strength != 1 or self.every != 1

    def parameters(self, param_groups: ParamGroups) -> list[tuple[BoundTie, list[Tensor]]]:
        """The ties with the parameters that stand in their places now.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone.
            ValueError: joined parameters have come to differ in what has to be the same.
        """
        return parameters_of(self.ties, param_groups)

    @between_graphs
    def tie_weights(
        self, pairs: Pairs, *, differentiable: bool = False, strength: float = 1.0, stepped: bool = False
    ) -> None:
        """Ties parameters; where the step is part of a graph, the projection is too.

        Args:
            pairs: ties and their parameters.
            differentiable: whether steps may be part of a graph.
            strength: how far members are moved towards their mean.
            stepped: whether a step of the inner optimizer has just written them.
        """
        if differentiable:
            pairs = self._tie_graphs(pairs, strength)
        if strength == 1:
            self.batches.project_(pairs, stepped=stepped)
        elif strength > 0:
            self.batches.relax_(pairs, strength, stepped=stepped)

    def of_calls(
        self, pairs: Sequence[tuple[T, list[Tensor]]], state: Mapping[Any, Any]
    ) -> list[tuple[T, list[Tensor]]]:
        """The ties that a method other than ``step()`` may write.

        These are also frozen ones that the optimizer has state of, unless somebody has written their members apart:
        frozen parameters stay as they are.
        """
        return [pair for pair in with_state(pairs, state) if pair[1][0].requires_grad or _is_still_tied(*pair)]

    @untraced
    def note(self, pairs: Iterable[tuple[BoundTie, list[Tensor]]]) -> None:
        """Remembers ties whose parameters are tied now."""
        self._seen.update((tie, traces(params)) for tie, params in pairs)

    @untraced
    def note_all(self, param_groups: ParamGroups) -> None:
        """Remembers that all parameters that are not frozen are tied now."""
        ties = self.ties if self.compact is None else self.compact.components
        self.note(pair for pair in parameters_of(ties, param_groups) if pair[1][0].requires_grad)

    @untraced
    def written(
        self, pairs: Sequence[tuple[T, list[Tensor]]], param_groups: ParamGroups
    ) -> list[tuple[T, list[Tensor]]]:
        """The ties whose parameters were replaced, moved or written to since they were noted.

        Warns if the members of a group are not equal any more.

        Raises:
            ValueError: entries of a parameter share memory now, with each other or with those of another parameter.
        """
        now = {tie: traces(params) for tie, params in pairs}
        changed = [(tie, params) for tie, params in pairs if now[tie] != self._seen.get(tie)]
        moved = [(tie, params) for tie, params in changed if _places(now[tie]) != _places(self._seen.get(tie, []))]
        for tie, params in moved:
            for place, param in zip(tie.places, params, strict=True):
                check_writable(param, name_of(param_groups, place))
        if moved:
            check_apart(param_groups, self.ties)
        for tie, params in changed:
            if tie in self._seen and not self.relaxed and not _is_still_tied(tie, params):
                names = ", ".join(name_of(param_groups, place) for place in tie.places)
                warnings.warn(
                    "Tied weights were replaced or written to between two steps, and their members differ now: "
                    f"{names}. They go on from their mean.\n"
                    "  Expected: the same written to all members, or tie_weights() afterwards; and no embedding with "
                    "max_norm,\n"
                    "            whose lookups write to single rows (instead call weight.renorm_() after each step)",
                    stacklevel=users_level(),
                )
        return changed

    @untraced
    def _tie_graphs(self, pairs: Pairs, strength: float) -> Pairs:
        """Ties the parameters that are part of a graph, and returns the other ones."""
        graphs = [pair for pair in pairs if any(param.grad_fn is not None for param in pair[1])]
        for tie, params in graphs:
            with torch.enable_grad():
                for param, result in zip(params, projected(params, tie.index_for), strict=True):
                    param.copy_(result if strength == 1 else param.lerp(result, strength))
        return [pair for pair in pairs if pair not in graphs] if graphs else pairs

    def drift(self, tie: BoundTie, params: list[Tensor]) -> float:
        """The largest distance of a member from its group's mean; of sharded parameters on any rank."""
        # Not in the buffers of the steps: this may be asked in another thread, or after a step was captured.
        workspace = Workspace()
        if any(map(is_sharded, params)):
            return shards_for(tie, params, list(map(str, tie.places))).drift(params, workspace)
        return drift(params, tie.index_for(params), workspace)

    def fingerprints(self, param_groups: ParamGroups) -> dict[int, str]:
        """The fingerprints of its ties, for each parameter by the number that it has in a ``state_dict``."""
        before = [0, *accumulate(len(group["params"]) for group in param_groups)]
        by_number: dict[int, list[str]] = {}
        for tie in self.ties:
            numbers = tuple(before[place.group] + place.position for place in tie.places)
            for number in dict.fromkeys(numbers):
                by_number.setdefault(number, []).append(tie.fingerprint_as(numbers))
        return {number: "; ".join(sorted(own)) for number, own in by_number.items()}

    def check_saved(self, saved: Any, param_groups: ParamGroups) -> None:
        """Compares what a checkpoint says of its ties with these.

        Raises:
            ValueError: they differ, or it says nothing of ties.
        """
        if not isinstance(saved, Mapping) or not isinstance(saved.get("ties"), Mapping):
            raise ValueError(
                "The state does not say what its ties are.\n"
                "  Expected: what state_dict() of a TiedOptimizer returned\n"
                f"  Got:      {shown(saved)}"
            )
        steps = saved.get("steps", 0)
        if not isinstance(steps, int):
            raise ValueError(
                f"The state does not say how many steps there were.\n  Expected: an integer\n  Got:      {shown(steps)}"
            )
        # torch.distributed.checkpoint makes numbers strings, and puts what it has loaded beside what was there.
        own, saved = (
            {str(number): one for number, one in each.items()}
            for each in (self.fingerprints(param_groups), saved["ties"])
        )
        names = {str(number): name_of(param_groups, place) for number, place in enumerate(all_places(param_groups))}
        for number in {**own, **saved}:
            if own.get(number) != saved.get(number):
                raise ValueError(
                    "The state was saved with other ties.\n"
                    f"  Parameter: {names.get(number, f'number {number}')}\n"
                    f"  Expected:  {own.get(number, 'no ties')}\n"
                    f"  Got:       {saved.get(number, 'no ties')}\n"
                    "  To change the ties, tie as when it was saved, load the state, and then call retie()."
                )


def _places(seen: Sequence[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Traces without what counts writes."""
    return [trace[:-1] for trace in seen]


def _is_still_tied(tie: Indices, params: list[Tensor]) -> bool:
    """Whether parameters are tied, as far as that can be asked: not of shards, whose ranks would have to talk."""
    if any(param.grad_fn is not None or is_sharded(param) for param in params) or is_capturing():
        return True
    return tied([param.detach() for param in params], tie.index_for(params), Workspace())


def _check_options(reduction: Any, strength: Any, every: Any, compact: Any) -> None:
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(f"Unknown reduction.\n  Expected: 'mean' or 'sum'\n  Got:      {shown(reduction)}")
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not number or not 0 <= strength <= 1:
        raise (ValueError if number else TypeError)(
            f"strength says how far a projection goes.\n  Expected: a number from 0 to 1\n  Got:      {shown(strength)}"
        )
    whole = isinstance(every, int) and not isinstance(every, bool)
    if not whole or every < 1:
        raise (ValueError if whole else TypeError)(
            "every says after how many steps the weights are projected.\n"
            "  Expected: an integer from 1 on\n"
            f"  Got:      {shown(every)}"
        )
    if reduction == "sum" and (strength != 1 or every != 1):
        raise ValueError(
            "Relaxed ties leave the gradients as they are, and do not add them up.\n"
            "  Expected: reduction='mean', or strength=1 and every=1\n"
            f"  Got:      reduction='sum', strength={strength}, every={every}"
        )
    if not isinstance(compact, bool):
        raise TypeError(f"compact says which mode it is.\n  Expected: True or False\n  Got:      {shown(compact)}")
    if compact and (strength != 1 or every != 1):
        raise ValueError(
            "Relaxed ties train every member by its own gradient, and not one entry for all of them.\n"
            "  Expected: compact=False, or strength=1 and every=1\n"
            f"  Got:      compact=True, strength={strength}, every={every}"
        )
