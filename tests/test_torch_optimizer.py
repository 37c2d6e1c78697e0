"""What torch, and code that is written for torch, may ask of an optimizer, asked of a tied one."""

import contextlib
import copy
import functools
import gc
import inspect
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from types import MethodType

import pytest
import torch
from checks import (
    GROUPS,
    REDUCTIONS,
    SHAPE,
    bits,
    mean_gradient,
    one_bare,
    one_tied,
    parameter,
    pickled,
    randn,
    same_bits,
    same_tree,
    sum_gradient,
    tied_bitwise,
    train,
)
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tieopt import Tie, TiedOptimizer
from tieopt.numbers import reduction as reduction_module

# --- a subclass of torch.optim.Optimizer ---


@pytest.mark.parametrize("inner", [SGD, Adam, AdamW, Adagrad])
def test_a_tied_optimizer_is_an_optimizer_and_an_instance_of_the_class_that_it_wraps(compact, inner):
    _, optimizer = one_tied(inner, compact=compact)

    assert isinstance(optimizer, Optimizer)
    assert isinstance(optimizer, TiedOptimizer)
    assert isinstance(optimizer, inner)
    assert type(optimizer).__name__ == f"Tied{inner.__name__}"


def test_there_is_one_list_of_groups_one_state_and_one_set_of_defaults():
    weight = parameter(*SHAPE)
    inner = AdamW([weight])
    before = (inner.param_groups, inner.param_groups[0], inner.state, inner.defaults)

    optimizer = TiedOptimizer(inner, {weight: GROUPS})

    after = (optimizer.param_groups, optimizer.param_groups[0], optimizer.state, optimizer.defaults)
    assert all(left is right for left, right in zip(before, after, strict=True))
    assert all(left is right for left, right in zip(before[::2], (inner.param_groups, inner.state), strict=True))


@pytest.mark.parametrize("through", ["tied", "inner"])
def test_a_learning_rate_that_is_set_on_either_reaches_the_step(compact, through):
    weight = parameter(*SHAPE)
    inner = SGD([weight], lr=1.0)
    optimizer = TiedOptimizer(inner, {weight: GROUPS}, compact=compact)
    before = weight.detach().clone()

    {"tied": optimizer, "inner": inner}[through].param_groups[0]["lr"] = 0.0
    train(optimizer, 1)

    assert same_bits(weight, before)
    assert bool(weight.grad.any())


def test_an_attribute_that_a_host_writes_on_the_optimizer_reaches_the_inner_step(compact):
    class Reads(SGD):
        def step(self, closure=None):
            self.seen = self.written_by_host
            return super().step(closure)

    _, optimizer = one_tied(Reads, compact=compact)
    optimizer.written_by_host = 7
    train(optimizer, 1)

    assert optimizer.seen == 7


def test_the_class_of_a_tied_optimizer_is_made_once(compact):
    assert type(one_tied(AdamW, compact=compact)[1]) is type(one_tied(AdamW, compact=compact)[1])
    assert type(one_tied(AdamW, compact=compact)[1]) is not type(one_tied(Adam, compact=compact)[1])


def test_tying_one_optimizer_leaves_others_of_its_class_as_they_were(compact):
    step = SGD.step
    one_tied(SGD, compact=compact)
    weight, bare = one_bare(SGD)
    train(bare, 1)

    assert SGD.step is step
    assert type(bare) is SGD
    assert not tied_bitwise(weight)


class Abstract(ABC, Optimizer):
    """What the optimizers of some packages come from: their objects are laid out in memory as those of ``ABC``."""

    @abstractmethod
    def name(self):
        """Of the optimizer."""


class Concrete(Abstract):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def name(self):
        return "concrete"

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"])


def test_an_optimizer_whose_first_base_is_another_class_is_tied(compact):
    weight, optimizer = one_tied(Concrete, compact=compact)
    # As Lightning does.
    optimizer.__class__ = type("Host", (type(optimizer),), {})
    train(optimizer, 2)

    assert isinstance(optimizer, TiedOptimizer)
    assert isinstance(optimizer, Concrete)
    order = [kind for kind in type(optimizer).__mro__ if issubclass(kind, Optimizer)]
    assert order[2:] == [TiedOptimizer, Concrete, Abstract, Optimizer]
    assert optimizer.name() == "concrete"
    assert "tieopt" in optimizer.state_dict()
    assert tied_bitwise(weight)


def test_an_optimizer_whose_first_base_is_another_class_is_copied_with_its_ties(compact):
    weight, optimizer = one_tied(Concrete, compact=compact)
    copied = pickled(optimizer)
    train(optimizer, 2)
    train(copied, 2)

    assert type(copied) is type(optimizer)
    assert same_bits(copied.param_groups[0]["params"][0], weight)


# --- hook dictionaries ---

HOOKS = [
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
]


