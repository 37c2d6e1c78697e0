"""Ties bound to an optimizer: found among its parameters, applied to what stands there now.

Parameters are held by their place in the parameter groups and not by identity, because hosts replace
the Parameter objects. Every method takes the groups as they are at the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tieopt.index import Index, Layout
from tieopt.reduction import Reduction, Workspace, divide_, drift, project_, projected, relax_
from tieopt.slices import FREE, Slices, fingerprint, numbered
from tieopt.ties import Part, Tie, check_one_shape, check_writable, overlaps, shown

ParamGroups = list[dict[str, Any]]


class Place(NamedTuple):
    """Where a tied parameter stands.

    Attributes:
        group: the number of its parameter group.
        position: its place in the group.
        shape: its shape when it was tied.
    """

    group: int
    position: int
    shape: torch.Size


class BoundTie:
    """The tie of one parameter, or of several that were joined.

    Attributes:
        places: of the parameters.
        slices: of each parameter; groups are numbered in the order of their first members.
    """

    def __init__(self, places: Sequence[Place], slices: Sequence[Slices]) -> None:
        self.places = tuple(places)
        self.slices = numbered(slices)
        self._indices: dict[Layout, Index] = {}
        self._fingerprints: dict[tuple[int, ...], str] = {}

    def index_for(self, tensors: Sequence[Tensor]) -> Index:
        """The compiled tie; compiled again for tensors of another layout, or on another device."""
        layout = Layout.of(self.slices, tensors)
        if layout not in self._indices:
            self._indices[layout] = Index.compile(self.slices, tensors)
        return self._indices[layout]

    def fingerprint_as(self, numbers: tuple[int, ...]) -> str:
        """The fingerprint, where these are the numbers of the parameters in a ``state_dict``."""
        if numbers not in self._fingerprints:
            self._fingerprints[numbers] = fingerprint(self.slices, numbers)
        return self._fingerprints[numbers]

    @property
    def is_of_rows(self) -> bool:
        """Whether it is of rows of one parameter, so that sparse gradients can be tied as they are."""
        return len(self.slices) == 1 and self.slices[0].dim == 0 and self.slices[0].labels.dim() == 1

    def __getstate__(self) -> dict[str, Any]:
        # An index is quickly compiled, and larger than the labels.
        return {**self.__dict__, "_indices": {}}


class Binding:
    """All the ties of an optimizer, and how to apply them.

    Args:
        param_groups: of the optimizer.
        ties: a mapping ``{parameter or name: groups}``, a :class:`Tie`, or an iterable of them.
        reduction: ``"mean"`` or ``"sum"``, what the inner optimizer is to see of the gradients.
        strength: how far a projection moves the weights, from 0 to 1.
        every: each how many steps they are projected.

    Raises:
        TypeError, IndexError, ValueError: as :class:`~tieopt.TiedOptimizer` says.
    """

    def __init__(
        self, param_groups: ParamGroups, ties: Any, reduction: Reduction, strength: float = 1.0, every: int = 1
    ) -> None:
        _check_options(reduction, strength, every)
        self.reduction = reduction
        self.strength = strength
        self.every = every
        self.steps = 0
        self.ties = _found(param_groups, _listed(ties))
        self._workspace = Workspace()
        for tie, params in self.parameters(param_groups):
            tie.index_for(params)

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
        pairs = []
        for tie in self.ties:
            params = [_at(param_groups, place) for place in tie.places]
            if len(params) > 1:
                _check_alike(param_groups, tie.places, params)
            pairs.append((tie, params))
        return pairs

    def parameters_with_gradients(self, param_groups: ParamGroups) -> list[tuple[BoundTie, list[Tensor]]]:
        """Those of :meth:`parameters` that take part in a step.

        If one of several joined parameters does, all of them do: what has no gradient gets one of zeros.

        Raises:
            RuntimeError, ValueError: as :meth:`parameters`.
        """
        pairs = self.parameters(param_groups)
        joined = [params for _, params in pairs if len(params) > 1]
        incomplete = True
        while incomplete:  # A parameter may be joined with one, and with another by another tie.
            incomplete = False
            for params in joined:
                missing = [param for param in params if param.grad is None]
                if 0 < len(missing) < len(params):
                    incomplete = True
                    for param in missing:
                        param.grad = torch.zeros_like(param)
        return [(tie, params) for tie, params in pairs if params[0].grad is not None]

    def tie_gradients(self, tie: BoundTie, params: list[Tensor], reduction: Reduction) -> Callable[[], None] | None:
        """Ties the gradients of one tie; if they are to be the sum, returns what turns them into the mean again."""
        grads = [_tieable_gradient(tie, param) for param in params]
        recorded = any(grad.requires_grad for grad in grads)
        if recorded or grads[0].layout == torch.sparse_coo:
            # There is a graph to keep, or no place for every member: the results are other tensors.
            index = tie.index_for(params)
            with torch.set_grad_enabled(recorded):
                means = projected(grads, index)
                seen = means if reduction == "mean" else projected(grads, index, reduction)
            for param, grad in zip(params, seen, strict=True):
                param.grad = grad
            restore = partial(_replace_gradients, params, means)
        else:
            seen, index = tuple(grads), tie.index_for(grads)
            project_(seen, index, self._workspace, reduction)
            restore = partial(divide_, seen, index, self._workspace)
        if reduction == "mean":
            return None

        def to_mean() -> None:
            # Some optimizers replace the gradient, or set it to None, while they step.
            if all(param.grad is grad for param, grad in zip(params, seen, strict=True)):
                restore()

        return to_mean

    def tie_weights(
        self, tie: BoundTie, params: list[Tensor], *, differentiable: bool = False, strength: float = 1.0
    ) -> None:
        """Ties the parameters of one tie; where the step is part of a graph, the projection is too."""
        index = tie.index_for(params)
        if differentiable and any(param.grad_fn is not None for param in params):
            with torch.enable_grad():
                for param, result in zip(params, projected(params, index), strict=True):
                    param.copy_(result if strength == 1 else param.lerp(result, strength))
        elif strength == 1:
            project_(params, index, self._workspace)
        else:
            relax_(params, index, self._workspace, strength)

    def drift(self, tie: BoundTie, params: list[Tensor]) -> float:
        """The largest distance of a member from its group's mean."""
        return drift(params, tie.index_for(params), self._workspace)

    def summary(self, param_groups: ParamGroups) -> str:
        """A table with a line for each tied parameter."""
        lines = [["parameter", "shape", "slices", "groups", "members", "free", "distinct", "drift"]]
        for tie, params in self.parameters(param_groups):
            measured = f"{self.drift(tie, params):.3g}"
            for place, slices in zip(tie.places, tie.slices, strict=True):
                labels = slices.labels
                count, free = labels.numel(), int((labels == FREE).sum())
                groups = len(torch.unique(labels[labels != FREE]))
                counts = [str(number) for number in (count, groups, count - free, free, groups + free)]
                lines.append([name_of(param_groups, place), str(tuple(place.shape)), *counts, measured])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join([*map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:])]) for line in lines
        ]
        return "\n".join([*table, *([self.relaxation] if self.relaxed else [])])

    @property
    def relaxation(self) -> str:
        """How approximate relaxed ties are, in words."""
        return f"Ties are approximate: strength {self.strength}, every {self.every} step{'s' * (self.every != 1)}"

    def fingerprints(self, param_groups: ParamGroups) -> dict[int, str]:
        """The fingerprints of its ties, for each parameter by the number that it has in a ``state_dict``."""
        before = [0, *accumulate(len(group["params"]) for group in param_groups)]
        found: dict[int, list[str]] = {}
        for tie in self.ties:
            numbers = tuple(before[place.group] + place.position for place in tie.places)
            for number in dict.fromkeys(numbers):
                found.setdefault(number, []).append(tie.fingerprint_as(numbers))
        return {number: "; ".join(sorted(own)) for number, own in found.items()}

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
        saved = saved["ties"]
        own = self.fingerprints(param_groups)
        names = dict(enumerate(name_of(param_groups, place) for place in _places(param_groups)))
        for number in {**own, **saved}:
            if own.get(number) != saved.get(number):
                raise ValueError(
                    "The state was saved with other ties.\n"
                    f"  Parameter: {names.get(number, f'number {number!r}')}\n"
                    f"  Expected:  {own.get(number, 'no ties')}\n"
                    f"  Got:       {saved.get(number, 'no ties')}"
                )


