"""Accelerate with a tied optimizer, beside a loop without it that does the same to the last bit."""

import pytest
import torch
from checks import GROUPS, SHAPE, mean_gradient, randn, same_bits, same_tree, tied_bitwise
from torch.amp import GradScaler
from torch.nn import Dropout, Linear, Sequential, Tanh
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from tieopt import TiedOptimizer

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState

DATA = TensorDataset(randn(12, SHAPE[1], seed=1), randn(12, 1, seed=2))


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerators of one process share a state that outlives them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def made(compact, inner=AdamW, dropout=0.0, **kwargs):
    """A model, the optimizer that ties rows of its first weight, and a scheduler of it."""
    torch.manual_seed(0)
    model = Sequential(Linear(SHAPE[1], SHAPE[0]), Tanh(), Dropout(dropout), Linear(SHAPE[0], 1))
    inner = inner(model.parameters(), lr=0.05, **kwargs)
    optimizer = TiedOptimizer(inner, {model[0].weight: GROUPS}, compact=compact)
    return model, optimizer, StepLR(optimizer, step_size=2, gamma=0.5)


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.host("Accelerate", "`prepare`, `backward`, a scheduler", package="accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_loop_is_bit_for_bit_the_plain_one(compact, precision):
    plain, optimizer, scheduler = made(compact)
    for x, y in DataLoader(DATA, batch_size=2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prediction = plain(x)
        mse_loss(prediction.float(), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, tied, scheduler = made(compact)
    weight = model[0].weight
    model, optimizer, loader, scheduler = accelerator.prepare(model, tied, DataLoader(DATA, batch_size=2), scheduler)
    for x, y in loader:
        accelerator.backward(mse_loss(model(x), y))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert tied_bitwise(weight)

    assert optimizer.optimizer is tied
    assert tied.param_groups[0]["lr"] == 0.05 * 0.5**3
    assert same_tree(weights_of(accelerator.unwrap_model(model)), weights_of(plain))


@pytest.mark.host("Accelerate", "`accumulate`", package="accelerate")
def test_accumulated_gradients_are_those_of_the_plain_loop(compact):
    plain, optimizer, _ = made(compact)
    for number, (x, y) in enumerate(DataLoader(DATA, batch_size=2)):
        (mse_loss(plain(x), y) / 3).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer, loader = accelerator.prepare(*made(compact)[:2], DataLoader(DATA, batch_size=2))
    distinct = set()
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        assert tied_bitwise(model[0].weight)
        distinct.add(model[0].weight.sum().item())

    assert len(distinct) == 3  # The start, and two steps on three batches each.
    assert same_tree(weights_of(model), weights_of(plain))


@pytest.mark.host("Accelerate", "`clip_grad_norm_`", package="accelerate")
@pytest.mark.parametrize("tie_first", [True, False])
def test_clipping_measures_the_tied_gradient_if_it_was_tied_before(compact, tie_first):
    accelerator = Accelerator(cpu=True)
    model, tied, _ = made(compact, SGD)
    model, optimizer = accelerator.prepare(model, tied)
    weight, (x, y) = model[0].weight, DATA[:]
    for _ in range(3):
        accelerator.backward(mse_loss(model(x), y))
        gradient = mean_gradient(weight.grad) if tie_first else weight.grad.clone()
        if tie_first:
            tied.tie_gradients()
        before = weight.detach().clone()
        norm = accelerator.clip_grad_norm_([weight], 1e-3)
        torch.testing.assert_close(norm, gradient.norm())
        optimizer.step()
        optimizer.zero_grad()
        assert tied_bitwise(weight)
        # Clipped by the norm of the untied gradient, the step is shorter.
        length = (before - weight.detach()).norm() / 0.05
        torch.testing.assert_close(length, 1e-3 * mean_gradient(gradient).norm() / gradient.norm(), rtol=0.01, atol=0)


@pytest.mark.host("Accelerate", "`save_state`, `load_state`", package="accelerate")
def test_a_loaded_state_goes_on_bit_for_bit_as_if_never_stopped(compact, tmp_path):
    def prepared():
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        # What is shuffled and dropped depends on the state of the random numbers, which is saved as well.
        model, optimizer, scheduler = made(compact, dropout=0.5)
        loader = DataLoader(DATA, batch_size=4, shuffle=True)
        return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)

    def epoch(accelerator, model, optimizer, loader, scheduler):
        for x, y in loader:
            accelerator.backward(mse_loss(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            assert tied_bitwise(model[0].weight)
        return [weights_of(model), optimizer.state_dict(), scheduler.state_dict()]

    run = prepared()
    epoch(*run)
    run[0].save_state(tmp_path / "state")
    uninterrupted = epoch(*run)

    run = prepared()
    run[0].load_state(tmp_path / "state")
    assert not same_tree(weights_of(run[1]), uninterrupted[0])
    assert same_tree(epoch(*run), uninterrupted)


@pytest.mark.host("Accelerate", "a `GradScaler`", package="accelerate")
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_no_bit_and_the_next_one_goes_on(compact, fused):
    # An Accelerator has a scaler only where there is a GPU. It gives it to the optimizer, as here.
    Accelerator(cpu=True)
    model, tied, _ = made(compact, fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(tied, scaler=scaler)
    weight, (x, y) = model[0].weight, DATA[:]
    plain, reference, _ = made(compact, fused=fused)
    for spoil in (False, True, False):
        before = weights_of(model)
        scaler.scale(mse_loss(model(x), y)).backward()
        if spoil:
            weight.grad[0, 0] = torch.inf
        else:
            mse_loss(plain(x), y).backward()
            reference.step()
            reference.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        assert same_tree(weights_of(model), before) == spoil
        assert tied_bitwise(weight)
        # A fused step skips itself, which Accelerate does not see.
        assert optimizer.step_was_skipped == (spoil and not fused)

    assert scaler.get_scale() == 2.0**9
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.host("Accelerate", "a `GradScaler`", package="accelerate")
def test_scaled_gradients_are_tied_and_then_unscaled_by_the_clipping(compact):
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    # What it makes itself where there is a GPU.
    accelerator.scaler, accelerator.native_amp = GradScaler("cpu", init_scale=2.0**10), True
    model, tied, _ = made(compact)
    plain, reference, _ = made(compact)
    weight = model[0].weight
    model, optimizer = accelerator.prepare(model, tied)
    for x, y in DataLoader(DATA, batch_size=2):
        accelerator.backward(mse_loss(model(x), y))
        tied.tie_gradients()
        norm = accelerator.clip_grad_norm_([weight], 1e-3)
        optimizer.step()
        optimizer.zero_grad()

        with torch.autocast("cpu", torch.float16):
            prediction = plain(x)
        (mse_loss(prediction.float(), y) * 2.0**10).backward()
        for parameter in plain.parameters():
            parameter.grad /= 2.0**10
        reference.tie_gradients()
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_([plain[0].weight], 1e-3))
        reference.step()
        reference.zero_grad()
        assert not optimizer.step_was_skipped
        assert tied_bitwise(weight)
    torch.testing.assert_close(weights_of(accelerator.unwrap_model(model)), weights_of(plain))


@pytest.mark.host("Accelerate", "`unscale_gradients`, `clip_grad_norm_` of the tied optimizer", package="accelerate")
def test_unscaled_gradients_are_clipped_by_the_optimizer(compact):
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    # What it makes itself where there is a GPU.
    accelerator.scaler, accelerator.native_amp = GradScaler("cpu", init_scale=2.0**10), True
    model, tied, _ = made(compact)
    plain, reference, _ = made(compact)
    model, optimizer = accelerator.prepare(model, tied)
    for x, y in DataLoader(DATA, batch_size=2):
        accelerator.backward(mse_loss(model(x), y))
        accelerator.unscale_gradients()
        norm = tied.clip_grad_norm_(1e-3)
        optimizer.step()
        optimizer.zero_grad()

        with torch.autocast("cpu", torch.float16):
            prediction = plain(x)
        (mse_loss(prediction.float(), y) * 2.0**10).backward()
        for parameter in plain.parameters():
            parameter.grad /= 2.0**10
        torch.testing.assert_close(norm, reference.clip_grad_norm_(1e-3))
        reference.step()
        reference.zero_grad()
        assert not optimizer.step_was_skipped
    torch.testing.assert_close(weights_of(accelerator.unwrap_model(model)), weights_of(plain))


@pytest.mark.host("Accelerate", "an optimizer that is tied once it is prepared", package="accelerate")
def test_what_is_below_a_prepared_optimizer_can_be_tied_as_well(compact):
    accelerator = Accelerator(cpu=True)
    model = Linear(*reversed(SHAPE))
    model, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=0.05))
    tied = TiedOptimizer(optimizer.optimizer, {model.weight: GROUPS}, compact=compact)
    start = model.weight.detach().clone()
    assert tied is optimizer.optimizer
    for _ in range(2):
        accelerator.backward(model(DATA[:][0]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        assert tied_bitwise(model.weight)
    assert not same_bits(model.weight, start)
