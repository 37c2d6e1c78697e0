"""Every learning rate scheduler of torch does to a tied optimizer what it does to the bare one."""

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref
from types import MethodType

import pytest
import torch
from checks import GROUPS, SHAPE, one_bare, parameter, randn, same_tree, tied_bitwise, train
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.optim.swa_utils import SWALR

from tieopt import TiedOptimizer

pytestmark = pytest.mark.host("lr_scheduler", "every scheduler, built before and after tying; saving and loading")

STEPS = 9


def chained(optimizer):
    first = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=3)
    return lr_scheduler.ChainedScheduler([first, lr_scheduler.ExponentialLR(optimizer, gamma=0.9)])


def sequential(optimizer):
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.StepLR(optimizer, 2)], milestones=[4])


SCHEDULERS = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=3),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=4),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS + 1),
    "SWALR": lambda optimizer: SWALR(optimizer, swa_lr=0.02, anneal_epochs=4),
}

INNER = {
    "SGD": lambda: one_bare(SGD, momentum=0.9),
    "Adam": lambda: one_bare(Adam),
    "tensor lr": lambda: one_bare(SGD, lr=torch.tensor(0.1), momentum=0.9),
    "fused": lambda: one_bare(AdamW, fused=True),
}


def bare(optimizer, weight, build):
    return optimizer, build(optimizer)


def tied_then_scheduled(optimizer, weight, build):
    tied = TiedOptimizer(optimizer, {weight: GROUPS})
    return tied, build(tied)


def scheduled_then_tied(optimizer, weight, build):
    scheduler = build(optimizer)
    return TiedOptimizer(optimizer, {weight: GROUPS}), scheduler


def compact_then_scheduled(optimizer, weight, build):
    tied = TiedOptimizer(optimizer, {weight: GROUPS}, compact=True)
    return tied, build(tied)


def scheduled_then_compact(optimizer, weight, build):
    scheduler = build(optimizer)
    return TiedOptimizer(optimizer, {weight: GROUPS}, compact=True), scheduler


ORDERS = [tied_then_scheduled, scheduled_then_tied, compact_then_scheduled, scheduled_then_compact]

scheduler_names = pytest.mark.parametrize("name", SCHEDULERS)
inner_names = pytest.mark.parametrize("inner", INNER)
orders = pytest.mark.parametrize("order", ORDERS)


