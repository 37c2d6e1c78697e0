"""The compact mode on shards: what one process trains, with shards of the compact parameters and of their state."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import every_pair
from checks import randn
from hypothesis import given
from hypothesis import strategies as st
from ranks import refusal_of
from strategies import seeds
from test_sharded import HOSTS, INNER, SHARDED, mesh_of, mesh_on, mlp, sharded, share_of, train, whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Embedding, Linear, Parameter, Sequential
from torch.optim import SGD, Adagrad, Adam, AdamW

from tieopt import Tie, TiedOptimizer, frozen, is_tied, split_shared_
from tieopt.tensors import bounds_of

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo"),
    pytest.mark.filterwarnings("ignore:A tie ties nothing"),
]

OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": functools.partial(AdamW, lr=0.1, amsgrad=True),
    "Adam, one by one": functools.partial(Adam, lr=0.1, foreach=False),
    "Adagrad": functools.partial(Adagrad, lr=0.1, initial_accumulator_value=0.5),
}
MULTIPLES = torch.tensor([1.0, -1.0, 0.0, 0.3, -2.0], dtype=torch.float64)


def placed(full: Tensor, mesh_shape: tuple[int, ...] | None, placements: list) -> Any:
    return full.clone() if mesh_shape is None else sharded(full, mesh_shape, placements)


def is_cut_as_torch_cuts(value: Any) -> bool:
    """Whether a tensor of the state has the shard that others expect on this rank; also one that is not sharded."""
    if not isinstance(value, DTensor):
        return True
    bounds = bounds_of(value, value.device_mesh.get_coordinate())
    return value.to_local().shape == tuple(part.stop - part.start for part in bounds)


def gathered(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def trained(
    weights: list[Tensor],
    labels: list[Tensor],
    scales: list[Tensor | None],
    dim: int,
    mesh_shape: tuple[int, ...] | None,
    placements: list,
    inner: str,
    reduction: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Weights, the state that they have once they are untied, and that of the compact mode if it is saved, gathered."""
    params = [Parameter(placed(weight, mesh_shape, placements)) for weight in weights]

    def step(number: int) -> None:
        for param, weight in zip(params, weights, strict=True):
            param.grad = placed(randn(*weight.shape, seed=number, dtype=weight.dtype), mesh_shape, placements)
        optimizer.step()

    optimizer = OPTIMIZERS[inner](params)
    step(1)
    slices = zip(params, labels, scales, strict=True)
    ties = Tie.join(*(Tie(param, numbers, dim=dim, scale=scale) for param, numbers, scale in slices))
    optimizer = TiedOptimizer(optimizer, ties, compact=True, reduction=reduction)
    step(2)
    assert optimizer.tie_drift() == 0
    optimizer.load_state_dict(optimizer.state_dict())
    step(3)
    for state in optimizer.state.values():
        assert all(map(is_cut_as_torch_cuts, state.values()))
    saved = optimizer.state_dict()
    held = [saved["state"].get(number, {}) for number in range(len(params))]
    compact_state = [gathered(value).clone() for own in held for _, value in sorted(own.items())]
    optimizer.retie(ties)
    step(4)
    weights = [gathered(param.detach()).clone() for param in params]
    optimizer.untie()
    state = [gathered(value).clone() for param in params for _, value in sorted(optimizer.state[param].items())]
    step(5)
    return (
        [*weights, *(gathered(param.detach()) for param in params)],
        state,
        compact_state if "compact" in saved["tieopt"] else None,
    )


