"""What ``torch.compile`` sees: the same numbers, written so that inductor makes one pass over the memory of them.

Where all groups of a tie have one small size, a group is a sum of as many loads, written out: the kernel that comes of
it reads every member once and is vectorised along the slices. It runs over a few chunks, because what is written
back right away is still in the caches. Everything else is one operation that runs eagerly within the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from tieopt.folding import fold_, fold_gradients_, folding_for, unfold_
from tieopt.index import Index, Indices, Run
from tieopt.reduction import Reduction, Workspace, divide_, is_narrow, means_for, project_, relax_, rounded

Function = TypeVar("Function", bound=Callable[..., Any])


def between_graphs(function: Function) -> Function:
    """A function that ``torch.compile`` leaves alone, but not what it calls; graphs end where it is called."""
    return cast(Function, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]


def untraced(function: Function) -> Function:
    """A function that ``torch.compile`` leaves alone, with all that it calls."""
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# Sums of more are not written out: it takes too long to compile them.
_WRITTEN_OUT = 64

# The inductor of torch 2.6 was seen to leave members of a group unequal; that of 2.13 was not.
_WRITES_OUT = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 13)

# Entries that are read and written back before the next ones, and into how many chunks they are cut at most.
_CHUNK = 2**20
_CHUNKS = 8


@torch.no_grad()
def project_traced_(
    ties: Indices, tensors: Sequence[Tensor], reduction: Reduction = "mean", *, stepped: bool = False
) -> None:
    """As :func:`~tieopt.reduction.project_`; ``stepped`` as for :meth:`~tieopt.batches.Batches.project_`."""
    index = ties.index_for(tensors)
    if not _is_written_out(index) or (stepped and is_narrow(tensors[0].dtype)):
        torch.ops.tieopt.project_(list(tensors), ties.number, reduction == "sum", stepped)
        return
    (rows,) = index.rows(tensors)
    for runs in _chunks(index.runs, rows[0].numel()):
        members = _positions(runs)
        rows[members] = _values(rows, members, reduction).unsqueeze(1)


def divide_traced_(ties: Indices, tensors: Sequence[Tensor]) -> None:
    """As :func:`~tieopt.reduction.divide_`."""
    torch.ops.tieopt.divide_(list(tensors), ties.number)


def relax_traced_(ties: Indices, tensors: Sequence[Tensor], strength: float, *, stepped: bool = False) -> None:
    """As :func:`~tieopt.reduction.relax_`; ``stepped`` as for :meth:`~tieopt.batches.Batches.project_`."""
    torch.ops.tieopt.relax_(list(tensors), ties.number, strength, stepped)


@torch.no_grad()
def fold_traced_(ties: Indices, compacts: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """As :func:`~tieopt.folding.fold_`."""
    folding = folding_for(ties, params)
    if any(scales is not None for scales in folding.scales):
        torch.ops.tieopt.fold_(list(compacts), list(params), ties.number)
        return
    rows, compact_rows = folding.rows(params, compacts)
    for own, kept, compact in zip(rows, folding.kept, compact_rows, strict=True):
        compact.copy_(own.index_select(0, kept))


@torch.no_grad()
def fold_gradients_traced_(
    ties: Indices, targets: Sequence[Tensor], grads: Sequence[Tensor], reduction: Reduction
) -> None:
    """As :func:`~tieopt.folding.fold_gradients_`."""
    folding = folding_for(ties, grads)
    if not _is_written_out(folding.index):
        torch.ops.tieopt.fold_gradients_(list(targets), list(grads), ties.number, reduction == "sum")
        return
    (rows,), (compact,) = folding.rows(grads, targets)
    groups, kept = folding.groups[0], folding.kept[0]
    values = _values(rows, _positions(folding.index.runs), reduction)
    if groups == len(kept):
        compact.copy_(values)
        return
    # Written to slices, values would be stored twice: inductor takes these for a choice in each entry of the whole.
    places = torch.arange(len(kept), device=kept.device)
    compact[places[:groups]] = values
    compact[places[groups:]] = rows.index_select(0, kept[groups:])


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
    # One load after the other: a sum over a dimension begins with 0.0, which turns -0.0 into 0.0.
    first, *others = members.unbind(1)
    total = rows[first].to(torch.float64)
    for each in others:
        total = total + rows[each].to(torch.float64)
    values = rounded(total / members.shape[1], rows.dtype)
    return rounded(values.to(torch.float64) * members.shape[1], rows.dtype) if reduction == "sum" else values


# --- operations that run eagerly within a graph ---


class _Kept(threading.local):
    """What operations keep from call to call; each thread has its own, as optimizers may step in several."""

    def __init__(self) -> None:
        self.workspace = Workspace()


_kept = _Kept()


def _operation(schema: str, *written: str) -> Callable[[Callable[..., None]], None]:
    """Registers a function as an operation of which the compiler knows what it writes to."""
    name, _, arguments = schema.partition("(")

    def register(function: Callable[..., None]) -> None:
        operation = torch.library.custom_op(f"tieopt::{name}", function, mutates_args=written, schema=f"({arguments}")
        operation.register_fake(lambda *_: None)

    return register


@_operation("project_(Tensor(a!)[] tensors, int number, bool sum, bool stepped) -> ()", "tensors")
def _project(tensors: list[Tensor], number: int, sum: bool, stepped: bool) -> None:  # noqa: A002
    ties = Indices.by_number[number]
    project_(tensors, ties.index_for(tensors), _kept.workspace, "sum" if sum else "mean", means_for(stepped))


@_operation("divide_(Tensor(a!)[] tensors, int number) -> ()", "tensors")
def _divide(tensors: list[Tensor], number: int) -> None:
    ties = Indices.by_number[number]
    divide_(tensors, ties.index_for(tensors), _kept.workspace)


@_operation("relax_(Tensor(a!)[] tensors, int number, float strength, bool stepped) -> ()", "tensors")
def _relax(tensors: list[Tensor], number: int, strength: float, stepped: bool) -> None:
    ties = Indices.by_number[number]
    relax_(tensors, ties.index_for(tensors), _kept.workspace, strength, means_for(stepped))


@_operation("fold_(Tensor(a!)[] compacts, Tensor[] params, int number) -> ()", "compacts")
def _fold(compacts: list[Tensor], params: list[Tensor], number: int) -> None:
    ties = Indices.by_number[number]
    fold_(compacts, params, folding_for(ties, params))


@_operation("fold_gradients_(Tensor(a!)[] targets, Tensor[] grads, int number, bool sum) -> ()", "targets")
def _fold_gradients(targets: list[Tensor], grads: list[Tensor], number: int, sum: bool) -> None:  # noqa: A002
    ties = Indices.by_number[number]
    fold_gradients_(targets, grads, folding_for(ties, grads), _kept.workspace, "sum" if sum else "mean")


@_operation("unfold_(Tensor(a!)[] params, Tensor[] compacts, int number) -> ()", "params")
def _unfold(params: list[Tensor], compacts: list[Tensor], number: int) -> None:
    ties = Indices.by_number[number]
    unfold_(params, compacts, folding_for(ties, params), _kept.workspace)
