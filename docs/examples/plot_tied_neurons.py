r"""
Tying the neurons that resemble each other
==========================================

How many *different* neurons does a network need?

A multilayer perceptron with 128 hidden neurons learns to read handwritten digits. Then k-means finds
the neurons that resemble each other, and :class:`tieopt.TiedOptimizer` ties each group: from then on,
its members share one row of weights and one bias.

Tied neurons compute the same activation. A network with :math:`k` distinct rows therefore computes, up
to rounding, the same as a network with :math:`k` hidden neurons whose outgoing weights are the sums over
the groups:

.. math::

    \sum_i v_i \, \phi(w_{g(i)} \cdot x + b_{g(i)})
    = \sum_{j=1}^{k} \Bigl(\sum_{i :\, g(i) = j} v_i\Bigr) \, \phi(w_j \cdot x + b_j)

Tying neurons is therefore a way of pruning them: train the large network, tie, fine-tune, merge. The
example measures the accuracy on held-out digits right after tying and after fine-tuning, for 4 to 64
groups, and compares it with small networks that are trained from scratch.

It takes about a minute on one core and needs scikit-learn, matplotlib and tqdm. Run it as
``python plot_tied_neurons.py``; ``--seeds 1`` is a quick try.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from tieopt import TiedOptimizer

HIDDEN = 128
GROUPS = (4, 6, 8, 12, 16, 32, 64)
EPOCHS = 30
FINE_TUNE_EPOCHS = 10
BATCH = 64

# Galleries and notebooks run this without a file, and show the figure themselves.
script = globals().get("__file__")

parser = argparse.ArgumentParser(description="Tie the neurons that resemble each other.")
parser.add_argument("--seeds", type=int, default=10, help="how many repetitions (default: 10)")
parser.add_argument(
    "--output",
    type=Path,
    default=script and Path(script).resolve().with_suffix(".png"),
    help="path of the figure (default: next to this script)",
)
# In a notebook, the arguments are those of its kernel.
args = parser.parse_args([] if "kernel_launcher" in Path(sys.argv[0]).name else None)

# The matrices are small: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


# %%
# The digits
# ----------
# 1797 images of 8 x 8 pixels, a quarter of them held out. Each seed draws its own split. The mean
# image and the scale come from the training part alone.


class Digits(NamedTuple):
    """Images ``[n, 64]`` and their digits ``[n]``, for training and held out."""

    train_images: Tensor
    train_digits: Tensor
    test_images: Tensor
    test_digits: Tensor


def split_digits(seed: int) -> Digits:
    """Draw a stratified split, with standardised images."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, test_size=0.25, stratify=digits, random_state=seed)
    train_images, test_images, train_digits, test_digits = map(torch.as_tensor, parts)
    mean = train_images.mean(dim=0)
    # One scale for all pixels: scaling each pixel would amplify pixels that are almost always blank.
    scale = (train_images - mean).std()
    return Digits(
        ((train_images - mean) / scale).float(),
        train_digits,
        ((test_images - mean) / scale).float(),
        test_digits,
    )


# %%
# The network
# -----------
# One hidden layer. SGD with momentum makes the rows easy to look at: pixels that are almost always
# blank keep small weights, whereas an adaptive optimizer scales up their tiny gradients. The ties
# work with either.


def build_network(hidden: int) -> nn.Sequential:
    """Build a perceptron from 64 pixels to 10 digits."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that every training run uses, so that only the ties differ."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=3e-3)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    digits: Digits,
    epochs: int,
    progress: tqdm,
) -> None:
    """Run the usual training loop, which is the same with and without ties."""
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train_images)).split(BATCH):
            optimizer.zero_grad()
            logits = model(digits.train_images[batch])
            nn.functional.cross_entropy(logits, digits.train_digits[batch]).backward()
            optimizer.step()
        progress.update()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the percentage of held-out digits that the model reads correctly."""
    hits = model(digits.test_images).argmax(dim=1) == digits.test_digits
    return 100 * hits.double().mean().item()


