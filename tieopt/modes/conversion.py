"""The state of an optimizer, converted between one entry for each member and one for each group."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_scalar_dtype

from tieopt.engine.engine import Engine
from tieopt.errors import shown
from tieopt.modes.mode import Mode
from tieopt.modes.state import Lost, Settings, State, begins_at, held_of, is_plain, scales_for, settings_in, tied_state
from tieopt.numbers.folding import Folded, compact_like, compact_slices
from tieopt.numbers.reduction import times
from tieopt.tensors import bits
from tieopt.ties.components import components
from tieopt.ties.places import BoundTie, ParamGroups, parameters_of
from tieopt.ties.slices import FREE, Slices

# Ties that have each parameter once, and their parameters.
Components = Iterable[tuple[BoundTie, Sequence[Tensor]]]


# Tensors that are made in inference mode could not be written to outside of it, by the next step.
@torch.inference_mode(False)
@torch.no_grad()
def compacted(
    state: Mapping[Tensor, State], pairs: Components, engine: Engine, maybe: bool = False, lost: Lost | None = None
) -> dict[Tensor, State]:
    """The state of compact parameters, from that of tied ones.

    Args:
        state: of an optimizer, by parameter; that of tied ones is tied as well.
        pairs: the ties that have each parameter once, and their parameters.
        engine: which knows what is kept of each.
        maybe: whether it may be that of compact parameters already, as distributed checkpoints do not say.
        lost: gets what cannot be converted; the parameter then has no state.

    Returns:
        What takes the place of the state of each parameter.

    Raises:
        ValueError: something is kept in a shape that only an optimizer of the whole parameter makes sense of, and there
            is no ``lost``.
    """
    changed: dict[Tensor, State] = {}
    for tie, params in pairs:
        for slices, part, param in zip(tie.slices, engine.folded(tie), params, strict=True):
            held = held_of(state, param)
            whole = {key for key, value in held.items() if _is_of(value, param.shape)}
            fitting = _compact_shape(slices, part, param.shape) if maybe else param.shape
            odd = [key for key, value in held.items() if key not in whole and not _is_known(value, fitting)]
            if odd and lost is None:
                _refuse(held, odd[0], param.shape)
            elif lost is not None and odd:
                lost[param] = list(held)
            # Where nothing of a parameter is left, there is nothing to train.
            if odd or not len(part.kept):
                changed[param] = {}
                continue
            changed[param] = {
                key: _compact_value(key, value, slices, part, param) if key in whole else value
                for key, value in held.items()
            }
    return changed


def _compact_value(key: str, value: Tensor, slices: Slices, part: Folded, param: Tensor) -> Tensor:
    rows = bits(_rows(slices, value))[part.kept.to(value.device)].view(value.dtype)
    scales = scales_for(key, [value], part.scale[part.kept])
    values = _in_place(compact_slices(slices), times(rows, 1 / scales))
    return _laid_out_as(compact_like(slices, param.detach(), len(part.kept)), values)


@torch.inference_mode(False)
@torch.no_grad()
def refolded(
    state: Mapping[Tensor, State],
    shapes: Mapping[Tensor, torch.Size],
    tie: BoundTie,
    optimizer: Optimizer,
    engine: Engine,
) -> dict[Tensor, State]:
    """The state of compact parameters, where something in it has an entry for each of the whole ones.

    Args:
        state: of compact parameters, by the tied ones.
        shapes: of the compact parameters, by the tied ones.
        tie: the component.
        optimizer: of any kind; what LBFGS keeps is of other shapes, and may have this one by chance.
        engine: which knows what is kept of each.

    Returns:
        What takes the place of the state of parameters for which it changes.
    """
    whole = {
        param: {key: value for key, value in held.items() if _is_of(value, param.shape)}
        for param, held in state.items()
        if param.shape != shapes[param] and not isinstance(optimizer, torch.optim.LBFGS)
    }
    if not any(whole.values()):
        return {}
    settings = settings_in(optimizer.param_groups)
    whole |= tied_state(whole, [(tie, list(shapes))], settings)
    return {
        param: {
            key: _compact_value(key, whole[param][key], slices, part, param) if key in whole[param] else value
            for key, value in state[param].items()
        }
        for param, slices, part in zip(shapes, tie.slices, engine.folded(tie), strict=True)
        if state[param] and whole.get(param)
    }


@torch.inference_mode(False)
@torch.no_grad()
def expanded(
    state: Mapping[Tensor, State], pairs: Components, engine: Engine, settings: Settings, lost: Lost | None = None
) -> dict[Tensor, State]:
    """The state of tied parameters, from that of compact ones.

    Args:
        state: of an optimizer, by tied parameter, in the shapes of the compact ones.
        pairs: the ties that have each parameter once, and their parameters.
        engine: which knows what is kept of each.
        settings: of the parameters.
        lost: gets what cannot be converted; the parameter then has no state. With it, a parameter may have another
            shape than when it was tied, and what is kept in that shape is left as it is.

    Returns:
        What takes the place of the state of each parameter.

    Raises:
        ValueError: something is kept in a shape that only an optimizer of the compact parameter makes sense of, and
            there is no ``lost``.
    """
    changed: dict[Tensor, State] = {}
    for tie, params in pairs:
        changed |= _Expansion(tie, params, state, engine, settings).states(lost)
    return changed


class _Expansion:
    """The state of the parameters of one component, on its way from compact ones.

    Args:
        tie: the component.
        params: its parameters.
        state: by parameter, in the shapes of the compact ones.
        engine: which knows what is kept of each.
        settings: of the parameters.
    """

    def __init__(
        self,
        tie: BoundTie,
        params: Sequence[Tensor],
        state: Mapping[Tensor, State],
        engine: Engine,
        settings: Settings,
    ) -> None:
        self.slices, self.folded, self.params, self.settings = tie.slices, engine.folded(tie), params, settings
        self.held = [held_of(state, param) for param in params]
        # When it was tied: by now a parameter may have another one.
        self.whole = [place.shape for place in tie.places]
        self.compact = [
            _compact_shape(slices, part, shape)
            for slices, part, shape in zip(self.slices, self.folded, self.whole, strict=True)
        ]
        self.odd = [
            [key for key, value in one.items() if not _is_known(value, shape)]
            for one, shape in zip(self.held, self.compact, strict=True)
        ]

    def states(self, lost: Lost | None) -> dict[Tensor, State]:
        """What takes the place of the state of each parameter; as for :func:`expanded`."""
        for part, odd in enumerate(self.odd if lost is None else []):
            if odd:
                _refuse(self.held[part], odd[0], self.compact[part])
        changed: dict[Tensor, State] = {}
        for part, (param, held) in enumerate(zip(self.params, self.held, strict=True)):
            homes = [number for number in range(len(self.held)) if self._stand_in(part, number)]
            odd = [] if lost is None else self._odd(part, homes)
            if lost is not None and odd:
                lost[param], changed[param] = list(held) or odd, {}
            elif held or (homes and param.shape == self.whole[part]):
                changed[param] = {key: self._value(key, part, homes) for key in held or self._keys()}
        return changed

    def _odd(self, part: int, homes: Sequence[int]) -> list[str]:
        """What is kept of a parameter, and neither can be converted nor fits it as it is now."""
        held, param = self.held[part], self.params[part]
        if param.shape != self.whole[part]:
            return [key for key, value in held.items() if not _is_known(value, param.shape)]
        odd = [key for key in self.odd[part] if not _is_of(held[key], param.shape)]
        # Members may have their values where these cannot be read.
        elsewhere = [key for number in homes if number != part for key in self.odd[number]]
        return odd or [key for key in elsewhere if not held or _is_of(held.get(key), self.compact[part])]

    def _stand_in(self, part: int, number: int) -> bool:
        """Whether groups of one parameter stand in the compact one of another, which has a state."""
        before, rows = sum(len(each.kept) for each in self.folded[:number]), self.folded[part].rows
        end = before + len(self.folded[number].kept)
        return bool(self.held[number]) and bool(((rows >= before) & (rows < end)).any())

    def _keys(self) -> list[str]:
        return list(dict.fromkeys(key for one in self.held for key in one))

    def _value(self, key: str, part: int, homes: Sequence[int]) -> Any:
        param, held = self.params[part], self.held[part]
        fits = held and _is_of(held[key], param.shape) and not _is_of(held[key], self.compact[part])
        if fits or param.shape != self.whole[part]:
            return held[key]
        values = [one.get(key) for one in self.held]
        if any(_is_of(values[number], self.compact[number]) for number in {part, *homes}):
            return _laid_out_as(param.detach(), self._expanded(key, part, values))
        return held[key] if held else copy.deepcopy(values[homes[0]])

    def _expanded(self, key: str, part: int, values: Sequence[Any]) -> Tensor:
        plain = [_is_of(value, shape) for value, shape in zip(values, self.compact, strict=True)]
        shown = [value for value, one in zip(values, plain, strict=True) if one]
        like: Tensor = values[part] if plain[part] else shown[0]
        # What no gradient has reached yet: a pinned entry, or a parameter that was not trained.
        start = begins_at(key, self.settings(self.params[part]), like)
        rows = torch.cat(
            [
                _rows(compact_slices(each), value.to(like) if one else like.new_full(shape, start))
                for each, value, one, shape in zip(self.slices, values, plain, self.compact, strict=True)
            ]
        )
        own = self.folded[part]
        known = own.rows != FREE
        full = rows.new_full((len(own.rows), *rows.shape[1:]), start)
        scales = scales_for(key, shown, own.scale[known])
        chosen = bits(rows)[own.rows[known].to(rows.device)].view(rows.dtype)
        bits(full)[known.to(rows.device)] = bits(times(chosen, scales))
        return _in_place(self.slices[part], full)


def without_history(
    optimizer: Optimizer, state: Mapping[Any, Any], lost: Lost | None = None, entries: int | None = None
) -> dict[Any, Any]:
    """The state without what LBFGS keeps of all parameters together, under the first one, and cannot be converted.

    Args:
        optimizer: of any kind; others have no history.
        state: that it has, by parameter.
        lost: gets what there is.
        entries: of how many entries a history is right as it is.

    Raises:
        ValueError: there is some, and no ``lost``.
    """
    state = dict(state)
    for param in state if isinstance(optimizer, torch.optim.LBFGS) else ():
        held = held_of(state, param)
        history = [key for key, value in held.items() if any(map(partial(_is_vector, entries), _tensors_in(value)))]
        if history and lost is None:
            _refuse(held, history[0], param.shape)
        elif history and lost is not None:
            lost[param], state[param] = list(held), {}
    return state


def _is_vector(entries: int | None, tensor: Tensor) -> bool:
    return tensor.dim() > 0 and tensor.numel() != entries


def converter(
    mode: Mode, optimizer: Any, was_compact: bool | None
) -> Callable[[Mapping[Any, Any]], dict[Any, Any]] | None:
    """Return what converts a state that was saved in the other mode, or without a word; None if there is no need.

    Args:
        mode: the ties.
        optimizer: the tied one.
        was_compact: whether the state was saved in the compact mode; None where the checkpoint does not say.
    """
    if bool(was_compact) == mode.compact:
        return None
    param_groups, settings = optimizer.param_groups, settings_in(optimizer.param_groups)
    ties = mode.applied if mode.compact else components(mode.ties, param_groups)
    pairs = parameters_of(ties, param_groups)
    entries = _count_entries(pairs, mode.engine, param_groups) if was_compact is None else None

    def convert(state: Mapping[Any, Any]) -> dict[Any, Any]:
        if pairs:
            without_history(optimizer, state, entries=entries)
        if was_compact:
            return dict(expanded(state, pairs, mode.engine, settings))
        return dict(compacted(state, pairs, mode.engine, maybe=was_compact is None))

    return convert


def _count_entries(pairs: Components, engine: Engine, param_groups: ParamGroups) -> int:
    """How many entries the inner optimizer trains in the compact mode."""
    entries = {id(param): param.numel() for settings in param_groups for param in settings["params"]}
    for tie, params in pairs:
        for slices, part, param in zip(tie.slices, engine.folded(tie), params, strict=True):
            entries[id(param)] = _compact_shape(slices, part, param.shape).numel()
    return sum(entries.values())


def begun(optimizer: Optimizer, param: Tensor, settings: Mapping[str, Any]) -> State:
    """The state with which an optimizer begins; most have none before the first step."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    fused = bool(settings.get("fused"))
    dtype = _get_scalar_dtype(is_fused=fused)  # type: ignore[no-untyped-call]
    step = torch.zeros((), dtype=dtype, device=param.device if fused else "cpu")
    return {"step": step, "sum": torch.full_like(param.detach(), begins_at("sum", settings, param))}


