"""Sparse COO gradients, as ``Embedding(sparse=True)`` gives: touched groups as a whole, and nothing else."""

import pytest
import torch
from checks import REDUCTIONS, bits, index_of, parameter, randn, same_bits, tied_bitwise
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import embedding
from torch.optim import SGD, Adagrad, SparseAdam
from torch.utils._python_dispatch import TorchDispatchMode

from tieopt import TiedOptimizer, tie_
from tieopt.numbers.reduction import projected
from tieopt.numbers.sparse import TiedRows, projected_sparse
from tieopt.ties.slices import Slices, numbered

ROWS, COLUMNS = 12, 4
GROUPS = [[0, 3, 5], [1, 7], [2, 8, 9, 11]]
FREE = [4, 6, 10]
GROUP_OF = {member: group for group in GROUPS for member in group}
INNER = {
    "SGD": lambda params: SGD(params, lr=0.1),
    "SGD-momentum": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "Adagrad": lambda params: Adagrad(params, lr=0.1),
    "SparseAdam": lambda params: SparseAdam(params, lr=0.1),
}
inner_names = pytest.mark.parametrize("inner", INNER)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)

row_lists = st.lists(st.integers(0, ROWS - 1), max_size=10)
seeds = st.integers(0, 2**20)


def tied(inner="SGD", reduction="mean", dtype=torch.float32, compact=False):
    weight = parameter(ROWS, COLUMNS, dtype=dtype)
    return weight, TiedOptimizer(INNER[inner]([weight]), {weight: GROUPS}, reduction=reduction, compact=compact)


def gradient(rows, seed=1, dtype=torch.float32):
    """A hybrid gradient, one sparse dimension and one dense; rows may occur more than once."""
    values = randn(len(rows), COLUMNS, seed=seed, dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, (ROWS, COLUMNS))


def with_whole_groups(rows):
    """The rows, and the other members of their groups."""
    return sorted({member for row in rows for member in GROUP_OF.get(row, [row])})


def stored_rows(sparse):
    assert sparse.layout == torch.sparse_coo
    return sorted(set(sparse.coalesce().indices()[0].tolist()))


def dense_result(sparse, reduction="mean"):
    """What the dense projection gives."""
    result = tie_(sparse.to_dense(), GROUPS)
    if reduction == "sum":
        for group in GROUPS:
            result[group] *= len(group)
    return result


# --- tie_gradients ---


@given(rows=row_lists, seed=seeds)
def test_every_member_of_a_touched_group_gets_the_mean_and_nothing_else_is_stored(rows, seed):
    weight, optimizer = tied()
    weight.grad = given_gradient = gradient(rows, seed)
    expected, before = dense_result(given_gradient), bits(weight)

    optimizer.tie_gradients()

    assert stored_rows(weight.grad) == with_whole_groups(rows)
    assert weight.grad.coalesce().indices().shape[1] == len(with_whole_groups(rows))
    torch.testing.assert_close(weight.grad.to_dense(), expected)
    assert tied_bitwise(weight.grad.to_dense(), GROUPS)
    assert torch.equal(bits(weight), before)


@given(rows=row_lists, seed=seeds)
def test_free_rows_of_a_sparse_gradient_are_untouched_to_the_last_bit(rows, seed):
    weight, optimizer = tied()
    weight.grad = gradient(rows, seed)
    before = bits(weight.grad.coalesce().to_dense()[FREE])

    optimizer.tie_gradients()

    assert torch.equal(bits(weight.grad.to_dense()[FREE]), before)


