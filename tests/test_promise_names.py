"""Promise 6: names don't matter. Renumber, reorder, permute: the result is permuted the same way."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import all_tied, entries_of, free_of, members_of, same_bits, unit_in_the_last_place
from strategies import (
    ALL,
    COMPLEX,
    HALF,
    REAL,
    TINY,
    generator,
    labels,
    loss_of,
    normal,
    recipes_for,
    reductions,
    seeds,
    shapes,
    small_shapes,
    spelled,
    tensors,
)
from torch.nn import Parameter
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer, tie_
from tieopt.ties.slices import FREE, Slices, numbered


@given(st.data())
def test_the_way_a_grouping_is_written_changes_no_bit(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes(wide=True, empty=True))
    names = data.draw(labels(shape[0]))
    start = data.draw(tensors(shape, ALL)).to(device)
    written = [tie_(start.clone(), data.draw(spelled(names))) for _ in range(2)]
    assert same_bits(*written)


@given(st.data())
def test_ways_to_write_one_grouping_make_equal_ties(compact: bool, data: st.DataObject) -> None:
    shape = data.draw(shapes(empty=True))
    names = data.draw(labels(shape[0]))
    parameter = Parameter(torch.zeros(shape))
    ties = [Tie(parameter, data.draw(spelled(names))) for _ in range(2)]
    first, second = (TiedOptimizer(SGD([parameter]), tie, compact=compact).ties[0].parts[0].groups for tie in ties)
    assert torch.equal(first, second)
    assert sorted(map(tuple, members_of(first))) == sorted(map(tuple, members_of(names)))
    assert free_of(first) == free_of(names)


@given(st.data())
def test_the_way_ties_are_written_changes_no_bit_of_training(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    names = data.draw(labels(shape[0]))
    start = normal(shape, data.draw(st.sampled_from([*REAL, *COMPLEX])), data.draw(seeds)).to(device)
    recipe = data.draw(recipes_for(start, closure=False))
    reduction = data.draw(reductions)
    steps = data.draw(st.lists(seeds, min_size=1, max_size=3))
    ends, states = [], []
    for _ in range(2):
        parameter = Parameter(start.clone())
        optimizer = TiedOptimizer(
            recipe([parameter]), {parameter: data.draw(spelled(names))}, reduction=reduction, compact=compact
        )
        for seed in steps:
            loss_of([parameter], seed).backward()
            optimizer.step()
        ends.append(parameter)
        states.append(optimizer.state_dict())
    assert same_bits(*ends)
    assert states[0]["tieopt"] == states[1]["tieopt"]


@given(st.data())
def test_a_saved_state_loads_into_ties_that_are_written_differently(compact: bool, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    names = data.draw(labels(shape[0]))
    first, second = (Parameter(torch.zeros(shape)) for _ in range(2))
    saved, loaded = (
        TiedOptimizer(torch.optim.SGD([parameter], lr=rate), {parameter: data.draw(spelled(names))}, compact=compact)
        for parameter, rate in ((first, 0.1), (second, 0.2))
    )
    loaded.load_state_dict(saved.state_dict())
    assert loaded.param_groups[0]["lr"] == 0.1


@given(st.data())
def test_rows_permuted_with_their_labels_give_the_permuted_result(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes(wide=True))
    names = data.draw(labels(shape[0]))
    start = data.draw(tensors(shape, (*REAL, *COMPLEX), finite=True)).to(device)
    order = torch.randperm(shape[0], generator=generator(data.draw(seeds)))
    plain = tie_(start.clone(), data.draw(spelled(names)))[order]
    permuted = tie_(start[order].clone(), data.draw(spelled(names[order])))

    assert all_tied(permuted, names[order])
    free = free_of(names[order])
    assert same_bits(permuted[free], plain[free])
    _assert_within_the_error_of_two_means(start[order], permuted, plain, names[order])


def _assert_within_the_error_of_two_means(
    start: torch.Tensor, first: torch.Tensor, second: torch.Tensor, names: torch.Tensor
) -> None:
    """Twice what one mean may be off by, because each may be so, to another side."""
    if start[0].numel() > 100:
        start, first, second = start[:, ::4999], first[:, ::4999], second[:, ::4999]
    real = start.dtype.to_real()
    rows, ones, others = entries_of(start), entries_of(first), entries_of(second)
    for group in members_of(names):
        units = 2 if real in HALF else len(group) ** 0.5
        for entry, value in enumerate(ones[group[0]]):
            largest = max(abs(rows[member][entry]) for member in group)
            step = unit_in_the_last_place(largest, real)
            inherent = 4 * len(group) * unit_in_the_last_place(0.0, torch.promote_types(real, torch.float32))
            off = abs(Fraction(value) - Fraction(others[group[0]][entry]))
            assert off <= 2 * (Fraction(units) * step + inherent), (value, others[group[0]][entry], start.dtype)


@given(data=st.data(), dtype=st.sampled_from([*REAL, *COMPLEX]))
def test_rows_permuted_with_their_labels_give_the_same_bits_where_the_arithmetic_is_exact(
    device: torch.device, data: st.DataObject, dtype: torch.dtype
) -> None:
    shape = (data.draw(st.integers(1, 30)), *data.draw(small_shapes))
    # Groups of at most four, whole multiples of twelve: sums and means are whole numbers of few digits.
    names = torch.arange(shape[0]) // data.draw(st.integers(1, 4))
    names = torch.where(torch.rand(shape[0], generator=generator(data.draw(seeds))) < 0.2, -1, names)
    start = (torch.randint(-10, 11, shape, generator=generator(data.draw(seeds))) * 12).to(device, dtype)
    order = torch.randperm(shape[0], generator=generator(data.draw(seeds)))
    plain = tie_(start.clone(), names)[order]
    assert torch.equal(tie_(start[order].clone(), names[order]), plain)


@given(data=st.data(), dtype=st.sampled_from(TINY))
def test_bytes_permuted_with_their_labels_are_tied_too(
    device: torch.device, data: st.DataObject, dtype: torch.dtype
) -> None:
    shape = data.draw(shapes(max_count=8))
    names = torch.arange(shape[0]) // 2
    start = (torch.randint(-3, 4, shape, generator=generator(data.draw(seeds))) * 2).float().to(device, dtype)
    order = torch.randperm(shape[0], generator=generator(data.draw(seeds)))
    plain = tie_(start.clone(), names).float()[order]
    assert torch.equal(tie_(start.float()[order].to(dtype), names[order]).float(), plain)


@given(st.data())
def test_training_on_permuted_rows_gives_the_permuted_weights(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    names = data.draw(labels(shape[0]))
    start = normal(shape, torch.float64, data.draw(seeds)).to(device)
    order = torch.randperm(shape[0], generator=generator(data.draw(seeds)))
    recipe = data.draw(recipes_for(start, closure=False, entrywise=True))
    reduction = data.draw(reductions)
    plain, permuted = Parameter(start.clone()), Parameter(start[order].clone())
    optimizers = [
        TiedOptimizer(recipe([parameter]), {parameter: each}, reduction=reduction, compact=compact)
        for parameter, each in ((plain, names), (permuted, names[order]))
    ]
    for seed in data.draw(st.lists(seeds, min_size=1, max_size=5)):
        grad = normal(shape, torch.float64, seed).to(device)
        plain.grad, permuted.grad = grad.clone(), grad[order].clone()
        for optimizer in optimizers:
            optimizer.step()
        assert all_tied(permuted, names[order])
        torch.testing.assert_close(permuted.detach(), plain.detach()[order], rtol=1e-12, atol=1e-12)


@given(st.lists(st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 2**62, 2**63 - 1])), min_size=1, max_size=3))
def test_groups_are_numbered_in_the_order_of_their_first_members(labels: list[list[int]]) -> None:
    numbers: dict[int, int] = {}
    for own, part in zip(
        labels, numbered([Slices(torch.tensor(own, dtype=torch.int64)) for own in labels]), strict=True
    ):
        expected = [FREE if label == FREE else numbers.setdefault(label, len(numbers)) for label in own]
        assert part.labels.tolist() == expected
