"""What is added to the multiples of shared values, for each slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.tensors import bits, calculable, gathered, in_front, movable, real

# Entries that are converted at a time.
_ENTRIES = 2**20


class Offset(NamedTuple):
    """The offsets of slices: few values, and which of them each slice has.

    Attributes:
        rows: for each slice the number of its value, any for a free slice; int64, on the CPU, the shape of the labels.
        values: shape ``[k, *slice]``, with 1 in place of each size of a slice along which nothing changes; any floating
            or complex dtype, on the CPU.
        precedence: of members with one scale the one with the lowest number leads, however slices are cut or written
            out; 0 where the offset is 0, float64, the shape of the labels. None if all slices are frozen.
    """

    rows: Tensor
    values: Tensor
    precedence: Tensor | None

    @classmethod
    def of_entries(cls, entries: Tensor, labels: Tensor, dim: int) -> Offset:
        """Return the offset of labelled slices, from a tensor of the shape of the parameter, expanded or not."""
        front = not_repeated(in_front(entries, dim)).cpu()
        shape = front.shape[: labels.dim()]
        values = front.reshape(shape.numel(), *front.shape[labels.dim() :])
        rows = torch.arange(len(values), device="cpu").view(shape).expand(labels.shape)
        # A member with a large offset has fewer digits of the shared value.
        return cls(rows, values, values.abs().reshape(len(values), -1).amax(1).double()[rows])

    @classmethod
    def of_frozen(cls, tensor: Tensor, is_frozen: Tensor, dim: int) -> Offset:
        """Return the offset at which slices keep the values that they have in a tensor.

        Of a sharded tensor every rank keeps those of the whole, for which all ranks have to call this.
        """
        front = in_front(gathered(tensor.detach()), dim)
        chosen = tuple(index.to(front.device) for index in is_frozen.nonzero(as_tuple=True))
        rows = (is_frozen.flatten().cumsum(0) - 1).clamp_(min=0).view(is_frozen.shape)
        return cls(rows, bits(front)[chosen].cpu().view(front.dtype), None)

    @classmethod
    def overlaid(cls, layers: Sequence[tuple[Tensor, Offset | None]]) -> Offset | None:
        """Return the offset of slices that have one of several offsets each, or none.

        Args:
            layers: which slices have the offset, boolean, and the offset.
        """
        present = [(has_offset, offset) for has_offset, offset in layers if offset is not None]
        if not present:
            return None
        shape = torch.broadcast_shapes(*(offset.values.shape[1:] for _, offset in present))  # type: ignore[no-untyped-call]
        values = [offset.values.expand(-1, *shape) for _, offset in present]
        if len({part.dtype for part in values}) > 1:
            values = list(map(calculable, values))
        # The first one is of slices without an offset.
        values.insert(0, values[0].new_zeros(1, *shape))
        rows, count = torch.zeros(layers[0][0].shape, dtype=torch.int64, device="cpu"), 1
        precedence = torch.zeros(rows.shape, dtype=torch.float64, device="cpu")
        for has_offset, offset in present:
            rows = torch.where(has_offset, offset.rows + count, rows)
            count += len(offset.values)
            if offset.precedence is not None:
                precedence = torch.where(has_offset, offset.precedence, precedence)
        # This promotes, too.
        joined = torch.cat(movable(values))
        joined = joined.view(values[0].dtype) if joined.element_size() == 1 else joined
        return cls(rows, joined, None if all(offset.precedence is None for _, offset in present) else precedence)

    def at(self, rows: Tensor | slice) -> Tensor:
        """Return values by their numbers; those of a slice as a view."""
        return bits(self.values)[rows].view(self.values.dtype)

    def by_entry(self, inner: torch.Size, dim: int) -> Offset:
        """Return the offset of the single entries of a tensor, from that of its slices.

        Args:
            inner: the shape of a slice.
            dim: the dimension along which the slices lie.
        """
        count = self.values.shape[1:].numel()
        within = torch.arange(count, device="cpu").view(self.values.shape[1:]).expand(inner)

        def of_entries(of_slices: Tensor) -> Tensor:
            return of_slices.reshape(*of_slices.shape, *[1] * len(inner)).expand(*of_slices.shape, *inner)

        rows = (of_entries(self.rows) * count + within).movedim(0, dim)
        precedence = None if self.precedence is None else of_entries(self.precedence).movedim(0, dim)
        return Offset(rows, self.values.reshape(-1), precedence)

    def cut(self, part: tuple[slice, ...], inner: Sequence[slice]) -> Offset:
        """Return the offset of some of the slices, and of a part of each.

        Args:
            part: which slices, along each dimension of the labels.
            inner: which part of them, along each dimension of a slice.
        """
        used, rows = torch.unique(self.rows[part], return_inverse=True)
        bounds = [bound if size > 1 else slice(None) for bound, size in zip(inner, self.values.shape[1:], strict=True)]
        values = self.at(used)[(slice(None), *bounds)].clone()
        return Offset(rows, values, None if self.precedence is None else self.precedence[part].clone())

    def is_nonzero(self) -> Tensor:
        """Return which slices have an offset other than 0, boolean; what is pinned at -0.0 is not pinned at 0."""
        flags = []
        for values in torch.split(self.values, _at_a_time(self.values.shape[1:])):
            numbers = real(calculable(values)).reshape(len(values), -1)
            flags.append(((numbers != 0) | numbers.signbit()).any(1))
        return torch.cat(flags)[self.rows]

    def written_out(self, chosen: Tensor, shape: torch.Size) -> Iterator[Tensor]:
        """Yield the offset of chosen slices, in numbers that do not depend on its dtype, some slices at a time.

        Args:
            chosen: which slices, boolean, the shape of the labels.
            shape: of a slice.
        """
        wide = torch.complex128 if self.values.is_complex() else torch.float64
        for rows in torch.split(self.rows[chosen], _at_a_time(shape)):
            yield self.at(rows).to(wide).expand(-1, *shape).contiguous()


def not_repeated(tensor: Tensor) -> Tensor:
    """Return a view with 1 in place of each size along which an expanded tensor repeats its entries."""
    return tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]


def _at_a_time(shape: torch.Size) -> int:
    return max(_ENTRIES // max(shape.numel(), 1), 1)
