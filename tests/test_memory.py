"""Parameters that share memory: refused where they are tied, and at the next step where that comes about later."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import parameter, randn, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer, is_tied
from tieopt.tensors import sharing

# Of a matrix of shape (6, 8) of eight bytes an entry.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda base: base,
    "transposed": lambda base: base.t(),
    "rows": lambda base: base[1:4],
    "other rows": lambda base: base[4:],
    "columns": lambda base: base[:, :3],
    "other columns": lambda base: base[:, 3:],
    "every other column": lambda base: base[:, ::2],
    "the others": lambda base: base[:, 1::2],
    "one entry repeated": lambda base: base[2, :1].expand(5),
    "halves of entries": lambda base: base.view(torch.int32)[:, ::2],
    "bytes of other columns": lambda base: base.view(torch.int8)[:, 24:30],
    "none": lambda base: base[:0],
    "overlapping rows": lambda base: base.view(-1).unfold(0, 4, 2),
    "a copy": lambda base: base.clone(),
}


def bytes_of(tensor: Tensor) -> set[int]:
    """The addresses of all bytes of all entries."""
    starts = [tensor.data_ptr()]
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        starts = [start + tensor.itemsize * stride * index for start in starts for index in range(size)]
    return {start + byte for start in starts for byte in range(tensor.itemsize)}


@given(st.lists(st.sampled_from(sorted(VIEWS)), min_size=2, max_size=5))
def test_tensors_that_share_memory_are_found_by_the_addresses_of_their_entries(names: list[str]) -> None:
    base = torch.zeros(6, 8, dtype=torch.float64)
    views = [VIEWS[name](base) for name in names]
    pairs = itertools.combinations(range(len(views)), 2)
    expected = {(first, second) for first, second in pairs if bytes_of(views[first]) & bytes_of(views[second])}
    assert {tuple(sorted(pair)) for pair in sharing(views)} == expected


def move(param: Parameter, data: Tensor) -> None:
    param.data = data


# How two weights, of shapes (4, 6) and (6, 4), come to share memory, or the rows of the first one.
SHARED: dict[str, Callable[[Parameter, Parameter], None]] = {
    "the second is the first transposed": lambda first, second: move(second, first.data.t()),
    "the first is a view of the second": lambda first, second: move(first, second.data.view(4, 6)),
    "rows are one": lambda first, _: move(first, first.data[:1].expand(4, 6)),
    "rows overlap": lambda first, _: move(first, first.data.view(-1)[:9].unfold(0, 6, 1)),
}

every_way = pytest.mark.parametrize("shared", SHARED)


def joined(first: Parameter, second: Parameter) -> Tie:
    return Tie.join(Tie(first, torch.arange(4)), Tie(second, torch.arange(4), dim=1))


@every_way
@pytest.mark.parametrize("ties", [joined, lambda first, _: {first: [[0, 1]]}], ids=["joined", "one of them"])
def test_parameters_that_share_memory_are_refused_and_nothing_is_written(
    shared: str, ties: Callable[[Parameter, Parameter], Any], compact: bool
) -> None:
    first, second = parameter(4, 6, seed=1), parameter(6, 4, seed=2)
    SHARED[shared](first, second)
    before = first.detach().clone()
    with pytest.raises(ValueError, match=r"shares memory|cannot be written"):
        TiedOptimizer(SGD([first, second], lr=1.0), ties(first, second), compact=compact)
    assert same_bits(first, before)


@every_way
def test_memory_that_is_shared_later_is_refused_by_the_next_step(shared: str, compact: bool) -> None:
    first, second = parameter(4, 6, seed=1), parameter(6, 4, seed=2)
    optimizer = TiedOptimizer(SGD([first, second], lr=1.0), joined(first, second), compact=compact)
    for param in (first, second):
        param.grad = torch.ones_like(param)
    optimizer.step()
    SHARED[shared](first, second)
    before = first.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shares memory|cannot be written"):
            optimizer.step()
        assert same_bits(first, before)
    for param in (first, second):
        move(param, param.detach().clone())
    optimizer.tie_weights()
    optimizer.step()
    assert torch.equal(first, second.t())


def add_view(first: Parameter, optimizer: TiedOptimizer) -> Parameter:
    added = Parameter(first.detach()[:2])
    optimizer.add_param_group({"params": [added]})
    return added


# What shares memory with a tied parameter, a free one, and where.
COMES_ABOUT: dict[str, Callable[[Parameter, Parameter, TiedOptimizer], object]] = {
    "the tied one is moved": lambda tied, free, _: move(tied, free.data),
    "the free one is moved": lambda tied, free, _: move(free, tied.data[1:]),
    "a free one is added": lambda tied, _, optimizer: add_view(tied, optimizer),
}


class Weight(Parameter):
    """As a framework may have its own."""


@pytest.mark.parametrize("how", COMES_ABOUT)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("kind", [Parameter, Weight])
def test_memory_shared_with_a_free_parameter_is_refused_by_every_step(
    how: str, frozen: bool, kind: type[Parameter], compact: bool
) -> None:
    tied, free = kind(randn(4, 6, seed=1)), kind(randn(4, 6, seed=2))
    optimizer = TiedOptimizer(SGD([tied, free], lr=1.0), {tied: [[0, 2]]}, compact=compact)
    free.grad = torch.ones_like(free)
    if frozen:
        tied.requires_grad_(False)
    else:
        tied.grad = torch.ones_like(tied)
    optimizer.step()
    COMES_ABOUT[how](tied, free, optimizer)
    before = tied.detach().clone()
    for again in range(3):
        if again == 2:
            optimizer.tie_weights()
            before = tied.detach().clone()
        with pytest.raises(ValueError, match="shares memory"):
            optimizer.step()
        assert same_bits(tied, before)


def test_a_tied_weight_that_grows_into_another_where_it_is_is_refused(compact: bool) -> None:
    buffer = randn(4, 6, seed=0)
    tied, free = Parameter(buffer[:, :3]), Parameter(buffer[:, 3:])
    optimizer = TiedOptimizer(SGD([tied, free], lr=1.0), {tied: [[0, 2]]}, compact=compact)
    tied.grad = torch.zeros(4, 3)
    optimizer.step()
    move(tied, buffer.view(-1)[:12].view(4, 3))
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()


def test_a_free_weight_that_grows_into_a_tied_one_where_it_is_is_refused(compact: bool) -> None:
    buffer = randn(8, 3, seed=0)
    free, tied = Parameter(buffer[:4]), Parameter(buffer[4:])
    optimizer = TiedOptimizer(SGD([tied, free], lr=1.0), {tied: [[0, 2]]}, compact=compact)
    tied.grad = torch.zeros(4, 3)
    optimizer.step()
    move(free, buffer)
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()


@pytest.mark.parametrize("call", ["step", "tie_weights"])
def test_a_weight_that_has_come_to_repeat_its_entries_is_refused_as_such(call: str, compact: bool) -> None:
    weight = parameter(4, 6, seed=1)
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), {weight: [[0, 2]]}, compact=compact)
    move(weight, weight.data[:1].expand(4, 6))
    weight.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match="cannot be written"):
        getattr(optimizer, call)()


# Views that torch negates or conjugates as it reads them.
LAZY: dict[torch.dtype, Callable[[Tensor], Tensor]] = {torch.float32: torch._neg_view, torch.complex64: torch.conj}


@pytest.mark.parametrize("dtype", LAZY, ids=str)
@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
@pytest.mark.parametrize("is_joined", [False, True], ids=["alone", "joined"])
def test_a_weight_that_torch_comes_to_negate_or_conjugate_is_trained_rightly_or_refused(
    dtype: torch.dtype, moved: bool, is_joined: bool, compact: bool
) -> None:
    weights = [Parameter(randn(4, 3, seed=seed).to(dtype)) for seed in range(2)]
    ties: Any = Tie.equal(*weights) if is_joined else {weights[0]: [[0, 2]]}
    optimizer = TiedOptimizer(SGD(weights, lr=1.0), ties, compact=compact)
    for weight in weights:
        weight.grad = torch.zeros(4, 3, dtype=dtype)
    optimizer.step()
    weight = weights[0]
    move(weight, LAZY[dtype](weight.data.clone() if moved else weight.data))
    before = weight.detach().clone()
    grad = weight.grad = torch.full((4, 3), 1 + 1j if dtype.is_complex else 1.0, dtype=dtype)
    if compact or is_joined:
        for call in (optimizer.step, optimizer.tie_weights):
            with pytest.raises(ValueError, match=r"in memory|conjugated or negated"):
                call()
            assert torch.equal(weight, before)
    else:
        optimizer.step()
        assert torch.equal(weight, before - grad)
        assert is_tied(weight, [[0, 2]])


def test_parameters_in_one_buffer_that_share_no_entry_are_tied(compact: bool) -> None:
    buffer = randn(4, 6, seed=0)
    first, second = Parameter(buffer[:, :3]), Parameter(buffer[:, 3:])
    optimizer = TiedOptimizer(SGD([first, second]), {first: [[0, 1]], second: [[1, 2]]}, compact=compact)
    for param in (first, second):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert is_tied(first, [[0, 1]])
    assert is_tied(second, [[1, 2]])
