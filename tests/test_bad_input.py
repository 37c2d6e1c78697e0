"""Bad input gets one clear error, that shows the value, the parameter and what was expected, and writes nothing.

Each case is tried with an optimizer that knows names and with one that knows only positions, and each has a
good tie before the bad one, which must not have been applied when the error comes.
"""

import copy
import re
from types import MethodType

import numpy
import pytest
import torch
from checks import GROUPS, SHAPE, bits, parameter, randn, same_tree, tied_bitwise, train
from torch.optim import SGD, AdamW
from torch.testing._internal.two_tensor import TwoTensor

import tieopt
from tieopt import Tie, TiedOptimizer, is_tied, tie_
from tieopt.tensors import overlaps

LAST = SHAPE[0] - 1
AT_POSITION = r"parameter 1 of group 0|param_groups\[0\]\['params'\]\[1\]"


class Setting:
    """A good parameter and one to be tied badly, in a bare optimizer; and what they all were at first."""

    def __init__(self, named):
        self.good, self.bad = parameter(*SHAPE), parameter(*SHAPE, seed=1)
        self.params = [self.good, self.bad]
        for seed, param in enumerate(self.params, start=10):
            param.grad = randn(*SHAPE, seed=seed)
        self.optimizer = SGD([("good", self.good), ("layer.bad", self.bad)] if named else self.params, lr=0.1)
        self.called = r"layer\.bad" if named else AT_POSITION
        self.before = self.look()

    def look(self):
        """All that an error must leave as it was."""
        optimizer = self.optimizer
        return [
            *[[bits(param), bits(param.grad), param._version, param.grad._version] for param in self.params],
            [type(optimizer).__name__, sorted(vars(optimizer)), optimizer.state_dict()],
        ]

    def refused(self, error, *parts, ties=None, groups=None, **kwargs):
        """Ties, and asserts that it is refused in one error with all the parts, and that nothing was written."""
        ties = {self.good: GROUPS, self.bad: groups} if ties is None else ties
        with pytest.raises(error) as caught:
            TiedOptimizer(self.optimizer, ties, **kwargs)
        assert_clear(caught.value, *parts)
        assert same_tree(self.look(), self.before)

        # The optimizer is as good as new.
        TiedOptimizer(self.optimizer, {self.good: GROUPS})
        train(self.optimizer, 1)
        assert tied_bitwise(self.good)


def assert_clear(error, *parts):
    message = str(error)
    assert "Expected:" in message
    assert "Got:" in message
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in\n{message}"
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__


@pytest.fixture(params=[True, False], ids=["named", "by position"])
def setting(request):
    return Setting(named=request.param)


# --- indices ---


@pytest.mark.parametrize("index", [SHAPE[0], 99, -1, -7, 2**40])
def test_an_index_out_of_range_is_refused(setting, index):
    setting.refused(
        IndexError,
        setting.called,
        r"\(7, 5\)",
        rf"from 0 to {LAST}",
        rf"Got: +{index}\b",
        groups=[[0, 1], [2, index]],
    )


@pytest.mark.parametrize(
    ("groups", "index", "where"),
    [
        ([[0, 1], [2, 2]], 2, r"\[1, 1\]"),
        ([[0, 4], [2, 4]], 4, r"\[0, 1\]"),
        ([[3], [0, 1], [5, 3]], 3, r"\[0, 2\]"),
        ((torch.tensor([0, 1]), torch.tensor([1, 2])), 1, r"\[0, 1\]"),
    ],
    ids=["twice in a group", "in two groups", "in a group of one, too", "in two tensors"],
)
def test_an_index_that_occurs_twice_is_refused(setting, groups, index, where):
    setting.refused(ValueError, setting.called, rf"Got: +{index} in groups {where}", "once", groups=groups)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0, "1.0 (float)"),
        (1.5, "1.5 (float)"),
        (float("nan"), "nan (float)"),
        (True, "True (bool)"),
        ("1", "'1' (str)"),
        (None, "None (NoneType)"),
        ([1], "[1] (list)"),
        (1j, "1j (complex)"),
        (slice(0, 2), "slice(0, 2, None) (slice)"),
    ],
    ids=str,
)
def test_an_index_that_is_no_integer_is_refused(setting, value, shown):
    setting.refused(
        TypeError, setting.called, f"Got: +{re.escape(shown)}", "list of lists of indices", groups=[[0, value]]
    )


