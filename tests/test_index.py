"""How members are cut into runs: every kind of run has the same means, and a million groups are no matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
from checks import check_means, times_signs
from hypothesis import given
from hypothesis import strategies as st
from reference import all_tied, same_bits
from strategies import ALL, generator, normal, seeds, tensors
from torch import Tensor
from torch.nn import Parameter

from tieopt import TiedOptimizer, is_tied, tie_
from tieopt.numbers import index as index_module
from tieopt.numbers import reduction as reduction_module
from tieopt.numbers import sums as sums_module
from tieopt.numbers.folding import Folding, compact_like, compact_rows_of, fold_, fold_gradients_, unfold_
from tieopt.numbers.index import Index, Run
from tieopt.numbers.reduction import Workspace, divide_, drift, project_, relax_, tied
from tieopt.numbers.rounding import INTEGERS
from tieopt.tensors import bits
from tieopt.ties.options import Reduction
from tieopt.ties.part import slices_for
from tieopt.ties.slices import Slices, numbered

# Values of the modules' constants at which small tensors are cut as large ones are.
CONSTANTS = {
    "_CPU_ENTRIES": [1, 64, 1000, 2**19],
    "_NARROW": [1, 16, 64],
    "_SINGLE_TOTALS": [0, 20, 2**23],
    "_NARROW_TOTALS": [0, 20, 2**20],
    "EVEN_ENTRIES": [1, 100, 2**15],
    "MANY": [0, 2**14],
    "_BLOCK": [2, 32],
}


# A NaN of float32 that every operator but a copy makes another one.
SIGNALLING = 0x7F800001


@contextmanager
def constants(values: dict[str, int]) -> Iterator[None]:
    """The modules with other constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(sums_module if name == "_BLOCK" else index_module, name, value)
        yield


