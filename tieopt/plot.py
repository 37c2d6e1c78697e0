"""Figures of ties: which entries are equal, how large the groups are, how far relaxed members drift apart.

These functions need matplotlib: ``pip install 'tieopt[plot]'``. Figures are made with pyplot, so that ``plt.show()``
and notebooks show them, and use the colours of the current style.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tieopt.errors import imported, message, refusal, shown
from tieopt.optimizer import TiedOptimizer
from tieopt.tensors import in_front
from tieopt.ties.part import Part, are_sharded
from tieopt.ties.places import all_places, name_of, parameter_at
from tieopt.ties.slices import FREE, Slices, numbered, told_apart
from tieopt.ties.tie import Tie

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["draw_drift", "draw_group_sizes", "draw_groups"]

# The most cells along a side of a panel, and along a side of a panel whose cells have numbers.
_CELLS = 256
_NUMBERED_CELLS = 12

# The fewest indices of a dimension that are drawn where several dimensions run along one side.
_FEWEST_INDICES = 16

# The largest ratio of the sides of a panel.
_SLENDER = 4

_PANELS_IN_A_LINE = 3
_TICKS = 8

# About how much of its part of the figure the longer side of a panel takes.
_SIDE = 0.55

# The width of a figure, in points, from which on the legend is one line.
_LEGEND = 420

# The largest and the smallest font of numbers in cells, in points.
_LARGEST, _SMALLEST = 7.0, 3.5

# The width of a character, relative to the size of its font.
_CHARACTER = 0.62

# The most characters of a name above a panel. Longer names are cut in the middle, nearer to the beginning, because the
# end says more.
_NAME = 36

_BARS = 40

# The colours of Okabe and Ito, which the colour-blind can tell apart as well; without black.
_FIRST_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# The saturation and value of further colours, in turn. Of all that were tried, they keep six consecutive groups
# farthest apart, also for people who do not see green.
_SHADES = ((1.0, 0.85), (0.45, 1.0), (0.75, 0.8), (1.0, 0.45))
_GOLDEN = (math.sqrt(5) - 1) / 2

# The number in the gaps between the kernels of a convolution, where other entries have the number of their group.
_GAP = FREE - 1

_LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64, device="cpu")


def draw_groups(
    ties: TiedOptimizer | Tie | Iterable[Tie], *, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draw the entries of each tied parameter, with one colour for each group.

    A matrix is drawn as it is printed, a vector as one line, and a convolution's weight ``[out, in, height, width]`` as
    the matrix of its kernels. Only labels are drawn, not values. Entries with the same colour in two panels are joined.
    Members with a negative scale are faded; free entries and pinned ones have the colours of the legend. Because the
    colours of many groups look alike, small panels also show the numbers of groups, and scales, if there is room.

    In large dimensions, only evenly spaced indices are drawn, as the axes show. A pattern that repeats within a few
    indices is not visible then.

    Args:
        ties: an optimizer, for all of its ties; or one or more ties.
        figure: the figure to draw in, preferably with ``layout="constrained"``, which has room for the legend; a new
            figure if None.

    Returns:
        The figure, with ``axes`` for each tied parameter.

    Raises:
        TypeError: ``ties`` are not ties, or are ties of names instead of parameters.
        ValueError: there are no ties.
        RuntimeError: a parameter of a tied optimizer has another shape than when it was tied, or is gone.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from tieopt import Tie, patterns, plot
        >>> weight = torch.nn.Parameter(torch.randn(6, 6))
        >>> figure = plot.draw_groups(Tie(weight, patterns.circulant(weight.shape)))
        >>> [axes.get_title() for axes in figure.axes]
        ['parameter of shape (6, 6)']
    """
    listed = _listed(ties)
    panels, is_linear = _panels(listed), all(part.offset is None for tie in listed for part in tie.parts)
    groups = ties.param_groups if isinstance(ties, TiedOptimizer) else []
    names = {parameter_at(groups, place): name_of(groups, place) for place in all_places(groups)}
    pyplot = _matplotlib("pyplot")
    columns = min(len(panels), _PANELS_IN_A_LINE)
    lines = math.ceil(len(panels) / columns)
    figure = figure or pyplot.figure(figsize=(1 + 3 * columns, 0.5 + 3 * lines), layout="constrained")
    wide, high = (72 * pixels / figure.dpi for pixels in (figure.bbox.width, figure.bbox.height))
    legend = {}
    for number, (param, panel) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(lines, columns, number)
        legend.update(
            _draw(axes, in_front(param, 0).shape, panel, is_linear, _SIDE * min(wide / columns, high / lines))
        )
        name, shape = names.get(param, ""), tuple(param.shape)
        short = name if len(name) <= _NAME else f"{name[: _NAME // 3]}...{name[3 + _NAME // 3 - _NAME :]}"
        title = f"{short}\n{shape}" if name else f"parameter of shape {shape}"
        axes.set_title(title, fontsize="medium", parse_math=False)
    if legend:
        style = {"edgecolor": pyplot.rcParams["text.color"], "linewidth": 0.5}
        handles = [_matplotlib("patches").Patch(facecolor=color, label=text, **style) for text, color in legend.items()]
        ncols = len(handles) if wide > _LEGEND else 1
        figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
    return figure


