"""Ties that change in mid-training: from then on, training is as if the new ties had been there all along."""

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checks import GROUPS, SHAPE, bits, one_tied, parameter, pickled, randn, same_tree, tied_bitwise, train
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import (
    Member,
    SharedTraining,
    flat,
    groups_of_entries,
    members_of,
    same_bits,
    slowly_tied,
    slowly_tied_entries,
)
from strategies import (
    ENTRYWISE,
    Recipe,
    closure_of,
    few_examples,
    labels,
    loss_of,
    normal,
    recipes_for,
    reductions,
    seeds,
    shapes,
    spelled,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, Rprop
from torch.testing import assert_close

from tieopt import Tie, TiedOptimizer, is_tied
from tieopt.testing import ties

# What torch's optimizers keep that has the sign of a gradient or a weight. The rest is of squares or sizes.
SIGNED = {"momentum_buffer", "exp_avg", "grad_avg", "prev", "ax"}

WAYS = ["retie, untied before", "retie, other ties before", "wrap", "load"]

some_seeds = st.lists(seeds, min_size=1, max_size=3)
small = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def _train(optimizer: Optimizer, parameters: Sequence[Parameter], steps: Sequence[int]) -> None:
    for seed in steps:
        optimizer.step(closure_of(optimizer, parameters, seed))


def _state_of(optimizer: Optimizer, parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    return [copy.deepcopy(optimizer.state.get(parameter, {})) for parameter in parameters]


def _untied_state(optimizer: Optimizer, parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """The state with an entry for each of the parameters', in either mode."""
    parameters, optimizer = copy.deepcopy((parameters, optimizer))
    if isinstance(optimizer, TiedOptimizer):
        optimizer.untie()
    return _state_of(optimizer, parameters)


def _of_entries(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _objects_not_of_entries(optimizer: Optimizer, parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """What of the state has not the parameter's shape: the objects themselves."""
    return [
        {key: value for key, value in optimizer.state.get(one, {}).items() if not _of_entries(value, one)}
        for one in parameters
    ]


def _everything(optimizer: Optimizer, parameters: Sequence[Parameter]) -> list[Any]:
    """All that could be written, in bits and objects."""
    return [
        [[bits(parameter), parameter._version] for parameter in parameters],
        copy.deepcopy(optimizer.state_dict()),
        [[id(value) for value in optimizer.state.get(parameter, {}).values()] for parameter in parameters],
    ]


# --- the trajectory ---


def _put_into(shared: SharedTraining, states: Sequence[dict[str, Any]], names: Sequence[Tensor]) -> None:
    """Gives the shared parameters the mean of each group of what was kept of its members."""
    for number, compact in enumerate(shared.shared):
        slots = shared.slots[number].tolist()
        leads = [slots.index(slot) for slot in range(len(compact))]
        shared.optimizer.state[compact] = {
            key: slowly_tied(value, names[number])[leads]
            if isinstance(value, Tensor) and value.dim() and len(value) == len(slots)
            else copy.deepcopy(value)
            for key, value in states[number].items()
        }


@pytest.mark.parametrize("recipe", ENTRYWISE, ids=repr)
@few_examples
@given(way=st.sampled_from(WAYS), data=st.data())
def test_from_a_change_on_the_trajectory_is_that_of_the_shared_parameter_with_the_mean_state(
    compact: bool, recipe: Recipe, way: str, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from([dtype for dtype in (torch.float64, torch.complex128) if dtype in recipe.dtypes]))
    starts = [normal(data.draw(shapes()), dtype, data.draw(seeds)) for _ in range(data.draw(st.integers(1, 2)))]
    before, names = ([data.draw(labels(len(start))) for start in starts] for _ in range(2))
    reduction = data.draw(reductions)
    parameters = [Parameter(start.clone()) for start in starts]
    spelling = [data.draw(spelled(each)) for each in names]
    new_ties = dict(zip(parameters, spelling, strict=True))
    seed = data.draw(st.integers(0, 2**31))
    first_steps = range(seed, seed + data.draw(st.integers(1, 4)))

    if way.startswith("retie"):
        old_ties = {} if "untied" in way else dict(zip(parameters, before, strict=True))
        optimizer = TiedOptimizer(recipe(parameters), old_ties, reduction=reduction, compact=compact)
    else:
        optimizer = recipe(parameters)
    _train(optimizer, parameters, first_steps)
    weights = [slowly_tied(one, each) for one, each in zip(parameters, names, strict=True)]
    if way == "load":
        checkpoint = copy.deepcopy(optimizer.state_dict())
        bare = recipe(parameters)
        bare.load_state_dict(copy.deepcopy(checkpoint))
        states = _state_of(bare, parameters)
        optimizer = TiedOptimizer(recipe(parameters), new_ties, reduction=reduction, compact=compact)
        optimizer.load_state_dict(checkpoint)
    else:
        states, others = _untied_state(optimizer, parameters), _objects_not_of_entries(optimizer, parameters)
        if way == "wrap":
            optimizer = TiedOptimizer(optimizer, new_ties, reduction=reduction, compact=compact)
        else:
            optimizer.retie(new_ties)
        for parameter, kept in zip(parameters, others, strict=True):
            # What the compact mode keeps of each entry has a shape of its own, and another one under other ties.
            kept = {key: value for key, value in kept.items() if not compact or not getattr(value, "shape", ())}
            assert all(optimizer.state[parameter][key] is value for key, value in kept.items())
    for parameter, state in zip(parameters, states, strict=True):
        now = optimizer.state.get(parameter, {})
        assert list(now) == list(state)
        assert all(same_tree(now[key], value) for key, value in state.items() if not _of_entries(value, parameter))

    shared = SharedTraining(weights, names, recipe, reduction)
    _put_into(shared, states, names)
    for step in range(10):
        _train(optimizer, parameters, [seed + 100 + step])
        shared.optimizer.zero_grad()
        loss_of(shared.weights(), seed + 100 + step).backward()
        shared.optimizer.step()
        for parameter, expected in zip(parameters, shared.weights(), strict=True):
            size = max(1.0, float(expected.detach().abs().max()))
            assert_close(parameter.detach(), expected.detach(), rtol=1e-12, atol=1e-12 * size)


# --- the state, with signs ---


def _drawn(data: st.DataObject, kinds: Sequence[str]) -> tuple[list[Parameter], list[Tie], list[list[Member]]]:
    parameters = [
        Parameter(normal(data.draw(small), torch.float64, data.draw(seeds)))
        for _ in range(data.draw(st.integers(1, 2)))
    ]
    drawn = data.draw(ties(parameters, kinds))
    return parameters, drawn, [group for tie in drawn for group in groups_of_entries(tie, parameters)]


def _changed(optimizer: Optimizer, drawn: list[Tie], way: str) -> TiedOptimizer:
    if way == "wrap":
        return TiedOptimizer(optimizer, drawn)
    tied = TiedOptimizer(optimizer, ())
    tied.retie(drawn)
    return tied


def _entries_in(groups: Sequence[Sequence[Member]], number: int) -> set[int]:
    return {position for group in groups for one, position, _ in group if one == number}


@pytest.mark.parametrize("recipe", ENTRYWISE, ids=repr)
@few_examples
@given(way=st.sampled_from(["retie", "wrap"]), data=st.data())
def test_the_state_of_members_is_tied_with_the_sign_of_their_scale_and_nothing_else_changes(
    recipe: Recipe, way: str, data: st.DataObject
) -> None:
    parameters, drawn, groups = _drawn(data, ("none", "signs", "zeros"))
    optimizer = recipe(parameters)
    _train(optimizer, parameters, data.draw(some_seeds))
    states, others = _state_of(optimizer, parameters), _objects_not_of_entries(optimizer, parameters)
    weights, settings = [one.detach().clone() for one in parameters], copy.deepcopy(optimizer.state_dict())

    optimizer = _changed(optimizer, drawn, way)

    assert same_tree(optimizer.state_dict()["param_groups"], settings["param_groups"])
    kept = {"the weights": (weights, [one.detach() for one in parameters], True)}
    for key in states[0]:
        if _of_entries(states[0][key], parameters[0]):
            now = [optimizer.state[one][key] for one in parameters]
            kept[key] = ([state[key] for state in states], now, key in SIGNED)
    for key, (old, new, signed) in kept.items():
        # What is kept of a pinned entry matters to nothing.
        own = [
            [(n, i, scale if signed else abs(scale)) for n, i, scale in group if scale or key == "the weights"]
            for group in groups
        ]
        expected, entries = slowly_tied_entries(old, own), [flat(one) for one in new]
        goals = [flat(one) for one in expected]
        for group in filter(None, own):
            (lead, at, sign), *_ = sorted(group, key=lambda member: member[2] == 0)
            for n, i, scale in group:
                assert entries[n][i] == scale * sign * entries[lead][at], key
                assert entries[n][i] == pytest.approx(goals[n][i], rel=1e-12, abs=1e-13), key
        if key.endswith("sq") or key in ("square_avg", "sum", "acc_delta", "exp_inf", "step_size"):
            assert all(value.real >= 0 for each in entries for value in each), key
        for number, (first, second) in enumerate(zip(old, new, strict=True)):
            free = [i for i in range(first.numel()) if i not in _entries_in(groups, number)]
            assert same_bits(first.flatten()[free], second.flatten()[free]), key
    for one, state, objects in zip(parameters, states, others, strict=True):
        assert list(optimizer.state.get(one, {})) == list(state)
        assert all(optimizer.state[one][key] is value for key, value in objects.items())
        assert all(same_tree(value, state[key]) for key, value in objects.items())


def test_opposite_momenta_under_opposite_signs_are_no_momentum_lost():
    weight = Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.tensor([3.0, -5.0], dtype=torch.float64)
    optimizer.step()
    TiedOptimizer(optimizer, Tie(weight, [[0, 1]], scale=torch.tensor([1.0, -1.0])))
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [4.0, -4.0]


@pytest.mark.parametrize("way", ["retie", "wrap", "load"])
def test_of_several_ties_of_one_parameter_each_averages_the_state(way):
    weight = Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.tensor([1.0, 3.0, 5.0, 9.0])
    optimizer.step()
    both = [Tie(weight, [[0, 1]]), Tie(weight, [[2, 3]])]
    if way == "load":
        state = optimizer.state_dict()
        optimizer = TiedOptimizer(SGD([weight], lr=0.1, momentum=0.9), both)
        optimizer.load_state_dict(state)
    else:
        optimizer = _changed(optimizer, both, way)
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [2.0, 2.0, 7.0, 7.0]


def test_what_is_kept_of_a_pinned_entry_has_no_say_in_what_is_kept_of_the_others():
    weight = Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = Rprop([weight], lr=0.1)
    for gradient in ([1.0, 1.0, 1.0], [1.0, 1.0, -1.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    before = optimizer.state[weight]["step_size"].clone()
    TiedOptimizer(optimizer, Tie(weight, [[0, 1, 2]], scale=torch.tensor([1.0, -1.0, 0.0])))
    assert before[0] == before[1] != before[2]
    assert same_bits(optimizer.state[weight]["step_size"][:2], before[:2])


# Adagrad has a state of the new parameter at once, so that what is there is of both.
@pytest.mark.parametrize("recipe", [one for one in ENTRYWISE if one.optimizer is not Adagrad], ids=repr)
def test_a_new_parameter_that_is_joined_to_a_trained_one_goes_on_with_its_state(compact, recipe):
    old, new = (Parameter(randn(4, 3, seed=seed, dtype=torch.float64)) for seed in (0, 1))
    optimizer = TiedOptimizer(recipe([old]), (), compact=compact)
    _train(optimizer, [old], [1, 2, 3])
    optimizer.add_param_group({"params": [new], **recipe.settings})
    states = _state_of(optimizer, [old])
    optimizer.retie(Tie.join(Tie(old, torch.arange(4)), Tie(new, torch.arange(4))))

    shared = SharedTraining([old.detach()], [torch.arange(4)], recipe, "sum")
    _put_into(shared, states, [torch.arange(4)])
    for seed in (4, 5, 6):
        _train(optimizer, [old, new], [seed])
        shared.optimizer.zero_grad()
        (weight,) = shared.weights()
        (loss_of([weight, weight], seed) / 2).backward()
        shared.optimizer.step()
        assert_close(old.detach(), shared.shared[0].detach(), rtol=1e-12, atol=1e-12)


# --- untie ---


@pytest.mark.parametrize("recipe", ENTRYWISE, ids=repr)
@few_examples
@given(st.data())
def test_an_untied_optimizer_is_from_then_on_the_bare_one_bit_for_bit(
    compact: bool, recipe: Recipe, data: st.DataObject
) -> None:
    parameters, drawn, _ = _drawn(data, ("none", "signs", "zeros", "any"))
    relaxed = not compact and data.draw(st.booleans())
    options = {"strength": 0.5, "every": 2} if relaxed else {"reduction": data.draw(reductions)}
    optimizer = TiedOptimizer(recipe(parameters), drawn, **options, compact=compact)
    _train(optimizer, parameters, data.draw(some_seeds))
    kept = _everything(optimizer, parameters)
    del kept[1]["tieopt"]
    optimizer.untie()

    now = _everything(optimizer, parameters)
    # The state has an entry for each of the parameters' again.
    assert same_tree(now[:1], kept[:1]) if compact else same_tree(now, kept)
    assert optimizer.ties == ()
    assert optimizer.tie_drift() == 0

    twins = copy.deepcopy(parameters)
    bare, twin_of = recipe(twins), dict(zip(parameters, twins, strict=True))
    bare.state.clear()
    bare.state.update({twin_of[one]: copy.deepcopy(state) for one, state in optimizer.state.items() if state})
    after = data.draw(some_seeds)
    _train(optimizer, parameters, after)
    _train(bare, twins, after)
    assert all(map(same_bits, parameters, twins))
    assert same_tree(optimizer.state_dict(), bare.state_dict())


def test_an_untied_optimizer_trains_its_entries_apart(compact):
    weight, optimizer = one_tied(Adam, compact=compact)
    train(optimizer, 1)
    assert tied_bitwise(weight)
    optimizer.untie()
    train(optimizer, 1)
    assert not tied_bitwise(weight)


# --- checkpoints ---


@given(st.data())
def test_a_state_belongs_to_the_ties_that_it_was_saved_with(data: st.DataObject) -> None:
    start = normal(data.draw(shapes()), torch.float32, data.draw(seeds))
    old, new = data.draw(labels(len(start))), data.draw(labels(len(start)))
    partitions = [{tuple(group) for group in members_of(each) if len(group) > 1} for each in (old, new)]
    assume(partitions[0] != partitions[1])
    recipe = data.draw(recipes_for(start, entrywise=True).filter(lambda one: one.optimizer not in _CASTING))

    def built(weight: Tensor, names: Tensor) -> tuple[Parameter, TiedOptimizer]:
        parameter = Parameter(weight.detach().clone())
        return parameter, TiedOptimizer(recipe([parameter]), {parameter: data.draw(spelled(names))})

    weight, optimizer = built(start, old)
    _train(optimizer, [weight], data.draw(some_seeds))
    with_old = pickled(optimizer.state_dict())
    optimizer.retie({weight: data.draw(spelled(new))})
    with_new = pickled(optimizer.state_dict())

    other, stale = built(weight, old)
    kept = _everything(stale, [other])
    with pytest.raises(ValueError, match="saved with other ties"):
        stale.load_state_dict(with_new)
    assert same_tree(_everything(stale, [other]), kept)
    with pytest.raises(ValueError, match="saved with other ties"):
        optimizer.load_state_dict(with_old)
    assert same_tree(pickled(optimizer.state_dict()), with_new)

    resumed, fresh = built(weight, new)
    fresh.load_state_dict(with_new)
    after = data.draw(some_seeds)
    _train(optimizer, [weight], after)
    _train(fresh, [resumed], after)
    assert same_bits(resumed, weight)


# torch casts some of their state to the dtype of the parameter on loading.
_CASTING = (torch.optim.NAdam, torch.optim.ASGD)


def test_a_tie_with_all_signs_turned_round_is_the_same_to_a_state():
    weight = parameter(*SHAPE)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    state = TiedOptimizer(SGD([weight], lr=0.1), Tie(weight, GROUPS, scale=signs)).state_dict()
    turned = signs.clone()
    turned[GROUPS[0]] *= -1
    TiedOptimizer(SGD([weight], lr=0.1), Tie(weight, GROUPS, scale=turned)).load_state_dict(state)


def test_a_state_of_an_untied_optimizer_says_nothing_of_ties():
    weight, optimizer = one_tied(AdamW)
    train(optimizer, 2)
    tied = pickled(optimizer.state_dict())
    assert "tieopt" in tied
    optimizer.untie()
    assert "tieopt" not in optimizer.state_dict()
    with pytest.raises(ValueError, match=r"Got: .*2 groups of 5 members"):
        optimizer.load_state_dict(tied)
    assert weight.grad is not None


@pytest.mark.parametrize("way", ["retie", "wrap", "load"])
def test_a_checkpoint_that_aliases_the_live_state_is_not_written(way):
    weight = parameter(*SHAPE)
    optimizer = AdamW([weight])
    train(optimizer, 2)
    # torch hands out the very dictionaries of the state; whoever keeps a checkpoint takes the tensors out of them.
    alias = {**optimizer.state_dict(), "state": {0: dict(optimizer.state[weight])}}
    before, objects = copy.deepcopy(alias), list(alias["state"][0].values())

    if way == "load":
        optimizer = TiedOptimizer(AdamW([weight]), {weight: GROUPS})
        optimizer.load_state_dict(alias)
    else:
        _changed(optimizer, [Tie(weight, GROUPS)], way)

    assert same_tree(alias, before)
    assert all(now is then for now, then in zip(alias["state"][0].values(), objects, strict=True))
    for key in ("exp_avg", "exp_avg_sq"):
        assert is_tied(optimizer.state[weight][key], GROUPS)
        assert not is_tied(alias["state"][0][key], GROUPS)


@pytest.mark.parametrize("way", ["retie", "wrap", "load"])
def test_what_a_state_keeps_beside_the_parameters_entries_is_left_alone(way):
    class Keeper(SGD):
        """Keeps everything that it could."""

    def kept(weight: Tensor, seed: int) -> dict[str, Any]:
        return {
            "momentum_buffer": randn(*SHAPE, seed=seed),
            "of rows": randn(SHAPE[0], 1, seed=seed),
            "transposed": randn(*reversed(SHAPE), seed=seed),
            "flat": randn(weight.numel(), seed=seed),
            "whole": torch.arange(weight.numel()).view(SHAPE),
            "mask": torch.ones(SHAPE, dtype=torch.bool),
            "number": 3,
            "text": "text",
            "none": None,
            "list": [randn(*SHAPE, seed=seed)],
        }

    weight = parameter(*SHAPE)
    optimizer = Keeper([weight], lr=0.1)
    optimizer.state[weight] = kept(weight, 1)
    before = dict(optimizer.state[weight])
    expected = copy.deepcopy(before)
    if way == "load":
        state = optimizer.state_dict()
        optimizer = TiedOptimizer(Keeper([weight], lr=0.1), {weight: GROUPS})
        # A bare optimizer turns what it loads into the parameter's dtype.
        bare = Keeper([weight], lr=0.1)
        bare.load_state_dict(copy.deepcopy(state))
        expected = bare.state[weight]
        optimizer.load_state_dict(state)
    else:
        _changed(optimizer, [Tie(weight, GROUPS)], way)
    now = optimizer.state[weight]
    assert list(now) == list(before)
    assert tied_bitwise(now["momentum_buffer"])
    assert not tied_bitwise(expected["momentum_buffer"])
    untouched = [
        key for key, value in expected.items() if not (_of_entries(value, weight) and value.is_floating_point())
    ]
    assert len(untouched) >= 7
    for key in untouched:
        assert same_tree(now[key], expected[key]), key
        assert now[key] is before[key] or way == "load", key


# --- bad ties ---

BAD = {
    "an index": ({"good": [[0, 1]], "bad": [[0, 7]]}, IndexError),
    "a name": ({"good": [[0, 1]], "worse": [[0, 1]]}, ValueError),
    "labels": ({"good": [[0, 1]], "bad": torch.zeros(6, dtype=torch.int64)}, ValueError),
    "an overlap": ([Tie("good", [[0, 1]]), Tie("bad", [[0, 1]]), Tie("bad", [[1, 2]])], ValueError),
    "a join": ([Tie("good", [[0, 1]]), Tie.join(Tie("bad", [[0, 1]]), Tie("good", [[3]], dim=1))], ValueError),
    "a scale": ([Tie("good", [[0, 1]]), Tie("bad", [[0, 1]], scale=torch.ones(3))], ValueError),
    "a dimension": ([Tie("good", [[0, 1]]), Tie("bad", [[0, 1]], dim=2)], IndexError),
    "no ties": (5, TypeError),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"strength": 0.5, "every": 2}, {"compact": True}], ids=str
)
def test_bad_ties_given_to_retie_change_nothing_at_all(bad, options):
    def built() -> tuple[list[Parameter], TiedOptimizer]:
        params = [parameter(*SHAPE), parameter(*SHAPE, seed=1)]
        inner = AdamW(zip(("good", "bad"), params, strict=True))
        optimizer = TiedOptimizer(inner, {"good": GROUPS, "bad": [[2, 4]]}, **options)
        train(optimizer, 3)
        return params, optimizer

    (params, optimizer), (twins, twin) = built(), built()
    assert optimizer.state
    kept, shown = _everything(optimizer, params), (optimizer.tie_summary(), repr(optimizer), repr(optimizer.ties))
    given_ties, error = BAD[bad]
    with pytest.raises(error):
        optimizer.retie(given_ties)

    assert same_tree(_everything(optimizer, params), kept)
    assert (optimizer.tie_summary(), repr(optimizer), repr(optimizer.ties)) == shown
    for one in (optimizer, twin):
        train(one, 3)
    assert all(map(same_bits, params, twins))


# --- parameters that were added, ties that stay ---


@given(data=st.data(), reduction=reductions)
def test_a_parameter_that_was_added_since_can_be_tied(compact: bool, data: st.DataObject, reduction: str) -> None:
    old, new = Parameter(normal(SHAPE, torch.float64, 0)), Parameter(normal(data.draw(shapes()), torch.float64, 1))
    names = data.draw(labels(len(new)))
    optimizer = TiedOptimizer(AdamW([old]), {old: GROUPS}, reduction=reduction, compact=compact)
    _train(optimizer, [old], [1, 2])
    optimizer.add_param_group({"params": [new], "lr": 0.02})
    assert len(optimizer.ties) == 1
    optimizer.retie({old: GROUPS, new: names})

    assert [tie.parts[0].param for tie in optimizer.ties] == [old, new]
    for seed in data.draw(some_seeds):
        _train(optimizer, [old, new], [seed])
        assert is_tied(old, GROUPS)
        assert is_tied(new, names)
    assert list(optimizer.state_dict()["tieopt"]["ties"]) == [0, 1]


def test_a_parameter_that_was_added_since_can_be_joined_by_its_name(compact):
    old, new = parameter(4, 3), parameter(3, 4, seed=1)
    optimizer = TiedOptimizer(SGD([("old", old)], lr=0.1), (), compact=compact)
    train(optimizer, 1)
    optimizer.add_param_group({"params": [("new", new)]})
    expected = (old.detach() + new.detach().T) / 2
    optimizer.retie(Tie.join(Tie("old", torch.arange(4)), Tie("new", torch.arange(4), dim=1)))
    assert_close(old.detach(), expected)
    assert torch.equal(old, new.T)
    train(optimizer, 2)
    assert torch.equal(old, new.T)
    assert not torch.equal(old, expected)


@pytest.mark.parametrize("recipe", ENTRYWISE, ids=repr)
@few_examples
@given(st.data())
def test_the_same_ties_again_change_no_bit(compact: bool, recipe: Recipe, data: st.DataObject) -> None:
    parameters, drawn, groups = _drawn(data, ("none", "signs", "zeros"))
    optimizer = TiedOptimizer(recipe(parameters), drawn, reduction=data.draw(reductions), compact=compact)
    _train(optimizer, parameters, data.draw(some_seeds))
    weights = [bits(one) for one in parameters]
    if recipe.settings.get("fused"):
        # What such a kernel keeps of equal gradients may differ in the last bit: once, it has to be tied.
        optimizer.retie(drawn)
    kept = _everything(optimizer, parameters)[1:]
    pinned = [[i for group in groups for n, i, scale in group if (n, scale) == (number, 0)] for number in range(2)]
    states = _without_pinned(_state_of(optimizer, parameters), parameters, pinned)
    optimizer.retie(drawn if data.draw(st.booleans()) else optimizer.ties)
    assert same_tree(_without_pinned(_state_of(optimizer, parameters), parameters, pinned), states)
    # In the compact mode the state is made anew.
    last = 2 if compact else 3
    assert any(pinned) or same_tree(_everything(optimizer, parameters)[1:last], kept[: last - 1])
    assert all(torch.equal(bits(one), words) for one, words in zip(parameters, weights, strict=True))


def _without_pinned(
    states: list[dict[str, Any]], parameters: Sequence[Parameter], pinned: list[list[int]]
) -> list[dict[str, Any]]:
    """The states, zero where an entry is pinned: what they are there matters to nothing."""
    for state, one, own in zip(states, parameters, pinned, strict=False):
        for value in state.values():
            if _of_entries(value, one):
                value.view(-1)[own] = 0
    return states


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_retie_keeps_the_reduction(compact, reduction):
    weight, other = parameter(*SHAPE, dtype=torch.float64), parameter(*SHAPE, dtype=torch.float64)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: [[0, 1]]}, reduction=reduction, compact=compact)
    optimizer.retie({weight: GROUPS})
    TiedOptimizer(SGD([other], lr=0.1), {other: [[0, 1]]}, compact=compact)
    from_the_start = TiedOptimizer(SGD([other], lr=0.1), {other: GROUPS}, reduction=reduction, compact=compact)
    for each, param in ((optimizer, weight), (from_the_start, other)):
        param.grad = randn(*SHAPE, seed=5, dtype=torch.float64)
        each.step()
    assert same_bits(weight, other)


def test_the_state_of_relaxed_ties_is_averaged_where_exact_ones_load_it():
    optimizers = []
    for options in ({"strength": 0.5}, {}):
        weight = Parameter(randn(4, 3, dtype=torch.float64))
        optimizers.append(TiedOptimizer(SGD([weight], lr=0.1, momentum=0.9), {weight: [[0, 1, 2]]}, **options))
    relaxed, exact = optimizers
    (weight,) = relaxed.param_groups[0]["params"]
    weight.grad = randn(4, 3, seed=1, dtype=torch.float64)
    relaxed.step()
    exact.load_state_dict(relaxed.state_dict())

    momentum = {
        name: one.state_dict()["state"][0]["momentum_buffer"] for name, one in (("old", relaxed), ("new", exact))
    }
    assert torch.equal(momentum["new"][0], momentum["new"][1])
    assert_close(momentum["new"][0], momentum["old"][:3].mean(dim=0), rtol=1e-12, atol=1e-12)
    assert torch.equal(momentum["new"][3], momentum["old"][3])


# --- changes in the middle of a step ---


class CallsBack(SGD):
    """Calls what it holds in the middle of its step and of its switches."""

    def step(self, closure: Any = None) -> None:
        self.callback()
        super().step()

    def train(self) -> None:
        self.callback()

    eval = train


CHANGES = {"retie": lambda optimizer, weight: optimizer.retie({weight: [[0, 1]]}), "untie": lambda one, _: one.untie()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("within", ["closure", "step", "train", "eval"])
def test_ties_cannot_change_in_the_middle_of_a_step(compact, change, within):
    weight, optimizer = one_tied(SGD if within == "closure" else CallsBack, compact=compact)
    weight.grad = randn(*SHAPE)
    copies = []

    def closure() -> None:
        del optimizer.callback
        copies.extend([copy.deepcopy((weight, optimizer)), pickled((weight, optimizer))])
        CHANGES[change](optimizer, weight)

    before, shown = bits(weight), optimizer.tie_summary()
    optimizer.callback = closure
    run, args = (optimizer.step, [closure]) if within == "closure" else (getattr(optimizer, within), [])
    with pytest.raises(RuntimeError, match=r"(?s)in the middle of a step.*Expected: retie\(\) or untie\(\) between"):
        run(*args)
    assert torch.equal(bits(weight), before)
    assert optimizer.tie_summary() == shown

    # The error does not stay, and a copy that was made in the step is in none.
    for own, one in [(weight, optimizer), *copies]:
        CHANGES[change](one, own)
        assert len(one.ties) == (change == "retie")


def test_ties_can_change_in_the_hooks_around_a_step(compact):
    weight, optimizer = one_tied(compact=compact)
    before = optimizer.register_step_pre_hook(lambda *_: optimizer.retie({weight: [[0, 1]]}))
    after = optimizer.register_step_post_hook(lambda *_: optimizer.retie({weight: [[2, 3]]}))
    train(optimizer, 1)
    assert tied_bitwise(weight, [[0, 1], [2, 3]])
    before.remove()
    after.remove()
    train(optimizer, 1)
    assert tied_bitwise(weight, [[2, 3]])
    assert not tied_bitwise(weight, [[0, 1]])


# --- from every state that a host can bring about ---


def _replaced(optimizer: Optimizer, old: Parameter, rows: int) -> Parameter:
    """Puts a parameter of so many rows in the place of another one, and leaves the state."""
    new = parameter(rows, 5, seed=9)
    optimizer.param_groups[0]["params"][0] = new
    return new


def _grown(weight: Parameter, optimizer: Optimizer) -> None:
    """Adds rows to a parameter, and to all that is kept of its entries."""
    held = optimizer.state.get(weight)
    held["momentum_buffer"] = torch.cat([held["momentum_buffer"], torch.zeros(2, 5)])
    del optimizer.state[weight]
    new = _replaced(optimizer, weight, 9)
    optimizer.state[new] = held


def _begun_anew(weight: Parameter, optimizer: Optimizer) -> None:
    """Replaces a parameter by one of the same shape, of which nothing has a momentum."""
    held = optimizer.state.pop(weight)
    new = _replaced(optimizer, weight, 7)
    optimizer.state[new] = {**held, "momentum_buffer": torch.zeros_like(new)}


def _converted(weight: Parameter, optimizer: Optimizer) -> None:
    weight.data = weight.data.double()
    optimizer.state.clear()


def _grown_first(weight: Parameter, optimizer: Optimizer) -> None:
    """The same in another order: what is kept is put there before the parameter has its place."""
    state = optimizer.state
    held, new = state.pop(weight), parameter(9, 5)
    state[new] = {**held, "momentum_buffer": torch.ones(9, 5)}
    optimizer.param_groups[0]["params"][0] = new


HOSTS = {
    "grown before it has its place": _grown_first,
    "grown with its state": _grown,
    "grown": lambda weight, optimizer: _replaced(optimizer, weight, 9),
    "pruned": lambda weight, optimizer: _replaced(optimizer, weight, 4),
    "replaced": lambda weight, optimizer: _replaced(optimizer, weight, 7),
    "begun anew": _begun_anew,
    "gone": lambda weight, optimizer: optimizer.param_groups[0]["params"].clear(),
    "first group gone": lambda weight, optimizer: optimizer.param_groups.pop(0),
    "last group gone": lambda weight, optimizer: optimizer.param_groups.pop(),
    "all gone but one": lambda weight, optimizer: optimizer.param_groups.__delitem__(slice(1, None)),
    "reordered": lambda weight, optimizer: optimizer.param_groups.reverse(),
    "of another dtype": _converted,
    "frozen": lambda weight, optimizer: weight.requires_grad_(False),
    "other settings": lambda weight, optimizer: optimizer.param_groups[0].update(lr=0.5),
    "no state": lambda weight, optimizer: optimizer.state.clear(),
    "state of another shape": lambda weight, optimizer: optimizer.state[weight].update(odd=torch.ones(3)),
    "another optimizer held": lambda weight, optimizer: vars(optimizer).update(held=SGD([weight], lr=0.1)),
}


def _hosted(compact: bool) -> tuple[Parameter, TiedOptimizer]:
    """A parameter that is tied and joined with a second one, and two without ties."""
    weights = [parameter(7, 5, seed=0), parameter(7, 5, seed=1), parameter(3, seed=2), parameter(7, 5, seed=3)]
    labels = torch.tensor([0, -1, 1, 0, -1, 0, 1])
    inner = SGD([{"params": [weight]} for weight in weights], lr=0.1, momentum=0.9)
    optimizer = TiedOptimizer(inner, Tie.join(Tie(weights[0], labels), Tie(weights[1], labels)), compact=compact)
    train(optimizer, 2)
    return weights[0], optimizer


def _one_group_each(compact: bool, tied: int) -> tuple[list[Parameter], TiedOptimizer]:
    """Three parameters of one shape, of which the last is not in a group; what stands in the place of another fits."""
    weights = [parameter(7, 5, seed=seed) for seed in range(3)]
    inner = SGD([{"params": [weight]} for weight in weights[:2]], lr=0.1)
    optimizer = TiedOptimizer(inner, {weights[tied]: [[0, 1]]}, compact=compact)
    for weight in weights:
        weight.grad = randn(7, 5)
    return weights, optimizer


def _added_after_the_first_is_gone(optimizer: TiedOptimizer, other: Parameter) -> None:
    optimizer.param_groups.pop(0)
    optimizer.add_param_group({"params": [other]})


def _gone_after_one_is_added(optimizer: TiedOptimizer, other: Parameter) -> None:
    optimizer.add_param_group({"params": [other]})
    optimizer.param_groups.pop(1)


MOVES: dict[str, tuple[int, Callable[[TiedOptimizer, Parameter], object]]] = {
    "first gone": (0, lambda optimizer, other: optimizer.param_groups.pop(0)),
    "reordered": (1, lambda optimizer, other: optimizer.param_groups.reverse()),
    "added after the first is gone": (0, _added_after_the_first_is_gone),
    "gone after one is added": (1, _gone_after_one_is_added),
    "one group takes what is of another": (
        0,
        lambda optimizer, other: optimizer.param_groups[0].update(params=optimizer.param_groups.pop()["params"]),
    ),
}


@pytest.mark.parametrize(
    "method", ["step", "tie_weights", "tie_gradients", "tie_summary", "tie_drift", "grad_norm", "state_dict"]
)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("copied", [lambda optimizer: optimizer, copy.deepcopy], ids=["itself", "copy"])
def test_no_tie_goes_to_another_parameter(compact, copied, move, method):
    tied, change = MOVES[move]
    weights, optimizer = _one_group_each(compact, tied)
    optimizer = copied(optimizer)
    weights[:2] = [weight for group in optimizer.param_groups for weight in group["params"]]
    change(optimizer, weights[2])
    before = [bits(weight) for weight in weights]
    with pytest.raises(RuntimeError, match="removed from the parameter groups or reordered"):
        getattr(optimizer, method)()
    assert all(map(torch.equal, map(bits, weights), before))


def test_a_parameter_that_is_gone_is_not_kept(compact):
    weights, optimizer = _one_group_each(compact, 0)
    for weight in weights[:2]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    gone = weakref.ref(weights.pop(1))
    del weight, optimizer.param_groups[1]
    optimizer.state.clear()
    optimizer.step()
    optimizer.state_dict()
    assert gone() is None


@pytest.mark.parametrize("replaces", [False, True])
def test_a_parameter_with_the_identity_of_one_that_is_gone_is_another_one(compact, replaces):
    """Python gives the address of what is gone to what comes next."""
    for _ in range(40):
        weights, optimizer = _one_group_each(compact, 0)
        optimizer.step()
        optimizer.param_groups.pop(1)
        optimizer.state.clear()
        del weights[1]
        added = parameter(7, 5, seed=5)
        if replaces:
            optimizer.param_groups[0]["params"][0] = added
            optimizer.tie_weights()
            assert is_tied(added, [[0, 1]])
            continue
        optimizer.add_param_group({"params": [added]})
        optimizer.param_groups.pop(0)
        with pytest.raises(RuntimeError, match="removed from the parameter groups or reordered"):
            optimizer.step()


def _replaced_after_the_last_is_gone(optimizer: TiedOptimizer, other: Parameter) -> None:
    optimizer.param_groups.pop()
    optimizer.step()
    optimizer.param_groups[0]["params"] = [other]


def _replaced_around_a_group_that_comes_and_goes(optimizer: TiedOptimizer, other: Parameter) -> None:
    optimizer.add_param_group({"params": [parameter(7, 5, seed=5)]})
    optimizer.param_groups[0]["params"][0] = parameter(7, 5, seed=6)
    optimizer.step()
    optimizer.param_groups.pop()
    optimizer.param_groups[0]["params"][0] = other


def _all_replaced(optimizer: TiedOptimizer, other: Parameter) -> None:
    for number, settings in enumerate(optimizer.param_groups):
        settings["params"] = [parameter(7, 5, seed=number) if number else other]


@pytest.mark.filterwarnings("ignore:Tied weights were replaced")
@pytest.mark.parametrize(
    "change", [_replaced_after_the_last_is_gone, _replaced_around_a_group_that_comes_and_goes, _all_replaced]
)
def test_a_parameter_that_takes_the_place_of_a_tied_one_is_tied(compact, change):
    weights, optimizer = _one_group_each(compact, 0)
    change(optimizer, weights[2])
    optimizer.step()
    assert tied_bitwise(weights[2], [[0, 1]])


@pytest.mark.filterwarnings("ignore:The optimizer begins the state")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("host", HOSTS)
def test_ties_can_change_whatever_a_host_has_done(compact, host, change):
    weight, optimizer = _hosted(compact)
    HOSTS[host](weight, optimizer)
    held = [param for settings in optimizer.param_groups for param in settings["params"]]
    tied = [param for param in held if param.dim() == 2 and param.requires_grad]
    before = [bits(param) for param in held]
    if change == "retie":
        vars(optimizer).pop("held", None)  # With ties, the compact mode cannot serve one that has another one step.

    optimizer.untie() if change == "untie" else optimizer.retie({param: [[0, 1]] for param in tied})
    assert len(optimizer.ties) == (len(tied) if change == "retie" else 0)
    assert all(is_tied(param, [[0, 1]]) for param in tied) or change == "untie"
    assert change == "retie" or all(map(torch.equal, map(bits, held), before))
    for seed in (1, 2):
        for param in held:
            param.grad = randn(*param.shape, seed=seed, dtype=param.dtype)
        optimizer.step()
    for param in tied:
        assert tied_bitwise(param, [[0, 1]]) == (change == "retie")
    if compact and host not in ("last group gone", "all gone but one"):
        # As in the bare optimizer, what was kept of a parameter without ties stays when it is gone.
        assert all(any(key is param for param in held) for key in optimizer.state)
        assert same_tree(pickled(optimizer).state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("host", ["grown with its state", "grown", "pruned", "gone", "first group gone"])
def test_a_step_of_a_parameter_that_was_replaced_is_refused_and_leaves_everything(compact, host):
    weight, optimizer = _hosted(compact)
    HOSTS[host](weight, optimizer)
    held = [param for settings in optimizer.param_groups for param in settings["params"]]
    for param in held:
        param.grad = randn(*param.shape)

    def everything() -> list[Any]:
        return [[[bits(one), bits(one.grad)] for one in held], copy.deepcopy(list(optimizer.state.values()))]

    before = everything()
    for step in (optimizer.step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(RuntimeError, match=r"param_groups\[\d\]\['params'\]\[0\]\n.*(?s:.)*untie\(\)"):
            step()
        assert same_tree(everything(), before)


def test_what_cannot_be_converted_is_dropped_with_a_warning_that_says_what(compact):
    weight, optimizer = _hosted(compact)
    _grown(weight, optimizer)
    optimizer.param_groups[0]["param_names"] = ["points"]
    if compact:
        # Of both: members of the other one had their values there.
        lost = r"points of shape \(9, 5\): momentum_buffer; param_groups\[1\]\['params'\]\[0\] .*: momentum_buffer$"
        with pytest.warns(UserWarning, match=f"Dropped: {lost}") as warned:
            optimizer.untie()
        assert [one.filename for one in warned] == [__file__]
    else:
        optimizer.untie()
    assert bool(optimizer.state.get(optimizer.param_groups[0]["params"][0])) == (not compact)


@pytest.mark.parametrize("host", ["begun anew", "grown before it has its place"])
def test_what_fits_a_parameter_as_it_is_now_is_kept(compact, host):
    weight, optimizer = _hosted(compact)
    HOSTS[host](weight, optimizer)
    with warnings.catch_warnings(action="ignore"):  # Of the parameter that was joined with it.
        optimizer.untie()
    new = optimizer.param_groups[0]["params"][0]
    assert torch.equal(optimizer.state[new]["momentum_buffer"], torch.full(new.shape, float(host != "begun anew")))


def test_what_remains_of_joined_parameters_keeps_its_state(compact):
    weight, optimizer = _hosted(compact)
    other = optimizer.param_groups[1]["params"][0]
    expected = _untied_state(optimizer, [weight, other])[1]
    _replaced(optimizer, weight, 9)
    if compact:
        with pytest.warns(UserWarning, match=r"params'\]\[0\] of shape \(9, 5\): momentum_buffer$"):
            optimizer.untie()
    else:
        optimizer.untie()
    assert same_tree(optimizer.state[other], expected)


@pytest.mark.filterwarnings("ignore:Tied weights were replaced")
@pytest.mark.parametrize("order", ["place, state", "state, place"])
def test_a_parameter_of_the_same_shape_goes_on_with_what_was_put_there_for_it(order):
    ends = []
    for compact in (False, True):
        weights = [parameter(*SHAPE), parameter(*SHAPE, seed=1)]
        optimizer = Adam([{"params": [weight]} for weight in weights], lr=0.1)
        ties = [Tie(weight, torch.tensor([0, -1, 1, 0, -1, 0, 1])) for weight in weights]
        optimizer = TiedOptimizer(optimizer, ties, compact=compact)
        train(optimizer, 2)
        old, weights[0] = weights[0], parameter(*SHAPE, seed=2)
        held = {"step": torch.tensor(5.0), "exp_avg": randn(*SHAPE, seed=3), "exp_avg_sq": randn(*SHAPE, seed=4) ** 2}
        del optimizer.state[old]
        if order == "state, place":
            optimizer.state[weights[0]] = held
        optimizer.param_groups[0]["params"][0] = weights[0]
        if order == "place, state":
            optimizer.state[weights[0]] = held
        if not compact:
            # In the full mode every member has a momentum of its own until ties begin.
            optimizer.retie(optimizer.ties)
        train(optimizer, 2)
        ends.append([weight.detach() for weight in weights])
    for first, second in zip(*ends, strict=True):
        assert_close(first, second)


@pytest.mark.parametrize("change", CHANGES)
def test_a_warning_that_is_an_error_leaves_the_new_ties(change):
    weight, optimizer = _hosted(True)
    _grown(weight, optimizer)
    new = optimizer.param_groups[0]["params"][0]
    with pytest.raises(UserWarning, match="begins the state of a parameter anew"):
        CHANGES[change](optimizer, new)
    assert len(optimizer.ties) == (change == "retie")
    train(optimizer, 1)


# --- freezing ---


@pytest.mark.parametrize("way", ["wrap", "retie", "load"])
def test_the_state_of_a_frozen_parameter_is_averaged_for_when_it_is_trained_again(compact, way):
    weight, ties = Parameter(torch.zeros(2)), [[0, 1]]
    optimizer = SGD([weight], lr=1.0, momentum=0.5)
    if way == "retie":
        optimizer = TiedOptimizer(optimizer, (), compact=compact)
    weight.grad = torch.tensor([1.0, 3.0])
    optimizer.step()
    before = bits(weight)
    weight.requires_grad_(False)
    if way == "wrap":
        optimizer = TiedOptimizer(optimizer, {weight: ties}, compact=compact)
    elif way == "retie":
        optimizer.retie({weight: ties})
    else:
        saved = optimizer.state_dict()
        optimizer = TiedOptimizer(SGD([weight], lr=1.0, momentum=0.5), {weight: ties}, compact=compact)
        optimizer.load_state_dict(saved)
    assert torch.equal(bits(weight), before)

    weight.requires_grad_(True)
    optimizer.tie_weights()
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert weight.tolist() == [-3.0, -3.0]


# --- pinned entries ---


@pytest.mark.parametrize(
    "recipe", [*ENTRYWISE, Recipe(Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5})], ids=repr
)
def test_a_pinned_entry_is_trained_after_the_ties_as_in_the_full_mode_and_from_the_start(recipe):
    ends = []
    for compact in (None, False, True):
        weight = Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = recipe([weight])
        if compact is not None:
            scale = torch.tensor([1.0, -1.0, 0.0, 1.0])
            optimizer = TiedOptimizer(optimizer, Tie(weight, [[0, 1, 2]], scale=scale), compact=compact)
            for seed in (0, 1):
                weight.grad = randn(4, seed=seed, dtype=torch.float64)
                optimizer.step()
            optimizer.untie()
        else:
            for _ in range(2):
                weight.grad = torch.zeros(4, dtype=torch.float64)
                optimizer.step()
        for seed in (2, 3):
            weight.grad = randn(4, seed=seed, dtype=torch.float64)
            optimizer.step()
        ends.append(weight.detach())
    bare, full, of_compact = ends
    assert_close(of_compact, full, rtol=1e-12, atol=1e-12)
    assert_close(of_compact[2], bare[2], rtol=1e-12, atol=1e-12)


def test_what_was_kept_of_a_pinned_entry_begins_anew(compact):
    weight = Parameter(torch.tensor([1.0, 1.0, 5.0]))
    optimizer = Rprop([weight], lr=0.25)
    for gradient in ([1.0, 1.0, 1.0], [1.0, 1.0, -1.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    optimizer = TiedOptimizer(optimizer, Tie(weight, [[0, 1, 2]], scale=torch.tensor([1.0, 1.0, 0.0])), compact=compact)
    optimizer.untie()
    assert optimizer.state[weight]["step_size"][2] == 0.25