@given(rows=row_lists, seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_tying_a_sparse_gradient_twice_changes_no_bit(rows, seed, dtype):
    weight, optimizer = tied(dtype=dtype)
    weight.grad = gradient(rows, seed, dtype)
    optimizer.tie_gradients()
    once = weight.grad.clone()

    optimizer.tie_gradients()

    assert same_bits(weight.grad, once)


@given(rows=row_lists, columns=st.lists(st.integers(0, COLUMNS - 1), min_size=10, max_size=10), seed=seeds)
def test_a_gradient_that_is_sparse_in_both_dimensions_is_tied_entry_by_entry(rows, columns, seed):
    weight, optimizer = tied()
    columns = columns[: len(rows)]
    where = torch.tensor([rows, columns], dtype=torch.int64)
    weight.grad = torch.sparse_coo_tensor(where, randn(len(rows), seed=seed), (ROWS, COLUMNS))
    expected = dense_result(weight.grad)

    optimizer.tie_gradients()

    stored = set(map(tuple, weight.grad.coalesce().indices().T.tolist()))
    wanted = {
        (member, column) for row, column in zip(rows, columns, strict=True) for member in GROUP_OF.get(row, [row])
    }
    assert weight.grad.sparse_dim() == 2
    assert stored == wanted
    # Entries of free rows are left as they are, also if one of them is stored in several parts.
    assert weight.grad._nnz() <= len(rows) + len(wanted)
    torch.testing.assert_close(weight.grad.to_dense(), expected)
    assert tied_bitwise(weight.grad.to_dense(), GROUPS)


@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
@pytest.mark.parametrize("shape", [(6, 3, 2), (6, 1, 5)])
def test_a_gradient_of_three_dimensions_is_tied_whichever_of_them_are_sparse(shape, sparse_dim):
    groups = [[0, 4], [1, 2, 5]]
    weight = parameter(*shape)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: groups})
    full = randn(*shape, seed=1)
    full[4:] = 0
    full[1, 0] = 0
    weight.grad = full.to_sparse(sparse_dim)

    optimizer.tie_gradients()

    assert weight.grad.sparse_dim() == sparse_dim
    torch.testing.assert_close(weight.grad.to_dense(), tie_(full.clone(), groups))
    assert tied_bitwise(weight.grad.to_dense(), groups)


def test_a_vector_with_a_sparse_gradient_is_tied():
    weight = parameter(6)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: [[0, 4], [1, 2, 5]]})
    weight.grad = torch.sparse_coo_tensor([[4, 3]], [2.0, 5.0], (6,))

    optimizer.tie_gradients()

    assert weight.grad.to_dense().tolist() == [1.0, 0.0, 0.0, 5.0, 1.0, 0.0]
    assert weight.grad._nnz() == 3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_sparse_gradient_is_tied(dtype):
    weight, optimizer = tied(dtype=dtype)
    weight.grad = gradient([3, 8, 3, 4], dtype=dtype)
    expected = dense_result(weight.grad)

    optimizer.tie_gradients()

    torch.testing.assert_close(weight.grad.to_dense(), expected)
    assert tied_bitwise(weight.grad.to_dense(), GROUPS)


@reductions
@pytest.mark.parametrize("rows", [[], [4], [4, 10, 4]], ids=["nothing", "a free row", "free rows"])
def test_a_gradient_that_touches_no_group_is_left_as_it_is(compact, rows, reduction):
    weight, optimizer = tied(reduction=reduction, compact=compact)
    weight.grad = gradient(rows)
    expected, start = gradient(rows).coalesce(), weight.detach().clone()

    optimizer.step()

    assert same_bits(weight.grad, expected)
    torch.testing.assert_close(weight.detach(), start - 0.1 * expected.to_dense())


def test_entries_that_are_stored_as_zero_count_as_touched():
    weight, optimizer = tied()
    weight.grad = torch.sparse_coo_tensor([[7]], torch.zeros(1, COLUMNS), (ROWS, COLUMNS))

    optimizer.tie_gradients()

    assert stored_rows(weight.grad) == [1, 7]


def test_duplicates_of_an_uncoalesced_gradient_are_added_before_the_mean():
    weight, optimizer = tied()
    weight.grad = torch.sparse_coo_tensor([[1, 1, 7]], torch.tensor([[1.0], [2.0], [5.0]]).expand(3, 4), (12, 4))
    assert not weight.grad.is_coalesced()

    optimizer.tie_gradients()

    assert weight.grad.to_dense()[1].tolist() == weight.grad.to_dense()[7].tolist() == [4.0] * 4


# --- step ---


@inner_names
@reductions
def test_touched_groups_move_together_and_the_rest_does_not_move_at_all(compact, inner, reduction):
    weight, optimizer = tied(inner, reduction, compact=compact)
    before = bits(weight)
    rows = [3, 4, 3, 11]
    weight.grad = gradient(rows)

    optimizer.step()

    touched = with_whole_groups(rows)
    rest = [row for row in range(ROWS) if row not in touched]
    assert tied_bitwise(weight, GROUPS)
    assert torch.equal(bits(weight)[rest], before[rest])
    assert all(not torch.equal(bits(weight)[row], before[row]) for row in touched)
    assert stored_rows(weight.grad) == (sorted(set(rows)) if compact else touched)