@st.composite
def cases(draw, count: int):
    """Joined tensors, how they lie, and labels of groups that are whole on every rank."""
    shape = draw(st.sampled_from([(8, 5), (7, 4), (3, 9), (8, 3, 2)]))
    dim = draw(st.integers(0, 1))
    depth = draw(st.integers(1, len(shape) - 1))
    mesh_shape, placements = draw(
        st.sampled_from(
            [
                ((count,), [Shard(0)]),
                ((count,), [Shard(1)]),
                ((count,), [Replicate()]),
                ((2, count // 2), [Replicate(), Shard(0)]),
                ((2, count // 2), [Shard(1), Shard(0)]),
                ((2, count // 2), [Shard(0), Shard(0)]),
            ]
        )
    )
    generator = torch.Generator().manual_seed(draw(seeds))
    number, kinds = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    labelled = [dim, *(other for other in range(len(shape)) if other != dim)][:depth]
    cuts = [
        (size, placement.dim)
        for size, placement in zip(mesh_shape, placements, strict=True)
        if placement.is_shard() and placement.dim in labelled
    ]
    rank = rank_of_each(torch.zeros(shape, dtype=torch.int64), cuts).movedim(dim, 0)
    rank = rank[(..., *[0] * (len(shape) - depth))]
    labels = [torch.randint(-1, kinds, rank.shape, generator=generator) for _ in range(number)]
    labels = [torch.where(own == -1, -1, own + kinds * rank) for own in labels]
    scales: list[Tensor | None] = [None] * number
    if draw(st.booleans()):
        scales = [MULTIPLES[torch.randint(0, 5, rank.shape, generator=generator)] for _ in range(number)]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(number)]
    return weights, labels, scales, dim, mesh_shape, placements


def rank_of_each(part: Tensor, cuts: list[tuple[int, int]]) -> Tensor:
    """Write to the parts into which ranks cut a tensor, along one dimension of the mesh after the other, numbers."""
    if not cuts:
        return part
    (size, dim), *rest = cuts
    chunks = part.chunk(size, dim)
    for number, chunk in enumerate(chunks):
        rank_of_each(chunk.mul_(size).add_(number), rest)
    return part


@given(data=st.data(), inner=st.sampled_from(list(OPTIMIZERS)), reduction=st.sampled_from(["mean", "sum"]))
def test_shards_are_trained_as_in_one_process(ranks, data, inner, reduction):
    weights, labels, scales, dim, mesh_shape, placements = data.draw(cases(ranks.count))
    expected = trained(weights, labels, scales, dim, None, [], inner, reduction)

    for answer in ranks.run(trained, weights, labels, scales, dim, mesh_shape, placements, inner, reduction):
        torch.testing.assert_close(answer[:2], expected[:2], rtol=1e-12, atol=1e-12)
        if answer[2] is not None:
            torch.testing.assert_close(answer[2], expected[2], rtol=1e-12, atol=1e-12)


def trained_on_some(ranks: tuple[int, ...], labels: Tensor, placement: Any) -> list[Tensor] | None:
    """Two joined weights that are trained on a mesh of some ranks; None on the others."""
    mesh = mesh_on(ranks)
    first, second = (randn(8, 4, seed=seed, dtype=torch.float64) for seed in (1, 2))
    params = [Parameter(distribute_tensor(weight, mesh, [placement])) for weight in (first, second)]
    optimizer = AdamW(params, lr=0.1)
    optimizer = TiedOptimizer(optimizer, Tie.join(*(Tie(param, labels) for param in params)), compact=True)
    for step in range(2):
        params[0].grad = distribute_tensor(randn(8, 4, seed=step, dtype=torch.float64), mesh, [placement])
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.tie_drift() == 0
    assert is_tied(params[0], labels)
    optimizer.untie()
    if dist.get_rank() not in ranks:
        return None
    return [param.full_tensor().detach() for param in params]


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2, 3, 3], [0, -1, 1, 1, 2, 2, 3, 3]], ids=["regular", "irregular"])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
def test_ranks_outside_the_mesh_have_nothing_to_train(ranks, placement, labels):
    everywhere = ranks.run(trained_on_some, tuple(range(ranks.count)), torch.tensor(labels), placement)
    answers = ranks.run(trained_on_some, (1,), torch.tensor(labels), placement)

    assert [rank for rank, weights in enumerate(answers) if weights is not None] == [1]
    torch.testing.assert_close(answers[1], everywhere[0], rtol=1e-12, atol=1e-12)


def trained_with_offsets(is_sharded: bool) -> list[Tensor]:
    full = randn(16, 3, dtype=torch.float64)
    weight = Parameter(sharded(full, (dist.get_world_size(),), [Shard(0)]) if is_sharded else full)
    offset = torch.arange(16.0)[:, None]
    ties = [frozen(weight, [0, 5]), Tie(weight, [[2, 3], [8, 9, 10], [12, 13]], offset=offset)]
    optimizer = TiedOptimizer(AdamW([weight], lr=0.1), ties, compact=True)
    weights = []
    for step in range(3):
        grad = randn(16, 3, seed=step, dtype=torch.float64)
        weight.grad = sharded(grad, (dist.get_world_size(),), [Shard(0)]) if is_sharded else grad
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.tie_drift() == 0
        weights.append(gathered(weight.detach()).clone())
    return weights


def test_offsets_and_frozen_rows_of_shards_are_those_of_one_process(ranks):
    expected = trained_with_offsets(False)
    for weights in ranks.run(trained_with_offsets, True):
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


# Along which dimensions the weights of both layers are cut.
CUTS = {
    "fully_shard": (0, 0),
    "fully_shard, Shard(1)": (0, 1),
    "HSDP": (0, 0),
    "tensor parallel": (0, 1),
}


def trained_model(how: str, inner: str, is_sharded: bool) -> list[Tensor]:
    model = mlp()
    if is_sharded:
        SHARDED[how](model, dist.get_world_size())
    weights = (model[0].weight, model[2].weight)
    ties = [Tie(weight, [[0, 3], [1, 2, 5]], dim=1 - cut) for weight, cut in zip(weights, CUTS[how], strict=True)]
    optimizer = TiedOptimizer(INNER[inner](model.parameters()), ties, compact=True, reduction="sum")
    train(model, optimizer, range(3), share_of(how) if is_sharded else slice(None))
    assert optimizer.tie_drift() == 0
    return whole(model)


@every_pair(how=[pytest.param(how, marks=host) for how, host in HOSTS.items()], inner=INNER, compact=[True])
@pytest.mark.usefixtures("compact")
def test_models_are_trained_as_in_one_process(ranks, how, inner):
    expected = trained_model(how, inner, False)
    for weights in ranks.run(trained_model, how, inner, True):
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


# --- checkpoints ---

GATHERED = StateDictOptions(full_state_dict=True)


class Tables(Sequential):
    """Three tables of one shape, of which modules share one Parameter, and a layer."""

    def __init__(self, rows: int = 7) -> None:
        super().__init__(Embedding(rows, 6), Linear(6, rows, bias=False), Linear(rows, 8))
        with torch.no_grad():
            for seed, param in enumerate(self.parameters()):
                param.copy_(randn(*param.shape, seed=seed))
        self[1].weight = self[0].weight

    def forward(self, numbers: Tensor) -> Tensor:
        return self[2](self[1](self[0](numbers)))


LABELS = {
    # Cut between groups, in whichever half or quarter these are: what is saved does not depend on the ranks.
    "regular": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
    # Some ranks have fewer rows of the compact parameter than others, and groups are not sorted by their rows.
    "irregular": torch.tensor([-1, 5, 2, 2, 4, 4, 3, -1]),
}


def built(kind: str, rows: int, is_sharded: bool, compact: bool = True) -> tuple[Sequential, TiedOptimizer]:
    model = Tables(rows)
    ties = split_shared_(model)
    for unit in (*model, model) if is_sharded else ():
        fully_shard(unit, mesh=mesh_of((dist.get_world_size(),)))
    ties = [*ties, Tie(model[2].weight, LABELS[kind])]
    return model, TiedOptimizer(AdamW(model.parameters(), lr=0.1), ties, compact=compact)


def stepped(model: Sequential, optimizer: TiedOptimizer, steps: range) -> None:
    """Every rank has the same batch."""
    for step in steps:
        optimizer.zero_grad()
        model(torch.arange(step, step + 5) % 7).square().mean().backward()
        optimizer.step()


def entries(optimizer: TiedOptimizer) -> int:
    return sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())


def interrupted(kind: str, rows: int, is_sharded: bool, saved: dict | None, compact: bool) -> tuple[Any, ...]:
    """The state after two steps, or one that was loaded; the weights after two more, and the size of the state."""
    model, optimizer = built(kind, rows, is_sharded, compact)
    stepped(model, optimizer, range(2))
    if saved is not None:
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved), options=GATHERED)
    # That of one process is not gathered, and goes on.
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=GATHERED))
    size = entries(optimizer)
    stepped(model, optimizer, range(2, 4))
    assert optimizer.tie_drift() == 0
    optimizer.untie()
    assert {float(held["step"]) for held in optimizer.state.values()} == {4.0}
    return state, [gathered(param.detach()) for param in model.parameters()], size


