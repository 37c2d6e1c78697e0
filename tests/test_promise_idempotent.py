"""Promise 2: tying what is tied changes no bit."""

import pytest
import torch
from checks import ROW
from hypothesis import given
from hypothesis import strategies as st
from reference import same_bits
from strategies import (
    ALL,
    COMPLEX,
    REAL,
    labels,
    laid_out,
    layouts,
    loss_of,
    normal,
    recipes_for,
    reductions,
    seeds,
    shapes,
    spelled,
    tensors,
    tied_tensors,
)
from torch.nn import Parameter

from tieopt import TiedOptimizer, tie_


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(st.data())
def test_tying_tied_input_changes_no_bit(device: torch.device, dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(shapes(wide=True, empty=True))
    names = data.draw(labels(shape[0]))
    start = data.draw(tied_tensors(shape, names, [dtype])).to(device)
    tensor = laid_out(start, data.draw(layouts(start, lazy=True)))
    tie_(tensor, data.draw(spelled(names)))
    assert same_bits(tensor, start)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(st.data())
def test_tying_twice_is_tying_once(device: torch.device, dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(shapes(wide=True))
    groups = data.draw(spelled(data.draw(labels(shape[0]))))
    start = data.draw(tensors(shape, [dtype])).to(device)
    tensor = tie_(laid_out(start, data.draw(layouts(start, lazy=True))), groups)
    once = tensor.clone()
    assert same_bits(tie_(tensor, groups), once)


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
@given(count=st.integers(2, 3000), width=st.sampled_from([7, ROW]), seed=seeds)
def test_a_group_of_any_size_keeps_its_value(
    device: torch.device, dtype: torch.dtype, count: int, width: int, seed: int
) -> None:
    start = normal((1, width), dtype, seed).to(device).expand(count, width).clone()
    assert same_bits(tie_(start.clone(), [range(count)]), start)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(
    sizes=st.lists(st.one_of(st.integers(2, 70), st.sampled_from([128, 4096])), min_size=1, max_size=3),
    width=st.sampled_from([1, ROW]),
    signed=st.booleans(),
)
def test_zeros_keep_their_sign(
    device: torch.device, dtype: torch.dtype, sizes: list[int], width: int, signed: bool
) -> None:
    names = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    signs = torch.where(torch.arange(len(names)) % 2 == 1, -1.0, 1.0)
    start = torch.full((len(names), width), -0.0) * (signs[:, None] if signed else 1.0)
    start = (torch.complex(start, start) if dtype.is_complex else start).to(device, dtype)
    assert same_bits(tie_(start.clone(), names, scale=signs if signed else None), start)


@given(st.data())
def test_tying_weights_and_gradients_again_changes_no_bit(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    dtype = data.draw(st.sampled_from([*REAL, *COMPLEX]))
    parameter = Parameter(normal(shape, dtype, data.draw(seeds)).to(device))
    names = data.draw(labels(shape[0]))
    recipe = data.draw(recipes_for(parameter, closure=False))
    optimizer = TiedOptimizer(recipe([parameter]), {parameter: names}, reduction=data.draw(reductions), compact=compact)

    loss_of([parameter], data.draw(seeds)).backward()
    optimizer.tie_gradients()
    gradient, weight = parameter.grad.clone(), parameter.detach().clone()
    optimizer.tie_gradients()
    optimizer.tie_weights()
    assert same_bits(parameter.grad, gradient)
    assert same_bits(parameter, weight)


@given(st.data())
def test_a_step_on_tied_gradients_is_the_step_on_the_untied_ones(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    dtype = data.draw(st.sampled_from([*REAL, *COMPLEX]))
    start = normal(shape, dtype, data.draw(seeds)).to(device)
    names, reduction = data.draw(labels(shape[0])), data.draw(reductions)
    recipe = data.draw(recipes_for(start, closure=False))
    steps = data.draw(st.lists(seeds, min_size=1, max_size=3))

    ends = []
    for tie_first in (False, True):
        parameter = Parameter(start.clone())
        optimizer = TiedOptimizer(recipe([parameter]), {parameter: names}, reduction=reduction, compact=compact)
        for seed in steps:
            optimizer.zero_grad()
            loss_of([parameter], seed).backward()
            if tie_first:
                optimizer.tie_gradients()
            optimizer.step()
        ends.append(parameter)
    assert same_bits(*ends)
