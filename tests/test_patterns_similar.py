"""Slices that resemble each other, and tied units merged into a smaller model."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from checks import bits, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tieopt import TiedOptimizer, export, neurons, patterns

seeds = st.integers(0, 2**20)


def farthest(slices: Tensor) -> float:
    """The largest distance of two slices."""
    return torch.cdist(slices, slices, compute_mode="donot_use_mm_for_euclid_dist").max().item()


@given(
    shape=st.sampled_from([(1,), (9,), (12, 2), (4, 10), (6, 2, 3), (10, 1)]),
    distance=st.floats(0, 3),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=seeds,
)
def test_groups_are_within_the_distance_and_no_two_of_them_could_be_one(shape, distance, data, dtype, seed):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensor = randn(*shape, seed=seed).to(dtype)
    before = bits(tensor)
    labels = patterns.similar(tensor, distance, dim=dim)

    assert torch.equal(bits(tensor), before)
    assert labels.shape == (shape[dim],)
    assert labels.dtype == torch.int64
    slices = tensor.double().movedim(dim, 0).reshape(shape[dim], -1)
    groups = [slices[labels == label] for label in range(int(labels.max()) + 1)]
    assert all(len(group) > 1 and farthest(group) <= distance * (1 + 1e-12) for group in groups)
    alone = [row[None] for row in slices[labels == -1]]
    sets = groups + alone
    for i, first in enumerate(sets):
        for second in sets[:i]:
            assert farthest(torch.cat([first, second])) > distance * (1 - 1e-12)
    firsts = [int((labels == label).nonzero()[0]) for label in range(len(groups))]
    assert firsts == sorted(firsts)


def test_chains_are_cut():
    labels = patterns.similar(torch.arange(6.0), 1.0)
    # Each resembles the next one, but groups of three do not fit.
    assert torch.bincount(labels).tolist() == [2, 2, 2]
    assert patterns.similar(torch.arange(6.0), 5.0).tolist() == [0] * 6


def test_equal_slices_have_the_distance_zero():
    rows = randn(3, 4)[torch.tensor([2, 0, 1, 2, 1])]
    assert patterns.similar(rows, 0).tolist() == [0, -1, 1, 0, 1]
    assert patterns.similar(rows.T, 0, dim=1).tolist() == [0, -1, 1, 0, 1]
    assert patterns.similar(rows.T, 0, dim=-1).tolist() == [0, -1, 1, 0, 1]


@pytest.mark.parametrize("distance", [1, 1.0, numpy.float32(1), torch.tensor(1.0)])
def test_a_distance_is_any_number(distance):
    assert patterns.similar(torch.tensor([0.0, 1.0, 3.0]), distance).tolist() == [0, 0, -1]


@pytest.mark.parametrize("unit", [2.0**1022, 2.0**-1060], ids=["large", "small"])
def test_numbers_may_be_as_large_or_small_as_floats_are(unit):
    rows = unit * torch.tensor([[1.0, -1.0], [1.0, 1.0], [1.0, -0.75]], dtype=torch.float64)
    assert patterns.similar(rows, 0.3 * unit).tolist() == [0, -1, 0]


# --- merging ---


def conv_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3))


def test_tied_units_are_merged_into_a_smaller_model():
    torch.manual_seed(0)
    model = conv_model().double()
    groups = torch.tensor([0, 1, -1, 0, 1, 0])
    optimizer = TiedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), neurons(model[0], groups, following=model[1:])
    )
    for step in range(3):
        optimizer.zero_grad()
        model(randn(4, 2, 8, 8, seed=step).double()).square().mean().backward()
        optimizer.step()

    with torch.no_grad():
        # The running statistics of tied units differ by rounding, which a codebook does not take.
        _, unit = export.encode(model[0].weight, groups)
        first = torch.tensor([int((unit == number).nonzero()[0]) for number in range(int(unit.max()) + 1)])
        small = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3)).double()
        for layer, merged in ((model[0], small[0]), (model[1], small[1])):
            merged.load_state_dict({k: v[first] if v.dim() else v for k, v in layer.state_dict().items()})
        small[3].weight.zero_().index_add_(1, unit, model[3].weight)
        small[3].bias.copy_(model[3].bias)
    x = randn(4, 2, 8, 8, seed=9).double()
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-12, atol=1e-12)


# --- errors ---


@pytest.mark.parametrize(
    ("error", "distance", "wrong", "expected", "got"),
    [
        (TypeError, "1", "A distance is not a number.", "a number from 0 on", "'1' (str)"),
        (TypeError, True, "A distance is not a number.", "a number from 0 on", "True (bool)"),
        (TypeError, None, "A distance is not a number.", "a number from 0 on", "None (NoneType)"),
        (
            TypeError,
            torch.ones(2),
            "A distance is not a number.",
            "a number from 0 on",
            "a tensor of shape (2,) and torch.float32",
        ),
        (ValueError, -1, "A distance is out of range.", "a finite number from 0 on", "-1.0"),
        (ValueError, math.nan, "A distance is out of range.", "a finite number from 0 on", "nan"),
        (ValueError, math.inf, "A distance is out of range.", "a finite number from 0 on", "inf"),
    ],
    ids=str,
)
def test_distances_that_are_none_are_refused(error, distance, wrong, expected, got):
    with pytest.raises(error) as caught:
        patterns.similar(torch.ones(3, 2), distance)
    assert str(caught.value) == f"{wrong}\n  Expected: {expected}\n  Got:      {got}"


def test_what_has_no_slices_to_compare_is_refused():
    with pytest.raises(IndexError, match="dim is out of range"):
        patterns.similar(torch.ones(3, 2), 1.0, dim=2)
    with pytest.raises(ValueError, match="nothing to compare"):
        patterns.similar(torch.ones(0, 2), 1.0)
    with pytest.raises(TypeError, match="cannot be compared"):
        patterns.similar(torch.ones(3, 2).long(), 1.0)
    with pytest.raises(ValueError, match="cannot be compared"):
        patterns.similar(torch.tensor([[math.nan]]), 1.0)
