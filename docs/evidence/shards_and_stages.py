"""One shared Parameter in one process, beside its copies in shards of FSDP2 and on two stages of a pipeline.

The small GPT of docs/how-to/gpt.py has an embedding that is its head. It is trained

1. on one process, with one Parameter in both modules and torch's own AdamW and ``clip_grad_norm_``: no tie, and nothing
   of tieopt;
2. in shards of two processes (``fully_shard``), after ``split_shared_`` has made copies of the Parameter;
3. on two processes that have a half of the model each, the embedding and the head tied by ``Tie.equal(..., across=)``.

All three have to end with the same weights, except for rounding in float64. There is no published number: torch does
not train a Parameter that separately sharded modules share (https://github.com/huggingface/accelerate/issues/4171), and
with stages the gradients have to be summed by hand (https://github.com/pytorch/torchtitan/issues/4486).

Run it as ``python shards_and_stages.py``. It needs torch 2.7 or later with gloo, and takes seconds.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from tieopt import Tie, TiedOptimizer, split_shared_

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "how-to"))
from gpt import BATCH, LENGTH, WORDS, gpt, loss_of

RANKS, STEPS, RATE, MAX_NORM = 2, 20, 0.01, 1.0


def shared_gpt() -> nn.Sequential:
    """Return the model with one Parameter in its embedding and its head."""
    model = gpt()
    model[3].weight = model[0].weight
    return model


def batches() -> Iterator[Tensor]:
    """Yield sentences in which each word is the one before it, plus one."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield (torch.randint(WORDS, (BATCH, 1), generator=generator) + torch.arange(LENGTH)) % WORDS


def train(optimizer: Optimizer, backward: Callable[[Tensor], None], clip: Callable[[float], Tensor]) -> list[float]:
    """Run the usual training loop, and return the norms of the gradients."""
    norms = []
    for words in batches():
        optimizer.zero_grad()
        backward(words)
        norms.append(float(clip(MAX_NORM)))
        optimizer.step()
    return norms


def on_one_process() -> tuple[nn.Module, list[float]]:
    """Train the shared Parameter without ties."""
    model = shared_gpt()
    norms = train(
        AdamW(model.parameters(), lr=RATE),
        lambda words: loss_of(model(words), words).backward(),
        lambda most: clip_grad_norm_(model.parameters(), most),
    )
    return model, norms


def in_shards(rank: int) -> tuple[nn.Module, list[float]]:
    """Train copies of it, sharded over the processes."""
    model = shared_gpt()
    ties = split_shared_(model)
    for module in (*model, model):
        fully_shard(module)
    optimizer = TiedOptimizer(AdamW(model.parameters(), lr=RATE), ties)

    def backward(words: Tensor) -> None:
        part = words.chunk(RANKS)[rank]
        loss_of(model(part), part).backward()

    return model, train(optimizer, backward, optimizer.clip_grad_norm_)


def on_stages(rank: int) -> tuple[nn.Module, list[float]]:
    """Train the embedding on the first stage of a pipeline, and the head on the last."""
    whole = gpt()
    whole[3].weight.data.copy_(whole[0].weight)
    stage_model = whole[:2] if rank == 0 else whole[2:]
    end = stage_model[0] if rank == 0 else stage_model[1]
    stage = PipelineStage(stage_model, rank, RANKS, torch.device("cpu"))
    pipeline = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_of)
    tie = Tie.equal(end.weight, reduction="sum", across=dist.group.WORLD)
    optimizer = TiedOptimizer(AdamW(stage_model.parameters(), lr=RATE), tie)

    def backward(words: Tensor) -> None:
        if rank == 0:
            pipeline.step(words)
        else:
            pipeline.step(target=words)

    # The parameters keep the names that they have in the whole model.
    return whole, train(optimizer, backward, optimizer.clip_grad_norm_)


WAYS = {"shards": in_shards, "stages": on_stages}


def as_rank(rank: int, way: str, folder: str) -> None:
    """Train on one of the processes, and write the norms and the weights that it has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{way}", rank=rank, world_size=RANKS)
    model, norms = WAYS[way](rank)
    state = {
        name: param.full_tensor() if isinstance(param, DTensor) else param for name, param in model.state_dict().items()
    }
    if way == "stages":
        state = {name: param for name, param in state.items() if (int(name[0]) < 2) == (rank == 0)}
    torch.save((state, norms), f"{folder}/{way}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Process groups that modules still hold are to end before the interpreter does.
    del model
    gc.collect()


def without_biases_of_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what trains on rounding alone.

    A bias of the keys adds the same to all scores of a query, which softmax takes away again. Its gradient would be
    zero without rounding, and Adam magnifies what is left.
    """
    return {
        name: torch.cat([param.chunk(3)[0], param.chunk(3)[2]]) if name.endswith("attention.bias") else param
        for name, param in state.items()
    }


def main() -> None:
    """Train in all ways, and print how far apart they end."""
    torch.set_num_threads(1)
    model, norms = on_one_process()
    expected, before = without_biases_of_keys(model.state_dict()), without_biases_of_keys(shared_gpt().state_dict())
    moved = max((expected[name] - before[name]).abs().max().item() for name in expected)
    print(f"One Parameter, one process: weights moved by up to {moved:.2f} in {STEPS} steps of AdamW\n")
    print(f"{'two processes':15s}{'weights differ by':>19s}{'norms of gradients':>20s}{'embedding and head':>20s}")
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            mp.spawn(as_rank, (way, folder), nprocs=RANKS)
            saved = [torch.load(f"{folder}/{way}.{rank}.pt") for rank in range(RANKS)]
            weights = without_biases_of_keys({name: tensor for state, _ in saved for name, tensor in state.items()})
            assert set(weights) == set(expected)
            apart = max((weights[name] - expected[name]).abs().max().item() for name in expected)
            norm = max(abs(a - b) for _, own in saved for a, b in zip(own, norms, strict=True))
            tied = (weights["0.weight"] - weights["3.weight"]).abs().max().item()
            print(f"{way:15s}{apart:19.1e}{norm:20.1e}{tied:20.1e}")
            assert apart < 1e-12
            assert norm < 1e-12
            assert tied == 0


if __name__ == "__main__":
    main()
