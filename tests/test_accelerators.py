"""What can be known of accelerators without one: what a warm step asks them to do, and what their branches compute."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerators import FakeAccelerator, Waits, as_on_accelerators, enter_devices
from cases import every_pair
from checks import randn
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

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


def last_step(accelerator: FakeAccelerator, kind: str, dtype: torch.dtype, **options: Any) -> list[str]:
    """The operators of the last of three steps, all of which neither read numbers nor copy between devices."""
    params = [Parameter(torch.empty(10, width, dtype=dtype, device="cuda")) for width in (10, 4, 4)]
    optimizer = TiedOptimizer(SGD(params, lr=0.1, momentum=0.9, foreach=False), KINDS[kind](params), **options)
    for step in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        if step == 1 and kind != "many small ones":
            # Ties that are worked on as one are compiled for every choice of them.
            params[2].grad = None
        accelerator.begin()
        optimizer.step()
    accelerator.is_warm = False
    return accelerator.operators


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@every_pair(kind=KINDS, compact=[False, True], dtype=DTYPES, reduction=["mean", "sum"])
def test_no_step_waits_for_an_accelerator_or_copies_to_it(
    accelerator: FakeAccelerator, kind: str, compact: bool, dtype: torch.dtype, reduction: Any
) -> None:
    # The compact mode has no relaxed ties.
    last_step(accelerator, kind, dtype, compact=compact and kind != "relaxed", reduction=reduction)


# What makes another view of memory, and starts nothing on the device.
VIEWS = {"alias", "detach", "permute", "select", "slice", "unbind", "view"}
OPERATORS = {
    ("rows", False): "fill_ 2, index_select 10, copy_ 4, add_ 12, index_copy_ 4, div_ 2, _to_copy 2, mul_ 3",
    ("symmetric", False): "fill_ 2, copy_ 8, add_ 10, div_ 2, index_select 2, _to_copy 2, mul_ 3",
    (
        "rows",
        True,
    ): "index_select 7, fill_ 1, copy_ 2, add_ 9, index_copy_ 1, div_ 1, _to_copy 1, _foreach_copy_ 1, mul_ 3",
    ("symmetric", True): "index_select 4, fill_ 1, copy_ 5, add_ 8, div_ 1, _to_copy 1, mul_ 3",
}


@pytest.mark.parametrize(("kind", "compact"), OPERATORS)
def test_a_warm_step_starts_these_operators(accelerator: FakeAccelerator, kind: str, compact: bool) -> None:
    """With the nine of SGD with momentum for three parameters; a change is to be seen, and may be for the better."""
    operators = Counter(last_step(accelerator, kind, torch.float32, compact=compact))
    counted = {f"{name} {count}" for name, count in operators.items() if name not in VIEWS}
    assert counted == set(OPERATORS[kind, compact].split(", "))


# --- sparse gradients ---

# Thirty rows in groups of two, three, four and six.
ROWS = torch.cat([torch.arange(10).repeat(2), torch.arange(5), torch.arange(3), torch.zeros(2, dtype=torch.int64)])
SCALES = {
    "rows": None,
    "signs": torch.tensor([1.0, -1.0]).repeat(20),
    "multiples": torch.tensor([1.0, 2.0, 0.5, 0.0]).repeat(10),
}
SPARSE: dict[str, Callable[[Params], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "Adagrad": lambda params: Adagrad(params, lr=0.1),
    "SparseAdam": lambda params: SparseAdam(params, lr=0.1),
}


def sparse_steps(inner: str, *, coalesced: bool = False, scale: str | None = None, **options: Any) -> Any:
    """The weight after three steps, and what waits for an accelerator in the third one.

    Args:
        inner: the name of an optimizer.
        coalesced: whether the gradients are.
        scale: the name of the scales of the ties; None for no ties.
        options: of :class:`TiedOptimizer`.
    """
    weight = Parameter(randn(40, 3))
    optimizer: Any = SPARSE[inner]([weight])
    if scale is not None:
        labels = torch.cat([ROWS, torch.full((10,), -1)])
        optimizer = TiedOptimizer(optimizer, Tie(weight, labels, scale=SCALES[scale]), **options)
    for step in range(3):
        # Every step touches other groups than the one before, and other numbers of them.
        rows = torch.arange(step, 40, 2 + step).repeat(2)
        weight.grad = torch.sparse_coo_tensor(rows[None], randn(len(rows), 3, seed=step), weight.shape)
        if coalesced:
            weight.grad = weight.grad.coalesce()
        with Waits(compiles=step == 0) as waits:
            optimizer.step()
    return weight.detach(), waits.operators


@every_pair(inner=SPARSE, scale=SCALES, compact=[False, True], coalesced=[False, True], reduction=["mean", "sum"])
def test_a_warm_sparse_step_waits_for_an_accelerator_once_for_each_reduction(
    inner: str, scale: str, compact: bool, coalesced: bool, reduction: Any
) -> None:
    """To learn how many groups are touched; and where the optimizer waits without ties, too."""
    options: Any = {"coalesced": coalesced, "scale": scale, "compact": compact, "reduction": reduction}
    expected, _ = sparse_steps(inner, **options)
    with as_on_accelerators():
        _, untied = sparse_steps(inner, coalesced=coalesced)
        weight, waits = sparse_steps(inner, **options)
    # The rows of a compact gradient are in another order.
    is_coalesced_by_optimizer = compact and coalesced and inner != "SGD"
    count = 2 if reduction == "sum" and not compact else 1
    assert Counter(waits) == Counter([*untied, *["tolist"] * count, *["_coalesce"] * is_coalesced_by_optimizer])
    torch.testing.assert_close(weight, expected)


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
