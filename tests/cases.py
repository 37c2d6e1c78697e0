"""Fewer cases than the product of all that may vary, where nothing depends on three things at once."""

from collections.abc import Iterable
from itertools import combinations, product

import pytest


def every_pair(**axes: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrize with cases in which any two values of different arguments occur together.

    Args:
        axes: for each argument its values, which may be ``pytest.param``.
    """
    values = [[value if isinstance(value, Param) else pytest.param(value) for value in axis] for axis in axes.values()]
    every_case = list(product(*(range(len(axis)) for axis in values)))
    missing = {pair for case in every_case for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(every_case, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append([axis[number] for axis, number in zip(values, best, strict=True)])
    cases = [
        pytest.param(*(param.values[0] for param in case), marks=[mark for param in case for mark in param.marks])
        for case in chosen
    ]
    return pytest.mark.parametrize(list(axes), cases)


Param = type(pytest.param())


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(case), 2))
