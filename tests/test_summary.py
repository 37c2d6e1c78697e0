"""What an optimizer says of its ties: a table that agrees with a count of the entries, and one line."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from tieopt import Tie, TiedOptimizer
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


def labelled(tie: Tie) -> list[tuple[Tensor, Tensor]]:
    """The labels and scales of each part."""
    return [(part.groups, torch.ones(part.groups.shape) if part.scale is None else part.scale) for part in tie.parts]


def counted(parts: list[tuple[Tensor, Tensor]]) -> tuple[int, int, int, int, int]:
    """Slices, groups, members, free and distinct ones, one slice after the other."""
    pairs = [
        (number, float(size))
        for labels, scale in parts
        for number, size in zip(labels.flatten().tolist(), scale.flatten().tolist(), strict=True)
    ]
    free = sum(number == -1 for number, _ in pairs)
    groups = {number for number, _ in pairs} - {-1}
    trained = {number for number, size in pairs if size != 0} - {-1}
    return len(pairs), len(groups), len(pairs) - free, free, len(trained) + free


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
        called = [names[next(i for i, param in enumerate(params) if param is part.param)] for part in tie.parts]
        for name, part, columns in zip(called, tie.parts, labelled(tie), strict=True):
            expected = [name, str(tuple(part.param.shape)), *map(str, counted([columns])), "0"]
            assert cells(lines.pop(0), len(head)) == expected
    for tie in optimizer.ties:
        if len(tie.parts) > 1:
            called = [names[next(i for i, param in enumerate(params) if param is part.param)] for part in tie.parts]
            note = f"Joined: {', '.join(called)}, {counted(labelled(tie))[-1]} distinct in all"
            assert lines.pop(0) == note
    assert not lines


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
