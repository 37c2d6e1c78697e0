"""The compact mode: the inner optimizer trains one entry for each group, and one for each free one.

The optimizer that everybody sees has the model's parameters. The inner one, its *twin*, is a second face of the
same object: whatever is read or written there is the same attribute, but for the parameter groups, which hold
compact parameters in the places of the tied ones. Its state is kept by the compact parameters, and shown by the
model's.

The weights remain what counts: before a step the shared values are read from them, and after it written to them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import wraps
from types import new_class
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tieopt.batches import Batches
from tieopt.compact_state import Parts
from tieopt.folding import (
    compact_like,
    fold_,
    fold_gradients_,
    folded_for,
    folded_sparse,
    folding_for,
    unfold_,
)
from tieopt.gradients import prepare_gradients, with_gradients
from tieopt.places import BoundTie, ParamGroups, Place, check_joined, name_of, parameter_at
from tieopt.reduction import Reduction
from tieopt.slices import FREE, Slices
from tieopt.traced import fold_traced_, unfold_traced_


class Component(BoundTie):
    """All the ties of parameters that have to be folded together, each parameter once.

    Attributes:
        versions: of the parameters when they were last written here, see :func:`_versions`; None if they were not.
    """

    def __init__(self, places: Sequence[Place], slices: Sequence[Slices]) -> None:
        super().__init__(places, slices)
        self.versions: list[tuple[int, int, int | None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "versions": None}


Components = Sequence[tuple[Component, list[Tensor]]]


def components(ties: Sequence[BoundTie], param_groups: ParamGroups) -> list[Component]:
    """Ties that have a parameter in common, or join some, as one."""
    sets: list[tuple[set[Place], list[BoundTie]]] = []
    for tie in ties:
        places, own = set(tie.places), [tie]
        for other in [each for each in sets if each[0] & places]:
            sets.remove(other)
            places, own = places | other[0], other[1] + own
        sets.append((places, own))
    return [_component(own, param_groups) for _, own in sets]


def _component(ties: Sequence[BoundTie], param_groups: ParamGroups) -> Component:
    kinds: dict[Place, set[tuple[int, torch.Size]]] = {}
    for tie in ties:
        for place, each in zip(tie.places, tie.slices, strict=True):
            kinds.setdefault(place, set()).add((each.dim, each.labels.shape))
    # What is tied in slices of several kinds is tied entry by entry.
    by_entry = any(len(own) > 1 for own in kinds.values())
    parts: dict[Place, list[Slices]] = {}
    count = 0
    for tie in ties:
        own = list(tie.slices)
        if by_entry:
            # Before they are counted: a group of slices is as many groups as a slice has entries.
            params = [parameter_at(param_groups, place) for place in tie.places]
            own = [Slices(*each.entries(param)) for each, param in zip(own, params, strict=True)]
        for place, each in zip(tie.places, own, strict=True):
            labels = torch.where(each.labels == FREE, FREE, each.labels + count)
            parts.setdefault(place, []).append(each._replace(labels=labels))
        count += 1 + max(int(each.labels.max()) if each.labels.numel() else FREE for each in own)
    return Component(list(parts), [_overlaid(own) for own in parts.values()])


def _overlaid(slices: Sequence[Slices]) -> Slices:
    """Several labellings of the same slices, which share none, as one."""
    labels, scale = slices[0].labels, slices[0].scales
    for each in slices[1:]:
        labels, scale = torch.maximum(labels, each.labels), torch.where(each.labels == FREE, scale, each.scales)
    scaled = any(each.scale is not None for each in slices)
    return Slices(labels, torch.where(labels == FREE, 1.0, scale) if scaled else None, slices[0].dim)


class Compact:
    """The compact parameters of an optimizer, and its twin that trains them.

    Copies and pickles know the ties, and begin anew with the rest.

    Args:
        ties: of the optimizer.
        param_groups: of the optimizer.

    Raises:
        ValueError: the mode cannot serve these.
    """

    def __init__(self, ties: Sequence[BoundTie], param_groups: ParamGroups) -> None:
        self.components = components(ties, param_groups)
        self._begin()

    def _begin(self) -> None:
        self.param_groups: ParamGroups = []
        self.parameters: dict[tuple[int, int], Parameter] = {}
        self.attributes: dict[str, Any] = {"_numel_cache": None}
        self._gradients: dict[int, Tensor] = {}
        self._twin: Optimizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"components": self.components}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def attach(self, param_groups: ParamGroups) -> None:
        """Makes the compact parameters, once."""
        if self.parameters:
            return
        for component, params in self.pairs(param_groups):
            for place, slices, part, param in zip(
                component.places, component.slices, folded_for(component), params, strict=True
            ):
                compact = compact_like(slices, param.detach(), len(part.kept))
                self.parameters[place[:2]] = Parameter(compact, requires_grad=param.requires_grad)
            own = [self.parameters[place[:2]] for place in component.places]
            # From here on they are read from the weights before each step.
            fold_(own, params, folding_for(component, params))
            for compact in own:
                compact.grad = self._gradient_of(compact) if compact.numel() else None
        self.mirror(param_groups)

    def pairs(self, param_groups: ParamGroups) -> list[tuple[Component, list[Tensor]]]:
        """The components with the parameters that stand in their places now."""
        pairs = []
        for component in self.components:
            params = [parameter_at(param_groups, place) for place in component.places]
            if len(params) > 1:
                check_joined(param_groups, component.places, params)
            pairs.append((component, params))
        return pairs

    def parts(self, param_groups: ParamGroups) -> list[Parts]:
        """What is kept of each parameter."""
        return [(component.slices, folded_for(component), params) for component, params in self.pairs(param_groups)]

    def by_param(self, param_groups: ParamGroups) -> dict[Tensor, Parameter]:
        """The compact parameter of each tied one."""
        return {param_groups[group]["params"][at]: compact for (group, at), compact in self.parameters.items()}

    def twin_of(self, optimizer: Optimizer, inner: type[Optimizer]) -> Optimizer:
        """The optimizer of the compact parameters."""
        if self._twin is None:
            self._twin = object.__new__(_twin_class(inner))
            self._twin.__dict__ = vars(optimizer)
        return self._twin

    def mirror(self, param_groups: ParamGroups) -> None:
        """Makes the parameter groups of the twin those of the optimizer, with the compact parameters."""
        for number, settings in enumerate(param_groups):
            if number == len(self.param_groups):
                self.param_groups.append({"params": []})
            own = self.param_groups[number]
            # The list stays the same: some optimizers hold it.
            params = own["params"]
            wanted = [self.parameters.get((number, at), param) for at, param in enumerate(settings["params"])]
            if len(params) != len(wanted) or any(old is not new for old, new in zip(params, wanted, strict=True)):
                params[:] = wanted
            for key in own.keys() - settings.keys():
                del own[key]
            _copy_settings(settings, own)
        del self.param_groups[len(param_groups) :]

    def settle(self, param_groups: ParamGroups) -> None:
        """Takes over what the twin wrote to the settings of its parameter groups."""
        for own, settings in zip(self.param_groups, param_groups, strict=True):
            _copy_settings(own, settings)

    def fold(self, pairs: Components, batches: Batches, reduction: Reduction, param_groups: ParamGroups) -> None:
        """Reads the compact parameters from the weights, and their gradients from the gradients.

        Args:
            pairs: the components that have gradients, and their parameters.
            batches: to work in.
            reduction: ``"mean"`` or ``"sum"``.
            param_groups: of the optimizer.
        """
        compacts = self._by_id(param_groups)
        given = [(param, param.grad) for _, params in pairs for param in params]
        prepare_gradients(pairs)
        if torch.compiler.is_compiling():
            self._fold_traced(pairs, reduction, compacts)
            return
        for compact in compacts.values():
            compact.grad = None
        # What was written from outside may not be tied.
        batches.project_([(tie, params) for tie, params in pairs if tie.versions != _versions(params)])
        dense = []
        for tie, params in pairs:
            grad = _gradients(params)[0]
            if grad.layout == torch.strided:
                dense.append((tie, params))
                continue
            ((compact,), folding) = self._compacts(params, compacts), folding_for(tie, params)
            fold_([compact], params, folding)
            compact.grad = folded_sparse(grad, compact, folding, reduction)
        for ties, params in batches.of(dense):
            own, grads = self._compacts(params, compacts), _gradients(params)
            fold_(own, params, folding_for(ties, params))
            targets = [self._gradient_of(compact) for compact in own]
            fold_gradients_(targets, grads, folding_for(ties, grads), batches.workspace, reduction)
            for compact, target in zip(own, targets, strict=True):
                # Where nothing of a parameter is left there is nothing to train, and some optimizers divide by nothing.
                compact.grad = target if target.numel() else None
        for param, original in given:
            # What could not be folded as it is was replaced; the model's gradients are not to be written.
            if param.grad is not original:
                param.grad = original

    def _fold_traced(self, pairs: Components, reduction: Reduction, compacts: Mapping[int, Parameter]) -> None:
        trained = {id(param) for _, params in pairs for param in params}
        for number, compact in compacts.items():
            # What is as it is to be is left so: a graph ends where attributes of parameters change.
            if number not in trained and compact.grad is not None:
                compact.grad = None
        for ties, params in pairs:
            own = self._compacts(params, compacts)
            targets = [self._gradient_of(compact) for compact in own]
            for compact, target in zip(own, targets, strict=True):
                if compact.grad is not target and target.numel():
                    compact.grad = target
            fold_traced_(ties, own, params, targets, _gradients(params), reduction)

    def unfold(self, pairs: Components, batches: Batches, param_groups: ParamGroups) -> None:
        """Writes what the compact parameters say to the weights.

        Args:
            pairs: components, and their parameters.
            batches: to work in.
            param_groups: of the optimizer.
        """
        compacts = self._by_id(param_groups)
        if torch.compiler.is_compiling():
            for tie, params in pairs:
                unfold_traced_(tie, params, self._compacts(params, compacts))
            return
        for ties, params in batches.of(pairs):
            unfold_(params, self._compacts(params, compacts), folding_for(ties, params), batches.workspace)
        for tie, params in pairs:
            tie.versions = _versions(params)

    def _by_id(self, param_groups: ParamGroups) -> dict[int, Parameter]:
        """As :meth:`by_param`, but quicker: hashing a tensor takes a while."""
        return {id(param_groups[group]["params"][at]): compact for (group, at), compact in self.parameters.items()}

    def _compacts(self, params: Sequence[Tensor], compacts: Mapping[int, Parameter]) -> list[Parameter]:
        """The compact parameters of some, where these are now."""
        own = [compacts[id(param)] for param in params]
        for param, compact in zip(params, own, strict=True):
            if compact.dtype != param.dtype or compact.device != param.device:
                compact.data = compact.data.to(param)
        return own

    def _gradient_of(self, compact: Parameter) -> Tensor:
        """A kept buffer for the gradient of a compact parameter."""
        kept = self._gradients.get(id(compact))
        if kept is None or kept.dtype != compact.dtype or kept.device != compact.device:
            kept = self._gradients[id(compact)] = torch.zeros_like(compact, requires_grad=False)
        return kept


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def _versions(params: Sequence[Tensor]) -> list[tuple[int, int, int | None]]:
    """What changes when parameters are replaced or written to; not through ``.data``, which leaves no trace."""
    return [(id(param), param.data_ptr(), None if param.is_inference() else param._version) for param in params]


def _copy_settings(source: Mapping[str, Any], target: dict[str, Any]) -> None:
    """Copies settings that differ: a traced step is traced again where something was written."""
    # While it traces, torch.compile pretends that every optimizer is capturable.
    apart = ("params", "capturable") if torch.compiler.is_compiling() else ("params",)
    for key, value in source.items():
        if key not in apart and (key not in target or not _same(target[key], value)):
            target[key] = value


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    plain = isinstance(first, (bool, int, float, str)) and type(first) is type(second)
    return first is second or (plain and first == second)


class CompactStep:
    """One step in the compact mode.

    Attributes:
        optimizer: whose step is to be called, the twin.
    """

    def __init__(self, optimizer: Any) -> None:
        self._tied = optimizer
        self._binding = optimizer._tieopt
        self._compact: Compact = self._binding.compact
        self._took_part: dict[Component, list[Tensor]] = {}
        self.optimizer = self._compact.twin_of(optimizer, optimizer._tieopt_bases[1])

    def begin(self) -> None:
        """Folds the gradients that are there, and the weights that they are of."""
        param_groups = self._tied.param_groups
        pairs = with_gradients(self._compact.pairs(param_groups))
        self._took_part.update(pairs)
        self._compact.mirror(param_groups)
        self._compact.fold(pairs, self._binding.batches, self._binding.reduction, param_groups)

    def finish(self) -> None:
        """Unfolds the weights that were trained."""
        param_groups = self._tied.param_groups
        self._compact.settle(param_groups)
        self._compact.unfold(list(self._took_part.items()), self._binding.batches, param_groups)

    def close(self) -> None:
        """There is nothing to undo: gradients were not written."""

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure as the twin is to call it: it sees the model's weights, and leaves their gradients."""

        @wraps(closure)
        def unfolded_closure(*args: Any, **kwargs: Any) -> Any:
            self.finish()
            loss = closure(*args, **kwargs)
            if self._tied._tieopt is not self._binding:
                raise RuntimeError(
                    "In the compact mode a closure cannot change the ties: the step goes on with the old ones.\n"
                    "  Expected: retie() or untie() between steps\n"
                    "  Got:      other ties after the closure"
                )
            self.begin()
            return loss

        return unfolded_closure


