"""torch.optim.swa_utils: what is averaged over a tied training stays tied, and the schedule reaches the optimizer."""

import io

import pytest
import torch
from checks import GROUPS, bits, randn, same_tree, tied_bitwise
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    update_bn,
)

from tieopt import Tie, TiedOptimizer, is_tied, tie_

STEPS = 8
AVERAGES = {
    "mean": {},
    "mean, one by one": {"avg_fn": get_swa_avg_fn()},
    "moving": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "moving, one by one": {"avg_fn": get_ema_avg_fn(0.9)},
}
every_average = pytest.mark.parametrize("average", AVERAGES)
averages = pytest.mark.host("swa_utils", "AveragedModel, the mean and the moving average")
schedule = pytest.mark.host("swa_utils", "SWALR")
statistics = pytest.mark.host("swa_utils", "update_bn")


def tied_model(compact, inner=SGD, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    # A fused step moves members apart in their last bits, so that they have to be tied after it as well.
    optimizer = inner(model.parameters(), lr=0.1, fused=True, **kwargs)
    return model, TiedOptimizer(optimizer, {model[0].weight: GROUPS, model[0].bias: GROUPS}, compact=compact)


def train(model, optimizer, steps, after):
    for step in steps:
        optimizer.zero_grad()
        mse_loss(model(randn(16, 5, seed=step)), randn(16, 7, seed=100 + step)).backward()
        optimizer.step()
        after()
        yield step


@averages
@every_average
def test_the_average_of_tied_weights_is_tied_to_the_last_bit(compact, average):
    model, optimizer = tied_model(compact, momentum=0.9)
    averaged = AveragedModel(model, **AVERAGES[average])
    expected = None
    for step in train(model, optimizer, range(STEPS), lambda: averaged.update_parameters(model)):
        snapshot = model[0].weight.detach().double()
        share = 0.1 if "moving" in average else 1 / (step + 1)
        expected = snapshot if expected is None else expected.lerp(snapshot, share)

        assert tied_bitwise(model[0].weight)
        assert tied_bitwise(averaged.module[0].weight)
        assert tied_bitwise(averaged.module[0].bias)
    torch.testing.assert_close(averaged.module[0].weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


# Vectors of a processor do not end where rows do.
@averages
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [3, 16, 37])
@every_average
def test_wherever_members_lie_in_memory_they_are_averaged_alike(device, dtype, width, average):
    layer = nn.Linear(width, 7, bias=False, device=device, dtype=dtype)
    labels = torch.arange(7 * width).view(7, width) % 4
    averaged = AveragedModel(layer, **AVERAGES[average])
    for step in range(STEPS):
        with torch.no_grad():
            layer.weight.copy_(randn(7, width, seed=step))
        tie_(layer.weight, labels)
        averaged.update_parameters(layer)

        assert is_tied(averaged.module.weight, labels)


@averages
@every_average
def test_signs_and_zeros_are_averaged_to_signs_and_zeros(compact, average):
    layer = nn.Linear(5, 7)
    scale = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
    labels = torch.tensor([0, 1, -1, 0, -1, 1, 2])
    optimizer = TiedOptimizer(
        AdamW(layer.parameters(), lr=0.1), Tie(layer.weight, labels, scale=scale), compact=compact
    )
    averaged = AveragedModel(layer, **AVERAGES[average])
    for _ in train(layer, optimizer, range(STEPS), lambda: averaged.update_parameters(layer)):
        weight = averaged.module.weight

        assert torch.equal(weight[3], -weight[0])
        assert torch.equal(weight[5], -weight[1])
        assert not weight[6].any()


@averages
def test_an_average_that_was_begun_before_the_ties_is_tied_from_its_first_update(compact):
    model = nn.Linear(5, 7)
    averaged = AveragedModel(model)
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), {model.weight: GROUPS}, compact=compact)
    assert not tied_bitwise(averaged.module.weight)
    for _ in train(model, optimizer, range(2), lambda: averaged.update_parameters(model)):
        assert tied_bitwise(averaged.module.weight)


