"""The norm of gradients in which a shared value counts once, and clipping by it."""

import copy
import math

import pytest
import torch
from cases import every_pair
from checks import bits, one_tied, parameter, randn, same_bits, same_tree
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import CompactTraining, flat, groups_of_entries
from strategies import COMPLEX, REAL, few_examples, loss_of, normal, reductions, seeds
from test_sharded import SHARDED, TIES, batch, mesh_on, mlp, share_of, whole
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Embedding, Linear, Parameter, Sequential
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer

from tieopt import Tie, TiedOptimizer, is_tied
from tieopt.testing import labels, scales, ties

SHAPES = [(4, 3), (3, 4), (5,), (2, 3, 2)]
NORMS = (1.0, 2.0, 3, 0.5, math.inf)
norm_types = st.sampled_from(NORMS)
TOLERANCE = {dtype: 1e-12 if torch.finfo(dtype).bits == 64 else 1e-5 for dtype in (*REAL, *COMPLEX)}
TOLERANCE |= {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@st.composite
def drawn_parameters(draw, dtypes, kinds=("none", "signs", "zeros", "any")) -> tuple[list[Parameter], list[Tie]]:
    """Parameters with gradients, but for some; the last is in no tie."""
    dtype = draw(st.sampled_from(dtypes))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    params = [Parameter(normal(shape, dtype, draw(seeds))) for shape in shapes]
    drawn = draw(ties(params, kinds=kinds))
    params.append(Parameter(normal((3,), dtype, draw(seeds))))
    return params, drawn


def give_gradients(params: list[Parameter], seed: int, missing: set[int] = frozenset()) -> None:
    for number, param in enumerate(params):
        param.grad = None if number in missing else normal(param.shape, param.dtype, seed + number).to(param.device)


def slow_norm(params: list[Parameter], drawn: list[Tie], reduction: str, norm_type: float) -> float:
    """The norm of the gradients of shared values and free entries, by loops."""
    entries = [[0.0] * param.numel() if param.grad is None else flat(param.grad) for param in params]
    groups = [group for tie in drawn for group in groups_of_entries(tie, params)]
    tied = {member[:2] for group in groups for member in group}
    shared = []
    for group in groups:
        total = sum(scale * entries[number][position] for number, position, scale in group)
        squares = sum(scale * scale for _, _, scale in group)
        shared.append(total / squares if reduction == "mean" and squares else total)
    free = [value for n, values in enumerate(entries) for p, value in enumerate(values) if (n, p) not in tied]
    moduli = list(map(abs, shared + free))
    if norm_type == math.inf:
        return max(moduli)
    return math.fsum(modulus**norm_type for modulus in moduli) ** (1 / norm_type)


# --- the norm ---


@given(
    data=st.data(),
    drawn=drawn_parameters((*REAL, *COMPLEX)),
    norm_type=norm_types,
    reduction=reductions,
    tied_before=st.booleans(),
)
def test_the_norm_is_that_of_the_shared_values_and_nothing_is_written(
    device, compact, data, drawn, norm_type, reduction, tied_before
):
    params, drawn_ties = drawn
    for param in params:
        param.data = param.data.to(device)
    optimizer = TiedOptimizer(SGD(params), drawn_ties, reduction=reduction, compact=compact)
    dtype = params[0].dtype
    missing = data.draw(st.sets(st.integers(0, len(params) - 1), max_size=len(params) - 1))
    give_gradients(params, data.draw(st.integers(0, 2**31)), missing)
    if tied_before:
        optimizer.tie_gradients()
    before = copy.deepcopy([(param.detach(), param.grad) for param in params])
    grads = [param.grad for param in params]
    expected = slow_norm(params, drawn_ties, reduction, norm_type)

    norms = [optimizer.grad_norm(norm_type) for _ in range(2)]

    assert same_bits(*norms)
    assert norms[0].dim() == 0
    assert float(norms[0]) == pytest.approx(expected, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert same_tree([(param.detach(), param.grad) for param in params], before)


@given(data=st.data(), norm_type=norm_types)
def test_without_groups_it_is_torchs_norm_with_the_same_bits(compact, data, norm_type):
    dtype = data.draw(st.sampled_from((*REAL, *COMPLEX)))
    params = [Parameter(normal(shape, dtype, 0)) for shape in SHAPES]
    optimizer = TiedOptimizer(SGD(params), (), compact=compact)
    twins = copy.deepcopy(params)
    seed = data.draw(st.integers(0, 2**31))
    give_gradients(params, seed), give_gradients(twins, seed)

    norm = optimizer.clip_grad_norm_(0.1, norm_type)

    assert same_bits(norm, torch.nn.utils.clip_grad_norm_(twins, 0.1, norm_type))
    assert all(same_bits(param.grad, twin.grad) for param, twin in zip(params, twins, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_gradients_it_is_zero(reduction, compact):
    weight, optimizer = one_tied(reduction=reduction, compact=compact)
    for norm in (optimizer.grad_norm(), optimizer.clip_grad_norm_(1.0)):
        assert same_bits(norm, torch.tensor(0.0))
    assert weight.grad is None


def test_an_empty_parameter_counts_nothing(compact):
    params = [Parameter(torch.zeros(0, 3)), parameter(3, 2)]
    optimizer = TiedOptimizer(SGD(params), {params[1]: [[0, 1]]}, compact=compact)
    give_gradients(params, 0)
    params[1].grad.fill_(-3.0)
    assert optimizer.grad_norm(math.inf) == 3.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_gradient_that_is_not_finite_has_such_a_norm(value, norm_type, compact):
    weight, optimizer = one_tied(compact=compact)
    weight.grad = randn(*weight.shape)
    weight.grad[3, 1] = value
    assert torch.equal(optimizer.grad_norm(norm_type), torch.tensor(value)) or math.isnan(value)
    assert not optimizer.grad_norm(norm_type).isfinite()


def test_sums_beyond_the_range_of_half_precision_are_finite(compact):
    weight = Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = TiedOptimizer(SGD([weight]), {weight: [[0, 1, 2, 3]]}, reduction="sum", compact=compact)
    weight.grad = torch.full_like(weight, 60000.0)
    assert optimizer.grad_norm() == 4 * weight.grad[0].float()


@st.composite
def _ties_of_rows(draw, weight: Parameter) -> list[Tie]:
    """Two ties of rows, as far as they tie anything."""
    names, size = draw(labels(len(weight))), draw(scales((len(weight),)))
    halves = [names.masked_fill(names % 2 == rest, -1) for rest in range(2)]
    return [Tie(weight, half, scale=size) for half in halves if len(half[half >= 0]) > len(half[half >= 0].unique())]


def _of_another(tie: Tie, param: Parameter) -> Tie:
    return Tie.join(*(Tie(param, part.groups, dim=part.dim, scale=part.scale) for part in tie.parts))


@given(data=st.data(), reduction=reductions, norm_type=norm_types)
def test_sparse_gradients_have_the_norm_of_dense_ones_and_stay_sparse(compact, data, reduction, norm_type):
    weight, free = parameter(data.draw(st.integers(2, 9)), 3, dtype=torch.float64), parameter(4, 2, dtype=torch.float64)
    tied = data.draw(ties([weight]) | _ties_of_rows(weight))
    optimizer = TiedOptimizer(SGD([weight, free], lr=0.1), tied, reduction=reduction, compact=compact)
    seed = data.draw(seeds)
    for param in (weight, free):
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(param) - 1), min_size=1, max_size=5)))
        values = normal((len(chosen), param.shape[1]), torch.float64, seed)
        param.grad = torch.sparse_coo_tensor(chosen[None], values, param.shape)
    before = [param.grad.to_dense() for param in (weight, free)]
    dense = [Parameter(param.detach().clone()) for param in (weight, free)]
    for param, grad in zip(dense, before, strict=True):
        param.grad = grad
    expected = slow_norm(dense, [_of_another(tie, dense[0]) for tie in tied], reduction, norm_type)

    assert float(optimizer.grad_norm(norm_type)) == pytest.approx(expected, rel=1e-12)
    assert all(torch.equal(param.grad.to_dense(), grad) for param, grad in zip((weight, free), before, strict=True))
    optimizer.clip_grad_norm_(expected / 2, norm_type)
    assert weight.grad.is_sparse
    assert free.grad.is_sparse
    assert float(optimizer.grad_norm(norm_type)) == pytest.approx(expected / 2, rel=1e-4)


