"""Promise 3: tying leaves a group's mean where it was, to the precision of the dtype."""

import math

import pytest
import torch
from checks import ROW, check_means, times_signs
from hypothesis import example, given
from hypothesis import strategies as st
from reference import all_tied, same_bits
from strategies import (
    ALL,
    HALF,
    REAL,
    TINY,
    generator,
    labels,
    laid_out,
    layouts,
    normal,
    seeds,
    shapes,
    spelled,
    tensors,
)

from tieopt import tie_

# A slice that is a single element, and one that is a row.
WIDTHS = [1, ROW]


def _check_column(column: torch.Tensor, width: int, device: torch.device) -> None:
    """Ties all of a column, as single elements or as rows of equal entries, and checks the mean."""
    names = torch.zeros(len(column), dtype=torch.int64)
    rows = _spread(column, width)
    tied = tie_(rows.clone().to(device), names)
    assert same_bits(tied, _spread(tied[:, 0], width))
    check_means(rows[:, :1], tied[:, :1], names, pairs=width >= ROW)


def _spread(column: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of equal entries."""
    return torch.stack([column] * width, dim=1)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(st.data())
def test_the_value_of_a_group_is_its_mean(device: torch.device, dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    names = data.draw(labels(shape[0]))
    start = data.draw(tensors(shape, [dtype], finite=True)).to(device)
    tensor = tie_(laid_out(start, data.draw(layouts(start, lazy=True))), data.draw(spelled(names)))
    check_means(start, tensor, names)


@given(st.data())
def test_the_value_of_a_group_is_its_mean_where_slices_are_long(device: torch.device, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(2, 12)), 40_000)
    names = data.draw(labels(shape[0]))
    start = data.draw(tensors(shape, ALL, finite=True)).to(device)
    tensor = tie_(start.clone(), data.draw(spelled(names)))
    check_means(start[:, ::4999], tensor[:, ::4999], names, pairs=True)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(
    size=st.one_of(st.integers(2, 70), st.sampled_from([2**power for power in range(1, 13)])),
    count=st.integers(1, 3),
    width=st.integers(ROW, ROW + 8),
    signed=st.booleans(),
    data=st.data(),
)
@example(size=2**12, count=1, width=ROW, signed=True, data=None)
def test_the_value_of_rows_in_groups_of_one_size_is_their_mean(
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    count: int,
    width: int,
    signed: bool,
    data: st.DataObject | None,
) -> None:
    """They are added up by pairs: halves of a group to each other, as long as their number is even."""
    names = torch.arange(count).repeat(size)
    shape = (len(names), width)
    start = normal(shape, dtype, size) if data is None else data.draw(tensors(shape, [dtype], finite=True))
    signs = torch.where(torch.arange(len(names)) % 3 == 1, -1.0, 1.0) if signed else torch.ones(len(names))
    tensor = tie_(start.clone().to(device), names, scale=signs.double() if signed else None).cpu()

    start, tensor = times_signs(start, signs), times_signs(tensor, signs)
    assert all_tied(tensor, names)
    check_means(start[:, ::7], tensor[:, ::7], names, pairs=True)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@given(
    size=st.one_of(st.integers(2, 200), st.sampled_from([1000, 4097])),
    values=st.tuples(st.floats(-3, 3, width=16), st.floats(-3, 3, width=16)),
    odd=st.sampled_from(["first", "last", "half", "none"]),
    width=st.sampled_from(WIDTHS),
)
@example(size=100_000, values=(1.1, 1.0), odd="first", width=1)
@example(size=100_000, values=(1.1, 1.0), odd="half", width=1)
@example(size=2**14, values=(1.1, 1.0), odd="half", width=ROW)
def test_errors_that_all_point_the_same_way_do_not_pile_up(
    device: torch.device, dtype: torch.dtype, size: int, values: tuple[float, float], odd: str, width: int
) -> None:
    column = torch.full((size,), values[0], dtype=dtype)
    column[{"first": slice(0, 1), "last": slice(-1, None), "half": slice(0, size // 2), "none": slice(0, 0)}[odd]] = (
        values[1]
    )
    _check_column(column, width, device)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@given(
    size=st.one_of(st.integers(2, 200), st.just(1000)),
    power=st.integers(0, 15),
    place=st.floats(0, 1, exclude_max=True),
    width=st.sampled_from(WIDTHS),
)
@example(size=100_000, power=15, place=0.0, width=1)
@example(size=92, power=14, place=0.0, width=1)
@example(size=96, power=14, place=0.0, width=ROW)
def test_one_large_member_does_not_cost_the_others_their_digits(
    device: torch.device, dtype: torch.dtype, size: int, power: int, place: float, width: int
) -> None:
    column = torch.full((size,), 0.1, dtype=dtype)
    column[int(place * size)] = 10.0**power if torch.finfo(dtype).max > 1e15 else 10.0 ** (power % 5)
    _check_column(column, width, device)


@pytest.mark.parametrize("dtype", [*REAL, *TINY], ids=str)
@given(
    size=st.integers(2, 3000),
    fraction=st.floats(0.5, 1),
    seed=seeds,
    one_sign=st.booleans(),
    width=st.sampled_from(WIDTHS),
)
@example(size=4, fraction=0.61, seed=0, one_sign=True, width=1)  # in float16 four times 40000 is infinite
@example(size=137_575, fraction=1.0, seed=0, one_sign=True, width=1)
@example(size=4, fraction=0.61, seed=0, one_sign=True, width=ROW)
@example(size=1024, fraction=1.0, seed=0, one_sign=False, width=ROW)
def test_no_sum_overflows_where_the_mean_is_finite(
    device: torch.device, dtype: torch.dtype, size: int, fraction: float, seed: int, one_sign: bool, width: int
) -> None:
    signs = torch.randint(0, 2, (size,), generator=generator(seed)) * 2 - 1
    column = torch.full((size,), torch.finfo(dtype).max * fraction, dtype=torch.float64)
    _check_column((column if one_sign else column * signs).to(dtype), width, device)


@given(
    values=st.lists(st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -2.0]), min_size=1, max_size=6),
    dtype=st.sampled_from([*HALF, torch.float32, torch.float64, torch.float8_e5m2]),
    width=st.sampled_from(WIDTHS),
)
@example(values=[math.inf, 1.0, -2.0, 0.0], dtype=torch.float32, width=ROW)
def test_the_mean_of_infinities_is_what_arithmetic_says(
    device: torch.device, values: list[float], dtype: torch.dtype, width: int
) -> None:
    # The other group is as large, and is nobody's neighbour in what it computes.
    columns = torch.tensor([*values, *map(float, range(1, len(values) + 1))])
    names = torch.arange(2).repeat_interleave(len(values))
    tensor = tie_(_spread(columns, width).to(device, dtype), names).double().cpu()
    if not all(map(math.isfinite, values)):
        expected = torch.full((len(values), width), sum(values) / len(values), dtype=torch.float64)
        torch.testing.assert_close(tensor[names == 0], expected, rtol=0, atol=0, equal_nan=True)
    other = torch.full((len(values), width), (1 + len(values)) / 2, dtype=torch.float64)
    assert torch.equal(tensor[names == 1], other)


def test_the_mean_of_many_numbers_as_large_as_can_be_is_finite(device: torch.device) -> None:
    largest = torch.finfo(torch.float64).max
    for size in (137_575, 353_723):
        column = torch.full((size,), largest, dtype=torch.float64, device=device)
        column[0] = 0.536 * largest
        assert bool(tie_(column, torch.zeros(size, dtype=torch.int64)).isfinite().all())
