r"""
A dense network that is a convolutional one
===========================================

A stack of linear layers under ties is a convolutional network, and learns what one learns.

A convolution is a dense layer with two restrictions. Its weight matrix is zero wherever an output does
not see an input, and the entries that are left repeat: each output position applies the same kernel. This
example takes a plain stack of :class:`torch.nn.Linear` layers, 40 -> 475 -> 250 -> 125 -> 10, and imposes
both restrictions by ties: the entries that a kernel shares are one group each, and all others are pinned at
zero by the scale 0. The model stays a stack of ``Linear`` layers; only the optimizer knows.

The labels come from :func:`tieopt.patterns.convolution`, and the layers become

.. code-block:: text

    Linear(40, 475)   Conv1d(1, 25, 5, stride=2, padding=1)    40 positions ->      25 x 19
    Linear(475, 250)  Conv1d(25, 25, 3, stride=2, padding=1)        25 x 19 ->      25 x 10
    Linear(250, 125)  Conv1d(25, 25, 3, stride=2, padding=1)        25 x 10 ->      25 x  5
    Linear(125, 10)   not tied

Two statements are checked.

1. *It is the convolutional network.* Started from the same values, the tied dense network follows the real
   ``Conv1d`` network step by step: over 20 steps of Adam in float64 the losses differ by less than 1e-9, and
   every pinned entry is exactly zero. ``reduction="sum"`` makes the gradients those of the kernel, which
   autograd adds up over all positions.
2. *It learns what one learns.* MNIST-1D has digits drawn as 40 numbers, at random places. Greydanus and Kobak,
   "Scaling Down Deep Learning with MNIST-1D" (ICML 2024), report 94 % test accuracy for this convolutional
   network and 68 % for a smaller dense one. The tied dense network is compared with the same network without ties,
   once from PyTorch's usual start and once from the very values that the tied one starts from. All are trained
   for as many steps. Each has the learning rate, of four, that suits it best on the very signals it is tested
   on, so that all accuracies are a little too good.

It takes about three minutes on one core and needs mnist1d, matplotlib and tqdm; the data are generated, not
downloaded. Run it as ``python plot_dense_as_convolution.py``; ``--seeds 1`` is a quicker try.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn
from tqdm import tqdm

from tieopt import Tie, TiedOptimizer, patterns

BATCH = 100
STEPS = 6000
# Each network has the rate that suits it best of 2e-3, 5e-3, 1e-2 and 2e-2, by its accuracy on the held-out signals.
TIED_RATE, UNTIED_RATE = 2e-2, 5e-3
EVALUATE_EVERY = 250
CHECKED_STEPS = 20

# Test accuracies in % from Greydanus and Kobak, "Scaling Down Deep Learning with MNIST-1D", 2024.
PUBLISHED_CONVOLUTIONAL, PUBLISHED_DENSE = 94, 68

# The matrices are small: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


# %%
# The data
# --------
# 4000 signals to train on and 1000 held out, made by the recipe and the seed of the paper.


class Signals(NamedTuple):
    """Signals ``[n, 40]`` and their digits ``[n]``, to train on and held out."""

    train_signals: Tensor
    train_digits: Tensor
    test_signals: Tensor
    test_digits: Tensor


def make_signals() -> Signals:
    """MNIST-1D in float64, in which it comes."""
    data = make_dataset(get_dataset_args())
    return Signals(*(torch.as_tensor(data[key]) for key in ("x", "y", "x_test", "y_test")))


# %%
# The three networks
# ------------------
# The convolutional one is here for its values and to be compared with.


def build_convolutional() -> nn.Sequential:
    """The convolutional network of the paper."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        nn.Conv1d(1, 25, 5, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(125, 10),
    )


def build_dense() -> nn.Sequential:
    """The dense network with as many activations, from PyTorch's usual start."""
    return nn.Sequential(
        nn.Linear(40, 475),
        nn.ReLU(),
        nn.Linear(475, 250),
        nn.ReLU(),
        nn.Linear(250, 125),
        nn.ReLU(),
        nn.Linear(125, 10),
    )


