"""The state of optimizers, and how it is tied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tieopt.engine.agreement import agree
from tieopt.engine.engine import Engine
from tieopt.engine.graphs import between_graphs, untraced
from tieopt.engine.sharded import any_negative, fill_where_, fits
from tieopt.errors import refusal
from tieopt.numbers.start import Start
from tieopt.ties.places import BoundTie, ParamGroups
from tieopt.ties.slices import FREE, Partition, Slices, are_scaled

# Keys of torch's optimizers for values with the sign of a gradient or a weight; their scales are those of the weights.
_SIGNED = {"momentum_buffer", "exp_avg", "grad_avg", "prev", "ax"}

# Keys of optimizers, torch's and others, for weights: their averages, starts and slow copies. Offsets belong to them.
_WEIGHTS = {
    "ax",
    "backup_params",
    "lookahead_params",
    "p0",
    "param_buffer",
    "prev_param",
    "shadow",
    "slow",
    "slow_buffer",
    "slow_params",
    "x",
    "x0",
    "x_k",
    "y",
    "z",
}

# The powers of the scales that count under other keys; the second where a key is not listed.
_POWERS = {"exp_inf": 1, "step_size": 0, "acc_delta": 0}

# Keys of torch's optimizers for one number for the whole parameter, which has the shape of a parameter of one number.
_NUMBERS = {"step", "mu_product", "eta", "mu"}

# Attributes in which no other optimizer is looked for; the first two may be large.
KEPT_BY_TORCH = ("param_groups", "state", "defaults", "_tieopt")

# What may hold optimizers.
_HOLDERS = (Optimizer, list, tuple, dict)

# The state of one parameter.
State = dict[str, Any]

# The settings of the parameter group that a parameter is in.
Settings = Callable[[Tensor], Mapping[str, Any]]

# Values under one key of the state, by the number of the parameter in its tie.
_Values = Mapping[int, Tensor]

# Keys of the state that is dropped because it cannot be converted, by parameter.
Lost = dict[Tensor, list[str]]


# --- what an optimizer has ---


def settings_in(param_groups: ParamGroups) -> Settings:
    """Return a function that looks up the settings of a parameter; it has none if it is in no group."""
    groups = {id(param): settings for settings in param_groups for param in settings["params"]}
    return lambda param: groups.get(id(param), {})


def by_number(state_dict: Mapping[str, Any], param_groups: ParamGroups) -> dict[Any, Tensor]:
    """Return the parameters by their numbers in a state; some checkpoints have names in the places of numbers."""
    numbers, params = (
        [param for settings in groups for param in settings["params"]]
        for groups in (state_dict["param_groups"], param_groups)
    )
    return dict(zip(numbers, params, strict=False))


def held_of(state: Mapping[Any, Any], param: Tensor) -> State:
    """Return the state of a parameter; none if it is not a dictionary."""
    held = state.get(param)
    return held if isinstance(held, dict) else {}


def has_entries(key: str, value: Any) -> bool:
    """Return whether a value of the state has an entry for each of its parameter's, if it has the parameter's shape."""
    return key not in _NUMBERS or not isinstance(value, Tensor) or value.dim() > 0


def are_weights(key: str) -> bool:
    """Return whether values under a key are weights, and not of gradients."""
    return key in _WEIGHTS


def begins_at(key: str, settings: Mapping[str, Any], like: Tensor) -> complex:
    """Return the value that an optimizer begins with under a key, complex where a tensor is."""
    start: Any = 0.0
    if key == "sum":  # Adagrad
        start = settings.get("initial_accumulator_value", 0.0)
    elif key == "step_size" and "step_sizes" in settings:  # Rprop
        start = settings["lr"]
    return complex(start, start) if like.is_complex() else float(start)


@between_graphs
def held_optimizers(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers that an optimizer has as attributes, or in lists and dictionaries, and theirs."""
    optimizers = [optimizer]
    for holder in optimizers:  # The list grows meanwhile.
        for name, value in vars(holder).items():
            # Without a call for what is empty, as the hooks of most optimizers.
            if isinstance(value, _HOLDERS) and value and name not in KEPT_BY_TORCH:
                for held in _optimizers_in(value):
                    if held not in optimizers:
                        optimizers.append(held)
    return optimizers[1:]