# Where vectors of a processor end, a multiplication and an addition are rounded otherwise than within them.
@averages
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [3, 37])
def test_an_average_of_ones_own_can_be_tied(dtype, width):
    layer = nn.Linear(width, 7, bias=False, dtype=dtype)
    averaged = AveragedModel(layer, avg_fn=lambda old, new, _: (0.9 * old).add_(new, alpha=0.1))
    for step in range(STEPS):
        with torch.no_grad():
            layer.weight.copy_(randn(7, width, seed=step))
        tie_(layer.weight, GROUPS)
        averaged.update_parameters(layer)
        before = averaged.module.weight.detach().clone()

        assert tied_bitwise(tie_(averaged.module.weight, GROUPS))
        # It was tied but for a rounding.
        torch.testing.assert_close(averaged.module.weight.detach(), before)


@averages
def test_averaged_weights_that_are_loaded_into_the_model_are_tied_already(compact):
    model, optimizer = tied_model(compact, momentum=0.9)
    averaged = AveragedModel(model)
    list(train(model, optimizer, range(STEPS), lambda: averaged.update_parameters(model)))
    model.load_state_dict(averaged.module.state_dict())
    before = bits(model[0].weight)
    optimizer.tie_weights()

    assert torch.equal(bits(model[0].weight), before)


@averages
@schedule
@every_average
@pytest.mark.skipif(torch.__version__ < (2, 7), reason="the state of its SWALR is not plain data")
def test_a_training_that_is_saved_and_loaded_goes_on_bit_for_bit(compact, average):
    def begun():
        model, optimizer = tied_model(compact, inner=AdamW)
        scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=STEPS)
        return model, optimizer, scheduler, AveragedModel(model, **AVERAGES[average])

    def go_on(parts, steps):
        model, optimizer, scheduler, averaged = parts

        def after():
            averaged.update_parameters(model)
            scheduler.step()

        for _ in train(model, optimizer, steps, after):
            assert tied_bitwise(model[0].weight)
            assert tied_bitwise(averaged.module[0].weight)
        return [part.state_dict() for part in parts]

    whole = go_on(begun(), range(STEPS))
    file = io.BytesIO()
    torch.save(go_on(begun(), range(STEPS // 2)), file)
    file.seek(0)
    resumed = begun()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)

    assert same_tree(go_on(resumed, range(STEPS // 2, STEPS)), whole)


@schedule
@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_the_schedule_is_that_of_the_bare_optimizer(compact, strategy):
    rates = []
    for tied in (False, True):
        model = nn.Linear(5, 7)
        optimizer = SGD(model.parameters(), lr=0.1)
        if tied:
            TiedOptimizer(optimizer, {model.weight: GROUPS}, compact=compact)
        scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3, anneal_strategy=strategy)
        rates.append([])
        for _ in train(model, optimizer, range(STEPS), scheduler.step):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            assert tied_bitwise(model.weight) or not tied

    assert rates[0] == rates[1]
    assert rates[1][-1] == 0.02


@schedule
def test_the_step_uses_the_scheduled_learning_rate(compact):
    model = nn.Linear(5, 7, bias=False)
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), {model.weight: GROUPS}, compact=compact)
    scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
    for _ in range(4):
        before, rate = model.weight.detach().clone(), optimizer.param_groups[0]["lr"]
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        scheduler.step()

        torch.testing.assert_close(model.weight.detach(), before - rate)
        assert tied_bitwise(model.weight)


@statistics
def test_update_bn_takes_the_statistics_of_the_averaged_weights_and_leaves_these_as_they_are(compact):
    model, optimizer = tied_model(compact, momentum=0.9)
    averaged = AveragedModel(model)
    list(train(model, optimizer, range(STEPS), lambda: averaged.update_parameters(model)))
    before = bits(averaged.module[0].weight)
    batches = [randn(16, 5, seed=step) for step in range(3)]
    update_bn(batches, averaged)

    linear, norm = averaged.module
    assert torch.equal(bits(linear.weight), before)
    assert tied_bitwise(linear.weight)
    torch.testing.assert_close(norm.running_mean, torch.stack([linear(batch).mean(0) for batch in batches]).mean(0))
    # Neurons that are tied, bias included, have one mean and one variance.
    for statistic in (norm.running_mean, norm.running_var):
        torch.testing.assert_close(statistic[[0, 1]], statistic[[3, 6]])
