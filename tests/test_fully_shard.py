"""fully_shard with what surrounds it in a training: the trajectory of one process, and ties to the last bit."""

import copy
import functools
import math
import warnings
from collections.abc import Callable
from itertools import cycle

import pytest
import torch
import torch.distributed as dist
from cases import every_pair
from checks import randn, same_bits, same_tree
from ranks import Ranks
from test_sharded import INNER, TIES, batch, fsdp, mesh_of, mlp, share_of, tied_after_all, train, whole
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn import Linear, Sequential, Tanh
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from tieopt import Tie, TiedOptimizer

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")


@pytest.fixture(scope="module")
def ranks(two_ranks):
    return two_ranks


# --- what runs both on the ranks and, to compare with, in this process ---


def share() -> slice:
    return share_of("fully_shard") if dist.is_initialized() else slice(None)


def shard(model: Sequential, **options) -> Sequential:
    if dist.is_initialized():
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh_of((dist.get_world_size(),)), **options)
    return model


def backward(model, step: int) -> None:
    inputs, targets = batch(step)
    (model(inputs[share()]) - targets[share()]).square().mean().backward()


def check(ranks: Ranks, scenario: Callable, *args, kind: str = "rows", tolerance: float = 1e-12) -> None:
    """Weights on all ranks are those of one process, tied and equal to the last bit."""
    expected, answers = scenario(*args), ranks.run(scenario, *args)
    assert not all(map(same_bits, expected, whole(mlp())))
    torch.testing.assert_close(answers[0], expected, rtol=tolerance, atol=tolerance)
    assert tied_after_all(answers[0], kind)
    assert all(all(map(same_bits, weights, answers[0])) for weights in answers)


# --- optimizers ---


def stepped(kind: str, reduction: str, options: dict) -> list[Tensor]:
    model = shard(mlp())
    optimizer = TiedOptimizer(AdamW(model.parameters(), lr=0.01, **options), TIES[kind](model), reduction=reduction)
    train(model, optimizer, range(4), share())
    return whole(model)


@pytest.mark.host("FSDP2", "foreach and fused AdamW")
@every_pair(
    kind=TIES,
    options=[{"foreach": True}, {"fused": True}, {"foreach": True, "amsgrad": True}],
    reduction=["mean", "sum"],
)
def test_foreach_and_fused_steps_are_those_of_one_process(ranks, kind, reduction, options):
    check(ranks, stepped, kind, reduction, options, kind=kind)


def with_closure() -> list[Tensor]:
    model = shard(mlp())
    optimizer = TiedOptimizer(INNER["SGD"](model.parameters()), TIES["rows"](model), reduction="sum")

    def closure(step: int) -> None:
        optimizer.zero_grad()
        backward(model, step)

    for step in range(3):
        optimizer.step(functools.partial(closure, step))
    return whole(model)


@pytest.mark.host("FSDP2", "closures")
def test_gradients_of_a_closure_are_tied_as_in_one_process(ranks):
    check(ranks, with_closure)


def with_lbfgs(line_search: str | None) -> tuple[list[Tensor], float]:
    # It flattens gradients, which torch does with even shards alone.
    model = Sequential(Linear(8, 12), Tanh(), Linear(12, 8)).double()
    with torch.no_grad():
        for seed, param in enumerate(model.parameters()):
            param.copy_(randn(*param.shape, seed=seed, dtype=torch.float64) / 3)
    shard(model)
    inner = LBFGS(model.parameters(), lr=0.1, line_search_fn=line_search)
    optimizer = TiedOptimizer(inner, TIES["rows"](model))

    def closure(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(inputs[share(), :8]) - targets[share(), :8]).square().mean()
        loss.backward()
        # Where a rank goes on depends on its loss.
        loss = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(loss.div_(dist.get_world_size()))
        return loss

    for step in range(2):
        optimizer.step(functools.partial(closure, *batch(step)))
    return whole(model), optimizer.tie_drift()