def draw_group_sizes(ties: TiedOptimizer | Tie | Iterable[Tie], *, axes: Axes | None = None) -> Axes:
    """Draw a histogram of the sizes of groups, on a logarithmic axis if they differ much.

    Args:
        ties: an optimizer, for all of its ties; or one or more ties. The size of a group in joined parameters is the
            number of its members in all of them.
        axes: the axes to draw in; those of a new figure if None.

    Returns:
        The axes.

    Raises:
        TypeError: ``ties`` are not ties, or are ties of names instead of parameters.
        ValueError: there are no groups.
        RuntimeError: a parameter of a tied optimizer has another shape than when it was tied, or is gone.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from tieopt import Tie, plot
        >>> axes = plot.draw_group_sizes(Tie(torch.zeros(9), [[0, 1], [2, 3], [4, 5, 6]]))
        >>> [int(bar.get_height()) for bar in axes.patches]
        [2, 1]
    """
    labels = [torch.cat([part.groups.flatten() for part in tie.parts]) for tie in _listed(ties)]
    sizes = torch.cat([torch.unique(column[column != FREE], return_counts=True)[1] for column in labels])
    if not len(sizes):
        raise refusal(ValueError, "There are no groups to draw.", expected="ties with groups", got="free slices only")
    axes = axes or _new_axes()
    values, counts = torch.unique(sizes, return_counts=True)
    first, last = int(values[0]), int(values[-1])
    if last - first < _BARS:
        axes.bar(values.tolist(), counts.tolist(), width=0.8)
    else:
        edges = torch.logspace(math.log10(first), math.log10(last + 1), _BARS + 1, dtype=torch.float64, device="cpu")
        # Halfway between sizes, so that each size is in one bin.
        bins = torch.unique(edges.round()) - 0.5
        axes.hist(values.tolist(), bins.tolist(), weights=counts.tolist())
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.locator_params("y" if axes.get_xscale() == "log" else "both", integer=True)
    axes.set(xlabel="members of a group", ylabel="groups")
    return axes


def draw_drift(drifts: Sequence[float] | Tensor, *, axes: Axes | None = None) -> Axes:
    """Draw how far members drifted apart during training.

    If the drifts differ much, the axis is logarithmic above the smallest drift that is not zero.

    Args:
        drifts: values of :meth:`~tieopt.TiedOptimizer.tie_drift`, for example of every step; shape ``[n]``.
        axes: the axes to draw in, which may have other curves; those of a new figure if None.

    Returns:
        The axes.

    Raises:
        TypeError: ``drifts`` are not numbers.
        ValueError: there are no drifts, or they do not have exactly one dimension.
        ImportError: matplotlib is not installed.

    Example:
        >>> from tieopt import plot
        >>> axes = plot.draw_drift([0.0, 0.3, 0.5, 0.0])
        >>> axes.get_ylabel()
        'drift'
    """
    text = message("These are no drifts.", expected="a sequence of numbers, one or more", got=shown(drifts))
    try:
        values = torch.as_tensor(drifts, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(text) from None
    if values.dim() != 1 or not len(values):
        raise ValueError(text)
    axes = axes or _new_axes()
    axes.plot(range(1, len(values) + 1), values.tolist(), marker="." if len(values) <= _BARS else None)
    # The smallest positive value of all curves, infinite if there is none.
    smallest = axes.dataLim.minposy
    if axes.dataLim.ymax > 100 * smallest:
        axes.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(smallest)))
    axes.set_ylim(bottom=0)
    axes.locator_params("x", integer=True)
    axes.set(xlabel="measurement", ylabel="drift")
    return axes


