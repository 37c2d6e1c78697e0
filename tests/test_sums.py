"""Sums as accelerators add them up, on the CPU: tied, accurate, in one order, and without waiting for a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerators import as_on_accelerators
from checks import check_means, times_signs
from hypothesis import given
from hypothesis import strategies as st
from reference import all_tied, same_bits
from strategies import ALL, generator, normal, reductions, seeds, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tieopt.numbers import index as index_module
from tieopt.numbers.folding import Folding, compact_like, compact_rows_of, fold_, fold_gradients_, unfold_
from tieopt.numbers.index import Index
from tieopt.numbers.reduction import Workspace, add_by_group_, project_, relax_, tied
from tieopt.numbers.sums import Sums
from tieopt.ties.slices import Slices, numbered

CPU = torch.device("cpu")

group_sizes = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.lists(st.integers(1, 3), min_size=1, max_size=60),
    st.tuples(st.integers(100, 3000), st.lists(st.integers(1, 4), max_size=20)).map(lambda pair: [pair[0], *pair[1]]),
)


def shuffled(sizes: Sequence[int], seed: int) -> Tensor:
    """Labels of groups of these sizes, and of two free slices, in any order."""
    names = torch.cat([torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), torch.full((2,), -1)])
    return names[torch.randperm(len(names), generator=generator(seed))]


def compiled(names: Tensor, tensor: Tensor, scale: Tensor | None = None, entries: int = 2**19) -> Index:
    """The index of the rows of a tensor, of which so many entries are gathered at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_CPU_ENTRIES", entries)
        patch.setattr(index_module, "_ACCELERATOR_ENTRIES", entries)
        return Index.compile(numbered([Slices(names, scale)]), [tensor])


# --- sums ---


@given(sizes=group_sizes, width=st.sampled_from([(), (1,), (2, 3)]), seed=seeds)
def test_every_value_is_added_to_its_group_once(sizes: list[int], width: tuple[int, ...], seed: int) -> None:
    groups = shuffled(sizes, seed) + 1
    # The sums of integers are exact, whatever their order.
    values = torch.randint(-1000, 1000, (len(groups), *width), generator=generator(seed)).float()
    before = torch.ones(len(sizes) + 1, *width, dtype=torch.float64)
    totals = before.clone()
    with as_on_accelerators():
        sums = Sums.of(groups, CPU)
    kept = values.clone()
    add_by_group_(totals, sums, values, Workspace())
    assert torch.equal(totals, before.index_add(0, groups, values.double()))
    assert torch.equal(values, kept)


def test_nothing_is_added_up_where_there_are_no_values() -> None:
    with as_on_accelerators():
        sums = Sums.of(torch.empty(0, dtype=torch.int64), CPU)
    totals = torch.full((2, 3), -0.0, dtype=torch.float64)
    add_by_group_(totals, sums, torch.empty(0, 3), Workspace())
    assert same_bits(totals, torch.full_like(totals, -0.0))


@given(sizes=group_sizes, seed=seeds)
def test_the_order_is_a_permutation_in_each_level_and_one_sum_of_each_group_is_left(
    sizes: list[int], seed: int
) -> None:
    groups = shuffled(sizes, seed)
    with as_on_accelerators():
        sums = Sums.of(groups, CPU)
    count = len(groups)
    assert sums.levels is not None
    for order, rows, columns in sums.levels:
        assert torch.equal(order.sort().values, torch.arange(count, dtype=torch.int32))
        assert columns > 0
        count -= (rows - 1) * columns
    assert torch.equal(sums.groups.sort().values, groups.unique())


def test_a_huge_group_takes_few_levels_and_is_as_exact_as_a_sum_by_pairs() -> None:
    values = torch.rand(2**20 + 77, 1, dtype=torch.float64, generator=generator(0))
    totals = torch.zeros(1, 1, dtype=torch.float64)
    with as_on_accelerators():
        sums = Sums.of(torch.zeros(len(values), dtype=torch.int64), CPU)
    assert sums.levels is not None
    assert len(sums.levels) < 10
    add_by_group_(totals, sums, values, Workspace())
    exact = math.fsum(values.flatten().tolist())
    assert abs(totals.item() - exact) <= 20 * torch.finfo(torch.float64).eps * exact


# --- means ---


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(
    sizes=group_sizes,
    width=st.sampled_from([1, 3, 20]),
    entries=st.sampled_from([64, 2**19]),
    signed=st.booleans(),
    seed=seeds,
    data=st.data(),
)
def test_groups_have_their_means_bit_for_bit_tied(
    dtype: torch.dtype, sizes: list[int], width: int, entries: int, signed: bool, seed: int, data: st.DataObject
) -> None:
    names = shuffled(sizes, seed)
    before = data.draw(tensors((len(names), width), [dtype], finite=True))
    scale = torch.where(normal((len(names),), torch.float64, seed) < 0, -1.0, 1.0).double() if signed else None
    after, workspace = before.clone(), Workspace()
    with as_on_accelerators():
        index = compiled(names, before, scale, entries)
        project_([after], index, workspace)
        assert tied([after], index, workspace)
        again = after.clone()
        project_([again], index, workspace)

    assert all_tied(times_signs(after, scale), names)
    assert same_bits(again, after)
    byte = torch.uint8 if dtype.itemsize == 1 else dtype
    assert same_bits(after.view(byte)[names == -1], before.view(byte)[names == -1])
    some = torch.tensor([0, width - 1])
    old, new = (times_signs(rows, scale).view(byte)[:, some].view(dtype) for rows in (before, after))
    check_means(old, new, names)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(sizes=group_sizes, width=st.sampled_from([1, 20]), reduction=reductions, seed=seeds, data=st.data())
