"""What ``torch.compile`` sees: the same numbers, written so that inductor makes one pass over the memory of them.

Where all groups of a tie have one small size, a group is a sum of as many loads, written out: the kernel that comes of
it reads every member once and is vectorised along the slices. It runs over a few chunks, because what is written
back right away is still in the caches. Everything else is one operation that runs eagerly within the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tieopt.folding import Folding, fold_, fold_gradients_, folding_for, unfold_
from tieopt.index import Index, Indices, Run
from tieopt.reduction import Reduction, Workspace, divide_, project_, relax_

# Sums of more are not written out: it takes too long to compile them.
_WRITTEN_OUT = 64

# The inductor of torch 2.6 was seen to leave members of a group unequal; that of 2.13 was not.
_WRITES_OUT = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 13)

# Loads that stand in one expression; inductor writes out sums that are shorter than eight.
_LOADS = 7

# Entries that are read and written back before the next ones, and into how many chunks they are cut at most.
_CHUNK = 2**20
_CHUNKS = 8


@torch.no_grad()
def project_traced_(ties: Indices, tensors: Sequence[Tensor], reduction: Reduction = "mean") -> None:
    """As :func:`~tieopt.reduction.project_`."""
    index = ties.index_for(tensors)
    if not _is_written_out(index):
        torch.ops.tieopt.project_(list(tensors), ties.number, reduction == "sum")
        return
    (rows,) = index.rows(tensors)
    for runs in _chunks(index.runs, rows[0].numel()):
        members = _positions(runs)
        rows[members] = _values(rows, members, reduction).unsqueeze(1)


def divide_traced_(ties: Indices, tensors: Sequence[Tensor]) -> None:
    """As :func:`~tieopt.reduction.divide_`."""
    torch.ops.tieopt.divide_(list(tensors), ties.number)


def relax_traced_(ties: Indices, tensors: Sequence[Tensor], strength: float) -> None:
    """As :func:`~tieopt.reduction.relax_`."""
    torch.ops.tieopt.relax_(list(tensors), ties.number, strength)


@torch.no_grad()
def fold_traced_(
    ties: Indices,
    compacts: Sequence[Tensor],
    params: Sequence[Tensor],
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    reduction: Reduction,
) -> None:
    """As :func:`~tieopt.folding.fold_` of the means of the members, and :func:`~tieopt.folding.fold_gradients_`."""
    both = folding_for(ties, params), folding_for(ties, grads)
    if not all(_is_written_out(folding.index) for folding in both):
        tensors = [list(each) for each in (params, compacts, targets, grads)]
        torch.ops.tieopt.fold_(*tensors, ties.number, reduction == "sum")
        return
    _fold_written_out(both[0], params, compacts, "mean")
    _fold_written_out(both[1], grads, targets, reduction)


def _fold_written_out(
    folding: Folding, tensors: Sequence[Tensor], compacts: Sequence[Tensor], reduction: Reduction
) -> None:
    members, free = _positions(folding.index.runs), folding.kept[0][folding.groups[0] :]
    (rows,), (compact,) = folding.rows(tensors, compacts)
    values = _values(rows, members, reduction)
    compact.copy_(torch.cat([values, rows.index_select(0, free)]) if len(free) else values)


@torch.no_grad()
def unfold_traced_(ties: Indices, params: Sequence[Tensor], compacts: Sequence[Tensor]) -> None:
    """As :func:`~tieopt.folding.unfold_`."""
    folding = folding_for(ties, params)
    if folding.places is None or folding.index.pinned:
        torch.ops.tieopt.unfold_(list(params), list(compacts), ties.number)
        return
    rows, compact_rows = folding.rows(params, compacts)
    for own, places, compact in zip(rows, folding.places, compact_rows, strict=True):
        own.copy_(compact.index_select(0, places))


def _is_written_out(index: Index) -> bool:
    sizes = {run.rounds[0].size for run in index.runs}
    return (
        _WRITES_OUT
        and len(index.slices) == 1
        and index.slices[0].scale is None
        and len(sizes) == 1
        and 0 < min(sizes) <= _WRITTEN_OUT
        and not index.layout.double
        and index.layout.device.type != "mps"
    )


def _chunks(runs: Sequence[Run], slice_entries: int) -> Iterator[Sequence[Run]]:
    """Runs that are worked on together."""
    entries = sum([len(run.rounds[0].slots) for run in runs]) * slice_entries
    count = min(max(entries // _CHUNK, 1), _CHUNKS, len(runs))
    for chunk in range(count):
        yield runs[chunk * len(runs) // count : (chunk + 1) * len(runs) // count]


def _positions(runs: Sequence[Run]) -> Tensor:
    """The members of whole groups of one size, int64, shape ``[g, size]``."""
    size, device = runs[0].rounds[0].size, runs[0].norms.device
    pieces = [run.rounds[0].pieces[0].members for run in runs]
    columns = [torch.arange(own.start, own.stop, device=device) if isinstance(own, slice) else own for own in pieces]
    return torch.cat([own.view(-1, size) for own in columns])


def _values(rows: Tensor, members: Tensor, reduction: Reduction) -> Tensor:
    """Means, or what they are multiplied to; added up in float64, where the sum of equal members is exact."""
    size = members.shape[1]
    parts = [rows[members[:, first : first + _LOADS]].to(torch.float64).sum(1) for first in range(0, size, _LOADS)]
    mean = sum(parts[1:], parts[0]) / size
    # Sums begin with 0.0, which turns -0.0 into 0.0.
    lead = rows[members[:, 0]]
    values = torch.where((mean == 0) & (lead == 0), lead, mean.to(rows.dtype))
    return (values.to(torch.float64) * size).to(rows.dtype) if reduction == "sum" else values


# --- operations that run eagerly within a graph ---

_workspace = Workspace()


def _operation(schema: str, *written: str) -> Callable[[Callable[..., None]], None]:
    """Registers a function as an operation of which the compiler knows what it writes to."""
    name, _, arguments = schema.partition("(")

    def register(function: Callable[..., None]) -> None:
        operation = torch.library.custom_op(f"tieopt::{name}", function, mutates_args=written, schema=f"({arguments}")
        operation.register_fake(lambda *_: None)

    return register


@_operation("project_(Tensor(a!)[] tensors, int number, bool sum) -> ()", "tensors")
def _project(tensors: list[Tensor], number: int, sum: bool) -> None:  # noqa: A002
    ties = Indices.by_number[number]
    project_(tensors, ties.index_for(tensors), _workspace, "sum" if sum else "mean")


@_operation("divide_(Tensor(a!)[] tensors, int number) -> ()", "tensors")
def _divide(tensors: list[Tensor], number: int) -> None:
    ties = Indices.by_number[number]
    divide_(tensors, ties.index_for(tensors), _workspace)


@_operation("relax_(Tensor(a!)[] tensors, int number, float strength) -> ()", "tensors")
def _relax(tensors: list[Tensor], number: int, strength: float) -> None:
    ties = Indices.by_number[number]
    relax_(tensors, ties.index_for(tensors), _workspace, strength)


@_operation(
    "fold_(Tensor(a!)[] params, Tensor(b!)[] compacts, Tensor(c!)[] targets, Tensor[] grads, int number, bool sum)"
    " -> ()",
    "params",
    "compacts",
    "targets",
)
def _fold(
    params: list[Tensor],
    compacts: list[Tensor],
    targets: list[Tensor],
    grads: list[Tensor],
    number: int,
    sum: bool,  # noqa: A002
) -> None:
    ties = Indices.by_number[number]
    project_(params, ties.index_for(params), _workspace)
    fold_(compacts, params, folding_for(ties, params))
    fold_gradients_(targets, grads, folding_for(ties, grads), _workspace, "sum" if sum else "mean")


@_operation("unfold_(Tensor(a!)[] params, Tensor[] compacts, int number) -> ()", "params")
def _unfold(params: list[Tensor], compacts: list[Tensor], number: int) -> None:
    ties = Indices.by_number[number]
    unfold_(params, compacts, folding_for(ties, params), _workspace)
