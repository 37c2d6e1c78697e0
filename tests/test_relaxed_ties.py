"""Relaxed ties: members are trained for themselves, and pulled together so far, each so many steps."""

import copy
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from checks import GROUPS, SHAPE, parameter, pickled, randn, same_tree, tied_bitwise, train
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    Member,
    flat,
    groups_of_entries,
    same_bits,
    slowly_tied_entries,
    unit_in_the_last_place,
)
from strategies import ALL, COMPLEX, REAL, Recipe, normal, recipes_for, reductions, seeds, tensors
from test_bad_input import Setting
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.testing import assert_close

from tieopt import Tie, TiedOptimizer, is_tied
from tieopt.testing import ties

KINDS = ("none", "signs", "zeros", "any")

some_seeds = st.lists(seeds, min_size=1, max_size=7)
small = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
strengths = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1)

# How far, each how many steps: all but the exact tie.
relaxations = st.tuples(strengths, st.integers(1, 4)).filter(lambda both: both != (1, 1))


def _parameters(data: st.DataObject, dtypes: Sequence[torch.dtype]) -> list[Parameter]:
    dtype, count = data.draw(st.sampled_from(list(dtypes))), data.draw(st.integers(1, 2))
    return [Parameter(normal(data.draw(small), dtype, data.draw(seeds))) for _ in range(count)]


def _groups(drawn: Sequence[Tie], parameters: Sequence[Tensor]) -> list[list[Member]]:
    return [group for tie in drawn for group in groups_of_entries(tie, parameters)]


def _for(parameters: Sequence[Tensor], others: Sequence[Tensor], drawn: Sequence[Tie]) -> list[Tie]:
    """The same ties for other parameters."""
    number = {id(one): other for one, other in zip(parameters, others, strict=True)}
    return [
        Tie.join(*(Tie(number[id(part.param)], part.groups, dim=part.dim, scale=part.scale) for part in tie.parts))
        for tie in drawn
    ]


def _step(optimizer: Optimizer, parameters: Sequence[Parameter], seed: int) -> list[Tensor]:
    """A step on gradients that do not depend on the weights, which it returns."""
    grads = [normal(one.shape, one.dtype, seed + number) for number, one in enumerate(parameters)]
    for one, grad in zip(parameters, grads, strict=True):
        one.grad = grad.clone()
    optimizer.step()
    return grads


def _slowly_relax(parameters: Sequence[Parameter], groups: Sequence[Sequence[Member]], strength: float) -> None:
    projected = slowly_tied_entries(parameters, groups)
    members = [{position for group in groups for n, position, _ in group if n == number} for number in range(2)]
    with torch.no_grad():
        for one, goal, own in zip(parameters, projected, members, strict=False):
            chosen = torch.tensor([position in own for position in range(one.numel())]).view(one.shape)
            one.copy_(torch.where(chosen, one + strength * (goal - one), one))


def _slow_drift(parameters: Sequence[Parameter], groups: Sequence[Sequence[Member]]) -> float:
    return max(
        float((one.detach() - goal).abs().max())
        for one, goal in zip(parameters, slowly_tied_entries(parameters, groups), strict=True)
    )


def _close(one: Tensor, other: Tensor) -> None:
    size = max(1.0, float(other.detach().abs().max()))
    assert_close(one.detach(), other.detach(), rtol=1e-12, atol=1e-12 * size)


# --- what relaxed ties do ---


@given(data=st.data(), relaxation=relaxations)
def test_members_are_trained_apart_and_pulled_towards_their_projection(
    data: st.DataObject, relaxation: tuple[float, int]
) -> None:
    strength, every = relaxation
    parameters = _parameters(data, [torch.float64, torch.complex128])
    recipe = data.draw(recipes_for(*parameters, closure=False))
    drawn = data.draw(ties(parameters, KINDS))
    groups, twins = _groups(drawn, parameters), copy.deepcopy(parameters)
    optimizer = TiedOptimizer(recipe(parameters), drawn, strength=strength, every=every)
    bare = recipe(twins)
    _slowly_relax(twins, groups, strength)

    for number, seed in enumerate(data.draw(some_seeds), start=1):
        grads = _step(optimizer, parameters, seed)
        _step(bare, twins, seed)
        if number % every == 0:
            _slowly_relax(twins, groups, strength)
        for one, twin, grad in zip(parameters, twins, grads, strict=True):
            _close(one, twin)
            assert same_bits(one.grad, grad)
        assert optimizer.tie_drift() == pytest.approx(_slow_drift(parameters, groups), rel=1e-12, abs=1e-13)
        if strength == 1 and number % every == 0:
            assert optimizer.tie_drift() == 0

    expected = slowly_tied_entries(parameters, groups)
    optimizer.tie_weights()
    for one, goal in zip(parameters, expected, strict=True):
        _close(one, goal)
    assert optimizer.tie_drift() == 0
    weights = [one.detach().clone() for one in parameters]
    optimizer.tie_weights()
    assert all(map(same_bits, parameters, weights))


