r"""
Kernels that do not change under a quarter turn
===============================================

A network whose kernels are symmetric under rotation reads rotated digits just as it reads upright digits.

Rotate an image and convolve it: in general the result is not the rotated feature map, because the kernel itself has a
direction. If the kernel :math:`k` equals itself rotated, :math:`R k = k`, it has no direction, and

.. math::

    k * (R x) = (R k) * (R x) = R (k * x)

Padding, ReLU, batch normalisation and max pooling over 2 x 2 pixels commute with a quarter turn :math:`R` as
well, so the features of the whole network rotate with its input, and after a global pooling its answer does not
change at all.

The example trains such a network on upright handwritten digits and lets it read rotated digits. Its kernels are tied by
:func:`tieopt.patterns.rotated`: entries that a rotation maps to each other are a group, which leaves 7 groups in a
kernel of 5 x 5 (the symmetry is called C4). With ``mirrored=True``, mirror images are tied too (D4), which leaves 6.
Kernels of 3 x 3 have the same groups in both cases, center, edges and corners, so the kernels here are larger. The
layers are ordinary :class:`torch.nn.Conv2d`, and the training is the same with and without ties.

Three statements are checked, in float64 and for every held-out digit: the tied features rotate with the input, up to
rounding (1e-12), and with D4 they are also mirrored with it; the features of the network without ties do neither; and
the tied networks give the same answer for every digit at 0, 90, 180 and 270 degrees. Networks with rotation symmetry go
back to Cohen and Welling, "Group Equivariant Convolutional Networks" (ICML 2016). Their kernels need not be symmetric
themselves, because each is applied in all four directions. Tying is the simplest special case.

It takes about two minutes on one core and needs scikit-learn, matplotlib and tqdm. Run it as
``python plot_rotated_kernels.py``; ``--seeds 1`` is a quick try.
"""

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from tieopt import TiedOptimizer, patterns

CHANNELS = 32
KERNEL = 5
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 1e-2
ANGLES = tuple(range(0, 361, 15))
QUARTERS = (90, 180, 270)

VARIANTS = ("not tied", "C4", "D4")

# The images are small: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


# %%
# The digits and their rotation
# -----------------------------


class Digits(NamedTuple):
    """Images ``[n, 1, 8, 8]`` and their digits ``[n]``, for training and held out."""

    train_images: Tensor
    train_digits: Tensor
    test_images: Tensor
    test_digits: Tensor


def split_digits(seed: int) -> Digits:
    """Draw a stratified split of 1797 digits, a quarter of them held out; ink is 1 and paper is 0."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, digits, test_size=0.25, stratify=digits, random_state=seed)
    train_images, test_images, train_digits, test_digits = map(torch.as_tensor, parts)
    shape = (-1, 1, 8, 8)
    return Digits(train_images.float().view(shape), train_digits, test_images.float().view(shape), test_digits)


def rotate(images: Tensor, degrees: int) -> Tensor:
    """Rotate images counterclockwise: exactly by quarter turns, and by interpolation for the rest."""
    quarters, rest = divmod(degrees, 90)
    images = images.rot90(quarters, (2, 3))
    if rest == 0:
        return images
    angle = torch.deg2rad(torch.tensor(float(rest)))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]])
    grid = nn.functional.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


# %%
# The network
# -----------
# Three convolutions. For the symmetry, no other operation may prefer a direction either: sizes are even where they
# are halved, and the head sees only the largest value of each feature map.


def build_network() -> nn.Sequential:
    """Build a convolutional network, of a module for features ``[n, channels, 4, 4]`` and the head."""

    def block(channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels, CHANNELS, KERNEL, padding="same", bias=False)
        return [conv, nn.BatchNorm2d(CHANNELS), nn.ReLU()]

    features = nn.Sequential(*block(1), nn.MaxPool2d(2), *block(CHANNELS), *block(CHANNELS))
    return nn.Sequential(features, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


def tie(model: nn.Module, optimizer: torch.optim.Optimizer, variant: str) -> TiedOptimizer:
    """Tie all kernels so that they stay symmetric, or nothing if the variant is "not tied"."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    if variant == "not tied":
        weights = []
    return TiedOptimizer(optimizer, {w: patterns.rotated(w.shape, mirrored=variant == "D4") for w in weights})


