"""Regular ties: recognised from their labels, and the same numbers as by an index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import same_bits
from strategies import ALL, REAL, generator, laid_out, layouts, normal, reductions, seeds
from torch import Tensor

from tieopt import Tie, TiedOptimizer, patterns, tie_
from tieopt.engine.engine import Engine
from tieopt.numbers import views
from tieopt.numbers.folding import Folding, ViewFolding, compact_like, compact_rows_of, fold_, fold_gradients_, unfold_
from tieopt.numbers.index import Index, Views
from tieopt.numbers.reduction import (
    Workspace,
    divide_,
    drift,
    lead_,
    means_after_step,
    project_,
    relax_,
    tied,
)
from tieopt.numbers.rounding import INTEGERS
from tieopt.numbers.views import Move
from tieopt.tensors import transposed_copy
from tieopt.ties.slices import Partition, Slices, numbered

# Tolerances of one operation, relative and absolute.
TOLERANCES = {2: 2e-2, 4: 1e-5, 8: 1e-12}


@pytest.fixture(autouse=True, scope="module", params=[(views._TRANSPOSED, views._WIDE), (4, 2)], ids=["small", "large"])
def sizes(request):
    """Small matrices as they are, and like large ones: transposed as a whole, cut in the middle where mirrored."""
    transposed, wide = request.param
    with patch.multiple(views, _TRANSPOSED=transposed, _WIDE=wide):
        yield


@st.composite
def moves(draw: st.DrawFn, shape: Sequence[int], *, keep_shape: bool = False) -> Move:
    """Draw a move of tensors of a shape, by default to tensors of any shape."""
    dims = tuple(draw(st.permutations(range(len(shape)))))
    if keep_shape and any(shape[dim] != size for dim, size in zip(dims, shape, strict=True)):
        dims = tuple(range(len(shape)))
    flips = tuple(dim for dim in range(len(shape)) if draw(st.booleans()))
    return Move(dims, flips, draw(st.sampled_from([1, 1, -1])))


def moved_back(move: Move, moved: Tensor) -> Tensor:
    """The tensor that was moved."""
    return moved.flip(move.flips).permute(sorted(range(moved.dim()), key=move.dims.__getitem__)).contiguous()


@dataclass
class Case:
    """A regular tie and tensors.

    Attributes:
        slices: of the tensors.
        tensors: of some dtype.
        layouts: of the tensors.
        most: entries of a tile.
    """

    slices: tuple[Slices, ...]
    tensors: list[Tensor]
    layouts: list[str]
    most: int

    def found(self, most: int | None = None) -> Views | None:
        with patch.multiple(views, _CPU_ENTRIES=most or self.most, _CPU_TILE=1):
            return Views.of(self.slices, self.tensors)

    def views(self, most: int | None = None) -> Views:
        found = self.found(most)
        assert found is not None
        return found

    def index(self) -> Index:
        return Index.compile(self.slices, self.tensors)

    def copies(self) -> list[Tensor]:
        return [laid_out(tensor, layout) for tensor, layout in zip(self.tensors, self.layouts, strict=True)]


def orbits(shape: Sequence[int], generators: Sequence[Move]) -> tuple[Tensor, Tensor]:
    """The labels and scales of entries under a group of moves with signs: 0 for what is its own negative.

    Raises:
        UnsatisfiedAssumption: the same move has both signs.
    """
    group, new = {Move(tuple(range(len(shape))), ())}, [Move(tuple(range(len(shape))), ())]
    while new:
        made = {generator.after(move) for move in new for generator in generators} - group
        group |= made
        new = list(made)
    assume(len({move[:2] for move in group}) == len(group))
    entries = torch.arange(math.prod(shape)).view(*shape)
    first = torch.stack([move(entries) for move in group]).amin(0)
    signs = torch.stack([(move(entries) == first) * move.sign for move in group])
    is_pinned = (signs == 1).any(0) & (signs == -1).any(0)
    return first, torch.where(is_pinned, 0.0, signs.sum(0).sign().double())


@st.composite
def cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = ALL) -> Case:
    """Draw a tie whose groups are orbits, of one tensor or several, and tensors in any layout."""
    depth = draw(st.sampled_from([1, 2, 2, 2, 3, 4]))
    shape = [draw(st.integers(1, 3 if depth > 2 else 6))] * depth
    if depth > 1 and draw(st.booleans()):
        shape[draw(st.integers(0, depth - 1))] = draw(st.integers(1, 5))
    generators = draw(st.lists(moves(shape, keep_shape=True), max_size=2))
    labels, scale = orbits(shape, generators)
    inner = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    dtype, seed = draw(st.sampled_from(dtypes)), draw(seeds)
    slices, tensors, names = [], [], []
    for number in range(draw(st.sampled_from([1, 1, 2, 3, 4, 5]))):
        move = draw(moves(shape)) if number else Move(tuple(range(depth)), ())
        own_labels, own_scale = moved_back(move, labels), moved_back(move, scale) * move.sign
        dim = draw(st.integers(0, depth + len(inner) - 1))
        slices.append(Slices(own_labels, None if bool((own_scale == 1).all()) else own_scale, dim))
        tensor = normal((*own_labels.shape, *inner), dtype, seed + number).movedim(0, dim)
        names.append(draw(layouts(tensor)))
        tensors.append(laid_out(tensor, names[-1]))
    case = Case(numbered(slices), tensors, names, draw(st.sampled_from([1, 8, 50, 2**17])))
    assume(case.found() is not None)
    return case


def close(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether tensors are equal up to rounding; 8-bit floats up to that of 8 bits."""
    for one, other in zip(first, second, strict=True):
        size = torch.finfo(one.dtype).bits // 8
        tolerance, wide = TOLERANCES.get(size, 0.3), one.dtype if size > 1 else torch.float32
        if not torch.allclose(one.to(wide), other.to(wide), rtol=tolerance, atol=tolerance):
            return False
    return True


