"""A layer with 16 values becomes a codebook tensor of torchao that has the same 16."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss, pad
from torchao.prototype.quantization.codebook_coreml import CodebookQuantizedTensor

from tieopt import TiedOptimizer, export, patterns

torch.manual_seed(0)
layer = nn.Linear(256, 256)
inputs, targets = torch.randn(64, 256), torch.randn(64, 256)
labels = patterns.clusters(layer.weight, 16, of="values")
optimizer = TiedOptimizer(torch.optim.AdamW(layer.parameters(), lr=1e-3), {layer.weight: labels})
for _ in range(10):
    optimizer.zero_grad()
    mse_loss(layer(inputs), targets).backward()
    optimizer.step()


def quantized(weight: torch.Tensor, labels: torch.Tensor) -> CodebookQuantizedTensor:
    """Return a tied matrix of at most 16 values as a codebook and codes of four bits."""
    weight = weight.detach()
    codebook, codes = export.encode(weight, labels)
    one_table = pad(codebook, (0, 16 - len(codebook))).view(1, 1, 16, 1)
    return CodebookQuantizedTensor(
        codes.to(torch.uint8), one_table, torch.uint4, [-1, -1], weight.shape, dtype=weight.dtype
    )


def main() -> None:
    small = nn.Linear(256, 256)
    small.bias = layer.bias
    small.weight = nn.Parameter(quantized(layer.weight, labels), requires_grad=False)
    print("the same weight:", torch.equal(small.weight.dequantize(), layer.weight))
    print("the same outputs:", torch.equal(small(inputs), layer(inputs)))

    folder = Path(tempfile.mkdtemp())
    for name, module in (("dense.pt", layer), ("codebook.pt", small)):
        torch.save(module.state_dict(), folder / name)
    export.save(layer, optimizer, folder / "packed.safetensors")
    for file in ("dense.pt", "codebook.pt", "packed.safetensors"):
        print(f"{file}: {(folder / file).stat().st_size} bytes")

    with torch.serialization.safe_globals([CodebookQuantizedTensor]):
        state = torch.load(folder / "codebook.pt")
    restored = nn.Linear(256, 256)
    restored.load_state_dict(state, assign=True)
    print("the same after loading:", torch.equal(restored(inputs), layer(inputs)))


if __name__ == "__main__":
    main()
