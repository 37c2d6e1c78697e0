"""Optimizers with ``train()`` and ``eval()``, which exchange the weights of training and those of evaluation."""

import io
from collections.abc import Callable, Sequence
from typing import Any, Self

import pytest
import torch
from checks import GROUPS, SHAPE, bits, parameter, randn, same_bits, same_tree, tied_bitwise, train
from hypothesis import given
from hypothesis import strategies as st
from reference import CompactTraining, groups_of_entries, slowly_tied_entries
from strategies import closure_of, loss_of, normal, reductions, seeds
from test_torch_optimizer import StandIn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.testing import assert_close

from tieopt import Tie, TiedOptimizer, is_tied
from tieopt.testing import ties


class ScheduleFree(Optimizer):
    """Defazio et al., "The Road Less Scheduled", 2024: trains at a point between the steps and their average."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.8) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0, "training": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            if not group["training"]:
                raise RuntimeError("call train() first")
            group["steps"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    base = self.state[param].setdefault("base", param.clone())
                    param.lerp_(base, 1 / group["steps"])
                    param.sub_(param.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - 1 / group["steps"])))
                    base.sub_(param.grad, alpha=group["lr"])
        return loss

    @torch.no_grad()
    def train(self, mode: bool = True) -> Self:
        for group in self.param_groups:
            if group["training"] != mode:
                group["training"] = mode
                weight = 1 - group["beta"] if mode else 1 - 1 / group["beta"]
                for param in group["params"]:
                    if self.state[param]:
                        self.move(param, self.state[param]["base"], weight)
        return self

    def eval(self) -> Self:
        return self.train(False)

    def move(self, param: Tensor, base: Tensor, weight: float) -> None:
        param.lerp_(base, weight)


class Noisy(ScheduleFree):
    """Rounds every entry otherwise, and leaves no trace of what it writes."""

    def move(self, param: Tensor, base: Tensor, weight: float) -> None:
        super().move(param.data, base, weight)
        param.data.mul_(1 + 1e-3 * normal(param.shape, torch.float64, 0).to(param))


def one(inner: type[Optimizer] = ScheduleFree, **options: Any) -> tuple[Parameter, Any]:
    weight = parameter(*SHAPE)
    return weight, TiedOptimizer(inner([weight]), {weight: GROUPS}, **options)


def drawn_weights(
    data: st.DataObject, dtype: torch.dtype, kinds: Sequence[str] = ("none", "signs", "zeros", "any")
) -> tuple[list[Parameter], list[Tie]]:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    weights = [Parameter(normal(shape, dtype, data.draw(seeds))) for shape in shapes]
    return weights, data.draw(ties(weights, kinds))


# What is done one after the other.
histories = st.lists(st.sampled_from(["step", "step", "eval", "train"]), min_size=6, max_size=20)


def act(optimizer: Any, what: str, closure: Callable[[], Tensor]) -> None:
    if what == "step":
        optimizer.train()  # Or it is an error.
        optimizer.step(closure)
    else:
        getattr(optimizer, what)()


@given(st.data(), histories)
def test_weights_are_tied_in_training_and_in_evaluation(compact, data, history):
    weights, drawn = drawn_weights(data, data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64])))
    optimizer = TiedOptimizer(Noisy(weights), drawn, compact=compact)
    for seed, what in enumerate(history):
        act(optimizer, what, closure_of(optimizer, weights, seed))
        assert optimizer.tie_drift() == 0
        before = [bits(weight) for weight in weights]
        optimizer.tie_weights()
        assert all(torch.equal(bits(weight), old) for weight, old in zip(weights, before, strict=True))


@given(st.data(), histories, reductions)
def test_training_and_evaluation_are_those_of_the_shared_values(compact, data, history, reduction):
    # To train every member is exact for these scales.
    kinds = ("none", "signs", "zeros", *["any"] * compact)
    weights, drawn = drawn_weights(data, torch.float64, kinds)
    groups = [group for tie in drawn for group in groups_of_entries(tie, weights)]
    with torch.no_grad():
        for weight, start in zip(weights, slowly_tied_entries(weights, groups), strict=True):
            weight.copy_(start)
    shared = CompactTraining(weights, drawn, ScheduleFree, reduction)
    optimizer = TiedOptimizer(ScheduleFree(weights), drawn, reduction=reduction, compact=compact)

    for seed, what in enumerate(history):

        def closure(seed: int = seed) -> Tensor:
            shared.optimizer.zero_grad()
            loss = loss_of(shared.weights(), seed)
            loss.backward()
            return loss

        act(optimizer, what, closure_of(optimizer, weights, seed))
        act(shared.optimizer, what, closure)
        for weight, expected in zip(weights, shared.weights(), strict=True):
            size = max(1.0, float(expected.detach().abs().max()))
            assert_close(weight.detach(), expected.detach(), rtol=1e-12, atol=1e-12 * size)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_that_is_saved_in_either_state_goes_on_bit_for_bit(compact, evaluated):
    def go_on(optimizer: Any) -> None:
        optimizer.train()
        train(optimizer, 3, seed=7)
        optimizer.eval()

    weight, optimizer = one(Noisy, compact=compact)
    train(optimizer, 3)
    optimizer.train(not evaluated)
    file = io.BytesIO()
    torch.save([weight.detach(), optimizer.state_dict()], file)
    file.seek(0)
    go_on(optimizer)

    resumed, twin = one(Noisy, compact=compact)
    saved, state = torch.load(file, weights_only=True)
    resumed.data.copy_(saved)
    twin.load_state_dict(state)
    assert twin.param_groups[0]["training"] != evaluated
    go_on(twin)
    assert same_bits(resumed, weight)
    assert same_tree(twin.state_dict(), optimizer.state_dict())


def test_a_checkpoint_of_evaluation_goes_on_in_the_other_mode(compact):
    weight, optimizer = one(compact=compact)
    train(optimizer, 3)
    optimizer.eval()
    other, twin = one(compact=not compact)
    other.data.copy_(weight.detach())
    twin.load_state_dict(optimizer.state_dict())
    for each in (optimizer, twin):
        each.train()
        train(each, 3, seed=7)
        each.eval()
    assert_close(other, weight)


@pytest.mark.filterwarnings("ignore:Tied weights were replaced or written to")
def test_what_is_written_to_the_weights_of_evaluation_counts(compact):
    weight, optimizer = one(compact=compact)
    with torch.no_grad():
        weight[GROUPS[0][0]] += 3
    mean = weight.detach()[GROUPS[0]].mean(0)
    optimizer.eval()
    assert_close(weight.detach()[GROUPS[0][1]], mean)


def test_gradients_are_left_alone(compact):
    weight, optimizer = one(compact=compact)
    train(optimizer, 2)
    weight.grad = gradient = randn(*SHAPE, seed=3)
    before = bits(gradient)
    optimizer.eval()
    assert weight.grad is gradient
    assert torch.equal(bits(gradient), before)


def test_what_was_frozen_in_training_is_exchanged_and_stays_tied(compact):
    weight, optimizer = one(Noisy, compact=compact)
    train(optimizer, 3)
    weight.requires_grad_(False)
    before = bits(weight)
    optimizer.eval()
    assert not torch.equal(bits(weight), before)
    assert tied_bitwise(weight)


def test_what_was_frozen_from_the_start_is_not_written(compact):
    weight = Parameter(randn(*SHAPE), requires_grad=False)
    before = bits(weight)
    optimizer = TiedOptimizer(Noisy([weight]), {weight: GROUPS}, compact=compact)
    optimizer.eval()
    assert torch.equal(bits(weight), before)


def test_relaxed_ties_are_not_tied():
    weight, optimizer = one(Noisy, strength=0.5)
    train(optimizer, 3)
    optimizer.eval()
    assert not is_tied(weight, GROUPS)


class Fails(Noisy):
    def move(self, param: Tensor, base: Tensor, weight: float) -> None:
        super().move(param, base, weight)
        raise RuntimeError("half way")


def test_weights_are_tied_where_it_fails_half_way(compact):
    weight, optimizer = one(Fails, compact=compact)
    train(optimizer, 3)
    with pytest.raises(RuntimeError, match="half way"):
        optimizer.eval()
    assert tied_bitwise(weight)


def test_it_returns_what_the_optimizer_does_and_takes_its_arguments(compact):
    _, optimizer = one(compact=compact)
    assert optimizer.eval() is optimizer
    assert optimizer.train(mode=True) is optimizer
    assert optimizer.param_groups[0]["training"]
    with pytest.raises(TypeError):
        optimizer.eval(True)


def test_what_a_framework_has_put_in_its_place_does_the_same(compact):
    weight, optimizer = one(Noisy, compact=compact)
    train(optimizer, 3)
    stand_in, before = StandIn(optimizer), bits(weight)
    stand_in.eval()
    assert not optimizer.param_groups[0]["training"]
    assert not torch.equal(bits(weight), before)
    assert tied_bitwise(weight)


def test_optimizers_without_them_get_none(compact):
    _, optimizer = one(SGD, compact=compact)
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")
