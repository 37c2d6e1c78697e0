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

from tieopt.engine.compacts import Compact
from tieopt.engine.engine import Engine
from tieopt.engine.sharded import is_dense
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
from tieopt.numbers.folding import CompactRows, compact_slices
from tieopt.numbers.rounding import times
from tieopt.tensors import bits, local, sharding_of
from tieopt.ties.components import components
from tieopt.ties.places import BoundTie, parameters_of
from tieopt.ties.slices import FREE, Slices, described

# The shape of a tensor, and its mesh and placements.
_Layout = tuple[torch.Size, tuple[Any, Any]]

# Ties that have each parameter once, and their parameters.
Components = Iterable[tuple[BoundTie, Sequence[Tensor]]]


class _TiedParameter(NamedTuple):
    """A parameter of a component, and its state, which is that of the parameter or of its compact one.

    Attributes:
        param: that stands in its place now.
        state: of the parameter.
        compact: what the compact parameter is made of.
        layout: of the parameter when it was tied.
        compact_layout: of the compact parameter.
    """

    param: Tensor
    state: State
    compact: Compact
    layout: _Layout
    compact_layout: _Layout

    @property
    def slices(self) -> Slices:
        """The slices of the parameter that this rank has."""
        return self.compact.slices

    @property
    def folded(self) -> CompactRows:
        """Which row of the compact parameters each slice is a multiple of, and which multiple."""
        return self.compact.rows

    @property
    def is_replaced(self) -> bool:
        """Whether its place was taken by a parameter that has another shape, or is sharded otherwise."""
        return (self.param.shape, sharding_of(self.param)) != self.layout

    def compact_value(self, key: str) -> Tensor | None:
        """Return the tensor under a key if it has an entry for each of the compact parameter's."""
        value = self.state.get(key)
        return value if is_dense(value, *self.compact_layout) else None

    def compact_rows(self, key: str) -> Tensor | None:
        """Return the rows of :meth:`compact_value` that this rank has."""
        value = self.compact_value(key)
        return None if value is None else _rows(compact_slices(self.slices), self.compact.shard(value))

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
        compact = dict(state)
        for key, value in state.items():
            if has_entries(key, value) and is_dense(value, *self.layout):
                rows, offsets = _select(_rows(self.slices, local(value)), kept), self.offsets(key, value)
                rows = rows if offsets is None else rows - offsets[kept]
                if self.compact.is_scaled:
                    rows = times(rows, 1 / scales_for(key, [value], self.folded.scale[kept]))
                # In the memory layout of the parameter: fused kernels walk it and its state together.
                compact[key] = self.compact.new_like(self.param.detach()).to(rows.device, rows.dtype)
                _write_rows_(self.compact.shard(compact[key]), rows, compact_slices(self.slices))
        return compact


_Component = Sequence[_TiedParameter]


def _component(tie: BoundTie, params: Sequence[Tensor], state: Mapping[Tensor, State], engine: Engine) -> _Component:
    parameters = []
    for place, compact, param in zip(tie.places, engine.compacts(tie, params), params, strict=True):
        layouts = (place.shape, compact.sharding), (compact.shape_for(place.shape), compact.compact_sharding)
        parameters.append(_TiedParameter(param, held_of(state, param), compact, *layouts))
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
            changed[tied.param] = {}
            # Where nothing of a parameter is left, there is nothing to train.
            if tied.compact_layout[0].numel():
                odd = _of_other_layouts(tied.state, tied.layout, *[tied.compact_layout] * maybe)
                if odd:
                    _drop(lost, tied.param, tied.state, odd, tied.layout)
                else:
                    changed[tied.param] = tied.compacted(tied.state)
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
                if has_entries(key, value) and is_dense(value, *tied.layout)
            }
            for tied in component
            if tied.layout != tied.compact_layout
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
        for tied in component:
            # Its values are in their states.
            sources = [component[number] for number in tied.compact.sources if component[number].state]
            odd = _unreadable(tied, sources, lost)
            if odd:
                _drop(lost, tied.param, tied.state, odd, tied.compact_layout)
                changed[tied.param] = {}
            elif not sources and _is_stand_in(tied):
                changed[tied.param] = {}
            elif tied.state or (sources and not tied.is_replaced):
                keys = tied.state or dict.fromkeys(key for other in component for key in other.state)
                changed[tied.param] = {key: _expanded(key, tied, sources, component, settings) for key in keys}
    return changed


def _is_stand_in(tied: _TiedParameter) -> bool:
    """Return whether a parameter of which nothing is left has the state without entries that checkpoints have of it."""
    is_left = tied.compact_layout[0].numel() > 0 or tied.is_replaced
    return not is_left and not any(is_dense(value, *tied.layout) for value in tied.state.values())


def _unreadable(tied: _TiedParameter, sources: _Component, lost: Lost | None) -> list[str]:
    """Return the keys of values that can neither be expanded nor fit the parameter as it is now."""
    if lost is None:
        return _of_other_layouts(tied.state, tied.compact_layout)
    if tied.is_replaced:
        return _of_other_layouts(tied.state, (tied.param.shape, sharding_of(tied.param)))
    # Members may have their values in the state of another parameter, where these may be unreadable.
    return _of_other_layouts(tied.state, tied.compact_layout, tied.layout) or [
        key
        for source in sources
        for key in _of_other_layouts(source.state, source.compact_layout)
        if not tied.state or tied.compact_value(key) is not None
    ]