@untraced
def _optimizers_in(value: Any, depth: int = 2) -> list[Optimizer]:
    if isinstance(value, Optimizer):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [held for item in items if depth and isinstance(item, _HOLDERS) for held in _optimizers_in(item, depth - 1)]


def states_of(optimizer: Any) -> list[MutableMapping[Any, Any]]:
    """Return the states of an optimizer and of those that it holds; a state that they share occurs once."""
    states = [holder.state for holder in (optimizer, *held_optimizers(optimizer))]
    return list({id(state): state for state in states}.values())


# --- tied ---


# Tensors that are made in inference mode could not be written to outside of it, by the next step.
@torch.inference_mode(False)
def tied_state(
    state: Mapping[Tensor, Any],
    pairs: Iterable[tuple[BoundTie, list[Tensor]]],
    settings: Settings,
    start: Start = "mean",
) -> dict[Tensor, State]:
    """Return the state as if the parameters had been tied all along.

    Tensors with an entry for each of the parameter's are averaged per group, or take the value of the first member.
    Everything else is left alone, and so is what is tied already. A parameter that has no state yet, and no free
    entry, goes on with the state of the parameters that it is joined with.

    Nothing is written, and new tensors share no memory with the old ones, which a checkpoint may hold.

    With scales, what is tied as the weights are is left so, and the rest goes by the names that torch's
    optimizers use: momentum is scaled as the weights are, second moments as their squares. Under an unknown name
    it is a second moment if no entry is negative.

    Args:
        state: of the optimizer, by parameter.
        pairs: ties and their parameters.
        settings: of the parameters.
        start: what the shared values start from; first members are looked for in the parameters that have state.

    Returns:
        The new state of each parameter for which it changes.
    """
    changed: dict[Tensor, State] = {}
    # The engine of the steps would keep what it compiles here, and never need it again.
    engine = Engine()
    for tie, params in pairs:
        states = [held_of(changed if param in changed else state, param) for param in params]
        tied_states = _states_of_untrained(tie, params, states)
        untrained = {number: params[number] for number in tied_states}
        keys: Iterable[str] = dict.fromkeys(key for held in states for key in held)
        if tie.across is not None:
            keys = _keys_on_all_ranks(tie, params, states)
        for key in keys:
            values = _values(key, params, states)
            if tie.across is not None and not len(tie.across.labels):
                # A rank without members has nothing to tie, and talks to the others.
                _tied_values(key, tie, dict(enumerate(map(torch.zeros_like, params))), {}, start, engine)
                continue
            if are_weights(key):
                results = _tied_weights(key, tie, values, params, start, engine)
                results = {number: results[number] for number in (*values, *untrained) if number in results}
            else:
                results = _tied_values(key, tie.linear, values, untrained, start, engine)
            for number, value in results.items():
                _begin_pinned_(value, tie.slices[number], begins_at(key, settings(params[number]), value))
                tied_states.setdefault(number, dict(states[number]))[key] = value
        changed |= {params[number]: held for number, held in tied_states.items()}
    return changed


def _values(key: str, params: Sequence[Tensor], states: Sequence[State]) -> dict[int, Tensor]:
    """Return the values under a key that have an entry for each of their parameter's, by its number."""
    return {
        number: held[key]
        for number, (param, held) in enumerate(zip(params, states, strict=True))
        if fits(held.get(key), param) and has_entries(key, held[key])
    }


def _keys_on_all_ranks(tie: BoundTie, params: Sequence[Tensor], states: Sequence[State]) -> list[str]:
    """Return the keys of the state that is to be tied, in an order that is that of all ranks.

    Raises:
        ValueError: some parameters of the tie have a value under a key, and others not.
        RuntimeError: ranks have state under different keys.
    """
    assert tie.across is not None
    keys = sorted({key for held in states for key in held if _values(key, params, states)}, key=str)
    for key in keys if len(tie.across.labels) else ():
        values = _values(key, params, states)
        lacking = [name for number, name in enumerate(tie.names) if number not in values]
        if lacking:
            what = "Parameters of a tie across ranks have no state yet, and others have."
            got = f"no {key} of {', '.join(lacking)}"
            raise refusal(ValueError, what, expected="state of all of them, or of none", got=got)
    told = agree(tie.across, "tie the state", {"state": keys}, keys if len(tie.across.labels) else None)
    return next((keys for keys in told if keys is not None), [])


