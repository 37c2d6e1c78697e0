"""What only the compact mode has: one entry for each group is what the inner optimizer trains, and nobody else sees."""

import copy
import gc
import inspect
import re
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from checks import (
    FREE,
    GROUPS,
    REDUCTIONS,
    SHAPE,
    bits,
    default_dtype,
    one_bare,
    one_tied,
    parameter,
    pickled,
    randn,
    same_tree,
)
from checks import same_bits as same
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import CompactTraining, flat, groups_of_entries, same_bits, slowly_tied_entries
from strategies import (
    COUPLING,
    ENTRYWISE,
    Recipe,
    closure_of,
    few_examples,
    labels,
    laid_out,
    layouts,
    loss_of,
    normal,
    recipes_for,
    reductions,
    reductions_for,
    seeds,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer
from torch.testing import assert_close

from tieopt import Tie, TiedOptimizer, is_tied, tie_
from tieopt.testing import scales, ties

STEPS = 20
EXACT = ("none", "signs", "zeros")

small = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
some_seeds = st.lists(seeds, min_size=1, max_size=3)


def tied_of(optimizer: Optimizer, drawn: Any, **options: Any) -> TiedOptimizer:
    return TiedOptimizer(optimizer, drawn, compact=True, **options)


# --- what is tied ---


def _parameters(data: st.DataObject, dtype: torch.dtype) -> list[Parameter]:
    starts = [normal(data.draw(small), dtype, data.draw(seeds)) for _ in range(data.draw(st.integers(1, 3)))]
    return [Parameter(laid_out(start, data.draw(layouts(start)))) for start in starts]


def _of_any_kind(
    data: st.DataObject, dtype: torch.dtype, kinds: Sequence[str], *, plain: bool = False
) -> tuple[list[Parameter], list[Tie]]:
    """Rows, columns, kernels, elements, joined, several of one parameter, of one kind or of different ones.

    Plain ones start at the beginning of their storage: torch adds sparse gradients to other ones at a wrong place.
    """
    parameters = _parameters(data, dtype)
    if plain:
        parameters = [Parameter(one.detach().clone(memory_format=torch.contiguous_format)) for one in parameters]
    return parameters, data.draw(ties(parameters, kinds))


def _of_matrices(data: st.DataObject, dtype: torch.dtype, kinds: Sequence[str]) -> tuple[list[Parameter], list[Tie]]:
    """Rows or columns of matrices, which may be joined, and may have two ties each."""
    width = data.draw(st.integers(1, 4))
    parameters, parts, more = [], [], []
    for _ in range(data.draw(st.integers(1, 2))):
        count, dim = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 1))
        parameters.append(Parameter(normal((count, width) if dim == 0 else (width, count), dtype, data.draw(seeds))))
        names = data.draw(labels(count))
        parts.append(Tie(parameters[-1], names, dim=dim, scale=data.draw(scales((count,), kinds))))
        rest = torch.where(names == -1, data.draw(labels(count)), -1)
        more.append(Tie(parameters[-1], rest, dim=dim, scale=data.draw(scales((count,), kinds))))
    return parameters, ([Tie.join(*parts)] if data.draw(st.booleans()) else parts) + more * data.draw(st.booleans())


def _drawn(
    data: st.DataObject, recipe: Recipe, dtype: torch.dtype, kinds: Sequence[str] = (*EXACT, "any")
) -> tuple[list[Parameter], list[Tie]]:
    """What an optimizer can train. Fused kernels walk the memory of a parameter with gaps, or of another order."""
    if recipe.matrices:
        return _of_matrices(data, dtype, kinds)
    return _of_any_kind(data, dtype, kinds, plain=recipe.contiguous or bool(recipe.settings.get("fused")))


def _tie_alike(parameters: Sequence[Parameter], drawn: Sequence[Tie], others: Sequence[Parameter]) -> list[Tie]:
    """The same ties of other parameters."""
    twin = {id(one): other for one, other in zip(parameters, others, strict=True)}
    return [
        Tie.join(*(Tie(twin[id(part.param)], part.groups, dim=part.dim, scale=part.scale) for part in tie.parts))
        for tie in drawn
    ]


def _tied_start(parameters: Sequence[Parameter], drawn: Sequence[Tie]) -> None:
    """Ties the weights without the library."""
    groups = [group for tie in drawn for group in groups_of_entries(tie, parameters)]
    with torch.no_grad():
        for parameter_, start in zip(parameters, slowly_tied_entries(parameters, groups), strict=True):
            parameter_.copy_(start)


