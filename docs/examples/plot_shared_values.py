r"""
A network of a few values, in a file of a few bits
==================================================

A few values replace all weights of a layer: k-means finds them, ties train them, and a file stores the indices.

Deep Compression (Han, Mao and Dally, ICLR 2016) replaces the weights of a trained layer by a few values: k-means finds
the values, every weight takes the nearest value, and training continues with the gradient of each value, which is the
sum of the gradients of all weights that share it. A file then contains the values, a codebook, and for each weight an
index of :math:`\log_2 k` bits.

Here a perceptron 64-300-100-10 learns to read digits, and then gets 2 to 64 values for each layer:

.. code-block:: python

    labels = patterns.clusters(layer.weight, k, of="values")
    optimizer = TiedOptimizer(Adam(model.parameters()), {layer.weight: labels, ...}, reduction="sum", compact=True)

With ``compact=True``, Adam trains only the k values, with a state of that size. :func:`tieopt.export.save` writes the
codebook and the indices to a safetensors file.

Two statements are checked.

1. *Nothing is lost on the way.* The network that is read back from the file is the trained network bit for bit, and
   each layer has at most k values.
2. *Training the values recovers most of the cost of clustering.* With two values per layer, the error on held-out
   digits is much smaller after the training than right after the clustering.

Published errors for a network of this kind, LeNet-300-100, on MNIST: with Deep Compression, 1.64 % become 1.58 % (with
pruning, and 64 values per layer); with a learning-compression algorithm (Carreira-Perpinan and Idelbayev, 2017), 2.13 %
with all values become 2.56 % with two per layer. This example uses scikit-learn's 1797 digits of 8 x 8 pixels instead
of the 70 000 of MNIST, which would have to be downloaded; it does not prune; and it clusters once, whereas the
learning-compression algorithm clusters again as it trains. Compare the trend, therefore, and not the figures: two
values for each layer increase the error, and more values make little difference.

It takes one to two minutes on one core and needs safetensors, scikit-learn, matplotlib and tqdm. Run it as
``python plot_shared_values.py``; ``--seeds 1`` is a quicker try.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from tieopt import TiedOptimizer, export, patterns

VALUES = (2, 4, 8, 16, 32, 64)
EPOCHS = 40
BATCH = 64
RATE = 1e-3
WEIGHT_DECAY = 1e-2

# Errors in % of LeNet-300-100 on MNIST, with all values and with this number of values per layer: for 2, of a
# learning-compression algorithm; for 64, of Deep Compression.
PUBLISHED = {2: (2.13, 2.56), 64: (1.64, 1.58)}

# The matrices are small: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


# %%
# The digits
# ----------
# 1797 images of 8 x 8 pixels, a third of them held out. Each seed draws its own split.


class Digits(NamedTuple):
    """Images ``[n, 64]`` and their digits ``[n]``, for training and held out."""

    train_images: Tensor
    train_digits: Tensor
    test_images: Tensor
    test_digits: Tensor


def split_digits(seed: int) -> Digits:
    """Draw a stratified split, with pixels from -1 to 1."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images / 8 - 1, digits, test_size=1 / 3, stratify=digits, random_state=seed)
    train_images, test_images, train_digits, test_digits = map(torch.as_tensor, parts)
    return Digits(train_images.float(), train_digits, test_images.float(), test_digits)


# %%
# The network, and its ties
# -------------------------


def build_network() -> nn.Sequential:
    """Build a perceptron from 64 pixels to 10 digits."""
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def share_values(model: nn.Sequential, count: int) -> TiedOptimizer:
    """Cluster the weights of each layer, and tie the weights of each cluster; biases are not tied."""
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    ties = {weight: patterns.clusters(weight, count, of="values") for weight in weights}
    return TiedOptimizer(build_optimizer(model), ties, reduction="sum", compact=True)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that every training run uses, so that only the ties differ."""
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, digits: Digits, seed: int, progress: tqdm) -> None:
    """Run the usual training loop, which is the same with and without ties."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(digits.train_images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            logits = model(digits.train_images[batch])
            nn.functional.cross_entropy(logits, digits.train_digits[batch]).backward()
            optimizer.step()
        scheduler.step()
        progress.update()


@torch.no_grad()
def error(model: nn.Module, digits: Digits) -> float:
    """Return the percentage of held-out digits that the model misreads."""
    misses = model(digits.test_images).argmax(dim=1) != digits.test_digits
    return 100 * misses.double().mean().item()


