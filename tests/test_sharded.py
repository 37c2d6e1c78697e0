"""Ties of sharded parameters, on processes that talk through gloo: the same numbers, and the same bits on all ranks."""

import functools
import math
import os
import time
import unittest.mock
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import every_pair
from checks import randn, same_bits
from hypothesis import example, given
from hypothesis import strategies as st
from ranks import Ranks, refusal_of
from strategies import few_examples, seeds
from test_rounding_at_random import LABELS, distances, expected_distance, rounded_training
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import Linear, Parameter, Sequential, Tanh
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from tieopt import Tie, TiedOptimizer, is_tied, tie_
from tieopt.engine import exchange
from tieopt.engine.exchange import plan_exchange
from tieopt.ties.slices import Slices, numbered

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")


# --- what runs on the ranks ---


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("xyz"[: len(shape)]))


def sharded(full: Tensor, mesh_shape: tuple[int, ...], placements: list) -> DTensor:
    return distribute_tensor(full.clone(), mesh_of(mesh_shape), placements)


def tied_twice(full, mesh_shape, placements, labels, dim, scale):
    """The tensor tied, tied again, and whether it is tied as the ranks see it, before and after."""
    tensor = sharded(full, mesh_shape, placements)
    before = is_tied(tensor, labels, dim=dim, scale=scale)
    tie_(tensor, labels, dim=dim, scale=scale)
    once = tensor.full_tensor().clone()
    after = is_tied(tensor, labels, dim=dim, scale=scale)
    tie_(tensor, labels, dim=dim, scale=scale)
    return once, tensor.full_tensor(), before, after


# --- the numbers ---