def write(tensor: Tensor, where: int, value: float) -> None:
    """Write a value to some entry; 8-bit floats as bytes, because torch 2.6 does not index them."""
    entry = torch.tensor(value).to(tensor.dtype)
    if tensor.element_size() == 1:
        tensor, entry = tensor.view(torch.uint8), entry.view(torch.uint8)
    tensor[torch.unravel_index(torch.tensor(where % tensor.numel()), tensor.shape)] = entry


# --- the same numbers as by an index ---


@given(case=cases(), reduction=reductions)
def test_projections_are_those_of_the_index(case, reduction):
    by_views, by_index, found, index = case.copies(), case.copies(), case.views(), case.index()
    project_(by_views, found, Workspace(), reduction)
    project_(by_index, index, Workspace(), reduction)
    assert close(by_views, by_index)
    assert tied(by_views, index, Workspace())
    assert tied(by_views, found, Workspace())


@given(case=cases(), where=seeds, value=st.sampled_from([None, math.nan, -math.nan, math.inf, -0.0]))
def test_what_is_tied_keeps_its_bits(case, where, value):
    found = case.views()
    if value is not None:
        write(case.tensors[0], where, value)
    project_(case.tensors, found, Workspace())
    before = case.copies()
    for means_of in (None, means_after_step):
        project_(case.tensors, found, Workspace(), means_of=means_of)
        assert all(map(same_bits, case.tensors, before))
    lead_(case.tensors, found, Workspace())
    assert all(map(same_bits, case.tensors, before))


@given(case=cases())
def test_both_agree_on_what_is_tied(case):
    found, index = case.views(), case.index()
    assert tied(case.tensors, found, Workspace()) == tied(case.tensors, index, Workspace())
    project_(case.tensors, index, Workspace())
    assert tied(case.tensors, found, Workspace())
    assert drift(case.tensors, found, Workspace()) == 0


@given(case=cases([torch.float32, torch.float64, torch.complex64]), strength=st.sampled_from([0.25, 0.5, 1.0]))
def test_drift_and_relaxed_ties_are_those_of_the_index(case, strength):
    by_views, by_index, found, index = case.copies(), case.copies(), case.views(), case.index()
    assert math.isclose(drift(by_views, found, Workspace()), drift(by_index, index, Workspace()), rel_tol=1e-5)
    relax_(by_views, found, Workspace(), strength)
    relax_(by_index, index, Workspace(), strength)
    assert close(by_views, by_index)


