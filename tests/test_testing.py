"""What users test their own ties with: it passes what is right, refuses what is wrong, and says why."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from random import Random
from typing import Any

import pytest
import torch
from checks import GROUPS, SHAPE, bits, parameter, randn
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from reference import groups_of_entries
from strategies import ALL, COUPLING, ENTRYWISE, REAL, TINY, NoisySGD, Recipe, normal, seeds
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adam

from tieopt import Tie, TiedOptimizer, tie_
from tieopt.testing import assert_equivalent, assert_tied, labels, scales, ties

small = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
KINDS = ("none", "signs", "zeros", "any")

# --- assert_tied ---


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(st.data())
def test_what_was_tied_passes_and_is_not_written(dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = normal(data.draw(small), dtype, data.draw(seeds))
    for part in [part for tie in data.draw(ties([tensor])) for part in tie.parts]:
        tie = Tie(tensor, part.groups, dim=part.dim, scale=part.scale)
        tie_(tensor, part.groups, dim=part.dim, scale=part.scale)
        before, version = bits(tensor), tensor._version
        assert_tied(tensor, tie)
        assert torch.equal(bits(tensor), before)
        assert tensor._version == version


@given(data=st.data(), dtype=st.sampled_from([*REAL, *TINY]))
def test_a_member_that_is_another_number_is_found(data: st.DataObject, dtype: torch.dtype) -> None:
    tensor = normal(data.draw(small), dtype, data.draw(seeds))
    part = data.draw(ties([tensor], ("none", "signs", "zeros")))[0].parts[0]
    drawn = Tie(tensor, part.groups, dim=part.dim, scale=part.scale)
    tie_(tensor, part.groups, dim=part.dim, scale=part.scale)
    for group in groups_of_entries(drawn, [tensor])[:3]:
        # One that alone is not pinned may be any number.
        several = sum(scale != 0 for _, _, scale in group) > 1
        known = [position for _, position, scale in group if several or scale == 0]
        if known:
            wrong = tensor.double()
            wrong.view(-1)[data.draw(st.sampled_from(known))] = 64.0
            with pytest.raises(AssertionError, match=r"the tensor is not tied\.(.|\n)* -?64\.0"):
                assert_tied(wrong.to(dtype), drawn)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))


def test_a_model_is_tied_by_names_and_by_parameters():
    model = layers()
    across = Tie.join(Tie("0.weight", torch.arange(4)), Tie("1.weight", torch.arange(4), dim=1))
    by_name = [across, Tie("0.bias", [[0, 3]], scale=torch.tensor([1.0, 1.0, 1.0, -1.0]))]
    by_parameter = [
        Tie.join(Tie(model[0].weight, torch.arange(4)), Tie(model[1].weight, torch.arange(4), dim=1)),
        {model[0].bias: [[0, 3]]},
    ]
    TiedOptimizer(SGD(model.named_parameters()), by_name)
    assert_tied(model, by_name)
    assert_tied(model, across)
    assert_tied(model, by_parameter[0])
    assert_tied(model, {})
    with pytest.raises(AssertionError, match=r"0\.bias is not tied"):
        assert_tied(model, by_parameter[1])
    with torch.no_grad():
        model[1].weight[2, 1] += 1
    expected, got = model[0].weight[1, 2].item(), model[1].weight[2, 1].item()
    with pytest.raises(AssertionError) as caught:
        assert_tied(model, by_name)
    assert str(caught.value) == (
        "1.weight is not tied.\n"
        f"  Expected: {expected!r} at (2, 1), as another member of its group says\n"
        f"  Got:      {got!r}"
    )


@pytest.mark.parametrize(
    ("values", "tie", "expected", "at", "got"),
    [
        ([1.0, 2.0, 1.5], [[0, 2]], "1.0", "(2,)", "1.5"),
        ([[1.0, 2.0], [3.0, 4.0]], Tie(torch.zeros(2, 2), [[0, 1]], dim=1), "1.0", "(0, 1)", "2.0"),
        ([1.0, 1.0], Tie(torch.zeros(2), [[0, 1]], scale=torch.tensor([1.0, -1.0])), "-1.0", "(1,)", "1.0"),
        ([1.0, 3.0], Tie(torch.zeros(2), [[0, 1]], scale=torch.tensor([1.0, 2.0])), "2.0", "(1,)", "3.0"),
        ([1.0, 3.0], Tie(torch.zeros(2), [[0, 1]], scale=torch.tensor([1.0, 0.0])), "0.0", "(1,)", "3.0"),
        ([1.0, float("nan")], [[0, 1]], "1.0", "(1,)", "nan"),
        ([float("nan")] * 2, [[0, 1]], "nan", "(0,)", "nan"),
        ([float("inf"), -float("inf")], [[0, 1]], "inf", "(1,)", "-inf"),
        ([1.0, 1.0 + 2**-52], [[0, 1]], "1.0", "(1,)", "1.0000000000000002"),
        ([1j, 2j], [[0, 1]], "1j", "(1,)", "2j"),
    ],
    ids=str,
)
def test_it_says_which_entry_is_not_tied(values, tie, expected, at, got):
    tensor = torch.tensor(values, dtype=torch.complex128 if 1j in values else torch.float64)
    with pytest.raises(AssertionError) as caught:
        assert_tied(tensor, tie)
    assert str(caught.value) == (
        "the tensor is not tied.\n"
        f"  Expected: {expected} at {at}, as another member of its group says\n"
        f"  Got:      {got}"
    )


def test_the_sign_of_zero_does_not_matter():
    assert_tied(torch.tensor([0.0, -0.0]), [[0, 1]])
    assert_tied(torch.tensor([0.0, 0.0]), Tie(torch.zeros(2), [[0, 1]], scale=torch.tensor([1.0, -1.0])))


def test_rows_that_share_their_memory_are_tied():
    assert_tied(torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).expand(4, 3), [[0, 1], [2, 3]])


def test_a_tie_of_several_parameters_does_not_fit_one_tensor():
    with pytest.raises((TypeError, ValueError)):
        assert_tied(torch.tensor([1.0, 1.0, 2.0]), Tie.join(Tie("a", [[0, 1]]), Tie("b", [[0, 2]])))


@pytest.mark.parametrize(
    ("ties", "error", "text"),
    [
        ({"0.wait": [[0, 1]]}, ValueError, "0.weight (4, 3), the nearest name; or one of 0.bias (4,)"),
        ({"0.weight": [[0, 4]]}, IndexError, "An index for 0.weight is out of range."),
        ([Tie("0.bias", [[0, 1]]), Tie("0.bias", [[1, 2]])], ValueError, "0.bias is tied twice."),
        (5, TypeError, "These are no ties."),
    ],
    ids=["name", "index", "overlap", "number"],
)
def test_ties_that_do_not_fit_the_model_are_another_error(ties, error, text):
    with pytest.raises(error, match=re.escape(text)):
        assert_tied(layers(), ties)


@pytest.mark.parametrize(
    ("ties", "error"),
    [([[0, 7]], IndexError), (torch.zeros(6, dtype=torch.int64), ValueError), (Tie("any", [[7]]), IndexError)],
    ids=["index", "labels", "tie"],
)
def test_ties_that_do_not_fit_the_tensor_are_another_error(ties, error):
    with pytest.raises(error, match=r"\(7, 5\)"):
        assert_tied(randn(*SHAPE), ties)


# --- assert_equivalent ---


class Autoencoder(nn.Module):
    """Has a matrix, its transpose, a square matrix and biases."""

    def __init__(self, biases: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 3, biases), nn.Linear(3, 4, biases)
        self.middle = nn.Linear(3, 3, biases)

    def forward(self, batch: Tensor) -> Tensor:
        return self.decoder(self.middle(self.encoder(batch).tanh()).sigmoid()) - batch


TRANSPOSED = Tie("middle.weight", torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]]))
ACROSS = Tie.join(Tie("encoder.weight", torch.arange(3)), Tie("decoder.weight", torch.tensor([0, 1, -1]), dim=1))
SIGNED = Tie(
    "middle.weight",
    torch.tensor([[0, 1, 2], [1, 0, 3], [2, 3, 0]]),
    scale=torch.tensor([[0.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, -1.0, 0.0]]),
)
EQUIVALENT = {
    "transposed": TRANSPOSED,
    "signed": [SIGNED, Tie("encoder.bias", [[0, 2]], scale=torch.tensor([-1.0, 1.0, 1.0]))],
    "across parameters": ACROSS,
    "across parameters, signed": Tie.join(
        Tie("encoder.weight", torch.arange(3)), Tie("decoder.weight", torch.arange(3), dim=1, scale=-torch.ones(3))
    ),
    "everything": [ACROSS, SIGNED, Tie("decoder.bias", [[0, 1, 2, 3]])],
}


def batches(count: int = 6) -> Tensor:
    return randn(count, 5, 4, seed=1, dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("recipe", ENTRYWISE, ids=repr)
@pytest.mark.parametrize("kind", EQUIVALENT)
def test_an_optimizer_that_works_entry_by_entry_follows_the_shared_values(kind, recipe, reduction):
    assert_equivalent(Autoencoder, recipe, EQUIVALENT[kind], batches(), reduction=reduction)


def refused(*args: Any, **kwargs: Any) -> dict[str, str]:
    """What the assertion says, in its parts."""
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(*args, **kwargs)
    pattern = (
        r"Tied training is not training of the shared values: step (?P<step>\d+), (?P<name>\S+)\.\n"
        r"  Expected: (?P<expected>\S+) at (?P<at>\(.*\)), to (?P<tolerance>\S+)\n"
        r"  Got:      (?P<got>\S+), which differs by (?P<difference>\S+); (?P<optimizer>\w+) (?P<why>.*)"
    )
    match = re.fullmatch(pattern, str(caught.value))
    assert match, str(caught.value)
    parts = match.groupdict()
    difference = abs(float(parts["expected"]) - float(parts["got"]))
    assert float(parts["difference"]) == pytest.approx(difference, rel=1e-2)
    assert difference > float(parts["tolerance"]) >= 1e-12
    return parts


COUPLES = "couples entries, so that it cannot follow the shared values"


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in COUPLING if not recipe.matrices and not recipe.closure], ids=repr
)
def test_an_optimizer_that_couples_entries_is_said_to_couple_them(recipe):
    ties = {"encoder.weight": [[0, 1]], "decoder.weight": [[0, 1], [2]]}
    said = refused(Autoencoder, recipe, ties, batches())
    assert said["why"] == COUPLES
    assert said["optimizer"] == recipe.optimizer.__name__
    assert said["name"] in dict(Autoencoder().named_parameters())


@pytest.mark.parametrize("recipe", [recipe for recipe in COUPLING if recipe.closure], ids=repr)
def test_an_optimizer_whose_step_length_depends_on_all_entries_is_said_to_couple_them(recipe):
    assert refused(Autoencoder, recipe, {"encoder.weight": [[0, 1]]}, batches())["why"] == COUPLES


@pytest.mark.parametrize("recipe", [recipe for recipe in COUPLING if not recipe.closure], ids=repr)
def test_a_matrix_without_free_entries_is_no_reason_for_another_error(recipe):
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(4, 3, bias=False)

    name = recipe.optimizer.__name__
    # The update of Adafactor on equal rows is that on one row.
    outcome = nullcontext() if name == "Adafactor" else pytest.raises(AssertionError, match=f"{name} couples entries")
    with outcome:
        assert_equivalent(model, recipe, {"weight": [[0, 1, 2]]}, batches())


def test_a_matrix_for_an_optimizer_of_matrices_is_no_reason_for_another_error():
    (muon,) = [recipe for recipe in COUPLING if recipe.matrices] or [pytest.skip("this torch has no Muon")]
    with pytest.raises(AssertionError, match="Muon couples entries"):
        assert_equivalent(lambda: nn.Linear(4, 3, bias=False), muon, {"weight": [[0, 1]]}, batches())


def test_what_is_frozen_is_trained_on_neither_side():
    def model() -> nn.Module:
        made = Autoencoder()
        for param in (*made.middle.parameters(), made.encoder.bias):
            param.requires_grad_(False)
        return made

    assert_equivalent(model, ENTRYWISE[7], {"encoder.weight": [[0, 1]], "middle.weight": [[0, 1]]}, batches())


class Different(nn.Module):
    """Gives the shared values another loss than the tied weights, from some step on."""

    def __init__(self, from_step: int) -> None:
        super().__init__()
        self.first, self.second = parameter(*SHAPE), parameter(*SHAPE, seed=1)
        self.from_step = from_step
        self.calls: Iterable[int] = _Counted()

    def forward(self, batch: Tensor) -> Tensor:
        call = next(self.calls)  # Each step calls twice: under ties, and on the shared values.
        factor = 1.5 if call % 2 == 1 and call // 2 + 1 >= self.from_step else 1.0
        return batch * (self.first.square().sum() + factor * self.second.square().sum())


class _Counted:
    """Numbers from 0 on, also for all its copies together."""

    def __init__(self) -> None:
        self.count = -1

    def __next__(self) -> int:
        self.count += 1
        return self.count

    def __deepcopy__(self, memo: Any) -> "_Counted":
        return self


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("recipe", [ENTRYWISE[0], ENTRYWISE[1], ENTRYWISE[7], ENTRYWISE[9]], ids=repr)
def test_it_says_at_which_step_and_in_which_parameter_they_differ(recipe, step):
    ties = {"first": GROUPS, "second": GROUPS}
    said = refused(
        lambda: Different(step), recipe, ties, torch.ones(6, 1, dtype=torch.float64), loss=lambda m, b: m(b).sum()
    )
    assert said["step"] == str(step)
    assert said["name"] == "second"
    assert said["optimizer"] == recipe.optimizer.__name__
    assert said["why"] == "works entry by entry"


def test_a_tolerance_as_large_as_the_difference_passes():
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()

    args = (lambda: Different(3), Recipe(SGD, {"lr": 1e-4}), {"first": GROUPS}, torch.ones(6, 1, dtype=torch.float64))
    largest = float(refused(*args, loss=loss)["difference"])
    assert_equivalent(*args, loss=loss, tolerance=100 * largest)
    refused(*args, loss=loss, tolerance=largest / 100)


@pytest.mark.parametrize(
    ("recipe", "passes"),
    [(Recipe(SGD, {"lr": 0.1, "momentum": 0.9}), True), (Recipe(Adam, {"lr": 0.1}), False)],
    ids=repr,
)
def test_with_multiples_only_an_update_that_is_linear_in_the_gradient_follows(recipe, passes):
    ties = Tie("encoder.weight", [[0, 1, 2]], scale=torch.tensor([1.0, 2.0, -0.5]))
    if passes:
        assert_equivalent(Autoencoder, recipe, ties, batches())
    else:
        why = "works entry by entry, but with scales other than -1, 0 and 1 it has to be linear, too"
        assert refused(Autoencoder, recipe, ties, batches())["why"] == why


def test_an_optimizer_of_which_each_side_gets_another_is_found():
    made = []

    def make(parameters: Iterable[tuple[str, Parameter]]) -> SGD:
        made.append(SGD(parameters, lr=0.1 / (1 + len(made))))
        return made[-1]

    assert refused(Autoencoder, make, TRANSPOSED, batches())["step"] == "1"


def test_only_one_model_is_made_and_the_optimizer_gets_names():
    made, names = [], []

    def model() -> nn.Module:
        made.append(Autoencoder())
        return made[-1]

    def make(parameters: Iterable[tuple[str, Parameter]]) -> SGD:
        parameters = list(parameters)
        names.append([name for name, _ in parameters])
        return SGD(parameters, lr=0.1)

    assert_equivalent(model, make, TRANSPOSED, batches(2))
    assert len(made) == 1
    assert names[0] == [name for name, _ in made[0].named_parameters()]
    assert all(param.dtype == torch.float64 for param in made[0].parameters())
    assert_tied(made[0], TRANSPOSED)


def test_ties_may_be_a_function_of_the_model_and_batches_anything_that_the_loss_takes():
    seen = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch["number"])
        return model(batch["images"]).abs().sum()

    given_batches = ({"number": number, "images": images} for number, images in enumerate(batches(3)))
    assert_equivalent(
        Autoencoder, ENTRYWISE[4], lambda model: {model.encoder.weight: [[0, 2]]}, given_batches, loss=loss
    )
    assert seen == [0, 0, 1, 1, 2, 2]


def test_a_model_that_is_wholly_tied_or_not_at_all_is_equivalent_too():
    wholly = {name: [list(range(len(param)))] for name, param in Autoencoder().named_parameters()}
    for tied in ({}, wholly):
        assert_equivalent(Autoencoder, ENTRYWISE[7], tied, batches())


def test_bad_ties_are_another_error():
    with pytest.raises(IndexError, match=r"encoder\.weight"):
        assert_equivalent(Autoencoder, ENTRYWISE[0], {"encoder.weight": [[3]]}, batches())


def test_a_value_that_is_no_number_is_a_difference():
    with pytest.raises(AssertionError, match="Got:      nan"):
        assert_equivalent(Autoencoder, ENTRYWISE[0], TRANSPOSED, [torch.full((2, 4), float("nan")).double()])


# --- the strategies ---


@given(data=st.data(), shape=small | st.just((0, 2)) | st.just((40,)))
def test_drawn_labels_are_labels(data: st.DataObject, shape: tuple[int, ...]) -> None:
    names = data.draw(labels(shape))
    assert names.shape == shape
    assert names.dtype == torch.int64
    assert bool((names >= -1).all())
    assert torch.equal(Tie(torch.zeros(shape), names).parts[0].groups, names)


@given(data=st.data(), count=st.integers(0, 40))
def test_a_number_stands_for_labels_of_rows(data: st.DataObject, count: int) -> None:
    assert data.draw(labels(count)).shape == (count,)


@given(data=st.data(), shape=small, kind=st.sampled_from(KINDS))
def test_drawn_scales_are_scales_of_their_kind(data: st.DataObject, shape: tuple[int, ...], kind: str) -> None:
    scale = data.draw(scales(shape, [kind]))
    if kind == "none":
        assert scale is None
        return
    assert scale.shape == shape
    size = scale.abs()
    assert bool({"signs": size == 1, "zeros": (size == 1) | (size == 0), "any": size <= 3}[kind].all())
    Tie(torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), scale=scale)


@given(data=st.data(), kinds=st.sets(st.sampled_from(KINDS), min_size=1).map(sorted))
def test_drawn_ties_share_no_entry_and_are_taken_by_an_optimizer(data: st.DataObject, kinds: list[str]) -> None:
    parameters = [
        Parameter(normal(data.draw(small), torch.float64, data.draw(seeds)))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    drawn = data.draw(ties(parameters, kinds))
    entries = [
        (number, position)
        for tie in drawn
        for group in groups_of_entries(tie, parameters)
        for number, position, _ in group
    ]
    assert len(set(entries)) == len(entries)
    optimizer = TiedOptimizer(SGD(parameters), drawn)
    assert len(optimizer.ties) == len(drawn)
    if kinds == ["none"]:
        assert all(part.scale is None for tie in drawn for part in tie.parts)


@pytest.mark.parametrize(
    "kind",
    [
        lambda drawn: len(drawn) == 2,
        lambda drawn: len(drawn[0].parts) == 2,
        lambda drawn: drawn[0].parts[0].dim == 1,
        lambda drawn: drawn[0].parts[0].groups.dim() == 2,
        lambda drawn: drawn[0].parts[0].scale is not None,
        lambda drawn: len(drawn[0].parts) == 2 and drawn[0].parts[0].dim != drawn[0].parts[1].dim,
    ],
    ids=["several", "joined", "columns", "elements", "scaled", "transposed"],
)
def test_ties_of_every_kind_are_drawn(kind: Callable[[list[Tie]], bool]) -> None:
    # Any of the kind will do, not only the simplest.
    generate = settings(max_examples=2000, phases=(Phase.generate,))
    assert find(ties([torch.zeros(3, 2), torch.zeros(2, 3)]), kind, settings=generate, random=Random(0))  # noqa: S311


# --- without hypothesis ---

BLOCKED = "import sys; sys.modules['hypothesis'] = None; import torch; from torch import nn; "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True)  # noqa: S603


@pytest.mark.slow
def test_what_needs_no_hypothesis_works_without_it():
    done = run(
        "from tieopt.testing import assert_equivalent, assert_tied;"
        "assert_tied(torch.ones(3, 2), [[0, 1]]);"
        "assert_equivalent(lambda: nn.Linear(3, 4), lambda p: torch.optim.Adam(p), {'weight': [[0, 2]]},"
        " torch.randn(3, 5, 3, dtype=torch.float64));"
        "print('equivalent')"
    )
    assert done.stdout.split() == ["equivalent"], done.stderr


@pytest.mark.slow
def test_without_hypothesis_a_strategy_says_that_it_needs_it():
    done = run("""
