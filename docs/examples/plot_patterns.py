r"""
What the patterns tie
=====================

:mod:`tieopt.patterns` has functions that return which entries of a weight are equal: in a symmetric matrix, in a kernel
that looks the same from all sides, in a weight that is filled from a hash table. This example shows eight of them.

Each pattern is an equation, such as :math:`W = W^\top`. A weight is trained under each pattern for 100 steps of AdamW,
towards a target that does not satisfy the equation. The example checks that the weight then satisfies it *in every
bit*.

.. code-block:: python

    labels = patterns.symmetric(weight.shape)
    optimizer = TiedOptimizer(AdamW([weight]), {weight: labels})

It takes seconds and needs scikit-learn and matplotlib. Run it as ``python plot_patterns.py``.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from tieopt import Tie, TiedOptimizer, patterns, plot

STEPS = 100

# The matrices are small: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


# %%
# The patterns
# ------------
# A pattern returns labels, and scales if it has signs or zeros. Its equation is checked with ``torch.equal``, without a
# tolerance.


class Pattern(NamedTuple):
    """A shape, what is tied, and the equation that holds for a tied weight."""

    shape: tuple[int, ...]
    labels: Tensor
    scale: Tensor | None
    holds: Callable[[Tensor], bool]


def is_circulant(weight: Tensor) -> bool:
    """Check that each row is the row above it, rolled by one."""
    return torch.equal(weight.roll(1, dims=1)[:-1], weight[1:])


def list_patterns() -> dict[str, Pattern]:
    """Return eight patterns of matrices and kernels."""
    matrix, kernel, conv = (6, 6), (1, 1, 7, 7), nn.Conv2d(1, 1, 2)
    table, unrolled = patterns.hashed((8, 8), 6), patterns.convolution(conv, (3, 3))
    return {
        "symmetric": Pattern(matrix, patterns.symmetric(matrix), None, lambda w: torch.equal(w, w.T)),
        "antisymmetric": Pattern(matrix, *patterns.antisymmetric(matrix), lambda w: torch.equal(w, -w.T)),
        "circulant": Pattern(matrix, patterns.circulant(matrix), None, is_circulant),
        "toeplitz": Pattern((5, 7), patterns.toeplitz((5, 7)), None, lambda w: torch.equal(w[:-1, :-1], w[1:, 1:])),
        "mirrored": Pattern(kernel, patterns.mirrored(kernel), None, lambda w: torch.equal(w, w.flip(-1))),
        "rotated": Pattern(kernel, patterns.rotated(kernel), None, lambda w: torch.equal(w, w.rot90(1, (-2, -1)))),
        "convolution": Pattern((4, 9), *unrolled, lambda w: len(w[w != 0].unique()) <= 4 and int((w != 0).sum()) <= 16),
        "hashed": Pattern((8, 8), *table, lambda w: len(w.abs().unique()) <= 6),
    }


# %%
# The training
# ------------


def train(pattern: Pattern) -> nn.Parameter:
    """Train a weight under the pattern, towards a target that does not satisfy it."""
    weight = nn.Parameter(torch.randn(pattern.shape))
    target = torch.randn(pattern.shape)
    tie = Tie(weight, pattern.labels, scale=pattern.scale)
    optimizer = TiedOptimizer(torch.optim.AdamW([weight], lr=0.05), tie)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(weight, target).backward()
        optimizer.step()
    return weight


# %%
# The figure
# ----------
# :func:`tieopt.plot.draw_groups` draws a weight with its groups in colour. One legend is enough for all panels.


def draw_figure(listed: dict[str, Pattern]) -> Figure:
    """Draw a panel for each pattern."""
    figure = plt.figure(figsize=(12, 6.4), layout="constrained")
    panels = figure.subfigures(2, 4).flatten()
    for panel, (name, pattern) in zip(panels, listed.items(), strict=True):
        tie = Tie(nn.Parameter(torch.zeros(pattern.shape)), pattern.labels, scale=pattern.scale)
        plot.draw_groups(tie, figure=panel)
        panel.axes[0].set(title=name, xticks=[], yticks=[], xlabel="", ylabel="")
        for legend in panel.legends:
            legend.remove()
    figure.supxlabel("one colour and number: one value; faded: its negative; black: pinned at zero", fontsize=12)
    return figure


def main() -> None:
    """Train, check, print and draw."""
    # Galleries and notebooks run this without a file, and show the figure themselves.
    script = globals().get("__file__")
    parser = argparse.ArgumentParser(description="Train a layer under each of eight patterns, and draw them.")
    figure = script and Path(script).resolve().with_suffix(".png")
    parser.add_argument("--output", type=Path, default=figure, help="path of the figure (default: next to this script)")
    # In a notebook, the arguments are those of its kernel.
    args = parser.parse_args([] if "kernel_launcher" in Path(sys.argv[0]).name else None)

    torch.manual_seed(0)
    listed = list_patterns()
    print(f"{'pattern':15s} {'entries':>8s} {'distinct':>9s}  after {STEPS} steps")
    for name, pattern in listed.items():
        weight = train(pattern)
        assert pattern.holds(weight.detach()), f"{name} does not hold"
        distinct = len(weight.detach().abs().unique())
        print(f"{name:15s} {weight.numel():8d} {distinct:9d}  holds in every bit")
    figure = draw_figure(listed)
    if args.output:
        figure.savefig(args.output, dpi=130)
        print(f"\nFigure written to {args.output}")


if __name__ == "__main__":
    main()