@given(case=cases([torch.float32, torch.float64]))
def test_the_sum_divided_is_the_mean(case):
    sums, means, found = case.copies(), case.copies(), case.views()
    project_(sums, found, Workspace(), "sum")
    divide_(sums, found, Workspace())
    project_(means, found, Workspace())
    assert close(sums, means)


@given(case=cases([torch.float32, torch.float64]), where=seeds, value=st.sampled_from([math.inf, -math.inf, math.nan]))
def test_what_is_not_finite_goes_to_its_group_alone(case, where, value):
    write(case.tensors[0], where, value)
    by_views, by_index = case.copies(), case.copies()
    project_(by_views, case.views(), Workspace())
    project_(by_index, case.index(), Workspace())
    for one, other in zip(by_views, by_index, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())
        assert close([one.nan_to_num(0, 0, 0)], [other.nan_to_num(0, 0, 0)])


@given(case=cases([torch.float16, torch.float32, torch.float64]))
def test_the_mean_of_the_largest_numbers_is_finite(case):
    for tensor in case.tensors:
        tensor.fill_(torch.finfo(tensor.dtype).max)
    project_(case.tensors, case.views(), Workspace())
    assert all(bool(tensor.isfinite().all()) for tensor in case.tensors)


@given(case=cases(), reduction=reductions)
def test_compact_tensors_are_those_of_the_index(case, reduction):
    found, parts = case.views(), compact_rows_of(case.slices)
    foldings = ViewFolding.compile(found, parts[0]), Folding.compile(case.index(), parts)
    compacts = [
        [
            compact_like(slices, tensor, len(part.kept)).zero_()
            for slices, tensor, part in zip(case.slices, case.tensors, parts, strict=True)
        ]
        for _ in foldings
    ]
    for folding, own in zip(foldings, compacts, strict=True):
        fold_gradients_(case.tensors, own, folding, Workspace(), reduction)
    assert close(*compacts)
    project_(case.tensors, found, Workspace())
    for folding, own in zip(foldings, compacts, strict=True):
        fold_(case.tensors, own, folding, Workspace())
    assert all(map(same_bits, *compacts))
    whole = [tensor.zero_() for tensor in case.copies()]
    unfold_(whole, compacts[0], foldings[0], Workspace())
    assert all(map(same_bits, whole, case.tensors))


@given(case=cases([torch.float32, torch.float64]), where=seeds, value=st.sampled_from([math.nan, -math.nan, -0.0]))
def test_what_is_folded_and_unfolded_keeps_its_bits(case, where, value):
    found, parts = case.views(), compact_rows_of(case.slices)
    write(case.tensors[0], where, value)
    project_(case.tensors, found, Workspace())
    before, folding = case.copies(), ViewFolding.compile(found, parts[0])
    kept = [len(part.kept) for part in parts]
    compacts = list(map(compact_like, case.slices, case.tensors, kept))
    fold_(case.tensors, compacts, folding, Workspace())
    unfold_(case.tensors, compacts, folding, Workspace())
    assert all(map(same_bits, case.tensors, before))


@given(case=cases([torch.float32, torch.float64, torch.bfloat16, torch.complex64]), most=st.sampled_from([1, 5, 2**17]))
def test_tiles_make_no_difference_to_the_bits(case, most):
    first, second = case.copies(), case.copies()
    project_(first, case.views(), Workspace())
    project_(second, case.views(most), Workspace())
    assert all(map(same_bits, first, second))


@given(case=cases())
def test_the_index_finds_nothing_to_change(case):
    project_(case.tensors, case.views(), Workspace())
    before = case.copies()
    project_(case.tensors, case.index(), Workspace())
    assert all(map(same_bits, case.tensors, before))


# --- what is recognised ---


@given(case=cases([torch.float32]), where=seeds)
def test_what_is_not_quite_regular_is_left_to_the_index(case, where):
    first, *others = case.slices
    labels = first.labels.clone()
    if where % 2:
        labels.view(-1)[where % labels.numel()] = -1
    else:
        labels.view(-1)[where % labels.numel()] = labels.max() + 1
    changed = (first._replace(labels=labels), *others)
    found = Views.of(changed, case.tensors)
    if found is not None:
        # Another tie, which is regular, too: all its groups have to be the same.
        tensors = case.copies()
        project_(tensors, found, Workspace())
        assert tied(tensors, Index.compile(changed, case.tensors), Workspace())