def check_served(optimizer: Any, compact: Compact) -> None:
    """Refuses what the compact mode cannot serve.

    Raises:
        ValueError: the optimizer is differentiable, or takes matrices where a compact parameter is none, or a parameter
            is lazily negated or conjugated.
    """
    if any(settings.get("differentiable", False) for settings in optimizer.param_groups):
        raise ValueError(
            "The compact mode has no graph through the step.\n"
            "  Expected: differentiable=False, or compact=False\n"
            f"  Got:      {type(optimizer).__name__} with differentiable=True"
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            "The compact mode serves step() alone, and these optimizers write to the parameters elsewhere, too.\n"
            "  Expected: an optimizer without train() and eval(), or compact=False\n"
            f"  Got:      {type(optimizer).__name__}"
        )
    muon = getattr(torch.optim, "Muon", None)
    for component, params in compact.pairs(optimizer.param_groups):
        for place, slices, param in zip(component.places, component.slices, params, strict=True):
            name = name_of(optimizer.param_groups, place)
            if param.is_neg() or param.is_conj():
                raise ValueError(
                    "The compact mode reads weights as they are in memory.\n"
                    "  Expected: a parameter that is not lazily negated or conjugated, or compact=False\n"
                    f"  Got:      {name}"
                )
            if muon is not None and isinstance(optimizer, muon) and slices.labels.dim() != 1:
                raise ValueError(
                    "Muon trains matrices, and the compact parameter would be a list of single values.\n"
                    f"  Parameter: {name} of shape {tuple(param.shape)}\n"
                    "  Expected:  ties of whole rows or columns, or compact=False\n"
                    f"  Got:       labels of shape {tuple(slices.labels.shape)}"
                )