def _assert_close(weights: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """Relative to the size of the weights: entries that cross zero have no relative precision."""
    for weight, one in zip(weights, expected, strict=True):
        size = max(1.0, float(one.detach().abs().max()))
        assert_close(weight.detach(), one.detach(), rtol=tolerance, atol=tolerance * size)


def _train(optimizer: Optimizer, parameters: Sequence[Parameter], steps: Sequence[int]) -> None:
    for seed in steps:
        optimizer.step(closure_of(optimizer, parameters, seed))


def _shared_closure(shared: CompactTraining, seed: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        shared.optimizer.zero_grad()
        loss = loss_of(shared.weights(), seed)
        loss.backward()
        return loss

    return closure


# --- promise 5, for every optimizer ---


@pytest.mark.parametrize("recipe", ENTRYWISE + COUPLING, ids=repr)
@few_examples
@given(st.data())
def test_the_trajectory_is_that_of_the_compact_parameter(recipe: Recipe, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([dtype for dtype in (torch.float64, torch.complex128) if dtype in recipe.dtypes]))
    of_any_kind = not recipe.matrices and data.draw(st.booleans())
    parameters, drawn = _drawn(data, recipe, dtype) if of_any_kind else _of_matrices(data, dtype, (*EXACT, "any"))
    reduction = data.draw(reductions_for(recipe, compact=True))
    _tied_start(parameters, drawn)
    shared = CompactTraining(parameters, drawn, recipe, reduction)
    assume(not recipe.filled or any(one.numel() for one in shared.compact))
    optimizer = tied_of(recipe(parameters), drawn, reduction=reduction)

    seed = data.draw(st.integers(0, 2**31))
    # LBFGS takes four steps in one, and is made for one loss; in the end it magnifies what is rounded.
    steps, every, tolerance = (STEPS // 4, 0, 1e-9) if recipe.closure else (STEPS, 1, 1e-12)
    for step in range(steps):
        loss = optimizer.step(closure_of(optimizer, parameters, seed + every * step))
        expected = shared.optimizer.step(_shared_closure(shared, seed + every * step))
        assert_close(loss, expected, rtol=10 * tolerance, atol=10 * tolerance)
        _assert_close(parameters, shared.weights(), tolerance)


@given(st.data())
def test_an_optimizer_that_works_entry_by_entry_does_the_same_in_both_modes(data: st.DataObject) -> None:
    recipe, reduction = data.draw(st.sampled_from(ENTRYWISE)), data.draw(reductions)
    parameters, drawn = _drawn(data, recipe, torch.float64, EXACT)
    twins = copy.deepcopy(parameters)
    compact = tied_of(recipe(parameters), drawn, reduction=reduction)
    full = TiedOptimizer(recipe(twins), _tie_alike(parameters, drawn, twins), reduction=reduction)
    assert all(map(same_bits, parameters, twins))
    for seed in data.draw(st.lists(seeds, min_size=5, max_size=10)):
        _train(compact, parameters, [seed])
        _train(full, twins, [seed])
        _assert_close(parameters, twins)


@given(data=st.data(), dim=st.integers(0, 2))
def test_the_compact_parameter_of_a_contiguous_one_is_contiguous(data: st.DataObject, dim: int) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    weight = Parameter(normal(shape, torch.float64, 0))
    front = weight.movedim(dim, 0).shape
    names = data.draw(labels(front[: data.draw(st.integers(1, 3))]))
    seen = []

    class Looks(SGD):
        def step(self, closure: Any = None) -> None:
            seen.extend(one for group in self.param_groups for one in group["params"])
            seen.extend([one.grad for one in seen if one.grad is not None])

    optimizer = tied_of(Looks([weight], lr=0.1), Tie(weight, names, dim=dim))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert len(seen) == 2
    assert all(one.is_contiguous() for one in seen)


# --- the state is as small as what is distinct ---


@pytest.mark.parametrize("recipe", ENTRYWISE, ids=repr)
@few_examples
@given(st.data())
def test_the_state_has_an_entry_for_each_distinct_one_and_no_more(recipe: Recipe, data: st.DataObject) -> None:
    parameters, drawn = _drawn(data, recipe, torch.float64)
    _tied_start(parameters, drawn)
    shapes = [one.shape for one in CompactTraining(parameters, drawn, recipe, "mean").compact]
    optimizer = tied_of(recipe(parameters), drawn)
    _train(optimizer, parameters, data.draw(some_seeds))

    bare = recipe(twins := copy.deepcopy(parameters))
    _train(bare, twins, [0])
    for number, (one, twin, shape) in enumerate(zip(parameters, twins, shapes, strict=True)):
        expected = {
            key: shape if isinstance(value, Tensor) and value.shape == twin.shape else getattr(value, "shape", None)
            for key, value in bare.state.get(twin, {}).items()
        }
        state = optimizer.state_dict()["state"].get(number, {})
        if shape.numel():
            # A parameter of one entry has the shape of a step count for some optimizers, which is as well.
            assert {key: getattr(value, "shape", None) for key, value in state.items()} == expected
            assert same_tree(optimizer.state.get(one, {}), state)
        else:
            # What is saved has a state for each parameter, as torch.distributed.checkpoint asks for.
            assert not optimizer.state.get(one)
            assert not any(isinstance(value, Tensor) and value.numel() > 1 for value in state.values())


@pytest.mark.parametrize("members", [2, 8])
def test_the_state_is_smaller_by_the_size_of_the_groups(members):
    weight = parameter(16, 5)
    optimizer = tied_of(AdamW([weight]), {weight: torch.arange(16) // members})
    weight.grad = randn(16, 5, seed=1)
    optimizer.step()

    assert optimizer.state[weight]["exp_avg"].numel() * members == weight.numel()
    assert optimizer.state[weight]["exp_avg_sq"].shape == (16 // members, 5)


# --- what everybody sees: the model's parameters, and settings that reach the inner optimizer and come back ---


class Witness(SGD):
    """Notes what it sees of its groups, and writes to their settings."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.seen = [
            {**group, "params": [(one.shape, getattr(one.grad, "shape", None)) for one in group["params"]]}
            for group in self.param_groups
        ]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = group["lr"] / 2
        super().step(closure)


def test_the_groups_have_the_models_parameters_and_the_inner_optimizer_sees_compact_ones():
    weight, other = parameter(*SHAPE), parameter(3, 2, seed=1)
    inner = Witness([{"params": [weight, other], "lr": 0.5}, {"params": [untouched := parameter(2)]}], lr=0.1)
    groups, params = inner.param_groups, inner.param_groups[0]["params"]
    optimizer = tied_of(inner, {weight: GROUPS})
    weight.grad, other.grad = randn(*SHAPE, seed=1), randn(3, 2, seed=2)
    optimizer.step()

    assert optimizer is inner
    assert optimizer.param_groups is groups
    assert optimizer.param_groups[0]["params"] is params
    held = [one for group in optimizer.param_groups for one in group["params"]]
    assert all(one is other_ for one, other_ in zip(held, [weight, other, untouched], strict=True))
    assert [group["params"] for group in optimizer.seen] == [[((4, 5), (4, 5)), ((3, 2), (3, 2))], [((2,), None)]]
    assert type(optimizer).__name__ == "TiedWitness"


def test_settings_reach_the_inner_optimizer_and_what_it_writes_to_them_comes_back():
    weight, optimizer = one_tied(Witness, compact=True, lr=1.0)
    for step in range(3):
        weight.grad = torch.ones(SHAPE)
        before = weight.detach().clone()
        optimizer.param_groups[0]["lr"] = rate = 10.0**-step
        optimizer.param_groups[0]["own"] = step
        optimizer.step()

        assert (optimizer.seen[0]["lr"], optimizer.seen[0]["own"]) == (rate, step)
        assert optimizer.param_groups[0]["count"] == step + 1
        assert optimizer.param_groups[0]["lr"] == rate / 2
        assert_close(weight.detach(), before - rate / 2)
        del optimizer.param_groups[0]["own"]
    optimizer.step()
    assert "own" not in optimizer.seen[0]


def test_a_group_that_is_added_and_a_list_that_is_replaced_are_what_is_trained():
    weight, optimizer = one_tied(Witness, compact=True)
    added, replacement = parameter(3, 2, seed=1), Parameter(tie_(randn(*SHAPE, seed=2), GROUPS))
    optimizer.add_param_group({"params": [added], "lr": 0.25})
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "params": [replacement]}
    replacement.grad, added.grad = randn(*SHAPE, seed=3), randn(3, 2, seed=4)
    before = bits(weight)
    optimizer.step()

    assert [group["params"] for group in optimizer.seen] == [[((4, 5), (4, 5))], [((3, 2), (3, 2))]]
    assert optimizer.seen[1]["lr"] == 0.25
    assert is_tied(replacement, GROUPS)
    assert torch.equal(bits(weight), before)


# --- gradients are read and not written ---


@given(st.data())
def test_a_step_leaves_every_gradient_as_it_was(data: st.DataObject) -> None:
    parameters, drawn = _of_any_kind(data, torch.float64, EXACT, plain=True)
    optimizer = tied_of(SGD(parameters, lr=0.1), drawn, reduction=data.draw(reductions))
    for seed in data.draw(some_seeds):
        for number, one in enumerate(parameters):
            grad = normal(one.shape, torch.float64, seed + number)
            kinds = {
                "none": lambda: None,
                "dense": lambda grad=grad: laid_out(grad, data.draw(layouts(grad, lazy=True))),
                "sparse": lambda grad=grad: grad.to_sparse(1),
                "expanded": lambda grad=grad: grad.flatten()[0].expand(grad.shape),
                "recorded": lambda grad=grad: grad.requires_grad_() * 1,
            }
            one.grad = kinds[data.draw(st.sampled_from(list(kinds)))]()
        kept = [one.grad for one in parameters]
        words = [None if grad is None else grad.detach().clone() for grad in kept]
        optimizer.step()
        for one, grad, word in zip(parameters, kept, words, strict=True):
            assert one.grad is grad
            assert grad is None or same(grad.detach(), word)


@given(st.data())
def test_gradients_of_any_kind_step_as_in_the_full_mode(data: st.DataObject) -> None:
    parameters, drawn = _of_any_kind(data, torch.float64, EXACT, plain=True)
    twins, reduction = copy.deepcopy(parameters), data.draw(reductions)
    optimizer = tied_of(SGD(parameters, lr=0.1), drawn, reduction=reduction)
    full = TiedOptimizer(SGD(twins, lr=0.1), _tie_alike(parameters, drawn, twins), reduction=reduction)
    for seed in data.draw(some_seeds):
        for number, (one, twin) in enumerate(zip(parameters, twins, strict=True)):
            grad = normal(one.shape, torch.float64, seed + number)
            # A joined parameter without one counts as zero.
            kind = data.draw(st.sampled_from(["none", "dense", "sparse", "lazy"]))
            if kind == "none":
                one.grad = twin.grad = None
            elif kind == "sparse":
                one.grad, twin.grad = grad.to_sparse(1), grad.to_sparse(1)
            else:
                layout = data.draw(layouts(grad, lazy=kind == "lazy"))
                one.grad, twin.grad = laid_out(grad, layout), laid_out(grad, layout)
        optimizer.step()
        full.step()
        _assert_close(parameters, twins)


@given(st.data())
def test_sparse_gradients_of_scaled_rows_are_those_of_the_compact_parameter(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 10))
    weight = Parameter(normal((rows, 3), torch.float64, data.draw(seeds)))
    drawn = [Tie(weight, data.draw(labels(rows)), scale=data.draw(scales((rows,))))]
    _tied_start([weight], drawn)
    reduction = data.draw(reductions)
    recipe = data.draw(st.sampled_from([torch.optim.SparseAdam, torch.optim.Adagrad, SGD]))
    shared = CompactTraining([weight], drawn, lambda params: recipe(params, lr=0.1), reduction)
    optimizer = tied_of(recipe([weight], lr=0.1), drawn, reduction=reduction)
    (compact,) = shared.compact
    for seed in data.draw(st.lists(seeds, min_size=1, max_size=6)):
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
        values = normal((len(chosen), 3), torch.float64, seed)
        weight.grad = torch.sparse_coo_tensor(chosen[None], values, weight.shape)
        before = weight.grad.clone()
        optimizer.step()
        assert same(weight.grad, before)

        compact.grad = None
        (shared.weights()[0] * before.to_dense()).sum().backward()
        # What is stored counts as touched, also where it is zero.
        touched = torch.zeros_like(compact)
        (stored,) = torch.autograd.grad((shared.weights()[0][chosen] ** 2 + shared.weights()[0][chosen]).sum(), compact)
        touched[stored.abs().sum(1) > 0] = 1
        mask = touched.bool().any(1).nonzero().squeeze(1)
        compact.grad = torch.sparse_coo_tensor(mask[None], compact.grad[mask], compact.shape)
        if compact.numel():
            shared.optimizer.step()
        _assert_close([weight], shared.weights())


# --- what is written from outside ---


@pytest.mark.filterwarnings("ignore:Tied weights were replaced or written to")
@given(st.data())
def test_what_is_written_between_steps_is_averaged_before_the_next_one(data: st.DataObject) -> None:
    recipe = data.draw(st.sampled_from(ENTRYWISE))
    parameters, drawn = _drawn(data, recipe, torch.float64, EXACT)
    twins = copy.deepcopy(parameters)
    optimizer = tied_of(recipe(parameters), drawn)
    full = TiedOptimizer(recipe(twins), _tie_alike(parameters, drawn, twins))
    for seed in data.draw(some_seeds):
        for each, params in ((optimizer, parameters), (full, twins)):
            with torch.no_grad():
                for number, one in enumerate(params):
                    one.add_(normal(one.shape, torch.float64, seed + number))
            each.zero_grad()
            loss_of(params, seed).backward()
            each.step()
        _assert_close(parameters, twins)
        assert optimizer.tie_drift() == 0


@given(data=st.data(), told=st.booleans())
def test_what_is_written_through_data_counts_where_it_is_tied_or_told(data: st.DataObject, told: bool) -> None:
    recipe = data.draw(st.sampled_from(ENTRYWISE))
    parameters, drawn = _drawn(data, recipe, torch.float64, EXACT)
    twins = copy.deepcopy(parameters)
    optimizer = tied_of(recipe(parameters), drawn)
    full = TiedOptimizer(recipe(twins), _tie_alike(parameters, drawn, twins))
    for seed in data.draw(some_seeds):
        written = [normal(one.shape, torch.float64, seed + number) for number, one in enumerate(parameters)]
        if not told:
            groups = [group for tie in drawn for group in groups_of_entries(tie, parameters)]
            written = slowly_tied_entries(written, groups)
        for each, params in ((optimizer, parameters), (full, twins)):
            for one, value in zip(params, written, strict=True):
                one.data.copy_(value)
            if told:
                each.tie_weights()
            _train(each, params, [seed])
        _assert_close(parameters, twins)


def test_a_weight_whose_dtype_changes_takes_its_compact_parameter_along():
    weight, optimizer = one_tied(SGD, compact=True)
    weight.grad = randn(*SHAPE, seed=1)
    optimizer.step()
    weight.data = weight.data.double()
    before = weight.detach().clone()
    weight.grad = torch.ones(SHAPE, dtype=torch.float64)
    optimizer.step()
    assert_close(weight.detach(), before - 0.1, rtol=1e-15, atol=1e-15)
    assert is_tied(weight, GROUPS)


# --- the state as it is shown ---

LOOKS = ("get", "getitem", "contains", "len", "items")
WRITES = ("setitem", "delitem", "pop", "setdefault", "update", "nested", "clear")


def _look_or_write(state: Any, kind: str, key: Any, value: int) -> Any:
    """One of the things that are done to a mapping, and its answer or error."""
    actions = {
        "get": lambda: state.get(key, value),
        "getitem": lambda: state[key],
        "contains": lambda: key in state,
        "len": lambda: len(state),
        "items": lambda: [(id(one), held) for one, held in state.items()],
        "setitem": lambda: state.__setitem__(key, {"value": value}),
        "delitem": lambda: state.__delitem__(key),
        "pop": lambda: state.pop(key, value) if value % 2 else state.pop(key),
        "setdefault": lambda: state.setdefault(key, {"value": value}),
        "update": lambda: state.update({key: {"value": value}}),
        "nested": lambda: state[key].setdefault("momentum_buffer", value),
        "clear": lambda: state.clear(),
    }
    try:
        return actions[kind]()
    except KeyError:
        return "KeyError"


@given(st.lists(st.tuples(st.sampled_from(LOOKS + WRITES), st.integers(0, 3), st.integers(0, 9)), max_size=12))
def test_the_state_is_a_dictionary_by_the_models_parameters(steps: list[tuple[str, int, int]]) -> None:
    keys = [parameter(*SHAPE), parameter(2, 2, seed=1), parameter(3, seed=2), "a key that is no parameter"]
    optimizer = tied_of(SGD(keys[:2], lr=0.1), {keys[0]: GROUPS})
    expected: dict[Any, Any] = defaultdict(dict)
    for kind, key, value in steps:
        assert _look_or_write(optimizer.state, kind, keys[key], value) == _look_or_write(
            expected, kind, keys[key], value
        )
        assert [id(one) for one in optimizer.state] == [id(one) for one in expected]
        assert repr(optimizer.state) == repr(expected)
        assert bool(optimizer.state) == bool(expected)


def test_what_is_put_into_the_state_is_what_the_inner_optimizer_finds():
    weight, optimizer = one_tied(SGD, compact=True, momentum=0.5, lr=1.0)
    before = weight.detach().clone()
    optimizer.state[weight]["momentum_buffer"] = torch.full((4, 5), 2.0)
    weight.grad = torch.zeros(SHAPE)
    optimizer.step()
    assert_close(weight.detach(), before - 1)

    optimizer.state = defaultdict(dict, {weight: {"momentum_buffer": torch.full((4, 5), 4.0)}})
    optimizer.step()
    assert_close(weight.detach(), before - 3)

    del optimizer.state[weight]
    weight.grad = torch.ones(SHAPE)
    optimizer.step()
    assert_close(weight.detach(), before - 4)


def test_a_copy_of_the_state_is_a_dictionary():
    weight, optimizer = one_tied(Adam, compact=True)
    weight.grad = randn(*SHAPE, seed=1)
    optimizer.step()
    for copied in (copy.deepcopy(optimizer.state), pickled(optimizer.state)):
        assert type(copied) is defaultdict
        ((key, value),) = copied.items()
        assert same(key, weight)
        assert same_tree(value, dict(optimizer.state[weight]))
        assert copied["another"] == {}


# --- converted between the modes ---


def _pair(
    data: st.DataObject, recipe: Recipe, kinds: Sequence[str]
) -> tuple[list[Parameter], TiedOptimizer, list[Parameter], TiedOptimizer]:
    """The same training in both modes: the compact one, and the full one."""
    parameters, drawn = _drawn(data, recipe, torch.float64, kinds)
    twins, reduction = copy.deepcopy(parameters), data.draw(reductions)
    compact = tied_of(recipe(parameters), drawn, reduction=reduction)
    full = TiedOptimizer(recipe(twins), _tie_alike(parameters, drawn, twins), reduction=reduction)
    return parameters, compact, twins, full


# What these keep beside the entries is cast on loading by torch itself.
_CASTING = (torch.optim.NAdam, torch.optim.ASGD)
CONVERTIBLE = [recipe for recipe in ENTRYWISE if recipe.optimizer not in _CASTING]


@pytest.mark.parametrize("recipe", CONVERTIBLE, ids=repr)
@pytest.mark.parametrize("to", ["compact", "full"])
@few_examples
@given(st.data())
def test_a_state_that_is_loaded_in_the_other_mode_goes_on(recipe: Recipe, to: str, data: st.DataObject) -> None:
    parameters, compact, twins, full = _pair(data, recipe, EXACT)
    (source, ours), (target, theirs) = ((compact, parameters), (full, twins))[:: 1 if to == "full" else -1]
    _train(source, ours, data.draw(some_seeds))
    saved = pickled(source.state_dict())
    with torch.no_grad():
        for one, other in zip(theirs, ours, strict=True):
            one.copy_(other)
    before = copy.deepcopy(saved)
    target.load_state_dict(saved)
    assert same_tree(saved, before)
    assert target.state_dict()["tieopt"].get("compact", False) == (to == "compact")
    for seed in data.draw(some_seeds):
        _train(source, ours, [seed])
        _train(target, theirs, [seed])
        _assert_close(theirs, ours)


@pytest.mark.parametrize("recipe", CONVERTIBLE, ids=repr)
@few_examples
@given(st.data())
def test_a_compact_state_that_went_through_the_full_mode_is_itself(recipe: Recipe, data: st.DataObject) -> None:
    parameters, compact, _, full = _pair(data, recipe, (*EXACT, "any"))
    _train(compact, parameters, data.draw(some_seeds))
    saved = copy.deepcopy(compact.state_dict())
    full.load_state_dict(copy.deepcopy(saved))
    for one in parameters:
        held = full.state.get(twin := full.param_groups[0]["params"][_place(parameters, one)], {})
        entries = [key for key, value in held.items() if isinstance(value, Tensor) and value.numel() > 1]
        assert all(held[key].shape == twin.shape for key in entries)
    compact.load_state_dict(full.state_dict())
    now = compact.state_dict()
    assert now["param_groups"] == saved["param_groups"]
    for number, entries in saved["state"].items():
        assert list(now["state"].get(number, {})) == list(entries)
        for key, value in entries.items():
            assert_close(now["state"][number][key], value, rtol=1e-12, atol=1e-14, msg=lambda text, key=key: key + text)


def _place(parameters: Sequence[Parameter], one: Parameter) -> int:
    return next(number for number, other in enumerate(parameters) if other is one)


@given(st.data())
def test_a_bare_state_is_averaged_and_made_compact(data: st.DataObject) -> None:
    recipe = data.draw(st.sampled_from(CONVERTIBLE))
    parameters, compact, twins, full = _pair(data, recipe, EXACT)
    bare = recipe(strangers := copy.deepcopy(parameters))
    _train(bare, strangers, data.draw(some_seeds))
    for optimizer in (compact, full):
        optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    for seed in data.draw(some_seeds):
        _train(compact, parameters, [seed])
        _train(full, twins, [seed])
        _assert_close(parameters, twins)


@pytest.mark.parametrize("recipe", CONVERTIBLE, ids=repr)
@few_examples
@given(st.data())
def test_an_optimizer_that_has_state_when_it_is_tied_goes_on_as_in_the_full_mode(
    recipe: Recipe, data: st.DataObject
) -> None:
    parameters, drawn = _drawn(data, recipe, torch.float64, EXACT)
    bare = recipe(parameters)
    _train(bare, parameters, data.draw(some_seeds))
    (twins, other) = copy.deepcopy((parameters, bare))
    other.__dict__.update(
        vars(copy.deepcopy(recipe(twins))) | {"state": other.state, "param_groups": other.param_groups}
    )
    compact = tied_of(bare, drawn)
    full = TiedOptimizer(other, _tie_alike(parameters, drawn, twins))
    for seed in data.draw(some_seeds):
        _train(compact, parameters, [seed])
        _train(full, twins, [seed])
        _assert_close(parameters, twins)


def test_what_has_no_entries_stays_as_it_is_in_the_state_of_either_mode():
    weight, bare = one_bare(momentum=0.9)
    _train(bare, [weight], [1])
    kept = {"count": 3, "text": "text", "none": None, "numbers": (1, torch.tensor(2.0))}
    bare.state[weight] |= kept
    optimizer = tied_of(bare, {weight: GROUPS})
    assert same_tree({key: optimizer.state[weight][key] for key in kept}, kept)
    optimizer.untie()
    assert same_tree({key: optimizer.state[weight][key] for key in kept}, kept)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_parameter_without_state_begins_as_with_a_new_optimizer(fused, default):
    with default_dtype(default):
        weight = Parameter(randn(*SHAPE, dtype=torch.float32))
        new = Adagrad([weight], initial_accumulator_value=0.5, fused=fused).state[weight]
        optimizer = tied_of(Adagrad([weight], initial_accumulator_value=0.5, fused=fused), {weight: GROUPS})
        optimizer.state.clear()
        optimizer.untie()
        assert same_tree(optimizer.state[weight], new)


# --- refused with a reason, and nothing is written ---


def _everything(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Any:
    return [
        type(optimizer),
        [[bits(one), one._version, one.data_ptr()] for one in parameters],
        copy.deepcopy(optimizer.state_dict()),
    ]


def _refused(call: Callable[[], Any], error: type[Exception], *parts: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for part in (*parts, "Expected", "Got"):
        assert part in str(caught.value), f"{part!r} is not shown by: {caught.value}"


REFUSED = {
    "differentiable": (
        lambda: SGD([parameter(*SHAPE)], lr=0.1, differentiable=True),
        lambda weight: {weight: GROUPS},
        {},
        ("no graph through the step", "differentiable=False, or compact=False", "SGD with differentiable=True"),
    ),
    "strength": (
        lambda: SGD([parameter(*SHAPE)], lr=0.1),
        lambda weight: {weight: GROUPS},
        {"strength": 0.5},
        ("Relaxed ties train every member", "strength=0.5, every=1"),
    ),
    "every": (
        lambda: SGD([parameter(*SHAPE)], lr=0.1),
        lambda weight: {weight: GROUPS},
        {"every": 2},
        ("Relaxed ties train every member", "strength=1.0, every=2"),
    ),
    "negated": (
        lambda: SGD([laid_out(randn(*SHAPE, dtype=torch.float64), "negated").requires_grad_()], lr=0.1),
        lambda weight: {weight: GROUPS},
        {},
        ("not lazily negated or conjugated", "param_groups[0]['params'][0]"),
    ),
    "conjugated": (
        lambda: SGD([laid_out(randn(*SHAPE, dtype=torch.complex64), "conjugated").requires_grad_()], lr=0.1),
        lambda weight: {weight: GROUPS},
        {},
        ("not lazily negated or conjugated", "param_groups[0]['params'][0]"),
    ),
}
if hasattr(torch.optim, "Muon"):
    REFUSED["Muon"] = (
        lambda: torch.optim.Muon([("kernel", parameter(*SHAPE))], lr=0.1),
        lambda weight: {weight: torch.arange(35).view(SHAPE) // 2},
        {},
        ("Muon trains matrices", "kernel of shape (7, 5)", "rows or columns", "labels of shape (7, 5)"),
    )


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_mode_cannot_serve_is_refused_with_a_reason(reason):
    build, make_ties, options, parts = REFUSED[reason]
    optimizer = build()
    (weight,) = optimizer.param_groups[0]["params"]
    before = _everything(optimizer, [weight])
    _refused(lambda: tied_of(optimizer, make_ties(weight), **options), ValueError, *parts)
    assert same_tree(_everything(optimizer, [weight]), before)
    # It is the mode, and nothing else.
    assert isinstance(TiedOptimizer(optimizer, make_ties(weight), **options), TiedOptimizer)


@pytest.mark.parametrize("wrong", [1, 0, None, "compact", torch.tensor(True)], ids=repr)
def test_a_mode_that_is_none_is_refused(wrong):
    weight, optimizer = one_bare()
    before = _everything(optimizer, [weight])
    _refused(lambda: TiedOptimizer(optimizer, {weight: GROUPS}, compact=wrong), TypeError, "True or False")
    assert same_tree(_everything(optimizer, [weight]), before)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_ties_that_the_mode_cannot_serve_are_refused_by_retie_and_everything_stays():
    weight = parameter(*SHAPE)
    optimizer = tied_of(torch.optim.Muon([weight], lr=0.1), {weight: GROUPS})
    weight.grad = randn(*SHAPE, seed=1)
    optimizer.step()
    before, shown = _everything(optimizer, [weight]), optimizer.tie_summary()
    _refused(lambda: optimizer.retie({weight: torch.arange(35).view(SHAPE) // 2}), ValueError, "Muon trains matrices")
    assert same_tree(_everything(optimizer, [weight]), before)
    assert optimizer.tie_summary() == shown


COUPLED = {
    "LBFGS": lambda params: LBFGS(params, lr=0.1, max_iter=3),
    **({"Adafactor": torch.optim.Adafactor} if hasattr(torch.optim, "Adafactor") else {}),
}


def _coupled(inner: str, compact: bool | None) -> tuple[Parameter, Optimizer]:
    weight = parameter(*SHAPE)
    optimizer = COUPLED[inner]([weight])
    if compact is not None:
        reduction = "sum" if compact else "mean"
        optimizer = TiedOptimizer(optimizer, {weight: GROUPS}, reduction=reduction, compact=compact)
    _train(optimizer, [weight], [1, 2])
    return weight, optimizer


@pytest.mark.parametrize("inner", COUPLED)
@pytest.mark.parametrize("modes", [(True, False), (False, True), (None, True)], ids=str)
def test_a_state_that_only_its_mode_makes_sense_of_is_refused_and_nothing_is_loaded(inner, modes):
    (_, source), (weight, target) = (_coupled(inner, mode) for mode in modes)
    saved, before = source.state_dict(), _everything(target, [weight])
    _refused(lambda: target.load_state_dict(saved), ValueError, "cannot be converted", "or a single one")
    assert same_tree(_everything(target, [weight]), before)
    _train(target, [weight], [3])


@pytest.mark.parametrize("inner", COUPLED)
def test_a_history_that_cannot_be_converted_is_no_reason_to_lose_it_when_an_optimizer_is_tied(inner):
    weight, bare = _coupled(inner, None)
    before = _everything(bare, [weight])
    _refused(lambda: tied_of(bare, {weight: GROUPS}, reduction="sum"), ValueError, "cannot be converted")
    assert same_tree(_everything(bare, [weight]), before)


@pytest.mark.parametrize("inner", COUPLED)
@pytest.mark.parametrize("ties", [(), GROUPS, [[0, 1]]], ids=["untie", "the same ties", "other ties"])
def test_a_history_that_cannot_be_converted_is_dropped_with_a_warning_when_ties_change(inner, ties):
    weight, optimizer = _coupled(inner, True)
    before, keys = bits(weight), ", ".join(optimizer.state[weight])
    with pytest.warns(UserWarning, match=re.escape(f"params'][0] of shape (7, 5): {keys}")):
        optimizer.retie({weight: ties} if ties else ())
    assert not optimizer.state
    assert torch.equal(bits(weight), before) == (ties != [[0, 1]])

    fresh = Parameter(weight.detach().clone())
    reference = tied_of(COUPLED[inner]([fresh]), {fresh: ties} if ties else (), reduction="sum")
    for weights, one in (([weight], optimizer), ([fresh], reference)):
        _train(one, weights, [3, 4])
    assert same(weight.detach(), fresh.detach())


def test_a_history_of_all_parameters_counts_whichever_of_them_is_tied():
    free, weight = parameter(3), parameter(*SHAPE)
    optimizer = LBFGS([free, weight], lr=0.1, max_iter=3)
    _train(optimizer, [free, weight], [1, 2])
    before, saved = _everything(optimizer, [free, weight]), optimizer.state_dict()
    _refused(lambda: tied_of(optimizer, {weight: GROUPS}, reduction="sum"), ValueError, "cannot be converted")
    assert same_tree(_everything(optimizer, [free, weight]), before)

    optimizer = tied_of(LBFGS([free, weight], lr=0.1, max_iter=3), {weight: GROUPS}, reduction="sum")
    for state_dict in (saved, TiedOptimizer(LBFGS([free, weight]), {weight: GROUPS}).state_dict() | saved):
        _refused(lambda state_dict=state_dict: optimizer.load_state_dict(state_dict), ValueError, "cannot be converted")
    _train(optimizer, [free, weight], [1, 2])
    with pytest.warns(UserWarning, match=r"params'\]\[0\] of shape \(3,\): .*old_dirs"):
        optimizer.untie()
    _train(optimizer, [free, weight], [3, 4])
    assert not is_tied(weight, GROUPS)


@pytest.mark.parametrize("names", ["numbers", "names"])
@pytest.mark.parametrize("compact", [True, False], ids=["to compact", "to full"])
def test_what_cannot_be_converted_is_found_before_anything_is_loaded_whatever_numbers_parameters_have(names, compact):
    (other, target), (_, source) = ((one_tied(Adam, compact=mode)) for mode in (compact, not compact))
    saved = source.state_dict()
    number = "weight" if names == "names" else 7
    saved["param_groups"][0]["params"] = [number]
    saved["param_groups"][0]["lr"] = 123.0
    saved["state"] = {number: {"odd": torch.ones(3)}}
    before = _everything(target, [other])
    _refused(lambda: target.load_state_dict(saved), ValueError, "'odd' of shape (3,)", "cannot be converted")
    assert same_tree(_everything(target, [other]), before)


# --- steps with a closure ---


class CallsClosure(SGD):
    """Calls the closure a number of times, and takes a step on what it finds after each call."""

    def __init__(self, params: Any, lr: float, calls: int) -> None:
        super().__init__(params, lr)
        self.calls, self.seen = calls, []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        for _ in range(self.calls):
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for one in group["params"]:
                    self.seen.append(None if one.grad is None else one.grad.clone())
                    if one.grad is not None:
                        one.sub_(group["lr"] * one.grad)
        return loss


@pytest.mark.parametrize("by", ["position", "keyword"])
@given(data=st.data(), calls=st.integers(1, 4), reduction=reductions, accumulates=st.booleans())
def test_the_closure_sees_the_models_weights_and_the_optimizer_the_compact_gradients(
    by: str, data: st.DataObject, calls: int, reduction: str, accumulates: bool
) -> None:
    parameters, drawn = _of_any_kind(data, torch.float64, EXACT)
    _tied_start(parameters, drawn)
    shared = CompactTraining(parameters, drawn, lambda params: CallsClosure(params, 0.05, calls), reduction)
    optimizer = tied_of(CallsClosure(parameters, 0.05, calls), drawn, reduction=reduction)
    seed = data.draw(seeds)

    def closure() -> Tensor:
        held = [one for group in optimizer.param_groups for one in group["params"]]
        assert all(one is other for one, other in zip(held, parameters, strict=True))
        _assert_close(parameters, shared.weights())
        assert optimizer.tie_drift() == 0
        if not accumulates:
            optimizer.zero_grad()
            assert all(one.grad is None for one in parameters)
        loss = loss_of(parameters, seed)
        loss.backward()
        shared_closure()
        return loss

    def shared_closure() -> None:
        if not accumulates:
            shared.optimizer.zero_grad()
        loss_of(shared.weights(), seed).backward()
        # What the tied optimizer does with the gradient after this, its twin does at once.
        with torch.no_grad():
            for one in shared.compact:
                one.sub_(0.05 * (one.grad if one.grad is not None else 0))

    for _ in range(2):
        result = optimizer.step(closure) if by == "position" else optimizer.step(closure=closure)
        assert isinstance(result, Tensor)
        _assert_close(parameters, shared.weights())
    shapes = [one.shape for one in shared.compact] * 2 * calls
    assert all(
        grad is None if not shape.numel() else grad.shape == shape
        for grad, shape in zip(optimizer.seen, shapes, strict=True)
    )


class SharpnessAware(SGD):
    """Reads ``.grad`` first to climb, and calls the closure there, as SAM does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        (group,) = self.param_groups
        with torch.enable_grad():
            closure()
        held = [one for one in group["params"] if one.grad is not None]
        climb = [0.05 * one.grad / one.grad.norm() for one in held]
        for one, direction in zip(held, climb, strict=True):
            one.add_(direction)
        with torch.enable_grad():
            loss = closure()
        for one, direction in zip(held, climb, strict=True):
            one.sub_(direction)
            one.sub_(group["lr"] * one.grad)
        return loss


@given(st.data())
def test_a_closure_is_evaluated_where_the_optimizer_climbed_to(data: st.DataObject) -> None:
    recipe = Recipe(SharpnessAware, {"lr": 0.01}, entrywise=False)
    parameters, drawn = _of_any_kind(data, torch.float64, (*EXACT, "any"))
    _tied_start(parameters, drawn)
    shared = CompactTraining(parameters, drawn, recipe, "sum")
    optimizer = tied_of(recipe(parameters), drawn, reduction="sum")
    for seed in data.draw(some_seeds):
        loss = optimizer.step(closure_of(optimizer, parameters, seed))
        assert_close(loss, shared.optimizer.step(_shared_closure(shared, seed)), rtol=1e-11, atol=1e-11)
        _assert_close(parameters, shared.weights(), 1e-11)


# --- what optimizers do to gradients and weights within a step ---


class AssignsData(SGD):
    def step(self, closure: Any = None) -> None:
        for one in self.param_groups[0]["params"]:
            one.data = one.data - self.param_groups[0]["lr"] * one.grad


class DropsGradients(SGD):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for one in self.param_groups[0]["params"]:
            one.grad = None


class ReplacesGradients(SGD):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for one in self.param_groups[0]["params"]:
            one.grad = torch.zeros_like(one)


@pytest.mark.parametrize("inner", [AssignsData, DropsGradients, ReplacesGradients])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_optimizer_that_replaces_data_or_gradients_trains_as_others(inner, reduction):
    weight, optimizer = one_tied(inner, reduction, compact=True)
    other, reference = one_tied(SGD, reduction, compact=True)
    pointer = weight.data_ptr()
    for step in range(3):
        weight.grad = randn(*SHAPE, seed=step)
        other.grad = randn(*SHAPE, seed=step)
        kept = weight.grad
        optimizer.step()
        reference.step()

        assert weight.grad is kept
        assert is_tied(weight, GROUPS)
        assert_close(weight, other)
        assert weight.data_ptr() == pointer


# --- an exception within the step ---


class FailsHalfway(SGD):
    """Gradient descent that can fail when it has written half of what it writes."""

    fail = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for one in self.param_groups[0]["params"]:
            one.sub_(self.param_groups[0]["lr"] * one.grad)
            if self.fail:
                one[:1].add_(1)
                raise RuntimeError("halfway")


@given(data=st.data(), reduction=reductions)
def test_an_exception_in_the_inner_step_leaves_weights_and_gradients_as_they_were(
    data: st.DataObject, reduction: str
) -> None:
    parameters, drawn = _of_any_kind(data, torch.float64, (*EXACT, "any"))
    optimizer = tied_of(FailsHalfway(parameters, lr=0.1), drawn, reduction=reduction)
    twins = copy.deepcopy(parameters)
    reference = tied_of(SGD(twins, lr=0.1), _tie_alike(parameters, drawn, twins), reduction=reduction)
    assume(all(one.numel() for one in optimizer._tieopt.compacts.values()))
    grads = [normal(one.shape, torch.float64, number) for number, one in enumerate(parameters)]
    for one, twin, grad in zip(parameters, twins, grads, strict=True):
        one.grad, twin.grad = grad.clone(), grad.clone()
    before = [bits(one) for one in parameters]
    with pytest.raises(RuntimeError, match=r"^halfway$"):
        optimizer.step()
    assert all(torch.equal(bits(one), words) for one, words in zip(parameters, before, strict=True))
    assert all(same_bits(one.grad, grad) for one, grad in zip(parameters, grads, strict=True))

    optimizer.fail = False
    optimizer.step()
    reference.step()
    _assert_close(parameters, twins, 1e-15)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_exception_in_the_closure_leaves_the_weights_that_it_saw(calls):
    weight, optimizer = one_tied(CallsClosure, compact=True, calls=5)
    seen = []

    def closure():
        seen.append(bits(weight))
        if len(seen) == calls:
            raise KeyError("closure")
        weight.grad = randn(*SHAPE, seed=len(seen))

    start = bits(weight)
    with pytest.raises(KeyError, match="closure"):
        optimizer.step(closure)
    assert torch.equal(bits(weight), seen[-1])
    assert torch.equal(seen[0], start)
    assert is_tied(weight, GROUPS)


# --- copies ---


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@given(st.data())
def test_a_copy_of_any_optimizer_goes_on_bit_for_bit(copied: Callable[[Any], Any], data: st.DataObject) -> None:
    # Copies of a bare LBFGS cannot step; here its parameters are found.
    recipe = data.draw(st.sampled_from(ENTRYWISE + COUPLING))
    parameters, drawn = _drawn(data, recipe, torch.float64)
    optimizer = tied_of(recipe(parameters), drawn, reduction=data.draw(reductions_for(recipe, compact=True)))
    # Where all is pinned, there is nothing to train.
    assume(not recipe.filled or optimizer.tie_summary().distinct)
    _train(optimizer, parameters, data.draw(some_seeds))
    twins, twin = copied((parameters, optimizer))
    assert all(map(same_bits, parameters, twins))
    before = _everything(optimizer, parameters)
    after = data.draw(some_seeds)
    _train(twin, twins, after)
    assert same_tree(_everything(optimizer, parameters), before)
    _train(optimizer, parameters, after)
    assert all(map(same_bits, parameters, twins))
    assert same_tree(optimizer.state_dict(), twin.state_dict())


# --- a step that does nothing changes no bit ---


@given(st.data())
def test_a_step_of_nothing_changes_no_bit(data: st.DataObject) -> None:
    parameters, drawn = _of_any_kind(
        data, data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])), (*EXACT, "any")
    )
    optimizer = tied_of(SGD(parameters, lr=0.0), drawn, reduction=data.draw(reductions))
    before = [bits(one) for one in parameters]
    for seed in data.draw(some_seeds):
        for number, one in enumerate(parameters):
            one.grad = normal(one.shape, one.dtype, seed + number)
        optimizer.step()
        assert all(torch.equal(bits(one), words) for one, words in zip(parameters, before, strict=True))


@given(st.data())
def test_pinned_entries_stay_zero_and_free_ones_are_those_of_the_bare_optimizer(data: st.DataObject) -> None:
    parameters, drawn = _of_any_kind(data, torch.float64, ("zeros",))
    twins = copy.deepcopy(parameters)
    recipe = data.draw(recipes_for(*parameters, entrywise=True).filter(lambda one: not one.settings.get("fused")))
    optimizer, bare = tied_of(recipe(parameters), drawn), recipe(twins)
    groups = [group for tie in drawn for group in groups_of_entries(tie, parameters)]
    for seed in data.draw(some_seeds):
        for number, (one, twin) in enumerate(zip(parameters, twins, strict=True)):
            one.grad, twin.grad = (normal(one.shape, torch.float64, seed + number) for _ in range(2))
        optimizer.step()
        bare.step()
    entries = [flat(one) for one in parameters]
    assert all(entries[number][at] == 0 for group in groups for number, at, scale in group if scale == 0)
    tied = {member[:2] for group in groups for member in group}
    for number, (one, twin) in enumerate(zip(parameters, twins, strict=True)):
        free = [at for at in range(one.numel()) if (number, at) not in tied]
        assert same_bits(one.detach().flatten()[free], twin.detach().flatten()[free])


def test_free_rows_are_trained_and_the_members_are_not_apart():
    weight, optimizer = one_tied(Adam, compact=True)
    weight.grad = randn(*SHAPE, seed=1)
    before = weight.detach().clone()
    optimizer.step()
    assert is_tied(weight, GROUPS)
    assert not is_tied(weight, [FREE])
    assert bool((weight != before).all())


# --- what others do in a step ---


class HoldsAnother(SGD):
    def __init__(self, params: Any, several: bool, **options: Any) -> None:
        super().__init__(params, **options)
        inner = SGD(self.param_groups, **options)
        self.base = [inner] if several else inner


@pytest.mark.parametrize("several", [False, True])
def test_an_optimizer_that_has_another_one_step_and_runs_a_model_is_refused(several):
    weight = parameter(*SHAPE)
    before = bits(weight)
    optimizer = HoldsAnother([weight], several, lr=0.1)
    optimizer.model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"HoldsAnother with a model as model"):
        tied_of(optimizer, {weight: GROUPS})
    assert type(optimizer) is HoldsAnother
    assert torch.equal(bits(weight), before)


class ClearsInStep(SGD):
    """Steps on the gradients of the closure alone, as sharpness-aware ones do."""

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self.zero_grad(self.set_to_none)
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_the_inner_step_clears_are_cleared(set_to_none):
    ends = []
    for compact in (False, True):
        weight = parameter(*SHAPE)
        optimizer = ClearsInStep([weight], lr=0.1)
        optimizer.set_to_none = set_to_none
        optimizer = TiedOptimizer(optimizer, {weight: GROUPS}, compact=compact)

        def closure(weight: Parameter = weight) -> Tensor:
            loss = weight.square().sum()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        ends.append(weight)
    assert_close(*ends)


@pytest.mark.parametrize(("dtype", "scale", "weight"), [(torch.float16, 1e-5, 1.0), (torch.float32, 2.0**-100, 1e9)])
def test_shared_values_beyond_the_range_of_the_weights_are_refused(dtype, scale, weight):
    param = Parameter(torch.full((4,), weight, dtype=dtype))
    optimizer = SGD([param], lr=0.1)
    with pytest.raises(ValueError, match=rf"{dtype}, or compact=False\n  Got: +a scale of {scale:g}"):
        tied_of(optimizer, Tie(param, torch.tensor([0, 0, -1, -1]), scale=torch.full((4,), scale, dtype=torch.float64)))
    assert type(optimizer) is SGD
    assert torch.equal(param, torch.full((4,), weight, dtype=dtype))


@pytest.mark.parametrize("how", ["converted", "loaded"])
@pytest.mark.parametrize("free", [0.0, -torch.inf])
def test_a_weight_whose_shared_value_has_left_its_range_is_refused_by_the_next_step(how, free):
    """It would stay infinite, and with it the weight where it is; a free row may be so."""
    layer = torch.nn.Linear(3, 3, bias=False, dtype=torch.float32 if how == "converted" else torch.float16)
    torch.nn.init.constant_(layer.weight, 100.0 if how == "converted" else 1.0)
    with torch.no_grad():
        layer.weight[2] = free
    tie = Tie(layer.weight, torch.tensor([0, 0, -1]), scale=torch.full((3,), 1e-3))
    optimizer = tied_of(SGD(layer.parameters(), lr=1.0), tie)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    if how == "converted":
        layer.half()
    else:
        layer.load_state_dict({"weight": torch.tensor([100.0, 100.0, free]).half()[:, None].expand(3, 3)})
    before = layer.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match="beyond the range"):
            optimizer.step()
        assert torch.equal(layer.weight, before)
    layer.weight.data = torch.ones_like(layer.weight)
    optimizer.step()
    assert torch.equal(layer.weight, torch.ones_like(layer.weight))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of the parameter")
def test_a_gradient_of_another_dtype_is_folded():
    weight = parameter(*SHAPE, dtype=torch.bfloat16)
    weight.grad_dtype = None
    optimizer = tied_of(SGD([weight], lr=0.1), {weight: GROUPS})
    start = weight.detach().clone()
    weight.grad = torch.ones(SHAPE)
    optimizer.step()
    assert_close(weight, start - 0.1, rtol=0, atol=0.02)
    assert is_tied(weight, GROUPS)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of the parameter")
def test_a_joined_parameter_gets_zeros_of_the_dtype_of_its_gradients(compact):
    weights = [Parameter(torch.zeros(SHAPE, dtype=torch.float16)) for _ in range(2)]
    optimizer = TiedOptimizer(SGD(weights, lr=0.5), Tie.equal(*weights), compact=compact)
    for weight in weights:
        weight.grad_dtype = torch.float32
    weights[0].grad = torch.ones(SHAPE)
    optimizer.step()
    assert all(torch.equal(weight, torch.full(SHAPE, -0.25, dtype=torch.float16)) for weight in weights)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of the parameter")
@pytest.mark.parametrize("given", [(0, 1), (0,), (1,)])
def test_gradients_of_joined_parameters_of_two_dtypes_are_refused(compact, given):
    """The mean would be rounded to the dtype of whichever is first."""
    weights, other = [Parameter(torch.zeros(SHAPE)) for _ in range(2)], parameter(*SHAPE)
    ties = [Tie(other, GROUPS), Tie.equal(*weights)]
    optimizer = TiedOptimizer(SGD([other, *weights], lr=0.5), ties, compact=compact)
    weights[1].grad_dtype = torch.bfloat16
    for number in given:
        weights[number].grad = torch.ones(SHAPE, dtype=weights[number].grad_dtype)
    grads = [weight.grad for weight in weights]
    # Another one that the step would tie first.
    with torch.no_grad():
        other[0] = 1.0
    before, other.grad = other.detach().clone(), torch.zeros(SHAPE)
    with pytest.raises(RuntimeError, match=r"differ in dtype(.|\n)*torch.float32, torch.bfloat16"):
        optimizer.step()
    assert all(torch.equal(weight, torch.zeros(SHAPE)) for weight in weights)
    assert torch.equal(other, before)
    assert all(weight.grad is grad for weight, grad in zip(weights, grads, strict=True))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of the parameter")
def test_gradients_of_two_dtypes_are_refused_where_one_is_to_be_zeros_by_way_of_another_tie(compact):
    first, second, third, other = weights = [Parameter(torch.zeros(3, 2)) for _ in range(4)]
    labels = torch.tensor([0, -1, -1]), torch.tensor([-1, 0, -1])
    pairs = (first, second, labels[0]), (second, third, labels[1])
    chain = [Tie.join(Tie(one, part), Tie(next_one, part)) for one, next_one, part in pairs]
    optimizer = TiedOptimizer(SGD(weights, lr=0.5), [Tie(other, [[0, 1]]), *chain], compact=compact)
    third.grad_dtype = torch.bfloat16
    first.grad, other.grad = torch.ones(3, 2), torch.ones(3, 2)
    with torch.no_grad():
        other[0] = 1.0
    before = other.detach().clone()
    with pytest.raises(RuntimeError, match="differ in dtype"):
        optimizer.step()
    assert torch.equal(other, before)
    assert second.grad is third.grad is None


def test_weights_that_are_not_finite_themselves_are_no_reason_to_refuse_them(compact):
    weight = Parameter(torch.full((3, 2), 100.0, dtype=torch.float16))
    tie = Tie(weight, [[0, 1]], scale=torch.full((3,), 1e-3), offset=torch.full((3, 2), 100.0))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), tie, compact=compact)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight[:2] = torch.nan
    # NaN is no equal of itself.
    with pytest.warns(UserWarning, match="their members differ now"):
        optimizer.step()
    assert weight[:2].isnan().all()


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of the parameter")
@pytest.mark.parametrize("given", [0, 1])
def test_zeros_for_a_gradient_of_any_dtype_have_that_of_the_gradients_that_there_are(compact, given):
    weights = [Parameter(torch.zeros(SHAPE, dtype=torch.float16)) for _ in range(2)]
    optimizer = TiedOptimizer(SGD(weights, lr=0.5), Tie.equal(*weights), compact=compact)
    for weight in weights:
        weight.grad_dtype = None
    # Half of it is no number of float16.
    weights[given].grad = torch.full(SHAPE, 2.0**17)
    optimizer.param_groups[0]["lr"] = 2.0**-17
    optimizer.step()
    assert all(torch.equal(weight, torch.full(SHAPE, -0.5, dtype=torch.float16)) for weight in weights)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients have the dtype of the parameter")
