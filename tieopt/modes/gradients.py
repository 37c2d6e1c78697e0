"""Gradients: as an optimizer is to see them, and back to what accumulates.

Dense gradients are tied where they are: they may be views of a bucket that others hold. Those with a graph,
and sparse ones, which have no place for every member, are replaced by other tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, pairwise, repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tieopt.engine.engine import Engine, Pairs
from tieopt.engine.sharded import placed_as, spans_ranks
from tieopt.errors import refusal, shown_list
from tieopt.numbers.reduction import Operation, divide_, project_
from tieopt.tensors import local, overlaps, sharing, span_of
from tieopt.ties.options import Reduction
from tieopt.ties.places import BoundTie, T

_PROJECT = {reduction: Operation(project_, reduction=reduction) for reduction in ("mean", "sum")}
_DIVIDE = Operation(divide_)

# Parameters whose gradients were replaced, with both gradients.
Replaced = Iterable[tuple[Tensor, Tensor | None, Tensor | None]]


def tie_gradients(
    pairs: Pairs[BoundTie],
    params: Sequence[Tensor],
    engine: Engine,
    undo: list[Callable[[], None]] | None = None,
    *,
    compiled: bool = False,
) -> Sequence[Callable[[], None]]:
    """Tie gradients but for what is worth compiling, and return the calls that do the rest.

    Args:
        pairs: ties and their parameters that take part in a step. Where one of several joined parameters has a
            gradient, the others get one of zeros.
        params: all parameters of the optimizer, tied or not, each once.
        engine: the numbers.
        undo: gets what turns sums into means again where nobody has replaced the gradient since; without it all
            gradients are tied to their means.
        compiled: whether ``torch.compile`` will get the calls.
    """
    _part_from_others(pairs, params)
    prepare_gradients(pairs)
    written, others = _parted(pairs)
    to_sum = [pair for pair in written if pair[0].options.reduction == "sum"] if undo is not None else []
    calls: list[Callable[[], None]] = []
    if len(to_sum) < len(written):
        to_mean = [pair for pair in written if pair[0].options.reduction == "mean"] if to_sum else written
        calls += engine.calls(_PROJECT["mean"], to_mean, compiled=compiled)
    if to_sum:
        calls += engine.calls(_PROJECT["sum"], to_sum, compiled=compiled)
    if others:
        _replace(others, engine, "mean")
    if undo is not None:
        if to_sum:
            undo.append(partial(_divide, pairs, to_sum, engine))
        summed = [pair for pair in others if pair[0].options.reduction == "sum"]
        if summed:
            means = [(param, param.grad) for _, params in summed for param in params]
            _replace(summed, engine, "sum")
            undo.append(partial(put_back, [(param, mean, param.grad) for param, mean in means]))
    return calls


def _part_from_others(pairs: Pairs[BoundTie], params: Sequence[Tensor]) -> None:
    """Give tied parameters gradients of their own where these have an entry in common with that of another parameter.

    Both ``backward()`` and ``torch.autograd.grad`` may leave one memory to the terms of a sum.
    """
    given = [(param, grad) for param in params if (grad := _strided(grad_of(param))) is not None]
    spans = sorted([span_of(grad) for _, grad in given])
    # Without anything more for each of many gradients that are apart.
    if all(end <= start for (_, end), (start, _) in pairwise(spans)):
        return
    meeting = {id(given[number][0]) for pair in sharing([grad for _, grad in given]) for number in pair}
    for param in dict.fromkeys(chain.from_iterable(tied for _, tied in pairs)):
        if id(param) in meeting and not grad_of(param).requires_grad:
            param.grad = grad_of(param).clone()


def _strided(grad: Tensor | None) -> Tensor | None:
    """Return the entries of a gradient that this rank has, if they have a place in memory each."""
    if grad is not None and type(grad) is not Tensor:
        grad = local(grad)
    return grad if type(grad) is Tensor and grad.layout is torch.strided else None


def _parted(pairs: Pairs[BoundTie]) -> tuple[Pairs[BoundTie], Pairs[BoundTie]]:
    """The ties with gradients that can be written, and with the parameters of those whose gradients are replaced."""
    written, replaced = [], set()
    for tie, params in pairs:
        grads = list(map(grad_of, params))
        if tie.across is not None:
            # A rank without members takes part with whatever there is.
            grads = [
                torch.zeros_like(param) if grad is None else grad for param, grad in zip(params, grads, strict=True)
            ]
        written.append((tie.linear, grads))
        for param, grad in zip(params, grads, strict=True):
            if grad.requires_grad or grad.layout is torch.sparse_coo:
                replaced.add(id(param))
    if not replaced:
        return written, ()
    replaced = _connected(pairs, replaced)
    others = [(tie, params) for tie, params in pairs if id(params[0]) in replaced]
    return [pair for pair, (_, params) in zip(written, pairs, strict=True) if id(params[0]) not in replaced], others


def _divide(pairs: Pairs[BoundTie], sums: Pairs[BoundTie], engine: Engine) -> None:
    # Some optimizers replace the gradient, or set it to None, while they step.
    params_of = {tie.linear: params for tie, params in pairs}
    kept = [(tie, grads) for tie, grads in sums if all(map(is_, map(grad_of, params_of[tie]), grads))]
    engine.apply_(_DIVIDE, kept)


def put_back(replaced: Replaced) -> None:
    """Put back gradients, but where somebody has replaced the replacement."""
    for param, grad, replacement in replaced:
        if param.grad is replacement:
            param.grad = grad


# Without a Python call for each of many parameters, as the loops of this file.
grad_of: Callable[[Tensor], Any] = attrgetter("grad")


def gradients_of(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients that there are."""
    return [param.grad for param in params if param.grad is not None]


