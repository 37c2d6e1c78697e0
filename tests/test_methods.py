"""Methods other than ``step()`` that read gradients or write weights, and optimizers that hold another one."""

import copy
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from checks import GROUPS, SHAPE, parameter, randn, same_bits, tied_bitwise
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.testing import assert_close

from tieopt import TiedOptimizer, tie_

LEADS = [group[0] for group in GROUPS] + [
    row for row in range(SHAPE[0]) if row not in itertools.chain.from_iterable(GROUPS)
]
# Which of the shared and free rows each row is.
PLACES = torch.tensor(
    [
        next(n for n, lead in enumerate(LEADS) if row == lead or any(lead in g and row in g for g in GROUPS))
        for row in range(SHAPE[0])
    ]
)


class SAM(Optimizer):
    """Foret et al., "Sharpness-Aware Minimization", 2021: climbs, and steps by the gradient that is there."""

    def __init__(self, params: list[Parameter], inner: type[Optimizer] = SGD, shared: bool = False, **kwargs: Any):
        super().__init__(params, {"rho": 0.05, **kwargs})
        self.inner = inner(self.param_groups, **kwargs)
        self.param_groups = self.inner.param_groups
        if shared:
            self.state = self.inner.state

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        norm = torch.stack([param.grad.norm() for param in params]).norm()
        for param in params:
            self.state[param]["old"] = param.clone()
            param.add_(param.grad, alpha=float(self.param_groups[0]["rho"] / norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if "old" in self.state[param]:
                    param.data = self.state[param].pop("old")
        self.inner.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Around(Optimizer):
    """Has an optimizer step in its place, which it keeps as it is told."""

    def __init__(self, params: list[Parameter], keep: Callable[[Optimizer], Any], inner: Any = SGD, **kwargs: Any):
        super().__init__(params, kwargs)
        self.held = keep(inner(self.param_groups, **kwargs))

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        held = self.held
        while not isinstance(held, Optimizer):
            held = held["inner"] if isinstance(held, dict) else held[0]
        return held.step(closure)


class Uninitialised(Optimizer):
    """Never calls ``Optimizer.__init__``, and has no dictionaries of hooks."""

    def __init__(self, param_groups: list[dict[str, Any]], **kwargs: Any):
        self.param_groups, self.state, self.defaults = param_groups, defaultdict(dict), kwargs
        self.held = SGD(param_groups, **kwargs)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        return self.held.step(closure)


HELD: dict[str, Callable[..., Optimizer]] = {
    "in a list": partial(Around, keep=lambda inner: [inner]),
    "in a dictionary": partial(Around, keep=lambda inner: {"inner": inner}),
    "in a list in a dictionary": partial(Around, keep=lambda inner: {"inner": [inner]}),
    "by another one": partial(Around, keep=lambda inner: inner, inner=partial(Around, keep=lambda inner: (inner,))),
    "by one without hooks": partial(Around, keep=lambda inner: inner, inner=Uninitialised),
}


def test_a_line_search_that_is_held_finds_the_compact_parameters() -> None:
    """LBFGS holds the list of its parameters, and counts their entries, outside its parameter groups."""
    trained = []
    for build in (torch.optim.LBFGS, partial(Around, keep=lambda inner: inner, inner=torch.optim.LBFGS)):
        weight, optimizer = made(lambda params, build=build: build(params, lr=0.1), compact=True, reduction="sum")
        for step in range(3):
            target = randn(*SHAPE, seed=step)

            def closure(weight: Parameter = weight, target: Tensor = target) -> Tensor:
                weight.grad = None
                loss = (weight - target).square().sum()
                loss.backward()
                return loss

            optimizer.step(torch.enable_grad()(closure))
        assert tied_bitwise(weight)
        trained.append(weight)
    assert same_bits(*trained)


@pytest.mark.parametrize("held", HELD)
def test_an_optimizer_steps_on_the_shared_rows_wherever_it_is_held(held: str, compact: bool) -> None:
    settings = {"lr": 0.05, "momentum": 0.9}
    weight, optimizer = made(lambda params: HELD[held](params, **settings), compact=compact)
    other, plain = made(lambda params: SGD(params, **settings), compact=compact)
    for step in range(3):
        for param, one in ((weight, optimizer), (other, plain)):
            param.grad = randn(*SHAPE, seed=step)
            one.step()
    assert same_bits(weight, other)


class KeepsParameters(SGD):
    """Steps on a list of its own instead of its parameter groups."""

    def __init__(self, params: list[Parameter], lr: float):
        super().__init__(params, lr)
        self.params = list(params)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for param in self.params:
            param.sub_(param.grad, alpha=0.1)


def _keeps_parameters(param_groups: list[dict[str, Any]], lr: float) -> Optimizer:
    return KeepsParameters(param_groups[0]["params"], lr)


@pytest.mark.parametrize(
    ("build", "where"),
    [(KeepsParameters, "params"), (partial(Around, keep=lambda inner: inner, inner=_keeps_parameters), "params")],
    ids=["by itself", "within"],
)
def test_the_compact_mode_refuses_parameters_beside_the_groups(build: Callable[..., Optimizer], where: str) -> None:
    with pytest.raises(ValueError, match=f"outside its parameter groups(.|\n)*with parameters in {where}"):
        made(lambda params: build(params, lr=0.1), compact=True, reduction="sum")
    weight, optimizer = made(lambda params: KeepsParameters(params, lr=0.1))
    weight.grad = randn(*SHAPE, seed=2)
    optimizer.step()
    assert tied_bitwise(weight)


class KeepsBuffers(SGD):
    """Keeps momenta by parameter from the start, and not in its state."""

    def __init__(self, params: list[Parameter], lr: float):
        super().__init__(params, lr)
        self.momenta = {param: torch.zeros_like(param) for param in params}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.sub_(self.momenta[param].mul_(0.9).add_(param.grad), alpha=0.1)


def test_the_compact_mode_says_why_buffers_beside_the_state_have_no_shared_rows() -> None:
    weight, optimizer = made(lambda params: KeepsBuffers(params, lr=0.1), compact=True)
    start, weight.grad = weight.detach().clone(), randn(*SHAPE, seed=2)
    with pytest.raises(KeyError) as caught:
        optimizer.step()
    assert "compact=False" in caught.value.__notes__[0]
    assert torch.equal(weight, start)
    assert optimizer.param_groups[0]["params"] == [weight]


class Averaging(SGD):
    """Keeps an average of the weights, and exchanges it with them."""

    def average(self, decay: float = 0.5) -> None:
        for param in self._params():
            average = self.state[param].setdefault("average", param.detach().clone())
            average.lerp_(param.detach(), 1 - decay)

    def swap(self) -> None:
        for n, param in enumerate(self._params()):
            average = self.state[param]["average"].clone()
            self.state[param]["average"].copy_(param.detach())
            # Noise that no two members share, and that is written without a trace.
            param.data.copy_(average + 1e-4 * randn(*param.shape, seed=n))

    def descend(self, closure: Callable[[], Tensor], lr: float) -> Tensor:
        loss = closure()
        for param in self._params():
            param.data.sub_(param.grad, alpha=lr)
        return loss

    def decay(self, given: Any, by: float) -> None:
        params = given["params"] if isinstance(given, dict) else [given] if isinstance(given, Tensor) else given
        for param in params:
            param.data.mul_(by)

    def fail(self) -> None:
        for param in self._params():
            param.data.add_(randn(*param.shape, seed=7))
        raise RuntimeError("failed halfway")

    def trained(self) -> tuple[Any, ...]:
        return self, self.param_groups, self.param_groups[0], self._params()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self.swap()
        yield
        self.swap()

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


def loss_of(rows: Tensor, step: int) -> Tensor:
    return (rows.sin() * randn(*SHAPE, seed=100 + step)).sum() + rows.prod(1).sum()


def made(build: Callable[[list[Parameter]], Optimizer], **options: Any) -> tuple[Parameter, Any]:
    weight = parameter(*SHAPE, seed=1)
    return weight, TiedOptimizer(build([weight]), {weight: GROUPS}, **options)


def two_steps(optimizer: Any, closure: Callable[[], Tensor]) -> None:
    closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step(zero_grad=True)


def one_step(optimizer: Any, closure: Callable[[], Tensor]) -> None:
    optimizer.step(closure)
    optimizer.zero_grad()


def test_the_compact_mode_refuses_a_method_that_goes_on_before_anything_is_written() -> None:
    weight, optimizer = made(lambda params: Averaging(params, lr=0.1), compact=True)
    with torch.no_grad():
        weight[GROUPS[0][0]] += 1.0
    weight.grad = randn(*SHAPE, seed=2)
    before, gradient = weight.detach().clone(), weight.grad.clone()
    with pytest.raises(TypeError, match="goes on after it has returned"):
        optimizer.averaged()
    assert torch.equal(weight, before)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stepped", [two_steps, one_step])
def test_sam_in_two_calls_or_in_one_keeps_the_ties_and_trains_the_shared_rows(
    stepped: Callable[..., None], shared: bool, compact: bool
) -> None:
    settings = {"lr": 0.05, "momentum": 0.9}
    weight, optimizer = made(lambda params: SAM(params, shared=shared, **settings), reduction="sum", compact=compact)
    rows = Parameter(tie_(randn(*SHAPE, seed=1), GROUPS)[LEADS])
    bare = SAM([rows], **settings)
    for step in range(10):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(weight, step)
            loss.backward()
            return loss

        def shared_closure(step: int = step) -> Tensor:
            bare.zero_grad()
            loss = loss_of(rows[PLACES], step)
            loss.backward()
            return loss

        stepped(optimizer, closure)
        one_step(bare, shared_closure)
        assert tied_bitwise(weight)
        if compact:
            # In the full mode the norm of the gradient counts every member.
            assert_close(weight.detach(), rows.detach()[PLACES], rtol=1e-5, atol=1e-6)


def test_sam_resumes_changes_its_ties_and_goes_on_untied(compact: bool) -> None:
    weight, optimizer = made(lambda params: SAM(params, lr=0.05, momentum=0.9), compact=compact)
    momentum = optimizer.inner.state

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(weight, 0)
        loss.backward()
        return loss

    for _ in range(2):
        two_steps(optimizer, closure)
    before = momentum[weight]["momentum_buffer"].clone()
    optimizer.retie({weight: [[0, 1]]})
    two_steps(optimizer, closure)
    assert tied_bitwise(weight, [[0, 1]])
    optimizer.untie()
    assert momentum[weight]["momentum_buffer"].shape == weight.shape
    assert bool(before.any())
    two_steps(optimizer, closure)
    assert not torch.equal(weight[0], weight[1])


def test_any_public_method_leaves_weights_that_are_tied(compact: bool) -> None:
    weight, optimizer = made(lambda params: Averaging(params, lr=0.1), compact=compact)
    for step in range(3):
        loss_of(weight, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()
        assert tied_bitwise(weight)
    trained = weight.detach().clone()
    optimizer.swap()
    assert tied_bitwise(weight)
    assert not torch.equal(weight, trained)
    with pytest.raises(RuntimeError, match="failed halfway"):
        optimizer.fail()
    assert tied_bitwise(weight)


def test_a_method_leaves_a_frozen_parameter_as_somebody_has_written_it(compact: bool) -> None:
    weight, optimizer = made(lambda params: Averaging(params, lr=0.1), compact=compact)
    loss_of(weight, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.average()
    weight.requires_grad_(False)
    weight.copy_(randn(*SHAPE, seed=3))
    before = weight.clone()
    optimizer.average()
    assert same_bits(weight, before)


def test_a_method_returns_the_optimizer_and_parameters_that_the_user_has(compact: bool) -> None:
    weight, optimizer = made(lambda params: Averaging(params, lr=0.1), compact=compact)
    same, groups, group, (param,) = optimizer.trained()
    assert same is optimizer
    assert groups is optimizer.param_groups
    assert group is optimizer.param_groups[0]
    assert param is weight


def test_a_method_that_goes_on_after_it_has_returned_is_refused_in_the_compact_mode(compact: bool) -> None:
    weight, optimizer = made(lambda params: Averaging(params, lr=0.1), compact=compact)
    optimizer.average()
    trained = weight.detach().clone()
    if compact:
        with pytest.raises(TypeError, match=r"Averaging.averaged\(\)"), optimizer.averaged():
            pass
        assert torch.equal(weight, trained)
        return
    with optimizer.averaged():
        assert tied_bitwise(weight)
        assert not torch.equal(weight, trained)


@pytest.mark.parametrize("given", ["position", "name"])
def test_a_closure_of_another_method_leaves_tied_gradients(given: str, compact: bool) -> None:
    weight, optimizer = made(lambda params: Averaging(params, lr=0.1), compact=compact)
    start = weight.detach().clone()
    mean = tie_(torch.autograd.grad(loss_of(weight, 0), weight)[0], GROUPS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(weight, 0)
        loss.backward()
        return loss

    arguments, named = ((closure, 0.1), {}) if given == "position" else ((), {"closure": closure, "lr": 0.1})
    loss = optimizer.descend(*arguments, **named)
    assert_close(loss, loss_of(start, 0))
    assert tied_bitwise(weight)
    assert_close(weight.detach(), start - 0.1 * mean)


GIVEN: dict[str, Callable[[Any, Any], Any]] = {
    "a parameter": lambda optimizer, weight: weight,
    "a parameter group": lambda optimizer, weight: optimizer.param_groups[0],
    "the parameters of a group": lambda optimizer, weight: optimizer.param_groups[0]["params"],
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_method_is_called_with_parameters(given: str, compact: bool) -> None:
    weight, optimizer = made(lambda params: Averaging(params, lr=0.1), compact=compact)
    start = weight.detach().clone()
    optimizer.decay(GIVEN[given](optimizer, weight), by=0.5)
    assert torch.equal(weight, start * 0.5)


class Private(Optimizer):
    """Makes the gradient of each parameter within the step, and hands it on, as optimizers for privacy do."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = param.samples.sum(0)
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


def test_sparse_gradients_are_tied_for_an_optimizer_within() -> None:
    weights = [parameter(*SHAPE, seed=1) for _ in range(2)]
    around = Around([weights[0]], keep=lambda inner: inner, lr=0.1)
    for weight, one in zip(weights, (around, SGD([weights[1]], lr=0.1)), strict=True):
        optimizer = TiedOptimizer(one, {weight: GROUPS})
        torch.nn.functional.embedding(torch.tensor([0, 3, 1]), weight, sparse=True).sum().backward()
        optimizer.step()
    assert same_bits(*weights)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("inner", [SGD, torch.optim.Adam])
def test_gradients_that_are_made_within_the_step_are_tied(inner: type[Optimizer], reduction: str) -> None:
    weights = [parameter(*SHAPE, seed=1, dtype=torch.float64) for _ in range(2)]
    within = TiedOptimizer(Private(inner([weights[0]], lr=0.1)), {weights[0]: GROUPS}, reduction=reduction)
    before = Private(TiedOptimizer(inner([weights[1]], lr=0.1), {weights[1]: GROUPS}, reduction=reduction))
    for step in range(5):
        for weight, optimizer in zip(weights, (within, before), strict=True):
            weight.grad = randn(*SHAPE, seed=50, dtype=torch.float64)
            weight.samples = randn(3, *SHAPE, seed=step, dtype=torch.float64)
            optimizer.step()
            assert tied_bitwise(weight)
        assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)


def test_the_compact_mode_asks_for_the_optimizer_within_to_be_tied_first() -> None:
    weight = parameter(*SHAPE, seed=1)
    private = Private(SGD([weight], lr=0.1))
    with pytest.raises(ValueError, match="ties of the optimizer within, before it is wrapped"):
        TiedOptimizer(private, {weight: GROUPS}, compact=True)
    tied = TiedOptimizer(private.inner, {weight: GROUPS}, compact=True)
    weight.samples = randn(3, *SHAPE, seed=2)
    Private(tied).step()
    assert tied_bitwise(weight)


def test_methods_keep_their_signatures_and_what_they_return() -> None:
    _, optimizer = made(lambda params: Averaging(params, lr=0.1))
    assert optimizer.average.__name__ == "average"
    assert Averaging.average.__doc__ == type(optimizer).average.__doc__
    assert same_bits(optimizer.param_groups[0]["params"][0], optimizer._params()[0])


class MakesGradients(SGD):
    """Makes its gradients within its own step."""

    def step(self, closure: None = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.grad = randn(*SHAPE, seed=9)
        super().step()


def test_gradients_that_an_optimizer_makes_for_itself_are_warned_of() -> None:
    weight, optimizer = made(lambda params: MakesGradients(params, lr=0.1))
    weight.grad = randn(*SHAPE, seed=2)
    with pytest.warns(UserWarning, match="MakesGradients made gradients within its step"):
        optimizer.step()
    assert tied_bitwise(weight)


# --- clearing gradients ---


class ClearsItsWay(SGD):
    """Has another default than torch, and takes it by another name."""

    def zero_grad(self, keep: bool = True) -> None:
        super().zero_grad(set_to_none=not keep)


class Counting(TiedOptimizer):
    cleared = 0

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        Counting.cleared += 1
        super().zero_grad(*args, **kwargs)


def test_clearing_gradients_is_what_the_optimizer_makes_of_it(compact: bool) -> None:
    weight = Parameter(randn(*SHAPE))
    optimizer = Counting(ClearsItsWay([weight], lr=0.1), {weight: GROUPS}, compact=compact)
    before = Counting.cleared
    weight.grad = torch.ones(SHAPE)
    optimizer.zero_grad()
    assert torch.equal(weight.grad, torch.zeros(SHAPE))
    optimizer.zero_grad(keep=False)
    assert weight.grad is None
    assert Counting.cleared == before + 2


# --- optimizers that come and go, and steps within methods ---


@pytest.mark.parametrize("container", [[], {}], ids=["list", "dictionary"])
def test_an_optimizer_that_is_held_later_steps_on_the_shared_rows(container: Any, compact: bool) -> None:
    class Holds(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})
            self.parts = copy.copy(container)

        def step(self, closure: None = None) -> None:
            for part in self.parts.values() if isinstance(self.parts, dict) else self.parts:
                part.step()

    weight, optimizer = made(Holds, compact=compact)
    weight.grad = torch.ones(SHAPE)
    optimizer.step()
    before = weight.detach().clone()
    later = SGD(optimizer.param_groups, lr=0.1)
    if isinstance(optimizer.parts, dict):
        optimizer.parts["later"] = later
    else:
        optimizer.parts.append(later)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1)
    assert later.param_groups[0]["params"][0] is weight


def test_a_method_may_step_with_a_closure(compact: bool) -> None:
    class Fits(SGD):
        def fit(self, function: Callable[[], Tensor]) -> Any:
            return self.step(function)

        def step(self, closure: Callable[[], Tensor]) -> Any:
            with torch.enable_grad():
                loss = closure()
            inspect.unwrap(SGD.step)(self)
            return loss

    weight, optimizer = made(lambda params: Fits(params, lr=0.1), compact=compact)
    before = weight.detach().clone()

    def closure() -> Tensor:
        weight.grad = torch.ones(SHAPE)
        return weight.sum()

    with torch.no_grad():
        optimizer.fit(closure)
    torch.testing.assert_close(weight.detach(), before - 0.1)
