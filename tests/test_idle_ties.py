"""Ties that tie nothing are taken with a warning, which points to the user's call and shows what was probably meant."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import bits, parameter
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer, neurons, patterns
from tieopt.testing import assert_tied, ties

WORDS = torch.arange(80)


def model() -> nn.Module:
    return nn.ModuleDict({"tok": nn.Embedding(80, 2), "head": nn.Linear(2, 80), "out": nn.Linear(80, 2)})


def named() -> SGD:
    return SGD(model().named_parameters(), lr=0.1)


def warned(make: Callable[[], Any]) -> list[str]:
    """The warnings, all of which point here."""
    with pytest.warns(UserWarning, match="nothing") as caught:
        make()
    assert {warning.filename for warning in caught} == {__file__}
    assert {warning.category for warning in caught} == {UserWarning}
    return [str(warning.message) for warning in caught]


def silent(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


@pytest.mark.parametrize("way", ["wrap", "retie"])
def test_a_mapping_that_was_meant_as_one_tie_is_answered_with_the_join(way: str) -> None:
    optimizer = named()
    meant = {"tok.weight": WORDS, "head.weight": WORDS}
    if way == "wrap":
        (message,) = warned(lambda: TiedOptimizer(optimizer, meant))
    else:
        TiedOptimizer(optimizer, ())
        (message,) = warned(lambda: optimizer.retie(meant))
    assert message == (
        "These ties tie nothing: the same label in two ties is two groups, of one member each.\n"
        "  Parameters: tok.weight, head.weight\n"
        '  Expected:   Tie.join(Tie("tok.weight", ...), Tie("head.weight", ...)), '
        "in which the same label is one group\n"
        "  Got:        80 groups of 80 members in all, 0 free; 80 groups of 80 members in all, 0 free"
    )
    silent(lambda: optimizer.retie(Tie.join(Tie("tok.weight", WORDS), Tie("head.weight", WORDS))))
    assert torch.equal(*(optimizer.param_groups[0]["params"][number] for number in (0, 1)))


@pytest.mark.parametrize(
    ("given_ties", "shown"),
    [
        ({"tok.weight": [[3], [4]], "head.weight": [[7]]}, 'Tie.join(Tie("tok.weight", ...), Tie("head.weight", ...))'),
        (
            [Tie("tok.weight", WORDS), Tie("out.weight", WORDS, dim=1)],
            'Tie.join(Tie("tok.weight", ...), Tie("out.weight", ..., dim=1))',
        ),
        ({"head.bias": WORDS}, 'Tie("head.bias", [[0, 1, 2, ...]])'),
        ({"out.bias": [[1], [0]]}, 'Tie("out.bias", [[0, 1]])'),
        ({"head.bias": [[5]]}, 'Tie("head.bias", [[5, ...]])'),
        ([Tie("out.weight", [[2], [3]], dim=1)], 'Tie("out.weight", [[2, 3]], dim=1)'),
        ({"head.weight": torch.arange(160).view(80, 2)}, 'Tie("head.weight", torch.where(labels < 0, -1, 0))'),
        (
            Tie.join(Tie("tok.weight", [[3]]), Tie("head.weight", [[], [7]])),
            'Tie.join(Tie("tok.weight", labels), Tie("head.weight", labels))',
        ),
        ([Tie("out.bias", [[0], [1]], scale=torch.tensor([1.0, -1.0]))], 'Tie("out.bias", [[0, 1]])'),
    ],
    ids=[
        "lists",
        "transposed",
        "labels that all differ",
        "lists of one index",
        "one member",
        "columns",
        "elements",
        "a join without a label in common",
        "signs alone",
    ],
)
def test_what_was_meant_is_shown(given_ties: Any, shown: str) -> None:
    (message,) = warned(lambda: TiedOptimizer(named(), given_ties))
    assert shown in message


def test_parameters_without_names_are_shown_by_their_places() -> None:
    params = [parameter(3, 2), parameter(3, 2, seed=1)]
    (message,) = warned(lambda: TiedOptimizer(SGD(params), dict.fromkeys(params, torch.arange(3))))
    assert "Tie.join(Tie(param_groups[0]['params'][0], ...), Tie(param_groups[0]['params'][1], ...))" in message


def test_ties_that_could_not_be_joined_are_warned_of_one_by_one() -> None:
    messages = warned(lambda: TiedOptimizer(named(), {"head.weight": [[0]], "head.bias": [[0]]}))
    assert ["head.weight" in message for message in messages] == [True, False]
    assert not any("join" in message for message in messages)


SILENT: dict[str, Any] = {
    "no ties": {},
    "no groups": {"tok.weight": [], "head.weight": [[]]},
    "all free": {"tok.weight": torch.full((80,), -1)},
    "some groups of one member": {"tok.weight": [[0], [1, 2]]},
    "pinned": Tie("head.bias", [[0]], scale=torch.zeros(80)),
    "scaled": Tie("head.bias", [[0]], scale=torch.full((80,), 2.0)),
    "a join of which one part is scaled": Tie.join(
        Tie("tok.weight", [[0]], scale=torch.full((80,), 2.0)), Tie("head.weight", [[], [0]])
    ),
    "a join of parts of one member": Tie.join(*(Tie(name, [[0]]) for name in ("tok.weight", "head.weight"))),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_ties_something_or_is_empty_is_taken_without_a_word(case: str) -> None:
    silent(lambda: TiedOptimizer(named(), SILENT[case]))


def test_a_parameter_of_a_single_entry_may_have_a_pattern() -> None:
    weight = parameter(1, 1)
    silent(lambda: TiedOptimizer(SGD([weight]), {weight: patterns.symmetric((1, 1))}))


def test_neurons_with_a_following_layer_tie_something() -> None:
    first, second = nn.Conv2d(1, 4, 3), nn.Linear(16, 2)
    inner = SGD([*first.parameters(), *second.parameters()])
    silent(lambda: TiedOptimizer(inner, neurons(first, [[0, 1], [2]], following=second)))


def test_an_assertion_that_asserts_nothing_warns_too() -> None:
    (message,) = warned(lambda: assert_tied(nn.Linear(2, 3), {"weight": torch.arange(3)}))
    assert "Parameter: weight" in message


def test_a_warning_that_is_an_error_comes_before_anything_is_written() -> None:
    first, second = parameter(3, 2), parameter(3, 2, seed=1)
    optimizer, before = SGD([first, second]), bits(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="ties nothing"):
            TiedOptimizer(optimizer, {first: [[0, 1]], second: [[2]]})
    assert type(optimizer) is SGD
    assert torch.equal(bits(first), before)


@given(data=st.data())
def test_drawn_ties_are_taken_without_a_word(data: st.DataObject) -> None:
    params = [parameter(2, 2), parameter(2)]
    drawn = data.draw(ties(params))
    silent(lambda: TiedOptimizer(SGD(params), drawn))
