"""Promise 3: tying leaves a group's mean where it was, to the precision of the dtype."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference import entries_of, exact_means, members_of, smallest_step, unit_in_the_last_place
from strategies import (
    ALL,
    HALF,
    REAL,
    TINY,
    generator,
    labels,
    laid_out,
    layouts,
    seeds,
    shapes,
    spelled,
    tensors,
)

from tieopt import tie_


def _tolerance(mean: Fraction, members: list[float], dtype: torch.dtype) -> Fraction:
    """What the mean may be off by.

    Types of up to 32 bits are added up in float64: half a unit in the last place of the mean itself, and what
    the float64 sum may lose. That is, in units of the members' mean size, the length of a block and the
    number of blocks, about twice the square root of the group's size. In float64 itself it is no more than the
    square root in units of the largest member, either; and near zero, where differences cannot be scaled down
    without loss, a few subnormal numbers for each member.
    """
    real, size = dtype.to_real(), len(members)
    sizes = [abs(Fraction(member)) for member in members]
    block = min(size, max(32, math.isqrt(size)))
    units = (block + -(-size // block) + 2) * unit_in_the_last_place(float(sum(sizes) / size), torch.float64)
    if real == torch.float64:
        root = Fraction(math.sqrt(size)) * unit_in_the_last_place(float(max(sizes)), torch.float64)
        return min(units, root) + smallest_step(real) * 4 * size
    return unit_in_the_last_place(float(mean), real) / 2 + units


def _check_mean(before: torch.Tensor, after: torch.Tensor, names: torch.Tensor) -> None:
    old, new = entries_of(before), entries_of(after)
    for group, means in zip(members_of(names), exact_means(before, names), strict=True):
        for entry, mean in enumerate(means):
            found = new[group[0]][entry]
            assert math.isfinite(found), (found, float(mean), before.dtype)
            error = abs(Fraction(found) - mean)
            assert error <= _tolerance(mean, [old[member][entry] for member in group], before.dtype), (
                f"{found!r} for the mean {float(mean)!r} of {len(group)} members in {before.dtype}, "
                f"off by {float(error / unit_in_the_last_place(float(mean), before.dtype.to_real())):.3g} units"
            )


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(st.data())
def test_the_value_of_a_group_is_its_mean(device: torch.device, dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    names = data.draw(labels(shape[0]))
    start = data.draw(tensors(shape, [dtype], finite=True)).to(device)
    tensor = tie_(laid_out(start, data.draw(layouts(start, lazy=True))), data.draw(spelled(names)))
    _check_mean(start, tensor, names)


@given(st.data())
def test_the_value_of_a_group_is_its_mean_where_slices_are_long(device: torch.device, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(2, 12)), 40_000)
    names = data.draw(labels(shape[0]))
    start = data.draw(tensors(shape, ALL, finite=True)).to(device)
    tensor = tie_(start.clone(), data.draw(spelled(names)))
    _check_mean(start[:, ::4999], tensor[:, ::4999], names)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@given(
    size=st.one_of(st.integers(2, 200), st.sampled_from([1000, 4097])),
    values=st.tuples(st.floats(-3, 3, width=16), st.floats(-3, 3, width=16)),
    odd=st.sampled_from(["first", "last", "half", "none"]),
)
@example(size=100_000, values=(1.1, 1.0), odd="first")
@example(size=100_000, values=(1.1, 1.0), odd="half")
def test_errors_that_all_point_the_same_way_do_not_pile_up(
    device: torch.device, dtype: torch.dtype, size: int, values: tuple[float, float], odd: str
) -> None:
    column = torch.full((size,), values[0], dtype=dtype)
    column[{"first": slice(0, 1), "last": slice(-1, None), "half": slice(0, size // 2), "none": slice(0, 0)}[odd]] = (
        values[1]
    )
    names = torch.zeros(size, dtype=torch.int64)
    _check_mean(column, tie_(column.clone().to(device), names), names)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@given(
    size=st.one_of(st.integers(2, 200), st.just(1000)),
    power=st.integers(0, 15),
    place=st.floats(0, 1, exclude_max=True),
)
@example(size=100_000, power=15, place=0.0)
@example(size=92, power=14, place=0.0)
def test_one_large_member_does_not_cost_the_others_their_digits(
    device: torch.device, dtype: torch.dtype, size: int, power: int, place: float
) -> None:
    column = torch.full((size,), 0.1, dtype=dtype)
    column[int(place * size)] = 10.0**power if torch.finfo(dtype).max > 1e15 else 10.0 ** (power % 5)
    names = torch.zeros(size, dtype=torch.int64)
    _check_mean(column, tie_(column.clone().to(device), names), names)


@pytest.mark.parametrize("dtype", [*REAL, *TINY], ids=str)
@given(size=st.integers(2, 3000), fraction=st.floats(0.5, 1), seed=seeds, one_sign=st.booleans())
@example(size=4, fraction=0.61, seed=0, one_sign=True)  # in float16 the four times 40000 that add up to infinity
@example(size=137_575, fraction=1.0, seed=0, one_sign=True)
def test_no_sum_overflows_where_the_mean_is_finite(
    device: torch.device, dtype: torch.dtype, size: int, fraction: float, seed: int, one_sign: bool
) -> None:
    signs = torch.randint(0, 2, (size,), generator=generator(seed)) * 2 - 1
    column = torch.full((size,), torch.finfo(dtype).max * fraction, dtype=torch.float64)
    column = (column if one_sign else column * signs).to(dtype)
    names = torch.zeros(size, dtype=torch.int64)
    _check_mean(column, tie_(column.clone().to(device), names), names)


@given(
    values=st.lists(st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -2.0]), min_size=1, max_size=6),
    dtype=st.sampled_from([*HALF, torch.float32, torch.float64, torch.float8_e5m2]),
)
def test_the_mean_of_infinities_is_what_arithmetic_says(
    device: torch.device, values: list[float], dtype: torch.dtype
) -> None:
    tensor = tie_(torch.tensor(values).to(device, dtype), [range(len(values))])
    if not all(map(math.isfinite, values)):
        expected = sum(values) / len(values)
        torch.testing.assert_close(
            tensor.double().cpu(), torch.full((len(values),), expected).double(), rtol=0, atol=0, equal_nan=True
        )


def test_the_mean_of_many_numbers_as_large_as_can_be_is_finite(device: torch.device) -> None:
    largest = torch.finfo(torch.float64).max
    for size in (137_575, 353_723):
        column = torch.full((size,), largest, dtype=torch.float64, device=device)
        column[0] = 0.536 * largest
        assert bool(tie_(column, torch.zeros(size, dtype=torch.int64)).isfinite().all())
