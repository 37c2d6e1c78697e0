"""When the numbers are applied: an optimizer that keeps its ties, and is an optimizer to everybody.

A tied optimizer *is* the optimizer that was wrapped: the same object, whose class is from then on a
subclass of :class:`TiedOptimizer` and of its own class (as ``torch.nn.utils.parametrize`` does with
modules). So there is one state and one list of parameter groups, ``isinstance`` holds, and whatever
a scheduler, a gradient scaler or a framework reads or writes, before or after, it reads or writes the
right object.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from itertools import accumulate
from types import new_class
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from tieopt.index import Index
from tieopt.reduction import Workspace, divide_, drift, multiplied, project_, projected
from tieopt.ties import FREE, Tie, canonical_labels, described, fingerprint, group_count, shown

Reduction = Literal["mean", "sum"]

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

# Where the fingerprints of the ties stand in a state_dict, beside "state" and "param_groups".
_TIES_KEY = "ties"


class _HeldTie:
    """A tie of one of the optimizer's parameters, held by position: hosts replace Parameter objects."""

    def __init__(self, group: int, position: int, param: Tensor, labels: Tensor) -> None:
        self.group = group
        self.position = position
        self.shape = param.shape
        self.labels = labels
        self._index: Index | None = None

    def index_on(self, device: torch.device) -> Index:
        """The compiled tie; compiled again where parameters have moved to another device."""
        if self._index is None or self._index.device != device:
            self._index = Index.compile(self.labels, self.shape[1:].numel(), device)
        return self._index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}


@dataclass
class _Ties:
    """All that a tied optimizer has beyond the optimizer: what is tied, how, and room to work in."""

    held: list[_HeldTie]
    reduction: Reduction
    workspace: Workspace = field(default_factory=Workspace)