class WithoutInit(Optimizer):
    """Gradient descent by someone who never calls ``Optimizer.__init__``, and has no hook dictionaries."""

    def __init__(self, params, lr):
        self.param_groups = [{"params": list(params), "lr": lr}]
        self.state = defaultdict(dict)
        self.defaults = {"lr": lr}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * param.grad)
        return loss


@pytest.mark.parametrize("name", HOOKS)
def test_all_hook_dictionaries_exist_and_are_ordered(compact, name):
    _, optimizer = one_tied(WithoutInit, compact=compact)

    assert isinstance(getattr(optimizer, name), OrderedDict)


def test_an_optimizer_that_never_calls_optimizer_init_is_tied(compact):
    weight, optimizer = one_tied(WithoutInit, compact=compact)
    start = weight.detach().clone()

    train(optimizer, 1)

    assert tied_bitwise(weight)
    torch.testing.assert_close(weight.detach(), start - 0.1 * mean_gradient(randn(*SHAPE, seed=100)))


def test_an_optimizer_that_never_calls_optimizer_init_gets_hooks_states_and_weak_references(compact):
    _, optimizer = one_tied(WithoutInit, compact=compact)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    handle = optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))

    train(optimizer, 1)
    handle.remove()
    train(optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())

    assert seen == ["pre", "post", "pre", "saved", "loaded"]
    assert weakref.ref(optimizer)() is optimizer


def test_hooks_in_a_plain_dict_go_on_firing_and_can_be_removed(compact):
    weight = parameter(*SHAPE)
    inner = WithoutInit([weight], lr=0.1)
    seen = []
    inner._optimizer_step_pre_hooks = {0: lambda *_: seen.append("old")}
    inner._optimizer_step_post_hooks = {}

    optimizer = TiedOptimizer(inner, {weight: GROUPS}, compact=compact)
    handle = optimizer.register_step_post_hook(lambda *_: seen.append("new"))
    train(optimizer, 1)
    handle.remove()
    train(optimizer, 1)

    assert seen == ["old", "new", "old"]


def test_hooks_that_were_registered_before_tying_fire_once_and_can_be_removed(compact):
    weight = parameter(*SHAPE)
    inner = SGD([weight], lr=0.1)
    seen = []
    handle = inner.register_step_pre_hook(lambda *_: seen.append("pre"))

    optimizer = TiedOptimizer(inner, {weight: GROUPS}, compact=compact)
    train(optimizer, 1)
    handle.remove()
    train(optimizer, 1)

    assert seen == ["pre"]


# --- order: pre-hooks, tie the gradients, inner step, tie the weights, post-hooks ---


class Witness(SGD):
    """Notes whether the gradients that it sees are tied, and unties the weights."""

    def __init__(self, params, lr, events):
        super().__init__(params, lr)
        self.events = events

    @torch.no_grad()
    def step(self, closure=None):
        (param,) = self.param_groups[0]["params"]
        self.events.append(("inner step", tied_bitwise(param.grad)))
        param.add_(randn(*SHAPE, seed=9))


def witnessed():
    events = []
    weight = parameter(*SHAPE)
    return events, weight, TiedOptimizer(Witness([weight], 0.1, events), {weight: GROUPS})


def test_the_order_is_pre_hooks_gradients_inner_step_weights_post_hooks_each_once():
    events, weight, optimizer = witnessed()

    def pre(*_):
        events.append(("pre-hook", tied_bitwise(weight.grad)))

    def post(*_):
        events.append(("post-hook", tied_bitwise(weight)))

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(post)
    train(optimizer, 1)

    assert events == [("pre-hook", False), ("inner step", True), ("post-hook", True)]


def test_global_hooks_fire_once_around_the_tied_step():
    events, weight, optimizer = witnessed()

    def pre(sender, *_):
        events.append(("pre-hook", sender is optimizer, tied_bitwise(weight.grad)))

    def post(sender, *_):
        events.append(("post-hook", sender is optimizer, tied_bitwise(weight)))

    with contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(pre).remove)
        stack.callback(register_optimizer_step_post_hook(post).remove)
        train(optimizer, 1)

    assert events == [("pre-hook", True, False), ("inner step", True), ("post-hook", True, True)]


@pytest.mark.parametrize("inner", [SGD, Adam, AdamW, WithoutInit])
def test_every_kind_of_hook_fires_exactly_once_a_step(compact, inner):
    _, optimizer = one_tied(inner, compact=compact)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    with contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")).remove)
        stack.callback(register_optimizer_step_post_hook(lambda *_: seen.append("global post")).remove)
        train(optimizer, 1)

    assert seen == ["global pre", "pre", "post", "global post"]


@pytest.mark.parametrize(("inner", "name"), [(AdamW, "AdamW"), (SGD, "SGD"), (WithoutInit, "WithoutInit")])
def test_the_profile_has_the_range_of_the_step_exactly_once(compact, inner, name):
    _, optimizer = one_tied(inner, compact=compact)
    with torch.autograd.profiler.profile() as profile:
        train(optimizer, 1)

    ranges = [event.name for event in profile.function_events if event.name.startswith("Optimizer.step#")]
    assert ranges == [f"Optimizer.step#Tied{name}.step"]


