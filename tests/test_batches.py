"""Small ties that are worked on together: every one has the bits that it has by itself."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
from checks import pickled, randn, same_tree
from hypothesis import given
from hypothesis import strategies as st
from reference import same_bits
from strategies import ALL, generator, labels, normal, reductions, seeds
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from tieopt import Tie, TiedOptimizer
from tieopt.engine import engine as engine_module
from tieopt.engine.engine import Engine
from tieopt.numbers import index as index_module
from tieopt.numbers.reduction import Operation, Workspace, divide_, project_
from tieopt.testing import scales
from tieopt.ties.offsets import Offset
from tieopt.ties.options import Reduction
from tieopt.ties.places import BoundTie, Place
from tieopt.ties.slices import (
    FREE,
    Partition,
    Slices,
    all_numbered,
    flat_labels,
    flat_scales,
    is_idle,
    joined,
    numbered,
    sizes_of_groups,
    told_apart,
)

Pairs = list[tuple[BoundTie, list[Tensor]]]


def _pair(
    number: int, names: Tensor, scale: Tensor | None, tensor: Tensor, offset: Tensor | None = None
) -> tuple[BoundTie, list[Tensor]]:
    entries = None if offset is None else Offset.of_entries(offset.expand(tensor.shape), names, 0)
    return BoundTie([Place(0, number, tensor.shape)], [Slices(names, scale, 0, entries)]), [tensor]


def _copied(pairs: Pairs) -> Pairs:
    return [(tie, [tensor.clone() for tensor in tensors]) for tie, tensors in pairs]


def _together(engine: Engine, pairs: Pairs, reduction: Reduction = "mean") -> None:
    engine.apply_(Operation(project_, reduction=reduction), pairs)


def _one_by_one(pairs: Pairs, reduction: Reduction) -> None:
    for tie, tensors in pairs:
        project_(tensors, Engine().index_for(tie, tensors), Workspace(), reduction)


def _merged(pairs: Pairs) -> list[list[Tensor]]:
    """The tensors that are worked on together."""
    tensors = [tensor for _, own in pairs for tensor in own]
    return [[tensors[number] for number in work.numbers] for work in Engine()._plan(pairs)]


def _same(first: Pairs, second: Pairs) -> bool:
    return all(same_bits(*one[1], *other[1]) for one, other in zip(first, second, strict=True))


@contextmanager
def _even_entries(count: int) -> Iterator[None]:
    """So many entries of groups of one size are enough to be worked on together."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (engine_module, index_module):
            patch.setattr(module, "EVEN_ENTRIES", count)
        yield


@st.composite
def pairs(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = ALL) -> Pairs:
    """Ties of a few parameters of rows that are mostly of one length, and the tensors."""
    dtype = draw(st.sampled_from(list(dtypes)))
    drawn = []
    for number in range(draw(st.integers(2, 5))):
        count, width = draw(st.integers(1, 24)), draw(st.sampled_from([3, 20, 20, 20]))
        names = torch.arange(count) // draw(st.integers(2, 6)) if draw(st.booleans()) else draw(labels(count))
        scale = draw(scales((count,), ["none", "none", "signs", "zeros", "any"]))
        tensor = normal((count, width), dtype, draw(seeds))
        offset = draw(st.none() | st.sampled_from([normal((count, 1), torch.float32, number), torch.tensor(0.5)]))
        drawn.append(_pair(number, names, scale, tensor, offset))
    return drawn


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(enough=st.sampled_from([100, 300, 2**15]), data=st.data())
def test_ties_have_the_bits_together_that_they_have_one_by_one(
    dtype: torch.dtype, enough: int, data: st.DataObject
) -> None:
    drawn, reduction = data.draw(pairs([dtype])), data.draw(reductions)
    together, alone = _copied(drawn), _copied(drawn)
    engine = Engine()
    with _even_entries(enough):
        _together(engine, together, reduction)
        _one_by_one(alone, reduction)
        assert _same(together, alone)

        engine.apply_(Operation(divide_), together)
        for tie, tensors in alone:
            divide_(tensors, engine.index_for(tie, tensors), Workspace())
        assert _same(together, alone)


