"""The forum thread that the library comes from: each of its ways to tie rows, step by step, in float64.

The question was how to keep rows ``w[1, :]`` and ``w[2, :]`` equal to one ``w0`` with the mean of their
gradients. Every answer is a special case of the library, and is one here.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import average_rows_, same_bits
from strategies import loss_of, normal, recipes_for, seeds
from torch import Tensor
from torch.nn import Linear, Parameter

from tieopt import TiedOptimizer, is_tied

STEPS = 20
RATE = 0.05

rows_and_columns = st.tuples(st.integers(2, 8), st.integers(1, 5))


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)


@given(data=st.data(), shape=rows_and_columns, seed=st.integers(0, 2**31))
def test_the_posters_own_loop(compact: bool, data: st.DataObject, shape: tuple[int, int], seed: int) -> None:
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=2, max_size=5, unique=True))
    start = normal(shape, torch.float64, seed)
    theirs, ours = Parameter(start.clone()), Parameter(start.clone())
    average_rows_(theirs, rows)
    their_optimizer = torch.optim.SGD([theirs], lr=RATE, momentum=0.9)
    our_optimizer = TiedOptimizer(torch.optim.SGD([ours], lr=RATE, momentum=0.9), {ours: [rows]}, compact=compact)
    for step in range(STEPS):
        their_optimizer.zero_grad()
        loss_of([theirs], seed + step).backward()
        average_rows_(theirs.grad, rows)
        their_optimizer.step()
        average_rows_(theirs, rows)

        our_optimizer.zero_grad()
        loss_of([ours], seed + step).backward()
        our_optimizer.step()
        _close(ours, theirs)
        if not compact:
            _close(ours.grad, theirs.grad)
        assert is_tied(ours, [rows])


@given(shape=rows_and_columns, seed=st.integers(0, 2**31))
def test_one_parameter_in_two_modules_is_two_tied_halves_with_the_sum(
    compact: bool, shape: tuple[int, int], seed: int
) -> None:
    rows, width = shape
    first, second = Linear(width, rows, bias=False).double(), Linear(width, rows, bias=False).double()
    first.weight = second.weight = Parameter(normal((rows, width), torch.float64, seed))
    their_optimizer = torch.optim.Adam([first.weight], lr=RATE)

    stacked = Parameter(torch.cat([first.weight.detach()] * 2))
    pairs = [[row, row + rows] for row in range(rows)]
    our_optimizer = TiedOptimizer(
        torch.optim.Adam([stacked], lr=RATE), {stacked: pairs}, reduction="sum", compact=compact
    )
    for step in range(STEPS):
        their_optimizer.zero_grad()
        loss_of([first.weight, second.weight], seed + step).backward()
        their_optimizer.step()

        our_optimizer.zero_grad()
        loss_of([stacked[:rows], stacked[rows:]], seed + step).backward()
        our_optimizer.step()
        _close(stacked[:rows], first.weight)
        assert same_bits(stacked[:rows], stacked[rows:])


def _built(raw: Tensor) -> Tensor:
    """A weight whose rows 1 and 2 are one row of a smaller raw parameter, as the answer builds it."""
    return torch.cat([raw[:1], raw[1:2], raw[1:2], raw[2:]])


@given(shape=rows_and_columns, seed=st.integers(0, 2**31))
def test_a_weight_built_by_cat_from_a_raw_parameter_is_the_sum(
    compact: bool, shape: tuple[int, int], seed: int
) -> None:
    raw = Parameter(normal(shape, torch.float64, seed))
    weight = Parameter(_built(raw.detach()))
    their_optimizer = torch.optim.Adam([raw], lr=RATE)
    our_optimizer = TiedOptimizer(
        torch.optim.Adam([weight], lr=RATE), {weight: [[1, 2]]}, reduction="sum", compact=compact
    )
    for step in range(STEPS):
        their_optimizer.zero_grad()
        loss_of([_built(raw)], seed + step).backward()
        their_optimizer.step()

        our_optimizer.zero_grad()
        loss_of([weight], seed + step).backward()
        our_optimizer.step()
        _close(weight, _built(raw))


@given(shape=rows_and_columns, seed=st.integers(0, 2**31))
def test_the_hook_that_halves_the_gradient_is_the_mean(compact: bool, shape: tuple[int, int], seed: int) -> None:
    raw = Parameter(normal(shape, torch.float64, seed))
    halves = torch.ones(shape, dtype=torch.float64)
    halves[1] = 0.5
    raw.register_hook(lambda grad: grad * halves)
    weight = Parameter(_built(raw.detach()))
    their_optimizer = torch.optim.SGD([raw], lr=RATE, momentum=0.9)
    our_optimizer = TiedOptimizer(torch.optim.SGD([weight], lr=RATE, momentum=0.9), {weight: [[1, 2]]}, compact=compact)
    for step in range(STEPS):
        their_optimizer.zero_grad()
        loss_of([_built(raw)], seed + step).backward()
        their_optimizer.step()

        our_optimizer.zero_grad()
        loss_of([weight], seed + step).backward()
        our_optimizer.step()
        _close(weight, _built(raw))
        if not compact:
            _close(weight.grad, _built(raw.grad))


# The open question: does it disturb the graph to write to the weights after backward()?


@given(data=st.data(), shape=rows_and_columns, seed=seeds)
def test_after_a_step_the_next_gradient_is_that_of_the_weights_that_were_written(
    compact: bool, data: st.DataObject, shape: tuple[int, int], seed: int
) -> None:
    layer = Linear(shape[1], shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(normal(shape, torch.float64, seed))
    recipe = data.draw(recipes_for(layer.weight, layer.bias, closure=False))
    optimizer = TiedOptimizer(
        recipe(layer.parameters()), {layer.weight: [[0, 1]], layer.bias: [[0, 1]]}, compact=compact
    )
    batch = normal((3, shape[1]), torch.float64, seed + 1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(batch).square().sum().backward()
        optimizer.step()

    # A model that has never been written to since its graph was built, with the same weights.
    fresh = Linear(shape[1], shape[0]).double()
    fresh.load_state_dict(layer.state_dict())
    layer.zero_grad()
    for module in (layer, fresh):
        module(batch).square().sum().backward()
    assert same_bits(layer.weight.grad, fresh.weight.grad)
    assert same_bits(layer.bias.grad, fresh.bias.grad)
    assert layer.weight.is_leaf
    assert layer.weight.grad_fn is None


@given(shape=rows_and_columns, seed=seeds)
def test_writing_between_forward_and_backward_is_an_error_and_not_a_wrong_gradient(
    compact: bool, shape: tuple[int, int], seed: int
) -> None:
    weight = Parameter(normal(shape, torch.float64, seed))
    optimizer = TiedOptimizer(torch.optim.SGD([weight], lr=RATE), {weight: [[0, 1]]}, compact=compact)
    loss = weight.square().sum()
    optimizer.tie_weights()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@given(shape=rows_and_columns, seed=seeds)
def test_a_graph_that_is_kept_is_an_error_after_a_step_and_not_a_wrong_gradient(
    compact: bool, shape: tuple[int, int], seed: int
) -> None:
    weight = Parameter(normal(shape, torch.float64, seed))
    optimizer = TiedOptimizer(torch.optim.SGD([weight], lr=RATE), {weight: [[0, 1]]}, compact=compact)
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
