"""Gradients: as an optimizer is to see them, and back to what accumulates.

Dense gradients are tied where they are: they may be views of a bucket that others hold. Those with a graph,
and sparse ones, which have no place for every member, are replaced by other tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tieopt.engine.engine import Batches, Pairs
from tieopt.engine.graphs import between_graphs, untraced
from tieopt.numbers.reduction import Reduction, projected
from tieopt.tensors import is_sharded, overlaps
from tieopt.ties.places import BoundTie, T


@between_graphs
def tie_gradients(
    pairs: Pairs,
    batches: Batches,
    reduction: Reduction = "mean",
    undo: list[Callable[[], None]] | None = None,
) -> None:
    """Ties gradients.

    Args:
        pairs: ties and their parameters, as :func:`with_gradients` returns them. Where one of several joined
            parameters has a gradient, the others get one of zeros.
        batches: to work in.
        reduction: ``"mean"`` or ``"sum"``.
        undo: for the sum, gets what turns it into the mean again where nobody has replaced the gradient since.
    """
    written, others = _prepared(pairs)
    batches.project_(written, reduction)
    _replace_others(pairs, others, batches, reduction, [] if undo is None else undo)


@untraced
def _prepared(pairs: Pairs) -> tuple[Pairs, set[int]]:
    """Ties with the gradients that can be written; and the identities of the parameters of the other ones."""
    prepare_gradients(pairs)
    replaced = _replaced(pairs)
    return [(tie, gradients_of(params)) for tie, params in pairs if id(params[0]) not in replaced], replaced


@untraced
def _replace_others(
    pairs: Pairs, replaced: set[int], batches: Batches, reduction: Reduction, undo: list[Callable[[], None]]
) -> None:
    """Ties the gradients of the parameters that are replaced, and says how to turn all sums into means again."""
    others = [(tie, params) for tie, params in pairs if id(params[0]) in replaced]
    _replace(others, "mean")
    if reduction == "sum":
        written = [(tie, params, gradients_of(params)) for tie, params in pairs if id(params[0]) not in replaced]
        undo.append(partial(_divide, written, batches))
        means = {param: param.grad for _, params in others for param in params}
        _replace(others, reduction)
        undo.extend(partial(_put_back, param, param.grad, mean) for param, mean in means.items())


def _divide(sums: Sequence[tuple[BoundTie, list[Tensor], list[Tensor]]], batches: Batches) -> None:
    # Some optimizers replace the gradient, or set it to None, while they step.
    batches.divide_(
        [
            (tie, grads)
            for tie, params, grads in sums
            if all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        ]
    )


def _put_back(param: Tensor, total: Tensor | None, mean: Tensor | None) -> None:
    if param.grad is total:
        param.grad = mean


def gradients_of(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    return [param.grad for param in params if param.grad is not None]


def with_gradients(pairs: Sequence[tuple[T, list[Tensor]]]) -> list[tuple[T, list[Tensor]]]:
    """The ties of which a parameter has a gradient."""
    return [(tie, params) for tie, params in pairs if not all(param.grad is None for param in params)]


def prepare_gradients(pairs: Pairs) -> None:
    """Gives every parameter a gradient that can be tied."""
    if any(len(params) > 1 for _, params in pairs):
        # A parameter may be joined with one, and with another by another tie.
        held = {id(param) for _, params in pairs for param in params if param.grad is not None}
        joined = _connected(pairs, held)
        for _, params in pairs:
            for param in params:
                if param.grad is None and id(param) in joined:
                    param.grad = torch.zeros_like(param)
    for tie, params in pairs:
        for param in params:
            grad = param.grad
            if grad is not None and is_sharded(param):
                param.grad = _as_sharded(grad, param)
                continue
            if grad is None:
                continue
            if grad.layout == torch.sparse_coo and not tie.is_of_rows:
                param.grad = grad.to_dense()
            elif grad.is_conj() or grad.is_neg():
                param.grad = grad.resolve_conj().resolve_neg()
            elif grad.layout == torch.strided and not grad.requires_grad and not _is_writable(grad):
                param.grad = grad.clone()


def _as_sharded(grad: Any, param: Any) -> Any:
    """A gradient where its parameter is.

    Raises:
        RuntimeError: it is sparse, has a graph, or is not sharded over the mesh of the parameter.
    """
    mesh = grad.device_mesh if is_sharded(grad) else "no mesh"
    if grad.requires_grad or grad.layout != torch.strided or mesh != param.device_mesh:
        raise RuntimeError(
            "The gradient of a sharded parameter cannot be tied.\n"
            f"  Expected: a dense one, without a graph, over {param.device_mesh}\n"
            f"  Got:      {grad.layout}, requires_grad={grad.requires_grad}, over {mesh}"
        )
    # Parts of a sum are added up, as the inner optimizer would have to.
    return grad if grad.placements == param.placements else grad.redistribute(placements=param.placements)


def _is_writable(grad: Tensor) -> bool:
    return not overlaps(grad) and (not grad.is_inference() or torch.is_inference_mode_enabled())


def _replaced(pairs: Pairs) -> set[int]:
    """The identities of the parameters whose gradient cannot be written, and of those that are joined with them."""
    return _connected(
        pairs,
        {
            id(param)
            for _, params in pairs
            for param, grad in zip(params, gradients_of(params), strict=True)
            if grad.requires_grad or grad.layout == torch.sparse_coo
        },
    )


def _connected(pairs: Pairs, params: set[int]) -> set[int]:
    """Parameters, by their identities, and all that ties join with them, directly or by others."""
    joins = [{id(param) for param in parts} for _, parts in pairs if len(parts) > 1]
    more = bool(params)
    while more:
        joined = {param for parts in joins if parts & params for param in parts}
        more = not joined <= params
        params = params | joined
    return params


def _replace(pairs: Pairs, reduction: Reduction) -> None:
    """Ties gradients out of place, and with their graph."""
    for tie, params in pairs:
        grads = gradients_of(params)
        with torch.set_grad_enabled(any(grad.requires_grad for grad in grads)):
            results = projected(grads, tie.index_for, reduction)
        for param, grad in zip(params, results, strict=True):
            param.grad = grad
