"""The ten promises for ties of every kind: columns, kernels, elements, scaled, joined, several of one parameter."""

import copy
import io
import math
from collections.abc import Sequence

import pytest
import torch
from checks import default_dtype
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import Member, bits, flat, groups_of_entries, same_bits, slowly_tied_entries
from strategies import (
    COMPLEX,
    COUPLING,
    ENTRYWISE,
    REAL,
    TINY,
    Recipe,
    few_examples,
    laid_out,
    layouts,
    loss_of,
    normal,
    recipes_for,
    reductions,
    seeds,
    tensors,
)
from torch import Tensor
from torch.nn import Parameter

from tieopt import Tie, TiedOptimizer, is_tied, patterns, tie_
from tieopt.testing import assert_equivalent, assert_tied, labels, scales, ties

SIGNED = ("none", "signs", "zeros")
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def _parameters(
    data: st.DataObject,
    dtypes: Sequence[torch.dtype],
    shapes: st.SearchStrategy[tuple[int, ...]] = shapes,
    most: int = 2,
) -> list[Parameter]:
    dtype = data.draw(st.sampled_from(list(dtypes)))
    starts = [
        data.draw(tensors(data.draw(shapes), [dtype], finite=True)) for _ in range(data.draw(st.integers(1, most)))
    ]
    return [Parameter(laid_out(start, data.draw(layouts(start)))) for start in starts]


def _groups(drawn: Sequence[Tie], parameters: Sequence[Tensor]) -> list[list[Member]]:
    return [group for tie in drawn for group in groups_of_entries(tie, parameters)]


def _assert_members_agree(parameters: Sequence[Tensor], groups: Sequence[Sequence[Member]]) -> None:
    """For scales of -1, 0 and 1 bit for bit but for the sign of zero, and to a unit in the last place otherwise."""
    entries = [flat(parameter) for parameter in parameters]
    dtype = parameters[0].dtype
    for group in groups:
        units = [(number, position, scale) for number, position, scale in group if abs(scale) == 1]
        # The largest of the others: the rounding of a smaller one, which may be subnormal, would be multiplied.
        others = sorted([member for member in group if member[2] != 0], key=lambda member: -abs(member[2]))
        lead = next(iter(units or others), None)
        for number, position, scale in group:
            value = entries[number][position]
            if scale == 0:
                assert value == 0
            elif units and abs(scale) == 1:
                assert value == scale * lead[2] * entries[lead[0]][lead[1]]
            else:
                expected = scale / lead[2] * entries[lead[0]][lead[1]]
                for got, exact in ((value.real, expected.real), (value.imag, expected.imag)):
                    finite = min(abs(exact), torch.finfo(dtype).max)
                    unit = max(
                        torch.finfo(dtype).eps * 2.0 ** (math.frexp(finite)[1] - 1),
                        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
                    )
                    assert abs(got - exact) <= unit or (math.isinf(got) and abs(exact) > torch.finfo(dtype).max)


def _elementwise(drawn: Sequence[Tie]) -> bool:
    """Whether single entries are tied, which leaves no matrix for optimizers of matrices to train."""
    kinds = {(part.dim, part.groups.dim()) for tie in drawn for part in tie.parts}
    return len(kinds) > 1 or any(depth > 1 for _, depth in kinds)


def _shared_values_are_in_range(drawn: Sequence[Tie], parameters: Sequence[Parameter]) -> bool:
    """Whether no shared value can be beyond the range of its dtype, which the compact mode refuses."""
    scales = [part.scale[part.scale != 0].abs() for tie in drawn for part in tie.parts if part.scale is not None]
    least = min([1.0, *(float(scale.min()) for scale in scales if scale.numel())])
    entries = torch.cat([parameter.detach().abs().double().flatten() for parameter in parameters])
    largest = float(entries.max()) if entries.numel() else 0.0
    return not largest > least * torch.finfo(parameters[0].dtype).max


def _steps(optimizer: torch.optim.Optimizer, parameters: list[Parameter], seeds: list[int]) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(parameters, seed).backward()
        optimizer.step()


some_seeds = st.lists(seeds, min_size=1, max_size=3)


