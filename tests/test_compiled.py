"""``torch.compile(optimizer.step)``: the same steps, with graphs for the ties beside that of the bare optimizer."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from cases import every_pair
from checks import REDUCTIONS, parameter, randn, same_bits
from torch.nn import Parameter
from torch.optim import SGD, AdamW, RMSprop

from tieopt import Tie, TiedOptimizer
from tieopt.index import Indices
from tieopt.slices import Slices, numbered
from tieopt.testing import assert_tied

pytestmark = [
    pytest.mark.host("torch.compile", "the step: eager, aot_eager and inductor; graph breaks"),
    # What torch's compiler itself calls.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),
]

# Compilers before that one trace the ties several times over; the steps are the same.
WHOLE_GRAPHS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

MODES = pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])


def rows() -> tuple[list[Parameter], Any]:
    params = [parameter(24, 20, seed=seed) for seed in range(3)]
    labels = torch.arange(24) // 2
    labels[:6] = -1
    return params, dict.fromkeys(params[:2], labels)


def neighbours() -> tuple[list[Parameter], Any]:
    weight = parameter(40, 20)
    return [weight], {weight: torch.arange(40) // 10}


def odd_groups() -> tuple[list[Parameter], Any]:
    weight = parameter(45, 20)
    return [weight], {weight: torch.arange(45) % 5}


def ragged() -> tuple[list[Parameter], Any]:
    weight = parameter(40, 20)
    return [weight], {weight: torch.arange(40) // 3 % 7}


def large_groups() -> tuple[list[Parameter], Any]:
    weight = parameter(300, 20)
    return [weight], {weight: torch.arange(300) % 2}


def elements() -> tuple[list[Parameter], Any]:
    weight = parameter(9, 8)
    return [weight], {weight: torch.arange(72).view(9, 8) % 11 - 1}


def columns() -> tuple[list[Parameter], Any]:
    weight = parameter(6, 20)
    return [weight], Tie(weight, torch.arange(20) // 2, dim=1)


def kernels() -> tuple[list[Parameter], Any]:
    weight = parameter(6, 4, 3, 3)
    return [weight], {weight: torch.arange(24).view(6, 4) % 5}


def signed() -> tuple[list[Parameter], Any]:
    weight = parameter(12, 20)
    return [weight], Tie(weight, torch.arange(12) // 2, scale=torch.tensor([1.0, -1.0, 0.0] * 4))


def scaled() -> tuple[list[Parameter], Any]:
    weight = parameter(12, 20)
    return [weight], Tie(weight, torch.arange(12) // 2, scale=torch.tensor([2.0, 0.5, 1.0] * 4))


def joined() -> tuple[list[Parameter], Any]:
    encoder, decoder = parameter(6, 20), parameter(20, 6, seed=1)
    return [encoder, decoder], Tie.join(Tie(encoder, torch.arange(6)), Tie(decoder, torch.arange(6), dim=1))


def halves() -> tuple[list[Parameter], Any]:
    weight = parameter(12, 20, dtype=torch.bfloat16)
    return [weight], {weight: torch.arange(12) // 2}


def doubles() -> tuple[list[Parameter], Any]:
    weight = parameter(12, 20, dtype=torch.float64)
    return [weight], {weight: torch.arange(12) // 3}


KINDS: list[Callable[[], tuple[list[Parameter], Any]]] = [
    rows,
    neighbours,
    odd_groups,
    ragged,
    large_groups,
    elements,
    columns,
    kernels,
    signed,
    scaled,
    joined,
    halves,
    doubles,
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def train(params: list[Parameter], step: Callable[[], Any], steps: int = 4) -> None:
    for seed in range(steps):
        for number, param in enumerate(params):
            param.grad = randn(*param.shape, seed=10 * seed + number).to(param.dtype)
        step()


def traced(make: Callable[[], Any], params: list[Parameter]) -> tuple[int, int]:
    """How many graphs a training has, and how often one is broken off."""
    graphs = []

    def recorded(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(params, torch.compile(make().step, backend=recorded))
    return len(graphs), sum(torch._dynamo.utils.counters["graph_break"].values())


class Bare(SGD):
    """What is made once for all optimizers of a class has not been made for this one."""


@cache
def traced_bare(kind: Callable[[], tuple[list[Parameter], Any]]) -> tuple[int, int]:
    """The same of an optimizer without ties."""
    params, _ = kind()
    return traced(lambda: Bare(params, lr=0.1, momentum=0.9), params)


@every_pair(kind=KINDS, reduction=REDUCTIONS, compact=[False, True])
def test_a_traced_step_is_the_step_with_a_graph_for_the_ties_on_either_side(kind, reduction, compact):
    class Inner(SGD):
        """What is made once for all optimizers of a class has not been made for this one."""

    ends = []
    for _ in range(2):
        params, ties = kind()
        optimizer = TiedOptimizer(Inner(params, lr=0.1, momentum=0.9), ties, reduction=reduction, compact=compact)
        ends.append((params, optimizer))
    expected = traced_bare(kind)

    found = traced(lambda: ends[1][1], ends[1][0])
    train(ends[0][0], ends[0][1].step)

    if WHOLE_GRAPHS:
        # What folds the gradients is one with the step; what unfolds the weights, and all of the full mode, is not.
        assert found[0] <= expected[0] + (1 if compact else 2)
        assert found[1] <= expected[1]
    assert ends[1][1].tie_drift() == 0
    for plain, other in zip(ends[0][0], ends[1][0], strict=True):
        # Means are rounded once, but added up in another order.
        close = {"rtol": 0, "atol": 16 * torch.finfo(plain.dtype).eps}
        torch.testing.assert_close(other, plain, **close)
        torch.testing.assert_close(other.grad, plain.grad, **close)


@MODES
@pytest.mark.skipif(not WHOLE_GRAPHS, reason="this compiler traces the ties several times over")
@pytest.mark.parametrize("inner", [AdamW, RMSprop])
def test_other_optimizers_have_no_more_graph_breaks_either(inner, compact):
    bare, _ = rows()
    expected = traced(lambda: inner(bare, lr=0.1), bare)
    params, ties = rows()
    found = traced(lambda: TiedOptimizer(inner(params, lr=0.1), ties, compact=compact), params)

    assert found[0] <= expected[0] + (1 if compact else 2)
    assert found[1] <= expected[1]


@every_pair(
    kind=[rows, odd_groups, elements, columns, joined], compact=[False, True], backend=["aot_eager", "inductor"]
)
def test_a_compiled_step_is_the_step(kind, compact, backend):
    ends = []
    for compiled in (False, True):
        params, ties = kind()
        optimizer = TiedOptimizer(AdamW(params, lr=0.01), ties, compact=compact)
        train(params, torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step)
        ends.append(params)
        model = torch.nn.ParameterList(params)
        names = {id(param): str(number) for number, param in enumerate(params)}
        assert_tied(
            model,
            [
                Tie.join(*(Tie(names[id(part.param)], part.groups, dim=part.dim) for part in tie.parts))
                for tie in optimizer.ties
            ],
        )

    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, plain)


@MODES
def test_a_learning_rate_reaches_a_traced_step(compact):
    ends = []
    for compiled in (False, True):
        params, ties = rows()
        rate = torch.tensor(0.1)
        optimizer = TiedOptimizer(SGD(params, lr=rate, foreach=True), ties, compact=compact)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        train(params, step, 2)
        rate.fill_(0.01)
        train(params, step, 2)
        ends.append(params)

    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, plain)


@MODES
def test_weights_that_were_written_between_traced_steps_count(compact):
    ends = []
    for compiled in (False, True):
        params, ties = rows()
        optimizer = TiedOptimizer(SGD(params, lr=0.1), ties, compact=compact)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        train(params, step, 2)
        with torch.no_grad():
            params[0].copy_(randn(*params[0].shape, seed=5))
        train(params, step, 2)
        ends.append(params)

    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, plain)


@MODES
def test_parameters_without_gradients_are_left_by_a_traced_step(compact):
    params, ties = rows()
    optimizer = TiedOptimizer(SGD(params, lr=0.1), ties, compact=compact)
    step = torch.compile(optimizer.step, backend="eager")
    train(params, step, 1)
    optimizer.zero_grad()
    before = [param.detach().clone() for param in params]
    params[1].grad = randn(*params[1].shape, seed=1)
    step()

    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert optimizer.tie_drift() == 0


def test_tie_weights_is_traced_as_one_graph():
    params, ties = rows()
    optimizer = TiedOptimizer(SGD(params, lr=0.1), ties)
    with torch.no_grad():
        for param in params:
            param.copy_(randn(*param.shape, seed=7))
    expected = [param.detach().clone() for param in params]
    other = TiedOptimizer(SGD([Parameter(each) for each in expected], lr=0.1), {})
    other.retie(dict(zip(other.param_groups[0]["params"], (labels for labels in ties.values()), strict=False)))

    torch.compile(optimizer.tie_weights, backend="eager", fullgraph=True)()

    assert optimizer.tie_drift() == 0
    for param, end in zip(params, other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param, end)


def test_operations_in_several_threads_do_not_disturb_each_other():
    """Those of compiled steps, without the compiler: the process may crash where that traces in several threads."""

    def weight_after(seed: int, start: threading.Barrier) -> torch.Tensor:
        weight, ties = randn(300, 400, seed=seed), Indices(numbered([Slices(torch.arange(300) % 7)]))
        start.wait()
        for number in range(30):
            weight += randn(300, 400, seed=number)
            torch.ops.tieopt.project_([weight], ties.number, False)
        return weight

    expected = [weight_after(seed, threading.Barrier(1)) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(weight_after, range(3), [threading.Barrier(3)] * 3))

    assert all(map(same_bits, answers, expected))
