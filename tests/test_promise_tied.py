"""Promise 1: after construction and after every step the members of a group are equal, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import all_tied, same_bits
from strategies import (
    ALL,
    COMPLEX,
    COUPLING,
    ENTRYWISE,
    REAL,
    Recipe,
    closure_of,
    few_examples,
    labels,
    laid_out,
    layouts,
    loss_of,
    normal,
    recipes_for,
    reductions,
    reductions_for,
    seeds,
    shapes,
    small_shapes,
    spelled,
    tensors,
)
from torch.nn import Parameter

from tieopt import Tie, TiedOptimizer, is_tied, tie_


@given(st.data())
def test_tie_makes_the_members_equal_and_returns_its_argument(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes(wide=True, empty=True))
    names = data.draw(labels(shape[0]))
    start = data.draw(tensors(shape, ALL)).to(device)
    tensor = laid_out(start, data.draw(layouts(start, lazy=True)))
    assert tie_(tensor, data.draw(spelled(names))) is tensor
    assert all_tied(tensor, names)


@given(st.data())
def test_is_tied_says_whether_the_members_are_equal(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes(wide=True, empty=True))
    names = data.draw(labels(shape[0]))
    groups = data.draw(spelled(names))
    start = data.draw(tensors(shape, ALL, finite=True)).to(device)
    tensor = laid_out(start, data.draw(layouts(start, lazy=True)))
    assert is_tied(tie_(tensor, groups), groups)

    members = (names != -1).nonzero().squeeze(1).tolist()
    if members and tensor.numel():
        member = data.draw(st.sampled_from(members))
        alone = int((names == names[member]).sum()) == 1
        tensor[member] = 3 - tensor[member].float() if tensor.element_size() == 1 else 3 - tensor[member]
        assert is_tied(tensor, groups) == (alone or all_tied(tensor, names))


def _parameter(data: st.DataObject, device: torch.device, recipe: Recipe) -> tuple[Parameter, torch.Tensor]:
    """A parameter of any dtype and layout that the optimizer can train, and labels for it."""
    shape = data.draw(recipe.shapes())
    start = data.draw(tensors(shape, recipe.dtypes, finite=data.draw(st.booleans()))).to(device)
    layout = "contiguous" if recipe.contiguous else data.draw(layouts(start))
    return Parameter(laid_out(start, layout)), data.draw(labels(shape[0]))


def _ties(data: st.DataObject, parameters: list[Parameter], names: list[torch.Tensor]) -> object:
    """One of the ways to say which parameters are tied how."""
    groups = [data.draw(spelled(each)) for each in names]
    match data.draw(st.sampled_from(["mapping", "ties", "names"])):
        case "mapping":
            return dict(zip(parameters, groups, strict=True))
        case "ties":
            ties = [Tie(parameter, group) for parameter, group in zip(parameters, groups, strict=True)]
            return ties[0] if len(ties) == 1 else iter(ties)
        case _:
            return {f"weight.{i}": group for i, group in enumerate(groups)}


@pytest.mark.parametrize("recipe", ENTRYWISE + COUPLING, ids=repr)
@few_examples
@given(st.data())
def test_members_are_equal_after_construction_and_after_every_step(
    device: torch.device, compact: bool, recipe: Recipe, data: st.DataObject
) -> None:
    drawn = [_parameter(data, device, recipe) for _ in range(data.draw(st.integers(1, 2)))]
    parameters, names = [p for p, _ in drawn], [each for _, each in drawn]
    inner = recipe([(f"weight.{i}", parameter) for i, parameter in enumerate(parameters)])
    reduction = data.draw(reductions_for(recipe, compact))
    optimizer = TiedOptimizer(inner, _ties(data, parameters, names), reduction=reduction, compact=compact)
    pointers = [parameter.data_ptr() for parameter in parameters]
    assert all(map(all_tied, parameters, names))

    for seed in data.draw(st.lists(seeds, min_size=1, max_size=4)):
        if recipe.closure or data.draw(st.booleans()):
            optimizer.step(closure_of(optimizer, parameters, seed))
        else:
            loss_of(parameters, seed).backward()
            optimizer.step()
        assert all(map(all_tied, parameters, names))
    assert pointers == [parameter.data_ptr() for parameter in parameters]


@given(st.data())
def test_members_are_equal_whatever_the_layout_of_their_gradients(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    names = data.draw(labels(shape[0]))
    dtype = data.draw(st.sampled_from([*REAL, *COMPLEX]))
    parameter = Parameter(normal(shape, dtype, data.draw(seeds)).to(device))
    optimizer = TiedOptimizer(
        data.draw(recipes_for(parameter, closure=False))([parameter]),
        {parameter: data.draw(spelled(names))},
        reduction=data.draw(reductions),
        compact=compact,
    )
    grad = data.draw(tensors(shape, [dtype])).to(device)
    if data.draw(st.booleans()):
        parameter.grad = laid_out(grad, data.draw(layouts(grad)))
    else:
        parameter.grad = grad[(slice(0, 1),) * len(shape)].expand(shape)
    given_grad, before = parameter.grad, parameter.grad.clone()
    optimizer.step()
    assert all_tied(parameter, names)
    if compact:
        assert parameter.grad is given_grad
        assert same_bits(parameter.grad, before)
    else:
        assert all_tied(parameter.grad, names)


@pytest.mark.filterwarnings("ignore:Tied weights were replaced or written to")
@given(st.data())
def test_a_write_from_outside_is_tied_again_by_tie_weights_and_by_a_step(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    recipe = data.draw(recipes_for(closure=False))
    parameter, names = _parameter(data, device, recipe)
    optimizer = TiedOptimizer(recipe([parameter]), {parameter: data.draw(spelled(names))}, compact=compact)
    with torch.no_grad():
        parameter.copy_(data.draw(tensors(tuple(parameter.shape), [parameter.dtype])))
    pointer = parameter.data_ptr()
    if data.draw(st.booleans()):
        optimizer.tie_weights()
    else:
        loss_of([parameter], data.draw(seeds)).backward()
        optimizer.step()
    assert all_tied(parameter, names)
    assert parameter.data_ptr() == pointer


SPARSE = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    lambda parameters: torch.optim.SparseAdam(parameters, lr=0.1),
]


@given(st.data())
def test_members_are_equal_after_steps_with_sparse_gradients(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = (data.draw(st.integers(1, 40)), *data.draw(small_shapes))
    names = data.draw(labels(shape[0]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    parameter = Parameter(normal(shape, dtype, data.draw(seeds)).to(device))
    optimizer = TiedOptimizer(data.draw(st.sampled_from(SPARSE))([parameter]), {parameter: names}, compact=compact)
    for seed in data.draw(st.lists(seeds, min_size=1, max_size=4)):
        stored = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=6))
        values = normal((len(stored), *shape[1:]), dtype, seed)
        parameter.grad = torch.sparse_coo_tensor(
            torch.tensor([stored], dtype=torch.int64), values, shape, check_invariants=True
        ).to(device)
        given_grad = parameter.grad
        optimizer.step()
        assert parameter.grad.layout == torch.sparse_coo
        assert all_tied(parameter, names)
        assert parameter.grad is given_grad if compact else all_tied(parameter.grad.to_dense(), names)


@given(st.data())
def test_a_step_without_gradients_changes_nothing(compact: bool, data: st.DataObject) -> None:
    recipe = data.draw(recipes_for(closure=False))
    parameter, names = _parameter(data, torch.device("cpu"), recipe)
    optimizer = TiedOptimizer(recipe([parameter]), {parameter: names}, compact=compact)
    before = parameter.detach().clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=data.draw(st.booleans()))
    assert same_bits(parameter, before)
    assert parameter.grad is None
