"""Optimizers that compare the loss with its gradient: they are given the gradient of what they train, or refused."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import closure_of, normal, seeds
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Optimizer
from torch.testing import assert_close

from tieopt import TiedOptimizer, is_tied
from tieopt.testing import ties

RIGHT = {False: "mean", True: "sum"}
CHOICES = list(itertools.product(["mean", "sum"], [False, True]))


class Slope(Optimizer):
    """Compares the slope of the loss along the gradient, by central differences, with the square of the gradient."""

    def __init__(self, params: list[Parameter]) -> None:
        super().__init__(params, {})
        self.slope = self.square = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            closure()
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        grads = [param.grad.clone() for param in params]
        self.square = sum(float(grad.square().sum()) for grad in grads)
        losses = []
        for way in (1e-5, -2e-5):
            torch._foreach_add_(params, grads, alpha=way)
            with torch.enable_grad():
                losses.append(closure().item())
        self.slope = (losses[0] - losses[1]) / 2e-5


@given(data=st.data(), seed=seeds)
def test_the_gradient_is_the_slope_of_the_loss_along_what_is_trained(
    compact: bool, data: st.DataObject, seed: int
) -> None:
    parameters = [Parameter(normal((4, 3), torch.float64, start)) for start in (1, 2)]
    drawn = data.draw(ties(parameters))
    optimizer = TiedOptimizer(Slope(parameters), drawn, reduction=RIGHT[compact], compact=compact)
    optimizer.step(closure_of(optimizer, parameters, seed))
    assert_close(optimizer.slope, optimizer.square, rtol=1e-5, atol=1e-7)


class Shifted(LBFGS):
    """A subclass of an optimizer that compares."""


class AliG(SGD):
    """Stands for the one of pytorch_optimizer, which is told by its name."""


class Holds(SGD):
    """Has another optimizer step in its place."""

    def __init__(self, params: list[Parameter], inner: type[Optimizer]) -> None:
        super().__init__(params)
        self.inner = inner(self.param_groups)
        self.param_groups = self.inner.param_groups


@pytest.mark.parametrize(("reduction", "compact"), CHOICES)
@pytest.mark.parametrize("inner", [LBFGS, Shifted, AliG, lambda params: Holds(params, AliG)])
def test_the_reduction_that_is_wrong_is_refused_before_anything_is_written(
    inner: Callable[[list[Parameter]], Optimizer], reduction: str, compact: bool
) -> None:
    weight = Parameter(normal((4, 3), torch.float64, 0))
    before = weight.detach().clone()
    optimizer = inner([weight])
    if reduction == RIGHT[compact]:
        TiedOptimizer(optimizer, {weight: [[0, 1]]}, reduction=reduction, compact=compact)
        assert is_tied(weight, [[0, 1]])
        return
    expected = r"compares the loss with its gradient(.|\n)*reduction='mean' with compact=False, or reduction='sum' with"
    with pytest.raises(ValueError, match=expected):
        TiedOptimizer(optimizer, {weight: [[0, 1]]}, reduction=reduction, compact=compact)
    assert not isinstance(optimizer, TiedOptimizer)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("reduction", "compact"), CHOICES)
def test_ties_that_come_later_are_refused_as_well(reduction: str, compact: bool) -> None:
    weight = Parameter(normal((4, 3), torch.float64, 0))
    optimizer = TiedOptimizer(LBFGS([weight]), {}, reduction=reduction, compact=compact)
    if reduction == RIGHT[compact]:
        optimizer.retie({weight: [[0, 1]]})
        assert is_tied(weight, [[0, 1]])
        return
    with pytest.raises(ValueError, match="compares the loss"):
        optimizer.retie({weight: [[0, 1]]})
    assert optimizer.ties == ()
