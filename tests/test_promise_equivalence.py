"""Promise 5: training tied weights is training the one shared parameter, with the mean or the sum of gradients."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import SharedTraining, slowly_tied
from strategies import (
    ENTRYWISE,
    Recipe,
    few_examples,
    labels,
    loss_of,
    normal,
    reductions,
    seeds,
    shapes,
    small_shapes,
    spelled,
)
from torch.nn import Parameter

from tieopt import TiedOptimizer

STEPS = 10


def _assert_on_one_trajectory(weights: list[Parameter], shared: SharedTraining) -> None:
    """1e-12 relative to the size of the weights: entries that cross zero have no relative precision."""
    for weight, expected in zip(weights, shared.weights(), strict=True):
        size = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0)
        torch.testing.assert_close(weight.detach(), expected.detach(), rtol=1e-12, atol=1e-12 * size)


@pytest.mark.parametrize("recipe", ENTRYWISE, ids=repr)
@few_examples
@given(st.data())
def test_the_trajectory_is_that_of_the_shared_parameter(
    device: torch.device, compact: bool, recipe: Recipe, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from([dtype for dtype in (torch.float64, torch.complex128) if dtype in recipe.dtypes]))
    starts = [
        normal(data.draw(shapes()), dtype, data.draw(seeds)).to(device) for _ in range(data.draw(st.integers(1, 3)))
    ]
    names = [data.draw(labels(len(start))) for start in starts]
    starts = [slowly_tied(start, each).to(device) for start, each in zip(starts, names, strict=True)]
    reduction = data.draw(reductions)
    own_rates = data.draw(st.booleans())

    def build(parameters: list[Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": [p], "lr": 0.01 / (i + 1)} for i, p in enumerate(parameters)]
        return recipe(groups if own_rates else parameters)

    parameters = [Parameter(start.clone()) for start in starts]
    ties = {p: data.draw(spelled(each)) for p, each in zip(parameters, names, strict=True)}
    optimizer = TiedOptimizer(build(parameters), ties, reduction=reduction, compact=compact)
    shared = SharedTraining(starts, names, build, reduction)

    seed = data.draw(st.integers(0, 2**31))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(parameters, seed + step).backward()
        optimizer.step()
        shared.optimizer.zero_grad()
        loss_of(shared.weights(), seed + step).backward()
        shared.optimizer.step()
        _assert_on_one_trajectory(parameters, shared)


@given(st.data())
def test_the_trajectory_starts_from_the_mean_of_untied_weights(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    start = normal(data.draw(shapes()), torch.float64, data.draw(seeds)).to(device)
    names = data.draw(labels(len(start)))
    parameter = Parameter(start.clone())
    TiedOptimizer(torch.optim.SGD([parameter]), {parameter: data.draw(spelled(names))}, compact=compact)
    torch.testing.assert_close(parameter.detach(), slowly_tied(start, names).to(device), rtol=1e-12, atol=1e-14)


def _sgd(parameters: list[Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _adagrad(parameters: list[Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.1)


def _sparse_adam(parameters: list[Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(parameters, lr=0.1)


@given(data=st.data(), build=st.sampled_from([_sgd, _adagrad, _sparse_adam]), reduction=reductions)
def test_with_sparse_gradients_it_is_a_smaller_embedding(
    device: torch.device,
    compact: bool,
    data: st.DataObject,
    build: Callable[[list[Parameter]], torch.optim.Optimizer],
    reduction: str,
) -> None:
    shape = (data.draw(st.integers(1, 30)), *data.draw(small_shapes))
    names = data.draw(labels(shape[0]))
    start = slowly_tied(normal(shape, torch.float64, data.draw(seeds)), names).to(device)
    parameter = Parameter(start.clone())
    optimizer = TiedOptimizer(build([parameter]), {parameter: names}, reduction=reduction, compact=compact)
    # The hook of the shared parameter cannot divide a sparse gradient by counts, so that it is built here.
    shared = SharedTraining([start], [names], build, "sum")
    slots, counts = shared.slots[0], shared.counts[0]

    for seed in data.draw(st.lists(seeds, min_size=1, max_size=10)):
        stored = data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=6))
        rows = torch.tensor(stored, device=device)
        values = normal((len(stored), *shape[1:]), torch.float64, seed).to(device)
        parameter.grad = torch.sparse_coo_tensor(rows[None], values, shape)
        optimizer.step()
        summed = values if reduction == "sum" else values / counts[slots[rows]]
        compact = shared.shared[0]
        compact.grad = torch.sparse_coo_tensor(slots[rows][None], summed, compact.shape)
        shared.optimizer.step()
        _assert_on_one_trajectory([parameter], shared)
