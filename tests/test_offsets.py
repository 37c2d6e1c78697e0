"""Offsets: members are multiples of the shared value plus constants; and slices that are frozen at what they are."""

import copy
import math
import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from checks import bits, randn, same_bits, same_tree, train
from hypothesis import assume, given
from hypothesis import strategies as st
from ranks import refusal_of
from reference import flat, groups_of_entries, slowly_tied_entries
from strategies import ALL, COMPLEX, REAL, normal, recipes_for, reductions, seeds
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import ASGD, LBFGS, SGD, Adam, AdamW

from tieopt import Tie, TiedOptimizer, frozen, patterns
from tieopt.testing import assert_equivalent, assert_tied, ties

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")

KINDS = ("none", "signs", "zeros", "any")
SHAPES = ((4, 3), (3, 4), (2, 3, 2))


def parameters_of(data: st.DataObject, dtypes: Sequence[torch.dtype]) -> list[Parameter]:
    dtype = data.draw(st.sampled_from(list(dtypes)))
    return [Parameter(normal(shape, dtype, data.draw(seeds))) for shape in SHAPES]


def with_offsets(data: st.DataObject, drawn: Sequence[Tie], size: float = 3.0) -> list[Tie]:
    """The same ties, with offsets of some of their parts: whole numbers, most of them zero, or of any size."""
    result = []
    for tie in drawn:
        parts = []
        for param, groups, dim, scale, _ in tie.parts:
            kind, seed = data.draw(st.sampled_from(["none", "whole", "any", "broadcast"])), data.draw(seeds)
            offset = size * normal(param.shape, torch.float64, seed)
            if kind == "whole":
                offset = (offset / 2).round()
            elif kind == "broadcast":
                offset = offset[..., :1].to(torch.float32)
            if param.is_complex() and data.draw(st.booleans()):
                offset = torch.complex(offset, offset.roll(1, 0))
            parts.append(Tie(param, groups, dim=dim, scale=scale, offset=None if kind == "none" else offset))
        result.append(Tie.join(*parts))
    return result


def for_others(drawn: Sequence[Tie], parameters: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tie]:
    other = {id(param): new for param, new in zip(parameters, others, strict=True)}
    return [
        Tie.join(
            *(
                Tie(other[id(part.param)], part.groups, dim=part.dim, scale=part.scale, offset=part.offset)
                for part in tie.parts
            )
        )
        for tie in drawn
    ]


