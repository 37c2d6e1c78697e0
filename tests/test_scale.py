"""The simulation of docs/benchmarks: what it says of small cases, where all can be counted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "benchmarks"))

import scale

layouts = st.sampled_from(sorted(scale.LAYOUTS))


def drawn(layout: str, rows: int) -> Tensor:
    labels, size = scale.LAYOUTS[layout]
    return labels(rows, size, torch.Generator().manual_seed(rows))


@given(layouts, st.integers(8, 200), st.integers(1, 9))
def test_all_ranks_together_send_every_mean_and_every_reply(layout, rows, ranks):
    labels = drawn(layout, rows)
    holders = [sum(int((own == group).any()) for own in labels.chunk(ranks)) for group in labels.unique()]
    found = scale.costs(labels, ranks, range(ranks), width=3)

    assert sum(cost.moved for cost in found) == 2 * sum(2 * (count - 1) for count in holders)
    assert sum(cost.spanning for cost in found) == sum(count for count in holders if count > 1)
    assert sum(cost.rows for cost in found) == rows
    assert all(sum(cost.moved for cost in found) <= ranks * cost.all_reduced for cost in found)


@given(layouts, st.integers(8, 200), st.integers(1, 9))
def test_it_says_the_same_twice(layout, rows, ranks):
    first, second = (scale.costs(drawn(layout, rows), ranks, range(ranks), width=3) for _ in range(2))

    assert first == second


@given(st.integers(1, 9), st.integers(1, 9))
def test_sorted_groups_that_fit_into_the_shards_cost_nothing(ranks, groups):
    found = scale.costs(torch.arange(ranks * groups * 8) // 8, ranks, range(ranks), width=3)

    assert all(cost.moved == cost.spanning == 0 for cost in found)


@given(st.floats(0, 2), st.integers(1, 1000))
def test_what_grows_by_a_power_is_extrapolated_by_it(power, first):
    at = [scale.Cost(*[first * rows**power] * 5) for rows in (10.0, 100.0, 10000.0)]

    assert scale.extrapolated(at[0], at[1], 10, 100) == pytest.approx(at[2])


def test_the_page_says_what_was_planned():
    planned = {
        name: {int(rows): scale.Cost(**cost) for rows, cost in own.items()}
        for name, own in json.loads((scale.HERE / "scale.json").read_text("utf-8")).items()
    }
    table = scale.HEAD + "".join(line for name in planned for line in scale.lines(name, planned[name]))

    assert list(planned) == list(scale.LAYOUTS)
    assert scale.TABLE.search((scale.HERE / "scale.md").read_text("utf-8"))[0] == table