def test_members_of_relaxed_ties_count_for_themselves():
    weight, _ = one_tied()
    optimizer = TiedOptimizer(SGD([weight]), {weight: [[0, 3, 5]]}, strength=0.5, every=2)
    weight.grad = randn(*weight.shape)
    assert same_bits(optimizer.grad_norm(), torch.nn.utils.get_total_norm([weight.grad]))


def test_a_gradient_with_a_graph_has_a_norm_without(compact):
    weight, optimizer = one_tied(compact=compact)
    (weight.grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    assert weight.grad.requires_grad
    assert not optimizer.grad_norm().requires_grad


def test_the_norm_follows_parameters_and_ties_that_change(compact):
    weight, optimizer = one_tied(compact=compact, reduction="sum")
    weight.grad = torch.ones_like(weight)
    # Groups of three and of two, and two free rows, of five entries.
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(5 * (9 + 4 + 2)))
    weight.data = weight.data.double()
    weight.grad = torch.ones_like(weight)
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(5 * (9 + 4 + 2)), rel=1e-12)
    optimizer.retie({weight: [list(range(7))]})
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(5 * 49), rel=1e-12)
    optimizer.untie()
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(35), rel=1e-12)


# --- published cases ---


def test_two_members_with_gradient_one_move_by_one(compact):
    weight = Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = TiedOptimizer(SGD([weight], lr=1.0), {weight: [[0, 1]]}, reduction="sum", compact=compact)
    weight.grad = torch.ones_like(weight)
    assert optimizer.clip_grad_norm_(1.0) == 2
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_embedding_of_two_pipeline_stages_counts_once(compact):
    # The regression of https://github.com/NVIDIA/Megatron-LM/pull/7227: the input embedding of one pipeline stage and
    # the output weight of another are one weight, whose summed gradient has the norm sqrt(800), and not sqrt(1600) as
    # where both count. So have 200 entries with a gradient of 1 in each stage.
    embedding, output = (Parameter(torch.zeros(20, 10)) for _ in range(2))
    tie = Tie.join(*(Tie(param, torch.arange(20)) for param in (embedding, output)))
    optimizer = TiedOptimizer(SGD([embedding, output]), tie, reduction="sum", compact=compact)
    for param in (embedding, output):
        param.grad = torch.ones_like(param)
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(800))
    # Where the gradients of both stages were summed already, as after an all-reduce, that is the mean.
    optimizer = TiedOptimizer(SGD([embedding, output]), tie, reduction="mean", compact=compact)
    for param in (embedding, output):
        param.grad = torch.full_like(param, 2.0)
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(800))


