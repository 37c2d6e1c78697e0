"""The ties of whole neurons: tied units compute the same, and what follows reads them equally."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checks import same_tree
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import members_of, same_bits
from strategies import ENTRYWISE, labels, normal, recipes_for, reductions, seeds, spelled
from test_bad_input import assert_clear
from torch import Tensor, nn

from tieopt import Tie, TiedOptimizer, is_tied, neurons
from tieopt.testing import assert_tied

UNITS = 5
POSITIONS = {1: 4, 2: 6, 3: 8}  # of a convolution's output, flattened
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (6,), 2: (4, 5), 3: (4, 4, 4)}  # of its input


def _convolution(dim: int, inputs: int, units: int, bias: bool) -> nn.Module:
    return CONVOLUTIONS[dim](inputs, units, 3, bias=bias)


# For each kind of layer: the layer, what may follow it, what it takes.
Made = tuple[nn.Module, nn.Module | None, Tensor]


def _linear(bias: bool, following: bool) -> Made:
    return nn.Linear(3, UNITS, bias), nn.Linear(UNITS, 2) if following else None, normal((7, 3), torch.float32, 0)


def _convolved(dim: int, then: str) -> Callable[[bool, bool], Made]:
    def made(bias: bool, following: bool) -> Made:
        layer, images = _convolution(dim, 2, UNITS, bias), normal((3, 2, *SIZES[dim]), torch.float32, 0)
        after = CONVOLUTIONS[dim](UNITS, 2, 1) if then == "convolution" else nn.Linear(UNITS * POSITIONS[dim], 2)
        return layer, after if following else None, images

    return made


def _embedding(bias: bool, following: bool) -> Made:
    return nn.Embedding(UNITS, 3), None, torch.arange(UNITS)


LAYERS = {
    "linear": _linear,
    **{f"{dim}-d convolution": _convolved(dim, "convolution") for dim in CONVOLUTIONS},
    **{f"{dim}-d convolution, flattened": _convolved(dim, "linear layer") for dim in CONVOLUTIONS},
    "embedding": _embedding,
}


def _units(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What each unit computes, unit by unit."""
    with torch.no_grad():
        outputs = layer(inputs)
    return outputs if isinstance(layer, nn.Embedding) else outputs.movedim(1, 0)


def _loss(layer: nn.Module, following: nn.Module | None, inputs: Tensor) -> Tensor:
    outputs = layer(inputs)
    if following is not None:
        hidden = outputs.tanh()
        outputs = following(hidden.flatten(1) if isinstance(following, nn.Linear) else hidden)
    return (outputs - normal(outputs.shape, torch.float32, 9)).square().mean()


def _readers(following: nn.Module) -> Tensor:
    """By what weights the following layer reads each unit, unit by unit."""
    return following.weight.detach().movedim(1, 0).unflatten(0, (UNITS, -1))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", LAYERS)
@given(data=st.data(), reduction=reductions)
def test_tied_units_compute_the_same_to_the_last_bit_and_are_read_equally(
    kind: str, bias: bool, data: st.DataObject, reduction: str
) -> None:
    torch.manual_seed(data.draw(seeds))
    follows = kind != "embedding" and data.draw(st.booleans())
    layer, following, inputs = LAYERS[kind](bias, follows)
    parameters = [*layer.parameters(), *(following.parameters() if following is not None else ())]
    names = data.draw(labels(UNITS))
    recipe = data.draw(recipes_for(*parameters, entrywise=True))
    options = {} if following is None else {"following": following}
    optimizer = TiedOptimizer(
        recipe(parameters), neurons(layer, data.draw(spelled(names)), **options), reduction=reduction
    )
    for _ in range(data.draw(st.integers(1, 3))):
        optimizer.zero_grad()
        _loss(layer, following, inputs).backward()
        optimizer.step()

    for group in members_of(names):
        for member in group[1:]:
            for one in layer.parameters():
                assert same_bits(one[member], one[group[0]])
            if following is not None:
                assert torch.equal(_readers(following)[member], _readers(following)[group[0]])
    if following is not None:
        # To exchange tied units changes nothing.
        order = torch.arange(UNITS)
        for group in members_of(names):
            order[group] = torch.tensor(data.draw(st.permutations(group)))
        assert torch.equal(_readers(following)[order], _readers(following))

    # In one batch, a matrix product may add up its columns in different orders: unit by unit it does not.
    for group in members_of(names):
        lead = _alone(layer, group[0], inputs)
        assert all(torch.equal(_alone(layer, member, inputs), lead) for member in group[1:])


def _alone(layer: nn.Module, unit: int, inputs: Tensor) -> Tensor:
    """What a unit computes, with the same arithmetic for each unit."""
    alone = copy.deepcopy(layer)
    with torch.no_grad():
        for one in alone.parameters():
            one.copy_(one[unit].expand_as(one).clone())
    return _units(alone, inputs)[0]


