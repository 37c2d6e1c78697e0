"""What is left of the product of all that varies still has every pair, and every value."""

from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pytest
from cases import every_pair, few_of, runs_few
from hypothesis import given
from hypothesis import strategies as st

pytest_plugins = ["pytester"]

AXES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@dataclass(frozen=True, eq=False)
class Item:
    """As much of a test's item as is looked at; it is its own ``callspec``."""

    nodeid: str
    _idlist: tuple[str, ...]

    @property
    def callspec(self) -> "Item":
        return self


@dataclass(frozen=True)
class Doctest:
    """An item without arguments."""

    nodeid: str


def items_of(name: str, axes: list[int]) -> list[Any]:
    return [Item(f"{name}[{case}]", case) for case in product(*(map(str, range(count)) for count in axes))]


@given(first=AXES, second=AXES)
def test_few_cases_have_each_value_of_every_test(first: list[int], second: list[int]) -> None:
    axes = {"first": first, "second": second}
    single: Any = Doctest("a doctest")
    items = [*items_of("first", first), single, *items_of("second", second)]
    few = few_of(items)

    assert few_of(reversed(items)) == few
    assert single in few
    assert few <= set(items)
    for name, counts in axes.items():
        cases = [item._idlist for item in few if item.nodeid.startswith(name)]
        assert [set(ids) for ids in zip(*cases, strict=True)] == [set(map(str, range(count))) for count in counts]
        assert len(cases) <= sum(counts)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_every_pair_occurs_and_what_is_not_slow_has_every_value(axes: list[int]) -> None:
    mark = every_pair(**{f"axis{number}": range(count) for number, count in enumerate(axes)}).mark
    cases = [param.values for param in mark.args[1]]
    quick = [param.values for param in mark.args[1] if pytest.mark.slow.mark not in [own.mark for own in param.marks]]

    for one, other in combinations(range(len(axes)), 2):
        assert {(case[one], case[other]) for case in cases} == set(product(range(axes[one]), range(axes[other])))
    assert [set(values) for values in zip(*quick, strict=True)] == [set(range(count)) for count in axes]


@pytest.mark.parametrize(
    ("arguments", "few"),
    [
        ([], True),
        (["-x", "-n", "2"], True),
        (["test_one.py"], False),
        (["-kone"], False),
        (["-mslow"], False),
        (["--lf"], False),
        (["--hypothesis-profile=thorough"], False),
    ],
)
def test_few_cases_are_run_if_nothing_says_what_to_run(
    pytester: pytest.Pytester, arguments: list[str], few: bool
) -> None:
    pytester.makeini("[pytest]\ntestpaths = .")
    pytester.makepyfile(test_one="")
    assert runs_few(pytester.parseconfig(*arguments)) == few