def test_a_group_that_is_a_tensor_of_floats_is_refused(setting):
    setting.refused(TypeError, setting.called, r"Got: +0\.0 \(float\)", groups=[torch.tensor([0.0, 1.0])])


@pytest.mark.parametrize(
    ("groups", "shown"),
    [
        (3, "3 (int)"),
        (None, "None (NoneType)"),
        ([0, 1], "[0, 1] (list)"),
        ([[0, 1], 2], "[[0, 1], 2] (list)"),
        ("01", "'01' (str)"),
        (b"01", "b'01' (bytes)"),
    ],
    ids=str,
)
def test_groups_that_are_no_lists_of_lists_are_refused(setting, groups, shown):
    setting.refused(TypeError, setting.called, f"Got: +{re.escape(shown)}", "list of lists", groups=groups)


# --- labels ---


@pytest.mark.parametrize("shape", [(6,), (8,), (5,), (7, 1), (1, 7), (7, 5, 1), (0,), ()], ids=str)
def test_labels_of_the_wrong_shape_are_refused(setting, shape):
    setting.refused(
        ValueError,
        setting.called,
        r"Parameter: +\(7, 5\)",
        r"Expected: .*\(7,",
        rf"Got: .*{re.escape(str(shape))}",
        groups=torch.zeros(shape, dtype=torch.int64),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.complex64, torch.bfloat16])
def test_labels_of_the_wrong_dtype_are_refused(setting, dtype):
    setting.refused(
        TypeError, setting.called, "integer dtype", f"Got: +{dtype}", groups=torch.zeros(SHAPE[0], dtype=dtype)
    )


@pytest.mark.parametrize("value", [-2, -(2**40)])
def test_labels_below_minus_one_are_refused(setting, value):
    labels = torch.zeros(SHAPE[0], dtype=torch.int64)
    labels[3] = value
    setting.refused(ValueError, setting.called, "-1 for a free", f"Got: +{value} at position 3", groups=labels)


# --- parameters ---


def test_a_parameter_that_the_optimizer_does_not_hold_is_refused_and_those_that_it_holds_are_named(setting):
    held = [r"good \(7, 5\)", r"layer\.bad \(7, 5\)"] if "layer" in setting.called else [AT_POSITION, r"\(7, 5\)"]
    ties = {setting.good: GROUPS, parameter(4, 3): [[0, 1]]}
    setting.refused(ValueError, "does not hold", *held, r"Got: .*\(4, 3\)", ties=ties)


def test_an_equal_copy_of_a_parameter_is_not_that_parameter(setting):
    setting.refused(ValueError, "does not hold", ties={setting.good: GROUPS, copy.deepcopy(setting.bad): GROUPS})


def test_a_name_that_no_parameter_has_is_refused_and_the_names_are_listed():
    setting = Setting(named=True)
    setting.refused(
        ValueError,
        r"good \(7, 5\)",
        r"layer\.bad \(7, 5\)",
        r"Got: +'layer\.good' \(str\)",
        ties={"good": GROUPS, "layer.good": GROUPS},
    )


def test_a_name_for_an_optimizer_without_names_is_refused_and_the_way_to_names_is_told():
    Setting(named=False).refused(ValueError, r"Got: +'good' \(str\)", "named_parameters", ties={"good": GROUPS})


def test_of_very_many_parameters_only_some_are_listed():
    optimizer = SGD([parameter(2, 2) for _ in range(500)], lr=0.1)
    with pytest.raises(ValueError, match="does not hold") as caught:
        TiedOptimizer(optimizer, {parameter(4, 3): [[0, 1]]})

    assert len(str(caught.value)) < 5000
    assert "480 more" in str(caught.value)


@pytest.mark.parametrize(
    ("named", "key", "hint"),
    [
        (False, "good", r"names need an optimizer that was built from model\.named_parameters\(\)"),
        (True, "goood", "a parameter that several modules share has one name"),
        (False, torch.zeros(SHAPE), r"copies, \.data and buffers are other tensors"),
        (False, torch.nn.Linear(5, 7), r"tie its parameters, such as its \.weight"),
    ],
    ids=["name", "wrong name", "tensor", "module"],
)
def test_a_key_that_is_not_held_gets_a_hint(named, key, hint):
    Setting(named=named).refused(ValueError, "does not hold", hint, ties={key: GROUPS})


@pytest.mark.parametrize("key", [None, 3, ("good",), 1.5, torch.nn.Linear], ids=str)
def test_a_key_that_is_neither_a_parameter_nor_a_name_is_refused(setting, key):
    setting.refused((TypeError, ValueError), r"\(7, 5\)", "Got:", ties={setting.good: GROUPS, key: GROUPS})