def _expanded(key: str, tied: _TiedParameter, sources: _Component, component: _Component, settings: Settings) -> Any:
    """Return the value of a whole parameter under a key, from those of the compact parameters that have its rows."""
    value = tied.state.get(key)
    is_whole = is_dense(value, *tied.layout) and tied.layout != tied.compact_layout
    if is_whole or tied.is_replaced or all(source.compact_value(key) is None for source in (tied, *sources)):
        return value if tied.state else copy.deepcopy(sources[0].state.get(key))
    values = [value for other in (tied, *component) if (value := other.compact_value(key)) is not None]
    like = next(part for other in (tied, *component) if (part := other.compact_rows(key)) is not None)
    # For what no gradient has reached yet: parameters that were not trained, and pinned slices.
    start = begins_at(key, settings(tied.param), like)
    rows: list[Tensor] = []
    for other in component:
        if other.compact_value(key) is None and are_weights(key) and not other.is_replaced:
            other = other._replace(state=other.compacted({key: other.param.detach()}))
        compact = other.compact_rows(key)
        rows.append(like.new_full((len(other.folded.kept), *like.shape[1:]), start) if compact is None else compact)
    # Pinned slices have the row of number -1.
    rows.append(like.new_full((1, *like.shape[1:]), start))
    all_rows, offsets = torch.cat([part.to(like) for part in rows]), tied.offsets(key, like)
    whole = _select(all_rows, tied.folded.rows)
    if tied.compact.is_scaled:
        whole = times(whole, scales_for(key, values, tied.folded.scale))
    result = torch.empty_like(tied.param.detach(), dtype=whole.dtype, device=whole.device)
    _write_rows_(local(result), whole if offsets is None else whole + offsets, tied.slices)
    return result


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
            _drop(lost, param, held, history, (param.shape, sharding_of(param)))
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
    # Irregular shards save whole states, because the order of their compact rows depends on the mesh.
    saves_compact = mode.saves_compact
    if mode.compact == bool(was_compact) and mode.compact == saves_compact:
        return None
    # The steps of the full mode never use what is worked out here.
    param_groups, engine, entries = optimizer.param_groups, mode.engine if mode.compact else Engine(), None
    ties = mode.applied if mode.compact else components(mode.ties)
    pairs = parameters_of(ties, param_groups)
    if not mode.compact:
        for tie, params in pairs:
            if engine.groups_span_ranks(tie, params):
                what = "The state is that of compact parameters, and groups have members on several ranks."
                expected, names = "a state that was saved with compact=False", ", ".join(tie.names)
                raise refusal(ValueError, what, parameters=names, expected=expected, got=described(tie.slices))
    if was_compact is None:
        # The inner optimizer trains so many in the compact mode.
        shapes = {param: param.shape for settings in param_groups for param in settings["params"]}
        shapes |= {tied.param: tied.compact_layout[0] for pair in pairs for tied in _component(*pair, {}, engine)}
        entries = sum(shape.numel() for shape in shapes.values())

    def convert(state: Mapping[Any, Any]) -> dict[Tensor, State]:
        if pairs:
            without_history(optimizer, state, entries=entries)
        if not mode.compact:
            return whole_state(optimizer, state, pairs, engine)
        return compacted(state, pairs, engine, maybe=was_compact is None and saves_compact)

    return convert


def whole_state(
    optimizer: Optimizer, state: Mapping[Tensor, State], pairs: Components, engine: Engine
) -> dict[Tensor, State]:
    """Return the state of all tied parameters as an optimizer without compact ones has it; see :func:`expanded`."""
    settings = settings_in(optimizer.param_groups)
    whole = expanded(state, pairs, engine, settings)
    params = [param for _, params in pairs for param in params]
    return {**whole, **begun(optimizer, (param for param in params if not whole.get(param)), settings)}


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
        states[param] = {"step": step, "sum": torch.full_like(param, begin)}
    return states


# --- values that cannot be converted ---


def _of_other_layouts(state: State, *layouts: _Layout) -> list[str]:
    """Return the keys of values that have none of some layouts, unless they are single numbers or no tensors at all."""
    others = {key: value for key, value in state.items() if not any(is_dense(value, *layout) for layout in layouts)}
    return _with_tensors(others, lambda tensor: tensor.numel() > 1)


def _with_tensors(state: State, condition: Callable[[Tensor], bool]) -> list[str]:
    return [key for key, value in state.items() if any(map(condition, _tensors_in(value)))]


def _drop(lost: Lost | None, param: Tensor, held: State, keys: list[str], layout: _Layout) -> None:
    """Note the state of a parameter as lost because of some keys; refuse to lose it where it cannot be noted."""
    if lost is not None:
        lost[param] = list(held) or keys
        return
    key, value = keys[0], held[keys[0]]
    sizes = [f" of shape {tuple(tensor.shape)}" for tensor in _tensors_in(value) if tensor.numel() > 1]
    raise refusal(
        ValueError,
        "This state cannot be converted between the parameter and the compact parameter of a tie.",
        expected=f"one entry for each of shape {tuple(layout[0])}, or a single one",
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


def _write_rows_(tensor: Tensor, rows: Tensor, slices: Slices) -> None:
    front = tensor.movedim(slices.dim, 0)
    front.copy_(rows.reshape(front.shape))
