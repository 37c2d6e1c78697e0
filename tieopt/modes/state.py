"""The state of an optimizer made as if its parameters had been tied all along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from tieopt.engine.engine import Engine
from tieopt.engine.graphs import untraced
from tieopt.engine.sharded import on_any_rank
from tieopt.numbers.reduction import rounded
from tieopt.numbers.start import Start
from tieopt.tensors import bits, calculable, is_sharded, is_sharded_as, local, real, sharded_as, wide_dtype
from tieopt.ties.places import BoundTie, ParamGroups
from tieopt.ties.slices import FREE, Partition, Slices

# How torch's optimizers call what has the sign of a gradient or a weight.
_SIGNED = {"momentum_buffer", "exp_avg", "grad_avg", "prev", "ax"}

State = dict[str, Any]

# The settings of the parameter group of a parameter.
Settings = Callable[[Tensor], Mapping[str, Any]]


def settings_in(param_groups: ParamGroups) -> Settings:
    """The settings of the parameters of an optimizer; none of a parameter that it does not have."""
    groups = {id(param): settings for settings in param_groups for param in settings["params"]}
    return lambda param: groups.get(id(param), {})


def held_of(state: Mapping[Any, Any], param: Tensor) -> State:
    """What an optimizer keeps of a parameter, if it is a dictionary."""
    held = state.get(param)
    return held if isinstance(held, dict) else {}


def begins_at(key: str, settings: Mapping[str, Any], like: Tensor) -> complex:
    """What an optimizer has under a key of an entry that no gradient has reached, in the dtype of a tensor."""
    start: Any = 0.0
    if key == "sum":  # Adagrad
        start = settings.get("initial_accumulator_value", 0.0)
    elif key == "step_size" and "step_sizes" in settings:  # Rprop
        start = settings["lr"]
    return complex(start, start) if like.is_complex() else float(start)


# What torch and the ties keep in an optimizer: it knows of the parameters, may be large, and holds no optimizer.
KEPT_BY_TORCH = ("param_groups", "state", "_tieopt")

# What is dropped where something cannot be converted: by parameter, the keys of its state.
Lost = dict[Tensor, list[str]]


@untraced
def held_optimizers(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers that an optimizer has as attributes, or in lists and dictionaries, and those of these."""
    found = {id(optimizer): optimizer}
    waiting = [optimizer]
    while waiting:
        attributes = vars(waiting.pop())
        for held in _optimizers_in([value for name, value in attributes.items() if name not in KEPT_BY_TORCH]):
            if id(held) not in found:
                found[id(held)] = held
                waiting.append(held)
    return list(found.values())[1:]


def _optimizers_in(values: Iterable[Any], depth: int = 2) -> Iterator[Optimizer]:
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif depth and isinstance(value, (list, tuple, dict)):
            yield from _optimizers_in(value.values() if isinstance(value, dict) else value, depth - 1)


def states_of(optimizer: Any) -> list[MutableMapping[Any, Any]]:
    """Return the states of an optimizer and of those that it holds; one that they share occurs once."""
    states = [holder.state for holder in (optimizer, *held_optimizers(optimizer))]
    return list({id(state): state for state in states}.values())


# Tensors that are made in inference mode could not be written to outside of it, by the next step.
@torch.inference_mode(False)
def tied_state(
    state: Mapping[Tensor, Any],
    pairs: Iterable[tuple[BoundTie, list[Tensor]]],
    settings: Settings,
    start: Start = "mean",
) -> dict[Tensor, State]:
    """Averages per group what an optimizer keeps of each entry of a tied parameter, or takes that of the first member.

    Whatever has not the shape of its parameter is left alone, and so is what is tied already. A parameter
    that has no state yet, and no free entry, goes on with the state of those that it is joined with.

    Nothing is written, and the results share no memory with what is there, which a checkpoint may hold.

    With scales, what is tied as the weights are is left so, and the rest goes by the names that torch's
    optimizers use: momentum is scaled as the weights are, second moments as their squares. Of an unknown name
    it is a second moment if no entry is negative.

    Args:
        state: of the optimizer, by parameter.
        pairs: ties and their parameters.
        settings: of the parameters.
        start: what the shared values start from; the first member is that of the parameters that have state.

    Returns:
        What takes the place of the state of each parameter for which it changes.
    """
    changed: dict[Tensor, State] = {}
    # Not that of the steps: what is compiled for the state is not needed again.
    engine = Engine()
    for tie, params in pairs:
        held = [changed.get(param, state.get(param)) for param in params]
        states = [one if isinstance(one, dict) else {} for one in held]
        trained = [part for part, one in enumerate(states) if one]
        begun: dict[int, State] = {}
        if trained:
            others = {key: value for key, value in states[trained[0]].items() if not _is_of(value, params[trained[0]])}
            for part, one in enumerate(states):
                if not one and bool((tie.slices[part].labels != FREE).all()):
                    begun[part] = copy.deepcopy(others)
        for key in dict.fromkeys(key for one in states for key in one):
            parts = [part for part in trained if _is_of(states[part].get(key), params[part])]
            if not parts:
                continue
            values = [states[part][key] for part in parts]
            own: Partition = tie if len(parts) == len(params) else Partition([tie.slices[part] for part in parts])
            linear = _is_tied(own, values, engine)
            if not linear and any(each.scale is not None for each in own.slices):
                own = Partition(_scaled(own.slices, key, values))
            if not linear and not _is_tied(own, values, engine):
                if start == "first":
                    order = [parts.index(part) for part in tie.order if part in parts]
                    values = engine.started_from_first(own, values, order)
                else:
                    values = engine.projected(own, values)
                for part, value in zip(parts, values, strict=True):
                    _begin_pinned_(value, tie.slices[part], params[part], begins_at(key, settings(params[part]), value))
                    changed.setdefault(params[part], dict(states[part]))[key] = value
            for part, one in begun.items():
                (joined,) = [tie.slices[part]] if linear else _scaled([tie.slices[part]], key, values)
                one[key] = _multiples(own.slices, values, joined, params[part])
                begin = begins_at(key, settings(params[part]), one[key])
                _begin_pinned_(one[key], tie.slices[part], params[part], begin)
        changed |= {params[part]: one for part, one in begun.items()}
    return changed


