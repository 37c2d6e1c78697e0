"""The state of an optimizer, converted between one entry for each member and one for each shared value."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_scalar_dtype

from tieopt.engine.engine import Engine
from tieopt.errors import refusal, shown
from tieopt.modes.mode import Mode
from tieopt.modes.state import (
    Lost,
    Settings,
    State,
    are_weights,
    begins_at,
    has_entries,
    held_of,
    scales_for,
    settings_in,
    tied_state,
)
from tieopt.numbers.folding import CompactRows, compact_like, compact_slices
from tieopt.numbers.rounding import times
from tieopt.tensors import bits, has_shape
from tieopt.ties.components import components
from tieopt.ties.places import BoundTie, parameters_of
from tieopt.ties.slices import FREE, Slices

# Ties that have each parameter once, and their parameters.
Components = Iterable[tuple[BoundTie, Sequence[Tensor]]]


class _TiedParameter(NamedTuple):
    """A parameter of a component, and its state, which is that of the parameter or of its compact one.

    Attributes:
        param: that stands in its place now.
        state: of the parameter.
        slices: of the parameter.
        folded: which row of the compact parameters each slice is a multiple of, and which multiple.
        shape: of the parameter when it was tied.
        compact_shape: of the compact parameter.
    """

    param: Tensor
    state: State
    slices: Slices
    folded: CompactRows
    shape: torch.Size
    compact_shape: torch.Size

    @property
    def is_replaced(self) -> bool:
        """Whether its place was taken by a parameter of another shape."""
        return self.param.shape != self.shape

    def compact_value(self, key: str) -> Tensor | None:
        """Return the tensor under a key if it has an entry for each of the compact parameter's."""
        value = self.state.get(key)
        return value if has_shape(value, self.compact_shape) else None

    def offsets(self, key: str, like: Tensor) -> Tensor | None:
        """Return what is added to the row of each slice, for a key of weights; None if there is nothing."""
        offset, folded = self.slices.offset, self.folded
        if offset is None or not are_weights(key):
            return None
        offsets = offset.at(offset.rows.flatten()).to(like.device, like.dtype)
        offsets[self.slices.labels.flatten() == FREE] = 0
        # Those that are alone in their groups have rows of their own, as free ones.
        offsets[folded.kept[folded.groups :]] = 0
        return offsets

    def compacted(self, state: State) -> State:
        """Return a state with an entry for each of the compact parameter's, where it has one for each of the whole."""
        kept = self.folded.kept
        like = compact_like(self.slices, self.param.detach(), len(kept))
        compact = dict(state)
        for key, value in state.items():
            if has_entries(key, value) and has_shape(value, self.shape):
                scales = scales_for(key, [value], self.folded.scale[kept])
                rows, offsets = _select(_rows(self.slices, value), kept), self.offsets(key, value)
                rows = times(rows if offsets is None else rows - offsets[kept], 1 / scales)
                compact[key] = _tensor_of(rows, compact_slices(self.slices), like)
        return compact


_Component = Sequence[_TiedParameter]


def _component(tie: BoundTie, params: Sequence[Tensor], state: Mapping[Tensor, State], engine: Engine) -> _Component:
    parameters = []
    for place, slices, folded, param in zip(tie.places, tie.slices, engine.folded(tie), params, strict=True):
        compact = compact_like(slices, torch.empty(place.shape, device="meta"), len(folded.kept))
        parameters.append(_TiedParameter(param, held_of(state, param), slices, folded, place.shape, compact.shape))
    return parameters


