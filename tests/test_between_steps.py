"""Writes to tied weights between two steps are noticed where they part members, and calls that read write nothing."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from checks import GROUPS, SHAPE, parameter, randn, same_bits, tied_bitwise
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer, is_tied, tie_

PARTED = "replaced or written to between two steps, and their members differ now: weight"


def made(compact: bool, **options: object) -> tuple[Parameter, TiedOptimizer]:
    weight = parameter(*SHAPE, seed=1)
    return weight, TiedOptimizer(SGD([("weight", weight)], lr=0.1), {weight: GROUPS}, compact=compact, **options)


def stepped(weight: Parameter, optimizer: TiedOptimizer) -> None:
    weight.grad = randn(*SHAPE, seed=2)
    optimizer.step()


@torch.no_grad()
def write_noise(weight: Parameter) -> None:
    weight.add_(randn(*SHAPE, seed=3))


@torch.no_grad()
def write_evenly(weight: Parameter) -> None:
    weight.mul_(0.5).clamp_(-1, 1)


def test_members_that_were_written_apart_are_warned_of_and_go_on_from_their_mean(compact: bool) -> None:
    weight, optimizer = made(compact)
    stepped(weight, optimizer)
    write_noise(weight)
    mean = tie_(weight.detach().clone(), GROUPS)
    with pytest.warns(UserWarning, match=PARTED):
        stepped(weight, optimizer)
    assert tied_bitwise(weight)
    torch.testing.assert_close(weight.detach(), mean - 0.1 * tie_(randn(*SHAPE, seed=2), GROUPS))
    # Once for each time.
    stepped(weight, optimizer)


SILENT: dict[str, Callable[[Parameter, TiedOptimizer], object]] = {
    "nothing": lambda weight, optimizer: None,
    "what keeps the ties": lambda weight, optimizer: write_evenly(weight),
    "what is tied afterwards": lambda weight, optimizer: (write_noise(weight), optimizer.tie_weights()),
    "free rows": lambda weight, optimizer: weight.data[4].fill_(1.0),
    "after untie()": lambda weight, optimizer: (optimizer.untie(), write_noise(weight)),
    "a copy": lambda weight, optimizer: copy.deepcopy(optimizer),
    "new storage": lambda weight, optimizer: setattr(weight, "data", weight.data.clone()),
}


@pytest.mark.parametrize("wrote", SILENT)
def test_what_leaves_members_equal_is_no_reason_to_warn(wrote: str, compact: bool) -> None:
    weight, optimizer = made(compact)
    stepped(weight, optimizer)
    SILENT[wrote](weight, optimizer)
    stepped(weight, optimizer)
    assert wrote == "after untie()" or tied_bitwise(weight)


def test_relaxed_ties_may_be_written_apart() -> None:
    weight, optimizer = made(False, strength=0.5)
    write_noise(weight)
    stepped(weight, optimizer)


def test_a_weight_that_was_frozen_when_it_was_tied_was_written_by_nobody(compact: bool) -> None:
    weight = parameter(*SHAPE, seed=1).requires_grad_(False)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS}, compact=compact)
    stepped(weight.requires_grad_(), optimizer)
    assert tied_bitwise(weight)


def test_a_lookup_that_limits_the_norms_of_some_members_is_warned_of(compact: bool) -> None:
    embedding = nn.Embedding(8, 64, max_norm=1.0)
    nn.init.ones_(embedding.weight)
    optimizer = TiedOptimizer(SGD(embedding.parameters(), lr=0.1), {embedding.weight: [[3, 7]]}, compact=compact)
    (embedding(torch.tensor([3])) * 0).sum().backward()
    with pytest.warns(UserWarning, match="no embedding with max_norm"):
        optimizer.step()
    assert is_tied(embedding.weight, [[3, 7]])


def test_the_drift_can_be_asked_for_in_another_thread_while_steps_run(compact: bool) -> None:
    rows = 600
    groups = torch.arange(rows) // 3
    weights = [Parameter(randn(rows, 16, seed=1)) for _ in range(2)]
    optimizers = [TiedOptimizer(SGD([one], lr=1e-3), {one: groups}, compact=compact) for one in weights]
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            optimizers[0].tie_drift()
            optimizers[0].tie_summary()
            optimizers[0].state_dict()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for step in range(60):
            for weight, optimizer in zip(weights, optimizers, strict=True):
                weight.grad = randn(rows, 16, seed=step)
                optimizer.step()
    finally:
        done.set()
        thread.join()
    assert same_bits(*weights)


def test_a_rate_of_zero_counts_no_step_whatever_holds_it() -> None:
    weight = parameter(*SHAPE, seed=1)
    rate = torch.tensor(0.0)
    optimizer = TiedOptimizer(SGD([weight], lr=rate), {weight: GROUPS}, every=2)
    for _ in range(3):
        stepped(weight, optimizer)
    assert optimizer.state_dict()["tieopt"]["steps"] == 0
    rate.fill_(0.1)
    stepped(weight, optimizer)
    assert optimizer.state_dict()["tieopt"]["steps"] == 1


def test_the_tensors_of_a_step_that_was_captured_stay_when_the_ties_are_replaced(
    compact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, optimizer = made(compact)
    monkeypatch.setattr("tieopt.engine.graphs._HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stepped(weight, optimizer)
    monkeypatch.undo()
    captured = weakref.ref(optimizer._tieopt)
    for ties in ([[0, 1]], [[1, 2]]):
        optimizer.retie({weight: ties})
        gc.collect()
        assert captured() is not None
    assert copy.deepcopy(optimizer)._tieopt is not captured()


def test_rates_in_tensors_that_come_to_differ_are_refused_by_the_next_step(compact: bool) -> None:
    first, second = parameter(4, 2, seed=1), parameter(4, 2, seed=2)
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    groups = [{"params": [one], "lr": rate} for one, rate in zip((first, second), rates, strict=True)]
    tie = Tie.join(Tie(first, torch.arange(4)), Tie(second, torch.arange(4)))
    optimizer = TiedOptimizer(SGD(groups), tie, compact=compact)
    for one in (first, second):
        one.grad = torch.ones_like(one)
    optimizer.step()
    rates[1].fill_(0.2)
    with pytest.raises(ValueError, match="different settings"):
        optimizer.step()
    rates[0].fill_(0.2)
    optimizer.step()
    assert torch.equal(first, second)