class TiedOptimizer(Optimizer):
    r"""Keeps entries of the parameters of any optimizer equal.

    Before each step the gradients of the members of a group are replaced by their mean, and after it
    the members by theirs. For an optimizer that works entry by entry this is exactly training the one
    value that they share.

    The wrapped optimizer becomes the tied one: ``TiedOptimizer(optimizer, ties) is optimizer``, and
    it is still an instance of its own class. The weights are tied at once.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        ties: a mapping from parameters to groups, or a :class:`Tie`, or an iterable of ties. Names
            may stand for parameters if the optimizer was built from ``named_parameters()``.
        reduction: ``"mean"`` steps on the mean of the members' gradients, ``"sum"`` on their sum, which
            is the gradient that autograd gives to a parameter used in several places. ``.grad``
            itself holds the mean after the step in both cases, so that gradients accumulate.

    Raises:
        TypeError: ``optimizer`` is none or is tied already, or ``ties`` are none.
        ValueError: a tie names a parameter that the optimizer does not hold, or does not fit it; two
            ties share a slice; ``reduction`` is unknown.

    Example:
        >>> model = torch.nn.Linear(3, 5)
        >>> optimizer = TiedOptimizer(torch.optim.AdamW(model.parameters()), {model.weight: [[0, 2], [1, 3, 4]]})
        >>> model(torch.ones(2, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> is_tied(model.weight, [[0, 2], [1, 3, 4]])
        True
        >>> isinstance(optimizer, torch.optim.AdamW)
        True
    """

    _ties: _Ties
    _tied_bases: tuple[type[TiedOptimizer], type[Optimizer]]

    def __new__(
        cls,
        optimizer: Optimizer,
        ties: Mapping[Tensor | str, Any] | Tie | Iterable[Tie],
        *,
        reduction: Reduction = "mean",
    ) -> Self:
        _check_wrappable(optimizer)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Unknown reduction.\n  Expected: 'mean' or 'sum'\n  Got:      {shown(reduction)}")
        held = _hold(optimizer, ties)

        vars(optimizer).pop("step", None)
        for name in _HOOKS:
            hooks = vars(optimizer).get(name)
            if not isinstance(hooks, OrderedDict):
                setattr(optimizer, name, OrderedDict(hooks or {}))
        optimizer.__class__ = _tied_class(cls, type(optimizer))
        tied = cast(Self, optimizer)
        tied._ties = _Ties(held, reduction)
        return tied

    def __init__(
        self,
        optimizer: Optimizer,
        ties: Mapping[Tensor | str, Any] | Tie | Iterable[Tie],
        *,
        reduction: Reduction = "mean",
    ) -> None:
        # Everything stands already. Optimizer.__init__ would begin a second state.
        self.tie_weights()

    @property
    def ties(self) -> tuple[Tie, ...]:
        """What is tied: a :class:`Tie` for each tied parameter."""
        return tuple(Tie(param, held.labels) for held, param in self._tied_parameters())

    def tie_gradients(self) -> None:
        """Replaces the gradients of the members of each group by their mean, in ``.grad``.

        :meth:`step` does so itself; call this to read or to clip the tied gradients before. Idempotent
        bit for bit. A gradient that is None stays None. It is the mean for ``reduction="sum"``
        too: the sum stands in ``.grad`` only while the inner optimizer reads it.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied.
            TypeError: a gradient is neither dense nor sparse COO.
        """
        for held, param in self._parameters_with_gradients():
            self._tie_gradient(held, param, "mean")

    def tie_weights(self) -> None:
        """Replaces the members of each group by their mean; for after anything else wrote to the weights.

        Idempotent bit for bit. Frozen parameters (``requires_grad`` is False and there is no
        gradient) are not written.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied.
        """
        for held, param in self._tied_parameters():
            if param.requires_grad or param.grad is not None:
                self._tie_weight(held, param)

    def tie_drift(self) -> float:
        """The largest distance of a member from its group's mean, over all ties; 0.0 if all are tied."""
        return max((self._drift(held, param) for held, param in self._tied_parameters()), default=0.0)

    def tie_summary(self) -> str:
        """A table of the ties, a line for each tied parameter, to be printed.

        Example:
            >>> layer = torch.nn.Linear(3, 6)
            >>> optimizer = torch.optim.SGD(layer.named_parameters(), lr=0.1)
            >>> print(TiedOptimizer(optimizer, {"weight": [[0, 2], [1, 3, 4]]}).tie_summary())
            parameter  shape   slices  groups  members  free  distinct  drift
            weight     (6, 3)       6       2        5     1         3      0
        """
        lines = [("parameter", "shape", "slices", "groups", "members", "free", "distinct", "drift")]
        for held, param in self._tied_parameters():
            slices, groups, free = len(held.labels), group_count(held.labels), int((held.labels == FREE).sum())
            numbers = map(str, (slices, groups, slices - free, free, groups + free))
            name = _name(self, held.group, held.position)
            lines.append((name, str(tuple(param.shape)), *numbers, f"{self._drift(held, param):.3g}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([*map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:])]) for line in lines
        )

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's own, and beside it the fingerprints of the ties.

        A bare optimizer loads it, and :meth:`load_state_dict` loads a bare optimizer's.
        """
        state_dict = super().state_dict()
        if self._ties.held:
            state_dict[_TIES_KEY] = self._fingerprints()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state that was saved with the same ties, or without any.

        Raises:
            ValueError: it was saved with other ties. Nothing is loaded then.
        """
        state_dict = dict(state_dict)
        saved = state_dict.pop(_TIES_KEY, None)
        if saved is not None and saved != self._fingerprints():
            raise ValueError(_difference(self, saved, self._fingerprints()))
        super().load_state_dict(state_dict)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made at run time and cannot be found by its name.
        return _restored, (*self._tied_bases, self._ties), self.__getstate__()

    def _tied_parameters(self) -> list[tuple[_HeldTie, Tensor]]:
        """The ties with the parameters that stand in their places now, after a look at their shapes."""
        tied = [(held, self.param_groups[held.group]["params"][held.position]) for held in self._ties.held]
        for held, param in tied:
            if param.shape != held.shape:
                raise RuntimeError(
                    "A tied parameter has another shape than when it was tied.\n"
                    f"  Parameter: {_name(self, held.group, held.position)}\n"
                    f"  Expected:  {tuple(held.shape)}\n"
                    f"  Got:       {tuple(param.shape)}"
                )
        return tied

    def _parameters_with_gradients(self) -> list[tuple[_HeldTie, Tensor]]:
        """Those of :meth:`_tied_parameters` that take part in a step, after a look at their gradients."""
        tied = [(held, param) for held, param in self._tied_parameters() if param.grad is not None]
        for held, param in tied:
            assert param.grad is not None
            if param.grad.layout not in (torch.strided, torch.sparse_coo):
                raise TypeError(
                    f"The gradient of {_name(self, held.group, held.position)} cannot be tied.\n"
                    "  Expected: layout torch.strided or torch.sparse_coo\n"
                    f"  Got:      {param.grad.layout}"
                )
        return tied

    def _tie_gradient(self, held: _HeldTie, param: Tensor, reduction: Reduction) -> Callable[[], None] | None:
        """Ties one gradient; returns what turns the sum into the mean again, if it is a sum."""
        grad = param.grad
        assert grad is not None
        index = held.index_on(grad.device)
        if grad.layout == torch.strided and not grad.requires_grad and not _overlaps(grad):
            project_(grad, index, self._ties.workspace, reduction)
            return None if reduction == "mean" else partial(self._divide_gradient, held, param, grad)

        # With a graph to keep, or without a place for every entry, the result is another tensor.
        with torch.set_grad_enabled(grad.requires_grad):
            param.grad = mean = projected(grad, index)
            if reduction == "mean":
                return None
            param.grad = multiplied(mean, index)
        return partial(setattr, param, "grad", mean)

    def _divide_gradient(self, held: _HeldTie, param: Tensor, grad: Tensor) -> None:
        # Some optimizers set the gradient to None, or to another tensor, while they step.
        if param.grad is grad:
            divide_(grad, held.index_on(grad.device), self._ties.workspace)

    def _tie_weight(self, held: _HeldTie, param: Tensor) -> None:
        index = held.index_on(param.device)
        if param.grad_fn is not None and _is_differentiable(self):
            with torch.enable_grad():
                param.copy_(projected(param, index))
        else:
            project_(param, index, self._ties.workspace)

    def _drift(self, held: _HeldTie, param: Tensor) -> float:
        return drift(param, held.index_on(param.device), self._ties.workspace)

    def _fingerprints(self) -> dict[int, str]:
        """By the number that the parameter has in a state_dict."""
        before = [0, *accumulate(len(group["params"]) for group in self.param_groups)]
        return {before[held.group] + held.position: fingerprint(held.labels) for held in self._ties.held}


class _StepGradients:
    """The gradients as the inner optimizer is to see them, for the length of one step."""

    def __init__(self, optimizer: TiedOptimizer) -> None:
        self._optimizer = optimizer
        self._undo: list[Callable[[], None]] = []
        self.took_part: dict[_HeldTie, Tensor] = {}

    def tie(self) -> None:
        """Ties the gradients that are there, and remembers whose they are."""
        for held, param in self._optimizer._parameters_with_gradients():
            self.took_part[held] = param
            undo = self._optimizer._tie_gradient(held, param, self._optimizer._ties.reduction)
            if undo is not None:
                self._undo.append(undo)

    def restore(self) -> None:
        """Leaves the mean in ``.grad``, so that the next backward accumulates into the mean."""
        while self._undo:
            self._undo.pop()()

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, with the gradients that it computes tied after each call."""

        @wraps(closure)
        def tied_closure(*args: Any, **kwargs: Any) -> Any:
            self.restore()
            loss = closure(*args, **kwargs)
            self.tie()
            return loss

        return tied_closure


def _tied_step(inner: type[Optimizer]) -> Callable[..., Any]:
    """The step of a tied optimizer: hooks, tie the gradients, inner step, tie the weights, hooks."""

    def step(self: TiedOptimizer, *args: Any, **kwargs: Any) -> Any:
        # A scheduler that was built first replaced `step` on the instance, to take this note.
        self._opt_called = True
        gradients = _StepGradients(self)
        gradients.tie()
        if args and callable(args[0]):
            args = (gradients.around(args[0]), *args[1:])
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": gradients.around(kwargs["closure"])}
        try:
            return _below_hooks(inner.step)(self, *args, **kwargs)
        finally:
            gradients.restore()
            for held, param in gradients.took_part.items():
                self._tie_weight(held, param)

    step.__doc__ = inner.step.__doc__
    step.__signature__ = inspect.signature(inner.step)  # type: ignore[attr-defined]
    hooked = Optimizer.profile_hook_step(step)
    hooked.hooked = True  # type: ignore[attr-defined]
    hooked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return hooked


# What torch puts around every optimizer's step, to fire the hooks and to mark the profile.
_HOOKED_CODE = Optimizer.profile_hook_step(lambda self: None).__code__


def _below_hooks(step: Any) -> Callable[..., Any]:
    """The step without torch's wrapper, so that the hooks fire once, on the tied optimizer.

    It is told by its code: ``functools.wraps`` copies the mark ``hooked`` to anything around it.
    """
    return cast(Callable[..., Any], step.__wrapped__ if getattr(step, "__code__", None) is _HOOKED_CODE else step)


@cache
def _tied_class(cls: type[TiedOptimizer], inner: type[Optimizer]) -> type[TiedOptimizer]:
    namespace = {
        "__doc__": inner.__doc__,
        "__module__": inner.__module__,
        "_tied_bases": (cls, inner),
        "step": _tied_step(inner),
    }
    return new_class(f"Tied{inner.__name__}", (cls, inner), exec_body=lambda body: body.update(namespace))


def _restored(cls: type[TiedOptimizer], inner: type[Optimizer], ties: _Ties) -> TiedOptimizer:
    """An optimizer without state, for ``pickle`` and ``copy`` to fill."""
    optimizer = object.__new__(_tied_class(cls, inner))
    optimizer._ties = ties
    return optimizer


def _check_wrappable(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"TiedOptimizer wraps an optimizer.\n  Expected: a torch.optim.Optimizer\n  Got:      {shown(optimizer)}"
        )
    if isinstance(optimizer, TiedOptimizer):
        raise TypeError(
            "The optimizer is tied already.\n"
            "  Expected: an optimizer without ties; give all ties at once\n"
            f"  Got:      {type(optimizer).__name__} with ties {shown(optimizer.ties)}"
        )
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise TypeError(
            "The optimizer's step was replaced on the instance, below which ties cannot go.\n"
            "  Expected: an optimizer with the step of its class; tie it first, then replace the step\n"
            f"  Got:      {type(optimizer).__name__} with step {shown(step)}"
        )


def _hold(optimizer: Optimizer, ties: Any) -> list[_HeldTie]:
    """Finds the tied parameters in the optimizer and validates the groups against them."""
    if isinstance(ties, Mapping):
        pairs = list(ties.items())
    else:
        listed = [ties] if isinstance(ties, Tie) else list(ties) if isinstance(ties, Iterable) else [ties]
        if isinstance(ties, Tensor) or not all(isinstance(tie, Tie) for tie in listed):
            raise TypeError(
                "The ties are none.\n"
                "  Expected: a mapping {parameter: groups}, a Tie, or an iterable of Ties\n"
                f"  Got:      {shown(ties)}"
            )
        pairs = [(tie.param, tie.groups) for tie in listed]

    places: dict[Any, tuple[int, int]] = {}
    for group, settings in enumerate(optimizer.param_groups):
        for position, param in enumerate(settings["params"]):
            places.setdefault(param, (group, position))
        for position, name in enumerate(settings.get("param_names", ())):
            places.setdefault(name, (group, position))

    held: dict[tuple[int, int], _HeldTie] = {}
    for key, groups in pairs:
        if not isinstance(key, (Tensor, str)) or key not in places:
            raise ValueError(_not_held(optimizer, key))
        place = places[key]
        name = _name(optimizer, *place)
        if place in held:
            raise ValueError(
                f"{name} is tied twice.\n"
                "  Expected: all the groups of a parameter in one tie\n"
                f"  Got:      {described(held[place].labels)}, and {shown(groups)}"
            )
        param = optimizer.param_groups[place[0]]["params"][place[1]]
        held[place] = _HeldTie(*place, param, canonical_labels(groups, param, name))
    return list(held.values())


def _not_held(optimizer: Optimizer, key: Any) -> str:
    known = [
        f"{_name(optimizer, group, position)} {tuple(param.shape)}"
        for group, settings in enumerate(optimizer.param_groups)
        for position, param in enumerate(settings["params"])
    ]
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    hint = (
        ""
        if "param_names" in optimizer.param_groups[0] or not isinstance(key, str)
        else ("\n  Names can stand for parameters if the optimizer is built from model.named_parameters().")
    )
    return f"A tie is of a parameter that the optimizer does not hold.\n  Expected: one of {listed}\n  Got:      {shown(key)}{hint}"


def _difference(optimizer: Optimizer, saved: Any, own: dict[int, str]) -> str:
    places = [
        (group, position)
        for group, settings in enumerate(optimizer.param_groups)
        for position in range(len(settings["params"]))
    ]
    saved = saved if isinstance(saved, Mapping) else {}
    number = next(n for n in [*own, *saved] if own.get(n) != saved.get(n))
    name = _name(optimizer, *places[number]) if number in range(len(places)) else f"parameter number {number}"
    return (
        "The state was saved with other ties.\n"
        f"  Parameter: {name}\n"
        f"  Expected:  {own.get(number, 'no ties')}\n"
        f"  Got:       {saved.get(number, 'no ties')}"
    )


def _name(optimizer: Optimizer, group: int, position: int) -> str:
    names = optimizer.param_groups[group].get("param_names")
    return str(names[position]) if names else f"parameter {position} of group {group}"


def _overlaps(tensor: Tensor) -> bool:
    """Whether entries share memory, as those of an expanded tensor do."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _is_differentiable(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "defaults", {}).get("differentiable", False))
