"""Figures of ties: which entries are one, how large the groups are, how far relaxed members drift apart.

They need matplotlib: ``pip install 'tieopt[plot]'``. Figures are pyplot's, so that ``plt.show()`` and notebooks show
them, and take the colours of the style that is in use. Only labels are drawn, whatever the entries of a parameter are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tieopt.errors import shown
from tieopt.optimizer import TiedOptimizer
from tieopt.ties.places import all_places, name_of, parameter_at
from tieopt.ties.slices import FREE, Slices, numbered, told_apart
from tieopt.ties.tie import Part, Tie

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["draw_drift", "draw_group_sizes", "draw_groups"]

# Cells along each side of a panel, and those that have room for a number.
_CELLS = 256
_NUMBERED_CELLS = 12

# Indices of a dimension that are drawn at least, of several along one side.
_FAIR = 16

# What a panel's longer side is of its shorter one, at most.
_SLENDER = 4

_PANELS_IN_A_LINE = 3
_TICKS = 8

# How much of its place in a figure the longer side of a panel takes, about; and the points of a legend of one line.
_SIDE = 0.55
_LEGEND = 420

# In points: the numbers in cells, and those that can hardly be read any more. And of both fonts the width of a
# character, as a part of its size.
_LARGEST, _SMALLEST = 7.0, 3.5
_CHARACTER = 0.62

# Characters of a name that fit above a panel; its end says more than its beginning.
_NAME = 36

_BARS = 40

# Of Okabe and Ito, which also the colour-blind tell apart; without black.
_FIRST_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# The saturation and value of further ones, in turn. Of those tried they keep six groups that follow each other farthest
# apart, also for those who do not see green.
_SHADES = ((1.0, 0.85), (0.45, 1.0), (0.75, 0.8), (1.0, 0.45))
_GOLDEN = (math.sqrt(5) - 1) / 2

# Between the kernels of a convolution.
_GAP = FREE - 1


def draw_groups(
    ties: TiedOptimizer | Tie | Iterable[Tie], *, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draws the entries of each tied parameter, those of one group in one colour.

    A matrix is drawn as it is printed, a vector as one line, and a convolution's weight ``[out, in, height, width]`` as
    the matrix of its kernels. What has the same colour in two panels is joined. Members that are negative multiples
    of what they share are faded; free entries and those that are pinned at zero have the colours of the legend.
    In small panels the groups have numbers, too, with what multiple a member is, where there is room for them: colours
    of many groups are alike. Of large dimensions evenly spaced indices are drawn, as the axes say, so that large
    parameters take no longer; what repeats within a few indices cannot be seen then.

    Args:
        ties: an optimizer, all of whose ties are drawn, or those to draw.
        figure: where to draw, best one of ``layout="constrained"``, which has room for the legend; a new one if it is
            None.

    Returns:
        The figure, of which each tied parameter has one of the ``axes``.

    Raises:
        TypeError: ``ties`` are not ties, or are for names instead of parameters.
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
    listed, names = _listed(ties)
    panels = _panels(listed)
    pyplot = _matplotlib("pyplot")
    columns = min(len(panels), _PANELS_IN_A_LINE)
    lines = math.ceil(len(panels) / columns)
    if figure is None:
        figure = pyplot.figure(figsize=(1 + 3 * columns, 0.5 + 3 * lines), layout="constrained")
    assert figure is not None
    wide, high = (72 * pixels / figure.dpi for pixels in (figure.bbox.width, figure.bbox.height))
    legend = {}
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        legend.update(_draw(axes, panel, _SIDE * min(wide / columns, high / lines)))
        name = names.get(id(panel.param), "parameter")
        shape = f"{tuple(panel.param.shape)}"
        short = name if len(name) <= _NAME else f"{name[: _NAME // 3]}...{name[3 + _NAME // 3 - _NAME :]}"
        title = f"{short}\n{shape}" if names else f"{name} of shape {shape}"
        axes.set_title(title, fontsize="medium", parse_math=False)
    if legend:
        patch, edge = _matplotlib("patches").Patch, _rgb("text.color").tolist()
        handles = [patch(facecolor=color, edgecolor=edge, linewidth=0.5, label=text) for text, color in legend.items()]
        beside = len(handles) if wide > _LEGEND else 1
        figure.legend(handles=handles, loc="outside lower center", ncols=beside, frameon=False)
    return figure


def draw_group_sizes(ties: TiedOptimizer | Tie | Iterable[Tie], *, axes: Axes | None = None) -> Axes:
    """Draws how many groups have how many members: a histogram, on a logarithmic axis if the sizes differ much.

    Args:
        ties: an optimizer, all of whose ties are counted, or those to count. A group of joined parameters has its
            members in all of them.
        axes: where to draw; those of a new figure if it is None.

    Returns:
        The axes.

    Raises:
        TypeError: ``ties`` are not ties, or are for names instead of parameters.
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
    sizes = torch.cat([_sizes(tie) for tie in _listed(ties)[0]])
    if not len(sizes):
        raise ValueError("There are no groups to draw.\n  Expected: ties with groups\n  Got:      free slices only")
    axes = _axes(axes)
    values, counts = torch.unique(sizes, return_counts=True)
    first, last = int(values[0]), int(values[-1])
    if last - first < _BARS:
        axes.bar(values.tolist(), counts.tolist(), width=0.8)
    else:
        edges = torch.logspace(math.log10(first), math.log10(last + 1), _BARS + 1, dtype=torch.float64, device="cpu")
        # Halfway between sizes, so that each is in one bin.
        edges = torch.unique(edges.round()) - 0.5
        bins = torch.bucketize(values.double(), edges) - 1
        heights = torch.zeros(len(edges) - 1, device="cpu").index_add_(0, bins, counts.float())
        axes.bar(edges[:-1].tolist(), heights.tolist(), width=edges.diff().tolist(), align="edge")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    ticker = _matplotlib("ticker")
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set(xlabel="members of a group", ylabel="groups")
    return axes


