"""What shows in the memory of tensors: which of them share entries, and which were replaced, moved or written to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


class _Span(NamedTuple):
    """The bytes from the first to the last entry of a tensor.

    Attributes:
        device: where they are, as text, so that spans can be sorted.
        start: the address of the first byte.
        end: the address after the last byte.
        number: of the tensor.
    """

    device: str
    start: int
    end: int
    number: int


def sharing(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield pairs of tensors, by their numbers, that have an entry in the same memory.

    Tensors without memory of their own (lazy, sparse, on the meta device, or wrappers of other tensors) share none.
    """
    spans = sorted(_span(tensor, number) for number, tensor in enumerate(tensors) if _has_memory(tensor))
    open_spans: list[_Span] = []
    for span in spans:
        open_spans = [other for other in open_spans if other.device == span.device and other.end > span.start]
        for other in open_spans:
            if _meet(tensors[other.number], other, tensors[span.number], span):
                yield other.number, span.number
        open_spans.append(span)


def _has_memory(tensor: Tensor) -> bool:
    plain = not is_lazy(tensor) and tensor.layout == torch.strided and not tensor.is_nested
    return plain and tensor.numel() > 0 and tensor.data_ptr() != 0


def _span(tensor: Tensor, number: int) -> _Span:
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    start = tensor.data_ptr()
    return _Span(str(tensor.device), start, start + (last + 1) * tensor.itemsize, number)


def _meet(first: Tensor, span: _Span, second: Tensor, other: _Span) -> bool:
    """Whether tensors whose spans overlap have an entry in common; columns of one matrix have none."""
    if all(one.end - one.start == tensor.nbytes for tensor, one in ((first, span), (second, other))):
        return True
    # In units in which every entry starts and ends.
    start = min(span.start, other.start)
    strides = (stride * tensor.itemsize for tensor in (first, second) for stride in tensor.stride())
    unit = math.gcd(first.itemsize, second.itemsize, abs(span.start - other.start), *strides)
    taken = torch.zeros((max(span.end, other.end) - start) // unit, dtype=torch.bool, device="cpu")
    for tensor, one in ((first, span), (second, other)):
        # What is repeated along a stride of 0 is one entry.
        sizes = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        steps = [stride * tensor.itemsize // unit for stride in tensor.stride()]
        units = taken.as_strided((*sizes, tensor.itemsize // unit), (*steps, 1), (one.start - start) // unit)
        if bool(units.any()):
            return True
        units.fill_(True)
    return False


def traces(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Return what changes when tensors are replaced, moved or written to.

    The last entry of each counts writes. Those through ``.data`` are not counted, and of a tensor that was made in
    inference mode none are: its trace equals no other.
    """
    return [(id(tensor), *_where(tensor), object() if tensor.is_inference() else tensor._version) for tensor in tensors]


def _where(tensor: Tensor) -> tuple[object, ...]:
    """Where the entries of a tensor are, if they have a place in memory each."""
    return (tensor.data_ptr(), tensor.stride()) if tensor.layout == torch.strided else ()
