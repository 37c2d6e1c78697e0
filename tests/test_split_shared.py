"""Parameters that several modules share, made one for each module: training is that of the shared ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import same_bits
from hypothesis import given
from hypothesis import strategies as st
from ranks import refusal_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from tieopt import Tie, TiedOptimizer, split_shared_

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")


class Language(nn.Module):
    """A small language model whose embedding and head share a weight, and whose layers share a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 12, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.head(hidden)


def language() -> Language:
    torch.manual_seed(0)
    model = Language().double()
    model.head.weight = model.embedding.weight
    model.layers[2].weight = model.layers[0].weight
    return model


def batches(count: int) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(12, (4, 5), generator=generator) for _ in range(count)]


def train(model: nn.Module, optimizer: Optimizer, clip: Callable[[], Any], count: int = 12) -> None:
    for tokens in batches(count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
        loss.backward()
        clip()
        optimizer.step()


OPTIMIZERS = {
    "AdamW": lambda params: AdamW(params, lr=0.01, weight_decay=0.1),
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "RMSprop": lambda params: RMSprop(params, lr=0.01, centered=True),
}
MAX_NORM = 0.3


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_the_shared_parameters(name: str, compact: bool) -> None:
    shared, model = language(), language()
    inner = OPTIMIZERS[name](shared.parameters())
    ties = split_shared_(model)
    optimizer = TiedOptimizer(OPTIMIZERS[name](model.parameters()), ties, compact=compact)
    train(shared, inner, lambda: clip_grad_norm_(shared.parameters(), MAX_NORM))
    train(model, optimizer, lambda: optimizer.clip_grad_norm_(MAX_NORM))
    assert len(list(model.parameters())) == len(list(shared.parameters())) + 2
    expected = shared.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)
    assert same_bits(model.head.weight, model.embedding.weight)
    assert same_bits(model.layers[0].weight, model.layers[2].weight)


def modules(shares: list[tuple[int, int]], shape: tuple[int, int]) -> nn.ModuleList:
    """Modules, some of which share one weight, in a module that some of them are in twice."""
    layers = [nn.Linear(*shape) for _ in range(5)]
    for first, second in shares:
        layers[second].weight = layers[first].weight
    return nn.ModuleList([*layers[:3], nn.ModuleDict({"inner": nn.ModuleList(layers[3:])}), layers[0]])


@given(shares=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6), frozen=st.booleans())
def test_every_module_has_a_parameter_of_its_own_and_all_else_stays(
    shares: list[tuple[int, int]], frozen: bool
) -> None:
    model = modules(shares, (3, 3)).requires_grad_(not frozen)
    for number, param in enumerate(model.parameters()):
        param.number = number
    before = {
        name: (param.number, param.detach().clone()) for name, param in model.named_parameters(remove_duplicate=False)
    }
    first = {number: name for name, (number, _) in reversed(before.items())}
    kept = {name: model.get_parameter(name) for name in first.values()}
    ties = split_shared_(model)
    # Layer 0 stands at two places, and is one module.
    assert len(list(model.parameters())) == len(before) - 2
    for name, param in model.named_parameters(remove_duplicate=False):
        assert (param.number, param.requires_grad) == (before[name][0], not frozen)
        assert same_bits(param, before[name][1])
    assert all(model.get_parameter(name) is param for name, param in kept.items())
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), ties)
    found = {frozenset(part.param.number for part in tie.parts) for tie in optimizer.ties}
    assert all(len(numbers) == 1 for numbers in found)
    assert len(found) == len(ties)
    assert split_shared_(model) == []


def test_parameters_are_found_in_their_modules_when_the_optimizer_is_wrapped() -> None:
    model = language()
    ties = split_shared_(model)
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, Parameter(param.detach().clone()))
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), ties)
    assert {id(part.param) for part in optimizer.ties[0].parts} == {id(model.embedding.weight), id(model.head.weight)}
    assert optimizer.ties[0].options.reduction == "sum"
    again = TiedOptimizer(SGD(model.named_parameters(), lr=0.1), [*ties, Tie(model.layers[1].weight, [[0, 1]])])
    assert repr(ties[0]) == "Tie.equal('embedding.weight', 'head.weight', reduction='sum')"
    assert "embedding.weight" in again.tie_summary()