# %%
# Tie, fine-tune, merge
# ---------------------
# The labels of k-means are the labels of a tie: an integer for each row, and the same integer for all
# rows that should be equal. One line ties them.


def find_groups(layer: nn.Linear, groups: int, seed: int) -> Tensor:
    """Return labels ``[neurons]`` by k-means over the weights and the bias of each neuron."""
    neurons = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().numpy()
    kmeans = KMeans(groups, n_init=4, random_state=seed).fit(neurons)
    return torch.as_tensor(kmeans.labels_).long()


@torch.no_grad()
def merge_neurons(model: nn.Sequential, labels: Tensor) -> nn.Sequential:
    """Build the small network that computes the same: a neuron for each group, outgoing weights added."""
    membership = nn.functional.one_hot(labels).float()  # [neurons, groups]
    representative = membership.argmax(dim=0)
    merged = build_network(membership.shape[1])
    merged[0].weight.copy_(model[0].weight[representative])
    merged[0].bias.copy_(model[0].bias[representative])
    merged[2].weight.copy_(model[2].weight @ membership)
    merged[2].bias.copy_(model[2].bias)
    return merged


class Run(NamedTuple):
    """Results for one seed and one number of groups: accuracies, and rows ``[neurons, 64]``."""

    groups: int
    untied: float
    tied: float
    tuned: float
    scratch: float
    drift: float
    labels: Tensor
    untied_rows: Tensor
    tied_rows: Tensor
    tuned_rows: Tensor


def tie_and_fine_tune(
    trained: nn.Sequential,
    groups: int,
    digits: Digits,
    seed: int,
    progress: tqdm,
) -> Run:
    """Tie and fine-tune a copy of the trained network, and train a small rival from scratch."""
    model = build_network(HIDDEN)
    model.load_state_dict(trained.state_dict())
    labels = find_groups(model[0], groups, seed)

    ties = {model[0].weight: labels, model[0].bias: labels}
    optimizer = TiedOptimizer(build_optimizer(model), ties)
    tied, tied_rows = accuracy(model, digits), model[0].weight.detach().clone()
    train(model, optimizer, digits, FINE_TUNE_EPOCHS, progress)

    # The rows are equal to the last bit, and the merged network computes the same up to rounding.
    drift = optimizer.tie_drift()
    assert drift == 0.0, f"the tied rows drifted apart by {drift}"
    assert len(model[0].weight.unique(dim=0)) == groups
    merged = merge_neurons(model, labels)
    images = digits.test_images
    torch.testing.assert_close(merged(images), model(images), rtol=1e-4, atol=1e-4)

    # As many epochs as the tied network had in total.
    rival = build_network(groups)
    train(rival, build_optimizer(rival), digits, EPOCHS + FINE_TUNE_EPOCHS, progress)

    return Run(
        groups=groups,
        untied=accuracy(trained, digits),
        tied=tied,
        tuned=accuracy(model, digits),
        scratch=accuracy(rival, digits),
        drift=drift,
        labels=labels,
        untied_rows=trained[0].weight.detach(),
        tied_rows=tied_rows,
        tuned_rows=model[0].weight.detach(),
    )


# %%
# All seeds, all numbers of groups
# --------------------------------


def run_seed(seed: int, progress: tqdm) -> list[Run]:
    """Train one network, and tie it into each number of groups."""
    torch.manual_seed(seed)
    digits = split_digits(seed)
    trained = build_network(HIDDEN)
    train(trained, build_optimizer(trained), digits, EPOCHS, progress)
    return [tie_and_fine_tune(trained, groups, digits, seed, progress) for groups in GROUPS]


epochs_per_seed = EPOCHS + len(GROUPS) * (FINE_TUNE_EPOCHS + EPOCHS + FINE_TUNE_EPOCHS)
# With `disable=None`, the bar appears only on a terminal, and does not fill log files.
with tqdm(
    desc="training",
    total=args.seeds * epochs_per_seed,
    unit="epoch",
    disable=None,
) as progress:
    runs = [run for seed in range(args.seeds) for run in run_seed(seed, progress)]