def _listed(ties: Any) -> list[Tie]:
    """Return the ties as a list, which is not empty."""
    if isinstance(ties, TiedOptimizer):
        ties = ties.ties
    listed = [ties] if isinstance(ties, Tie) or not isinstance(ties, Iterable) else list(ties)
    expected = "a TiedOptimizer, a Tie of parameters, or an iterable of them"
    for tie in listed:
        if not isinstance(tie, Tie) or not all(isinstance(part.param, Tensor) for part in tie.parts):
            raise refusal(TypeError, "These ties cannot be drawn.", expected=expected, got=shown(tie))
        if any(are_sharded(part.groups) for part in tie.parts):
            whole = "labels of all slices, in a plain tensor"
            raise refusal(TypeError, "These ties cannot be drawn.", expected=whole, got=shown(tie))
    if not listed:
        raise refusal(ValueError, "There are no ties to draw.", expected=expected, got=shown(ties))
    return listed


def _panels(ties: Sequence[Tie]) -> dict[Tensor, Slices]:
    """Return the entries that are drawn of each parameter, with the groups of all ties numbered together."""
    panels: dict[Tensor, Slices] = {}
    sampled = told_apart(numbered([_sampled(part) for part in tie.parts]) for tie in ties)
    for part, slices in zip(chain(*(tie.parts for tie in ties)), chain(*sampled), strict=True):
        free = Slices(torch.full_like(slices.labels, FREE), torch.ones_like(slices.scales))
        panel, tied = panels.setdefault(cast(Tensor, part.param), free), slices.labels != FREE
        panel.labels[tied], panel.scales[tied] = slices.labels[tied], slices.scales[tied]
    return panels


def _sampled(part: Part) -> Slices:
    """Return the labels and scales of the entries that are drawn, in the shape that is drawn."""
    param = cast(Tensor, part.param)
    moved = in_front(param, part.dim).shape
    indices = torch.meshgrid(_drawn_indices(in_front(param, 0).shape), indexing="ij")

    def drawn(column: Tensor) -> Tensor:
        inner = (None,) * (len(moved) - column.dim())
        # Expanded as a view: entries that are not drawn take no memory.
        return column[(..., *inner)].expand(moved).movedim(0, part.dim)[indices]

    return Slices(drawn(part.groups), None if part.scale is None else drawn(part.scale))


