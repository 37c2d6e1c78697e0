"""Figures of ties: what is drawn is what is tied, however large it is."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import matplotlib as mpl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer, patterns, plot
from tieopt.testing import ties

mpl.use("Agg")

SHAPES = [(4,), (4, 3), (3, 4), (1, 1), (2, 3, 2), (2, 2, 3, 1), (2, 1, 2, 2, 2)]


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


@st.composite
def drawn_ties(draw: st.DrawFn) -> tuple[list[Parameter], list[Tie]]:
    params = [Parameter(torch.ones(shape)) for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))]
    return params, draw(ties(params).filter(bool))


def cell(entry: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """Where an entry is drawn: kernels stand side by side, one cell apart."""
    match entry, shape:
        case (i,), _:
            return 0, i
        case (i, j), _:
            return i, j
        case (i, j, k), (_, _, length):
            return i, j * (length + 1) + k
        case (i, j, k, m), (_, _, height, width):
            return i * (height + 1) + k, j * (width + 1) + m
        case (i, j, d, k, m), (_, _, depth, height, width):
            return i * (height + 1) + k, (j * depth + d) * (width + 1) + m
    raise AssertionError(entry)


def kinds(given_ties: list[Tie], param: Tensor) -> dict[tuple[int, ...], Any]:
    """What each entry of a parameter is: free, pinned, or of which group and with which sign."""
    entry_kinds: dict[tuple[int, ...], Any] = dict.fromkeys(product(*map(range, param.shape)), "free")
    for number, tie in enumerate(given_ties):
        for part in tie.parts:
            if part.param is not param:
                continue
            for entry in entry_kinds:
                front = (entry[part.dim], *entry[: part.dim], *entry[part.dim + 1 :])[: part.groups.dim()]
                label, scale = int(part.groups[front]), 1.0 if part.scale is None else float(part.scale[front])
                if label >= 0:
                    entry_kinds[entry] = (number, label, scale > 0) if scale else "pinned"
    return entry_kinds


def image_of(axes: Axes) -> Tensor:
    (image,) = axes.images
    return torch.tensor(image.get_array().tolist(), dtype=torch.float64)


@given(drawn=drawn_ties())
def test_entries_have_one_colour_if_and_only_if_they_are_tied(drawn: tuple[list[Parameter], list[Tie]]) -> None:
    _, given_ties = drawn
    params = list({id(part.param): part.param for tie in given_ties for part in tie.parts}.values())
    figure = plot.draw_groups(given_ties, figure=Figure())
    pairs = set()
    for axes, param in zip(figure.axes, params, strict=True):
        image, entries = image_of(axes), set()
        for entry, kind in kinds(given_ties, param).items():
            entries.add(cell(entry, tuple(param.shape)))
            pairs.add((kind, tuple(image[cell(entry, tuple(param.shape))].tolist())))
        gaps = set(product(range(image.shape[0]), range(image.shape[1]))) - entries
        assert all(float(image[gap][3]) == 0 for gap in gaps)
        assert entries | gaps == set(product(*map(range, image.shape[:2])))
    colours, drawn_kinds = {colour for _, colour in pairs}, {kind for kind, _ in pairs}
    assert len(colours) == len(drawn_kinds) == len(pairs)


@given(drawn=drawn_ties())
def test_an_optimizer_is_drawn_as_its_ties_under_the_names_of_its_parameters(
    drawn: tuple[list[Parameter], list[Tie]],
) -> None:
    params, given_ties = drawn
    names = [f"$layer$.{number}" for number in range(len(params))]
    optimizer = TiedOptimizer(SGD(zip(names, params, strict=True)), given_ties)
    figure, same = plot.draw_groups(optimizer, figure=Figure()), plot.draw_groups(optimizer.ties, figure=Figure())
    tied = [part.param for tie in optimizer.ties for part in tie.parts]
    titles = dict.fromkeys(
        next(f"{name}\n{tuple(param.shape)}" for name, param in zip(names, params, strict=True) if param is drawn_param)
        for drawn_param in tied
    )
    assert [axes.get_title() for axes in figure.axes] == list(titles)
    for axes, other in zip(figure.axes, same.axes, strict=True):
        assert torch.equal(image_of(axes), image_of(other))
    figure.draw_without_rendering()


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_the_legend_has_the_colours_of_the_panel(style: str) -> None:
    tie = Tie(torch.zeros(4), torch.tensor([0, 0, 1, -1]), scale=torch.tensor([1.0, -1.0, 0.0, 1.0]))
    with plt.style.context(style):
        figure = plot.draw_groups(tie)
        (legend,) = figure.legends
        swatches = dict(zip([text.get_text() for text in legend.texts], legend.get_patches(), strict=True))
        image = image_of(figure.axes[0])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "\N{MINUS SIGN}0"]
    for text, column in (("free", 3), ("pinned at zero", 2), ("faded: a negative multiple", 1)):
        assert swatches[text].get_facecolor() == pytest.approx(image[0, column].tolist())
    assert len(set(map(tuple, image[0].tolist()))) == 4


def test_the_legend_names_what_is_there() -> None:
    assert not plot.draw_groups(Tie(torch.zeros(2), [[0, 1]])).legends


def test_multiples_are_written_where_there_is_room() -> None:
    def texts(count: int) -> list[str]:
        scale = torch.tensor([2.5, -0.5] + [1.0] * (count - 2))
        (axes,) = plot.draw_groups(Tie(torch.zeros(count), torch.arange(count) // 2, scale=scale)).axes
        return [text.get_text() for text in axes.texts]

    assert texts(4) == ["2.5·0", "\N{MINUS SIGN}0.5·0", "1", "1"]
    assert texts(13) == []


TEN = torch.tensor([1.0, -1.0, 0.0, 2.5, -0.5, 1.0, 1.0, 1.0, -12.25, 1.0])


@pytest.mark.parametrize("shape", [(10,), (10, 4), (10, 12), (10, 2, 2, 2)])
@pytest.mark.parametrize("size", [None, (4, 4), (9, 4)])
def test_what_is_written_in_a_figure_stays_in_its_place(
    shape: tuple[int, ...], size: tuple[float, float] | None
) -> None:
    tie = Tie(torch.zeros(shape), torch.tensor([0, 0, 0, 1, 1, 2, 2, 10, 10, -1]), scale=TEN)
    figure = plot.draw_groups(tie, figure=size and plt.figure(figsize=size, layout="constrained"))
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    whole, outer = figure.bbox, legend.get_window_extent()
    assert whole.x0 <= outer.x0 <= outer.x1 <= whole.x1
    assert whole.y0 <= outer.y0 <= outer.y1 < axes.get_window_extent().y0
    for text in axes.texts:
        assert text.get_fontsize() >= 3.5
        box = text.get_window_extent()
        (left, _), (right, _) = axes.transData.transform([(text.get_position()[0] + half, 0) for half in (-0.5, 0.5)])
        assert left <= box.x0 <= box.x1 <= right


@pytest.mark.parametrize("shape", [(50_000, 128), (128, 50_000), (1000, 1000), (300,), (7, 300), (64, 3, 7, 7)])
@pytest.mark.parametrize("style", ["default", {"xtick.labelsize": 14, "ytick.labelsize": "large"}])
def test_ticks_do_not_overlap(shape: tuple[int, ...], style: Any) -> None:
    whole = torch.empty(1).expand(shape)
    with plt.style.context(style):
        figure = plot.draw_groups([Tie(whole, torch.arange(shape[0])), Tie(torch.zeros(3), [[0, 1]])])
        figure.draw_without_rendering()
        axes = figure.axes[0]
        for axis, low, high in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
            spans = sorted((getattr(box, low), getattr(box, high)) for box in boxes)
            assert all(end < start for (_, end), (start, _) in pairwise(spans))


# How colours look to those who do not see green: Machado, Oliveira and Fernandes, "A Physiologically-based Model for
# Simulation of Color Vision Deficiency", 2009.
DEUTERANOPIA = torch.tensor(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    dtype=torch.float64,
)


def test_groups_that_follow_each_other_have_colours_that_everybody_tells_apart() -> None:
    colours = image_of(plot.draw_groups(Tie(torch.zeros(130), torch.arange(130))).axes[0])[0, 7:, :3]
    for seen, least in ((colours, 0.4), (colours @ DEUTERANOPIA.T, 0.12)):
        for step in range(1, 6):
            assert float((seen[step:] - seen[:-step]).norm(dim=1).min()) > least


@pytest.mark.parametrize(
    "shape", [(100_000,), (30_000, 2_000), (700, 300, 3, 3), (3, 500, 700), (2, 2, 300, 400), (40, 20, 5, 5, 5)]
)
def test_large_parameters_are_drawn_from_evenly_spaced_indices(shape: tuple[int, ...]) -> None:
    param = torch.empty(1).expand(shape)
    labels = torch.arange(shape[0]) // 7
    (axes,) = plot.draw_groups(Tie(param, labels)).axes
    image = image_of(axes)
    # A gap after each kernel, at most, stands beside the cells.
    assert 128 <= max(image.shape[:2]) <= 256
    assert len(axes.get_children()) < 50
    assert " of " in axes.get_xlabel() + axes.get_ylabel()

    axis = axes.xaxis if len(shape) == 1 else axes.yaxis
    shown = [int(label.get_text()) for label in axis.get_ticklabels()]
    assert shown[0] == 0
    assert shown == sorted(set(shown))
    assert shown[-1] >= shape[0] / 2


@pytest.mark.parametrize("shape", [(1000, 2), (30, 2), (50, 2, 3, 3)])
def test_ticks_name_the_indices_that_stand_there(shape: tuple[int, ...]) -> None:
    whole = torch.empty(1).expand(shape)
    height = shape[2] + 1 if len(shape) > 2 else 1
    (axes,) = plot.draw_groups(Tie(whole, torch.arange(shape[0]))).axes
    for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        index = int(label.get_text())
        alone = torch.full(shape[:1], -1)
        alone[index] = 0
        image = image_of(plot.draw_groups(Tie(whole, alone), figure=Figure()).axes[0])
        drawn = (image != image[-1 if index == 0 else 0]).any(-1)[:, 0] & (image[:, 0, 3] > 0)
        rows = drawn.nonzero().flatten().tolist()
        assert len(rows) == max(height - 1, 1)
        assert place == sum(rows) / len(rows)


def test_several_ties_of_a_parameter_are_in_one_panel() -> None:
    weight = torch.zeros(4, 3)
    figure = plot.draw_groups([Tie(weight, [[0, 1]]), Tie(weight, torch.tensor([[-1] * 3] * 2 + [[0] * 3] * 2))])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0"] * 6 + ["1"] * 6


def test_several_ties_of_a_parameter_keep_their_scales() -> None:
    weight, signs = torch.zeros(4), torch.tensor([-1.0, 1.0])
    first = Tie(weight, torch.tensor([0, 0, -1, -1]), scale=torch.cat([signs, torch.ones(2)]))
    second = Tie(weight, torch.tensor([-1, -1, 0, 0]), scale=torch.cat([torch.ones(2), signs]))
    (axes,) = plot.draw_groups([first, second]).axes
    assert [text.get_text() for text in axes.texts] == ["\N{MINUS SIGN}0", "0", "\N{MINUS SIGN}1", "1"]


def test_a_pattern_that_is_not_in_use_can_be_drawn() -> None:
    weight = torch.zeros(5, 5)
    image = image_of(plot.draw_groups(Tie(weight, patterns.symmetric(weight.shape))).axes[0])
    assert torch.equal(image, image.transpose(0, 1))


@given(drawn=drawn_ties())
def test_bars_count_the_groups_of_each_size(drawn: tuple[list[Parameter], list[Tie]]) -> None:
    _, given_ties = drawn
    sizes = [
        sum(int((part.groups == label).sum()) for part in tie.parts)
        for tie in given_ties
        for label in {label for part in tie.parts for label in part.groups.unique().tolist()} - {-1}
    ]
    axes = Figure().subplots()
    if not sizes:
        with pytest.raises(ValueError, match="no groups"):
            plot.draw_group_sizes(given_ties, axes=axes)
        return
    assert plot.draw_group_sizes(given_ties, axes=axes) is axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
    assert bars == {size: sizes.count(size) for size in sizes}


@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=30))
def test_bars_of_sizes_that_differ_much_count_each_once(sizes: list[int]) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    axes = plot.draw_group_sizes(Tie(torch.empty(len(labels)), labels), axes=Figure().subplots())
    logarithmic = max(sizes) - min(sizes) >= 40
    assert axes.get_xscale() == ("log" if logarithmic else "linear")
    assert len(axes.patches) <= 40
    for bar in axes.patches:
        low, high = bar.get_x(), bar.get_x() + bar.get_width()
        assert bar.get_height() == sum(low < size < high for size in sizes)
    assert sum(bar.get_height() for bar in axes.patches) == len(sizes)


@given(drifts=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60), tensor=st.booleans())
def test_drifts_are_drawn_as_they_are(drifts: list[float], tensor: bool) -> None:
    axes = plot.draw_drift(torch.tensor(drifts) if tensor else drifts, axes=Figure().subplots())
    (line,) = axes.lines
    assert line.get_ydata().tolist() == drifts
    assert line.get_xdata().tolist() == list(range(1, len(drifts) + 1))
    positive = [drift for drift in drifts if drift]
    much = bool(positive) and max(positive) > 100 * min(positive)
    assert axes.get_yscale() == ("symlog" if much else "linear")
    assert axes.get_ylim()[0] == 0
    axes.figure.draw_without_rendering()


def test_drifts_of_several_runs_share_an_axis_and_what_is_not_finite_is_left_out() -> None:
    axes = plot.draw_drift([1.0, math.nan, math.inf])
    assert axes.get_yscale() == "linear"
    assert plot.draw_drift([1e-5, 0.0], axes=axes) is axes
    assert len(axes.lines) == 2
    assert axes.get_yscale() == "symlog"
    axes.figure.draw_without_rendering()


@pytest.mark.parametrize("draw", [plot.draw_groups, plot.draw_group_sizes])
@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (3, TypeError, "3 (int)"),
        ([Tie(torch.zeros(2), [[0, 1]]), "weight"], TypeError, "'weight' (str)"),
        (Tie("weight", [[0, 1]]), TypeError, "Tie('weight'"),
        ([], ValueError, "[] (list)"),
        (lambda: TiedOptimizer(SGD([Parameter(torch.zeros(2))]), {}), ValueError, "() (tuple)"),
    ],
    ids=["number", "name", "tie of a name", "nothing", "no ties"],
)
def test_what_cannot_be_drawn_is_refused_before_there_is_a_figure(
    draw: Any, wrong: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        draw(wrong() if callable(wrong) else wrong)
    assert f"Got:      {text}" in str(caught.value)
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [("drifts", TypeError), ([None], TypeError), ([], ValueError), ([[1.0]], ValueError), (1.0, ValueError)],
)
def test_what_are_no_drifts_is_refused(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="These are no drifts"):
        plot.draw_drift(wrong)
    assert not plt.get_fignums()


def test_the_default_device_does_not_matter() -> None:
    weight = Parameter(torch.zeros(400, 2))
    with torch.device("meta"):
        plot.draw_groups(Tie(weight, [[0, 1], [2, 3, 4]]))
        axes = plot.draw_group_sizes(Tie(weight, [[0, 1], list(range(2, 400))]))
        plot.draw_drift([0.1, 0.0])
    assert sum(bar.get_height() for bar in axes.patches) == 2


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 3, 0, 0)])
def test_what_is_empty_is_drawn_empty(shape: tuple[int, ...]) -> None:
    figure = plot.draw_groups(Tie(torch.zeros(shape), []))
    figure.draw_without_rendering()
    assert len(figure.axes) == 1


def test_long_names_end_as_they_do() -> None:
    name = "model." * 20 + "weight"
    optimizer = TiedOptimizer(SGD([(name, Parameter(torch.zeros(3)))]), {name: [[0, 1]]})
    title = plot.draw_groups(optimizer).axes[0].get_title().splitlines()[0]
    assert len(title) == 36
    assert title == f"{name[:12]}...{name[-21:]}"


@pytest.mark.slow
def test_matplotlib_is_not_needed_until_something_is_drawn() -> None:
    program = """
        import sys
        sys.modules["matplotlib"] = None  # an import of it fails
        import torch
        from tieopt import Tie, plot
        try:
            plot.draw_groups(Tie(torch.zeros(2), [[0, 1]]))
        except ImportError as error:
            assert "Expected: pip install 'tieopt[plot]'\\n  Got: " in str(error), error
        else:
            sys.exit("no error")
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(program)], check=True)  # noqa: S603
