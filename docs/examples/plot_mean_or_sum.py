r"""
Mean or sum of the gradients: when it matters
=============================================

If all groups have one size, training on the mean of the members' gradients equals training on their sum with other
settings.

The gradient of a shared value is the *sum* of its members' gradients, which autograd computes for a parameter that is
used several times. tieopt's default is their *mean*. For groups of :math:`m` members, the sum is :math:`m` times the
mean. The effect depends on the optimizer:

.. list-table::
   :header-rows: 1

   * - optimizer
     - settings with the sum: learning rate :math:`\eta`, decay :math:`\lambda`
     - equivalent settings with the mean
   * - SGD, with momentum or without
     - :math:`\eta`
     - :math:`m \eta`
   * - SGD with weight decay that is added to the gradient
     - :math:`\eta, \lambda`
     - :math:`m \eta, \lambda / m`
   * - Adam, RMSprop, Adagrad, ...
     - :math:`\eta, \epsilon`
     - :math:`\eta, \epsilon / m`
   * - Adam with weight decay that is added to the gradient
     - :math:`\eta, \lambda, \epsilon`
     - :math:`\eta, \lambda / m, \epsilon / m`
   * - AdamW, whose weight decay is decoupled
     - :math:`\eta, \lambda, \epsilon`
     - :math:`\eta, \lambda, \epsilon / m`

Two statements are checked, on a perceptron 64-30-10 whose hidden neurons are tied in groups of six.

1. *With these settings, mean and sum are equivalent*: after 200 steps in float64, the weights differ only by rounding.
2. *With equal settings they are not*, except for Adam and AdamW, where only the effect of :math:`\epsilon` differs.

The table requires groups of one size. If the sizes differ, no learning rate turns the mean into the sum: the steps of
the sum grow with the size of the group, and those of the mean do not. The last line of the figure has groups of 1, 3,
10 and 16. For the mean, nine learning rates up to 16 times as large are tried, and the closest to the sum is shown.

Only the hidden layer is trained: the gradients of untied weights are the same with the mean and the sum, and no single
learning rate would suit both. There are no published figures to compare with; all of this is arithmetic.

It takes about a minute on one core and needs scikit-learn, matplotlib and tqdm. Run it as
``python plot_mean_or_sum.py``; ``--seeds 1`` is a quicker try.
"""

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from tieopt import TiedOptimizer

HIDDEN = 30
STEPS = 200
BATCH = 64
# Groups of hidden neurons, of one size or of several sizes.
EVEN = [list(range(start, start + 6)) for start in range(0, HIDDEN, 6)]
UNEVEN = [[0], [1, 2, 3], list(range(4, 14)), list(range(14, 30))]
# Relative differences of weights: rounding is below the first bound, real differences are above the second.
ROUNDING, DIFFERENCE = 1e-9, 1e-3

# The matrices are small: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


# %%
# The comparisons
# ---------------


class Comparison(NamedTuple):
    """An optimizer with settings for the sum, and the equivalent settings for the mean.

    Attributes:
        inner: class of the optimizer.
        settings: settings with the sum, and with the mean when settings are equal.
        equivalent: returns the different settings with the mean for a size of groups.
        groups: the ties.
    """

    inner: type[torch.optim.Optimizer]
    settings: dict[str, float]
    equivalent: Callable[[float], dict[str, float]]
    groups: list[list[int]] = EVEN

    @property
    def factors(self) -> list[float]:
        """Factors to try between sum and mean: the size of the groups, or nine factors from 1 to 16."""
        sizes = {len(group) for group in self.groups}
        return [*map(float, sizes)] if len(sizes) == 1 else [2 ** (step / 2) for step in range(9)]