@pytest.mark.parametrize(
    "groups", [patterns.circulant((6, 6)), patterns.toeplitz((5, 6)), torch.zeros(4, 4, dtype=torch.int64)]
)
def test_other_patterns_have_an_index(groups):
    assert Views.of(numbered([Slices(groups)]), [torch.empty(groups.shape)]) is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_parameter_without_slices_can_be_joined(order):
    weights = [torch.nn.Parameter(torch.arange(6.0).view(3, 2)), torch.nn.Parameter(torch.empty(0, 2))]
    parts = [Tie(weights[0], [[0, 1, 2]]), Tie(weights[1], [])]
    optimizer = TiedOptimizer(torch.optim.SGD(weights), Tie.join(*(parts[number] for number in order)))
    assert torch.equal(weights[0], torch.tensor([2.0, 3.0]).expand(3, 2))
    assert optimizer.tie_drift() == 0


def test_slices_without_entries_can_be_tied():
    weights = [torch.nn.Parameter(torch.empty(4, 0)) for _ in range(2)]
    optimizer = TiedOptimizer(torch.optim.SGD(weights), Tie.join(*(Tie(weight, torch.arange(4)) for weight in weights)))
    optimizer.step()
    assert Views.of([Slices(torch.arange(4))] * 2, weights) is None


def test_rows_of_joined_parameters_are_whole_views_whichever_dimension_they_lie_along():
    encoder, decoder = torch.randn(6, 9), torch.randn(9, 6)
    tie = Partition(numbered([Slices(torch.arange(6)), Slices(torch.arange(6), dim=1)]))
    assert isinstance(Engine().index_for(tie, [encoder, decoder]), Views)


def test_the_summary_names_the_regular_ties():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    ties = [
        Tie.join(Tie(model[0].weight, torch.arange(4)), Tie(model[1].weight, torch.arange(4), dim=1)),
        Tie(model[2].weight, [[0, 1]]),
    ]
    optimizer = TiedOptimizer(torch.optim.SGD(model.named_parameters()), ties)
    lines = [line for line in optimizer.tie_summary().splitlines() if line.startswith("Regular: ")]
    assert lines == ["Regular: 0.weight, 1.weight, computed as views, without an index"]


def held_bytes(value: object) -> int:
    """The bytes of all storages in tuples of tuples."""
    storages = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    visit(value)
    return sum(storages.values())


def test_joined_parameters_keep_nothing_for_their_entries():
    slices, tensors = numbered([Slices(torch.arange(600))] * 3), [torch.empty(600, 800) for _ in range(3)]
    found = Views.of(slices, tensors)
    assert len(found.runs) > 1
    assert held_bytes(found.runs) <= 64 * len(found.runs)


@pytest.mark.parametrize(
    ("build", "bytes_an_entry"), [(patterns.mirrored, 0), (patterns.centrosymmetric, 0), (patterns.symmetric, 4.6)]
)
def test_the_compact_mode_keeps_nothing_for_half_of_a_matrix_and_little_for_a_triangle(build, bytes_an_entry):
    slices = numbered([Slices(build((1024, 1024)))])
    folding = ViewFolding.compile(Views.of(slices, [torch.empty(1024, 1024)]), *compact_rows_of(slices))
    assert held_bytes((folding.kept, folding.sources)) <= bytes_an_entry * 1024**2


@given(
    build=st.sampled_from([patterns.mirrored, patterns.centrosymmetric]),
    # One of two rows and columns is symmetric as well.
    rows=st.integers(2, 30),
    columns=st.integers(1, 30),
    most=st.integers(1, 400),
)
def test_what_is_shared_by_the_halves_of_an_even_matrix_is_a_box(build, rows, columns, most):
    shape = 2 * rows, 2 * columns
    slices = numbered([Slices(build(shape))])
    with patch.multiple(views, _CPU_ENTRIES=most, _CPU_TILE=1, _WIDE=2):
        found = Views.of(slices, [torch.empty(shape)])
    assert ViewFolding.compile(found, *compact_rows_of(slices)).box is not None