def test_the_optimizer_sees_gradients_in_the_dtype_that_they_have():
    weight, seen = Parameter(torch.zeros(SHAPE, dtype=torch.float16)), []

    class Recording(SGD):
        def step(self) -> None:
            seen.append(self.param_groups[0]["params"][0].grad.dtype)
            super().step()

    optimizer = tied_of(Recording([weight], lr=2.0**-20), {weight: GROUPS})
    dtypes = [torch.float16, torch.float32, torch.float32, torch.float16]
    for step, dtype in enumerate(dtypes):
        weight.grad, weight.grad_dtype = None, dtype
        # One of float16 would be infinite.
        weight.grad = torch.full(SHAPE, 2.0**20 if dtype == torch.float32 else 0.0, dtype=dtype)
        optimizer.step()
        assert torch.equal(weight, torch.full(SHAPE, -float(min(step, 2)), dtype=torch.float16))
    assert seen == dtypes


def test_a_weight_that_a_closure_writes_to_and_does_not_train_stays_as_it_was_written():
    weight = parameter(*SHAPE)
    calls = []

    class CallsTwice(SGD):
        def step(self, closure: Callable[[], None]) -> None:
            closure()
            super().step()
            closure()

    def closure() -> None:
        calls.append(weight)
        weight.grad = torch.ones_like(weight) if len(calls) == 1 else None
        if len(calls) == 2:
            with torch.no_grad():
                weight.zero_()

    tied_of(CallsTwice([weight], lr=0.1), {weight: GROUPS}).step(closure)
    assert torch.equal(weight, torch.zeros(SHAPE))


