"""Ties across ranks: an embedding on the first stage of a pipeline, and a head on the last, are one weight."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from checks import randn, same_bits
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks, refusal_of
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from tieopt import Tie, TiedOptimizer
from tieopt.engine.agreement import agree
from tieopt.ties.across import Across

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")

WORDS, WIDTH, BATCH, PIECES = 12, 8, 8, 4
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


# --- pipelines ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(4)]
    whole = nn.Sequential(nn.Embedding(WORDS, WIDTH), *blocks, nn.Linear(WIDTH, WORDS, bias=False)).double()
    whole[-1].weight = whole[0].weight
    return whole


def batches(count: int = 4) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(WORDS, (BATCH, 5), generator=generator) for _ in range(count)]


def loss_of(scores: Tensor, words: Tensor) -> Tensor:
    return cross_entropy(scores.flatten(0, 1), words.roll(1, 1).flatten())


def optimizer_of(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def trained_in_one_process() -> dict[str, Tensor]:
    whole = model()
    optimizer = optimizer_of(whole.parameters())
    for words in batches():
        optimizer.zero_grad()
        loss_of(whole(words), words).backward()
        optimizer.step()
    return whole.state_dict()


def trained_in_stages(schedule: str, replicas: int, kind: str) -> dict[str, Tensor]:
    """The state of this rank's stage after some steps, by the names of the whole model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // replicas, replicas), mesh_dim_names=("stages", "replicas"))
    stages, number = mesh["stages"].size(), mesh["stages"].get_local_rank()
    whole = model()
    whole[-1].weight = Parameter(whole[0].weight.detach().clone())
    cuts = [0, *(1 + 4 * (stage + 1) // stages for stage in range(stages - 1)), len(whole)]
    names = range(cuts[number], cuts[number + 1])
    here = nn.Sequential(*(whole[name] for name in names))
    if kind == "fully_shard":
        for module in (*here, here):
            fully_shard(module, mesh=mesh["replicas"])
    module = DistributedDataParallel(here, process_group=mesh.get_group("replicas")) if kind == "replicas" else here
    ends = ends_of(mesh)
    ties = []
    if number in (0, stages - 1):
        weight = here[0].weight if number == 0 else here[-1].weight
        ties = [Tie(weight, torch.arange(WORDS), reduction="sum", across=ends)]
    optimizer = TiedOptimizer(optimizer_of(here.parameters()), ties)
    stage = PipelineStage(module, number, stages, torch.device("cpu"), group=mesh.get_group("stages"))
    run = SCHEDULES[schedule](stage, PIECES, loss_fn=loss_of)
    replica = mesh["replicas"].get_local_rank()
    for words in batches():
        part = words.chunk(replicas)[replica]
        optimizer.zero_grad()
        if number == 0:
            run.step(part)
        elif number == stages - 1:
            run.step(target=part)
        else:
            run.step()
        optimizer.step()
    if ties:
        assert optimizer.tie_drift() == 0
    state = {f"{names[int(key[0])]}{key[1:]}": value.detach() for key, value in here.state_dict().items()}
    moments = {
        f"{key}.moment": optimizer.state[param]["exp_avg"] for key, param in zip(state, here.parameters(), strict=True)
    }
    return {key: value.full_tensor() if kind == "fully_shard" else value for key, value in (state | moments).items()}


def ends_of(mesh: DeviceMesh) -> Any:
    """The process group of the first stage and the last one, with the same place in the other dimension."""
    groups = [dist.new_group([int(column[0]), int(column[-1])]) for column in mesh.mesh.T]
    return groups[mesh.get_coordinate()[1]]


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 does not divide gradients by the number of pieces")
@pytest.mark.host("pipelining", "an embedding and a head on two stages, with DDP and FSDP2 on the other dimension")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("count", "replicas", "kind"),
    [
        pytest.param(2, 1, "alone", id="2 stages"),
        pytest.param(4, 1, "alone", id="4 stages", marks=pytest.mark.slow),
        pytest.param(4, 2, "replicas", id="2 stages of replicas", marks=pytest.mark.slow),
        pytest.param(4, 2, "fully_shard", id="2 stages of shards", marks=pytest.mark.slow),
    ],
)
def test_stages_train_as_one_process(request: Any, schedule: str, count: int, replicas: int, kind: str) -> None:
    if kind == "replicas" and schedule == "GPipe":
        pytest.skip("DistributedDataParallel waits for itself under GPipe, also without ties")
    ranks = request.getfixturevalue("two_ranks") if count == 2 else request.getfixturevalue("four_ranks")
    expected = trained_in_one_process()
    answers = ranks.run(trained_in_stages, schedule, replicas, kind)
    for answer in answers:
        for key, value in answer.items():
            if key in expected:
                torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)
    for suffix in ("weight", "weight.moment"):
        first, last = ([answer[key] for answer in answers if key in answer] for key in (f"0.{suffix}", f"5.{suffix}"))
        assert len(first) == len(last) == replicas
        assert all(same_bits(value, first[0]) for value in (*first, *last))


