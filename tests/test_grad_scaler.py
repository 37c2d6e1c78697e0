"""torch.amp.GradScaler with a tied optimizer, whose skipped steps must be no steps at all."""

import copy
import inspect

import pytest
import torch
from checks import (
    FREE,
    GROUPS,
    REDUCTIONS,
    SHAPE,
    bits,
    mean_gradient,
    one_bare,
    one_tied,
    parameter,
    randn,
    same_bits,
    same_tree,
    sum_gradient,
    tied_bitwise,
)
from torch.amp import GradScaler
from torch.optim import SGD, Adagrad, Adam, AdamW

from tieopt import TiedOptimizer

pytestmark = pytest.mark.host("GradScaler", "unscaling, clipping, skipped steps, fused optimizers, autocast")

FUSED = [SGD, Adam, AdamW, Adagrad]
# Those whose step skips itself, and which a scaler therefore always steps.
SELF_SKIPPING = [
    inner
    for inner in FUSED
    if getattr(inner([torch.zeros(1)], lr=0.1, fused=True), "_step_supports_amp_scaling", False)
]
INNER = [(inner, fused) for inner in FUSED for fused in (False, True)]
inner_and_fused = pytest.mark.parametrize(
    ("inner", "fused"), INNER, ids=[f"{inner.__name__}{'-fused' * fused}" for inner, fused in INNER]
)
SCALE = 2.0**10


def scaler_of(scale=SCALE):
    return GradScaler("cpu", init_scale=scale, growth_interval=1000)


def backward(scaler, weight, seed, spoil=None):
    """A scaled gradient as ``scaler.scale(loss).backward()`` leaves it; one entry of it may be spoiled."""
    weight.grad = None
    scaler.scale((weight * randn(*SHAPE, seed=seed)).sum()).backward()
    if spoil is not None:
        weight.grad[GROUPS[0][1], 2] = spoil


# --- the scaler's books: state by id(optimizer), signature(step), param_groups ---


def test_the_scaler_keeps_its_state_under_one_id_for_the_optimizer_before_and_after_it_is_tied(compact):
    weight = parameter(*SHAPE)
    inner = SGD([weight], lr=0.1)
    optimizer = TiedOptimizer(inner, {weight: GROUPS}, compact=compact)
    start, scaler = weight.detach().clone(), scaler_of()
    backward(scaler, weight, seed=1)

    scaler.unscale_(inner)
    scaler.step(optimizer)
    scaler.update()

    torch.testing.assert_close(weight.detach(), start - 0.1 * mean_gradient(randn(*SHAPE, seed=1)))


def test_the_scaler_notices_a_second_unscale_and_a_second_step(compact):
    weight, optimizer = one_tied(compact=compact)
    scaler = scaler_of()
    backward(scaler, weight, seed=1)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)


def test_an_optimizer_whose_step_names_grad_scaler_is_given_the_scaler(compact):
    class TakesScaler(SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, grad_scaler=None):
            self.given = grad_scaler
            grad_scaler.unscale_(self)
            for param in self.param_groups[0]["params"]:
                param.data.sub_(0.1 * param.grad)

    weight, optimizer = one_tied(TakesScaler, compact=compact)
    scaler = scaler_of()
    backward(scaler, weight, seed=1)
    with pytest.warns(FutureWarning, match="passing itself as a keyword argument"):
        scaler.step(optimizer)

    assert "grad_scaler" in inspect.signature(optimizer.step).parameters
    assert optimizer.given is scaler
    assert tied_bitwise(weight)


def test_the_scaler_unscales_every_parameter_of_every_group(compact):
    weight, optimizer = one_tied(compact=compact)
    other = parameter(3, 2, seed=1)
    optimizer.add_param_group({"params": [other]})
    weight.grad, other.grad = torch.full(SHAPE, SCALE), torch.full((3, 2), SCALE)
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)

    assert bool((weight.grad == 1).all())
    assert bool((other.grad == 1).all())


def test_without_ties_a_scaled_run_is_bit_for_bit_that_of_the_bare_optimizer(compact):
    runs = []
    for tie in (True, False):
        weight, optimizer = one_bare(AdamW, fused=True)
        optimizer = TiedOptimizer(optimizer, {}, compact=compact) if tie else optimizer
        scaler = scaler_of()
        for step, spoil in enumerate([None, float("inf"), None]):
            backward(scaler, weight, seed=step, spoil=spoil)
            scaler.step(optimizer)
            scaler.update()
        runs.append([weight.detach(), optimizer.state_dict(), scaler.state_dict()])

    assert same_tree(*runs)


