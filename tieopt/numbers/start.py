"""Where the shared values start: from the first member of each group, where the mean is not wanted.

The mean of independent random weights is smaller than they are; the first of them is a weight as it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tieopt.errors import shown
from tieopt.numbers.index import Index, Members, sorted_members
from tieopt.numbers.reduction import Workspace, lead_, rounded
from tieopt.tensors import column, in_memory, real, wide_dtype
from tieopt.ties.slices import Slices

Start = Literal["mean", "first"]


def check_start(start: Any, *, relaxed: bool) -> None:
    """Refuses what is no start, and what relaxed ties cannot start from.

    Raises:
        ValueError: it is one of these.
    """
    if not isinstance(start, str) or start not in ("mean", "first"):
        raise ValueError(f"Unknown start.\n  Expected: 'mean' or 'first'\n  Got:      {shown(start)}")
    if relaxed and start == "first":
        raise ValueError(
            "Relaxed ties pull members towards their mean, and have no shared value to start from the first member.\n"
            "  Expected: start='mean', or strength=1 and every=1\n"
            "  Got:      start='first' with relaxed ties"
        )


def start_from_first_(tensors: Sequence[Tensor], index: Index, workspace: Workspace, order: Sequence[int]) -> None:
    """Gives every group the value of its first member that is not pinned, and writes zero to what is pinned.

    What is written is tied, to the last bit, and what is tied already keeps its bits.

    Args:
        tensors: dense ones, in which no two entries share memory.
        index: of the tensors.
        workspace: buffers to work in.
        order: the numbers of the tensors, that with the first members first.
    """
    slices = [index.slices[number] for number in order]
    fronts = [real(in_memory(tensors[number])).movedim(index.slices[number].dim, 0) for number in order]
    # Counted in the order of their labels, whatever the layout of the tensors.
    flat = [Slices(each.labels.flatten(), each.scales.flatten()) for each in slices]
    members, _ = sorted_members(flat, [(1,)] * len(flat))
    if len(members.group):
        sizes = torch.bincount(members.group)
        leads = members.at(sizes.cumsum(0) - sizes)
        values = _lead_values(fronts, [each.labels.shape for each in slices], members, leads)
        for part, (each, front) in enumerate(zip(slices, fronts, strict=True)):
            own = members.where(members.part == part)
            multiples = own.scale / leads.scale[own.group]
            front[_at(own.position, each.labels.shape, front)] = _times(values[own.group.to(front.device)], multiples)
    # Multiples are rounded as a projection rounds them, and what is pinned is written.
    lead_(tensors, index, workspace)


def _lead_values(fronts: Sequence[Tensor], shapes: Sequence[torch.Size], members: Members, leads: Members) -> Tensor:
    """What the lead of each group is if the first member keeps its value."""
    number = members.part * (int(members.position.max()) + 1) + members.position
    least = torch.full_like(leads.group, int(number.max())).scatter_reduce_(0, members.group, number, "amin")
    firsts = members.where(number == least[members.group])
    values = _gathered(fronts, shapes, firsts)
    if torch.equal(firsts.scale, leads.scale):
        return values
    # A lead of which the first member is the multiple stays, so that nothing changes where all are tied.
    own, wide = _gathered(fronts, shapes, leads), wide_dtype(values.device)
    is_kept = _times(own, firsts.scale / leads.scale).to(wide) == values.to(wide)
    others = _times(values, leads.scale / firsts.scale)
    return torch.where(is_kept, own.to(wide), others.to(wide)).to(values.dtype)


def _gathered(fronts: Sequence[Tensor], shapes: Sequence[torch.Size], chosen: Members) -> Tensor:
    """One slice for each of the members, in their order."""
    parts = [(chosen.part == part).nonzero().squeeze(1) for part in range(len(fronts))]
    found = [
        front[_at(chosen.position[own], shape, front)] for own, shape, front in zip(parts, shapes, fronts, strict=True)
    ]
    return torch.cat(found)[torch.cat(parts).argsort().to(fronts[0].device)]


def _at(positions: Tensor, shape: torch.Size, front: Tensor) -> tuple[Tensor, ...]:
    """What slices are indexed by, counted in the order of their labels."""
    return tuple(each.to(front.device) for each in torch.unravel_index(positions, shape))


def _times(values: Tensor, multiples: Tensor) -> Tensor:
    """Slices times their multiples, rounded once; of what is finite the multiple is finite, too."""
    if bool((multiples == 1).all()):
        return values
    wide = values.to(wide_dtype(values.device))
    products = wide * column(multiples.to(wide.device, wide.dtype), wide)
    largest = torch.finfo(values.dtype).max
    return rounded(torch.where(wide.isfinite(), products.clamp(-largest, largest), products), values.dtype)