import tieopt.testing as t
for call in (lambda: t.labels(3), lambda: t.scales((3,)), lambda: t.ties([torch.zeros(3)])):
    try:
        call()
    except ImportError as error:
        print("hypothesis" in str(error))
""")
    assert done.stdout.split() == ["True"] * 3, done.stderr


def test_the_noise_of_an_optimizer_is_what_couples_its_entries():
    quiet = Recipe(SGD, {"lr": 0.01})
    ties = {"encoder.weight": [[0, 1, 2]]}
    assert_equivalent(Autoencoder, quiet, ties, batches())
    assert refused(Autoencoder, Recipe(NoisySGD, {"lr": 0.01}), ties, batches())["why"] == COUPLES


# --- devices ---


class Normalized(SGD):
    """Steps by gradients of norm 1, so that entries are coupled."""

    def step(self, closure: Callable[[], float]) -> None:
        with torch.enable_grad():
            closure()
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1e-3, foreach=False)
        super().step()


# What is made on the default device and meets the weights fails there.
@given(st.data())
def test_the_default_device_does_not_matter(data: st.DataObject) -> None:
    model = nn.Linear(3, 4, dtype=torch.float64, device="cpu")
    batches = torch.ones(2, 5, 3, dtype=torch.float64)
    with torch.device("meta"):
        drawn = data.draw(ties([model.weight, model.bias]))
        assert data.draw(labels((2, 9))).is_cpu
        assert data.draw(scales((2, 2), ["any"])).is_cpu
        assert_equivalent(lambda: model, lambda params: SGD(params, lr=0.1), drawn, batches)
        assert_tied(model, drawn)


def test_an_optimizer_is_said_to_couple_entries_whatever_the_default_device_is() -> None:
    model = nn.Linear(3, 4, dtype=torch.float64, device="cpu")
    batches = torch.ones(2, 5, 3, dtype=torch.float64)
    with torch.device("meta"), pytest.raises(AssertionError, match=COUPLES):
        assert_equivalent(
            lambda: model, lambda params: Normalized(params, lr=0.1), {"weight": [[0, 1, 2]]}, batches, reduction="sum"
        )