@pytest.mark.parametrize("pinned", [False, True])
@given(seed=seeds)
def test_groups_that_are_many_of_one_size_only_together_have_the_same_bits(pinned: bool, seed: int) -> None:
    """By themselves they are too few to be worked on as a matrix, beside one of another size."""
    names = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, *([2] * pinned)])
    scale = torch.tensor([1.0] * 11 + [0.0]).double() if pinned else None
    drawn = [_pair(number, names, scale, normal((len(names), 20), torch.float32, seed + number)) for number in range(8)]
    together, alone = _copied(drawn), _copied(drawn)
    with _even_entries(300):
        _together(Engine(), together)
        _one_by_one(alone, "mean")
    assert _same(together, alone)


@given(size=st.integers(2, 9), others=st.integers(2, 9), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_equal_rows_of_several_parameters_are_merged_by_the_size_of_their_groups(
    size: int, others: int, dtype: torch.dtype
) -> None:
    sizes = [size, size, others, others, 0, 0]
    listed = []
    for number, each in enumerate(sizes):
        names = torch.arange(12) // each if each else torch.tensor([0, 0, 1, 1, 1])
        names = names[: len(names) - len(names) % each] if each else names
        listed.append(_pair(number, names, None, randn(len(names), 20, seed=number, dtype=dtype)))
    counts = [len(tensors) for tensors in _merged(listed)]
    # What is as wide as its sums would round by the groups of the others.
    merged_as = [4, 2] if size == others else [2, 2, 2]
    assert counts == ([1] * 6 if dtype == torch.float64 else merged_as)


def test_what_is_not_alike_is_not_merged() -> None:
    names = torch.tensor([0, 0, 1, 1])
    first = _pair(0, names, None, randn(4, 20))
    others = {
        "longer rows": _pair(1, names, None, randn(4, 21)),
        "another dtype": _pair(1, names, None, randn(4, 20).double()),
        "multiples": _pair(1, names, torch.tensor([1.0, 2.0, 1.0, 1.0]).double(), randn(4, 20)),
        "not in the order of memory": _pair(1, names, None, randn(20, 4).t()),
        "large": _pair(1, torch.arange(8000) // 2, None, randn(8000, 20)),
        "columns": (BoundTie([Place(0, 1, torch.Size([20, 4]))], [Slices(names, dim=1)]), [randn(20, 4)]),
    }
    for what, other in others.items():
        assert len(_merged([first, other])) == 2, what
    assert len(_merged([first, _pair(1, names, None, randn(4, 20))])) == 1


def test_many_ties_are_merged_into_batches_that_are_kept_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether elements are added up where they lie depends on how many shared values there are."""
    monkeypatch.setattr(engine_module, "_TOGETHER", 150)
    monkeypatch.setattr(engine_module, "ONE_PART", 50)
    listed = [_pair(number, torch.arange(10) // 2, None, randn(10, 3, seed=number)) for number in range(12)]
    batches = _merged(listed)
    assert 1 < len(batches) < len(listed)
    assert all(sum(tensor.numel() for tensor in tensors) <= 150 for tensors in batches)
    merged = [tensor for tensors in batches for tensor in tensors]
    assert all(one is other for one, (_, [other]) in zip(merged, listed, strict=True))


@pytest.mark.parametrize("selections", [0, 2, engine_module._SELECTIONS])
@given(drawn=pairs([torch.float32, torch.float64, torch.bfloat16]), steps=st.lists(seeds, min_size=12, max_size=20))
def test_a_selection_of_ties_that_changes_from_step_to_step_has_the_same_bits(
    selections: int, drawn: Pairs, steps: list[int]
) -> None:
    engine = Engine()
    for step in steps:
        chosen = torch.rand(len(drawn), generator=generator(step)) < 0.6
        some = [pair for pair, one in zip(drawn, chosen.tolist(), strict=True) if one]
        some = [(tie, [normal(tensor.shape, tensor.dtype, step) for tensor in tensors]) for tie, tensors in some]
        together, alone = _copied(some), _copied(some)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "_SELECTIONS", selections)
            _together(engine, together)
        _one_by_one(alone, "mean")
        assert _same(together, alone)
    assert len(engine._plans) <= selections


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
@given(seed=seeds, count=st.integers(10, 14), reduction=reductions)
def test_training_goes_on_after_a_checkpoint_whichever_gradients_there_were(
    compact: bool, seed: int, count: int, reduction: Reduction
) -> None:
    """Bit for bit, though the one that was loaded knows nothing of earlier selections."""
    source = generator(seed)
    sizes = [2, 4, 3, 6]
    params = [Parameter(torch.randn(12, 20, generator=source)) for _ in sizes]
    ties = [Tie(param, torch.arange(12) // size) for param, size in zip(params, sizes, strict=True)]
    ties[2] = Tie(params[2], torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, -1, -1, 3]))
    optimizer = TiedOptimizer(AdamW(params), ties, reduction=reduction, compact=compact)

    def step(some: Sequence[Parameter], tied: TiedOptimizer, number: int) -> None:
        present = (torch.rand(len(some), generator=generator(seed + number)) < 0.6).tolist()
        for place, (param, one) in enumerate(zip(some, present, strict=True)):
            param.grad = randn(12, 20, seed=100 * number + place) if one else None
        tied.step()

    for number in range(count):
        step(params, optimizer, number)
    others = [Parameter(param.detach().clone()) for param in params]
    again = [Tie(param, tie.parts[0].groups) for param, tie in zip(others, ties, strict=True)]
    loaded = TiedOptimizer(AdamW(others), again, reduction=reduction, compact=compact)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(count, 2 * count):
        step(params, optimizer, number)
        step(others, loaded, number)
    assert all(map(same_bits, others, params))
    assert same_tree(loaded.state_dict(), optimizer.state_dict())


@given(seed=seeds, reduction=reductions)
def test_several_ties_of_one_parameter_are_merged_as_well(seed: int, reduction: Reduction) -> None:
    start = normal((9, 20), torch.float32, seed)
    names = [torch.tensor([0, 0, -1, -1, 1, 1, -1, -1, -1]), torch.tensor([-1, -1, 0, 0, -1, -1, 1, 1, -1])]
    ties = [BoundTie([Place(0, 0, start.shape)], [Slices(one)]) for one in names]
    together, alone = start.clone(), start.clone()
    listed = [(tie, [together]) for tie in ties]
    assert len(_merged(listed)) == 1
    _together(Engine(), listed, reduction)
    _one_by_one([(tie, [alone]) for tie in ties], reduction)
    assert same_bits(together, alone)


@st.composite
def _some_ties(draw: st.DrawFn) -> list[list[Slices]]:
    """Ties of small and of large labels, too large for those of several ties to be told apart by adding to them."""

    def slices(factor: int) -> Slices:
        names = torch.tensor(draw(st.lists(st.integers(-1, 3), max_size=8)), dtype=torch.int64)
        scale = draw(st.sampled_from([None, 1.0, -1.0, 0.0, 2.0]))
        scales = None if scale is None else torch.full(names.shape, scale, dtype=torch.float64)
        return Slices(torch.where(names == FREE, FREE, names * factor), scales)

    factors = draw(st.lists(st.sampled_from([2**61, 1000, 1]), min_size=1, max_size=5))
    return [[slices(factor) for _ in range(draw(st.integers(1, 2)))] for factor in factors]


@given(_some_ties())
def test_what_is_said_of_many_ties_at_once_is_what_is_said_of_each(ties: list[list[Slices]]) -> None:
    several = all_numbered(ties)
    for slices, alone in zip(several, map(numbered, ties), strict=True):
        assert [part.labels.tolist() for part in slices] == [part.labels.tolist() for part in alone]
    idle, sizes = [], []
    for slices in several:
        labels, scale = flat_labels(slices), flat_scales(slices)
        members = Counter(labels[labels != FREE].tolist())
        idle.append({*members.values()} == {1} and bool((scale[labels != FREE].abs() == 1).all()))
        shared = {size for size in Counter(labels[(labels != FREE) & (scale != 0)].tolist()).values() if size > 1}
        sizes.append(shared.pop() if len(shared) == 1 else 0)
    assert list(map(is_idle, several)) == idle
    assert sizes_of_groups(several) == sizes


@given(_some_ties())
def test_told_apart_labels_say_the_same_and_no_two_ties_share_one(ties: list[list[Slices]]) -> None:
    several = all_numbered(ties)
    apart = told_apart(several)
    for slices, alone in zip(apart, several, strict=True):
        assert [part.labels.tolist() for part in numbered(slices)] == [part.labels.tolist() for part in alone]
    used = [{label for part in slices for label in part.labels.tolist()} - {FREE} for slices in apart]
    assert sum(map(len, used)) == len(set().union(*used))
    _, labels = joined([Partition(slices) for slices in several])
    assert labels is None or torch.equal(labels, flat_labels([*chain.from_iterable(apart)]))


def test_labels_that_are_numbered_together_are_kept_alone() -> None:
    """A pickle has all that is in memory behind a view, once for each of them."""
    ties = [[Slices(torch.tensor([2, 2, 0, 1]))] for _ in range(3)]
    for part in chain(*all_numbered(ties), *told_apart(ties), numbered([*chain(*ties)])):
        assert part.labels.untyped_storage().nbytes() == part.labels.nbytes


def test_the_compact_rows_of_merged_ties_are_copied_from_their_own_compact_tensors() -> None:
    """Otherwise they would be written in a slower way."""
    params = [Parameter(randn(4, 20, seed=seed)) for seed in range(3)]
    optimizer = TiedOptimizer(SGD(params), {param: [[0, 1]] for param in params}, compact=True)
    engine = optimizer._tieopt.engine
    (folding,) = engine._foldings.values()
    assert [rows.tolist() for rows, _ in folding.sources] == [[0, 0, 1, 2]] * 3
    assert [compact.rows.first for compacts in engine._compacts.values() for compact in compacts] == [0, 0, 0]


def test_the_groups_of_merged_ties_stay_apart() -> None:
    names = [torch.tensor([0, 0, -1]), torch.tensor([1, -1, 1, 0, 0])]
    listed = [_pair(number, one, None, randn(len(one), 2)) for number, one in enumerate(names)]
    apart = told_apart([tie.slices[0]] for tie, _ in listed)
    assert [each.labels.tolist() for (each,) in apart] == [[0, 0, -1], [1, -1, 1, 2, 2]]
    # Of labels that are told apart nothing stays.
    (work,) = Engine()._plan(listed)
    for (tie, _), kept in zip(listed, work.executor.slices, strict=True):
        assert kept.labels is tie.slices[0].labels


def test_copies_and_pickles_know_nothing_of_what_was_merged() -> None:
    params = [Parameter(randn(4, 20, seed=seed)) for seed in range(3)]
    optimizer = TiedOptimizer(SGD(params), {param: [[0, 1], [2, 3]] for param in params})
    engine = optimizer._tieopt.engine
    assert any(len(work.ties) == 3 for plan in engine._plans.values() for work in plan)
    for other in (pickled(engine), copy.deepcopy(engine)):
        assert not any(vars(other)[name] for name in ("_indices", "_compacts", "_foldings", "_plans"))
        assert not other._workspace._buffers
