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
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.engine.graphs import Copies, static
from tieopt.engine.sharded import Shards
from tieopt.numbers.folding import Folding, ViewFolding, fold_free_gradients_
from tieopt.numbers.index import Index
from tieopt.numbers.reduction import Operation, is_narrow
from tieopt.numbers.rounding import rounded
from tieopt.tensors import overlaps
from tieopt.ties.slices import Partition

# Tensors of fewer entries are not worth a call of what was compiled.
_LEAST = 2**19

# Sums of more are not written out: it takes too long to compile them.
_WRITTEN_OUT = 64

# Entries that are read and written back before the next ones, and into how many chunks they are cut at most.
_CHUNK = 2**20
_CHUNKS = 8


class Work(NamedTuple):
    """Ties that are worked on as one.

    Attributes:
        ties: one, or several that were merged.
        executor: what applies operations to them: their index, or their shards.
        numbers: of their tensors, among those of all ties that were given.
    """

    ties: tuple[Partition, ...]
    executor: Index | Shards
    numbers: list[int]


def calls_of_means(
    plan: Sequence[Work],
    tensors: Sequence[Tensor],
    compacts: Sequence[Tensor],
    folding_of: Callable[[Work], Folding | ViewFolding],
    operation: Operation,
    copies: Copies,
) -> tuple[list[Callable[[], None]], list[Work]]:
    """Return the calls that write the means that can be written out, and the rest of the plan.

    Means that depend on whether a step has just written the weights are not written out. Of gradients that are folded
    the free slices are written here.

    Args:
        plan: what is worked on together.
        tensors: of all of it.
        compacts: where the means of gradients are written to, one for each; none where they are written to the members.
        folding_of: returns the folding of the gradients of a part of the plan.
        operation: a projection, or :func:`~tieopt.numbers.folding.fold_gradients_`.
        copies: of the optimizer.
    """
    # Of small ties together, and then of each chunk of a large one.
    arguments: list[list[tuple[Tensor, ...]]] = [[]]
    others = []
    count = Counter(map(id, tensors))
    for work in plan:
        chosen = [tensors[number] for number in work.numbers]
        plain = count[id(chosen[0])] == 1 and not (operation.stepped and is_narrow(chosen[0].dtype))
        means = _written_out(work, chosen) if plain else None
        if means is None:
            others.append(work)
            continue
        rows, members = means
        if compacts:
            targets, folding = [compacts[number] for number in work.numbers], folding_of(work)
            assert isinstance(folding, Folding)
            fold_free_gradients_(chosen, targets, folding)
            _, (compact,) = folding.rows(chosen, targets)
            arguments[0].append((rows, members, static(compact[: folding.groups[0]])))
            continue
        chunks = _chunks(members, rows[0].numel())
        if len(chunks) == 1:
            arguments[0].append((rows, chunks[0]))
        else:
            arguments.extend([(rows, chunk)] for chunk in chunks)
    function = _mean if compacts else _project
    return [_call(function, columns, operation, copies) for columns in arguments if columns], others


def _written_out(work: Work, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the rows of a tensor and the members of its groups, if their means are worth writing out, and can be."""
    index = work.executor
    if type(index) is not Index or len(tensors) != 1 or tensors[0].numel() < _LEAST:
        return None
    sizes = {run.chunks[0].size for run in index.runs}
    if (
        index.slices[0].scale is not None
        or not all(run.signed for run in index.runs)
        or len(sizes) != 1
        or not 0 < min(sizes) <= _WRITTEN_OUT
        or index.layout.double
        or index.layout.device.type == "mps"
    ):
        return None
    (rows,) = index.rows(tensors)
    # Slices between others may be rows that share entries. The compiler reads them before it writes to any.
    return None if overlaps(rows) else (static(rows), index.members_of_groups)


def _chunks(members: Tensor, slice_entries: int) -> Sequence[Tensor]:
    """Return members of whole groups that are worked on together, in chunks of one shape but for the last."""
    most = max(min(members.numel() * slice_entries // _CHUNK, _CHUNKS, len(members)), 1)
    even = (count for count in range(most, most // 2, -1) if len(members) % count == 0)
    return [static(chunk) for chunk in torch.split(members, len(members) // next(even, most))]


def _call(
    function: Callable[..., None], tensors: Sequence[tuple[Tensor, ...]], operation: Operation, copies: Copies
) -> Callable[[], None]:
    reduction = operation.options.get("reduction", "mean")
    columns = [list(column) for column in zip(*tensors, strict=True)]
    shapes = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in chain(*columns)]
    return partial(copies.of(function, reduction, *shapes), *columns, reduction == "sum")


# --- what is compiled ---


def _project(rows: list[Tensor], members: list[Tensor], to_sum: bool) -> None:
    for slices, group_members in zip(rows, members, strict=True):
        slices[group_members] = _values(slices, group_members, to_sum).unsqueeze(1)


def _mean(rows: list[Tensor], members: list[Tensor], targets: list[Tensor], to_sum: bool) -> None:
    for slices, group_members, target in zip(rows, members, targets, strict=True):
        target.copy_(_values(slices, group_members, to_sum))


def _values(rows: Tensor, members: Tensor, to_sum: bool) -> Tensor:
    """Return means, or what they are multiplied to; added up in float64, where the sum of equal members is exact."""
    # One load after the other: a sum over a dimension begins with 0.0, which turns -0.0 into 0.0.
    first, *others = members.unbind(1)
    total = rows[first].to(torch.float64)
    for other in others:
        total = total + rows[other].to(torch.float64)
    values = rounded(total / members.shape[1], rows.dtype)
    return rounded(values.to(torch.float64) * members.shape[1], rows.dtype) if to_sum else values
