"""The norm of a gradient in which a weight on two pipeline stages counts once, in Megatron's own case.

Megatron-LM has a test for it (https://github.com/NVIDIA/Megatron-LM/pull/7227): the input embedding on the first stage
and the output weight on the last one are one weight, of 200 entries. Each stage has a gradient of 1 for each entry. The
gradient of the one weight is their sum, 2 for each of 200 entries: its norm is sqrt(800) = 28.28, and not sqrt(1600) =
40, as it is where both copies of the summed gradient count.

Here both are trained in one process, tied by ``Tie.equal``, and beside them one Parameter that is used twice.

Run it as ``python gradient_norm.py``. It takes seconds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer

SHAPE, MAX_NORM = (20, 10), 1.0
PUBLISHED = math.sqrt(800)


def loss(embedding: Tensor, output: Tensor) -> Tensor:
    """Return a loss whose gradient is 1 for each entry of both."""
    return embedding.sum() + output.sum()


def main() -> None:
    """Print the norms and what a clipped step of SGD moves."""
    torch.set_num_threads(1)
    print(f"{'':44s}{'norm':>9s}{'moved by':>10s}")

    shared = Parameter(torch.zeros(SHAPE))
    inner = SGD([shared], lr=1.0)
    loss(shared, shared).backward()
    norm = clip_grad_norm_([shared], MAX_NORM)
    inner.step()
    expected = -shared[0, 0].item()
    print(f"{'one Parameter, used twice, in torch':44s}{norm:9.4f}{expected:10.6f}")

    for compact in (False, True):
        params = [Parameter(torch.zeros(SHAPE)) for _ in range(2)]
        optimizer = TiedOptimizer(SGD(params, lr=1.0), Tie.equal(*params), reduction="sum", compact=compact)
        loss(*params).backward()
        norm = optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        moved = -params[0][0, 0].item()
        print(f"{f'two that are tied, compact={compact}':44s}{norm:9.4f}{moved:10.6f}")
        assert math.isclose(norm, PUBLISHED, rel_tol=1e-6)
        assert math.isclose(moved, expected, rel_tol=1e-6)

    params = [Parameter(torch.zeros(SHAPE)) for _ in range(2)]
    loss(*params).backward()
    total = params[0].grad + params[1].grad
    for param in params:
        param.grad = total.clone()
    print(f"{'both copies of the sum counted, in torch':44s}{clip_grad_norm_(params, MAX_NORM):9.4f}")
    print(f"\nMegatron-LM expects sqrt(800) = {PUBLISHED:.4f}")


if __name__ == "__main__":
    main()
