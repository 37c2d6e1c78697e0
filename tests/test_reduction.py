"""How the numbers are worked out: in pieces whose ends do not show, in little memory, in few operations."""

import gc
import math
import sys
from functools import partial

import pytest
import torch
from checks import REDUCTIONS, bits, index_of, parameter, randn, same_bits, tied_bitwise
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from tieopt import TiedOptimizer, is_tied, tie_
from tieopt.numbers import index as index_module
from tieopt.numbers.folding import Folding, compact_like, compact_rows_of, fold_, fold_gradients_, unfold_
from tieopt.numbers.index import Index
from tieopt.numbers.reduction import Workspace, _parts, divide_, drift, have_same_bits, project_, tied
from tieopt.numbers.rounding import rounded
from tieopt.ties.slices import Slices, numbered, told_apart

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
ENTRIES = [1, 7, 64]
seeds = st.integers(0, 2**20)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def in_pieces(entries, tensor, labels, reduction="mean"):
    """The result when so many entries are worked on at a time, and the number of chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_CPU_ENTRIES", entries)
        index = index_of(labels, tensor)
    result = tensor.clone()
    project_([result], index, Workspace(), reduction)
    return result, sum(len(run.chunks) for run in index.runs)


def shuffled(labels, seed):
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def groups_of(*sizes, free=0, seed=0):
    """Labels for groups of these sizes, and some free slices, in any order."""
    names = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return shuffled(torch.cat([names, torch.full((free,), -1)]), seed)


# --- the ends of runs and pieces do not show ---


@given(
    # Groups of one size are added up by pairs, if they fit into one piece.
    sizes=st.lists(st.integers(2, 32), min_size=2, max_size=12).filter(lambda sizes: len(set(sizes)) > 1),
    free=st.integers(0, 5),
    columns=st.sampled_from([(), (1,), (5,), (2, 3), (20,)]),
    dtype=st.sampled_from(DTYPES),
    entries=st.sampled_from(ENTRIES),
    reduction=st.sampled_from(REDUCTIONS),
    seed=seeds,
)
def test_groups_of_up_to_32_have_the_same_bits_wherever_the_pieces_end(
    sizes, free, columns, dtype, entries, reduction, seed
):
    labels = groups_of(*sizes, free=free, seed=seed)
    tensor = randn(len(labels), *columns, seed=seed).to(dtype)

    whole, _ = in_pieces(2**18, tensor, labels, reduction)
    cut, _ = in_pieces(entries, tensor, labels, reduction)

    assert same_bits(cut, whole)


@given(
    size=st.integers(2, 70),
    count=st.integers(2, 9),
    dtype=st.sampled_from(DTYPES),
    groups_at_a_time=st.integers(1, 3),
    reduction=st.sampled_from(REDUCTIONS),
    seed=seeds,
)
def test_groups_of_one_size_have_the_same_bits_wherever_the_pieces_end(
    size, count, dtype, groups_at_a_time, reduction, seed
):
    labels = groups_of(*[size] * count, free=2, seed=seed)
    tensor = randn(len(labels), 20, seed=seed).to(dtype)
    width = 40 if dtype.is_complex else 20

    whole, _ = in_pieces(2**18, tensor, labels, reduction)
    cut, chunks = in_pieces(groups_at_a_time * size * width, tensor, labels, reduction)

    assert chunks > 1 or count <= 2 * groups_at_a_time
    assert same_bits(cut, whole)


@given(
    sizes=st.lists(st.integers(33, 700), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    entries=st.sampled_from(ENTRIES),
    seed=seeds,
)
def test_larger_groups_are_as_exact_wherever_the_pieces_end(sizes, dtype, entries, seed):
    labels = groups_of(*sizes, free=3, seed=seed)
    tensor = randn(len(labels), 2, seed=seed, dtype=dtype)
    unit = torch.finfo(dtype).eps * tensor.abs().max().item()
    for result, _ in (in_pieces(2**18, tensor, labels), in_pieces(entries, tensor, labels)):
        for group, size in enumerate(sizes):
            members = tensor[labels == group].double().T.tolist()
            got = result[labels == group]
            for column, values in enumerate(members):
                exact = math.fsum(values) / size

                assert abs(got[0, column].item() - exact) <= math.sqrt(size) * unit
            assert tied_bitwise(got, [list(range(size))])


@given(
    groups=st.sampled_from([1, 2, 100, 2**19 // 3]),
    odd=st.integers(1, 16),
    entries=st.sampled_from([2**18 + 5, 2**19]),
    signed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e5m2]),
    seed=seeds,
)
def test_many_single_entries_are_added_up_in_parts_and_each_entry_once(groups, odd, entries, signed, dtype, seed):
    count = 2**18 + odd
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(groups, (count,), generator=generator)
    labels[torch.rand(count, generator=generator) < 0.1] = -1
    signs = 1 - 2 * torch.randint(2, (count,), generator=generator) if signed else torch.ones(count).long()
    # The sums of integers are exact, whatever their order.
    start = torch.randint(-8, 8, (count,), generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_CPU_ENTRIES", entries)
        index = Index.compile(numbered([Slices(labels, signs.double() if signed else None)]), [start])
    assert [_parts(run, len(run.norms)) for run in index.runs] == [min(8, 2**19 // len(index.runs[0].norms))]

    result = start.clone()
    project_([result], index, Workspace())
    tied_to, sizes = labels.clamp(min=0), torch.bincount(labels[labels >= 0], minlength=groups)
    sums = torch.zeros(groups, dtype=torch.float64).index_add(0, tied_to, (start.double() * signs) * (labels >= 0))
    means = (sums / sizes)[tied_to] * signs
    expected = torch.where((labels >= 0) & (sizes[tied_to] > 1), rounded(means, dtype).double(), start.double())
    assert torch.equal(result.double(), expected)
    again = result.clone()
    project_([again], index, Workspace())
    assert same_bits(again, result)


@pytest.mark.parametrize("entries", ENTRIES)
def test_few_entries_at_a_time_really_give_many_pieces(entries):
    labels = groups_of(*[5] * 40, free=3)
    tensor = randn(len(labels), 3)

    assert in_pieces(2**18, tensor, labels)[1] == 1
    assert in_pieces(entries, tensor, labels)[1] >= 10


def test_a_group_that_spans_several_pieces_keeps_its_value_to_the_last_bit():
    labels = torch.zeros(500, dtype=torch.int64)
    tensor = randn(1, 3).expand(500, 3).clone()
    result, pieces = in_pieces(1, tensor, labels)

    assert pieces > 10
    assert same_bits(result, tensor)


@pytest.mark.parametrize("entries", [*ENTRIES, 2**18])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_the_sum_back_to_the_mean_is_close_and_tied(dtype, entries):
    labels = groups_of(2, 3, 7, 40, free=3)
    tensor = randn(len(labels), 3).to(dtype)
    mean, _ = in_pieces(entries, tensor, labels)
    result, _ = in_pieces(entries, tensor, labels, "sum")
    divide_([result], index_of(labels, result), Workspace())

    # Two roundings, which for sizes that are powers of two are none.
    real = torch.view_as_real(mean) if dtype.is_complex else mean
    torch.testing.assert_close(result, mean, rtol=2 * torch.finfo(real.dtype).eps, atol=0)
    assert same_bits(result[labels == 0], mean[labels == 0])
    assert all(tied_bitwise(result[labels == group], [list(range(int((labels == group).sum())))]) for group in range(4))


@pytest.mark.parametrize("entries", ENTRIES)
def test_is_tied_sees_one_member_that_differs_in_any_piece(entries, monkeypatch):
    monkeypatch.setattr(index_module, "_CPU_ENTRIES", entries)
    labels = groups_of(40, 3, 2, free=2)
    tensor = tie_(randn(len(labels), 3), labels)
    assert is_tied(tensor, labels)
    for row in (labels >= 0).nonzero().flatten().tolist():
        other = tensor.clone()
        other[row, 1] += 1.0

        assert not is_tied(other, labels)


@pytest.mark.parametrize("entries", [*ENTRIES, 2**18])
def test_the_drift_is_found_in_any_piece(entries, monkeypatch):
    monkeypatch.setattr(index_module, "_CPU_ENTRIES", entries)
    labels = groups_of(4, 4, 4, free=1)
    index = index_of(labels, torch.zeros(len(labels), 2))
    for row in (labels >= 0).nonzero().flatten().tolist():
        tensor = torch.zeros(len(labels), 2)
        tensor[row, 1] = 4.0

        assert drift([tensor], index, Workspace()) == 3.0
    assert drift([torch.zeros(len(labels), 2)], index, Workspace()) == 0.0


def test_slices_without_entries_have_no_drift():
    empty = torch.zeros(4, 0)
    assert drift([empty], index_of(torch.tensor([0, 0, -1, 0]), empty), Workspace()) == 0.0


# --- rounded once ---

NARROW = [
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_lies_near_the_middle_of_two_numbers_is_rounded_to_the_nearer(dtype):
    patterns = torch.arange(2 ** (8 * dtype.itemsize)).to(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    numbers = patterns.view(dtype).double()
    finite, order = numbers[numbers.isfinite()].unique(return_inverse=True)
    below, above = finite[:-1], finite[1:]
    middles, infinity = (below + above) / 2, torch.full_like(below, math.inf)
    is_even = torch.zeros(len(finite), dtype=torch.bool)
    is_even[order] = patterns[numbers.isfinite()] % 2 == 0
    is_even[finite == 0] = True

    assert torch.equal(rounded(middles, dtype).double(), torch.where(is_even[:-1], below, above))
    assert torch.equal(rounded(torch.nextafter(middles, -infinity), dtype).double(), below)
    assert torch.equal(rounded(torch.nextafter(middles, infinity), dtype).double(), above)
    assert torch.equal(rounded(finite, dtype).double(), finite)
    special = torch.tensor([math.inf, -math.inf, 1e300, -1e300, 1e-310, -1e-310, 0.0, -0.0], dtype=torch.float64)
    assert same_bits(rounded(special, dtype), special.to(dtype))
    assert rounded(torch.full((20,), math.nan, dtype=torch.float64), dtype).isnan().all()


# The mean of four is a little more than the middle of 1 and the next number, by less than float32 can tell.
JUST_ABOVE = {torch.float16: [2.0, 2.0, 2**-9, 2**-23], torch.bfloat16: [2.0, 2.0, 2**-6, 2**-26]}
halves = pytest.mark.parametrize("dtype", JUST_ABOVE, ids=str)


@halves
def test_a_mean_is_rounded_once(dtype):
    above = 1 + torch.finfo(dtype).eps
    tensor = torch.tensor(JUST_ABOVE[dtype], dtype=dtype)
    assert tie_(tensor.clone(), [[0, 1, 2, 3]]).tolist() == [above] * 4
    # As rows, and of complex numbers.
    assert tie_(tensor[:, None].repeat(1, 20), [[0, 1, 2, 3]]).unique().tolist() == [above]
    if dtype == torch.float16:
        paired = torch.view_as_complex(torch.stack([tensor, tensor], dim=1))
        assert torch.view_as_real(tie_(paired, [[0, 1, 2, 3]])).unique().tolist() == [above]
    # Three members whose squared scales add up to four.
    scale = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    members = torch.cat([tensor[:3], torch.full((4,), 2 * tensor[3].item() / 4, dtype=dtype)])
    assert tie_(members, torch.zeros(7).long(), scale=scale).tolist()[:3] == [above] * 3


@halves
def test_a_multiple_is_rounded_once(dtype):
    above = 1 + torch.finfo(dtype).eps
    scale = torch.tensor([1.0, (1 + above) / 2 + 2.0**-30], dtype=torch.float64)
    # The shared value is a little more than 1, which it is rounded to.
    assert tie_(torch.tensor([1.0, above], dtype=dtype), torch.zeros(2).long(), scale=scale).tolist() == [1.0, above]


@halves
@reductions
def test_a_step_rounds_the_gradient_once(dtype, reduction, compact):
    weight = parameter(4, dtype=dtype)
    with torch.no_grad():
        weight.zero_()
    inner = SGD([weight], lr=1.0, maximize=True)
    TiedOptimizer(inner, {weight: [[0, 1, 2, 3]]}, reduction=reduction, compact=compact)
    weight.grad = torch.tensor(JUST_ABOVE[dtype], dtype=dtype)
    inner.step()
    above = 1 + torch.finfo(dtype).eps
    assert weight.tolist() == [above * (4 if reduction == "sum" else 1)] * 4


# --- one result ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 200), (3000, 200), (2**18 + 77,)])
def test_the_result_does_not_depend_on_the_number_of_threads(dtype, shape):
    labels = shuffled(torch.arange(shape[0]) % 5 - 1, seed=1)
    tensor = randn(*shape)
    if len(shape) == 1:
        # What is left once the largest numbers have cancelled shows in which order float64 was rounded.
        half = tensor[: shape[0] // 2] * 10 ** (
            20 * torch.rand(shape[0] // 2, generator=torch.Generator().manual_seed(1))
        )
        tensor, labels = shuffled(torch.cat([half, -half]), seed=2), labels[: 2 * len(half)].clamp(min=0, max=0)
    tensor = tensor.to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            results.append(tie_(tensor.clone(), labels))
    finally:
        torch.set_num_threads(threads)

    assert all(same_bits(result, results[0]) for result in results)


@given(dtype=st.sampled_from(DTYPES), seed=seeds)
def test_a_workspace_carries_nothing_from_one_call_to_the_next(dtype, seed):
    labels = groups_of(40, 3, 2, free=2, seed=seed)
    index = index_of(labels, torch.zeros(len(labels), 3))
    used = Workspace()
    for value in (float("nan"), float("inf"), 1e4):
        project_([torch.full((len(labels), 3), value, dtype=dtype)], index, used)
    fresh, again = randn(len(labels), 3, seed=seed).to(dtype), randn(len(labels), 3, seed=seed).to(dtype)

    project_([fresh], index, Workspace())
    project_([again], index, used)

    assert same_bits(fresh, again)


def test_a_workspace_serves_tensors_of_several_sizes_and_dtypes():
    workspace = Workspace()
    for rows, columns, dtype in [
        (40, 3, torch.float32),
        (9, 70, torch.float32),
        (40, 3, torch.bfloat16),
        (3, 1, torch.float32),
    ]:
        labels = torch.arange(rows) % 3
        tensor = randn(rows, columns, seed=rows).to(dtype)
        expected = tie_(tensor.clone(), labels)
        project_([tensor], index_of(labels, tensor), workspace)

        assert same_bits(tensor, expected)


# --- memory and operations of a step ---


class Operations(TorchDispatchMode):
    """Records the operations that run within it, and how many bytes of new storage each takes."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given_storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_in([args, kwargs])}
        result = func(*args, **kwargs)
        self.names.append(str(func))
        self.sizes += [
            tensor.untyped_storage().nbytes()
            for tensor in tensors_in(result)
            if tensor.untyped_storage().data_ptr() not in given_storages
        ]
        return result

    @property
    def largest(self):
        return max(self.sizes, default=0)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.layout == torch.strided else []
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def operations_of(action):
    with Operations() as operations:
        action()
    return operations