def test_what_is_not_finite_comes_out_as_on_the_cpu(
    dtype: torch.dtype, sizes: list[int], width: int, reduction: Any, seed: int, data: st.DataObject
) -> None:
    names = shuffled(sizes, seed)
    before = data.draw(tensors((len(names), width), [dtype]))
    results = []
    for branch in (as_on_accelerators(), pytest.MonkeyPatch.context()):
        after = before.clone()
        with branch:
            project_([after], compiled(names, before), Workspace(), reduction)
        results.append(torch.view_as_real(after) if dtype.is_complex else after.double())
    here, there = results
    assert torch.equal(here.isnan(), there.isnan())
    assert torch.equal(here[there.isinf()], there[there.isinf()])


@pytest.mark.parametrize("scale", [None, torch.tensor([1.0, -1.0]), torch.tensor([2.0, -0.5])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_groups_with_scales_are_as_on_the_cpu_but_for_the_rounding(dtype: torch.dtype, scale: Tensor | None) -> None:
    names = shuffled([700, 3, 2, 41, 5], 0)
    scales = None if scale is None else scale.double().repeat(len(names))[: len(names)]
    before = normal((len(names), 20), dtype, 1)
    results = []
    for branch in (as_on_accelerators(), pytest.MonkeyPatch.context()):
        with branch:
            index, workspace = compiled(names, before, scales), Workspace()
            mean, total, near = before.clone(), before.clone(), before.clone()
            project_([mean], index, workspace)
            project_([total], index, workspace, "sum")
            relax_([near], index, workspace, 0.5)
            again = mean.clone()
            project_([again], index, workspace)
            assert same_bits(again, mean)
        results.append((mean, total, near))
    unit = torch.finfo(dtype).eps
    # A sum is a stored mean, rounded, times the size.
    for here, there, size in zip(*results, [1, 1000, 1], strict=True):
        torch.testing.assert_close(here, there, rtol=4 * unit, atol=size * unit)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_the_mean_of_negative_zeros_is_one_and_that_of_mixed_zeros_none(dtype: torch.dtype) -> None:
    if dtype.is_complex:
        start = torch.view_as_complex(torch.full((82, 3, 2), -0.0, dtype=dtype.to_real()))
    else:
        start = torch.full((82, 3), -0.0).to(dtype)
    names = torch.cat([torch.zeros(41, dtype=torch.int64), torch.tensor([1, 2]).repeat(20), torch.tensor([2])])
    after = start.clone()
    with as_on_accelerators():
        project_([after], compiled(names, after), Workspace())
    assert same_bits(after, start)


# --- nothing is waited for ---

# Operators that wait for an accelerator, sort, or add in an order that changes.
FORBIDDEN = {
    *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "lift_fresh"),
    *("bincount", "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave"),
    *("sort", "argsort", "topk", "scatter_add_", "scatter_reduce_", "index_add_", "put_"),
}


class Operators(TorchDispatchMode):
    """Records the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        kwargs = kwargs or {}
        if name in ("index_put_", "_index_put_impl_"):
            accumulate = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
            name += " that accumulates" if accumulate else ""
        # Made of numbers of the host, or found with a mask.
        if name in ("index", "index_put_") and any(one is not None and one.dtype == torch.bool for one in args[1]):
            name = "nonzero"
        self.names.append(name)
        return func(*args, **kwargs)


KINDS: dict[str, Callable[[], Tensor]] = {
    "a codebook": lambda: torch.randint(0, 2, (5000,), generator=generator(0)),
    "hashed": lambda: torch.randint(-1, 300, (5000,), generator=generator(0)),
    "a few large groups": lambda: shuffled([200, 70, 3], 0),
    "groups of one size": lambda: shuffled([3] * 40, 0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scale", [None, -1.0, 0.5], ids=["plain", "signed", "scaled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 20])
def test_a_warm_operation_waits_for_nothing_and_sorts_nothing(
    dtype: torch.dtype, scale: float | None, kind: str, width: int
) -> None:
    names = KINDS[kind]()
    scales = None if scale is None else torch.tensor([1.0, scale], dtype=torch.float64).repeat(len(names) // 2 + 1)
    slices = numbered([Slices(names, None if scales is None else scales[: len(names)])])
    tensor, workspace = normal((len(names), width), dtype, 0), Workspace()
    with as_on_accelerators():
        index, (kept,) = Index.compile(slices, [tensor]), compact_rows_of(slices)
        folding = Folding.compile(index, [kept])
        compact = compact_like(slices[0], tensor, len(kept.kept))
        operations: list[Callable[[], None]] = [
            lambda: project_([tensor], index, workspace),
            lambda: project_([tensor], index, workspace, "sum"),
            lambda: fold_([tensor], [compact], folding, workspace),
            lambda: fold_gradients_([tensor], [compact], folding, workspace, "mean"),
            lambda: fold_gradients_([tensor], [compact], folding, workspace, "sum"),
            lambda: unfold_([tensor], [compact], folding, workspace),
        ]
        for operation in operations:
            operation()
            buffers = dict(workspace._buffers)
            with Operators() as operators:
                operation()
            assert not [name for name in operators.names if name in FORBIDDEN or name.endswith("accumulates")]
            assert all(workspace._buffers[key] is buffer for key, buffer in buffers.items())
            assert workspace._buffers.keys() == buffers.keys()
            assert len(operators.names) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_call_has_the_bits_of_the_first(kind: str) -> None:
    names = KINDS[kind]()
    start, workspace = normal((len(names), 3), torch.float32, 0), Workspace()
    results = []
    with as_on_accelerators():
        index = compiled(names, start)
        for _ in range(2):
            after = start.clone()
            project_([after], index, workspace)
            results.append(after)
    assert same_bits(*results)