@pytest.mark.parametrize("kind", LAYERS)
@given(data=st.data())
def test_free_units_are_not_touched(kind: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(seeds))
    layer, following, _ = LAYERS[kind](True, kind != "embedding")
    names = data.draw(labels(UNITS))
    before, read = copy.deepcopy(layer), None if following is None else _readers(following).clone()
    parameters = [*layer.parameters(), *(following.parameters() if following is not None else ())]
    TiedOptimizer(torch.optim.SGD(parameters), neurons(layer, names, following=following))
    sizes = {unit: len(group) for group in members_of(names) for unit in group}
    for unit in range(UNITS):
        if sizes.get(unit, 1) == 1:
            pairs = zip(layer.parameters(), before.parameters(), strict=True)
            assert all(same_bits(now[unit], then[unit]) for now, then in pairs)
            assert read is None or same_bits(_readers(following)[unit], read[unit])
    if following is not None and following.bias is not None:
        assert all(tie.parts[0].param is not following.bias for tie in neurons(layer, names, following=following))


@pytest.mark.parametrize("kind", LAYERS)
@given(data=st.data())
def test_lists_and_labels_say_the_same(kind: str, data: st.DataObject) -> None:
    names = data.draw(labels(UNITS))
    assume(bool((names != -1).any()))
    states = []
    for groups in (names, data.draw(spelled(names)), members_of(names)):
        torch.manual_seed(0)
        layer, following, _ = LAYERS[kind](True, kind != "embedding")
        parameters = [*layer.parameters(), *(following.parameters() if following is not None else ())]
        optimizer = TiedOptimizer(torch.optim.SGD(parameters), neurons(layer, groups, following=following))
        states.append([optimizer.state_dict()["tieopt"], [one.detach() for one in parameters]])
    assert all(same_tree(state, states[0]) for state in states[1:])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_there_is_one_tie_for_each_parameter(kind, bias):
    layer, following, _ = LAYERS[kind](bias, kind != "embedding")
    found = [tie.parts[0].param for tie in neurons(layer, [[0, 1]], following=following)]
    expected = [*layer.parameters(), *([] if following is None else [following.weight])]
    assert len(found) == len(expected)
    assert all(one is other for one, other in zip(found, expected, strict=True))
    alone = [tie.parts[0].param for tie in neurons(layer, [[0, 1]])]
    assert len(alone) == len(list(layer.parameters()))


def test_the_positions_of_a_flattened_channel_are_tied_one_by_one():
    layer, following, _ = LAYERS["2-d convolution, flattened"](True, True)
    *_, tie = neurons(layer, [[1, 3]], following=following)
    (part,) = tie.parts
    expected = torch.full((30,), -1)
    expected[6:12] = expected[18:24] = torch.arange(6)
    assert part.dim == 1
    assert torch.equal(part.groups, expected)


def test_an_unflattened_channel_has_one_position():
    layer, following = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)  # After pooling over all positions.
    *_, tie = neurons(layer, torch.tensor([0, -1, 0, 1]), following=following)
    assert tie.parts[0].groups.tolist() == [0, -1, 0, 1]


def test_neurons_of_a_model_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    tied = neurons(model[0], [[0, 2]], following=model[3])
    optimizer = TiedOptimizer(ENTRYWISE[4](model.parameters()), tied)
    for seed in range(3):
        optimizer.zero_grad()
        model(normal((5, 1, 4, 4), torch.float32, seed)).square().mean().backward()
        optimizer.step()
    assert_tied(model, tied)
    assert is_tied(model[0].weight, [[0, 2]])
    assert torch.equal(model[3].weight[:, 0:4], model[3].weight[:, 8:12])
    assert not torch.equal(model[3].weight[:, 0:4], model[3].weight[:, 4:8])


# --- errors ---

LINEAR = "Linear(in_features=3, out_features=5, bias=True)"
NO_LAYER = "This layer has no neurons to tie.\n  Expected: Linear, Conv1d, Conv2d, Conv3d, Embedding\n  Got:      {got}"
NO_READER = (
    "No layer follows so that it reads these neurons.\n"
    "  Expected: a linear layer or a convolution with a shape, after one\n"
    "  Got:      {got}"
)
OTHER_READER = (
    "The following layer does not read these neurons.\n"
    "  Expected: a layer without groups and with 5 inputs{more}\n"
    "  Got:      {got}"
)


