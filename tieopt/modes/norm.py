"""The norm of gradients in which every shared value counts once, and clipping by it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import repeat
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from tieopt.engine.agreement import agree
from tieopt.engine.graphs import untraced
from tieopt.engine.norms import by_mesh, norm_of, placed_weights
from tieopt.errors import refusal, shown
from tieopt.modes.gradients import prepared
from tieopt.modes.mode import Mode
from tieopt.numbers.reduction import Operation, project_
from tieopt.tensors import column, local, sharding_of
from tieopt.ties.options import Reduction
from tieopt.ties.places import BoundTie, ParamGroups, all_parameters
from tieopt.ties.slices import FREE, firsts_of, flat_labels, flat_scales, numbered

_PROJECT = Operation(project_)


@untraced
@torch.no_grad()
def grad_norm(mode: Mode, param_groups: ParamGroups, norm_type: float, purpose: str = "grad_norm()") -> Tensor:
    """Return the norm of all gradients; see :meth:`tieopt.TiedOptimizer.grad_norm`.

    Args:
        mode: the ties.
        param_groups: of the optimizer.
        norm_type: as for the method.
        purpose: for which all ranks need it.
    """
    _check_number("norm_type", norm_type, "a number above 0; float('inf') for the largest entry", zero=False)
    grads = {param: param.grad for param in all_parameters(param_groups) if param.grad is not None}
    grads |= _counted_once(mode, param_groups)
    norm = norm_of(grads.values(), norm_type)
    if mode.across is None:
        return norm
    # The dtype of no gradients is none.
    told = agree(
        mode.across, f"{purpose}, norm_type={norm_type}", payload=(norm.tolist(), norm.dtype if grads else None)
    )
    norms, dtypes = zip(*told, strict=True)
    dtype = reduce(torch.promote_types, filter(None, dtypes), torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.tensor(norms, dtype=dtype, device=norm.device), norm_type)
    return total


def clip_grad_norm_(mode: Mode, param_groups: ParamGroups, max_norm: float, norm_type: float) -> Tensor:
    """Scale all gradients so that their norm is no larger; see :meth:`tieopt.TiedOptimizer.clip_grad_norm_`."""
    _check_number("max_norm", max_norm, "a number from 0 on", zero=True)
    norm = grad_norm(mode, param_groups, norm_type, f"clip_grad_norm_({max_norm})")
    for params in by_mesh(all_parameters(param_groups)):
        clip_grads_with_norm_(params, max_norm, norm)
    return norm


def _check_number(name: str, value: Any, expected: str, *, zero: bool) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # Of a NaN neither is true.
    if not is_number or not (value > 0 or (zero and value == 0)):
        kind = ValueError if is_number else TypeError
        raise refusal(kind, f"{name} is no norm.", expected=expected, got=shown(value))


def _counted_once(mode: Mode, param_groups: ParamGroups) -> dict[Tensor, Tensor]:
    """Return gradients of tied parameters in which that of each shared value stands once, and zeros for the rest."""
    exact = [(tie, params) for tie, params in mode.parameters(param_groups) if not tie.options.relaxed]
    pairs = mode.taking_part(exact, param_groups)
    grads: dict[Tensor, Tensor] = {}
    for tie, params in pairs:
        for param in params:
            grad = grads.get(param, param.grad)
            # Where a joined parameter has a gradient, those of the others count as zero.
            grads[param] = torch.zeros_like(param) if grad is None else prepared(grad, param, is_of_rows=tie.is_of_rows)
    # Nothing is written to the gradients themselves.
    grads = {param: grad.coalesce() if grad.is_sparse else grad.clone() for param, grad in grads.items()}

    dense = [(tie, params) for tie, params in pairs if not grads[params[0]].is_sparse]
    mode.engine.apply_(_PROJECT, [(tie.linear, [grads[param] for param in params]) for tie, params in dense])
    for tie, params in pairs:
        if grads[params[0]].is_sparse:
            (grads[params[0]],) = mode.engine.projected(tie.linear, [grads[params[0]]])

    for tie, params in pairs:
        for param, (weights, uncounted) in zip(params, _weights_for(mode, tie, params), strict=True):
            # Numbers of 16 bits would be rounded once more.
            grad = grads[param] = grads[param].to(torch.promote_types(grads[param].dtype, torch.float32))
            if grad.is_sparse:
                rows, values = grad._indices()[0], grad._values()
                weights, uncounted = (column(of_rows.flatten()[rows], values) for of_rows in (weights, uncounted))
            else:
                values = local(grad)
            # Zero times infinity is not zero.
            values.mul_(weights).masked_fill_(uncounted, 0)
    return grads


def _weights_for(mode: Mode, tie: BoundTie, params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return what the entries of each mean gradient are multiplied by, and where that is zero; worked out once."""
    key = tie, *((param.device, param.dtype, *sharding_of(param)) for param in params)
    if key not in mode.norm_weights:
        has_others = tie.across is not None or tie.labels_are_sharded
        across = mode.engine.members_across(tie, params) if has_others else None
        of_slices = _weights(tie, tie.options.reduction, across)
        dims = [part.dim for part in tie.slices]
        weights = map(placed_weights, of_slices, dims, params, repeat(tie.labels_are_sharded))
        mode.norm_weights[key] = [(factors, factors == 0) for factors in weights]
    return mode.norm_weights[key]


def _weights(tie: BoundTie, reduction: Reduction, across: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Return for each slice what its mean gradient is multiplied by, so that each group counts once.

    The gradient of the shared value is counted in the place of its first member of the largest scale ``s``, where the
    mean gradient stands ``s`` times. The others, and what is pinned, count nothing.

    Args:
        tie: of the parameters.
        reduction: of its gradients.
        across: for each group whether a lower rank counts it, and how many members it has on all ranks.
    """
    slices = numbered([part._replace(sharding=None) for part in tie.slices])
    labels, scales = flat_labels(slices), flat_scales(slices)
    weights, zeros = (labels == FREE).double(), scales.new_zeros(len(labels))
    members = ((labels != FREE) & (scales != 0)).nonzero().squeeze(1)
    groups, sizes = labels[members], scales[members].abs()
    largest = members[sizes == zeros.scatter_reduce(0, groups, sizes, "amax")[groups]]
    firsts = firsts_of(labels[largest], len(labels))
    # What is pinned in all members has none.
    counted = largest[firsts[firsts < len(largest)]]
    squares = zeros.index_add(0, groups, sizes.square())
    if across is not None:
        is_on_lower, members_of = across
        squares[: len(members_of)] = members_of.double()
        counted = counted[~is_on_lower[labels[counted]]]
    weights[counted] = (squares[labels[counted]] if reduction == "sum" else 1) / scales[counted].abs()
    parts = torch.split(weights, [part.labels.numel() for part in tie.slices])
    return [weight.view(part.labels.shape) for weight, part in zip(parts, tie.slices, strict=True)]