def test_hooks_get_the_tied_optimizer_and_the_arguments_of_the_step(compact):
    _, optimizer = one_tied(compact=compact)
    seen = []
    optimizer.register_step_pre_hook(lambda *arguments: seen.append(arguments))
    optimizer.register_step_post_hook(lambda *arguments: seen.append(arguments))

    def closure():
        return 1.0

    optimizer.step(closure=closure)

    assert seen == [(optimizer, (optimizer,), {"closure": closure})] * 2


def test_a_pre_hook_may_replace_the_arguments_of_the_step():
    weight, optimizer = one_tied()

    def closure():
        weight.grad = randn(*SHAPE, seed=1)
        return 42.0

    optimizer.register_step_pre_hook(lambda sender, args, kwargs: ((sender, closure), {}))

    assert optimizer.step() == 42.0
    assert tied_bitwise(weight.grad)


def test_a_pre_hook_may_write_the_gradients(compact):
    weight, optimizer = one_tied(compact=compact)
    start = weight.detach().clone()

    def hook(*_):
        weight.grad = randn(*SHAPE, seed=5)

    optimizer.register_step_pre_hook(hook)
    optimizer.step()

    torch.testing.assert_close(weight.detach(), start - 0.1 * mean_gradient(randn(*SHAPE, seed=5)))


# --- functools.wraps of a hooked step ---


def decorated(step):
    """What a library does to a step; ``wraps`` copies torch's mark ``hooked`` along."""

    @functools.wraps(step)
    def wrapper(self, *args, **kwargs):
        self.decorations = getattr(self, "decorations", 0) + 1
        return step(self, *args, **kwargs)

    return wrapper


class DecoratedDefinition(SGD):
    @decorated
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.data.sub_(0.1 * param.grad)


def test_a_step_decorated_with_functools_wraps_fires_the_hooks_once_and_keeps_the_decoration(compact):
    weight, optimizer = one_tied(DecoratedDefinition, compact=compact)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append(("post", tied_bitwise(weight))))

    train(optimizer, 2)

    assert seen == ["pre", ("post", True)] * 2
    assert optimizer.decorations == 2


def test_a_step_decorated_after_it_was_hooked_keeps_the_decoration_and_the_ties(compact):
    class Local(SGD):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                param.data.sub_(0.1 * param.grad)

    one_bare(Local)
    Local.step = decorated(Local.step)
    weight, optimizer = one_tied(Local, compact=compact)
    optimizer.register_step_post_hook(lambda *_: seen.append(tied_bitwise(weight)))
    seen = []
    train(optimizer, 1)

    # Torch's wrapper is below the decorator and fires the hooks too; the last word is the tied step's.
    assert optimizer.decorations == 1
    assert seen[-1]


# --- step(closure) ---