def draw_drift(drifts: Sequence[float] | Tensor, *, axes: Axes | None = None) -> Axes:
    """Draws how far members drifted apart over a training.

    The axis is logarithmic above the smallest drift that is not zero, if the drifts differ much.

    Args:
        drifts: what :meth:`~tieopt.TiedOptimizer.tie_drift` returned, step by step for example; shape ``[n]``.
        axes: where to draw, beside what is there; those of a new figure if it is None.

    Returns:
        The axes.

    Raises:
        TypeError: ``drifts`` are no numbers.
        ValueError: there are no drifts, or they have not exactly one dimension.
        ImportError: matplotlib is not installed.

    Example:
        >>> from tieopt import plot
        >>> axes = plot.draw_drift([0.0, 0.3, 0.5, 0.0])
        >>> axes.get_ylabel()
        'drift'
    """
    expected = "  Expected: a sequence of numbers, one or more\n"
    try:
        values = torch.as_tensor(drifts, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"These are no drifts.\n{expected}  Got:      {shown(drifts)}") from None
    if values.dim() != 1 or not len(values):
        raise ValueError(f"These are no drifts.\n{expected}  Got:      {shown(drifts)}")
    axes = _axes(axes)
    axes.plot(range(1, len(values) + 1), values.tolist(), marker="." if len(values) <= _BARS else None)
    drawn = torch.cat([torch.as_tensor(line.get_ydata(), dtype=torch.float64, device="cpu") for line in axes.lines])
    positive = drawn[(drawn > 0) & drawn.isfinite()]
    if len(positive) and float(positive.max()) > 100 * float(positive.min()):
        axes.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(float(positive.min()))))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True))
    axes.set(xlabel="measurement", ylabel="drift")
    return axes


class _Panel(NamedTuple):
    """What is drawn of a parameter.

    Attributes:
        param: the parameter.
        kept: the indices that are drawn of each of its dimensions.
        numbers: the group of each entry, -1 for a free one, of the shape that is drawn.
        scales: what multiple of its group's shared value each is.
    """

    param: Tensor
    kept: list[Tensor]
    numbers: Tensor
    scales: Tensor


def _listed(ties: Any) -> tuple[list[Tie], dict[int, str]]:
    """The ties, and the names of the parameters that have one."""
    names = {}
    if isinstance(ties, TiedOptimizer):
        groups = ties.param_groups
        names = {id(parameter_at(groups, place)): name_of(groups, place) for place in all_places(groups)}
        ties = ties.ties
    listed = [ties] if isinstance(ties, Tie) or not isinstance(ties, Iterable) else list(ties)
    expected = "  Expected: a TiedOptimizer, a Tie of parameters, or an iterable of them\n"
    for tie in listed:
        if not isinstance(tie, Tie) or any(isinstance(part.param, str) for part in tie.parts):
            raise TypeError(f"These ties cannot be drawn.\n{expected}  Got:      {shown(tie)}")
    if not listed:
        raise ValueError(f"There are no ties to draw.\n{expected}  Got:      {shown(ties)}")
    return listed, names