# --- unscale, clip, step ---


@inner_and_fused
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scaled_training_follows_unscaled_training(compact, inner, fused, reduction):
    weight, optimizer = one_tied(inner, reduction=reduction, fused=fused, compact=compact)
    other, reference = one_tied(inner, reduction=reduction, compact=compact)
    scaler = scaler_of()
    for step in range(4):
        backward(scaler, weight, seed=step)
        scaler.step(optimizer)
        scaler.update()
        other.grad = randn(*SHAPE, seed=step)
        reference.step()

        assert tied_bitwise(weight)
        torch.testing.assert_close(weight.detach(), other.detach())
        if not compact:
            assert tied_bitwise(weight.grad)
            torch.testing.assert_close(weight.grad, other.grad)


@inner_and_fused
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_unscale_tie_clip_step_clips_the_norm_of_the_tied_gradient(compact, inner, fused, reduction):
    weight, optimizer = one_tied(inner, reduction=reduction, fused=fused, compact=compact)
    other, reference = one_tied(inner, reduction=reduction, compact=compact)
    scaler = scaler_of()
    for step in range(3):
        backward(scaler, weight, seed=step)
        scaler.unscale_(optimizer)
        optimizer.tie_gradients()
        norm = torch.nn.utils.clip_grad_norm_([weight], 0.5)
        scaler.step(optimizer)
        scaler.update()
        tied = mean_gradient(randn(*SHAPE, seed=step))
        torch.testing.assert_close(norm, tied.norm())
        other.grad = tied * (0.5 / tied.norm())
        reference.step()

        assert tied_bitwise(weight)
        torch.testing.assert_close(weight.grad, other.grad)
        torch.testing.assert_close(weight.detach(), other.detach())


# --- fused optimizers get grad_scale and found_inf, and step always ---


@pytest.mark.parametrize("inner", SELF_SKIPPING)
def test_grad_scale_and_found_inf_that_the_scaler_sets_reach_the_step_and_are_gone_afterwards(compact, inner):
    seen = []

    class Watches(inner):
        pass

    def step(self, closure=None):
        seen.append((float(self.grad_scale), float(self.found_inf)))
        inner.step.__wrapped__(self, closure)

    Watches.step = step
    weight, optimizer = one_tied(Watches, fused=True, compact=compact)
    scaler = scaler_of()
    for spoil in (None, float("inf")):
        backward(scaler, weight, seed=1, spoil=spoil)
        scaler.step(optimizer)
        scaler.update()

    assert optimizer._step_supports_amp_scaling
    assert seen == [(SCALE, 0.0), (SCALE, 1.0)]
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@inner_and_fused
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("spoil", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_skipped_step_changes_no_bit_of_the_weights_and_of_the_state(
    compact, inner, fused, reduction, spoil, unscale
):
    weight, optimizer = one_tied(inner, reduction=reduction, fused=fused, compact=compact)
    scaler = scaler_of()
    for step in range(2):
        backward(scaler, weight, seed=step)
        scaler.step(optimizer)
        scaler.update()
    before, state = bits(weight), copy.deepcopy(optimizer.state_dict()["state"])

    backward(scaler, weight, seed=3, spoil=spoil)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()

    assert torch.equal(bits(weight), before)
    assert same_tree(optimizer.state_dict()["state"], state)
    assert scaler.get_scale() == SCALE / 2


@inner_and_fused
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_training_goes_on_after_a_skipped_step_as_if_the_step_had_not_been(compact, inner, fused, reduction):
    runs = []
    for spoil in (True, False):
        weight, optimizer = one_tied(inner, reduction=reduction, fused=fused, compact=compact)
        scaler = scaler_of()
        if spoil:
            backward(scaler, weight, seed=9, spoil=float("inf"))
            scaler.step(optimizer)
            scaler.update(SCALE)
        for step in range(3):
            backward(scaler, weight, seed=step)
            scaler.step(optimizer)
            scaler.update()
        assert tied_bitwise(weight)
        runs.append(weight)

    assert same_bits(*runs)


@inner_and_fused
def test_the_gradient_of_a_skipped_step_does_not_leak_into_free_rows(compact, inner, fused):
    weight, optimizer = one_tied(inner, fused=fused, compact=compact)
    scaler = scaler_of()
    backward(scaler, weight, seed=1, spoil=float("inf"))
    scaler.step(optimizer)

    assert bool(weight.grad[FREE].isfinite().all())
    assert bool(weight.grad[GROUPS[1]].isfinite().all())


def test_a_scaler_that_is_disabled_just_steps(compact):
    weight, optimizer = one_tied(compact=compact)
    start = weight.detach().clone()
    scaler = GradScaler("cpu", enabled=False)
    weight.grad = randn(*SHAPE, seed=1)
    scaler.step(optimizer)
    scaler.update()

    torch.testing.assert_close(weight.detach(), start - 0.1 * mean_gradient(randn(*SHAPE, seed=1)))


# --- float16 and bfloat16 are reduced in float32 ---


@pytest.mark.parametrize("members", [4, 64])
def test_float16_gradients_whose_sum_overflows_have_a_finite_mean(compact, members):
    weight = torch.nn.Parameter(torch.zeros(members, 3, dtype=torch.float16))
    optimizer = TiedOptimizer(SGD([weight], lr=1e-4), {weight: [list(range(members))]}, compact=compact)
    weight.grad = torch.full((members, 3), 40000.0, dtype=torch.float16)
    weight.grad[1] = 20000.0
    expected = weight.grad.double().mean(0)

    optimizer.step()

    assert bool(weight.isfinite().all())
    torch.testing.assert_close(weight[0].double(), -1e-4 * expected, rtol=2**-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_gradients_lose_no_digits_in_a_large_group(compact, dtype):
    members, columns = 3000, 64
    weight = torch.nn.Parameter(torch.zeros(members, columns, dtype=dtype))
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), {weight: [list(range(members))]}, compact=compact)
    weight.grad = (1 + randn(members, columns).mul(0.25)).to(dtype)
    expected = weight.grad.double().mean(0).to(dtype)

    optimizer.step()

    assert same_bits(-weight[7], expected)
    assert tied_bitwise(weight, [list(range(members))])