def test_a_parameter_that_is_tied_twice_is_refused(setting):
    ties = [Tie(setting.good, GROUPS), Tie(setting.bad, [[0, 1]]), Tie(setting.bad, [[2, 3], [4, 1]])]
    both = (r"entry \(1, 0\) in 1 group of 2 members, 5 free", "and in 2 groups of 4 members in all, 3 free")
    setting.refused(ValueError, setting.called, "tied twice", "share no entry", *both, ties=ties)


def test_a_parameter_that_is_tied_as_itself_and_by_its_name_is_refused():
    setting = Setting(named=True)
    setting.refused(ValueError, setting.called, "tied twice", ties={setting.bad: [[0, 1]], "layer.bad": [[1, 3]]})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_a_parameter_that_has_no_mean_is_refused(dtype):
    whole = torch.nn.Parameter(torch.zeros(4, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match="floating or complex") as caught:
        TiedOptimizer(SGD([whole], lr=0.1), {whole: [[0, 1]]})
    assert_clear(caught.value, f"Got: +{dtype}")


@pytest.mark.parametrize(
    "make",
    [lambda: randn(1, 5).expand(7, 5), lambda: randn(7, 5).to_sparse(), lambda: randn(7, 5).to_sparse_csr()],
    ids=["expanded", "sparse COO", "sparse CSR"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_parameter_that_cannot_be_written_row_by_row_is_refused_before_a_good_one_is_written(make):
    good, bad = parameter(*SHAPE), torch.nn.Parameter(make())
    optimizer = SGD([good, bad], lr=0.1)
    before = bits(good)
    with pytest.raises((TypeError, ValueError)) as caught:
        TiedOptimizer(optimizer, {good: GROUPS, bad: GROUPS})

    assert torch.equal(bits(good), before)
    assert type(optimizer) is SGD
    assert_clear(caught.value, AT_POSITION)


# --- optimizers ---


@pytest.mark.parametrize(
    "value",
    [None, 3, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).parameters(), SGD, torch.zeros(2)],
    ids=["None", "int", "module", "parameters", "class", "tensor"],
)
def test_what_is_no_optimizer_is_refused(value):
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer") as caught:
        TiedOptimizer(value, {})
    assert_clear(caught.value, rf"Got: .*{'shape' if isinstance(value, torch.Tensor) else type(value).__name__}")


def test_an_optimizer_that_is_tied_already_is_refused_and_stays_as_it_is():
    weight, other = parameter(*SHAPE), parameter(*SHAPE, seed=1)
    optimizer = TiedOptimizer(AdamW([weight, other]), {weight: GROUPS})
    train(optimizer, 1)
    before = [bits(weight), bits(other), optimizer.state_dict()]

    with pytest.raises(TypeError, match="tied already") as caught:
        TiedOptimizer(optimizer, {other: GROUPS})

    assert_clear(caught.value, "TiedAdamW", r"optimizer\.retie\(ties\)", "at once")
    assert same_tree([bits(weight), bits(other), optimizer.state_dict()], before)
    assert len(optimizer.ties) == 1


def replace_step(optimizer):
    """What some hosts do to an instance."""

    def step(self, closure=None):
        self.replaced = True
        return SGD.step(self, closure)

    optimizer.step = MethodType(step, optimizer)


def test_an_optimizer_whose_step_was_replaced_on_the_instance_is_refused():
    setting = Setting(named=True)
    replace_step(setting.optimizer)
    with pytest.raises(TypeError, match="step") as caught:
        TiedOptimizer(setting.optimizer, {setting.good: GROUPS})

    assert_clear(caught.value, "SGD", "replaced")
    assert torch.equal(bits(setting.good), setting.before[0][0])
    train(setting.optimizer, 1)
    assert setting.optimizer.replaced


def test_a_step_that_was_replaced_on_the_instance_is_not_lost_below_a_scheduler():
    setting = Setting(named=True)
    replace_step(setting.optimizer)
    torch.optim.lr_scheduler.StepLR(setting.optimizer, 1)
    with pytest.raises(TypeError, match="step"):
        TiedOptimizer(setting.optimizer, {setting.good: GROUPS})

    train(setting.optimizer, 1)
    assert setting.optimizer.replaced


# --- the reduction, and the ties as a whole ---


@pytest.mark.parametrize("reduction", ["max", "Mean", "", None, 1, b"mean"])
def test_an_unknown_reduction_is_refused(setting, reduction):
    setting.refused(
        ValueError,
        "'mean'",
        "'sum'",
        rf"Got: +{re.escape(repr(reduction))} \({type(reduction).__name__}\)",
        ties={setting.good: GROUPS},
        reduction=reduction,
    )


@pytest.mark.parametrize(
    ("ties", "shown"),
    [
        (None, "None"),
        (3, "3"),
        ("good", "'good'"),
        ([[0, 1], [2, 3]], r"\[0, 1\]"),
        (torch.zeros(7, dtype=torch.int64), r"shape \(7,\)"),
        ([("good", [[0, 1]])], r"\('good', \[\[0, 1\]\]\)"),
    ],
    ids=["None", "int", "name", "groups", "labels", "pairs"],
)
def test_ties_that_are_no_mapping_and_no_ties_are_refused(setting, ties, shown):
    with pytest.raises(TypeError) as caught:
        TiedOptimizer(setting.optimizer, ties)
    assert_clear(caught.value, "mapping", f"Got: .*{shown}")
    assert same_tree(setting.look(), setting.before)


@pytest.mark.parametrize("param", [None, 3, [1.0], torch.nn.Linear], ids=str)
def test_a_tie_of_what_is_no_parameter_is_refused(param):
    with pytest.raises(TypeError, match="tensor, or the name") as caught:
        Tie(param, GROUPS)
    assert_clear(caught.value, rf"Got: .*{re.escape(repr(param)[:10])}")


def test_a_tie_is_checked_where_it_is_made():
    with pytest.raises(IndexError, match=r"Got: +7"):
        Tie(parameter(*SHAPE), [[0, 7]])


def test_the_groups_of_a_name_are_checked_when_the_optimizer_is_tied():
    setting = Setting(named=True)
    setting.refused(
        IndexError, setting.called, r"\(7, 5\)", "Got: +7", ties=[Tie("good", GROUPS), Tie("layer.bad", [[7]])]
    )


@pytest.mark.parametrize("function", [tie_, is_tied])
@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ([[0, 7]], IndexError),
        ([[0, 1], [1, 2]], ValueError),
        ([[0, 1.5]], TypeError),
        (torch.zeros(6, dtype=torch.int64), ValueError),
        (torch.zeros(7), TypeError),
        (5, TypeError),
    ],
    ids=["out of range", "twice", "float", "shape", "dtype", "no groups"],
)
def test_the_functions_refuse_the_same_and_write_nothing(function, groups, error):
    tensor = randn(*SHAPE)
    with pytest.raises(error) as caught:
        function(tensor, groups)

    assert_clear(caught.value)
    assert torch.equal(bits(tensor), bits(randn(*SHAPE)))


