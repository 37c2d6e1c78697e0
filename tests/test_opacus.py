"""Optimizers that Opacus makes private, without noise: they make the gradients within their step."""

import functools

import pytest
import torch
from checks import GROUPS
from torch.optim import SGD, Adam, Optimizer
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from training import BATCHES, moved, neurons_tied, plain_loop, small_model

from tieopt import TiedOptimizer

pytest.importorskip("opacus")

from opacus import PrivacyEngine

pytestmark = pytest.mark.filterwarnings("ignore")

HOST = functools.partial(pytest.mark.host, "Opacus", package="opacus")

INNER = pytest.mark.parametrize("inner", [SGD, Adam])
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum"])


def tied(optimizer: Optimizer, model: torch.nn.Sequential, reduction: str, compact: bool) -> Optimizer:
    ties = {model[0].weight: GROUPS, model[0].bias: GROUPS}
    return TiedOptimizer(optimizer, ties, reduction=reduction, compact=compact)


def private(optimizer: Optimizer, model: torch.nn.Sequential) -> tuple[torch.nn.Module, Optimizer]:
    """The model and the optimizer as Opacus makes them; no gradient is clipped, and none gets noise."""
    loader = DataLoader(TensorDataset(*map(torch.cat, zip(*BATCHES, strict=True))), batch_size=len(BATCHES[0][0]))
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=1e6,
        poisson_sampling=False,
    )
    return model, optimizer


def expected(inner: type[Optimizer], reduction: str, compact: bool) -> dict[str, torch.Tensor]:
    """The weights after the same training without Opacus."""
    model = small_model()
    return plain_loop(model, tied(inner(model.parameters(), lr=0.05), model, reduction, compact), BATCHES)


@HOST("`make_private` of a tied optimizer")
@INNER
@REDUCTION
def test_an_optimizer_that_is_tied_and_then_made_private_trains_as_without_opacus(inner, reduction, compact):
    model = small_model()
    outer, optimizer = private(tied(inner(model.parameters(), lr=0.05), model, reduction, compact), model)
    plain_loop_of_private(outer, optimizer)

    assert neurons_tied(model)
    assert_close(model.state_dict(), expected(inner, reduction, compact))


@HOST("an optimizer that is tied once it is private")
@INNER
@REDUCTION
def test_an_optimizer_that_is_made_private_and_then_tied_trains_so_too_or_is_refused(
    inner, reduction, compact, record_property
):
    model = small_model()
    outer, optimizer = private(inner(model.parameters(), lr=0.05), model)
    if compact:
        with pytest.raises(ValueError, match="before it is wrapped"):
            tied(optimizer, model, reduction, compact)
        record_property("refused", "an optimizer that only hands gradients to another one")
        return
    optimizer = tied(optimizer, model, reduction, compact)
    plain_loop_of_private(outer, optimizer)

    assert neurons_tied(model)
    assert_close(model.state_dict(), expected(inner, reduction, compact))


def plain_loop_of_private(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """The loop of plain_loop(); the private model has the modules of the model within."""
    for inputs, targets in BATCHES:
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert neurons_tied(model._module)
    assert moved(model._module)


def test_noise_moves_no_member_of_a_group_from_the_others():
    model = small_model()
    optimizer = tied(Adam(model.parameters()), model, "mean", False)
    loader = DataLoader(TensorDataset(*BATCHES[0]), batch_size=len(BATCHES[0][0]))
    outer, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        noise_generator=torch.Generator().manual_seed(0),
    )
    torch.nn.functional.mse_loss(outer(BATCHES[0][0]), BATCHES[0][1]).backward()
    optimizer.step()

    assert neurons_tied(model)
    assert not torch.equal(model[0].weight, small_model()[0].weight)
