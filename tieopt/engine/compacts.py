"""Compact tensors: whole, or sharded as the tensors that they are made of.

Of sharded tensors every rank folds its own shard, so no group may have members on several ranks. The compact tensor is
a :class:`~torch.distributed.tensor.DTensor`: cut along its rows where slices are on different ranks, and otherwise as
the tensor is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tieopt.engine.sharded import Shards, bounds_in_front, cut_apart, cut_by, numbers_of_ranks, on_any_rank
from tieopt.errors import refusal
from tieopt.numbers.folding import CompactRows, compact_like, compact_rows_of, compact_slices
from tieopt.tensors import bounds_of, local
from tieopt.ties.slices import Partition, Slices, described


class Placed(NamedTuple):
    """How a compact tensor is sharded.

    Attributes:
        mesh: of the ranks.
        placements: along the dimensions of the mesh.
        rows: of each shard: those that the rank folds, and zeros that fill it up.
        all_rows: of all shards together.
        is_canonical: whether it does not depend on the mesh what the compact tensor is as a whole.
    """

    mesh: Any
    placements: tuple[Any, ...]
    rows: int
    all_rows: int
    is_canonical: bool


class Compact(NamedTuple):
    """What the compact tensor of a tensor is made of on this rank.

    Attributes:
        slices: of the tensor.
        rows: of the compact tensor.
        placed: how the compact tensor is sharded; None if it is not.
    """

    slices: Slices
    rows: CompactRows
    placed: Placed | None = None

    @property
    def sharding(self) -> tuple[Any, Any]:
        """The mesh and the placements, as :func:`~tieopt.tensors.sharding_of` returns them."""
        return (None, None) if self.placed is None else self.placed[:2]

    def shape(self, of: torch.Size) -> torch.Size:
        """Return the shape of the compact tensor of a tensor of a shape, on all ranks together."""
        count = len(self.rows.kept) if self.placed is None else self.placed.all_rows
        return compact_like(self.slices, torch.empty(of, device="meta"), count).shape

    def like(self, tensor: Any) -> Tensor:
        """Return a compact tensor of the dtype and on the device of a tensor, with nothing written to its rows."""
        if self.placed is None:
            return compact_like(self.slices, tensor, len(self.rows.kept))
        mesh, placements, rows, all_rows, _ = self.placed
        whole = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
        whole = compact_like(self.slices, whole, all_rows)
        shard = compact_like(self.slices, local(tensor), rows).zero_()
        placed = type(tensor).from_local(shard, mesh, placements, shape=whole.shape, stride=whole.stride())
        # Shards may wait in another memory than that of the mesh.
        return placed.to(shard.device)  # type: ignore[no-any-return]

    def shard(self, compact: Tensor) -> Tensor:
        """View the rows of a compact tensor that this rank folds."""
        if self.placed is None:
            return compact
        return local(compact).narrow(compact_slices(self.slices).dim, 0, len(self.rows.kept))


def compacts_of(tie: Partition, tensors: Sequence[Any], shards: Shards | None) -> tuple[Compact, ...]:
    """Return what the compact tensors of the tensors of a tie are made of; a collective where they are sharded.

    Args:
        tie: of the tensors.
        tensors: which say how they are sharded.
        shards: of the tie, if the tensors are sharded.

    Raises:
        ValueError: a group has members on several ranks.
    """
    if shards is None:
        return tuple(map(Compact, tie.slices, compact_rows_of(tie.slices)))
    if on_any_rank(shards.spans_ranks, tensors[0]):
        what = "The compact mode has no shared values of members on several ranks."
        expected = "groups whose members are on one rank, as rows of a parameter that is cut along its columns; or\n"
        expected += "            compact=False"
        got = f"{described(tie.slices)}, {tensors[0].placements} of a parameter of shape {tuple(tensors[0].shape)}"
        raise refusal(ValueError, what, parameters=", ".join(tie.names), expected=expected, got=got)
    slices, _ = cut_apart(tie.names, tie.slices, tensors)
    # Slices that are written out entry by entry make other compact tensors than without a mesh.
    whole = compact_rows_of(tie.slices) if slices is tie.slices else [None] * len(slices)
    parts = zip(shards.slices, compact_rows_of(shards.slices), slices, tensors, whole, strict=True)
    return tuple(_sharded(*part) for part in parts)


def _sharded(here: Slices, rows: CompactRows, slices: Slices, tensor: Any, whole: CompactRows | None) -> Compact:
    mesh, dim, count = tensor.device_mesh, compact_slices(slices).dim, len(rows.kept)
    placements = []
    shards = 1
    for placement, size in zip(tensor.placements, mesh.shape, strict=True):
        cut = cut_by(slices, placement)
        if cut == 0:
            placements.append(type(placement)(dim))
            shards *= size
        elif cut is None:
            placements.append(placement)
        else:
            # Counted among the dimensions of a slice, before which or after which the rows are.
            placements.append(type(placement)(cut - (cut <= dim)))
    most = int(numbers_of_ranks(torch.tensor([count], device=local(tensor).device), mesh).max())
    compact = Compact(here, rows, Placed(mesh, tuple(placements), most, most * shards, False))
    if whole is not None:
        placed = Placed(mesh, tuple(placements), count, len(whole.kept), True)
        canonical = compact._replace(placed=placed)
        if not on_any_rank(not _is_canonical(canonical, slices, tensor, whole), tensor):
            return canonical
    return compact


def _is_canonical(compact: Compact, slices: Slices, tensor: Any, whole: CompactRows) -> bool:
    """Return whether the rows of this rank are those that it has once the whole compact tensor is sharded."""
    here = tensor.device_mesh.get_coordinate()
    if here is None:
        return True
    dim, depth = compact_slices(slices).dim, slices.labels.dim()
    numbers = torch.arange(slices.labels.numel(), device="cpu").view(slices.labels.shape)
    numbers = numbers[bounds_in_front(slices, tensor, here)[:depth]].flatten()
    return torch.equal(numbers[compact.rows.kept], whole.kept[bounds_of(compact.like(tensor), here)[dim]])