# --- states ---


def trained(ties=GROUPS, named=False, other_ties=None):
    weight, other = parameter(*SHAPE), parameter(*SHAPE, seed=1)
    params = [("layer.weight", weight), ("other", other)] if named else [weight, other]
    optimizer = TiedOptimizer(AdamW(params), {weight: ties} | ({other: other_ties} if other_ties else {}))
    train(optimizer, 2)
    return optimizer


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "saved",
    [{"ties": [[0, 3], [1, 6]]}, {"ties": [[0, 3, 5, 1, 6]]}, {"ties": []}],
    ids=["a member less", "one group", "no groups"],
)
def test_a_state_that_was_saved_with_other_ties_is_refused_and_nothing_is_loaded(named, saved):
    optimizer, state = trained(named=named), trained(named=named, **saved).state_dict()
    state["param_groups"][0]["lr"] = 99.0
    before, given = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(state)

    with pytest.raises(ValueError, match="other ties") as caught:
        optimizer.load_state_dict(state)

    called = r"layer\.weight" if named else AT_POSITION.replace("1 of", "0 of").replace(r"\[1\]", r"\[0\]")
    assert_clear(caught.value, called, "Expected: +2 groups of 5 members, 2 free", "Got: +[0-9n]")
    assert same_tree(optimizer.state_dict(), before)
    assert same_tree(state, given)
    assert optimizer.param_groups[0]["lr"] != 99.0