@inner_names
@reductions
def test_many_steps_keep_the_ties_and_leave_untouched_groups_to_the_last_bit(compact, inner, reduction):
    weight, optimizer = tied(inner, reduction, compact=compact)
    before = bits(weight)
    for step in range(8):
        optimizer.zero_grad()
        weight.grad = gradient([[3, 4], [0, 0, 8], [], [5, 2, 9, 11]][step % 4], seed=step)
        optimizer.step()

        assert tied_bitwise(weight, GROUPS)
    untouched = [*GROUPS[1], 6, 10]
    assert torch.equal(bits(weight)[untouched], before[untouched])


@reductions
@pytest.mark.parametrize("inner", ["SGD", "Adagrad"])
def test_a_step_on_a_sparse_gradient_agrees_with_the_step_on_the_dense_one(compact, inner, reduction):
    weight, optimizer = tied(inner, reduction, compact=compact)
    other, reference = tied(inner, reduction, compact=compact)
    for step in range(5):
        weight.grad = gradient([3, 8, 4, 8, 1], seed=step)
        other.grad = weight.grad.to_dense()
        optimizer.step()
        reference.step()

        torch.testing.assert_close(weight.detach(), other.detach())
        torch.testing.assert_close(weight.grad.to_dense(), other.grad)


@inner_names
@reductions
def test_the_step_is_that_of_the_bare_optimizer_on_the_reduced_gradient(compact, inner, reduction):
    weight, optimizer = tied(inner, reduction, compact=compact)
    other = torch.nn.Parameter(weight.detach().clone())
    bare = INNER[inner]([other])
    for step in range(4):
        rows = [[3, 8, 4, 8], [1, 0]][step % 2]
        weight.grad = gradient(rows, seed=step)
        touched = with_whole_groups(rows)
        reduced = dense_result(gradient(rows, seed=step), reduction)[touched]
        other.grad = torch.sparse_coo_tensor(torch.tensor([touched]), reduced, (ROWS, COLUMNS))
        optimizer.step()
        bare.step()

        torch.testing.assert_close(weight.detach(), other.detach())


@inner_names
@given(rows=row_lists, seed=seeds)
def test_after_a_step_with_the_sum_the_mean_is_in_the_gradient(inner, rows, seed):
    weight, optimizer = tied(inner, "sum")
    weight.grad = gradient(rows, seed)
    other, reference = tied(inner, "sum")
    other.grad = gradient(rows, seed)
    reference.tie_gradients()

    optimizer.step()

    assert same_bits(weight.grad, other.grad)


@reductions
def test_sparse_gradients_accumulate_over_steps_as_those_of_the_shared_row_would(reduction):
    weight, optimizer = tied(reduction=reduction)
    start, total = weight.detach().clone(), torch.zeros(ROWS, COLUMNS)
    moved = torch.zeros(ROWS, COLUMNS)
    for step in range(3):
        loss = (embedding(torch.tensor([3, 8, 4, 7]), weight, sparse=True) * randn(4, COLUMNS, seed=step)).sum()
        loss.backward()
        total.index_add_(0, torch.tensor([3, 8, 4, 7]), randn(4, COLUMNS, seed=step))
        moved -= 0.1 * dense_result(total.to_sparse(1), reduction)
        optimizer.step()

    torch.testing.assert_close(weight.detach(), start + moved)