# %%
# The file
# --------


def file_size(model: nn.Sequential, optimizer: TiedOptimizer, count: int) -> int:
    """Return the bytes of the file with codebooks and indices, after checking that it is read back bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.safetensors"
        export.save(model, optimizer, file)
        state = export.load(file)
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor), f"{name} was read back with other bits"
            assert not name.endswith("weight") or len(tensor.unique()) <= count, f"{name} has more than {count} values"
        return file.stat().st_size


def dense_file_size(model: nn.Sequential) -> int:
    """Return the bytes of the file with all weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(model.state_dict(), Path(folder) / "network.safetensors")
        return (Path(folder) / "network.safetensors").stat().st_size


# %%
# The measurement
# ---------------
# The network without ties is also trained for the additional epochs, for a fair comparison with trained values.


class Run(NamedTuple):
    """Results for one number of values: held-out errors in %, and the bytes of the file."""

    clustered: float
    trained: float
    size: int


class Seed(NamedTuple):
    """Results of one seed.

    Attributes:
        error: held-out error in % with all values, after the additional epochs.
        before: held-out error in % with all values, before clustering.
        size: bytes of the file with all values.
        runs: results for each number of values.
        histograms: the flattened weights of the middle layer for each number of values; key 0 has all values.
    """

    error: float
    before: float
    size: int
    runs: dict[int, Run]
    histograms: dict[int, Tensor]


def measure(seed: int, progress: tqdm) -> Seed:
    """Train a network, and a copy of it for each number of values."""
    torch.manual_seed(seed)
    digits, model = split_digits(seed), build_network()
    train(model, build_optimizer(model), digits, seed, progress)
    runs, weights = {}, {}
    for count in VALUES:
        shared = copy.deepcopy(model)
        optimizer = share_values(shared, count)
        clustered = error(shared, digits)
        train(shared, optimizer, digits, seed, progress)
        runs[count] = Run(clustered, error(shared, digits), file_size(shared, optimizer, count))
        weights[count] = shared[2].weight.detach().flatten()
    start = model[2].weight.detach().flatten().clone()
    before = error(model, digits)
    train(model, build_optimizer(model), digits, seed, progress)
    return Seed(error(model, digits), before, dense_file_size(model), runs, {0: start, **weights})


