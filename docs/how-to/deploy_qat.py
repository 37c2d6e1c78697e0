"""Quantisation-aware training of torchao on tied weights."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis
from torchao.quantization.qat import QATConfig

from tieopt import TiedOptimizer, patterns


def trained(config: Int8DynamicActivationIntxWeightConfig) -> nn.Sequential:
    """Train two layers as if they were quantised; the first has tied rows, the second has 16 values in each row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    rows = [[1, 2], [4, 5, 6]]
    values = patterns.clusters(model[2].weight, 16, of="values", per="channel")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = TiedOptimizer(optimizer, {model[0].weight: rows, model[0].bias: rows, model[2].weight: values})

    quantize_(model, QATConfig(config, step="prepare"))
    inputs, classes = torch.randn(256, 64), torch.randint(64, (256,))
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(model(inputs), classes).backward()
        optimizer.step()
    print("  drift:", optimizer.tie_drift())
    print("  values in a row:", most_values(model[2].weight))
    return model


def most_values(weight: torch.Tensor) -> int:
    return max(len(row.unique()) for row in weight)


def main() -> None:
    for dtype in (torch.int8, torch.int4):
        print(dtype)
        config = Int8DynamicActivationIntxWeightConfig(dtype, PerAxis(0))
        model = trained(config)
        quantize_(model, QATConfig(config, step="convert"))
        weight = model[0].weight
        equal = all(torch.equal(part[1], part[2]) for part in (weight.qdata, weight.scale))
        print("  rows 1 and 2 equal:", equal)
        print("  values in a row, quantised:", most_values(model[2].weight.dequantize()))


if __name__ == "__main__":
    main()