class CallsClosure(SGD):
    """Calls the closure a number of times and notes what it finds in ``.grad`` after each call."""

    def __init__(self, params, lr, calls):
        super().__init__(params, lr)
        self.calls = calls
        self.seen = []

    @torch.no_grad()
    def step(self, closure):
        for _ in range(self.calls):
            with torch.enable_grad():
                loss = closure()
            self.seen += [param.grad.clone() for param in self.param_groups[0]["params"]]
        for param in self.param_groups[0]["params"]:
            param.sub_(self.param_groups[0]["lr"] * param.grad)
        return loss


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("calls", [1, 2, 5])
@pytest.mark.parametrize("by", ["position", "keyword"])
def test_the_gradients_are_tied_after_every_call_of_the_closure(reduction, calls, by):
    weight, optimizer = one_tied(CallsClosure, calls=calls, reduction=reduction)
    made = []

    def closure():
        optimizer.zero_grad()
        weight.grad = randn(*SHAPE, seed=len(made))
        made.append(weight.grad.clone())
        return weight.sum()

    optimizer.step(closure) if by == "position" else optimizer.step(closure=closure)

    expected = mean_gradient if reduction == "mean" else sum_gradient
    assert len(made) == len(optimizer.seen) == calls
    for seen, gradient in zip(optimizer.seen, made, strict=True):
        assert tied_bitwise(seen)
        torch.testing.assert_close(seen, expected(gradient))
    torch.testing.assert_close(weight.grad, mean_gradient(made[-1]))
    assert tied_bitwise(weight.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_closure_that_accumulates_adds_to_the_mean(reduction):
    weight, optimizer = one_tied(CallsClosure, calls=3, reduction=reduction)
    weight.grad = torch.zeros(SHAPE)
    made = []

    def closure():
        made.append(randn(*SHAPE, seed=len(made)))
        weight.grad += made[-1]

    optimizer.step(closure)

    expected = mean_gradient if reduction == "mean" else sum_gradient
    torch.testing.assert_close(optimizer.seen[-1], expected(sum(made)))
    torch.testing.assert_close(weight.grad, mean_gradient(sum(made)))


class SharpnessAware(SGD):
    """Reads ``.grad`` first to climb, and calls the closure twice, as SAM does."""

    @torch.no_grad()
    def step(self, closure):
        (group,) = self.param_groups
        self.first = [param.grad.clone() for param in group["params"]]
        climb = [0.05 * gradient / gradient.norm() for gradient in self.first]
        for param, direction in zip(group["params"], climb, strict=True):
            param.add_(direction)
        with torch.enable_grad():
            closure()
            loss = closure()
        for param, direction in zip(group["params"], climb, strict=True):
            param.sub_(direction)
        self.last = [param.grad.clone() for param in group["params"]]
        for param in group["params"]:
            param.sub_(group["lr"] * param.grad)
        return loss


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_optimizer_that_reads_gradients_before_it_calls_the_closure_sees_tied_ones(reduction):
    weight, optimizer = one_tied(SharpnessAware, reduction=reduction)
    target = randn(*SHAPE, seed=3)
    expected = mean_gradient if reduction == "mean" else sum_gradient

    def closure():
        optimizer.zero_grad()
        loss = (weight - target).pow(4).sum()
        loss.backward()
        return loss

    for _ in range(5):
        closure()
        untied = weight.grad.clone()
        optimizer.step(closure)

        assert tied_bitwise(optimizer.first[0])
        torch.testing.assert_close(optimizer.first[0], expected(untied))
        assert tied_bitwise(optimizer.last[0])
        assert tied_bitwise(weight)


class ReturnsToken(SGD):
    token = object()

    def step(self, *args, **kwargs):
        self.received = (args, kwargs)
        return self.token


@pytest.mark.parametrize("arguments", [((), {}), ((None,), {}), ((), {"closure": None}), ((3, "x"), {"scale": 2.0})])
def test_arguments_and_the_return_value_of_the_step_are_passed_on_as_they_came(compact, arguments):
    _, optimizer = one_tied(ReturnsToken, compact=compact)
    args, kwargs = arguments

    assert optimizer.step(*args, **kwargs) is ReturnsToken.token
    assert optimizer.received == arguments


def test_arguments_beside_the_closure_are_passed_on_as_they_came(compact):
    _, optimizer = one_tied(ReturnsToken, compact=compact)

    optimizer.step(lambda: 5, 1, scale=2.0)
    ((closure, *rest), kwargs) = optimizer.received

    assert closure() == 5
    assert (rest, kwargs) == ([1], {"scale": 2.0})


def test_the_loss_that_the_closure_returns_is_returned(compact):
    weight, optimizer = one_tied(AdamW, compact=compact)
    loss = weight.sum()

    assert optimizer.step(lambda: loss) is loss
    assert optimizer.step(closure=lambda: loss) is loss
    assert optimizer.step() is None


def test_step_with_closure_none_by_keyword_is_a_step_without_closure(compact):
    weight, optimizer = one_tied(AdamW, compact=compact)
    other, reference = one_tied(AdamW, compact=compact)
    weight.grad, other.grad = randn(*SHAPE, seed=1), randn(*SHAPE, seed=1)

    optimizer.step(closure=None)
    reference.step()

    assert same_bits(weight, other)


def test_an_optimizer_whose_step_takes_no_closure_is_tied(compact):
    class NoClosure(SGD):
        def step(self):
            for param in self.param_groups[0]["params"]:
                param.data.sub_(0.1 * param.grad)

    weight, optimizer = one_tied(NoClosure, compact=compact)
    train(optimizer, 2)

    assert tied_bitwise(weight)
    with pytest.raises(TypeError, match="positional argument"):
        optimizer.step(None)
    assert list(inspect.signature(optimizer.step).parameters) == []


def test_an_optimizer_whose_step_takes_more_keywords_is_tied(compact):
    class Scaled(SGD):
        @torch.no_grad()
        def step(self, closure=None, *, scale=1.0):
            for param in self.param_groups[0]["params"]:
                param.sub_(scale * param.grad)

    weight, optimizer = one_tied(Scaled, compact=compact)
    start = weight.detach().clone()
    weight.grad = randn(*SHAPE, seed=1)
    optimizer.step(scale=0.5)

    torch.testing.assert_close(weight.detach(), start - 0.5 * mean_gradient(randn(*SHAPE, seed=1)))
    assert tied_bitwise(weight)


# --- what optimizers do to gradients and weights within a step ---


class DropsGradients(SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        for param in self.param_groups[0]["params"]:
            param.grad = None
        return loss


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["dense", "sparse", "expanded"])
def test_a_gradient_that_the_step_sets_to_none_stays_none(reduction, layout):
    weight, optimizer = one_tied(DropsGradients, reduction=reduction)
    for step in range(3):
        gradient = randn(*SHAPE, seed=step)
        weight.grad = {
            "dense": lambda gradient: gradient,
            "sparse": lambda gradient: gradient.to_sparse(1),
            "expanded": lambda gradient: gradient[:, :1].expand(SHAPE),
        }[layout](gradient)
        optimizer.step()

        assert weight.grad is None
        assert tied_bitwise(weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_gradient_that_the_step_replaces_stays_the_one_that_it_put_there(reduction):
    class Replaces(SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["params"][0].grad = replacement

    replacement = randn(*SHAPE, seed=8)
    before = bits(replacement)
    weight, optimizer = one_tied(Replaces, reduction=reduction)
    weight.grad = randn(*SHAPE, seed=1)
    with pytest.warns(UserWarning, match="made gradients within its step"):
        optimizer.step()

    assert weight.grad is replacement
    assert torch.equal(bits(replacement), before)


def test_an_optimizer_that_writes_through_data_is_tied():
    class WritesData(SGD):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                param.data.add_(randn(*SHAPE, seed=4))

    weight, optimizer = one_tied(WritesData)
    train(optimizer, 3)

    assert tied_bitwise(weight)


def test_an_optimizer_that_assigns_data_is_tied():
    class AssignsData(SGD):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                param.data = param.data + randn(*SHAPE, seed=4)

    weight, optimizer = one_tied(AssignsData)
    train(optimizer, 3)

    assert tied_bitwise(weight)


# --- an exception within the step ---


class FailsHalfway(SGD):
    """Gradient descent with momentum that can fail when it has written half of what it writes."""

    fail = True

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            momentum = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
            momentum.mul_(0.9).add_(param.grad)
            param.sub_(self.param_groups[0]["lr"] * momentum)
            if self.fail:
                param[:4].add_(randn(4, 5, seed=6))
                raise RuntimeError("halfway")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_exception_in_the_inner_step_leaves_the_weights_tied_and_the_mean_in_the_gradient(reduction):
    weight, optimizer = one_tied(FailsHalfway, reduction=reduction)
    gradient = randn(*SHAPE, seed=1)
    weight.grad = gradient.clone()

    with pytest.raises(RuntimeError, match=r"^halfway$"):
        optimizer.step()

    assert tied_bitwise(weight)
    torch.testing.assert_close(weight.grad, mean_gradient(gradient))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_after_an_exception_in_the_inner_step_training_goes_on_as_if_from_those_weights(reduction):
    weight, optimizer = one_tied(FailsHalfway, reduction=reduction)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    with pytest.raises(RuntimeError, match=r"^halfway$"):
        train(optimizer, 1)

    other, reference = one_tied(FailsHalfway, reduction=reduction)
    other.data.copy_(weight.data)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.fail = reference.fail = False
    train(optimizer, 3)
    train(reference, 3)

    assert seen == ["post"] * 3
    assert same_bits(weight, other)
    assert same_tree(optimizer.state_dict(), reference.state_dict())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_in_the_closure_leaves_the_weights_tied_and_the_optimizer_usable(compact, reduction, call):
    weight, optimizer = one_tied(CallsClosure, calls=2, reduction=reduction, compact=compact)
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == call:
            raise KeyError("closure")
        weight.grad = randn(*SHAPE, seed=1)

    weight.grad = randn(*SHAPE, seed=0)
    with pytest.raises(KeyError, match="closure"):
        optimizer.step(closure)
    assert tied_bitwise(weight)
    left = (lambda gradient: gradient) if compact else mean_gradient
    torch.testing.assert_close(weight.grad, left(randn(*SHAPE, seed=call - 1)))

    optimizer.step(closure)
    assert tied_bitwise(weight)
    torch.testing.assert_close(weight.grad, left(randn(*SHAPE, seed=1)))


# --- add_param_group ---


@pytest.mark.parametrize("inner", [SGD, AdamW])
def test_parameters_that_are_added_later_are_free_and_the_ties_stay(compact, inner):
    weight, optimizer = one_tied(inner, compact=compact)
    added, reference = parameter(*SHAPE, seed=3), parameter(*SHAPE, seed=3)
    bare = inner([parameter(*SHAPE), reference], lr=0.1)
    train(optimizer, 2)
    optimizer.add_param_group({"params": [added], "lr": 0.1})
    train(optimizer, 2)
    bare.param_groups[0]["params"] = bare.param_groups[0]["params"][1:]
    train(bare, 2)

    assert len(optimizer.param_groups) == 2
    assert tied_bitwise(weight)
    assert same_bits(added, reference)


def test_a_state_with_an_added_group_is_saved_and_loaded(compact):
    def grown():
        weight, optimizer = one_tied(AdamW, compact=compact)
        optimizer.add_param_group({"params": [parameter(3, 2, seed=3)], "lr": 0.5})
        return weight, optimizer

    _, optimizer = grown()
    train(optimizer, 2)
    _, other = grown()
    other.load_state_dict(optimizer.state_dict())

    assert same_tree(other.state_dict(), optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.5]


def test_an_added_group_gets_the_defaults_of_the_inner_optimizer(compact):
    _, optimizer = one_tied(SGD, momentum=0.75, compact=compact)
    optimizer.add_param_group({"params": [parameter(2, 2)]})

    assert optimizer.param_groups[1]["momentum"] == 0.75


# --- writes go into the storage that is there ---


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inner", [SGD, AdamW])
def test_a_gradient_that_is_a_view_of_a_flat_bucket_stays_one(inner, reduction):
    weight, optimizer = one_tied(inner, reduction=reduction)
    gradient = randn(*SHAPE, seed=1)
    bucket = torch.cat([torch.full((4,), 7.0), gradient.flatten(), torch.full((4,), 7.0)])
    weight.grad = view = bucket[4:-4].view(SHAPE)

    optimizer.tie_gradients()
    assert weight.grad is view
    optimizer.step()

    assert weight.grad is view
    assert view.data_ptr() == bucket.data_ptr() + 4 * bucket.element_size()
    torch.testing.assert_close(bucket[4:-4].view(SHAPE), mean_gradient(gradient))
    assert bucket[:4].tolist() == bucket[-4:].tolist() == [7.0] * 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_storage_of_the_weights_stays_where_it_is(compact, reduction):
    weight = parameter(*SHAPE)
    pointer, version = weight.data_ptr(), weight.data
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS}, reduction=reduction, compact=compact)
    train(optimizer, 2)
    optimizer.tie_weights()

    assert weight.data_ptr() == pointer
    assert same_bits(version, weight)
    assert optimizer.param_groups[0]["params"][0] is weight


def test_a_weight_that_is_a_view_into_a_flat_buffer_is_tied_there(compact):
    buffer = randn(2 * 35 + 8)
    outside = bits(torch.cat([buffer[:8], buffer[43:]]))
    weight = torch.nn.Parameter(buffer[8:43].view(SHAPE))
    train(TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS}, compact=compact), 2)

    assert tied_bitwise(buffer[8:43].view(SHAPE))
    assert torch.equal(bits(torch.cat([buffer[:8], buffer[43:]])), outside)