def tensors_of(saved: dict) -> dict[tuple[str, str], Tensor]:
    return {
        (name, key): value
        for name, held in saved["state"].items()
        for key, value in held.items()
        if isinstance(value, Tensor)
    }


@pytest.mark.host("FSDP2", "the compact mode, where every group is whole on a rank")
@pytest.mark.parametrize("compact", [True])
@pytest.mark.usefixtures("compact")
@pytest.mark.parametrize("rows", [7, 8])
@pytest.mark.parametrize("kind", LABELS)
def test_what_is_saved_is_what_one_process_saves_and_loads(ranks, kind, rows):
    compact_state, weights, size = interrupted(kind, rows, False, None, True)
    whole_state, *_ = interrupted(kind, rows, False, None, False)
    expected = tensors_of(compact_state if kind == "regular" else whole_state)

    answers = ranks.run(interrupted, kind, rows, True, None, True)
    saved = answers[0][0]
    assert tensors_of(saved).keys() == expected.keys()
    for key, value in tensors_of(saved).items():
        torch.testing.assert_close(value, expected[key])
    # Of compact parameters, a little larger where every rank has as many rows as the one that has most.
    full_size = sum(value.numel() for value in tensors_of(whole_state).values() if value.dim())
    for *_, own in answers:
        assert own == size if kind == "regular" else size <= own < full_size
    # Wherever and in whichever mode it was saved, it is loaded by one process, and by the ranks.
    for state in (saved, compact_state, whole_state):
        _, resumed, _ = interrupted(kind, rows, False, state, True)
        torch.testing.assert_close(resumed, weights)
        if kind == "irregular" and state is compact_state:
            # The order of its rows is not that of the shards.
            for message in ranks.run(refusal_of, ValueError, interrupted, kind, rows, True, state, True):
                assert "cannot be converted" in message
            continue
        for _, resumed, _ in ranks.run(interrupted, kind, rows, True, state, True):
            torch.testing.assert_close(resumed, weights)


