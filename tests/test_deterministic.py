"""``torch.use_deterministic_algorithms(True)``: ties of every kind work under it, and give one result."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import REDUCTIONS, randn, same_tree
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer
from tieopt.testing import assert_tied

pytestmark = pytest.mark.host("use_deterministic_algorithms", "ties of every kind, dtypes, sparse gradients")

# So many that a sum over a group is more than one after the other.
ROWS, WIDTH = 200, 24


def rows(weight: Tensor, other: Tensor) -> Any:
    return {weight: torch.arange(ROWS) // 2}


def ragged(weight: Tensor, other: Tensor) -> Any:
    return {weight: [list(range(0, ROWS, 2)), list(range(1, ROWS // 2, 2))]}


def columns(weight: Tensor, other: Tensor) -> Any:
    return Tie(weight, torch.arange(WIDTH) % 5 - 1, dim=1)


def elements(weight: Tensor, other: Tensor) -> Any:
    return {weight: torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 11 - 1}


def signed(weight: Tensor, other: Tensor) -> Any:
    return Tie(weight, torch.arange(ROWS) % 3, scale=torch.tensor([1.0, -1.0, 1.0, 0.0]).repeat(ROWS // 4))


def scaled(weight: Tensor, other: Tensor) -> Any:
    return Tie(weight, torch.arange(ROWS) % 3, scale=torch.tensor([2.0, 0.5, 1.0, -4.0]).repeat(ROWS // 4))


def joined(weight: Tensor, other: Tensor) -> Any:
    units = torch.arange(WIDTH)
    return Tie.join(Tie(weight, units % 7, dim=1), Tie(other, units % 7))


def several(weight: Tensor, other: Tensor) -> Any:
    upper, lower = torch.arange(ROWS) % 4, torch.arange(ROWS) % 5
    return [
        Tie(weight, torch.where(torch.arange(ROWS) < 100, upper, -1)),
        Tie(weight, torch.where(torch.arange(ROWS) < 100, -1, lower)),
    ]


KINDS: list[Callable[[Tensor, Tensor], Any]] = [rows, ragged, columns, elements, signed, scaled, joined, several]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def trained(kind: Any, device: torch.device, dtype: torch.dtype, *, sparse: bool = False, **kwargs: Any) -> nn.Module:
    """Two parameters after a few steps, tied after each."""
    starts = {"weight": randn(ROWS, WIDTH), "other": randn(WIDTH, ROWS, seed=1)}
    model = nn.ParameterDict({name: Parameter(start.to(device, dtype)) for name, start in starts.items()})
    ties = kind(model["weight"], model["other"])
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.0 if sparse else 0.9), ties, **kwargs)
    for step in range(3):
        for number, param in enumerate(model.values()):
            grad = randn(*param.shape, seed=10 * step + number).to(device, dtype)
            param.grad = grad.to_sparse(1) if sparse else grad
        optimizer.step()

        assert_tied(model, optimizer.ties)
        assert all(bool(param.isfinite().all()) for param in model.values())
    return model


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_ties_of_every_kind_hold_and_give_one_result(device, compact, kind, reduction):
    first, second = (
        trained(kind, device, torch.float32, reduction=reduction, compact=compact).state_dict() for _ in range(2)
    )

    assert same_tree(first, second)
    torch.use_deterministic_algorithms(False)
    other = trained(kind, device, torch.float32, reduction=reduction, compact=compact).state_dict()
    torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_other_dtypes_hold_and_give_one_result(device, compact, kind, dtype):
    first, second = (trained(kind, device, dtype, compact=compact).state_dict() for _ in range(2))

    assert same_tree(first, second)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sparse_gradients_hold_and_give_one_result(device, compact, reduction):
    first, second = (
        trained(ragged, device, torch.float32, sparse=True, reduction=reduction, compact=compact).state_dict()
        for _ in range(2)
    )

    assert same_tree(first, second)