# --- gradients that are None, frozen parameters, parameters that took no part ---


def two_tied(compact):
    first, second = parameter(*SHAPE), parameter(*SHAPE, seed=1)
    return first, second, TiedOptimizer(SGD([first, second], lr=0.1), {first: GROUPS, second: GROUPS}, compact=compact)


def test_a_gradient_that_is_none_stays_none(compact):
    first, second, optimizer = two_tied(compact)
    first.grad = randn(*SHAPE, seed=2)

    optimizer.tie_gradients()
    assert second.grad is None
    optimizer.step()
    assert second.grad is None


def test_a_parameter_that_took_no_part_in_the_step_is_not_written(compact):
    first, second, optimizer = two_tied(compact)
    with torch.no_grad():
        second.copy_(randn(*SHAPE, seed=3))
    before, version = bits(second), second._version
    first.grad = randn(*SHAPE, seed=2)

    optimizer.step()

    assert torch.equal(bits(second), before)
    assert second._version == version
    assert tied_bitwise(first)


def test_a_frozen_parameter_is_never_written(compact):
    weight = parameter(*SHAPE).requires_grad_(False)
    other = parameter(2, 2, seed=1)
    before, version = bits(weight), weight._version
    optimizer = TiedOptimizer(SGD([weight, other], lr=0.1), {weight: GROUPS}, compact=compact)
    other.grad = randn(2, 2, seed=2)

    optimizer.step()
    optimizer.tie_weights()
    optimizer.tie_gradients()

    assert torch.equal(bits(weight), before)
    assert weight._version == version