def compiled(names: Sequence[Tensor], rows: Sequence[Tensor], scales: Sequence[Tensor | None], **values: int) -> Index:
    """The index of tensors whose rows are joined, cut at these constants."""
    slices = [Slices(one, scale) for one, scale in zip(names, scales, strict=True)]
    with constants(values):
        return Index.compile(numbered(slices), rows)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors, also of 8-bit floats, which torch does not concatenate."""
    dtype = rows[0].dtype
    return torch.cat([one.view(torch.uint8) if dtype.itemsize == 1 else one for one in rows]).view(dtype)


def _group_labels(sizes: Sequence[int], free: int, parts: int, seed: int, *, in_order: bool) -> list[Tensor]:
    """Labels of groups of these sizes, and of free slices, dealt out to tensors."""
    names = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    names = torch.cat([names, torch.full((free,), -1)])
    names = names if in_order else names[torch.randperm(len(names), generator=generator(seed))]
    return [part for part in names.chunk(parts) if len(part)]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(
    sizes=st.one_of(
        st.lists(st.integers(1, 40), min_size=1, max_size=8),
        st.tuples(st.integers(2, 20), st.integers(1, 8)).map(lambda pair: [pair[0]] * pair[1]),
        st.lists(st.sampled_from([2, 3, 8]), min_size=4, max_size=20),
    ),
    parts=st.integers(1, 3),
    width=st.sampled_from([1, 3, 16, 20]),
    free=st.integers(0, 4),
    in_order=st.booleans(),
    signed=st.booleans(),
    values=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CONSTANTS.items()}),
    seed=seeds,
    data=st.data(),
)
def test_wherever_the_members_are_cut_every_group_has_its_mean(
    dtype: torch.dtype,
    sizes: list[int],
    parts: int,
    width: int,
    free: int,
    in_order: bool,
    signed: bool,
    values: dict[str, int],
    seed: int,
    data: st.DataObject,
) -> None:
    names = _group_labels(sizes, free, parts, seed, in_order=in_order)
    before = [data.draw(tensors((len(one), width), [dtype], finite=True)) for one in names]
    signs = [torch.where(normal((len(one),), torch.float64, seed) < 0, -1.0, 1.0) for one in names]
    scales = [one.double() if signed else None for one in signs]

    index = compiled(names, before, scales, **values)
    after = [one.clone() for one in before]
    project_(after, index, Workspace())

    every = torch.cat(names)
    old, new = (_stacked(list(map(times_signs, rows, scales))) for rows in (before, after))
    assert all_tied(new, every)
    # Narrow slices of few groups are added up where they are, and all others may be by pairs.
    entries = width * (1 + dtype.is_complex)
    narrow = (
        entries < values["_NARROW"]
        and len(sizes) * entries <= values["_SINGLE_TOTALS" if entries == 1 else "_NARROW_TOTALS"]
    )
    check_means(old[:, ::4], new[:, ::4], every, pairs=not narrow)
    assert same_bits(bits(new)[every == -1], bits(old)[every == -1])
    assert tied(after, index, Workspace())
    assert drift(after, index, Workspace()) == 0.0

    again = [one.clone() for one in after]
    project_(again, index, Workspace())
    assert all(map(same_bits, again, after))


def _is_sorted(slots: Tensor) -> bool:
    return bool((slots.diff() >= 0).all())


# For each kind of run how it comes about, and what it looks like.
KINDS: dict[str, tuple[list[int], int, torch.dtype, dict[str, int], Callable[[tuple[Run, ...]], bool]]] = {
    "a matrix": (
        [6] * 4,
        16,
        torch.float32,
        {},
        lambda runs: len(runs) == 1 and runs[0].chunks[0].size == 6,
    ),
    "several matrices": (
        [6] * 9,
        16,
        torch.float32,
        {"_CPU_ENTRIES": 16 * 14},
        lambda runs: [len(run.norms) for run in runs] == [2, 2, 2, 2, 1] and all(run.chunks[0].size for run in runs),
    ),
    "in the order of memory": (
        [6] * 4,
        3,
        torch.float32,
        {},
        lambda runs: len(runs) == 1 and not runs[0].chunks[0].size and not _is_sorted(runs[0].chunks[0].groups),
    ),
    "in the order of memory, in chunks": (
        [6] * 4,
        3,
        torch.float32,
        {"_CPU_ENTRIES": 30},
        lambda runs: len(runs) == 1 and len(runs[0].chunks) == 3,
    ),
    "ragged": (
        [2, 5, 3, 4],
        16,
        torch.float32,
        {},
        lambda runs: len(runs) == 1 and not runs[0].chunks[0].size and _is_sorted(runs[0].chunks[0].groups),
    ),
    "one group over several chunks": (
        [40],
        16,
        torch.float32,
        {"_CPU_ENTRIES": 1},
        lambda runs: len(runs) == 1 and len(runs[0].chunks) == 7,
    ),
    "many of one size among others": (
        [5, *[2] * 8, 3],
        16,
        torch.float32,
        {"EVEN_ENTRIES": 2 * 8 * 16},
        lambda runs: [run.chunks[0].size for run in runs] == [2, 0],
    ),
    "many of a larger size among others": (
        [2, *[4] * 8, 3, 9],
        16,
        torch.float32,
        {"EVEN_ENTRIES": 4 * 8 * 16},
        lambda runs: [run.chunks[0].size for run in runs] == [0, 4, 0],
    ),
    "in blocks": (
        [70, 3],
        16,
        torch.float64,
        {},
        lambda runs: len(runs) == 1 and runs[0].chunks[0].sums.blocks is not None,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, free=st.integers(0, 3))
def test_each_kind_of_run_comes_about_and_has_the_means(kind: str, seed: int, free: int) -> None:
    sizes, width, dtype, values, looks_so = KINDS[kind]
    names = _group_labels(sizes, free, 1, seed, in_order=False)
    before = normal((len(names[0]), width), dtype, seed)
    index = compiled(names, [before], [None], **values)
    assert looks_so(index.runs)

    after = before.clone()
    project_([after], index, Workspace())
    assert all_tied(after, names[0])
    check_means(before, after, names[0])
    largest = (before.double() - after.double()).abs().max().item()
    assert drift([before], index, Workspace()) == pytest.approx(largest, rel=1e-6)
    halfway = before.clone()
    relax_([halfway], index, Workspace(), 0.5)
    torch.testing.assert_close(halfway, (before + after) / 2)
    total = before.clone()
    project_([total], index, Workspace(), "sum")
    divide_([total], index, Workspace())
    assert all_tied(total, names[0])
    torch.testing.assert_close(total, after, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [dtype for dtype in ALL if dtype.to_real() != torch.float64], ids=str)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=4, max_size=8),
    alone=st.sampled_from(["free", "groups of one"]),
    shape=st.sampled_from([(-1,), (1, -1), (-1, 1), (-1, 3)]),
    signed=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=seeds,
    data=st.data(),
)
def test_a_few_slices_in_no_group_are_passed_over_bit_for_bit(
    dtype: torch.dtype,
    sizes: list[int],
    alone: str,
    shape: tuple[int, ...],
    signed: bool,
    reduction: Reduction,
    seed: int,
    data: st.DataObject,
) -> None:
    """Members are read as one stretch then. What lies between is not written, nor compared: NaN is no drift."""
    (names,) = _group_labels(sizes, sum(sizes) // 8, 1, seed, in_order=False)
    is_alone = names == -1
    if alone == "groups of one":
        names[is_alone] = 1000 + torch.arange(int(is_alone.sum()))
    values = normal((len(names),), dtype, seed)
    alone_bits = bits(data.draw(tensors((int(is_alone.sum()),), [dtype])))
    if data.draw(st.booleans()) and dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2):
        # A signalling NaN.
        pattern = torch.tensor(math.inf).to(dtype).view(INTEGERS[dtype.itemsize]) + 1
        alone_bits[0] = bits(pattern.view(dtype))
    bits(values)[is_alone] = alone_bits
    scale = torch.where(normal((len(names),), torch.float64, seed) < 0, -1.0, 1.0).double() if signed else None
    if shape == (-1, 3):
        # Slices of three entries each, which are alike.
        values = values[:, None].repeat(1, 3)
    else:
        names, values = names.view(shape), values.view(shape)
        scale = None if scale is None else scale.view(shape)
    index = Index.compile(numbered([Slices(names, scale)]), [values])
    (run,) = index.runs
    assert run.between is not None
    assert all(type(rows) is slice for chunk in run.chunks for rows in chunk.pieces.rows)

    kept, is_alone = bits(values).clone(), is_alone.view(names.shape)
    after = values.clone()
    project_([after], index, Workspace())
    groups = names.flatten().masked_fill(is_alone.flatten(), -1)
    assert same_bits(bits(after)[is_alone], kept[is_alone])
    assert tied([after], index, Workspace())
    assert drift([after], index, Workspace()) == 0.0
    first = (tensor.view(len(groups), -1)[:, :1] for tensor in (after, values))
    new, old = (times_signs(entries, None if scale is None else scale.flatten()) for entries in first)
    assert all_tied(new, groups)
    check_means(old, new, groups, pairs=False)

    total, halfway = values.clone(), values.clone()
    project_([total], index, Workspace(), reduction)
    relax_([halfway], index, Workspace(), 0.5)
    for result in (total, halfway):
        assert same_bits(bits(result)[is_alone], kept[is_alone])

    (rows,) = compact_rows_of(index.slices)
    folding = Folding.compile(index, (rows,))
    compact, unfolded = compact_like(index.slices[0], after, len(rows.kept)), torch.zeros_like(after)
    fold_([after], [compact], folding, Workspace())
    unfold_([unfolded], [compact], folding, Workspace())
    assert same_bits(unfolded, after)
    fold_gradients_([values], [compact], folding, Workspace(), reduction)
    passed = rows.kept[rows.groups :].long()
    entries = values.reshape(len(groups), *values.shape[names.dim() :])
    assert same_bits(bits(compact)[rows.groups :], bits(entries)[passed])


@given(sizes=st.lists(st.integers(2, 6), min_size=4, max_size=8), seed=seeds)
def test_slices_in_no_group_are_not_rounded_with_scaled_members(sizes: list[int], seed: int) -> None:
    (names,) = _group_labels(sizes, sum(sizes) // 8, 1, seed, in_order=False)
    tensor, is_free = normal((len(names),), torch.float32, seed), names == -1
    # The members stay in their order: the largest scales come first.
    scale = torch.where(torch.arange(len(names)) < len(names) // 2, 2.0, 0.5).double()
    tensor.view(torch.int32)[is_free] = SIGNALLING
    index = compiled([names], [tensor], [scale])
    project_([tensor], index, Workspace())
    relax_([tensor], index, Workspace(), 0.5)
    assert bool((tensor.view(torch.int32)[is_free] == SIGNALLING).all())


@given(
    size=st.integers(2, 9),
    count=st.integers(1, 9),
    width=st.sampled_from([1, 16]),
    offset=st.integers(0, 3),
    seed=seeds,
)
def test_members_that_follow_each_other_have_the_bits_of_those_that_do_not(
    size: int, count: int, width: int, offset: int, seed: int
) -> None:
    """The first are a slice of the rows, and the others are looked up one by one."""
    together = torch.cat([torch.full((offset,), -1), torch.arange(count).repeat_interleave(size)])
    apart = torch.full((2 * len(together),), -1)
    apart[::2] = together
    start = normal((len(together), width), torch.float32, seed)
    spread = torch.zeros(len(apart), width)
    spread[::2] = start

    kinds = []
    for labels, tensor in ((together, start), (apart, spread)):
        index = compiled([labels], [tensor], [None])
        kinds += [isinstance(rows, slice) for run in index.runs for chunk in run.chunks for rows in chunk.pieces.rows]
        project_([tensor], index, Workspace())
    assert kinds == [True, False]
    assert same_bits(spread[::2], start)


@pytest.mark.parametrize(
    ("values", "size", "most"),
    [
        ({}, 2, 8),
        ({}, 64, 8),
        ({}, 10**4, 8),
        ({"_SINGLE_TOTALS": 0}, 2, 8),
        ({"_SINGLE_TOTALS": 0}, 3, 12),
        # The last chunk has few members, and keeps no others.
        ({"_SINGLE_TOTALS": 0, "_CPU_ENTRIES": 10**5 - 100}, 2, 8),
    ],
)
@pytest.mark.parametrize("even", [True, False])
def test_an_index_of_single_entries_takes_few_bytes(
    values: dict[str, int], size: int, most: int, *, even: bool
) -> None:
    """Of which a group with members at random takes more for what it keeps for each group."""
    count = 10**5
    labels = torch.arange(count) // size if even else torch.randint(0, count // size, (count,), generator=generator(0))
    labels = labels[torch.randperm(count, generator=generator(1))]
    index = compiled([labels], [torch.zeros(count, 1)], [None], **values)
    assert _bytes_of(index.runs) <= (most if even else most + 4 / size) * count


@pytest.mark.parametrize("shape", [(2**18,), (2**9, 2**9), (2**4, 2**7, 2**7)])
@pytest.mark.parametrize("free", [0, 2**14])
@pytest.mark.parametrize("negative", [0, 2**15])
def test_a_folding_takes_four_bytes_for_each_entry_and_for_each_row(
    shape: tuple[int, ...], free: int, negative: int
) -> None:
    """Beside the norms, where these differ; what the index and the rows have as well takes none of its own."""
    count = math.prod(shape)
    labels = torch.randperm(count, generator=generator(0)) // 2
    labels[:free] = torch.arange(free) + count
    scale = torch.ones(shape, dtype=torch.float64)
    scale.view(-1)[-negative or count :] = -1
    slices = numbered([Slices(labels.view(shape), scale if negative else None)])
    (rows,) = compact_rows_of(slices)
    index = Index.compile(slices, [torch.empty(shape)])
    folding = Folding.compile(index, (rows,))
    norms = len(rows.kept) if free else 0
    signs = 2 * count if negative else 0
    kept = (index.runs, folding.kept, folding.free, folding.sources, folding.shared, folding.scales, rows)
    assert _bytes_of(kept) <= 4 * (count + len(rows.kept)) + norms + signs + 128


def test_a_folding_takes_no_other_numbers_for_the_same() -> None:
    """Groups of each size are counted from 0 on in their own run, but through all of them in the compact tensor."""
    sizes = torch.arange(2, 600)
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    weight = Parameter(normal((len(labels), 16), torch.float32, 0))
    optimizer = TiedOptimizer(torch.optim.SGD([weight], lr=0.1), {weight: labels}, compact=True)
    grad = weight.grad = normal(weight.shape, torch.float32, 1)
    means = torch.segment_reduce(weight.detach().double(), "mean", lengths=sizes)
    means -= 0.1 * torch.segment_reduce(grad.double(), "mean", lengths=sizes)
    optimizer.step()
    assert is_tied(weight, labels)
    torch.testing.assert_close(weight[sizes.cumsum(0) - 1].double(), means, rtol=0, atol=1e-6)


def test_an_index_keeps_the_offset_of_each_member_and_of_each_group_once() -> None:
    rows, labels = normal((64, 1024), torch.float32, 0), torch.arange(64) // 8
    slices = slices_for(rows, labels, 0, None, "rows", normal((64, 1024), torch.float32, 1))
    index = Index.compile([slices], [rows])
    assert _bytes_of(index.runs) <= (64 + 8 + 1) * 1024 * 8


def test_an_index_of_labels_that_were_made_in_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        slices = numbered([Slices(torch.tensor([0, 1, 0, 1]))])
        rows = compact_rows_of(slices)
    index = Index.compile(slices, [torch.zeros(4)])
    assert not any(tensor.is_inference() for tensor in _tensors_of((index.runs, rows)))


def test_what_is_written_row_by_row_is_widened_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer for all pinned rows would take more than an index in int32 saves."""
    monkeypatch.setattr(reduction_module, "_WIDENED", 8)
    labels, tensor = torch.zeros(100, dtype=torch.int64), torch.ones(200, 3)[::2]
    index, workspace = compiled([labels], [tensor], [torch.arange(100.0) % 3 % 2], MANY=0), Workspace()
    project_([tensor], index, workspace)
    widened = [math.prod(shape) for name, shape, *_ in workspace if name == "numbers"]
    assert 0 < max(widened) <= len(labels) // 3
    assert torch.equal(tensor[:, 0], torch.arange(100.0) % 3 % 2)


def _bytes_of(kept: object) -> int:
    """How many bytes tensors have in memory, without those of views of others."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors_of(kept)}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors_of(kept: object) -> Iterator[Tensor]:
    """The tensors in tuples of tuples."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, tuple):
        yield from chain.from_iterable(map(_tensors_of, kept))


def test_a_million_groups_are_tied() -> None:
    """Nothing that is built for them is a Python loop over groups: this would take minutes."""
    count = 10**6
    labels = torch.randperm(2 * count, generator=generator(0)) // 2
    start = normal((2 * count, 1), torch.float32, 0)
    tensor = tie_(start.clone(), labels)
    first, second = labels.argsort(stable=True).view(count, 2).T
    mean = ((start[first].double() + start[second].double()) / 2).float()
    assert torch.equal(tensor[first], mean)
    assert torch.equal(tensor[second], mean)
    assert is_tied(tensor, labels)

    (part,) = compact_rows_of(numbered([Slices(labels)]))
    assert len(part.kept) == part.groups == count
    assert torch.equal(labels[part.kept][part.rows], labels)