@pytest.mark.parametrize("inner", SELF_SKIPPING)
def test_float16_weights_with_a_fused_step_stay_tied_and_finite(compact, inner):
    weight = parameter(*SHAPE, dtype=torch.float16)
    optimizer = TiedOptimizer(inner([weight], lr=1e-3, fused=True), {weight: GROUPS}, compact=compact)
    scaler = GradScaler("cpu", init_scale=2.0**15, growth_interval=1000)
    for step in range(3):
        weight.grad = (randn(*SHAPE, seed=step) * 2.0**13).half().clamp(-65504, 65504)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()

        assert tied_bitwise(weight)
        assert bool(weight.isfinite().all())


# --- autocast ---


def tied_classifier(inner, reduction, compact, **kwargs):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(randn(*param.shape, seed=number))
    ties = {model[0].weight: GROUPS, model[0].bias: GROUPS}
    return model, TiedOptimizer(inner(model.parameters(), **kwargs), ties, reduction=reduction, compact=compact)


@inner_and_fused
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_with_a_scaler_lowers_the_loss_and_keeps_the_ties(
    compact, inner, fused, reduction, dtype
):
    model, optimizer = tied_classifier(inner, reduction, compact, lr=0.05, fused=fused)
    scaler = scaler_of(2.0**6)
    inputs, targets = randn(32, 5, seed=50), randn(32, 3, seed=51)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = (model(inputs) - targets).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        optimizer.tie_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())

        assert tied_bitwise(model[0].weight)
        assert tied_bitwise(model[0].bias)
        assert not tied_bitwise(model[0].weight, [FREE])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_accumulate_over_several_scaled_backward_passes(compact, reduction):
    weight, optimizer = one_tied(reduction=reduction, lr=1.0, compact=compact)
    start, scaler = weight.detach().clone(), scaler_of()
    for seed in (1, 2):
        scaler.scale((weight * randn(*SHAPE, seed=seed)).sum()).backward()
    scaler.step(optimizer)

    expected = mean_gradient if reduction == "mean" else sum_gradient
    both = randn(*SHAPE, seed=1) + randn(*SHAPE, seed=2)
    torch.testing.assert_close(weight.detach(), start - expected(both))