@pytest.mark.parametrize("recipe", [recipe for recipe in ENTRYWISE + COUPLING if not recipe.closure], ids=repr)
@few_examples
@given(st.data())
def test_members_are_tied_after_construction_and_every_step(compact: bool, recipe: Recipe, data: st.DataObject) -> None:
    dtypes = [dtype for dtype in (*REAL, *COMPLEX) if dtype in recipe.dtypes]
    parameters = _parameters(data, dtypes, st.tuples(*[st.integers(1, 5)] * 2) if recipe.matrices else shapes)
    drawn = data.draw(ties(parameters))
    assume(not (compact and recipe.matrices and _elementwise(drawn)))
    assume(not compact or _shared_values_are_in_range(drawn, parameters))
    groups = _groups(drawn, parameters)
    optimizer = TiedOptimizer(recipe(parameters), drawn, reduction=data.draw(reductions), compact=compact)
    _assert_members_agree(parameters, groups)
    for seed in data.draw(some_seeds):
        _steps(optimizer, parameters, [seed])
        assume(all(bool(parameter.isfinite().all()) for parameter in parameters))
        _assert_members_agree(parameters, groups)
        assert optimizer.tie_drift() == 0


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX, *TINY], ids=str)
@given(st.data())
def test_tying_tied_input_changes_no_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    start = data.draw(tensors(data.draw(shapes), [dtype], finite=True))
    tensor = laid_out(start, data.draw(layouts(start, lazy=True)))
    for part in [part for tie in data.draw(ties([tensor])) for part in tie.parts]:
        tie_(tensor, part.groups, dim=part.dim, scale=part.scale)
        once = tensor.clone()
        tie_(tensor, part.groups, dim=part.dim, scale=part.scale)
        assert same_bits(tensor, once)
        if bool((tensor == tensor).all() if dtype not in TINY else (tensor.float() == tensor.float()).all()):
            assert is_tied(tensor, part.groups, dim=part.dim, scale=part.scale)
            assert_tied(tensor, Tie(tensor, part.groups, dim=part.dim, scale=part.scale))


@pytest.mark.parametrize("layout", ["negated", "conjugated"])
@given(st.data())
def test_what_torch_negates_or_conjugates_on_reading_is_tied_all_the_same(layout: str, data: st.DataObject) -> None:
    dtype = torch.complex128 if layout == "conjugated" else torch.float64
    start = normal(data.draw(st.tuples(*[st.integers(2, 3)] * 3)), dtype, data.draw(seeds))
    tensor = laid_out(start, layout)
    for part in [part for tie in data.draw(ties([tensor])) for part in tie.parts]:
        tie_(tensor, part.groups, dim=part.dim, scale=part.scale)
        tie_(start, part.groups, dim=part.dim, scale=part.scale)
        assert torch.equal(tensor, start)


@given(st.data())
def test_a_group_goes_to_its_projection(compact: bool, data: st.DataObject) -> None:
    parameters = [
        Parameter(
            normal(data.draw(shapes), data.draw(st.sampled_from([torch.float64, torch.complex128])), data.draw(seeds))
        )
    ]
    parameters += [Parameter(normal(data.draw(shapes), parameters[0].dtype, data.draw(seeds)))]
    drawn = data.draw(ties(parameters))
    expected = slowly_tied_entries(parameters, _groups(drawn, parameters))
    TiedOptimizer(torch.optim.SGD(parameters), drawn, compact=compact)
    for parameter, one in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), one, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@given(st.data())
