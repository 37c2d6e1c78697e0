"""Norms of tensors of any layout, sharded or not, and weights that are multiplied with them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from tieopt.tensors import bounds_of, is_sharded, shard_of, sharding_of


def norm_of(tensors: Iterable[Tensor], norm_type: float) -> Tensor:
    """Return the norm of tensors as if they were one; on all ranks of a mesh, each of which has to ask for it."""
    entries = [_entries(tensor, norm_type) for tensor in tensors]
    # The largest of no entries is an error to torch.
    norms: list[Any] = [get_total_norm(some, norm_type) for some in by_mesh(each for each in entries if each.numel())]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    total: Tensor = norms[0] if len(norms) == 1 else get_total_norm(norms, norm_type)
    return total


def by_mesh(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Return the tensors of each mesh, and the tensors of no mesh: torch does not take them together."""
    meshes: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        meshes.setdefault(sharding_of(tensor)[0], []).append(tensor)
    return meshes.values()


def placed_weights(weights: Tensor, dim: int, tensor: Any, of_shard: bool) -> Tensor:
    """Return weights of slices so that they broadcast against a tensor, or against the shard that this rank has.

    Args:
        weights: one for each slice, the shape of the labels.
        dim: the dimension along which the slices lie.
        tensor: what has these slices.
        of_shard: whether they are weights of the slices that this rank has alone.
    """
    weights = weights.to(torch.promote_types(tensor.dtype.to_real(), torch.float32)).to(tensor.device)
    # The one label of a single number has no dimension there.
    labelled = weights.shape[: tensor.dim()]
    weights = weights.view((*labelled, *[1] * (tensor.dim() - len(labelled)))).movedim(0, dim)
    if not is_sharded(tensor):
        return weights
    # A rank outside the mesh has nothing to multiply.
    if tensor.device_mesh.get_coordinate() is None:
        return weights.new_ones(())
    return weights if of_shard else shard_of(weights.expand(tensor.shape), tensor)


def _entries(tensor: Any, norm_type: float) -> Tensor:
    """Return the entries of a tensor as torch can take their norm."""
    entries: Tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    if norm_type == math.inf and is_sharded(tensor):
        last = bounds_of(tensor, [count - 1 for count in tensor.device_mesh.shape])
        # A rank without entries fails while the others wait for it. If there is any, the last one is.
        if any(part.start == part.stop for part in last):
            entries = tensor.full_tensor()
    return entries