SGD, ADAM = {"lr": 0.02}, {"lr": 1e-3, "eps": 1e-8}
COMPARISONS = {
    "SGD": Comparison(torch.optim.SGD, SGD, lambda m: {"lr": SGD["lr"] * m}),
    "SGD, momentum 0.9": Comparison(
        torch.optim.SGD, {"lr": 0.005, "momentum": 0.9}, lambda m: {"lr": 0.005 * m}
    ),
    "SGD, weight decay": Comparison(
        torch.optim.SGD, {**SGD, "weight_decay": 0.1}, lambda m: {"lr": SGD["lr"] * m, "weight_decay": 0.1 / m}
    ),
    "Adam": Comparison(torch.optim.Adam, ADAM, lambda m: {"eps": ADAM["eps"] / m}),
    "Adam, weight decay": Comparison(
        torch.optim.Adam, {**ADAM, "weight_decay": 0.1}, lambda m: {"weight_decay": 0.1 / m, "eps": ADAM["eps"] / m}
    ),
    "AdamW": Comparison(torch.optim.AdamW, {**ADAM, "weight_decay": 0.1}, lambda m: {"eps": ADAM["eps"] / m}),
    "SGD, groups of several sizes": Comparison(torch.optim.SGD, SGD, lambda m: {"lr": SGD["lr"] * m}, UNEVEN),
}  # fmt: skip
# Optimizers for which equal settings give nearly the same result.
SCALE_FREE = ("Adam", "AdamW")


class Run(NamedTuple):
    """Results of one training run: the tied weights and the losses."""

    weight: Tensor
    losses: list[float]


@cache
def load_images() -> tuple[Tensor, Tensor]:
    """Load all images ``[n, 64]`` with pixels from -1 to 1, and their digits ``[n]``."""
    images, digits = map(torch.as_tensor, load_digits(return_X_y=True))
    return images.double() / 8 - 1, digits


