"""Models of transformers whose embedding and head share a weight, split and trained under FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import same_bits
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from tieopt import TiedOptimizer, split_shared_

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")

WORDS = 40
_SMALL = {"vocab_size": WORDS, "tie_word_embeddings": True}
_LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
_BERT = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "LlamaForCausalLM": ("LlamaConfig", {"hidden_size": 16, "intermediate_size": 32, **_LLAMA}),
    "BertForMaskedLM": ("BertConfig", {"hidden_size": 16, "intermediate_size": 32, **_BERT}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
}


def made(name: str) -> nn.Module:
    config, settings = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**_SMALL, **settings))
    # Without dropout.
    return model.double().eval()


def train(model: nn.Module, optimizer: Any, clip: Any) -> None:
    for seed in range(4):
        ids = torch.randint(WORDS, (2, 8), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        clip(0.5)
        optimizer.step()


def trained_in_shards(name: str, folder: str) -> dict[str, Tensor]:
    """The whole state after some steps; the first rank saves the model."""
    model = made(name)
    ties = split_shared_(model)
    layers = {layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module}
    # From the inside out.
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Embedding) or module in layers or module is model.get_output_embeddings():
            fully_shard(module)
    fully_shard(model)
    optimizer = TiedOptimizer(AdamW(model.parameters(), lr=0.01), ties)
    train(model, optimizer, optimizer.clip_grad_norm_)
    state: dict[str, Tensor] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=dict(state))
    return state


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param) as started:
        yield started


@pytest.mark.host("transformers", "`split_shared_` and FSDP2: GPT-2, Llama, BERT, T5", package="transformers")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_shared_weights_trains_in_shards_and_is_read_as_before(
    ranks: Ranks, name: str, tmp_path: Path
) -> None:
    model = made(name)
    inner = AdamW(model.parameters(), lr=0.01)
    train(model, inner, lambda norm: clip_grad_norm_(model.parameters(), norm))
    expected = model.state_dict()
    state, *_ = ranks.run(trained_in_shards, name, str(tmp_path))
    assert list(state) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12)

    read = type(model).from_pretrained(tmp_path)
    assert read.get_input_embeddings().weight is read.get_output_embeddings().weight
    assert len(list(read.parameters())) == len(list(model.parameters()))
    for key, value in read.state_dict().items():
        assert same_bits(value, state[key]), key