def large(dtype=torch.float32, reduction="mean", size=2):
    """Two megabytes and more, in groups of neighbours."""
    rows, columns = 6000, 200
    weight = parameter(rows, columns, dtype=dtype)
    optimizer = TiedOptimizer(
        SGD([weight], lr=0.1, foreach=False), {weight: torch.arange(rows) // size}, reduction=reduction
    )
    weight.grad = randn(rows, columns, seed=1, dtype=dtype)
    return weight, optimizer


@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("size", [2, 200, 6000])
def test_no_step_takes_memory_of_the_size_of_the_parameter(dtype, reduction, size):
    weight, optimizer = large(dtype, reduction, size)
    # Of one piece, in the dtype of the accumulation.
    piece = index_module._CPU_ENTRIES * max(dtype.itemsize, 4)
    assert weight.nbytes > 2 * piece or dtype == torch.bfloat16

    for _ in range(2):
        assert 0 < operations_of(optimizer.step).largest <= piece


@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_the_workspace_is_kept_and_the_second_step_makes_nothing_new(dtype, reduction):
    rows, columns = 6000, 200
    weight = parameter(rows, columns, dtype=dtype)
    inner = SGD([weight], lr=0.1, foreach=False)
    weight.grad = randn(rows, columns, seed=1, dtype=dtype)

    tying = operations_of(lambda: TiedOptimizer(inner, {weight: torch.arange(rows) // 2}, reduction=reduction))
    steps = [operations_of(inner.step) for _ in range(3)]

    assert sum("aten.empty.memory_format" in name for name in tying.names) >= 1
    assert [sum("aten.empty.memory_format" in name for name in step.names) for step in steps[1:]] == [0, 0]
    assert steps[1].sizes == steps[2].sizes


def test_all_parameters_share_one_workspace():
    params = [parameter(600, 50, seed=seed) for seed in range(8)]
    inner = SGD(params, lr=0.1, foreach=False)
    some = params[:2]
    first = operations_of(lambda: TiedOptimizer(SGD(some), {param: torch.arange(600) // 2 for param in some}))
    tying = operations_of(lambda: TiedOptimizer(inner, {param: torch.arange(600) // 2 for param in params}))

    made = [sum("aten.empty.memory_format" in name for name in operations.names) for operations in (first, tying)]
    assert made[0] == made[1] > 0


def pairs(count):
    """So many groups of two among two thousand rows."""
    labels = torch.full((2000,), -1)
    labels[: 2 * count] = torch.arange(count).repeat(2)
    return labels


def hundreds(count):
    """So many groups of a hundred among two thousand rows, which are summed up in blocks."""
    labels = torch.full((2000,), -1)
    labels[: 100 * count] = torch.arange(count).repeat(100)
    return labels


def prepared(sparse=False):
    weight = parameter(2000, 4)
    inner = SGD([weight], lr=0.1, foreach=False)
    weight.grad = randn(2000, 4, seed=1)
    if sparse:
        weight.grad = weight.grad.to_sparse(1)
    return weight, inner


@reductions
@pytest.mark.parametrize(("make", "few", "many"), [(pairs, 10, 1000), (hundreds, 2, 20)])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_step_takes_as_many_operations_for_many_groups_as_for_few(make, few, many, reduction, sparse):
    names = []
    for count in (few, many):
        weight, inner = prepared(sparse)
        optimizer = TiedOptimizer(inner, {weight: make(count)}, reduction=reduction)
        # The first step with a sparse gradient looks up what only sparse gradients need.
        optimizer.step()
        names.append(operations_of(optimizer.step).names)

    assert any("scatter_reduce" in name for name in names[0])
    assert names[0] == names[1]


# Without free rows there is nothing to leave out.
@pytest.mark.parametrize(("make", "few", "many"), [(pairs, 10, 800), (hundreds, 2, 16)])
def test_tying_takes_as_many_operations_for_many_groups_as_for_few(make, few, many):
    names = []
    for count in (few, many):
        weight, inner = prepared()
        ties = {weight: make(count)}
        names.append(operations_of(lambda inner=inner, ties=ties: TiedOptimizer(inner, ties)).names)

    assert len(names[0]) > 10
    assert names[0] == names[1]


@pytest.mark.parametrize("groups", [[], [[]], [[3], [5]], torch.arange(2000), torch.full((2000,), -1)], ids=str)
def test_a_step_with_nothing_to_tie_takes_the_writing_operations_of_the_bare_step(groups):
    results = []
    for tie in (True, False):
        weight, inner = prepared()
        if tie:
            TiedOptimizer(inner, {weight: groups})
        operations = operations_of(inner.step)
        results.append([[name for name in operations.names if "_." in name], bits(weight)])

    assert results[0][0] == results[1][0] == ["aten.add_.Tensor"]
    assert torch.equal(results[0][1], results[1][1])


def calls_of(action):
    """How many Python functions are called once everything is warm."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    action()
    before = sys.getprofile()
    # Hypothesis has the garbage collector call it.
    gc.disable()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls


# Twice as many as there are, so that a function more is no matter.
MOST_CALLS = {project_: 30, divide_: 30, tied: 30, fold_: 12, fold_gradients_: 24, unfold_: 12}


@pytest.mark.parametrize("function", MOST_CALLS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("columns", [3, 32])
def test_a_warm_operation_calls_few_functions_and_none_for_each_parameter(function, columns):
    calls = []
    for count in (1, 2, 200):
        tensors = [randn(5, columns, seed=seed) for seed in range(count)]
        slices = [own for (own,) in told_apart([Slices(torch.tensor([0, 0, 1, 1, -1]))] for _ in tensors)]
        index, parts = Index.compile(slices, tensors), compact_rows_of(slices)
        folding = Folding.compile(index, parts)
        kept = [len(part.kept) for part in parts]
        compacts = [compact.fill_(1.0) for compact in map(compact_like, slices, tensors, kept)]
        arguments = {fold_gradients_: {"reduction": "mean"}}.get(function, {})
        is_folding = function in (fold_, fold_gradients_, unfold_)
        given = (tensors, compacts, folding) if is_folding else (tensors, index)
        calls.append(calls_of(partial(function, *given, Workspace(), **arguments)))

    assert max(calls) <= MOST_CALLS[function]
    assert calls[1] == calls[2]


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (2, 3, 1)])
def test_the_drift_of_complex_entries_is_a_modulus(shape):
    tensor = torch.zeros(shape, dtype=torch.complex64)
    tensor[1] = 6 + 8j
    for layout in (tensor, tensor.mT.contiguous().mT if tensor.dim() > 2 else tensor.t().contiguous().t()):
        index = index_of(torch.zeros(2, dtype=torch.int64), layout)
        assert drift([layout], index, Workspace()) == 5.0
    strided = torch.tensor([0, 6 + 8j]).as_strided((2, 1), (1, 0))
    assert drift([strided], index, Workspace()) == 5.0


@given(
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(0, 3),
    st.booleans(),
    st.data(),
)
def test_members_that_differ_in_one_bit_are_told_apart_however_they_lie_in_memory(dtype, shape, offset, turned, data):
    size, count = dtype.itemsize, math.prod(shape)
    tensor, other = [torch.zeros((count + offset) * size, dtype=torch.uint8) for _ in range(2)]
    views = [memory.view(dtype)[offset:].view(shape) for memory in (tensor, other)]
    views = [view.movedim(0, -1) if turned else view for view in views]
    assert have_same_bits(*views)
    changed = data.draw(st.integers(0, (count + offset) * size - 1))
    other[changed] = 1 << data.draw(st.integers(0, 7))
    assert have_same_bits(*views) == (changed < offset * size)
