"""How a tensor lies in memory and on ranks."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tieopt.errors import refusal

T = TypeVar("T")


def sharing(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield pairs of tensors, by their numbers, that have an entry in the same memory.

    Tensors without memory of their own (lazy, sparse, on the meta device, or wrappers of other tensors) share none.
    """
    spans = [(str(tensor.device), *span_of(tensor), n) for n, tensor in enumerate(tensors) if _has_memory(tensor)]
    before: list[tuple[str, int, int, int]] = []
    for span in sorted(spans):
        device, start, _, number = span
        before = [other for other in before if other[0] == device and other[2] > start]
        for *_, other_number in before:
            if _meet(tensors[other_number], tensors[number]):
                yield other_number, number
        before.append(span)


def _has_memory(tensor: Tensor) -> bool:
    plain = not is_lazy(tensor) and tensor.layout == torch.strided and not tensor.is_nested
    return plain and tensor.numel() > 0 and tensor.data_ptr() != 0


def where_in_memory(tensor: Any) -> tuple[object, ...]:
    """Return where the entries that this rank has lie in memory; nothing if they have none of their own."""
    tensor = local(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if _has_memory(tensor) else ()


def span_of(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor, and the one after the last."""
    start = tensor.data_ptr()
    # Without a Python loop for most.
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + (last + 1) * tensor.itemsize


def _meet(*tensors: Tensor) -> bool:
    """Return whether two tensors whose spans overlap have an entry in common; columns of one matrix have none."""
    starts, ends = zip(*map(span_of, tensors), strict=True)
    if all(end - start == tensor.nbytes for start, end, tensor in zip(starts, ends, tensors, strict=True)):
        return True
    # In units in which every entry starts and ends.
    strides = (stride * tensor.itemsize for tensor in tensors for stride in tensor.stride())
    unit = math.gcd(*(tensor.itemsize for tensor in tensors), starts[1] - starts[0], *strides)
    taken = torch.zeros((max(ends) - min(starts)) // unit, dtype=torch.bool, device="cpu")
    for start, tensor in zip(starts, tensors, strict=True):
        # What is repeated along a stride of 0 is one entry.
        sizes = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        steps = [stride * tensor.itemsize // unit for stride in tensor.stride()]
        units = taken.as_strided((*sizes, tensor.itemsize // unit), (*steps, 1), (start - min(starts)) // unit)
        if bool(units.any()):
            return True
        units.fill_(True)
    return False


def traces(pairs: Iterable[tuple[T, Sequence[Tensor]]]) -> dict[T, list[tuple[object, ...]]]:
    """Return, for each of several lists of tensors, what changes when one is replaced, converted, moved or written to.

    It changes as well when torch comes to negate or conjugate one as it reads it.

    Args:
        pairs: each list, and the key that its traces are returned under.

    The second entry for a tensor is its dtype, and the last one counts writes. Those through ``.data`` are not counted,
    and of a tensor that was made in inference mode none are: its trace equals no other.
    """
    traced: dict[T, list[tuple[object, ...]]] = {}
    for key, tensors in pairs:
        traced[key] = []
        for tensor in tensors:
            # Entries of other layouts have no place in memory each.
            where = (tensor.data_ptr(), tensor.stride()) if tensor.layout == torch.strided else ()
            writes = object() if tensor.is_inference() else tensor._version
            traced[key].append((id(tensor), tensor.dtype, tensor.is_neg(), tensor.is_conj(), *where, writes))
    return traced


# --- in memory ---


def in_memory(tensor: Tensor) -> Tensor:
    """View the entries as they are in memory, where torch negates or conjugates them on reading."""
    if tensor.is_neg():
        return torch._neg_view(tensor)
    return tensor.conj() if tensor.is_conj() else tensor


def transposed_copy(matrix: Tensor) -> Tensor:
    """Return a contiguous transposed copy of a contiguous matrix."""
    if matrix.dtype != torch.float32 or matrix.device.type != "cpu":
        return matrix.t().contiguous()
    # Shuffling the channels of one pixel transposes them as a matrix, and for float32 on a CPU torch vectorises it.
    (rows, columns), count = matrix.shape, matrix.numel()
    pixel = matrix.as_strided((1, count, 1, 1), (count, 1, count, count))
    return torch.channel_shuffle(pixel, rows).view(columns, rows)


def overlaps(tensor: Tensor) -> bool:
    """Return whether entries may share memory, as those of an expanded or unfolded tensor do."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def raw_bytes(tensor: Tensor) -> memoryview | bytes:
    """Return the memory of a contiguous tensor on the CPU, without a copy; valid as long as the tensor is.

    NumPy is not needed, and torch may be installed without it.
    """
    # A tensor without entries may have no address.
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())) if tensor.nbytes else b""