def test_what_was_made_in_inference_mode_trains_outside_of_it():
    weight = parameter(*SHAPE)
    with torch.inference_mode():
        optimizer = tied_of(SGD([weight], lr=0.1), {weight: GROUPS})
    weight.square().sum().backward()
    optimizer.step()
    weight.data = weight.data.to(torch.float64)
    weight.grad = None
    with torch.inference_mode():
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    weight.grad = torch.ones(SHAPE, dtype=torch.float64)
    optimizer.step()
    assert is_tied(weight, GROUPS)


def test_a_write_to_an_inference_tensor_counts():
    with torch.inference_mode():
        weight = Parameter(torch.zeros(SHAPE), requires_grad=True)
        optimizer = tied_of(SGD([weight], lr=0.0), {weight: GROUPS})
        weight.grad = torch.zeros(SHAPE)
        optimizer.step()
        first, second = GROUPS[0][:2]
        weight[first], weight[second] = 0.0, float(len(GROUPS[0]))
        with pytest.warns(UserWarning, match="their members differ now"):
            optimizer.step()
        assert torch.equal(weight[first], torch.ones(SHAPE[1]))


def test_the_state_is_copied_as_a_dictionary():
    weight = parameter(*SHAPE)
    optimizer = tied_of(Adam([weight]), {weight: GROUPS})
    weight.square().sum().backward()
    optimizer.step()
    assert optimizer.state.copy().keys() == {weight}


