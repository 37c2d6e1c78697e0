"""The state of an optimizer made as if its parameters had been tied all along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tieopt.binding import BoundTie
from tieopt.index import Index
from tieopt.reduction import Workspace, project_, tied
from tieopt.slices import Slices

# How torch's optimizers call what has the sign of a gradient or a weight.
_SIGNED = {"momentum_buffer", "exp_avg", "grad_avg", "prev", "ax"}
_ABSOLUTE = {"exp_inf"}
_UNSCALED = {"step_size", "acc_delta"}


def tied_state(
    state: Mapping[Tensor, Any], pairs: Iterable[tuple[BoundTie, list[Tensor]]]
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Averages per group what an optimizer keeps of each entry of a tied parameter.

    Whatever has not the shape of its parameter is left alone, and so is what is tied already. Nothing is
    written, and the results share no memory with what is there, which a checkpoint may hold.

    With scales, what has signs is scaled as the weights are, and what has none as their squares: second
    moments.

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
            slices = _scaled([tie.slices[part] for part in parts], key, values)
            index, workspace = Index.compile(slices, values), Workspace()
            if not tied(values, index, workspace):
                values = [value.clone() for value in values]
                project_(values, index, workspace)
                changes += [(kept[part], key, value) for part, value in zip(parts, values, strict=True)]
    return changes


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
    if key in _SIGNED or any(bool((_real(value) < 0).any()) for value in values):
        return list(slices)
    if key in _UNSCALED:
        return [each._replace(scale=None) for each in slices]
    power = 1 if key in _ABSOLUTE else 2
    return [each._replace(scale=None if each.scale is None else each.scale.abs() ** power) for each in slices]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
