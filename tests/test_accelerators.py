"""What can be known of accelerators without one: what a warm step asks them to do, and what their branches compute."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerators import FakeAccelerator, as_on_accelerators, enter_devices
from cases import every_pair
from checks import randn
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer, frozen
from tieopt.patterns import symmetric
from tieopt.testing import ties

Params = list[Parameter]
LABELS = torch.tensor([0, 1, -1, 0, 2, 1, 0, 2, -1, 1])

# Kinds of ties of parameters of the shapes (10, 10) and (10, 4).
KINDS: dict[str, Callable[[Params], Any]] = {
    "rows": lambda params: Tie(params[0], LABELS),
    "columns": lambda params: Tie(params[0], LABELS, dim=1),
    "elements": lambda params: Tie(params[0], torch.arange(100).view(10, 10) % 7),
    "whole parameters": lambda params: Tie.join(Tie(params[1], torch.arange(10)), Tie(params[2], torch.arange(10))),
    "symmetric": lambda params: Tie(params[0], symmetric((10, 10))),
    "signs": lambda params: Tie(params[0], LABELS, scale=torch.tensor([1.0, -1.0]).repeat(5)),
    "multiples": lambda params: Tie(params[0], LABELS, scale=torch.linspace(0.5, 2, 10)),
    "zeros": lambda params: Tie(params[0], LABELS, scale=torch.tensor([1.0, 0.0]).repeat(5)),
    "offsets": lambda params: Tie(params[0], LABELS, offset=torch.linspace(-1, 1, 10)[:, None].expand(10, 10)),
    "frozen": lambda params: frozen(params[0], [1, 3]),
    "overlaid": lambda params: [Tie(params[0], [[0, 1]]), Tie(params[0], overlay())],
    "many small ones": lambda params: [Tie(param, LABELS) for param in params[1:]],
    "relaxed": lambda params: Tie(params[0], LABELS, strength=0.5),
}


def overlay() -> torch.Tensor:
    labels = torch.full((10, 10), -1)
    labels[4:6, 3] = 0
    return labels


# Fake tensors are nowhere in memory.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")


@pytest.fixture(scope="module", autouse=True)
def devices() -> None:
    enter_devices()


@pytest.fixture
def accelerator() -> Iterator[FakeAccelerator]:
    with FakeAccelerator() as entered:
        yield entered


def warm_step(accelerator: FakeAccelerator, kind: str, dtype: torch.dtype, **options: Any) -> list[str]:
    """The operators of a warm step, which neither reads numbers nor copies between devices."""
    params = [Parameter(torch.empty(10, width, dtype=dtype, device="cuda")) for width in (10, 4, 4)]
    optimizer = TiedOptimizer(SGD(params, lr=0.1, momentum=0.9, foreach=False), KINDS[kind](params), **options)
    for step in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        # The first step compiles what it needs.
        accelerator.begin(warm=step > 0)
        optimizer.step()
    accelerator.is_warm = False
    return accelerator.operators


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@every_pair(kind=KINDS, compact=[False, True], dtype=DTYPES, reduction=["mean", "sum"])
def test_a_warm_step_neither_waits_for_an_accelerator_nor_copies_to_it(
    accelerator: FakeAccelerator, kind: str, compact: bool, dtype: torch.dtype, reduction: Any
) -> None:
    # The compact mode has no relaxed ties.
    warm_step(accelerator, kind, dtype, compact=compact and kind != "relaxed", reduction=reduction)


# What makes another view of memory, and starts nothing on the device.
VIEWS = {"alias", "detach", "permute", "select", "slice", "unbind", "view"}
OPERATORS = {
    ("rows", False): "fill_ 2, index_select 10, copy_ 4, add_ 12, index_copy_ 4, div_ 2, _to_copy 2, mul_ 3",
    ("symmetric", False): "fill_ 2, copy_ 8, add_ 10, div_ 2, index_select 2, _to_copy 2, mul_ 3",
    (
        "rows",
        True,
    ): "index_select 7, fill_ 1, copy_ 2, add_ 9, index_copy_ 1, div_ 1, _to_copy 1, _foreach_copy_ 1, mul_ 3",
    ("symmetric", True): "index_select 4, fill_ 1, copy_ 4, add_ 8, div_ 1, _to_copy 1, mul_ 3",
}


@pytest.mark.parametrize(("kind", "compact"), OPERATORS)
def test_a_warm_step_starts_these_operators(accelerator: FakeAccelerator, kind: str, compact: bool) -> None:
    """With the nine of SGD with momentum for three parameters; a change is to be seen, and may be for the better."""
    operators = Counter(warm_step(accelerator, kind, torch.float32, compact=compact))
    counted = {f"{name} {count}" for name, count in operators.items() if name not in VIEWS}
    assert counted == set(OPERATORS[kind, compact].split(", "))


# --- what the branches of accelerators compute ---


@given(data=st.data())
def test_steps_by_the_branches_of_accelerators_are_those_of_the_cpu(compact: bool, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    params = [
        Parameter(randn(*shape, seed=seed, dtype=dtype)) for seed, shape in enumerate([(4, 3), (3, 4), (2, 3, 2)])
    ]
    drawn = data.draw(ties(params))
    others = copy.deepcopy(params)
    twins = {id(param): twin for param, twin in zip(params, others, strict=True)}
    same = [
        Tie.join(*(Tie(twins[id(part.param)], part.groups, dim=part.dim, scale=part.scale) for part in tie.parts))
        for tie in drawn
    ]

    def trained(params: Params, ties: Any) -> TiedOptimizer:
        optimizer = TiedOptimizer(SGD(params, lr=0.1, momentum=0.9), ties, compact=compact)
        for seed in range(3):
            for param in params:
                param.grad = randn(*param.shape, seed=10 * seed, dtype=dtype)
            optimizer.step()
        return optimizer

    trained(params, drawn)
    with as_on_accelerators():
        assert trained(others, same).tie_drift() == 0
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(others, params, rtol=8 * eps, atol=8 * eps)