def offsets_of(drawn: Sequence[Tie], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The offset of each entry, zero for free ones; float64 or complex128."""
    dtype = torch.complex128 if parameters[0].is_complex() else torch.float64
    offsets = [torch.zeros(param.shape, dtype=dtype) for param in parameters]
    numbers = {id(param): number for number, param in enumerate(parameters)}
    for part in (part for tie in drawn for part in tie.parts):
        target = offsets[numbers[id(part.param)]].movedim(part.dim, 0)
        is_member = part.groups != -1
        if part.offset is not None:
            target[is_member] = part.offset.to(dtype).movedim(part.dim, 0)[is_member]
    return offsets


def slowly_tied_with(parameters: Sequence[Tensor], drawn: Sequence[Tie]) -> list[Tensor]:
    """``s_i sum(s_j (w_j - c_j)) / sum(s_j^2) + c_i``, in float64 or complex128, by loops."""
    offsets = offsets_of(drawn, parameters)
    wide = [param.detach().to(offset.dtype) - offset for param, offset in zip(parameters, offsets, strict=True)]
    groups = [group for tie in drawn for group in groups_of_entries(tie, parameters)]
    return [tied + offset for tied, offset in zip(slowly_tied_entries(wide, groups), offsets, strict=True)]


def check_tied(parameters: Sequence[Tensor], drawn: Sequence[Tie]) -> None:
    """Check that in each group there is a member by which all others are what scales and offsets say, bit for bit."""
    entries, offsets = [flat(param) for param in parameters], [flat(each) for each in offsets_of(drawn, parameters)]
    for group in (group for tie in drawn for group in groups_of_entries(tie, parameters)):
        leads = [member for member in group if member[2] != 0] or group[:1]

        def is_said_by(lead: tuple[int, int, float], group: Sequence[tuple[int, int, float]] = group) -> bool:
            (number, at, first) = lead
            others = [member for member in group if member[:2] != (number, at)] if first else group
            for n, i, scale in others:
                multiple = scale / first if first else 0.0
                shift = offsets[n][i] - multiple * offsets[number][at]
                wanted = torch.tensor(multiple * entries[number][at] + shift, dtype=torch.complex128)
                if wanted.to(parameters[0].dtype.to_complex()).item() != complex(entries[n][i]):
                    return False
            return True

        assert len(group) == 1 or any(map(is_said_by, leads))


@given(data=st.data())
def test_members_are_the_nearest_multiples_plus_their_offsets(compact: bool, data: st.DataObject) -> None:
    parameters = parameters_of(data, (torch.float32, torch.float64, torch.complex64))
    drawn = with_offsets(data, data.draw(ties(parameters, KINDS)))
    expected = slowly_tied_with(parameters, drawn)
    optimizer = TiedOptimizer(SGD(parameters), drawn, compact=compact)
    eps = torch.finfo(parameters[0].dtype).eps
    for param, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(param.detach().to(wanted.dtype), wanted, rtol=4 * eps, atol=64 * eps)
    check_tied(parameters, drawn)
    assert optimizer.tie_drift() <= 64 * eps


@given(data=st.data())
def test_tied_weights_are_tied_already_and_free_ones_are_not_touched(compact: bool, data: st.DataObject) -> None:
    parameters = parameters_of(data, ALL)
    drawn = with_offsets(data, data.draw(ties(parameters, KINDS)))
    before = copy.deepcopy(parameters)
    optimizer = TiedOptimizer(SGD(parameters, lr=0.1), drawn, compact=compact)
    for number, param in enumerate(parameters):
        free = torch.ones(param.shape, dtype=torch.bool)
        for part in (part for tie in drawn for part in tie.parts if part.param is param):
            free.movedim(part.dim, 0)[part.groups != -1] = False
        assert torch.equal(bits(param)[free], bits(before[number])[free])
    once = list(map(bits, copy.deepcopy(parameters)))
    optimizer.tie_weights()
    optimizer.retie(optimizer.ties)
    assert all(map(torch.equal, map(bits, parameters), once))
    TiedOptimizer(SGD(parameters, lr=0.1), drawn, compact=not compact)
    assert all(map(torch.equal, map(bits, parameters), once))


@given(data=st.data(), reduction=reductions)
def test_steps_keep_the_ties_of_every_optimizer_and_dtype(compact: bool, reduction: str, data: st.DataObject) -> None:
    parameters = parameters_of(data, (*REAL, *COMPLEX))
    recipe = data.draw(recipes_for(*parameters, closure=False))
    drawn = with_offsets(data, data.draw(ties(parameters, KINDS)))
    optimizer = TiedOptimizer(recipe(parameters), drawn, reduction=reduction, compact=compact)
    for seed in range(2):
        for number, param in enumerate(parameters):
            param.grad = normal(param.shape, param.dtype, 10 * seed + number)
        optimizer.step()
        stepped = list(map(bits, copy.deepcopy(parameters)))
        optimizer.tie_weights()
        assert all(map(torch.equal, map(bits, parameters), stepped))
    if parameters[0].dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        check_tied(parameters, drawn)


@given(data=st.data())
def test_gradients_are_those_of_the_same_ties_without_offsets(data: st.DataObject) -> None:
    parameters = parameters_of(data, (torch.float32, torch.float64))
    twins = copy.deepcopy(parameters)
    drawn = data.draw(ties(parameters, KINDS))
    optimizer = TiedOptimizer(SGD(parameters), with_offsets(data, drawn))
    linear = TiedOptimizer(SGD(twins), for_others(drawn, parameters, twins))
    for number, both in enumerate(zip(parameters, twins, strict=True)):
        for param in both:
            param.grad = normal(param.shape, param.dtype, number)
    optimizer.tie_gradients()
    linear.tie_gradients()
    for param, twin in zip(parameters, twins, strict=True):
        # Another member may lead, and multiples of it are rounded in another way.
        torch.testing.assert_close(param.grad, twin.grad)


class SharedWeights:
    """Training of the shared values: weights are built from them in the forward pass."""

    def __init__(self, parameters: Sequence[Tensor], drawn: Sequence[Tie], make, reduction: str) -> None:
        self._offsets = offsets_of(drawn, parameters)
        groups = [group for tie in drawn for group in groups_of_entries(tie, parameters)]
        tied = {member[:2] for group in groups for member in group}
        places = [(number, at) for number, param in enumerate(parameters) for at in range(param.numel())]
        groups += [[(*place, 1.0)] for place in places if place not in tied]
        entries, offsets = [flat(param) for param in parameters], [flat(each) for each in self._offsets]
        values, norms = [], []
        self._numbers = [torch.zeros(param.numel(), dtype=torch.int64) for param in parameters]
        self._scales = [torch.zeros(param.numel(), dtype=torch.float64) for param in parameters]
        for group in groups:
            number, at, scale = max(group, key=lambda member: abs(member[2]))
            values.append((entries[number][at] - offsets[number][at]).real / scale if scale else 0.0)
            norms.append(math.fsum(scale * scale for _, _, scale in group) or 1.0)
            for number, at, scale in group:
                self._numbers[number][at], self._scales[number][at] = len(values) - 1, scale
        self.shared = Parameter(torch.tensor(values, dtype=torch.float64))
        if reduction == "mean":
            self.shared.register_hook(lambda grad: grad / torch.tensor(norms, dtype=torch.float64))
        self.optimizer = make([self.shared])

    def weights(self) -> list[Tensor]:
        return [
            (self.shared[numbers] * scales).view(offset.shape) + offset
            for numbers, scales, offset in zip(self._numbers, self._scales, self._offsets, strict=True)
        ]


MAKE = {
    "momentum": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "decay": lambda params: AdamW(params, lr=0.05, weight_decay=0.3),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@given(data=st.data(), reduction=reductions)
def test_the_compact_mode_trains_the_shared_values(make, reduction: str, data: st.DataObject) -> None:
    _check_training(make, reduction, True, ("none", "signs", "zeros", "any"), data)


@given(data=st.data(), reduction=reductions)
def test_the_full_mode_trains_the_shared_values(reduction: str, data: st.DataObject) -> None:
    _check_training(MAKE["momentum"], reduction, False, ("none", "signs", "zeros", "any"), data)


def _check_training(make, reduction: str, compact: bool, kinds: Sequence[str], data: st.DataObject) -> None:
    parameters = parameters_of(data, (torch.float64,))
    drawn = with_offsets(data, data.draw(ties(parameters, kinds)))
    targets = [normal(shape, torch.float64, 7 + number) for number, shape in enumerate(SHAPES)]

    def loss_of(weights: Sequence[Tensor]) -> Tensor:
        return sum((weight - target).square().sum() for weight, target in zip(weights, targets, strict=True))

    optimizer = TiedOptimizer(make(parameters), drawn, reduction=reduction, compact=compact)
    shared = SharedWeights(parameters, drawn, make, reduction)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(parameters).backward()
        optimizer.step()
        shared.optimizer.zero_grad()
        loss_of(shared.weights()).backward()
        shared.optimizer.step()
        for param, weight in zip(parameters, shared.weights(), strict=True):
            # A group of one that is no multiple is free: what decays is the weight.
            if compact and make is MAKE["decay"] and _has_lonely_members(drawn):
                return
            torch.testing.assert_close(param.detach(), weight.detach(), rtol=1e-9, atol=1e-9)


def _has_lonely_members(drawn: Sequence[Tie]) -> bool:
    for tie in drawn:
        labels = torch.cat([part.groups.flatten() for part in tie.parts])
        scales = [torch.ones(part.groups.shape) if part.scale is None else part.scale for part in tie.parts]
        trained = labels[(labels != -1) & (torch.cat([scale.flatten() for scale in scales]) != 0)]
        if len(trained) and bool((torch.bincount(trained) == 1).any()):
            return True
    return False


@given(data=st.data(), strength=st.sampled_from([0.25, 0.5, 1.0]))
def test_relaxed_ties_pull_towards_the_multiples_plus_their_offsets(strength: float, data: st.DataObject) -> None:
    parameters = parameters_of(data, (torch.float64,))
    drawn = with_offsets(data, data.draw(ties(parameters, KINDS)))
    before, goals = copy.deepcopy(parameters), slowly_tied_with(parameters, drawn)
    TiedOptimizer(SGD(parameters), drawn, strength=strength, every=2)
    for param, start, goal in zip(parameters, before, goals, strict=True):
        torch.testing.assert_close(param.detach(), start.detach().lerp(goal, strength), rtol=1e-12, atol=1e-12)


@given(data=st.data())
def test_the_first_member_keeps_its_value(compact: bool, data: st.DataObject) -> None:
    parameters = parameters_of(data, (torch.float64, torch.float32, torch.complex64))
    drawn = with_offsets(data, data.draw(ties(parameters, KINDS)))
    entries, offsets = [flat(param) for param in parameters], [flat(each) for each in offsets_of(drawn, parameters)]
    optimizer = TiedOptimizer(SGD(parameters), drawn, start="first", compact=compact)
    eps = torch.finfo(parameters[0].dtype).eps
    for group in (group for tie in drawn for group in groups_of_entries(tie, parameters)):
        first = next((member for member in group if member[2] != 0), None)
        shared = 0.0 if first is None else (entries[first[0]][first[1]] - offsets[first[0]][first[1]]) / first[2]
        for number, at, scale in group:
            wanted = scale * shared + offsets[number][at]
            assert parameters[number].flatten()[at].item() == pytest.approx(wanted, rel=8 * eps, abs=128 * eps)
    started = list(map(bits, copy.deepcopy(parameters)))
    optimizer.tie_weights()
    assert all(map(torch.equal, map(bits, parameters), started))


@given(data=st.data())
def test_training_goes_on_from_a_checkpoint_bit_for_bit(compact: bool, data: st.DataObject) -> None:
    parameters = parameters_of(data, (torch.float32,))
    drawn = with_offsets(data, data.draw(ties(parameters, KINDS)))
    optimizer = TiedOptimizer(Adam(parameters), drawn, compact=compact)
    train(optimizer, 2)
    twins = copy.deepcopy(parameters)
    resumed = TiedOptimizer(Adam(twins), for_others(drawn, parameters, twins), compact=compact)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, 2)
    train(resumed, 2)
    assert all(map(same_bits, parameters, twins))
    assert same_tree(optimizer.state_dict(), resumed.state_dict())


def test_a_checkpoint_with_another_offset_is_refused():
    weight = Parameter(torch.zeros(3))
    said = [
        TiedOptimizer(SGD([weight]), Tie(weight, [[0, 1]], offset=torch.tensor([0.0, number, 9.0 * number])))
        for number in (1.0, 2.0)
    ]
    with pytest.raises(ValueError, match="saved with other ties"):
        said[0].load_state_dict(said[1].state_dict())
    # Offsets of free entries do not count, nor does the dtype.
    other = Tie(weight, [[0, 1]], offset=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    TiedOptimizer(SGD([weight]), other).load_state_dict(said[0].state_dict())


def test_a_checkpoint_with_another_imaginary_part_of_an_offset_is_refused():
    weight = Parameter(torch.zeros(3, dtype=torch.complex64))
    real, complex_one = (
        TiedOptimizer(SGD([weight]), Tie(weight, [[0, 1]], offset=torch.tensor([0.0, number, 0.0])))
        for number in (1.0, 1.0 + 2.0j)
    )
    with pytest.raises(ValueError, match="saved with other ties"):
        real.load_state_dict(complex_one.state_dict())


def test_a_checkpoint_knows_which_parameter_has_the_offset():
    first, second = (Parameter(torch.zeros(3)) for _ in range(2))

    def wrapped(which: int) -> TiedOptimizer:
        ties = [Tie(p, torch.arange(3), offset=float(n == which)) for n, p in enumerate((first, second))]
        return TiedOptimizer(SGD([first, second]), Tie.join(*ties))

    with pytest.raises(ValueError, match="saved with other ties"):
        wrapped(0).load_state_dict(wrapped(1).state_dict())
    # An offset of free entries alone is none.
    plain = TiedOptimizer(SGD([first]), Tie(first, [[0, 1]]))
    plain.load_state_dict(
        TiedOptimizer(SGD([first]), Tie(first, [[0, 1]], offset=torch.tensor([0.0, 0, 3]))).state_dict()
    )


@pytest.mark.parametrize("kind", ["parts", "labels"])
def test_the_same_member_leads_in_both_modes(kind, compact):
    # Both offsets are of one size, so that another order of the members would round in another way.
    weight = Parameter(randn(2, 2))
    tie = Tie.join(Tie(weight, [[1]], offset=1.3), Tie(weight, [[0]], offset=-1.3))
    if kind == "labels":
        labels = torch.tensor([[0, 1], [1, -1]])
        tie = [Tie(weight, labels, dim=1, offset=torch.tensor([[0.0, 1.3], [-1.3, 0.0]])), frozen(weight, labels == -1)]
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), tie, compact=compact)
    for seed in range(50):
        weight.grad = randn(2, 2, seed=seed)
        optimizer.step()
        stepped = weight.detach().clone()
        optimizer.tie_weights()
        assert same_bits(weight, stepped)


class Lookahead(SGD):
    """Keeps slow weights, and goes half of the way to the fast ones."""

    @torch.no_grad()
    def step(self, closure=None):
        trained = [param for param in self.param_groups[0]["params"] if param.grad is not None]
        slow = [self.state[param].setdefault("slow", param.clone()) for param in trained]
        super().step()
        for param, kept in zip(trained, slow, strict=True):
            param.copy_(kept.lerp_(param, 0.5))


@pytest.mark.parametrize("saved", [False, True])
def test_weights_that_an_optimizer_keeps_have_their_offsets(compact, saved):
    """Also where it is tied in mid-training, and where its state goes from one mode to the other."""
    weight = Parameter(torch.tensor([1.0, 11.0, 5.0], dtype=torch.float64))
    tie = Tie(weight, [[0, 1]], offset=torch.tensor([0.5, 10.0, 0.0]))
    optimizer = Lookahead([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer = TiedOptimizer(optimizer, tie, compact=compact)
    (slow,) = (held["slow"] for held in optimizer.state.values())
    for mode in (compact, not compact):
        if saved and mode != compact:
            twin = TiedOptimizer(Lookahead([weight], lr=0.1), tie, compact=mode)
            twin.load_state_dict(optimizer.state_dict())
            optimizer = twin
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        # The slow weights are the weights.
        torch.testing.assert_close(weight.detach(), before, rtol=1e-12, atol=1e-12)
    assert slow.numel() == 3 - compact


@given(data=st.data())
def test_weights_that_an_optimizer_keeps_are_the_weights_whatever_becomes_of_its_state(compact, data):
    """Without gradients a step moves nothing, as long as what is kept is what the weights are."""
    parameters = parameters_of(data, (torch.float64,))
    drawn = with_offsets(data, data.draw(ties(parameters, KINDS)))
    optimizer = Lookahead(parameters, lr=0.1)
    # Those without a gradient have no state yet.
    for param in data.draw(st.lists(st.sampled_from(parameters), unique_by=id)):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    start = data.draw(st.sampled_from(["mean", "first"]))
    optimizer = TiedOptimizer(optimizer, drawn, compact=compact, start=start)
    for action in data.draw(st.lists(st.sampled_from(["load", "retie", "untie"]), max_size=3)):
        if action == "load":
            compact, old = not compact, optimizer
            optimizer = TiedOptimizer(Lookahead(parameters, lr=0.1), drawn, compact=compact)
            optimizer.load_state_dict(old.state_dict())
        elif action == "retie":
            optimizer.retie(drawn)
        else:
            optimizer.untie()
        before = [param.detach().clone() for param in parameters]
        for param in parameters:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        torch.testing.assert_close([param.detach() for param in parameters], before, rtol=1e-9, atol=1e-9)


def test_weights_of_which_an_optimizer_keeps_none_yet_are_kept_as_they_are(compact):
    first, second = parameters = [
        Parameter(torch.tensor(values)) for values in ([4.0, 4.0, 8.0], [4.0, 4.0, 20.0, 20.0])
    ]
    optimizer = Lookahead(parameters, lr=0.1)
    first.grad = torch.zeros(3)
    optimizer.step()
    tie = Tie.join(Tie(first, torch.tensor([0, 0, -1])), Tie(second, torch.tensor([0, 0, 1, 1])))
    optimizer = TiedOptimizer(optimizer, tie, compact=compact)
    for param in parameters:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(second, torch.tensor([4.0, 4.0, 20.0, 20.0]))


def test_averages_of_weights_have_their_offsets(compact):
    weight = Parameter(torch.tensor([1.0, 11.0, 5.0], dtype=torch.float64))
    optimizer = ASGD([weight], lr=0.1, t0=0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer = TiedOptimizer(optimizer, Tie(weight, [[0, 1]], offset=torch.tensor([0.0, 10.0, 0.0])), compact=compact)
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    optimizer.untie()
    torch.testing.assert_close(optimizer.state[weight]["ax"], weight.detach(), rtol=1e-3, atol=1e-3)


def test_shared_values_out_of_range_are_refused_in_the_compact_mode():
    weight = Parameter(torch.tensor([3e4, 3e4, 1.0], dtype=torch.float16))
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="beyond the range"):
        TiedOptimizer(SGD([weight]), Tie(weight, [[0, 1]], offset=-5e4), compact=True)
    assert same_bits(weight, before)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_an_offset_can_be_written_in_any_shape_that_broadcasts(compact, dim, depth):
    full = torch.full((4, 3), 2.0)
    labels = torch.tensor([0, 0, -1, 0])[: (4, 3)[dim]]
    labels = labels if depth == 1 else labels[:, None].expand(-1, (3, 4)[dim])
    saved, weights = [], []
    for offset in (2.0, full, full.double(), full[:1], full[:, :1], full[0], torch.tensor(2.0).expand(4, 3)):
        weight = Parameter(randn(4, 3))
        scale = torch.ones(labels.shape).index_fill_(0, torch.tensor([1]), -1.0)
        tie = Tie(weight, labels, dim=dim, scale=scale, offset=offset)
        optimizer = TiedOptimizer(Adam([weight], lr=0.1), tie, compact=compact)
        train(optimizer, 2)
        weights.append(weight)
        saved.append(optimizer.state_dict()["tieopt"])
        assert torch.equal(optimizer.ties[0].parts[0].offset, full)
    assert all(same_bits(weight, weights[0]) for weight in weights)
    assert all(said == saved[0] for said in saved)


def test_pinned_entries_are_their_offsets_as_torch_converts_them(compact):
    # float32 has the middle between two numbers of float16 for the first one.
    offset = torch.tensor([1 + 2**-11 + 2**-40, 0.1, 0.0, 0.0], dtype=torch.float64)
    weight = Parameter(torch.zeros(4, dtype=torch.float16))
    tie = Tie(weight, [[0, 1]], scale=torch.tensor([0.0, 0.0, 1.0, 1.0]), offset=offset)
    TiedOptimizer(SGD([weight]), [tie, Tie(weight, [[2, 3]], offset=0.3)], compact=compact)
    assert torch.equal(weight[:2], offset[:2].half())
    # So frozen ones are what the weights become that they were frozen in.
    wide = Parameter(offset.clone())
    optimizer = TiedOptimizer(SGD([wide]), [frozen(wide, [0, 1]), Tie(wide, [[2, 3]], offset=0.3)], compact=compact)
    wide.data = wide.data.half()
    wide.grad = torch.ones_like(wide)
    optimizer.step()
    assert torch.equal(wide[:2], offset[:2].half())


@given(data=st.data(), seed=seeds)
def test_no_sum_of_members_with_offsets_overflows(compact: bool, data: st.DataObject, seed: int) -> None:
    largest, sizes = torch.finfo(torch.float64).max, st.sampled_from([1.0, -1.0, 0.5, -0.25])
    scale = torch.tensor(data.draw(st.lists(sizes, min_size=6, max_size=6)), dtype=torch.float64)
    # The compact mode refuses shared values that are larger than all members.
    assume(not compact or bool((scale.abs() == 1).any()))
    weight = Parameter(largest * scale.sign() * data.draw(st.sampled_from([1.0, -1.0])))
    tie = Tie(weight, torch.zeros(6, dtype=torch.int64), scale=scale, offset=normal((6,), torch.float64, seed))
    optimizer = TiedOptimizer(SGD([weight], lr=0.0), tie, compact=compact)
    assert bool(weight.isfinite().all())
    assert optimizer.tie_drift() == 0


def test_gradients_of_many_small_ties_with_offsets_are_those_without():
    grads = []
    for offset in (None, torch.arange(4.0)[:, None]):
        params = [Parameter(randn(4, 3, seed=seed)) for seed in range(3)]
        optimizer = TiedOptimizer(SGD(params), [Tie(param, [[0, 2], [1, 3]], offset=offset) for param in params])
        for seed, param in enumerate(params):
            param.grad = randn(4, 3, seed=seed + 9)
        optimizer.tie_gradients()
        grads.append([param.grad for param in params])
    assert all(map(torch.equal, *grads))


def test_all_is_compiled_before_the_first_step(monkeypatch):
    # A step may be captured in a CUDA graph.
    weight = Parameter(randn(4, 3))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), [Tie(weight, [[0, 1]], offset=1.0), frozen(weight, [2])])
    monkeypatch.setattr("tieopt.numbers.index.Index.compile", None)
    train(optimizer, 2)


def test_gradients_through_weights_with_offsets_are_those_without():
    gradients = []
    for offset in (None, torch.arange(6.0).view(3, 2)):
        start = randn(3, 2, dtype=torch.float64).requires_grad_()
        weight = start * 1
        tie = Tie(weight, [[0, 2]], scale=torch.tensor([1.0, 1.0, -2.0]), offset=offset)
        TiedOptimizer(SGD([weight], lr=0.1, differentiable=True), tie).tie_weights()
        gradients += torch.autograd.grad(weight, start, randn(3, 2, seed=1, dtype=torch.float64))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_the_antisymmetric_recurrent_matrix_is_exact(compact):
    size, damping = 7, 0.01
    labels, scale = patterns.antisymmetric((size, size))
    weight = Parameter(randn(size, size))
    tie = Tie(weight, labels, scale=scale, offset=-damping * torch.eye(size))
    optimizer = TiedOptimizer(AdamW([weight], lr=0.1), tie, compact=compact)
    for seed in range(5):
        weight.grad = randn(size, size, seed=seed)
        optimizer.step()
        upper = weight.detach().triu(1)
        assert torch.equal(weight.detach(), upper - upper.T - damping * torch.eye(size))
        assert optimizer.tie_drift() == 0


def test_a_small_member_keeps_the_digits_that_a_large_offset_hides(compact):
    weight = Parameter(torch.zeros(3))
    tie = Tie(weight, [[0, 1, 2]], offset=torch.tensor([1e6, 0.0, -1e6]))
    weight.data.copy_(torch.tensor([1e6, 0.0, -1e6]))
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), tie, compact=compact)
    weight.grad = torch.full((3,), 1e-3)
    optimizer.step()
    assert weight[1].item() == pytest.approx(-1e-3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_negative_zero_keeps_its_sign(compact, dtype):
    weight = Parameter(torch.tensor([-0.0, 1.0, -0.0], dtype=dtype))
    tie = Tie(weight, [[0, 1, 2]], offset=torch.tensor([0.0, 1.0, 0.0]))
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), tie, compact=compact)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.signbit().tolist() == [True, False, True]


# --- frozen slices ---

AWKWARD = [-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-40, 0.1, -3.0]


@given(data=st.data(), reduction=reductions)
def test_frozen_slices_do_not_move_bit_for_bit(compact: bool, reduction: str, data: st.DataObject) -> None:
    (weight, *others) = parameters_of(data, (*REAL, *COMPLEX))
    recipe = data.draw(recipes_for(weight, *others, closure=False))
    labels = torch.tensor(data.draw(st.lists(st.booleans(), min_size=4, max_size=4)))
    if data.draw(st.booleans()):
        count = min(weight[labels].numel(), len(AWKWARD))
        with torch.no_grad():
            values = torch.tensor(AWKWARD[:count], dtype=torch.float64).to(weight.dtype)
            weight[labels] = torch.cat([values, weight[labels].flatten()[count:]]).view(-1, 3)
    before = bits(copy.deepcopy(weight))
    optimizer = TiedOptimizer(recipe([weight, *others]), frozen(weight, labels), reduction=reduction, compact=compact)
    for seed in range(3):
        for number, param in enumerate([weight, *others]):
            param.grad = normal(param.shape, param.dtype, 10 * seed + number)
        optimizer.step()
        assert torch.equal(bits(weight)[labels], before[labels])
    optimizer.retie(optimizer.ties)
    assert torch.equal(bits(weight)[labels], before[labels])


def test_the_rest_trains_as_without_frozen_slices(compact):
    weight, twin = Parameter(randn(5, 3)), Parameter(randn(5, 3)[[3]])
    optimizer = TiedOptimizer(AdamW([weight], lr=0.1), frozen(weight, [0, 1, 2, 4]), compact=compact)
    bare = AdamW([twin], lr=0.1)
    for seed in range(3):
        weight.grad = randn(5, 3, seed=seed)
        twin.grad = weight.grad[[3]].clone()
        optimizer.step()
        bare.step()
    assert same_bits(weight[[3]], twin)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_indices_masks_and_labels_say_the_same(dim):
    ways = [[0, 2], range(0, 3, 2), torch.tensor([True, False, True]), torch.tensor([7, -1, 0])]
    expected = None
    for way in ways:
        weight = Parameter(randn(3, 3))
        optimizer = TiedOptimizer(SGD([weight], lr=1.0), frozen(weight, way, dim=dim))
        weight.grad = torch.ones(3, 3)
        optimizer.step()
        moved = (weight.detach() != randn(3, 3)).movedim(dim, 0)
        assert moved.all(1).tolist() == [False, True, False]
        expected = weight.detach() if expected is None else expected
        assert torch.equal(weight, expected)


def test_single_entries_and_names_can_be_frozen(compact):
    layer = torch.nn.Linear(3, 2)
    before, mask = layer.weight.detach().clone(), torch.tensor([[True, False, True], [False, True, False]])
    inner = AdamW(layer.named_parameters(), lr=0.1)
    optimizer = TiedOptimizer(inner, [frozen("weight", mask), frozen("bias", iter([1]))], compact=compact)
    train(optimizer, 3)
    assert torch.equal(layer.weight.detach() == before, mask)


def test_values_are_those_of_when_the_tie_is_bound():
    weight = Parameter(torch.zeros(3, 2))
    tie = frozen(weight, [1])
    with torch.no_grad():
        weight.fill_(5.0)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1, weight_decay=0.1), tie)
    train(optimizer, 2)
    assert weight[1].tolist() == [5.0, 5.0]
    with torch.no_grad():
        weight.fill_(2.0)
    optimizer.retie(optimizer.ties)
    train(optimizer, 2)
    assert weight[1].tolist() == [2.0, 2.0]


def test_frozen_values_are_loaded_before_the_optimizer_is_wrapped(compact):
    def wrapped(weight: Parameter) -> TiedOptimizer:
        return TiedOptimizer(AdamW([weight], lr=0.1), frozen(weight, [1]), compact=compact)

    weight, late, early = (Parameter(randn(3, 2, seed=seed)) for seed in range(3))
    optimizer = wrapped(weight)
    train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    too_early = wrapped(late)
    with pytest.raises(ValueError, match="load the weights before the optimizer is wrapped"):
        too_early.load_state_dict(saved)
    early.data.copy_(weight)
    resumed = wrapped(early)
    resumed.load_state_dict(saved)
    train(optimizer, 2)
    train(resumed, 2)
    assert same_bits(weight, early)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_frozen_slices_are_converted_with_the_weights(compact, dtype):
    weight, other = (Parameter(randn(4, 3, dtype=torch.float64)) for _ in range(2))
    tie = Tie(weight, [[2, 3]], scale=torch.tensor([1.0, 1.0, 0.3, 1.7]), offset=0.1)

    def wrapped(weight: Parameter) -> TiedOptimizer:
        listed = [frozen(weight, [1]), for_others([tie], [tie.parts[0].param], [weight])[0]]
        return TiedOptimizer(SGD([weight], lr=0.1), listed, compact=compact)

    optimizer = wrapped(weight)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = None
    weight.data = weight.data.to(dtype)
    expected = weight[1].detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert same_bits(weight[1], expected)
    other.data = weight.data.clone()
    wrapped(other).load_state_dict(optimizer.state_dict())


def test_frozen_slices_of_weights_that_are_trained_later_are_watched(compact):
    weight = Parameter(torch.ones(3, 2), requires_grad=False)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), frozen(weight, [1]), compact=compact)
    weight.fill_(7.0).requires_grad_()
    with pytest.warns(UserWarning, match="Frozen slices were written to"):
        train(optimizer, 1)
    assert weight[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda weight, _: frozen(weight, [0, 2]),
        lambda weight, _: Tie(weight, [[0, 1]], offset=1j),
        lambda weight, other: Tie.equal(weight, other),
        lambda weight, other: Tie.equal(other, weight),
    ],
    ids=["frozen", "offset", "equal", "the other first"],
)
def test_lazily_conjugated_weights_are_refused_when_they_are_tied_and_later(make, later):
    weight, other = (Parameter(randn(4, 3, dtype=torch.complex64)) for _ in range(2))
    lazy = weight.detach().conj().resolve_conj().conj()
    if not later:
        weight.data = lazy
        with pytest.raises(ValueError, match=r"\['params'\]\[0\] is conjugated .*\n.*resolve_conj\(\)"):
            TiedOptimizer(SGD([weight, other]), make(weight, other))
        return
    optimizer = TiedOptimizer(SGD([weight, other]), make(weight, other))
    weight.data = lazy
    weight.grad = other.grad = torch.ones_like(other)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"resolve_conj\(\)"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_only_frozen_slices_are_kept():
    weight = Parameter(randn(1000, 4))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), frozen(weight, [3, 500]))
    (tie,) = optimizer._tieopt.ties
    assert torch.equal(tie.slices[0].offset.values, weight[[3, 500]])


def test_what_is_written_to_frozen_slices_between_steps_is_undone_with_a_warning(compact):
    weight = Parameter(torch.ones(3, 2))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), frozen(weight, [1]), compact=compact)
    train(optimizer, 1)
    with torch.no_grad():
        weight.fill_(7.0)
    with pytest.warns(UserWarning, match="Frozen slices were written to"):
        train(optimizer, 1)
    assert weight[1].tolist() == [1.0, 1.0]


def test_frozen_slices_beside_others_are_watched_and_others_may_be_written_to(compact):
    weight = Parameter(torch.ones(4, 2))
    with torch.no_grad():
        weight[0] = math.nan
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), [frozen(weight, [0, 1]), Tie(weight, [[2, 3]])], compact=compact)
    train(optimizer, 1)
    assert optimizer.tie_drift() == 0
    with torch.no_grad():
        weight[2:] += 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, 1)
    with torch.no_grad():
        weight[1] = 5.0
    with pytest.warns(UserWarning, match="written to") as said:
        train(optimizer, 1)
    assert [str(warning.message).partition(":")[0] for warning in said] == ["Frozen slices were written to"]


def test_a_frozen_slice_cannot_be_in_a_group():
    weight = Parameter(randn(4, 2))
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"tied twice.\n.*what is frozen, or has an offset, is in one tie alone"):
        TiedOptimizer(SGD([weight]), [Tie(weight, [[0, 1]]), frozen(weight, [1, 2])])
    assert torch.equal(weight, before)


def test_lbfgs_trains_beside_frozen_slices(compact):
    weight, target = Parameter(randn(4, 3, dtype=torch.float64)), randn(4, 3, seed=1, dtype=torch.float64)
    before = weight.detach().clone()
    inner = LBFGS([weight], line_search_fn="strong_wolfe")
    optimizer = TiedOptimizer(inner, frozen(weight, [0, 2]), compact=compact, reduction="sum" if compact else "mean")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(weight[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(weight[[1, 3]].detach(), target[[1, 3]])


# --- what else reads ties ---


@given(data=st.data(), reduction=reductions)
def test_equivalent_training_knows_offsets(reduction: str, data: st.DataObject) -> None:
    model = torch.nn.Linear(3, 4)
    (drawn, *_) = with_offsets(data, data.draw(ties([model.weight], ("none", "signs", "zeros"))))
    parts = [(part.groups, part.dim, part.scale, part.offset) for part in drawn.parts]

    def as_named(model: torch.nn.Module) -> list[Tie]:
        joined = (Tie(model.weight, groups, dim=dim, scale=s, offset=c) for groups, dim, s, c in parts)
        return [Tie.join(*joined), frozen(model.bias, [1])]

    batches = torch.randn(3, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(data.draw(seeds)))
    assert_equivalent(
        lambda: copy.deepcopy(model), lambda params: SGD(params, lr=0.05), as_named, batches, reduction=reduction
    )


def test_tied_weights_with_an_offset_are_tied_to_assert_tied():
    weight, tie = torch.zeros(3), Tie("weight", [[0, 1]], offset=torch.tensor([0.0, 1.0, 0.0]))
    layer = torch.nn.Module()
    layer.weight = Parameter(weight)
    with pytest.raises(AssertionError, match="not tied"):
        assert_tied(layer, tie)
    TiedOptimizer(SGD(layer.named_parameters()), tie)
    assert_tied(layer, tie)


@given(data=st.data())
def test_files_have_the_weights_bit_for_bit_and_the_ties_without_offsets(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    export = pytest.importorskip("tieopt.export")
    pytest.importorskip("safetensors")
    layer = torch.nn.Linear(3, 4)
    drawn = with_offsets(data, data.draw(ties([layer.weight], KINDS)))
    optimizer = TiedOptimizer(AdamW(layer.parameters(), lr=0.1), [*drawn, frozen(layer.bias, [1, 3])])
    train(optimizer, 2)
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    for said in (optimizer, optimizer.ties):
        export.save(layer, said, path)
        state = export.load(path)
        assert all(same_bits(state[name], param) for name, param in layer.named_parameters())
    twin = copy.deepcopy(layer)
    with warnings.catch_warnings():
        # Members whose others had offsets may be alone in their groups.
        warnings.simplefilter("ignore", UserWarning)
        TiedOptimizer(SGD(twin.named_parameters()), export.load_ties(path))
    assert all(map(same_bits, layer.parameters(), twin.parameters()))


def test_files_keep_the_signs_of_frozen_zeros(tmp_path):
    export = pytest.importorskip("tieopt.export")
    pytest.importorskip("safetensors")
    layer = torch.nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight[1:] = torch.tensor([[-0.0], [0.0]])
    optimizer = TiedOptimizer(SGD(layer.parameters(), lr=0.1), frozen(layer.weight, [1, 2]))
    export.save(layer, optimizer, tmp_path / "model.safetensors")
    assert same_bits(export.load(tmp_path / "model.safetensors")["weight"], layer.weight)


def test_pinned_entries_of_an_offset_are_not_said_to_be_zero():
    plot = pytest.importorskip("tieopt.plot")
    pytest.importorskip("matplotlib")
    figure = plot.draw_groups(frozen(torch.zeros(3, 2), [0]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["free", "pinned"]


# --- sharded ---


def frozen_bytes(full: Tensor) -> Tensor:
    """The frozen rows of sharded 8-bit floats after a step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # torch 2.6 views no shards in another dtype.
    shard = distribute_tensor(full.view(torch.uint8), mesh, [Shard(0)]).to_local()
    weight = Parameter(DTensor.from_local(shard.view(full.dtype), mesh, [Shard(0)]))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), frozen(weight, [0, 3]))
    return optimizer._tieopt.ties[0].slices[0].offset.values.view(torch.uint8)


