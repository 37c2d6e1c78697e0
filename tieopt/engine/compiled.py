"""What ``torch.compile`` sees of a step: small functions of tensors of fixed shapes; all else runs as without it.

Where all groups of a tie have one small size, a mean is a sum of as many loads, written out: the kernel that inductor
makes of it reads every member once and is vectorised along the slices. A large tie is cut into chunks of one shape,
because what is written back right away is still in the caches; one kernel serves them all.

No Python object of ours is traced in a step. So nothing of a step has to be compiled again where ties, copies or
parameter groups are new objects with the same shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from tieopt.engine.graphs import Copies, between_graphs, is_compiled
from tieopt.numbers.folding import Folding, fold_free_gradients_
from tieopt.numbers.index import Index
from tieopt.numbers.reduction import Operation, is_narrow, rounded
from tieopt.tensors import overlaps

# What an engine works on together.
W = TypeVar("W", bound=Any)


# The inductor of torch 2.6 was seen to leave members of a group unequal; that of 2.13 was not.
_WRITES_OUT = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 13)

# Tensors of fewer entries are not worth a call of what was compiled.
_LEAST = 2**19

# Sums of more are not written out: it takes too long to compile them.
_WRITTEN_OUT = 64

# Entries that are read and written back before the next ones, and into how many chunks they are cut at most.
_CHUNK = 2**20
_CHUNKS = 8


@between_graphs
def is_under_compiler() -> bool:
    """Return whether ``torch.compile`` gets what is called now, and is right with what we write for it."""
    return is_compiled() and _WRITES_OUT


class Call(NamedTuple):
    """A call of a function that is to be compiled.

    Attributes:
        function: one of those below.
        arguments: lists of tensors of equal lengths, and whether the result is the sum.
    """

    function: Callable[..., None]
    arguments: tuple[list[Tensor], list[Tensor], list[Tensor], bool]


def projections(
    plan: Sequence[W], tensors: Sequence[Tensor], operation: Operation, copies: Copies
) -> tuple[list[Call], list[W]]:
    """Return the calls that project the tensors whose means can be written out, and the rest of the plan.

    Means that depend on whether a step has just written the weights are not written out.

    Args:
        plan: what is worked on together.
        tensors: of all of it.
        operation: a projection.
        copies: of the optimizer.
    """
    calls: list[Call] = []
    small, others = [], []
    count = Counter(map(id, tensors))
    for work in plan:
        chosen = _chosen(tensors, work)
        plain = count[id(chosen[0])] == 1 and not (operation.stepped and is_narrow(chosen[0].dtype))
        index = work.executor
        rows = _rows_written_out(index, chosen) if plain and isinstance(index, Index) else None
        if rows is None:
            others.append(work)
            continue
        chunks = _chunks(cast(Index, index), rows[0].numel())
        if len(chunks) == 1:
            small.append((rows, rows, chunks[0]))
        else:
            calls.extend(_call(_project, [(rows, rows, chunk)], operation, copies) for chunk in chunks)
    if small:
        calls.append(_call(_project, small, operation, copies))
    return calls, others


def gradient_foldings(
    foldings: Sequence[tuple[W, Folding]],
    grads: Sequence[Tensor],
    compacts: Sequence[Tensor],
    operation: Operation,
    copies: Copies,
) -> tuple[list[Call], list[W]]:
    """Fold the gradients whose means can be written out, but for the means.

    Args:
        foldings: what is worked on together, with its folding.
        grads: of all of it.
        compacts: to write to, one for each gradient.
        operation: :func:`~tieopt.numbers.folding.fold_gradients_`.
        copies: of the optimizer.

    Returns:
        The calls that write the means, and the rest of the plan.
    """
    given, others = [], []
    for work, folding in foldings:
        own_grads, own_compacts = _chosen(grads, work), _chosen(compacts, work)
        rows = _rows_written_out(folding.index, own_grads)
        if rows is None:
            others.append(work)
            continue
        fold_free_gradients_(own_grads, own_compacts, folding)
        _, (compact,) = folding.rows(own_grads, own_compacts)
        given.append((_static(compact[: folding.groups[0]]), rows, folding.index.members_of_groups))
    return [_call(_mean, given, operation, copies)] if given else [], others


def _chosen(tensors: Sequence[Tensor], work: Any) -> list[Tensor]:
    return list(tensors) if work.numbers is None else [tensors[number] for number in work.numbers]


def _rows_written_out(index: Index, tensors: Sequence[Tensor]) -> Tensor | None:
    """The rows of a tensor whose means are worth writing out, and can be."""
    if not _WRITES_OUT or len(tensors) != 1 or tensors[0].numel() < _LEAST:
        return None
    sizes = {run.rounds[0].size for run in index.runs}
    if (
        index.slices[0].scale is not None
        or len(sizes) != 1
        or not 0 < min(sizes) <= _WRITTEN_OUT
        or index.layout.double
        or index.layout.device.type == "mps"
    ):
        return None
    (rows,) = index.rows(tensors)
    # Slices between others may be rows that share entries. The compiler reads them before it writes to any.
    return None if overlaps(rows) else _static(rows)


def _static(tensor: Tensor) -> Tensor:
    """A tensor of its own for the compiler, whose shape it is to take as it is.

    Shapes that it takes as variables after a second model were seen to fail, for some values of ``PYTHONHASHSEED``.
    """
    tensor = tensor.detach()
    torch._dynamo.mark_static(tensor)
    return tensor


def _chunks(index: Index, slice_entries: int) -> Sequence[Tensor]:
    """Members of whole groups that are worked on together, in chunks of one shape but for the last."""
    members = index.members_of_groups
    most = max(min(members.numel() * slice_entries // _CHUNK, _CHUNKS, len(members)), 1)
    even = (count for count in range(most, most // 2, -1) if len(members) % count == 0)
    return [_static(chunk) for chunk in torch.split(members, len(members) // next(even, most))]


def _call(
    function: Callable[..., None], given: Sequence[tuple[Tensor, Tensor, Tensor]], operation: Operation, copies: Copies
) -> Call:
    reduction = operation.options.get("reduction", "mean")
    targets, rows, members = (list(column) for column in zip(*given, strict=True))
    shapes = tuple(
        (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in (*targets, *rows, *members)
    )
    return Call(copies.of(function, reduction, shapes), (targets, rows, members, reduction == "sum"))


# --- what is compiled ---


def _project(targets: list[Tensor], rows: list[Tensor], members: list[Tensor], sum: bool) -> None:  # noqa: A002
    for own, group_members in zip(rows, members, strict=True):
        own[group_members] = _values(own, group_members, sum).unsqueeze(1)


def _mean(targets: list[Tensor], rows: list[Tensor], members: list[Tensor], sum: bool) -> None:  # noqa: A002
    for target, own, group_members in zip(targets, rows, members, strict=True):
        target.copy_(_values(own, group_members, sum))


def _values(rows: Tensor, members: Tensor, sum: bool) -> Tensor:  # noqa: A002
    """Means, or what they are multiplied to; added up in float64, where the sum of equal members is exact."""
    # One load after the other: a sum over a dimension begins with 0.0, which turns -0.0 into 0.0.
    first, *others = members.unbind(1)
    total = rows[first].to(torch.float64)
    for each in others:
        total = total + rows[each].to(torch.float64)
    values = rounded(total / members.shape[1], rows.dtype)
    return rounded(values.to(torch.float64) * members.shape[1], rows.dtype) if sum else values