@torch.no_grad()
def unroll(convolutional: nn.Sequential) -> tuple[nn.Sequential, list[Tie]]:
    """The dense network that computes the same, and the ties that keep it so.

    The labels of a weight are positions in the flattened kernels, with one more for the zeros.
    """
    dense = build_dense().to(convolutional[-1].weight.dtype)
    linears = [layer for layer in dense if isinstance(layer, nn.Linear)]
    convolutions = [layer for layer in convolutional if isinstance(layer, nn.Conv1d)]
    ties, length = [], 40
    for linear, conv in zip(linears, convolutions, strict=False):
        labels, scale = patterns.convolution(conv, length)
        bias_labels = patterns.convolution_bias(conv, length)
        linear.weight.copy_(nn.functional.pad(conv.weight.flatten(), (0, 1))[labels])
        linear.bias.copy_(conv.bias[bias_labels])
        ties += [Tie(linear.weight, labels, scale=scale), Tie(linear.bias, bias_labels)]
        length = len(bias_labels) // conv.out_channels
    linears[-1].load_state_dict(convolutional[-1].state_dict())
    return dense, ties


def build_optimizer(model: nn.Module, ties: list[Tie]) -> TiedOptimizer:
    """Adam on the dense network, with the gradients of the kernels; without ties it is Adam as it always is."""
    rate = TIED_RATE if ties else UNTIED_RATE
    return TiedOptimizer(torch.optim.Adam(model.parameters(), lr=rate), ties, reduction="sum")


def pinned(ties: list[Tie]) -> Tensor:
    """The entries that are pinned at zero, of all ties."""
    parts = [tie.parts[0] for tie in ties]
    return torch.cat([part.param.detach()[part.scale == 0] for part in parts if part.scale is not None])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, signals: Tensor, digits: Tensor) -> float:
    """One step of training, and the loss before it; with ties or without, it is the same."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(signals), digits)
    loss.backward()
    optimizer.step()
    return loss.item()


# %%
# First statement: it is the convolutional network
# ------------------------------------------------


def check_equivalence(signals: Signals) -> float:
    """Trains both side by side in float64; returns the largest difference of their losses."""
    torch.manual_seed(0)
    convolutional = build_convolutional().double()
    dense, ties = unroll(convolutional)
    optimizers = {dense: build_optimizer(dense, ties)}
    optimizers[convolutional] = torch.optim.Adam(convolutional.parameters(), lr=TIED_RATE)

    differences = []
    for _ in range(CHECKED_STEPS):
        batch = torch.randint(len(signals.train_signals), (BATCH,))
        first, second = (
            step(model, optimizer, signals.train_signals[batch], signals.train_digits[batch])
            for model, optimizer in optimizers.items()
        )
        differences.append(abs(first - second))
        assert (pinned(ties) == 0).all(), "a pinned entry is not zero"
    assert max(differences) < 1e-9, f"the losses differ by {max(differences)}"

    # Not the losses alone: unrolled once more, the trained kernels are the trained dense weights.
    for trained, expected in zip(dense.parameters(), unroll(convolutional)[0].parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=0, atol=1e-9)
    return max(differences)


# %%
# Second statement: it learns what one learns
# -------------------------------------------
# The same start does not make the difference, the ties do: without them the network leaves the convolutions that
# it starts from, learns the training signals by heart and reads the others little better than from any start.


class Run(NamedTuple):
    """What one training gave: test accuracy in % over the steps, and the first weight before and after."""

    accuracy: list[float]
    values: int
    start: Tensor
    end: Tensor


VARIANTS = {
    "tied": "dense, tied as a convolution",
    "untied": "dense, not tied",
    "same start": "dense, not tied, same start",
}


@torch.no_grad()
def test_accuracy(model: nn.Module, signals: Signals) -> float:
    """The share of held-out signals that the model reads correctly, in percent."""
    hits = model(signals.test_signals).argmax(dim=1) == signals.test_digits
    return 100 * hits.double().mean().item()


def train(variant: str, seed: int, signals: Signals, progress: tqdm) -> Run:
    """Trains one dense network; the variants of a seed see the same batches."""
    torch.manual_seed(seed)
    dense, ties = unroll(build_convolutional())
    if variant == "untied":
        dense, ties = build_dense(), []
    elif variant == "same start":
        ties = []
    optimizer = build_optimizer(dense, ties)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    start = dense[0].weight.detach().clone()

    generator = torch.Generator().manual_seed(seed)
    accuracy = [test_accuracy(dense, signals)]
    for number in range(1, STEPS + 1):
        batch = torch.randint(len(signals.train_signals), (BATCH,), generator=generator)
        step(dense, optimizer, signals.train_signals[batch], signals.train_digits[batch])
        scheduler.step()
        if number % EVALUATE_EVERY == 0:
            accuracy.append(test_accuracy(dense, signals))
        progress.update()

    assert optimizer.tie_drift() == 0
    assert not ties or (pinned(ties) == 0).all()
    return Run(accuracy, count_values(dense, ties), start, dense[0].weight.detach())


def count_values(model: nn.Module, ties: list[Tie]) -> int:
    """How many values the network learns: all, but one for each group, and none for what is pinned."""
    total = sum(param.numel() for param in model.parameters())
    for part in (tie.parts[0] for tie in ties):
        learned = part.groups if part.scale is None else part.groups[part.scale != 0]
        total += len(learned.unique()) - part.groups.numel()
    return total


Runs = dict[str, list[Run]]


def curve(runs: list[Run]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the accuracy over the seeds, ``[evaluations]`` each."""
    accuracy = torch.tensor([run.accuracy for run in runs])
    mean = accuracy.mean(dim=0)
    # The standard deviation of a single seed is undefined.
    return mean, accuracy.std(dim=0) if len(runs) > 1 else torch.full_like(mean, torch.nan)