def test_a_parameter_that_is_frozen_later_is_no_longer_written(compact):
    first, second, optimizer = two_tied(compact)
    train(optimizer, 1)
    optimizer.zero_grad()
    second.requires_grad_(False)
    second.copy_(randn(*SHAPE, seed=3))
    before = bits(second)
    first.grad = randn(*SHAPE, seed=2)

    optimizer.step()
    optimizer.tie_weights()

    assert torch.equal(bits(second), before)


def test_a_parameter_that_gets_its_gradient_in_the_closure_took_part(compact):
    first, second, optimizer = two_tied(compact)
    with torch.no_grad():
        second.add_(randn(*SHAPE, seed=3))

    def closure():
        second.grad = randn(*SHAPE, seed=2)

    with pytest.warns(UserWarning, match="their members differ now"):
        optimizer.step(closure)

    assert first.grad is None
    assert compact or tied_bitwise(second.grad)
    assert tied_bitwise(second)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_step_without_any_gradient_changes_nothing(compact, reduction):
    weight, optimizer = one_tied(AdamW, reduction=reduction, compact=compact)
    before = bits(weight)

    optimizer.step()

    assert torch.equal(bits(weight), before)
    assert weight.grad is None
    assert not optimizer.state


def test_zero_grad_is_the_one_of_the_inner_optimizer(compact):
    weight, optimizer = one_tied(compact=compact)
    weight.grad = view = randn(*SHAPE)

    optimizer.zero_grad(set_to_none=False)
    assert weight.grad is view
    assert not view.any()
    optimizer.zero_grad()
    assert weight.grad is None


