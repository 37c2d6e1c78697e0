"""What an optimizer says of its ties: a table that agrees with a count of the entries, and one line."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import groups_of_entries
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from tieopt import Tie, TiedOptimizer
from tieopt.modes.summary import SummaryRow
from tieopt.testing import ties

SHAPES = [(4, 3), (3, 4), (5,), (2, 3, 2)]


@st.composite
def drawn_ties(draw: st.DrawFn) -> tuple[list[Parameter], list[Tie]]:
    params = [Parameter(torch.ones(shape)) for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))]
    return params, draw(ties(params))


def cells(line: str, width: int) -> list[str]:
    """The cells of a line of the table, of which shapes have blanks in them, too."""
    name, rest = line.split(None, 1)
    shape, numbers = rest.split(")", 1)
    assert len(line) == width
    return [name, shape + ")", *numbers.split()]


def width_of(tie: Tie) -> int:
    """The entries of a slice."""
    part = tie.parts[0]
    return part.param.numel() // part.groups.numel()


def labelled(tie: Tie) -> list[tuple[Tensor, Tensor]]:
    """The labels and scales of each part."""
    return [(part.groups, torch.ones(part.groups.shape) if part.scale is None else part.scale) for part in tie.parts]


def in_order_of_parameters(tie: Tie, params: list[Parameter]) -> list[tuple[int, Any, tuple[Tensor, Tensor]]]:
    """The number of the parameter of each part, the part, and its labels and scales; parts of one by their dimension.

    The table has the parameters in their order, and the tie in that in which they were joined.
    """
    numbers = [next(number for number, param in enumerate(params) if param is part.param) for part in tie.parts]
    return sorted(zip(numbers, tie.parts, labelled(tie), strict=True), key=lambda entry: (entry[0], entry[1].dim))


def counted(parts: list[tuple[Tensor, Tensor]], width: int = 1) -> tuple[int, int, int, int, int]:
    """Slices, groups, members and free ones, one slice after the other; and how many values are left in them."""
    pairs = [
        (number, float(size))
        for labels, scale in parts
        for number, size in zip(labels.flatten().tolist(), scale.flatten().tolist(), strict=True)
    ]
    free = sum(number == -1 for number, _ in pairs)
    groups = {number for number, _ in pairs} - {-1}
    trained = {number for number, size in pairs if size != 0} - {-1}
    return len(pairs), len(groups), len(pairs) - free, free, (len(trained) + free) * width


@given(drawn=drawn_ties())
def test_the_table_counts_what_is_there(drawn: tuple[list[Parameter], list[Tie]]) -> None:
    params, given_ties = drawn
    names = [f"layer.{number}" for number in range(len(params))]
    optimizer = TiedOptimizer(SGD(zip(names, params, strict=True)), given_ties)

    head, *lines = optimizer.tie_summary().splitlines()
    # tests/test_views.py tests these.
    lines = [line for line in lines if not line.startswith("Regular: ")]
    assert head.split() == ["parameter", "shape", "slices", "groups", "members", "free", "distinct", "drift"]
    for tie in optimizer.ties:
        for number, part, columns in in_order_of_parameters(tie, params):
            expected = [names[number], str(tuple(part.param.shape)), *map(str, counted([columns], width_of(tie))), "0"]
            assert cells(lines.pop(0), len(head)) == expected
    for tie in optimizer.ties:
        if len(tie.parts) > 1:
            called = ", ".join(names[number] for number, *_ in in_order_of_parameters(tie, params))
            assert lines.pop(0) == f"Joined: {called}, {counted(labelled(tie), width_of(tie))[-1]} distinct in all"
    assert not lines


@given(drawn=drawn_ties())
def test_the_rows_are_those_of_the_table(drawn: tuple[list[Parameter], list[Tie]]) -> None:
    params, given_ties = drawn
    summary = TiedOptimizer(SGD(params), given_ties).tie_summary()
    head, *lines = summary.splitlines()
    assert tuple(head.split()) == SummaryRow._fields
    for row, line in zip(summary.rows, lines, strict=False):
        name, shape = line.split(")", 1)[0].rsplit("(", 1)
        assert [row.parameter, str(row.shape)] == [name.strip(), f"({shape})"]
        assert list(map(str, row[2:-1])) == line.split()[-6:-1]
        assert row.drift == 0.0
    assert len(summary.rows) == sum(len(tie.parts) for tie in given_ties)


@given(drawn=drawn_ties())
def test_the_totals_are_counted_entry_by_entry(compact: bool, drawn: tuple[list[Parameter], list[Tie]]) -> None:
    params, given_ties = drawn
    params.append(Parameter(torch.ones(7)))
    optimizer = TiedOptimizer(AdamW(params), given_ties, compact=compact)
    groups = [group for tie in given_ties for group in groups_of_entries(tie, params)]
    tied = sum(map(len, groups))
    trained = sum(any(scale for _, _, scale in group) for group in groups)
    summary = optimizer.tie_summary()

    assert summary.entries == sum(param.numel() for param in params)
    assert summary.distinct == summary.entries - tied + trained
    assert summary.ratio == summary.distinct / summary.entries
    assert summary.state_bytes == 0
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    # Two moments of float32 for each entry that is trained, and a step count for each parameter that has some.
    expected = 8 * (summary.distinct if compact else summary.entries) + 4 * len(optimizer.state)
    assert optimizer.tie_summary().state_bytes == expected
    assert optimizer.tie_summary()[:] == summary


def test_rows_are_counted_by_their_values() -> None:
    weight = Parameter(torch.zeros(6, 512))
    optimizer = TiedOptimizer(SGD([weight]), {weight: [[0, 2], [1, 3, 4]]})
    summary = optimizer.tie_summary()
    assert (summary.rows[0].distinct, summary.distinct, summary.entries) == (3 * 512, 3 * 512, 6 * 512)


def test_without_ties_everything_is_distinct() -> None:
    for params in ([Parameter(torch.zeros(3))], [Parameter(torch.zeros(0))]):
        summary = TiedOptimizer(SGD(params), ()).tie_summary()
        assert (summary.rows, summary.ratio) == ((), 1.0)
        assert summary.entries == summary.distinct == params[0].numel()


def test_state_of_any_kind_is_measured_once() -> None:
    weight = Parameter(torch.ones(4))
    optimizer = TiedOptimizer(SGD([weight]), {weight: [[0, 1]]})
    history = torch.zeros(4, dtype=torch.float64)
    optimizer.state[weight] = {"history": [history, {"again": history}], "pair": (torch.zeros(2), None), "number": 3}
    assert optimizer.tie_summary().state_bytes == 4 * 8 + 2 * 4


def test_a_summary_prints_as_its_table_and_can_be_copied() -> None:
    weight = Parameter(torch.ones(4))
    summary = TiedOptimizer(SGD([weight]), {weight: [[0, 1]]}).tie_summary()
    assert repr(summary) == str(summary) == f"{summary}"
    for other in (copy.deepcopy(summary), pickle.loads(pickle.dumps(summary))):  # noqa: S301
        assert (str(other), other.rows, other.distinct) == (str(summary), summary.rows, 3)


@given(drawn=drawn_ties(), reduction=st.sampled_from(["mean", "sum"]), compact=st.booleans())
def test_the_line_counts_what_is_there(drawn: Any, reduction: str, compact: bool) -> None:
    params, given_ties = drawn
    optimizer = TiedOptimizer(SGD(params), given_ties, reduction=reduction, compact=compact)
    totals = [counted(labelled(tie)) for tie in optimizer.ties]
    groups, members = sum(each[1] for each in totals), sum(each[2] for each in totals)
    held = len({id(part.param) for tie in optimizer.ties for part in tie.parts})

    line = repr(optimizer)
    counts = [f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((groups, "group"), (members, "member"))]
    tied = "no groups" if groups == 0 else f"{counts[0]} of {counts[1]}{' in all' if groups > 1 else ''}"
    where = f"{held} parameter{'' if held == 1 else 's'}"
    if optimizer.ties:
        settings = f"reduction={reduction!r}{', compact=True' if compact else ''}"
        assert line == f"TiedSGD({tied}, in {where}, {settings})"
    for one in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):  # noqa: S301
        assert repr(one) == line
    assert str(optimizer).endswith(line.removeprefix("TiedSGD(").removesuffix(")"))
    optimizer.untie()
    assert repr(optimizer) == "TiedSGD(no ties)"


@given(drawn=drawn_ties())
def test_reprs_are_one_line_each(drawn: tuple[list[Parameter], list[Tie]]) -> None:
    params, given_ties = drawn
    optimizer = TiedOptimizer(AdamW(params), given_ties)
    for thing in (optimizer, *optimizer.ties, *given_ties, Tie("a\nb", [[0], ["c\nd"]])):
        assert "\n" not in repr(thing)


def test_the_drift_is_that_of_the_tie(compact: bool) -> None:
    first, second = (Parameter(torch.zeros(3, 2)) for _ in range(2))
    optimizer = TiedOptimizer(SGD([("a", first), ("b", second)]), {first: [[0, 1]], second: [[0, 1]]}, compact=compact)
    with torch.no_grad():
        second[0] += 3.0
    assert [line.split()[-1] for line in optimizer.tie_summary().splitlines()] == ["drift", "0", "1.5"]


@pytest.mark.parametrize("name", ["a" * 200, "überlang", "a b"])
def test_names_are_shown_whole_and_columns_stay_under_each_other(name: str) -> None:
    params = [Parameter(torch.zeros(3)), Parameter(torch.zeros(12, 3))]
    optimizer = TiedOptimizer(SGD(zip([name, "b"], params, strict=True)), {name: [[0, 1]], "b": [[0, 1]]})
    lines = optimizer.tie_summary().splitlines()
    assert len(set(map(len, lines))) == 1
    assert lines[1].startswith(f"{name.ljust(len('parameter'))}  (3,)")


def test_the_line_needs_no_parameter() -> None:
    weight = Parameter(torch.zeros(3))
    optimizer = TiedOptimizer(SGD([weight]), {weight: [[0, 1]]})
    optimizer.param_groups.clear()
    assert repr(optimizer) == "TiedSGD(1 group of 2 members, in 1 parameter, reduction='mean')"
