"""Train a small GPT with ties, stop at any step, and continue in another process.

python small-gpt.py FILE [STEP]     train up to this step, from the checkpoint in the file if it exists
"""

import hashlib
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from tieopt import Tie, TiedOptimizer

WORDS, WIDTH, HEADS, LAYERS, LENGTH, BATCH, PARTS = 32, 32, 4, 3, 16, 16, 2
STEPS, WARM_UP, UNTIED_FROM = 90, 10, 60


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.dropout = nn.Dropout(0.01)

    def forward(self, hidden: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in self.attention(self.norms[0](hidden)).chunk(3, dim=2)
        )
        seen = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        hidden = hidden + self.dropout(seen.transpose(1, 2).flatten(2))
        return hidden + self.dropout(self.feed_forward(self.norms[1](hidden)))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(words))))


def loss_of(scores: Tensor, words: Tensor) -> Tensor:
    return cross_entropy(scores[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def draw_words() -> Tensor:
    """Draw sentences that count from a random word, by 1, 2, 3 or 4."""
    first, by = torch.randint(WORDS, (BATCH, 1)), torch.randint(1, 5, (BATCH, 1))
    return (first + by * torch.arange(LENGTH)) % WORDS


def rate(step: int) -> float:
    """Return the factor of the learning rate: it warms up, then follows half a cosine."""
    return min((step + 1) / WARM_UP, (1 + math.cos(math.pi * step / STEPS)) / 2)


def main(file: str, stop: int = STEPS) -> None:
    torch.manual_seed(0)
    checkpoint = torch.load(file) if Path(file).exists() else None
    begin = checkpoint["step"] if checkpoint else 0
    if stop <= begin:
        sys.exit(f"The file is at step {begin} already.")

    model = GPT()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.02, weight_decay=0.01)
    ties = [Tie.equal("embedding.weight", "head.weight"), Tie.equal("blocks.*.feed_forward.*")]
    optimizer = TiedOptimizer(optimizer, ties if begin <= UNTIED_FROM else [], reduction="sum", start="first")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        torch.set_rng_state(checkpoint["random"])

    for step in range(begin, stop):
        if step == UNTIED_FROM:
            optimizer.untie()
        optimizer.zero_grad()
        total = 0.0
        for words in draw_words().chunk(PARTS):
            loss = loss_of(model(words), words) / PARTS
            loss.backward()
            total += loss.item()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 30 == 0:
            print(f"step {step + 1}, loss {total:.3f}, {optimizer.tie_summary().distinct} distinct values")

    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "step": stop,
    }
    torch.save(checkpoint, file)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    print(f"step {stop}, SHA-256 of weights {hashlib.sha256(weights.numpy()).hexdigest()[:16]}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
