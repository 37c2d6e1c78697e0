"""Promise 7: tying is the orthogonal projection onto the tied tensors: linear, symmetric, a contraction."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import entries_of, slowly_tied
from strategies import (
    generator,
    labels,
    laid_out,
    layouts,
    normal,
    recipes_for,
    reductions_for,
    seeds,
    shapes,
    small_shapes,
    spelled,
)
from torch import Tensor
from torch.nn import Parameter

from tieopt import TiedOptimizer, is_tied, tie_

DOUBLE = st.sampled_from([torch.float64, torch.complex128])


def _dot(first: Tensor, second: Tensor) -> float:
    """The real inner product, which is the one of the real and imaginary parts as entries of their own."""
    return float((first.conj() * second).real.sum())


def _space(data: st.DataObject, device: torch.device) -> tuple[Tensor, Tensor, object]:
    """Two tensors of one shape and layout, and a grouping of their slices."""
    shape = data.draw(shapes(wide=True, empty=True))
    dtype = data.draw(DOUBLE)
    x, y = (normal(shape, dtype, data.draw(seeds)).to(device) for _ in range(2))
    layout = data.draw(layouts(x, lazy=True))
    return laid_out(x, layout), laid_out(y, layout), data.draw(spelled(data.draw(labels(shape[0]))))


@given(st.data())
def test_tying_is_linear(device: torch.device, data: st.DataObject) -> None:
    x, y, groups = _space(data, device)
    a, b = data.draw(st.floats(-5, 5)), data.draw(st.floats(-5, 5))
    combined = tie_(a * x + b * y, groups)
    torch.testing.assert_close(combined, a * tie_(x, groups) + b * tie_(y, groups), rtol=1e-12, atol=1e-13)


@given(st.data())
def test_tying_is_symmetric(device: torch.device, data: st.DataObject) -> None:
    x, y, groups = _space(data, device)
    size = float(x.norm() * y.norm())
    tied_x, tied_y = tie_(x.clone(), groups), tie_(y.clone(), groups)
    assert abs(_dot(tied_x, y) - _dot(x, tied_y)) <= 1e-12 * size


def _norm(tensor: Tensor) -> float:
    """The Euclidean norm; added up exactly, because torch's error depends on the layout in memory."""
    return math.sqrt(math.fsum(entry * entry for slice_ in entries_of(tensor) for entry in slice_))


@given(st.data())
def test_tying_is_a_contraction_with_the_rest_at_a_right_angle(device: torch.device, data: st.DataObject) -> None:
    x, _, groups = _space(data, device)
    tied = tie_(x.clone(), groups)
    size = _norm(x)
    assert _norm(tied) <= size * (1 + 1e-14)
    assert abs(_dot(x - tied, tied)) <= 1e-12 * size**2


@given(st.data())
def test_nothing_tied_is_nearer_than_the_projection(device: torch.device, data: st.DataObject) -> None:
    x, y, groups = _space(data, device)
    tied, other = tie_(x.clone(), groups), tie_(y.clone(), groups)
    assert is_tied(other, groups)
    assert _norm(x - tied) <= _norm(x - other) * (1 + 1e-14)


@given(st.data())
def test_gradients_are_projected(device: torch.device, compact: bool, data: st.DataObject) -> None:
    grad, _, groups = _space(data, device)
    parameter = Parameter(torch.zeros_like(grad, memory_format=torch.contiguous_format))
    recipe = data.draw(recipes_for(parameter))
    parameter.grad = grad.resolve_conj().resolve_neg().clone()
    reduction = data.draw(reductions_for(recipe, compact))
    TiedOptimizer(recipe([parameter]), {parameter: groups}, reduction=reduction, compact=compact).tie_gradients()
    assert is_tied(parameter.grad, groups)
    assert abs(_dot(grad - parameter.grad, parameter.grad)) <= 1e-12 * float(grad.norm()) ** 2


def test_a_gradient_is_projected_where_it_lies_in_memory(compact: bool) -> None:
    buckets = normal((3, 4, 2), torch.float64, 0)
    weight = Parameter(torch.zeros(4, 3, dtype=torch.float64))
    weight.grad = buckets[..., 1].T
    expected = torch.stack([buckets[..., 0], tie_(weight.grad.clone(), [[0, 2, 3]]).T], dim=-1)
    TiedOptimizer(torch.optim.SGD([weight]), {weight: [[0, 2, 3]]}, compact=compact).tie_gradients()
    torch.testing.assert_close(buckets, expected)


@given(st.data())
def test_sparse_gradients_are_projected_as_dense_ones(device: torch.device, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 30)), *data.draw(small_shapes))
    names = data.draw(labels(shape[0]))
    sparse_dim = data.draw(st.integers(1, len(shape)))
    stored = data.draw(st.integers(0, 8))
    source = generator(data.draw(seeds))
    indices = torch.stack([torch.randint(size, (stored,), generator=source) for size in shape[:sparse_dim]])
    values = normal((stored, *shape[sparse_dim:]), torch.float64, data.draw(seeds))
    grad = torch.sparse_coo_tensor(indices, values, shape)
    parameter = Parameter(torch.zeros(shape, dtype=torch.float64, device=device))
    optimizer = TiedOptimizer(torch.optim.SGD([parameter]), {parameter: data.draw(spelled(names))})
    parameter.grad = grad.to(device)
    optimizer.tie_gradients()
    assert parameter.grad.layout == torch.sparse_coo
    torch.testing.assert_close(
        parameter.grad.to_dense().cpu(), slowly_tied(grad.to_dense(), names), rtol=1e-12, atol=1e-14
    )


@given(st.data())
def test_a_gradient_with_a_graph_is_projected_and_so_is_what_flows_back(
    device: torch.device, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    groups = data.draw(spelled(data.draw(labels(shape[0]))))
    start, incoming = (normal(shape, torch.float64, data.draw(seeds)).to(device) for _ in range(2))
    parameter = Parameter(torch.zeros_like(start))
    optimizer = TiedOptimizer(torch.optim.SGD([parameter]), {parameter: groups})
    source = start.clone().requires_grad_()
    parameter.grad = source * 1.0
    optimizer.tie_gradients()
    parameter.grad.backward(incoming)
    assert torch.equal(parameter.grad.detach(), tie_(start, groups))
    assert torch.equal(source.grad, tie_(incoming, groups))
