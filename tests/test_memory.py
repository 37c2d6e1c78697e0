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


def test_parameters_in_one_buffer_that_share_no_entry_are_tied(compact: bool) -> None:
    buffer = randn(4, 6, seed=0)
    first, second = Parameter(buffer[:, :3]), Parameter(buffer[:, 3:])
    optimizer = TiedOptimizer(SGD([first, second]), {first: [[0, 1]], second: [[1, 2]]}, compact=compact)
    for param in (first, second):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert is_tied(first, [[0, 1]])
    assert is_tied(second, [[1, 2]])