@given(data=st.data(), relaxation=relaxations)
def test_free_entries_are_the_bare_optimizers_bit_for_bit(data: st.DataObject, relaxation: tuple[float, int]) -> None:
    strength, every = relaxation
    parameters = _parameters(data, [torch.float32, torch.float64])
    recipe = data.draw(recipes_for(*parameters, entrywise=True).filter(lambda one: not one.settings.get("fused")))
    drawn = data.draw(ties(parameters, KINDS))
    groups, twins = _groups(drawn, parameters), copy.deepcopy(parameters)
    optimizer, bare = TiedOptimizer(recipe(parameters), drawn, strength=strength, every=every), recipe(twins)
    for seed in data.draw(some_seeds):
        _step(optimizer, parameters, seed)
        _step(bare, twins, seed)
    tied = {(number, position) for group in groups for number, position, _ in group}
    for number, (one, twin) in enumerate(zip(parameters, twins, strict=True)):
        free = [position for position in range(one.numel()) if (number, position) not in tied]
        assert same_bits(one.detach().flatten()[free], twin.detach().flatten()[free])


@given(data=st.data(), every=st.integers(1, 4))
def test_of_strength_zero_they_write_no_bit(data: st.DataObject, every: int) -> None:
    weight = Parameter(data.draw(tensors(data.draw(small), ALL)))
    twin = copy.deepcopy(weight)
    optimizer = TiedOptimizer(SGD([weight]), data.draw(ties([weight], KINDS)), strength=0, every=every)
    optimizer.step()
    assert same_bits(weight, twin)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    ("values", "goal"),
    [
        ([0.0, 1.0], 0.5),
        ([math.inf, 1.0], math.inf),
        ([-math.inf, 3.0], -math.inf),
        ([1.75e308, 1.75e308, 1.75e308, -1.75e308], 0.875e308),
    ],
    ids=str,
)
def test_the_way_to_the_mean_is_finite_where_its_ends_are_and_else_infinite(strength, values, goal):
    weight = Parameter(torch.tensor(values, dtype=torch.float64))
    TiedOptimizer(SGD([weight]), {weight: [list(range(len(values)))]}, strength=strength)
    assert weight.tolist() == pytest.approx([(1 - strength) * value + strength * goal for value in values], rel=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.75])
def test_a_pinned_infinity_stays(strength):
    weight = Parameter(torch.tensor([math.inf, -math.inf]))
    TiedOptimizer(SGD([weight]), Tie(weight, [[0], [1]], scale=torch.zeros(2)), strength=strength)
    assert weight.tolist() == [math.inf, -math.inf]


@given(data=st.data(), every=st.integers(1, 4))
def test_of_strength_zero_they_are_no_ties_bit_for_bit(data: st.DataObject, every: int) -> None:
    parameters = _parameters(data, (*REAL, *COMPLEX))
    recipe = data.draw(recipes_for(*parameters, closure=False))
    drawn, twins = data.draw(ties(parameters, KINDS)), copy.deepcopy(parameters)
    optimizer, bare = TiedOptimizer(recipe(parameters), drawn, strength=0, every=every), recipe(twins)
    for seed in data.draw(some_seeds):
        _step(optimizer, parameters, seed)
        _step(bare, twins, seed)
        assert all(map(same_bits, parameters, twins))
    assert same_tree(optimizer.state_dict()["state"], bare.state_dict()["state"])


@given(data=st.data(), reduction=reductions, one=st.sampled_from([1, 1.0]))
def test_of_strength_one_after_every_step_they_are_the_exact_ties_bit_for_bit(
    data: st.DataObject, reduction: str, one: float
) -> None:
    parameters = _parameters(data, (*REAL, *COMPLEX))
    recipe, drawn = data.draw(recipes_for(*parameters, closure=False)), data.draw(ties(parameters, KINDS))
    twins = copy.deepcopy(parameters)
    optimizer = TiedOptimizer(recipe(parameters), drawn, reduction=reduction, strength=one, every=1)
    exact = TiedOptimizer(recipe(twins), _for(parameters, twins, drawn), reduction=reduction)
    for seed in data.draw(some_seeds):
        _step(optimizer, parameters, seed)
        _step(exact, twins, seed)
        assert all(map(same_bits, parameters, twins))
        assert all(same_bits(first.grad, second.grad) for first, second in zip(parameters, twins, strict=True))
    assert same_tree(optimizer.state_dict(), exact.state_dict())