# --- a step neither waits for the device nor chooses by what it computes ---


class Operations(TorchDispatchMode):
    """Records the operations that run within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


# Each makes the host wait for a number that is on the device, makes a shape depend on one, or makes a
# tensor from numbers that are on the host.
SYNCHRONISING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "is_nonzero",
    "equal",
    "repeat_interleave",
    "lift_fresh",
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [7, 3000])
def test_the_first_step_finds_its_index_tensors_ready_and_synchronises_nothing(reduction, rows, monkeypatch):
    # As on an accelerator.
    monkeypatch.setattr(reduction_module, "can_be_asked", lambda tensor: False)
    weight = parameter(rows, 3)
    groups = [list(range(0, rows, 2)), list(range(1, rows, 2))]
    optimizer = TiedOptimizer(SGD([weight], lr=0.1, foreach=True), {weight: groups}, reduction=reduction)
    weight.grad = randn(rows, 3, seed=1)

    with Operations() as operations:
        optimizer.step()

    assert "index_select" in operations.names
    assert SYNCHRONISING & set(operations.names) == set()


def test_an_optimizer_that_is_capturable_fails_on_the_cpu_as_the_bare_one_does(compact):
    errors = []
    for weight, optimizer in (one_tied(Adam, capturable=True, compact=compact), one_bare(Adam, capturable=True)):
        weight.grad = randn(*SHAPE, seed=1)
        with pytest.raises(AssertionError) as caught:
            optimizer.step()
        errors.append(str(caught.value))

    assert errors[0] == errors[1]
    assert "capturable" in errors[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [7, 300])
def test_a_step_is_captured_in_a_cuda_graph_and_keeps_the_ties_when_it_is_replayed(reduction, rows):
    groups = [list(range(0, rows, 2)), list(range(1, rows, 2))]
    weight = torch.nn.Parameter(randn(rows, 3).cuda())
    optimizer = TiedOptimizer(Adam([weight], lr=0.1, capturable=True), {weight: groups}, reduction=reduction)
    weight.grad = torch.zeros_like(weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    for step in range(3):
        before = weight.detach().clone()
        weight.grad.copy_(randn(rows, 3, seed=step))
        graph.replay()

        assert tied_bitwise(weight.cpu(), groups)
        assert tied_bitwise(weight.grad.cpu(), groups)
        assert not same_bits(weight, before)


# --- weak references, and step as a bound method that can be replaced ---


def _untied(weight, optimizer):
    optimizer.untie()
    train(optimizer, 1)


def _retied_and_scheduled(weight, optimizer):
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step(lambda: weight.square().sum())
    scheduler.step()
    optimizer.retie({weight: [[0, 1]]})
    train(optimizer, 1)


LIVES = {
    "after a step": lambda weight, optimizer: None,
    "after closures, a scheduler and other ties": _retied_and_scheduled,
    "after the ties": _untied,
}


@pytest.mark.parametrize("life", LIVES)
def test_the_optimizer_and_its_state_die_with_the_last_reference_and_not_when_garbage_is_collected(compact, life):
    gc.disable()
    try:
        weight, optimizer = one_tied(AdamW, compact=compact)
        train(optimizer, 1)
        LIVES[life](weight, optimizer)
        references = [weakref.ref(optimizer), *map(weakref.ref, optimizer.state[weight].values())]
        assert len(references) == 4
        assert references[0]() is optimizer
        del optimizer
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()


def test_an_optimizer_with_a_hook_that_refers_to_it_goes_when_garbage_is_collected(compact):
    weight, optimizer = one_tied(AdamW, compact=compact)

    def hook(*_, optimizer=optimizer):
        optimizer.tie_weights()

    optimizer.register_step_post_hook(hook)
    train(optimizer, 1)
    references = [weakref.ref(optimizer), *map(weakref.ref, optimizer.state[weight].values())]
    del optimizer, hook
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_step_is_a_bound_method_with_a_function():
    weight, optimizer = one_tied()
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__self__ is optimizer

    weight.grad = randn(*SHAPE, seed=1)
    optimizer.step.__func__(optimizer)

    assert tied_bitwise(weight.grad)


@pytest.mark.parametrize("inner", [SGD, Adam, WithoutInit])
def test_the_signature_of_step_is_that_of_the_inner_step(compact, inner):
    _, optimizer = one_tied(inner, compact=compact)
    _, bare = one_bare(inner)

    assert inspect.signature(optimizer.step) == inspect.signature(bare.step)


def test_step_can_be_replaced_on_the_instance_and_put_back(compact):
    weight, optimizer = one_tied(compact=compact)
    original, calls = optimizer.step, []

    def step(self, *args, **kwargs):
        calls.append(self)
        return original(*args, **kwargs)

    optimizer.step = MethodType(step, optimizer)
    train(optimizer, 1)
    assert calls == [optimizer]
    assert tied_bitwise(weight)

    del optimizer.step
    train(optimizer, 1)
    assert calls == [optimizer]
    assert tied_bitwise(weight)


def test_it_is_printed_as_the_inner_optimizer_under_the_tied_name_and_with_its_ties(compact):
    printed, ties = str(one_tied(AdamW, compact=compact)[1]).rsplit("\n", 1)
    assert printed == "Tied" + str(one_bare(AdamW)[1])
    assert ties.startswith("Ties: 2 groups of 5 members in all, in 1 parameter")


def test_a_tie_can_be_read_back_and_given_to_another_optimizer(compact):
    weight, optimizer = one_tied(compact=compact)
    (tie,) = optimizer.ties
    assert isinstance(tie, Tie)
    (part,) = tie.parts
    assert part.param is weight

    other = parameter(*SHAPE, seed=1)
    TiedOptimizer(SGD([other]), Tie(other, part.groups), compact=compact)
    assert tied_bitwise(other)


# --- what frameworks put in its place: of its class, and asks it for attributes ---


class StandIn:
    """As LightningOptimizer and the optimizer of Fabric."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("StandIn", (StandIn, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def test_a_stand_in_shows_the_ties_the_state_and_ties_gradients_and_weights(compact):
    weight, optimizer = one_tied(AdamW, compact=compact)
    train(optimizer, 2)
    stand_in = StandIn(optimizer)

    assert isinstance(stand_in, TiedOptimizer)
    assert repr(stand_in.ties) == repr(optimizer.ties)
    assert stand_in.tie_summary() == optimizer.tie_summary()
    assert same_tree(dict(stand_in.state), dict(optimizer.state))
    assert same_tree(stand_in.state_dict(), optimizer.state_dict())
    with torch.no_grad():
        weight[GROUPS[0][0]] += 1
    assert stand_in.tie_drift() > 0
    stand_in.tie_weights()
    assert tied_bitwise(weight)
    weight.grad = randn(*SHAPE)
    stand_in.tie_gradients()
    assert tied_bitwise(weight.grad)