def trained(full: Tensor, placement: Shard | None, ties_of) -> tuple[Tensor, str]:
    """A weight after some steps, sharded over the ranks or whole, and what a checkpoint says of its ties."""
    mesh = None if placement is None else init_device_mesh("cpu", (dist.get_world_size(),))
    weight = Parameter(full.clone() if mesh is None else distribute_tensor(full.clone(), mesh, [placement]))
    optimizer = TiedOptimizer(AdamW([weight], lr=0.1, weight_decay=0.1), ties_of(weight))
    for seed in range(3):
        grad = randn(*full.shape, seed=seed, dtype=full.dtype)
        weight.grad = grad if mesh is None else distribute_tensor(grad, mesh, [placement])
        optimizer.step()
    optimizer.retie(optimizer.ties)
    said = str(optimizer.state_dict()["tieopt"])
    return (weight.detach() if mesh is None else weight.full_tensor().detach()), said


def rows_with_offsets(weight: Tensor) -> list[Tie]:
    scale = torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0, 1.0])
    offset = torch.arange(24.0).view(6, 4)
    return [Tie(weight, torch.tensor([0, 0, 1, 1, 1, -1]), scale=scale, offset=offset), frozen(weight, [5])]


def rows_shifted_as_a_whole(weight: Tensor) -> list[Tie]:
    return [Tie(weight, [[0, 1], [2, 5]], offset=torch.arange(6.0)[:, None])]