@given(data=st.data(), every=st.integers(2, 4))
def test_of_strength_one_members_are_equal_to_the_last_bit_after_each_so_many_steps(
    data: st.DataObject, every: int
) -> None:
    weight = Parameter(normal(SHAPE, data.draw(st.sampled_from(REAL)), data.draw(seeds)))
    recipe = data.draw(recipes_for(weight, closure=False, entrywise=True))
    optimizer = TiedOptimizer(recipe([weight]), {weight: GROUPS}, every=every)
    assert tied_bitwise(weight)
    for step in range(1, 3 * every + 1):
        _step(optimizer, [weight], step)
        assert tied_bitwise(weight) == (step % every == 0)


def test_strength_and_every_act_on_the_weights_as_computed_by_hand():
    weight = Parameter(torch.tensor([0.0, 8.0, 5.0, 4.0], dtype=torch.float64))
    tie = Tie(weight, torch.tensor([0, 0, -1, 1]), scale=torch.tensor([1.0, 1.0, 1.0, 0.0]))
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), tie, strength=0.25, every=2)
    assert weight.tolist() == [1.0, 7.0, 5.0, 3.0]
    assert optimizer.tie_drift() == 3.0
    weight.grad = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert weight.tolist() == [0.0, 7.0, 4.0, 3.0]
    optimizer.step()
    assert weight.tolist() == [0.0, 6.0, 3.0, 2.25]


def test_signs_and_joined_parameters_are_pulled_together_too():
    encoder, decoder = parameter(2, 3, dtype=torch.float64), parameter(3, 2, seed=1, dtype=torch.float64)
    minus = Tie(decoder, torch.arange(2), dim=1, scale=-torch.ones(2))
    before = [encoder.detach().clone(), decoder.detach().clone()]
    TiedOptimizer(SGD([encoder, decoder]), Tie.join(Tie(encoder, torch.arange(2)), minus), strength=0.5)
    middle = (before[0] - before[1].T) / 2
    assert_close(encoder.detach(), (before[0] + middle) / 2)
    assert_close(decoder.detach(), (before[1] - middle.T) / 2)


@given(data=st.data(), strength=st.floats(0, 1, exclude_max=True))
def test_in_any_dtype_the_error_is_that_of_rounding_the_goal_and_the_way_to_it(
    data: st.DataObject, strength: float
) -> None:
    dtype = data.draw(st.sampled_from([dtype for dtype in ALL if not dtype.is_complex]))
    weight = Parameter(normal(data.draw(small), dtype, data.draw(seeds)))
    drawn = data.draw(ties([weight], ("none", "signs", "zeros")))
    exact = Parameter(weight.detach().double())
    goals = flat(slowly_tied_entries([exact], _groups(drawn, [weight]))[0])
    _slowly_relax([exact], _groups(drawn, [weight]), strength)
    TiedOptimizer(SGD([weight]), drawn, strength=strength)
    for got, expected, goal in zip(flat(weight), flat(exact), goals, strict=True):
        units = unit_in_the_last_place(expected.real, dtype) + unit_in_the_last_place(goal.real, dtype)
        assert abs(got - expected) <= float(units)


@given(data=st.data(), relaxation=relaxations)
def test_no_input_in_any_dtype_or_layout_is_refused(data: st.DataObject, relaxation: tuple[float, int]) -> None:
    strength, every = relaxation
    start = data.draw(tensors(data.draw(small), ALL))
    weight = Parameter(start.movedim(0, -1).clone().movedim(-1, 0))
    drawn = data.draw(ties([weight]))
    optimizer = TiedOptimizer(SGD([weight]), drawn, strength=strength, every=every)
    assert isinstance(optimizer.tie_drift(), float)
    optimizer.tie_weights()
    finite = weight.detach().to(torch.complex128).isfinite().all()
    assert not finite or optimizer.tie_drift() == 0


