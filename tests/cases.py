"""Fewer cases than the product of all that may vary, where nothing depends on three things at once."""

from collections.abc import Iterable
from hashlib import sha256
from itertools import combinations, product

import pytest


def every_pair(**axes: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrize with cases in which any two values of different arguments occur together.

    Cases whose values have all occurred before are marked as slow.

    Args:
        axes: for each argument its values, which may be ``pytest.param``.
    """
    values = [[value if isinstance(value, Param) else pytest.param(value) for value in axis] for axis in axes.values()]
    every_case = list(product(*(range(len(axis)) for axis in values)))
    missing = {pair for case in every_case for pair in _pairs(case)}
    seen, cases = set(), []
    while missing:
        best = max(every_case, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen = [axis[number] for axis, number in zip(values, best, strict=True)]
        marks = [mark for param in chosen for mark in param.marks]
        if seen.issuperset(enumerate(best)):
            marks.append(pytest.mark.slow)
        seen.update(enumerate(best))
        cases.append(pytest.param(*(param.values[0] for param in chosen), marks=marks))
    return pytest.mark.parametrize(list(axes), cases)


Param = type(pytest.param())


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(case), 2))


def runs_few(config: pytest.Config) -> bool:
    """Whether few cases of each test are run: nothing says what to run, nor how thoroughly."""
    telling = "keyword", "markexpr", "lf", "failedfirst", "stepwise", "--hypothesis-profile", "write_page"
    named = config.args_source is not config.ArgsSource.TESTPATHS
    return not named and not any(config.getoption(option, None) for option in telling)


def few_of(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """A few cases of each test that have everything that each ``parametrize`` lists.

    Which ones does not depend on other tests.
    """
    few, seen = set(), set()
    for item in sorted(items, key=lambda item: sha256(item.nodeid.encode()).digest()):
        test, _, _ = item.nodeid.partition("[")
        # One id for each parametrize and each parametrized fixture; nothing public of pytest keeps them apart.
        ids = item.callspec._idlist if hasattr(item, "callspec") else [item.nodeid]
        new = {(test, *numbered) for numbered in enumerate(ids)} - seen
        if new:
            seen |= new
            few.add(item)
    return few