# Tensors that are made in inference mode could not be written to outside of it, by the next step.
@torch.inference_mode(False)
@torch.no_grad()
def compacted(
    state: Mapping[Tensor, State], pairs: Components, engine: Engine, maybe: bool = False, lost: Lost | None = None
) -> dict[Tensor, State]:
    """Return the state of compact parameters, from that of tied ones.

    Args:
        state: of an optimizer, by parameter; that of tied ones is tied as well.
        pairs: the ties that have each parameter once, and their parameters.
        engine: which knows the slices of compact parameters.
        maybe: whether it may be that of compact parameters already, as distributed checkpoints do not say.
        lost: gets what cannot be converted; the parameter then has no state.

    Returns:
        The new state of each parameter.

    Raises:
        ValueError: something is kept in a shape that only an optimizer of the whole parameter makes sense of, and there
            is no ``lost``.
    """
    changed: dict[Tensor, State] = {}
    for tie, params in pairs:
        for tied in _component(tie, params, state, engine):
            odd = _of_other_shapes(tied.state, tied.shape, *[tied.compact_shape] * maybe)
            if odd:
                _drop(lost, tied.param, tied.state, odd, tied.shape)
            # Where nothing of a parameter is left, there is nothing to train.
            is_trained = not odd and len(tied.folded.kept)
            changed[tied.param] = tied.compacted(tied.state) if is_trained else {}
    return changed


@torch.inference_mode(False)
@torch.no_grad()
def refolded(
    state: Mapping[Tensor, State], pairs: Components, optimizer: Optimizer, engine: Engine
) -> dict[Tensor, State]:
    """Return the state of compact parameters, where something in it has an entry for each of the whole ones.

    Args:
        state: of compact parameters, by the tied ones.
        pairs: the ties that have each parameter once, and their parameters.
        optimizer: of any kind; what LBFGS keeps is of other shapes, and may have this one by chance.
        engine: which knows the slices of compact parameters.

    Returns:
        The new state of each parameter for which it changes.
    """
    changed: dict[Tensor, State] = {}
    if isinstance(optimizer, torch.optim.LBFGS):
        return changed
    for tie, params in pairs:
        component = _component(tie, params, state, engine)
        whole = {
            tied.param: {
                key: value
                for key, value in tied.state.items()
                if has_entries(key, value) and has_shape(value, tied.shape)
            }
            for tied in component
            if tied.shape != tied.compact_shape
        }
        if any(whole.values()):
            whole |= tied_state(whole, [(tie, list(params))], settings_in(optimizer.param_groups))
            for tied in component:
                if tied.state and whole.get(tied.param):
                    held = {key: whole[tied.param].get(key, value) for key, value in tied.state.items()}
                    changed[tied.param] = tied.compacted(held)
    return changed


@torch.inference_mode(False)
@torch.no_grad()
def expanded(
    state: Mapping[Tensor, State], pairs: Components, engine: Engine, settings: Settings, lost: Lost | None = None
) -> dict[Tensor, State]:
    """Return the state of tied parameters, from that of compact ones.

    Args:
        state: of an optimizer, by tied parameter, in the shapes of the compact ones.
        pairs: the ties that have each parameter once, and their parameters.
        engine: which knows the slices of compact parameters.
        settings: of the parameters.
        lost: gets what cannot be converted; the parameter then has no state. With it, a parameter may have another
            shape than when it was tied, and what is kept in that shape is left as it is.

    Returns:
        The new state of each parameter.

    Raises:
        ValueError: something is kept in a shape that only an optimizer of the compact parameter makes sense of, and
            there is no ``lost``.
    """
    changed: dict[Tensor, State] = {}
    for tie, params in pairs:
        component = _component(tie, params, state, engine)
        # For each row of all compact parameters, the number of the parameter.
        owners = torch.repeat_interleave(torch.tensor([len(tied.folded.kept) for tied in component], device="cpu"))
        for tied in component:
            rows = tied.folded.rows[tied.folded.rows != FREE]
            # Its values are in their states.
            sources = [component[number] for number in sorted(set(owners[rows].tolist())) if component[number].state]
            odd = _unreadable(tied, sources, lost)
            if odd:
                _drop(lost, tied.param, tied.state, odd, tied.compact_shape)
                changed[tied.param] = {}
            elif tied.state or (sources and not tied.is_replaced):
                keys = tied.state or dict.fromkeys(key for other in component for key in other.state)
                changed[tied.param] = {key: _expanded(key, tied, sources, component, settings) for key in keys}
    return changed


