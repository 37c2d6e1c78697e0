"""The compact mode: the inner optimizer trains one entry for each group, and one for each free one.

The optimizer that everybody sees has the model's parameters. The inner one, its :mod:`~tieopt.modes.twin`, has compact
parameters in the places of the tied ones.

The weights remain what counts: before a step the shared values are read from them, and after it written to them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from tieopt.engine.compiled import Call, gradient_foldings, is_under_compiler, is_written_out
from tieopt.engine.engine import Batches
from tieopt.engine.graphs import between_graphs, untraced
from tieopt.modes.conversion import Lost, begun, expanded, refolded, without_history
from tieopt.modes.gradients import gradients_of, prepare_gradients, with_gradients
from tieopt.modes.state import held_of, settings_in
from tieopt.modes.twin import KEPT_BY_TORCH, compact_within, held_optimizers, twin_of
from tieopt.numbers.folding import (
    compact_like,
    fold_,
    fold_free_gradients_,
    fold_gradients_,
    folded_for,
    folded_sparse,
    folding_for,
    unfold_,
)
from tieopt.numbers.reduction import Reduction
from tieopt.tensors import calculable, is_sharded
from tieopt.ties.components import Component, components
from tieopt.ties.places import BoundTie, ParamGroups, name_of, parameters_of

Components = Sequence[tuple[Component, list[Tensor]]]


class Compact:
    """The compact parameters of an optimizer.

    Copies and pickles know the ties, and begin anew with the rest.

    Args:
        ties: of the optimizer.
        param_groups: of the optimizer.

    Attributes:
        components: the ties, so that each parameter is in one.
        param_groups: those of the optimizer, with compact parameters in the places of the tied ones.
        entries: what LBFGS remembers of them.
        twin: the optimizer that compiled steps are for, see :func:`~tieopt.modes.twin.twin_of`.

    Raises:
        ValueError: the mode cannot serve these.
    """

    def __init__(self, ties: Sequence[BoundTie], param_groups: ParamGroups) -> None:
        self.components = components(ties, param_groups)
        self._begin()

    def _begin(self) -> None:
        self.param_groups: ParamGroups = []
        self.entries: int | None = None
        self.twin: Optimizer | None = None
        self._parameters: dict[tuple[int, int], Parameter] = {}
        self._gradients: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"components": self.components}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    # Tensors that are made in inference mode could not be trained outside of it.
    @torch.inference_mode(False)
    def attach(self, param_groups: ParamGroups) -> None:
        """Makes the compact parameters, once.

        Raises:
            ValueError: with its scales, a shared value is beyond the range of the dtype.
        """
        if self._parameters:
            return
        for component, params in parameters_of(self.components, param_groups):
            for place, slices, part, param in zip(
                component.places, component.slices, folded_for(component), params, strict=True
            ):
                compact = compact_like(slices, param.detach(), len(part.kept))
                self._parameters[place[:2]] = Parameter(compact, requires_grad=param.requires_grad)
            own = [self._parameters[place[:2]] for place in component.places]
            # From here on they are read from the weights before each step.
            fold_(own, params, folding_for(component, params))
            _check_range(component, params, own)
            for compact in own:
                compact.grad = self._gradient_of(compact) if compact.numel() else None
        self.mirror(param_groups)

    def counterparts(self, param_groups: ParamGroups) -> list[tuple[Tensor, Parameter]]:
        """The parameters that are tied, and the compact one of each; not of those that are gone."""
        return [
            (param_groups[group]["params"][at], compact)
            for (group, at), compact in self._parameters.items()
            if group < len(param_groups) and at < len(param_groups[group]["params"])
        ]

    def released(self, optimizer: Any, state: Mapping[Any, Any], lost: Lost) -> dict[Any, Any]:
        """A state by the parameters that stand there now, as if none had been compact.

        Args:
            optimizer: the tied one.
            state: of it, or of an optimizer within it.
            lost: gets what cannot be converted, and begins anew.
        """
        settings = settings_in(optimizer.param_groups)
        params = {id(compact): param for param, compact in self.counterparts(optimizer.param_groups)}
        # What stands for a parameter that is gone may have the values of others.
        gone = {id(compact): compact for compact in self._parameters.values() if id(compact) not in params}
        # What was put there for a parameter before it took its place is held by itself, and is the later one.
        held = {params[id(key)]: value for key, value in state.items() if id(key) in params}
        held |= {key: value for key, value in state.items() if id(key) not in params}
        pairs = []
        for component in self.components:
            compacts = [self._parameters[place[:2]] for place in component.places]
            pairs.append((component, [params.get(id(compact), compact) for compact in compacts]))
        held |= expanded(held, pairs, settings, lost)
        if self.components:
            held = without_history(optimizer, held, lost)
        held |= {param: begun(optimizer, param, settings(param)) for param in lost}
        return {key: value for key, value in held.items() if id(key) not in gone}

    def _adopt(self, pairs: Components, optimizer: Any) -> None:
        """Takes over what a host has put into the state for parameters that it replaced.

        It may be held by the parameters themselves, if it was put there before they had their places, and it may have
        an entry for each of theirs.
        """
        state, compacts = vars(optimizer)["state"], self._by_id(optimizer.param_groups)
        for tie, params in pairs:
            state.update({compacts[id(param)]: state.pop(param) for param in params if param in state})
            own = {param: compacts[id(param)] for param in params}
            held = {param: held_of(state, compact) for param, compact in own.items()}
            for param, folded in refolded(held, own, tie, optimizer).items():
                state[own[param]] = folded

    def count(self) -> int:
        """How many entries the twin trains."""
        return sum(param.numel() for settings in self.param_groups for param in settings["params"])

    def mirror(self, param_groups: ParamGroups) -> None:
        """Makes the parameter groups of the twin those of the optimizer, with the compact parameters."""
        for number, settings in enumerate(param_groups):
            if number == len(self.param_groups):
                self.param_groups.append({"params": []})
            own = self.param_groups[number]
            # The list stays the same: some optimizers hold it.
            params = own["params"]
            wanted = [self._parameters.get((number, at), param) for at, param in enumerate(settings["params"])]
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

    def prepare(self, pairs: Components, written: Components, batches: Batches, optimizer: Any) -> None:
        """Makes ready what is to be folded.

        Args:
            pairs: components, and their parameters.
            written: those whose weights were written from outside, and may not be tied.
            batches: to work in.
            optimizer: the tied one.
        """
        param_groups = optimizer.param_groups
        trained = {id(param) for _, params in pairs for param in params if param.grad is not None}
        for param, compact in self.counterparts(param_groups):
            other_kind = compact.dtype != param.dtype or compact.device != param.device
            # What is as it is to be is left so: a compiled step is compiled again where it finds other attributes.
            if compact.grad is not None and (other_kind or id(param) not in trained or compact.grad.is_sparse):
                compact.grad = None
            if other_kind:
                with torch.inference_mode(False):
                    compact.data = compact.data.to(param)
            if compact.requires_grad != param.requires_grad:
                compact.requires_grad_(param.requires_grad)
            # Where nothing of a parameter is left there is nothing to train, and some optimizers divide by nothing.
            if id(param) in trained and compact.grad is None and compact.numel() and not _is_sparse(param.grad):
                compact.grad = self._gradient_of(compact)
        # What was written from outside, or took the place of another one, may not be tied.
        self._adopt(written, optimizer)
        batches.project_(written)

    def fold(
        self, pairs: Components, batches: Batches, reduction: Reduction, param_groups: ParamGroups, compiled: bool
    ) -> Sequence[Call]:
        """Reads the compact parameters from the weights, and their gradients from the gradients.

        Args:
            pairs: the components that have gradients, and their parameters, prepared.
            batches: to work in.
            reduction: ``"mean"`` or ``"sum"``.
            param_groups: of the optimizer.
            compiled: whether ``torch.compile`` is to get what it is worth giving to it.

        Returns:
            What it is to get.
        """
        compacts = self._by_id(param_groups)
        dense: list[tuple[Component, list[Tensor]]] = []
        written_out: list[tuple[Component, list[Tensor]]] = []
        triples = []
        for tie, params in pairs:
            if not _is_sparse(params[0].grad):
                (written_out if compiled and is_written_out(tie, gradients_of(params)) else dense).append((tie, params))
                continue
            compact, folding = compacts[id(params[0])], folding_for(tie, params)
            fold_([compact], params, folding)
            compact.grad = folded_sparse(cast(Tensor, params[0].grad), compact, folding, reduction)
        for tie, params in written_out:
            compact, grad = compacts[id(params[0])], cast(Tensor, params[0].grad)
            target = torch.empty_like(compact) if compact.grad is None else compact.grad
            fold_([compact], params, folding_for(tie, params))
            fold_free_gradients_([target], [grad], folding_for(tie, [grad]))
            triples.append((folding_for(tie, [grad]), target, grad))
        for ties, params in batches.of(dense):
            own, grads = [compacts[id(param)] for param in params], gradients_of(params)
            targets = [torch.empty_like(compact) if compact.grad is None else compact.grad for compact in own]
            fold_(own, params, folding_for(ties, params))
            fold_gradients_(targets, grads, folding_for(ties, grads), batches.workspace, reduction)
        return gradient_foldings(triples, reduction, batches.copies)

    def fold_weights(self, pairs: Components, batches: Batches, param_groups: ParamGroups) -> None:
        """Reads the compact parameters from the weights, and leaves their gradients.

        Args:
            pairs: components, and their parameters, prepared.
            batches: to work in.
            param_groups: of the optimizer.
        """
        compacts = self._by_id(param_groups)
        for ties, params in batches.of(pairs):
            fold_([compacts[id(param)] for param in params], params, folding_for(ties, params))

    def unfold(self, pairs: Components, batches: Batches, param_groups: ParamGroups) -> None:
        """Writes what the compact parameters say to the weights.

        Args:
            pairs: components, and their parameters.
            batches: to work in.
            param_groups: of the optimizer.
        """
        compacts = self._by_id(param_groups)
        for ties, params in batches.of(pairs):
            own = [compacts[id(param)] for param in params]
            unfold_(params, own, folding_for(ties, params), batches.workspace)

    def _by_id(self, param_groups: ParamGroups) -> dict[int, Parameter]:
        return {id(param): compact for param, compact in self.counterparts(param_groups)}

    @torch.inference_mode(False)
    def _gradient_of(self, compact: Parameter) -> Tensor:
        """A kept buffer for the gradient of a compact parameter."""
        kept = self._gradients.get(id(compact))
        if kept is None or kept.dtype != compact.dtype or kept.device != compact.device:
            kept = self._gradients[id(compact)] = torch.zeros_like(compact, requires_grad=False)
        return kept


def _check_range(component: Component, params: Sequence[Tensor], compacts: Sequence[Tensor]) -> None:
    if all(slices.scale is None for slices in component.slices):
        return
    for slices, param, compact in zip(component.slices, params, compacts, strict=True):
        if bool(calculable(param).isfinite().all()) and not bool(calculable(compact).isfinite().all()):
            raise ValueError(
                "The compact mode trains shared values, and one is beyond the range of the weights.\n"
                f"  Expected: weights divided by their scales within {param.dtype}, or compact=False\n"
                f"  Got:      a scale of {float(slices.scales[slices.scales != 0].abs().min()):g}"
            )


def _check_whole(pairs: Components) -> None:
    sharded: list[Any] = [param for _, params in pairs for param in params if is_sharded(param)]
    if sharded:
        raise ValueError(
            "The compact mode has no shards of compact parameters.\n"
            "  Expected: parameters that are whole on every rank, or compact=False\n"
            f"  Got:      {sharded[0].placements} of a parameter of shape {tuple(sharded[0].shape)}"
        )


def _is_sparse(grad: Tensor | None) -> bool:
    return grad is not None and grad.layout == torch.sparse_coo


def _copy_settings(source: Mapping[str, Any], target: dict[str, Any]) -> None:
    """Copies settings that differ: a compiled step is compiled again where something was written."""
    for key, value in source.items():
        if key != "params" and (key not in target or not _is_unchanged(target[key], value)):
            target[key] = value


def _is_unchanged(first: Any, second: Any) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_is_unchanged, first, second))
    plain = isinstance(first, (bool, int, float, str)) and type(first) is type(second)
    return first is second or (plain and first == second)


class CompactStep:
    """One step in the compact mode.

    ``torch.compile`` is to see the folding of gradients and the step of the twin, each in a graph of its own. In one
    graph the optimizer could keep the very buffer of a gradient as its momentum, and the next step writes over that.

    Args:
        optimizer: the tied one.
    """

    def __init__(self, optimizer: Any) -> None:
        self._tied = optimizer
        self._binding = optimizer._tieopt
        self._compact: Compact = self._binding.compact
        self._took_part: dict[Component, list[Tensor]] = {}
        self._replaced: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        self._twin = twin_of(optimizer)
        self._within = ExitStack()

    @between_graphs
    def step(self, inner_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Steps on the gradients that are there."""
        self._fold(self._prepared())
        return self._stepped(inner_step, *args, **kwargs)

    @between_graphs
    def _stepped(self, inner_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_under_compiler():
            inner_step = self._binding.inner_copies.of(inner_step)
        with self._within:
            self._go_within()
            return inner_step(self._twin, *args, **kwargs)

    @untraced
    def _go_within(self) -> None:
        if held_optimizers(self._tied):
            self._within.enter_context(compact_within(self._tied))

    @between_graphs
    def _fold(self, pairs: Components) -> None:
        for function, arguments in self._folded(pairs, is_under_compiler()):
            function(*arguments)

    @untraced
    def _folded(self, pairs: Components, compiled: bool) -> Sequence[Call]:
        """Folds what is not to be compiled, and returns the calls that do the rest."""
        batches, param_groups = self._binding.batches, self._tied.param_groups
        return self._compact.fold(pairs, batches, self._binding.reduction, param_groups, compiled)

    @untraced
    def _prepared(self, pairs: Components | None = None) -> Components:
        """Makes parameters ready to be folded, by default those that have gradients, and returns these."""
        param_groups = self._tied.param_groups
        if pairs is None:
            pairs = with_gradients(parameters_of(self._compact.components, param_groups))
        # What a closure has left without a gradient is not trained any more.
        self._took_part = dict(pairs)
        written = self._written(pairs)
        given = [(param, param.grad) for _, params in pairs for param in params]
        prepare_gradients(pairs)
        self._compact.mirror(param_groups)
        self._compact.prepare(pairs, written, self._binding.batches, self._tied)
        self._replaced = [(param, grad, param.grad) for param, grad in given if param.grad is not grad]
        return with_gradients(pairs)

    def _written(self, pairs: Components) -> Components:
        # Shards may have taken the places of whole parameters.
        _check_whole(pairs)
        written: Components = self._binding.written(pairs, self._tied.param_groups)
        return written

    @between_graphs
    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls another method than ``step()``, which may write weights that have no gradients."""
        param_groups = self._tied.param_groups
        pairs = self._binding.of_calls(parameters_of(self._compact.components, param_groups), self._tied.state)
        trained = self._prepared(pairs)
        rest = [pair for pair in pairs if pair not in trained]
        self._compact.fold_weights(rest, self._binding.batches, param_groups)
        counterparts = self._counterparts()
        own = {id(given): compact for given, compact in counterparts}
        args = tuple(_exchanged(arg, own) for arg in args)
        kwargs = {name: _exchanged(arg, own) for name, arg in kwargs.items()}
        self._fold(trained)
        result = self._stepped(method, *args, **kwargs)
        self.finish()
        return _exchanged(result, {id(compact): given for given, compact in counterparts})

    def _counterparts(self) -> list[tuple[Any, Any]]:
        """What a method may be given or return, and what the twin has in its place."""
        param_groups = self._tied.param_groups
        groups = zip(param_groups, self._compact.param_groups, strict=True)
        whole = [(self._tied, self._twin), (param_groups, self._compact.param_groups)]
        return [*whole, *groups, *self._compact.counterparts(param_groups)]

    @untraced
    def finish(self) -> None:
        """Unfolds the weights that were trained."""
        param_groups, pairs = self._tied.param_groups, list(self._took_part.items())
        self._compact.unfold(pairs, self._binding.batches, param_groups)
        self._compact.settle(param_groups)
        self._binding.note(pairs)

    def __enter__(self) -> None:
        pass

    @untraced
    def __exit__(self, *_: object) -> None:
        """Puts back the gradients that could not be folded as they were; the model's are not to be written."""
        for param, grad, replacement in self._replaced:
            if param.grad is replacement:
                param.grad = grad
        self._replaced = []

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure as the twin is to call it: it sees the model's weights, and leaves their gradients."""

        @wraps(closure)
        @between_graphs
        def unfolded_closure(*args: Any, **kwargs: Any) -> Any:
            self.__exit__()
            self.finish()
            self._within.close()
            loss = closure(*args, **kwargs)
            self._go_within()
            self._fold(self._prepared())
            return loss

        return unfolded_closure


def _exchanged(value: Any, others: Mapping[int, Any]) -> Any:
    """The value, or its items if it is a list or tuple, with others in the places of those that have one, by id."""
    if id(value) in others or type(value) not in (list, tuple):
        return others.get(id(value), value)
    items = [_exchanged(item, others) for item in value]
    # A method may write to a list that it is given.
    return value if all(map(operator.is_, items, value)) else type(value)(items)


def _has(value: Any, params: set[int], depth: int = 2) -> bool:
    """Whether something is one of some parameters, or contains one."""
    if isinstance(value, Tensor):
        return id(value) in params
    if not depth or not isinstance(value, (list, tuple, set, dict)):
        return False
    within = [*value, *value.values()] if isinstance(value, dict) else value
    return any(_has(one, params, depth - 1) for one in within)


def _check_reached(optimizer: Any, held: Sequence[Optimizer], compact: Compact) -> None:
    """Refuses optimizers that reach the tied parameters other than by the groups of the twin."""
    tied = {id(param) for _, params in parameters_of(compact.components, optimizer.param_groups) for param in params}
    kind = type(optimizer).__name__
    around = f"{kind} around {type(held[0]).__name__}" if held else kind
    for one in [optimizer, *held]:
        if held and not {"param_groups", "state"} <= vars(one).keys():
            raise ValueError(
                "The compact mode cannot serve an optimizer that only hands gradients to another one.\n"
                "  Expected: ties of the optimizer within, before it is wrapped; or compact=False\n"
                f"  Got:      {around}"
            )
        # The twin of LBFGS has the compact ones under this name.
        replaced = "_params" if one is optimizer and isinstance(one, torch.optim.LBFGS) else ""
        attributes = {name: value for name, value in vars(one).items() if name not in (*KEPT_BY_TORCH, replaced)}
        # One that holds no other may look up more about each parameter by those of its groups, as heavyball does.
        looked_up = () if held_optimizers(one) else dict
        own = [name for name, value in attributes.items() if not isinstance(value, looked_up) and _has(value, tied)]
        if own:
            way = "ties of the optimizer within, before it is wrapped;" if held else "an optimizer that steps on these,"
            raise ValueError(
                "The compact mode cannot serve an optimizer that keeps parameters outside its parameter groups.\n"
                f"  Expected: {way} or compact=False\n"
                f"  Got:      {around}, with parameters in {own[0]}"
            )
        models = [name for name, value in attributes.items() if isinstance(value, Module)]
        if held and models:
            raise ValueError(
                "The compact mode cannot serve an optimizer that runs the model itself.\n"
                "  Expected: an optimizer that runs the model in a closure alone, or compact=False\n"
                f"  Got:      {type(one).__name__} with a model as {models[0]}"
            )


def check_served(optimizer: Any, compact: Compact) -> None:
    """Refuses what the compact mode cannot serve.

    Raises:
        ValueError: the optimizer is differentiable; or it holds another one, and only hands it gradients, keeps
            parameters outside its groups or runs the model; or it takes matrices where a compact parameter is none, or
            a parameter is lazily negated or conjugated.
    """
    _check_reached(optimizer, held_optimizers(optimizer), compact)
    if any(settings.get("differentiable", False) for settings in optimizer.param_groups):
        raise ValueError(
            "The compact mode has no graph through the step.\n"
            "  Expected: differentiable=False, or compact=False\n"
            f"  Got:      {type(optimizer).__name__} with differentiable=True"
        )
    pairs = parameters_of(compact.components, optimizer.param_groups)
    _check_whole(pairs)
    muon = getattr(torch.optim, "Muon", None)
    for component, params in pairs:
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