def test_what_cannot_be_split_is_refused_and_stays() -> None:
    model = nn.ModuleList([nn.LazyLinear(3), nn.LazyLinear(3)])
    model[1].weight = model[0].weight
    with pytest.raises(TypeError, match=r"0\.weight and 1\.weight share a parameter without a shape"):
        split_shared_(model)
    assert model[1].weight is model[0].weight


def test_parameters_that_were_loaded_apart_are_warned_of() -> None:
    model = language()
    ties = split_shared_(model)
    model.load_state_dict({"head.weight": torch.ones(12, 8)}, strict=False)
    with pytest.warns(UserWarning, match="were shared differ"):
        TiedOptimizer(SGD(model.parameters()), ties)


def test_parameters_with_hooks_are_refused() -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        model = language()
        getattr(model.head.weight, register)(lambda grad: None)
        with pytest.raises(ValueError, match="share a parameter with hooks"):
            split_shared_(model)
        assert model.head.weight is model.embedding.weight


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of the parameter")
def test_the_dtype_of_gradients_is_kept() -> None:
    model = language().bfloat16()
    model.head.weight = model.embedding.weight
    model.head.weight.grad_dtype = torch.float32
    split_shared_(model)
    assert model.head.weight is not model.embedding.weight
    assert model.head.weight.grad_dtype == torch.float32


def test_a_parameter_that_is_gone_or_shared_again_is_refused() -> None:
    model = language()
    ties = split_shared_(model)
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match=r"nothing to join"):
        TiedOptimizer(SGD(model.parameters()), ties)
    del model.head.weight
    with pytest.raises(ValueError, match=r"head\.weight"):
        TiedOptimizer(SGD(model.parameters()), ties)


# --- sharded ---


def trained(clipped: bool) -> dict[str, Tensor]:
    """The whole weights after some steps under FSDP2, each layer, the embedding and the head in a unit of its own."""
    model = language()
    ties = split_shared_(model)
    for module in (model.embedding, *model.layers, model.head, model):
        fully_shard(module)
    optimizer = TiedOptimizer(AdamW(model.parameters(), lr=0.01, weight_decay=0.1), ties)
    train(model, optimizer, (lambda: optimizer.clip_grad_norm_(MAX_NORM)) if clipped else lambda: None)
    return {key: value.full_tensor() for key, value in model.state_dict().items()}


@needs_gloo
@pytest.mark.host("FSDP2", "`split_shared_`: modules that share a Parameter, in units of their own")
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_modules_train_as_the_shared_parameters(
    request: pytest.FixtureRequest, count: int, clipped: bool
) -> None:
    ranks = request.getfixturevalue("two_ranks") if count == 2 else request.getfixturevalue("four_ranks")
    model = language()
    inner = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, inner, (lambda: clip_grad_norm_(model.parameters(), MAX_NORM)) if clipped else lambda: None)
    for state in ranks.run(trained, clipped):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-12)
        assert same_bits(state["head.weight"], state["embedding.weight"])


def split_after_sharding() -> None:
    split_shared_(fully_shard(language()))


def sharded_otherwise() -> list[Tensor]:
    """The whole weights of embedding and head, which are sharded along different dimensions, once they are tied."""
    model = language()
    ties = [tie for tie in split_shared_(model) if "head.weight" in repr(tie)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module, dim in ((model.embedding, 0), (model.head, 1)):
        module.weight = Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(dim)]))
    weights = [model.embedding.weight, model.head.weight]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TiedOptimizer(SGD(weights), ties)
    return [weight.full_tensor().detach() for weight in weights]


@needs_gloo
def test_modules_may_be_sharded_along_different_dimensions(two_ranks: Any) -> None:
    for weights in two_ranks.run(sharded_otherwise):
        assert all(same_bits(weight, language().embedding.weight) for weight in weights)


def split_replica() -> None:
    split_shared_(nn.Sequential(nn.parallel.DistributedDataParallel(language())))


@needs_gloo
def test_replicas_are_split_before(two_ranks: Any) -> None:
    for text in two_ranks.run(refusal_of, TypeError, split_replica):
        assert "before it is wrapped" in text


@needs_gloo
def test_sharded_parameters_are_split_before(two_ranks: Any) -> None:
    for text in two_ranks.run(refusal_of, ValueError, split_after_sharding):
        assert "share a sharded parameter" in text
