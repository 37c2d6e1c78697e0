"""The second face of an optimizer in the compact mode, and the state as the first one shows it.

A *twin* shares all attributes with its optimizer, but for the parameter groups, which have compact parameters in the
places of the tied ones. These are what it steps on, and keeps its state by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from types import new_class
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tieopt.engine.graphs import is_compiled, untraced


def twin_of(optimizer: Any) -> Optimizer:
    """The twin of an optimizer in the compact mode, for a step; the same one for each compiled step."""
    return _twin_of(optimizer, is_compiled())


@untraced
def _twin_of(optimizer: Any, kept: bool) -> Optimizer:
    compact = optimizer._tieopt.compact
    twin: Optimizer | None = compact.twin
    if twin is None or vars(twin) is not vars(optimizer):
        twin = cast(Optimizer, object.__new__(optimizer._tieopt_twin))
        twin.__dict__ = vars(optimizer)
        # A twin has the attributes of its optimizer. If these lead to the twin in turn, the state of a discarded
        # optimizer stays until the garbage collector runs. But what is compiled is for one object.
        if kept:
            compact.twin = twin
    return twin


# What torch and the ties keep in an optimizer: it knows of the parameters, may be large, and holds no optimizer.
KEPT_BY_TORCH = ("param_groups", "state", "_tieopt")


@untraced
def held_optimizers(optimizer: Any) -> list[Optimizer]:
    """The optimizers that an optimizer has as attributes, or in lists and dictionaries, and those that these have."""
    found = {id(optimizer): optimizer}
    waiting = [optimizer]
    while waiting:
        attributes = vars(waiting.pop())
        for one in _optimizers_in([value for name, value in attributes.items() if name not in KEPT_BY_TORCH]):
            if id(one) not in found:
                found[id(one)] = one
                waiting.append(one)
    return list(found.values())[1:]


def _optimizers_in(values: Iterable[Any], depth: int = 2) -> Iterator[Optimizer]:
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif depth and isinstance(value, (list, tuple, dict)):
            yield from _optimizers_in(value.values() if isinstance(value, dict) else value, depth - 1)


def states_of(optimizer: Any) -> list[MutableMapping[Any, Any]]:
    """The states of an optimizer and of those that it holds, as they are kept; one that they share occurs once."""
    kept = vars(optimizer).get("state", optimizer.state)
    others = [one.state for one in held_optimizers(optimizer)]
    return [kept, *(one for one in others if one is not kept and not isinstance(one, StateView))]


@contextmanager
def compact_within(optimizer: Any) -> Iterator[None]:
    """Has the optimizers that an optimizer in the compact mode holds step on the compact parameters, too."""
    compact, state = optimizer._tieopt.compact, vars(optimizer)["state"]
    pairs = compact.counterparts(optimizer.param_groups)
    compacts = {id(param): parameter for param, parameter in pairs}
    held = [(one, one.param_groups, one.state) for one in held_optimizers(optimizer)]
    own = dict(zip(map(id, optimizer.param_groups), compact.param_groups, strict=True))
    for one, param_groups, kept in held:
        one.param_groups = [
            own.get(id(settings)) or {**settings, "params": [compacts.get(id(p), p) for p in settings["params"]]}
            for settings in param_groups
        ]
        # Some share the state of the optimizer that holds them.
        shared = kept is state or isinstance(kept, StateView)
        one.state = state if shared else _by_compacts(kept, pairs)
    try:
        yield
    finally:
        for one, param_groups, kept in held:
            for settings, stepped in zip(param_groups, one.param_groups, strict=True):
                settings.update((key, value) for key, value in stepped.items() if key != "params")
            if one.state is not state:
                params = {id(parameter): param for param, parameter in pairs}
                new = {params.get(id(key), key): value for key, value in one.state.items()}
                kept.clear()
                kept.update(new)
            one.param_groups, one.state = param_groups, kept


def _twin_class(inner: type[Optimizer]) -> type[Optimizer]:
    """A subclass whose parameter groups are the compact ones."""
    namespace: dict[str, Any] = {
        "__module__": inner.__module__,
        "param_groups": property(lambda twin: twin._tieopt.compact.param_groups),
        "zero_grad": _zero_grad,
    }
    if issubclass(inner, torch.optim.LBFGS):
        # It keeps the parameters, and counts their entries, under names of its own.
        namespace["_params"] = property(lambda twin: twin._tieopt.compact.param_groups[0]["params"])
        namespace["_numel_cache"] = property(lambda twin: twin._tieopt.compact.entries, _set_entries)
    return new_class(f"Compact{inner.__name__}", (inner,), exec_body=lambda body: body.update(namespace))


def _zero_grad(twin: Any, set_to_none: bool = True) -> None:
    """Clears the gradients of the model as well: what a closure adds to is these."""
    super(type(twin), twin).zero_grad(set_to_none)
    for param, _ in twin._tieopt.compact.counterparts(vars(twin)["param_groups"]):
        if set_to_none or param.grad is None:
            param.grad = None
        else:
            param.grad.detach_().zero_()


def _set_entries(twin: Any, entries: int | None) -> None:
    twin._tieopt.compact.entries = entries


class StateView(MutableMapping[Any, Any]):
    """The state of an optimizer in the compact mode, by the model's parameters.

    What was put there for a parameter before it took its place in the groups is still held by itself.

    Args:
        held: the state by compact parameters.
        pairs: the tied parameters, and the compact one of each.
    """

    def __init__(self, held: MutableMapping[Any, Any], pairs: Sequence[tuple[Tensor, Parameter]]) -> None:
        self._held = held
        self._pairs = pairs
        # By identity: to hash a tensor takes a while.
        self._compacts = {id(param): compact for param, compact in pairs}

    def _key(self, param: Any) -> Any:
        compact = self._compacts.get(id(param))
        return param if compact is None or param in self._held else compact

    def __getitem__(self, param: Any) -> Any:
        return self._held[self._key(param)]

    def __setitem__(self, param: Any, value: Any) -> None:
        self._held[self._key(param)] = value

    def __delitem__(self, param: Any) -> None:
        del self._held[self._key(param)]

    def __contains__(self, param: object) -> bool:
        return self._key(param) in self._held

    # A look makes no entry, as __getitem__ of a defaultdict does, on which the mixin would build these.

    def get(self, param: Any, default: Any = None) -> Any:  # noqa: D102
        return self._held.get(self._key(param), default)

    def pop(self, param: Any, *default: Any) -> Any:  # noqa: D102
        return self._held.pop(self._key(param), *default)

    def setdefault(self, param: Any, default: Any = None) -> Any:  # noqa: D102
        return self._held.setdefault(self._key(param), default)

    def __iter__(self) -> Iterator[Any]:
        params = {id(compact): param for param, compact in self._pairs}
        return iter(dict.fromkeys(params.get(id(key), key) for key in self._held))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[Any, Any]:  # noqa: D102
        return dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))


def _shown_state(self: Any) -> StateView:
    """The state by the model's parameters, though it is kept by the compact ones."""
    if "state" not in vars(self):
        # What a framework has put in the optimizer's place, with a class made from its class, looks there then.
        raise AttributeError("state")
    return StateView(vars(self)["state"], self._tieopt.compact.counterparts(self.param_groups))


def _take_state(self: Any, state: Mapping[Any, Any]) -> None:
    vars(self)["state"] = _by_compacts(state, self._tieopt.compact.counterparts(self.param_groups))


def _set_state(self: Any, state: dict[str, Any]) -> None:
    """Restores a copy; it is also how ``load_state_dict`` writes."""
    compact, param_groups = self._tieopt.compact, state["param_groups"]
    compact.attach(param_groups)
    held = _by_compacts(state["state"], compact.counterparts(param_groups))
    self._tieopt_bases[1].__setstate__(self, {**state, "state": held})


def _by_compacts(state: Mapping[Any, Any], pairs: Sequence[tuple[Tensor, Parameter]]) -> defaultdict[Any, Any]:
    compacts = {id(param): compact for param, compact in pairs}
    return defaultdict(dict, {compacts.get(id(key), key): value for key, value in state.items()})


def compact_namespace(inner: type[Optimizer]) -> dict[str, Any]:
    """What the class of an optimizer in the compact mode has of its own."""
    return {
        "state": property(_shown_state, _take_state),
        "__setstate__": _set_state,
        # Made with it, and not by the first step: torch.compile cannot trace the making of a class.
        "_tieopt_twin": _twin_class(inner),
    }