def advance(scheduler, step):
    """One step; for a plateau with a loss that stops falling."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0 / min(step + 1, 3))
    else:
        scheduler.step()


def settings_of(optimizer):
    """What a scheduler can read and write: the groups without their parameters."""
    return [
        {key: value for key, value in copy.deepcopy(group).items() if key != "params"}
        for group in optimizer.param_groups
    ]


def history(optimizer, scheduler, steps=STEPS, seed=100):
    """The settings after each step of both, and what was warned of meanwhile."""
    settings = [settings_of(optimizer)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            train(optimizer, 1, seed=seed + 10 * step)
            advance(scheduler, step)
            settings.append(settings_of(optimizer))
    return settings, [str(warning.message) for warning in caught]


def test_every_scheduler_class_of_torch_is_tested_here():
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }

    assert classes - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


# --- the same learning rates and momenta, and no warning ---


@scheduler_names
@inner_names
@orders
def test_a_scheduler_sets_the_learning_rates_and_momenta_of_the_bare_optimizer(name, inner, order):
    build = SCHEDULERS[name]
    bare_weight, bare_optimizer = INNER[inner]()
    expected, expected_warnings = history(*bare(bare_optimizer, bare_weight, build))
    weight, optimizer = INNER[inner]()
    optimizer, scheduler = order(optimizer, weight, build)
    seen, seen_warnings = history(optimizer, scheduler)

    assert scheduler.optimizer is optimizer
    assert same_tree(seen, expected)
    assert seen_warnings == expected_warnings
    assert tied_bitwise(weight)
    assert any(settings != seen[0] for settings in seen)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("CyclicLR", "OneCycleLR")])
@orders
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR of older versions warns of itself.
def test_the_step_uses_the_learning_rate_that_the_scheduler_set(name, order):
    weight = parameter(*SHAPE)
    optimizer, scheduler = order(SGD([weight], lr=0.1), weight, SCHEDULERS[name])
    for step in range(4):
        start, rate = weight.detach().clone(), optimizer.param_groups[0]["lr"]
        weight.grad = torch.ones(SHAPE)
        optimizer.step()
        advance(scheduler, step)

        torch.testing.assert_close(weight.detach(), start - rate)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize(("inner", "key"), [("SGD", "momentum"), ("Adam", "betas")])
@orders
def test_a_scheduler_that_cycles_momentum_cycles_it(name, inner, key, order):
    weight, optimizer = INNER[inner]()
    optimizer, scheduler = order(optimizer, weight, SCHEDULERS[name])
    settings, _ = history(optimizer, scheduler)

    assert len({group[key] for (group,) in settings}) > 3


@scheduler_names
@orders
def test_a_tensor_learning_rate_is_filled_in_place_where_it_is_for_the_bare_optimizer(name, order):
    def run(how):
        rate = torch.tensor(0.1)
        weight = parameter(*SHAPE)
        optimizer, scheduler = how(SGD([weight], lr=rate, momentum=0.9), weight, SCHEDULERS[name])
        history(optimizer, scheduler)
        return optimizer.param_groups[0]["lr"] is rate

    assert run(order) == run(bare)


@orders
def test_the_initial_learning_rate_is_in_the_groups_of_the_optimizer(order):
    weight = parameter(*SHAPE)
    optimizer, scheduler = order(SGD([weight], lr=0.125), weight, SCHEDULERS["ExponentialLR"])
    history(optimizer, scheduler, steps=2)

    assert optimizer.param_groups[0]["initial_lr"] == 0.125
    assert scheduler.base_lrs == [0.125]


@pytest.mark.parametrize("order", ORDERS)
def test_groups_that_were_added_have_learning_rates_of_their_own(order):
    def run(how):
        weight, other = parameter(*SHAPE), parameter(3, 2, seed=1)
        inner = SGD([{"params": [weight]}, {"params": [other], "lr": 0.5}], lr=0.1)
        return history(*how(inner, weight, SCHEDULERS["CosineAnnealingLR"]))

    seen, expected = run(order), run(bare)

    assert same_tree(seen, expected)
    assert seen[0][-1][0]["lr"] != seen[0][-1][1]["lr"]


@orders
def test_two_schedulers_on_one_optimizer_act_both(order):
    def run(how):
        weight, optimizer = one_bare(SGD)
        optimizer, first = how(optimizer, weight, SCHEDULERS["ExponentialLR"])
        second = SCHEDULERS["StepLR"](optimizer)
        settings = []
        for step in range(STEPS):
            train(optimizer, 1)
            advance(first, step)
            advance(second, step)
            settings.append(settings_of(optimizer))
        return settings

    assert same_tree(run(order), run(bare))


@orders
def test_a_scheduler_that_is_stepped_before_the_optimizer_warns_as_ever(order):
    weight, optimizer = one_bare(SGD)
    _, scheduler = order(optimizer, weight, SCHEDULERS["StepLR"])

    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


# --- what a scheduler asks of the optimizer ---


def test_a_scheduler_takes_a_tied_optimizer_for_an_optimizer_and_nothing_else(compact):
    weight, optimizer = one_bare()
    lr_scheduler.StepLR(TiedOptimizer(optimizer, {weight: GROUPS}, compact=compact), 1)
    with pytest.raises(TypeError, match="is not an Optimizer"):
        lr_scheduler.StepLR(object(), 1)


@orders
def test_step_stays_a_bound_method_of_the_optimizer(order):
    weight, optimizer = one_bare()
    optimizer, _ = order(optimizer, weight, SCHEDULERS["StepLR"])
    before = weight.detach().clone()
    weight.grad = randn(*SHAPE, seed=1)
    optimizer.step.__func__(optimizer)

    assert optimizer.step.__self__ is optimizer
    assert tied_bitwise(weight)
    assert not torch.equal(weight, before)


@orders
def test_hooks_fire_once_under_a_scheduler(order):
    weight, optimizer = one_bare()
    optimizer, _ = order(optimizer, weight, SCHEDULERS["StepLR"])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(optimizer, 2)

    assert seen == ["pre", "post"] * 2


@orders
def test_step_can_be_replaced_under_a_scheduler(order):
    weight, optimizer = one_bare()
    optimizer, scheduler = order(optimizer, weight, SCHEDULERS["StepLR"])
    original, calls = optimizer.step, []

    def step(self, closure=None):
        calls.append(self)
        return original(closure)

    step._wrapped_by_lr_sched = True
    optimizer.step = MethodType(step, optimizer)
    _, warned = history(optimizer, scheduler, steps=3)

    assert calls == [optimizer] * 3
    assert warned == []
    assert tied_bitwise(weight)


@orders
def test_a_scheduler_keeps_only_a_weak_reference_in_the_step_of_the_optimizer(order):
    weight, optimizer = one_bare()
    optimizer, scheduler = order(optimizer, weight, SCHEDULERS["StepLR"])
    train(optimizer, 1)
    advance(scheduler, 0)
    reference = weakref.ref(optimizer)
    del scheduler
    gc.disable()
    try:
        del optimizer
        assert reference() is None
    finally:
        gc.enable()


@orders
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])  # noqa: S301
def test_a_copy_of_a_scheduled_optimizer_steps_on_its_own(order, copied):
    weight, optimizer = one_bare(AdamW)
    optimizer, scheduler = order(optimizer, weight, SCHEDULERS["StepLR"])
    history(optimizer, scheduler, steps=2)
    twin = copied(optimizer)
    other = twin.param_groups[0]["params"][0]
    start = weight.detach().clone()
    train(twin, 2)

    assert tied_bitwise(other)
    assert torch.equal(weight.detach(), start)
    assert not torch.equal(weight.detach(), other.detach())


# --- saving and loading a scheduler ---


@scheduler_names
@pytest.mark.parametrize("inner", ["SGD", "Adam"])
@orders
def test_a_scheduler_and_its_optimizer_are_saved_and_loaded_and_go_on(name, inner, order):
    weight, optimizer = INNER[inner]()
    optimizer, scheduler = order(optimizer, weight, SCHEDULERS[name])
    history(optimizer, scheduler, steps=4)
    file = io.BytesIO()
    torch.save([weight.detach(), optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    expected = history(optimizer, scheduler, steps=4, seed=900)

    other, twin = INNER[inner]()
    twin, resumed = order(twin, other, SCHEDULERS[name])
    saved, state, schedule = torch.load(file, weights_only=False)
    other.data.copy_(saved)
    resumed.load_state_dict(schedule)
    twin.load_state_dict(state)

    assert same_tree(history(twin, resumed, steps=4, seed=900), expected)
    assert same_tree([other.detach(), twin.state_dict()], [weight.detach(), optimizer.state_dict()])


@scheduler_names
def test_a_schedule_of_a_bare_optimizer_is_loaded_for_a_tied_one(name):
    weight, optimizer = one_bare(SGD, momentum=0.9)
    optimizer, scheduler = bare(optimizer, weight, SCHEDULERS[name])
    history(optimizer, scheduler, steps=4)
    other, twin = one_bare(SGD, momentum=0.9)
    twin, resumed = tied_then_scheduled(twin, other, SCHEDULERS[name])
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    assert same_tree(history(twin, resumed, steps=4)[0], history(optimizer, scheduler, steps=4)[0])
    assert tied_bitwise(other)