# %%
# The table
# ---------
# Mean and standard deviation over the seeds. The drift is the largest of all seeds, and it is
# exactly zero: the rows of a group are equal bit for bit.
#
# Tying into 32 groups or more costs about one point of accuracy at most. Tying into fewer costs more,
# and fine-tuning the tied network recovers most of it. A small network trained from scratch reaches
# the same accuracy: on a task this easy, tying finds no better small network, but it gets there from
# a network that is already trained.


class Curve(NamedTuple):
    """Mean and standard deviation over the seeds, each ``[len(GROUPS)]``."""

    mean: Tensor
    std: Tensor


def curve(field: str) -> Curve:
    """Return an accuracy for each number of groups."""
    by_groups = [[getattr(run, field) for run in runs if run.groups == k] for k in GROUPS]
    values = torch.tensor(by_groups)
    mean = values.mean(dim=1)
    # The standard deviation of a single seed is undefined.
    return Curve(mean, values.std(dim=1) if args.seeds > 1 else torch.full_like(mean, torch.nan))


def print_table() -> None:
    """Print a line for each number of groups."""
    columns = {
        "before tying": curve("untied"),
        "right after": curve("tied"),
        "fine-tuned": curve("tuned"),
        "from scratch": curve("scratch"),
    }
    print(f"Test accuracy in %, {HIDDEN} neurons tied to fewer distinct rows; seeds: {args.seeds}")
    print()
    print("rows", *(f"{name:>13}" for name in columns), "  drift")
    for i, groups in enumerate(GROUPS):
        cells = (f"{c.mean[i]:7.1f} ± {c.std[i]:3.1f}" for c in columns.values())
        drift = max(run.drift for run in runs if run.groups == groups)
        print(f"{groups:4d}", *cells, f"{drift:7g}")


print_table()


# %%
# The figure
# ----------
# The left panel shows rows of the first layer as images, with one line for each group of one network:
# some of its members as trained, from the nearest to the mean to the farthest, then the row that they
# all share. Purple is negative and green positive; the colours of each line are scaled to the largest
# weight of the fine-tuned row. The right panel shows the accuracy.

SHOWN_GROUPS = 8
SHOWN_MEMBERS = 5
PITCH = 1.12
TIED_X = SHOWN_MEMBERS * PITCH + 0.5
TUNED_X = TIED_X + 1.6
TIED_COLOR, TUNED_COLOR, SCRATCH_COLOR = "#D55E00", "#0072B2", "#555555"


def draw_row(
    axes: Axes,
    row: Tensor,
    corner: tuple[float, float],
    limit: float,
    frame: str,
) -> None:
    """Draw a weight row as an image of unit size, with its upper left corner at ``corner``."""
    x, y = corner
    axes.imshow(row.view(8, 8), cmap="PRGn", vmin=-limit, vmax=limit, extent=(x, x + 1, y + 1, y))
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=frame, linewidth=1.3))


def draw_arrow(axes: Axes, x: float, y: float) -> None:
    """Draw a short arrow to the left edge of an image at ``x``."""
    style = {"arrowstyle": "->", "color": "#444444", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(x - 0.09, y + 0.5), xytext=(x - 0.51, y + 0.5), arrowprops=style)