def frozen_rows(weight: Tensor) -> list[Tie]:
    return [frozen(weight, [0, 5]), Tie(weight, [[1, 4], [2, 3]])]


def antisymmetric(weight: Tensor) -> list[Tie]:
    labels, scale = patterns.antisymmetric((6, 6))
    return [Tie(weight, labels, scale=scale, offset=-0.3 * torch.eye(6, dtype=torch.float64))]


@needs_gloo
@pytest.mark.parametrize(
    ("width", "dim", "ties_of"),
    [
        (4, 1, rows_with_offsets),
        (4, 1, rows_shifted_as_a_whole),
        (4, 0, frozen_rows),
        (4, 1, frozen_rows),
        (6, 0, antisymmetric),
        (6, 1, antisymmetric),
    ],
)
def test_sharded_weights_are_trained_as_whole_ones(two_ranks, width, dim, ties_of):
    full = randn(6, width, dtype=torch.float64)
    expected, said = trained(full, None, ties_of)
    answers = two_ranks.run(trained, full, Shard(dim), ties_of)
    for weight, said_here in answers:
        assert same_bits(weight, answers[0][0])
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
        assert said_here == said
    if ties_of is frozen_rows:
        assert same_bits(answers[0][0][[0, 5]], full[[0, 5]])
    if ties_of is antisymmetric:
        upper = weight.triu(1)
        assert torch.equal(weight, upper - upper.T - 0.3 * torch.eye(6, dtype=torch.float64))


