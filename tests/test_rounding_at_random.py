"""Weights of 16 bits that the optimizer rounds at random: tied ones move as far on the average as free ones do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import bits, randn, same_bits
from test_traced import as_compiled
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from tieopt import Tie, TiedOptimizer, tie_

HALVES = [torch.bfloat16, torch.float16]


def here(tensor: Any) -> Tensor:
    """The entries that this rank has of a tensor, which are all of them if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class RoundedAtRandom(Optimizer):
    """SGD, or Adam without its corrections, that rounds each weight up or down, by chance and without a bias."""

    def __init__(self, params: Any, lr: float, adaptive: bool = False, seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "adaptive": adaptive})
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                weight, update = here(param), here(param.grad).float()
                if group["adaptive"]:
                    square = self.state[param].setdefault("exp_avg_sq", update.square())
                    update = update / square.lerp_(update.square(), 0.1).sqrt()
                weight.copy_(self._rounded(weight.float() - group["lr"] * update, weight.dtype))

    def _rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        nearest = values.to(dtype)
        other = torch.nextafter(nearest, torch.where(values > nearest.float(), torch.inf, -torch.inf).to(dtype))
        share = (values - nearest.float()) / (other.float() - nearest.float())
        return torch.where(torch.rand(values.shape, generator=self._generator) < share, other, nearest)


# A free row and groups of 2, 4 and 8, spread over all rows.
LABELS = torch.tensor([3, 2, 1, 3, 0, 3, 2, 3, 2, 3, 3, 1, 3, 2, 3])
SIGNS = torch.where(torch.arange(15) % 3 == 1, -1.0, 1.0)
# Of the distance between neighbouring numbers from 0.5 to 1, so that few of the steps move a weight.
STEP, STEPS, WIDTH = 0.05, 200, 512


def rounded_training(
    dtype: torch.dtype,
    signs: Tensor | None = None,
    *,
    place: Callable[[Tensor], Tensor] = Tensor.clone,
    adaptive: bool = False,
    seed: int = 0,
    steps: int = STEPS,
    **options: Any,
) -> Parameter:
    """Tied weights after so many steps, that began as one or its negative; ``place`` may shard them."""
    start = torch.ones(15, WIDTH, dtype=dtype) if signs is None else signs[:, None].expand(15, WIDTH).to(dtype)
    weight, gradient = Parameter(place(start)), place(start)
    optimizer = RoundedAtRandom([weight], STEP * torch.finfo(dtype).eps / 2, adaptive, seed)
    optimizer = TiedOptimizer(optimizer, Tie(weight, torch.where(LABELS == 0, -1, LABELS), scale=signs), **options)
    for _ in range(steps):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight


def distances(weight: Tensor) -> Tensor:
    """How far the free row and the groups of 2, 4 and 8 have moved on the average, in such distances."""
    moved = (1 - weight.detach().float().abs()) / (torch.finfo(weight.dtype).eps / 2)
    return torch.stack([moved[label == LABELS].mean() for label in range(4)])


def expected_distance(steps: int = STEPS) -> tuple[float, float]:
    """The distance, and five times the error with which the mean of a row is known."""
    return STEP * steps, 5 * (steps * STEP * (1 - STEP) / WIDTH) ** 0.5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("adaptive", [False, True], ids=["SGD", "adaptive"])
def test_tied_rows_move_on_the_average_as_free_rows_do(compact: bool, dtype: torch.dtype, adaptive: bool) -> None:
    distance, error = expected_distance()
    found = distances(rounded_training(dtype, adaptive=adaptive, compact=compact))
    torch.testing.assert_close(found, torch.full((4,), distance), rtol=0, atol=error)


def test_rows_of_flipped_signs_move_as_free_rows_do() -> None:
    distance, error = expected_distance()
    found = distances(rounded_training(torch.bfloat16, SIGNS))
    torch.testing.assert_close(found, torch.full((4,), distance), rtol=0, atol=error)


@pytest.mark.parametrize("options", [{"strength": 0.9}, {"every": 2}], ids=str)
def test_the_pull_of_relaxed_ties_does_not_undo_small_updates(options: dict[str, Any]) -> None:
    distance, _ = expected_distance()
    # What the members are pulled to is rounded, and so is what they become.
    found = distances(rounded_training(torch.bfloat16, **options))
    torch.testing.assert_close(found, torch.full((4,), distance), rtol=0.1, atol=0)


class Written(Optimizer):
    """Writes to the weights what it was told."""

    def __init__(self, params: Any, written: Tensor) -> None:
        super().__init__(params, {})
        self._written = written

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.param_groups[0]["params"][0].copy_(self._written)


