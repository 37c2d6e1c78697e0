"""Whole parameters that are equal, given as parameters, as modules, or by names with wildcards."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import randn
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from tieopt import Tie, TiedOptimizer, frozen, plot


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class Model(nn.Module):
    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.Sequential(*(Layer() for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.layers(self.encoder(x)))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def tied(model: nn.Module, ties: Any, **options: Any) -> TiedOptimizer:
    return TiedOptimizer(SGD(model.named_parameters(), lr=0.1), ties, **options)


def names(model: nn.Module, ties: Any) -> list[set[str]]:
    """The names of the parameters that each tie joins."""
    known = {param: name for name, param in model.named_parameters()}
    return [{known[part.param] for part in tie.parts} for tie in tied(model, ties).ties]


CODERS = [{f"{side}.{kind}" for side in ("encoder", "decoder")} for kind in ("weight", "bias")]
MIDDLE = [f"layers.{layer}.ffn" for layer in (2, 3, 4)]


@pytest.mark.parametrize(
    ("equal", "expected"),
    [
        (["encoder.weight", "decoder.weight"], [{"encoder.weight", "decoder.weight"}]),
        (["encoder.*", "decoder.*"], CODERS),
        (["layers.[2-4].ffn.*.weight"], [{f"{ffn}.{number}.weight" for ffn in MIDDLE} for number in (0, 2)]),
        (["layers.[!0156].ffn.0.bias"], [{f"{ffn}.0.bias" for ffn in MIDDLE}]),
        (["layers.?.norm.bias"], [{f"layers.{layer}.norm.bias" for layer in range(6)}]),
        (
            ["layers.*.*"],
            [{f"layers.{layer}.{name}" for layer in range(6)} for name, _ in Layer().named_parameters()],
        ),
        (["*coder.weight"], [{"encoder.weight", "decoder.weight"}]),
        (
            ["layers.0.*.bias", "layers.5.*.bias"],
            [{f"layers.{layer}.{name}.bias" for layer in (0, 5)} for name in ("ffn.0", "ffn.2", "norm")],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_names_that_differ_in_wildcards_are_counterparts(
    model: Model, equal: list[str], expected: list[set[str]]
) -> None:
    assert names(model, Tie.equal(*equal)) == expected


def test_parameters_and_modules_are_taken_as_names_are(model: Model) -> None:
    assert names(model, Tie.equal(model.encoder, model.decoder)) == CODERS
    assert names(model, Tie.equal(model.encoder, "decoder.*")) == CODERS
    for first, second in [("encoder.weight", model.decoder.weight), (model.encoder.weight, model.decoder.weight)]:
        assert names(model, [Tie.equal(first, second)]) == CODERS[:1]
    assert names(model, Tie.equal(*model.layers)) == names(model, Tie.equal("layers.*.*"))


def test_a_parameter_of_this_very_name_is_meant_itself() -> None:
    model = nn.ParameterDict({"w[0]": randn(2, 3), "w0": randn(2, 3), "w1": randn(2, 3)})
    assert names(model, Tie.equal("w[0]", "w1")) == [{"w[0]", "w1"}]
    assert names(model, Tie.equal("w[01]")) == [{"w0", "w1"}]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_training_is_that_of_modules_that_share_their_parameters(model: Model, reduction: str, compact: bool) -> None:
    shared = copy.deepcopy(model)
    for layer in (3, 4):
        shared.layers[layer] = shared.layers[2]
    optimizers = [
        TiedOptimizer(
            AdamW(model.named_parameters(), lr=0.01, eps=1e-12),
            Tie.equal("layers.[2-4].*"),
            start="first",
            reduction=reduction,
            compact=compact,
        ),
        AdamW(shared.parameters(), lr=0.01, eps=1e-12),
    ]
    for step in range(5):
        x = randn(7, 4, seed=step).double()
        for one, optimizer in zip((model, shared), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
        for param, other in zip(model.layers[2].parameters(), model.layers[4].parameters(), strict=True):
            assert torch.equal(param, other)
        for (name, param), (_, other) in zip(
            model.named_parameters(), copy.deepcopy(shared).named_parameters(remove_duplicate=False), strict=True
        ):
            torch.testing.assert_close(param, other, rtol=1e-9, atol=1e-9, msg=name)


def test_a_parameter_that_modules_share_counts_once(model: Model) -> None:
    model.decoder.weight = model.encoder.weight
    assert names(model, Tie.equal(model.encoder, model.decoder)) == [{"encoder.bias", "decoder.bias"}]
    assert names(model, Tie.equal(model.encoder.bias, "encoder.bias", "decoder.bias")) == [
        {"encoder.bias", "decoder.bias"}
    ]


def test_keys_with_wildcards_tie_each_parameter_for_itself(model: Model) -> None:
    optimizer = tied(model, {"layers.*.norm.*": [[0, 3]], "layers.[01].ffn.0.weight": [[1, 2], [3, 5]]})
    assert len(optimizer.ties) == 6 * 2 + 2
    assert all(len(tie.parts) == 1 for tie in optimizer.ties)
    first, second = (model.layers[layer].ffn[0].weight for layer in (0, 1))
    assert torch.equal(first[3], first[5])
    assert torch.equal(second[3], second[5])
    assert not torch.equal(first[3], second[3])


@pytest.mark.parametrize(
    "groups",
    [lambda: iter([[0, 1], [2, 3]]), lambda: [iter([0, 1]), iter([2, 3])], lambda: (range(k, k + 2) for k in (0, 2))],
    ids=["iterator", "list of iterators", "generator"],
)
@pytest.mark.parametrize("make", [lambda name, groups: {name: groups}, Tie], ids=["mapping", "Tie"])
def test_iterators_of_groups_are_read_for_each_parameter(
    model: Model, make: Callable[[str, Any], Any], groups: Callable[[], Any]
) -> None:
    optimizer = TiedOptimizer(SGD(model.named_parameters()), make("layers.*.ffn.0.bias", groups()))
    assert [tie.parts[0].groups.tolist() for tie in optimizer.ties] == [[0, 0, 1, 1, -1, -1]] * 6


def test_a_name_of_several_parameters_is_refused() -> None:
    first, second = (nn.Linear(2, 4) for _ in range(2))
    inner = SGD([{"params": list(module.named_parameters())} for module in (first, second)])
    for ties in ({"weight": [[0, 1]]}, {"w*": [[0, 1]]}, Tie.equal("weight", second.weight)):
        with pytest.raises(ValueError, match='Several parameters have the name "weight"'):
            TiedOptimizer(inner, ties)
    assert len(TiedOptimizer(inner, {first.weight: [[0, 1]], second.weight: [[0, 1]]}).ties) == 2


def test_other_ties_take_wildcards_as_well(model: Model) -> None:
    before = model.encoder.weight.detach().clone()
    joined = Tie.join(Tie("encoder.*", [[0, 1]]), Tie("decoder.*", [[2]]))
    optimizer = tied(model, [joined, frozen("*coder.weight", [3]), Tie("layers.?.ffn.2.weight", [[0, 1]], dim=1)])
    assert len(optimizer.ties) == 2 + 2 + 6
    assert torch.equal(model.encoder.bias[0], model.decoder.bias[2])
    assert torch.equal(model.encoder.weight[1], model.decoder.weight[2])
    assert torch.equal(model.encoder.weight[3], before[3])
    assert torch.equal(model.layers[5].ffn[2].weight[:, 0], model.layers[5].ffn[2].weight[:, 1])


def test_a_tie_is_plain_data(model: Model) -> None:
    tie = Tie.equal("encoder.*", "decoder.*")
    for copied in (copy.deepcopy(tie), pickle.loads(pickle.dumps(tie))):  # noqa: S301
        assert repr(copied) == "Tie.equal('encoder.*', 'decoder.*')"
        assert names(model, copied) == CODERS
    assert repr(Tie.equal(nn.Linear(2, 2), nn.Linear(2, 2))).startswith("Tie.equal(Linear(in_features=2,")
    assert repr(Tie.equal("a", model.encoder.bias)) == "Tie.equal('a', a tensor of shape (4,) and torch.float64)"


def test_modules_without_data_are_found_once_they_have_it() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(3))
    tie = Tie.equal(*model)
    model[0](randn(2, 4)), model[1](randn(2, 4))
    tied(model, tie)
    assert torch.equal(model[0].weight, model[1].weight)


def bind(ties: Any) -> Callable[[], object]:
    torch.manual_seed(0)
    return lambda: tied(Model(), ties)


NEITHER_NAME = "Tie.equal joins parameters.\n  Expected: parameters, names of parameters, or modules\n  Got:      "
NOTHING = (
    "Tie.equal has nothing to join.\n"
    "  Expected: two parameters or more; all that a single name matches have to differ in its first wildcard\n"
    "  Got:      "
)
SHAPES = "Parameters that are to be equal differ in shape.\n  Expected: parameters of one shape\n  Got:      "
LONELY = (
    "Parameters of one tie have no counterparts.\n"
    "  Expected: wildcards that stand for the same texts in each name, or the same parameters in each module\n"
    "  Got:      "
)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Tie.equal(), TypeError, NEITHER_NAME + "None (NoneType)"),
        (lambda: Tie.equal(["a", "b"]), TypeError, "(Tie.equal(*params) takes those of a list)"),
        (lambda: Tie.equal(3), TypeError, NEITHER_NAME + "3 (int)"),
        (lambda: Tie.equal(nn.Linear(3, 4)), ValueError, NOTHING + "weight (4, 3), bias (4,) alone"),
        (lambda: Tie.equal(nn.ReLU(), nn.ReLU()), ValueError, NOTHING + "modules without parameters"),
        (lambda: Tie.equal(*[torch.zeros(2, 3)] * 2), ValueError, NOTHING + "a parameter (2, 3) alone"),
        (
            lambda: Tie.equal(nn.Linear(3, 4), nn.Linear(4, 3)),
            ValueError,
            SHAPES + "weight (4, 3), weight (3, 4)",
        ),
        (
            lambda: Tie.equal(nn.Linear(3, 4), nn.Linear(3, 4, bias=False)),
            ValueError,
            LONELY + "bias (4,) without a counterpart",
        ),
        (lambda: Tie.equal(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)), TypeError, "int64"),
        (bind(Tie.equal("encoder.weight")), ValueError, NOTHING + "encoder.weight (4, 4) alone"),
        (
            bind(Tie.equal("layers.[2-2].ffn.*.bias")),
            ValueError,
            NOTHING + "layers.2.ffn.0.bias (6,), layers.2.ffn.2.bias (4,) alone",
        ),
        (
            bind(Tie.equal("layers.*.weight")),
            ValueError,
            SHAPES + "layers.0.ffn.0.weight (6, 4), layers.0.ffn.2.weight (4, 6), layers.0.norm.weight (4,)",
        ),
        (
            bind(Tie.equal("encoder.*", "decoder.weight")),
            ValueError,
            LONELY + "encoder.weight (4, 4), encoder.bias (4,), decoder.weight (4, 4) without a counterpart",
        ),
        (
            bind(Tie.join(Tie("encoder.*", [[0]]), Tie("decoder.b*", [[0]]))),
            ValueError,
            LONELY + "encoder.weight (4, 4), encoder.bias (4,), decoder.bias (4,) without a counterpart",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    "ties",
    [{"layers.*.fnn.0.weight": [[0, 1]]}, *(Tie.equal(*most, "layers.*.fnn.0.weight") for most in ([], ["encoder.*"]))],
    ids=["key", "equal", "second"],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(model: Model, ties: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="No parameter name in the optimizer matches the pattern") as caught:
        tied(model, ties)
    assert "Expected: layers.0.ffn.0.weight (6, 4) or" in str(caught.value)
    assert "Got:      'layers.*.fnn.0.weight'" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parameters_of_two_optimizers_are_told_that_one_has_to_hold_them(model: Model) -> None:
    inner = SGD([("encoder.weight", model.encoder.weight)], lr=0.1)
    for tie in (Tie.equal("encoder.weight", "decoder.weight"), Tie.equal(model.encoder.weight, model.decoder.weight)):
        with pytest.raises(ValueError, match="One optimizer has to hold all members of a tie") as caught:
            TiedOptimizer(inner, tie)
        assert "call add_param_group() first" in str(caught.value)


def test_weights_of_another_dtype_are_told_how_to_be_converted(model: Model) -> None:
    model.decoder.to(torch.bfloat16)
    with pytest.raises(ValueError, match=re.escape("convert one of their modules first, as with module.to(")) as caught:
        tied(model, Tie.equal(model.encoder, model.decoder))
    assert "untie" not in str(caught.value)


def test_a_name_that_finds_no_counterpart_for_some_is_refused() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
    with pytest.raises(ValueError, match=re.escape(NOTHING + "0.bias (2,) alone")):
        tied(model, Tie.equal("?.*"))


def test_modules_are_no_keys(model: Model) -> None:
    with pytest.raises(ValueError, match=re.escape("tie its parameters, such as its .weight")):
        tied(model, {model.encoder: [[0, 1]]})


def test_ties_of_names_and_modules_are_not_drawn(model: Model) -> None:
    for tie in [Tie.equal("encoder.*", "decoder.*"), Tie.equal(model.encoder, model.decoder)]:
        with pytest.raises(TypeError, match="cannot be drawn"):
            plot.draw_groups(tie)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_what_ties_join_one_after_the_other_stays_tied_where_only_the_first_has_a_gradient(
    compact: bool, backwards: bool
) -> None:
    first, second, third = params = [nn.Parameter(randn(4, 2, seed=seed)) for seed in range(3)]
    ties = [
        Tie.join(Tie(first, [[0]]), Tie(second, [[0]])),
        Tie.join(Tie(second, [[3]]), Tie(third, [[3]])),
    ]
    optimizer = TiedOptimizer(AdamW(params, lr=0.1), ties[::-1] if backwards else ties, compact=compact)
    for _ in range(2):
        first.grad = torch.ones(4, 2)
        optimizer.step()
        assert torch.equal(first[0], second[0])
        assert torch.equal(second[3], third[3])


def test_what_relaxed_ties_join_takes_part_where_it_has_a_gradient_alone() -> None:
    first, second = params = [nn.Parameter(randn(4, 2, seed=seed)) for seed in range(2)]
    relaxed = Tie.join(Tie(first, [[0]], strength=0.5), Tie(second, [[0]], strength=0.5))
    optimizer = TiedOptimizer(AdamW(params, lr=0.1), [relaxed, Tie(second, [[1, 2]]), Tie(second, [[3]], strength=0.5)])
    before = second.detach().clone()
    first.grad = torch.ones(4, 2)
    optimizer.step()
    assert second.grad is None
    assert torch.equal(second[1:], before[1:])