# --- the twin, and the state as it is shown ---


def _kept_apart(name: str) -> property:
    """An attribute of the twin that is not that of the optimizer."""

    def get(twin: Any) -> Any:
        return twin._tieopt.compact.attributes[name]

    def put(twin: Any, value: Any) -> None:
        twin._tieopt.compact.attributes[name] = value

    return property(get, put)


_twin_classes: dict[type, type] = {}


def _twin_class(inner: type[Optimizer]) -> type[Optimizer]:
    """A subclass whose parameter groups are the compact ones, one for all optimizers of a class."""
    if inner not in _twin_classes:
        namespace: dict[str, Any] = {
            "__module__": inner.__module__,
            "param_groups": property(lambda twin: twin._tieopt.compact.param_groups),
        }
        if issubclass(inner, torch.optim.LBFGS):
            # It keeps the parameters, and counts their entries, under names of its own.
            namespace["_params"] = property(lambda twin: twin._tieopt.compact.param_groups[0]["params"])
            namespace["_numel_cache"] = _kept_apart("_numel_cache")
        _twin_classes[inner] = new_class(
            f"Compact{inner.__name__}", (inner,), exec_body=lambda body: body.update(namespace)
        )
    return _twin_classes[inner]


class StateView(MutableMapping[Any, Any]):
    """The state of an optimizer in the compact mode, by the model's parameters.

    Args:
        held: the state by compact parameters.
        compacts: the compact parameter of each tied one.
    """

    def __init__(self, held: MutableMapping[Any, Any], compacts: Mapping[Tensor, Parameter]) -> None:
        self._held = held
        self._compacts = compacts

    def __getitem__(self, param: Any) -> Any:
        return self._held[self._compacts.get(param, param)]

    def __setitem__(self, param: Any, value: Any) -> None:
        self._held[self._compacts.get(param, param)] = value

    def __delitem__(self, param: Any) -> None:
        del self._held[self._compacts.get(param, param)]

    def __contains__(self, param: object) -> bool:
        return self._compacts.get(param, param) in self._held  # type: ignore[call-overload]

    # A look makes no entry, as __getitem__ of a defaultdict does, on which the mixin would build these.

    def get(self, param: Any, default: Any = None) -> Any:  # noqa: D102
        return self._held.get(self._compacts.get(param, param), default)

    def pop(self, param: Any, *default: Any) -> Any:  # noqa: D102
        return self._held.pop(self._compacts.get(param, param), *default)

    def setdefault(self, param: Any, default: Any = None) -> Any:  # noqa: D102
        return self._held.setdefault(self._compacts.get(param, param), default)

    def __iter__(self) -> Iterator[Any]:
        params = {compact: param for param, compact in self._compacts.items()}
        return iter([params.get(key, key) for key in self._held])

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))