def tied_after_step(written: Tensor, labels: Tensor, scale: Tensor | None = None, **options: Any) -> Tensor:
    weight = Parameter(torch.zeros_like(written))
    optimizer = TiedOptimizer(Written([weight], written), Tie(weight, labels, scale=scale), **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return weight.detach()


def after_step(members: list[float], dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    written = torch.tensor(members, dtype=torch.float64).to(dtype)
    return tied_after_step(written, torch.zeros(len(members), dtype=torch.int64), scale)


@pytest.mark.parametrize("options", [{}, {"strength": 0.7}], ids=["tied", "relaxed"])
@pytest.mark.parametrize("labels", [torch.arange(12) // 4, torch.arange(12) % 5], ids=["one size", "several"])
def test_a_step_as_it_is_traced_takes_the_same_numbers(labels: Tensor, options: dict[str, Any]) -> None:
    # Rows, and of one size: sums that are written out where they are traced.
    written = (1 + (randn(12, 32) > 0) * torch.finfo(torch.bfloat16).eps).bfloat16()
    plain = tied_after_step(written, labels, **options)
    with as_compiled():
        assert same_bits(tied_after_step(written, labels, **options), plain)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("members", "shared"),
    [
        # Neighbours, in units from one: what the first member is.
        ([0, 1], 0),
        ([1, 0], 1),
        ([0, 1, 1, 1, 1], 0),
        ([1, 0, 0, 0, 0], 1),
        # The first is next to the mean, and others are farther away.
        ([1, 2, 2, 0, 1, 2], 1),
        ([2, 1, 1, 0, 1, 2], 2),
        # Below one neighbours are half as far from each other.
        ([-0.5, 0], -0.5),
        ([0, -0.5], 0),
        ([-1, -0.5, -0.5], -1),
        # A mean that is a number of the dtype is taken.
        ([0, 2], 1),
        ([2, 0], 1),
        ([1, 0, 2], 1),
        ([-1, 1], 0),
        # The first is not next to the mean, which is rounded to the nearest, as anywhere else.
        ([0, 4, 3], 2),
        ([4, 0, 0], 1),
        ([0, 3], 2),
        ([3, 0], 2),
    ],
)
def test_a_group_takes_the_first_member_where_it_is_next_to_the_mean(
    dtype: torch.dtype, members: list[float], shared: float
) -> None:
    unit = torch.finfo(dtype).eps
    found = after_step([1 + unit * member for member in members], dtype)
    assert found.tolist() == [1 + unit * shared] * len(members)
    signs = torch.tensor([1.0, -1.0] * len(members))[: len(members)]
    flipped = [float(sign) * (1 + unit * member) for sign, member in zip(signs, members, strict=True)]
    assert same_bits(after_step(flipped, dtype, signs).double(), found.double() * signs)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_numbers_next_to_zero_are_neighbours_too(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert after_step([least, 0.0, 0.0], dtype).tolist() == [least] * 3
    assert after_step([0.0, least, least], dtype).tolist() == [0.0] * 3
    assert after_step([-least, least, least], dtype).tolist() == [0.0] * 3
    largest = torch.finfo(dtype).max
    assert (
        after_step([largest, -largest, largest], dtype).tolist()
        == tie_(torch.tensor([largest, -largest, largest], dtype=dtype), [range(3)]).tolist()
    )


def test_everywhere_else_the_mean_is_rounded_to_the_nearest() -> None:
    unit = torch.finfo(torch.bfloat16).eps
    members = torch.tensor([1.0, 1 + unit, 1 + unit], dtype=torch.bfloat16)
    weight, nearest = Parameter(members.clone()), bits(members[[1, 1, 1]])
    optimizer = TiedOptimizer(SGD([weight], lr=0.0), {weight: [[0, 1, 2]]})
    assert torch.equal(bits(weight), nearest)
    weight.data.copy_(members)
    optimizer.tie_weights()
    assert torch.equal(bits(weight), nearest)
    weight.grad = members.clone()
    optimizer.tie_gradients()
    assert torch.equal(bits(weight.grad), nearest)
    assert torch.equal(bits(tie_(members.clone(), [[0, 1, 2]])), nearest)
    # What has more bits is not rounded at random.
    unit = torch.finfo(torch.float32).eps
    assert after_step([1.0, 1 + unit, 1 + unit], torch.float32).tolist() == [1 + unit] * 3


@pytest.mark.parametrize("inner", [SGD, AdamW], ids=lambda inner: inner.__name__)
def test_what_rounds_to_the_nearest_trains_the_bare_shared_value(compact: bool, inner: type[Optimizer]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 33, generator=generator).bfloat16()
    weight, shared = Parameter(start[LABELS]), Parameter(start.clone())
    optimizer = TiedOptimizer(inner([weight], lr=1e-2, foreach=False), {weight: LABELS}, compact=compact)
    bare = inner([shared], lr=1e-2, foreach=False)
    for _ in range(30):
        shared.grad = torch.randn(4, 33, generator=generator).bfloat16()
        weight.grad = shared.grad[LABELS]
        optimizer.step()
        bare.step()
    assert same_bits(weight, shared.detach()[LABELS])