# --- what depends on the rank ---


def with_few_rows(pinned: bool) -> list[float]:
    """The steps that two joined weights have made, where the last rank has no rows of one or both to train."""
    count = dist.get_world_size()
    shape = (2 * count if pinned else count - 1, 4)
    params = [Parameter(sharded(randn(*shape, seed=seed), (count,), [Shard(0)])) for seed in (1, 2)]
    scale = torch.ones(shape[0])
    scale[-2:] = 0
    labels, scales = torch.arange(shape[0]), (None, scale if pinned else None)
    ties = Tie.join(*(Tie(param, labels, scale=scale) for param, scale in zip(params, scales, strict=True)))
    optimizer = TiedOptimizer(AdamW(params, lr=0.1), ties, compact=True)
    for _ in range(2):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.retie(ties)
    optimizer.untie()
    assert all(sorted(optimizer.state[param]) == ["exp_avg", "exp_avg_sq", "step"] for param in params)
    return [float(optimizer.state[param]["step"]) for param in params]


@pytest.mark.parametrize("pinned", [False, True])
def test_ranks_without_rows_convert_the_state_with_the_others(ranks, pinned):
    assert ranks.run(with_few_rows, pinned) == [[2.0, 2.0]] * ranks.count


def saved_alone(labels: list[int], copied: bool) -> list[bool]:
    mesh = mesh_of((dist.get_world_size(),))
    params = [Parameter(distribute_tensor(randn(8, 4, seed=seed), mesh, [Shard(0)])) for seed in (1, 2)]
    optimizer = TiedOptimizer(
        AdamW(params, lr=0.1), Tie.join(*(Tie(param, torch.tensor(labels)) for param in params)), compact=True
    )
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    if copied:
        optimizer = copy.deepcopy(optimizer)
    # The other ranks would not answer.
    saved = optimizer.state_dict() if dist.get_rank() == 0 else None
    dist.barrier()
    return [] if saved is None else [number in saved["state"] for number in (0, 1)]


@pytest.mark.parametrize("labels", [range(8), [0, -1, 1, 1, 2, 2, 3, 3]], ids=["regular", "irregular"])
def test_the_state_is_saved_without_the_other_ranks(ranks, labels):
    assert ranks.run(saved_alone, list(labels), False)[0] == [True, True]


def test_that_of_a_copy_is_as_well(ranks):
    assert ranks.run(saved_alone, list(range(8)), True)[0] == [True, True]


def untied_after_sharding() -> bool:
    params = [Parameter(randn(8, 4, seed=seed)) for seed in (1, 2)]
    labels = torch.arange(8) // 2
    ties = Tie.join(*(Tie(param, labels) for param in params))
    optimizer = TiedOptimizer(AdamW(params, lr=0.1), ties, compact=True)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    mesh = mesh_of((dist.get_world_size(),))
    optimizer.param_groups[0]["params"][:] = [
        Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])) for param in params
    ]
    with pytest.warns(UserWarning, match="begins"):
        optimizer.untie()
    return not optimizer.ties


def test_parameters_that_were_sharded_since_can_be_untied(ranks):
    assert ranks.run(untied_after_sharding) == [True] * ranks.count


def irregular(kind: str) -> str:
    mesh = mesh_of((dist.get_world_size(),))
    weight = Parameter(distribute_tensor(randn(8, 4), mesh, [Shard(0)]))
    inner = getattr(torch.optim, kind)([weight])
    ties = Tie(weight, LABELS["irregular"])
    return refusal_of(ValueError, lambda: TiedOptimizer(inner, ties, compact=True, reduction="sum"))


@pytest.mark.parametrize("kind", ["Adafactor", "LBFGS", "Muon"])
def test_optimizers_that_couple_rows_are_refused_where_the_rows_depend_on_the_mesh(ranks, kind):
    if not hasattr(torch.optim, kind):
        pytest.skip(f"this torch has no {kind}")
    for message in ranks.run(irregular, kind):
        assert f"{kind} couples rows" in message
