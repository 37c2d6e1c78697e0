"""What other libraries do with shared parameters, done by ties: the same weights after training.

The facts, not the code, of:

- Uni-LoRA (Li et al., 2025, https://arxiv.org/abs/2506.00799, and its implementation in PEFT): the entries of all LoRA
  matrices are entries of one short vector, each found at random and divided by the square root of how often it is used;
- the tests of weight tying in torchtitan and Megatron-LM: an embedding and a head that share their weight train, are
  clipped, saved and loaded as one Parameter.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from checks import randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from tieopt import Tie, TiedOptimizer

MAKE: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: AdamW(params, lr=0.05, weight_decay=0.1),
}


class LoraLinear(nn.Module):
    def __init__(self, size: int, rank: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("weight", randn(size, size, seed=seed, dtype=torch.float64))
        self.lora_a = Parameter(torch.zeros(rank, size, dtype=torch.float64))
        self.lora_b = Parameter(torch.zeros(size, rank, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.lora_b @ self.lora_a).T


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@given(seed=seeds, length=st.integers(1, 40))
def test_lora_matrices_of_one_short_vector_are_one_compact_tie(make, seed: int, length: int) -> None:
    model = nn.Sequential(LoraLinear(5, 2, 1), nn.Tanh(), LoraLinear(5, 2, 2))
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    labels = {name: torch.randint(length, param.shape, generator=generator) for name, param in named.items()}
    counts = torch.bincount(torch.cat([each.flatten() for each in labels.values()]), minlength=length).double()
    scales = {name: counts[each].rsqrt() for name, each in labels.items()}
    vector = torch.randn(length, dtype=torch.float64, generator=generator)
    for name, param in named.items():
        param.data.copy_(vector[labels[name]] * scales[name])

    shared = Parameter(vector.clone())
    bare = make([shared])
    tie = Tie.join(*(Tie(param, labels[name], scale=scales[name]) for name, param in named.items()))
    tied = TiedOptimizer(make(model.parameters()), tie, compact=True, reduction="sum")
    for step in range(4):
        x = randn(8, 5, seed=step, dtype=torch.float64)
        weights = {name: shared[labels[name]] * scales[name] for name in named}
        bare.zero_grad()
        functional_call(model, weights, (x,)).square().mean().backward()
        bare.step()
        tied.zero_grad()
        model(x).square().mean().backward()
        tied.step()
    for name, param in named.items():
        torch.testing.assert_close(
            param.detach(), (shared[labels[name]] * scales[name]).detach(), rtol=1e-12, atol=1e-12
        )


class Words(nn.Module):
    """A model of words, in which the head may share the weight of the embedding."""

    def __init__(self, *, share: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6, dtype=torch.float64)
        self.layer = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 12, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for number, param in enumerate(self.parameters()):
                param.copy_(randn(*param.shape, seed=number, dtype=torch.float64))
            self.head.weight.copy_(self.embedding.weight)
        if share:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(words)).tanh())


def step(model: nn.Module, optimizer: Optimizer, clip: Callable[[], Tensor], seed: int) -> Tensor:
    words = torch.randint(12, (2, 16), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(words[0]), words[1]).backward()
    norm = clip()
    optimizer.step()
    return norm


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_an_embedding_and_a_head_train_as_one_parameter_clipped_saved_and_loaded(compact, make):
    one, two = Words(share=True), Words(share=False)
    bare = make(one.parameters())
    head = Tie.equal("embedding.weight", "head.weight", reduction="sum")
    tied = TiedOptimizer(make(two.named_parameters()), head, compact=compact)
    assert sum(param.numel() for param in one.parameters()) == tied.tie_summary().distinct

    def norms(seed: int) -> tuple[Tensor, Tensor]:
        expected = step(one, bare, lambda: clip_grad_norm_(one.parameters(), 0.5), seed)
        return expected, step(two, tied, lambda: tied.clip_grad_norm_(0.5), seed)

    for seed in range(4):
        torch.testing.assert_close(*norms(seed), rtol=1e-12, atol=1e-12)
    saved, state = copy.deepcopy(two.state_dict()), copy.deepcopy(tied.state_dict())
    two = Words(share=False)
    two.load_state_dict(saved)
    tied = TiedOptimizer(make(two.named_parameters()), head, compact=compact)
    tied.load_state_dict(state)
    for seed in range(4, 8):
        torch.testing.assert_close(*norms(seed), rtol=1e-12, atol=1e-12)
    assert torch.equal(two.embedding.weight, two.head.weight)
    for name, param in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name).detach(), param.detach(), rtol=1e-10, atol=1e-10)
    # A checkpoint of the one loads into the other, which has both names.
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.embedding.weight, two.head.weight)