def spread(values: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation, which is NaN for a single seed."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.mean().item(), numbers.std().item() if len(values) > 1 else torch.nan


def print_table(seeds: list[Seed]) -> None:
    """Print a line for each number of values."""
    before, dense = spread([seed.before for seed in seeds]), spread([seed.error for seed in seeds])
    print(f"Held-out errors in % (mean ± standard deviation); seeds: {len(seeds)}\n")
    print(f"{'values':>7s} {'clustered':>14s} {'trained on':>14s} {'file':>10s} {'smaller':>9s}  published on MNIST")
    print(f"{'all':>7s} {before[0]:7.2f} ± {before[1]:4.2f} {dense[0]:7.2f} ± {dense[1]:4.2f} {seeds[0].size:8d} B")
    for count in VALUES:
        clustered, trained = (
            spread([getattr(s.runs[count], kind) for s in seeds]) for kind in ("clustered", "trained")
        )
        size = seeds[0].runs[count].size
        published = "{} -> {}".format(*PUBLISHED[count]) if count in PUBLISHED else ""
        print(
            f"{count:7d} {clustered[0]:7.2f} ± {clustered[1]:4.2f} {trained[0]:7.2f} ± {trained[1]:4.2f}"
            f" {size:8d} B {seeds[0].size / size:8.1f}x  {published}"
        )
    print("\nPublished: with all values -> with this number; for 64 after pruning, by Deep Compression")


# %%
# The figure
# ----------

COLORS = {"clustered": "#D55E00", "trained": "#0072B2"}
LABELS = {"clustered": "right after clustering", "trained": "after training the values"}


def draw_errors(axes: Axes, seeds: list[Seed]) -> None:
    """Draw the errors over the number of values."""
    dense, _ = spread([seed.error for seed in seeds])
    axes.axhline(dense, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(VALUES[-1], dense * 0.93, f"all values: {dense:.1f} %", ha="right", va="top")
    for kind, color in COLORS.items():
        means, deviations = torch.tensor([spread([getattr(s.runs[k], kind) for s in seeds]) for k in VALUES]).T
        axes.fill_between(VALUES, means - deviations, means + deviations, color=color, alpha=0.2, linewidth=0)
        axes.plot(VALUES, means, color=color, marker="o", label=LABELS[kind])
    # Next to the marks of this example.
    at, published = [0.92 * k for k in PUBLISHED], [after for _, after in PUBLISHED.values()]
    axes.plot(at, published, "D", color="black", markerfacecolor="none", label="published, on MNIST")
    axes.set(xscale="log", yscale="log", xticks=VALUES, xlabel="values for each layer", ylabel="held-out error (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xticks(VALUES)
    axes.set_yticks([1, 2, 5, 10, 20, 50])
    axes.secondary_xaxis("top", functions=(lambda k: k, lambda k: k))
    top = axes.child_axes[0]
    top.set_xticks(VALUES, [f"{seeds[0].size / seeds[0].runs[k].size:.0f}x" for k in VALUES])
    top.minorticks_off()
    top.set_xlabel("how much smaller the file is")
    axes.legend(frameon=False)
    axes.spines[["right"]].set_visible(False)


def draw_values(axes: Axes, before: Tensor, after: Tensor) -> None:
    """Draw a histogram of the weights before clustering, and a line for each value after training."""
    axes.hist(before, bins=100, color="#999999", label="all values")
    values, counts = after.unique(return_counts=True)
    heights = axes.get_ylim()[1] * counts / counts.max()
    axes.vlines(values, 0, heights, color=COLORS["trained"], linewidth=3)
    for value, height, count in zip(values.tolist(), heights.tolist(), counts.tolist(), strict=True):
        axes.text(value, height, count, color=COLORS["trained"], fontweight="bold", ha="center", va="bottom")
    limit = 1.2 * after.abs().max().item()
    axes.set(xlim=(-limit, limit), yticks=[], xlabel="weights from 300 to 100 neurons")
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_figure(seeds: list[Seed]) -> Figure:
    """Draw the errors and the values, and a title with the numbers of these runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=(3, 2))
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    draw_errors(left, seeds)
    draw_values(right, seeds[0].histograms[0], seeds[0].histograms[4])
    right.set_title("grey: all values; blue: four, and how many weights share each", fontsize=10)
    dense, two = spread([s.error for s in seeds])[0], spread([s.runs[2].trained for s in seeds])[0]
    figure.suptitle(
        f"Two values for each layer: {two:.1f} % errors instead of {dense:.1f} %,"
        f" and a file {seeds[0].size / seeds[0].runs[2].size:.0f} times smaller",
        fontweight="bold",
    )
    return figure


# %%
# The result
# ----------
# Clustering into two values for each layer loses most of the accuracy, and training the values recovers most of it.
# From 16 values on, the cost of clustering is not distinguishable from chance, so training has nothing to recover. The
# network without ties gains slightly more from the same training.
#
# The left panel shows the errors: lines are the means of the seeds, and bands their standard deviations. The right
# panel shows the values of the middle layer, before clustering and with four values.


def parse_arguments() -> argparse.Namespace:
    """Parse the number of seeds and the path of the figure."""
    # Galleries and notebooks run this without a file, and show the figure themselves.
    script = globals().get("__file__")
    figure = script and Path(script).resolve().with_suffix(".png")
    parser = argparse.ArgumentParser(description="Share values within the layers of a network.")
    parser.add_argument("--seeds", type=int, default=5, help="how many repetitions (default: 5)")
    parser.add_argument("--output", type=Path, default=figure, help="path of the figure (default: next to this script)")
    # In a notebook, the arguments are those of its kernel.
    return parser.parse_args([] if "kernel_launcher" in Path(sys.argv[0]).name else None)


def main() -> None:
    """Train, check, print and draw."""
    args = parse_arguments()
    # With `disable=None`, the bar appears only on a terminal, and does not fill log files.
    total = args.seeds * (2 + len(VALUES)) * EPOCHS
    with tqdm(desc="training", total=total, unit="epoch", disable=None) as progress:
        seeds = [measure(seed, progress) for seed in range(args.seeds)]

    print_table(seeds)
    for seed in seeds:
        run = seed.runs[2]
        assert run.trained < run.clustered / 2, f"{run.clustered} % errors after clustering, {run.trained} % trained"
    figure = draw_figure(seeds)
    if args.output:
        figure.savefig(args.output, dpi=130)
        print(f"\nFigure written to {args.output}")


if __name__ == "__main__":
    main()
