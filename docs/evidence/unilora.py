"""UniLora as one tie of PEFT's plain LoRA, trained beside PEFT's own implementation of it.

Uni-LoRA (Li et al., 2025, https://arxiv.org/abs/2506.00799) draws every entry of all LoRA matrices from one vector of d
values: an entry is a value of the vector, times a scale. PEFT implements it as a tuner of its own. Here its indices and
scales become one tie that joins all matrices of PEFT's LoRA, and a compact optimizer trains the d values.

Both models start alike and see the same batches. There is no published number to reach: the difference between the two
after training has to be that of rounding in float64.

Run it as ``python unilora.py``. It needs peft (``pip install peft==0.21.2``) and takes seconds.
"""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, UniLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW

from tieopt import Tie, TiedOptimizer

RANK, VALUES, STEPS, BATCH = 4, 64, 200, 32
LAYERS = ("0", "2", "4")


def network() -> nn.Sequential:
    """Return the network that is adapted."""
    torch.manual_seed(0)
    layers = (nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 5))
    return nn.Sequential(*layers).double()


def lora_with_a_tie(unilora: nn.Module) -> tuple[nn.Module, Tie]:
    """Return PEFT's LoRA of the same network, and the tie that makes it the given UniLora."""
    # lora_alpha is the rank, so that LoRA multiplies by 1.
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS))
    model = get_peft_model(network(), config, autocast_adapter_dtype=False)
    values, ties = unilora.base_model.unilora_theta_d["default"].detach(), []
    for name in LAYERS:
        theirs, ours = unilora.base_model.model.get_submodule(name), model.base_model.model.get_submodule(name)
        for side in "AB":
            weight = getattr(ours, f"lora_{side}")["default"].weight
            labels = getattr(theirs, f"unilora_indices_{side}")["default"]
            scale = getattr(theirs, f"unilora_scales_{side}")["default"]
            weight.data = values[labels] * scale
            ties.append(Tie(weight, labels, scale=scale))
    return model, Tie.join(*ties)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return random inputs and what another network makes of them."""
    teacher = copy.deepcopy(network())
    generator = torch.Generator().manual_seed(1)
    for param in teacher.parameters():
        param.data += 0.1 * torch.randn(param.shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(STEPS, BATCH, 20, generator=generator, dtype=torch.float64)
    return [(batch, teacher(batch).detach()) for batch in inputs]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Run the usual training loop, and return the losses."""
    losses = []
    for inputs, targets in batches():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return what the tuner trains."""
    return [param for param in model.parameters() if param.requires_grad]


def main() -> None:
    """Train both, and print how far apart they are."""
    torch.set_num_threads(1)
    unilora = get_peft_model(
        network(), UniLoraConfig(r=RANK, theta_d_length=VALUES, target_modules=list(LAYERS), init_theta_d_bound=0.1)
    ).double()
    lora, tie = lora_with_a_tie(unilora)
    optimizer = TiedOptimizer(AdamW(trainable(lora), lr=0.01), tie, reduction="sum", compact=True)

    theirs, ours = train(unilora, AdamW(trainable(unilora), lr=0.01)), train(lora, optimizer)

    inputs = batches()[0][0]
    vector = sum(param.numel() for param in trainable(unilora))
    trained = sum(state["exp_avg"].numel() for state in optimizer.state_dict()["state"].values())
    print(f"{'':34s}{'UniLora of PEFT':>18s}{'LoRA with a tie':>18s}")
    print(f"{'entries of LoRA matrices':34s}{'':18s}{sum(p.numel() for p in trainable(lora)):18d}")
    print(f"{'values that the optimizer trains':34s}{vector:18d}{trained:18d}")
    print(f"{'first loss':34s}{theirs[0]:18.12f}{ours[0]:18.12f}")
    print(f"{f'loss of step {STEPS}':34s}{theirs[-1]:18.12f}{ours[-1]:18.12f}")
    losses = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    outputs = (unilora(inputs) - lora(inputs)).abs().max().item()
    print(f"\nLargest difference of a loss {losses:.1e}, of an output after training {outputs:.1e}")
    assert losses < 1e-12
    assert outputs < 1e-12


if __name__ == "__main__":
    main()
