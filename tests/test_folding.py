"""Compact tensors: what is left without the repetitions, and all that is tied is made of it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from checks import randn
from hypothesis import given
from hypothesis import strategies as st
from reference import groups_of_entries, same_bits, slowly_tied_entries
from strategies import ALL, COMPLEX, HALF, laid_out, layouts, normal, reductions, seeds, tensors
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tieopt import Tie, TiedOptimizer
from tieopt.numbers import folding as folding_module
from tieopt.numbers import index as index_module
from tieopt.numbers import reduction as reduction_module
from tieopt.numbers.folding import (
    Folding,
    compact_like,
    compact_rows_of,
    fold_,
    fold_gradients_,
    unfold_,
)
from tieopt.numbers.index import Index
from tieopt.numbers.reduction import Workspace, project_, tied
from tieopt.numbers.sparse import TiedRows, folded_sparse
from tieopt.testing import scales, ties
from tieopt.ties.components import components
from tieopt.ties.options import Reduction
from tieopt.ties.places import BoundTie, bind_ties
from tieopt.ties.slices import Slices

SHAPES = [
    [(7,)],
    [(9, 2)],
    [(4, 6)],
    [(6, 20)],
    [(4, 6), (6, 4)],
    [(3, 5), (3, 5), (5, 3)],
    [(5, 2, 3)],
    [(3, 2, 2, 3)],
    [(2, 3, 3, 3), (3, 3, 3)],
    [(0, 3)],
]
WIDE = [torch.float32, torch.float64, *COMPLEX]
SIGNS = ["none", "signs", "zeros"]


@dataclass
class Case:
    """Tensors, and what folds them.

    Attributes:
        tensors: those that are tied.
        ties: as a user writes them.
        component: all the ties of these tensors.
        folding: of the tensors.
    """

    tensors: list[Tensor]
    ties: list[Tie]
    component: BoundTie
    folding: Folding

    def compacts(self) -> list[Tensor]:
        """Compact tensors, with anything in them."""
        parts = zip(self.component.slices, self.tensors, compact_rows_of(self.component.slices), strict=True)
        return [compact_like(slices, tensor, len(part.kept)).fill_(7.0) for slices, tensor, part in parts]

    def normal_compacts(self, seed: int) -> list[Tensor]:
        """Compact tensors with normal entries."""
        return [
            compact.copy_(normal(compact.shape, compact.dtype, seed + number))
            for number, compact in enumerate(self.compacts())
        ]

    def copies(self) -> list[Tensor]:
        """The tensors, in their layouts."""
        return [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype).copy_(one) for one in self.tensors]

    def scrambled(self) -> list[Tensor]:
        """Others of the same layout."""
        return [tensor.fill_(-3.0) for tensor in self.copies()]

    def tied(self) -> list[Tensor]:
        """The tensors when they are tied."""
        copies = self.copies()
        project_(copies, self.folding.index, Workspace())
        return copies


def folding_of(tie: BoundTie, tensors: Sequence[Tensor]) -> Folding:
    """The ties compiled for tensors."""
    return Folding.compile(Index.compile(tie.slices, tensors), compact_rows_of(tie.slices))


@pytest.fixture(autouse=True, scope="module")
def few_at_a_time() -> Iterator[None]:
    """Numbers that are kept as those of many members are widened in several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction_module, "_WIDENED", 3)
        yield


def case_of(given_tensors: Sequence[Tensor], given_ties: Sequence[Tie]) -> list[Case]:
    """The ties compiled, a case for each set of tensors that are folded together."""
    param_groups = [{"params": list(given_tensors)}]
    bound = components(bind_ties(param_groups, list(given_ties)))
    return [
        Case(own, list(given_ties), each, folding_of(each, own))
        for each in bound
        for own in [[given_tensors[place.position] for place in each.places]]
    ]


