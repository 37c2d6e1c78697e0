"""A convolutional network with 32 values in each layer, beside TensorFlow's published one.

The proposal of weight clustering in the TensorFlow Model Optimization Toolkit reports, for a convolutional network on
MNIST with 32 clusters in every layer, an accuracy of 98.78 % instead of 99.40 %, and a zipped file of 0.09 MB instead
of 0.57 MB (community/rfcs/techniques/proposals/20200507-weight-clustering-proposal.md of
https://github.com/tensorflow/model-optimization).

Here a network of like size, 0.6 MB, learns scikit-learn's 1797 digits of 8 x 8 pixels instead of the 70 000 of MNIST,
which would have to be downloaded. So accuracies are lower from the start, and a held-out image is 0.17 %; the file is
what can be compared. k-means finds the values as they do there, and training goes on with them. It is done once for the
network as it is, and once after half of the weights of each layer were pruned, the smallest ones: ``keep_zeros=True``
pins these at zero, and zero is one value more.

Files are written by ``tieopt.export``, and are not zipped; zipped sizes are in the last column. All are read back, and
compared bit for bit.

Run it as ``python clustering.py``. It needs safetensors and scikit-learn, and takes about a minute.
"""

from __future__ import annotations

import copy
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import Adam

from tieopt import Tie, TiedOptimizer, export, patterns

SEEDS, VALUES, BATCH = 5, 32, 64
EPOCHS, EPOCHS_AFTER = 12, 4
RATE, RATE_AFTER = 1e-3, 3e-4


class Digits(NamedTuple):
    """Images ``[n, 1, 8, 8]`` and their digits ``[n]``, for training and held out."""

    train_images: Tensor
    test_images: Tensor
    train_digits: Tensor
    test_digits: Tensor


def split_digits(seed: int) -> Digits:
    """Hold out a third of the digits."""
    images, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(images / 16).float().view(-1, 1, 8, 8)
    parts = train_test_split(images, torch.as_tensor(digits), test_size=1 / 3, stratify=digits, random_state=seed)
    return Digits(*parts)


def network() -> nn.Sequential:
    """Return a convolutional network of 151 306 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that are clustered; biases are not."""
    return [layer.weight for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, digits: Digits, epochs: int, seed: int) -> None:
    """Run the usual training loop."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train_images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(digits.train_images[batch]), digits.train_digits[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return how many held-out digits are read correctly, in %."""
    return 100 * (model(digits.test_images).argmax(dim=1) == digits.test_digits).double().mean().item()


def clustered(model: nn.Module) -> TiedOptimizer:
    """Cluster the weights of each layer into as many values, and pin the zeros of pruned ones."""
    ties = []
    for weight in weights_of(model):
        labels, scale = patterns.clusters(weight, VALUES, of="values", keep_zeros=True)
        ties.append(Tie(weight, labels, scale=scale))
    return TiedOptimizer(Adam(model.parameters(), lr=RATE_AFTER), ties, reduction="sum", compact=True)


@torch.no_grad()
def prune(model: nn.Module) -> None:
    """Set the smaller half of the weights of each layer to zero."""
    for weight in weights_of(model):
        weight.mul_(weight.abs() > weight.abs().median())


def sizes(model: nn.Module, optimizer: TiedOptimizer | None) -> tuple[float, float]:
    """Return the size of a file and of that file zipped, in MB, after reading it back."""
    with tempfile.TemporaryDirectory() as folder:
        file, archive = Path(folder) / "network.safetensors", Path(folder) / "network.zip"
        if optimizer is None:
            save_file(model.state_dict(), file)
        else:
            export.save(model, optimizer, file)
            state = export.load(file)
            assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
            writer.write(file)
        return file.stat().st_size / 1e6, archive.stat().st_size / 1e6


class Row(NamedTuple):
    """A network of one seed: its accuracy right after clustering and after training, in %, and sizes in MB."""

    before: float
    after: float
    size: float
    zipped: float


def measure(seed: int) -> dict[str, Row]:
    """Train a network, cluster it, and cluster it after pruning."""
    torch.manual_seed(seed)
    digits, rows = split_digits(seed), {}
    model = network()
    train(model, Adam(model.parameters(), lr=RATE), digits, EPOCHS, seed)
    dense = copy.deepcopy(model)
    before = accuracy(dense, digits)
    # As many steps as the others have, for a fair comparison.
    train(dense, Adam(dense.parameters(), lr=RATE_AFTER), digits, EPOCHS_AFTER, seed)
    rows["all values"] = Row(before, accuracy(dense, digits), *sizes(dense, None))

    for name in (f"{VALUES} values", f"{VALUES} and half zeros"):
        other = copy.deepcopy(model)
        if "zeros" in name:
            prune(other)
        zeros = [weight == 0 for weight in weights_of(other)]
        optimizer = clustered(other)
        before = accuracy(other, digits)
        train(other, optimizer, digits, EPOCHS_AFTER, seed)
        for weight, zero in zip(weights_of(other), zeros, strict=True):
            assert torch.equal(weight == 0, zero), "a zero has changed, or there is a new one"
            assert len(weight[~zero].unique()) <= VALUES
        rows[name] = Row(before, accuracy(other, digits), *sizes(other, optimizer))
    return rows


def main() -> None:
    """Measure, and print a table of means."""
    torch.set_num_threads(1)
    seeds = [measure(seed) for seed in range(SEEDS)]
    print(f"Held-out digits read correctly in %, means of {SEEDS} seeds; sizes of files in MB\n")
    print(f"{'each layer has':20s}{'at first':>10s}{'trained':>9s}{'size':>8s}{'zipped':>8s}")
    means = {name: Row(*torch.tensor([rows[name] for rows in seeds]).mean(dim=0).tolist()) for name in seeds[0]}
    for name, (before, after, size, zipped) in means.items():
        print(f"{name:20s}{before:10.2f}{after:9.2f}{size:8.3f}{zipped:8.3f}")
    dense, *clustered = means.values()
    # Published: 0.62 points are lost, and the file is about a sixth. Here it is less than a fifth.
    assert all(row.after > dense.after - 0.62 and row.zipped < dense.zipped / 5 for row in clustered)
    print("\nPublished, on MNIST: 99.40 and 0.57 MB with all values, 98.78 and 0.09 MB with 32, zipped")


if __name__ == "__main__":
    main()