@needs_gloo
def test_rows_of_sharded_bytes_are_frozen(two_ranks):
    full = randn(4, 2).to(torch.float8_e5m2)
    for rows in two_ranks.run(frozen_bytes, full):
        assert torch.equal(rows, full.view(torch.uint8)[[0, 3]])


def tied_by_other_offsets(full: Tensor) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = Parameter(distribute_tensor(full, mesh, [Shard(1)]))
    TiedOptimizer(SGD([weight]), Tie(weight, [[0, 1]], offset=torch.tensor([[0.0], [1.0 + dist.get_rank()]])))


@needs_gloo
def test_other_offsets_on_another_rank_are_refused_on_every_rank(two_ranks):
    for text in two_ranks.run(refusal_of, ValueError, tied_by_other_offsets, randn(2, 4)):
        assert "other ties than some other rank" in text


def compact_shards(full: Tensor) -> None:
    weight = Parameter(distribute_tensor(full, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)]))
    TiedOptimizer(SGD([weight]), [frozen(weight, [0]), Tie(weight, [[1, 2]])], compact=True)


@needs_gloo
def test_the_compact_mode_refuses_groups_across_shards_beside_frozen_ones(two_ranks):
    for text in two_ranks.run(refusal_of, ValueError, compact_shards, randn(4, 2)):
        assert "compact=False" in text