def _panels(ties: Sequence[Tie]) -> list[_Panel]:
    """What to draw of each parameter, with all its ties, whose groups are numbered together."""
    sampled = [[_sampled(part) for part in tie.parts] for tie in ties]
    parted = told_apart(numbered(own) for own in sampled)
    panels: dict[int, _Panel] = {}
    for tie, own in zip(ties, parted, strict=True):
        for part, slices in zip(tie.parts, own, strict=True):
            assert isinstance(part.param, Tensor)
            panel = panels.get(id(part.param))
            if panel is not None:
                free = slices.labels == FREE
                numbers = torch.where(free, panel.numbers, slices.labels)
                scales = torch.where(free, panel.scales, slices.scales)
                panels[id(part.param)] = panel._replace(numbers=numbers, scales=scales)
            else:
                kept = _kept(part.param.shape)
                panels[id(part.param)] = _Panel(part.param, kept, slices.labels, slices.scales)
    return list(panels.values())


def _sampled(part: Part) -> Slices:
    """The labels of the entries that are drawn, of the shape that is drawn."""
    assert isinstance(part.param, Tensor)
    moved, kept = part.param.movedim(part.dim, 0).shape, _kept(part.param.shape)

    def drawn(column: Tensor) -> Tensor:
        within = [1] * (len(moved) - column.dim())
        # A view: what is not drawn takes no memory.
        whole = column.reshape(*column.shape, *within).expand(moved).movedim(0, part.dim)
        return whole[torch.meshgrid(kept, indexing="ij")]

    return Slices(drawn(part.groups), None if part.scale is None else drawn(part.scale))


def _sides(shape: torch.Size) -> tuple[list[int], list[int]]:
    """The dimensions that run down the panel, and those that run across; the outermost first."""
    dims = list(range(len(shape)))
    if len(dims) == 1:
        return [], dims
    down = [0, len(dims) - 2] if len(dims) > 3 else [0]
    return down, [dim for dim in dims if dim not in down]


