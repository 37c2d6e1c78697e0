"""Labels that are sharded with their parameter: the ties of whole labels, bit for bit, and no rank has all labels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from checks import pickled, randn, same_bits, same_tree
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks, refusal_of
from strategies import few_examples, seeds
from test_sharded import INNER, SHARDED, layouts, mesh_of, mesh_on, mlp, share_of, train, whole
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tieopt import Tie, TiedOptimizer, frozen, is_tied, plot, tie_
from tieopt.engine.exchange import plan_exchange
from tieopt.engine.planning import Peers, plan_together
from tieopt.ties.slices import FREE, Slices, labels_before, numbered

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")


def sharded_as(labels: Tensor, param: DTensor, dim: int = 0) -> DTensor:
    """Labels of the slices of a parameter, each on the ranks that have its slice."""
    placements = [Shard(0) if placement == Shard(dim) else Replicate() for placement in param.placements]
    return distribute_tensor(labels, param.device_mesh, placements)


# --- training, compared with whole labels ---


class Course(NamedTuple):
    """A weight, how it lies, its tie, and how it is trained."""

    weight: Tensor
    mesh_shape: tuple[int, ...]
    placements: Sequence[Any]
    labels: Tensor
    dim: int
    inner: str
    start: str
    options: dict[str, Any]


@st.composite
def courses(draw: Any, count: int) -> Course:
    shape = draw(st.sampled_from([(7, 5), (3, 9), (1, 4), (8, 3, 2)]))
    dim = draw(st.integers(0, len(shape) - 1))
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(shape, dtype=torch.complex128, generator=generator)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]))
    dtype_of_labels = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    labels = torch.randint(0 if dtype_of_labels == torch.uint8 else -1, 4, (shape[dim],), generator=generator)
    labels = labels.to(dtype_of_labels)
    if dtype_of_labels == torch.int64 and draw(st.booleans()):
        labels[labels > 0] += 2**62
    options = draw(st.sampled_from([{}, {"reduction": "sum"}, {"strength": 0.5}, {"strength": 0.5, "every": 2}]))
    start = draw(st.sampled_from(["mean", "first"])) if "strength" not in options else "mean"
    inner = draw(st.sampled_from(sorted(INNER)))
    weight = (weight if dtype.is_complex else weight.real).to(dtype)
    return Course(weight, *draw(layouts(count)), labels, dim, inner, start, options)


def trained(course: Course, *, shards_labels: bool) -> list[Any]:
    """What is left of a weight once it was trained, tied, retied, copied, resumed, clipped and untied."""
    mesh = mesh_of(tuple(course.mesh_shape))
    param = Parameter(distribute_tensor(course.weight.clone(), mesh, course.placements))
    labels = sharded_as(course.labels, param, course.dim) if shards_labels else course.labels
    answers: list[Any] = []

    def step(optimizer: Any, seed: int) -> None:
        full = (course.weight * seed).roll(seed, 0)
        param.grad = distribute_tensor(full, mesh, course.placements)
        optimizer.step()
        answers.append(param.full_tensor().detach().clone())

    bare = INNER[course.inner]([param])
    step(bare, 1)
    answers.append(is_tied(param, labels, dim=course.dim))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The tie may tie nothing.
        tie = Tie(param, labels, dim=course.dim)
        optimizer = TiedOptimizer(bare, tie, start=course.start, **course.options)
        step(optimizer, 2)
        # Nothing to do: a step without a gradient.
        param.grad = None
        optimizer.step()
        optimizer.retie(optimizer.ties)
    step(optimizer, 3)
    optimizer = copy.deepcopy(optimizer)
    (param,) = optimizer.param_groups[0]["params"]
    step(optimizer, 4)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer = pickled(optimizer)
    (param,) = optimizer.param_groups[0]["params"]
    step(optimizer, 5)
    with torch.no_grad():
        param.mul_(1.5)
    answers.append(float(optimizer.grad_norm()))
    answers.append(float(optimizer.clip_grad_norm_(0.5)))
    optimizer.tie_gradients()
    answers.append(param.grad.full_tensor())
    optimizer.tie_weights()
    summary = optimizer.tie_summary()
    answers += [optimizer.tie_drift(), str(summary), summary.rows, summary.distinct, summary.ratio, repr(optimizer)]
    answers.append(is_tied(param, labels, dim=course.dim))
    answers += [value.full_tensor() for value in optimizer.state[param].values() if isinstance(value, DTensor)]
    (given,) = optimizer.ties
    (part,) = given.parts
    groups = part.groups.full_tensor() if shards_labels else part.groups
    answers.append(numbered([Slices(groups)])[0].labels)
    if shards_labels:
        assert "on this rank" in repr(given)
        assert same_bits(groups, course.labels.long())
    optimizer.untie()
    step(optimizer, 6)
    tie_(param, labels, dim=course.dim)
    answers.append(param.full_tensor().detach())
    return answers


def trained_both_ways(course: Course) -> tuple[list[Any], list[Any]]:
    return trained(course, shards_labels=True), trained(course, shards_labels=False)


@few_examples
@given(data=st.data())
def test_sharded_labels_tie_as_whole_ones_bit_for_bit_on_all_ranks(ranks: Ranks, data: Any) -> None:
    course = data.draw(courses(ranks.count))
    answers = ranks.run(trained_both_ways, course)

    for by_shards, by_all in answers:
        assert same_tree(by_shards, by_all)
        assert same_tree(by_shards, answers[0][0])


ROW_LABELS = torch.tensor([0, 1, 1, 0, 2, 2, -1, -1, 5, 0, -1, 5])


def trained_model(how: str, inner: str, reduction: str, *, shards_labels: bool) -> list[Tensor]:
    model = mlp()
    SHARDED[how](model, dist.get_world_size())
    # Of nine rows the last of four ranks has none.
    labels = {"0.weight": ROW_LABELS, "0.bias": ROW_LABELS, "2.weight": ROW_LABELS[:9]}
    params = dict(model.named_parameters())
    ties = {name: sharded_as(own, params[name]) if shards_labels else own for name, own in labels.items()}
    optimizer = TiedOptimizer(INNER[inner](model.named_parameters()), ties, reduction=reduction)
    train(model, optimizer, range(3), share_of(how))
    assert optimizer.tie_drift() == 0
    return whole(model)


def trained_model_both_ways(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    return trained_model(*args, shards_labels=True), trained_model(*args, shards_labels=False)


@pytest.mark.parametrize("how", SHARDED)
@pytest.mark.parametrize(("inner", "reduction"), [("AdamW", "mean"), ("SGD", "sum")])
def test_models_train_as_with_whole_labels(ranks: Ranks, how: str, inner: str, reduction: str) -> None:
    answers = ranks.run(trained_model_both_ways, how, inner, reduction)

    for by_shards, by_all in answers:
        assert same_tree(by_shards, by_all)
        assert same_tree(by_shards, answers[0][0])


def tied_in_halves(labels: Tensor) -> Tensor:
    """A tensor of which each half of the ranks has all rows, in a process group of all."""
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(2, -1, 1))
    param = Parameter(distribute_tensor(randn(8, 3), mesh, [Replicate(), Shard(0), Shard(0)]))
    optimizer = TiedOptimizer(SGD([param]), Tie(param, sharded_as(labels, param)))
    assert optimizer.tie_summary().rows[0][2:6] == (8, 3, 7, 1)
    return param.full_tensor().detach()


def test_replicas_in_one_process_group_tie_apart(ranks: Ranks) -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 0, -1, 2])
    answers = ranks.run(tied_in_halves, labels)

    torch.testing.assert_close(answers[0], tie_(randn(8, 3), labels))
    assert all(same_bits(answer, answers[0]) for answer in answers)


def trained_on_some(numbers: tuple[int, ...], labels: Tensor, dim: int) -> Tensor | None:
    """A weight that was trained on a mesh of some ranks; None on the others."""
    mesh = mesh_on(numbers)
    param = Parameter(distribute_tensor(randn(8, 8), mesh, [Shard(0)]))
    optimizer = TiedOptimizer(AdamW([param]), Tie(param, sharded_as(labels, param, dim), dim=dim))
    param.grad = distribute_tensor(randn(8, 8, seed=1), mesh, [Shard(0)])
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.retie(optimizer.ties)
    assert optimizer.tie_drift() == 0
    assert optimizer.tie_summary()
    return param.full_tensor().detach() if dist.get_rank() in numbers else None


@pytest.mark.parametrize("dim", [0, 1])
def test_ranks_outside_the_mesh_have_nothing_to_tie(ranks: Ranks, dim: int) -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 0, -1, 2])
    everywhere = ranks.run(trained_on_some, tuple(range(ranks.count)), labels, dim)
    answers = ranks.run(trained_on_some, tuple(range(1, ranks.count)), labels, dim)

    assert answers[0] is None
    for answer in answers[1:]:
        torch.testing.assert_close(answer, everywhere[0])


# --- checkpoints ---


def fingerprint(labels: Tensor, numbers: tuple[int, ...], placements: Sequence[Any]) -> Any:
    mesh = mesh_on(numbers)
    if dist.get_rank() not in numbers:
        return None
    param = Parameter(distribute_tensor(torch.zeros(len(labels), 2), mesh, placements))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The tie may tie nothing.
        optimizer = TiedOptimizer(SGD([param]), Tie(param, sharded_as(labels, param)))
    # A state_dict takes no other rank, also of a copy.
    return next(copy.deepcopy(optimizer).state_dict()["tieopt"] for _ in range(dist.get_rank() + 1))


labels_of_ten = st.lists(st.integers(-1, 3), min_size=10, max_size=10).map(torch.tensor)


def without_single_groups(labels: Tensor) -> Tensor:
    alone = (labels[:, None] == labels).sum(1) == 1
    return numbered([Slices(torch.where(alone, FREE, labels))])[0].labels


@given(labels_of_ten, labels_of_ten)
def test_fingerprints_tell_ties_and_nothing_else(ranks: Ranks, first: Tensor, second: Tensor) -> None:
    everywhere = tuple(range(ranks.count))
    said = ranks.run(fingerprint, first, everywhere, [Shard(0)])
    renamed = torch.where(first == FREE, FREE, 7 * (5 - first))
    others = [
        ranks.run(fingerprint, renamed, everywhere, [Shard(0)]),
        ranks.run(fingerprint, first, (0, 1), [Shard(0)])[:2],
        ranks.run(fingerprint, first, (0,), [Shard(0)])[:1],
        ranks.run(fingerprint, first, everywhere, [Replicate()]),
    ]
    assert all(answer == said[0] for answers in (said, *others) for answer in answers)

    is_same = torch.equal(without_single_groups(first), without_single_groups(second))
    assert (ranks.run(fingerprint, second, everywhere, [Shard(0)])[0] == said[0]) == is_same


def tied_model(labels: Tensor, mesh: DeviceMesh) -> tuple[Any, TiedOptimizer]:
    model = mlp()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    weight = model[0].weight
    return model, TiedOptimizer(INNER["AdamW"](model.parameters()), Tie(weight, sharded_as(labels, weight)))


def saved(folder: str) -> None:
    model, optimizer = tied_model(ROW_LABELS, mesh_of((dist.get_world_size(),)))
    train(model, optimizer, range(3), share_of("fully_shard"))
    checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)


def resumed(folder: str, count: int) -> Any:
    """The weights after two more steps on fewer ranks, and what refuses them with other ties."""
    group = dist.new_group(list(range(count)))
    if dist.get_rank() >= count:
        return None
    mesh = DeviceMesh.from_group(group, "cpu")
    model, optimizer = tied_model(ROW_LABELS, mesh)
    train(model, optimizer, range(1), slice(dist.get_rank(), None, count))
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.load(content, checkpoint_id=folder, process_group=group)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    _, other = tied_model(ROW_LABELS.roll(1), mesh)
    message = refusal_of(ValueError, other.load_state_dict, content["optimizer"])
    train(model, optimizer, range(3, 5), slice(dist.get_rank(), None, count))
    return whole(model), message


def test_what_was_saved_goes_on_on_fewer_ranks_and_with_the_same_ties_alone(ranks: Ranks, tmp_path: Path) -> None:
    model = mlp()
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), Tie(model[0].weight, ROW_LABELS))
    train(model, optimizer, range(5))
    ranks.run(saved, str(tmp_path / "checkpoint"))

    for count in {ranks.count, 2, 1}:
        for weights, message in ranks.run(resumed, str(tmp_path / "checkpoint"), count)[:count]:
            torch.testing.assert_close(weights, whole(model), rtol=1e-12, atol=1e-12)
            assert "The state was saved with other ties" in message
            assert "4 groups of 9 members, 3 free, sharded labels" in message


# --- the plan ---


def planned(labels: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    rank = dist.get_rank()
    peers = Peers(dist.group.WORLD, torch.arange(len(labels)), rank, len(labels), torch.device("cpu"))
    plan, spanning, members_across, totals = plan_together(labels[rank], peers)
    return plan._asdict(), (spanning, members_across), totals._asdict()


@given(data=st.data())
def test_ranks_plan_together_what_is_planned_with_all_labels(ranks: Ranks, data: Any) -> None:
    some_labels = st.lists(st.sampled_from([-1, -1, 0, 1, 2, 4, 6, 8, 2**62, 2**63 - 1]), max_size=9)
    labels = [torch.tensor(data.draw(some_labels), dtype=torch.int64) for _ in range(ranks.count)]
    given_slices = [Slices(torch.cat(labels))]
    slices = numbered(given_slices)
    names = labels_before(slices, given_slices)
    of_ranks = slices[0].labels.split([len(own) for own in labels])
    sizes = torch.bincount(slices[0].labels + 1, minlength=len(names) + 1)[1:]

    for rank, (plan, (spanning, (on_lower, members)), totals) in enumerate(ranks.run(planned, labels)):
        expected, groups = plan_exchange([own[own != FREE] for own in of_ranks], rank)
        assert same_tree(plan, expected._replace(groups=names[expected.groups])._asdict())
        assert spanning == len(groups)
        here = of_ranks[rank][of_ranks[rank] != FREE].tolist()
        in_order = torch.tensor(list(dict.fromkeys(here)), dtype=torch.int64)
        lower = {label for own in of_ranks[:rank] for label in own.tolist()}
        assert on_lower.tolist() == [label in lower for label in in_order.tolist()]
        assert torch.equal(members, sizes[in_order])
        counts = (len(slices[0].labels), len(names), int(sizes.sum()), int((sizes == 1).sum()))
        assert tuple(totals.values())[:4] == counts


class LargestIntegers(TorchDispatchMode):
    """How long the longest tensor of int64 is that an operator makes or is given, sends included."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.dtype == torch.int64 and not isinstance(value, DTensor):
                self.largest = max(self.largest, *value.shape, 0)
        return result


