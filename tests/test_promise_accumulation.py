"""Promise 8: gradients that accumulate over several steps are those of the shared parameter."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import SharedTraining, slowly_tied
from strategies import labels, loss_of, normal, recipes_for, reductions, seeds, shapes, spelled
from torch.nn import Parameter

from tieopt import TiedOptimizer

# What a user may do between two backward passes, to both trainings alike.
MOVES = ("step", "tie_gradients", "zero_grad", "nothing")


@given(st.data())
def test_gradients_accumulate_as_those_of_the_shared_parameter(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.complex128]))
    shape = data.draw(shapes())
    names = data.draw(labels(shape[0]))
    start = slowly_tied(normal(shape, dtype, data.draw(seeds)), names).to(device)
    recipe = data.draw(recipes_for(start, entrywise=True))
    reduction = data.draw(reductions)
    parameter = Parameter(start.clone())
    optimizer = TiedOptimizer(
        recipe([parameter]), {parameter: data.draw(spelled(names))}, reduction=reduction, compact=compact
    )
    shared = SharedTraining([start], [names], recipe, reduction)

    for move in data.draw(st.lists(st.sampled_from(MOVES), min_size=2, max_size=8)):
        seed = data.draw(seeds)
        loss_of([parameter], seed).backward()
        loss_of(shared.weights(), seed).backward()
        if move == "step":
            optimizer.step()
            shared.optimizer.step()
        elif move == "tie_gradients":
            optimizer.tie_gradients()
        elif move == "zero_grad":
            to_none = data.draw(st.booleans())
            optimizer.zero_grad(set_to_none=to_none)
            shared.optimizer.zero_grad(set_to_none=to_none)
        torch.testing.assert_close(parameter.detach(), shared.weights()[0].detach(), rtol=1e-12, atol=1e-12)

        expected = shared.gradients()[0]
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            mean = slowly_tied(parameter.grad, names).to(device)
            torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-11)
            if move == "tie_gradients" or (move == "step" and not compact):
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-11)


@given(st.data())
def test_micro_batches_step_as_one_batch(device: torch.device, compact: bool, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    names = data.draw(labels(shape[0]))
    start = normal(shape, torch.float64, data.draw(seeds)).to(device)
    recipe = data.draw(recipes_for(start, entrywise=True))
    reduction = data.draw(reductions)
    batches = data.draw(st.lists(seeds, min_size=1, max_size=5))
    ends = []
    for split in (True, False):
        parameter = Parameter(start.clone())
        optimizer = TiedOptimizer(recipe([parameter]), {parameter: names}, reduction=reduction, compact=compact)
        for _ in range(3):
            optimizer.zero_grad()
            if split:
                for seed in batches:
                    loss_of([parameter], seed).backward()
                    if data.draw(st.booleans()):
                        optimizer.tie_gradients()
            else:
                sum(loss_of([parameter], seed) for seed in batches).backward()
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)