def test_a_state_with_ties_of_another_parameter_is_refused_either_way():
    one, two = trained(named=True), trained(named=True, other_ties=[[0, 1]])
    for optimizer, state, expected, got in ((one, two, "no ties", "1 group"), (two, one, "1 group", "no ties")):
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="other ties") as caught:
            optimizer.load_state_dict(state.state_dict())

        assert_clear(caught.value, "other", f"Expected: +{expected}", f"Got: +{got}")
        assert same_tree(optimizer.state_dict(), before)


def test_a_state_with_as_many_groups_and_members_but_others_is_refused():
    optimizer = trained()
    with pytest.raises(ValueError, match="other ties"):
        optimizer.load_state_dict(trained([[0, 3, 4], [1, 6]]).state_dict())


def test_the_order_and_the_names_of_groups_do_not_matter_to_a_state():
    optimizer = trained([[6, 1], [5, 0, 3]])
    labels = torch.tensor([9, 4, -1, 9, -1, 9, 4])

    optimizer.load_state_dict(trained().state_dict())
    optimizer.load_state_dict(trained(labels).state_dict())


@pytest.mark.parametrize("ties", [5, None, "x", [1]])
def test_a_state_whose_ties_are_nothing_that_was_ever_saved_is_refused(ties):
    optimizer = trained()
    state = {**optimizer.state_dict(), "tieopt": ties}
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError)) as caught:
        optimizer.load_state_dict(state)

    assert_clear(caught.value)
    assert same_tree(optimizer.state_dict(), before)


# --- a parameter whose shape changed ---