@pytest.mark.host("FSDP2", "LBFGS, where shards are even")
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_goes_as_in_one_process(ranks, line_search):
    expected, _ = with_lbfgs(line_search)
    for weights, drift in ranks.run(with_lbfgs, line_search):
        # Forty evaluations, each on sums in another order.
        torch.testing.assert_close(weights, expected, rtol=1e-8, atol=1e-8)
        assert drift == 0


# --- gradients ---


def accumulated() -> list[Tensor]:
    model = shard(mlp())
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES["rows"](model))
    for step in range(3):
        for micro in range(3):
            if dist.is_initialized():
                model.set_requires_gradient_sync(micro == 2)
            backward(model, 3 * step + micro)
            optimizer.tie_gradients()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


@pytest.mark.host("FSDP2", "set_requires_gradient_sync")
def test_gradients_that_were_accumulated_without_being_reduced_are_tied_once_they_are(ranks):
    check(ranks, accumulated)


def stepped_unreduced() -> bool:
    """Whether a step changes nothing as long as gradients are where nobody sees them."""
    model = shard(mlp())
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES["rows"](model))
    before = whole(model)
    model.set_requires_gradient_sync(False)
    backward(model, 0)
    optimizer.step()
    return all(map(same_bits, before, whole(model)))


def test_a_step_before_gradients_are_reduced_writes_nothing(ranks):
    assert ranks.run(stepped_unreduced) == [True] * ranks.count


def clipped() -> list[Tensor]:
    model = shard(mlp())
    optimizer = TiedOptimizer(INNER["SGD"](model.parameters()), TIES["rows"](model))
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    return whole(model)


@pytest.mark.host("FSDP2", "clipping of untied gradients")
def test_gradients_that_were_clipped_before_they_are_tied_are_those_of_one_process(ranks):
    check(ranks, clipped)


def without_gradients(kind: str, missing: list[int], frozen: list[int]) -> list[Tensor]:
    model = mlp()
    for number in frozen:
        list(model.parameters())[number].requires_grad_(False)
    shard(model)
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES[kind](model))
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        for number in missing:
            list(model.parameters())[number].grad = None
        optimizer.step()
    return whole(model)


@pytest.mark.host("FSDP2", "frozen parameters and parameters without a gradient")
@pytest.mark.parametrize(
    ("kind", "missing", "frozen"),
    [("transposed", [2], []), ("transposed", [0, 2], []), ("rows", [1], []), ("transposed", [], [0, 2])],
)
def test_parameters_without_gradients_are_treated_as_in_one_process(ranks, kind, missing, frozen):
    expected = without_gradients(kind, missing, frozen)
    start = whole(mlp())
    for weights in ranks.run(without_gradients, kind, missing, frozen):
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
        for number in frozen:
            assert same_bits(weights[number], start[number])


# --- precision ---


def scaled(options: dict, spoilt: int) -> tuple[list[Tensor], list[float]]:
    model = shard(mlp())
    optimizer = TiedOptimizer(AdamW(model.parameters(), lr=0.01, **options), TIES["rows"](model))
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for step in range(4):
        optimizer.zero_grad()
        inputs, targets = batch(step)
        scaler.scale((model(inputs[share()]) - targets[share()]).square().mean()).backward()
        # On one rank alone, in a row of a group that spans both.
        if step == spoilt and (not dist.is_initialized() or dist.get_rank() == 0):
            grad = model[0].weight.grad
            (grad.to_local() if dist.is_initialized() else grad)[0, 0] = math.inf
        before = whole(model)
        scaler.step(optimizer)
        scaler.update()
        assert all(map(same_bits, before, whole(model))) == (step == spoilt)
        scales.append(scaler.get_scale())
    return whole(model), scales


@pytest.mark.host("FSDP2", "GradScaler, an overflow on one rank")
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_all_ranks_skip_a_step_that_overflows_on_one(ranks, options):
    expected, scales = scaled(options, 2)
    assert scales == [1024, 1024, 512, 512]
    for weights, own_scales in ranks.run(scaled, options, 2):
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
        assert own_scales == scales
        assert tied_after_all(weights, "rows")