def _sides(shape: torch.Size) -> tuple[list[int], list[int]]:
    """Return the dimensions that run down a panel, and those that run across it, the outermost first."""
    # Down a vector runs no dimension, and down the matrix of a convolution's kernels the height of these as well.
    down = [0, len(shape) - 2][: len(shape) // 2]
    return down, [dim for dim in range(len(shape)) if dim not in down]


def _drawn_indices(shape: torch.Size) -> list[Tensor]:
    """Return evenly spaced indices of each dimension, as many as a panel has room for."""
    counts = dict.fromkeys(range(len(shape)), 0)
    for side in _sides(shape):
        cells = 1
        for position, dim in reversed(list(enumerate(side))):
            gap = len(side) > 1 and dim == side[-1]
            # Inner dimensions leave room for the outer ones.
            share = max(_CELLS // max(math.prod(shape[outer] for outer in side[:position]), 1), _FEWEST_INDICES)
            counts[dim] = min(shape[dim], max(min(_CELLS // cells, share - gap), 1))
            cells *= counts[dim] + gap
    return [torch.arange(counts[dim], device="cpu") * size // max(counts[dim], 1) for dim, size in enumerate(shape)]


def _image(entries: Tensor, gap: int) -> Tensor:
    """Return entries of a parameter as a matrix, with the number ``gap`` between kernels."""
    down, across = _sides(entries.shape)
    # Kernels are the last two dimensions. There is a gap after each, but not at the edges of the matrix.
    below, right = len(down) > 1, len(across) > 1
    entries = pad(entries, (0, right, 0, below)[: 2 * entries.dim()], value=gap)
    height, width = (math.prod(entries.shape[dim] for dim in side) for side in (down, across))
    return entries.permute(*down, *across).reshape(height, width)[: height - below, : width - right]


def _draw(axes: Axes, shape: torch.Size, panel: Slices, is_linear: bool, side: float) -> dict[str, list[float]]:
    """Draw a parameter, ``side`` points along its longer side, and return the colours of the legend by their texts.

    Offsets are not drawn. Without any, ``is_linear`` is true.
    """
    numbers, scales = _image(panel.labels, _GAP), _image(panel.scales, 1)
    paper, ink = _rgba(axes.get_facecolor()), _rgba(_matplotlib("pyplot").rcParams["text.color"])
    free, pinned, faded = paper.lerp(ink, 0.15), scales == 0, scales < 0

    distinct, which = torch.unique(numbers, return_inverse=True)
    special = {FREE: free, _GAP: torch.zeros_like(paper)}
    colors = [special[number] if number in special else _color(number) for number in distinct.tolist()]
    image = torch.stack(colors or [free])[which]  # An empty panel has no numbers.
    image[faded] = _faded(image[faded], paper)
    image[pinned] = ink
    height, width = numbers.shape
    if image.numel():
        axes.imshow(image.numpy(), interpolation="nearest", aspect="auto")
    aspect = min(max(height / max(width, 1), 1 / _SLENDER), _SLENDER)
    axes.set_box_aspect(aspect)
    down, across = side * min(aspect, 1), side / max(aspect, 1)
    if max(height, width) <= _NUMBERED_CELLS:
        for row, column in ((numbers >= 0) & (scales != 0)).nonzero().tolist():
            text = _multiple(float(scales[row, column]), int(numbers[row, column]))
            size = min(across / width / (len(text) + 0.5) / _CHARACTER, _LARGEST)
            if size >= _SMALLEST:
                color = "black" if float(image[row, column, :3] @ _LUMINANCE) > 0.4 else "white"
                axes.text(column, row, text, color=color, fontsize=size, ha="center", va="center")
    rows, columns = _sides(shape)
    _label(axes.yaxis, rows, shape, height, down)
    _label(axes.xaxis, columns, shape, width, across)
    legend = {
        "free": (free, numbers == FREE),
        "pinned at zero" if is_linear else "pinned": (ink, pinned),
        "faded: a negative multiple": (_faded(_color(0), paper), faded),
    }
    return {text: color.tolist() for text, (color, where) in legend.items() if bool(where.any())}


def _multiple(scale: float, number: int) -> str:
    text = f"{'-' * (scale < 0)}{number}" if abs(scale) == 1 else f"{scale:.3g}·{number}"
    return text.replace("-", "\N{MINUS SIGN}")


def _label(axis: Any, side: Sequence[int], shape: torch.Size, cells: int, room: float) -> None:
    """Label an axis with its dimensions, and with as many indices as fit into ``room`` points."""
    if not side:
        axis.set_ticks([])
        return
    indices = _drawn_indices(shape)
    sizes = {dim: (len(indices[dim]), shape[dim]) for dim in side}
    texts = [f"{dim} ({drawn} of {size})" if drawn < size else str(dim) for dim, (drawn, size) in sizes.items()]
    axis.set_label_text(f"dimension{'s' * (len(side) > 1)} {', '.join(texts)}")
    outer, gap = indices[side[0]], len(side) > 1
    # The cells of one outer index, with a gap after the innermost dimension.
    block = (cells + gap) / max(len(outer), 1)
    font = axis.get_major_ticks(1)[0].label1.get_fontsize()
    # Along the horizontal axis, a label is as wide as its digits and a blank.
    taken = font * (_CHARACTER * (len(str(shape[side[0]])) + 1) if axis.axis_name == "x" else 1.2)
    count = max(min(_TICKS, int(room / taken)), 1)
    steps = (digit * 10**power for power in range(3) for digit in (1, 2, 5))
    step = next(step for step in steps if step * count >= len(outer))
    positions = [number * block + max(block - 1 - gap, 0) / 2 for number in range(0, len(outer), step)]
    axis.set_ticks(positions, [str(index) for index in outer[::step].tolist()])


def _color(number: int) -> Tensor:
    """Return the colour of a group.

    After the first colours, hues are multiples of the golden ratio, and consecutive colours differ in lightness, too.
    """
    if number < len(_FIRST_COLORS):
        return _rgba(_FIRST_COLORS[number])
    return _rgba(_matplotlib("colors").hsv_to_rgb((number * _GOLDEN % 1, *_SHADES[number % len(_SHADES)])))


def _faded(color: Tensor, paper: Tensor) -> Tensor:
    return color.lerp(paper, 0.55)


def _rgba(color: Any) -> Tensor:
    return torch.tensor(_matplotlib("colors").to_rgba(color, alpha=1), dtype=torch.float64, device="cpu")


def _new_axes() -> Any:
    return _matplotlib("pyplot").subplots(layout="constrained")[1]


def _matplotlib(name: str) -> Any:
    return imported(f"matplotlib.{name}", "Figures are drawn with matplotlib.", "plot")
