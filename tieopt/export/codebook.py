"""The numbers of a codebook: which entries it has, which each slice is, and indices of as few bits as they need.

An entry is what stands in a tensor, bit for bit, so that reading it takes no arithmetic: a group that has members of
several scales has an entry for each. Pure functions of tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tieopt.tensors import bits
from tieopt.ties.slices import FREE, Slices, numbered

# So many entries, and indices, are worked on at a time; a multiple of 8.
_CHUNK = 2**16


class Entries(NamedTuple):
    """What a codebook has an entry for: each multiple of a group's shared value that occurs.

    Attributes:
        symbols: for the slices of each tensor the number of its entry, and for a free one the number of all entries;
            int64, of the shape of the labels.
        groups: the group of each entry, int64.
        scales: what multiple of the shared value it is, float64.
        firsts: the first slice that is this entry, by its number among those of all tensors, int64; they ascend.
    """

    symbols: list[Tensor]
    groups: Tensor
    scales: Tensor
    firsts: Tensor


def entries_of(slices: Sequence[Slices]) -> Entries:
    """The entries for slices of several tensors, numbered ones, in the order in which they occur."""
    labels = torch.cat([each.labels.flatten() for each in slices])
    scales = torch.cat([each.scales.flatten() for each in slices])
    pairs = labels
    if any(each.scale is not None for each in slices):
        multiples, which = torch.unique(scales, return_inverse=True)
        pairs = numbered([Slices(torch.where(labels == FREE, FREE, labels * len(multiples) + which))])[0].labels
    total = len(pairs)
    count = int(pairs.max()) + 1 if total else 0
    symbols = torch.where(pairs == FREE, count, pairs)
    firsts = torch.full((count + 1,), total, device="cpu")
    firsts = firsts.scatter_reduce_(0, symbols, torch.arange(total, device="cpu"), "amin")[:count]
    own = torch.split(symbols, [each.labels.numel() for each in slices])
    parts = [part.view(each.labels.shape) for part, each in zip(own, slices, strict=True)]
    return Entries(parts, labels[firsts], scales[firsts], firsts)


def codebook_of(entries: Entries, slices: Sequence[Slices], tensors: Sequence[Tensor]) -> Tensor:
    """The first slices that are each entry, ``[entries, *slice]``; see :func:`differing` for the others."""
    found, start = [], 0
    for each, tensor in zip(slices, tensors, strict=True):
        end = start + each.labels.numel()
        own = entries.firsts[(entries.firsts >= start) & (entries.firsts < end)] - start
        found.append(bits(tensor).movedim(each.dim, 0)[torch.unravel_index(own, each.labels.shape)])
        start = end
    return torch.cat(found).view(tensors[0].dtype)


def differing(codebook: Tensor, tensor: Tensor, dim: int, symbols: Tensor) -> int:
    """How many members in a tensor are not what the codebook says they are, bit for bit."""
    found = 0
    for part, members, expected in _members(codebook, tensor, dim, symbols):
        own, wanted = (one.unsqueeze(-1).contiguous().view(torch.uint8) for one in (part[members], expected))
        found += int((own != wanted).flatten(1).any(1).sum())
    return found


def fill_(tensor: Tensor, codebook: Tensor, dim: int, symbols: Tensor) -> None:
    """Writes the members into a tensor."""
    for part, members, values in _members(codebook, tensor, dim, symbols):
        part[members] = values


def _members(codebook: Tensor, tensor: Tensor, dim: int, symbols: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A tensor part by part: a view of it, which of its slices are members, and what the codebook says of these."""
    front = bits(tensor).movedim(dim, 0)
    length = max(_CHUNK * len(front) // max(front.numel(), 1), 1)
    for part, own in zip(torch.split(front, length), torch.split(symbols, length), strict=True):
        members = own < len(codebook)
        yield part, members, bits(codebook)[own[members]]


def packed(numbers: Tensor, width: int) -> Tensor:
    """Numbers of so many bits each, without gaps; the lowest bit first, uint8."""
    chunks = [_packed(chunk, width) for chunk in torch.split(numbers.flatten(), _CHUNK)]
    return torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *chunks])


def _packed(numbers: Tensor, width: int) -> Tensor:
    each = (numbers[:, None] >> torch.arange(width, device="cpu")) & 1
    octets = torch.nn.functional.pad(each.view(-1), (0, -each.numel() % 8)).view(-1, 8)
    return (octets << torch.arange(8, device="cpu")).sum(1).byte()


def unpacked(octets: Tensor, width: int, shape: torch.Size) -> Tensor:
    """The numbers that were packed, int64; of so many octets as these numbers take."""
    if not width:
        return torch.zeros((), dtype=torch.int64, device="cpu").expand(shape)
    numbers = torch.empty(shape.numel(), dtype=torch.int64, device="cpu")
    for chunk, target in zip(torch.split(octets, _CHUNK // 8 * width), torch.split(numbers, _CHUNK), strict=True):
        each = (chunk[:, None].long() >> torch.arange(8, device="cpu")) & 1
        each = each.view(-1)[: len(target) * width].view(-1, width)
        target.copy_((each << torch.arange(width, device="cpu")).sum(1))
    return numbers.view(shape)
