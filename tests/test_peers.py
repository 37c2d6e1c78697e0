"""Facts that the tests of other libraries assert: the same cases, without their code.

The ranks of EMLP's groups are in ``test_patterns_equivariant.py``.
"""

from __future__ import annotations

import pytest
import torch
from checks import randn
from torch import Tensor, nn
from torch.optim import SGD, Adam

from tieopt import Tie, TiedOptimizer, patterns

# --- TensorFlow Model Optimization: cluster_integration_test.py, clustering_registry_test.py, cluster_per_channel ---


def train(model: nn.Module, optimizer: TiedOptimizer, steps: int, *shape: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        outputs = model(randn(*shape, seed=step))
        (outputs[0] if isinstance(outputs, tuple) else outputs).square().mean().backward()
        optimizer.step()


def clustered(model: nn.Module, names: list[str], count: int, compact: bool, **options: object) -> TiedOptimizer:
    """Adam, with clusters of values in some parameters."""
    ties = [Tie(name, patterns.clusters(model.get_parameter(name), count, of="values", **options)) for name in names]
    return TiedOptimizer(Adam(model.named_parameters(), lr=0.01), ties, compact=compact, reduction="sum")


def test_values_remain_clustered_after_training(compact):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    optimizer = clustered(model, ["0.weight", "1.weight"], 8, compact)
    assert all(len(layer.weight.unique()) == 8 for layer in model)
    train(model, optimizer, 5, 5, 5)
    assert all(len(layer.weight.unique()) <= 8 for layer in model)


def test_centroids_and_biases_learn_in_every_step(compact):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5))
    optimizer = clustered(model, ["0.weight"], 8, compact)
    for _ in range(5):
        before = [param.detach().clone() for param in model.parameters()]
        train(model, optimizer, 1, 5, 5)
        assert not any(map(torch.equal, before, model.parameters()))


def test_zeros_are_preserved_in_training_and_no_value_is_added(compact):
    torch.manual_seed(1)
    layer = nn.Linear(5, 5)
    row = torch.tensor([-0.13, -0.08, -0.05, 0.005, 0.13])
    with torch.no_grad():
        layer.weight[:2] = 0.0
        layer.weight[3:] = row
    was_zero = layer.weight.detach() == 0
    # Their six clusters are five and zero.
    labels, scale = patterns.clusters(layer.weight, 5, of="values", keep_zeros=True)
    optimizer = TiedOptimizer(
        Adam(layer.parameters(), lr=0.01), Tie(layer.weight, labels, scale=scale), compact=compact
    )
    before = len(layer.weight.unique())
    train(layer, optimizer, 100, 5, 5)

    assert len(layer.weight.unique()) <= before <= 6
    assert torch.equal(layer.weight == 0, was_zero)


DENSE = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]])
CONVOLUTION = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    ("indices", "reduction", "gradients"),
    [
        (DENSE, "mean", [1, 1]),
        (DENSE, "sum", [8, 8]),
        (torch.ones(4, 4).long(), "mean", [0, 1]),
        (torch.ones(4, 4).long(), "sum", [0, 16]),
        (CONVOLUTION, "mean", [1, 1]),
        (CONVOLUTION, "sum", [6, 3]),
        (torch.zeros(3, 3).long(), "mean", [1, 0]),
        (torch.zeros(3, 3).long(), "sum", [9, 0]),
    ],
)
def test_a_centroid_gets_the_sum_or_the_mean_of_its_gradients(indices, reduction, gradients, compact):
    centroids = torch.tensor([-0.75, 0.875])
    weight = nn.Parameter(centroids[indices])
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), {weight: indices}, reduction=reduction, compact=compact)
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(weight, (centroids - torch.tensor(gradients))[indices])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_kernels_of_recurrent_layers_have_as_many_values_as_clusters(kind, compact):
    torch.manual_seed(0)
    model = kind(16, 16, batch_first=True)
    kernels = ["weight_ih_l0", "weight_hh_l0"]
    optimizer = clustered(model, kernels, 16, compact)
    train(model, optimizer, 3, 32, 2, 16)
    assert [len(model.get_parameter(name).unique()) for name in kernels] == [16, 16]


def values_of(channels: Tensor) -> list[int]:
    return [len(channel.unique()) for channel in channels]


def test_every_channel_has_as_many_values_as_clusters(compact):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3))
    optimizer = clustered(model, ["0.weight", "2.weight"], 4, compact, per="channel")
    train(model, optimizer, 3, 2, 3, 8, 8)
    assert values_of(model[0].weight) == [4] * 12
    assert values_of(model[2].weight) == [4] * 4
