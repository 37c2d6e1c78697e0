"""Engines of ignite with a tied optimizer."""

import pytest
import torch
from checks import GROUPS, SHAPE, randn, same_tree, tied_bitwise
from torch.nn import Linear, Sequential, Tanh
from torch.nn.functional import mse_loss
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

from tieopt import TiedOptimizer

pytest.importorskip("ignite")

from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, LRScheduler

BATCHES = list(zip(randn(12, SHAPE[1], seed=1).split(2), randn(12, 1, seed=2).split(2), strict=True))


def made(compact):
    """A model, the optimizer that ties rows of its first weight, and a scheduler of it."""
    torch.manual_seed(0)
    model = Sequential(Linear(SHAPE[1], SHAPE[0]), Tanh(), Linear(SHAPE[0], 1))
    optimizer = TiedOptimizer(AdamW(model.parameters(), lr=0.05), {model[0].weight: GROUPS}, compact=compact)
    return model, optimizer, StepLR(optimizer, step_size=2, gamma=0.5)


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def trainer_of(model, optimizer, scheduler, **kwargs):
    """A trainer with its handlers, one of which asserts the ties after every batch."""
    trainer = create_supervised_trainer(model, optimizer, mse_loss, **kwargs)
    handler = LRScheduler(scheduler)
    trainer.add_event_handler(Events.ITERATION_STARTED, handler)

    @trainer.on(Events.ITERATION_COMPLETED)
    def sees_ties():
        assert tied_bitwise(model[0].weight)

    return trainer, {"trainer": trainer, "model": model, "optimizer": optimizer, "scheduler": handler}


@pytest.mark.host("ignite", "`create_supervised_trainer`, accumulating, a scheduler", package="pytorch-ignite")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_trainer_is_bit_for_bit_the_plain_loop(compact, accumulate):
    model, optimizer, scheduler = made(compact)
    trainer, _ = trainer_of(model, optimizer, scheduler, gradient_accumulation_steps=accumulate)
    trainer.run(BATCHES, max_epochs=2)

    plain, optimizer, _ = made(compact)
    for number, (x, y) in enumerate(BATCHES * 2, 1):
        (mse_loss(plain(x), y) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** ((number - 1) // 2)
            optimizer.step()
            optimizer.zero_grad()
    assert same_tree(weights_of(model), weights_of(plain))


@pytest.mark.host("ignite", "`Checkpoint`", package="pytorch-ignite")
def test_a_loaded_checkpoint_goes_on_bit_for_bit_as_if_never_stopped(compact, tmp_path):
    model, optimizer, scheduler = made(compact)
    trainer, parts = trainer_of(model, optimizer, scheduler)
    saver = Checkpoint(parts, DiskSaver(tmp_path), n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run(BATCHES, max_epochs=3)

    loaded, optimizer_of_loaded, scheduler = made(compact)
    trainer, parts = trainer_of(loaded, optimizer_of_loaded, scheduler)
    Checkpoint.load_objects(parts, torch.load(tmp_path / f"checkpoint_{len(BATCHES)}.pt", weights_only=True))
    assert not same_tree(weights_of(loaded), weights_of(model))
    trainer.run(BATCHES, max_epochs=3)
    assert trainer.state.iteration == 3 * len(BATCHES)
    assert same_tree(weights_of(loaded), weights_of(model))
    assert same_tree(optimizer_of_loaded.state_dict(), optimizer.state_dict())
