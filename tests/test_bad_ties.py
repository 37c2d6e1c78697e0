"""Bad ties get one clear error before anything is written: scales, dimensions, joins, overlaps, old shapes."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from checks import GROUPS, SHAPE, bits, parameter, randn, same_tree
from test_bad_input import AT_POSITION, Setting, assert_clear
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from tieopt import Tie, TiedOptimizer, is_tied, tie_

ROWS = torch.tensor([0, 1, 0, -1, 2, 2, 1])
GOOD = Tie("good", GROUPS)


def refused(error: type[Exception], make: Callable[[], Any], *parts: str) -> None:
    """Asserts that something is refused in one clear error with all the parts."""
    with pytest.raises(error) as caught:
        make()
    assert_clear(caught.value, *parts)


def by_name(setting: Setting, groups: Any, **kwargs: Any) -> list[Tie]:
    """A good tie, and a bad one that is found out when the parameter is."""
    return [Tie("good", GROUPS), Tie("layer.bad", groups, **kwargs)]


@pytest.fixture
def setting():
    return Setting(named=True)


# --- scales ---

NAN, INF = float("nan"), float("inf")


def with_value(value: float, at: int = 3) -> Tensor:
    scale = torch.ones(7, dtype=torch.float64)
    scale[at] = value
    return scale


BAD_SCALES = {
    **{
        f"shape {tuple(shape)}": (
            torch.ones(shape),
            ValueError,
            ["wrong shape", r"Parameter: \(7, 5\)", r"Expected: +\(7,\), one number", f"Got: +{re.escape(str(shape))}"],
        )
        for shape in [(6,), (8,), (1,), (), (7, 1), (7, 5), (1, 7)]
    },
    **{
        f"{dtype}": (torch.ones(7, dtype=dtype), TypeError, ["wrong dtype", "Expected: a real dtype", f"Got: +{dtype}"])
        for dtype in [torch.complex64, torch.complex128, torch.bool]
    },
    **{
        f"{value}": (
            with_value(value),
            ValueError,
            ["scales nothing", r"2\*\*-100 to 2\*\*100", f"Got: +{re.escape(str(value))} at position 3"],
        )
        for value in [NAN, INF, -INF, 2.0**-101, -(2.0**-101), 2.0**101, -(2.0**101), 1e300, 5e-324]
    },
    **{
        f"no tensor: {value}": (
            value,
            TypeError,
            [
                "is no tensor",
                r"Expected: a tensor of real numbers of shape \(7,\), or None",
                f"Got: +{re.escape(shown)}",
            ],
        )
        for value, shown in [
            (1.0, "1.0 (float)"),
            (-1, "-1 (int)"),
            ([1.0] * 7, "[1.0, 1.0"),
            ("sign", "'sign' (str)"),
        ]
    },
    "an array of objects": (
        numpy.array([1.0] * 7, dtype=object),
        TypeError,
        ["Scales for .* wrong dtype", "Expected: a real dtype, in the byte order", r"Got: +dtype\('O'\)"],
    ),
    "an array in another byte order": (
        numpy.ones(7, dtype=">f8"),
        TypeError,
        ["Scales for .* wrong dtype", "Expected: a real dtype, in the byte order", r"Got: +dtype\('>f8'\)"],
    ),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_a_bad_scale_is_refused(setting, case):
    scale, error, parts = BAD_SCALES[case]
    setting.refused(error, r"layer\.bad", *parts, ties=by_name(setting, ROWS, scale=scale))
    refused(error, lambda: Tie(setting.bad, ROWS, scale=scale), "the parameter", *parts)
    refused(error, lambda: Tie(setting.bad, GROUPS, scale=scale), "the parameter", *parts)
    for function in (tie_, is_tied):
        tensor = randn(*SHAPE)
        refused(error, lambda: function(tensor, ROWS, scale=scale), "the tensor", *parts)  # noqa: B023
        assert torch.equal(bits(tensor), bits(randn(*SHAPE)))


@pytest.mark.parametrize("value", [2.0**-100, -(2.0**-100), 2.0**100, -(2.0**100), 0.0, -0.0])
def test_a_scale_just_within_the_bounds_is_none_too_large_or_small(value):
    assert float(Tie(parameter(*SHAPE), ROWS, scale=with_value(value)).parts[0].scale[3]) == value


def test_the_position_of_a_bad_scale_of_elements_is_that_of_the_element():
    scale = torch.ones(SHAPE)
    scale[4, 2] = NAN
    labels = torch.zeros(SHAPE, dtype=torch.int64)
    refused(ValueError, lambda: Tie(parameter(*SHAPE), labels, scale=scale), r"Got: +nan at position \(4, 2\)")


def test_a_scale_has_the_shape_of_the_labels_along_another_dimension():
    scale = torch.ones(7)
    parts = [r"Parameter: \(7, 5\)", r"Expected: +\(5,\), one number for each label", r"Got: +\(7,\)"]
    refused(ValueError, lambda: Tie(parameter(*SHAPE), [[0, 1]], dim=1, scale=scale), *parts)


# --- dimensions ---


@pytest.mark.parametrize(
    ("dim", "error", "shown"),
    [
        (2, IndexError, "2"),
        (-3, IndexError, "-3"),
        (2**40, IndexError, str(2**40)),
        (True, TypeError, r"True \(bool\)"),
        (False, TypeError, r"False \(bool\)"),
        (1.0, TypeError, r"1\.0 \(float\)"),
        ("1", TypeError, r"'1' \(str\)"),
        (None, TypeError, r"None \(NoneType\)"),
        ((0, 1), TypeError, r"\(0, 1\) \(tuple\)"),
        (torch.tensor(1.0), TypeError, r"a tensor of shape \(\) and torch\.float32"),
    ],
    ids=str,
)
def test_a_bad_dimension_is_refused(setting, dim, error, shown):
    what = "out of range" if error is IndexError else "not an integer"
    parts = [what, r"Parameter: \(7, 5\)", "Expected: +an integer from -2 to 1", f"Got: +{shown}"]
    setting.refused(error, r"dim for layer\.bad", *parts, ties=by_name(setting, [[0, 1]], dim=dim))
    refused(error, lambda: Tie(setting.bad, [[0, 1]], dim=dim), "dim for the parameter", *parts)
    for function in (tie_, is_tied):
        refused(error, lambda: function(randn(*SHAPE), [[0, 1]], dim=dim), "dim for the tensor", *parts)  # noqa: B023


@pytest.mark.parametrize("dim", [1, -1, numpy.int64(1), torch.tensor(1)], ids=repr)
def test_whatever_is_an_integer_is_a_dimension(dim):
    assert Tie(parameter(*SHAPE), [[0, 1]], dim=dim).parts[0].dim == 1


# --- labels of a wrong shape ---

PREFIXES = [
    ((7, 5, 3), 0, (5,), r"\(7,\), one label for each slice along dimension 0, or more of the leading .* \(7, 5, 3\)"),
    ((7, 5, 3), 0, (7, 3), r"\(7,\), .* dimension 0, .* \(7, 5, 3\)"),
    ((7, 5, 3), 0, (7, 5, 3, 1), r"\(7,\), .* dimension 0, .* \(7, 5, 3\)"),
    ((7, 5, 3), 1, (7,), r"\(5,\), .* dimension 1, or more of the leading dimensions of \(5, 7, 3\)"),
    ((7, 5, 3), 1, (7, 5), r"\(5,\), .* dimension 1, .* \(5, 7, 3\)"),
    ((7, 5, 3), -1, (7, 5, 3), r"\(3,\), .* dimension 2, .* \(3, 7, 5\)"),
    ((7, 5, 3), 2, (), r"\(3,\), .* dimension 2, .* \(3, 7, 5\)"),
    ((7,), 0, (5,), r"\(7,\), one label for each slice along dimension 0\n"),
]


@pytest.mark.parametrize(("shape", "dim", "labels", "expected"), PREFIXES, ids=str)
def test_labels_whose_shape_is_no_beginning_of_the_parameters_are_refused(shape, dim, labels, expected):
    good, bad = parameter(*SHAPE), parameter(*shape, seed=1)
    optimizer = SGD([("good", good), ("bad", bad)], lr=0.1)
    before = [bits(good), bits(bad)]
    names = torch.zeros(labels, dtype=torch.int64)
    parts = [
        "wrong shape",
        rf"Parameter: {re.escape(str(shape))}",
        f"Expected: +{expected}",
        f"Got: +{re.escape(str(labels))}( |$)",
    ]
    refused(ValueError, lambda: TiedOptimizer(optimizer, [GOOD, Tie("bad", names, dim=dim)]), "for bad", *parts)
    refused(ValueError, lambda: Tie(bad, names, dim=dim), "for the parameter", *parts)
    assert type(optimizer) is SGD
    assert same_tree([bits(good), bits(bad)], before)


# --- what is joined ---


@pytest.mark.parametrize(
    ("ties", "shown"),
    [
        ((), r"None \(NoneType\)"),
        ((None,), r"None \(NoneType\)"),
        ((Tie("a", [[0]]), [[0, 1]]), r"\[\[0, 1\]\] \(list\)"),
        ((Tie("a", [[0]]), "b"), r"'b' \(str\)"),
        (([Tie("a", [[0]]), Tie("b", [[0]])],), r"\[Tie\('a', \[\[0\]\] \(list\)\), Tie\('b', .* \(list\)"),
        ((torch.zeros(3),), r"a tensor of shape \(3,\)"),
    ],
    ids=["nothing", "None", "groups", "a name", "a list of ties", "a tensor"],
)
def test_what_is_no_tie_is_not_joined(ties, shown):
    refused(TypeError, lambda: Tie.join(*ties), "joins ties", "Expected: Ties, at least one", f"Got: +{shown}")


def test_slices_of_different_shapes_are_not_joined_where_the_parameters_are_known():
    rows, columns = Tie(parameter(7, 5), [[0, 1]]), Tie(parameter(7, 5), [[0, 1]], dim=1)
    parts = ["different shapes", r"slices of shape \(5,\), as in part 0 \(7, 5\)", r"Got: +\(7,\) in part 1 \(7, 5\)"]
    refused(ValueError, lambda: Tie.join(rows, columns), *parts)
    elements = Tie(parameter(2, 2), torch.zeros(2, 2, dtype=torch.int64))
    refused(ValueError, lambda: Tie.join(rows, rows, elements), r"Got: +\(\) in part 2 \(2, 2\)")


def test_slices_of_different_shapes_are_not_joined_where_names_are_found_later(setting):
    ties = [GOOD, Tie.join(Tie("layer.bad", [[0, 1]]), Tie("good", [[2, 4]], dim=1))]
    parts = [r"slices of shape \(5,\), as in layer\.bad \(7, 5\)", r"Got: +\(7,\) in good \(7, 5\)"]
    setting.refused(ValueError, "different shapes", *parts, ties=ties)


def test_slices_of_different_shapes_are_not_joined_where_one_is_known_and_one_is_not(setting):
    ties = [GOOD, Tie.join(Tie(setting.bad, [[0, 1]]), Tie("good", [[2, 4]], dim=1))]
    parts = [r"slices of shape \(5,\), as in layer\.bad \(7, 5\)", r"Got: +\(7,\) in good \(7, 5\)"]
    setting.refused(ValueError, "different shapes", *parts, ties=ties)


class Joined:
    """Two parameters in groups of their own, to be joined, and a third that is tied well before."""

    def __init__(
        self,
        inner: type[Optimizer] = AdamW,
        first: dict[str, Any] | None = None,
        second: dict[str, Any] | None = None,
        change: Callable[[Parameter], Parameter] = lambda one: one,
    ) -> None:
        self.good, self.one, self.other = (
            parameter(*SHAPE),
            parameter(*SHAPE, seed=1),
            change(parameter(*SHAPE, seed=2)),
        )
        named = [("good", self.good), ("one", self.one)], [("other", self.other)]
        settings = first or {}, second or {}
        self.optimizer = inner([{"params": params, **own} for params, own in zip(named, settings, strict=True)])
        self.before = self.look()

    def look(self) -> list[Any]:
        params = [self.good, self.one, self.other]
        optimizer = self.optimizer
        return [
            [[bits(one), one._version] for one in params],
            [type(optimizer).__name__, sorted(vars(optimizer)), optimizer.state_dict()],
        ]

    @property
    def ties(self) -> list[Tie]:
        return [GOOD, Tie.join(Tie(self.one, [[0, 1]]), Tie(self.other, [[2], [3]]))]

    def refused(self, *parts: str) -> None:
        refused(ValueError, lambda: TiedOptimizer(self.optimizer, self.ties), *parts)
        assert same_tree(self.look(), self.before)

    def taken(self) -> None:
        TiedOptimizer(self.optimizer, self.ties)
        assert torch.equal(self.one[0], self.other[2])
        assert torch.equal(self.one[0], self.one[1])


@pytest.mark.parametrize(
    ("change", "attribute", "expected", "got"),
    [
        (lambda one: Parameter(one.detach().double()), "dtype", "torch.float32", "torch.float64"),
        (lambda one: Parameter(one.detach().bfloat16()), "dtype", "torch.float32", "torch.bfloat16"),
        (lambda one: one.requires_grad_(False), "requires_grad", "True", "False"),
    ],
    ids=["float64", "bfloat16", "frozen"],
)
def test_parameters_that_are_not_alike_are_not_joined(change, attribute, expected, got):
    Joined(change=change).refused(
        f"Joined parameters differ in {attribute}", f"Expected: {expected}, as one has", f"Got: +{got} of other"
    )


@pytest.mark.parametrize(
    ("change", "way", "alike"),
    [
        (
            lambda one: Parameter(one.detach().bfloat16()),
            r"convert one of their modules first, as with module\.to\(torch\.float32\)$",
            lambda one: setattr(one, "data", one.data.to(torch.float32)),
        ),
        (
            lambda one: one.requires_grad_(False),
            r"freeze all of them or none, with requires_grad_\(\)$",
            lambda one: one.requires_grad_(),
        ),
    ],
    ids=["bfloat16", "frozen"],
)
def test_parameters_that_are_not_alike_are_told_how_to_be_joined_which_works(change, way, alike):
    joined = Joined(change=change)
    with pytest.raises(ValueError, match=way) as caught:
        TiedOptimizer(joined.optimizer, joined.ties)
    assert "retie" not in str(caught.value)
    alike(joined.other)
    joined.taken()


def test_where_something_is_tied_the_way_is_to_retie():
    joined = Joined()
    joined.taken()
    joined.other.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Got: +False of other; retie or untie them first$"):
        joined.optimizer.tie_weights()
    joined.optimizer.retie(())
    assert joined.optimizer.ties == ()

    joined = Joined()
    joined.taken()
    joined.optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"param_groups\[0\] and \[1\]; or retie or untie them first\n"):
        joined.optimizer.tie_weights()


def test_frozen_parameters_may_be_joined_and_are_not_written():
    joined = Joined(change=lambda one: one.requires_grad_(False))
    joined.one.requires_grad_(False)
    TiedOptimizer(joined.optimizer, joined.ties)
    assert same_tree([bits(joined.one), bits(joined.other)], [words for words, _ in joined.before[0][1:]])


@pytest.mark.parametrize(
    ("first", "second", "differing"),
    [
        ({"lr": 0.1}, {"lr": 0.2}, ["lr: 0.1 (float) and 0.2 (float)"]),
        ({"weight_decay": 0.5}, {}, ["weight_decay: 0.5 (float) and 0.01 (float)"]),
        ({}, {"betas": (0.5, 0.9)}, ["betas: (0.9, 0.999) (tuple) and (0.5, 0.9) (tuple)"]),
        (
            {"lr": 0.1, "eps": 1e-6},
            {"lr": 0.2, "amsgrad": True},
            [
                "amsgrad: False (bool) and True (bool)",
                "eps: 1e-06 (float) and 1e-08 (float)",
                "lr: 0.1 (float) and 0.2 (float)",
            ],
        ),
        ({"lr": torch.tensor(0.1)}, {"lr": torch.tensor(0.2)}, ["lr: a tensor of shape () and torch.float32"]),
        ({"lr": torch.tensor(0.1)}, {"lr": 0.5}, ["lr: a tensor of shape () and torch.float32 and 0.5 (float)"]),
        ({"own": 1}, {"own": None}, ["own: 1 (int) and None (NoneType)"]),
        ({"maximize": True}, {"maximize": False}, ["maximize: True (bool) and False (bool)"]),
    ],
    ids=[
        "lr",
        "weight_decay",
        "betas",
        "several",
        "tensors",
        "a tensor and a number",
        "own",
        "maximize",
    ],
)
def test_parameters_with_different_settings_are_not_joined(first, second, differing):
    Joined(first=first, second=second).refused(
        "parameter groups with different settings",
        "Parameters: one and other",
        r"Expected: +the same settings in param_groups\[0\] and \[1\]",
        "; ".join(re.escape(each) for each in differing),
    )


def test_only_what_differs_is_listed():
    joined = Joined(first={"lr": 0.1}, second={"lr": 0.2})
    with pytest.raises(ValueError, match="different settings") as caught:
        TiedOptimizer(joined.optimizer, joined.ties)
    assert str(caught.value) == (
        "Joined parameters stand in parameter groups with different settings.\n"
        "  Parameters: one and other\n"
        "  Expected:   the same settings in param_groups[0] and [1]; "
        "set them alike, or put the parameters into one group\n"
        "  Got:        lr: 0.1 (float) and 0.2 (float)"
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"lr": 0.1, "weight_decay": 0.2, "betas": (0.5, 0.9)}, {"lr": 0.1, "weight_decay": 0.2, "betas": (0.5, 0.9)}),
        ({"lr": torch.tensor(0.1)}, {"lr": torch.tensor(0.1)}),
        ({"name": "encoder"}, {"name": "decoder"}),
        ({"own": 1}, {}),
        ({}, {"own": 1}),
    ],
    ids=["defaults", "numbers", "tensors", "names of groups", "what one has", "what the other has"],
)
def test_the_same_settings_in_two_groups_are_no_difference(first, second):
    Joined(Adam, first=first, second=second).taken()


def test_settings_that_are_lists_of_tensors_are_compared_too():
    Joined(first={"own": [torch.ones(2)]}, second={"own": [torch.ones(2)]}).taken()
    joined = Joined(first={"own": [torch.ones(2)]}, second={"own": [torch.zeros(2)]})
    joined.refused("different settings", "own: ")


def test_parameters_that_are_tied_apart_may_have_settings_of_their_own():
    joined = Joined(first={"lr": 0.1}, second={"lr": 0.2})
    TiedOptimizer(joined.optimizer, [Tie("one", [[0, 1]]), Tie("other", [[0, 1]])])
    assert is_tied(joined.one, [[0, 1]])


# --- overlaps ---


@pytest.mark.parametrize(
    ("first", "second", "entry", "both"),
    [
        (
            {"groups": [[0, 1]]},
            {"groups": [[2, 4]], "dim": 1},
            r"\(0, 2\)",
            "1 group of 2 members, 5 free, and in 1 group of 2 members, 3 free, dim=1",
        ),
        (
            {"groups": torch.zeros(SHAPE, dtype=torch.int64)},
            {"groups": [[6]]},
            r"\(6, 0\)",
            "1 group of 35 members, 0 free, and in 1 group of 1 member, 6 free",
        ),
        (
            {"groups": [[3, 4]], "scale": -with_value(2.0)},
            {"groups": [[1, 2], [4, 5]]},
            r"\(4, 0\)",
            "1 group of 2 members, 5 free, scaled, and in 2 groups of 4 members in all, 3 free",
        ),
        (
            {"groups": [[0, 1]]},
            {"groups": [[1, 2]], "scale": with_value(0.0, 1)},
            r"\(1, 0\)",
            "1 group of 2 members, 5 free, and in 1 group of 2 members, 5 free, scaled",
        ),
    ],
    ids=["rows and columns", "all and a row", "scaled", "pinned"],
)
def test_ties_that_share_an_entry_are_refused(setting, first, second, entry, both):
    ties = [GOOD, Tie("layer.bad", **first), Tie("layer.bad", **second)]
    parts = [r"layer\.bad is tied twice", "Expected: ties that share no entry", f"Got: +entry {entry} in {both}$"]
    setting.refused(ValueError, *parts, ties=ties)


@pytest.mark.parametrize(
    ("first", "second", "entry", "both"),
    [
        ({"groups": [[0, 1]]}, {"groups": [[1], [2, 3]]}, r"\(1, 0\)", "1 group of 2 .*, and in 2 groups of 3 .*"),
        ({"groups": [[0, 4]], "dim": 1}, {"groups": [[4, 2, 3]], "dim": 1}, r"\(0, 4\)", ".* dim=1, and in .* dim=1"),
        (
            {"groups": torch.zeros(SHAPE, dtype=torch.int64)},
            {"groups": torch.arange(35).view(5, 7), "dim": 1},
            r"\(0, 0\)",
            "1 group of 35 members, 0 free, and in 35 groups of 35 members in all, 0 free, dim=1",
        ),
    ],
    ids=["rows", "columns", "elements, transposed"],
)
@pytest.mark.parametrize("known", [True, False])
def test_parts_of_one_join_that_share_an_entry_are_refused(setting, known, first, second, entry, both):
    param = setting.bad if known else "layer.bad"
    ties = [GOOD, Tie.join(Tie(param, **first), Tie(param, **second))]
    parts = [r"layer\.bad is tied twice", "Expected: ties that share no entry", f"Got: +entry {entry} in {both}$"]
    setting.refused(ValueError, *parts, ties=ties)


def test_an_entry_in_two_ties_is_told_how_to_be_in_one(setting):
    way = (
        r"Tie.union\(\*ties\) returns such ties of parameters; or write what is to be equal as one group of one Tie{}; "
        r"retie\(\) takes new ties in the place of all old ones\n"
    )
    setting.refused(ValueError, way.format(""), ties=[Tie("layer.bad", [[0, 1]]), Tie("layer.bad", [[1, 2]])])
    of_entries = r", with a label for each entry, of shape \(7, 5\)"
    ties = [Tie("layer.bad", [[0, 1]]), Tie("layer.bad", [[1, 2]], dim=1)]
    Setting(named=True).refused(ValueError, way.format(of_entries), ties=ties)


def test_the_overlap_of_later_ties_is_told_from_the_first(setting):
    ties = [Tie("layer.bad", [[0, 1]]), Tie("layer.bad", [[2, 3], [4]]), Tie("layer.bad", [[5, 4, 6]])]
    got = r"entry \(4, 0\) in 2 groups of 3 members in all, 4 free, and in 1 group of 3 members, 4 free"
    setting.refused(ValueError, "tied twice", got, ties=ties)


def test_an_overlap_with_a_part_of_a_join_is_refused(setting):
    ties = [Tie.join(Tie("good", [[0, 1]]), Tie("layer.bad", [[2, 3]])), Tie("layer.bad", [[3, 4]])]
    setting.refused(ValueError, r"layer\.bad is tied twice", r"entry \(3, 0\)", ties=ties)


def test_ties_that_share_a_parameter_and_no_entry_are_taken(setting):
    element = torch.full(SHAPE, -1)
    element[2, 3] = element[4, 0] = 0
    ties = [Tie("layer.bad", [[0, 1]]), Tie("layer.bad", element), Tie("layer.bad", [[3, 5]])]
    TiedOptimizer(setting.optimizer, ties)
    assert is_tied(setting.bad, [[0, 1], [3, 5]])
    assert torch.equal(setting.bad[2, 3], setting.bad[4, 0])


# --- a shape that the parameter no longer has ---


@pytest.mark.parametrize(
    ("new", "tie", "error", "parts"),
    [
        ((8, 5), {"groups": ROWS}, ValueError, [r"Parameter: \(8, 5\)", r"Expected: +\(8,\)", r"Got: +\(7,\)"]),
        ((8, 5), {"groups": GROUPS}, ValueError, [r"Parameter: \(8, 5\)", r"Expected: +\(8,\)", r"Got: +\(7,\)"]),
        ((5, 7), {"groups": [[0, 1]], "dim": 1}, ValueError, [r"Expected: +\(7,\)", r"Got: +\(5,\)"]),
        ((7,), {"groups": [[0, 1]], "dim": 1}, IndexError, [r"Parameter: \(7,\)", "from -1 to 0", "Got: +1"]),
        ((), {"groups": ROWS}, ValueError, [r"Parameter: \(\)", r"Expected: +\(1,\)", r"Got: +\(7,\)"]),
        ((7, 4), {"groups": torch.zeros(SHAPE, dtype=torch.int64)}, ValueError, [r"Got: +\(7, 5\)"]),
    ],
    ids=["longer", "longer, of lists", "transposed", "a dimension less", "no dimension", "elements"],
)
@pytest.mark.parametrize("way", ["wrap", "retie"])
def test_labels_for_a_shape_that_the_parameter_no_longer_has_are_refused(way, new, tie, error, parts):
    good, bad = parameter(*SHAPE), parameter(*SHAPE, seed=1)
    optimizer = SGD([("good", good), ("bad", bad)], lr=0.1)
    if way == "retie":
        optimizer = TiedOptimizer(optimizer, ())
    ties = [GOOD, Tie(bad, **tie)]
    bad.data = randn(*new, seed=3)
    before = [bits(good), bits(bad), good._version, bad._version, type(optimizer).__name__, optimizer.state_dict()]
    refused(
        error,
        lambda: TiedOptimizer(optimizer, ties) if way == "wrap" else optimizer.retie(ties),
        r"\bbad\b",
        *parts,
    )
    now = [bits(good), bits(bad), good._version, bad._version, type(optimizer).__name__, optimizer.state_dict()]
    assert same_tree(now, before)


def test_a_parameter_without_a_name_is_called_by_its_position():
    setting = Setting(named=False)
    ties = [Tie(setting.bad, [[0, 1]]), Tie(setting.bad, [[1]], dim=1)]
    setting.refused(ValueError, f"({AT_POSITION}) is tied twice", ties=ties)


# --- the wording, whole ---

WHOLE = {
    "labels without data": (
        lambda: Tie(torch.zeros(3), torch.zeros(3, dtype=torch.int64, device="meta")),
        "Labels for the parameter cannot be read.\n"
        "  Expected: a dense tensor, on a device that holds its data\n"
        "  Got:      a tensor of shape (3,) and torch.int64, torch.strided, device meta",
    ),
    "sparse labels": (
        lambda: Tie(torch.zeros(3), torch.zeros(3, dtype=torch.int64).to_sparse()),
        "Labels for the parameter cannot be read.\n"
        "  Expected: a dense tensor, on a device that holds its data\n"
        "  Got:      a tensor of shape (3,) and torch.int64, torch.sparse_coo, device cpu",
    ),
    "a sparse scale": (
        lambda: Tie(torch.zeros(3), [[0, 1]], scale=torch.ones(3).to_sparse()),
        "Scales for the parameter cannot be read.\n"
        "  Expected: a dense tensor, on a device that holds its data\n"
        "  Got:      a tensor of shape (3,) and torch.float32, torch.sparse_coo, device cpu",
    ),
    "nested labels": (
        lambda: Tie(torch.zeros(3), torch.nested.nested_tensor([torch.zeros(3)], layout=torch.jagged)),
        "Labels for the parameter cannot be read.\n"
        "  Expected: a dense tensor, on a device that holds its data\n"
        "  Got:      ",
    ),
    "labels of another shape": (
        lambda: Tie(torch.zeros(3, 2), numpy.zeros(2, dtype="int64")),
        "Labels for the parameter have the wrong shape.\n"
        "  Parameter: (3, 2)\n"
        "  Expected:  (3,), one label for each slice along dimension 0, or more of the leading dimensions of (3, 2)\n"
        "  Got:       (2,) (as many as there are slices along dimension 1)",
    ),
    "labels and a scale": (
        lambda: Tie(torch.zeros(3), (torch.zeros(3, dtype=torch.int64), torch.ones(3))),
        "Groups for the parameter are labels and a scale.\n"
        "  Expected: Tie(parameter, labels, scale=scale)\n"
        "  Got:      a tensor of shape (3,) and torch.int64, and a tensor of shape (3,) and torch.float32",
    ),
    "a Tie in a Tie": (
        lambda: Tie(torch.zeros(3), Tie("weight", [[0]])),
        "Groups for the parameter are not groups.\n"
        "  Expected: a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels\n"
        "  Got:      Tie('weight', [[0]] (list)) (Tie) "
        "(a Tie goes into a list of Ties; tie_ and is_tied take its groups)",
    ),
    "an index where there is none": (
        lambda: Tie(torch.zeros(0, 2), [[0]]),
        "An index for the parameter is out of range.\n"
        "  Parameter: (0, 2)\n"
        "  Expected:  none, as there is nothing to index\n"
        "  Got:       0",
    ),
    "a parameter without a shape": (
        lambda: Tie(torch.nn.UninitializedParameter(), [[0]]),
        "This cannot be tied: the parameter.\n  Expected: a tensor, with a shape\n  Got:      UninitializedParameter "
        "(call the module once, which gives it one)",
    ),
    "no tensor": (
        lambda: tie_([1.0, 2.0], [[0, 1]]),
        "This cannot be tied: the tensor.\n  Expected: a tensor, with a shape\n  Got:      list",
    ),
    "a scale of nothing": (
        lambda: Tie(torch.zeros(2), [[0, 1]], scale=torch.tensor([1.0, INF])),
        "The scale for the parameter has a value that scales nothing.\n"
        "  Expected: finite numbers, zero or from 2**-100 to 2**100 in magnitude\n"
        "  Got:      inf at position 1",
    ),
    "slices of other shapes": (
        lambda: Tie.join(Tie(torch.zeros(2, 3), [[0]]), Tie(torch.zeros(2, 4), [[0]])),
        "Joined slices have different shapes.\n"
        "  Expected: slices of shape (3,), as in part 0 (2, 3)\n"
        "  Got:      (4,) in part 1 (2, 4)",
    ),
    "nothing to join": (
        lambda: Tie.join(),
        "Tie.join joins ties.\n  Expected: Ties, at least one\n  Got:      None (NoneType)",
    ),
    "a dim of another type": (
        lambda: Tie(torch.zeros(2, 3), [[0]], dim=1.0),
        "dim for the parameter is not an integer.\n"
        "  Parameter: (2, 3)\n"
        "  Expected:  an integer from -2 to 1\n"
        "  Got:       1.0 (float)",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_the_message_is_this_one(case):
    make, message = WHOLE[case]
    with pytest.raises((TypeError, ValueError, IndexError)) as caught:
        make()
    assert str(caught.value).startswith(message) if message.endswith(" ") else str(caught.value) == message


@pytest.mark.parametrize(
    "groups",
    [
        ([0, 1], [2]),
        (torch.tensor([0, 1]), torch.tensor([2])),
        (torch.tensor([0, 1]), torch.tensor([2, 3])),
        (torch.tensor([0, 1]),),
        (torch.tensor([0, 1]), [2, 3], [4]),
    ],
    ids=str,
)
def test_a_tuple_of_groups_is_not_taken_for_labels_and_a_scale(groups):
    (part,) = Tie(torch.zeros(5), groups).parts
    assert part.groups[0] == part.groups[1] != -1


@pytest.mark.parametrize(
    ("tie", "text"),
    [
        (lambda: Tie("weight", [[0, 1]], dim=1), "Tie('weight', [[0, 1]] (list), dim=1)"),
        (
            lambda: Tie("weight", [[0, 1]], scale=torch.ones(2)),
            "Tie('weight', [[0, 1]] (list), scale=a tensor of shape (2,) and torch.float32)",
        ),
        (
            lambda: Tie(torch.zeros(2, 2), [[0, 1]], dim=-1, scale=torch.tensor([1.0, -1.0])),
            "Tie(parameter of shape (2, 2), 1 group of 2 members, 0 free, dim=1, scaled)",
        ),
        (
            lambda: Tie.join(Tie("a", [[0]]), Tie("b", [[1]])),
            "Tie.join(Tie('a', [[0]] (list)), Tie('b', [[1]] (list)))",
        ),
        (
            lambda: Tie.join(*(Tie(name, [[0]]) for name in "abcdef")),
            "Tie.join(" + "".join(f"Tie('{name}', [[0]] (list)), " for name in "abcd") + "and 2 more)",
        ),
    ],
)
def test_a_tie_of_any_kind_says_what_it_is(tie, text):
    assert repr(tie()) == text


def test_ties_that_an_optimizer_returns_keep_the_names_of_its_parameters():
    weight, other = parameter(4, 2), parameter(4, 2, seed=1)
    given = Tie.join(Tie("fc.weight", [[0, 3]]), Tie(other, [[1]]))
    ties = TiedOptimizer(SGD([("fc.weight", weight), ("head.weight", other)]), given).ties
    text = (
        "Tie.join(Tie('fc.weight' of shape (4, 2), 1 group of 2 members, 2 free), "
        "Tie('head.weight' of shape (4, 2), 1 group of 1 member, 3 free))"
    )
    assert [repr(tie) for tie in ties] == [text]
    assert repr(Tie.join(*ties)) == text
    assert f"Tie.join({', '.join(map(repr, ties[0].parts))})" == text
    assert repr(copy.deepcopy(ties[0])) == repr(pickle.loads(pickle.dumps(ties[0]))) == text  # noqa: S301

    # A part is a named tuple.
    for part, param in zip(ties[0].parts, (weight, other), strict=True):
        assert part.param is param
        assert (part.param, part.groups, part.dim, part.scale, part.offset) == tuple(part)
    again = TiedOptimizer(SGD([other, weight]), ties)
    again.retie(ties)
    assert repr(again.ties[0]).count("parameter of shape (4, 2)") == 2
    assert all(part.param is param for part, param in zip(again.ties[0].parts, (weight, other), strict=True))


def test_what_the_user_does_to_labels_and_scale_later_changes_no_tie():
    labels, scale = torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    weight = parameter(3, 2)
    optimizer = TiedOptimizer(SGD([weight]), Tie(weight, labels, scale=scale))
    before = optimizer.state_dict()["tieopt"]
    labels[0], scale[1] = -1, 5.0
    (part,) = optimizer.ties[0].parts
    part.groups[1], part.scale[2] = -1, 3.0

    (part,) = optimizer.ties[0].parts
    assert part.groups.tolist() == [0, 0, 0]
    assert part.scale.tolist() == [1.0, -1.0, 2.0]
    assert optimizer.state_dict()["tieopt"] == before


def test_integers_are_scales():
    scale = Tie(torch.zeros(2), [[0, 1]], scale=torch.tensor([1, -1])).parts[0].scale
    assert torch.equal(scale, torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert scale.dtype == torch.float64


def test_dimensions_are_counted_from_the_end_too():
    assert [Tie(torch.zeros(2, 3), [[0, 1]], dim=dim).parts[0].dim for dim in (-2, -1, 0, 1)] == [0, 1, 0, 1]


def test_a_scale_of_ones_is_none():
    assert Tie(torch.zeros(3), [[0, 1]], scale=torch.ones(3)).parts[0].scale is None
    assert Tie(torch.zeros(3), [[0, 1]], scale=2 * torch.ones(3)).parts[0].scale.tolist() == [2.0] * 3


def test_groups_that_can_be_read_once_are_kept():
    weight = parameter(4, 2)
    tie = Tie("weight", (group for group in ([0, 1], [2, 3])))
    for _ in range(2):
        TiedOptimizer(SGD([("weight", weight)]), tie)
        assert is_tied(weight, [[0, 1], [2, 3]])
        with torch.no_grad():
            weight.copy_(randn(4, 2))
