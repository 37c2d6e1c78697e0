"""What is tied: from what the user wrote to labels.

Lists of indices, or a tensor of labels -> canonical labels. Everything that a user can get wrong about
a tie is found here, before anything is written; whoever holds canonical labels may trust them.
"""

from __future__ import annotations

import ctypes
import hashlib
from itertools import chain
from operator import index as as_int
from typing import Any

import torch
from torch import Tensor

FREE = -1

# The dtypes that have a mean and that torch converts to the others.
_DTYPES = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
}


class Tie:
    """Which slices of a parameter share one value.

    A *slice* is what one label labels: a row of a matrix, a kernel of a convolution's first
    dimension, an entry of a bias. Slices in one *group* are tied to each other; slices in no group are
    *free* and never touched.

    Args:
        param: the parameter, or its name if the optimizer was built from ``named_parameters()``.
            Shape ``[n, ...]``, any floating or complex dtype, any memory layout.
        groups: a list of lists of indices along dimension 0, each index at most once; or a tensor
            (or NumPy array) of labels, shape ``[n]``, any integer dtype: slices with the same label
            are tied, -1 is free.

    Raises:
        TypeError: ``param`` is neither a tensor nor a name, or cannot be tied, or ``groups`` holds
            something other than integers.
        IndexError: an index is out of range.
        ValueError: an index occurs twice, or the labels have the wrong shape or a value below -1.

    Groups for a name are looked at when an optimizer finds the parameter.

    Example:
        >>> import torch
        >>> from tieopt import Tie
        >>> weight = torch.nn.Parameter(torch.zeros(5, 3))
        >>> Tie(weight, [[4, 1], [0, 2]])
        Tie(parameter of shape (5, 3), 2 groups of 4 members, 1 free)
        >>> Tie(weight, torch.tensor([7, 3, 7, -1, 3])).groups
        tensor([ 0,  1,  0, -1,  1])

    Attributes:
        param: what was given.
        groups: for a tensor the canonical labels, int64, shape ``[n]``, groups numbered in the order
            of their first members, -1 for free slices; for a name what was given, until an
            optimizer finds the parameter.
    """

    def __init__(self, param: Tensor | str, groups: Any) -> None:
        if not isinstance(param, (Tensor, str)):
            raise TypeError(
                "A tie needs a parameter.\n"
                "  Expected: a tensor, or the name of a parameter\n"
                f"  Got:      {shown(param)}"
            )
        self.param = param
        self.groups = canonical_labels(groups, param, "the parameter") if isinstance(param, Tensor) else groups

    def __repr__(self) -> str:
        if isinstance(self.param, str):
            return f"Tie({self.param!r}, {shown(self.groups)})"
        return f"Tie(parameter of shape {tuple(self.param.shape)}, {described(self.groups)})"


def canonical_labels(groups: Any, tensor: Tensor, name: str) -> Tensor:
    """Validates ``groups`` against the tensor they are for and returns their labels.

    Args:
        groups: as in :class:`Tie`.
        tensor: what is to be tied, shape ``[n, ...]``.
        name: how the errors call the tensor.

    Returns:
        int64 labels on the CPU, shape ``[n]``. Groups are numbered 0, 1, ... in the order of their
        first members, so that two ways to write one partition give equal labels.
    """
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"{name} of shape {tuple(tensor.shape)} cannot be tied.\n"
            "  Expected: a dense tensor of a floating or complex dtype, on a device that holds its data\n"
            f"  Got:      {tensor.dtype}, {tensor.layout}, device {tensor.device}"
        )
    if tensor.dim() == 0:
        raise ValueError(
            f"{name} has no slices to tie.\n"
            "  Expected: a tensor of one or more dimensions\n"
            "  Got:      a tensor of shape ()"
        )
    if isinstance(groups, Tensor):
        labels = _checked_labels(groups, tensor, name)
    elif hasattr(groups, "__array__"):
        labels = _checked_labels(_from_array(groups, name), tensor, name)
    else:
        labels = _labels_from_lists(groups, tensor, name)
    return _renumbered(labels)


def _from_array(labels: Any, name: str) -> Tensor:
    """A NumPy array as a tensor; a copy, because torch takes none that is read-only or reversed."""
    try:
        return torch.as_tensor(labels.copy())
    except (TypeError, ValueError):
        raise TypeError(
            f"Labels for {name} have the wrong dtype.\n"
            "  Expected: an integer dtype, in the byte order of this machine\n"
            f"  Got:      {labels.dtype!r}"
        ) from None


