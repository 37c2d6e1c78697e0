"""What the shared values start from: the first member of each group, where it is not the mean."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from checks import bits, pickled, randn, same_bits, same_tree
from hypothesis import given
from hypothesis import strategies as st
from reference import flat, groups_of_entries
from strategies import normal, seeds
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW

from tieopt import Tie, TiedOptimizer, is_tied
from tieopt.testing import ties

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]


def as_first(parameters: list[Parameter], drawn: list[Tie]) -> list[list[complex]]:
    """The entries if every member is a multiple of what the first member says that the shared value is, by loops."""
    entries = [flat(parameter) for parameter in parameters]
    for tie in drawn:
        for group in groups_of_entries(tie, parameters):
            number, position, first = next((member for member in group if member[2] != 0), (0, 0, 0.0))
            shared = entries[number][position] / first if first else 0.0
            for number, position, scale in group:
                entries[number][position] = scale * shared
    return entries


def in_any_order(data: st.DataObject, drawn: list[Tie]) -> list[Tie]:
    """The same ties, what is joined in them in another order."""
    return [
        Tie.join(
            *(Tie(one.param, one.groups, dim=one.dim, scale=one.scale) for one in data.draw(st.permutations(parts)))
        )
        for parts in (tie.parts for tie in drawn)
    ]


@pytest.mark.parametrize("kinds", [("none", "signs", "zeros"), ("any",)], ids=["signs", "multiples"])
@given(data=st.data())
def test_every_group_starts_from_its_first_member(compact: bool, kinds: tuple[str, ...], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    parameters = [Parameter(normal(shape, dtype, data.draw(seeds))) for shape in ((4, 3), (3, 4), (2, 3, 2))]
    drawn = in_any_order(data, data.draw(ties(parameters, kinds)))
    expected = as_first(parameters, drawn)
    optimizer = TiedOptimizer(SGD(parameters, lr=0.1), drawn, start="first", compact=compact)

    # Multiples are rounded: the shared value when it is taken from the first member, and the members.
    tolerance = 0 if "signs" in kinds else 4 * torch.finfo(dtype).eps
    for parameter, entries in zip(parameters, expected, strict=True):
        wanted = torch.tensor(entries, dtype=torch.complex128).view(parameter.shape)
        torch.testing.assert_close(parameter.detach().to(torch.complex128), wanted, rtol=tolerance, atol=0)

    # As a projection leaves them, and what is tied already keeps its bits.
    assert optimizer.tie_drift() == 0
    started = [bits(parameter) for parameter in parameters]
    optimizer.tie_weights()
    assert all(map(torch.equal, map(bits, parameters), started))
    optimizer.retie(in_any_order(data, drawn), start="first")
    assert all(map(torch.equal, map(bits, parameters), started))


def encoder_and_decoder() -> tuple[Parameter, Parameter, Tie, Tie]:
    encoder, decoder = Parameter(randn(3, 5)), Parameter(randn(5, 3, seed=1))
    return encoder, decoder, Tie(encoder, torch.arange(3)), Tie(decoder, torch.arange(3), dim=1)


@pytest.mark.parametrize("decoder_is_first", [False, True])
def test_the_order_is_that_of_joining_and_not_of_the_optimizer(compact, decoder_is_first):
    encoder, decoder, rows, columns = encoder_and_decoder()
    expected = (decoder.T if decoder_is_first else encoder).detach().clone()
    joined = Tie.join(columns, rows) if decoder_is_first else Tie.join(rows, columns)
    for params in ([encoder, decoder], [decoder, encoder]):
        other_encoder, other_decoder = map(copy.deepcopy, (encoder, decoder))
        optimizer = SGD(params, lr=0.1)
        TiedOptimizer(optimizer, joined, start="first", compact=compact)
        assert same_bits(encoder, expected)
        assert same_bits(decoder, expected.T)
        encoder.data, decoder.data = other_encoder.data, other_decoder.data


def test_the_mean_is_the_default(compact):
    encoder, decoder, rows, columns = encoder_and_decoder()
    mean = (encoder + decoder.T).detach() / 2
    TiedOptimizer(SGD([encoder, decoder], lr=0.1), Tie.join(rows, columns), compact=compact)
    assert same_bits(encoder, mean)


def trained(*params: Parameter) -> AdamW:
    optimizer = AdamW(params, lr=0.1)
    for seed in range(3):
        for number, param in enumerate(params):
            param.grad = randn(*param.shape, seed=10 * number + seed)
        optimizer.step()
    return optimizer


def test_state_that_is_there_starts_from_the_first_member(compact):
    weight = Parameter(randn(4, 3))
    optimizer = trained(weight)
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    scale = torch.tensor([0.0, -1.0, 1.0, 1.0])
    optimizer = TiedOptimizer(optimizer, Tie(weight, [[0, 1, 3]], scale=scale), start="first", compact=compact)
    optimizer.untie()

    state = optimizer.state[weight]
    assert same_bits(state["exp_avg"][3], -before["exp_avg"][1])
    assert same_bits(state["exp_avg_sq"][3], before["exp_avg_sq"][1])
    assert all(same_bits(state[key][2], before[key][2]) for key in ("exp_avg", "exp_avg_sq"))


def test_state_of_joined_parameters_starts_from_the_first_that_has_any(compact):
    one, other = Parameter(randn(3, 2)), Parameter(randn(3, 2, seed=1))
    optimizer = trained(other)
    before = {key: value.clone() for key, value in optimizer.state[other].items()}
    optimizer.add_param_group({"params": [one]})
    joined = Tie.join(Tie(one, [[0, 1]]), Tie(other, [[0, 1]]))
    optimizer = TiedOptimizer(optimizer, joined, start="first", compact=compact)
    optimizer.untie()
    state = optimizer.state[other]
    assert all(same_bits(state[key][row], before[key][0]) for key in ("exp_avg", "exp_avg_sq") for row in (0, 1))


def test_retie_starts_anew_once(compact):
    weight = Parameter(randn(5, 3))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: [[0, 1]]}, start="first", compact=compact)
    before = weight.detach().clone()
    optimizer.retie({weight: [[0, 1], [2, 3]]}, start="first")
    assert same_bits(weight, before[[0, 1, 2, 2, 4]])
    optimizer.retie({weight: [[0, 4]]})
    assert same_bits(weight[0], (before[0] + before[4]) / 2)


def test_a_frozen_parameter_is_not_written(compact):
    encoder, decoder, rows, columns = encoder_and_decoder()
    optimizer = SGD([encoder.requires_grad_(False), decoder.requires_grad_(False)], lr=0.1)
    before = encoder.detach().clone(), decoder.detach().clone()
    TiedOptimizer(optimizer, Tie.join(rows, columns), start="first", compact=compact)
    assert all(map(same_bits, (encoder, decoder), before))


def test_it_is_in_no_checkpoint(compact):
    saved = []
    for start in ("mean", "first"):
        weight = Parameter(torch.ones(4, 3))
        optimizer = TiedOptimizer(Adam([weight]), {weight: [[0, 2]]}, start=start, compact=compact)
        weight.grad = torch.ones(4, 3)
        optimizer.step()
        saved.append(optimizer.state_dict())
        assert same_tree(pickled(optimizer).state_dict(), saved[0])
    assert same_tree(*saved)


def test_the_graph_of_a_differentiable_step_leads_to_the_first_members():
    leaf = randn(4, dtype=torch.float64).requires_grad_()
    optimizer = TiedOptimizer(SGD([Parameter(leaf.detach())], lr=0.1, differentiable=True), ())
    # As after a step that is part of a graph.
    optimizer.param_groups[0]["params"][0] = weight = leaf.clone()
    scale = torch.tensor([1.0, 2.0, 1.0, -4.0])
    optimizer.retie(Tie(weight, [[1, 2, 3]], scale=scale), start="first")
    weight.sum().backward()
    assert weight.tolist() == [leaf[0], leaf[1], leaf[1] / 2, -2 * leaf[1]]
    torch.testing.assert_close(leaf.grad, torch.tensor([1.0, 1 + 0.5 - 2, 0.0, 0.0], dtype=torch.float64))


def change(optimizer: SGD, way: str, **options: object) -> Callable[..., object]:
    """What ties an optimizer that is not tied yet, or reties one that is."""
    return (
        TiedOptimizer(optimizer, (), **options).retie
        if way == "retie"
        else partial(TiedOptimizer, optimizer, **options)
    )


@pytest.mark.parametrize("start", ["last", "First", "", None, 0, True, ["first"], torch.ones(1)])
@pytest.mark.parametrize("way", ["wrap", "retie"])
def test_what_is_no_start_is_refused(compact, way, start):
    weight = Parameter(randn(4, 3))
    optimizer, before = SGD([weight], lr=0.1), bits(weight)
    tie = change(optimizer, way, compact=compact)
    with pytest.raises(ValueError, match=r"Unknown start.\n  Expected: 'mean' or 'first'\n  Got:      ") as error:
        tie({weight: [[0, 1]]}, start=start)
    assert type(start).__name__.lower() in str(error.value).lower()
    assert torch.equal(bits(weight), before)
    assert way == "retie" or type(optimizer) is SGD


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"every": 2}], ids=str)
@pytest.mark.parametrize("way", ["wrap", "retie"])
def test_relaxed_ties_start_from_no_first_member(way, options):
    weight = Parameter(randn(4, 3))
    tie, before = change(SGD([weight], lr=0.1), way, **options), bits(weight)
    with pytest.raises(ValueError, match=r"(?s)Relaxed ties .*Expected: .*Got: .*'first'"):
        tie({weight: [[0, 1]]}, start="first")
    assert torch.equal(bits(weight), before)


def test_without_ties_any_start_is_taken(compact):
    weight = Parameter(randn(4, 3))
    TiedOptimizer(SGD([weight], lr=0.1), {}, start="first", compact=compact)
    assert same_bits(weight, randn(4, 3))


def test_the_first_member_keeps_the_bits_of_what_compares_otherwise(compact):
    weight = Parameter(torch.tensor([-0.0, 0.0, 0.0, -0.0, float("nan"), 1.0]))
    TiedOptimizer(SGD([weight], lr=0.1), {weight: [[0, 1], [2, 3], [4, 5]]}, start="first", compact=compact)
    assert same_bits(weight, torch.tensor([-0.0, -0.0, 0.0, 0.0, float("nan"), float("nan")]))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (3, 1)])
def test_where_there_is_nothing_to_start_from_nothing_happens(compact, shape):
    weight = Parameter(torch.ones(shape))
    labels = torch.arange(shape[0])
    TiedOptimizer(SGD([weight], lr=0.1), {weight: labels}, start="first", compact=compact)
    assert is_tied(weight, labels)


def test_the_layout_in_memory_does_not_matter(compact):
    start = randn(4, 6, 3, 3)
    labels = torch.arange(24).view(4, 6) % 5
    expected = start.flatten(0, 1)[:5][labels.flatten()].view_as(start)

    def begun(weight: Tensor) -> Parameter:
        weight = Parameter(weight)
        TiedOptimizer(SGD([weight], lr=0.1), {weight: labels}, start="first", compact=compact)
        return weight

    layouts = [start.clone(), start.to(memory_format=torch.channels_last), start.permute(3, 1, 0, 2).contiguous()]
    layouts[2] = layouts[2].permute(2, 1, 3, 0)
    assert all(same_bits(begun(one).detach().contiguous(), expected) for one in layouts)