# --- what others see while compact parameters stand in the places of the tied ones ---


class LooksAround(SGD):
    """Notes, in the middle of its step, whatever it is given to look with."""

    look: Callable[[Any], Any] = staticmethod(lambda optimizer: None)
    fail = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        # Without the hooks, which torch puts around the step of a class once there is an object of it.
        inspect.unwrap(SGD.step)(self)
        self.seen = self.look(self)
        if self.fail:
            raise RuntimeError("late")


def _looking(look: Callable[[Any], Any], **settings: Any) -> tuple[Parameter, Any]:
    weight, optimizer = one_tied(LooksAround, compact=True, momentum=0.9, **settings)
    optimizer.look = look
    weight.grad = randn(*SHAPE, seed=1)
    return weight, optimizer


def _is_at_rest(optimizer: Any, weight: Parameter) -> bool:
    return optimizer.param_groups[0]["params"][0] is weight and all(key is weight for key in optimizer.state)


@pytest.mark.parametrize("fail", [False, True])
def test_the_inner_step_sees_compact_parameters_and_everybody_else_those_of_the_model(fail: bool) -> None:
    weight, optimizer = _looking(lambda tied: [tied.param_groups[0]["params"][0], *tied.state])
    held, state, rests = optimizer.param_groups[0]["params"], optimizer.state, []
    optimizer.register_step_pre_hook(lambda *_: rests.append(_is_at_rest(optimizer, weight)))
    optimizer.register_step_post_hook(lambda *_: rests.append(_is_at_rest(optimizer, weight)))
    for optimizer.fail in (False, fail):
        try:
            optimizer.step()
        except RuntimeError as error:
            assert str(error) == "late"  # noqa: PT017
    first, key = optimizer.seen
    assert first is key
    assert first is not weight
    assert first.shape == (4, 5)
    assert rests == [True] * (3 if fail else 4)
    assert _is_at_rest(optimizer, weight)
    # The same objects: hosts hold them.
    assert optimizer.param_groups[0]["params"] is held
    assert optimizer.state is state
    assert isinstance(state, dict)
    assert is_tied(weight, GROUPS)