@pytest.mark.parametrize("strength", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("dtype", [*REAL, torch.float8_e5m2], ids=str)
def test_equal_infinities_stay(dtype, strength):
    infinity = float("inf")
    weight = Parameter(torch.tensor([infinity, infinity, -infinity, -infinity, 1.0, 3.0]).to(dtype))
    optimizer = TiedOptimizer(SGD([weight]), {weight: [[0, 1], [2, 3], [4, 5]]}, strength=strength)
    words = weight.detach().double()
    assert words[:4].tolist() == [infinity, infinity, -infinity, -infinity]
    assert words[4:].isfinite().all()
    assert 1 <= float(words[4]) <= 2 <= float(words[5]) <= 3
    assert optimizer.tie_drift() == pytest.approx(float(words[5] - words[4]) / 2)


def test_a_frozen_parameter_is_not_pulled():
    weight = parameter(*SHAPE)
    before = weight.detach().clone()
    weight.requires_grad_(False)
    TiedOptimizer(SGD([weight]), {weight: GROUPS}, strength=0.5)
    assert same_bits(weight, before)


@pytest.mark.parametrize("at_rest", [0, 0.0, torch.tensor(0.0)])
def test_steps_in_which_no_parameter_moves_are_not_counted(at_rest):
    first, second = parameter(*SHAPE), parameter(*SHAPE, seed=1)
    groups = [{"params": [first], "lr": at_rest}, {"params": [second], "lr": at_rest}]
    optimizer = TiedOptimizer(SGD(groups), {first: GROUPS}, strength=0.5, every=2)
    before, drift = first.detach().clone(), optimizer.tie_drift()
    train(optimizer, 3)
    assert same_bits(first.detach(), before)

    optimizer.param_groups[1]["lr"] = 0.1
    train(optimizer, 1)
    assert same_bits(first.detach(), before)
    train(optimizer, 1)
    assert optimizer.tie_drift() == pytest.approx(drift / 2)


def test_tie_gradients_ties_gradients_also_where_a_step_does_not():
    weight = parameter(*SHAPE)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS}, strength=0.5)
    weight.grad = randn(*SHAPE, seed=3)
    optimizer.tie_gradients()
    assert tied_bitwise(weight.grad)


def test_a_step_with_a_closure_counts_once():
    weight = parameter(*SHAPE)
    optimizer = TiedOptimizer(LBFGS([weight], max_iter=3), {weight: GROUPS}, every=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight - randn(*SHAPE, seed=5)).pow(4).sum()
        loss.backward()
        return loss

    drifts = []
    for _ in range(4):
        optimizer.step(closure)
        drifts.append(optimizer.tie_drift())
    assert [drift == 0 for drift in drifts] == [False, True, False, True]


@pytest.mark.parametrize("way", ["wrap", "retie", "load"])
def test_the_state_of_relaxed_ties_is_that_of_entries_of_their_own(way):
    weight = parameter(*SHAPE)
    optimizer = Adam([weight])
    train(optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    if way == "load":
        state = optimizer.state_dict()
        optimizer = TiedOptimizer(Adam([weight]), {weight: GROUPS}, strength=0.5)
        optimizer.load_state_dict(state)
    elif way == "wrap":
        optimizer = TiedOptimizer(optimizer, {weight: GROUPS}, strength=0.5)
    else:
        optimizer = TiedOptimizer(optimizer, {}, strength=0.5)
        optimizer.retie({weight: GROUPS})
    assert same_tree(optimizer.state_dict()["state"], before)
    assert not tied_bitwise(before[0]["exp_avg"])


def test_ties_that_are_changed_are_as_relaxed_as_before():
    weight = parameter(*SHAPE, dtype=torch.float64)
    optimizer = TiedOptimizer(SGD([weight]), {}, strength=0.5)
    assert optimizer.tie_drift() == 0
    before = weight.detach().clone()
    optimizer.retie({weight: GROUPS})
    expected = before.clone()
    for group in GROUPS:
        expected[group] = (before[group] + before[group].mean(0)) / 2
    assert_close(weight.detach(), expected)


# --- they say so ---


@given(strength=strengths, every=st.integers(1, 4), reduction=reductions)
def test_they_are_called_approximate_exactly_if_they_are(strength: float, every: int, reduction: str) -> None:
    relaxed = (strength, every) != (1, 1)
    weight = parameter(*SHAPE)
    options: dict[str, Any] = {"strength": strength, "every": every}
    optimizer = TiedOptimizer(
        SGD([weight]), {weight: GROUPS}, **options | ({} if relaxed else {"reduction": reduction})
    )
    for text in (repr(optimizer), optimizer.tie_summary(), repr(copy.deepcopy(optimizer)), repr(pickled(optimizer))):
        assert ("approximate" in text) == relaxed
        if relaxed:
            plural = "step" if every == 1 else "steps"
            assert f"approximate: strength {strength}, every {every} {plural}" in text.splitlines()[-1]
    optimizer.untie()
    for text in (repr(optimizer), str(optimizer), optimizer.tie_summary()):
        assert "approximate" not in text


def test_a_step_that_fails_in_its_closure_is_not_counted():
    weight = parameter(*SHAPE)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS}, every=2)

    def failing() -> Tensor:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(failing)
    train(optimizer, 1)
    assert not tied_bitwise(weight)
    train(optimizer, 1)
    assert tied_bitwise(weight)


