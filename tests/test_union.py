"""The union of ties that share entries, compared with a slow union of sets of entries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

import pytest
import torch
from checks import parameter, randn
from hypothesis import given
from hypothesis import strategies as st
from reference import Member, groups_of_entries
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adam

from tieopt import Tie, TiedOptimizer, frozen, is_tied, neurons
from tieopt.testing import assert_equivalent
from tieopt.testing import ties as drawn_ties

Entry = tuple[int, int]


def slow_union(groups: Iterable[Sequence[Member]]) -> dict[Entry, tuple[Entry, float]]:
    """For each tied entry the first one of its group in the union of all groups, and which multiple of it it is.

    Raises:
        ZeroDivisionError, ValueError: an entry is pinned in one group and not in another, or scales contradict.
    """
    sets: list[dict[Entry, float]] = []
    pinned: set[Entry] = set()
    for group in groups:
        pinned |= {member[:2] for member in group if member[2] == 0}
        united = {member[:2]: member[2] for member in group if member[2] != 0}
        for other in [other for other in sets if not other.keys().isdisjoint(united)]:
            sets.remove(other)
            common = next(iter(other.keys() & united.keys()))
            moved = {entry: scale * united[common] / other[common] for entry, scale in other.items()}
            if any(moved[entry] != united[entry] for entry in moved.keys() & united.keys()):
                raise ValueError
            united |= moved
        sets.append(united)
    if any(not pinned.isdisjoint(united) for united in sets):
        raise ValueError
    firsts = [(united, min(united)) for united in sets if united]
    found = {entry: (first, united[entry] / united[first]) for united, first in firsts for entry in united}
    return found | {entry: (entry, 0.0) for entry in pinned}


def partition(ties: Sequence[Tie], params: Sequence[Tensor]) -> dict[Entry, tuple[Entry, float]]:
    return slow_union(group for tie in ties for group in groups_of_entries(tie, params))


def is_disjoint(ties: Sequence[Tie], params: Sequence[Tensor]) -> bool:
    entries = [member[:2] for tie in ties for group in groups_of_entries(tie, params) for member in group]
    return len(entries) == len(set(entries))


@given(data=st.data())
def test_the_union_is_that_of_sets_of_entries(data: st.DataObject) -> None:
    params = [parameter(3, 4, seed=1), parameter(4, seed=2), parameter(3, 4, seed=3)]
    kinds = data.draw(st.sampled_from([["none"], ["none", "signs", "zeros"]]))
    draws = [data.draw(drawn_ties(data.draw(st.permutations(params)), kinds)) for _ in range(3)]
    ties = [tie for drawn in draws for tie in drawn]
    try:
        expected = partition(ties, params)
    except ValueError:
        with pytest.raises(ValueError, match="they can only be zero"):
            Tie.union(*ties)
        return
    for ordered in (ties, ties[::-1]):
        union = Tie.union(*ordered)
        assert is_disjoint(union, params)
        assert partition(union, params) == expected
        # What shares no entry is the tie that was given.
        assert all(any(tie is given for given in ties) for tie in union) == is_disjoint(ties, params)


@given(data=st.data())
def test_both_modes_train_the_union(data: st.DataObject) -> None:
    params = [parameter(3, 4, seed=1), parameter(4, 3, seed=2)]
    ties = [tie for _ in range(2) for tie in data.draw(drawn_ties(params, ["none"]))]
    union = Tie.union(*ties)
    optimizer = TiedOptimizer(Adam(params, lr=0.1), union, compact=data.draw(st.booleans()))
    for _ in range(3):
        for param in params:
            param.grad = randn(*param.shape, seed=7)
        optimizer.step()
    assert optimizer.tie_drift() == 0
    for tie in ties:
        for group in groups_of_entries(tie, params):
            values = torch.stack([params[number].detach().flatten()[at] for number, at, _ in group])
            assert torch.equal(values, values[:1].expand(len(values)))


def test_ties_that_share_nothing_stay_as_they_are() -> None:
    weight, bias = parameter(4, 3), parameter(4)
    ties = [Tie(weight, [[0, 1]]), Tie(bias, [[0, 1]]), Tie(weight, [[2, 3]]), frozen(bias, [3])]
    union = Tie.union(*ties)
    assert len(union) == 4
    assert all(one is other for one, other in zip(union, ties, strict=True))
    assert Tie.union(ties[0])[0] is ties[0]


def test_whole_slices_stay_whole() -> None:
    weight, other = parameter(6, 3), parameter(6, 3)
    joined = Tie.join(Tie(weight, [[0], [4, 5]]), Tie(other, [[1], [2]]))
    (union,) = Tie.union(Tie(weight, [[0, 1], [2, 3]]), Tie(weight, [[1, 2]]), joined)
    assert [(part.param, part.groups.tolist(), part.dim) for part in union.parts] == [
        (weight, [0, 0, 0, 0, 1, 1], 0),
        (other, [-1, 0, 1, -1, -1, -1], 0),
    ]
    (columns,) = Tie.union(Tie(weight, [[0, 1]], dim=1), Tie(weight, [[1, 2]], dim=1))
    assert (columns.parts[0].groups.tolist(), columns.parts[0].dim) == ([0, 0, 0], 1)
    (elements,) = Tie.union(Tie(weight, [[0, 1]]), Tie(weight, [[1, 2]], dim=1))
    assert elements.parts[0].groups.shape == (6, 3)


def test_a_tie_whose_parts_share_entries_is_united_with_itself() -> None:
    matrix = parameter(4, 4)
    symmetric = Tie.join(Tie(matrix, torch.arange(4)), Tie(matrix, torch.arange(4), dim=1))
    TiedOptimizer(SGD([matrix]), Tie.union(symmetric))
    assert torch.equal(matrix, matrix.T)


def test_scales_are_those_along_the_chain() -> None:
    vector = parameter(5, seed=3, dtype=torch.float64)
    doubled = Tie(vector, [[0, 1]], scale=torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]))
    negated = Tie(vector, [[1, 2], [3, 4]], scale=torch.tensor([1.0, 1.0, -3.0, 1.0, 0.0]))
    (union,) = Tie.union(doubled, negated)
    assert union.parts[0].groups.tolist() == [0, 0, 0, 1, 1]
    assert union.parts[0].scale.tolist() == [1, 2, -6, 1, 0]
    # Multiples of the shared value of the first tie.
    (union,) = Tie.union(negated, doubled)
    assert union.parts[0].scale.tolist() == [0.5, 1, -3, 1, 0]


@given(data=st.data(), seed=st.integers(0, 2**20))
def test_what_a_tie_says_is_equal_is_equal_to_the_last_bit_in_the_union(data: st.DataObject, seed: int) -> None:
    factors, signs = (
        randn(3, seed=seed, dtype=torch.float64),
        data.draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=4)),
    )
    vector = Parameter(randn(4, seed=seed, dtype=torch.float64))
    first, second, third = factors.tolist()
    ties = [
        Tie(vector, [[0, 1]], scale=torch.tensor([1.0, first, 1.0, 1.0], dtype=torch.float64)),
        Tie(vector, [[1, 2]], scale=torch.tensor([1.0, second, second * signs[0], 1.0], dtype=torch.float64)),
        Tie(vector, [[2, 3]], scale=torch.tensor([1.0, 1.0, third, third * signs[1]], dtype=torch.float64)),
    ]
    TiedOptimizer(SGD([vector]), Tie.union(*(ties[number] for number in data.draw(st.permutations(range(3))))))
    assert vector[2].item() == signs[0] * vector[1].item()
    assert vector[3].item() == signs[1] * vector[2].item()


def test_an_entry_that_is_pinned_wherever_it_is_tied_stays_pinned() -> None:
    vector = parameter(5)
    first = Tie(vector, [[0, 1, 2]], scale=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    second = Tie(vector, [[1, 3], [2, 4]], scale=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    for ties in permutations([first, second]):
        (union,) = Tie.union(*ties)
        TiedOptimizer(SGD([vector]), union)
        assert vector[2] == 0
        assert torch.equal(vector[0], vector[3])
        assert is_tied(vector, union.parts[0].groups, scale=union.parts[0].scale)


def test_a_long_chain_and_many_entries_are_united() -> None:
    count = 2**16
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    weight = Parameter(torch.zeros(count))
    links = torch.empty(2, count, dtype=torch.int64)
    links[0, order], links[1, order] = torch.arange(count) // 2, (torch.arange(count) + 1) // 2
    (union,) = Tie.union(*(Tie(weight, labels) for labels in links))
    assert not union.parts[0].groups.any()
    # Labels as large as hashes.
    (union,) = Tie.union(Tie(weight, links[0] + 2**62), Tie(weight, torch.arange(count) % 2 + 2**62))
    assert union.parts[0].groups.max() <= 1


def test_neurons_of_consecutive_layers_are_tied(compact: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    first, second = [[0, 2], [1, 4, 5]], [[0, 1, 2], [3, 5]]
    ties = [*neurons(model[0], first, following=model[2]), *neurons(model[2], second, following=model[4])]
    params = list(model.parameters())
    with pytest.raises(ValueError, match=re.escape("Tie.union(*ties) returns such ties of parameters")):
        TiedOptimizer(Adam(params, lr=0.01), ties, compact=compact)
    optimizer = TiedOptimizer(Adam(params, lr=0.01), Tie.union(*ties), compact=compact)
    hidden: dict[nn.Module, Tensor] = {}
    for layer in (model[1], model[3]):
        layer.register_forward_hook(lambda layer, _, output: hidden.update({layer: output}))
    for step in range(4):
        optimizer.zero_grad()
        model(randn(7, 5, seed=step).double()).square().sum().backward()
        optimizer.step()
    for weight, groups, dim in [
        (model[0].weight, first, 0),
        (model[2].weight, first, 1),
        (model[2].weight, second, 0),
        (model[2].bias, second, 0),
        (model[4].weight, second, 1),
    ]:
        assert is_tied(weight, groups, dim=dim)
    model(randn(7, 5).double())
    for layer, groups in zip((model[1], model[3]), (first, second), strict=True):
        for group in groups:
            outputs = hidden[layer][:, group]
            torch.testing.assert_close(outputs, outputs[:, :1].expand_as(outputs), rtol=1e-14, atol=1e-14)


def test_training_the_union_is_training_of_its_shared_values() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def ties(model: nn.Module) -> list[Tie]:
        consecutive = neurons(model[0], [[0, 1]], following=model[2]), neurons(model[2], [[0, 3]], following=model[4])
        return Tie.union(*consecutive[0], *consecutive[1])

    batches = [(randn(5, 3, seed=seed).double(), randn(5, 2, seed=seed + 9).double()) for seed in range(3)]
    assert_equivalent(
        make,
        lambda named: Adam(named, lr=0.01, eps=1e-12),
        ties,
        batches,
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        tolerance=1e-9,
    )


def test_the_union_has_the_options_of_all() -> None:
    vector, other = parameter(4), parameter(0)
    ties = [
        Tie(vector, [[0, 1]], reduction="sum"),
        Tie.join(*(Tie(v, g, reduction="sum") for v, g in [(vector, [[1, 2]]), (other, [])])),
    ]
    (union,) = Tie.union(*ties)
    assert union.options == ties[1].options
    assert [part.param for part in union.parts] == [vector, other]
    with pytest.raises(ValueError, match="different options: reduction"):
        Tie.union(*ties, Tie(vector, [[2, 3]]))
    (first, second) = Tie.union(Tie.equal(*(nn.Linear(2, 2) for _ in range(2)), reduction="sum"))
    assert first.options == second.options == ties[1].options


def test_ties_of_modules_are_united_as_well() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    union = Tie.union(Tie.equal(first, second), Tie(first.weight, [[0, 2]]))
    assert [len(tie.parts) for tie in union] == [2, 2]
    assert union[0].parts[1].groups.tolist() == [0, 1, 0]


VECTOR, OTHER = parameter(4), parameter(4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Tie.union(), TypeError, "Tie.union unites ties.\n  Expected: Ties, at least one\n  Got:      None"),
        (lambda: Tie.union([Tie(VECTOR, [[0, 1]])]), TypeError, "(Tie.union(*ties) takes those of a list)"),
        (lambda: Tie.union(Tie("w", [[0, 1]])), TypeError, "Got:      Tie('w', [[0, 1]] (list)) (give the parameters"),
        (lambda: Tie.union(Tie.equal("a", "b")), TypeError, "Got:      Tie.equal('a', 'b') (give the parameters"),
        (
            lambda: Tie.union(Tie(VECTOR, [[0, 1]]), Tie(VECTOR, [[0, 1]], scale=torch.tensor([1.0, -1, 1, 1]))),
            ValueError,
            "Ties that share entries say of some that they can only be zero.\n"
            "  Expected: the same multiples in each of them; an entry that is to be zero gets a scale of 0 wherever it "
            "is tied\n"
            "  Got:      Tie(parameter of shape (4,), 1 group of 2 members, 2 free), "
            "Tie(parameter of shape (4,), 1 group of 2 members, 2 free, scaled)",
        ),
        (
            lambda: Tie.union(Tie(VECTOR, [[0, 1]], scale=torch.tensor([1.0, 0, 1, 1])), Tie(VECTOR, [[1, 2]])),
            ValueError,
            "can only be zero",
        ),
        (
            lambda: Tie.union(
                Tie(VECTOR, [[0, 1]]), Tie(VECTOR, [[1, 2]]), Tie(VECTOR, [[2, 0]], scale=torch.tensor([1.0, 1, 2, 1]))
            ),
            ValueError,
            "can only be zero",
        ),
        (
            lambda: Tie.union(frozen(VECTOR, [0]), Tie(OTHER, [[0, 1]]), Tie(VECTOR, [[0, 1]])),
            ValueError,
            "Ties with offsets share entries.\n"
            "  Expected: one Tie of all these slices, with its offsets; or ties that share no entry\n"
            "  Got:      Tie(parameter of shape (4,), 1 group of 1 member, 3 free, frozen), "
            "Tie(parameter of shape (4,), 1 group of 2 members, 2 free)",
        ),
    ],
)
def test_what_has_no_union_is_refused(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()