def _refuse(held: State, key: str, shape: torch.Size) -> None:
    raise ValueError(
        "This state cannot be converted between the parameter and the compact parameter of a tie.\n"
        f"  Expected: one entry for each of shape {tuple(shape)}, or a single one\n"
        f"  Got:      {key!r}{_shape_in(held[key])}: {shown(held[key])}"
    )


def _shape_in(value: Any) -> str:
    odd = next((tensor for tensor in _tensors_in(value) if tensor.numel() > 1), None)
    return "" if odd is None else f" of shape {tuple(odd.shape)}"


def _is_known(value: Any, shape: torch.Size) -> bool:
    """Whether a value of the state can be converted: it has an entry for each of the shape, or is a single one."""
    return _is_of(value, shape) or is_shapeless(value)


def is_shapeless(value: Any) -> bool:
    """Whether a value of the state has no tensor of several entries, and fits a parameter of any shape."""
    return all(tensor.numel() <= 1 for tensor in _tensors_in(value))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that a value of the state consists of, in containers and objects, too."""
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


def _is_of(value: Any, shape: torch.Size) -> bool:
    """Whether a value of the state is plain numbers, one for each entry."""
    return is_plain(value) and value.shape == shape


def _compact_shape(slices: Slices, part: Folded, shape: torch.Size) -> torch.Size:
    own = [len(part.kept), *slices.slice_shape(torch.empty(shape, device="meta"))]
    return torch.empty(own, device="meta").movedim(0, compact_slices(slices).dim).shape


def _rows(slices: Slices, value: Tensor) -> Tensor:
    front = value.movedim(slices.dim, 0)
    return front.flatten(0, slices.labels.dim() - 1)


def _in_place(slices: Slices, rows: Tensor) -> Tensor:
    """The tensor that has these rows."""
    labels = slices.labels.shape if slices.labels.dim() > 1 else rows.shape[:1]
    return rows.reshape(*labels, *rows.shape[1:]).movedim(0, slices.dim)


def _laid_out_as(like: Tensor, value: Tensor) -> Tensor:
    """The value in the memory layout of the parameter that it belongs to: fused kernels walk both side by side."""
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
