"""The one door to the numbers: operations on the tensors of ties, of whatever kind these are.

Whether tensors are plain or sharded, whether many small ties are worked on as one, and what ``torch.compile`` gets is
decided here. Everything that is compiled for ties is kept here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from tieopt.engine.compacts import Compact, compacts_of, whole_compacts_of
from tieopt.engine.compiled import Work, calls_of_means
from tieopt.engine.graphs import Copies, between_graphs, is_under_compiler, untraced
from tieopt.engine.sharded import Shards, on_any_rank, spans_ranks
from tieopt.numbers.folding import Folding, ViewFolding, fold_gradients_
from tieopt.numbers.index import EVEN_ENTRIES, Index, Layout, Views
from tieopt.numbers.reduction import ONE_PART, Operation, Workspace, drift, project_, projected, tied
from tieopt.numbers.sparse import TiedRows, folded_sparse, projected_sparse
from tieopt.numbers.start import start_from_first_
from tieopt.tensors import gathered, local, shard_of, sharding_of, wide_dtype
from tieopt.ties.options import Reduction
from tieopt.ties.slices import Partition, Totals, joined, sizes_of_groups

P = TypeVar("P", bound=Partition)
Pairs = Sequence[tuple[P, list[Tensor]]]

# Larger ties, of more than ONE_PART entries, are not merged; smaller ones are, up to so many entries.
_TOGETHER = 2**20

# What is not sharded, as can be told without a call.
_PLAIN = (Tensor, Parameter)

# Which ties take part in a step may change. So many selections are remembered; in others no ties are merged.
_SELECTIONS = 32


class Engine:
    """Applies operations to the tensors of ties, with buffers and indices that are kept from call to call.

    It carries nothing else from one call to the next: its copies and pickles are empty.

    Attributes:
        copies: of the functions that ``torch.compile`` gets.
    """

    def __init__(self) -> None:
        self.copies = Copies()
        self._workspace = Workspace()
        self._indices: dict[tuple[Partition, Layout], Index] = {}
        self._shards: dict[tuple[Any, ...], Shards] = {}
        self._compacts: dict[Partition, tuple[Compact, ...]] = {}
        self._foldings: dict[Index | Shards, Folding | ViewFolding] = {}
        self._rows: dict[tuple[Partition, torch.device, bool], TiedRows] = {}
        self._plans: dict[tuple[Any, ...], list[Work]] = {}

    def __reduce__(self) -> tuple[type[Engine], tuple[()]]:
        return Engine, ()

    @between_graphs
    def apply_(
        self, operation: Operation, pairs: Pairs[Partition], compacts: Sequence[Sequence[Tensor]] | None = None
    ) -> None:
        """Apply an operation to tensors, in place.

        Args:
            operation: such as a projection, or a folding.
            pairs: ties and their tensors, all of which are sharded or none, tie by tie.
            compacts: for a folding, the compact tensors of each tie.
        """
        for call in self._untraced_calls(operation, pairs, compacts, compiled=is_under_compiler()):
            call()

    def calls(
        self,
        operation: Operation,
        pairs: Pairs[Partition],
        compacts: Sequence[Sequence[Tensor]] | None = None,
        *,
        compiled: bool,
    ) -> Sequence[Callable[[], None]]:
        """Apply an operation but for what is worth compiling, and return the calls that do the rest.

        Args:
            operation: as for :meth:`apply_`.
            pairs: as for :meth:`apply_`.
            compacts: as for :meth:`apply_`.
            compiled: whether ``torch.compile`` will get the calls.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.calls(operation, pairs, compacts, compiled=compiled)
        plan = self._plan(pairs)
        tensors = list(chain.from_iterable(map(itemgetter(1), pairs)))
        others = list(chain.from_iterable(compacts or ()))
        calls: Sequence[Callable[[], None]] = ()
        if compiled and operation.function in (project_, fold_gradients_):
            calls, plan = calls_of_means(plan, tensors, others, self._folding, operation, self.copies)
        for work in plan:
            # Without a Python call, as a step has to be quick where there is little to do.
            chosen = list(map(tensors.__getitem__, work.numbers))
            if compacts is not None:
                compact = list(map(others.__getitem__, work.numbers))
                if type(work.executor) is Shards:
                    work, chosen, compact = self._on_this_rank(work, chosen, compact)
                folding = self._foldings.get(work.executor) or self._folding(work)
                operation.function(chosen, compact, folding, self._workspace, **operation.options)
            elif type(work.executor) is Shards:
                work.executor.apply_(operation, chosen, self._workspace)
            else:
                operation.function(chosen, work.executor, self._workspace, **operation.options)
        return calls

    _untraced_calls = untraced(calls)

    def whole(self, pairs: Sequence[tuple[P, list[Tensor]]]) -> list[tuple[P, list[Tensor]]]:
        """Return the ties that are of this rank alone, and whose tensors are not sharded."""
        return [(tie, tensors) for tie, tensors in pairs if not spans_ranks(tensors, tie)]

    def groups_span_ranks(self, tie: Partition, tensors: Sequence[Any]) -> bool:
        """Return whether a group of a tie has members on several ranks; of sharded tensors all ranks have to ask."""
        return spans_ranks(tensors) and on_any_rank(self._shards_for(tie, tensors).spans_ranks, tensors[0])

    def is_regular(self, tie: Partition, tensors: Sequence[Tensor]) -> bool:
        """Return whether the members of a tie are views of whole tensors, so that it has no index."""
        if not spans_ranks(tensors, tie):
            return isinstance(self.index_for(tie, tensors), Views)
        shards = self._shards_for(tie, tensors)
        return not shards.spans_ranks and isinstance(shards.index_for(list(map(local, tensors))), Views)

    @torch.no_grad()
    def is_tied(self, pairs: Pairs[Partition]) -> bool:
        """Return whether the members of each group are equal; with scales, multiples of one value."""
        return all(self._answers(Operation(tied), pairs))

    @torch.no_grad()
    def is_tied_here(self, tie: Partition, tensors: list[Tensor]) -> bool:
        """Return whether tensors are tied; of sharded ones, as far as this rank can tell without the others."""
        if not spans_ranks(tensors, tie):
            return self.is_tied([(tie, tensors)])
        shards = self._shards.get((tie, *map(sharding_of, tensors)))
        return shards is None or shards.is_tied_here(tensors, Workspace())

    def members_across(self, tie: Partition, tensors: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return for each group whether a lower rank counts it, and its number of members on all ranks."""
        return self._shards_for(tie, tensors).members_across

    def totals(self, tie: Partition, tensors: Sequence[Any]) -> Totals:
        """Return the counts of a tie whose labels are sharded, over all ranks."""
        return self._shards_for(tie, tensors).totals

    @torch.no_grad()
    def drift(self, pairs: Pairs[Partition]) -> float:
        """Return the largest distance of a member from its group's mean, on any rank; NaN if there is one."""
        answers = [0.0, *self._answers(Operation(drift), pairs)]
        # Unlike Python's, this maximum is NaN if a drift is.
        return float(torch.tensor(answers, dtype=torch.float64, device="cpu").max())

    def _answers(self, question: Operation, pairs: Pairs[Partition]) -> Iterator[Any]:
        # Not in the buffers of the steps: this may be asked in another thread, or after a step was captured.
        workspace = Workspace()
        # Nor is anything merged for it.
        for tie, tensors in pairs:
            executor = self._executor((tie,), tensors)
            if isinstance(executor, Shards):
                yield from executor.answers(question, tensors, workspace)
            else:
                yield question.function(tensors, executor, workspace, **question.options)

    def projected(self, tie: Partition, tensors: Sequence[Tensor], reduction: Reduction = "mean") -> list[Tensor]:
        """Return the projection of tensors, out of place; differentiable where they are not sharded.

        Args:
            tie: of the tensors.
            tensors: dense ones, or a sparse COO tensor that is tied by rows. A tensor that occurs twice has one result,
                twice.
            reduction: ``"mean"`` or ``"sum"``.
        """
        if tensors[0].layout is torch.sparse_coo:
            return [projected_sparse(tensors[0], self._tied_rows(tie, tensors[0]), reduction)]
        if not spans_ranks(tensors, tie):
            index_for, linear = (partial(self.index_for, part) for part in (tie, tie.linear))
            return list(projected(tensors, index_for, reduction, linear))
        with torch.no_grad():
            results = _once(Tensor.clone, tensors)
        self.apply_(Operation(project_, reduction=reduction), [(tie, results)])
        return results

    def start_from_first_(self, tie: Partition, tensors: Sequence[Any], order: Sequence[int]) -> None:
        """Give every group the value of its first member; see :func:`~tieopt.numbers.start.start_from_first_`.

        Of sharded tensors every rank gathers the whole for the time of this call, unless their labels are sharded.
        """
        if tie.across is not None or tie.labels_are_sharded:
            self._shards_for(tie, tensors).start_from_first_(tensors, order)
            return
        sharded = spans_ranks(tensors)
        # A rank outside the mesh has nothing to write, and nothing to send.
        if sharded and tensors[0].device_mesh.get_coordinate() is None:
            return
        # Of tensors that are part of a graph what is written is to be part of it, too.
        with torch.set_grad_enabled(not sharded and any(tensor.grad_fn is not None for tensor in tensors)):
            whole = _once(gathered, tensors)
            start_from_first_(whole, self.index_for(tie, whole), Workspace(), order)
            if sharded:
                for tensor, result in zip(tensors, whole, strict=True):
                    local(tensor).copy_(shard_of(result, tensor))

    def started_from_first(self, tie: Partition, tensors: Sequence[Any], order: Sequence[int]) -> list[Tensor]:
        """As :meth:`start_from_first_`, out of place; a tensor that occurs twice has one result, twice."""
        results = _once(Tensor.clone, tensors)
        self.start_from_first_(tie, results, order)
        return results

    def folded_sparse(
        self, tie: Partition, grad: Tensor, param: Tensor, compact: Tensor, reduction: Reduction
    ) -> Tensor:
        """Return the sparse gradient of a compact tensor; see :func:`~tieopt.numbers.sparse.folded_sparse`."""
        return folded_sparse(grad, compact, self._tied_rows(tie, param, compact=True), reduction)

    def _tied_rows(self, tie: Partition, tensor: Tensor, *, compact: bool = False) -> TiedRows:
        key = tie, tensor.device, compact
        if key not in self._rows:
            rows = self.compacts(tie)[0].rows if compact else None
            self._rows[key] = TiedRows.compile(tie.slices[0], tensor.device, rows)
        return self._rows[key]

    def compacts(self, tie: Partition, tensors: Sequence[Tensor] = ()) -> tuple[Compact, ...]:
        """Return what the compact tensors of a tie are made of; worked out once, of the first tensors that are given.

        Sharded ones have no group with members on several ranks, and all ranks have to ask for them.
        """
        if tie not in self._compacts:
            shards = self._shards_for(tie, tensors) if spans_ranks(tensors) else None
            self._compacts[tie] = compacts_of(tie, tensors, shards)
        return self._compacts[tie]

    def prepare_compacts(self, pairs: Pairs[Partition]) -> None:
        """Work out :meth:`compacts` of many ties, together where their tensors are not sharded."""
        ties = [tie for tie, tensors in pairs if tie not in self._compacts and not spans_ranks(tensors)]
        if ties:
            self._compacts.update(zip(ties, whole_compacts_of(ties), strict=True))
        for tie, tensors in pairs:
            self.compacts(tie, tensors)

    def index_for(self, tie: Partition, tensors: Sequence[Tensor]) -> Index:
        """Return the index of plain tensors; compiled again for those of another layout, or on another device."""
        key = tie, Layout.of(tie.slices, tensors)
        if key not in self._indices:
            index = Views.of(tie.slices, tensors) or Index.compile(tie.slices, tensors, linear=tie.is_linear)
            self._indices[key] = index
        return self._indices[key]

    def prepare(self, pairs: Pairs[Partition], *, folded: bool = False) -> None:
        """Compile what the tensors of ties need, and if they are to be folded that, too: now, and not in a step."""
        plan = self._plan(pairs)
        if folded:
            self.prepare_compacts(pairs)
            for work in plan:
                if type(work.executor) is not Shards:
                    self._folding(work)

    def _plan(self, pairs: Pairs[Partition]) -> list[Work]:
        """Return what is worked on together; planned once for ties and the layouts of their tensors."""
        key: list[Any] = []
        for tie, tensors in pairs:
            key.append(tie)
            for tensor in tensors:
                key += tensor.dtype, tensor.device, tensor.stride()
                if type(tensor) not in _PLAIN:
                    key += type(tensor), sharding_of(tensor)
        plan = self._plans.get(tuple(key))
        if plan is None:
            is_kept = len(self._plans) < _SELECTIONS
            plan = self._new_plan(pairs, merge=is_kept)
            if is_kept:
                self._plans[tuple(key)] = plan
        return plan

    def _new_plan(self, pairs: Pairs[Partition], *, merge: bool) -> list[Work]:
        alike: dict[tuple[Any, ...], list[tuple[Partition, list[Tensor], range]]] = {}
        entries: Counter[tuple[Any, ...]] = Counter()
        count = 0
        kinds = _kinds(pairs) if merge else [()] * len(pairs)
        for (tie, tensors), kind in zip(pairs, kinds, strict=True):
            entries[kind] += tensors[0].numel()
            key = (*kind, entries[kind] // (_TOGETHER - ONE_PART)) if kind else (count,)
            numbers = range(count, count + len(tensors))
            alike.setdefault(key, []).append((tie, tensors, numbers))
            count = numbers.stop
        plan = []
        for (size, *_), several in alike.items():
            ties, tensors_of, numbers_of = zip(*several, strict=True)
            executor = self._executor(ties, list(chain.from_iterable(tensors_of)), even=bool(size))
            plan.append(Work(ties, executor, list(chain.from_iterable(numbers_of))))
        return plan

    def _executor(self, ties: Sequence[Partition], tensors: Sequence[Tensor], *, even: bool = True) -> Index | Shards:
        """Return what applies operations to ties as one; ``even`` is for several, see :meth:`Index.compile`."""
        if len(ties) == 1:
            return (self._shards_for if spans_ranks(tensors, ties[0]) else self.index_for)(ties[0], tensors)
        slices, labels = joined(ties)
        return Index.compile(slices, tensors, labels, even=even, linear=ties[0].is_linear)

    def _folding(self, work: Work) -> Folding | ViewFolding:
        index = cast(Index, work.executor)
        if index not in self._foldings:
            rows = [compact.rows for tie in work.ties for compact in self.compacts(tie)]
            self._foldings[index] = (
                ViewFolding.compile(index, rows[0]) if isinstance(index, Views) else Folding.compile(index, rows)
            )
        return self._foldings[index]

    def _on_this_rank(
        self, work: Work, tensors: Sequence[Tensor], compacts: Sequence[Tensor]
    ) -> tuple[Work, list[Tensor], list[Tensor]]:
        """Return what folding is to a rank: that of its shards, by itself."""
        parts, shards = self.compacts(work.ties[0], tensors), list(map(local, tensors))
        index = cast(Shards, work.executor).index_for(shards)
        return work._replace(executor=index), shards, list(map(Compact.shard, parts, compacts))

    def _shards_for(self, tie: Partition, tensors: Sequence[Any]) -> Shards:
        """The tie as this rank sees it; the first time all ranks have to ask for the same."""
        key = tie, *map(sharding_of, tensors)
        if key not in self._shards:
            self._shards[key] = Shards(tie, tensors)
        return self._shards[key]


def _once(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the results for tensors; for one that occurs twice the same result, twice."""
    results = {id(tensor): function(tensor) for tensor in tensors}
    return [results[id(tensor)] for tensor in tensors]


def _kinds(pairs: Pairs[Partition]) -> list[tuple[Any, ...]]:
    """Return a key for each tie: those with equal keys can be merged; one with an empty key cannot.

    A key begins with the size of all groups, 0 if there are several.
    """
    small = [number for number, (tie, tensors) in enumerate(pairs) if _may_be_merged(tie, tensors)]
    kinds: list[tuple[Any, ...]] = [()] * len(pairs)
    if len(small) > 1:
        sizes = sizes_of_groups([pairs[number][0].slices for number in small])
        for number, size in zip(small, sizes, strict=True):
            tie, (tensor,) = pairs[number]
            if size or tensor.numel() < EVEN_ENTRIES:
                kinds[number] = size, tie.is_linear, tensor.shape[1:], tensor.dtype, tensor.device
    return kinds


def _may_be_merged(tie: Partition, tensors: Sequence[Tensor]) -> bool:
    """Return whether a tie can be worked on together with others, as far as that does not depend on its groups."""
    tensor = tensors[0]
    if not tie.is_of_rows or not 0 < tensor.numel() <= ONE_PART or spans_ranks([tensor], tie):
        return False
    # Sums that are as wide as their terms are scaled by the largest group of a run, and round by that.
    if not tensor.is_contiguous() or tensor.dtype.to_real() == wide_dtype(tensor.device):
        return False
    scale = tie.slices[0].scale
    # Multiples that are rounded have a run take another way, and all groups in it; so have offsets.
    return scale is None or bool(((scale == 0) | (scale.abs() == 1)).all())