def test_copies_of_an_embedding_and_a_head_train_as_the_weight_that_both_share(compact):
    def language_model(*, shared: bool) -> Sequential:
        model = Sequential(Embedding(11, 4), Linear(4, 4), Linear(4, 11, bias=False)).double()
        for seed, param in enumerate(model.parameters()):
            param.data = randn(*param.shape, seed=min(seed, 2), dtype=torch.float64)
        model[2].weight = model[0].weight if shared else Parameter(model[0].weight.detach().clone())
        return model

    shared, copies = language_model(shared=True), language_model(shared=False)
    plain = SGD(shared.parameters(), lr=0.5, momentum=0.9)
    tie = Tie.join(*(Tie(copies[layer].weight, torch.arange(11)) for layer in (0, 2)))
    inner = SGD(copies.parameters(), lr=0.5, momentum=0.9)
    tied = TiedOptimizer(inner, tie, reduction="sum", compact=compact)
    words = torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(0))
    for batch_of_words in words:
        for model, optimizer in ((shared, plain), (copies, tied)):
            optimizer.zero_grad()
            cross_entropy(model(batch_of_words[:-1]), batch_of_words[1:]).backward()
        norm, expected = tied.clip_grad_norm_(0.3), torch.nn.utils.clip_grad_norm_(shared.parameters(), 0.3)
        assert float(norm) == pytest.approx(float(expected), rel=1e-12)
        assert expected > 0.3
        tied.step(), plain.step()
        for layer in (0, 1, 2):
            torch.testing.assert_close(copies[layer].weight, shared[layer].weight, rtol=1e-12, atol=1e-12)


