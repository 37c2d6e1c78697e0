"""Where a graph is to be kept, the projection is a part of it."""

import checks
import pytest
import torch
from checks import FREE, GROUPS, REDUCTIONS, SHAPE, bits, mean_gradient, parameter, randn, sum_gradient, tied_bitwise
from hypothesis import given
from hypothesis import strategies as st
from strategies import few_examples
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.optim import SGD, Adam

from tieopt import Tie, TiedOptimizer
from tieopt.numbers.reduction import projected

DOUBLE = torch.float64
ROWS = SHAPE[0]
LABELS = torch.tensor([0, 1, -1, 0, -1, 0, 1])
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
some_labels = st.lists(st.integers(-1, 3), min_size=ROWS, max_size=ROWS).map(torch.tensor)
seeds = st.integers(0, 2**20)


def index_of(labels, shape=SHAPE):
    (part,) = Tie(torch.zeros(shape), labels).parts
    return checks.index_of(part.groups, torch.zeros(shape))


def reduced(gradient, reduction):
    return mean_gradient(gradient) if reduction == "mean" else sum_gradient(gradient)


# --- the projection itself ---


@given(labels=some_labels, seed=seeds, dtype=st.sampled_from([DOUBLE, torch.complex128]))
def test_the_gradient_of_the_projection_is_right(labels, seed, dtype):
    index = index_of(labels)
    tensor = randn(*SHAPE, seed=seed, dtype=dtype).requires_grad_()

    assert gradcheck(lambda tensor: projected([tensor], lambda _: index)[0], [tensor])


@few_examples
@given(labels=some_labels, seed=seeds, dtype=st.sampled_from([DOUBLE, torch.complex128]))
def test_the_second_gradient_of_the_projection_is_right(labels, seed, dtype):
    index = index_of(labels)
    tensor = randn(*SHAPE, seed=seed, dtype=dtype).requires_grad_()

    # Squared, because the second gradient of what is linear is zero.
    assert gradgradcheck(lambda tensor: projected([tensor], lambda _: index)[0].square(), [tensor])


@few_examples
@given(labels=some_labels, seed=seeds)
def test_the_gradient_of_the_sum_is_right(labels, seed):
    index = index_of(labels)
    tensor = randn(*SHAPE, seed=seed, dtype=DOUBLE).requires_grad_()

    assert gradcheck(lambda tensor: projected([tensor], lambda _: index, "sum")[0], [tensor])
    assert gradgradcheck(lambda tensor: projected([tensor], lambda _: index, "sum")[0].square(), [tensor])


@given(labels=some_labels, seed=seeds)
def test_the_projection_is_its_own_backward(labels, seed):
    index = index_of(labels)
    tensor = randn(*SHAPE, seed=seed).requires_grad_()
    cotangent = randn(*SHAPE, seed=seed + 1)
    before = bits(tensor)
    (gradient,) = grad(projected([tensor], lambda _: index)[0], tensor, cotangent)

    assert torch.equal(bits(gradient), bits(projected([cotangent], lambda _: index)[0]))
    assert torch.equal(bits(tensor), before)


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last"])
def test_the_gradient_of_the_projection_is_right_in_any_memory_layout(layout):
    shape = (ROWS, 2, 3, 2)
    tensor = {
        "transposed": lambda: randn(2, 3, 2, ROWS, dtype=DOUBLE).permute(3, 0, 1, 2),
        "strided": lambda: randn(2 * ROWS, 2, 3, 2, dtype=DOUBLE)[::2],
        "channels_last": lambda: randn(*shape, dtype=DOUBLE).to(memory_format=torch.channels_last),
    }[layout]()
    index = index_of(LABELS, shape)

    assert gradcheck(lambda tensor: projected([tensor], lambda _: index)[0], [tensor.requires_grad_()])


# --- gradients with a graph (create_graph=True) ---


@reductions
def test_a_gradient_with_a_graph_is_tied_out_of_place_and_keeps_its_graph(reduction):
    weight = parameter(*SHAPE, dtype=DOUBLE)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS}, reduction=reduction)
    (gradient,) = grad(weight.pow(3).sum(), weight, create_graph=True)
    weight.grad = gradient
    before = bits(gradient)

    optimizer.tie_gradients()

    assert torch.equal(bits(gradient), before)
    assert weight.grad.grad_fn is not None
    assert tied_bitwise(weight.grad)
    (second,) = grad(weight.grad.square().sum(), weight)
    # The gradient of |P g|^2 by w is H P g times two, and H is 6 w on the diagonal.
    torch.testing.assert_close(second, 6 * weight.detach() * 2 * mean_gradient(gradient.detach()))


