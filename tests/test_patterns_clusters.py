"""Clusters of channels and subvectors, of pruned weights, and by sensitivity."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checks import bits, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tieopt import Tie, TiedOptimizer, export, patterns, tie_

seeds = st.integers(0, 2**20)


def pruned(*shape: int, seed: int = 0) -> Tensor:
    """Normal entries, about half of them zero."""
    return randn(*shape, seed=seed) * (randn(*shape, seed=seed + 1) > 0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, dict[str, object]]:
    """A pruned tensor, and how it is to be clustered."""
    shape = draw(st.sampled_from([(1, 4), (6, 8), (5, 2, 4), (3, 2, 2, 2), (7,)]))
    tensor = pruned(*shape, seed=draw(seeds))
    columns = tensor[0].numel()
    of = draw(st.sampled_from(["rows", "values", *[size for size in (1, 2, 4) if columns % size == 0]]))
    per = "tensor" if of == "rows" else draw(st.sampled_from(["tensor", "channel"]))
    size = {"rows": columns, "values": 1}.get(of, of)
    most = (columns if per == "channel" else tensor.numel()) // size
    weights = draw(st.sampled_from([None, torch.rand(shape), torch.rand(shape[0]), torch.zeros(shape)]))
    options = {"count": draw(st.integers(1, min(most, 5))), "of": of, "per": per, "weights": weights}
    return tensor, {**options, "seed": draw(seeds)}


def per_position(options: dict[str, object], tensor: Tensor) -> int:
    """The entries of what is clustered."""
    return {"rows": tensor[0].numel(), "values": 1}.get(options["of"], options["of"])


@given(case=cases())
def test_zeros_stay_zero_and_others_are_clustered(case):
    tensor, options = case
    before = bits(tensor)
    labels, scale = patterns.clusters(tensor, **options, keep_zeros=True)
    tied = tie_(tensor.clone(), labels, scale=scale)

    assert torch.equal(bits(tensor), before)
    assert labels.shape == scale.shape == tensor.shape
    assert labels.dtype == torch.int64
    assert scale.dtype == torch.float32
    assert torch.equal(scale, (tensor != 0).float())
    assert torch.equal(labels == labels.max(), tensor == 0) or not (tensor == 0).any()
    assert (tied[tensor == 0] == 0).all()
    channels = tensor.flatten(1) if options["per"] == "channel" else tensor.view(1, -1)
    most = options["count"] * per_position(options, tensor)
    assert all(len(row[row != 0].unique()) <= most for row in tied.view_as(channels))


@given(case=cases())
def test_clusters_have_labels_in_the_order_of_channels_and_positions(case):
    tensor, options = case
    labels = patterns.clusters(tensor, **options)
    size = per_position(options, tensor)

    if options["of"] == "rows":
        assert labels.shape == tensor.shape[:1]
        return
    assert labels.shape == tensor.shape
    blocks = labels.view(-1, size)
    assert torch.equal(blocks % size, torch.arange(size).expand(blocks.shape))
    assert (blocks // size == blocks[:, :1] // size).all()
    if options["per"] == "channel":
        ranges = [(int(row.min()), int(row.max())) for row in labels]
        assert all(last < first for (_, last), (first, _) in pairwise(ranges))
        assert max(last - first for first, last in ranges) < options["count"] * size
    else:
        assert labels.max() < options["count"] * size


@given(n=st.integers(1, 5), count=st.integers(1, 4), of=st.sampled_from(["values", 2]), seed=seeds)
def test_clusters_of_a_channel_are_those_of_the_channel_alone(n, count, of, seed):
    tensor = randn(n, 4, 3, seed=seed)
    labels = patterns.clusters(tensor, count, of=of, per="channel", seed=seed)

    for channel, named in zip(tensor, labels, strict=True):
        alone = patterns.clusters(channel.reshape(1, -1), count, of=of, seed=seed).view(channel.shape)
        assert torch.equal(named - named.min(), alone)


@given(rows=st.integers(1, 8), count=st.integers(1, 8), seed=seeds)
def test_subvectors_are_clustered_as_rows(rows, count, seed):
    tensor = randn(rows, 2, 6, seed=seed)
    labels = patterns.clusters(tensor, min(count, 3 * rows), of=4, seed=seed)
    as_rows = patterns.clusters(tensor.view(-1, 4), min(count, 3 * rows), seed=seed)

    assert torch.equal(labels.view(-1, 4)[:, 0] // 4, as_rows)
    tied, tied_rows = tie_(tensor.clone(), labels), tie_(tensor.view(-1, 4).clone(), as_rows)
    assert torch.equal(tied.view(-1, 4), tied_rows)


@given(seed=seeds, count=st.integers(1, 6))
def test_clusters_that_keep_zeros_are_those_of_the_other_values(seed, count):
    tensor = pruned(8, 5, seed=seed)
    others = tensor[tensor != 0]
    labels, _ = patterns.clusters(tensor, count, of="values", keep_zeros=True, seed=seed)

    assert torch.equal(labels[tensor != 0], patterns.clusters(others, min(count, len(others)), of="values", seed=seed))


def test_a_tensor_of_zeros_is_one_group_of_zeros():
    for of in ("rows", "values", 2):
        labels, scale = patterns.clusters(torch.zeros(3, 4), 2, of=of, keep_zeros=True)
        assert not labels.any()
        assert not scale.any()
        assert labels.shape == (3, 4)


def test_negative_zeros_are_zeros():
    labels, scale = patterns.clusters(torch.tensor([-0.0, 1.0, 0.0, 1.0]), 1, of="values", keep_zeros=True)
    assert labels.tolist() == [1, 0, 1, 0]
    assert scale.tolist() == [0, 1, 0, 1]


# --- sensitivities ---


@pytest.mark.parametrize("of", ["rows", "values", 1])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", [1e-300, 1.0, 1e300])
def test_a_heavy_value_counts_as_many_equal_ones(of, seed, unit):
    # The heavy zero keeps its center, and the last two of those between are nearer to the others.
    values = torch.cat([torch.tensor([0.0, 0.8, 0.94, 1.0]), torch.linspace(1.89, 1.91, 10)]).view(-1, 1)
    weights = torch.ones(14, dtype=torch.float64) * unit
    weights[0] *= 1000

    heavy = patterns.clusters(values, 2, of=of, weights=weights, seed=seed).flatten()
    assert (heavy == heavy[0]).tolist() == [True, True, *[False] * 12]
    even = patterns.clusters(values, 2, of=of, weights=torch.full((14, 1), unit, dtype=torch.float64), seed=seed)
    assert (even.flatten() == even.flatten()[0]).tolist() == [*[True] * 4, *[False] * 10]


def test_what_has_no_weight_goes_to_the_nearest_center():
    values = torch.linspace(0, 1, 101).view(1, -1)
    weights = torch.zeros(1, 101)
    weights[0, [20, 90]] = 1.0
    labels = patterns.clusters(values, 2, of="values", weights=weights)
    assert torch.equal(labels, (values > 0.55).long()) or torch.equal(labels, (values >= 0.55).long())


def test_the_weight_of_a_subvector_is_the_sum_of_its_entries():
    blocks = torch.tensor(
        [[0.0, 0.0], [0.8, 0.8], [0.94, 0.94], [1.0, 1.0], *[[1.9, 1.9 + i / 1000] for i in range(10)]]
    )
    weights = torch.ones(14, 2)
    weights[0] = torch.tensor([0.0, 2000.0])
    tensor, flat = blocks.view(1, -1), weights.view(1, -1)
    labels = patterns.clusters(tensor, 2, of=2, weights=flat).view(-1, 2)[:, 0]
    assert (labels == labels[0]).tolist() == [True, True, *[False] * 12]


# --- training, and the file ---


@pytest.mark.parametrize("compact", [False, True])
def test_a_pruned_and_clustered_layer_stays_so(compact):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape) > 0.5)
    was_zero = layer.weight.detach() == 0
    labels, scale = patterns.clusters(layer.weight, 4, of="values", per="channel", keep_zeros=True)
    inner = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = TiedOptimizer(inner, Tie(layer.weight, labels, scale=scale), compact=compact)
    for step in range(3):
        optimizer.zero_grad()
        layer(randn(2, 3, 5, 5, seed=step)).square().mean().backward()
        optimizer.step()

    assert torch.equal(layer.weight == 0, was_zero)
    assert all(len(row[row != 0].unique()) <= 4 for row in layer.weight)


def test_a_codebook_has_one_entry_for_all_zeros():
    weight = pruned(16, 16)
    labels, scale = patterns.clusters(weight, 4, of=4, keep_zeros=True)
    tie_(weight, labels, scale=scale)
    entries, indices = export.encode(weight, labels, scale=scale)
    assert int((entries == 0).sum()) == 1
    assert torch.equal(entries[indices], weight)


# --- errors ---

WEIGHT = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("error", "options", "wrong", "expected", "got"),
    [
        (TypeError, {"of": 2.0}, "The size of a subvector is not an integer.", "an integer from 1 to 6", "2.0 (float)"),
        (
            TypeError,
            {"of": None},
            "The size of a subvector is not an integer.",
            "an integer from 1 to 6",
            "None (NoneType)",
        ),
        (
            TypeError,
            {"of": True},
            "The size of a subvector is not an integer.",
            "an integer from 1 to 6",
            "True (bool)",
        ),
        (ValueError, {"of": 0}, "The size of a subvector is out of range.", "an integer from 1 to 6", "0"),
        (ValueError, {"of": 7}, "The size of a subvector is out of range.", "an integer from 1 to 6", "7"),
        (ValueError, {"of": 4}, "Rows cannot be cut into such subvectors.", "a divisor of 6", "4"),
        (
            ValueError,
            {"of": "columns"},
            "This cannot be clustered.",
            "of='rows', of='values' or a number of entries",
            "'columns' (str)",
        ),
        (
            ValueError,
            {"per": "row", "of": 2},
            "Clusters are per something else.",
            "per='tensor' or per='channel'",
            "'row' (str)",
        ),
        (
            ValueError,
            {"per": "channel"},
            "A channel is one row.",
            "of='values' or a number of entries with per='channel'",
            "of='rows'",
        ),
        (
            ValueError,
            {"of": 2, "count": 13},
            "The number of clusters is out of range.",
            "an integer from 1 to 12",
            "13",
        ),
        (
            ValueError,
            {"of": 2, "per": "channel", "count": 4},
            "The number of clusters is out of range.",
            "an integer from 1 to 3",
            "4",
        ),
        (
            TypeError,
            {"weights": [1.0] * 4},
            "These are no weights of entries.",
            "a dense real tensor",
            "[1.0, 1.0, 1.0, 1.0] (list)",
        ),
        (
            TypeError,
            {"weights": torch.ones(4, dtype=torch.complex64)},
            "These are no weights of entries.",
            "a dense real tensor",
            "a tensor of shape (4,) and torch.complex64, torch.strided",
        ),
        (
            TypeError,
            {"weights": WEIGHT.to_sparse()},
            "These are no weights of entries.",
            "a dense real tensor",
            "a tensor of shape (4, 6) and torch.float32, torch.sparse_coo",
        ),
        (ValueError, {"weights": torch.ones(6)}, "Weights have the wrong shape.", "(4, 6) or (4,)", "(6,)"),
        (ValueError, {"weights": torch.ones(())}, "Weights have the wrong shape.", "(4, 6) or (4,)", "()"),
        (
            ValueError,
            {"weights": torch.tensor([1.0, 0.0, -1.0, 1.0])},
            "A weight of an entry is wrong.",
            "finite numbers from 0 on",
            "-1.0 at position 2",
        ),
        (
            ValueError,
            {"weights": torch.full((4, 6), float("nan"))},
            "A weight of an entry is wrong.",
            "finite numbers from 0 on",
            "nan at position (0, 0)",
        ),
        (
            ValueError,
            {"weights": torch.full((4, 6), float("inf"))},
            "A weight of an entry is wrong.",
            "finite numbers from 0 on",
            "inf at position (0, 0)",
        ),
    ],
    ids=str,
)
def test_options_that_are_none_are_refused(error, options, wrong, expected, got):
    with pytest.raises(error) as caught:
        patterns.clusters(WEIGHT, **{"count": 1, **options})
    assert str(caught.value) == f"{wrong}\n  Expected: {expected}\n  Got:      {got}"
