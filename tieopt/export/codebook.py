"""Codebooks: the values of tied slices, each once, and for every slice the index of its value.

Entries are copied from slices bit for bit, so that decoding takes no arithmetic. A group whose members have several
scales has an entry for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tieopt.errors import refusal
from tieopt.export.tensor_file import checked_dense, plain
from tieopt.tensors import bits, in_front
from tieopt.ties.part import Groups, SupportsArray, slices_for
from tieopt.ties.slices import FREE, Slices, are_scaled, flat_labels, flat_scales, numbered

# The entries of a tensor, or the indices, that are processed at a time; a multiple of 8.
_CHUNK = 2**16


def encode(
    param: Tensor, groups: Groups, *, dim: int = 0, scale: Tensor | SupportsArray | None = None
) -> tuple[Tensor, Tensor]:
    """Encode a tied tensor as a codebook and indices.

    ``codebook[indices].movedim(0, dim)`` is the tensor again, bit for bit.

    Args:
        param: the tied tensor, of any dtype and layout that :class:`~tieopt.Tie` takes.
        groups: as in :class:`~tieopt.Tie`.
        dim: as in :class:`~tieopt.Tie`.
        scale: as in :class:`~tieopt.Tie`.

    Returns:
        The codebook, of shape ``[entries, *slice]`` and the dtype of the tensor, and the indices, int64, in the shape
        of the labels. Both are on the device of the tensor. The codebook has an entry for each group and each free
        slice, in the order in which they occur; with scales, an entry for each scale in each group.

    Raises:
        TypeError, IndexError, ValueError: as for :class:`~tieopt.Tie`; or the tensor is sharded, or is not tied.

    Example:
        Sixteen values for a matrix, each with both signs:

        >>> import torch
        >>> from tieopt import export, patterns, tie_
        >>> weight = torch.randn(64, 64)
        >>> labels, signs = patterns.hashed(weight.shape, 16)
        >>> _ = tie_(weight, labels, scale=signs)
        >>> codebook, indices = export.encode(weight, labels, scale=signs)
        >>> codebook.shape, indices.shape
        (torch.Size([32]), torch.Size([64, 64]))
        >>> torch.equal(codebook[indices], weight)
        True
    """
    (slices,) = numbered([slices_for(param, groups, dim, scale, "the tensor")])
    tensor = plain(checked_dense("the tensor", param))
    # Each free slice becomes a group of its own.
    labels = slices.labels
    alone = torch.arange(labels.numel(), device="cpu").view(labels.shape) + labels.numel()
    with_free = numbered([slices._replace(labels=torch.where(labels == FREE, alone, labels))])
    entries, (indices,), *_ = codebook_of(with_free, [tensor], ["the tensor"])
    return entries.to(param.device), indices.to(param.device)


def codebook_of(
    slices: Sequence[Slices], tensors: Sequence[Tensor], names: Sequence[str]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Return the codebook of a tie, with its entries in the order in which they occur.

    Args:
        slices: the slices of each tensor, with groups numbered by :func:`~tieopt.ties.slices.numbered`.
        tensors: the tied tensors, on the CPU.
        names: the names of the tensors, for the error.

    Returns:
        The entries, shape ``[entries, *slice]``; for each tensor the entry of every slice, int64, in the shape of the
        labels, where the index of a free slice is the number of entries; the group of each entry, int64; and the scale
        of each entry, float64.

    Raises:
        ValueError: members with the same group and scale are not equal bit for bit.
    """
    labels, scales = flat_labels(slices), flat_scales(slices)
    pairs = labels
    if are_scaled(slices):
        multiples, which = torch.unique(scales, return_inverse=True)
        pairs = numbered([Slices(torch.where(labels == FREE, FREE, labels * len(multiples) + which))])[0].labels
    # Pairs of a group and a scale are numbered as they occur, so that each new pair is a new maximum.
    highest = pairs.cummax(0).values
    is_first = highest.diff(prepend=highest.new_full((1,), FREE)) > 0
    indices = _split(torch.where(pairs == FREE, is_first.sum(), pairs), slices)
    firsts = zip(slices, tensors, _split(is_first, slices), strict=True)
    entries = torch.cat([in_front(bits(tensor), labelled.dim)[first] for labelled, tensor, first in firsts])
    entries = entries.view(tensors[0].dtype)
    for labelled, tensor, name, index in zip(slices, tensors, names, indices, strict=True):
        _check_tied(tensor, entries, labelled.dim, index, name)
    return entries, indices, labels[is_first], scales[is_first]