def train(comparison: Comparison, reduction: str, settings: dict[str, Any], seed: int) -> Run:
    """Train the hidden layer in float64; runs with the same seed have the same start and batches."""
    torch.manual_seed(seed)
    images, digits = load_images()
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).double()
    # The last layer is not trained, because it is not tied.
    hidden, last = model[0], model[2].requires_grad_(False)
    with torch.no_grad():
        last.weight.mul_(3)
    ties = {hidden.weight: comparison.groups, hidden.bias: comparison.groups}
    inner = comparison.inner(hidden.parameters(), **{**comparison.settings, **settings})
    optimizer = TiedOptimizer(inner, ties, reduction=reduction)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), digits[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.tie_drift() == 0
    return Run(hidden.weight.detach(), losses)


class Result(NamedTuple):
    """Runs of one comparison and seed: with the sum, and with the mean with equal and with equivalent settings."""

    sum: Run
    equal: Run
    equivalent: Run

    def distance(self, kind: str) -> float:
        """Return the distance between the weights of the mean and of the sum, relative to those of the sum."""
        other: Run = getattr(self, kind)
        return ((other.weight - self.sum.weight).norm() / self.sum.weight.norm()).item()


def compare(comparison: Comparison, seed: int) -> Result:
    """Train with the sum and with the mean, and keep the equivalent settings that come closest to the sum."""
    summed, equal = train(comparison, "sum", {}, seed), train(comparison, "mean", {}, seed)
    results = [
        Result(summed, equal, train(comparison, "mean", comparison.equivalent(factor), seed))
        for factor in comparison.factors
    ]
    return min(results, key=lambda result: result.distance("equivalent"))


Results = dict[str, list[Result]]


def check(results: Results) -> None:
    """Check both statements."""
    for name, own in results.items():
        for result in own:
            equal, equivalent = result.distance("equal"), result.distance("equivalent")
            if COMPARISONS[name].groups is EVEN:
                assert equivalent < ROUNDING, f"{name}: equivalent settings differ by {equivalent}"
            else:
                assert equivalent > DIFFERENCE, f"{name}: one learning rate comes as close as {equivalent}"
            if name in SCALE_FREE:
                assert equal < DIFFERENCE, f"{name}: equal settings differ by {equal}"
            else:
                assert equal > DIFFERENCE, f"{name}: equal settings differ by {equal} only"


def print_table(results: Results) -> None:
    """Print a line for each comparison, with the largest difference of any seed."""
    print(f"Relative difference of the weights, mean and sum, {STEPS} steps; largest of the seeds\n")
    print(f"{'optimizer':30s} {'equal settings':>15s} {'equivalent':>16s}")
    for name, own in results.items():
        equal, equivalent = (max(result.distance(kind) for result in own) for kind in ("equal", "equivalent"))
        print(f"{name:30s} {equal:15.1e} {equivalent:16.1e}")
    print("\nFor groups of several sizes: the learning rate that comes closest")


# %%
# The figure
# ----------

EQUAL, EQUIVALENT = "#D55E00", "#0072B2"


def draw_differences(axes: Axes, results: Results) -> None:
    """Draw a line for each comparison, with a mark for each seed."""
    for at, own in enumerate(results.values()):
        for kind, color in (("equal", EQUAL), ("equivalent", EQUIVALENT)):
            # A logarithmic axis cannot show a distance of zero.
            distances = [max(result.distance(kind), 1e-17) for result in own]
            axes.plot(distances, [at] * len(own), "o", color=color, alpha=0.6, markeredgewidth=0, markersize=8)
    axes.plot([], [], "o", color=EQUAL, label="equal settings")
    axes.plot([], [], "o", color=EQUIVALENT, label="equivalent settings, or the closest")
    axes.axvspan(1e-18, ROUNDING, color="#eeeeee", zorder=0)
    axes.text(ROUNDING, -0.75, "rounding ", ha="right", va="center", color="#777777")
    axes.set_yticks(range(len(results)), list(results))
    axes.set(
        xscale="log", xlim=(1e-18, 30), ylim=(len(results) - 0.4, -1.2), xlabel="relative difference of the weights"
    )
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def draw_losses(axes: Axes, result: Result) -> None:
    """Draw the smoothed losses of SGD."""
    smooth = torch.ones(10, dtype=torch.float64) / 10
    size = len(EVEN[0])
    lines = {
        f"mean, learning rate {SGD['lr']}": (result.equal, EQUAL, "-"),
        f"sum, learning rate {SGD['lr']}": (result.sum, "black", "-"),
        f"mean, learning rate {SGD['lr'] * size}": (result.equivalent, EQUIVALENT, (0, (2, 2))),
    }
    for label, (run, color, style) in lines.items():
        losses = torch.tensor(run.losses, dtype=torch.float64).unfold(0, 10, 1) @ smooth
        axes.plot(losses, color=color, linestyle=style, linewidth=2, label=label)
    axes.set(xlabel="steps of SGD", ylabel="training loss, mean of 10 steps", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_figure(results: Results) -> Figure:
    """Draw the differences and the losses, and a title with the numbers of these runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(3, 2))
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    draw_differences(left, results)
    draw_losses(right, results["SGD"][0])
    apart = max(result.distance("equal") for result in results["SGD"])
    figure.suptitle(
        f"Mean and sum: SGD ends {100 * apart:.0f} % apart; with {len(EVEN[0])} times the learning rate, "
        "or with Adam, they agree",
        fontweight="bold",
    )
    return figure


# %%
# The result
# ----------
# The left panel shows how far the weights that were trained with the mean are from those trained with the sum, with a
# mark for each seed. The right panel shows SGD with equal settings: with the mean, it is slower by the size of the
# groups.


def parse_arguments() -> argparse.Namespace:
    """Parse the number of seeds and the path of the figure."""
    # Galleries and notebooks run this without a file, and show the figure themselves.
    script = globals().get("__file__")
    figure = script and Path(script).resolve().with_suffix(".png")
    parser = argparse.ArgumentParser(description="Compare the mean of the members' gradients with their sum.")
    parser.add_argument("--seeds", type=int, default=5, help="how many repetitions (default: 5)")
    parser.add_argument("--output", type=Path, default=figure, help="path of the figure (default: next to this script)")
    # In a notebook, the arguments are those of its kernel.
    return parser.parse_args([] if "kernel_launcher" in Path(sys.argv[0]).name else None)


def main() -> None:
    """Train, check, print and draw."""
    args = parse_arguments()
    # With `disable=None`, the bar appears only on a terminal, and does not fill log files.
    with tqdm(desc="comparing", total=args.seeds * len(COMPARISONS), disable=None) as progress:
        results: Results = {}
        for name, comparison in COMPARISONS.items():
            results[name] = []
            for seed in range(args.seeds):
                results[name].append(compare(comparison, seed))
                progress.update()

    print_table(results)
    check(results)
    figure = draw_figure(results)
    if args.output:
        figure.savefig(args.output, dpi=130)
        print(f"\nFigure written to {args.output}")


if __name__ == "__main__":
    main()
