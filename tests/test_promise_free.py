"""Promise 4: what is in no group is untouched, bit for bit, and no ties at all are the bare optimizer."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import free_of, same_bits
from strategies import (
    ALL,
    COMPLEX,
    REAL,
    closure_of,
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
    with_gaps,
)
from torch.nn import Parameter

from tieopt import TiedOptimizer, tie_


@given(st.data())
def test_tie_leaves_free_slices_untouched(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes(wide=True, empty=True))
    names = data.draw(labels(shape[0]))
    start = data.draw(tensors(shape, ALL)).to(device)
    tensor = tie_(laid_out(start, data.draw(layouts(start, lazy=True))), data.draw(spelled(names)))
    for free in free_of(names):
        assert same_bits(tensor[free], start[free])


@given(st.data())
def test_tie_leaves_groups_of_one_untouched(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes(empty=True))
    start = data.draw(tensors(shape, ALL)).to(device)
    names = torch.randperm(shape[0])
    assert same_bits(tie_(start.clone(), data.draw(spelled(names))), start)


@given(st.data())
def test_tie_writes_nothing_between_the_entries_of_a_view(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes(max_count=5))
    start = data.draw(tensors(shape, ALL)).to(device)
    view, buffer = with_gaps(start)
    names = data.draw(labels(shape[0]))
    tie_(view, data.draw(spelled(names)))
    view.copy_(start)
    assert same_bits(buffer, with_gaps(start)[1])


def _gradients(data: st.DataObject, parameters: list[Parameter], seed: int) -> list[Any]:
    """A gradient for some of the parameters, and None for the rest."""
    return [
        normal(parameter.shape, parameter.dtype, seed + i).to(parameter.device) if data.draw(st.booleans()) else None
        for i, parameter in enumerate(parameters)
    ]


@given(st.data())
def test_free_slices_and_their_gradients_are_those_of_the_bare_optimizer(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    # Fused kernels, and all kernels of 16-bit numbers, round the last entries in memory otherwise, and the free ones
    # of a compact parameter stand elsewhere. torch's fused SGD cannot begin with a parameter in a later step than with
    # the first.
    dtypes = [dtype for dtype in (*REAL, *COMPLEX) if not compact or dtype.to_real().itemsize > 2]
    starts = [data.draw(tensors(data.draw(shapes()), dtypes, finite=True)).to(device) for _ in range(2)]
    names = [data.draw(labels(len(start))) for start in starts]
    unfit = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW} if compact else {torch.optim.SGD}
    recipe = data.draw(
        recipes_for(*starts, entrywise=True).filter(lambda r: not (r.settings.get("fused") and r.optimizer in unfit))
    )
    tied_parameters, bare_parameters = ([Parameter(start.clone()) for start in starts] for _ in range(2))
    ties = {p: data.draw(spelled(n)) for p, n in zip(tied_parameters, names, strict=True)}
    tied = TiedOptimizer(recipe(tied_parameters), ties, reduction=data.draw(reductions), compact=compact)
    bare = recipe(bare_parameters)

    for seed in data.draw(st.lists(seeds, min_size=1, max_size=4)):
        gradients = _gradients(data, tied_parameters, seed)
        for parameters in (tied_parameters, bare_parameters):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
        tied.step()
        bare.step()
        for ours, theirs, each in zip(tied_parameters, bare_parameters, names, strict=True):
            free = free_of(each)
            assert same_bits(ours[free], theirs[free])
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                assert same_bits(ours.grad[free], theirs.grad[free])


@given(st.data())
def test_a_parameter_without_ties_is_that_of_the_bare_optimizer(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    dtype = data.draw(st.sampled_from([*REAL, *COMPLEX]))
    seed = data.draw(seeds)
    names = data.draw(labels(shape[0]))
    recipe = data.draw(recipes_for(normal(shape, dtype, 0), closure=False, entrywise=True))
    steps = data.draw(st.lists(seeds, min_size=1, max_size=3))

    def trained(tie: bool) -> torch.Tensor:
        parameters = [Parameter(normal(shape, dtype, seed + i).to(device)) for i in range(2)]
        optimizer = recipe(parameters)
        if tie:
            optimizer = TiedOptimizer(optimizer, {parameters[0]: names}, compact=compact)
        for step in steps:
            optimizer.zero_grad()
            loss_of(parameters[1:], step).backward()
            parameters[0].grad = normal(shape, dtype, step).to(device)
            optimizer.step()
        return parameters[1]

    assert same_bits(trained(tie=True), trained(tie=False))


@given(st.data())
def test_an_optimizer_without_ties_is_the_bare_optimizer(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    start = data.draw(tensors(data.draw(shapes()), (*REAL, *COMPLEX), finite=True)).to(device)
    start = laid_out(start, data.draw(layouts(start)))
    recipe = data.draw(recipes_for(start))
    count = len(start)
    groups = data.draw(st.sampled_from([None, [], [[]], [[i] for i in range(count)], torch.full((count,), -1)]))
    tied_parameter, bare_parameter = (Parameter(start.clone()) for _ in range(2))
    ties = {} if groups is None else {tied_parameter: groups}
    reduction = data.draw(reductions_for(recipe, compact))
    tied = TiedOptimizer(recipe([tied_parameter]), ties, reduction=reduction, compact=compact)
    bare = recipe([bare_parameter])
    assert same_bits(tied_parameter, bare_parameter)

    for seed in data.draw(st.lists(seeds, min_size=1, max_size=3)):
        for optimizer, parameter in ((tied, tied_parameter), (bare, bare_parameter)):
            optimizer.step(closure_of(optimizer, [parameter], seed))
        assert same_bits(tied_parameter, bare_parameter)
        assert same_bits(tied_parameter.grad, bare_parameter.grad)


@given(st.data())
def test_a_frozen_parameter_is_never_written(device: torch.device, compact: bool, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    frozen = Parameter(data.draw(tensors(shape, (*REAL, *COMPLEX))).to(device), requires_grad=False)
    moving = Parameter(normal(shape, torch.float32, data.draw(seeds)).to(device))
    before = frozen.detach().clone()
    groups = data.draw(spelled(data.draw(labels(shape[0]))))
    recipe = data.draw(recipes_for(moving, frozen, closure=False))
    optimizer = TiedOptimizer(recipe([frozen, moving]), {frozen: groups, moving: groups}, compact=compact)
    loss_of([moving], data.draw(seeds)).backward()
    optimizer.step()
    optimizer.tie_weights()
    optimizer.tie_gradients()
    assert same_bits(frozen, before)
    assert frozen.grad is None


@given(st.data())
def test_a_parameter_without_a_gradient_is_not_written_by_a_step(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    dtype = data.draw(st.sampled_from([*REAL, *COMPLEX]))
    resting, moving = (Parameter(normal(shape, dtype, data.draw(seeds)).to(device)) for _ in range(2))
    groups = data.draw(spelled(data.draw(labels(shape[0]))))
    recipe = data.draw(recipes_for(moving, entrywise=True))
    optimizer = TiedOptimizer(recipe([resting, moving]), {resting: groups, moving: groups}, compact=compact)
    written = data.draw(tensors(shape, [dtype])).to(device)
    with torch.no_grad():
        resting.copy_(written)
    loss_of([moving], data.draw(seeds)).backward()
    optimizer.step()
    assert same_bits(resting, written)
    assert resting.grad is None


@given(st.data())
def test_a_gradient_that_several_parameters_have_is_tied_for_each_of_them_alone(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    """Both ``backward()`` and ``torch.autograd.grad`` may leave one memory to the terms of a sum."""
    shape = data.draw(shapes(max_count=5))
    grad, seed = normal(shape, torch.float64, data.draw(seeds)).to(device), data.draw(seeds)
    given_labels = [data.draw(labels(shape[0])), data.draw(labels(shape[0])), None]
    explicit = data.draw(st.booleans())
    results = []
    for of_each in (torch.clone, lambda given: given, lambda given: given.view(shape)):
        given = grad.clone()
        params = [Parameter(normal(shape, torch.float64, seed + number).to(device)) for number in range(3)]
        ties = {param: names for param, names in zip(params, given_labels, strict=True) if names is not None}
        optimizer = TiedOptimizer(torch.optim.SGD(params, lr=0.1), ties, compact=compact)
        for param in params:
            param.grad = of_each(given)
        if explicit:
            optimizer.tie_gradients()
        optimizer.step()
        results.append(params)
    for params in results[1:]:
        assert all(map(same_bits, params, results[0]))


@pytest.mark.parametrize("tied", [[0], [1], [2], [1, 2], [0, 1, 2]])
def test_gradients_that_backward_leaves_in_one_memory_are_tied_apart(tied: list[int]) -> None:
    shapes_of, factors = [(6, 3), (2, 3), (4, 3)], normal((18,), torch.float64, 3)
    results = []
    for is_copied in (False, True):
        whole, first, rest = params = [Parameter(normal(shape, torch.float64, 7)) for shape in shapes_of]
        ties = {params[number]: [[0, 1]] for number in tied}
        optimizer = TiedOptimizer(torch.optim.SGD(params, lr=0.1), ties)
        ((torch.cat([first, rest]).view(18) + whole.view(18)) * factors).sum().backward()
        for param in params if is_copied else ():
            param.grad = param.grad.clone()
        optimizer.step()
        results.append(params)
    assert all(map(same_bits, *results))


def test_gradients_that_lie_beside_each_other_stay_where_they_are() -> None:
    """As in the buckets of ``DistributedDataParallel``, also column by column."""
    bucket = normal((4, 6), torch.float64, 0)
    params = [Parameter(torch.zeros(4, 3, dtype=torch.float64)) for _ in range(2)]
    optimizer = TiedOptimizer(torch.optim.SGD(params, lr=0.1), {param: [[0, 1]] for param in params})
    for grads in (bucket.view(-1).split(12), bucket.split(3, dim=1)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.view(4, 3)
        places = [param.grad.data_ptr() for param in params]
        optimizer.step()
        assert [param.grad.data_ptr() for param in params] == places


@given(st.data())
def test_sparse_gradients_stay_sparse_and_reach_only_the_groups_they_touch(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    shape = (data.draw(st.integers(1, 30)), *data.draw(small_shapes))
    names = data.draw(labels(shape[0]))
    parameter = Parameter(normal(shape, torch.float64, data.draw(seeds)).to(device))
    optimizer = TiedOptimizer(torch.optim.SparseAdam([parameter], lr=0.1), {parameter: names}, compact=compact)
    before = parameter.detach().clone()

    stored = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=6))
    values = normal((len(stored), *shape[1:]), torch.float64, data.draw(seeds))
    parameter.grad = torch.sparse_coo_tensor(torch.tensor([stored], dtype=torch.int64), values, shape).to(device)
    optimizer.step()

    touched = {i for i in range(shape[0]) if i in stored or any(names[i] == names[j] != -1 for j in stored)}
    # The compact mode reads gradients and does not write them.
    assert set(parameter.grad.coalesce().indices()[0].tolist()) == (set(stored) if compact else touched)
    untouched = [i for i in range(shape[0]) if i not in touched]
    assert same_bits(parameter[untouched], before[untouched])