# --- clipped training is that of the shared parameter ---


def train_clipped(optimizer: Optimizer, shared: CompactTraining, params: list[Parameter], clips: list, seed: int):
    for step, (max_norm, norm_type) in enumerate(clips):
        optimizer.zero_grad()
        loss_of(params, seed + step).backward()
        norm = optimizer.clip_grad_norm_(max_norm, norm_type)
        optimizer.step()
        shared.optimizer.zero_grad()
        loss_of(shared.weights(), seed + step).backward()
        # torch knows no largest entry where there is none.
        filled = [param for param in shared.compact if param.numel()]
        assume(filled)
        expected = torch.nn.utils.clip_grad_norm_(filled, max_norm, norm_type)
        shared.optimizer.step()
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=1e-12)
        for weight, other in zip(params, shared.weights(), strict=True):
            torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [SGD, Adam])
@few_examples
@given(data=st.data(), reduction=reductions)
def test_clipped_training_is_that_of_the_shared_parameter(compact, inner, data, reduction):
    # Adam in the full mode follows members of scales -1, 0 and 1 alone.
    kinds = ("none", "signs", "zeros") if inner is Adam and not compact else ("none", "signs", "zeros", "any")
    params, drawn = data.draw(drawn_parameters([torch.float64], kinds))
    # Starts tied, as the reference has to.
    TiedOptimizer(SGD(params), drawn).untie()
    # Moments of Adam that begin from gradients near zero magnify what is rounded.
    build = (lambda p: inner(p, lr=0.01)) if inner is SGD else (lambda p: inner(p, lr=0.01, eps=1e-3))
    shared = CompactTraining(params, drawn, build, reduction)
    optimizer = TiedOptimizer(build(params), drawn, reduction=reduction, compact=compact)
    clip = st.tuples(st.sampled_from([0.01, 0.3, 1.0, 1e3, math.inf]), norm_types)
    clips = data.draw(st.lists(clip, min_size=3, max_size=6))
    train_clipped(optimizer, shared, params, clips, data.draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_second_call_clips_no_more_and_accumulated_gradients_are_clipped_as_a_whole(reduction, compact):
    once, first = one_tied(reduction=reduction, compact=compact)
    twice, second = one_tied(reduction=reduction, compact=compact)
    for seed in range(3):
        for weight in (once, twice):
            weight.grad = randn(*weight.shape, seed=seed) + (0 if weight.grad is None else weight.grad)
    norms = [optimizer.clip_grad_norm_(0.5) for optimizer in (first, second)]
    assert same_bits(*norms)
    assert float(second.clip_grad_norm_(0.5)) == pytest.approx(0.5, rel=1e-4)
    # torch adds 1e-6 to the norm, which is what the second call may clip.
    torch.testing.assert_close(once.grad, twice.grad, rtol=1e-5, atol=0)
    second.tie_gradients()
    assert float(second.grad_norm()) == pytest.approx(0.5, rel=1e-4)
    first.step(), second.step()
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_in_a_closure(compact):
    reduction = "sum" if compact else "mean"
    weight, optimizer = one_tied(torch.optim.LBFGS, reduction=reduction, compact=compact, max_iter=3)
    norms = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum() / 2
        loss.backward()
        expected = slow_norm([weight], list(optimizer.ties), reduction, 2.0)
        assert float(optimizer.clip_grad_norm_(0.1)) == pytest.approx(expected, rel=1e-5)
        norms.append(float(optimizer.grad_norm()))
        return loss

    optimizer.step(closure)
    assert norms == pytest.approx([0.1] * len(norms), rel=1e-4)
    assert len(norms) == 3
    assert is_tied(weight, [[0, 3, 5], [1, 6]])


@pytest.mark.host("GradScaler", "`clip_grad_norm_` of the tied optimizer")
@pytest.mark.parametrize("overflow", [False, True])
def test_unscaled_gradients_are_clipped(overflow, compact):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight, optimizer = one_tied(reduction="sum", compact=compact, lr=1.0)
    twin, other = one_tied(reduction="sum", compact=compact, lr=1.0)
    factor = randn(*weight.shape)
    if overflow:
        factor[0, 0] = math.inf
    before = bits(weight)
    scaler.scale((weight * factor).sum()).backward()
    scaler.unscale_(optimizer)
    norm = optimizer.clip_grad_norm_(0.1)
    scaler.step(optimizer)
    if overflow:
        assert torch.equal(bits(weight), before)
        return
    (twin * factor).sum().backward()
    torch.testing.assert_close(norm, other.clip_grad_norm_(0.1))
    other.step()
    torch.testing.assert_close(weight, twin)


# --- shards ---


def clipped_steps(how: str | None, kind: str, reduction: str, norm_type: float) -> tuple[list[float], list[Tensor]]:
    """The norms of three steps, and the weights after them; of whole parameters if ``how`` is None."""
    model, share = mlp(), slice(None)
    if how:
        SHARDED[how](model, torch.distributed.get_world_size())
        share = share_of(how)
    optimizer = TiedOptimizer(AdamW(model.parameters(), lr=0.01), TIES[kind](model), reduction=reduction)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        inputs, targets = batch(step)
        (model(inputs[share]) - targets[share]).square().mean().backward()
        norms.append(optimizer.clip_grad_norm_(0.01, norm_type))
        assert not isinstance(norms[-1], DTensor)
        torch.testing.assert_close(optimizer.grad_norm(norm_type), norms[-1].new_tensor(0.01), rtol=1e-3, atol=0)
        optimizer.step()
    return list(map(float, norms)), whole(model)


@every_pair(
    how=[
        pytest.param(how, marks=pytest.mark.host("FSDP2", "`clip_grad_norm_` of the tied optimizer")) for how in SHARDED
    ],
    kind=TIES,
    reduction=["mean", "sum"],
    norm_type=[2.0, 1.0, math.inf],
)
def test_ranks_have_the_norm_of_one_process(two_ranks, how, kind, reduction, norm_type):
    norms, weights = clipped_steps(None, kind, reduction, norm_type)
    for own_norms, own_weights in two_ranks.run(clipped_steps, how, kind, reduction, norm_type):
        assert own_norms == pytest.approx(norms, rel=1e-12)
        torch.testing.assert_close(own_weights, weights, rtol=1e-12, atol=1e-12)


def norm_on(ranks: tuple[int, ...], placement, norm_type: float) -> float:
    mesh = mesh_on(ranks)
    tied, free, plain = (randn(*shape, dtype=torch.float64) for shape in ((3, 2), (1, 4), (4,)))
    params = [Parameter(distribute_tensor(full, mesh, [placement])) for full in (tied, free)] + [Parameter(plain)]
    optimizer = TiedOptimizer(SGD(params), {params[0]: [[0, 2]]}, reduction="sum")
    for seed, param in enumerate(params):
        grad = randn(*param.shape, seed=seed, dtype=torch.float64)
        param.grad = grad if seed == 2 else distribute_tensor(grad, mesh, [placement])
    return float(optimizer.clip_grad_norm_(0.5, norm_type))


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_shards_without_entries_and_whole_parameters_are_in_one_norm(two_ranks, placement, norm_type):
    params = [Parameter(randn(*shape, dtype=torch.float64)) for shape in ((3, 2), (1, 4), (4,))]
    for seed, param in enumerate(params):
        param.grad = randn(*param.shape, seed=seed, dtype=torch.float64)
    expected = slow_norm(params, [Tie(params[0], [[0, 2]])], "sum", norm_type)
    assert two_ranks.run(norm_on, (0, 1), placement, norm_type) == pytest.approx([expected] * 2, rel=1e-12)


@pytest.mark.parametrize("norm_type", NORMS)
def test_a_rank_outside_the_mesh_has_the_norm_of_its_whole_parameters(two_ranks, norm_type):
    inside, outside = two_ranks.run(norm_on, (0,), Shard(0), norm_type)
    plain = Parameter(torch.zeros(4, dtype=torch.float64))
    plain.grad = randn(4, seed=2, dtype=torch.float64)
    assert outside == pytest.approx(slow_norm([plain], [], "sum", norm_type), rel=1e-12)
    assert inside > outside


# --- what is refused, and what is kept ---


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.nan, "1.0", None, True, [1.0], 1j, torch.ones(2)])
def test_a_maximum_that_is_no_norm_is_refused(value, compact):
    weight, optimizer = one_tied(compact=compact)
    weight.grad = randn(*weight.shape)
    before = bits(weight.grad)
    kind = ValueError if isinstance(value, float) else TypeError
    with pytest.raises(kind, match=r"max_norm(.|\n)*Expected: a number from 0 on(.|\n)*Got: "):
        optimizer.clip_grad_norm_(value)
    assert torch.equal(bits(weight.grad), before)


