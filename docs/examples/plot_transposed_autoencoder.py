r"""
An autoencoder whose decoder is its encoder transposed
======================================================

One tie across two layers keeps a decoder equal to the transposed encoder, and halves the number of weights.

An autoencoder compresses an image into a short code and reconstructs it from the code. Here it has two layers:

.. math::

    c = \operatorname{relu}(W x + b), \qquad \hat x = V c + d

Row :math:`i` of :math:`W` is what number :math:`i` of the code looks for in the image, and column :math:`i` of
:math:`V` is what it draws. An old idea is to make them equal, :math:`V = W^\top` (Vincent et al., "Stacked
Denoising Autoencoders", JMLR 2010), which halves the number of weights.

With PyTorch alone, there is then no second layer, and a custom module calls ``linear(code, W.T)``. Here, model
and checkpoint keep their two ``Linear`` layers, and a tie across both makes them equal. Rows of one weight and
columns of the other with the same label are one group::

    Tie.join(Tie(encoder.weight, torch.arange(k)), Tie(decoder.weight, torch.arange(k), dim=1))

Two statements are checked: ``torch.equal(encoder.weight, decoder.weight.T)`` holds after every training run, and
in float64 the training follows that of a module with one shared weight that is used twice, to a relative 1e-9
over 50 steps of Adam. Then the example measures the cost of the tie: the reconstruction error on held-out digits
for codes of 2 to 48 numbers, tied and not tied. Both start from the same values, and only the tie differs.

It takes about a minute on one core and needs scikit-learn, matplotlib and tqdm. Run it as
``python plot_transposed_autoencoder.py``; ``--seeds 1`` is a quick try.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from tieopt import Tie, TiedOptimizer

PIXELS = 64
CODES = (2, 4, 8, 16, 24, 32, 48)
EPOCHS = 60
BATCH = 64
LEARNING_RATE = 1e-2
CHECKED_STEPS = 50

# The matrices are small: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


# %%
# The digits
# ----------
# 1797 images of 8 x 8 pixels, a quarter of them held out. Each seed draws its own split.


class Digits(NamedTuple):
    """Images ``[n, 64]`` for training and held out, and the held-out digits; ink is 1 and paper is 0."""

    train_images: Tensor
    test_images: Tensor
    test_digits: Tensor


def split_digits(seed: int) -> Digits:
    """Draw a stratified split."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, digits, test_size=0.25, stratify=digits, random_state=seed)
    train_images, test_images, _, test_digits = map(torch.as_tensor, parts)
    return Digits(train_images.float(), test_images.float(), test_digits)


# %%
# The autoencoder and its tie
# ---------------------------


def build_autoencoder(code: int) -> nn.Sequential:
    """Build encoder and decoder; tied or not, the decoder starts as the transposed encoder."""
    encoder, decoder = nn.Linear(PIXELS, code), nn.Linear(code, PIXELS)
    with torch.no_grad():
        decoder.weight.copy_(encoder.weight.T)
    return nn.Sequential(encoder, nn.ReLU(), decoder)