def _unreadable(tied: _TiedParameter, sources: _Component, lost: Lost | None) -> list[str]:
    """Return the keys of values that can neither be expanded nor fit the parameter as it is now."""
    if lost is None:
        return _of_other_shapes(tied.state, tied.compact_shape)
    if tied.is_replaced:
        return _of_other_shapes(tied.state, tied.param.shape)
    # Members may have their values in the state of another parameter, where these may be unreadable.
    return _of_other_shapes(tied.state, tied.compact_shape, tied.shape) or [
        key
        for source in sources
        for key in _of_other_shapes(source.state, source.compact_shape)
        if not tied.state or tied.compact_value(key) is not None
    ]


def _expanded(key: str, tied: _TiedParameter, sources: _Component, component: _Component, settings: Settings) -> Any:
    """Return the value of a whole parameter under a key, from those of the compact parameters that have its rows."""
    value = tied.state.get(key)
    is_whole = has_shape(value, tied.shape) and tied.shape != tied.compact_shape
    if is_whole or tied.is_replaced or all(source.compact_value(key) is None for source in (tied, *sources)):
        return value if tied.state else copy.deepcopy(sources[0].state.get(key))
    values = [value for other in (tied, *component) if (value := other.compact_value(key)) is not None]
    like = values[0]
    # For what no gradient has reached yet: parameters that were not trained, and pinned slices.
    start = begins_at(key, settings(tied.param), like)
    rows = []
    for other in component:
        compact = other.compact_value(key)
        if compact is None and are_weights(key) and not other.is_replaced:
            compact = other.compacted({key: other.param.detach()})[key]
        compact = like.new_full(other.compact_shape, start) if compact is None else compact.to(like)
        rows.append(_rows(compact_slices(other.slices), compact))
    # Pinned slices have the row of number -1.
    rows.append(like.new_full((1, *rows[0].shape[1:]), start))
    scales = scales_for(key, values, tied.folded.scale)
    whole, offsets = times(_select(torch.cat(rows), tied.folded.rows), scales), tied.offsets(key, like)
    return _tensor_of(whole if offsets is None else whole + offsets, tied.slices, tied.param.detach())


def without_history(
    optimizer: Optimizer, state: Mapping[Any, Any], lost: Lost | None = None, entries: int | None = None
) -> dict[Any, Any]:
    """Return the state without what LBFGS keeps of all parameters together, under the first one.

    Args:
        optimizer: of any kind; others have no history.
        state: that it has, by parameter.
        lost: gets the keys that are left out.
        entries: the number of entries of a history that can stay.

    Raises:
        ValueError: there is a history, and no ``lost``.
    """
    state = dict(state)
    for param in state if isinstance(optimizer, torch.optim.LBFGS) else ():
        held = held_of(state, param)
        history = _with_tensors(held, lambda tensor: tensor.dim() > 0 and tensor.numel() != entries)
        if history:
            _drop(lost, param, held, history, param.shape)
            state[param] = {}
    return state