# --- stop and go on ---


def _going_on(way: str, optimizer: TiedOptimizer, weight: Parameter, recipe: Recipe, **options: Any) -> Any:
    if way == "deepcopy":
        return copy.deepcopy((optimizer, weight))
    if way == "pickle":
        return pickled((optimizer, weight))
    file = io.BytesIO()
    torch.save({"weight": weight.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Parameter(saved["weight"].clone())
    resumed = TiedOptimizer(recipe([other]), {other: GROUPS}, **options)
    with torch.no_grad():
        other.copy_(saved["weight"])  # Relaxed ties pull at the weights that they are given, too.
    resumed.load_state_dict(saved["optimizer"])
    return resumed, other


@pytest.mark.parametrize("way", ["checkpoint", "deepcopy", "pickle"])
@given(data=st.data(), relaxation=relaxations)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    way: str, data: st.DataObject, relaxation: tuple[float, int]
) -> None:
    weight = Parameter(normal(SHAPE, torch.float32, data.draw(seeds)))
    recipe = data.draw(recipes_for(weight, closure=False))
    options = {"strength": relaxation[0], "every": relaxation[1]}
    optimizer = TiedOptimizer(recipe([weight]), {weight: GROUPS}, **options)
    for seed in data.draw(some_seeds):
        _step(optimizer, [weight], seed)
    resumed, other = _going_on(way, optimizer, weight, recipe, **options)
    assert same_bits(other, weight)
    for seed in data.draw(some_seeds):
        _step(optimizer, [weight], seed)
        _step(resumed, [other], seed)
        assert same_bits(other, weight)
    assert same_tree(resumed.state_dict(), optimizer.state_dict())


def test_the_steps_are_counted_from_a_checkpoint_on():
    weight = parameter(*SHAPE)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS}, every=3)
    train(optimizer, 2)
    assert not tied_bitwise(weight)
    state = pickled(optimizer.state_dict())
    train(optimizer, 1)
    assert tied_bitwise(weight)

    optimizer.load_state_dict(state)
    train(optimizer, 1, seed=500)
    assert tied_bitwise(weight)


def test_a_checkpoint_of_exact_ties_is_one_of_relaxed_ties_and_counts_from_zero():
    weight, other = parameter(*SHAPE), parameter(*SHAPE)
    exact = TiedOptimizer(AdamW([weight]), {weight: GROUPS})
    train(exact, 2)
    relaxed = TiedOptimizer(AdamW([other]), {other: GROUPS}, every=3)
    train(relaxed, 1)
    relaxed.load_state_dict(exact.state_dict())
    found = []
    for _ in range(3):
        train(relaxed, 1)
        found.append(is_tied(other, GROUPS))
    assert found == [False, False, True]
    exact.load_state_dict(pickled(relaxed.state_dict()))


# --- bad input ---


@pytest.fixture(params=[True, False], ids=["named", "by position"])
def setting(request):
    return Setting(named=request.param)


@pytest.mark.parametrize(
    ("strength", "error"),
    [
        (-0.1, ValueError),
        (1.1, ValueError),
        (2, ValueError),
        (-1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (False, TypeError),
        (0.5j, TypeError),
        ([0.5], TypeError),
    ],
    ids=str,
)
def test_a_strength_that_is_none_is_refused(setting, strength, error):
    got = rf"Got: +{re.escape(repr(strength))} \({type(strength).__name__}\)"
    parts = ["strength says how far", "Expected: a number from 0 to 1", got]
    setting.refused(error, *parts, ties={setting.good: GROUPS}, strength=strength)


@pytest.mark.parametrize(
    ("every", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1.0, TypeError),
        (2.5, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
    ids=str,
)
def test_an_every_that_is_none_is_refused(setting, every, error):
    got = rf"Got: +{re.escape(repr(every))} \({type(every).__name__}\)"
    parts = ["every says after how many steps", "Expected: an integer from 1 on", got]
    setting.refused(error, *parts, ties={setting.good: GROUPS}, every=every)


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"every": 2}, {"strength": 0, "every": 3}], ids=str)
def test_relaxed_ties_of_the_sum_are_refused(setting, options):
    got = f"Got: +reduction='sum', strength={options.get('strength', 1.0)}, every={options.get('every', 1)}"
    parts = ["leave the gradients as they are", "Expected: reduction='mean', or strength=1 and every=1", got]
    setting.refused(ValueError, *parts, ties={setting.good: GROUPS}, reduction="sum", **options)