@pytest.mark.parametrize("value", [0, 0.0, -2.0, math.nan, "inf", None, True, 2j])
def test_a_type_that_is_no_norm_is_refused(value, compact):
    weight, optimizer = one_tied(compact=compact)
    weight.grad = randn(*weight.shape)
    before = bits(weight.grad)
    kind = ValueError if isinstance(value, (int, float)) and value is not True else TypeError
    for call in (optimizer.grad_norm, lambda norm_type: optimizer.clip_grad_norm_(1.0, norm_type)):
        with pytest.raises(kind, match=r"norm_type(.|\n)*Expected: a number above 0(.|\n)*Got: "):
            call(value)
    assert torch.equal(bits(weight.grad), before)


def test_a_maximum_of_zero_clips_to_zero(compact):
    weight, optimizer = one_tied(compact=compact)
    weight.grad = randn(*weight.shape)
    optimizer.clip_grad_norm_(0)
    assert not weight.grad.any()


class Clipping(SGD):
    """An optimizer with methods of the same names."""

    def grad_norm(self, loss: Tensor) -> str:
        return f"its own, of {loss}"

    def clip_grad_norm_(self) -> str:
        return "its own"


def test_an_optimizer_keeps_its_own_methods(compact):
    weight, optimizer = one_tied(Clipping, reduction="sum", compact=compact)
    weight.grad = torch.ones_like(weight)
    assert (optimizer.grad_norm("a loss"), optimizer.clip_grad_norm_()) == ("its own, of a loss", "its own")
    assert float(TiedOptimizer.grad_norm(optimizer)) == pytest.approx(math.sqrt(5 * (9 + 4 + 2)))
    TiedOptimizer.clip_grad_norm_(optimizer, 1.0)
    assert float(TiedOptimizer.grad_norm(optimizer)) == pytest.approx(1.0, rel=1e-4)
