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
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tieopt.engine.graphs import Copies, between_graphs, is_compiled
from tieopt.numbers.folding import Folding
from tieopt.numbers.index import Index, Indices
from tieopt.numbers.reduction import Reduction, is_narrow, rounded
from tieopt.tensors import overlaps

Function = TypeVar("Function", bound=Callable[..., Any])
Ties = TypeVar("Ties", bound=Indices)


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
    """Whether it gets them, and what we write for it is right with this version of torch."""
    return _WRITES_OUT and is_compiled()


class Call(NamedTuple):
    """A call of a function that is to be compiled.

    Attributes:
        function: one of those below.
        arguments: lists of tensors of equal lengths, and whether the result is the sum.
    """

    function: Callable[..., None]
    arguments: tuple[list[Tensor], list[Tensor], list[Tensor], bool]


def projections(
    pairs: Sequence[tuple[Ties, list[Tensor]]], reduction: Reduction, copies: Copies, *, stepped: bool
) -> tuple[list[Call], list[tuple[Ties, list[Tensor]]]]:
    """How to project tensors as :func:`~tieopt.numbers.reduction.project_` does.

    Args:
        pairs: ties and their tensors.
        reduction: ``"mean"`` or ``"sum"``.
        copies: of the optimizer.
        stepped: whether they are weights that a step has just written. Those whose means depend on it are not written
            out.

    Returns:
        The calls that project those that can be written out, and the other ones.
    """
    calls: list[Call] = []
    small, others = [], []
    held = Counter(id(tensor) for _, own in pairs for tensor in own)
    for ties, own in pairs:
        plain = held[id(own[0])] == 1 and not (stepped and is_narrow(own[0].dtype))
        rows = _rows_written_out(ties, own) if plain else None
        if rows is None:
            others.append((ties, own))
            continue
        chunks = _chunks(ties.index_for(own), rows[0].numel())
        if len(chunks) == 1:
            small.append((rows, chunks[0]))
        else:
            calls.extend(_call(_project, [(rows, rows, chunk)], reduction, copies) for chunk in chunks)
    if small:
        calls.append(_call(_project, [(rows, rows, members) for rows, members in small], reduction, copies))
    return calls, others


def gradient_foldings(
    triples: Sequence[tuple[Folding, Tensor, Tensor]], reduction: Reduction, copies: Copies
) -> list[Call]:
    """The calls that write the gradients of shared values, as :func:`~tieopt.numbers.folding.fold_gradients_` does.

    Args:
        triples: foldings that can be written out, and for each a compact tensor to write to, and a gradient.
        reduction: ``"mean"`` or ``"sum"``.
        copies: of the optimizer.
    """
    given = []
    for folding, target, grad in triples:
        (rows,), (compact,) = folding.rows([grad], [target])
        given.append((_static(compact[: folding.groups[0]]), _static(rows), folding.index.members_of_groups))
    return [_call(_mean, given, reduction, copies)] if given else []


def is_written_out(ties: Indices, tensors: Sequence[Tensor]) -> bool:
    """Whether the means of tensors are worth writing out, and can be."""
    return _rows_written_out(ties, tensors) is not None


def _rows_written_out(ties: Indices, tensors: Sequence[Tensor]) -> Tensor | None:
    if not _WRITES_OUT or len(tensors) != 1 or tensors[0].numel() < _LEAST:
        return None
    index = ties.index_for(tensors)
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
    function: Callable[..., None], given: Sequence[tuple[Tensor, Tensor, Tensor]], reduction: Reduction, copies: Copies
) -> Call:
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