def train(variant: str, seed: int, digits: Digits, progress: tqdm) -> nn.Sequential:
    """Train a network on upright digits."""
    torch.manual_seed(seed)
    model = build_network()
    optimizer = tie(model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), variant)
    steps = EPOCHS * -(-len(digits.train_images) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(digits.train_images)).split(BATCH):
            optimizer.zero_grad()
            logits = model(digits.train_images[batch])
            nn.functional.cross_entropy(logits, digits.train_digits[batch]).backward()
            optimizer.step()
            scheduler.step()
        progress.update()
    assert optimizer.tie_drift() == 0
    return model.eval()


# %%
# Measurements and checks
# -----------------------


class Run(NamedTuple):
    """Results of one training run: accuracies in % at all angles, and how far features are from being symmetric."""

    model: nn.Sequential
    accuracy: list[float]
    rotation_error: float
    mirror_error: float


@torch.no_grad()
def error(model: nn.Sequential, images: Tensor, turned: Tensor, turned_features: Tensor) -> float:
    """Return how far the features of turned images are from the turned features, relative to the largest feature."""
    return ((model[0](turned) - turned_features).abs().max() / model[0](images).abs().max()).item()


@torch.no_grad()
def measure(model: nn.Sequential, variant: str, digits: Digits) -> Run:
    """Read the held-out digits at all angles, and check the symmetries in float64."""
    exact, images = deepcopy(model).double(), digits.test_images.double()
    features = exact[0](images)
    rotation_error = error(exact, images, images.rot90(1, (2, 3)), features.rot90(1, (2, 3)))
    mirror_error = error(exact, images, images.flip(3), features.flip(3))

    if variant == "not tied":
        assert rotation_error > 0.1, f"features without ties rotate with the input, up to {rotation_error}"
    else:
        assert rotation_error < 1e-12, f"tied features do not rotate with the input: {rotation_error}"
        answers = exact(images)
        for quarters in (1, 2, 3):
            torch.testing.assert_close(exact(images.rot90(quarters, (2, 3))), answers, rtol=0, atol=1e-10)
    # Only D4 is symmetric under mirroring.
    assert (mirror_error < 1e-12) == (variant == "D4"), f"{variant}: {mirror_error}"

    read = [model(rotate(digits.test_images, angle)).argmax(dim=1) for angle in ANGLES]
    accuracy = [100 * (answer == digits.test_digits).double().mean().item() for answer in read]
    return Run(model, accuracy, rotation_error, mirror_error)


Runs = dict[str, list[Run]]