def test_ties_drift_and_summary_are_those_of_the_model_in_the_middle_of_a_step() -> None:
    weight, optimizer = _looking(lambda tied: (tied.ties, tied.tie_drift(), tied.tie_summary(), str(tied)))
    before = optimizer.tie_summary()
    optimizer.step()
    ties, drift, summary, _ = optimizer.seen
    assert ties[0].parts[0].param is weight
    assert drift == 0
    assert summary == before


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_that_is_made_in_the_middle_of_a_step_is_at_rest(copied: Callable[[Any], Any]) -> None:
    weight, optimizer = _looking(lambda tied: None)
    optimizer.step()
    # Neither knows how to copy a function of a test.
    del optimizer.look
    type(optimizer).look = staticmethod(lambda tied: copied(tied))
    try:
        optimizer.step()
    finally:
        del type(optimizer).look
    other = optimizer.seen
    (param,) = other.param_groups[0]["params"]
    assert param.shape == weight.shape
    assert _is_at_rest(other, param)
    param.grad = randn(*SHAPE, seed=2)
    other.step()
    assert is_tied(param, GROUPS)


def test_what_is_saved_in_the_middle_of_a_step_is_what_is_saved_after_it() -> None:
    _, optimizer = _looking(lambda tied: copy.deepcopy(tied.state_dict()))
    optimizer.step()
    assert same_tree(optimizer.seen, optimizer.state_dict())


