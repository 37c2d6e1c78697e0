"""Promise 10: bad input is refused before anything is written, with an error that shows what was wrong."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import bits
from strategies import ALL, REAL, labels, loss_of, normal, recipes_for, seeds, shapes, spelled, tensors
from torch.nn import Parameter
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer, is_tied, tie_
from tieopt.ties.slices import Slices, numbered


class Bad(NamedTuple):
    """Bad groups for a tensor, the error that they deserve, and what its message has to show."""

    groups: Any
    error: type[Exception]
    shown: tuple[str, ...]


@st.composite
def bad_groups(draw: st.DrawFn, shape: tuple[int, ...]) -> Bad:
    """Groupings that do not fit a tensor, each for one reason; beside it stand good groups."""
    count = shape[0]
    names = draw(labels(count))
    before = [(names == name).nonzero().squeeze(1).tolist() for name in names.unique().tolist() if name >= 0]
    free = (names == -1).nonzero().squeeze(1).tolist()
    kind = draw(
        st.sampled_from(
            ["out of range", "not an integer", "no groups", "wrong shape", "wrong dtype", "below free"]
            + ["twice"] * bool(before)
        )
    )
    match kind:
        case "out of range":
            index = draw(st.one_of(st.integers(count, 10**6), st.integers(-(10**6), -1)))
            return Bad([*before, [*free, index]], IndexError, (str(index), str(shape), f"0 to {count - 1}"))
        case "twice":
            index = draw(st.sampled_from(draw(st.sampled_from(before))))
            return Bad([*before, [index]], ValueError, (str(index), "more than once"))
        case "not an integer":
            value = draw(st.sampled_from([1.5, 0.0, "0", None, True, 1j, [0]]))
            return Bad([*before, [value]], TypeError, (repr(value), type(value).__name__))
        case "no groups":
            value = draw(st.sampled_from([7, None, "0123", b"01", 1.5, [1, 2], object]))
            return Bad(value, TypeError, (repr(value),))
        case "wrong shape":
            wrong = draw(st.sampled_from([(count + 1,), (count, 1, 1, 1, 1, 1, 1), (), (1, count)]))
            return Bad(torch.zeros(wrong, dtype=torch.int64), ValueError, (str(wrong), str(shape)))
        case "wrong dtype":
            dtype = draw(st.sampled_from([torch.float32, torch.bool, torch.complex64]))
            return Bad(torch.zeros(count, dtype=dtype), TypeError, (str(dtype),))
        case _:
            at, value = draw(st.integers(0, count - 1)), draw(st.integers(-100, -2))
            wrong = names.clone()
            wrong[at] = value
            return Bad(wrong, ValueError, (str(value), f"position {at}"))


def _everything(optimizer: torch.optim.Optimizer, parameters: list[Parameter]) -> Any:
    """All that could have been written to, as it is now."""
    return (
        type(optimizer),
        {name: (id(value), repr(value)) for name, value in vars(optimizer).items()},
        [(id(p), p.data_ptr(), p._version, bits(p).tolist()) for p in parameters],
        [None if p.grad is None else (id(p.grad), p.grad._version, bits(p.grad).tolist()) for p in parameters],
    )


def _position(number: int) -> str:
    """How errors call a parameter without a name, for optimizers with one group."""
    return f"param_groups[0]['params'][{number}]"


def _refused(
    call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], shown: tuple[str, ...]
) -> None:
    errors = error if isinstance(error, tuple) else (error,)
    with pytest.raises(errors) as caught:
        call()
    assert type(caught.value) in errors
    for part in (*shown, "Expected", "Got"):
        assert part in str(caught.value), f"{part!r} is not shown by: {caught.value}"


@given(st.data())
def test_bad_groups_for_a_tensor_are_refused_and_nothing_is_written(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    tensor = data.draw(tensors(shape, ALL))
    bad = data.draw(bad_groups(shape))
    before = bits(tensor).clone()
    call = data.draw(st.sampled_from([tie_, is_tied, Tie]))
    _refused(lambda: call(tensor, bad.groups), bad.error, bad.shown)
    assert torch.equal(bits(tensor), before)


def _trained(data: st.DataObject, named: bool) -> tuple[torch.optim.Optimizer, list[Parameter], Any]:
    """A bare optimizer in the middle of its training, with hooks, a scheduler, state and gradients."""
    parameters = [Parameter(normal(data.draw(shapes(max_count=5)), torch.float32, data.draw(seeds))) for _ in range(2)]
    recipe = data.draw(recipes_for(*parameters, closure=False))
    optimizer = recipe([("first", parameters[0]), ("second", parameters[1])] if named else parameters)
    optimizer.register_step_pre_hook(lambda *_: None)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if data.draw(st.booleans()) else None
    loss_of(parameters, data.draw(seeds)).backward()
    if data.draw(st.booleans()):
        optimizer.step()
    return optimizer, parameters, scheduler


@given(st.data())
def test_bad_groups_for_one_parameter_leave_all_of_them_and_the_optimizer_untouched(
    compact: bool, data: st.DataObject
) -> None:
    named = data.draw(st.booleans())
    optimizer, parameters, _ = _trained(data, named)
    good = data.draw(spelled(data.draw(labels(len(parameters[0])))))
    bad = data.draw(bad_groups(tuple(parameters[1].shape)))
    by_name = named and data.draw(st.booleans())
    first, second = ("first", "second") if by_name else parameters
    ties = {first: good, second: bad.groups} if data.draw(st.booleans()) else {second: bad.groups, first: good}
    before = _everything(optimizer, parameters)
    _refused(
        lambda: TiedOptimizer(optimizer, ties, compact=compact),
        bad.error,
        (*bad.shown, "second" if named else _position(1)),
    )
    assert _everything(optimizer, parameters) == before


@st.composite
def bad_arguments(draw: st.DrawFn, optimizer: Any, parameters: list[Parameter]) -> tuple[Any, type, tuple[str, ...]]:
    """Calls that fail before the groups are looked at: the ties, the optimizer or the reduction are wrong."""
    good = {parameters[0]: [[0]]}
    stranger = Parameter(torch.zeros(3, 5))
    twice = [Tie(parameters[0], [[0]])] * 2
    value = draw(st.sampled_from([None, 3, "mean", [[0, 1]], 1.5]))
    unknown = draw(st.sampled_from(["Mean", "max", "", None, 1]))
    return draw(
        st.sampled_from(
            [
                (lambda: TiedOptimizer(optimizer, {stranger: [[0]]}), ValueError, ("(3, 5)", _position(0))),
                (lambda: TiedOptimizer(optimizer, {"no such": [[0]]}), ValueError, ("'no such'",)),
                (lambda: TiedOptimizer(optimizer, {**good, 4: [[0]]}), ValueError, ("4 (int)",)),
                (lambda: TiedOptimizer(optimizer, twice), ValueError, ("tied twice", _position(0))),
                (lambda: TiedOptimizer(optimizer, value), TypeError, (repr(value),)),
                (lambda: TiedOptimizer(optimizer, [*twice[:1], value]), TypeError, (repr(value),)),
                (lambda: TiedOptimizer(optimizer, good, reduction=unknown), ValueError, (repr(unknown), "'sum'")),
                (lambda: TiedOptimizer(value, good), TypeError, (repr(value),)),
            ]
        )
    )


@given(st.data())
def test_bad_arguments_leave_the_optimizer_untouched(data: st.DataObject) -> None:
    optimizer, parameters, _ = _trained(data, named=False)
    call, error, shown = data.draw(bad_arguments(optimizer, parameters))
    before = _everything(optimizer, parameters)
    _refused(call, error, shown)
    assert _everything(optimizer, parameters) == before


@given(st.data())
def test_a_tied_optimizer_refuses_to_be_tied_again_and_is_untouched(compact: bool, data: st.DataObject) -> None:
    optimizer, parameters, _ = _trained(data, named=False)
    # What Adafactor remembers of a whole matrix cannot be that of a compact one.
    assume(not (compact and isinstance(optimizer, torch.optim.Adafactor) and optimizer.state))
    TiedOptimizer(optimizer, {parameters[0]: [[0]]}, compact=compact)
    before = _everything(optimizer, parameters)
    _refused(
        lambda: TiedOptimizer(optimizer, {parameters[1]: [[0]]}, compact=compact),
        TypeError,
        (type(optimizer).__name__,),
    )
    assert _everything(optimizer, parameters) == before


@given(st.data())
def test_tensors_that_have_no_mean_are_refused(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.int64, torch.int8, torch.uint8, torch.bool]))
    call = data.draw(st.sampled_from([tie_, is_tied, Tie]))
    _refused(lambda: call(torch.zeros(3, dtype=dtype), [[0, 1]]), TypeError, (str(dtype),))


@given(st.data())
def test_a_tensor_that_cannot_be_written_is_refused_and_all_are_untouched(compact: bool, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(2, 5)), data.draw(st.integers(1, 5)))
    good = Parameter(normal(shape, torch.float32, data.draw(seeds)))
    dense = normal(shape, torch.float32, data.draw(seeds))
    bad = Parameter(data.draw(st.sampled_from([dense.to_sparse_coo(), dense[:1].expand(shape)])))
    groups = [list(range(shape[0]))]
    call = data.draw(st.sampled_from([tie_, is_tied])) if bad.is_sparse else tie_
    _refused(lambda: call(bad, groups), (TypeError, ValueError), (str(shape),))

    optimizer = torch.optim.SGD([good, bad], lr=0.1)
    before = (type(optimizer), bits(good).tolist())
    ties = dict.fromkeys(data.draw(st.permutations([good, bad])), groups)
    _refused(
        lambda: TiedOptimizer(optimizer, ties, compact=compact), (TypeError, ValueError), (str(shape), _position(1))
    )
    assert (type(optimizer), bits(good).tolist()) == before


@given(st.data())
def test_a_parameter_of_another_shape_stops_the_step_before_anything_is_written(
    compact: bool, data: st.DataObject
) -> None:
    first, second = (Parameter(normal((4, 3), torch.float32, data.draw(seeds))) for _ in range(2))
    recipe = data.draw(recipes_for(first, closure=False))
    optimizer = TiedOptimizer(recipe([first, second]), {first: [[0, 1]], second: [[2, 3]]}, compact=compact)
    shape = data.draw(shapes(max_count=3))
    second.data = normal(shape, torch.float32, data.draw(seeds))
    loss_of([first, second], data.draw(seeds)).backward()
    before = [bits(tensor).clone() for tensor in (first, second, first.grad, second.grad)]
    calls = [optimizer.step, optimizer.tie_gradients, optimizer.tie_weights, optimizer.tie_drift]
    _refused(data.draw(st.sampled_from(calls)), RuntimeError, (str(shape), "(4, 3)", _position(1)))
    after = [bits(tensor) for tensor in (first, second, first.grad, second.grad)]
    assert all(map(torch.equal, before, after))


@given(st.data())
def test_a_state_with_other_ties_is_refused_and_nothing_is_loaded(compact: bool, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    start = normal(shape, data.draw(st.sampled_from(REAL)), data.draw(seeds))
    recipe = data.draw(recipes_for(start, closure=False))
    names = data.draw(labels(shape[0]))
    others = data.draw(labels(shape[0]).filter(lambda other: not torch.equal(*map(_canonical, (other, names)))))
    optimizers, parameters = [], []
    for each in (names, others):
        parameters.append(Parameter(start.clone()))
        optimizers.append(TiedOptimizer(recipe([parameters[-1]]), {parameters[-1]: each}, compact=compact))
        loss_of(parameters[-1:], data.draw(seeds)).backward()
        optimizers[-1].step()
    before = _everything(optimizers[0], parameters)
    saved = optimizers[1].state_dict()
    _refused(
        lambda: optimizers[0].load_state_dict(saved), ValueError, (_position(0), *saved["tieopt"]["ties"].values())
    )
    assert _everything(optimizers[0], parameters) == before


def _canonical(names: torch.Tensor) -> torch.Tensor:
    """Labels that are equal where the ties are: a group of one member ties nothing."""
    sizes = torch.bincount(names[names >= 0], minlength=1)
    names = torch.where((names >= 0) & (sizes[names] > 1), names, -1)
    return numbered([Slices(names)])[0].labels


def test_python_does_not_look_for_garbage_while_ties_are_made() -> None:
    """A mapping is read then."""
    weight, seen = Parameter(torch.zeros(3)), []

    class Asked(dict[Parameter, list[list[int]]]):
        def items(self) -> Any:
            seen.append(gc.isenabled())
            return super().items()

    was_enabled = gc.isenabled()
    try:
        gc.enable()
        optimizer = TiedOptimizer(SGD([weight]), Asked({weight: [[0, 1]]}))
        optimizer.retie(Asked({weight: [[0, 2]]}))
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert set(seen) == {False}


@pytest.mark.parametrize("enabled", [True, False])
def test_python_looks_for_garbage_afterwards_if_it_did_before(*, enabled: bool) -> None:
    weight, other = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        optimizer = TiedOptimizer(SGD([weight]), {weight: [[0, 1]]})
        assert gc.isenabled() == enabled
        optimizer.retie({weight: [[0, 2]]})
        assert gc.isenabled() == enabled
        with pytest.raises(IndexError):
            TiedOptimizer(SGD([other]), {other: [[0, 9]]})
        with pytest.raises(IndexError):
            optimizer.retie({weight: [[0, 9]]})
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