@st.composite
def cases(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype], kinds: Sequence[str] = SIGNS, *, any_bits: bool = False
) -> Case:
    dtype = draw(st.sampled_from(list(dtypes)))
    shapes = draw(st.sampled_from(SHAPES))
    plain = [draw(tensors(shape, [dtype])) if any_bits else normal(shape, dtype, draw(seeds)) for shape in shapes]
    stored = [laid_out(one, draw(layouts(one))) for one in plain]
    with pytest.MonkeyPatch.context() as patch:
        # Numbers are kept as those of many members are, or of few.
        many = draw(st.sampled_from([0, 2**14]))
        patch.setattr(index_module, "MANY", many)
        patch.setattr(folding_module, "MANY", many)
        (first, *_) = case_of(stored, draw(ties(stored, kinds)))
    return first


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(st.data())
def test_folding_and_unfolding_changes_no_bit_of_what_is_tied(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases([dtype], ["none"], any_bits=True))
    before, compacts, after = case.tied(), case.compacts(), case.scrambled()
    fold_(before, compacts, case.folding, Workspace())
    unfold_(after, compacts, case.folding, Workspace())
    assert all(map(same_bits, after, before))


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(st.data())
def test_the_same_with_signs_and_zeros(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases([dtype]))
    before, compacts, after = case.tied(), case.compacts(), case.scrambled()
    fold_(before, compacts, case.folding, Workspace())
    unfold_(after, compacts, case.folding, Workspace())
    assert all(map(same_bits, after, before))


@given(case=cases(ALL, ["any"]))
def test_with_any_scales_nothing_changes_where_the_shared_values_did_not(case: Case) -> None:
    before, after, compacts = case.tied(), case.tied(), case.compacts()
    fold_(after, compacts, case.folding, Workspace())
    unfold_(after, compacts, case.folding, Workspace())
    assert all(map(same_bits, after, before))


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(seed=seeds, data=st.data())
def test_unfolding_and_folding_returns_the_compact_tensors(dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    case = data.draw(cases([dtype]))
    before, after, whole = case.normal_compacts(seed), case.compacts(), case.scrambled()
    unfold_(whole, before, case.folding, Workspace())
    fold_(whole, after, case.folding, Workspace())
    assert all(map(same_bits, after, before))


@given(case=cases(WIDE, ["any"]), seed=seeds)
def test_with_any_scales_the_compact_tensors_are_rounded(case: Case, seed: int) -> None:
    before, after, whole = case.normal_compacts(seed), case.compacts(), case.scrambled()
    unfold_(whole, before, case.folding, Workspace())
    fold_(whole, after, case.folding, Workspace())
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(one.dtype).eps, atol=0)


@given(case=cases(ALL, ["none", "signs", "zeros", "any"]), seed=seeds)
def test_what_is_unfolded_is_tied(case: Case, seed: int) -> None:
    whole = case.scrambled()
    unfold_(whole, case.normal_compacts(seed), case.folding, Workspace())
    assert tied(whole, case.folding.index, Workspace())
    entries = [one.to(torch.complex128).flatten().tolist() for one in whole]
    numbers = {id(tensor): number for number, tensor in enumerate(case.tensors)}
    for tie in case.ties:
        if not all(id(part.param) in numbers for part in tie.parts):
            continue
        for group in groups_of_entries(tie, case.tensors):
            values = [entries[number][at] / scale for number, at, scale in group if scale]
            rounding = 4 * torch.finfo(whole[0].dtype).eps
            # Of a group of one nothing is tied.
            assert all(abs(value - values[0]) <= rounding * abs(values[0]) for value in values)
            assert all(entries[number][at] == 0 for number, at, scale in group if not scale)


@given(case=cases([*WIDE, *HALF], ["none", "signs", "zeros", "any"]), reduction=reductions)
def test_folded_gradients_are_those_of_the_shared_values(case: Case, reduction: Reduction) -> None:
    """Written out to all members again they are what the slow reference says."""
    grads, compacts, whole = case.copies(), case.compacts(), case.scrambled()
    fold_gradients_(grads, compacts, case.folding, Workspace(), reduction)
    assert all(map(same_bits, grads, case.tensors))
    unfold_(whole, compacts, case.folding, Workspace())

    expected = case.copies()
    for tie in case.ties:
        if any(all(part.param is not tensor for tensor in case.tensors) for part in tie.parts):
            continue
        groups = groups_of_entries(tie, case.tensors)
        expected = slowly_tied_entries(expected, groups, reduction)
    unit = torch.finfo(grads[0].dtype).eps
    for one, other in zip(whole, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=8 * unit, atol=20 * unit)