def with_gradients(pairs: Sequence[tuple[T, list[Tensor]]]) -> list[tuple[T, list[Tensor]]]:
    """Return the ties of parameters of which at least one has a gradient, or gets one of zeros by another tie."""
    chosen = [pair for pair in pairs if any(map(is_not, map(grad_of, pair[1]), repeat(None)))]
    if len(chosen) < len(pairs) and any(len(params) > 1 for _, params in chosen):
        taken = {tie for tie, _ in chosen}
        # Relaxed ties leave gradients alone.
        exact = [pair for pair in pairs if not pair[0].options.relaxed]
        reached = _connected(
            exact, {id(param) for tie, params in chosen if not tie.options.relaxed for param in params}
        )
        chosen = [pair for pair in pairs if pair[0] in taken or any(map(reached.__contains__, map(id, pair[1])))]
    return chosen


def prepare_gradients(pairs: Pairs[BoundTie]) -> Replaced:
    """Give every parameter a gradient that can be tied, and return those whose gradients were replaced."""
    replaced: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    missing = []
    for tie, params in pairs:
        for param in params:
            grad = param.grad
            if grad is None:
                missing.append((param, params))
                continue
            # Without a call for each of many gradients that are as they should be.
            if (
                type(grad) is Tensor
                and type(param) is Parameter
                and grad.layout is torch.strided
                and grad.is_contiguous()
                and not (grad.requires_grad or grad.is_conj() or grad.is_neg() or grad.is_inference())
            ):
                continue
            replacement = prepared(grad, param, is_of_rows=tie.is_of_rows)
            if replacement is not grad:
                param.grad = replacement
                replaced.append((param, grad, replacement))
    if missing:
        # A parameter may be joined with one that has a gradient, and with another by another tie.
        trained = {
            id(param)
            for tie, params in pairs
            for param in params
            if param.grad is not None or (tie.across is not None and len(tie.across.labels))
        }
        joined = _connected(pairs, trained)
        for param, params in missing:
            if param.grad is None and id(param) in joined:
                dtype = next(filter(None, map(_gradient_dtype, params)), None)
                param.grad = torch.zeros_like(param, dtype=dtype)
                replaced.append((param, None, param.grad))
    return replaced


def check_gradients(pairs: Pairs[BoundTie]) -> None:
    """Refuse gradients that cannot be tied, before anything is written.

    Args:
        pairs: ties and their parameters.

    Raises:
        RuntimeError: those of joined parameters differ in dtype, so that some would be rounded to that of another; or
            one that is tied across ranks has a graph.
    """
    for tie, params in with_gradients([pair for pair in pairs if len(pair[1]) > 1 or pair[0].across is not None]):
        grads = [param.grad for param in params if param.grad is not None]
        graphs = [grad.grad_fn for grad in grads if grad.requires_grad] if tie.across is not None else []
        if graphs:
            what, expected = "A gradient that is tied across ranks has a graph.", "one without, as of backward()"
            raise refusal(RuntimeError, what, expected=expected, got=f"{graphs[0]}")
        dtypes = list(filter(None, map(_gradient_dtype, params)))
        if any(map(is_not, dtypes, dtypes[1:])):
            what, expected = "Gradients of joined parameters differ in dtype.", "one dtype, see param.grad_dtype"
            got = shown_list(list(map(str, dtypes)))
            raise refusal(RuntimeError, what, parameters=shown_list(list(tie.names)), expected=expected, got=got)


def _gradient_dtype(param: Tensor) -> torch.dtype | None:
    """Return the dtype of the gradient that a parameter has, or may have; None for any."""
    # Older versions of torch have gradients of the parameter's dtype alone.
    return getattr(param, "grad_dtype", param.dtype) if param.grad is None else param.grad.dtype


def prepared(grad: Tensor, param: Tensor, *, is_of_rows: bool) -> Tensor:
    """Return a gradient as it can be tied: itself, or a copy of another kind."""
    if spans_ranks([param]):
        return placed_as(grad, param)
    if grad.layout == torch.sparse_coo and not is_of_rows:
        return grad.to_dense()
    if grad.is_conj() or grad.is_neg():
        return grad.resolve_conj().resolve_neg()
    is_writable = not overlaps(grad) and (not grad.is_inference() or torch.is_inference_mode_enabled())
    return grad if grad.layout != torch.strided or grad.requires_grad or is_writable else grad.clone()


def _connected(pairs: Pairs[BoundTie], params: set[int]) -> set[int]:
    """Parameters, by their identities, and all that ties join with them, directly or by others."""
    joins = [{id(param) for param in parts} for _, parts in pairs if len(parts) > 1]
    more = bool(params)
    while more:
        joined = {param for parts in joins if parts & params for param in parts}
        more = not joined <= params
        params = params | joined
    return params


def _replace(pairs: Pairs[BoundTie], engine: Engine, reduction: Reduction) -> None:
    """Tie gradients out of place, and with their graph."""
    for tie, params in pairs:
        grads = gradients_of(params)
        with torch.set_grad_enabled(any(grad.requires_grad for grad in grads)):
            results = engine.projected(tie.linear, grads, reduction)
        for param, grad in zip(params, results, strict=True):
            param.grad = grad