def in_mixed_precision(kind: str, reduce_dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Weights after each step, and those of whole parameters that stepped on the gathered gradients."""
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype, output_dtype=torch.float32)
    model, twin = shard(mlp().float(), mp_policy=policy), mlp().float()
    optimizer, reference = (
        TiedOptimizer(SGD(each.parameters(), lr=0.1, momentum=0.9), TIES[kind](each)) for each in (model, twin)
    )
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        inputs, targets = batch(step)
        (model(inputs[share()].float()) - targets[share()].float()).square().mean().backward()
        for param, whole_param in zip(model.parameters(), twin.parameters(), strict=True):
            whole_param.grad = param.grad.full_tensor()
        optimizer.step()
        reference.step()
        seen.append((whole(model), whole(twin)))
    return seen


@pytest.mark.host("FSDP2", "MixedPrecisionPolicy")
@pytest.mark.parametrize(
    ("kind", "reduce_dtype"), list(zip(TIES, cycle([torch.float32, torch.bfloat16]), strict=False))
)
def test_in_mixed_precision_the_weights_are_those_of_whole_parameters_with_the_same_gradients(
    ranks, kind, reduce_dtype
):
    for seen in ranks.run(in_mixed_precision, kind, reduce_dtype):
        for weights, expected in seen:
            assert {weight.dtype for weight in weights} == {torch.float32}
            torch.testing.assert_close(weights, expected)
            assert tied_after_all([weight.double() for weight in weights], kind)


# --- where parameters are ---


def offloaded() -> list[Tensor]:
    # Memory that is pinned needs an accelerator.
    model = shard(mlp(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES["rows"](model))
    train(model, optimizer, range(3), share())
    return whole(model)


@pytest.mark.host("FSDP2", "CPUOffloadPolicy, as far as it goes without an accelerator")
def test_offloaded_parameters_are_tied(ranks):
    check(ranks, offloaded)


def swap(optimizer: Optimizer, model: Sequential) -> None:
    """As Accelerate does, once it has sharded the model that the optimizer was built of."""
    shards = iter(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [next(shards) for _ in group["params"]]


def tied_before_sharded(kind: str) -> list[Tensor]:
    model = mlp()
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES[kind](model))
    if dist.is_initialized():
        fsdp(model, dist.get_world_size())
        swap(optimizer, model)
    train(model, optimizer, range(3), share())
    return whole(model)


@pytest.mark.host("FSDP2", "tied before it is sharded, parameters swapped after")
@pytest.mark.parametrize("kind", TIES)
def test_ties_follow_parameters_that_are_sharded_and_swapped_later(ranks, kind):
    check(ranks, tied_before_sharded, kind, kind=kind)


def rounded_before_sharded() -> str:
    model = mlp()
    scale = torch.full((12,), 0.3)
    ties = Tie(model[0].weight, [list(range(12))], scale=scale)
    optimizer = TiedOptimizer(SGD(model.named_parameters(), lr=0.1), ties)
    fsdp(model, dist.get_world_size())
    swap(optimizer, model)
    before = whole(model)
    try:
        train(model, optimizer, range(1), share())
    except ValueError as error:
        assert all(map(same_bits, before, whole(model)))
        return str(error)
    raise AssertionError("nothing was refused")


def test_what_shards_cannot_do_is_refused_by_the_step_that_finds_them(ranks):
    for message in ranks.run(rounded_before_sharded):
        assert "multiples that are rounded" in message
        assert "Parameter: 0.weight" in message


def sharded_in_part() -> list[str]:
    """What everything that ties says once a host has sharded one of two joined parameters."""
    model = mlp()
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), TIES["transposed"](model))
    optimizer.param_groups[0]["params"][2] = fully_shard(model[2], mesh=mesh_of((dist.get_world_size(),))).weight
    said = []
    for method in (optimizer.tie_weights, optimizer.tie_drift, optimizer.tie_summary):
        try:
            method()
        except ValueError as error:
            said.append(str(error))
    return said


def test_joined_parameters_of_which_one_is_sharded_later_are_refused(ranks):
    for said in ranks.run(sharded_in_part):
        assert len(said) == 3
        assert all("not sharded over one mesh" in message for message in said)


# --- torch.compile ---


def compiled_model() -> list[Tensor]:
    model = shard(mlp())
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES["rows"](model))
    train(torch.compile(model, backend="aot_eager"), optimizer, range(3), share())
    return whole(model)


@pytest.mark.host("FSDP2", "torch.compile of the model")
def test_a_compiled_model_is_trained_as_in_one_process(ranks):
    check(ranks, compiled_model)


def compiled_step(kind: str) -> list[Tensor]:
    torch._dynamo.reset()
    model = shard(mlp())
    optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES[kind](model), reduction="sum")
    step = torch.compile(optimizer.step, backend="aot_eager") if dist.is_initialized() else optimizer.step
    for number in range(3):
        optimizer.zero_grad()
        backward(model, number)
        step()
    return whole(model)


@pytest.mark.host("FSDP2", "torch.compile of the step")
@pytest.mark.parametrize("kind", ["rows", "transposed"])
def test_a_compiled_step_is_that_of_one_process(ranks, kind):
    # A compiled AdamW corrects its bias in float32.
    check(ranks, compiled_step, kind, kind=kind, tolerance=1e-6)


# --- checkpoints ---


def made(inner: str) -> tuple[Sequential, Optimizer]:
    model = shard(mlp())
    return model, TiedOptimizer(INNER[inner](model.parameters()), TIES["rows"](model))


def resumed(inner: str, full: bool, folder: str) -> tuple[list[Tensor], list[Tensor], bool]:
    """Weights of a training that goes on, and of one that was resumed; and whether their states are equal."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    def content(model: Sequential, optimizer: Optimizer) -> dict:
        options = StateDictOptions(full_state_dict=full, cpu_offload=full)
        return {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }

    model, optimizer = made(inner)
    train(model, optimizer, range(3), share())
    saved = copy.deepcopy(content(model, optimizer))
    train(model, optimizer, range(3, 5), share())

    other, resumed = made(inner)
    if full:
        # The first rank has it all, the others nothing.
        saved = {key: value if dist.get_rank() == 0 else {} for key, value in saved.items()}
    else:
        save(saved, checkpoint_id=folder)
        saved = content(other, resumed)
        load(saved, checkpoint_id=folder)
    options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    set_model_state_dict(other, saved["model"], options=options)
    set_optimizer_state_dict(other, resumed, saved["optimizer"], options=options)
    train(other, resumed, range(3, 5), share())
    same = same_tree(
        *(tree(content(*each)["optimizer"].get("state")) for each in ((model, optimizer), (other, resumed)))
    )
    return whole(model), whole(other), same


def tree(state):
    """A state with the shards of its tensors."""
    if isinstance(state, dict):
        return {key: tree(value) for key, value in state.items()}
    return state.to_local() if hasattr(state, "to_local") else state


@pytest.mark.host("torch.distributed.checkpoint", "FSDP2: resumed to the last bit, from shards and from a full state")
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("full", [False, True])
def test_what_was_saved_goes_on_as_if_it_had_not_been_stopped(ranks, inner, full, tmp_path):
    for weights, others, same in ranks.run(resumed, inner, full, str(tmp_path / "checkpoint")):
        assert all(map(same_bits, weights, others))
        assert tied_after_all(others, "rows")
        assert same


# --- warnings ---


def warned(kind: str) -> list[str]:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model = shard(mlp())
            optimizer = TiedOptimizer(INNER["AdamW"](model.parameters()), TIES[kind](model))
            backward(model, 0)
            optimizer.step()
    finally:
        torch.set_warn_always(False)
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize("kind", TIES)
def test_nothing_warns(ranks, kind):
    assert ranks.run(warned, kind) == [[]] * ranks.count
