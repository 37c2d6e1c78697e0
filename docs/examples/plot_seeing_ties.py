"""
Seeing ties
===========

:mod:`tieopt.plot` draws three things: which entries are equal, how large the groups are, and how far members are apart.

First, an autoencoder 12-5-12 has a decoder that is the transposed encoder, and output biases that are tied by k-means.
The figure shows both, as the optimizer has them. Second, a dense layer of 300 rows is tied into 40 clusters of
different sizes. Third, ties are *relaxed*: with ``every=20`` the members train separately and are made equal in each
twentieth step, and :meth:`tieopt.TiedOptimizer.tie_drift` returns how far apart they are. The example checks that ties
that are not relaxed have a drift of exactly zero after every step.

It takes seconds and needs scikit-learn and matplotlib. Run it as ``python plot_seeing_ties.py``.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import nn

from tieopt import Tie, TiedOptimizer, patterns, plot

STEPS = 100

# The matrices are small: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


# %%
# Three kinds of ties
# -------------------


def tie_autoencoder() -> TiedOptimizer:
    """Tie the rows of the encoder to the columns of the decoder, and the decoder's biases to three values."""
    model = nn.ModuleDict({"encoder": nn.Linear(12, 5), "decoder": nn.Linear(5, 12)})
    encoder, decoder = model["encoder"], model["decoder"]
    transposed = Tie.join(Tie(encoder.weight, torch.arange(5)), Tie(decoder.weight, torch.arange(5), dim=1))
    bias = Tie(decoder.bias, patterns.clusters(decoder.bias, 3, of="values"))
    return TiedOptimizer(torch.optim.AdamW(model.named_parameters()), [transposed, bias])


def tie_clusters() -> TiedOptimizer:
    """Tie 300 rows into 40 clusters."""
    layer = nn.Linear(16, 300)
    return TiedOptimizer(torch.optim.AdamW(layer.parameters()), {layer.weight: patterns.clusters(layer.weight, 40)})


def measure_drift(every: int) -> list[float]:
    """Return how far members are apart after each step."""
    layer = nn.Linear(8, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    optimizer = TiedOptimizer(optimizer, {layer.weight: [[0, 2], [1, 4, 5]]}, every=every)
    x, y = torch.randn(64, 8), torch.randn(64, 6)
    drifts = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()
        drifts.append(optimizer.tie_drift())
    return drifts


# %%
# The figure
# ----------


def draw_figure(autoencoder: TiedOptimizer, clusters: TiedOptimizer, drifts: list[float]) -> Figure:
    """Draw the groups at the top, and their sizes and the drift at the bottom."""
    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    plot.draw_groups(autoencoder, figure=above)
    above.suptitle("draw_groups: one colour, one value, also across parameters", fontweight="bold")
    left, right = below.subplots(1, 2)
    plot.draw_group_sizes(clusters, axes=left).set_title("draw_group_sizes: 40 clusters of 300 rows", fontweight="bold")
    plot.draw_drift(drifts, axes=right).set_title("draw_drift: projected at each 20th step", fontweight="bold")
    right.set_xlabel("step")
    return figure


def main() -> None:
    """Tie, check, print and draw."""
    # Galleries and notebooks run this without a file, and show the figure themselves.
    script = globals().get("__file__")
    parser = argparse.ArgumentParser(description="Draw ties, the sizes of their groups, and their drift.")
    figure = script and Path(script).resolve().with_suffix(".png")
    parser.add_argument("--output", type=Path, default=figure, help="path of the figure (default: next to this script)")
    # In a notebook, the arguments are those of its kernel.
    args = parser.parse_args([] if "kernel_launcher" in Path(sys.argv[0]).name else None)

    torch.manual_seed(0)
    autoencoder, clusters = tie_autoencoder(), tie_clusters()
    print(autoencoder.tie_summary(), end="\n\n")
    assert set(measure_drift(every=1)) == {0.0}
    drifts = measure_drift(every=20)
    print(f"the largest drift in {STEPS} steps: {max(drifts):.3f} for relaxed ties, 0 for the others")
    figure = draw_figure(autoencoder, clusters, drifts)
    if args.output:
        figure.savefig(args.output, dpi=130)
        print(f"\nFigure written to {args.output}")


if __name__ == "__main__":
    main()