@pytest.mark.parametrize("change", [lambda one: one.retie({}), lambda one: one.untie()], ids=["retie", "untie"])
def test_ties_are_not_changed_through_a_stand_in_which_would_keep_the_change_for_itself(compact, change):
    weight, optimizer = one_tied(AdamW, compact=compact)
    train(optimizer, 2)
    stand_in, before, ties = StandIn(optimizer), bits(weight), repr(optimizer.ties)

    with pytest.raises(TypeError, match=r"(?s)on the tied optimizer itself.*Got:      StandIn"):
        change(stand_in)
    assert repr(stand_in.ties) == repr(optimizer.ties) == ties
    assert torch.equal(bits(weight), before)
    train(optimizer, 1)
    assert tied_bitwise(weight)


# --- all or nothing, where the fault is not in the arguments ---


def test_a_class_that_cannot_be_subclassed_leaves_the_weights(compact):
    class NeedsTag(SGD):
        def __init_subclass__(cls, *, tag, **kwargs):
            super().__init_subclass__(**kwargs)

    weight = parameter(*SHAPE)
    optimizer, before = NeedsTag([weight], lr=0.1), bits(weight)
    with pytest.raises(TypeError, match="tag"):
        TiedOptimizer(optimizer, {weight: GROUPS}, compact=compact)
    assert torch.equal(bits(weight), before)
    assert type(optimizer) is NeedsTag


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_that_were_made_in_inference_mode_are_tied_as_others(compact, reduction):
    ends = []
    for inference in (True, False):
        first, second = parameter(*SHAPE), parameter(*SHAPE, seed=1)
        ties = {first: GROUPS, second: GROUPS}
        optimizer = TiedOptimizer(SGD([first, second], lr=0.1), ties, reduction=reduction, compact=compact)
        first.grad = randn(*SHAPE, seed=2)
        with torch.inference_mode(inference):
            second.grad = randn(*SHAPE, seed=3)
        optimizer.step()
        ends.append([first, second, first.grad, second.grad])

    assert all(map(same_bits, *ends))


def test_a_tied_parameter_that_is_gone_is_an_error_that_names_its_place(compact):
    _, optimizer = one_tied(compact=compact)
    optimizer.param_groups.clear()
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\]\n.*\(7, 5\)\n.*no parameter there"):
        optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_extra_arguments_of_the_state_go_to_the_inner_optimizer(compact, reduction):
    class Verbose(SGD):
        def state_dict(self, prefix=""):
            self.seen = [prefix]
            return super().state_dict()

        def load_state_dict(self, state_dict, *, strict):
            self.seen.append(strict)
            super().load_state_dict(state_dict)

    _, optimizer = one_tied(Verbose, reduction, compact=compact)
    optimizer.load_state_dict(optimizer.state_dict("model."), strict=True)
    assert optimizer.seen == ["model.", True]