class StepGradients:
    """The gradients as the inner optimizer is to see them, for the length of one step."""

    def __init__(self, binding: Binding, param_groups: ParamGroups) -> None:
        self._binding = binding
        self._param_groups = param_groups
        self._undo: list[Callable[[], None]] = []
        self.took_part: dict[BoundTie, list[Tensor]] = {}

    def tie(self) -> None:
        """Ties the gradients that are there, and remembers whose they are; relaxed ties leave them alone."""
        if self._binding.relaxed:
            return
        for tie, params in self._binding.parameters_with_gradients(self._param_groups):
            self.took_part[tie] = params
            undo = self._binding.tie_gradients(tie, params, self._binding.reduction)
            if undo is not None:
                self._undo.append(undo)

    def restore(self) -> None:
        """Leaves the mean in ``.grad``, so that the next backward adds to the mean."""
        while self._undo:
            self._undo.pop()()

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, with the gradients that it leaves tied after each call."""

        @wraps(closure)
        def tied_closure(*args: Any, **kwargs: Any) -> Any:
            self.restore()
            loss = closure(*args, **kwargs)
            self.tie()
            return loss

        return tied_closure


def _check_options(reduction: Any, strength: Any, every: Any) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"Unknown reduction.\n  Expected: 'mean' or 'sum'\n  Got:      {shown(reduction)}")
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not number or not 0 <= strength <= 1:
        raise (ValueError if number else TypeError)(
            f"strength says how far a projection goes.\n  Expected: a number from 0 to 1\n  Got:      {shown(strength)}"
        )
    whole = isinstance(every, int) and not isinstance(every, bool)
    if not whole or every < 1:
        raise (ValueError if whole else TypeError)(
            "every says each how many steps the weights are projected.\n"
            "  Expected: an integer from 1 on\n"
            f"  Got:      {shown(every)}"
        )
    if reduction == "sum" and (strength != 1 or every != 1):
        raise ValueError(
            "Relaxed ties leave the gradients as they are, and do not add them up.\n"
            "  Expected: reduction='mean', or strength=1 and every=1\n"
            f"  Got:      reduction='sum', strength={strength}, every={every}"
        )


def name_of(param_groups: ParamGroups, place: Place) -> str:
    """What errors and tables call a parameter."""
    names = param_groups[place.group].get("param_names", ()) if place.group < len(param_groups) else ()
    if place.position < len(names):
        return str(names[place.position])
    return f"param_groups[{place.group}]['params'][{place.position}]"


def _tieable_gradient(tie: BoundTie, param: Tensor) -> Tensor:
    """The gradient, replaced by another tensor of the same entries if it cannot be tied as it is."""
    grad = param.grad
    assert grad is not None
    if grad.layout == torch.sparse_coo and not tie.is_of_rows:
        param.grad = grad = grad.to_dense()
    elif grad.layout == torch.strided and not grad.requires_grad and overlaps(grad):
        param.grad = grad = grad.clone()
    return grad


def _replace_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def _at(param_groups: ParamGroups, place: Place) -> Tensor:
    params = param_groups[place.group]["params"] if place.group < len(param_groups) else ()
    param: Tensor | None = params[place.position] if place.position < len(params) else None
    if param is None or param.shape != place.shape:
        raise RuntimeError(
            "A tied parameter has not the shape that it had when it was tied.\n"
            f"  Parameter: {name_of(param_groups, place)}\n"
            f"  Expected:  {tuple(place.shape)}\n"
            f"  Got:       {'no parameter there' if param is None else tuple(param.shape)}"
        )
    return param


def _places(param_groups: ParamGroups) -> list[Place]:
    return [
        Place(group, position, param.shape)
        for group, settings in enumerate(param_groups)
        for position, param in enumerate(settings["params"])
    ]


def _listed(ties: Any) -> list[tuple[Part, ...]]:
    """The parts of each tie."""
    if isinstance(ties, Mapping):
        return [(Part(param, groups, 0, None),) for param, groups in ties.items()]
    single = isinstance(ties, (Tie, Tensor)) or not isinstance(ties, Iterable)
    listed = [ties] if single else list(ties)
    for tie in listed:
        if not isinstance(tie, Tie):
            raise TypeError(
                "These are no ties.\n"
                "  Expected: a mapping {parameter: groups}, a Tie, or an iterable of Ties\n"
                f"  Got:      {shown(tie)}{'' if single else f' in {shown(ties)}'}"
            )
    return [tie.parts for tie in listed]


def _found(param_groups: ParamGroups, ties: Sequence[tuple[Part, ...]]) -> list[BoundTie]:
    """Finds the parameters and validates the ties against them."""
    places: dict[Any, Place] = {}
    for place in _places(param_groups):
        settings = param_groups[place.group]
        places.setdefault(settings["params"][place.position], place)
        if place.position < len(settings.get("param_names", ())):
            places.setdefault(settings["param_names"][place.position], place)

    found = []
    for parts in ties:
        held = []
        for part in parts:
            if not isinstance(part.param, (Tensor, str)) or part.param not in places:
                raise ValueError(_not_held(param_groups, part.param))
            held.append(places[part.param])
        names, params = [name_of(param_groups, place) for place in held], [_at(param_groups, place) for place in held]
        slices = [part.slices(param, name) for part, param, name in zip(parts, params, names, strict=True)]
        check_one_shape(list(zip(slices, params, strict=True)), names)
        for param, name in zip(params, names, strict=True):
            check_writable(param, name)
        _check_alike(param_groups, held, params)
        _check_settings(param_groups, held)
        found.append(BoundTie(held, slices))
    _check_disjoint(param_groups, found)
    return found


def _check_alike(param_groups: ParamGroups, places: Sequence[Place], params: Sequence[Tensor]) -> None:
    """Refuses to join parameters of different dtypes, devices, or of which only some are frozen."""
    first = params[0]
    for place, param in zip(places, params, strict=True):
        for attribute in ("dtype", "device", "requires_grad"):
            expected, got = getattr(first, attribute), getattr(param, attribute)
            if expected != got:
                raise ValueError(
                    f"Joined parameters differ in {attribute}.\n"
                    f"  Expected: {expected}, as {name_of(param_groups, places[0])} has\n"
                    f"  Got:      {got} of {name_of(param_groups, place)}"
                )


def _check_settings(param_groups: ParamGroups, places: Sequence[Place]) -> None:
    """Refuses to join parameters that the optimizer would update differently."""
    first = param_groups[places[0].group]
    for place in places:
        other = param_groups[place.group]
        if other is first:
            continue
        differing = [
            f"{key}: {shown(first.get(key))} and {shown(other.get(key))}"
            for key in {**first, **other}
            if key not in ("params", "param_names", "name") and not _same(first.get(key), other.get(key))
        ]
        if differing:
            raise ValueError(
                "Joined parameters stand in parameter groups with different settings.\n"
                f"  Parameters: {name_of(param_groups, places[0])} and {name_of(param_groups, place)}\n"
                f"  Expected:   the same settings in param_groups[{places[0].group}] and [{place.group}]\n"
                f"  Got:        {'; '.join(differing)}"
            )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    return bool(first == second)


def _check_disjoint(param_groups: ParamGroups, ties: Sequence[BoundTie]) -> None:
    """Refuses ties that share an entry."""
    parts: dict[Place, list[Slices]] = {}
    for tie in ties:
        for place, slices in zip(tie.places, tie.slices, strict=True):
            parts.setdefault(place, []).append(slices)
    for place, several in parts.items():
        if len(several) == 1:
            continue
        owner = torch.full(place.shape, FREE, dtype=torch.int32)
        for number, slices in enumerate(several):
            labelled = torch.zeros(place.shape, dtype=torch.bool)
            labelled.movedim(slices.dim, 0)[slices.labels != FREE] = True
            shared = labelled & (owner != FREE)
            if shared.any():
                entry = tuple(shared.nonzero()[0].tolist())
                raise ValueError(
                    f"{name_of(param_groups, place)} is tied twice.\n"
                    "  Expected: ties that share no entry\n"
                    f"  Got:      entry {entry} in {several[int(owner[entry])]}, and in {slices}"
                )
            owner[labelled] = number


def _not_held(param_groups: ParamGroups, key: Any, limit: int = 20) -> str:
    held = [f"{name_of(param_groups, place)} {tuple(place.shape)}" for place in _places(param_groups)]
    more = f" and {len(held) - limit} more" if len(held) > limit else ""
    nameless = isinstance(key, str) and not any("param_names" in settings for settings in param_groups)
    hint = " (names need an optimizer that was built from model.named_parameters())" if nameless else ""
    return (
        "A tie is for a parameter that the optimizer does not hold.\n"
        f"  Expected: one of {', '.join(held[:limit])}{more}\n"
        f"  Got:      {shown(key)}{hint}"
    )