def linear() -> nn.Linear:
    return nn.Linear(3, UNITS)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another layer": (
        lambda: neurons(nn.PReLU(5), [[0, 1]]),
        TypeError,
        NO_LAYER.format(got="PReLU(num_parameters=5)"),
    ),
    "a transposed convolution": (
        lambda: neurons(nn.ConvTranspose1d(2, 5, 3), [[0, 1]]),
        TypeError,
        NO_LAYER.format(got="ConvTranspose1d(2, 5, kernel_size=(3,), stride=(1,))"),
    ),
    "a parameter": (
        lambda: neurons(nn.Parameter(torch.zeros(5, 3)), [[0, 1]]),
        TypeError,
        NO_LAYER.format(got="a tensor of shape (5, 3) and torch.float32"),
    ),
    "nothing": (lambda: neurons(None, [[0, 1]]), TypeError, NO_LAYER.format(got="None (NoneType)")),
    "a class": (
        lambda: neurons(nn.Linear, [[0, 1]]),
        TypeError,
        NO_LAYER.format(got="<class 'torch.nn.modules.linear.Linear'> (type)"),
    ),
    "labels of entries": (
        lambda: neurons(linear(), torch.zeros(5, 3, dtype=torch.int64)),
        ValueError,
        "Neurons are tied whole.\n  Expected: labels of shape (5,)\n  Got:      (5, 3)",
    ),
    "labels of other units": (
        lambda: neurons(linear(), torch.zeros(4, dtype=torch.int64)),
        ValueError,
        f"Labels for the weight of {LINEAR} have the wrong shape.\n"
        "  Parameter: (5, 3)\n"
        "  Expected:  (5,), one label for each slice along dimension 0, or more of the leading dimensions of (5, 3)\n"
        "  Got:       (4,)",
    ),
    "a unit that there is not": (
        lambda: neurons(linear(), [[0, 5]]),
        IndexError,
        f"An index for the weight of {LINEAR} is out of range.\n"
        "  Parameter: (5, 3)\n"
        "  Expected:  indices from 0 to 4\n"
        "  Got:       5",
    ),
    "no groups": (
        lambda: neurons(linear(), 5),
        TypeError,
        f"Groups for the weight of {LINEAR} are not groups.\n"
        "  Expected: a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels\n"
        "  Got:      5 (int)",
    ),
    "a layer after an embedding": (
        lambda: neurons(nn.Embedding(5, 3), [[0, 1]], following=nn.Linear(5, 2)),
        TypeError,
        NO_READER.format(got="Linear(in_features=5, out_features=2, bias=True)"),
    ),
    "an embedding after a layer": (
        lambda: neurons(linear(), [[0, 1]], following=nn.Embedding(5, 3)),
        TypeError,
        NO_READER.format(got="Embedding(5, 3)"),
    ),
    "a layer that reads nothing": (
        lambda: neurons(linear(), [[0, 1]], following=nn.ReLU()),
        TypeError,
        NO_READER.format(got="ReLU()"),
    ),
    "a layer that does not know its inputs yet": (
        lambda: neurons(linear(), [[0, 1]], following=nn.LazyLinear(2)),
        TypeError,
        NO_READER.format(got="LazyLinear(in_features=0, out_features=2, bias=True)"),
    ),
    "no layer after a layer": (
        lambda: neurons(linear(), [[0, 1]], following=3),
        TypeError,
        NO_READER.format(got="3 (int)"),
    ),
    "other inputs": (
        lambda: neurons(linear(), [[0, 1]], following=nn.Linear(4, 2)),
        ValueError,
        OTHER_READER.format(more="", got="Linear(in_features=4, out_features=2, bias=True)"),
    ),
    "a multiple of a linear layer's inputs": (
        lambda: neurons(linear(), [[0, 1]], following=nn.Linear(10, 2)),
        ValueError,
        OTHER_READER.format(more="", got="Linear(in_features=10, out_features=2, bias=True)"),
    ),
    "no multiple after a convolution": (
        lambda: neurons(nn.Conv1d(2, 5, 3), [[0, 1]], following=nn.Linear(12, 2)),
        ValueError,
        OTHER_READER.format(more=", or a multiple", got="Linear(in_features=12, out_features=2, bias=True)"),
    ),
    "fewer inputs than a convolution's units": (
        lambda: neurons(nn.Conv1d(2, 5, 3), [[0, 1]], following=nn.Linear(4, 2)),
        ValueError,
        OTHER_READER.format(more=", or a multiple", got="Linear(in_features=4, out_features=2, bias=True)"),
    ),
    "other channels": (
        lambda: neurons(nn.Conv1d(2, 5, 3), [[0, 1]], following=nn.Conv1d(10, 2, 1)),
        ValueError,
        OTHER_READER.format(more="", got="Conv1d(10, 2, kernel_size=(1,), stride=(1,))"),
    ),
    "a convolution in groups": (
        lambda: neurons(nn.Conv1d(2, 5, 3), [[0, 1]], following=nn.Conv1d(5, 5, 1, groups=5)),
        ValueError,
        OTHER_READER.format(more="", got="Conv1d(5, 5, kernel_size=(1,), stride=(1,), groups=5)"),
    ),
    "a convolution in groups with as many inputs each": (
        lambda: neurons(linear(), [[0, 1]], following=nn.Conv1d(10, 4, 1, groups=2)),
        ValueError,
        OTHER_READER.format(more="", got="Conv1d(10, 4, kernel_size=(1,), stride=(1,), groups=2)"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_say_exactly(case):
    make, error, message = CASES[case]
    with pytest.raises(error, match=re.escape(message.splitlines()[0])) as caught:
        make()
    assert str(caught.value) == message
    assert_clear(caught.value)


def test_ties_of_neurons_are_ties():
    ties: Sequence[Tie] = neurons(linear(), [[0, 2], [1, 3]])
    assert [str(tie) for tie in ties] == [
        "Tie(parameter of shape (5, 3), 2 groups of 4 members, 1 free)",
        "Tie(parameter of shape (5,), 2 groups of 4 members, 1 free)",
    ]
