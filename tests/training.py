"""A small training that hosts are given, and the plain loop that they are compared with."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from checks import GROUPS, randn, tied_bitwise
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, AdamW, Optimizer

from tieopt import TiedOptimizer
from tieopt.ties.options import Reduction

Batch = tuple[Tensor, Tensor]

# A fused step moves members apart in their last bits, so that they have to be tied after it as well.
FUSED_ADAMW = partial(AdamW, fused=True)

BATCHES: list[Batch] = [(randn(8, 5, seed=seed), randn(8, 2, seed=100 + seed)) for seed in range(6)]


def small_model() -> nn.Sequential:
    """A model whose neurons are to be tied; the same one each time."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    with torch.no_grad():
        for seed, param in enumerate(model.parameters()):
            param.copy_(randn(*param.shape, seed=seed))
    return model


def tied_optimizer(
    model: nn.Sequential,
    inner: Callable[..., Optimizer] = FUSED_ADAMW,
    compact: bool = False,
    reduction: Reduction = "mean",
    **kwargs: object,
) -> Optimizer:
    """An optimizer of the model that ties some neurons of its first layer."""
    kwargs.setdefault("lr", 0.05)
    if compact and inner is LBFGS:
        # It compares the loss with the gradient of the shared values.
        reduction = "sum"
    ties = {model[0].weight: GROUPS, model[0].bias: GROUPS}
    return TiedOptimizer(inner(model.parameters(), **kwargs), ties, reduction=reduction, compact=compact)


def neurons_tied(model: nn.Sequential) -> bool:
    """Whether they are, to the last bit."""
    return tied_bitwise(model[0].weight) and tied_bitwise(model[0].bias)


def moved(model: nn.Sequential) -> bool:
    """Whether each entry of a model that was small_model() has changed; tying alone changes none that is free."""
    pairs = zip(model.parameters(), small_model().parameters(), strict=True)
    return all(bool((new.float() != old).all()) for new, old in pairs)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that is trained."""
    inputs, targets = batch
    return mse_loss(model(inputs), targets)


def plain_loop(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    *,
    accumulate: int = 1,
    before_step: Callable[[], object] = lambda: None,
    after_step: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Trains as a page of PyTorch's own would have it, and returns the weights."""
    for number, batch in enumerate(batches, start=1):
        (loss_of(model, batch) / accumulate).backward()
        if number % accumulate == 0:
            before_step()
            optimizer.step()
            optimizer.zero_grad()
            after_step()
    assert moved(model)
    return model.state_dict()
