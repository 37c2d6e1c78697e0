"""Compact tensors: whole, or sharded as the tensors that they are made of.

Of sharded tensors every rank folds its own shard, so no group may have members on several ranks. The compact tensor is
a :class:`~torch.distributed.tensor.DTensor`: cut along its rows where slices are on different ranks, and otherwise as
the tensor is. How it is cut is worked out by every rank alone, because all of them have all labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tieopt.engine.sharded import Shards, bounds_in_front, cut_apart, cut_by, slices_of_shard
from tieopt.numbers.folding import CompactRows, compact_like, compact_rows_of, compact_slices
from tieopt.tensors import bounds_in, local, sharding_of
from tieopt.ties.slices import FREE, Partition, Slices, are_scaled, joined, numbered


class Placement(NamedTuple):
    """How a compact tensor is sharded.

    Attributes:
        mesh: of the ranks.
        placements: along the dimensions of the mesh.
        rows: of the shard of this rank, padding included.
        all_rows: of all shards together.
        is_canonical: whether the gathered compact tensor is the same on any mesh.
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
        sources: the numbers of the tensors of the tie whose compact tensors have a row of this one, on any rank.
        is_scaled: whether the tie has scales.
        sharding: of the tensor, see :func:`~tieopt.tensors.sharding_of`.
        placement: how the compact tensor is sharded; None if it is not.
    """

    slices: Slices
    rows: CompactRows
    sources: tuple[int, ...]
    is_scaled: bool
    sharding: tuple[Any, Any]
    placement: Placement | None = None

    @property
    def compact_sharding(self) -> tuple[Any, Any]:
        """As ``sharding``, of the compact tensor."""
        return (None, None) if self.placement is None else self.placement[:2]

    def shape_for(self, shape: torch.Size) -> torch.Size:
        """Return the shape of the compact tensor of a tensor of a shape, on all ranks together."""
        count = len(self.rows.kept) if self.placement is None else self.placement.all_rows
        return compact_like(self.slices, torch.empty(shape, device="meta"), count).shape

    def new_like(self, tensor: Any) -> Tensor:
        """Return a compact tensor of the dtype and on the device of a tensor, with nothing written to its rows."""
        if self.placement is None:
            return compact_like(self.slices, tensor, len(self.rows.kept))
        mesh, placements, rows, all_rows, _ = self.placement
        meta = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
        whole = compact_like(self.slices, meta, all_rows)
        shard = compact_like(self.slices, local(tensor), rows).zero_()
        compact = type(tensor).from_local(shard, mesh, placements, shape=whole.shape, stride=whole.stride())
        # Shards may wait in another memory than that of the mesh.
        return compact.to(shard.device)  # type: ignore[no-any-return]

    def shard(self, compact: Tensor) -> Tensor:
        """View the rows of a compact tensor that this rank folds."""
        if self.placement is None:
            return compact
        return local(compact).narrow(compact_slices(self.slices).dim, 0, len(self.rows.kept))


def compacts_of(tie: Partition, tensors: Sequence[Any], shards: Shards | None) -> tuple[Compact, ...]:
    """Return what the compact tensors of the tensors of a tie are made of.

    Args:
        tie: of the tensors.
        tensors: which say how they are sharded; all of them, if they are.
        shards: of the tie, if the tensors are sharded; no group has members on several ranks.
    """
    if shards is None:
        return whole_compacts_of([tie])[0]
    is_scaled = are_scaled(tie.slices)
    slices, dims = cut_apart(tie.names, tie.slices, tensors)
    mesh, whole = tensors[0].device_mesh, compact_rows_of(slices)
    # Along the other dimensions of the mesh, ranks have the same slices, or other parts of them.
    coordinates = list(product(*(range(size) if dim in dims else (0,) for dim, size in enumerate(mesh.shape))))
    rows_at = [
        compact_rows_of(numbered([slices_of_shard(*part, at) for part in zip(slices, tensors, strict=True)]))
        for at in coordinates
    ]
    compacts = []
    parts = zip(slices, tensors, whole, shards.slices, compact_rows_of(shards.slices), _sources(whole), strict=True)
    for number, (part, tensor, rows, here, rows_here, sources) in enumerate(parts):
        placements, kept = _placements(part, tensor), [rows_of_all[number].kept for rows_of_all in rows_at]
        # Slices that are written out entry by entry make another compact tensor than without a mesh.
        is_canonical = slices is tie.slices and all(
            torch.equal(_numbers(part, tensor, at)[own], rows.kept[_chunk(part, tensor, placements, rows, at)].long())
            for own, at in zip(kept, coordinates, strict=True)
        )
        most = max(map(len, kept))
        counts = (len(rows_here.kept), len(rows.kept)) if is_canonical else (most, most * len(kept))
        placement = Placement(mesh, placements, *counts, is_canonical)
        compacts.append(Compact(here, rows_here, sources, is_scaled, sharding_of(tensor), placement))
    return tuple(compacts)


def whole_compacts_of(ties: Sequence[Partition]) -> list[tuple[Compact, ...]]:
    """Return what the compact tensors of ties are made of whose tensors are not sharded; of many ties at once."""
    all_rows, compacts = iter(compact_rows_of(*joined(ties), [len(tie.slices) for tie in ties])), []
    for tie in ties:
        rows = list(islice(all_rows, len(tie.slices)))
        is_scaled = are_scaled(tie.slices)
        parts = zip(tie.slices, rows, _sources(rows), strict=True)
        compacts.append(tuple(Compact(*part, is_scaled, (None, None)) for part in parts))
    return compacts


def _sources(rows: Sequence[CompactRows]) -> list[tuple[int, ...]]:
    """Return for each tensor the numbers of those whose compact tensors have its rows."""
    if len(rows) == 1:
        return [(0,)]
    owners = torch.repeat_interleave(torch.tensor([len(part.kept) for part in rows], device="cpu"))
    return [tuple(sorted(set(owners[part.rows[part.rows != FREE]].tolist()))) for part in rows]


def _placements(slices: Slices, tensor: Any) -> tuple[Any, ...]:
    """Return the placements of the compact tensor of a tensor."""
    dim, placements = compact_slices(slices).dim, []
    for placement in tensor.placements:
        cut = cut_by(slices, placement)
        if cut == 0:
            placement = type(placement)(dim)
        elif cut is not None:
            # Dimensions of a slice before that of the rows move down by one.
            placement = type(placement)(cut - (cut <= dim))
        placements.append(placement)
    return tuple(placements)


def _numbers(slices: Slices, tensor: Any, coordinate: Sequence[int]) -> Tensor:
    """Return the numbers that the slices in the shard at a coordinate have among those of the whole tensor."""
    numbers = torch.arange(slices.labels.numel(), device="cpu").view(slices.labels.shape)
    return numbers[bounds_in_front(slices, tensor, coordinate)[: slices.labels.dim()]].flatten()


def _chunk(slices: Slices, tensor: Any, placements: Any, rows: CompactRows, coordinate: Sequence[int]) -> slice:
    """Return which rows of a compact tensor are at a coordinate once the whole of it is sharded."""
    dim = compact_slices(slices).dim
    shape = [len(rows.kept) if number == dim else 0 for number in range(tensor.dim() or 1)]
    return bounds_in(shape, placements, tensor.device_mesh.shape, coordinate)[dim]