def overlaps(tensor: Tensor) -> bool:
    """Whether entries may share memory, as those of an expanded or unfolded tensor do."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check_writable(tensor: Tensor, name: str) -> None:
    """Refuses a dense tensor in which entries share memory.

    Raises:
        ValueError: it is one.
    """
    if overlaps(tensor):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} cannot be written.\n"
            "  Expected: a place in memory for every entry, as after clone()\n"
            f"  Got:      strides {tensor.stride()}"
        )


def _checked_labels(labels: Tensor, tensor: Tensor, name: str) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype in (torch.bool, torch.uint64):
        raise TypeError(
            f"Labels for {name} have the wrong dtype.\n"
            "  Expected: an integer dtype that fits into int64\n"
            f"  Got:      {labels.dtype}"
        )
    if labels.shape != tensor.shape[:1]:
        raise ValueError(
            f"Labels for {name} have the wrong shape.\n"
            f"  Parameter: {tuple(tensor.shape)}\n"
            f"  Expected:  {tuple(tensor.shape[:1])}, one label for each slice along dimension 0\n"
            f"  Got:       {tuple(labels.shape)}"
        )
    labels = labels.detach().to("cpu", torch.int64)
    wrong = (labels < FREE).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"Labels for {name} have a negative value.\n"
            f"  Expected: group numbers from 0 on, or {FREE} for a free slice\n"
            f"  Got:      {int(labels[at])} at position {at}"
        )
    return labels


def _labels_from_lists(groups: Any, tensor: Tensor, name: str) -> Tensor:
    expected = "  Expected: a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels\n"
    try:
        if isinstance(groups, (str, bytes)):
            raise TypeError
        members = [list(group.tolist() if isinstance(group, Tensor) else group) for group in groups]
    except TypeError:
        hint = " (labels go into a tensor: torch.tensor(labels))" if isinstance(groups, (list, tuple)) else ""
        raise TypeError(f"Groups for {name} are not groups.\n{expected}  Got:      {shown(groups)}{hint}") from None
    flat = list(chain.from_iterable(members))
    if not set(map(type, flat)) <= {int}:
        flat = [_integer(i, name, expected) for i in flat]

    count = tensor.shape[0]
    outside = [i for i in flat if not 0 <= i < count]
    if outside:
        raise IndexError(
            f"An index for {name} is out of range.\n"
            f"  Parameter: {tuple(tensor.shape)}\n"
            f"  Expected:  indices from 0 to {count - 1}\n"
            f"  Got:       {outside[0]}"
        )
    indices = torch.tensor(flat, dtype=torch.int64)
    numbers = torch.arange(len(members)).repeat_interleave(torch.tensor([len(m) for m in members], dtype=torch.int64))
    repeated = (torch.bincount(indices, minlength=count) > 1).nonzero()
    if len(repeated):
        at = int(repeated[0])
        raise ValueError(
            f"An index for {name} occurs more than once.\n"
            "  Expected: each index in one group, once\n"
            f"  Got:      {at} in groups {numbers[indices == at].tolist()}"
        )
    return torch.full((count,), FREE).index_put_((indices,), numbers)


def _integer(value: Any, name: str, expected: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return as_int(value)
    except TypeError:
        raise TypeError(f"An index for {name} is not an integer.\n{expected}  Got:      {shown(value)}") from None


def _renumbered(labels: Tensor) -> Tensor:
    """Groups numbered in the order of their first members."""
    tied = (labels != FREE).nonzero().squeeze(1)
    names, number = torch.unique(labels[tied], return_inverse=True)
    first = torch.full_like(names, labels.numel()).scatter_reduce_(0, number, tied, "amin")
    rank = torch.empty_like(first).index_put_((first.argsort(),), torch.arange(len(first)))
    return torch.full_like(labels, FREE).index_put_((tied,), rank[number])


def described(labels: Tensor) -> str:
    """How many groups, members and free slices canonical labels have, in words."""
    free = int((labels == FREE).sum())
    count = group_count(labels)
    return f"{count} group{'' if count == 1 else 's'} of {labels.numel() - free} members, {free} free"


def group_count(labels: Tensor) -> int:
    """The number of groups in canonical labels."""
    return int(labels.max()) + 1 if labels.numel() else 0


def fingerprint(labels: Tensor) -> str:
    """What a checkpoint says of a tie: readable, and the same for the same tie.

    A group of one member ties nothing, and counts as a free slice.
    """
    sizes = torch.bincount(labels[labels != FREE], minlength=1)
    labels = _renumbered(torch.where((labels != FREE) & (sizes[labels] > 1), labels, FREE))
    # Their bytes without NumPy, which torch does not need to have.
    digest = hashlib.sha256(ctypes.string_at(labels.data_ptr(), labels.nbytes)).hexdigest()
    return f"{described(labels)}, sha256 {digest}"


def shown(value: Any, limit: int = 80) -> str:
    """A value and its type, short enough for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= limit else text[: limit - 3] + '...'} ({type(value).__name__})"