def layouts(count: int):
    """Meshes of so many ranks, and how a tensor of two dimensions or more may lie on them."""
    line = st.sampled_from([[Shard(0)], [Shard(1)], [Replicate()]])
    square = st.sampled_from(
        [
            [Replicate(), Shard(0)],
            [Shard(0), Replicate()],
            [Shard(0), Shard(1)],
            [Shard(1), Shard(0)],
            [Shard(0), Shard(0)],
            [Replicate(), Shard(1)],
        ]
    )
    meshes = st.tuples(st.just((count,)), line)
    return meshes | st.tuples(st.just((2, count // 2)), square)


@st.composite
def cases(draw, count: int):
    """A tensor, how it lies, and a tie of it."""
    shape = draw(st.sampled_from([(7, 5), (3, 9), (1, 4), (8, 3, 2), (6, 4, 2, 2)]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]))
    dim = draw(st.integers(0, 1))
    depth = draw(st.sampled_from([1, 1, 2, len(shape)]))
    seed = draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    labelled = torch.empty(shape, device="meta").movedim(dim, 0).shape[:depth]
    labels = torch.randint(-1, draw(st.integers(1, 6)), labelled, generator=generator)
    scale = None
    if draw(st.booleans()):
        scale = torch.randint(-1, 2, labelled, generator=generator).double()
    full = torch.randn(shape, dtype=torch.complex128, generator=generator)
    full = (full if dtype.is_complex else full.real).to(dtype)
    return full, *draw(layouts(count)), labels, dim, scale


@given(data=st.data())
def test_sharded_tensors_are_tied_as_whole_ones_with_the_same_bits_on_all_ranks(ranks, data):
    full, mesh_shape, placements, labels, dim, scale = data.draw(cases(ranks.count))
    expected = tie_(full.clone(), labels, dim=dim, scale=scale)

    answers = ranks.run(tied_twice, full, mesh_shape, placements, labels, dim, scale)
    for once, twice, before, after in answers:
        assert same_bits(once, answers[0][0])
        assert same_bits(once, twice)
        assert after
        assert is_tied(once, labels, dim=dim, scale=scale)
        assert before == is_tied(full, labels, dim=dim, scale=scale)
    # The error is that of a summation in another order; of half types that of rounding twice.
    bound = full.abs().max().double() * torch.finfo(full.dtype).eps * 2
    assert bool(((answers[0][0] - expected).abs() <= bound).all())


@given(data=st.data())
def test_free_entries_of_sharded_tensors_keep_their_bits(ranks, data):
    full, mesh_shape, placements, labels, dim, scale = data.draw(cases(ranks.count))
    once = ranks.run(tied_twice, full, mesh_shape, placements, labels, dim, scale)[0][0]
    free = (labels == -1).reshape(*labels.shape, *[1] * (full.dim() - labels.dim()))
    free = free.expand(full.movedim(dim, 0).shape).movedim(0, dim)

    assert same_bits(once[free], full[free])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_special_values_have_the_mean_that_they_have_on_one_rank(ranks, dtype):
    groups = [[math.inf] * 4, [math.nan, 1, 2, 3], [-0.0] * 4, [1.0, math.inf, 2, 3], [torch.finfo(dtype).max] * 4]
    # Members of each group are on all ranks.
    full = torch.tensor(groups, dtype=dtype).T.reshape(20, 1).expand(20, 3).clone()
    labels = torch.arange(20) % 5
    answers = ranks.run(tied_twice, full, (ranks.count,), [Shard(0)], labels, 0, None)

    for once, *_ in answers:
        assert same_bits(once, tie_(full.clone(), labels))


def tied_in_blocks(entries: int, full: Tensor, labels: Tensor) -> Tensor:
    with unittest.mock.patch.object(exchange, "_CPU_ENTRIES", entries):
        return tied_twice(full, (dist.get_world_size(),), [Shard(0)], labels, 0, None)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_means_have_the_same_bits_in_blocks_of_any_size(ranks, dtype):
    # Ranks have several members of some groups, one of others, and none of the last ones.
    labels = torch.cat([torch.arange(30) % 11, torch.tensor([11, 12, 11, 12, 0, 0])])
    full = randn(36, 3, dtype=dtype)
    expected = ranks.run(tied_in_blocks, 2**17, full, labels)[0]

    for entries in (1, 30):
        assert all(same_bits(tied, expected) for tied in ranks.run(tied_in_blocks, entries, full, labels))


def tied_beside_nan(full: Tensor, labels: Tensor) -> bool:
    return is_tied(sharded(full, line(), [Shard(0)]), labels)


@given(data=st.data())
def test_what_is_tied_is_so_whatever_free_entries_are(ranks, data):
    labels = torch.tensor(data.draw(st.lists(st.integers(-1, 3), min_size=1, max_size=9)))
    full = torch.where((labels == -1)[:, None], math.nan, tie_(randn(len(labels), 3), labels))
    spoilt = data.draw(st.booleans())
    if spoilt:
        full[data.draw(st.integers(0, len(labels) - 1))] = math.nan

    assert ranks.run(tied_beside_nan, full, labels) == [is_tied(full, labels)] * ranks.count


def kernels_and_slices(kernels: Tensor, slices: Tensor, labels: Tensor, cuts: tuple[int, int]) -> list[Tensor]:
    """Kernels of a convolution and slices of another tensor, joined."""
    first, second = (
        Parameter(sharded(full, line(), [Shard(dim)])) for full, dim in zip((kernels, slices), cuts, strict=True)
    )
    TiedOptimizer(SGD([first, second], lr=0.1), Tie.join(Tie(first, labels), Tie(second, labels.flatten())))
    return [first.full_tensor().detach(), second.full_tensor().detach()]


@example(seed=0, cuts=(2, 2))
@given(seed=seeds, cuts=st.tuples(st.integers(0, 3), st.integers(0, 2)))
def test_joined_slices_are_tied_however_each_is_cut(ranks, seed, cuts):
    kernels, slices = randn(2, 3, 5, 5, seed=seed), randn(6, 5, 5, seed=seed + 1)
    labels = torch.randint(-1, 4, (2, 3), generator=torch.Generator().manual_seed(seed))
    alone = [Parameter(kernels.clone()), Parameter(slices.clone())]
    TiedOptimizer(SGD(alone, lr=0.1), Tie.join(Tie(alone[0], labels), Tie(alone[1], labels.flatten())))

    for answer in ranks.run(kernels_and_slices, kernels, slices, labels, cuts):
        torch.testing.assert_close(answer, [param.detach() for param in alone])


def tied_with_another_default_device(placements: list) -> tuple[Tensor, bool]:
    tensor = sharded(randn(8, 3), line(), placements)
    with torch.device("meta"):
        tied = is_tied(tie_(tensor, torch.arange(8, device="cpu") % 3), torch.arange(8, device="cpu") % 3)
    return tensor.full_tensor(), tied


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_the_default_device_does_not_matter(ranks, placement):
    expected = tie_(randn(8, 3), torch.arange(8) % 3)
    for tensor, tied in ranks.run(tied_with_another_default_device, [placement]):
        torch.testing.assert_close(tensor, expected)
        assert tied


def tied_beside_other_groups(ranks_of_mesh: list, placements: list) -> Tensor | None:
    mesh = DeviceMesh("cpu", ranks_of_mesh)
    # Ranks are in different numbers of groups from here on, as where one of them has a group to itself for its log.
    dist.new_group([0])
    # What waits for a rank that looks elsewhere is to fail soon.
    patient, tied = functools.partial(dist.new_group, timeout=timedelta(seconds=10)), None
    if mesh.get_coordinate() is not None:
        tensor = distribute_tensor(randn(8, 3), mesh, placements)
        with unittest.mock.patch.object(dist, "new_group", patient):
            tied = tie_(tensor, torch.arange(8) % 3).full_tensor()
    # Ranks outside the mesh have taken no part, and yet all find each other in the next group that they make.
    dist.barrier(patient())
    return tied


@pytest.mark.parametrize("where", ["all", "halves", "some"])
def test_shards_along_several_dimensions_are_tied_however_many_groups_a_rank_is_in(ranks, where):
    """Along two dimensions of a mesh, which are of all ranks, of each half of them, or of some."""
    numbers, half = torch.arange(ranks.count), ranks.count // 2
    ranks_of_mesh = {"all": numbers.view(2, half), "halves": numbers.view(2, half, 1), "some": numbers[::2, None]}[
        where
    ]
    expected = tie_(randn(8, 3), torch.arange(8) % 3)
    placements = [Replicate()] * (where == "halves") + [Shard(0), Shard(0)]

    answers = ranks.run(tied_beside_other_groups, ranks_of_mesh.tolist(), placements)

    for rank, tensor in enumerate(answers):
        if rank in ranks_of_mesh:
            torch.testing.assert_close(tensor, expected)


# --- training ---

HIDDEN = 12
ROWS = [[0, 3, 9], [1, 2], [4, 5]]


def mlp() -> Sequential:
    """The same on every rank."""
    model = Sequential(Linear(9, HIDDEN), Tanh(), Linear(HIDDEN, 9)).double()
    with torch.no_grad():
        for seed, param in enumerate(model.parameters()):
            param.copy_(randn(*param.shape, seed=seed, dtype=torch.float64) / 3)
    return model


def elements(shape: torch.Size) -> Tensor:
    return torch.randint(-1, 7, shape, generator=torch.Generator().manual_seed(3))


# What is tied, by the model.
TIES = {
    "rows": lambda model: {model[0].weight: ROWS, model[0].bias: ROWS},
    "columns": lambda model: Tie(model[2].weight, ROWS, dim=1),
    "elements": lambda model: {model[0].weight: elements(model[0].weight.shape)},
    "transposed": lambda model: Tie.join(
        Tie(model[0].weight, torch.arange(HIDDEN)), Tie(model[2].weight, torch.arange(HIDDEN), dim=1)
    ),
    "signs": lambda model: Tie(
        model[0].weight, [list(range(HIDDEN))], scale=torch.tensor([1.0, -1, -1, 0, 1, 1, -1, 1, 0, 1, 1, -1])
    ),
}
INNER = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: AdamW(params, lr=0.01),
}


def plain(model: Sequential, count: int) -> None:
    """Every rank has all."""


def fsdp(model: Sequential, count: int, mesh_shape: tuple[int, ...] | None = None, dim: int = 0) -> None:
    mesh = mesh_of(mesh_shape or (count,))

    def place(param: Parameter) -> Shard:
        # fully_shard cuts the first dimension unevenly alone.
        return Shard(dim if param.dim() > dim and param.shape[dim] % mesh.size() == 0 else 0)

    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def tensor_parallel(model: Sequential, count: int) -> None:
    parallelize_module(model, mesh_of((count,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})


SHARDED = {
    "fully_shard": fsdp,
    "fully_shard, Shard(1)": functools.partial(fsdp, dim=1),
    "HSDP": lambda model, count: fsdp(model, count, (2, count // 2)),
    "tensor parallel": tensor_parallel,
}
# Which rows of docs/hosts.md these are.
HOSTS = {
    "fully_shard": pytest.mark.host("FSDP2", "fully_shard, Shard(0)"),
    "fully_shard, Shard(1)": pytest.mark.host("FSDP2", "fully_shard, Shard(1)"),
    "HSDP": pytest.mark.host("FSDP2", "hybrid sharding, mesh of two dimensions"),
    "tensor parallel": pytest.mark.host("tensor parallelism", "ColwiseParallel, RowwiseParallel"),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    return randn(8, 9, seed=2 * step, dtype=torch.float64), randn(8, 9, seed=2 * step + 1, dtype=torch.float64)


def train(model, optimizer, steps: range, share: slice = slice(None)) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs, targets = batch(step)
        (model(inputs[share]) - targets[share]).square().mean().backward()
        optimizer.step()


def whole(model: Sequential) -> list[Tensor]:
    return [
        (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone() for param in model.parameters()
    ]


def share_of(how: str) -> slice:
    """The part of a batch that is this rank's: with tensor parallelism all have the whole of it."""
    if how == "tensor parallel":
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def trained(how: str, kind: str, inner: str, reduction: str, steps: int) -> list[Tensor]:
    """Weights after each step, gathered."""
    model = mlp()
    SHARDED[how](model, dist.get_world_size())
    optimizer = TiedOptimizer(INNER[inner](model.parameters()), TIES[kind](model), reduction=reduction)
    seen = [whole(model)]
    for step in range(steps):
        train(model, optimizer, range(step, step + 1), share_of(how))
        seen.append(whole(model))
        assert optimizer.tie_drift() == 0
    return seen


def trained_alone(kind: str, inner: str, reduction: str, steps: int) -> tuple[list[list[Tensor]], Sequential]:
    model = mlp()
    optimizer = TiedOptimizer(INNER[inner](model.parameters()), TIES[kind](model), reduction=reduction)
    seen = [whole(model)]
    for step in range(steps):
        train(model, optimizer, range(step, step + 1))
        seen.append(whole(model))
    return seen, model


def tied_after_all(weights: list[Tensor], kind: str) -> bool:
    """Whether gathered weights are tied, bit for bit."""
    model = mlp()
    with torch.no_grad():
        for param, weight in zip(model.parameters(), weights, strict=True):
            param.copy_(weight)
    start = whole(model)
    TiedOptimizer(SGD(model.parameters(), lr=0.1), TIES[kind](model))
    return all(map(same_bits, start, whole(model)))


@every_pair(
    how=[pytest.param(how, marks=host) for how, host in HOSTS.items()],
    kind=TIES,
    reduction=["mean", "sum"],
    inner=INNER,
)
def test_the_trajectory_is_that_of_one_process_and_rows_are_tied_across_ranks(ranks, how, kind, reduction, inner):
    expected, _ = trained_alone(kind, inner, reduction, 4)
    answers = ranks.run(trained, how, kind, inner, reduction, 4)

    for weights, wanted in zip(answers[0], expected, strict=True):
        torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-12)
        assert tied_after_all(weights, kind)
    for seen in answers:
        assert all(all(map(same_bits, weights, first)) for weights, first in zip(seen, answers[0], strict=True))


# --- what is communicated ---


class Collectives(TorchDispatchMode):
    """The collectives that were issued within, and how many entries each sends to other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.name()
            self.sent.append((name, self._to_others(args) if name == "c10d::alltoall_base_" else -1))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _to_others(args: tuple) -> int:
        _, tensor, _, _, splits, *_ = args
        return sum(tensor.shape[1:].numel() * rows for rank, rows in enumerate(splits) if rank != dist.get_rank())


def one_step(labels: Tensor, shape: tuple[int, int], placement: Shard, reduction: str) -> list[tuple[str, int]]:
    """What a step of a tied SGD issues."""
    weight = Parameter(sharded(randn(*shape), (dist.get_world_size(),), [placement]))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: labels}, reduction=reduction)
    weight.grad = sharded(randn(*shape, seed=1), (dist.get_world_size(),), [placement])
    with Collectives() as issued:
        optimizer.step()
    return issued.sent


def holders(labels: Tensor, count: int) -> Tensor:
    """On how many ranks each group of rows has members."""
    shards = labels.chunk(count)
    return torch.stack([torch.stack([(own == group).any() for own in shards]).sum() for group in labels.unique()])


@given(data=st.data())
def test_a_step_sends_what_the_groups_that_span_ranks_need(ranks, data):
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=16, max_size=16)))
    width, reduction = data.draw(st.integers(1, 5)), data.draw(st.sampled_from(["mean", "sum"]))
    shape = (16, width)
    if data.draw(st.booleans()):
        # Of single entries.
        labels, shape, width = labels.view(8, 2), (8, 2), 1
    on = holders(labels, ranks.count)
    spanning = int((on > 1).sum())
    answers = ranks.run(one_step, labels, shape, Shard(0), reduction)

    assert {name for sent in answers for name, _ in sent} <= {"c10d::alltoall_base_"}
    # Two for the gradients and two for the weights, and none if no group spans.
    assert {len(sent) for sent in answers} == {4 if spanning else 0}
    total = sum(entries for sent in answers for _, entries in sent)
    assert total == 2 * int((2 * (on[on > 1] - 1)).sum()) * width
    # What two all-reduces of [spanning groups, D] send around a ring of all ranks.
    assert total <= 2 * 2 * (ranks.count - 1) * spanning * width
    # Of two ranks each sends [spanning groups, D] twice; of more, what was planned.
    shards = [own.flatten() for own in numbered([Slices(labels)])[0].labels.chunk(ranks.count)]
    planned = [2 * plan_exchange(shards, rank)[0].rows_moved * width for rank in range(ranks.count)]
    assert [sum(entries for _, entries in sent) for sent in answers] == planned
    assert ranks.count > 2 or planned == [2 * spanning * width] * 2


def test_groups_within_a_rank_and_rows_cut_across_communicate_nothing(ranks):
    within = torch.arange(16) // 4
    across = torch.arange(16) % 4
    entries = torch.arange(16)[:, None] // 4 * 3 + torch.arange(8) % 3

    assert ranks.run(one_step, within, (16, 8), Shard(0), "mean") == [[]] * ranks.count
    assert ranks.run(one_step, entries, (16, 8), Shard(0), "sum") == [[]] * ranks.count
    assert ranks.run(one_step, across, (16, 8), Shard(1), "mean") == [[]] * ranks.count


# --- who sends what, without processes ---


@st.composite
def held_labels(draw):
    """Labels of the members on some ranks."""
    ranks = draw(st.integers(1, 6))
    return [torch.tensor(draw(st.lists(st.integers(0, 9), max_size=12)), dtype=torch.int64) for _ in range(ranks)]


@given(held_labels())
def test_the_plans_of_all_ranks_fit_each_other(labels):
    count = len(labels)
    plans, spanning = zip(*(plan_exchange(labels, rank) for rank in range(count)), strict=True)
    spans = [group for group in range(10) if sum(int((own == group).any()) for own in labels) > 1]
    sizes = {group: sum(int((own == group).sum()) for own in labels) for group in spans}

    assert [groups.tolist() for groups in spanning] == [spans] * count
    for rank, plan in enumerate(plans):
        assert sorted(plan.groups.tolist()) == [group for group in spans if bool((labels[rank] == group).any())]
        assert plan.sizes.tolist() == [sizes[group] for group in plan.groups.tolist()]
        assert [other.sent[rank] for other in plans] == plan.received
    # What arrives is laid out as it was sent: each row of a slot is of the same group, and all members are counted.
    starts = [[sum(plan.sent[:rank]) for rank in range(count)] for plan in plans]
    for rank, plan in enumerate(plans):
        arrived = torch.cat(
            [
                plan.groups[begin[rank] : begin[rank] + plan.sent[rank]]
                for plan, begin in zip(plans, starts, strict=True)
            ]
        )
        assert arrived[plan.firsts][plan.slots].tolist() == arrived.tolist()
        sums = torch.zeros(len(plan.firsts), dtype=torch.float64).index_add_(0, plan.slots, plan.weights)
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert sum(plan.rows_moved for plan in plans) == sum(
        2 * (sum(int((own == group).any()) for own in labels) - 1) for group in spans
    )


# --- checkpoints on other numbers of ranks, clipping, ties that change ---


def saved(folder: str, kind: str) -> None:
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = mlp()
    fsdp(model, dist.get_world_size())
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES[kind](model))
    train(model, optimizer, range(3), share_of("fully_shard"))
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def resumed(folder: str, kind: str, ranks: int) -> list[Tensor] | None:
    """The weights two steps after those that were saved, on fewer ranks; the others do nothing."""
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    group = dist.new_group(list(range(ranks)))
    if dist.get_rank() >= ranks:
        return None
    model = mlp()
    for param in model.parameters():
        param.data.zero_()
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES[kind](model))
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state}
    load(content, checkpoint_id=folder, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    train(model, optimizer, range(3, 5), slice(dist.get_rank(), None, ranks))
    return whole(model)


@pytest.mark.host("torch.distributed.checkpoint", "FSDP2: saved on 4 and on 2 ranks, loaded on as many, on 2 and on 1")
@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_what_was_saved_on_some_ranks_goes_on_on_fewer(ranks, kind, tmp_path):
    ranks.run(saved, str(tmp_path / "checkpoint"), kind)
    expected = trained_alone(kind, "AdamW", "mean", 5)[0][-1]
    for fewer in {ranks.count, 2, 1}:
        answers = ranks.run(resumed, str(tmp_path / "checkpoint"), kind, fewer)

        for weights in answers[:fewer]:
            torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
            assert tied_after_all(weights, kind)


def clipped_and_retied() -> tuple[float, list[Tensor], str]:
    model = mlp()
    if dist.is_initialized():
        fsdp(model, dist.get_world_size())
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES["rows"](model))
    share = share_of("fully_shard") if dist.is_initialized() else slice(None)
    train(model, optimizer, range(2), share)
    optimizer.retie(TIES["elements"](model))
    inputs, targets = batch(7)
    optimizer.zero_grad()
    (model(inputs[share]) - targets[share]).square().mean().backward()
    optimizer.tie_gradients()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    assert optimizer.tie_drift() == 0
    summary = optimizer.tie_summary()
    optimizer.untie()
    train(model, optimizer, range(2), share)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm), whole(model), summary


@pytest.mark.host("FSDP2", "clipping after tie_gradients(), retie, untie")
def test_clipping_retying_and_untying_are_as_in_one_process(ranks):
    norm, weights, summary = clipped_and_retied()
    for own_norm, own_weights, own_summary in ranks.run(clipped_and_retied):
        assert own_norm == pytest.approx(norm, rel=1e-12)
        torch.testing.assert_close(own_weights, weights, rtol=1e-12, atol=1e-12)
        assert own_summary == summary


def wrapped_late() -> list[Tensor]:
    model = mlp()
    if dist.is_initialized():
        fsdp(model, dist.get_world_size())
    share = share_of("fully_shard") if dist.is_initialized() else slice(None)
    bare = INNER["AdamW"](model.parameters())
    train(model, bare, range(2), share)
    train(model, TiedOptimizer(bare, TIES["transposed"](model)), range(2, 4), share)
    return whole(model)


@pytest.mark.host("FSDP2", "tied in mid-training")
def test_the_state_of_an_optimizer_that_was_tied_late_is_tied(ranks):
    expected = wrapped_late()
    for weights in ranks.run(wrapped_late):
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def state_when_tied(weights: list[Tensor], states: list[dict], ties: list[list[tuple]], placement) -> list[dict]:
    """What an optimizer of sharded weights has as state once these are tied, gathered; in one process without them."""

    def placed(full: Tensor) -> Tensor:
        return full.clone() if placement is None else sharded(full, line(), [placement])

    params = [Parameter(placed(weight)) for weight in weights]
    optimizer = SGD(params, lr=0.1)
    for param, state in zip(params, states, strict=True):
        if state:
            optimizer.state[param] = {key: placed(value) for key, value in state.items()}
    TiedOptimizer(
        optimizer,
        [
            Tie.join(*(Tie(params[number], labels, dim=dim, scale=scale) for number, labels, dim, scale in tie))
            for tie in ties
        ],
    )
    return [
        {key: value.full_tensor() if placement is not None else value for key, value in optimizer.state[param].items()}
        for param in params
    ]


@st.composite
def ties_of_two(draw):
    """Ties of two square weights: several of one, one that joins both, one that joins one with itself."""
    generator = torch.Generator().manual_seed(draw(seeds))
    labels = torch.randint(draw(st.sampled_from([-1, 0])), 4, (6, 6), generator=generator)
    scale = torch.randint(-1, 2, (6, 6), generator=generator).double() if draw(st.booleans()) else None
    upper = torch.where(torch.ones(6, 6).triu(1) == 1, labels, -1)
    kind = draw(st.sampled_from(["several", "both", "itself"]))
    if kind == "several":
        return [[(0, upper, 0, scale)], [(0, torch.where(upper == -1, labels, -1), 0, scale)]]
    if kind == "both":
        return [[(0, labels, 0, scale), (1, labels, 1, scale)]]
    return [[(0, upper, 0, scale), (0, upper, 1, scale)]]


@few_examples
@given(
    ties=ties_of_two(),
    trained=st.sampled_from([(True, True), (True, False), (False, True)]),
    placement=st.sampled_from([Shard(0), Shard(1), Replicate()]),
)
def test_the_state_that_is_there_is_tied_as_in_one_process(ranks, ties, trained, placement):
    weights = [randn(6, 6, seed=seed, dtype=torch.float64) for seed in (0, 1)]
    state = {
        "exp_avg": randn(6, 6, seed=2, dtype=torch.float64),
        "exp_avg_sq": randn(6, 6, seed=3, dtype=torch.float64).square(),
        "velocity": randn(6, 6, seed=4, dtype=torch.float64),
        "variance": randn(6, 6, seed=5, dtype=torch.float64).square(),
        "age": torch.arange(36).view(6, 6),
    }
    states = [state if one else {} for one in trained]
    expected = state_when_tied(weights, states, ties, None)

    for answer in ranks.run(state_when_tied, weights, states, ties, placement):
        torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-12)


def started_from_first(weights: list[Tensor], ties: list[list[tuple]], placement) -> list[Tensor]:
    """Weights, and a state of the same entries, that start from the first members, gathered."""

    def placed(full: Tensor) -> Tensor:
        return full.clone() if placement is None else sharded(full, line(), [placement])

    params = [Parameter(placed(weight)) for weight in weights]
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    for param in params:
        optimizer.state[param] = {"momentum_buffer": param.detach().clone()}
    joined = [
        Tie.join(*(Tie(params[number], labels, dim=dim, scale=scale) for number, labels, dim, scale in tie[::-1]))
        for tie in ties
    ]
    optimizer = TiedOptimizer(optimizer, joined, start="first")
    started = [param.detach().clone() for param in params]
    optimizer.tie_weights()
    assert all(torch.equal(one, param) for one, param in zip(started, params, strict=True))
    entries = [*started, *(optimizer.state[param]["momentum_buffer"] for param in params)]
    return [one.full_tensor() if placement is not None else one for one in entries]


MULTIPLES = torch.tensor([1.0, 0.3, 0.0, -2.0, 1.0, 7.0])


@few_examples
@example(ties=[[(0, torch.tensor([0, 0, 1, 1, -1, 1]), 0, MULTIPLES)]], placement=Shard(1))
@given(ties=ties_of_two(), placement=st.sampled_from([Shard(0), Shard(1), Replicate()]))
def test_sharded_groups_start_from_their_first_members_as_in_one_process(ranks, ties, placement):
    weights = [randn(6, 6, seed=seed) for seed in (0, 1)]
    expected = started_from_first(weights, ties, None)

    for answer in ranks.run(started_from_first, weights, ties, placement):
        assert all(map(same_bits, answer, expected))


def relaxed() -> list[Tensor]:
    model = mlp()
    if dist.is_initialized():
        fsdp(model, dist.get_world_size())
    share = share_of("fully_shard") if dist.is_initialized() else slice(None)
    optimizer = TiedOptimizer(INNER["SGD"](model.parameters()), TIES["elements"](model), strength=0.5, every=2)
    train(model, optimizer, range(4), share)
    assert optimizer.tie_drift() > 0
    return [*whole(model), torch.tensor(optimizer.tie_drift(), dtype=torch.float64)]


def test_relaxed_ties_are_as_in_one_process(ranks):
    expected = relaxed()
    for weights in ranks.run(relaxed):
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def rounded_at_random(placement, steps: int) -> Tensor:
    place = functools.partial(sharded, mesh_shape=line(), placements=[placement])
    return rounded_training(torch.bfloat16, place=place, seed=dist.get_rank(), steps=steps).full_tensor().detach()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
def test_shards_that_are_rounded_at_random_move_as_free_rows_do(ranks, placement):
    distance, error = expected_distance(steps=40)
    answers = ranks.run(rounded_at_random, placement, 40)
    assert all(same_bits(answer, answers[0]) for answer in answers)
    assert is_tied(answers[0], torch.where(LABELS == 0, -1, LABELS))
    torch.testing.assert_close(distances(answers[0]), torch.full((4,), distance), rtol=0, atol=error)


# --- ranks outside the mesh ---


@functools.cache
def mesh_on(ranks: tuple[int, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", list(ranks))


def trained_on_some(ranks: tuple[int, ...], labels: Tensor, placement, reduction: str) -> list[Tensor] | None:
    """Two joined weights trained on a mesh of some ranks, tied in mid-training; None on the others."""
    mesh = mesh_on(ranks)
    params = [Parameter(distribute_tensor(randn(*shape), mesh, [placement])) for shape in ((8, 4), (8, 4))]

    def step(optimizer, number: int) -> None:
        params[0].grad = distribute_tensor(randn(8, 4, seed=number), mesh, [placement])
        optimizer.step()

    optimizer = AdamW(params, lr=0.1)
    step(optimizer, 1)
    ties = Tie.join(*(Tie(param, labels) for param in params))
    optimizer = TiedOptimizer(optimizer, ties, reduction=reduction)
    step(optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.retie(ties)
    step(optimizer, 3)
    assert optimizer.tie_drift() == 0
    assert is_tied(params[0], labels)
    if dist.get_rank() not in ranks:
        assert not any(param.to_local().numel() for param in params)
        return None
    return [param.full_tensor().detach() for param in params]


@few_examples
@given(
    data=st.data(),
    placement=st.sampled_from([Shard(0), Shard(1), Replicate()]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_ranks_outside_the_mesh_have_nothing_to_tie(ranks, data, placement, reduction):
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=8, max_size=8)))
    everywhere = ranks.run(trained_on_some, tuple(range(ranks.count)), labels, placement, reduction)
    some = data.draw(st.sets(st.integers(0, ranks.count - 1), min_size=1, max_size=ranks.count - 1))
    answers = ranks.run(trained_on_some, tuple(sorted(some)), labels, placement, reduction)

    assert {rank for rank, weights in enumerate(answers) if weights is not None} == some
    for rank in some:
        torch.testing.assert_close(answers[rank], everywhere[0])


# --- replicas ---


def replicas(kind: str, reduction: str, compact: bool, zero: bool) -> list[Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = mlp()
    replica = DistributedDataParallel(model)
    if zero:
        inner = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamW, lr=0.01)
    else:
        inner = INNER["AdamW"](model.parameters())
    optimizer = TiedOptimizer(inner, TIES[kind](model), reduction=reduction, compact=compact)
    train(replica, optimizer, range(4), share_of("DDP"))
    return whole(model)


@pytest.mark.host("DistributedDataParallel", "replicas equal to the last bit")
@every_pair(kind=TIES, reduction=["mean", "sum"], compact=[False, True])
def test_replicas_stay_equal_to_the_last_bit(ranks, kind, reduction, compact):
    expected = trained_alone(kind, "AdamW", reduction, 4)[0][-1]
    answers = ranks.run(replicas, kind, reduction, compact, False)
    for weights in answers:
        assert all(map(same_bits, weights, answers[0]))
        assert tied_after_all(weights, kind)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.host("ZeroRedundancyOptimizer", "replicas equal to the last bit")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", TIES)
def test_ties_go_around_a_zero_redundancy_optimizer(ranks, kind, reduction):
    expected = trained_alone(kind, "AdamW", reduction, 4)[0][-1]
    answers = ranks.run(replicas, kind, reduction, False, True)
    for weights in answers:
        assert all(map(same_bits, weights, answers[0]))
        assert tied_after_all(weights, kind)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


# --- gradients that are elsewhere than their parameters ---


def stepped_on(placement, reduction: str) -> Tensor:
    """The weight after a step on a gradient of ones that lies so."""
    weight = Parameter(sharded(randn(8, 4), line(), [Shard(0)]))
    optimizer = TiedOptimizer(SGD([weight], lr=0.5), {weight: [[0, 7], [1, 2]]}, reduction=reduction)
    ones = torch.ones(8, 4)
    if placement.is_partial():
        ones /= dist.get_world_size()
        weight.grad = DTensor.from_local(ones, mesh_of(line()), [placement])
    else:
        weight.grad = sharded(ones, line(), [placement])
    optimizer.step()
    return weight.full_tensor().detach()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_brought_to_where_their_parameters_are(ranks, reduction):
    from torch.distributed.tensor import Partial

    expected = ranks.run(stepped_on, Shard(0), reduction)
    for placement in (Shard(1), Replicate(), Partial()):
        for weight, wanted in zip(ranks.run(stepped_on, placement, reduction), expected, strict=True):
            assert same_bits(weight, wanted)


def in_one_memory() -> bool:
    """Whether a gradient that is in the memory of that of a tied parameter stays as it is."""
    tied, free = [Parameter(sharded(randn(8, 4, seed=seed), line(), [Shard(0)])) for seed in range(2)]
    optimizer = TiedOptimizer(SGD([tied, free], lr=0.5), {tied: [[0, 1, 7]]})
    grad = sharded(randn(8, 4, seed=2), line(), [Shard(0)])
    tied.grad, free.grad = grad, DTensor.from_local(grad.to_local(), grad.device_mesh, grad.placements)
    before = grad.to_local().clone()
    optimizer.step()
    return same_bits(free.grad.to_local(), before)


def test_gradients_of_shards_in_one_memory_are_tied_apart(ranks):
    assert all(ranks.run(in_one_memory))


def shared_later() -> str:
    tied = Parameter(sharded(randn(8, 4), line(), [Shard(0)]))
    optimizer = TiedOptimizer(SGD([tied], lr=0.5), {tied: [[0, 1, 7]]})
    tied.grad = sharded(randn(8, 4), line(), [Shard(0)])
    optimizer.step()
    optimizer.add_param_group({"params": [Parameter(tied.detach())]})
    return refusal_of(ValueError, optimizer.step)


def test_shards_that_come_to_share_memory_are_refused_by_the_next_step(ranks):
    assert all("shares memory" in message for message in ranks.run(shared_later))


GRADIENTS = {
    "with a graph": lambda weight: weight.square().sum().backward(create_graph=True),
    "sparse": lambda weight: setattr(weight, "grad", randn(8, 4).to_sparse(1)),
    "whole": lambda weight: setattr(weight, "grad", randn(8, 4)),
}


def step_refused(gradient: str) -> str:
    weight = Parameter(sharded(randn(8, 4), line(), [Shard(0)]))
    optimizer = TiedOptimizer(SGD([weight], lr=0.5), {weight: [[0, 7]]})
    start = weight.to_local().detach().clone()
    GRADIENTS[gradient](weight)
    try:
        optimizer.step()
    except RuntimeError as error:
        assert same_bits(weight.to_local().detach(), start)
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize(
    ("gradient", "reason"),
    [("with a graph", "requires_grad=True"), ("sparse", "torch.sparse_coo"), ("whole", "over no mesh")],
)
def test_gradients_that_cannot_be_tied_where_they_are_are_refused_by_the_step(ranks, gradient, reason):
    for message in ranks.run(step_refused, gradient):
        assert "The gradient of a sharded parameter cannot be tied" in message
        assert reason in message


def signed_state(late: bool) -> list[Tensor]:
    """Weights of an AdamW with signs, tied from the start or after three steps on gradients that were tied."""
    model = mlp()
    if dist.is_initialized():
        fsdp(model, dist.get_world_size())
    share = share_of("fully_shard") if dist.is_initialized() else slice(None)
    optimizer = INNER["AdamW"](model.parameters())
    if not late:
        optimizer = TiedOptimizer(optimizer, TIES["signs"](model))
    train(model, optimizer, range(2), share)
    if late:
        optimizer = TiedOptimizer(optimizer, TIES["signs"](model))
    train(model, optimizer, range(2, 5), share)
    return whole(model)


@pytest.mark.parametrize("late", [False, True])
def test_the_state_of_groups_with_signs_is_tied_as_in_one_process(ranks, late):
    expected = signed_state(late)
    for weights in ranks.run(signed_state, late):
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


# --- what is refused, and ranks that do not come ---


def refusal(make) -> str:
    """What the error says that refuses a tie, when nothing was written."""
    weight, optimizer, ties, options = make()
    start = weight.to_local().detach().clone() if isinstance(weight, DTensor) else weight.detach().clone()
    before = vars(optimizer).copy()
    try:
        TiedOptimizer(optimizer, ties, **options)
    except ValueError as error:
        assert not isinstance(optimizer, TiedOptimizer)
        assert vars(optimizer) == before
        assert same_bits(weight.to_local() if isinstance(weight, DTensor) else weight, start)
        return str(error)
    raise AssertionError("nothing was refused")


def line() -> tuple[int]:
    return (dist.get_world_size(),)


def of_one(placement, full=None):
    weight = Parameter(
        sharded(randn(8, 4) if full is None else full, line(), [placement])
        if not placement.is_partial()
        else DTensor.from_local(randn(8, 4), mesh_of(line()), [placement])
    )
    return weight, SGD([weight], lr=0.1)


def partial():
    from torch.distributed.tensor import Partial

    weight, optimizer = of_one(Partial())
    return weight, optimizer, {weight: [[0, 7]]}, {}


def strided():
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = mesh_of((2, dist.get_world_size() // 2))
    model = Linear(4, 8, bias=False)
    parallelize_module(model, mesh["y"], ColwiseParallel())
    fully_shard(model, mesh=mesh["x"])
    assert any(isinstance(placement, _StridedShard) for placement in model.weight.placements)
    return model.weight, SGD([model.weight], lr=0.1), {model.weight: [[0, 7]]}, {}


def flattened():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Linear(4, 8, bias=False), device_id=torch.device("cpu"))
    (weight,) = model.parameters()
    return weight, SGD([weight], lr=0.1), {weight: [[0, 7]]}, {}


def flattened_with_original_parameters():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Linear(4, 8, bias=False), device_id=torch.device("cpu"), use_orig_params=True)
    (weight,) = model.parameters()
    return weight, SGD([weight], lr=0.1), {weight: [[0, 1]]}, {}


def rounded():
    weight, optimizer = of_one(Shard(0))
    return weight, optimizer, Tie(weight, [[0, 7]], scale=torch.tensor([1.0, *[1] * 6, 0.3])), {}


def compact_across_ranks():
    weight, optimizer = of_one(Shard(0))
    return weight, optimizer, {weight: [[0, 7]]}, {"compact": True}


def one_sharded_only():
    weight, other = Parameter(sharded(randn(8, 4), line(), [Shard(0)])), Parameter(randn(8, 4))
    labels = torch.arange(8)
    return weight, SGD([weight, other], lr=0.1), Tie.join(Tie(weight, labels), Tie(other, labels)), {}


def one_replicated():
    weight, other = (Parameter(sharded(randn(8, 4), line(), [place])) for place in (Shard(0), Replicate()))
    labels = torch.arange(8)
    return weight, SGD([weight, other], lr=0.1), Tie.join(Tie(weight, labels), Tie(other, labels)), {}


def cut_otherwise():
    sizes = [8 - (dist.get_world_size() - 1), *[1] * (dist.get_world_size() - 1)]
    shard = randn(8, 4).split(sizes)[dist.get_rank()].clone()
    weight = Parameter(DTensor.from_local(shard, mesh_of(line()), [Shard(0)], shape=torch.Size((8, 4)), stride=(4, 1)))
    return weight, SGD([weight], lr=0.1), {weight: [[0, 7]]}, {}


def descending():
    weight = Parameter(
        distribute_tensor(randn(8, 4), DeviceMesh("cpu", range(dist.get_world_size())[::-1]), [Shard(0)])
    )
    return weight, SGD([weight], lr=0.1), {weight: [[0, 7]]}, {}


def other_groups():
    weight, optimizer = of_one(Shard(0))
    return weight, optimizer, {weight: [[0, 7 - dist.get_rank() % 2]]}, {}


def other_scales():
    weight, optimizer = of_one(Shard(0))
    scale = torch.ones(8)
    scale[7] = -1 if dist.get_rank() else 1
    return weight, optimizer, Tie(weight, [[0, 7]], scale=scale), {}


def other_parameter_pinned():
    weight, other = (Parameter(sharded(randn(8, 4), line(), [Shard(0)])) for _ in range(2))
    # The same zeros in the same order; of which tie they are the scales is what differs.
    labels = torch.zeros(8, dtype=torch.int64)
    first, second = Tie(weight, labels, scale=labels), Tie(other, labels)
    if dist.get_rank():
        first, second = Tie(weight, labels), Tie(other, labels, scale=labels)
    return weight, SGD([weight, other], lr=0.1), Tie.join(first, second), {}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial, "cannot be tied as it is distributed"),
        (flattened, "flattened by FullyShardedDataParallel"),
        (flattened_with_original_parameters, "flattened by FullyShardedDataParallel"),
        (rounded, "multiples that are rounded"),
        (compact_across_ranks, "members on several ranks"),
        (one_sharded_only, "not sharded over one mesh"),
        (one_replicated, "not sharded over the same dimensions of the mesh"),
        (cut_otherwise, "not cut as torch.chunk cuts"),
        (descending, "ranks do not ascend"),
        (other_groups, "other ties than some other rank"),
        (other_scales, "other ties than some other rank"),
        (other_parameter_pinned, "other ties than some other rank"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_tied_is_refused_on_every_rank_and_nothing_is_written(ranks, make, reason):
    for message in ranks.run(refusal, make):
        assert reason in message


def sharded_labels(scaled: bool) -> str:
    weight, optimizer = of_one(Shard(0))
    start = weight.to_local().detach().clone()
    ones = sharded(torch.ones(8, 4, dtype=torch.int64), line(), [Shard(0)])
    try:
        TiedOptimizer(optimizer, Tie(weight, torch.ones(8, 4).long(), scale=ones) if scaled else {weight: ones})
    except TypeError as error:
        assert same_bits(weight.to_local(), start)
        return str(error)
    return ""


@pytest.mark.parametrize("scaled", [False, True], ids=["labels", "scale"])
def test_labels_and_scales_that_are_sharded_are_refused(ranks, scaled):
    for message in ranks.run(sharded_labels, scaled):
        assert "Expected: those of the whole parameter on every rank" in message
        assert "(Shard(dim=0),)" in message


def zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    weight = Parameter(randn(8, 4))
    return weight, ZeroRedundancyOptimizer([weight], optimizer_class=SGD, lr=0.1), {weight: [[0, 7]]}, {"compact": True}


def compact_on(how: str):
    model = mlp()
    SHARDED[how](model, dist.get_world_size())
    return model[0].weight, SGD(model.parameters(), lr=0.1), {model[0].weight: ROWS}, {"compact": True}


@pytest.mark.parametrize("compact", [True])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        *(
            pytest.param(functools.partial(compact_on, how), "groups across ranks", marks=host, id=how)
            for how, host in HOSTS.items()
        ),
        pytest.param(
            zero,
            "an optimizer within the optimizer",
            marks=pytest.mark.host("ZeroRedundancyOptimizer", "replicas equal to the last bit"),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.usefixtures("compact")
def test_what_the_compact_mode_does_not_serve_it_refuses(ranks, make, reason, record_property, request):
    if "HSDP" in request.node.name and ranks.count == 2:
        pytest.skip("two replicas of one rank each have whole parameters")
    for message in ranks.run(refusal, make):
        assert "compact=False" in message
    record_property("refused", reason)


@pytest.mark.host("FSDP2", "refusal of _StridedShard")
def test_strided_shards_are_refused(ranks):
    if ranks.count < 4:
        pytest.skip("a mesh of two dimensions has four ranks")
    for message in ranks.run(refusal, strided):
        assert "cannot be tied as it is distributed" in message
        assert "StridedShard" in message


def sharded_late() -> str:
    """What the compact mode says when a host shards parameters after they were tied."""
    model = mlp()
    optimizer = TiedOptimizer(INNER["SGD"](model.parameters()), TIES["rows"](model), compact=True)
    train(model, optimizer, range(1))
    fsdp(model, dist.get_world_size())
    optimizer.param_groups[0]["params"][:] = model.parameters()
    start = whole(model)
    try:
        train(model, optimizer, range(1), share_of("fully_shard"))
    except ValueError as error:
        assert all(map(same_bits, whole(model), start))
        return str(error)
    return "nothing"


def test_parameters_that_are_sharded_once_they_are_tied_are_refused_in_the_compact_mode(ranks):
    for message in ranks.run(sharded_late):
        assert "compact=False" in message


def impatient() -> tuple[dist.ProcessGroup, DeviceMesh]:
    """A group of all ranks, which no other test waits for, and a mesh of it."""
    # From the start on: in torch 2.6, all_to_all_single ignores a timeout that is set later.
    group = dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=20))
    # torch takes meshes of one name for the same one, whatever their groups are.
    return group, DeviceMesh.from_group(group, "cpu", mesh_dim_names=(group.group_name,))


def alone(mesh: DeviceMesh) -> TiedOptimizer | None:
    """An optimizer whose step waits for all ranks; None on the last one, which is to take none."""
    weight = Parameter(distribute_tensor(randn(8, 4), mesh, [Shard(0)]))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: torch.arange(8) % 2})
    weight.grad = distribute_tensor(randn(8, 4), mesh, [Shard(0)])
    dist.barrier()
    return None if dist.get_rank() == dist.get_world_size() - 1 else optimizer


def lagging() -> tuple[str, float]:
    """What a rank sees when the last one takes no step, and after how many seconds."""
    group, mesh = impatient()
    optimizer = alone(mesh)
    if optimizer is None:
        return "", 0.0
    # Not before: to start on a busy machine takes longer.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    begin = time.monotonic()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return "nothing", 0.0


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_torch_says(two_ranks):
    (message, seconds), _ = two_ranks.run(lagging)

    assert "timeout" in message or "Timed out" in message
    assert 1 <= seconds < 30


def dying() -> None:
    optimizer = alone(mesh_of(line()))
    if optimizer is None:
        os._exit(1)
    optimizer.step()


@pytest.mark.slow
def test_a_rank_that_is_dead_is_an_error_of_torch_on_the_others():
    died = r"(?s)rank 0: .*in all_to_all_single.*Connection (closed|reset) by peer.*rank 1: the process has died"
    with Ranks(2) as started, pytest.raises(AssertionError, match=died):
        started.run(dying)


class Switching(SGD):
    """As those that exchange the weights."""

    def eval(self, exchange):
        exchange()


def failing_alone(method: str, everywhere: bool) -> tuple[str, bool]:
    """What a rank sees when what the last one, or all, call fails; and whether weights are as they were."""
    group, mesh = impatient()
    weight = Parameter(distribute_tensor(randn(8, 4), mesh, [Shard(0)]))
    optimizer = TiedOptimizer(Switching([weight], lr=0.1), {weight: torch.arange(8) % 2})
    start = weight.to_local().detach().clone()
    weight.grad = distribute_tensor(randn(8, 4), mesh, [Shard(0)])
    optimizer.tie_gradients()

    def closure() -> None:
        if everywhere or dist.get_rank() == dist.get_world_size() - 1:
            raise KeyError("closure")

    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    try:
        getattr(optimizer, method)(closure)
    except (KeyError, RuntimeError) as error:
        return str(error), same_bits(weight.to_local().detach(), start)
    return "nothing", False


@pytest.mark.parametrize("method", ["step", "eval"])
def test_a_rank_that_fails_sends_the_others_nothing_that_they_would_take_for_something_else(two_ranks, method):
    assert two_ranks.run(failing_alone, method, True) == [("'closure'", True)] * 2
    (waited, kept), failed = two_ranks.run(failing_alone, method, False)

    assert "timeout" in waited or "Timed out" in waited
    assert kept
    assert failed == ("'closure'", True)