def converter(
    mode: Mode, optimizer: Any, was_compact: bool | None
) -> Callable[[Mapping[Any, Any]], dict[Tensor, State]] | None:
    """Return a function that converts a loaded state to the mode of the ties; None if it needs no conversion.

    Args:
        mode: the ties.
        optimizer: the tied one.
        was_compact: whether the state was saved in the compact mode; None where the checkpoint does not say.
    """
    if bool(was_compact) == mode.compact:
        return None
    param_groups, engine, entries = optimizer.param_groups, mode.engine, None
    ties = mode.applied if mode.compact else components(mode.ties)
    pairs = parameters_of(ties, param_groups)
    if was_compact is None:
        # The inner optimizer trains so many in the compact mode.
        shapes = {param: param.shape for settings in param_groups for param in settings["params"]}
        shapes |= {tied.param: tied.compact_shape for pair in pairs for tied in _component(*pair, {}, engine)}
        entries = sum(shape.numel() for shape in shapes.values())

    def convert(state: Mapping[Any, Any]) -> dict[Tensor, State]:
        if pairs:
            without_history(optimizer, state, entries=entries)
        if was_compact:
            settings = settings_in(param_groups)
            whole = expanded(state, pairs, engine, settings)
            params = [param for _, params in pairs for param in params]
            return {**whole, **begun(optimizer, (param for param in params if not whole.get(param)), settings)}
        return compacted(state, pairs, engine, maybe=was_compact is None)

    return convert


def begun(optimizer: Optimizer, params: Iterable[Tensor], settings: Settings) -> dict[Tensor, State]:
    """Return the states of parameters with which an optimizer begins; most have none before the first step."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    states = {}
    for param in params:
        fused = bool(settings(param).get("fused"))
        dtype = _get_scalar_dtype(is_fused=fused)  # type: ignore[no-untyped-call]
        step = torch.zeros((), dtype=dtype, device=param.device if fused else "cpu")
        begin = begins_at("sum", settings(param), param)
        states[param] = {"step": step, "sum": torch.full_like(param.detach(), begin)}
    return states


# --- values that cannot be converted ---


def _of_other_shapes(state: State, *shapes: torch.Size) -> list[str]:
    """Return the keys of values that have none of some shapes, unless they are single numbers or no tensors at all."""
    others = {key: value for key, value in state.items() if not any(has_shape(value, shape) for shape in shapes)}
    return _with_tensors(others, lambda tensor: tensor.numel() > 1)


def _with_tensors(state: State, condition: Callable[[Tensor], bool]) -> list[str]:
    return [key for key, value in state.items() if any(map(condition, _tensors_in(value)))]


def _drop(lost: Lost | None, param: Tensor, held: State, keys: list[str], shape: torch.Size) -> None:
    """Note the state of a parameter as lost because of some keys; refuse to lose it where it cannot be noted."""
    if lost is not None:
        lost[param] = list(held) or keys
        return
    key, value = keys[0], held[keys[0]]
    sizes = [f" of shape {tuple(tensor.shape)}" for tensor in _tensors_in(value) if tensor.numel() > 1]
    raise refusal(
        ValueError,
        "This state cannot be converted between the parameter and the compact parameter of a tie.",
        expected=f"one entry for each of shape {tuple(shape)}, or a single one",
        got=f"{key!r}{''.join(sizes[:1])}: {shown(value)}",
    )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that a value of the state consists of, also those in containers and objects."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, type):
            seen.add(id(value))
            if isinstance(value, Mapping):
                waiting.extend(value.values())
            elif isinstance(value, (list, tuple, set, deque)):
                waiting.extend(value)
            else:
                waiting.extend(getattr(value, "__dict__", {}).values())


# --- tensors as rows, one for each slice, in the order of the labels ---


def _rows(slices: Slices, tensor: Tensor) -> Tensor:
    return tensor.movedim(slices.dim, 0).flatten(0, slices.labels.dim() - 1)


def _select(rows: Tensor, numbers: Tensor) -> Tensor:
    return bits(rows)[numbers.to(rows.device)].view(rows.dtype)


def _tensor_of(rows: Tensor, slices: Slices, like: Tensor) -> Tensor:
    """Return the tensor that has these rows, in the memory layout of another one.

    Fused kernels walk a parameter and its state together, and take them to have one layout.
    """
    tensor = torch.empty_like(like, dtype=rows.dtype, device=rows.device)
    front = tensor.movedim(slices.dim, 0)
    front.copy_(rows.reshape(front.shape))
    return tensor