@inner_names
@reductions
def test_an_embedding_with_sparse_gradients_trains_with_tied_rows(compact, inner, reduction):
    layer = torch.nn.Embedding(ROWS, COLUMNS, sparse=True)
    with torch.no_grad():
        layer.weight.copy_(randn(ROWS, COLUMNS))
    optimizer = TiedOptimizer(
        INNER[inner](layer.parameters()), {layer.weight: GROUPS}, reduction=reduction, compact=compact
    )
    target = randn(ROWS, COLUMNS, seed=5)
    losses = []
    for step in range(12):
        words = torch.tensor([[step % ROWS, 3], [(5 * step) % ROWS, 3]])
        optimizer.zero_grad()
        loss = (layer(words) - target[words]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append((layer.weight - target).square().mean().item())

        assert layer.weight.grad.is_sparse
        assert tied_bitwise(layer.weight, GROUPS)
    assert losses[-1] < losses[0]


@reductions
def test_dense_and_sparse_gradients_may_alternate(compact, reduction):
    weight, optimizer = tied("SGD", reduction, compact=compact)
    for step in range(4):
        sparse = gradient([3, 8, 4], seed=step)
        weight.grad = sparse if step % 2 else sparse.to_dense()
        optimizer.step()

        assert tied_bitwise(weight, GROUPS)
        assert weight.grad.is_sparse == bool(step % 2)


def test_the_sparse_tensor_that_the_user_holds_is_not_written(compact):
    weight, optimizer = tied(reduction="sum", compact=compact)
    weight.grad = held = gradient([3, 8, 4]).coalesce()
    before = held.clone()

    optimizer.step()

    assert same_bits(held, before)


# --- nothing is densified ---


class Largest(TorchDispatchMode):
    """The largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self.entries = max(self.entries, value.numel())
        return result


@reductions
def test_no_tensor_of_the_size_of_the_parameter_is_made_to_tie_a_sparse_gradient(reduction):
    rows = 5000
    weight = parameter(rows, 64)
    optimizer = TiedOptimizer(SGD([weight], lr=0.1), {weight: [[2 * row, 2 * row + 1] for row in range(rows // 2)]})
    touched = torch.tensor([[7, 4000, 12]])
    for step in range(2):
        weight.grad = torch.sparse_coo_tensor(touched, randn(3, 64, seed=step), (rows, 64))
        with Largest() as largest:
            optimizer.tie_gradients()

        assert stored_rows(weight.grad) == [6, 7, 12, 13, 4000, 4001]
        assert 6 * 64 <= largest.entries <= rows


@reductions
def test_free_rows_that_occur_several_times_are_trained_as_by_the_bare_optimizer(compact, reduction):
    rows = torch.tensor([4, 6, 4, 0, 6, 4, 7, 0, 10, 4])
    values = randn(len(rows), COLUMNS, seed=3)
    weight, optimizer = tied(reduction=reduction, compact=compact)
    alone = torch.nn.Parameter(weight.detach().clone())
    bare = SGD([alone], lr=0.1)
    for param, each in ((weight, optimizer), (alone, bare)):
        param.grad = torch.sparse_coo_tensor(rows[None], values, (ROWS, COLUMNS))
        each.step()
    assert same_bits(weight[FREE], alone[FREE])
    assert not same_bits(weight[[3]], alone[[3]])  # tied to row 0


@reductions
def test_the_graph_of_a_sparse_gradient_is_kept(reduction):
    rows = torch.tensor([[4, 0, 4, 7]])
    values = randn(4, COLUMNS, seed=5, dtype=torch.float64).requires_grad_()
    weights = randn(ROWS, COLUMNS, seed=6, dtype=torch.float64)
    index = index_of(labels_of(GROUPS), torch.zeros(ROWS, COLUMNS))

    def gradient_through(function):
        result = function(torch.sparse_coo_tensor(rows, values, (ROWS, COLUMNS))).to_dense()
        return torch.autograd.grad((result * weights).sum(), values)[0]

    sparse = gradient_through(lambda grad: projected_sparse(grad, TIED_ROWS, reduction))
    dense = gradient_through(lambda grad: projected([grad.to_dense()], lambda _: index, reduction)[0])
    torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_compact_mode_takes_no_graph_of_a_gradient(is_sparse):
    class Watched(SGD):
        def step(self, closure=None):
            (self.seen,) = (param.grad for param in self.param_groups[0]["params"])
            super().step(closure)

    weight = parameter(ROWS, COLUMNS)
    optimizer = TiedOptimizer(Watched([weight], lr=0.1), {weight: GROUPS}, compact=True)
    gradient = randn(ROWS, COLUMNS).requires_grad_() * 2
    weight.grad = gradient.to_sparse(1) if is_sparse else gradient
    optimizer.step()
    assert optimizer.seen.is_sparse == is_sparse
    assert not optimizer.seen.requires_grad


@given(seed=seeds)
def test_no_sum_of_stored_rows_overflows(seed):
    largest = torch.finfo(torch.float64).max * randn(ROWS, COLUMNS, seed=seed).sign().double()
    found = projected_sparse(largest.to_sparse(1), TIED_ROWS).to_dense()
    assert found.isfinite().all()
    torch.testing.assert_close(found, tie_(largest.clone(), GROUPS))


def test_entries_in_three_sparse_dimensions_are_tied_where_they_stand():
    gradient = randn(ROWS, 3, 5, seed=7)
    gradient[:, 1] = 0
    gradient[randn(ROWS, 3, 5, seed=8) < 0] = 0
    index = index_of(labels_of(GROUPS), gradient)
    found = projected_sparse(gradient.to_sparse(3), TIED_ROWS)
    assert found.is_coalesced()
    torch.testing.assert_close(found.to_dense(), projected([gradient], lambda _: index)[0])


def labels_of(groups):
    return torch.tensor([next((i for i, group in enumerate(groups) if row in group), -1) for row in range(ROWS)])


TIED_ROWS = TiedRows.compile(numbered([Slices(labels_of(GROUPS))])[0], torch.device("cpu"))
