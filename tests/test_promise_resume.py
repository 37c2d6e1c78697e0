"""Promise 9: save, load, go on: bit for bit as if never stopped."""

import copy
import io
import pickle
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import same_bits
from strategies import (
    Recipe,
    closure_of,
    labels,
    laid_out,
    layouts,
    normal,
    recipes_for,
    reductions_for,
    seeds,
    shapes,
    spelled,
)
from torch.nn import Parameter

from tieopt import TiedOptimizer, tie_


def _resumable(recipe: Recipe, dtype: torch.dtype) -> bool:
    """Whether the bare optimizer resumes bit for bit: torch casts some state to the parameter's dtype on loading."""
    return dtype == torch.float32 or recipe.optimizer not in (torch.optim.NAdam, torch.optim.ASGD)


def _train(optimizer: torch.optim.Optimizer, parameters: list[Parameter], steps: list[int]) -> None:
    for seed in steps:
        optimizer.step(closure_of(optimizer, parameters, seed))


def _through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _same_state(first: Any, second: Any) -> bool:
    """Whether two state_dicts agree, their tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return same_bits(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same_state(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same_state, first, second))
    return first == second


def _drawn(
    data: st.DataObject, device: torch.device, compact: bool, closure: bool = True
) -> tuple[Any, Any, list[int], list[int]]:
    """How to build a tied training from scratch, of what, and the steps before and after the stop."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    starts = [normal(data.draw(shapes()), dtype, data.draw(seeds)).to(device) for _ in range(2)]
    starts[0] = laid_out(starts[0], data.draw(layouts(starts[0])))
    names = [data.draw(labels(len(start))) for start in starts]
    recipe = data.draw(recipes_for(*starts, closure=closure).filter(lambda recipe: _resumable(recipe, dtype)))
    reduction = data.draw(reductions_for(recipe, compact))
    ways = data.draw(st.lists(spelled(names[0]), min_size=2, max_size=2))

    def build(weights: list[torch.Tensor], way: int = 0) -> tuple[TiedOptimizer, list[Parameter]]:
        parameters = [Parameter(weight.detach().clone()) for weight in weights]
        ties = {parameters[0]: ways[way], parameters[1]: names[1]}
        return TiedOptimizer(recipe(parameters), ties, reduction=reduction, compact=compact), parameters

    before, after = (data.draw(st.lists(seeds, min_size=1, max_size=4)) for _ in range(2))
    return build, starts, before, after


@given(st.data())
def test_resuming_from_a_checkpoint_is_never_having_stopped(
    device: torch.device, compact: bool, data: st.DataObject
) -> None:
    build, starts, before, after = _drawn(data, device, compact)
    straight, weights = build(starts)
    _train(straight, weights, before)
    saved = _through_a_file({"weights": [w.detach() for w in weights], "optimizer": straight.state_dict()})
    _train(straight, weights, after)

    resumed, resumed_weights = build(starts, way=1)
    with torch.no_grad():
        for parameter, weight in zip(resumed_weights, saved["weights"], strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(saved["optimizer"])
    assert _same_state(resumed.state_dict(), saved["optimizer"])
    _train(resumed, resumed_weights, after)
    assert all(map(same_bits, resumed_weights, weights))
    assert _same_state(resumed.state_dict(), straight.state_dict())


@given(st.data())
def test_a_checkpoint_can_be_resumed_from_twice(device: torch.device, compact: bool, data: st.DataObject) -> None:
    build, starts, before, after = _drawn(data, device, compact)
    straight, weights = build(starts)
    _train(straight, weights, before)
    saved = _through_a_file(straight.state_dict())
    checkpoint = [weight.detach().clone() for weight in weights]
    ends = []
    for _ in range(2):
        resumed, resumed_weights = build(checkpoint)
        resumed.load_state_dict(copy.deepcopy(saved))
        _train(resumed, resumed_weights, after)
        ends.append(resumed_weights)
    assert all(map(same_bits, *ends))


@given(data=st.data(), way=st.sampled_from(["deepcopy", "pickle"]))
def test_a_copy_goes_on_as_the_original_does(
    device: torch.device, compact: bool, data: st.DataObject, way: str
) -> None:
    # Copies of a bare LBFGS cannot step, so that it is left out.
    build, starts, before, after = _drawn(data, device, compact, closure=False)
    straight, weights = build(starts)
    _train(straight, weights, before)
    both = (straight, weights)
    copied, copied_weights = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))  # noqa: S301
    assert type(copied) is type(straight)
    frozen_in_time = [weight.detach().clone() for weight in weights]

    _train(copied, copied_weights, after)
    assert all(map(same_bits, weights, frozen_in_time))
    _train(straight, weights, after)
    assert all(map(same_bits, copied_weights, weights))
    assert _same_state(copied.state_dict(), straight.state_dict())


def _averaged(state: Any, start: torch.Tensor, names: torch.Tensor) -> Any:
    """The state, with the mean of the members in what has an entry for each of the parameter's."""
    return {
        number: {
            key: tie_(value.clone(), names) if torch.is_tensor(value) and value.shape == start.shape else value
            for key, value in entries.items()
        }
        for number, entries in state.items()
    }


@given(st.data())
def test_a_bare_optimizer_loads_a_tied_one_and_the_other_way_round(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    start = normal(data.draw(shapes()), dtype, data.draw(seeds))
    recipe = data.draw(recipes_for(start).filter(lambda recipe: _resumable(recipe, dtype)))
    groups = data.draw(spelled(data.draw(labels(len(start)))))
    steps = data.draw(st.lists(seeds, min_size=1, max_size=3))
    first, second = Parameter(start.clone()), Parameter(start.clone())
    tied, bare = TiedOptimizer(recipe([first]), {first: groups}), recipe([second])

    _train(tied, [first], steps)
    bare.load_state_dict(tied.state_dict())
    assert _same_state(bare.state_dict()["state"], tied.state_dict()["state"])
    _train(bare, [second], steps)
    names = tied.ties[0].parts[0].groups
    tied.load_state_dict(bare.state_dict())
    assert _same_state(_averaged(bare.state_dict()["state"], start, names), tied.state_dict()["state"])