def warnings_of_shards(full: Tensor, dim: int, ties_of) -> tuple[list[str], Tensor]:
    """What is said on this rank after weights were loaded into shards, some of whose slices are frozen."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = Parameter(distribute_tensor(torch.zeros_like(full), mesh, [Shard(dim)]))
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), ties_of(weight))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight.copy_(distribute_tensor(full, mesh, [Shard(dim)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught], weight.full_tensor().detach()


@needs_gloo
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_written_to_frozen_shards_is_undone_with_a_warning(two_ranks, dim):
    for said, weight in two_ranks.run(warnings_of_shards, torch.ones(6, 4), dim, frozen_rows):
        assert any("Frozen slices were written to" in text for text in said)
        assert weight[:, 0].tolist() == [0, 1, 1, 1, 1, 0]


@needs_gloo
def test_offsets_of_groups_that_span_ranks_are_refused_on_every_rank(two_ranks):
    for text in two_ranks.run(refusal_of, ValueError, trained, randn(6, 4), Shard(0), rows_with_offsets):
        assert "has an offset" in text
        assert "whole on one rank" in text


# --- bad input ---


def test_frozen_slices_are_neither_joined_nor_compared():
    weight, other = Parameter(randn(4, 3)), Parameter(randn(4, 3))
    with pytest.raises(ValueError, match="as a tie of its own"):
        Tie.join(frozen(weight, [0]), Tie(other, [[1, 2]]))
    with pytest.raises(ValueError, match="Frozen slices have no other members"):
        assert_tied(weight, frozen(weight, [0]))


@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, "wrong shape"),
        (torch.zeros(()).expand(2, 3), ValueError, "wrong shape"),
        (torch.zeros(4, 1, 1), ValueError, "wrong shape"),
        (torch.tensor([0.0, math.nan, 0.0]), ValueError, "out of range"),
        (math.inf, ValueError, "out of range"),
        (torch.tensor(1e39, dtype=torch.float64), ValueError, "up to 3.4028"),
        pytest.param(10**400, ValueError, "out of range", id="10**400"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "wrong dtype"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "wrong dtype"),
        (1j, TypeError, "wrong dtype"),
        ([1.0, 2.0, 3.0], TypeError, "no tensor"),
        ("one", TypeError, "no tensor"),
        (torch.zeros(3).to_sparse(), TypeError, "cannot be read"),
    ],
    ids=str,
)
def test_a_bad_offset_is_refused_before_anything_is_written(offset, error, message):
    weight = Parameter(randn(4, 3))
    before = weight.detach().clone()
    with pytest.raises(error, match=message):
        Tie(weight, [[0, 1]], offset=offset)
    with pytest.raises(error, match=message):
        TiedOptimizer(SGD([("weight", weight)]), Tie("weight", [[0, 1]], offset=offset))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([9], IndexError, "out of range"),
        ([0, 0], ValueError, "more than once"),
        ([0.5], TypeError, "a list of indices"),
        (3, TypeError, "a list of indices"),
        ("12", TypeError, "a list of indices"),
        ([[0, 1]], TypeError, "a list of indices"),
        (torch.tensor([0, 1]), ValueError, "a list of indices, not a tensor"),
        (torch.tensor([0, 1, 1, 0]), ValueError, "All slices would be frozen"),
        (torch.tensor([0, -1]), ValueError, "wrong shape"),
        (torch.tensor([True, False]), ValueError, "wrong shape"),
        (torch.zeros(4), TypeError, "wrong dtype"),
    ],
    ids=str,
)
def test_bad_indices_of_frozen_slices_are_refused(indices, error, message):
    with pytest.raises(error, match=message):
        frozen(Parameter(randn(4, 3)), indices)