def curve(runs: list[Run]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the accuracy over the seeds, each ``[angles]``."""
    accuracy = torch.tensor([run.accuracy for run in runs])
    mean = accuracy.mean(dim=0)
    # The standard deviation of a single seed is undefined.
    return mean, accuracy.std(dim=0) if len(runs) > 1 else torch.full_like(mean, torch.nan)


def values_per_kernel(variant: str) -> int:
    """Return the number of different values of a kernel."""
    shape = (KERNEL, KERNEL)
    return KERNEL**2 if variant == "not tied" else len(patterns.rotated(shape, mirrored=variant == "D4").unique())


def print_table(runs: Runs) -> None:
    """Print a line for each symmetry; errors are the largest of all seeds."""
    print(f"Test accuracy in %, trained on upright digits only; seeds: {len(runs['C4'])}")
    print("Errors: how far the features are from being rotated or mirrored with the input\n")
    columns = [f"{angle}°" for angle in (0, *QUARTERS)]
    print("kernels   values", *(f"{column:>12}" for column in columns), "    rotated   mirrored")
    for variant in VARIANTS:
        mean, std = curve(runs[variant])
        cells = (f"{mean[i]:6.1f} ± {std[i]:3.1f}" for i in map(ANGLES.index, (0, *QUARTERS)))
        rotation = max(run.rotation_error for run in runs[variant])
        mirror = max(run.mirror_error for run in runs[variant])
        print(f"{variant:9s} {values_per_kernel(variant):6d}", *cells, f"   {rotation:8.1e}   {mirror:8.1e}")


# %%
# The figure
# ----------

COLORS = {"not tied": "#D55E00", "C4": "#0072B2", "D4": "#009E73"}
SHOWN = 4


def draw_image(axes: Axes, image: Tensor, color: str, cmap: str, limit: float) -> None:
    """Draw a small framed image without ticks."""
    axes.imshow(image, cmap=cmap, vmin=-limit if cmap == "PRGn" else 0, vmax=limit, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(color)


def strongest_channels(model: nn.Sequential, image: Tensor) -> Tensor:
    """Return the channels of the first layer, sorted by their response to an image, largest first."""
    with torch.no_grad():
        return model[0][:3](image)[0].sum(dim=(1, 2)).argsort(descending=True)


def draw_kernels(panel: SubFigure, runs: Runs, image: Tensor) -> None:
    """Draw two lines of kernels for each symmetry, the first for the channels of the middle panel."""
    grid = panel.subplots(2 * len(VARIANTS), SHOWN).reshape(len(VARIANTS), 2 * SHOWN)
    for variant, cells in zip(VARIANTS, grid, strict=True):
        model = runs[variant][0].model
        for axes, channel in zip(cells, strongest_channels(model, image), strict=False):
            kernel = model[0][0].weight.detach()[channel, 0]
            draw_image(axes, kernel, COLORS[variant], "PRGn", kernel.abs().max().item())
        cells[0].set_ylabel(variant, color=COLORS[variant], fontweight="bold")
        cells[SHOWN].set_ylabel(f"{values_per_kernel(variant)} values", color=COLORS[variant])
    panel.suptitle("Kernels of the first layer", x=0.02, ha="left", fontsize=12)


@torch.no_grad()
def draw_features(panel: SubFigure, runs: Runs, image: Tensor) -> None:
    """Draw feature maps of a digit, and feature maps of the turned digit, turned back."""
    turned = image.rot90(1, (2, 3))
    grid = panel.subplots(4, SHOWN + 1)
    for lines, variant in zip((grid[:2], grid[2:]), VARIANTS, strict=False):
        model, color = runs[variant][0].model, COLORS[variant]
        channels = strongest_channels(model, image)[:SHOWN]
        maps = model[0][:3](image)[0, channels]
        maps_back = model[0][:3](turned).rot90(-1, (2, 3))[0, channels]
        limits = torch.maximum(maps, maps_back).amax(dim=(1, 2)).tolist()
        for line, digit, shown in zip(lines, (image, turned), (maps, maps_back), strict=True):
            draw_image(line[0], digit[0, 0], "black", "Greys", 1)
            for axes, one, limit in zip(line[1:], shown, limits, strict=True):
                draw_image(axes, one, color, "magma", limit)
        lines[0, 0].set_ylabel(variant, color=color, fontweight="bold")
        lines[1, 0].set_ylabel("turned", color=color)
    title = "A digit, and what the first layer makes of it\n(of the turned digit: maps turned back)"
    panel.suptitle(title, x=0.02, ha="left", fontsize=12)


def draw_accuracy(axes: Axes, runs: Runs) -> None:
    """Draw the accuracy against the angle, with labels at the lines."""
    for variant in VARIANTS:
        mean, std = curve(runs[variant])
        axes.fill_between(ANGLES, mean - std, mean + std, color=COLORS[variant], alpha=0.2, linewidth=0)
        axes.plot(ANGLES, mean, color=COLORS[variant], linewidth=2)
        exact = [i for i, angle in enumerate(ANGLES) if angle % 90 == 0]
        axes.plot([ANGLES[i] for i in exact], mean[exact], "o", color=COLORS[variant], markersize=5)
    labels = (110, 3, "not tied", "not tied"), (135, 91, "tied, C4", "C4"), (135, 84, "tied, D4", "D4")
    for x, y, text, variant in labels:
        axes.text(x, y, text, color=COLORS[variant], fontweight="bold", ha="center")
    axes.set(xlim=(0, 360), ylim=(0, 103), xticks=range(0, 361, 90), yticks=range(0, 101, 20))
    axes.set(xlabel="rotation of the test digits (degrees)", ylabel="test accuracy (%)")
    spread = f"\nmean ± standard deviation of {len(runs['C4'])} seeds" if len(runs["C4"]) > 1 else ""
    axes.set_title(f"Trained on upright digits only{spread}", loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def draw_figure(runs: Runs, image: Tensor) -> Figure:
    """Draw three panels, and a title with the numbers of these runs."""
    figure = plt.figure(figsize=(14, 5.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.2, 1.15), wspace=0.03)
    draw_kernels(left, runs, image)
    draw_features(middle, runs, image)
    draw_accuracy(right.subplots(), runs)

    quarters = [ANGLES.index(angle) for angle in QUARTERS]
    turned = {variant: curve(runs[variant])[0][quarters].mean().item() for variant in VARIANTS}
    figure.suptitle(
        f"Digits turned by 90°, 180° and 270°, none seen in training: {turned['C4']:.1f} % are read with kernels tied "
        f"by rotation (C4), {turned['not tied']:.1f} % without",
        fontweight="bold",
    )
    return figure


# %%
# The result
# ----------
# The left panel shows kernels of the first layer, with purple for negative and green for positive weights, each scaled
# to its largest weight. The middle panel shows the output of the first layer for a digit and for the same digit turned,
# with the maps turned back for comparison: with tied kernels they are the same. The right panel shows the accuracy at
# all angles. Between quarter turns, pixels are interpolated, and no kernel on a grid is fully symmetric.


def parse_arguments() -> argparse.Namespace:
    """Parse the number of seeds and the path of the figure."""
    # Galleries and notebooks run this without a file, and show the figure themselves.
    script = globals().get("__file__")
    figure = script and Path(script).resolve().with_suffix(".png")
    parser = argparse.ArgumentParser(description="Tie kernels that equal themselves rotated.")
    parser.add_argument("--seeds", type=int, default=5, help="how many repetitions (default: 5)")
    parser.add_argument("--output", type=Path, default=figure, help="path of the figure (default: next to this script)")
    # In a notebook, the arguments are those of its kernel.
    return parser.parse_args([] if "kernel_launcher" in Path(sys.argv[0]).name else None)


def main() -> None:
    """Train, measure, check, print and draw."""
    args = parse_arguments()
    runs: Runs = {variant: [] for variant in VARIANTS}
    # With `disable=None`, the bar appears only on a terminal, and does not fill log files.
    with tqdm(desc="training", total=args.seeds * len(VARIANTS) * EPOCHS, unit="epoch", disable=None) as progress:
        for seed in range(args.seeds):
            digits = split_digits(seed)
            for variant in VARIANTS:
                runs[variant].append(measure(train(variant, seed, digits, progress), variant, digits))

    print_table(runs)
    digits = split_digits(0)
    four = digits.test_images[digits.test_digits == 4][:1]
    figure = draw_figure(runs, four)
    if args.output:
        figure.savefig(args.output, dpi=130)
        print(f"\nFigure written to {args.output}")


if __name__ == "__main__":
    main()
