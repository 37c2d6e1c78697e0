"""Ties bound to an optimizer: found among its parameters, applied to what stands there now.

Parameters are held by their place in the parameter groups and not by identity, because hosts replace
the Parameter objects. Every method takes the groups as they are at the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from tieopt.index import Index
from tieopt.reduction import Workspace, divide_, drift, multiplied, project_, projected
from tieopt.ties import (
    FREE,
    Tie,
    canonical_labels,
    check_writable,
    described,
    fingerprint,
    group_count,
    overlaps,
    shown,
)

Reduction = Literal["mean", "sum"]
ParamGroups = list[dict[str, Any]]


class TiedParameter:
    """The tie of one parameter.

    Attributes:
        group: the number of its parameter group.
        position: its place in the group.
        shape: its shape when it was tied.
        labels: canonical, int64 on the CPU, shape ``[n]``.
    """

    def __init__(self, group: int, position: int, shape: torch.Size, labels: Tensor) -> None:
        self.group = group
        self.position = position
        self.shape = shape
        self.labels = labels
        self._index: Index | None = None

    def index_on(self, device: torch.device) -> Index:
        """The compiled tie; compiled again if the parameter has moved to another device."""
        if self._index is None or self._index.device != device:
            self._index = Index.compile(self.labels, self.shape[1:].numel(), device)
        return self._index

    def __getstate__(self) -> dict[str, Any]:
        # An index is quickly compiled, and larger than the labels.
        return {**self.__dict__, "_index": None}


class Binding:
    """All the ties of an optimizer, and how to apply them.

    Args:
        param_groups: of the optimizer.
        ties: a mapping ``{parameter or name: groups}``, a :class:`Tie`, or an iterable of them.
        reduction: ``"mean"`` or ``"sum"``, what the inner optimizer is to see of the gradients.

    Raises:
        TypeError, IndexError, ValueError: as :class:`~tieopt.TiedOptimizer` says.
    """

    def __init__(self, param_groups: ParamGroups, ties: Any, reduction: Reduction) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Unknown reduction.\n  Expected: 'mean' or 'sum'\n  Got:      {shown(reduction)}")
        self.reduction = reduction
        self.tied = _found(param_groups, _pairs(ties))
        self._workspace = Workspace()
        for tied, param in self.parameters(param_groups):
            tied.index_on(param.device)

    def parameters(self, param_groups: ParamGroups) -> list[tuple[TiedParameter, Tensor]]:
        """The ties with the parameters that stand in their places now.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone.
        """
        pairs = []
        for tied in self.tied:
            param = _at(param_groups, tied.group, tied.position)
            if param is None or param.shape != tied.shape:
                raise RuntimeError(
                    "A tied parameter has not the shape that it had when it was tied.\n"
                    f"  Parameter: {name_of(param_groups, tied.group, tied.position)}\n"
                    f"  Expected:  {tuple(tied.shape)}\n"
                    f"  Got:       {'no parameter there' if param is None else tuple(param.shape)}"
                )
            pairs.append((tied, param))
        return pairs

    def parameters_with_gradients(self, param_groups: ParamGroups) -> list[tuple[TiedParameter, Tensor]]:
        """Those of :meth:`parameters` that take part in a step.

        Raises:
            RuntimeError: as :meth:`parameters`.
        """
        return [(tied, param) for tied, param in self.parameters(param_groups) if param.grad is not None]

    def tie_gradient(self, tied: TiedParameter, param: Tensor, reduction: Reduction) -> Callable[[], None] | None:
        """Ties one gradient; if it is to be the sum, returns what turns it into the mean again."""
        grad = param.grad
        assert grad is not None
        index = tied.index_on(grad.device)
        if grad.layout == torch.sparse_coo or grad.requires_grad:
            # It has no place for every member, or a graph to keep: the result is another tensor.
            with torch.set_grad_enabled(grad.requires_grad):
                mean = projected(grad, index)
                param.grad = seen = mean if reduction == "mean" else multiplied(mean, index)
            restore = partial(setattr, param, "grad", mean)
        else:
            if overlaps(grad):
                param.grad = grad = grad.clone()
            seen = grad
            project_(seen, index, self._workspace, reduction)
            restore = partial(divide_, seen, index, self._workspace)
        if reduction == "mean":
            return None

        def to_mean() -> None:
            # Some optimizers replace the gradient, or set it to None, while they step.
            if param.grad is seen:
                restore()

        return to_mean

    def tie_weight(self, tied: TiedParameter, param: Tensor, *, differentiable: bool) -> None:
        """Ties one parameter; where the step is part of a graph, the projection is too."""
        index = tied.index_on(param.device)
        if differentiable and param.grad_fn is not None:
            with torch.enable_grad():
                param.copy_(projected(param, index))
        else:
            project_(param, index, self._workspace)

    def drift(self, tied: TiedParameter, param: Tensor) -> float:
        """The largest distance of a member from its group's mean."""
        return drift(param, tied.index_on(param.device), self._workspace)

    def summary(self, param_groups: ParamGroups) -> str:
        """A table with a line for each tied parameter."""
        lines = [["parameter", "shape", "slices", "groups", "members", "free", "distinct", "drift"]]
        for tied, param in self.parameters(param_groups):
            slices, groups, free = len(tied.labels), group_count(tied.labels), int((tied.labels == FREE).sum())
            names = [name_of(param_groups, tied.group, tied.position), str(tuple(param.shape))]
            counts = [str(count) for count in (slices, groups, slices - free, free, groups + free)]
            lines.append([*names, *counts, f"{self.drift(tied, param):.3g}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([*map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:])]) for line in lines
        )

    def fingerprints(self, param_groups: ParamGroups) -> dict[int, str]:
        """The fingerprint of each tie, by the number that its parameter has in a ``state_dict``."""
        before = [0, *accumulate(len(group["params"]) for group in param_groups)]
        return {before[tied.group] + tied.position: fingerprint(tied.labels) for tied in self.tied}

    def check_fingerprints(self, saved: Any, param_groups: ParamGroups) -> None:
        """Compares the fingerprints of a checkpoint with those of these ties.

        Raises:
            ValueError: they differ, or are none.
        """
        if not isinstance(saved, Mapping):
            raise ValueError(
                "The fingerprints of the state's ties are no mapping.\n"
                "  Expected: what state_dict() of a TiedOptimizer returned\n"
                f"  Got:      {shown(saved)}"
            )
        own = self.fingerprints(param_groups)
        places = ((g, position) for g, group in enumerate(param_groups) for position in range(len(group["params"])))
        names = {number: name_of(param_groups, *place) for number, place in enumerate(places)}
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
        self.took_part: dict[TiedParameter, Tensor] = {}

    def tie(self) -> None:
        """Ties the gradients that are there, and remembers whose they are."""
        for tied, param in self._binding.parameters_with_gradients(self._param_groups):
            self.took_part[tied] = param
            undo = self._binding.tie_gradient(tied, param, self._binding.reduction)
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


def name_of(param_groups: ParamGroups, group: int, position: int) -> str:
    """What errors and tables call a parameter."""
    names = param_groups[group].get("param_names", ()) if group < len(param_groups) else ()
    return str(names[position]) if position < len(names) else f"param_groups[{group}]['params'][{position}]"


def _at(param_groups: ParamGroups, group: int, position: int) -> Tensor | None:
    params = param_groups[group]["params"] if group < len(param_groups) else ()
    return params[position] if position < len(params) else None


def _pairs(ties: Any) -> list[tuple[Any, Any]]:
    """Parameters or names, and their groups."""
    if isinstance(ties, Mapping):
        return list(ties.items())
    single = isinstance(ties, (Tie, Tensor)) or not isinstance(ties, Iterable)
    listed = [ties] if single else list(ties)
    for tie in listed:
        if not isinstance(tie, Tie):
            raise TypeError(
                "These are no ties.\n"
                "  Expected: a mapping {parameter: groups}, a Tie, or an iterable of Ties\n"
                f"  Got:      {shown(tie)}{'' if single else f' in {shown(ties)}'}"
            )
    return [(tie.param, tie.groups) for tie in listed]


def _found(param_groups: ParamGroups, pairs: list[tuple[Any, Any]]) -> list[TiedParameter]:
    """Finds the parameters and validates the groups against them."""
    places: dict[Any, tuple[int, int]] = {}
    for group, settings in enumerate(param_groups):
        for keys in (settings["params"], settings.get("param_names", ())):
            for position, key in enumerate(keys):
                places.setdefault(key, (group, position))

    found: dict[tuple[int, int], TiedParameter] = {}
    for key, groups in pairs:
        if not isinstance(key, (Tensor, str)) or key not in places:
            raise ValueError(_not_held(param_groups, key))
        group, position = place = places[key]
        name = name_of(param_groups, group, position)
        if place in found:
            raise ValueError(
                f"{name} is tied twice.\n"
                "  Expected: one tie with all the groups of a parameter\n"
                f"  Got:      {described(found[place].labels)}, and {shown(groups)}"
            )
        param = param_groups[group]["params"][position]
        labels = canonical_labels(groups, param, name)
        check_writable(param, name)
        found[place] = TiedParameter(group, position, param.shape, labels)
    return list(found.values())


def _not_held(param_groups: ParamGroups, key: Any, limit: int = 20) -> str:
    held = [
        f"{name_of(param_groups, group, position)} {tuple(param.shape)}"
        for group, settings in enumerate(param_groups)
        for position, param in enumerate(settings["params"])
    ]
    more = f" and {len(held) - limit} more" if len(held) > limit else ""
    nameless = isinstance(key, str) and not any("param_names" in settings for settings in param_groups)
    hint = " (names need an optimizer that was built from model.named_parameters())" if nameless else ""
    return (
        "A tie is for a parameter that the optimizer does not hold.\n"
        f"  Expected: one of {', '.join(held[:limit])}{more}\n"
        f"  Got:      {shown(key)}{hint}"
    )