@given(case=cases([*WIDE, *HALF], ["none", "signs", "zeros"]), reduction=reductions)
def test_folding_gradients_that_are_tied_already_gives_the_same_bits(case: Case, reduction: Reduction) -> None:
    first, second = case.compacts(), case.compacts()
    fold_gradients_(case.copies(), first, case.folding, Workspace(), reduction)
    fold_gradients_(case.tied(), second, case.folding, Workspace(), reduction)
    assert all(map(same_bits, first, second))


@given(
    count=st.integers(1, 12),
    width=st.sampled_from([(), (3,), (2, 2)]),
    seed=seeds,
    reduction=reductions,
    data=st.data(),
)
def test_sparse_gradients_are_folded_as_dense_ones(
    count: int, width: tuple[int, ...], seed: int, reduction: Reduction, data: st.DataObject
) -> None:
    tensor = torch.zeros(count, *width, dtype=torch.float64)
    names = torch.randint(-1, 4, (count,), generator=torch.Generator().manual_seed(seed))
    (case,) = case_of([tensor], [Tie(tensor, names, scale=data.draw(scales((count,))))])
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=6))
    values = normal((len(rows), *width), torch.float64, seed)
    sparse = torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, tensor.shape)
    (dense,), (compact,) = case.compacts(), case.compacts()
    fold_gradients_([sparse.to_dense()], [dense], case.folding, Workspace(), reduction)
    slices = case.component.slices
    rows_of_tie = TiedRows.compile(slices[0], tensor.device, compact_rows_of(slices)[0])
    result = folded_sparse(sparse, compact, rows_of_tie, reduction)
    assert result.shape == compact.shape
    torch.testing.assert_close(result.to_dense(), dense, rtol=1e-12, atol=1e-12)
    # Groups without a row in the batch have none in the result.
    assert result._nnz() <= len(rows)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((4, 6), "contiguous"), ((4, 6), "reversed"), ((4, 3, 2, 5), "channels_last"), ((4, 3, 5), "swapped")],
)
def test_a_compact_tensor_is_in_the_order_of_memory_of_its_own(shape: tuple[int, ...], layout: str) -> None:
    """So that whatever works entry by entry walks both of them in one way."""
    tensor = laid_out(randn(*shape), layout)
    compact = compact_like(Slices(torch.tensor([0, 0, 1, 1])), tensor, 2)
    assert compact.shape == (2, *shape[1:])
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    assert compact.permute(order).is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_compact_tensor_of_kernels_is_in_the_order_of_memory_within_them(layout: str) -> None:
    tensor = laid_out(randn(4, 3, 2, 5), layout)
    compact = compact_like(Slices(torch.arange(12).view(4, 3) // 2), tensor, 6)
    assert compact.shape == (6, 2, 5)
    assert compact.is_contiguous()


@given(case=cases(ALL, ["signs", "zeros", "any"]), seed=seeds)
def test_with_which_sign_a_group_is_written_makes_no_difference(case: Case, seed: int) -> None:
    turned = [
        each._replace(scale=torch.where(each.labels % 2 == seed % 2, -each.scales, each.scales))
        for each in case.component.slices
    ]
    other = BoundTie(case.component.places, turned)
    folding = folding_of(other, case.tensors)
    first, second, before = case.compacts(), case.compacts(), case.tied()
    fold_(before, first, case.folding, Workspace())
    fold_(before, second, folding, Workspace())
    assert all(map(same_bits, first, second))
    fold_gradients_(case.copies(), first, case.folding, Workspace(), "mean")
    fold_gradients_(case.copies(), second, folding, Workspace(), "mean")
    assert all(map(same_bits, first, second))


def test_shared_values_stand_first_and_free_slices_after_them() -> None:
    tensor = torch.arange(7.0)
    (case,) = case_of([tensor], [Tie(tensor, [[2, 5], [1, 4, 6]])])
    (compact,) = case.compacts()
    fold_([tensor], [compact], case.folding, Workspace())
    assert compact.tolist() == [2.0, 1.0, 0.0, 3.0]


def test_joined_values_stand_where_the_first_member_is() -> None:
    first, second = torch.arange(6.0).view(3, 2), 10 + torch.arange(4.0).view(2, 2)
    tie = Tie.join(Tie(first, torch.tensor([0, 1, -1])), Tie(second, torch.tensor([1, 0]), dim=1))
    (case,) = case_of([first, second], [tie])
    compacts = case.compacts()
    fold_([first, second], compacts, case.folding, Workspace())
    assert [compact.shape for compact in compacts] == [(3, 2), (2, 0)]
    assert compacts[0].tolist() == first.tolist()


def test_what_is_pinned_stands_nowhere() -> None:
    tensor = torch.tensor([5.0, 1.0, 0.0, -1.0])
    tie = Tie(tensor, torch.tensor([-1, 0, 0, 0]), scale=torch.tensor([1.0, 1.0, 0.0, -1.0]))
    (case,) = case_of([tensor], [tie])
    (compact,) = case.compacts()
    fold_([tensor], [compact], case.folding, Workspace())
    assert compact.tolist() == [1.0, 5.0]
    assert isinstance(case.folding.index, Index)
    assert case.folding.index.pinned == ((0,), (slice(2, 3),), (1,))


# --- 8-bit floats ---

TINY = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


class Widened(Optimizer):
    """SGD with momentum, and with state of names that torch does not use, for dtypes that torch does not add up."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:
        for param in self.param_groups[0]["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state |= {"exp_avg": torch.zeros_like(param), "signed": torch.zeros_like(param)}
                state |= {"square": torch.zeros_like(param)}
            momentum = state["exp_avg"].float() / 2 + param.grad.float()
            state["exp_avg"].copy_(momentum)
            state["signed"].copy_(-momentum)
            state["square"].copy_(momentum.square())
            param.data.copy_(param.data.float() - momentum / 8)


def tiny_ties(first: Parameter, second: Parameter) -> dict[str, list[Tie]]:
    signs, multiples = torch.tensor([1.0, -1, 1, 0, -1, 1]), torch.tensor([2.0, -0.3, 1, 0, 3, 0.7])
    return {
        "rows": [Tie(first, [[0, 2, 4], [1, 3]])],
        "elements": [Tie(first, torch.arange(24).view(6, 4) % 5 - 1, scale=signs[:, None].expand(6, 4))],
        "signs": [Tie(first, torch.tensor([0, 0, 0, 1, 1, -1]), scale=signs)],
        "joined": [Tie.join(Tie(first, [[0, 2], [1]], dim=1), Tie(second, [[3], [0, 1]]))],
        "multiples": [Tie(first, torch.tensor([0, 0, -1, 1, 1, 1]), scale=multiples)],
        "joined multiples": [
            Tie.join(Tie(first, [[0, 3]], dim=1), Tie(second, [[0, 1, 2, 3, 4]], scale=multiples[:5]))
        ],
        "several": [Tie(first, [[0, 1]]), Tie(first, torch.tensor([[-1] * 4] * 2 + [[0, 1, 0, -1]] * 4))],
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", TINY, ids=str)
def test_8_bit_floats_train_with_ties_of_every_kind_in_both_modes(dtype: torch.dtype, reduction: Reduction) -> None:
    for kind in tiny_ties(Parameter(torch.ones(6, 4)), Parameter(torch.ones(5, 6))):
        ends = []
        for compact in (False, True):
            params = [Parameter(normal((6, 4), dtype, 1)), Parameter(normal((5, 6), dtype, 2))]
            own = tiny_ties(*params)
            optimizer = TiedOptimizer(Widened(params), own[kind], reduction=reduction, compact=compact)
            for seed in range(3):
                for param in params:
                    param.grad = normal(param.shape, dtype, seed)
                optimizer.tie_gradients()
                optimizer.step()
            assert optimizer.tie_drift() == 0
            ends.append([param.detach().clone() for param in params])
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.untie()
            optimizer.retie(own["elements"])
            optimizer.retie(own[kind])
            optimizer.step()
            assert optimizer.tie_drift() == 0
        # Other multiples are rounded, in one mode or in both.
        assert "multiples" in kind or all(map(same_bits, *ends))