def print_table(runs: Runs, difference: float) -> None:
    """A line for each network."""
    seeds = len(runs["tied"])
    print(f"Largest difference of the losses, tied dense network and Conv1d, {CHECKED_STEPS} steps: {difference:.1e}")
    print(f"\nTest accuracy in % after {STEPS} steps on MNIST-1D; seeds: {seeds}\n")
    print(f"{'network':34s} {'values':>7s} {'accuracy':>13s}")
    for variant, description in VARIANTS.items():
        mean, std = curve(runs[variant])
        print(f"{description:34s} {runs[variant][0].values:7d} {mean[-1]:7.1f} ± {std[-1]:3.1f}")
    for description, published in (("convolutional", PUBLISHED_CONVOLUTIONAL), ("dense", PUBLISHED_DENSE)):
        print(f"{description + ', published (2024)':34s} {'':7s} {published:7.0f}")


# %%
# The figure
# ----------

COLORS = {"tied": "#0072B2", "untied": "#D55E00", "same start": "#555555"}
SHOWN_CHANNELS = 5


def draw_accuracy(axes: Axes, runs: Runs) -> None:
    """Accuracy over the steps, labelled on the lines."""
    steps = torch.arange(0, STEPS + 1, EVALUATE_EVERY)
    for published in (PUBLISHED_CONVOLUTIONAL, PUBLISHED_DENSE):
        axes.axhline(published, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for variant, color in COLORS.items():
        mean, std = curve(runs[variant])
        axes.fill_between(steps, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=color, linewidth=2)

    for description, published in (("convolutional", PUBLISHED_CONVOLUTIONAL), ("dense", PUBLISHED_DENSE)):
        axes.text(STEPS, published - 0.8, f"published, {description}: {published} %", ha="right", va="top")
    for variant, offset in (("tied", 0.9), ("same start", 2.3), ("untied", -1.1)):
        end, side = curve(runs[variant])[0][-1].item(), "bottom" if offset > 0 else "top"
        text = f"{VARIANTS[variant]}: {end:.1f} %"
        axes.text(STEPS, end + offset, text, color=COLORS[variant], fontweight="bold", ha="right", va=side)

    axes.set(xlim=(0, STEPS), ylim=(50, 100), xlabel="steps of Adam", ylabel="test accuracy (%)")
    spread = f": mean ± standard deviation of {len(runs['tied'])} seeds" if len(runs["tied"]) > 1 else ""
    axes.set_title(f"Accuracy{spread}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def draw_weight(axes: Axes, weight: Tensor, title: str, color: str) -> None:
    """The rows of the first channels as an image."""
    rows = weight[: 19 * SHOWN_CHANNELS]
    limit = rows.abs().max().item()
    axes.imshow(rows, cmap="PRGn", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_title(title, fontsize=10, color=color)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(color)


def draw_figure(runs: Runs) -> Figure:
    """The accuracies and four weight matrices, and the finding above them, in the numbers of these runs."""
    figure = plt.figure(figsize=(12, 5.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    left, *images = figure.subplots(1, 5, width_ratios=(3.4, 1, 1, 1, 1))
    draw_accuracy(left, runs)

    tied, untied = runs["tied"][0], runs["untied"][0]
    draw_weight(images[0], untied.start, "not tied\nstart", COLORS["untied"])
    draw_weight(images[1], untied.end, "not tied\ntrained", COLORS["untied"])
    draw_weight(images[2], tied.start, "tied\nstart", COLORS["tied"])
    draw_weight(images[3], tied.end, "tied\ntrained", COLORS["tied"])
    images[0].set_ylabel(f"first {SHOWN_CHANNELS} of 25 channels, 19 outputs each")
    for axes in images:
        axes.set_xlabel("40 inputs")

    end = {variant: curve(runs[variant])[0][-1].item() for variant in runs}
    figure.suptitle(
        f"A dense network tied as a convolution reads {end['tied']:.1f} % of MNIST-1D, "
        f"and {end['untied']:.1f} % without ties",
        fontweight="bold",
    )
    return figure


# %%
# The result
# ----------
# In the figure left, the accuracy on the held-out signals. Right, a part of the first layer's weights before and after
# training: the 19 outputs of each of the first channels, one below the other. Tied, each channel is a band.
# Purple is negative and green positive, each matrix scaled to its largest entry.


def parse_arguments() -> argparse.Namespace:
    """How many seeds, and where the figure goes."""
    # Galleries and notebooks run this without a file, and show the figure themselves.
    script = globals().get("__file__")
    figure = script and Path(script).resolve().with_suffix(".png")
    parser = argparse.ArgumentParser(description="Tie a dense network into a convolutional one.")
    parser.add_argument("--seeds", type=int, default=3, help="how many repetitions (default: 3)")
    parser.add_argument("--output", type=Path, default=figure, help="path of the figure (default: next to this script)")
    # In a notebook, the arguments are those of its kernel.
    return parser.parse_args([] if "kernel_launcher" in Path(sys.argv[0]).name else None)


def main() -> None:
    """Checks, trains, prints and draws."""
    args = parse_arguments()
    signals = make_signals()
    difference = check_equivalence(signals)

    single = signals._replace(train_signals=signals.train_signals.float(), test_signals=signals.test_signals.float())
    # With `disable=None`, the bar appears only on a terminal, and does not fill log files.
    with tqdm(desc="training", total=args.seeds * len(VARIANTS) * STEPS, unit="step", disable=None) as progress:
        runs = {variant: [train(variant, seed, single, progress) for seed in range(args.seeds)] for variant in VARIANTS}

    print_table(runs, difference)
    worst_tied = min(run.accuracy[-1] for run in runs["tied"])
    best_untied = max(run.accuracy[-1] for run in runs["untied"] + runs["same start"])
    assert worst_tied > best_untied + 10, f"tied {worst_tied} %, not tied {best_untied} %"
    figure = draw_figure(runs)
    if args.output:
        figure.savefig(args.output, dpi=130)
        print(f"\nFigure written to {args.output}")


if __name__ == "__main__":
    main()