def largest_while_training(labels_here: Callable[[int, int], Tensor], rows: int) -> int:
    """How long the longest tensor of int64 is while a table is tied, trained and asked."""
    mesh = mesh_of((dist.get_world_size(),))
    count = rows // dist.get_world_size()
    here = labels_here(dist.get_rank() * count, count)
    param = Parameter(DTensor.from_local(torch.randn(count, 1), mesh, [Shard(0)]))
    with LargestIntegers() as seen:
        labels = DTensor.from_local(here, mesh, [Shard(0)])
        optimizer = TiedOptimizer(AdamW([param]), Tie(param, labels))
        param.grad = DTensor.from_local(torch.randn(count, 1), mesh, [Shard(0)])
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.retie(optimizer.ties)
        optimizer.state_dict()
        assert optimizer.tie_drift() == 0
        assert f"{rows}" in optimizer.tie_summary()
    return seen.largest


def at_random(start: int, count: int) -> Tensor:
    """Labels of pairs that are far from each other, and multiples of the number of ranks."""
    return 8 * ((torch.arange(start, start + count) * 7919) % 2**15)


def in_one_group(start: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("labels_here", [at_random, in_one_group])
def test_no_rank_has_all_labels(ranks: Ranks, labels_here: Callable[[int, int], Tensor]) -> None:
    rows = 2**16
    for largest in ranks.run(largest_while_training, labels_here, rows):
        # A home hears of about as many labels as there are in a shard.
        assert rows / ranks.count <= largest < 1.1 * rows / ranks.count


# --- what is refused ---


def line_of(*, shape: tuple[int, ...] = (8, 4), placement: Any = None) -> Parameter:
    mesh = mesh_of((dist.get_world_size(),))
    return Parameter(distribute_tensor(randn(*shape), mesh, [placement or Shard(0)]))


EIGHT = torch.tensor([0, 0, 1, 1, 2, 2, 0, -1])


def wrapped(param: Parameter, ties: Any, inner: Any = SGD, **options: Any) -> TiedOptimizer:
    return TiedOptimizer(inner([param]), ties, **options)


def replicated_labels() -> None:
    param = line_of()
    Tie(param, distribute_tensor(EIGHT, param.device_mesh, [Replicate()]))


def labels_of_rows_for_columns() -> None:
    param = line_of(shape=(4, 8), placement=Shard(0))
    Tie(param, distribute_tensor(EIGHT, param.device_mesh, [Shard(0)]), dim=1)


def labels_on_another_mesh() -> None:
    mesh = mesh_of((dist.get_world_size(), 1))
    Tie(line_of(), distribute_tensor(EIGHT, mesh, [Shard(0), Replicate()]))


def labels_of_a_whole_parameter() -> None:
    Tie(Parameter(randn(8, 4)), sharded_as(EIGHT, line_of()))


def labels_of_a_name() -> None:
    param = line_of()
    labels = distribute_tensor(EIGHT, param.device_mesh, [Replicate()])
    TiedOptimizer(SGD([("weight", param)]), Tie("weight", labels))


def labels_of_kernels() -> None:
    param = line_of()
    Tie(param, distribute_tensor(EIGHT[:, None].expand(8, 4).clone(), param.device_mesh, [Shard(0)]))


def labels_too_few() -> None:
    param = line_of()
    Tie(param, distribute_tensor(EIGHT[:7], param.device_mesh, [Shard(0)]))


def labels_of_floats() -> None:
    Tie(line_of(), sharded_as(EIGHT.double(), line_of()))


def labels_below() -> None:
    Tie(line_of(), sharded_as(EIGHT - 1 - torch.arange(8), line_of()))


def with_a_scale() -> None:
    Tie(line_of(), sharded_as(EIGHT, line_of()), scale=torch.ones(8))


def with_an_offset() -> None:
    Tie(line_of(), sharded_as(EIGHT, line_of()), offset=1.0)


def frozen_by_a_mask() -> None:
    frozen(line_of(), sharded_as(EIGHT, line_of()))


def across_ranks() -> None:
    Tie(line_of(), sharded_as(EIGHT, line_of()), across=dist.group.WORLD)


def joined() -> None:
    Tie.join(*(Tie(param := line_of(), sharded_as(EIGHT, param)) for _ in range(2)))


def joined_by_names() -> None:
    labels = sharded_as(EIGHT, line_of())
    Tie.join(Tie("first", labels), Tie("second", EIGHT))


def united() -> None:
    param = line_of()
    Tie.union(Tie(param, sharded_as(EIGHT, param)), Tie(param, EIGHT))


def united_alone() -> None:
    param = line_of(placement=Shard(1), shape=(4, 8))
    Tie.union(Tie(param, sharded_as(EIGHT, param, 1), dim=1))


def tied_twice() -> None:
    param = line_of()
    wrapped(param, [Tie(param, sharded_as(EIGHT, param)), Tie(param, EIGHT[:4], dim=1)])


def compact() -> None:
    param = line_of()
    wrapped(param, Tie(param, sharded_as(EIGHT, param)), compact=True)


def of_a_line_search() -> None:
    param = line_of()
    wrapped(param, Tie(param, sharded_as(EIGHT, param)), LBFGS, reduction="sum")


def drawn() -> None:
    param = line_of()
    plot.draw_groups(Tie(param, sharded_as(EIGHT, param)))


def cut_otherwise_on_a_rank() -> None:
    param, rank, count = line_of(), dist.get_rank(), dist.get_world_size()
    sizes = [8 - (count - 1), *[1] * (count - 1)]
    here = EIGHT.split(sizes)[rank].clone()
    labels = DTensor.from_local(here, param.device_mesh, [Shard(0)], shape=torch.Size([8]), stride=(1,))
    wrapped(param, Tie(param, labels))


def other_labels_of_replicas() -> None:
    param = line_of(placement=Replicate())
    labels = DTensor.from_local(EIGHT.roll(dist.get_rank()), param.device_mesh, [Replicate()])
    wrapped(param, Tie(param, labels))


def whole_labels_on_a_rank() -> None:
    param = line_of()
    labels = sharded_as(EIGHT, param)
    wrapped(param, Tie(param, EIGHT if dist.get_rank() else labels))


def another_dimension_on_a_rank() -> None:
    param = line_of(shape=(8, 8), placement=Replicate())
    wrapped(param, Tie(param, sharded_as(EIGHT, param), dim=int(dist.get_rank() > 0)))


def sharded_otherwise_since() -> None:
    param = line_of()
    optimizer = wrapped(param, Tie(param, sharded_as(EIGHT, param)))
    optimizer.param_groups[0]["params"][0] = line_of(placement=Replicate())
    optimizer.tie_drift()


def gathered_since() -> None:
    param = line_of()
    optimizer = wrapped(param, Tie(param, sharded_as(EIGHT, param)))
    optimizer.param_groups[0]["params"][0] = Parameter(param.full_tensor().detach())
    optimizer.tie_weights()


REFUSED = {
    replicated_labels: r"(Shard(dim=0),) on DeviceMesh",
    labels_of_rows_for_columns: r"(Replicate(),) on DeviceMesh",
    labels_on_another_mesh: "not sharded as its slices",
    labels_of_a_whole_parameter: "labels of all slices, in a plain tensor",
    labels_of_a_name: "Labels for weight are not sharded as its slices",
    labels_of_kernels: "those of the whole parameter on every rank",
    labels_too_few: "(8,), one label for each slice",
    labels_of_floats: "an integer dtype that fits into int64",
    labels_below: "group numbers from 0 on, or -1 for a free slice",
    with_a_scale: "no scale and no offset; or labels of all slices",
    with_an_offset: "no scale and no offset; or labels of all slices",
    frozen_by_a_mask: "those of the whole parameter on every rank",
    across_ranks: "labels of the slices of this rank, in a plain tensor",
    joined: "Ties with sharded labels cannot be joined",
    joined_by_names: "Ties with sharded labels cannot be joined",
    united_alone: "Ties with sharded labels cannot be united.",
    united: "Ties with sharded labels cannot be united.",
    tied_twice: "one tie, because its labels are sharded",
    compact: "compact=False, or labels of all slices",
    of_a_line_search: "compares the loss with its gradient",
    drawn: "labels of all slices, in a plain tensor",
    cut_otherwise_on_a_rank: "are not cut as the parameter is",
    other_labels_of_replicas: "Ranks that have the same slices have other labels",
    whole_labels_on_a_rank: "other ties than some other rank",
    another_dimension_on_a_rank: "other ties than some other rank",
    sharded_otherwise_since: "not sharded as its labels any more",
    gathered_since: "not sharded as its labels any more",
}


def refused(call: Callable[[], None]) -> str:
    return refusal_of((ValueError, TypeError), call)


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__)
def test_what_is_no_tie_of_sharded_labels_is_refused_on_every_rank(ranks: Ranks, call: Callable[[], None]) -> None:
    for rank, message in enumerate(ranks.run(refused, call)):
        # A label is wrong where it is.
        assert REFUSED[call] in message or (call is labels_below and rank == 0)


def warned(labels: Tensor) -> list[str]:
    param = line_of()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped(param, Tie(param, sharded_as(labels, param)))
    # Not what torch warns of when it is first asked for random numbers.
    return [text for warning in caught if "tie" in (text := str(warning.message))]


def test_a_tie_that_ties_nothing_on_any_rank_is_warned_of(ranks: Ranks) -> None:
    for messages in ranks.run(warned, torch.arange(8)):
        assert len(messages) == 1
        assert "8 groups of 8 members in all" in messages[0]
    assert ranks.run(warned, torch.arange(8) % 4) == [[]] * ranks.count
    assert ranks.run(warned, torch.full((8,), -1)) == [[]] * ranks.count


def stays_as_it_is() -> bool:
    param = line_of().requires_grad_(False)
    start = param.full_tensor().clone()
    optimizer = wrapped(param, Tie(param, sharded_as(EIGHT, param)))
    param.grad = None
    optimizer.step()
    return same_bits(param.full_tensor(), start)


def test_frozen_parameters_stay_as_they_are(ranks: Ranks) -> None:
    assert all(ranks.run(stays_as_it_is))