def test_what_another_thread_saves_in_the_middle_of_a_step_is_the_state_of_the_models_parameters() -> None:
    weight, optimizer = _looking(lambda tied: None)
    optimizer.step()
    rests: list[bool] = []
    saved: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda tied: rests.append(_is_at_rest(tied, weight)))
    thread = threading.Thread(target=lambda: saved.append(copy.deepcopy(optimizer.state_dict())))

    def look(tied: Any) -> None:
        thread.start()
        # It waits for the step; one that did not would be done long before.
        thread.join(timeout=0.2)
        for held in tied.state.values():
            held["momentum_buffer"].mul_(2)

    optimizer.look = look
    optimizer.step()
    thread.join()
    assert rests == [True]
    assert same_tree(saved, [optimizer.state_dict()])


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_an_optimizer_that_is_dropped_in_a_step_or_after_it_leaves_nothing_alive(
    within: bool, fail: bool, compact: bool
) -> None:
    weight, optimizer = one_tied(LooksAround, compact=compact, momentum=0.9)
    weight.grad = randn(*SHAPE, seed=1)
    optimizer.step()
    owners = [optimizer]
    alive = [weakref.ref(kept) for kept in (weight, weight.grad, optimizer, optimizer._tieopt)]

    def look(tied: Any) -> None:
        (param,) = tied.param_groups[0]["params"]
        alive.extend(map(weakref.ref, (param, param.grad, *tied.state, tied.state[param]["momentum_buffer"])))
        if within:
            owners.clear()

    optimizer.look, optimizer.fail = look, fail
    del weight, optimizer
    with suppress(RuntimeError):
        owners[0].step()
    owners.clear()
    gc.collect()
    assert len(alive) == 8
    assert [ref() for ref in alive if ref() is not None] == []


