"""The state of an optimizer made as if its parameters had been tied all along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tieopt.index import Index
from tieopt.places import BoundTie
from tieopt.reduction import Workspace, projected, tied
from tieopt.slices import Slices, real

# How torch's optimizers call what has the sign of a gradient or a weight.
_SIGNED = {"momentum_buffer", "exp_avg", "grad_avg", "prev", "ax"}

Change = tuple[dict[str, Any], str, Tensor]


def tied_state(state: Mapping[Tensor, Any], pairs: Iterable[tuple[BoundTie, list[Tensor]]]) -> list[Change]:
    """Averages per group what an optimizer keeps of each entry of a tied parameter.

    Whatever has not the shape of its parameter is left alone, and so is what is tied already. Nothing is
    written, and the results share no memory with what is there, which a checkpoint may hold.

    With scales, what is tied as the weights are is left so, and the rest goes by the names that torch's
    optimizers use: momentum is scaled as the weights are, second moments as their squares. Of an unknown name
    it is a second moment if no entry is negative.

    Args:
        state: of the optimizer, by parameter.
        pairs: ties and their parameters.

    Returns:
        The entries to write: a parameter's state, the key, the new value.
    """
    changes = []
    for tie, params in pairs:
        states = [state.get(param) for param in params]
        kept = [one if isinstance(one, dict) else {} for one in states]
        for key in dict.fromkeys(key for one in kept for key in one):
            parts = [part for part, param in enumerate(params) if _is_of_entries(kept[part].get(key), param)]
            if not parts:
                continue
            values = [kept[part][key] for part in parts]
            own = [tie.slices[part] for part in parts]
            slices = own if _is_tied(own, values) else _scaled(own, key, values)
            if not _is_tied(slices, values):
                results = projected(values, partial(Index.compile, slices))
                changes += [(kept[part], key, result) for part, result in zip(parts, results, strict=True)]
    return changes


def write_state(changes: Iterable[Change]) -> None:
    """Writes what :func:`tied_state` returned."""
    for state, key, value in changes:
        state[key] = value


def _is_tied(slices: Sequence[Slices], values: Sequence[Tensor]) -> bool:
    detached = [value.detach() for value in values]
    return tied(detached, Index.compile(slices, detached), Workspace())


def _is_of_entries(value: Any, param: Tensor) -> bool:
    """Whether a value of the state is plain numbers, one for each entry of the parameter."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.shape == param.shape
        and value.device == param.device
        and value.layout == torch.strided
        and (value.is_floating_point() or value.is_complex())
    )


def _scaled(slices: Sequence[Slices], key: str, values: Sequence[Tensor]) -> list[Slices]:
    """The slices with scales for what is kept under a key."""
    if key in _SIGNED or any(bool((real(value) < 0).any()) for value in values):
        return list(slices)
    # To the power of zero a pinned entry would be a member.
    power = {"exp_inf": 1, "step_size": 0, "acc_delta": 0}.get(key, 2)
    return [
        each._replace(scale=None if each.scale is None else torch.where(each.scale == 0, 0, each.scale.abs() ** power))
        for each in slices
    ]
