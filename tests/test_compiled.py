"""``torch.compile(optimizer.step)``: the same steps, with graphs for the ties beside that of the bare optimizer."""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from checks import parameter, pickled, randn
from hypothesis import settings
from torch import Tensor
from torch.nn import Parameter
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)

from tieopt import Tie, TiedOptimizer, tie_
from tieopt.engine import compiled as traced_module
from tieopt.engine import engine as engine_module
from tieopt.engine import graphs

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


def shifted() -> tuple[list[Parameter], Any]:
    weight = parameter(12, 20)
    return [weight], Tie(weight, torch.arange(12) // 3, offset=randn(12, 1, seed=3))


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
    shifted,
    joined,
    halves,
    doubles,
]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Small ties, too, are given to the compiler here, one by one as large ones are.
    monkeypatch.setattr(traced_module, "_LEAST", 1)
    monkeypatch.setattr(engine_module, "ONE_PART", 0)
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


@MODES
@pytest.mark.parametrize(
    ("kind", "reduction"),
    [(kind, "mean") for kind in KINDS] + [(kind, "sum") for kind in (rows, columns, halves, elements)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_traced_step_is_the_step_with_a_graph_for_the_ties_on_either_side(kind, reduction, compact):
    class Inner(SGD):
        """What is made once for all optimizers of a class has not been made for this one."""

    ends = []
    for _ in range(2):
        params, ties = kind()
        optimizer = TiedOptimizer(Inner(params, lr=0.1, momentum=0.9), ties, reduction=reduction, compact=compact)
        ends.append((params, optimizer))
    bare, _ = kind()
    expected = traced(lambda: Inner(bare, lr=0.1, momentum=0.9), bare)

    found = traced(lambda: ends[1][1], ends[1][0])
    train(ends[0][0], ends[0][1].step)

    if WHOLE_GRAPHS:
        # One for the gradients, and in the full mode one for the weights.
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


def compiled_and_not(
    make: Callable[[], tuple[list[Parameter], Any]],
    inner: Callable[[list[Parameter]], Any],
    backend: Any,
    *,
    compact: bool,
    train: Callable[[list[Parameter], Any], None] = train,
) -> list[Parameter]:
    """Trains with a compiled step and without, asserts that it makes no difference, and returns the parameters."""
    ends = []
    for compiled in (False, True):
        params, ties = make()
        optimizer = TiedOptimizer(inner(params), ties, compact=compact)
        train(params, torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step)
        assert optimizer.tie_drift() == 0
        ends.append(params)
    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, plain)
    return ends[1]


@MODES
@pytest.mark.parametrize("kind", [rows, columns, joined], ids=lambda kind: kind.__name__)
def test_a_compiled_step_is_the_step(kind, compact):
    compiled_and_not(kind, AdamW, "aot_eager", compact=compact)


@MODES
@pytest.mark.parametrize("kind", [rows, columns], ids=lambda kind: kind.__name__)
def test_an_optimizer_keeps_no_buffer_that_a_compiled_step_writes_over(kind, compact):
    """Inductor makes the first momentum of the gradient itself, if it may."""
    compiled_and_not(kind, lambda params: SGD(params, lr=0.1, momentum=0.9), "inductor", compact=compact)


OPTIMIZERS = [
    partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    Adadelta,
    Adafactor,
    Adagrad,
    partial(Adam, amsgrad=True),
    AdamW,
    Adamax,
    ASGD,
    NAdam,
    RAdam,
    partial(RMSprop, momentum=0.9, centered=True),
    Rprop,
]


@MODES
@pytest.mark.parametrize("inner", OPTIMIZERS, ids=lambda inner: getattr(inner, "func", inner).__name__)
def test_compiled_steps_of_every_optimizer_are_its_steps(inner, compact):
    thorough = settings.default.max_examples >= settings.get_profile("thorough").max_examples
    # Inductor takes seconds for each.
    compiled_and_not(rows, inner, "inductor" if thorough else "eager", compact=compact)


@MODES
@pytest.mark.parametrize("shape", [(6, 4, 4, 4), (2, 4, 2, 2, 4)], ids=["2d", "3d"])
def test_kernels_whose_entries_lie_between_those_of_others_stay_tied(shape, compact):
    """In channels_last the entries of a kernel are not next to each other."""
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d

    def kernels() -> tuple[list[Parameter], Any]:
        weight = Parameter(randn(*shape).contiguous(memory_format=order))
        return [weight], {weight: torch.arange(shape[0] * shape[1]).view(shape[:2]) // 4}

    def train(params: list[Parameter], step: Callable[[], Any]) -> None:
        for seed in range(2):
            params[0].grad = randn(*shape, seed=seed).contiguous(memory_format=order)
            step()

    compiled_and_not(kernels, partial(SGD, lr=0.1), "aot_eager", compact=compact, train=train)


@MODES
def test_a_gradient_that_is_a_view_is_no_other_gradient(compact):
    def weights() -> tuple[list[Parameter], Any]:
        weight = parameter(6, 4, 4)
        return [weight], {weight: [[0, 1], [2, 3]]}

    def train(params: list[Parameter], step: Callable[[], Any]) -> None:
        for seed in range(2):
            params[0].grad = randn(6, 4, 4, seed=seed).permute(0, 1, 2)
            step()

    compiled_and_not(weights, partial(SGD, lr=0.1), "aot_eager", compact=compact, train=train)


class Recorder:
    """A backend that runs graphs as they are, and keeps them with the tensors that they were made for."""

    def __init__(self) -> None:
        self.graphs: list[tuple[Any, list[Any]]] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        self.graphs.append((graph, inputs))
        return graph


@MODES
@pytest.mark.skipif(not WHOLE_GRAPHS, reason="this compiler is not given the ties")
def test_many_models_are_compiled_each_for_its_own_shapes(compact):
    """torch takes shapes that differ for variables, which fails now and then, and compiles a function only so often."""
    recorder, limit = Recorder(), torch._dynamo.config.recompile_limit
    for number in range(limit + 2):
        weight = parameter(8 + 8 * number, 20 + number)
        optimizer = SGD([weight], lr=0.1)
        optimizer = TiedOptimizer(optimizer, {weight: torch.arange(len(weight)) // 4}, compact=compact)
        train([weight], torch.compile(optimizer.step, backend=recorder), steps=2)

    assert len(recorder.graphs) == 2 * (limit + 2)
    assert all(isinstance(size, int) for _, inputs in recorder.graphs for each in inputs for size in each.shape)


@MODES
def test_what_moves_after_the_ties_were_made_is_compiled_as_any_other(compact):
    """Copies have no index tensors yet, and weights in another order have none for it."""
    weight = parameter(6, 4, 3, 3)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: torch.arange(24).view(6, 4) // 3 % 5}, compact=compact)
    expected = copy.deepcopy(optimizer)
    (plain,) = expected.param_groups[0]["params"]
    for param in (weight, plain):
        param.data = param.data.contiguous(memory_format=torch.channels_last)
    recorder = Recorder()
    train([plain], expected.step, steps=2)
    train([weight], torch.compile(optimizer.step, backend=recorder), steps=2)

    torch.testing.assert_close(weight, plain)
    assert len(recorder.graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@MODES
@pytest.mark.skipif(not WHOLE_GRAPHS, reason="this compiler is not given the ties")
def test_copies_and_other_ties_are_compiled_no_more_often_than_need_be(compact):
    params, ties = rows()
    recorder = Recorder()
    optimizer = TiedOptimizer(SGD(params, lr=0.1), ties, compact=compact)
    train(params, torch.compile(optimizer.step, backend=recorder), steps=2)
    first = len(recorder.graphs)

    other = copy.deepcopy(optimizer)
    train(other.param_groups[0]["params"], torch.compile(other.step, backend=recorder), steps=2)
    assert len(recorder.graphs) == 2 * first

    step = torch.compile(optimizer.step, backend=recorder)
    for seed in range(3):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        optimizer.retie({param: labels[order] for param, labels in ties.items()})
        train(params, step, steps=1)
    # The compact parameters are others with other ties, and their step is one of others.
    assert len(recorder.graphs) == 2 * first + (3 if compact else 0)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(params, step, steps=1)


def test_large_groups_are_not_written_out_several_times():
    """It took a minute to compile."""
    weight = parameter(64 * 64, 2048)
    recorder = Recorder()
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: torch.arange(len(weight)) // 64})
    train([weight], torch.compile(optimizer.step, backend=recorder), steps=1)

    assert sum(len(graph.graph.nodes) for graph, _ in recorder.graphs) < 5 * 64
    assert optimizer.tie_drift() == 0


@MODES
def test_what_is_done_between_compiled_steps_counts(compact):
    """Rates, gradients that are missing, parameters that are added, and states that are loaded."""
    ends = []
    for compiled in (False, True):
        params, ties = rows()
        optimizer = TiedOptimizer(SGD(params[:2], lr=0.1, momentum=0.9), ties, compact=compact)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        train(params[:2], step, 1)
        scheduler.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        params[1].grad = randn(24, 20, seed=7)
        step()
        optimizer.add_param_group({"params": params[2:], "lr": 0.5})
        train(params, step, 1)
        optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
        scheduler.step()
        train(params, step, 2)
        assert optimizer.tie_drift() == 0
        ends.append(params)

    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, plain)


Between = Callable[[Any, list[Parameter]], object]

# What a program does between the steps of one optimizer.
BETWEEN: dict[str, Between] = {
    "a rate": lambda optimizer, _: optimizer.param_groups[0].update(lr=0.03),
    "weight decay and momentum": lambda optimizer, _: optimizer.param_groups[0].update(weight_decay=0.1, momentum=0.5),
    "tied gradients": lambda optimizer, _: optimizer.tie_gradients(),
    "gradients that stay": lambda optimizer, _: optimizer.zero_grad(set_to_none=False),
    "clipping": lambda _, params: torch.nn.utils.clip_grad_norm_(params, 0.1),
    "a frozen parameter": lambda _, params: params[0].requires_grad_(False),
    "other ties": lambda optimizer, params: optimizer.retie({params[0]: [[0, 1], [2, 3]]}),
    "no ties": lambda optimizer, _: optimizer.untie(),
    "a lost state": lambda optimizer, _: optimizer.state.clear(),
    "a copy": lambda optimizer, _: copy.deepcopy(optimizer),
    "a state that is saved and loaded": lambda optimizer, _: optimizer.load_state_dict(optimizer.state_dict()),
    "weights that are tied again": lambda optimizer, params: (params[0].data.mul_(0.5), optimizer.tie_weights()),
}


@MODES
@pytest.mark.parametrize("between", BETWEEN)
def test_compiled_steps_go_on_as_others_whatever_happens_between_them(between, compact):
    ends = []
    for compiled in (False, True):
        params, ties = rows()
        optimizer = TiedOptimizer(SGD(params, lr=0.1, momentum=0.9), ties, compact=compact)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            train(params, step, 1)
            BETWEEN[between](optimizer, params)
            step()
        ends.append(params)

    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, plain)


@MODES
def test_folds_and_players_that_take_turns_are_compiled_beside_each_other(compact):
    ends = []
    for compiled in (False, True):
        trained = []
        for _ in range(2):
            players = []
            for inner in (SGD, partial(AdamW, lr=0.01)):
                params, ties = rows()
                optimizer = TiedOptimizer(inner(params), ties, compact=compact)
                players.append((params, torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step))
            for _ in range(2):
                for params, step in players:
                    train(params, step, 1)
            trained += [param for params, _ in players for param in params]
        ends.append(trained)

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
        with pytest.warns(UserWarning, match="their members differ now"):
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


def test_what_is_worth_compiling_of_tie_weights_is_traced_as_one_graph(monkeypatch):
    monkeypatch.setattr(traced_module, "_LEAST", 1)
    monkeypatch.setattr(engine_module, "ONE_PART", 0)
    params, ties = rows()
    optimizer = TiedOptimizer(SGD(params, lr=0.1), ties)
    with torch.no_grad():
        for param in params:
            param.copy_(randn(*param.shape, seed=7))
    expected = [tie_(param.detach().clone(), labels) for param, labels in ties.items()]

    torch.compile(optimizer.tie_weights, backend="eager", fullgraph=True)()

    assert optimizer.tie_drift() == 0
    for param, end in zip(params, expected, strict=False):
        torch.testing.assert_close(param.detach(), end)


# --- what graphs.py relies on ---


def cosine(tensor):
    return tensor.cos()


def methods(recorder: Recorder) -> list[list[str]]:
    """What each graph calls of tensors."""
    return [[node.target for node in graph.graph.nodes if node.op == "call_method"] for graph, _ in recorder.graphs]


def test_a_function_between_graphs_is_left_alone_but_not_what_it_calls():
    recorder = Recorder()

    @graphs.between_graphs
    def between(tensor):
        return cosine(tensor.sin())

    step = torch.compile(between, backend=recorder, fullgraph=True)
    for stance in ("default", "fail_on_recompile" if WHOLE_GRAPHS else "default"):
        with torch.compiler.set_stance(stance):
            step(torch.ones(3))

    assert methods(recorder) == [["cos"]]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_an_untraced_function_is_left_alone_with_all_that_it_calls():
    recorder, answers = Recorder(), []

    @graphs.untraced
    def alone(tensor):
        answers.append(graphs.is_under_compiler())
        return cosine(tensor.sin())

    @graphs.between_graphs
    def between(tensor):
        answers.append(graphs.is_under_compiler())
        return alone(tensor)

    torch.compile(between, backend=recorder)(torch.ones(3))
    between(torch.ones(3))

    assert not recorder.graphs
    assert answers == [WHOLE_GRAPHS, False, False, False]


@pytest.mark.skipif(not WHOLE_GRAPHS, reason="this compiler is not asked for its callback")
def test_to_ask_for_the_callback_of_the_compiler_takes_no_reference_from_it():
    counts = []

    @graphs.between_graphs
    def between():
        callback = graphs._frames.get_eval_frame_callback()
        before = sys.getrefcount(callback)
        for _ in range(10):
            graphs.is_under_compiler()
        counts.append(sys.getrefcount(callback) - before)

    torch.compile(between, backend="eager")()

    assert counts == [0]


def of_several_sizes(make: Callable[[], Any], mark: Callable[[Tensor], Tensor], count: int) -> Recorder:
    """What the compiler makes of functions, each called with a tensor of another size."""
    recorder, tensors = Recorder(), [mark(torch.ones(3 + number)) for number in range(count)]

    @graphs.between_graphs
    def between():
        for tensor in tensors:
            make()(tensor)

    torch._dynamo.reset()
    torch.compile(between, backend=recorder)()
    return recorder


def test_copies_of_a_function_are_compiled_each_for_itself():
    limit = torch._dynamo.config.recompile_limit if WHOLE_GRAPHS else torch._dynamo.config.cache_size_limit

    assert len(of_several_sizes(lambda: graphs.copied(cosine), graphs.static, limit + 2).graphs) == limit + 2
    assert len(of_several_sizes(lambda: cosine, graphs.static, limit + 2).graphs) <= limit


@pytest.mark.skipif(not WHOLE_GRAPHS, reason="this compiler takes sizes for variables all the same")
def test_static_tensors_have_no_variable_sizes():
    marked, others = (
        [each for _, inputs in of_several_sizes(lambda: graphs.copied(cosine), mark, 2).graphs for each in inputs]
        for mark in (graphs.static, Tensor.detach)
    )

    assert [type(each) for each in marked] == [Tensor, Tensor]
    # A copy alone does not do: the size of the second tensor is an input.
    assert len(others) == 3


def test_copies_of_functions_are_kept_for_some_shapes_and_by_one_optimizer():
    copies = graphs.Copies()
    first = copies.of(cosine, 0)

    assert first.__code__ is not cosine.__code__
    assert copies.of(cosine, 0) is first
    assert all(each.of(cosine, 0) is not first for each in (copy.deepcopy(copies), pickled(copies)))
    for shape in range(graphs._COPIES + 1):
        copies.of(cosine, shape)
    assert copies.of(cosine, 0) is not first
