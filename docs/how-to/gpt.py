"""A small GPT whose embedding is its head, and whose layers share one feed-forward network.

python gpt.py                                       on one process
torchrun --nproc-per-node 2 gpt.py shards           in shards of two processes
torchrun --nproc-per-node 2 gpt.py stages           on two stages of a pipeline
"""

import gc
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from tieopt import Tie, TiedOptimizer

WORDS, WIDTH, HEADS, LENGTH, BATCH = 64, 32, 4, 16, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, hidden: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in self.attention(self.norms[0](hidden)).chunk(3, dim=2)
        )
        seen = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        hidden = hidden + seen.transpose(1, 2).flatten(2)
        return hidden + self.feed_forward(self.norms[1](hidden))


def gpt() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH), Block(), Block(), nn.Linear(WIDTH, WORDS, bias=False))
    nn.init.normal_(model[0].weight, std=0.1)
    return model.double()


def loss_of(scores: Tensor, words: Tensor) -> Tensor:
    return cross_entropy(scores[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def main(where: str = "one process") -> None:
    model = gpt()
    ties = [Tie.equal("0.weight", "3.weight"), Tie.equal("[12].feed_forward.*")]
    rank, ranks = 0, 1
    if where != "one process":
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    if where == "shards":
        for module in (*model, model):
            fully_shard(module)
    if where == "stages":
        model = model[:2] if rank == 0 else model[2:]
        end, block = (model[0], model[1]) if rank == 0 else (model[1], model[0])
        shared = [end.weight, *block.feed_forward.parameters()]
        ties = [Tie.equal(param, across=dist.group.WORLD) for param in shared]
        stage = PipelineStage(model, rank, ranks, torch.device("cpu"))
        pipeline = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_of)

    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    optimizer = TiedOptimizer(optimizer, ties, reduction="sum", start="first")

    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        # Each word is the one before it, plus one.
        words = (torch.randint(WORDS, (BATCH, 1), generator=generator) + torch.arange(LENGTH)) % WORDS
        optimizer.zero_grad()
        if where == "stages":
            losses: list[Tensor] = []
            pipeline.step(words) if rank == 0 else pipeline.step(target=words, losses=losses)
            loss = torch.stack(losses).mean() if losses else torch.tensor(0.0).double()
        else:
            part = words.chunk(ranks)[rank]
            loss = loss_of(model(part), part)
            loss.backward()
            loss = loss.detach() / ranks
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        if ranks > 1:
            dist.all_reduce(loss)
        if rank == 0:
            print(f"loss {loss.item():.10f}")
    assert optimizer.tie_drift() == 0
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Process groups that modules still hold are to end before the interpreter does.
    gc.collect()
