"""Weights that modules share, split and trained under the FSDP2 of transformers, Accelerate and Lightning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
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
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import DataLoader

from tieopt import TiedOptimizer, split_shared_

accelerate = pytest.importorskip("accelerate")
L = pytest.importorskip("lightning")
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


# --- Accelerate and Lightning ---


def shared() -> nn.Sequential:
    """A model whose head has the weight of the embedding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, WORDS, bias=False)).double()
    model[2].weight = model[0].weight
    return model


def batches() -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(WORDS, (4, 5), generator=generator) for _ in range(5)]


def loss_of(model: nn.Module, words: Tensor) -> Tensor:
    return cross_entropy(model(words).flatten(0, 1), words.roll(1, 1).flatten())


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.full_tensor().detach() for key, value in model.state_dict().items()}


def as_launched() -> None:
    """Set what a launcher tells the processes that it starts."""
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": "0"}
    os.environ |= {**names, "TORCHELASTIC_RUN_ID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def trained_by_accelerate(wrapped_first: bool) -> dict[str, Tensor]:
    as_launched()
    policy = ModuleWrapPolicy({nn.Embedding, nn.Linear})
    plugin = accelerate.utils.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=policy, cpu_ram_efficient_loading=False
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate shards on accelerators alone; its code does the same on a CPU.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = accelerate.DistributedType.FSDP, plugin
    model = shared()
    ties = split_shared_(model)
    inner = AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, TiedOptimizer(inner, ties) if wrapped_first else inner)
    if not wrapped_first:
        optimizer.optimizer = TiedOptimizer(optimizer.optimizer, ties)
    for words in batches():
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, words))
        optimizer.optimizer.clip_grad_norm_(0.1)
        optimizer.step()
    return whole_state(model)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = shared()
        self.ties = split_shared_(self.model)

    def configure_model(self) -> None:
        for unit in (*self.model, self.model):
            fully_shard(unit, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> TiedOptimizer:
        return TiedOptimizer(AdamW(self.parameters(), lr=0.01), self.ties)

    def training_step(self, words: Tensor, number: int) -> Tensor:
        return loss_of(self.model, words)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        optimizer.clip_grad_norm_(0.1)


def trained_by_lightning() -> dict[str, Tensor]:
    as_launched()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=L.pytorch.strategies.ModelParallelStrategy(dist.get_world_size(), 1),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    return whole_state(module.model)


def check_trained_as_shared(states: Sequence[dict[str, Tensor]]) -> None:
    model = shared()
    optimizer = AdamW(model.parameters(), lr=0.01)
    for words in batches():
        optimizer.zero_grad()
        loss_of(model, words).backward()
        clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    for state in states:
        assert same_bits(state["0.weight"], state["2.weight"])
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.host("Accelerate", "`split_shared_` and its FSDP2, as it shards on accelerators", package="accelerate")
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_accelerate_trains_split_weights_as_the_shared_one(wrapped_first: bool) -> None:
    with Ranks(2) as ranks:
        check_trained_as_shared(ranks.run(trained_by_accelerate, wrapped_first))


@pytest.mark.host("Lightning", "`split_shared_` and `ModelParallelStrategy` with `fully_shard`", package="lightning")
def test_lightning_trains_split_weights_as_the_shared_one() -> None:
    with Ranks(2) as ranks:
        check_trained_as_shared(ranks.run(trained_by_lightning))