@reductions
def test_after_a_step_the_gradient_is_the_mean_and_still_has_its_graph(reduction):
    weight = parameter(*SHAPE, dtype=DOUBLE)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS}, reduction=reduction)
    start = weight.detach().clone()
    used = weight * 1.0
    (gradient,) = grad(used.pow(3).sum(), used, create_graph=True)
    weight.grad = gradient

    optimizer.step()

    assert weight.grad.grad_fn is not None
    torch.testing.assert_close(weight.grad.detach(), mean_gradient(gradient.detach()))
    torch.testing.assert_close(weight.detach(), start - 0.1 * reduced(gradient.detach(), reduction))
    assert tied_bitwise(weight)


class Curvature(SGD):
    """Differentiates the gradient again within the step, as second-order optimizers do."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
            (param,) = self.param_groups[0]["params"]
            (self.product,) = grad(param.grad, param, self.direction)
        self.seen = param.grad.detach().clone()
        with torch.no_grad():
            param.sub_(0.01 * self.product)


@reductions
def test_an_optimizer_that_differentiates_the_gradient_again_sees_the_tied_one(reduction):
    weight = parameter(*SHAPE, dtype=DOUBLE)
    optimizer = TiedOptimizer(Curvature([weight], lr=0.1), {weight: GROUPS}, reduction=reduction)
    optimizer.direction = randn(*SHAPE, seed=4, dtype=DOUBLE)
    start = weight.detach().clone()

    def closure():
        (weight.grad,) = grad(weight.pow(3).sum(), weight, create_graph=True)

    optimizer.step(closure)

    torch.testing.assert_close(optimizer.seen, reduced(3 * start.square(), reduction))
    torch.testing.assert_close(optimizer.product, 6 * start * reduced(optimizer.direction, reduction))
    assert tied_bitwise(weight)


def test_a_gradient_that_takes_part_in_a_graph_is_not_written_under_it():
    weight = parameter(*SHAPE, dtype=DOUBLE)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS})
    source = randn(*SHAPE, seed=1, dtype=DOUBLE).requires_grad_()
    weight.grad = source.square()
    penalty = weight.grad.square().sum()

    optimizer.tie_gradients()
    (gradient,) = grad(penalty, source)

    torch.testing.assert_close(gradient, 4 * source.detach() ** 3)


# --- differentiable=True ---


def tied_after_one_step(theta, start, reduction, make):
    """Weights after a differentiable tied step on a loss that depends on theta."""
    weight = start.clone()
    optimizer = TiedOptimizer(make([weight]), {weight: LABELS}, reduction=reduction)
    # On a copy, because the step writes over what the graph of the loss has kept.
    used = weight.clone()
    (weight.grad,) = grad(inner_loss(used, theta), used, create_graph=True)
    optimizer.step()
    return weight


def inner_loss(weight, theta):
    return (weight * theta).pow(3).sum() + (weight.sum(1) * theta.sum(1)).sin().sum()


def outer_loss(weight):
    return (weight * randn(*SHAPE, seed=8, dtype=DOUBLE)).pow(2).sum()


def shared_after_one_step(theta, start, reduction, rate):
    """The same with one shared row for each group, and one row for each free row, and plain descent."""
    names = torch.tensor([0, 1, 2, 0, 3, 0, 1])
    counts = torch.bincount(names).to(DOUBLE)[:, None]
    shared = torch.zeros(4, SHAPE[1], dtype=DOUBLE).index_add(0, names, start) / counts
    (gradient,) = grad(inner_loss(shared[names], theta), shared, create_graph=True)
    if reduction == "mean":
        gradient = gradient / counts
    return (shared - rate * gradient)[names]


@reductions
@given(seed=seeds)
def test_the_meta_gradient_through_a_tied_step_is_that_of_the_reparametrised_model(reduction, seed):
    theta = randn(*SHAPE, seed=seed, dtype=DOUBLE).requires_grad_()
    start = randn(*SHAPE, seed=seed + 1, dtype=DOUBLE).requires_grad_()

    def sgd(params):
        return SGD(params, lr=0.05, differentiable=True)

    tied = tied_after_one_step(theta, start, reduction, sgd)
    shared = shared_after_one_step(theta, start, reduction, 0.05)

    torch.testing.assert_close(tied, shared)
    assert tied_bitwise(tied)
    expected = grad(outer_loss(shared), [theta, start])
    torch.testing.assert_close(grad(outer_loss(tied), [theta, start]), expected)


@reductions
def test_the_meta_gradient_through_a_tied_step_passes_gradcheck(reduction):
    theta = randn(*SHAPE, seed=1, dtype=DOUBLE).requires_grad_()
    start = randn(*SHAPE, seed=2, dtype=DOUBLE).requires_grad_()

    def after(theta, start):
        return tied_after_one_step(
            theta, start, reduction, lambda params: SGD(params, lr=0.05, weight_decay=0.1, differentiable=True)
        )

    assert gradcheck(after, [theta, start])


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="SGD takes no learning rate with a graph")
def test_the_meta_gradient_reaches_a_learning_rate_that_is_a_tensor():
    rate = torch.tensor(0.05, dtype=DOUBLE, requires_grad=True)
    theta, start = randn(*SHAPE, seed=1, dtype=DOUBLE), randn(*SHAPE, seed=2, dtype=DOUBLE).requires_grad_()

    def descend(params):
        optimizer = SGD(params, lr=0.05, differentiable=True)
        optimizer.param_groups[0]["lr"] = rate
        return optimizer

    tied = tied_after_one_step(theta, start, "mean", descend)
    shared = shared_after_one_step(theta, start, "mean", rate)

    torch.testing.assert_close(grad(outer_loss(tied), rate), grad(outer_loss(shared), rate))


@reductions
@pytest.mark.parametrize(("inner", "steps"), [(SGD, 3), (Adam, 1)])
def test_differentiable_steps_keep_the_ties_and_the_graph_to_the_start(inner, steps, reduction):
    start = randn(*SHAPE, dtype=DOUBLE).requires_grad_()
    weight = start.clone()
    optimizer = TiedOptimizer(inner([weight], lr=0.01, differentiable=True), {weight: LABELS}, reduction=reduction)
    for _ in range(steps):
        current = weight.clone()
        (weight.grad,) = grad(current.pow(2).sum(), current, create_graph=True)
        optimizer.step()

        assert tied_bitwise(weight)
        assert weight.grad_fn is not None
    (gradient,) = grad(weight.sum(), start)

    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())
    assert tied_bitwise(gradient)


@reductions
def test_a_differentiable_step_leaves_free_rows_to_the_bare_optimizer(reduction):
    start = randn(*SHAPE, dtype=DOUBLE).requires_grad_()
    results = []
    for tie in (True, False):
        weight = start.clone()
        optimizer = Adam([weight], lr=0.01, differentiable=True)
        if tie:
            TiedOptimizer(optimizer, {weight: LABELS}, reduction=reduction)
        weight.grad = randn(*SHAPE, seed=1, dtype=DOUBLE)
        optimizer.step()
        results.append(weight)

    assert torch.equal(bits(results[0])[FREE], bits(results[1])[FREE])
    torch.testing.assert_close(*[grad(result[FREE].sum(), start)[0][FREE] for result in results])


def test_a_leaf_with_a_differentiable_optimizer_is_tied_where_it_lies():
    weight = parameter(*SHAPE)
    pointer = weight.data_ptr()
    optimizer = TiedOptimizer(SGD([weight], lr=0.1, differentiable=True), {weight: GROUPS})

    optimizer.tie_weights()

    assert weight.data_ptr() == pointer
    assert weight.is_leaf
    assert tied_bitwise(weight)


# --- a graph that was there before the step ---


def test_the_weights_after_a_step_carry_no_graph_and_can_be_used_at_once():
    weight = parameter(*SHAPE)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: GROUPS})
    for _ in range(3):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()

        assert weight.is_leaf
        assert weight.requires_grad
        assert tied_bitwise(weight)


def test_a_backward_through_weights_that_a_step_wrote_since_fails_as_it_does_for_the_bare_optimizer():
    messages = []
    for tie in (True, False):
        weight = parameter(*SHAPE)
        optimizer = SGD([weight], lr=0.1)
        if tie:
            TiedOptimizer(optimizer, {weight: GROUPS})
        loss = weight.square().sum()
        weight.grad = randn(*SHAPE, seed=1)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            loss.backward()
        messages.append(str(caught.value).split(":")[0])

    assert messages[0] == messages[1]


def test_weights_of_a_differentiable_optimizer_are_tied_within_their_graph():
    start = randn(*SHAPE, seed=1, dtype=torch.float64).requires_grad_()
    weight = start * 1
    optimizer = TiedOptimizer(SGD([weight], lr=0.1, differentiable=True), {weight: GROUPS})
    factor = randn(*SHAPE, seed=3, dtype=torch.float64)
    weight.mul_(factor)
    optimizer.tie_weights()
    cotangent = randn(*SHAPE, seed=2, dtype=torch.float64)
    (gradient,) = grad(weight, start, cotangent)
    expected = mean_gradient(factor * mean_gradient(cotangent))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert tied_bitwise(weight)
