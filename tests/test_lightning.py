"""Lightning: the Trainer, with automatic and manual optimisation, and Fabric."""

import functools

import pytest
import torch
from checks import GROUPS, REDUCTIONS, same_tree, tied_bitwise
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader
from training import BATCHES, FUSED_ADAMW, loss_of, moved, neurons_tied, plain_loop, small_model, tied_optimizer

from tieopt import TiedOptimizer

L = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

EPOCHS = 3
# So low that every gradient is clipped.
CLIP = 0.05

host = functools.partial(pytest.mark.host, "Lightning", package="lightning")


class Module(L.LightningModule):
    """Trains the small model, and asserts after every batch that its neurons are tied."""

    def __init__(self, inner=FUSED_ADAMW, scheduled=False, **kwargs):
        super().__init__()
        self.model, self.inner, self.scheduled, self.kwargs = small_model(), inner, scheduled, kwargs
        self.batches_seen = 0

    def configure_optimizers(self):
        optimizer = tied_optimizer(self.model, self.inner, **self.kwargs)
        if not self.scheduled:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"},
        }

    def training_step(self, batch, number):
        return loss_of(self.model, batch)

    def on_train_batch_end(self, *args):
        assert neurons_tied(self.model)
        self.batches_seen += 1


class TiedBeforeClipping(Module):
    def on_before_optimizer_step(self, optimizer):
        optimizer.tie_gradients()


class ClippedByTheOptimizer(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        optimizer.clip_grad_norm_(gradient_clip_val)


class Manual(Module):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.model, batch))
        optimizer.tie_gradients()
        self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
        optimizer.step()