def largest_block(indices: Sequence[Tensor], count: int) -> int:
    """Return the largest size of blocks of consecutive slices that are determined by their first slice.

    Blocks lie along the last dimension of the indices. A block has consecutive entries, the first of them a multiple of
    the size, or free slices alone. No entry is in two different blocks.

    Args:
        indices: for each tensor the entry of every slice, as :func:`codebook_of` returns them.
        count: the number of entries, which is the index of a free slice.
    """
    size = math.gcd(*[tensor.shape[-1] for tensor in indices])
    for tensor in filter(Tensor.numel, indices):
        numbers = torch.where(tensor == count, FREE - 1, tensor)
        following = torch.where(numbers < 0, numbers, numbers + 1)
        # A block begins wherever a slice does not follow the one before it, perhaps in one row of several.
        begins = pad(following[..., :-1] != numbers[..., 1:], (1, 0), value=True)
        somewhere = begins.view(-1, tensor.shape[-1]).any(0)
        size = math.gcd(size, *somewhere.nonzero().flatten().tolist())
        firsts = numbers[begins & (numbers >= 0)]
        size = math.gcd(size, *torch.unique(firsts % size).tolist())
    return max(size, 1)


def _split(column: Tensor, slices: Sequence[Slices]) -> list[Tensor]:
    """Split values for all slices by tensor, each in the shape of its labels."""
    shapes = [labelled.labels.shape for labelled in slices]
    parts = torch.split(column, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _check_tied(tensor: Tensor, entries: Tensor, dim: int, indices: Tensor, name: str) -> None:
    compared = _members(tensor, entries, dim, indices)
    wrong = sum(int((_bytes(view[members]) != _bytes(expected)).any(1).sum()) for view, members, expected in compared)
    if wrong:
        what, parameter = "What is not tied cannot be written as a codebook.", f"{name} of shape {tuple(tensor.shape)}"
        expected = "members that are equal bit for bit, as after tie_weights()"
        got = f"{wrong} that differ from the first one of their group"
        raise refusal(ValueError, what, parameter=parameter, expected=expected, got=got)


def _bytes(slices: Tensor) -> Tensor:
    """Return the bytes of slices, shape ``[n, bytes]``; those of 0.0 and -0.0 differ, those of equal NaNs do not."""
    return slices.unsqueeze(-1).flatten(1).contiguous().view(torch.uint8)


def fill_(tensor: Tensor, entries: Tensor, dim: int, indices: Tensor) -> None:
    """Write the entries of a codebook to the members of its groups; free slices stay as they are."""
    for view, members, values in _members(tensor, entries, dim, indices):
        view[members] = values


def _members(tensor: Tensor, entries: Tensor, dim: int, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield chunks of a tensor: a view of some slices, the mask of its members, and the entries of these members."""
    slices = in_front(bits(tensor), dim)
    length = max(_CHUNK * len(slices) // max(slices.numel(), 1), 1)
    for view, chosen in zip(torch.split(slices, length), torch.split(indices, length), strict=True):
        members = chosen < len(entries)
        yield view, members, bits(entries)[chosen[members]]


def packed(numbers: Tensor, width: int) -> Tensor:
    """Pack numbers of ``width`` bits into bytes without gaps, the lowest bit first."""
    chunks = (_binary(chunk, width).view(-1) for chunk in torch.split(numbers.flatten(), _CHUNK))
    return torch.cat([_from_binary(pad(binary, (0, -binary.numel() % 8)).view(-1, 8)).byte() for binary in chunks])


def unpacked(data: Tensor, width: int, shape: torch.Size) -> Tensor:
    """Return the numbers that :func:`packed` has packed, int64."""
    if not width:
        return torch.zeros((), dtype=torch.int64, device="cpu").expand(shape)
    numbers = torch.empty(shape.numel(), dtype=torch.int64, device="cpu")
    for chunk, target in zip(torch.split(data, _CHUNK // 8 * width), torch.split(numbers, _CHUNK), strict=True):
        target.copy_(_from_binary(_binary(chunk, 8).view(-1)[: len(target) * width].view(-1, width)))
    return numbers.view(shape)


def _binary(numbers: Tensor, width: int) -> Tensor:
    """Return the binary digits of numbers, shape ``[n, width]``, the lowest first."""
    return (numbers.long()[:, None] >> torch.arange(width, device="cpu")) & 1


def _from_binary(digits: Tensor) -> Tensor:
    return (digits << torch.arange(digits.shape[1], device="cpu")).sum(1)