def draw_groups(axes: Axes, run: Run) -> None:
    """Draw the groups, largest first: members as trained, the shared row, the fine-tuned shared row."""
    sizes = run.labels.bincount()
    for line, group in enumerate(sizes.argsort(descending=True)):
        members = (run.labels == group).nonzero()[:, 0]
        tied, tuned = run.tied_rows[members[0]], run.tuned_rows[members[0]]
        order = (run.untied_rows[members] - tied).norm(dim=1).argsort()
        evenly = torch.linspace(0, len(members) - 1, SHOWN_MEMBERS).round().long()
        limit = tuned.abs().max().item()

        y = line * PITCH
        axes.text(-0.25, y + 0.5, f"{sizes[group]}", ha="right", va="center", fontsize=9)
        for i, member in enumerate(members[order[evenly]]):
            draw_row(axes, run.untied_rows[member], (i * PITCH, y), limit, frame="#cccccc")
        draw_arrow(axes, TIED_X, y)
        draw_row(axes, tied, (TIED_X, y), limit, frame=TIED_COLOR)
        draw_arrow(axes, TUNED_X, y)
        draw_row(axes, tuned, (TUNED_X, y), limit, frame=TUNED_COLOR)

    some = f"{SHOWN_MEMBERS} of them as trained,\nfrom typical to unusual"
    headings = (
        (-0.25, "right", "black", "neurons"),
        (SHOWN_MEMBERS * PITCH / 2, "center", "black", some),
        (TIED_X + 0.5, "center", TIED_COLOR, "right after\ntying"),
        (TUNED_X + 0.5, "center", TUNED_COLOR, "fine-\ntuned"),
    )
    for x, side, color, text in headings:
        axes.text(x, -0.2, text, color=color, ha=side, va="bottom", fontsize=9)
    axes.set(xlim=(-1.7, TUNED_X + 1.1), ylim=(len(sizes) * PITCH, -1.2))
    axes.set_title(f"One network's {run.groups} groups, weights as images", loc="left")
    axes.set_anchor("N")
    axes.axis("off")


def draw_accuracy(axes: Axes) -> None:
    """Draw the accuracy against the number of distinct rows, with labels at the lines."""
    untied, tied, tuned, scratch = map(curve, ("untied", "tied", "tuned", "scratch"))
    reference = untied.mean[0].item()
    axes.axhline(reference, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(HIDDEN, reference, "o", color="black", markersize=5)
    for line, color in ((tied, TIED_COLOR), (tuned, TUNED_COLOR)):
        low, high = line.mean - line.std, line.mean + line.std
        axes.fill_between(GROUPS, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(GROUPS, line.mean, color=color, linewidth=2, marker="o", markersize=5)
    axes.plot(GROUPS, scratch.mean, "D", color=SCRATCH_COLOR, markerfacecolor="none", markersize=8)

    axes.text(HIDDEN, reference + 0.9, f"untied, {reference:.1f} %", ha="right", va="bottom")
    axes.text(GROUPS[0], 95, "fine-tuned", color=TUNED_COLOR, fontweight="bold")
    axes.text(9.2, 67, "right after tying", color=TIED_COLOR, fontweight="bold")
    axes.text(17, 88, "◇ as many neurons, trained from scratch", color=SCRATCH_COLOR)

    axes.set_xscale("log", base=2)
    axes.set_xticks((*GROUPS, HIDDEN), [str(rows) for rows in (*GROUPS, HIDDEN)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(top=101.5)
    axes.set_xlabel(f"distinct rows among the {HIDDEN} neurons")
    axes.set_ylabel("test accuracy (%)")
    spread = "" if args.seeds == 1 else f": mean ± standard deviation of {args.seeds} seeds"
    axes.set_title(f"Accuracy{spread}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def draw_figure() -> Figure:
    """Draw both panels, and a title with the numbers of these runs."""
    figure = plt.figure(figsize=(10.5, 5.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    draw_groups(left, next(run for run in runs if run.groups == SHOWN_GROUPS))
    draw_accuracy(right)

    shown = GROUPS.index(SHOWN_GROUPS)
    untied, tied, tuned = (curve(field).mean[shown] for field in ("untied", "tied", "tuned"))
    figure.suptitle(
        f"{HIDDEN} neurons tied into {SHOWN_GROUPS} groups: accuracy falls from {untied:.1f} % to "
        f"{tied:.1f} %, and fine-tuning lifts it to {tuned:.1f} %",
        fontweight="bold",
    )
    return figure


figure = draw_figure()
if args.output:
    figure.savefig(args.output, dpi=130)
    print(f"\nFigure written to {args.output}")