def _tied_weights(
    key: str, tie: BoundTie, values: _Values, params: Sequence[Tensor], start: Start, engine: Engine
) -> dict[int, Tensor]:
    """Return the new values under a key of weights, where a parameter of which none is kept yet counts as it is."""
    if not values:
        return {}
    dtype = next(iter(values.values())).dtype
    # Copies, which a state may keep.
    kept = {number: param.detach().to(dtype, copy=True) for number, param in enumerate(params) if number not in values}
    every = dict(sorted({**kept, **values}.items()))
    return {**kept, **_tied_values(key, tie, every, {}, start, engine)}


def _states_of_untrained(tie: Partition, params: Sequence[Tensor], states: Sequence[State]) -> dict[int, State]:
    """Return the step count and the like for each parameter, by number, that has no state yet, and no free entry."""
    first = next((number for number, held in enumerate(states) if held), None)
    if first is None:
        return {}
    rest = {
        key: value
        for key, value in states[first].items()
        if not (has_entries(key, value) and fits(value, params[first]))
    }
    return {
        number: copy.deepcopy(rest)
        for number, (slices, held) in enumerate(zip(tie.slices, states, strict=True))
        if not held and bool((slices.labels != FREE).all())
    }


def _tied_values(
    key: str, tie: BoundTie, values: _Values, untrained: _Values, start: Start, engine: Engine
) -> dict[int, Tensor]:
    """Return the new values under a key of the state, of each parameter for which they change.

    Args:
        key: of the state.
        tie: of the parameters.
        values: those that are there.
        untrained: parameters that get values as well; zero in groups without members in the other parameters.
        start: as for :func:`tied_state`.
        engine: for the state.
    """
    if not values:
        return {}
    tied: dict[int, Tensor] = {}
    scaled = _scaled_for(key, tie, values, engine)
    if not engine.is_tied([_pair(scaled, values)]):
        if start == "mean":
            results = engine.projected(*_pair(scaled, values))
        else:
            order = [list(values).index(number) for number in tie.order if number in values]
            results = engine.started_from_first(*_pair(scaled, values), order)
        tied = dict(zip(values, results, strict=True))
    if untrained:
        dtype = next(iter(values.values())).dtype
        with torch.no_grad():
            zeros = {number: torch.zeros_like(param, dtype=dtype) for number, param in untrained.items()}
            # Zeros come last: a group takes them only if none of its members has a value.
            members = {**values, **tied, **zeros}
            results = engine.started_from_first(*_pair(scaled, members), range(len(members)))
        tied |= dict(zip(untrained, results[len(values) :], strict=True))
    return tied


def _scaled_for(key: str, tie: Partition, values: _Values, engine: Engine) -> Partition:
    """Return the tie with the scales for a key of the state: those of the weights, if values are tied so already."""
    if not tie.is_linear or not are_scaled(tie.slices) or engine.is_tied([_pair(tie, values)]):
        return tie
    scales = [scales_for(key, values.values(), slices.scales) for slices in tie.slices]
    scaled = [slices._replace(scale=scale) for slices, scale in zip(tie.slices, scales, strict=True)]
    return Partition(scaled, is_linear=True)


def scales_for(key: str, values: Iterable[Tensor], scale: Tensor) -> Tensor:
    """Return the scales for a key of the state.

    Args:
        key: of the state.
        values: that are kept under it.
        scale: of the weights.
    """
    if key in _SIGNED or are_weights(key) or any_negative(values):
        return scale
    # What is pinned stays pinned, also to the power of zero.
    return torch.where(scale == 0, 0, scale.abs() ** _POWERS.get(key, 2))


def _pair(tie: Partition, values: _Values) -> tuple[Partition, list[Tensor]]:
    """Return the tie of some parameters alone; of all, the same object, for which there may be an index already."""
    is_whole = list(values) == list(range(len(tie.slices)))
    slices = [tie.slices[number] for number in values]
    part = tie if is_whole else Partition(slices, is_linear=tie.is_linear, across=tie.across)
    return part, list(values.values())


def _begin_pinned_(value: Tensor, slices: Slices, begin: complex) -> None:
    """Write the value that an optimizer begins with to pinned entries."""
    if begin != 0 and slices.scale is not None:
        numbers, scales = slices.entries(value.shape)
        fill_where_(value, (numbers != FREE) & (scales == 0), begin)