def _is_tied(tie: Partition, values: Sequence[Tensor], engine: Engine) -> bool:
    return engine.is_tied([(tie, [value.detach() for value in values])])


@torch.no_grad()
def _begin_pinned_(value: Tensor, slices: Slices, param: Tensor, begin: complex) -> None:
    """Writes to the pinned entries of a value of the state what an optimizer begins with."""
    if begin == 0 or slices.scale is None or not bool((slices.scale == 0).any()):
        return
    numbers, scales = slices.entries(torch.empty(param.shape, device="meta"))
    pinned = (numbers != FREE) & (scales == 0)
    if not is_sharded(param):
        value.masked_fill_(pinned.to(value.device), begin)
    elif cast(Any, param).device_mesh.get_coordinate() is not None:
        local(value).masked_fill_(local(sharded_as(param, pinned)), begin)


def _is_of(value: Any, param: Tensor) -> bool:
    """Whether a value of the state is plain numbers, one for each entry of the parameter."""
    if is_sharded(param):
        return is_sharded_as(value, param) and _is_of(local(value), local(param))
    return is_plain(value) and value.shape == param.shape and value.device == param.device


def is_plain(value: Any) -> bool:
    """Whether a value of the state is a dense tensor of numbers."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and (value.is_floating_point() or value.is_complex())
    )


def _scaled(slices: Sequence[Slices], key: str, values: Sequence[Tensor]) -> list[Slices]:
    """The slices with scales for what is kept under a key."""
    return [each._replace(scale=None if each.scale is None else scales_for(key, values, each.scale)) for each in slices]


def scales_for(key: str, values: Sequence[Tensor], scale: Tensor) -> Tensor:
    """What multiples the members are in what is kept under a key, where these are those of the weights."""
    if key in _SIGNED or any(map(_has_negative, values)):
        return scale
    # To the power of zero a pinned entry would be a member.
    power = {"exp_inf": 1, "step_size": 0, "acc_delta": 0}.get(key, 2)
    return torch.where(scale == 0, 0, scale.abs() ** power)


def _has_negative(value: Tensor) -> bool:
    if is_sharded(value):
        return on_any_rank(_has_negative(local(value)), value)
    return bool((calculable(real(value.resolve_conj())) < 0).any())


@torch.no_grad()
def _multiples(slices: Sequence[Slices], values: Sequence[Tensor], joined: Slices, param: Tensor) -> Tensor:
    """What members in another parameter are, if these are those of tied ones; zero in groups without any."""
    if is_sharded(param):
        if cast(Any, param).device_mesh.get_coordinate() is None:
            return torch.zeros_like(param, dtype=values[0].dtype)
        # Members of a group may be on any rank.
        whole = [value.full_tensor() for value in cast("Sequence[Any]", values)]
        like = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        return sharded_as(param, _multiples(slices, whole, joined, like))
    numbers, scale = joined.entries(param)
    wide = wide_dtype(values[0].device)
    wide = wide.to_complex() if values[0].is_complex() else wide
    shared = values[0].new_zeros(int(numbers.max()) + 1 if numbers.numel() else 0, dtype=wide)
    for each, value in zip(slices, values, strict=True):
        known, scales = each.entries(value)
        led = (known != FREE) & (known < len(shared)) & (scales != 0)
        members = bits(value)[led.to(value.device)].view(value.dtype)
        shared[known[led].to(shared.device)] = members.to(wide) / scales[led].to(value.device, wide)
    multiples = shared[numbers.to(shared.device)] * scale.to(shared.device, wide)
    return torch.empty_like(param, dtype=values[0].dtype).copy_(rounded(multiples, values[0].dtype))
