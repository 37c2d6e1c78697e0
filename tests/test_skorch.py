"""Nets of skorch with a tied optimizer."""

import pickle

import pytest
import torch
from checks import GROUPS, SHAPE, mean_gradient, randn, same_tree, tied_bitwise
from torch.nn import Linear, Module, MSELoss, Tanh
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, AdamW

from tieopt import TiedOptimizer

pytest.importorskip("skorch")

from skorch import NeuralNet
from skorch.callbacks import Callback, GradientNormClipping

X, Y = randn(12, SHAPE[1], seed=1), randn(12, 1, seed=2)
CLIP = 0.01


class Network(Module):
    def __init__(self, units=SHAPE[0]):
        super().__init__()
        self.hidden, self.tanh, self.head = Linear(SHAPE[1], units), Tanh(), Linear(units, 1)

    def forward(self, x):
        return self.head(self.tanh(self.hidden(x)))


def reduction_for(optimizer, compact):
    """The reduction that an optimizer takes: LBFGS compares the loss with the gradient of what it trains."""
    return "sum" if compact and isinstance(optimizer, LBFGS) else "mean"


class TiedNet(NeuralNet):
    """Ties rows of a weight whenever its optimizer is made."""

    def __init__(self, *args, compact=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.compact = compact

    def initialize_optimizer(self, *args):
        super().initialize_optimizer(*args)
        ties, compact = {self.module_.hidden.weight: GROUPS}, self.compact
        self.optimizer_ = TiedOptimizer(
            self.optimizer_, ties, reduction=reduction_for(self.optimizer_, compact), compact=compact
        )
        return self


class SeesTies(Callback):
    """Asserts that what is tied is equal after every batch."""

    def on_batch_end(self, net, batch=None, training=False, **kwargs):
        assert isinstance(net.optimizer_, TiedOptimizer)
        assert tied_bitwise(net.module_.hidden.weight)


def made(kind=TiedNet, callbacks=(), **kwargs):
    torch.manual_seed(0)
    kwargs = {"optimizer": AdamW, "lr": 0.05, "batch_size": 4, "max_epochs": 2, **kwargs}
    callbacks = [SeesTies(), *callbacks]
    return kind(Network, MSELoss, train_split=None, verbose=0, callbacks=callbacks, **kwargs)


def weights_of(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def plain_loop(compact, inner=AdamW, epochs=2):
    """What a net does to the same module, without skorch."""
    torch.manual_seed(0)
    module = Network()
    optimizer, ties = inner(module.parameters(), lr=0.05), {module.hidden.weight: GROUPS}
    optimizer = TiedOptimizer(optimizer, ties, reduction=reduction_for(optimizer, compact), compact=compact)
    for _ in range(epochs):
        for x, y in zip(X.split(4), Y.split(4), strict=True):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = mse_loss(module(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    return weights_of(module)


@pytest.mark.host("skorch", "`NeuralNet.fit`", package="skorch")
@pytest.mark.parametrize("inner", [AdamW, LBFGS])
def test_fitting_a_net_is_bit_for_bit_the_plain_loop(compact, inner):
    net = made(compact=compact, optimizer=inner).fit(X, Y)
    assert same_tree(weights_of(net.module_), plain_loop(compact, inner))


@pytest.mark.host("skorch", "`NeuralNet.fit`", package="skorch")
def test_a_function_that_ties_serves_as_the_optimizer(compact):
    def tied(groups, **kwargs):
        inner = AdamW(groups, **kwargs)
        return TiedOptimizer(inner, {inner.param_groups[0]["params"][0]: GROUPS}, compact=compact)

    net = made(NeuralNet, optimizer=tied).fit(X, Y)
    assert same_tree(weights_of(net.module_), plain_loop(compact))


@pytest.mark.host("skorch", "`set_params`", package="skorch")
def test_a_setting_reaches_the_tied_optimizer_and_an_optimizer_made_anew_is_tied(compact):
    net = made(compact=compact).fit(X, Y)
    first, before = net.optimizer_, weights_of(net.module_)
    net.set_params(optimizer__lr=0.0)
    net.partial_fit(X, Y)
    assert net.optimizer_ is first
    assert same_tree(weights_of(net.module_), before)

    net.set_params(module__units=9, optimizer__lr=0.05)
    start = weights_of(net.module_)
    net.partial_fit(X, Y)
    assert net.optimizer_ is not first
    assert not same_tree(weights_of(net.module_), start)


@pytest.mark.host("skorch", "`GradientNormClipping`", package="skorch")
def test_clipping_measures_the_tied_gradient_after_a_callback_that_ties_it(compact):
    class TiesGradients(Callback):
        def on_grad_computed(self, net, named_parameters, **kwargs):
            gradients = [parameter.grad for _, parameter in named_parameters]
            tied = [mean_gradient(one) if one.shape == SHAPE else one.clone() for one in gradients]
            norm = torch.nn.utils.get_total_norm(tied)
            self.expected = [one * (CLIP / norm) for one in tied]
            net.optimizer_.tie_gradients()

    class SeesGradients(Callback):
        def on_grad_computed(self, net, named_parameters, **kwargs):
            for (_, parameter), expected in zip(named_parameters, ties.expected, strict=True):
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=0)

    ties = TiesGradients()
    made(compact=compact, callbacks=[ties, GradientNormClipping(CLIP), SeesGradients()]).fit(X, Y)


@pytest.mark.host("skorch", "`clip_grad_norm_` of the tied optimizer in a callback", package="skorch")
def test_a_callback_has_the_optimizer_clip(compact):
    class Clips(Callback):
        def on_grad_computed(self, net, **kwargs):
            norms.append(net.optimizer_.clip_grad_norm_(CLIP))
            torch.testing.assert_close(net.optimizer_.grad_norm(), torch.tensor(CLIP), rtol=1e-3, atol=0)

    norms = []
    made(compact=compact, callbacks=[Clips()]).fit(X, Y)
    assert all(norm > CLIP for norm in norms)
    assert norms


@pytest.mark.host("skorch", "`save_params`, `load_params`, `pickle`", package="skorch")
@pytest.mark.parametrize("way", ["params", "pickle"])
def test_a_net_that_was_saved_goes_on_bit_for_bit_as_if_never_stopped(compact, way, tmp_path):
    net = made(compact=compact).fit(X, Y)
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(net))  # noqa: S301
    else:
        files = {"f_params": tmp_path / "module", "f_optimizer": tmp_path / "optimizer"}
        net.save_params(**files)
        loaded = made(compact=compact).initialize()
        loaded.load_params(**files)
    for each in (net, loaded):
        each.partial_fit(X, Y, epochs=1)
    assert same_tree(weights_of(loaded.module_), weights_of(net.module_))
    assert same_tree(weights_of(loaded.module_), plain_loop(compact, epochs=3))
    assert same_tree(loaded.optimizer_.state_dict(), net.optimizer_.state_dict())
