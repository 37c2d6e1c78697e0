"""The state of an optimizer, converted between one entry for each member and one for each group."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tieopt.folding import Folded, compact_like, compact_slices, folded_for
from tieopt.index import Indices
from tieopt.reduction import bits, times
from tieopt.slices import FREE, Slices
from tieopt.state import State, is_plain, scales_for
from tieopt.ties import shown

# Ties and their parameters.
Pairs = Iterable[tuple[Indices, Sequence[Tensor]]]


# Tensors that are made in inference mode could not be written to outside of it, by the next step.
@torch.inference_mode(False)
@torch.no_grad()
def compacted(state: Mapping[Tensor, State], pairs: Pairs, maybe: bool = False) -> dict[Tensor, State]:
    """The state of compact parameters, from that of tied ones.

    Args:
        state: of an optimizer, by parameter; that of tied ones is tied as well.
        pairs: the ties that have each parameter once, and their parameters.
        maybe: whether it may be that of compact parameters already, as distributed checkpoints do not say.

    Returns:
        What takes the place of the state of each parameter.

    Raises:
        ValueError: something is kept in a shape that only an optimizer of the whole parameter makes sense of.
    """
    changed: dict[Tensor, State] = {}
    for tie, params in pairs:
        all_slices, folded = tie.slices, folded_for(tie)
        for slices, part, param in zip(all_slices, folded, params, strict=True):
            held = state.get(param) or {}
            new = {key: _compact_value(key, value, slices, part, param, maybe) for key, value in held.items()}
            # Where nothing of a parameter is left, there is nothing to train.
            changed[param] = new if len(part.kept) else {}
    return changed


def _compact_value(key: str, value: Any, slices: Slices, part: Folded, param: Tensor, maybe: bool) -> Any:
    if not _is_of(value, param.shape):
        if maybe and _is_of(value, _compact_shape(slices, part, param)):
            return value
        check_shapeless(key, value, param.shape)
        return value
    rows = bits(_rows(slices, value))[part.kept.to(value.device)].view(value.dtype)
    scales = scales_for(key, [value], part.scale[part.kept])
    values = _in_place(compact_slices(slices), times(rows, 1 / scales))
    return _laid_out_as(compact_like(slices, param.detach(), len(part.kept)), values)


@torch.inference_mode(False)
@torch.no_grad()
def expanded(state: Mapping[Tensor, State], pairs: Pairs) -> dict[Tensor, State]:
    """The state of tied parameters, from that of compact ones.

    Args:
        state: of an optimizer, by tied parameter, in the shapes of the compact ones.
        pairs: the ties that have each parameter once, and their parameters.

    Returns:
        What takes the place of the state of each parameter.

    Raises:
        ValueError: something is kept in a shape that only an optimizer of the compact parameter makes sense of.
    """
    changed: dict[Tensor, State] = {}
    for tie, params in pairs:
        all_slices, folded = tie.slices, folded_for(tie)
        held = [state.get(param) or {} for param in params]
        shapes = [
            _compact_shape(slices, part, param) for slices, part, param in zip(all_slices, folded, params, strict=True)
        ]
        for part, one in enumerate(held):
            for key, value in one.items():
                if not is_plain(value) or value.shape != shapes[part]:
                    check_shapeless(key, value, shapes[part])
        keys = dict.fromkeys(key for one in held for key in one)
        for part, (slices, own, param) in enumerate(zip(all_slices, folded, params, strict=True)):
            homes = [number for number, one in enumerate(held) if one and _stand_in(own, folded, number)]
            if not held[part] and not homes:
                continue
            new: State = {}
            for key in held[part] or keys:
                values = [one.get(key) for one in held]
                plain = [_is_of(value, shape) for value, shape in zip(values, shapes, strict=True)]
                if any(plain[number] for number in {part, *homes}):
                    value = _expanded_value(key, values, plain, all_slices, folded, own, slices, shapes)
                    new[key] = _laid_out_as(param.detach(), value)
                else:
                    new[key] = held[part][key] if held[part] else copy.deepcopy(values[homes[0]])
            changed[param] = new
    return changed


def _expanded_value(
    key: str,
    values: Sequence[Any],
    plain: Sequence[bool],
    all_slices: Sequence[Slices],
    folded: Sequence[Folded],
    own: Folded,
    slices: Slices,
    shapes: Sequence[torch.Size],
) -> Tensor:
    like: Tensor = next(value for value, one in zip(values, plain, strict=True) if one)
    # A parameter that was not trained yet has nothing.
    rows = torch.cat(
        [
            _rows(compact_slices(each), value if one else like.new_zeros(shape))
            for each, value, one, shape in zip(all_slices, values, plain, shapes, strict=True)
        ]
    )
    known = own.rows != FREE
    full = rows.new_zeros((len(own.rows), *rows.shape[1:]))
    shown = [value for value, one in zip(values, plain, strict=True) if one]
    scales = scales_for(key, shown, own.scale[known])
    chosen = bits(rows)[own.rows[known].to(rows.device)].view(rows.dtype)
    bits(full)[known.to(rows.device)] = bits(times(chosen, scales))
    return _in_place(slices, full)


def _stand_in(own: Folded, folded: Sequence[Folded], number: int) -> bool:
    """Whether groups of one parameter stand in the compact one of another."""
    before = sum(len(part.kept) for part in folded[:number])
    return bool(((own.rows >= before) & (own.rows < before + len(folded[number].kept))).any())


def check_shapeless(key: str, value: Any, shape: torch.Size) -> None:
    """Refuses to convert a value of the state that is neither one entry for each of a parameter nor a single one.

    Raises:
        ValueError: it is.
    """
    within = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, Mapping) else [value]
    for one in within:
        if isinstance(one, Tensor) and one.numel() > 1:
            raise ValueError(
                "This state cannot be converted between the parameter and the compact parameter of a tie.\n"
                f"  Expected: one entry for each of shape {tuple(shape)}, or a single one\n"
                f"  Got:      {key!r} of shape {tuple(one.shape)}: {shown(value)}"
            )


def _is_of(value: Any, shape: torch.Size) -> bool:
    """Whether a value of the state is plain numbers, one for each entry."""
    return is_plain(value) and value.shape == shape


def _compact_shape(slices: Slices, part: Folded, param: Tensor) -> torch.Size:
    shape = [len(part.kept), *slices.slice_shape(param)]
    return torch.empty(shape, device="meta").movedim(0, compact_slices(slices).dim).shape


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