# --- other ties of two ranks, compared with one process ---

SHAPES = [(5, 3), (3, 6)]
# Of the rows of the first weight and of the columns of the second one.
labels_of_both = st.tuples(
    *(st.lists(st.sampled_from([-1, 0, 3, 7, 2**62]), min_size=n, max_size=n).map(torch.tensor) for n in (5, 6))
)


def weights(seed: int) -> list[Tensor]:
    return [randn(*shape, seed=seed + number, dtype=torch.float64) for number, shape in enumerate(SHAPES)]


class Course(NamedTuple):
    """What happens to two tied weights.

    Attributes:
        start: of the values that they share.
        reduction: of the gradients.
        strength: of the ties.
        clips: whether they are clipped.
        tied_at: the step before which they are tied.
        missing: the steps at which each of the weights has no gradient.
        written: the steps before which each of the weights is written to.
    """

    start: Literal["mean", "first"]
    reduction: Literal["mean", "sum"]
    strength: float
    clips: bool
    tied_at: int
    missing: tuple[set[int], set[int]]
    written: tuple[set[int], set[int]]
    inner: Literal["AdamW", "Adam", "SGD"]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": partial(AdamW, lr=0.1),
    # These are not linear in the weights.
    "Adam": partial(Adam, lr=0.1, weight_decay=0.1),
    "SGD": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
}
STEPS = 4
some_steps = st.sets(st.integers(0, STEPS - 1), max_size=2)
exact = st.builds(
    Course,
    st.sampled_from(["mean", "first"]),
    st.sampled_from(["mean", "sum"]),
    st.just(1.0),
    st.booleans(),
    st.sampled_from([0, 2]),
    st.tuples(some_steps, some_steps),
    st.tuples(some_steps, some_steps),
    st.sampled_from(list(OPTIMIZERS)),
)
courses = exact | exact.map(lambda course: course._replace(start="mean", reduction="mean", strength=0.5))


def trained(params: Sequence[Parameter], numbers: Sequence[int], ties: Any, course: Course) -> list[Any]:
    """Take these weights of the two through a course, and return what is left of them."""
    optimizer, norms = OPTIMIZERS[course.inner](params), []
    for step in range(STEPS):
        for param, number in zip(params, numbers, strict=True):
            # Before they are tied the weights have their own state, and all of them have some.
            missing = step in course.missing[number] and (step >= course.tied_at > 0 or step > 0)
            param.grad = None if missing else weights(10 * (step + 1))[number]
            if step in course.written[number]:
                param.detach().mul_(1.5)
        if step == course.tied_at:
            optimizer = TiedOptimizer(optimizer, ties, start=course.start)
        if step >= course.tied_at and course.clips:
            norms.append(float(optimizer.clip_grad_norm_(1.0)))
        optimizer.step()
        if step == course.tied_at:
            optimizer.retie(optimizer.ties)
    optimizer.tie_gradients()
    state = [optimizer.state[param].get(key, param) for param in params for key in ("exp_avg", "momentum_buffer")]
    gradients = [param.grad for param in params]
    return [[param.detach() for param in params], gradients, state, norms, optimizer.tie_drift(), repr(optimizer.ties)]


