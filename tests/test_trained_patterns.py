"""Patterns keep their structure under every optimizer, and a dense layer tied as a convolution is one."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from checks import randn
from strategies import COUPLING, ENTRYWISE, Recipe
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy, pad

from tieopt import Tie, TiedOptimizer, patterns
from tieopt.testing import assert_tied

STEPS = 4
N = 6


class Structure(NamedTuple):
    """A pattern for a shape, and what is true of a tensor that has it."""

    shape: tuple[int, ...]
    pattern: object
    holds: object


def _constant_on(numbers: Tensor):
    return lambda w: all(len(w[numbers == number].unique()) == 1 for number in numbers.unique())


_I, _J = torch.arange(N)[:, None], torch.arange(N)[None, :]
_CONV = nn.Conv1d(2, 2, 3, stride=2, padding=1)

STRUCTURES = {
    "symmetric": Structure((N, N), patterns.symmetric, lambda w: torch.equal(w, w.T)),
    "antisymmetric": Structure((N, N), patterns.antisymmetric, lambda w: torch.equal(w, -w.T)),
    "persymmetric": Structure((N, N), patterns.persymmetric, lambda w: torch.equal(w, w.flip(0, 1).T)),
    "centrosymmetric": Structure((N, N - 1), patterns.centrosymmetric, lambda w: torch.equal(w, w.flip(0, 1))),
    "circulant": Structure((N, N), patterns.circulant, lambda w: torch.equal(w, w.roll((1, 1), (0, 1)))),
    "block_circulant": Structure(
        (N, 2 * N),
        lambda shape: patterns.block_circulant(shape, 3),
        lambda w: torch.equal(w[:3, :3], w[:3, :3].roll((1, 1), (0, 1))),
    ),
    "toeplitz": Structure((N, N), patterns.toeplitz, lambda w: torch.equal(w[1:, 1:], w[:-1, :-1])),
    "hankel": Structure((N, N), patterns.hankel, lambda w: torch.equal(w[1:, :-1], w[:-1, 1:])),
    "mirrored": Structure((N, N), lambda shape: patterns.mirrored(shape, (0,)), lambda w: torch.equal(w, w.flip(0))),
    "rotated": Structure((N, N), patterns.rotated, lambda w: torch.equal(w, w.rot90())),
    "rotated and mirrored": Structure(
        (N, N),
        lambda shape: patterns.rotated(shape, mirrored=True),
        lambda w: torch.equal(w, w.rot90()) and torch.equal(w, w.flip(0)),
    ),
    "orbits": Structure(
        (N, N),
        lambda shape: patterns.orbits(torch.arange(N * N).view(shape).roll(1, 0)),
        lambda w: torch.equal(w, w.roll(1, 0)),
    ),
    "convolution": Structure(
        (8, 16), lambda _: patterns.convolution(_CONV, 8), lambda w: torch.equal(w[0, :2], w[1, 2:4]) and w[0, 5] == 0
    ),
    "hashed": Structure(
        (N, N),
        lambda shape: patterns.hashed(shape, 5),
        lambda w: _constant_on(patterns.hashed(w.shape, 5)[0])(w * patterns.hashed(w.shape, 5)[1]),
    ),
    "clusters": Structure(
        (N, N), lambda shape: patterns.clusters(randn(*shape, seed=9), 4, of="values"), lambda w: len(w.unique()) <= 4
    ),
}


@pytest.mark.parametrize("recipe", ENTRYWISE + COUPLING, ids=repr)
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_pattern_holds_after_every_step(name: str, recipe: Recipe) -> None:
    structure = STRUCTURES[name]
    found = structure.pattern(structure.shape)
    labels, scale = found if isinstance(found, tuple) else (found, None)
    weight, goal = Parameter(randn(*structure.shape, seed=1)), randn(*structure.shape, seed=2)
    optimizer = TiedOptimizer(recipe([weight]), Tie(weight, labels, scale=scale))
    assert structure.holds(weight.detach())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight - goal).pow(4).sum() + (weight[0] * weight[-1]).sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    for _ in range(STEPS):
        optimizer.step(closure)
        assert structure.holds(weight.detach())
    assert not torch.equal(weight, before)


class Dense(nn.Module):
    """The layers of a convolutional network, dense."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in pairwise(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def test_a_dense_network_tied_as_a_convolution_is_the_convolution() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv1d(1, 25, 5, 2, 1), nn.Conv1d(25, 25, 3, 2, 1), nn.Conv1d(25, 25, 3, 2, 1)]
    head = nn.Linear(125, 10)
    network = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.ReLU(), nn.Flatten(), head).double()
    dense = Dense([40, 475, 250, 125, 10]).double()

    ties, pins = [], []
    with torch.no_grad():
        for conv, layer, size in zip(convs, dense.layers, (40, 19, 10), strict=False):
            labels, scale = patterns.convolution(conv, size)
            shared = patterns.convolution_bias(conv, size)
            layer.weight.copy_(pad(conv.weight.flatten(), (0, 1))[labels])
            layer.bias.copy_(conv.bias[shared])
            ties += [Tie(layer.weight, labels, scale=scale), Tie(layer.bias, shared)]
            pins.append((layer.weight, scale == 0))
        dense.layers[-1].load_state_dict(head.state_dict())
    tied = TiedOptimizer(torch.optim.Adam(dense.parameters(), lr=0.01), ties, reduction="sum")
    bare = torch.optim.Adam(network.parameters(), lr=0.01)

    for _ in range(20):
        x, y = randn(100, 40, dtype=torch.float64), torch.arange(100) % 10
        losses = []
        for optimizer, output in ((tied, lambda x=x: dense(x)), (bare, lambda x=x: network(x[:, None]))):
            optimizer.zero_grad()
            losses.append(cross_entropy(output(), y))
            losses[-1].backward()
            optimizer.step()
        assert abs(losses[0].item() - losses[1].item()) <= 1e-9
        assert all(bool((weight[zero] == 0).all()) for weight, zero in pins)
    assert losses[0].item() < 2.2  # it learns
    assert_tied(dense, ties)
