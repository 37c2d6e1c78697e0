"""Shared values that start from the first member of each group, and not from the mean.

The mean of independent random weights is smaller than they are; the first of them is a weight as it was drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tieopt.errors import refusal, shown
from tieopt.numbers.index import Index, offset_in_memory, offsets_of
from tieopt.numbers.members import Members, members_of
from tieopt.numbers.reduction import Workspace, lead_
from tieopt.numbers.rounding import multiplied
from tieopt.tensors import bits, column, in_front, in_memory, real, wide_dtype
from tieopt.ties.offsets import Offset
from tieopt.ties.slices import Slices

Start = Literal["mean", "first"]


def check_start(start: Any, *, relaxed: bool) -> None:
    """Refuse a start that is unknown, or that relaxed ties cannot have.

    Raises:
        ValueError: it is one of these.
    """
    if not isinstance(start, str) or start not in ("mean", "first"):
        raise refusal(ValueError, "Unknown start.", expected="'mean' or 'first'", got=shown(start))
    if relaxed and start == "first":
        raise refusal(
            ValueError,
            "Relaxed ties pull members towards their mean, and have no shared value to start from the first member.",
            expected="start='mean', or strength=1 and every=1",
            got="start='first' with relaxed ties",
        )


def start_from_first_(tensors: Sequence[Tensor], index: Index, workspace: Workspace, order: Sequence[int]) -> None:
    """Give every group the value of its first member that is not pinned, and write zero to what is pinned.

    The results are tied, to the last bit, and tensors that are tied already keep their bits.

    Args:
        tensors: dense ones, in which no two entries share memory.
        index: of the tensors.
        workspace: buffers to work in.
        order: the numbers of the tensors in the order of their members, that with the first members first.
    """
    slices = [index.slices[number] for number in order]
    fronts = [real(in_front(in_memory(tensors[number]), index.slices[number].dim)) for number in order]
    members, _ = members_of(slices)
    if len(members.group):
        leads, offsets = members.leads, None
        if index.has_offsets:
            wide = wide_dtype(fronts[0].device)
            offsets = [offset_in_memory(index.slices[number], tensors[number], wide) for number in order]
        values = _lead_values(fronts, slices, members, leads, offsets)
        for front, at, here in _by_tensor(fronts, slices, members):
            group = members.group[here]
            chosen = bits(values)[group.to(front.device)]
            # Not of all dtypes: a view of another dtype is no part of a graph.
            chosen = chosen if chosen.dtype == values.dtype else chosen.view(values.dtype)
            bits(front)[at] = bits(_moved(chosen, slices, leads.at(group), members.at(here), offsets))
    # This rounds multiples as a projection does, and writes what is pinned.
    lead_(tensors, index, workspace)


def _lead_values(
    fronts: Sequence[Tensor],
    slices: Sequence[Slices],
    members: Members,
    leads: Members,
    offsets: Sequence[Offset] | None,
) -> Tensor:
    """Return the value of the lead of each group if the first member keeps its value."""
    number = members.tensor * (int(members.position.max()) + 1) + members.position
    least = torch.full_like(leads.group, int(number.max())).scatter_reduce_(0, members.group, number, "amin")
    firsts = members.where(number == least[members.group])
    # One for each group, as the leads are.
    firsts = firsts.at(firsts.group.argsort())
    values = _gathered(fronts, slices, firsts)
    if offsets is None and torch.equal(firsts.scale, leads.scale):
        return values
    # A lead stays if the first member is what it says, so that tied tensors do not change.
    before, wide = _gathered(fronts, slices, leads), wide_dtype(values.device)
    is_kept = _moved(before, slices, leads, firsts, offsets).to(wide) == values.to(wide)
    others = _moved(values, slices, firsts, leads, offsets)
    return torch.where(is_kept, before.to(wide), others.to(wide)).to(values.dtype)


def _moved(
    values: Tensor, slices: Sequence[Slices], source: Members, target: Members, offsets: Sequence[Offset] | None
) -> Tensor:
    """Return what members are, as they are stored, if other members of their groups have these values."""
    multiples, shifts = target.scale / source.scale, None
    if offsets is not None:
        before, after = (offsets_of(chosen, offsets) for chosen in (source, target))
        shifts = (after - column(multiples.to(before), before) * before).to(values.device)
    if shifts is None and bool((multiples == 1).all()):
        return values
    return multiplied(values, multiples.to(values.device), shifts, values.dtype)


def _gathered(fronts: Sequence[Tensor], slices: Sequence[Slices], chosen: Members) -> Tensor:
    """Return one slice for each of the members, in their order."""
    values = fronts[0].new_empty((len(chosen.group), *fronts[0].shape[slices[0].labels.dim() :]))
    for front, at, here in _by_tensor(fronts, slices, chosen):
        bits(values)[here.to(front.device)] = bits(front)[at]
    return values


def _by_tensor(
    fronts: Sequence[Tensor], slices: Sequence[Slices], members: Members
) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
    """Yield for each tensor a view with the slices in front, the indices of its members, and their numbers."""
    for number, (front, labelled) in enumerate(zip(fronts, slices, strict=True)):
        here = (members.tensor == number).nonzero().squeeze(1)
        indices = torch.unravel_index(members.position[here], labelled.labels.shape)
        yield front, tuple(index.to(front.device) for index in indices), here