@given(
    move=st.sampled_from([Move((1, 0), (0,), -1), Move((0, 1), (0, 1), -1), Move((0, 1), (1,), -1)]),
    size=st.sampled_from([64, 128, 130]),
)
def test_symmetries_with_signs_are_recognised_whatever_the_size(move, size):
    labels, scale = orbits((size, size), [move])
    assert Views.of(numbered([Slices(labels, scale)]), [torch.empty(size, size)]) is not None


@pytest.mark.parametrize("build", [patterns.symmetric, patterns.antisymmetric, patterns.centrosymmetric])
def test_symmetries_keep_what_is_left_of_a_tile_on_the_diagonal_and_no_more(build):
    labels = build((1024, 1024))
    labels, scale = labels if isinstance(labels, tuple) else (labels, None)
    slices = numbered([Slices(labels, None if scale is None else scale.double())])
    found = Views.of(slices, [torch.empty(1024, 1024)])
    assert len(found.runs) > 2
    assert held_bytes(found.runs) <= 3 * 8 * math.prod(found.tiles[0].shape) + 64 * len(found.runs)


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_moves_are_undone_and_composed(shape, data):
    tensor = torch.arange(math.prod(shape)).view(*shape)
    first = data.draw(moves(shape))
    second = data.draw(moves(shape))
    assert torch.equal(moved_back(first, first(tensor)), tensor)
    assert torch.equal(second.after(first)(tensor), second(first(tensor)))


@given(dtype=st.sampled_from([*REAL, torch.uint8]), rows=st.integers(1, 40), columns=st.integers(1, 40), seed=seeds)
def test_matrices_are_transposed_bit_for_bit(dtype, rows, columns, seed):
    """NaN of any bits among the entries."""
    bytes_ = torch.randint(256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=generator(seed))
    matrix = bytes_.view(dtype)
    assert same_bits(transposed_copy(matrix), matrix.t().contiguous())
    assert transposed_copy(matrix).is_contiguous()


@pytest.mark.parametrize("dtype", REAL, ids=str)
@given(size=st.integers(2, 200), count=st.integers(1, 20), negative=st.booleans(), seed=seeds)
def test_nan_is_spread_bit_for_bit(dtype, size, count, negative, seed):
    """Where torch rounds several numbers at once, it makes other bits of a NaN than where it rounds one."""
    labels = patterns.antisymmetric((size, size)) if negative else patterns.symmetric((size, size))
    labels, scale = labels if negative else (labels, None)
    tensor = normal((size, size), torch.float32, seed)
    tensor.view(-1)[torch.randint(size * size, (count,), generator=generator(seed))] = torch.nan
    tensor = tie_(tensor.to(dtype), labels, scale=scale)
    patterns_of = tensor.view(INTEGERS[dtype.itemsize])
    mirrored = patterns_of.t() ^ torch.iinfo(patterns_of.dtype).min if negative else patterns_of.t()
    is_off = ~torch.eye(size, dtype=torch.bool)
    assert torch.equal(patterns_of[is_off], mirrored[is_off])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@given(size=st.integers(2, 40), count=st.integers(1, 20), seed=seeds)
def test_nan_of_a_step_is_negated_bit_for_bit(dtype, size, count, seed):
    labels, scale = patterns.antisymmetric((size, size))
    weight = torch.nn.Parameter(torch.zeros(size, size, dtype=dtype))
    optimizer = TiedOptimizer(torch.optim.SGD([weight], lr=0.1), Tie(weight, labels, scale=scale))
    weight.grad = normal((size, size), dtype, seed)
    weight.grad.view(-1)[torch.randint(size * size, (count,), generator=generator(seed))] = torch.nan
    optimizer.step()
    patterns_of = weight.detach().view(INTEGERS[dtype.itemsize])
    is_off = ~torch.eye(size, dtype=torch.bool)
    assert torch.equal(patterns_of[is_off], (patterns_of.t() ^ torch.iinfo(patterns_of.dtype).min)[is_off])


@given(size=st.integers(1, 70), block=st.integers(1, 70))
def test_dimensions_are_cut_alike_from_either_end(size, block):
    sizes = [part.stop - part.start for part in views._cuts(size, min(block, size))]
    assert sum(sizes) == size
    assert sizes == sizes[::-1]
    assert 0 < min(sizes) <= max(sizes) <= min(block, size) + 1