def _kept(shape: torch.Size) -> list[Tensor]:
    """Evenly spaced indices of each dimension, of which there is room for."""
    counts = dict.fromkeys(range(len(shape)), 0)
    for side in _sides(shape):
        cells = 1
        for place, dim in reversed(list(enumerate(side))):
            gap = len(side) > 1 and dim == side[-1]
            # Outer dimensions get their share, too.
            fair = max(_CELLS // max(math.prod(shape[outer] for outer in side[:place]), 1), _FAIR)
            counts[dim] = min(shape[dim], max(min(_CELLS // cells, fair - gap), 1))
            cells *= counts[dim] + gap
    return [torch.arange(counts[dim], device="cpu") * size // max(counts[dim], 1) for dim, size in enumerate(shape)]


def _image(entries: Tensor, outside: int) -> Tensor:
    """Entries of a parameter as a matrix, with gaps between kernels."""
    down, across = _sides(entries.shape)
    for side in (down, across):
        if len(side) > 1:
            shape = [*entries.shape]
            shape[side[-1]] = 1
            entries = torch.cat([entries, entries.new_full(shape, outside)], dim=side[-1])
    height, width = (math.prod(entries.shape[dim] for dim in side) for side in (down, across))
    image = entries.permute(*down, *across).reshape(height, width)
    return image[: -1 if len(down) > 1 else None, : -1 if len(across) > 1 else None]


def _draw(axes: Axes, panel: _Panel, side: float) -> dict[str, Any]:
    """Draws a parameter, so many points high or wide; returns what is to be in the legend, and its colour."""
    numbers, scales = _image(panel.numbers, _GAP), _image(panel.scales, 1)
    paper, ink = _rgb(axes.get_facecolor()), _rgb("text.color")
    tied, pinned = (numbers >= 0) & (scales != 0), (numbers >= 0) & (scales == 0)
    free, faded = 0.85 * paper + 0.15 * ink, tied & (scales < 0)

    image = torch.zeros(*numbers.shape, 4, dtype=torch.float64, device="cpu")
    image[..., 3] = (numbers != _GAP).double()
    # A view: torch 2.6 takes no mask beside a slice.
    colors = image[..., :3]
    names, which = torch.unique(numbers[tied], return_inverse=True)
    colors[tied] = torch.stack([_color(number) for number in names.tolist()])[which] if len(names) else paper
    colors[faded] = _faded(colors[faded], paper)
    colors[pinned] = ink
    colors[numbers == FREE] = free
    height, width = numbers.shape
    if image.numel():
        axes.imshow(image.numpy(), interpolation="nearest", aspect="auto")
    aspect = min(max(height / max(width, 1), 1 / _SLENDER), _SLENDER)
    axes.set_box_aspect(aspect)
    down, across = side * min(aspect, 1), side / max(aspect, 1)
    if max(height, width) <= _NUMBERED_CELLS:
        for row, column in tied.nonzero().tolist():
            text = _multiple(float(scales[row, column]), int(numbers[row, column]))
            size = min(across / width / (len(text) + 0.5) / _CHARACTER, _LARGEST)
            if size < _SMALLEST:
                continue
            color = "black" if float(colors[row, column] @ _LUMINANCE) > 0.4 else "white"
            axes.text(column, row, text, color=color, fontsize=size, ha="center", va="center")
    for axis, dims, room in zip((axes.yaxis, axes.xaxis), _sides(panel.param.shape), (down, across), strict=True):
        _label(axis, dims, panel, room)
    legend = {
        "free": (free, numbers == FREE),
        "pinned at zero": (ink, pinned),
        "faded: a negative multiple": (_faded(_color(0), paper), faded),
    }
    return {text: color.tolist() for text, (color, where) in legend.items() if bool(where.any())}


_LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64, device="cpu")


def _multiple(scale: float, number: int) -> str:
    text = f"{'-' * (scale < 0)}{number}" if abs(scale) == 1 else f"{scale:.3g}·{number}"
    return text.replace("-", "\N{MINUS SIGN}")


def _label(axis: Any, side: Sequence[int], panel: _Panel, room: float) -> None:
    """Says which dimensions run along an axis, and which of their indices are drawn; so many as there is room for."""
    if not side:
        axis.set_ticks([])
        return
    shown_of = [(dim, len(panel.kept[dim]), panel.param.shape[dim]) for dim in side]
    parts = [f"{dim} ({some} of {all_of_it})" if some < all_of_it else str(dim) for dim, some, all_of_it in shown_of]
    axis.set_label_text(f"dimension{'s' * (len(side) > 1)} {', '.join(parts)}")
    outer = panel.kept[side[0]]
    block = math.prod(len(panel.kept[dim]) for dim in side[1:-1])
    block *= len(panel.kept[side[-1]]) + 1 if len(side) > 1 else 1
    font = _font_size(f"{axis.axis_name}tick.labelsize")
    # Across, a label is as wide as its digits are, and a blank.
    taken = font * (_CHARACTER * (len(str(panel.param.shape[side[0]])) + 1) if axis.axis_name == "x" else 1.2)
    count = max(min(_TICKS, int(room / taken)), 1)
    steps = (digit * 10**power for power in range(3) for digit in (1, 2, 5))
    step = next(step for step in steps if step * count >= len(outer))
    places = [number * block + max(block - 2, 0) / 2 for number in range(0, len(outer), step)]
    axis.set_ticks(places, [str(index) for index in outer[::step].tolist()])


def _color(number: int) -> Tensor:
    """The colour of a group: after the first ones, hues as far apart as the golden ratio keeps them.

    Those that follow each other differ in how light they are, too.
    """
    colors = _matplotlib("colors")
    if number < len(_FIRST_COLORS):
        return torch.tensor(colors.to_rgb(_FIRST_COLORS[number]), dtype=torch.float64, device="cpu")
    rgb = colors.hsv_to_rgb((number * _GOLDEN % 1, *_SHADES[number % len(_SHADES)]))
    return torch.tensor(rgb.tolist(), dtype=torch.float64, device="cpu")


def _faded(color: Tensor, paper: Tensor) -> Tensor:
    return 0.45 * color + 0.55 * paper


def _rgb(color: Any) -> Tensor:
    """A colour, or the colour that the style has for it."""
    matplotlib = _matplotlib()
    if isinstance(color, str) and color in matplotlib.rcParams:
        color = matplotlib.rcParams[color]
    return torch.tensor(_matplotlib("colors").to_rgb(color), dtype=torch.float64, device="cpu")


def _font_size(setting: str) -> float:
    """What the style has for it, in points."""
    properties = _matplotlib("font_manager").FontProperties(size=_matplotlib().rcParams[setting])
    return float(properties.get_size_in_points())


def _sizes(tie: Tie) -> Tensor:
    """The number of members of each group."""
    slices = numbered([Slices(part.groups) for part in tie.parts])
    return torch.bincount(torch.cat([each.labels[each.labels != FREE] for each in slices]))


def _axes(axes: Axes | None) -> Axes:
    if axes is None:
        made: Axes = _matplotlib("pyplot").subplots(layout="constrained")[1]
        return made
    return axes


def _matplotlib(name: str = "") -> Any:
    try:
        return import_module(f"matplotlib.{name}" if name else "matplotlib")
    except ImportError as error:
        raise ImportError(
            f"Figures are drawn with matplotlib.\n  Expected: pip install 'tieopt[plot]'\n  Got:      {error}"
        ) from None