CHANGES = {
    "assigned data": lambda optimizer, param: setattr(param, "data", randn(8, 5)),
    "another parameter": lambda optimizer, param: optimizer.param_groups[0]["params"].__setitem__(1, parameter(8, 5)),
    "a transposed parameter": lambda optimizer, param: setattr(param, "data", param.data.t().contiguous()),
}
USES = {
    "step": lambda optimizer: optimizer.step(),
    "step with a closure": lambda optimizer: optimizer.step(lambda: 0.0),
    "tie_gradients": lambda optimizer: optimizer.tie_gradients(),
    "grad_norm": lambda optimizer: optimizer.grad_norm(),
    "clip_grad_norm_": lambda optimizer: optimizer.clip_grad_norm_(1e-3),
    "tie_weights": lambda optimizer: optimizer.tie_weights(),
    "tie_drift": lambda optimizer: optimizer.tie_drift(),
    "tie_summary": lambda optimizer: optimizer.tie_summary(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use", USES)
def test_a_parameter_whose_shape_changed_since_is_refused_and_nothing_is_written(setting, change, use):
    optimizer = TiedOptimizer(setting.optimizer, {setting.good: GROUPS, setting.bad: GROUPS})
    for param in setting.params:
        param.grad = None
    with torch.no_grad():
        CHANGES[change](optimizer, setting.bad)
        setting.good.copy_(randn(*SHAPE, seed=3))
    for param in optimizer.param_groups[0]["params"]:
        param.grad = randn(*param.shape, seed=4)
    params = list(optimizer.param_groups[0]["params"])
    before = [[bits(param), bits(param.grad)] for param in params]

    with pytest.raises(RuntimeError, match="shape") as caught:
        USES[use](optimizer)

    changed = r"\(5, 7\)" if "transposed" in change else r"\(8, 5\)"
    assert_clear(caught.value, setting.called, r"Expected: .*\(7, 5\)", f"Got: .*{changed}")
    assert same_tree([[bits(param), bits(param.grad)] for param in params], before)


# --- what comes close to being right ---


@pytest.mark.parametrize(
    ("groups", "error", "shown"),
    [
        ([torch.tensor(0), torch.tensor(1)], TypeError, r"tensor\(0\)"),
        (torch.full((7,), 2**64 - 1, dtype=torch.uint64), TypeError, r"torch\.uint64"),
        (numpy.zeros(7, dtype=object), TypeError, r"object|dtype\('O'\)"),
        (numpy.zeros(7, dtype=">i8"), TypeError, r">i8"),
    ],
    ids=["single numbers as tensors", "uint64", "objects", "byte order"],
)
def test_groups_that_are_nearly_right_are_refused(setting, groups, error, shown):
    setting.refused(error, f"Got: .*{shown}", ties={setting.good: GROUPS, setting.bad: groups})


@pytest.mark.parametrize("change", ["reversed", "read-only", "int8"])
def test_labels_of_numpy_are_labels(change):
    labels = numpy.array([0, 1, 0, -1, 2, 2, 1])
    expected = torch.tensor([0, 1, 0, -1, 2, 2, 1])
    if change == "reversed":
        labels = labels[::-1].copy()[::-1]
    elif change == "read-only":
        labels.flags.writeable = False
    else:
        labels = labels.astype(numpy.int8)
    assert torch.equal(Tie(torch.zeros(7), labels).parts[0].groups, expected)


def test_a_tensor_whose_entries_overlap_in_memory_is_refused():
    tensor = torch.arange(5.0).unfold(0, 3, 1)
    with pytest.raises(ValueError, match=r"strides \(1, 1\)"):
        tie_(tensor, [[0, 2]])
    assert torch.equal(tensor, torch.arange(5.0).unfold(0, 3, 1))


@pytest.mark.parametrize("number", ["zero", -5, 99])
def test_a_fingerprint_of_a_parameter_that_there_is_not_is_refused(number):
    optimizer = trained()
    state = optimizer.state_dict()
    state["tieopt"]["ties"][number] = "1 groups"
    with pytest.raises(ValueError, match=rf"number {number}\n.*no ties\n.*1 groups"):
        optimizer.load_state_dict(state)


def test_a_parameter_that_a_host_added_without_a_name_has_its_place_for_a_name(setting):
    optimizer = SGD([("good", setting.good)], lr=0.1)
    optimizer.param_groups[0]["params"].append(setting.bad)
    with pytest.raises(IndexError, match=r"param_groups\[0\]\['params'\]\[1\]"):
        TiedOptimizer(optimizer, {setting.bad: [[0, SHAPE[0]]]})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_dtype_without_means_is_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        tie_(torch.zeros(3, 2, dtype=dtype), [[0, 1]])


def test_a_parameter_without_data_is_refused(setting):
    bad = torch.nn.Parameter(torch.zeros(*SHAPE, device="meta"))
    optimizer, before = SGD([setting.good, bad], lr=0.1), bits(setting.good)
    with pytest.raises(TypeError, match="device meta"):
        TiedOptimizer(optimizer, {setting.good: GROUPS, bad: GROUPS})
    assert torch.equal(bits(setting.good), before)


def test_a_tie_says_what_it_is():
    assert repr(Tie("layer.bad", GROUPS)) == f"Tie('layer.bad', {GROUPS} (list))"
    assert (
        repr(Tie(torch.zeros(7, 5), GROUPS)) == "Tie(parameter of shape (7, 5), 2 groups of 5 members in all, 2 free)"
    )


# --- the wording, whole ---


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        (
            lambda: Tie(3, GROUPS),
            "A tie needs a parameter.\n  Expected: a tensor, or the name of a parameter\n  Got:      3 (int)",
        ),
        (
            lambda: Tie(torch.zeros(3), [0, 0, 1]),
            "Groups for the parameter are not groups.\n"
            "  Expected: a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels\n"
            "  Got:      [0, 0, 1] (list) (labels go into a tensor: torch.tensor(labels))",
        ),
        (
            lambda: Tie(torch.zeros(3), 5),
            "Groups for the parameter are not groups.\n"
            "  Expected: a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels\n"
            "  Got:      5 (int)",
        ),
        (
            lambda: Tie(torch.zeros(3), [[0, 1], [1, 2]]),
            "An index for the parameter occurs more than once.\n"
            "  Expected: each index in one group, once\n"
            "  Got:      1 in groups [0, 1]",
        ),
        (
            lambda: Tie(torch.zeros(3), numpy.zeros(3, dtype=">i4")),
            "Labels for the parameter have the wrong dtype.\n"
            "  Expected: an integer dtype, in the byte order of this machine\n"
            "  Got:      dtype('>i4')",
        ),
        (
            lambda: Tie(torch.zeros(3), numpy.zeros(3)),
            "Labels for the parameter have the wrong dtype.\n"
            "  Expected: an integer dtype that fits into int64\n"
            "  Got:      torch.float64",
        ),
        (
            lambda: Tie(torch.zeros(3, dtype=torch.int32), [[0, 1]]),
            "This cannot be tied: the parameter of shape (3,).\n"
            "  Expected: a dense tensor of a floating or complex dtype, on a device that holds its data\n"
            "  Got:      torch.int32, torch.strided, device cpu "
            "(tie and train the floating weights, and quantise them afterwards)",
        ),
        (
            lambda: Tie(torch.zeros(3), "x" * 78),
            "Groups for the parameter are not groups.\n"
            "  Expected: a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels\n"
            f"  Got:      '{'x' * 78}' (str)",
        ),
        (
            lambda: Tie(torch.zeros(3), "x" * 79),
            "Groups for the parameter are not groups.\n"
            "  Expected: a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels\n"
            f"  Got:      '{'x' * 76}... (str)",
        ),
    ],
    ids=[
        "no parameter",
        "flat labels",
        "a number",
        "twice",
        "byte order",
        "floats of NumPy",
        "integers",
        "just short enough",
        "too long",
    ],
)
def test_errors_say_exactly(tie, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        tie()
    assert str(caught.value) == message


def test_a_tie_of_nothing_says_so():
    assert repr(Tie(torch.zeros(0, 2), [])) == "Tie(parameter of shape (0, 2), no groups, 0 free)"


def test_a_group_of_one_member_is_no_other_tie_to_a_state():
    def optimizer_with(groups):
        weight = parameter(*SHAPE)
        return TiedOptimizer(SGD([weight], lr=0.1), {weight: groups})

    saved = optimizer_with([[0, 1], [2], [3, 4]]).state_dict()
    optimizer_with([[3, 4], [0, 1]]).load_state_dict(saved)
    with pytest.raises(ValueError, match="saved with other ties"):
        optimizer_with([[0, 1], [2, 5], [3, 4]]).load_state_dict(saved)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 3), False),
        ((3, 4), (9, 2), False),
        ((3, 4), (3, 1), True),
        ((3, 4), (4, 0), True),
        ((3, 1), (1, 0), False),
        ((3, 1, 2), (2, 0, 1), False),
        ((2, 3, 4), (12, 4, 1), False),
        ((2, 3, 4), (11, 4, 1), True),
        ((2, 3, 4), (1, 2, 6), False),
        ((2, 3, 4), (1, 2, 5), True),
        ((0, 3), (3, 1), False),
    ],
)
def test_entries_that_share_memory_are_found(shape, strides, expected):
    assert overlaps(torch.zeros(64).as_strided(shape, strides)) == expected