def test_the_projection_is_as_exact_with_scales_of_any_size(dtype: torch.dtype, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 40))
    powers = data.draw(st.lists(st.integers(-14, 14), min_size=count, max_size=count))
    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0, 1 / 3]), min_size=count, max_size=count))
    scale = torch.tensor([sign * 2.0**power for sign, power in zip(signs, powers, strict=True)], dtype=torch.float64)
    start = normal((count,), dtype, data.draw(seeds))
    tensor = tie_(start.clone(), [range(count)], scale=scale)

    shared = (scale * start.double()).sum() / scale.square().sum()
    # Rounded once as the lead, once as its multiple; the lead may be as small as the 256th part of the largest.
    smallest = 256 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(tensor.double(), scale * shared, rtol=1.01 * torch.finfo(dtype).eps, atol=smallest)
    assert same_bits(tie_(tensor.clone(), [range(count)], scale=scale), tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_tied_is_no_new_mean_of_its_rounded_multiples(dtype: torch.dtype) -> None:
    scale = torch.cat([torch.ones(1), torch.arange(2, 32) * 8 - 1 / 3])
    start = normal((len(scale), 2000), dtype, 0)
    tensor = tie_(start, [range(len(scale))], scale=scale)
    once = tensor.clone()
    assert same_bits(tie_(tensor, [range(len(scale))], scale=scale), once)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_shared_value_beyond_the_range_of_its_dtype_stops_at_the_end(dtype: torch.dtype, sign: int) -> None:
    largest = torch.finfo(dtype).max
    tensor = tie_(torch.full((2,), sign * largest, dtype=dtype), [[0, 1]], scale=torch.tensor([1.0, 1 / 3]))
    assert tensor[0] == sign * largest
    assert bool(tensor.isfinite().all())


@given(st.data())
def test_sparse_gradients_are_tied_with_their_scales_and_pinned(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 12)), *data.draw(st.sampled_from([(), (2,), (2, 2)])))
    weight = Parameter(torch.zeros(shape, dtype=torch.float64))
    tie = Tie(weight, data.draw(labels(shape[0])), scale=data.draw(scales(shape[:1])))
    reduction = data.draw(reductions)
    stored = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=8))
    values = normal((len(stored), *shape[1:]), torch.float64, data.draw(seeds))
    grad = torch.sparse_coo_tensor(torch.tensor([stored], dtype=torch.int64), values, shape)
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            seen.append(weight.grad.to_dense())

    optimizer = TiedOptimizer(Watching([weight]), tie, reduction=reduction)
    weight.grad = grad.clone()
    optimizer.step()
    groups = groups_of_entries(tie, [weight])
    assert weight.grad.layout == torch.sparse_coo
    for got, how in ((seen[0], reduction), (weight.grad.to_dense(), "mean")):
        (expected,) = slowly_tied_entries([grad.to_dense()], groups, how)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    entries = math.prod(shape[1:])
    rows = [{position // entries for _, position, scale in group if scale} for group in groups]
    expected_rows = set(stored).union(*(group for group in rows if not group.isdisjoint(stored)))
    assert set(weight.grad.coalesce().indices()[0].tolist()) == expected_rows


@given(st.data())
def test_multiples_of_what_is_finite_are_finite(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(REAL))
    largest = torch.finfo(dtype).max
    values = data.draw(st.lists(st.sampled_from([largest, -largest, largest / 3, 1.0]), min_size=2, max_size=6))
    scale = torch.tensor(
        data.draw(st.lists(st.sampled_from([1.0, -1.0, 3.0, 1 / 3, 100.0]), min_size=len(values), max_size=len(values)))
    )
    tensor = tie_(torch.tensor(values, dtype=torch.float64).to(dtype), [range(len(values))], scale=scale)
    assert bool(tensor.isfinite().all())
    assert same_bits(tie_(tensor.clone(), [range(len(values))], scale=scale), tensor)


@given(st.data())
def test_free_entries_are_the_bare_optimizers_bit_for_bit(compact: bool, data: st.DataObject) -> None:
    parameters = _parameters(data, [torch.float32, torch.float64])
    recipe = data.draw(
        recipes_for(*parameters, closure=False, entrywise=True).filter(lambda one: not one.settings.get("fused"))
    )
    drawn = data.draw(ties(parameters))
    bare = copy.deepcopy(parameters)
    groups = _groups(drawn, parameters)
    optimizer, other = TiedOptimizer(recipe(parameters), drawn, compact=compact), recipe(bare)
    for seed in data.draw(some_seeds):
        for each, stepped in ((optimizer, parameters), (other, bare)):
            each.zero_grad()
            for number, parameter in enumerate(stepped):
                parameter.grad = normal(parameter.shape, parameter.dtype, seed + number)
            each.step()
    tied = {(number, position) for group in groups for number, position, _ in group}
    for number, (parameter, one) in enumerate(zip(parameters, bare, strict=True)):
        free = [position for position in range(parameter.numel()) if (number, position) not in tied]
        assert same_bits(parameter.detach().flatten()[free], one.detach().flatten()[free])


@pytest.mark.parametrize("recipe", [recipe for recipe in ENTRYWISE if torch.float64 in recipe.dtypes], ids=repr)
@few_examples
@given(st.data())
def test_the_trajectory_is_that_of_the_shared_values(recipe: Recipe, data: st.DataObject) -> None:
    linear = recipe.optimizer is torch.optim.SGD
    model = torch.nn.ParameterList([normal(data.draw(shapes), torch.float64, data.draw(seeds)) for _ in range(2)])
    drawn = data.draw(ties(list(model), ("none", "signs", "zeros", "any") if linear else SIGNED))

    assert_equivalent(
        lambda: _Weights(model),
        recipe,
        lambda _: drawn,
        data.draw(st.lists(seeds, min_size=10, max_size=10)),
        reduction=data.draw(reductions),
        loss=lambda module, seed: module(seed),
        tolerance=1e-11,
    )


class _Weights(torch.nn.Module):
    """A model that is its parameters."""

    def __init__(self, weights: torch.nn.ParameterList) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, seed: int) -> Tensor:
        return loss_of(list(self.weights), seed)


@given(st.data())
def test_names_of_groups_do_not_matter(compact: bool, data: st.DataObject) -> None:
    parameters = _parameters(data, REAL)
    drawn = data.draw(ties(parameters))
    twins = copy.deepcopy(parameters)
    number = {id(parameter): twin for parameter, twin in zip(parameters, twins, strict=True)}
    renamed = [
        Tie.join(
            *(
                Tie(
                    number[id(part.param)],
                    torch.where(part.groups < 0, -1, 1000 - 7 * part.groups),
                    dim=part.dim,
                    scale=part.scale,
                )
                for part in tie.parts
            )
        )
        for tie in reversed(drawn)
    ]
    first = TiedOptimizer(torch.optim.SGD(parameters), drawn, compact=compact)
    second = TiedOptimizer(torch.optim.SGD(twins), renamed, compact=compact)
    assert all(map(same_bits, parameters, twins))
    assert first.state_dict()["tieopt"] == second.state_dict()["tieopt"]


@given(st.data())
def test_tying_is_an_orthogonal_projection(data: st.DataObject) -> None:
    parameters = [Parameter(normal(data.draw(shapes), torch.float64, data.draw(seeds))) for _ in range(2)]
    drawn = data.draw(ties(parameters))
    optimizer = TiedOptimizer(torch.optim.SGD(parameters), drawn)
    before = [normal(parameter.shape, torch.float64, data.draw(seeds)) for parameter in parameters]
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad.clone()
    optimizer.tie_gradients()
    g = torch.cat([grad.flatten() for grad in before])
    p = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert p.norm() <= g.norm() * (1 + 1e-12)
    assert abs(float((g - p) @ p)) <= 1e-12 * float(g @ g)


@pytest.mark.parametrize("kind", ["dense", "recorded", "sparse"])
@given(st.data())
def test_gradients_accumulate(kind: str, data: st.DataObject) -> None:
    starts = [normal(data.draw(shapes), torch.float64, data.draw(seeds)) for _ in range(2)]
    parameters = [Parameter(laid_out(start, data.draw(layouts(start)))) for start in starts]
    drawn, reduction = data.draw(ties(parameters)), data.draw(reductions)
    groups = _groups(drawn, parameters)
    optimizer = TiedOptimizer(torch.optim.SGD(parameters, lr=0.0), drawn, reduction=reduction)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for seed in data.draw(some_seeds):
        grads = [normal(parameter.shape, torch.float64, seed + i) for i, parameter in enumerate(parameters)]
        for parameter, grad in zip(parameters, grads, strict=True):
            added = grad.clone().requires_grad_() * 1 if kind == "recorded" else grad.clone()
            added = added.to_sparse(1) if kind == "sparse" and parameter.grad is None else added
            parameter.grad = added if parameter.grad is None else added + parameter.grad
        optimizer.step()
        total = slowly_tied_entries([one + grad for one, grad in zip(total, grads, strict=True)], groups)
        for parameter, one in zip(parameters, total, strict=True):
            torch.testing.assert_close(parameter.grad.detach().to_dense(), one, rtol=1e-10, atol=1e-10)


def test_the_default_device_does_not_matter(compact) -> None:
    params = [Parameter(torch.zeros(4, 4)), Parameter(torch.zeros(4)), Parameter(torch.zeros(400, 100))]
    pairs = torch.arange(400) // 2
    with torch.device("meta"):
        names, scale = patterns.antisymmetric((4, 4))
        ties = [Tie(params[0], names, scale=scale), Tie(params[1], [[0, 1]]), Tie(params[2], pairs)]
        optimizer = TiedOptimizer(torch.optim.SGD(params), ties, compact=compact)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.tie_drift() == 0
        assert optimizer.state_dict()["tieopt"]["ties"]
        assert len(optimizer.ties) == 3


@pytest.mark.parametrize("columns", [1, 100])
def test_the_default_dtype_does_not_matter(compact, columns) -> None:
    """bfloat16 has no 257."""
    rows = torch.arange(514) // 257
    weight = Parameter(torch.zeros(514, columns, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    with default_dtype(torch.bfloat16):
        TiedOptimizer(torch.optim.SGD([weight], lr=1.0), {weight: rows}, reduction="sum", compact=compact).step()
    assert torch.equal(weight, torch.full_like(weight, -257.0))


@given(st.data())
def test_gradients_with_a_graph_are_differentiable_in_any_layout(data: st.DataObject) -> None:
    starts = [normal(data.draw(shapes), torch.float64, data.draw(seeds)) for _ in range(2)]
    parameters = [Parameter(laid_out(start, data.draw(layouts(start)))) for start in starts]
    drawn = data.draw(ties(parameters))
    groups = _groups(drawn, parameters)
    optimizer = TiedOptimizer(torch.optim.SGD(parameters), drawn)
    sources = [normal(parameter.shape, torch.float64, data.draw(seeds)).requires_grad_() for parameter in parameters]
    for parameter, source in zip(parameters, sources, strict=True):
        parameter.grad = source * 1
    optimizer.tie_gradients()
    cotangents = [normal(parameter.shape, torch.float64, data.draw(seeds)) for parameter in parameters]
    handed = [laid_out(one, data.draw(layouts(one))) for one in cotangents]
    found = torch.autograd.grad([parameter.grad for parameter in parameters], sources, handed)
    for got, one in zip(found, slowly_tied_entries(cotangents, groups), strict=True):
        torch.testing.assert_close(got, one, rtol=1e-12, atol=1e-12)


@given(st.data())
def test_a_differentiable_step_ties_any_slices(data: st.DataObject) -> None:
    starts = [normal(data.draw(shapes), torch.float64, data.draw(seeds)).requires_grad_() for _ in range(2)]
    weights = [start * 1 for start in starts]
    drawn = data.draw(ties(weights))
    groups = _groups(drawn, weights)
    optimizer = TiedOptimizer(torch.optim.SGD(weights, lr=0.1, momentum=0.9, differentiable=True), drawn)
    for seed in data.draw(some_seeds):
        for number, weight in enumerate(weights):
            weight.grad = normal(weight.shape, torch.float64, seed + number)
        optimizer.step()
        _assert_members_agree(weights, groups)
    cotangents = [normal(weight.shape, torch.float64, data.draw(seeds)) for weight in weights]
    for got, one in zip(
        torch.autograd.grad(weights, starts, cotangents), slowly_tied_entries(cotangents, groups), strict=True
    ):
        torch.testing.assert_close(got, one, rtol=1e-12, atol=1e-12)


@given(st.data())
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(compact: bool, data: st.DataObject) -> None:
    parameters = _parameters(data, [torch.float32, torch.float64])
    recipe = data.draw(recipes_for(*parameters, closure=False))
    # The bare ones do not either: load_state_dict casts what they keep in float32 to the dtype of the parameter.
    casting = recipe.optimizer in (torch.optim.NAdam, torch.optim.ASGD)
    assume(not casting or parameters[0].dtype == torch.float32)
    drawn, reduction = data.draw(ties(parameters)), data.draw(reductions)
    assume(not (compact and recipe.matrices and _elementwise(drawn)))
    optimizer = TiedOptimizer(recipe(parameters), drawn, reduction=reduction, compact=compact)
    _steps(optimizer, parameters, data.draw(some_seeds))

    saved = io.BytesIO()
    torch.save([optimizer.state_dict(), [parameter.detach() for parameter in parameters]], saved)
    saved.seek(0)
    state, weights = torch.load(saved, weights_only=True)
    resumed = [Parameter(weight) for weight in weights]
    number = {id(parameter): one for parameter, one in zip(parameters, resumed, strict=True)}
    again = [
        Tie.join(*(Tie(number[id(part.param)], part.groups, dim=part.dim, scale=part.scale) for part in tie.parts))
        for tie in drawn
    ]
    other = TiedOptimizer(recipe(resumed), again, reduction=reduction, compact=compact)
    other.load_state_dict(state)
    after = data.draw(some_seeds)
    _steps(optimizer, parameters, after)
    _steps(other, resumed, after)
    assert all(map(same_bits, parameters, resumed))


@given(st.data())
def test_ties_that_share_an_entry_are_refused_and_nothing_is_written(compact: bool, data: st.DataObject) -> None:
    parameters = _parameters(data, REAL)
    drawn = data.draw(ties(parameters))
    covered = groups_of_entries(drawn[0], parameters)
    assume(covered)
    member = covered[0][0]
    names = torch.full((parameters[member[0]].numel(),), -1)
    names[member[1]] = 0
    clash = Tie(parameters[member[0]], names.view(parameters[member[0]].shape))
    before = [bits(parameter).clone() for parameter in parameters]
    with pytest.raises(ValueError, match="share no entry"):
        TiedOptimizer(torch.optim.SGD(parameters), [*drawn, clash], compact=compact)
    assert all(torch.equal(bits(parameter), one) for parameter, one in zip(parameters, before, strict=True))