def real(tensor: Tensor) -> Tensor:
    """View complex entries as two real ones each, in a last dimension."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest real dtype of a device; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def calculable(tensor: Tensor) -> Tensor:
    """Return 8-bit floats as float32, because torch does not calculate with 8-bit floats."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def bits(tensor: Tensor) -> Tensor:
    """View 8-bit floats as bytes, because torch does not index 8-bit floats."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def movable(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors of one dtype, 8-bit floats viewed as bytes; see :func:`bits`."""
    return [tensor.view(torch.uint8) for tensor in tensors] if tensors[0].element_size() == 1 else tensors


def in_front(tensor: Tensor, dim: int) -> Tensor:
    """View a tensor with a dimension in front; a single number as a vector of one entry."""
    return tensor.movedim(dim, 0) if tensor.dim() else tensor.view(1)


def column(vector: Tensor, like: Tensor) -> Tensor:
    """View a vector so that it broadcasts against slices along the first dimension."""
    return vector.view(-1, *[1] * (like.dim() - 1))


def has_shape(value: Any, shape: torch.Size) -> bool:
    """Return whether a value is a dense tensor of numbers of a shape."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and (value.is_floating_point() or value.is_complex())
        and value.shape == shape
    )


# --- on ranks ---


def is_sharded(tensor: Any) -> bool:
    """Return whether it is a ``DTensor``; there is none as long as nobody has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharding_of(tensor: Any) -> tuple[Any, Any]:
    """Return the mesh and the placements of a sharded tensor, None and None for any other."""
    return getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """Return the shard that this rank has; of a tensor that is not sharded, the tensor."""
    shard: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return shard


def gathered(tensor: Any) -> Tensor:
    """Return a tensor with all of its entries, which of a sharded one all ranks of its mesh have to ask for."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    # A rank outside the mesh has nothing to send, and gets nothing.
    if tensor.device_mesh.get_coordinate() is None:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    # As bytes, because not every backend sends 8-bit floats.
    shards = type(tensor).from_local(
        bits(tensor.to_local()), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return shards.full_tensor().view(tensor.dtype)  # type: ignore[no-any-return]


def sharding_of_slices(tensor: Any, dim: int) -> tuple[Any, Any]:
    """Return the mesh and the placements of what has one entry for each slice of a tensor along a dimension."""
    if not is_sharded(tensor):
        return None, None
    from torch.distributed.tensor import Replicate, Shard

    return tensor.device_mesh, tuple(Shard(0) if cut.is_shard(dim) else Replicate() for cut in tensor.placements)


def of_shards(shard: Tensor, mesh: Any, placements: Any, length: int) -> Tensor:
    """Return a sharded vector of a length, of which this rank has a shard."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, mesh, placements, shape=torch.Size([length]), stride=(1,))


def bounds_in(
    shape: Sequence[int], placements: Sequence[Any], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> tuple[slice, ...]:
    """Return which part of a tensor of a shape the rank at a coordinate of a mesh has.

    The tensor is cut as ``torch.chunk`` does, along one dimension of the mesh after the other.
    """
    bounds = [slice(0, size) for size in shape]
    for placement, count, number in zip(placements, mesh_shape, coordinate, strict=True):
        if placement.is_shard():
            start, stop = bounds[placement.dim].start, bounds[placement.dim].stop
            chunk = -((start - stop) // count)
            start = min(start + number * chunk, stop)
            bounds[placement.dim] = slice(start, min(start + chunk, stop))
    return tuple(bounds)


def bounds_of(tensor: Any, coordinate: Sequence[int]) -> tuple[slice, ...]:
    """Return which part of a sharded tensor the rank at a coordinate of the mesh has; see :func:`bounds_in`."""
    return bounds_in(tensor.shape, tensor.placements, tensor.device_mesh.shape, coordinate)


def shard_of(full: Tensor, like: Any) -> Tensor:
    """Return the shard that this rank has once a whole tensor is sharded as another one."""
    return full[bounds_of(like, like.device_mesh.get_coordinate())]


def check_sharding(param: Any, name: str) -> None:
    """Refuse a parameter whose entries a tie cannot find.

    Raises:
        ValueError: it is one.
    """
    name = f"{name} of shape {tuple(param.shape)}"
    if getattr(param, "_fsdp_flattened", False):
        what = f"{name} was flattened by FullyShardedDataParallel."
        expected = "torch.distributed.fsdp.fully_shard, which leaves parameters their shapes"
        raise refusal(ValueError, what, expected=expected, got=type(param).__name__)
    if not is_sharded(param):
        return
    mesh = param.device_mesh
    if any(bool((mesh.mesh.diff(dim=dim) < 0).any()) for dim in range(mesh.ndim)):
        # torch itself goes by the order of the mesh here, and by that of the process group there.
        what = f"{name} is on a mesh whose ranks do not ascend."
        expected = "ranks in ascending order along each dimension, as process groups have them"
        raise refusal(ValueError, what, expected=expected, got=mesh)
    # Placements that derive from Shard lie elsewhere.
    if any(not placement.is_replicate() and type(placement).__name__ != "Shard" for placement in param.placements):
        what = f"{name} cannot be tied as it is distributed."
        raise refusal(ValueError, what, expected="placements Shard and Replicate alone", got=param.placements)