def tie(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> TiedOptimizer:
    """Tie the decoder to the transposed encoder; the gradients are those of one weight that is used twice."""
    encoder, _, decoder = model
    codes = torch.arange(encoder.out_features)
    transposed = Tie.join(Tie(encoder.weight, codes), Tie(decoder.weight, codes, dim=1))
    return TiedOptimizer(optimizer, transposed, reduction="sum")


def is_transposed(model: nn.Sequential) -> bool:
    """Return whether the decoder is the transposed encoder, bit for bit."""
    return torch.equal(model[0].weight, model[2].weight.T)


# %%
# The tied autoencoder is the one with a shared weight
# ----------------------------------------------------


class SharedAutoencoder(nn.Module):
    """An autoencoder without ties: a single weight, used twice."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.weight = nn.Parameter(model[0].weight.detach().clone())
        self.encoder_bias = nn.Parameter(model[0].bias.detach().clone())
        self.decoder_bias = nn.Parameter(model[2].bias.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        code = nn.functional.linear(images, self.weight, self.encoder_bias).relu()
        return nn.functional.linear(code, self.weight.T, self.decoder_bias)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    """Run one training step, which is the same with and without ties."""
    optimizer.zero_grad()
    nn.functional.mse_loss(model(images), images).backward()
    optimizer.step()


def check_equivalence(digits: Digits) -> float:
    """Train the tied and the shared weight side by side in float64, and return the largest difference."""
    torch.manual_seed(0)
    tied = build_autoencoder(16).double()
    shared = SharedAutoencoder(tied)
    optimizer = tie(tied, torch.optim.Adam(tied.parameters(), lr=LEARNING_RATE))
    shared_optimizer = torch.optim.Adam(shared.parameters(), lr=LEARNING_RATE)
    differences = []
    for batch in torch.randint(len(digits.train_images), (CHECKED_STEPS, BATCH)):
        images = digits.train_images[batch].double()
        step(tied, optimizer, images)
        step(shared, shared_optimizer, images)
        assert is_transposed(tied)
        torch.testing.assert_close(tied[0].weight, shared.weight, rtol=1e-9, atol=1e-12)
        differences.append((tied[0].weight - shared.weight).abs().max().item())
    return max(differences)


# %%
# The cost of the tie
# -------------------
# The error is the share of the variance of the held-out pixels that the reconstruction misses. Principal
# components, the best linear codes of a given size, are there for comparison; a code that cannot be negative does
# not reach them.
#
# The tied autoencoder has half of the values and misses about as much as the untied one, or slightly more with
# the longest codes. At equal numbers of values, the tied autoencoder is therefore far ahead: its code is almost
# twice as long. The untied autoencoder approaches the tie by itself, but does not reach it: the cosine of an encoder
# row and its decoder column is about 0.9.


class Run(NamedTuple):
    """Results of one training run: the error in %, the number of distinct values, and the model.

    ``likeness`` is the mean cosine of an encoder row and its decoder column.
    """

    error: float
    values: int
    likeness: float
    model: nn.Sequential


def reconstruction_error(reconstruction: Tensor, digits: Digits) -> float:
    """Return the percentage of the variance that the reconstruction misses."""
    missed = (reconstruction - digits.test_images).square().mean()
    return (100 * missed / (digits.test_images - digits.train_images.mean(dim=0)).square().mean()).item()


def count_values(model: nn.Sequential, tied: bool) -> int:
    """Return the number of distinct values that the network learns."""
    total = sum(param.numel() for param in model.parameters())
    return total - model[0].weight.numel() if tied else total


def train(code: int, tied: bool, seed: int, digits: Digits, progress: tqdm) -> Run:
    """Train one autoencoder; for a seed, tied and untied start from the same values and see the same batches."""
    torch.manual_seed(seed)
    model = build_autoencoder(code)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    if tied:
        optimizer = tie(model, optimizer)
    steps = EPOCHS * -(-len(digits.train_images) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(digits.train_images)).split(BATCH):
            step(model, optimizer, digits.train_images[batch])
            scheduler.step()
        progress.update()

    assert is_transposed(model) == tied
    with torch.no_grad():
        error = reconstruction_error(model(digits.test_images), digits)
        likeness = nn.functional.cosine_similarity(model[0].weight, model[2].weight.T).mean().item()
    return Run(error, count_values(model, tied), likeness, model)


def principal_components_error(code: int, digits: Digits) -> float:
    """Return the error of the same number of principal components."""
    components = PCA(code).fit(digits.train_images.numpy())
    codes = components.transform(digits.test_images.numpy())
    return reconstruction_error(torch.as_tensor(components.inverse_transform(codes)), digits)


class Results(NamedTuple):
    """All runs by code size and tie, and the errors of principal components by code size."""

    runs: dict[tuple[int, bool], list[Run]]
    principal: dict[int, list[float]]

    def curve(self, tied: bool, field: str = "error") -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation over the seeds, each ``[len(CODES)]``."""
        return mean_and_std([[getattr(run, field) for run in self.runs[code, tied]] for code in CODES])


def mean_and_std(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each row, which is NaN for a single seed."""
    values = torch.tensor(rows, dtype=torch.float64)
    mean = values.mean(dim=1)
    return mean, values.std(dim=1) if values.shape[1] > 1 else torch.full_like(mean, torch.nan)


def print_table(results: Results, difference: float) -> None:
    """Print a line for each code size."""
    print(f"Largest difference between tied and shared weight, {CHECKED_STEPS} steps: {difference:.1e}")
    print(f"\nReconstruction error on held-out digits in % of the variance; seeds: {len(results.principal[CODES[0]])}")
    print("Likeness: mean cosine of an encoder row and its decoder column\n")
    print("        --------- tied ---------   ------------- not tied -------------   principal")
    print("code    values        error        values        error        likeness   components")
    tied, untied = results.curve(tied=True), results.curve(tied=False)
    likeness, _ = results.curve(tied=False, field="likeness")
    for i, code in enumerate(CODES):
        principal = sum(results.principal[code]) / len(results.principal[code])
        print(
            f"{code:4d} {results.runs[code, True][0].values:9d} {tied[0][i]:9.2f} ± {tied[1][i]:4.2f}"
            f" {results.runs[code, False][0].values:11d} {untied[0][i]:9.2f} ± {untied[1][i]:4.2f}"
            f" {likeness[i]:12.2f} {principal:12.2f}"
        )


# %%
# The figure
# ----------

TIED_COLOR, UNTIED_COLOR, PRINCIPAL_COLOR = "#0072B2", "#D55E00", "#555555"
SHOWN_CODE = 16
SHOWN_FILTERS = 8


def draw_image(axes: Axes, image: Tensor, color: str, cmap: str = "Greys") -> None:
    """Draw 64 pixels or weights as a small framed image without ticks."""
    limit = image.abs().max().item() if cmap == "PRGn" else 1
    low = -limit if cmap == "PRGn" else 0
    axes.imshow(image.view(8, 8), cmap=cmap, vmin=low, vmax=limit, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(color)


@torch.no_grad()
def draw_reconstructions(panel: SubFigure, results: Results, digits: Digits) -> None:
    """Draw a held-out image of some digits, and the reconstructions of both autoencoders."""
    shown = digits.test_images[[int((digits.test_digits == digit).nonzero()[0]) for digit in range(SHOWN_FILTERS)]]
    columns = {
        "input": (shown, "black"),
        "tied": (results.runs[SHOWN_CODE, True][0].model(shown), TIED_COLOR),
        "not tied": (results.runs[SHOWN_CODE, False][0].model(shown), UNTIED_COLOR),
    }
    grid = panel.subplots(SHOWN_FILTERS, len(columns))
    for column, (name, (images, color)) in zip(grid.T, columns.items(), strict=True):
        column[0].set_title(name, color=color, fontsize=10)
        for axes, image in zip(column, images, strict=True):
            draw_image(axes, image, color)
    panel.suptitle(f"{PIXELS} pixels from {SHOWN_CODE} numbers", fontsize=12)


def draw_filters(panel: SubFigure, results: Results) -> None:
    """Draw the largest filters of the tied autoencoder, and the same filters without the tie."""
    tied, untied = (results.runs[SHOWN_CODE, which][0].model for which in (True, False))
    largest = tied[0].weight.norm(dim=1).argsort(descending=True)[:SHOWN_FILTERS]
    columns = {
        "tied\nboth": (tied[0].weight, TIED_COLOR),
        "not tied\nencoder": (untied[0].weight, UNTIED_COLOR),
        "not tied\ndecoder": (untied[2].weight.T, UNTIED_COLOR),
    }
    grid = panel.subplots(SHOWN_FILTERS, len(columns))
    for column, (name, (filters, color)) in zip(grid.T, columns.items(), strict=True):
        column[0].set_title(name, color=color, fontsize=10)
        for axes, row in zip(column, filters.detach()[largest], strict=True):
            draw_image(axes, row, color, "PRGn")
    panel.suptitle(f"{SHOWN_FILTERS} of {SHOWN_CODE} filters", fontsize=12)


def draw_errors(axes: Axes, results: Results) -> None:
    """Draw the error against the number of distinct values; thin lines join equal codes."""
    points = {}
    for tied, color in ((True, TIED_COLOR), (False, UNTIED_COLOR)):
        mean, std = results.curve(tied)
        values = [results.runs[code, tied][0].values for code in CODES]
        points[tied] = list(zip(values, mean.tolist(), strict=True))
        axes.fill_between(values, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        axes.plot(values, mean, color=color, linewidth=2, marker="o", markersize=5)
    for code, left, right in zip(CODES, points[True], points[False], strict=True):
        axes.plot(*zip(left, right, strict=True), color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(f"{code}", left, (-6, -3), textcoords="offset points", ha="right", va="top", fontsize=9)
    axes.text(0.02, 0.03, f"{CODES[0]} to {CODES[-1]}: numbers in the code", transform=axes.transAxes, fontsize=9)

    middle = len(CODES) // 2
    label = {"textcoords": "offset points", "fontweight": "bold"}
    axes.annotate("tied", points[True][middle], (-30, -34), color=TIED_COLOR, ha="right", **label)
    axes.annotate("not tied", points[False][middle], (14, 8), color=UNTIED_COLOR, **label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = (200, 500, 1000, 2000, 5000)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks((1, 2, 5, 10, 20, 50, 100), ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set(xlabel="distinct values in the network", ylabel="reconstruction error (% of the variance)")
    seeds = len(results.principal[CODES[0]])
    spread = f": mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"Error{spread}", loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def draw_figure(results: Results, digits: Digits) -> Figure:
    """Draw three panels, and a title with the numbers of these runs."""
    figure = plt.figure(figsize=(13, 6.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1, 2.2), wspace=0.04)
    draw_reconstructions(left, results, digits)
    draw_filters(middle, results)
    draw_errors(right.subplots(), results)

    at = CODES.index(SHOWN_CODE)
    tied, untied = (results.curve(which)[0][at].item() for which in (True, False))
    fewer = 1 - results.runs[SHOWN_CODE, True][0].values / results.runs[SHOWN_CODE, False][0].values
    figure.suptitle(
        f"A decoder that is the encoder transposed, {SHOWN_CODE} numbers: {100 * fewer:.0f} % fewer values, "
        f"and {tied:.1f} % of the variance missed instead of {untied:.1f} %",
        fontweight="bold",
    )
    return figure


# %%
# The result
# ----------
# The left panel shows held-out digits and their reconstructions. The middle panel shows the filters: with the tie, one
# image is both what a number of the code looks for and what it draws; without the tie, these are two images. Purple is
# negative and green positive, and each image is scaled to its largest weight. The right panel shows the error against
# the number of distinct values: the tied curve is further left.


def parse_arguments() -> argparse.Namespace:
    """Parse the number of seeds and the path of the figure."""
    # Galleries and notebooks run this without a file, and show the figure themselves.
    script = globals().get("__file__")
    figure = script and Path(script).resolve().with_suffix(".png")
    parser = argparse.ArgumentParser(description="Tie a decoder to its encoder transposed.")
    parser.add_argument("--seeds", type=int, default=5, help="how many repetitions (default: 5)")
    parser.add_argument("--output", type=Path, default=figure, help="path of the figure (default: next to this script)")
    # In a notebook, the arguments are those of its kernel.
    return parser.parse_args([] if "kernel_launcher" in Path(sys.argv[0]).name else None)


def main() -> None:
    """Check, train, print and draw."""
    args = parse_arguments()
    difference = check_equivalence(split_digits(0))

    results = Results({(code, tied): [] for code in CODES for tied in (True, False)}, {code: [] for code in CODES})
    # With `disable=None`, the bar appears only on a terminal, and does not fill log files.
    with tqdm(desc="training", total=args.seeds * len(results.runs) * EPOCHS, unit="epoch", disable=None) as progress:
        for seed in range(args.seeds):
            digits = split_digits(seed)
            for (code, tied), runs in results.runs.items():
                runs.append(train(code, tied, seed, digits, progress))
            for code, errors in results.principal.items():
                errors.append(principal_components_error(code, digits))

    print_table(results, difference)
    figure = draw_figure(results, split_digits(0))
    if args.output:
        figure.savefig(args.output, dpi=130)
        print(f"\nFigure written to {args.output}")


if __name__ == "__main__":
    main()
