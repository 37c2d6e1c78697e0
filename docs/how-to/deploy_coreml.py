"""A network with 16 values in each weight becomes a Core ML package with the same 16."""

import tempfile
from pathlib import Path

import coremltools as ct
import torch
from coremltools.optimize import coreml
from torch import nn
from torch.nn.functional import cross_entropy

from tieopt import TiedOptimizer, patterns

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 13 * 13, 10))
images, digits = torch.rand(64, 1, 28, 28), torch.randint(10, (64,))
weights = [model[0].weight, model[3].weight]
ties = {weight: patterns.clusters(weight, 16, of="values") for weight in weights}
optimizer = TiedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), ties)
for _ in range(10):
    optimizer.zero_grad()
    cross_entropy(model(images), digits).backward()
    optimizer.step()


def convert(model: nn.Module, inputs: torch.Tensor, **options: object) -> ct.models.MLModel:
    program = torch.export.export(model.eval(), (inputs,)).run_decompositions({})
    return ct.convert(program, **options)


def palettize(converted: ct.models.MLModel, **options: object) -> ct.models.MLModel:
    chosen = coreml.OpPalettizerConfig(mode="unique", **options)
    return coreml.palettize_weights(converted, coreml.OptimizationConfig(global_config=chosen))


def saved(converted: ct.models.MLModel, path: Path) -> int:
    """Save a package and return the bytes of its files."""
    converted.save(str(path))
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def weights_in(path: Path) -> list[torch.Tensor]:
    """Read the weights of a package: those of layers, without their biases."""
    unpacked = coreml.decompress_weights(ct.models.MLModel(str(path)))
    found = coreml.get_weights_metadata(unpacked, weight_threshold=0).values()
    return [torch.from_numpy(weight.val) for weight in found if weight.val.ndim > 1]


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    for precision in (ct.precision.FLOAT32, ct.precision.FLOAT16):
        converted = convert(model, images[:1], compute_precision=precision)
        path = folder / f"{precision.name}.mlpackage"
        palettized = palettize(converted)
        print(precision.name)
        print("  bytes:", saved(converted, folder / "dense.mlpackage"), "->", saved(palettized, path))
        for read, weight in zip(weights_in(path), weights, strict=True):
            equal = torch.equal(read, weight.detach().to(read.dtype))
            print(f"  {len(read.unique())} values, the same weight: {equal}")


if __name__ == "__main__":
    main()
