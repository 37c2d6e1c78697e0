"""Options of single ties: another reduction, strength or interval than the rest of the optimizer has."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from checks import pickled, randn, same_bits, train
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, recipes_for, seeds
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Adadelta, Adam, AdamW, RMSprop

from tieopt import Tie, TiedOptimizer, frozen, is_tied
from tieopt.testing import ties
from tieopt.ties.options import Options

some_options = st.fixed_dictionaries(
    {}, optional={"reduction": st.sampled_from(["mean", "sum"])}
) | st.fixed_dictionaries({}, optional={"strength": st.sampled_from([0.0, 0.5, 1.0]), "every": st.integers(1, 3)})


def with_options(tie: Tie, param: Parameter, options: dict[str, Any]) -> Tie:
    """The tie of one parameter, for another one, with options."""
    return Tie.join(*(Tie(param, part.groups, dim=part.dim, scale=part.scale, **options) for part in tie.parts))


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        param.grad = normal(param.shape, param.dtype, 100 * seed + number)
    optimizer.step()


@given(data=st.data(), defaults=some_options)
def test_each_tie_is_applied_as_by_an_optimizer_with_its_options(
    compact: bool, defaults: dict[str, Any], data: st.DataObject
) -> None:
    """One optimizer with ties of several options moves as an optimizer for each of them."""
    allowed = {"reduction"} if compact else {"reduction", "strength", "every"}
    defaults = {name: option for name, option in defaults.items() if name in allowed}
    together, alone, optimizers, drawn = [], [], [], []
    recipe = data.draw(recipes_for(torch.zeros(4, 3), entrywise=True, closure=False))
    for _ in range(3):
        options = {name: option for name, option in data.draw(some_options).items() if name in allowed}
        if options.get("reduction") == "sum" and not compact:
            options |= {"strength": 1, "every": 1}
        both = {"strength": 1, "every": 1, **defaults, **options}
        if Options(**both).relaxed and "reduction" not in options:
            both.pop("reduction", None)
        param = Parameter(normal((4, 3), torch.float64, data.draw(seeds)))
        (tie, *_) = data.draw(ties([param]))
        together.append(param)
        alone.append(copy.deepcopy(param))
        drawn.append(with_options(tie, param, options))
        optimizers.append(TiedOptimizer(recipe([alone[-1]]), with_options(tie, alone[-1], {}), compact=compact, **both))
    optimizer = TiedOptimizer(recipe(together), drawn, compact=compact, **defaults)
    assert all(map(same_bits, together, alone))
    for seed in range(4):
        step(optimizer, seed)
        for number, other in enumerate(optimizers):
            alone[number].grad = normal((4, 3), torch.float64, 100 * seed + number)
            other.step()
        assert all(map(same_bits, together, alone))
        grads = [(param.grad, other.grad) for param, other in zip(together, alone, strict=True)]
        assert all(same_bits(first, second) for first, second in grads)


def test_the_sum_for_one_tie_and_the_mean_for_another_of_one_parameter():
    weight = Parameter(torch.zeros(5, 2))
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), [Tie(weight, [[0, 1]], reduction="sum"), Tie(weight, [[2, 3]])])
    weight.grad = torch.ones(5, 2)
    optimizer.step()
    assert weight[:, 0].tolist() == [-2.0, -2.0, -1.0, -1.0, -1.0]
    # Gradients accumulate.
    assert torch.equal(weight.grad, torch.ones(5, 2))


@pytest.mark.parametrize("kind", ["sparse", "graph"])
def test_gradients_that_are_replaced_for_the_step_are_put_back(kind):
    weight = Parameter(torch.zeros(5, 2))
    pair = [Tie(weight, [[0, 1]], reduction="sum"), Tie(weight, [[2, 3]])]
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), pair)
    grad = torch.ones(5, 2)
    weight.grad = grad.to_sparse(1) if kind == "sparse" else grad.requires_grad_() * 1
    optimizer.step()
    assert weight[:, 0].tolist() == [-2.0, -2.0, -1.0, -1.0, -1.0]
    after = weight.grad.to_dense() if kind == "sparse" else weight.grad
    assert torch.equal(after, torch.ones(5, 2))


def test_an_embedding_with_the_sum_and_clusters_with_the_mean(compact):
    embedding, head, layer = (Parameter(torch.zeros(4, 2)) for _ in range(3))
    shared = Tie.join(Tie(embedding, torch.arange(4)), Tie(head, torch.arange(4)))
    assert shared.options == Options()
    said = Tie.join(*(Tie(param, torch.arange(4), reduction="sum") for param in (embedding, head)))
    optimizer = TiedOptimizer(
        SGD([embedding, head, layer], lr=1.0), [said, Tie(layer, [[0, 1, 2, 3]])], compact=compact
    )
    for param in (embedding, head, layer):
        param.grad = torch.ones(4, 2)
    optimizer.step()
    assert torch.equal(embedding, torch.full((4, 2), -2.0))
    assert torch.equal(head, embedding)
    assert torch.equal(layer, torch.full((4, 2), -1.0))
    assert "reduction='sum'" in repr(optimizer.ties[0])
    assert "reduction" not in repr(optimizer.ties[1])
    assert "reduction='sum' and reduction='mean'" in repr(optimizer)
    place = "param_groups[0]['params'][{}]"
    assert optimizer.tie_summary().splitlines()[-2:] == [
        f"Ties of {place.format(0)}, {place.format(1)} have reduction='sum'",
        f"Ties of {place.format(2)} have reduction='mean'",
    ]


def test_whole_parameters_that_are_equal_can_have_options(compact):
    layers = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    inner = SGD(layers.named_parameters(), lr=1.0)
    said = [Tie.equal("[01].weight", reduction="sum"), Tie.equal(layers[1].bias, layers[2].bias, reduction="mean")]
    optimizer = TiedOptimizer(inner, said, compact=compact)
    assert [tie.options.reduction for tie in optimizer.ties] == ["sum", "mean"]
    before = [layers[0].weight.detach().clone(), layers[1].bias.detach().clone()]
    for param in layers.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(layers[0].weight, before[0] - 2)
    assert torch.equal(layers[1].bias, before[1] - 1)
    assert "reduction='sum'" in repr(said[0])
    with pytest.raises(ValueError, match="Unknown reduction"):
        Tie.equal("a", "b", reduction="max")


def test_the_pull_follows_a_schedule():
    weight = Parameter(torch.tensor([0.0, 8.0]))
    optimizer = TiedOptimizer(Adam([weight]), {weight: [[0, 1]]}, strength=0.0)
    train(optimizer, 1)
    steps = optimizer.state[weight]["step"].clone()
    with torch.no_grad():
        weight.copy_(torch.tensor([0.0, 8.0]))
    for strength, expected in [(0.25, [1.0, 7.0]), (0.5, [2.5, 5.5]), (1.0, [4.0, 4.0])]:
        optimizer.retie(optimizer.ties, strength=strength)
        assert weight.tolist() == expected
    assert is_tied(weight, [[0, 1]])
    assert torch.equal(optimizer.state[weight]["step"], steps)
    optimizer.retie(optimizer.ties, reduction="sum")
    assert "reduction='sum'" in repr(optimizer)
    with pytest.raises(ValueError, match="Relaxed ties leave"):
        optimizer.retie(optimizer.ties, strength=0.5)
    optimizer.retie(optimizer.ties, reduction="mean", strength=0.5, every=4)
    assert "strength 0.5, every 4 steps" in repr(optimizer)


def test_ties_are_projected_after_as_many_steps_as_each_says():
    often, seldom = Parameter(randn(2)), Parameter(randn(2))
    pair = [Tie(often, [[0, 1]], every=2), Tie(seldom, [[0, 1]], every=3)]
    optimizer = TiedOptimizer(SGD([often, seldom], lr=1.0), pair)
    for number in range(1, 13):
        often.grad, seldom.grad = randn(2, seed=number), randn(2, seed=-number)
        optimizer.step()
        assert is_tied(often, [[0, 1]]) == (number % 2 == 0)
        assert is_tied(seldom, [[0, 1]]) == (number % 3 == 0)


def test_each_shared_value_counts_once_in_the_norm_as_its_tie_says(compact):
    summed, averaged, free = (Parameter(torch.zeros(2)) for _ in range(3))
    said = [Tie(summed, [[0, 1]], reduction="sum"), Tie(averaged, [[0, 1]]), frozen(free, [0])]
    optimizer = TiedOptimizer(SGD([summed, averaged, free], lr=1.0), said, compact=compact)
    summed.grad, averaged.grad, free.grad = torch.ones(2), torch.full((2,), 6.0), torch.full((2,), 3.0)
    # 2 of the sum, 6 of the mean, and 3 of what is free.
    assert optimizer.grad_norm().item() == pytest.approx(7.0)
    optimizer.clip_grad_norm_(0.7)
    optimizer.step()
    torch.testing.assert_close(summed.detach(), torch.full((2,), -0.2))
    torch.testing.assert_close(averaged.detach(), torch.full((2,), -0.6))
    torch.testing.assert_close(free.detach(), torch.tensor([0.0, -0.3]))


def test_pulled_members_count_for_themselves_in_the_norm():
    pulled, tied = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    said = [Tie(pulled, [[0, 1]], strength=0.5), Tie(tied, [[0, 1]])]
    optimizer = TiedOptimizer(SGD([pulled, tied], lr=1.0), said)
    pulled.grad, tied.grad = torch.tensor([3.0, 4.0]), torch.full((2,), 12.0)
    assert optimizer.grad_norm().item() == pytest.approx(13.0)


def test_what_is_said_of_a_tie_stays_with_it():
    first, second = Parameter(randn(3)), Parameter(randn(3, seed=1))
    pulled = Tie(first, [[0, 1]], strength=0.5, every=2)
    optimizer = TiedOptimizer(SGD([first, second]), [pulled, Tie(second, [[0, 1]])], reduction="sum")
    assert [tie.options for tie in optimizer.ties] == [Options(None, 0.5, 2), Options()]
    assert is_tied(second, [[0, 1]])
    assert not is_tied(first, [[0, 1]])
    for other in (copy.deepcopy(optimizer), pickled(optimizer)):
        assert [tie.options for tie in other.ties] == [Options(None, 0.5, 2), Options()]
    optimizer.retie(optimizer.ties)
    assert [tie.options for tie in optimizer.ties] == [Options(None, 0.5, 2), Options()]
    # An optimizer that is relaxed can have ties that are not.
    exact = [Tie(first, [[0, 1]], strength=1, every=1, reduction="sum"), {second: [[0, 1]]}]
    optimizer = TiedOptimizer(SGD([first, second]), [exact[0], Tie(second, [[0, 1]])], strength=0.0)
    assert is_tied(first, [[0, 1]])


def test_frozen_slices_do_not_move_where_other_ties_are_relaxed():
    weight = Parameter(randn(4, 2))
    before = weight.detach().clone()
    optimizer = TiedOptimizer(
        Adam([weight], lr=0.1), [frozen(weight, [0]), Tie(weight, [[1, 2]])], strength=0.1, every=3
    )
    train(optimizer, 4)
    assert torch.equal(weight[0], before[0])
    assert not is_tied(weight, [[1, 2]])


@given(data=st.data())
def test_options_are_nothing_that_a_checkpoint_depends_on(data: st.DataObject) -> None:
    param, other = Parameter(randn(4, 3)), Parameter(randn(4, 3))
    (tie, *_) = data.draw(ties([param]))
    optimizer = TiedOptimizer(Adam([param]), with_options(tie, param, data.draw(some_options)))
    train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = TiedOptimizer(Adam([other]), with_options(tie, other, data.draw(some_options)))
    resumed.load_state_dict(saved)
    assert resumed.state_dict().get("tieopt", {}).get("ties") == saved.get("tieopt", {}).get("ties")


@pytest.mark.parametrize("inner", [Adam, AdamW, RMSprop, Adadelta, partial(SGD, momentum=0.9)], ids=str)
def test_training_goes_on_bit_for_bit_where_one_tie_is_relaxed_and_one_is_not(inner):
    scale = torch.tensor([1.0, 3.0, -0.7, 0.0, 1.3, 1.0])

    def wrapped(params: list[Parameter]) -> TiedOptimizer:
        exact = Tie(params[0], torch.tensor([0, 0, 0, 1, 2, 2]), scale=scale)
        return TiedOptimizer(inner(params, lr=0.01), [exact, Tie(params[1], [[0, 1]], strength=0.5)])

    params = [Parameter(randn(6, 3, seed=seed)) for seed in range(2)]
    optimizer = wrapped(params)
    train(optimizer, 7)
    twins = copy.deepcopy(params)
    resumed = wrapped(twins)
    with torch.no_grad():
        # What wrapping has pulled together.
        torch._foreach_copy_(twins, params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, 5)
    train(resumed, 5)
    assert all(map(same_bits, params, twins))


def test_the_state_of_a_tie_that_was_relaxed_is_tied_when_it_is_exact():
    params = [Parameter(randn(4, 2, seed=seed)) for seed in range(2)]
    ties = [Tie(params[0], [[0, 1]]), Tie(params[1], [[0, 1]], strength=0.5)]
    optimizer = TiedOptimizer(Adam(params), ties)
    train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    assert not is_tied(optimizer.state[params[1]]["exp_avg"], [[0, 1]])
    now = TiedOptimizer(Adam(params), [ties[0], Tie(params[1], [[0, 1]])])
    now.load_state_dict(saved)
    assert is_tied(now.state[params[1]]["exp_avg"], [[0, 1]])


def test_exact_ties_start_from_their_first_members_beside_relaxed_ones():
    params = [Parameter(randn(4, 2, seed=seed)) for seed in range(2)]
    before = [param.detach().clone() for param in params]
    ties = [Tie(params[0], [[1, 3]]), Tie(params[1], [[1, 3]], strength=0.5)]
    TiedOptimizer(SGD(params), ties, start="first")
    assert torch.equal(params[0][3], before[0][1])
    assert not is_tied(params[1], [[1, 3]])
    with pytest.raises(ValueError, match="Relaxed ties"):
        TiedOptimizer(SGD(params), ties[1], start="first")


def test_joined_ties_are_given_back_in_the_order_of_their_parts():
    first, second = (Parameter(randn(4, 2, seed=seed)) for seed in range(2))
    before = second.detach().clone()
    joined = Tie.join(Tie(second, torch.arange(4)), Tie(first, torch.arange(4)))
    optimizer = TiedOptimizer(SGD([first, second]), joined, strength=0.0)
    assert [part.param for part in optimizer.ties[0].parts] == [second, first]
    optimizer.retie(optimizer.ties, start="first", strength=1.0)
    assert torch.equal(first, before)
    assert torch.equal(second, before)


def test_what_is_written_to_ties_that_are_given_back_changes_none():
    weight = Parameter(randn(4, 2))
    scale, offset = torch.tensor([1.0, -1.0, 2.0, 1.0]), torch.arange(8.0).view(4, 2)
    optimizer = TiedOptimizer(SGD([weight]), Tie(weight, [[0, 1, 2]], scale=scale, offset=offset))
    part, before = optimizer.ties[0].parts[0], weight.detach().clone()
    for tensor in (part.groups, part.scale, part.offset):
        tensor.zero_()
    optimizer.tie_weights()
    assert same_bits(weight, before)
    again = optimizer.ties[0].parts[0]
    assert again.groups.tolist() == [0, 0, 0, -1]
    assert again.scale.tolist() == scale.tolist()
    assert torch.equal(again.offset[:3], offset[:3].double())


def test_slices_that_are_frozen_say_nothing_of_the_reduction(compact):
    weight = Parameter(randn(4, 2, dtype=torch.float64))
    pair = [frozen(weight, [0]), Tie(weight, [[1, 2]], reduction="sum" if compact else "mean")]
    optimizer = TiedOptimizer(LBFGS([weight]), pair, compact=compact)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert is_tied(weight, [[1, 2]])


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "Unknown reduction"),
        ({"reduction": 1}, ValueError, "Unknown reduction"),
        ({"strength": 1.5}, ValueError, "a number from 0 to 1"),
        ({"strength": "half"}, TypeError, "a number from 0 to 1"),
        ({"every": 0}, ValueError, "an integer from 1 on"),
        ({"every": 1.5}, TypeError, "an integer from 1 on"),
        ({"reduction": "sum", "strength": 0.5}, ValueError, "Relaxed ties leave"),
        ({"reduction": "sum", "every": 2}, ValueError, "Relaxed ties leave"),
    ],
    ids=str,
)
def test_options_that_no_tie_has_are_refused(options, error, message):
    weight = Parameter(randn(3))
    before = weight.detach().clone()
    with pytest.raises(error, match=message):
        Tie(weight, [[0, 1]], **options)
    optimizer = TiedOptimizer(SGD([weight]), ())
    with pytest.raises(error, match=message):
        optimizer.retie({weight: [[0, 1]]}, **options)
    assert torch.equal(weight, before)
    assert optimizer.ties == ()


def test_options_that_exclude_each_other_are_refused():
    weight, other = Parameter(randn(4)), Parameter(randn(4))
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="different options: strength"):
        Tie.join(Tie(weight, [[0, 1]], strength=0.5), Tie(other, [[0, 1]], strength=0.25))
    with pytest.raises(ValueError, match="Relaxed ties leave"):
        TiedOptimizer(SGD([weight]), Tie(weight, [[0, 1]], reduction="sum"), strength=0.5)
    with pytest.raises(ValueError, match="Relaxed ties train every member"):
        TiedOptimizer(SGD([weight]), Tie(weight, [[0, 1]], strength=0.5), compact=True)
    with pytest.raises(ValueError, match="no shared value to start"):
        TiedOptimizer(SGD([weight]), Tie(weight, [[0, 1]], strength=0.5), start="first")
    pair = [Tie(weight, [[0, 1]], reduction="sum"), Tie(weight, [[2, 3]])]
    with pytest.raises(ValueError, match="different reductions"):
        TiedOptimizer(SGD([weight]), pair, compact=True)
    joined = Tie.join(*(Tie(name, [[0]], reduction="sum") for name in ("weight", "other")))
    named = SGD([("weight", weight), ("other", other)])
    with pytest.raises(ValueError, match=r"different reductions\.\n  Parameters: weight, other\n"):
        TiedOptimizer(named, [joined, Tie("weight", [[2, 3]])], compact=True)
    with pytest.raises(ValueError, match="compares the loss"):
        TiedOptimizer(LBFGS([weight]), pair)
    assert torch.equal(weight, before)