class WithClosure(Manual):
    def training_step(self, batch, number):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = loss_of(self.model, batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class TwoOptimizers(Manual):
    """Each trains a layer of its own, while the other one is frozen."""

    def configure_optimizers(self):
        first, _, last = self.model
        ties = [{first.weight: GROUPS}, {last.weight: [[0, 1]]}]
        return [
            TiedOptimizer(SGD(layer.parameters(), lr=0.1, momentum=0.9), tie, **self.kwargs)
            for layer, tie in zip([first, last], ties, strict=True)
        ]

    def training_step(self, batch, number):
        for optimizer in self.optimizers():
            with optimizer.toggle_model():
                self.manual_backward(loss_of(self.model, batch))
                optimizer.step()
                optimizer.zero_grad()

    def on_train_batch_end(self, *args):
        assert tied_bitwise(self.model[0].weight)
        assert tied_bitwise(self.model[2].weight, [[0, 1]])
        self.batches_seen += 1


def fit(module, tmp_path, epochs=EPOCHS, resume=None, **kwargs):
    """Trains, and returns the trainer."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **kwargs,
    )
    trainer.fit(module, DataLoader(BATCHES, batch_size=None), ckpt_path=resume, weights_only=True)
    # A step that trains nothing would be the same in the plain loop.
    assert moved(module.model)
    assert module.batches_seen == len(BATCHES) * (epochs - (EPOCHS if resume else 0))
    return trainer


def same_as(module, expected):
    """Whether the module has the weights of the plain loop."""
    return same_tree(module.model.state_dict(), expected)


# --- automatic optimisation ---


@host("automatic optimisation")
@pytest.mark.parametrize(("inner", "kwargs"), [(AdamW, {}), (FUSED_ADAMW, {}), (SGD, {"momentum": 0.9})])
def test_automatic_optimisation_is_the_plain_loop(compact, tmp_path, inner, kwargs):
    module, model = Module(inner, compact=compact, **kwargs), small_model()
    fit(module, tmp_path)

    assert same_as(module, plain_loop(model, tied_optimizer(model, inner, compact, **kwargs), BATCHES * EPOCHS))


@host("accumulate_grad_batches")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_accumulated_gradients_are_those_of_the_plain_loop(compact, tmp_path, reduction):
    # With SGD the mean and the sum are far apart.
    kwargs = {"inner": SGD, "momentum": 0.9, "reduction": reduction, "compact": compact}
    module, model = Module(**kwargs), small_model()
    fit(module, tmp_path, accumulate_grad_batches=3)

    expected = plain_loop(model, tied_optimizer(model, **kwargs), BATCHES * EPOCHS, accumulate=3)
    if compact:
        assert same_as(module, expected)
    # The last of three backward passes is within the step, which has tied the gradients of the others by then.
    torch.testing.assert_close(module.model.state_dict(), expected, rtol=1e-5, atol=1e-6)


@host("learning rate scheduler")
def test_a_scheduler_is_stepped_as_in_the_plain_loop(compact, tmp_path):
    module, model = Module(compact=compact, scheduled=True), small_model()
    fit(module, tmp_path)

    optimizer = tied_optimizer(model, compact=compact)
    scheduler = ExponentialLR(optimizer, 0.9)
    assert same_as(module, plain_loop(model, optimizer, BATCHES * EPOCHS, after_step=scheduler.step))


@host("gradient clipping")
@pytest.mark.parametrize(("algorithm", "clip"), [("norm", clip_grad_norm_), ("value", clip_grad_value_)])
@pytest.mark.parametrize("kind", [Module, TiedBeforeClipping])
def test_the_trainer_clips_untied_gradients_or_tied_ones_if_they_are_tied_before(
    compact, tmp_path, algorithm, clip, kind
):
    module, model = kind(SGD, compact=compact), small_model()
    fit(module, tmp_path, gradient_clip_val=CLIP, gradient_clip_algorithm=algorithm)

    optimizer = tied_optimizer(model, SGD, compact)

    def before_step():
        if kind is TiedBeforeClipping:
            optimizer.tie_gradients()
        clip(model.parameters(), CLIP)

    assert same_as(module, plain_loop(model, optimizer, BATCHES * EPOCHS, before_step=before_step))


@host("gradient clipping by `clip_grad_norm_` of the tied optimizer")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_trainer_has_the_optimizer_clip(compact, tmp_path, reduction):
    module, model = ClippedByTheOptimizer(SGD, compact=compact, reduction=reduction), small_model()
    fit(module, tmp_path, gradient_clip_val=CLIP)

    optimizer = tied_optimizer(model, SGD, compact, reduction=reduction)
    plain = plain_loop(model, optimizer, BATCHES * EPOCHS, before_step=lambda: optimizer.clip_grad_norm_(CLIP))
    assert same_as(module, plain)


@host("LBFGS")
def test_lbfgs_is_trained_as_with_a_closure_of_ones_own(compact, tmp_path):
    module, model = Module(LBFGS, compact=compact, max_iter=4), small_model()
    fit(module, tmp_path)

    optimizer = tied_optimizer(model, LBFGS, compact, max_iter=4)
    for batch in BATCHES * EPOCHS:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same_as(module, model.state_dict())


@host("precision bf16-mixed and 64-true")
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("64-true", torch.float64)])
def test_in_other_precisions_the_neurons_stay_tied(compact, tmp_path, precision, dtype):
    module = Module(compact=compact)
    trainer = fit(module, tmp_path, precision=precision)

    assert module.model[0].weight.dtype == dtype
    assert trainer.optimizers[0].tie_drift() == 0


@host("StochasticWeightAveraging, EMAWeightAveraging")
@pytest.mark.parametrize(
    "average",
    [
        lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1),
        lambda: callbacks.EMAWeightAveraging(decay=0.9),
    ],
    ids=["mean", "moving"],
)
def test_averaged_weights_are_tied(compact, tmp_path, average):
    last, module = Module(compact=compact), Module(compact=compact)
    fit(last, tmp_path)
    fit(module, tmp_path, callbacks=[average()])

    assert neurons_tied(module.model)
    assert not torch.equal(module.model[0].weight, last.model[0].weight)


# --- manual optimisation ---


@host("manual optimisation")
def test_manual_optimisation_is_the_plain_loop(compact, tmp_path):
    module, model = Manual(compact=compact), small_model()
    fit(module, tmp_path)

    optimizer = tied_optimizer(model, compact=compact)

    def before_step():
        optimizer.tie_gradients()
        clip_grad_norm_(model.parameters(), CLIP)

    assert same_as(module, plain_loop(model, optimizer, BATCHES * EPOCHS, before_step=before_step))


@host("manual optimisation")
def test_manual_optimisation_with_a_closure_is_the_plain_loop(compact, tmp_path):
    module, model = WithClosure(compact=compact), small_model()
    fit(module, tmp_path)

    assert same_as(module, plain_loop(model, tied_optimizer(model, compact=compact), BATCHES * EPOCHS))


@host("manual optimisation")
def test_two_optimizers_that_freeze_each_others_layers_keep_their_ties(compact, tmp_path):
    fit(TwoOptimizers(compact=compact), tmp_path)


@host("retie() in mid-training")
def test_ties_are_changed_on_the_optimizer_that_lightning_has_wrapped(compact, tmp_path):
    class Retied(Module):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                with pytest.raises(TypeError, match=r"\.optimizers\(\)\.optimizer"):
                    self.optimizers().retie({self.model[0].weight: [[0, 1]]})
                self.optimizers().optimizer.retie({self.model[0].weight: [[0, 1]]})

        def on_train_batch_end(self, *args):
            assert tied_bitwise(self.model[0].weight, GROUPS if self.current_epoch < 1 else [[0, 1]])
            self.batches_seen += 1

    module = Retied(compact=compact)
    fit(module, tmp_path)
    assert not neurons_tied(module.model)


# --- checkpoints ---


@host("checkpoint and resume")
@pytest.mark.parametrize(("inner", "settings"), [(FUSED_ADAMW, {}), (SGD, {"momentum": 0.9}), (LBFGS, {"max_iter": 4})])
def test_a_training_that_is_resumed_goes_on_bit_for_bit(compact, tmp_path, inner, settings):
    kwargs = {"inner": inner, "scheduled": True, "compact": compact, **settings}
    whole, half, resumed = (Module(**kwargs) for _ in range(3))
    expected = fit(whole, tmp_path, epochs=2 * EPOCHS)
    fit(half, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(resumed, tmp_path, epochs=2 * EPOCHS, resume=tmp_path / "half.ckpt")

    assert same_as(resumed, whole.model.state_dict())
    assert same_tree(trainer.optimizers[0].state_dict(), expected.optimizers[0].state_dict())


@host("checkpoint and resume")
def test_a_checkpoint_of_the_other_mode_is_resumed_from(compact, tmp_path):
    whole, half, resumed = Module(compact=compact), Module(compact=not compact), Module(compact=compact)
    fit(whole, tmp_path, epochs=2 * EPOCHS)
    fit(half, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, epochs=2 * EPOCHS, resume=tmp_path / "half.ckpt")

    # The modes add up in another order.
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=1e-4, atol=1e-5)


@host("checkpoint and resume")
def test_a_checkpoint_with_other_ties_is_refused(compact, tmp_path):
    class Other(Module):
        def configure_optimizers(self):
            return TiedOptimizer(AdamW(self.model.parameters()), {self.model[0].weight: [[0, 1]]}, **self.kwargs)

    fit(Module(compact=compact), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="saved with other ties"):
        fit(Other(compact=compact), tmp_path, epochs=2 * EPOCHS, resume=tmp_path / "half.ckpt")


# --- Fabric ---


def fabric_loop(fabric, model, optimizer, batches, tie=True):
    for batch in batches:
        fabric.backward(loss_of(model, batch))
        if tie:
            optimizer.tie_gradients()
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()

        assert neurons_tied(model.module)
    assert moved(model.module)


def fabric_parts(compact, **kwargs):
    fabric = L.Fabric(accelerator="cpu", devices=1, **kwargs)
    model = small_model()
    return fabric, *fabric.setup(model, tied_optimizer(model, compact=compact))


@host("Fabric")
@pytest.mark.parametrize("tie", [True, False])
def test_fabric_is_the_plain_loop(compact, tie):
    fabric, model, optimizer = fabric_parts(compact)
    fabric_loop(fabric, model, optimizer, BATCHES * EPOCHS, tie=tie)

    plain = small_model()
    same = tied_optimizer(plain, compact=compact)

    def before_step():
        if tie:
            same.tie_gradients()
        clip_grad_norm_(plain.parameters(), CLIP)

    assert same_tree(model.state_dict(), plain_loop(plain, same, BATCHES * EPOCHS, before_step=before_step))


@host("Fabric")
def test_fabric_saves_and_loads_and_goes_on_bit_for_bit(compact, tmp_path):
    fabric, model, optimizer = fabric_parts(compact)
    fabric_loop(fabric, model, optimizer, BATCHES)
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    fabric_loop(fabric, model, optimizer, BATCHES)
    other, resumed, resumed_optimizer = fabric_parts(compact)
    other.load(tmp_path / "half.ckpt", {"model": resumed, "optimizer": resumed_optimizer})
    fabric_loop(other, resumed, resumed_optimizer, BATCHES)

    assert same_tree(resumed.state_dict(), model.state_dict())
    assert same_tree(resumed_optimizer.state_dict(), optimizer.state_dict())


@host("Fabric")
def test_fabric_in_bfloat16_keeps_the_neurons_tied(compact):
    fabric, model, optimizer = fabric_parts(compact, precision="bf16-mixed")
    fabric_loop(fabric, model, optimizer, BATCHES)
