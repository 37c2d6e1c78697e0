"""Compress a CNN to a few values for each layer, write it to a file, and read it elsewhere.

python compressed-cnn.py make           writes digits-16.safetensors and digits-2.safetensors
python compressed-cnn.py read FILE      needs torch, scikit-learn and safetensors, not tieopt
"""

import copy
import json
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

EPOCHS, FINE_TUNING, BATCH = 6, 3, 64


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def digits() -> tuple[list[Tensor], list[Tensor]]:
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16
    parts = train_test_split(images, labels, test_size=500, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.as_tensor, parts)
    return [train_images, train_labels], [test_images, test_labels]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor], epochs: int) -> None:
    images, labels = data
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: list[Tensor]) -> float:
    images, labels = data
    model.eval()
    return 100 * (model(images).argmax(dim=1) == labels).double().mean().item()


def make() -> None:
    from tieopt import TiedOptimizer, export, patterns

    torch.manual_seed(0)
    train_data, test_data = digits()
    trained = cnn()
    train(trained, torch.optim.AdamW(trained.parameters(), lr=2e-3), train_data, EPOCHS)
    save_file(trained.state_dict(), "digits.safetensors")
    right, size = accuracy(trained, test_data), os.path.getsize("digits.safetensors")
    print(f"all weights            {right:.1f} %  {size} bytes")

    for count in (16, 2):
        model, file = copy.deepcopy(trained), f"digits-{count}.safetensors"
        layers = [module for module in model if isinstance(module, (nn.Conv2d, nn.Linear))]
        ties = {layer.weight: patterns.clusters(layer.weight, count, of="values") for layer in layers}
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        optimizer = TiedOptimizer(optimizer, ties, reduction="sum", compact=True)
        print(f"{count:2d} values, clustered   {accuracy(model, test_data):.1f} %")

        train(model, optimizer, train_data, FINE_TUNING)
        export.save(model, optimizer, file)
        right, size = accuracy(model, test_data), os.path.getsize(file)
        print(f"{count:2d} values, fine-tuned  {right:.1f} %  {size:6d} bytes")

        # With tieopt, reading is one line.
        again = cnn()
        again.load_state_dict(export.load(file))
        assert all(torch.equal(state, again.state_dict()[name]) for name, state in model.state_dict().items())


def read(file: str) -> None:
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        ties = json.loads(opened.metadata()["tieopt"])["ties"]
    for (tie,) in ties:
        name, shape, width = tie["name"], torch.Size(tie["shape"]), tie["bits"]
        codebook, packed = state.pop(f"{name}.codebook"), state.pop(f"{name}.indices")
        digits_of_bytes = packed[:, None] >> torch.arange(8) & 1  # the lowest bit first
        digits_of_indices = digits_of_bytes.flatten()[: shape.numel() * width].view(*shape, width)
        state[name] = codebook[(digits_of_indices << torch.arange(width)).sum(-1)]

    model = cnn()
    model.load_state_dict(state)
    _, test_data = digits()
    print(f"{accuracy(model, test_data):.1f} %")


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](*sys.argv[2:])
