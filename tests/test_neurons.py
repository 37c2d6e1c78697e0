"""The ties of whole neurons: tied units compute the same, and what follows reads them equally."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checks import randn, same_tree
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import members_of, same_bits
from strategies import ENTRYWISE, few_examples, labels, normal, recipes_for, reductions, seeds, spelled
from test_bad_input import assert_clear
from torch import Tensor, nn

from tieopt import Tie, TiedOptimizer, is_tied, neurons, tie_
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
@few_examples
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


# --- norms between ---

# As many units as fill the vectors of a processor, so that a kernel treats all alike, and outputs agree in every bit.
WIDE = torch.tensor([0, 1, 0, 2, 1, 0, -1, 3, 4, 3, 4, -1, 5, 5, 6, 6])
PARTS = members_of(WIDE)
# The first member of each unit's group.
LEADS = torch.tensor([next((group[0] for group in PARTS if unit in group), unit) for unit in range(len(WIDE))])

# For each norm: the layer before it, and the norm; the shape that it is given, of which dimension 1 are the units.
NORMS: dict[str, Callable[[], tuple[nn.Module, nn.Module, tuple[int, ...]]]] = {
    "1-d batch norm": lambda: (nn.Linear(3, 16), nn.BatchNorm1d(16), (6, 16)),
    "2-d batch norm": lambda: (nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), (4, 16, 2, 3)),
    "3-d batch norm": lambda: (nn.Conv3d(3, 16, 1), nn.BatchNorm3d(16), (4, 16, 2, 1, 2)),
    "1-d instance norm": lambda: (nn.Conv1d(3, 16, 1), nn.InstanceNorm1d(16, affine=True), (4, 16, 5)),
    "2-d instance norm": lambda: (nn.Conv2d(3, 16, 1), nn.InstanceNorm2d(16, 1e-5, 0.1, True, True), (4, 16, 2, 3)),
    "3-d instance norm": lambda: (nn.Conv3d(3, 16, 1), nn.InstanceNorm3d(16, 1e-5, 0.1, True, True), (2, 16, 2, 1, 2)),
    "layer norm": lambda: (nn.Linear(3, 16), nn.LayerNorm(16), (6, 16)),
    "layer norm of an image": lambda: (nn.Conv2d(3, 16, 1), nn.LayerNorm((16, 2, 3)), (4, 16, 2, 3)),
    "layer norm of channels": lambda: (nn.Conv2d(3, 16, 1), nn.LayerNorm(16), (6, 16)),
    "RMS norm": lambda: (nn.Linear(3, 16), nn.RMSNorm(16), (6, 16)),
    "group norm": lambda: (nn.Conv1d(3, 16, 1), nn.GroupNorm(1, 16), (4, 16, 3)),
    "PReLU": lambda: (nn.Linear(3, 16), nn.PReLU(16), (6, 16)),
    "depthwise convolution": lambda: (nn.Conv1d(3, 16, 1), nn.Conv1d(16, 16, 2, groups=16), (4, 16, 3)),
    "batch norm without parameters": lambda: (nn.Linear(3, 16), nn.BatchNorm1d(16, affine=False), (6, 16)),
    "batch norm without statistics": lambda: (
        nn.Linear(3, 16),
        nn.BatchNorm1d(16, track_running_stats=False),
        (6, 16),
    ),
}


def _randomised(module: nn.Module) -> nn.Module:
    """The module with parameters and statistics that all differ."""
    tensors = [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
    with torch.no_grad():
        for seed, tensor in enumerate(tensors):
            tensor.copy_(0.5 + normal(tensor.shape, torch.float32, seed).abs())
    return module


def _statistics(norm: nn.Module) -> list[Tensor]:
    return [buffer for buffer in norm.buffers() if buffer.is_floating_point()]


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("kind", NORMS)
def test_tied_units_are_equal_after_a_norm(kind: str, compact: bool) -> None:
    layer, norm, shape = NORMS[kind]()
    model = nn.ModuleList([_randomised(layer), _randomised(norm)])
    before = copy.deepcopy(norm)
    optimizer = TiedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), neurons(layer, WIDE, following=norm), compact=compact
    )
    for statistic, old in zip(_statistics(norm), _statistics(before), strict=True):
        assert same_bits(statistic, statistic[LEADS])
        assert same_bits(statistic, tie_(old.clone(), WIDE))

    for step in range(3):
        for param in norm.parameters():
            assert same_bits(param, param[LEADS])
            assert not torch.equal(*param[WIDE == -1])
        equal = normal(shape, torch.float32, step)[:, LEADS]
        for training in (True, False):
            outputs = norm.train(training)(equal)
            assert torch.equal(outputs, outputs[:, LEADS])
        for param in model.parameters():
            param.grad = normal(param.shape, torch.float32, step)
        optimizer.step()
    assert all(torch.equal(statistic, statistic[LEADS]) for statistic in _statistics(norm))


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
def test_tied_units_agree_after_a_norm_whose_weights_differed(compact: bool) -> None:
    torch.manual_seed(0)
    conv, norm, head = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(12, 2)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), head)
    images = normal((8, 2, 5), torch.float32, 0)
    model(images)  # So that the statistics differ, too.
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    ties = neurons(conv, [[0, 1], [2, 3]], following=[norm, head])
    optimizer = TiedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ties, compact=compact)
    for seed in range(4):
        assert norm.weight[0] == norm.weight[1]
        for training in (False, True):
            units = model[:3].train(training)(images)
            torch.testing.assert_close(units[:, [0, 2]], units[:, [1, 3]])
        optimizer.zero_grad()
        (model(images) - normal((8, 2), torch.float32, seed)).square().mean().backward()
        optimizer.step()
    assert_tied(model, ties)
    assert not torch.equal(norm.weight[0], norm.weight[2])


def test_free_statistics_are_not_touched() -> None:
    layer, norm = nn.Linear(3, UNITS), _randomised(nn.BatchNorm1d(UNITS))
    before = copy.deepcopy(norm)
    neurons(layer, [[0, 3]], following=norm)
    for statistic, old in zip(_statistics(norm), _statistics(before), strict=True):
        assert same_bits(statistic[[1, 2, 4]], old[[1, 2, 4]])
        assert statistic[0] == statistic[3] == (old[0] + old[3]) / 2
    # The optimizer ties the parameters, when there is one.
    assert all(map(same_bits, norm.parameters(), before.parameters()))


def _labels_of(ties: Sequence[Tie]) -> list[tuple[tuple[int, ...], int, list[int]]]:
    return [(tuple(part.param.shape), part.dim, part.groups.tolist()) for tie in ties for part in tie.parts]


def test_a_norm_after_a_flattening_has_each_unit_once_for_each_position() -> None:
    conv = nn.Conv1d(1, 3, 2, bias=False)
    spread = [0, 1, -1, -1, 0, 1]
    following = [nn.BatchNorm1d(3), nn.Flatten(), nn.BatchNorm1d(6), nn.SyncBatchNorm(6), nn.PReLU(6), nn.Linear(6, 2)]
    assert _labels_of(neurons(conv, [[0, 2]], following=following)) == [
        ((3, 1, 2), 0, [0, -1, 0]),
        *[((3,), 0, [0, -1, 0])] * 2,
        *[((6,), 0, spread)] * 5,
        ((2, 6), 1, spread),
    ]


def test_a_layer_norm_has_the_units_in_its_first_or_last_dimension() -> None:
    labels = [0, -1, 0]
    shapes = [(3,), (4, 3), (2, 3, 3)]
    for shape in shapes:
        *_, tie = neurons(nn.Linear(2, 3), [[0, 2]], following=nn.RMSNorm(shape))
        assert _labels_of([tie]) == [(shape, len(shape) - 1, labels)]
    *_, tie = neurons(nn.Conv2d(2, 3, 1), [[0, 2]], following=nn.RMSNorm((3, 3, 5)))
    assert _labels_of([tie]) == [((3, 3, 5), 0, labels)]


@pytest.mark.parametrize(
    "groups",
    [[[0, 1, 2]], [[0, 2], [3, 5]], [[0, 3], [1, 5], [2, 4]], [[0, 1, 3, 4], [2, 5]], []],
    ids=["in one norm group", "in each", "across, all tied", "across, all tied, in other numbers", "none"],
)
def test_a_group_norm_takes_units_that_have_equal_statistics(groups: list[list[int]]) -> None:
    conv, norm = nn.Conv1d(2, 6, 1), _randomised(nn.GroupNorm(2, 6))
    ties = neurons(conv, groups, following=norm)
    TiedOptimizer(torch.optim.SGD([*conv.parameters(), *norm.parameters()]), ties)
    outputs = norm(conv(normal((3, 2, 4), torch.float32, 0)))
    for group in groups:
        torch.testing.assert_close(outputs[:, group], outputs[:, group[:1]].expand(-1, len(group), -1))


@pytest.mark.parametrize("groups", [[[0, 3]], [[0, 3], [1, 4]], [[0, 1, 3], [4, 5, 2]]])
def test_a_group_norm_that_treats_tied_units_differently_is_refused(groups: list[list[int]]) -> None:
    statistics = (norm := _randomised(nn.BatchNorm1d(6))).running_mean.clone()
    with pytest.raises(ValueError, match="different statistics") as caught:
        neurons(nn.Conv1d(2, 6, 1), groups, following=[norm, nn.GroupNorm(2, 6)])
    assert_clear(caught.value, re.escape(f"at position 1 of following, with {sorted(groups[0])} as one group"))
    assert same_bits(norm.running_mean, statistics)


def test_each_channel_with_statistics_of_its_own_is_an_instance_norm() -> None:
    assert len(neurons(nn.Conv1d(2, 6, 1), [[0, 3]], following=nn.GroupNorm(6, 6))) == 4


def test_a_part_of_a_model_is_given_as_it_is() -> None:
    conv, norm, head = nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Linear(12, 2)
    model = nn.Sequential(
        conv, nn.Sequential(norm, nn.ReLU(), nn.PReLU()), nn.MaxPool1d(2), nn.Dropout(), nn.Flatten(), head
    )
    expected = _labels_of(neurons(conv, [[0, 2]], following=[norm, head]))
    for following in (model[1:], nn.ModuleList(model[1:]), list(model)[1:], iter(model[1:]), ((norm,), [head])):
        assert _labels_of(neurons(conv, [[0, 2]], following=following)) == expected
    assert _labels_of(neurons(conv, [[0, 2]], following=[])) == _labels_of(neurons(conv, [[0, 2]]))


def test_nothing_is_written_if_a_later_layer_is_refused_or_a_warning_is_an_error() -> None:
    norm = _randomised(nn.BatchNorm1d(6))
    before = [same.clone() for same in _statistics(norm)]
    with pytest.raises(ValueError, match="does not read"):
        neurons(nn.Linear(2, 6), [[0, 3]], following=[norm, nn.Linear(5, 2)])
    with pytest.raises(UserWarning, match="read different inputs"):
        neurons(nn.Conv1d(2, 6, 1, groups=2), [[0, 3]], following=norm)
    unwritable = nn.BatchNorm1d(6)
    unwritable.running_var = torch.ones(1).expand(6)
    with pytest.raises(ValueError, match="cannot be written"):
        neurons(nn.Linear(2, 6), [[0, 3]], following=[norm, unwritable])
    assert all(map(same_bits, _statistics(norm), before))


# --- tied units that differ for a reason in the layer itself ---


def test_units_of_a_convolution_that_read_different_inputs_are_warned_of() -> None:
    conv = nn.Conv1d(4, 6, 1, groups=2)
    neurons(conv, [[0, 2], [3, 4]])
    with pytest.warns(UserWarning, match="read different inputs") as caught:
        ties = neurons(conv, [[0, 2], [1, 5]])
    assert "Conv1d(4, 6, kernel_size=(1,), stride=(1,), groups=2), with [1, 5] as one group" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(ties) == 2


def test_an_embedding_that_lookups_write_to_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="max_norm") as caught:
        neurons(nn.Embedding(10, 4, max_norm=1.0), [[3, 7]])
    assert "weight.renorm_(...)" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
def test_norms_of_tied_rows_can_be_limited_after_each_step(compact: bool) -> None:
    embedding = nn.Embedding(10, 4)
    nn.init.ones_(embedding.weight)
    inner = torch.optim.SGD(embedding.parameters(), lr=0.1)
    optimizer = TiedOptimizer(inner, neurons(embedding, [[3, 7]]), compact=compact)

    def limit_norms(*_: object) -> None:
        with torch.no_grad():
            embedding.weight.renorm_(2, 0, 1.0)
        optimizer.tie_weights()

    optimizer.register_step_post_hook(limit_norms)
    for factor in (0, -100):
        (factor * embedding(torch.tensor([3])).sum()).backward()
        optimizer.step()
        assert is_tied(embedding.weight, [[3, 7]])
        torch.testing.assert_close(embedding.weight[[3, 7]].norm(dim=1), torch.ones(2))


class Conv1D(torch.nn.Module):
    """A linear layer whose weight is transposed, as that of the transformers library."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(randn(inputs, outputs))
        self.bias = torch.nn.Parameter(randn(outputs, seed=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_layers_with_transposed_weights_are_told_which_ties_to_write():
    first, second, groups = Conv1D(4, 3), Conv1D(2, 4), [[0, 2]]
    for call in (lambda: neurons(first, groups), lambda: neurons(torch.nn.Linear(3, 4), groups, following=second)):
        with pytest.raises(TypeError, match=r"as Tie\(layer\.weight, groups, dim=1\)|add a Tie for each weight"):
            call()
    # As the how-to has it.
    ties = [Tie(first.weight, groups, dim=1), Tie(first.bias, groups), Tie(second.weight, groups)]
    optimizer = TiedOptimizer(torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1), ties)
    x = randn(5, 3)
    for _ in range(2):
        second(first(x).tanh()).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(first(x)[:, 0], first(x)[:, 2])
    assert is_tied(second.weight, groups)


# --- errors ---

LINEAR = "Linear(in_features=3, out_features=5, bias=True)"
NO_LAYER = (
    "This layer has no neurons to tie.\n"
    "  Expected: Linear, Conv1d, Conv2d, Conv3d, Embedding, "
    "or ties of another layer's parameters, as Tie(layer.weight, groups, dim=1) if its units are columns\n"
    "  Got:      {got}"
)
NO_READER = (
    "No layer in following reads these neurons.\n"
    "  Expected: norms, then a linear layer or a convolution, none of them lazy, and all after a linear layer or a "
    "convolution; leave out other layers without weights, and add a Tie for each weight of those that have some\n"
    "  Got:      {got}"
)
OTHER_READER = (
    "The following layer does not read these neurons.\n"
    "  Expected: a layer without groups and with 5 inputs{more}\n"
    "  Got:      {got}"
)
NO_FIT = (
    "The following layer does not fit these neurons.\n  Expected: an entry for each of 5 units{more}\n  Got:      {got}"
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
        lambda: neurons(nn.Conv1d(2, 5, 3), [[0, 1]], following=nn.Conv1d(5, 10, 1, groups=5)),
        ValueError,
        OTHER_READER.format(more="", got="Conv1d(5, 10, kernel_size=(1,), stride=(1,), groups=5)"),
    ),
    "a convolution in groups with as many inputs each": (
        lambda: neurons(linear(), [[0, 1]], following=nn.Conv1d(10, 4, 1, groups=2)),
        ValueError,
        OTHER_READER.format(more="", got="Conv1d(10, 4, kernel_size=(1,), stride=(1,), groups=2)"),
    ),
    "a transposed convolution that reads": (
        lambda: neurons(nn.Conv1d(2, 5, 3), [[0, 1]], following=[nn.ConvTranspose1d(5, 2, 1)]),
        TypeError,
        NO_READER.format(got="ConvTranspose1d(5, 2, kernel_size=(1,), stride=(1,)), at position 0 of following"),
    ),
    "a layer that may mix units": (
        lambda: neurons(linear(), [[0, 1]], following=[nn.Tanh(), nn.Sequential(nn.Tanh(), nn.GLU())]),
        TypeError,
        NO_READER.format(got="GLU(dim=-1), at position 1.1 of following"),
    ),
    "layers without weights alone": (
        lambda: neurons(linear(), [[0, 1]], following=[nn.Tanh(), nn.Dropout(0.1)]),
        TypeError,
        NO_READER.format(got="Tanh(), at position 0 of following"),
    ),
    "a norm that does not know its units yet": (
        lambda: neurons(linear(), [[0, 1]], following=nn.LazyBatchNorm1d(affine=False, track_running_stats=False)),
        TypeError,
        NO_READER.format(got=repr(nn.LazyBatchNorm1d(affine=False, track_running_stats=False))),
    ),
    "a norm after an embedding": (
        lambda: neurons(nn.Embedding(5, 3), [[0, 1]], following=[nn.LayerNorm(5)]),
        TypeError,
        NO_READER.format(got=f"{nn.LayerNorm(5)}, at position 0 of following"),
    ),
    "names of layers": (
        lambda: neurons(linear(), [[0, 1]], following="bn"),
        TypeError,
        NO_READER.format(got="'bn' (str)"),
    ),
    "a dict of layers": (
        lambda: neurons(linear(), [[0, 1]], following={"bn": nn.BatchNorm1d(5)}),
        TypeError,
        NO_READER.format(got="'bn' (str), at position 0 of following"),
    ),
    "nothing in a list": (
        lambda: neurons(linear(), [[0, 1]], following=[nn.BatchNorm1d(5), None]),
        TypeError,
        NO_READER.format(got="None (NoneType), at position 1 of following"),
    ),
    "a layer after the reader": (
        lambda: neurons(linear(), [[0, 1]], following=[nn.Linear(5, 5), nn.Tanh(), nn.PReLU(5)]),
        ValueError,
        "A layer comes after the one that reads these neurons.\n"
        "  Expected: nothing after Linear(in_features=5, out_features=5, bias=True), at position 0 of following\n"
        "  Got:      PReLU(num_parameters=5), at position 2 of following",
    ),
    "a norm of other units": (
        lambda: neurons(linear(), [[0, 1]], following=nn.PReLU(10)),
        ValueError,
        NO_FIT.format(more="", got="PReLU(num_parameters=10)"),
    ),
    "a norm of other channels": (
        lambda: neurons(nn.Conv2d(2, 5, 3), [[0, 1]], following=[nn.Identity(), nn.BatchNorm2d(10)]),
        ValueError,
        NO_FIT.format(more="", got=f"{nn.BatchNorm2d(10)}, at position 1 of following"),
    ),
    "a norm of no multiple of the channels": (
        lambda: neurons(nn.Conv2d(2, 5, 3), [[0, 1]], following=nn.BatchNorm1d(12)),
        ValueError,
        NO_FIT.format(more=", or for each of their positions", got=nn.BatchNorm1d(12)),
    ),
    "a layer norm of other units": (
        lambda: neurons(linear(), [[0, 1]], following=nn.LayerNorm((5, 4))),
        ValueError,
        NO_FIT.format(more=", in the last dimension", got=nn.LayerNorm((5, 4))),
    ),
    "a layer norm of an image without its channels": (
        lambda: neurons(nn.Conv2d(2, 5, 3), [[0, 1]], following=nn.LayerNorm((5, 4))),
        ValueError,
        NO_FIT.format(more=", in the first of 3 dimensions, or in the only one", got=nn.LayerNorm((5, 4))),
    ),
    "a layer norm of nothing": (
        lambda: neurons(linear(), [[0, 1]], following=nn.LayerNorm(())),
        ValueError,
        NO_FIT.format(more=", in the last dimension", got=nn.LayerNorm(())),
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
        "Tie(parameter of shape (5, 3), 2 groups of 4 members in all, 1 free)",
        "Tie(parameter of shape (5,), 2 groups of 4 members in all, 1 free)",
    ]