# --- what to do, in the error ---

LAYERS = [f"layers.{number}.{name}" for number in range(40) for name in ("attn.qkv.weight", "fc.weight", "fc.bias")]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("layers.31.attn.qvk.weight", "layers.31.attn.qkv.weight"),
        ("Layers.7.FC.weight", "layers.7.fc.weight"),
        ("module.layers.38.fc.bias", "layers.38.fc.bias"),
        ("39.fc.bias", "layers.39.fc.bias"),
        ("layer.12.fc.weight", "layers.12.fc.weight"),
        ("backbone.encoder.block.qkv.weight", "layers.0.attn.qkv.weight"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest_ones_before_the_list_is_cut(wrong, nearest):
    optimizer = SGD([(name, parameter(2, 2)) for name in LAYERS], lr=0.1)
    with pytest.raises(ValueError, match="does not hold") as caught:
        TiedOptimizer(optimizer, {wrong: [[0, 1]]})
    assert_clear(
        caught.value, rf"Expected: {re.escape(nearest)} \(2, 2\)[^;]*, the nearest names?; or one of layers\.0\."
    )
    assert "97 more" in str(caught.value)


def test_a_name_that_resembles_none_is_answered_with_the_list():
    Setting(named=True).refused(ValueError, r"Expected: one of good \(7, 5\), layer\.bad", ties={"xyz": GROUPS})


def test_parameters_of_the_shape_of_a_stranger_come_first():
    optimizer = SGD([("a", parameter(2)), ("b", parameter(4, 3)), ("c", parameter(2))], lr=0.1)
    with pytest.raises(ValueError, match="does not hold") as caught:
        TiedOptimizer(optimizer, {parameter(4, 3): [[0, 1]]})
    assert_clear(caught.value, r"Expected: b \(4, 3\), of the same shape; or one of a \(2,\), c \(2,\)\n")


def test_the_parameters_of_a_module_are_named():
    layer = torch.nn.Linear(5, 7)
    optimizer = SGD([("in.weight", parameter(7, 5)), *((f"out.{name}", one) for name, one in layer.named_parameters())])
    with pytest.raises(ValueError, match="does not hold") as caught:
        TiedOptimizer(optimizer, {layer: GROUPS})
    assert_clear(
        caught.value, r"Expected: out\.weight \(7, 5\) or out\.bias \(7,\), of this module; or one of in\.weight"
    )


@pytest.mark.parametrize("named", [True, False])
def test_a_tie_across_two_optimizers_is_told_the_rule_and_what_to_do(named):
    matrix, other = parameter(*SHAPE), parameter(*SHAPE, seed=1)
    first = SGD([("matrix", matrix)] if named else [matrix], lr=0.1)
    SGD([other], lr=0.1)
    with pytest.raises(ValueError, match="does not hold") as caught:
        TiedOptimizer(first, Tie.join(Tie(matrix, GROUPS), Tie(other, GROUPS)))
    assert_clear(
        caught.value, "in no parameter group", "One optimizer has to hold all members of a tie", "add_param_group"
    )

    first.add_param_group({"params": [("other", other)] if named else [other]})
    TiedOptimizer(first, Tie.join(Tie(matrix, GROUPS), Tie(other, GROUPS)))
    assert torch.equal(matrix[0], other[0])


def test_a_model_is_not_told_of_optimizers():
    with pytest.raises(ValueError, match="the model does not hold") as caught:
        tieopt.testing.assert_tied(torch.nn.Linear(2, 3), {"wieght": [[0, 1]]})
    assert_clear(caught.value, r"Expected: weight \(3, 2\), the nearest name")
    assert "optimizer" not in str(caught.value)


def test_a_module_in_the_place_of_a_parameter_is_told_of_its_parameters():
    with pytest.raises(TypeError, match=r"tie its parameters, such as its \.weight"):
        Tie(torch.nn.Linear(2, 3), [[0, 1]])


def test_a_changed_shape_is_told_of_retie():
    weight = parameter(*SHAPE)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS})
    weight.data = randn(8, 5)
    with pytest.raises(RuntimeError, match=r"call retie\(\) with ties that fit it, or untie\(\)"):
        optimizer.tie_weights()
    optimizer.retie({weight: [[0, 7]]})
    assert is_tied(weight, [[0, 7]])