def trained_on_a_rank(labels: Sequence[Tensor], course: Course) -> list[Any]:
    rank = dist.get_rank()
    param = Parameter(weights(0)[rank])
    options: dict[str, Any] = {"reduction": course.reduction, "strength": course.strength}
    tie = Tie(param, labels[rank], dim=rank, **options, across=dist.group.WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Members were written to.
        return trained([param], [rank], tie, course)


@given(labels=labels_of_both, course=courses)
@pytest.mark.filterwarnings("ignore:Tied weights were")
def test_other_parameters_on_two_ranks_train_as_joined_ones(two_ranks: Ranks, labels: Any, course: Course) -> None:
    params = [Parameter(weight) for weight in weights(0)]
    options: dict[str, Any] = {"reduction": course.reduction, "strength": course.strength}
    ties = [Tie(param, labels[n], dim=n, **options) for n, param in enumerate(params)]
    expected = trained(params, [0, 1], Tie.join(*ties), course)
    answers = two_ranks.run(trained_on_a_rank, labels, course)

    for rank, (weight, gradient, state, norms, drift, said) in enumerate(answers):
        near([*weight, *gradient, *state], [expected[0][rank], expected[1][rank], *expected[2][2 * rank :][:2]])
        near(torch.tensor(norms), torch.tensor(expected[3]))
        near(drift, expected[4])
        assert "across 2 ranks" in said
        # A weight without gradients is not stepped, and stays as it was written.
        assert drift == 0 or any(course.written) or course.strength < 1
    (first,), (second,) = (weight for weight, *_ in answers)
    for label in set(labels[0].tolist()) & set(labels[1].tolist()) - {-1}:
        assert drift or torch.equal(first[labels[0] == label][0], second.T[labels[1] == label][0])


def near(values: Any, expected: Any) -> None:
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


# --- ranks that go apart ---


def tied_row(**options: Any) -> tuple[Parameter, Tie, TiedOptimizer]:
    """A weight of this rank whose first row is that of the other rank, its tie, and the optimizer."""
    weight = Parameter(randn(4, 2, seed=dist.get_rank()))
    tie = Tie(weight, [[0]], across=dist.group.WORLD)
    # An object of which every process has another one.
    settings = {"params": [weight], "note": lambda: None, "number": object()}
    optimizer = TiedOptimizer(AdamW([settings], lr=0.1), tie, **options)
    weight.grad = randn(4, 2, seed=10 + dist.get_rank())
    optimizer.step()
    return weight, tie, optimizer


def steps_alone(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.step() if dist.get_rank() else optimizer.tie_drift()


def ties_weights_alone(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.step() if dist.get_rank() else optimizer.tie_weights()


def ties_anew_alone(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.step() if dist.get_rank() else optimizer.retie(tie)


def takes_another_rate(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.param_groups[0]["lr"] += dist.get_rank()
    optimizer.step()


def takes_another_rate_in_a_tensor(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5 + dist.get_rank())
    optimizer.step()


def freezes_one(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    weight.requires_grad_(dist.get_rank() == 0)
    optimizer.step()


def converts_one(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    if dist.get_rank():
        weight.data, weight.grad = weight.data.double(), weight.grad.double()
    optimizer.step()


def fails_within(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    """The inner step fails, once gradients are tied."""
    if dist.get_rank():
        optimizer.state[weight]["exp_avg"] = None
    optimizer.step()


def fails_in_a_closure(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.step(lambda: 1 // (1 - dist.get_rank()))


def has_a_graph(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    if dist.get_rank():
        weight.grad = weight.grad * torch.ones((), requires_grad=True)
    optimizer.step()


def names_no_parameter(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    other = Parameter(weight.detach().clone())
    TiedOptimizer(AdamW([weight if dist.get_rank() else other]), tie)


def has_another_class(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    TiedOptimizer((AdamW, SGD)[dist.get_rank()]([weight]), tie)


def starts_otherwise(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    TiedOptimizer(AdamW([weight]), tie, start=("mean", "first")[dist.get_rank()])


def has_state_alone(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    bare = AdamW([weight])
    if dist.get_rank():
        bare.step()
    TiedOptimizer(bare, tie)


def unties_alone(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.step() if dist.get_rank() else optimizer.untie()


def clips_by_another_norm(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.clip_grad_norm_(1.0 + dist.get_rank())


def clips_by_no_norm(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.clip_grad_norm_(math.nan if dist.get_rank() else 1.0)


def ties_gradients_with_a_graph(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    if dist.get_rank():
        weight.grad = weight.grad * torch.ones((), requires_grad=True)
    optimizer.tie_gradients()


def loads_another_state(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    state = optimizer.state_dict()
    if dist.get_rank():
        state["tieopt"] = {"ties": {0: "others"}}
    optimizer.load_state_dict(state)


def loads_alone(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    optimizer.step() if dist.get_rank() else optimizer.load_state_dict(optimizer.state_dict())


def starts_nowhere(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    start: Any = "mean" if dist.get_rank() else "frist"
    TiedOptimizer(AdamW([weight]), tie, start=start)


def ties_what_is_tied(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    TiedOptimizer(AdamW([weight]) if dist.get_rank() else optimizer, tie)


def points_to_other_memory(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    other = Parameter(randn(4, 2))
    optimizer.add_param_group({"params": [other]})
    if dist.get_rank():
        weight.data = other.data
    optimizer.step()


def joins_what_is_tied(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    other = Parameter(weight.detach().clone())
    more = [Tie.join(Tie(weight, [[1]]), Tie(other, [[1]]))] * dist.get_rank()
    TiedOptimizer(AdamW([weight, other]), [tie, *more])


def has_state_of_some(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    other = Parameter(weight.detach().clone())
    bare = AdamW([weight, other])
    other.grad = weight.grad if dist.get_rank() else None
    bare.step()
    TiedOptimizer(bare, Tie.join(tie, Tie(other, [[0]], across=dist.group.WORLD)), start="first")


def ties_twice(weight: Parameter, tie: Tie, optimizer: TiedOptimizer) -> None:
    other = Parameter(weight.detach().clone())
    more = [Tie(other, [[1]], across=dist.group.WORLD)] * dist.get_rank()
    TiedOptimizer(AdamW([weight, other]), [tie, *more])
    optimizer.tie_drift()


def went_apart(scenario: Callable[[Parameter, Tie, TiedOptimizer], None]) -> tuple[str, Tensor, float]:
    """What a rank says of it, and its weight and the drift after both have gone on from the same state."""
    weight, tie, optimizer = tied_row()
    before = weight.detach().clone()
    said = refusal_of(Exception, scenario, weight, tie, optimizer)
    weight.data, weight.grad = before, randn(4, 2, seed=20 + dist.get_rank())
    weight.requires_grad_()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.state.clear()
    optimizer.retie(tie)
    optimizer.step()
    return said, weight.detach(), optimizer.tie_drift()


@pytest.mark.parametrize(
    ("scenario", "first", "second"),
    [
        (steps_alone, "rank 0: tie_drift()", "rank 1: begin a step"),
        (ties_weights_alone, "rank 0: tie members", "rank 1: begin a step"),
        (ties_anew_alone, "rank 0: retie() with 1 ties", "rank 1: begin a step"),
        (takes_another_rate, "rank 0: lr=0.1", "rank 1: lr=1.1"),
        (takes_another_rate_in_a_tensor, "rank 0: lr=0.5", "rank 1: lr=1.5"),
        (freezes_one, "requires_grad=True", "requires_grad=False"),
        (converts_one, "torch.float32", "torch.float64"),
        (fails_within, "after AttributeError", "NoneType"),
        (fails_in_a_closure, "after ZeroDivisionError", "by zero"),
        (has_a_graph, "after RuntimeError: A gradient that is tied across ranks has a graph", "has a graph"),
        (names_no_parameter, "does not hold", "after ValueError: "),
        (has_another_class, "rank 0: optimizer='AdamW'", "rank 1: optimizer='SGD'"),
        (starts_otherwise, "start='mean'", "start='first'"),
        (has_state_alone, "rank 0: state=[]", "rank 1: state=['exp_avg', 'exp_avg_sq']"),
        (has_state_of_some, "no exp_avg of", "after ValueError: Parameters of a tie across ranks have no state"),
        (unties_alone, "rank 0: retie() with 0 ties", "rank 1: begin a step"),
        (clips_by_another_norm, "clip_grad_norm_(1.0)", "clip_grad_norm_(2.0)"),
        (clips_by_no_norm, "after ValueError: max_norm is no norm", "max_norm is no norm"),
        (ties_gradients_with_a_graph, "has a graph", "has a graph"),
        (loads_another_state, "after ValueError: The state was saved with other ties", "saved with other ties"),
        (loads_alone, "rank 0: load_state_dict()", "rank 1: begin a step"),
        (starts_nowhere, "'frist'", "after ValueError: Unknown start"),
        (ties_what_is_tied, "is tied already", "after TypeError: The optimizer is tied already"),
        (points_to_other_memory, "after ValueError", "memory"),
        (joins_what_is_tied, "after ValueError: A parameter that is tied", "joined by another tie"),
        (ties_twice, "tie 1 across them", "tie 1 across them"),
    ],
)
def test_ranks_that_go_apart_are_all_told_and_can_go_on(
    two_ranks: Ranks, scenario: Callable[..., None], first: str, second: str
) -> None:
    answers = two_ranks.run(went_apart, scenario)
    for said, _, drift in answers:
        assert drift == 0
        assert said
    assert first in answers[0][0]
    assert second in answers[1][0]
    assert torch.equal(answers[0][1][0], answers[1][1][0])


def told(lengths: Sequence[int]) -> list[int]:
    across = Across(dist.group.WORLD, 0, False, torch.arange(1))
    return [len(text) for text in agree(across, "tell", payload="x" * lengths[dist.get_rank()])]


@pytest.mark.parametrize("lengths", [[1, 2], [1, 10_000], [10_000, 1], [5_000, 10_000]])
def test_ranks_tell_each_other_what_is_long_as_well_as_what_is_short(two_ranks: Ranks, lengths: list[int]) -> None:
    assert two_ranks.run(told, lengths) == [lengths] * 2


def waits_for_a_dead_rank() -> None:
    _, _, optimizer = tied_row()
    if dist.get_rank():
        os._exit(1)
    optimizer.step()


@pytest.mark.slow
def test_a_rank_that_is_dead_is_an_error_of_torch_on_the_others() -> None:
    died = r"(?s)rank 0: .*in all_gather.*Connection (closed|reset) by peer.*rank 1: the process has died"
    with Ranks(2) as started, pytest.raises(AssertionError, match=died):
        started.run(waits_for_a_dead_rank)


def skips_infinities() -> list[bool]:
    """Whether steps were taken, where one rank has an infinite gradient in the first of two."""
    weight, _, optimizer = tied_row()
    scaler, moved = ShardedGradScaler(device="cpu", init_scale=2.0, process_group=dist.group.WORLD), []
    for step in range(2):
        before = weight.detach().clone()
        weight.grad = scaler.scale(torch.ones(4, 2) if step or not dist.get_rank() else torch.full((4, 2), math.inf))
        scaler.step(optimizer)
        scaler.update()
        moved.append(not same_bits(weight, before))
    return [*moved, optimizer.tie_drift() == 0]


def test_a_scaler_of_all_ranks_skips_a_step_on_all(two_ranks: Ranks) -> None:
    for said in two_ranks.run(skips_infinities):
        assert said == [False, True, True]


# --- what else there is on a rank ---


# The ranks that have gradients in a step; those in between have no members.
TRAINED = [(2, 3), (3,), (1, 2)]


def without_members(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """The ends of four ranks are tied; what is between them has no members, and counts in the norm."""
    rank = dist.get_rank()
    weight = Parameter(weights[rank].clone())
    labels = [[0, 1, 2], [-1] * 3, [-1] * 3, [2, 1, 0]][rank]
    optimizer = SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    weight.grad = weights[rank] + 1
    optimizer.step()
    optimizer = TiedOptimizer(optimizer, Tie(weight, torch.tensor(labels), across=dist.group.WORLD))
    for trained in TRAINED:
        weight.grad = weights[rank] - 1 if rank in trained else None
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]["momentum_buffer"], float(norm)


@pytest.mark.slow
def test_ranks_without_members_take_part_in_the_norm_alone(four_ranks: Ranks) -> None:
    shapes = [(3, 2), (3, 5), (3, 1), (3, 2)]
    values = [randn(*shape, seed=number, dtype=torch.float64) for number, shape in enumerate(shapes)]
    params = [Parameter(value.clone()) for value in values]
    optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    for param, value in zip(params, values, strict=True):
        param.grad = value + 1
    optimizer.step()
    first, *_, last = params
    optimizer = TiedOptimizer(optimizer, Tie.join(Tie(first, [[0], [1], [2]]), Tie(last, [[2], [1], [0]])))
    for trained in TRAINED:
        for rank, (param, value) in enumerate(zip(params, values, strict=True)):
            param.grad = value - 1 if rank in trained else None
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    for (weight, momentum, clipped_by), param in zip(four_ranks.run(without_members, values), params, strict=True):
        near([weight, momentum], [param.detach(), optimizer.state[param]["momentum_buffer"]])
        near(clipped_by, float(norm))


def of_every_kind(dtype: torch.dtype) -> tuple[list[Tensor], float, float, str]:
    """Two joined parameters on each rank, in single entries, relaxed, beside rows of one of them alone."""
    rank, world = dist.get_rank(), dist.group.WORLD
    params = [Parameter(randn(*shape, seed=10 * rank, dtype=dtype)) for shape in [(4, 3), (5,), *[(2, 3)] * 3]]
    matrix, vector, rows, other, more = params
    joined = Tie.join(
        Tie(matrix, torch.arange(12).view(4, 3) % (5 + rank), across=world), Tie(vector, torch.arange(5), across=world)
    )
    ties = [joined, Tie(rows, [[rank]], strength=0.5, across=world), Tie(other, [[rank]], strength=0.25, across=world)]
    # Of one rank alone: the strengths come in another order.
    ties = [*ties, Tie(more, [[0, 1]], strength=0.25)] if rank else [Tie(more, [[0, 1]], strength=0.25), *ties]
    optimizer = TiedOptimizer(SGD(params, lr=0.1, momentum=0.9, foreach=True), ties)
    for step in range(3):
        for param in params:
            param.grad = randn(*param.shape, seed=100 * rank + step, dtype=dtype)
        if rank == 0:
            matrix.grad = matrix.grad.to_sparse(1)
        optimizer.step()
    apart = optimizer.tie_drift()
    copied = copy.deepcopy(optimizer)
    assert repr(copy.deepcopy(optimizer.ties)) == repr(optimizer.ties)
    optimizer.tie_weights()
    copied.tie_weights()
    assert all(map(torch.equal, *([*held.param_groups[0]["params"]] for held in (optimizer, copied))))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    return [param.detach() for param in params], apart, optimizer.tie_drift(), str(optimizer.tie_summary())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_ties_of_every_kind_hold_across_ranks(two_ranks: Ranks, dtype: torch.dtype) -> None:
    (first, apart, drift, _), (second, *_) = two_ranks.run(of_every_kind, dtype)
    assert apart > 0
    assert drift == 0
    values, numbers = first[1], torch.arange(12) % 6
    assert torch.equal(values, second[1])
    assert torch.equal(first[0].flatten(), values[torch.arange(12) % 5])
    assert torch.equal(second[0].flatten()[numbers < 5], values[numbers[numbers < 5]])
    assert torch.equal(first[2][0], second[2][1])


def starts_from_the_first() -> Tensor:
    weight = Parameter(torch.tensor([[1.0], [math.inf], [math.nan]]).roll(-dist.get_rank(), 0))
    TiedOptimizer(SGD([weight]), Tie(weight, torch.arange(3), across=dist.group.WORLD), start="first")
    return weight.detach()


def test_what_later_ranks_have_does_not_count_where_the_first_one_is_taken(two_ranks: Ranks) -> None:
    for weight in two_ranks.run(starts_from_the_first):
        assert same_bits(weight, torch.tensor([[1.0], [math.inf], [math.nan]]))


# --- shards of stages ---


def of_shards(placements: Sequence[Any], sizes: Sequence[int], shift: int | None) -> str:
    """Rows on two stages of two shards each; the second stage has other rows at the same place."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "replicas"))
    stage = mesh["stages"].get_local_rank()
    weight = Parameter(distribute_tensor(randn(sizes[stage], 2), mesh["replicas"], [placements[stage]]))
    # Without a shift all rows are one group.
    labels = torch.zeros(8) if shift is None else torch.arange(sizes[stage]).roll(shift * stage)
    tie = Tie(weight, labels.long(), across=mesh.get_group("stages"))
    return refusal_of(ValueError, TiedOptimizer, SGD([weight], lr=0.1), tie)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placements", "sizes", "shift", "is_refused"),
    [
        ((Shard(0), Shard(0)), (8, 8), 0, False),
        ((Shard(1), Shard(1)), (8, 8), 3, False),
        ((Shard(0), Shard(0)), (8, 10), 0, True),
        ((Shard(0), Shard(0)), (8, 8), 3, True),
        ((Shard(0), Replicate()), (8, 8), 0, True),
        ((Shard(0), Shard(0)), (8, 8), None, True),
    ],
    ids=["alike", "columns", "padded", "permuted", "replicated", "spanning"],
)
def test_members_with_other_places_in_the_mesh_are_refused_on_all_ranks(
    four_ranks: Ranks, placements: Any, sizes: Any, shift: int | None, is_refused: bool
) -> None:
    for said in four_ranks.run(of_shards, placements, sizes, shift):
        assert ("different ranks of a mesh" in said) == is_refused


def joined_shards(same: bool) -> str:
    """Rows and columns of two parameters, both sharded by their rows, so that one is cut between slices."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "replicas"))
    weights = [Parameter(distribute_tensor(randn(4, 4, seed=n), mesh["replicas"], [Shard(0)])) for n in range(2)]
    across = mesh.get_group("stages")
    if same:
        tie = Tie.join(*(Tie(weight, torch.arange(4), across=across) for weight in weights))
    else:
        tie = Tie.join(*(Tie(weight, torch.arange(4), dim=dim, across=across) for dim, weight in enumerate(weights)))
    return refusal_of(ValueError, TiedOptimizer, SGD(weights, lr=0.1), tie)


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_joined_shards_are_tied_across_stages_where_each_group_is_on_one_rank_of_a_stage(
    four_ranks: Ranks, same: bool
) -> None:
    for said in four_ranks.run(joined_shards, same):
        assert ("different ranks of a mesh" in said) != same


# --- checkpoints ---


def resumed(folder: str) -> list[bool]:
    """Whether stages that were loaded train on as those that were saved, to the last bit."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def stage(seed: int) -> tuple[nn.Module, TiedOptimizer]:
        torch.manual_seed(10 * seed + dist.get_rank())
        names = (("0", nn.Embedding(5, 3)), ("1", nn.Linear(3, 3))), (("2", nn.Linear(3, 3)), ("3", nn.Linear(3, 5)))
        module = nn.ModuleDict(dict(names[dist.get_rank()]))
        tied = module["0" if dist.get_rank() == 0 else "3"].weight
        optimizer = AdamW(module.named_parameters(), lr=0.1)
        return module, TiedOptimizer(optimizer, Tie(tied, torch.arange(5), across=dist.group.WORLD))

    def step(module: nn.Module, optimizer: TiedOptimizer, seed: int) -> None:
        for number, param in enumerate(module.parameters()):
            param.grad = randn(*param.shape, seed=100 * seed + 10 * dist.get_rank() + number)
        optimizer.step()

    def state_of(module: nn.Module, optimizer: TiedOptimizer) -> dict[str, Any]:
        return {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer, options=options)}

    saved, loaded = stage(0), stage(1)
    step(*saved, 1)
    checkpoint.save(state_of(*saved), checkpoint_id=folder)
    state = state_of(*loaded)
    checkpoint.load(state, checkpoint_id=folder)
    loaded[0].load_state_dict(state["model"])
    set_optimizer_state_dict(*loaded, state["optimizer"], options=options)
    for both in (saved, loaded):
        step(*both, 2)
    return [same_bits(*both) for both in zip(saved[0].parameters(), loaded[0].parameters(), strict=True)]


@pytest.mark.host("torch.distributed.checkpoint", "two stages whose ends are tied: resumed to the last bit")
def test_stages_are_saved_and_loaded(two_ranks: Ranks, tmp_path: Path) -> None:
    for same in two_ranks.run(resumed, str(tmp_path / "checkpoint")):
        assert all(same)


# --- what ties nothing, or cannot be tied ---


def ties_nothing() -> list[str]:
    weight = Parameter(randn(2, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TiedOptimizer(SGD([weight]), Tie(weight, [[0], [1]][dist.get_rank() :], across=dist.group.WORLD))
        TiedOptimizer(SGD([weight]), Tie(weight, torch.arange(2) + 2 * dist.get_rank(), across=dist.group.WORLD))
    return [str(warning.message) for warning in caught]


def test_a_tie_of_different_labels_warns(two_ranks: Ranks) -> None:
    for said in two_ranks.run(ties_nothing):
        assert len(said) == 1
        assert "ties nothing" in said[0]


def cannot_be_tied(make: Callable[[Parameter], Any]) -> str:
    weight = Parameter(randn(4, 2, seed=dist.get_rank()))
    before = weight.detach().clone()
    said = refusal_of(Exception, make, weight)
    assert same_bits(weight, before)
    return said


def of_other_options(weight: Parameter) -> Any:
    reduction: Any = ("mean", "sum")[dist.get_rank()]
    return TiedOptimizer(SGD([weight]), Tie(weight, [[0]], reduction=reduction, across=dist.group.WORLD))


def of_other_shapes(weight: Parameter) -> Any:
    return TiedOptimizer(SGD([weight]), Tie(weight, [[0]], dim=dist.get_rank(), across=dist.group.WORLD))


def of_scales(weight: Parameter) -> Any:
    return Tie(weight, [[0]], scale=torch.full((4,), 0.5), across=dist.group.WORLD)


def of_offsets(weight: Parameter) -> Any:
    return Tie(weight, [[0]], offset=1.0, across=dist.group.WORLD)


def of_the_compact_mode(weight: Parameter) -> Any:
    return TiedOptimizer(SGD([weight]), Tie(weight, [[0]], across=dist.group.WORLD), compact=True)


def of_unions(weight: Parameter) -> Any:
    return Tie.union(Tie(weight, [[0]], across=dist.group.WORLD), Tie(weight, [[0, 1]]))


def of_joins(weight: Parameter) -> Any:
    return Tie.join(Tie(weight, [[0]], across=dist.group.WORLD), Tie(weight, [[1]]))


def of_names(weight: Parameter) -> Any:
    return Tie.equal("weight", across=dist.group.WORLD)


def of_line_searches(weight: Parameter) -> Any:
    return TiedOptimizer(LBFGS([weight]), Tie(weight, [[0]], across=dist.group.WORLD))


def of_pulls_now_and_then(weight: Parameter) -> Any:
    return TiedOptimizer(SGD([weight]), Tie(weight, [[0]], strength=0.5, every=2, across=dist.group.WORLD))


def of_other_heights(weight: Parameter) -> Any:
    taller = Parameter(randn(4 + dist.get_rank(), 2))
    return TiedOptimizer(SGD([taller]), Tie.equal(taller, across=dist.group.WORLD))


def of_two_process_groups(weight: Parameter) -> Any:
    other = Parameter(randn(4, 2))
    ties = [Tie(weight, [[0]], across=dist.group.WORLD), Tie(other, [[0]], across=dist.new_group([0, 1]))]
    return TiedOptimizer(SGD([weight, other]), ties)


def of_no_group(weight: Parameter) -> Any:
    across: Any = -100
    return Tie(weight, [[0]], across=across)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (of_other_options, "have different ties"),
        (of_other_shapes, "have different ties"),
        (of_scales, "without scale and offset"),
        (of_offsets, "without scale and offset"),
        (of_the_compact_mode, "ties of this rank alone"),
        (of_unions, "cannot be united."),
        (of_joins, "across different ranks"),
        (of_names, "not tied across ranks"),
        (of_line_searches, "a loss of its own"),
        (of_pulls_now_and_then, "every=1"),
        (of_other_heights, "shape=(5, 2)"),
        (of_two_process_groups, "several process groups"),
        (of_no_group, "no process group"),
    ],
)
def test_what_cannot_be_tied_across_ranks_is_refused_on_all(
    two_ranks: Ranks, make: Callable[[Parameter], Any], text: str
) -> None:
    for said in two_ranks.run(cannot_be_tied, make):
        assert text in said