def test_clearing_gradients_in_the_middle_of_a_step_clears_those_of_the_model() -> None:
    for to_none in (True, False):
        weight, optimizer = _looking(lambda tied, to_none=to_none: tied.zero_grad(to_none))
        optimizer.step()
        assert weight.grad is None if to_none else torch.equal(weight.grad, torch.zeros(SHAPE))


def test_looking_up_the_state_of_a_parameter_of_the_model_in_a_step_leaves_what_is_kept_of_it() -> None:
    weight, optimizer = _looking(lambda tied: None)
    type(optimizer).look = staticmethod(lambda tied: tied.state[weight])
    del optimizer.look
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        del type(optimizer).look
    other, plain = one_tied(SGD, compact=True, momentum=0.9)
    other.grad = weight.grad
    for _ in range(3):
        plain.step()
    assert same(weight, other)
    assert same(optimizer.state[weight]["momentum_buffer"], plain.state[other]["momentum_buffer"])


@pytest.mark.parametrize("before", [True, False], ids=["before the step", "in the step"])
def test_parameters_may_stand_in_a_tuple(before: bool) -> None:
    def freeze(tied: Any) -> None:
        tied.param_groups[0]["params"] = tuple(tied.param_groups[0]["params"])

    weight, optimizer = _looking(lambda tied: None if before else freeze(tied))
    other, plain = one_tied(SGD, compact=True, momentum=0.9)
    other.grad = weight.grad
    if before:
        freeze(optimizer)
    for _ in range(2):
        optimizer.step()
        plain.step()
    assert type(optimizer.param_groups[0]["params"]) is tuple
    assert _is_at_rest(optimizer, weight)
    assert same(weight, other)


@pytest.mark.parametrize("between", ["tie_weights", "state_dict", "deepcopy", "pickle"])
def test_the_state_of_a_parameter_follows_what_took_its_place(between: str) -> None:
    weight, optimizer = one_tied(SGD, compact=True, momentum=0.9, lr=0.1)
    weight.grad = torch.ones(SHAPE)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = Parameter(weight.detach().clone())
    if between in ("tie_weights", "state_dict"):
        getattr(optimizer, between)()
    else:
        optimizer = copy.deepcopy(optimizer) if between == "deepcopy" else pickled(optimizer)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(SHAPE)
    optimizer.step()
    assert_close(optimizer.state[param]["momentum_buffer"], torch.full((4, 5), 1.9))
    assert len(optimizer.state) == 1


def test_a_line_search_may_have_another_list_of_its_parameters() -> None:
    weight, optimizer = one_tied(LBFGS, compact=True, reduction="sum")
    optimizer.param_groups[0]["params"] = list(optimizer.param_groups[0]["params"])
    optimizer.retie({weight: [[0, 1]]})
    assert is_tied(weight, [[0, 1]])


def test_without_ties_the_state_is_not_touched() -> None:
    class Counted(defaultdict):
        cleared = 0

        def clear(self) -> None:
            type(self).cleared += 1
            super().clear()

    weight, optimizer = one_tied(SGD, compact=True, momentum=0.9)
    optimizer.untie()
    optimizer.state = Counted(dict)
    weight.grad = torch.ones(SHAPE)
    optimizer.step()
    assert Counted.cleared == 0


def test_a_joined_parameter_counts_the_steps_of_the_others_whatever_was_loaded_before() -> None:
    first, second = parameter(4, 3), parameter(4, 3)
    optimizer = tied_of(AdamW([first, second]), Tie.equal(first, second))
    for _ in range(3):
        first.grad = randn(4, 3)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    first.grad = randn(4, 3)
    optimizer.step()
    optimizer.untie()

    assert [float(optimizer.state[param]["step"]) for param in (first, second)] == [4.0, 4.0]
    assert same_tree(optimizer.state[first], optimizer.state[second])


@pytest.mark.parametrize("other", [torch.zeros(3, 0), torch.ones(2, 3)])
def test_a_joined_parameter_without_values_of_its_own_goes_on_in_the_full_mode(other: Tensor) -> None:
    """Such as one that is pinned as a whole: a checkpoint has a state without entries for it."""

    def made(*, compact: bool) -> tuple[Optimizer, list[Parameter]]:
        params = [Parameter(torch.ones(4, 3)), Parameter(other.clone())]
        dim = int(not other.numel())
        labels = torch.zeros(other.shape[dim], dtype=torch.int64)
        tie = Tie.join(Tie(params[0], [[0, 1]]), Tie(params[1], labels, dim=dim, scale=torch.zeros(len(labels))))
        return TiedOptimizer(Adam(params), tie, compact=compact), params

    def step(optimizer: Optimizer, params: list[Parameter]) -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()

    (saved, params), (loaded, others) = made(compact=True), made(compact=False)
    step(saved, params)
    loaded.load_state_dict(saved.state_dict())
    step(loaded, others)
    assert all(loaded.state[param] for param in others)
    assert all(value.numel() in (1, param.numel()) for param in others for value in loaded.state[param].values())