def test_a_state_with_other_ties_is_told_how_to_change_them():
    optimizer, state = trained([[0, 1]]), trained([[2, 3]]).state_dict()
    with pytest.raises(ValueError, match=r"tie as when it was saved, load the state, and then call retie\(\)"):
        optimizer.load_state_dict(state)


# --- classes of tensors that replace torch's operators ---


class Quantised(torch.Tensor):
    """Whole numbers and one scale, as weights that are quantised are stored; read by writing them out."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.numbers, self.size = (values * 10).round().to(torch.int8), 0.1

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].numbers * args[0].size)
        plain = (one.numbers * one.size if isinstance(one, cls) else one for one in args)
        return function(*plain, **(kwargs or {}))


@pytest.mark.parametrize("function", [tie_, is_tied, Tie])
def test_a_tensor_whose_entries_cannot_be_written_is_refused_with_the_way(function):
    with pytest.raises(TypeError, match="cannot be tied") as caught:
        function(Quantised(randn(*SHAPE)), GROUPS)
    assert_clear(caught.value, "tie and train the weights as they are before they are quantised", "Got: +Quantised of")


@pytest.mark.parametrize("shape", [(7,), (7, 5), (7, 2, 3)])
def test_a_class_that_passes_everything_on_is_tied(shape):
    weight = torch.nn.Parameter(TwoTensor(randn(*shape), randn(*shape, seed=1)))
    TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS})
    assert is_tied(weight.a, GROUPS)
    assert is_tied(weight.b, GROUPS)


@pytest.mark.parametrize(
    ("tensor", "way"),
    [
        (torch.zeros(4, 2, device="meta"), r"give it data first, as module\.to_empty\(device=\.\.\.\) does"),
        (torch.zeros(4, 2).to_sparse(), r"to_dense\(\) makes it dense"),
        (torch.nn.UninitializedParameter(), "call the module once"),
    ],
    ids=["meta", "sparse", "lazy"],
)
def test_what_cannot_be_tied_as_it_is_is_told_the_way(tensor, way):
    with pytest.raises((TypeError, ValueError), match="tie") as caught:
        Tie(tensor, [[0, 1]])
    assert_clear(caught.value, way)


def test_parameters_may_be_lazy_if_they_are_not_tied(compact):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LazyLinear(2))
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), {model[0].weight: GROUPS}, compact=compact)
    model(randn(3, 5)).sum().backward()
    optimizer.step()
    assert is_tied(model[0].weight, GROUPS)


def test_integer_weights_are_told_to_be_tied_before_they_are_quantised():
    weight = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="tie and train the floating weights, and quantise them afterwards"):
        TiedOptimizer(SGD([weight], lr=0.1), {weight: [[0, 1]]})
