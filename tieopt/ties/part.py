"""What a tie says of one parameter, read into labelled slices.

:func:`slices_for` reads it: lists of indices, or labels in a tensor or an array, become
:class:`~tieopt.ties.slices.Slices`. Whatever a user can get wrong about the tie of one tensor is refused here, before
anything is written, so that other code can rely on slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, SupportsIndex

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tieopt.errors import as_integer, integer_between, refusal, shown, shown_entry
from tieopt.tensors import calculable, in_front, local, overlaps, real, sharding_of, sharding_of_slices
from tieopt.ties.offsets import Offset, not_repeated
from tieopt.ties.slices import FREE, Slices


class SupportsArray(Protocol):
    """An object that can be read as a NumPy array."""

    def __array__(self) -> Any: ...


# Lists of indices, or labels in a tensor. A NumPy array is an iterable of anything.
Groups = Tensor | Iterable[Iterable[SupportsIndex]]


class Whole:
    """Stands for the groups of a parameter that is tied as a whole: the label of a slice is its number."""


class _Fields(NamedTuple):
    param: Tensor | str
    groups: Any
    dim: int
    scale: Any
    offset: Any = None


class Frozen:
    """The offset of pinned slices that stay as they are when their tie is bound to an optimizer."""

    def __reduce__(self) -> str:
        return "FROZEN"


FROZEN = Frozen()


def readable_again(groups: Any) -> Any:
    """Return groups with lists in place of iterators, which can be read only once."""
    is_iterator = isinstance(groups, Iterator)
    # There may be millions of lists.
    if is_iterator or (
        isinstance(groups, (list, tuple))
        and any(type(group) is not list and isinstance(group, Iterator) for group in groups)
    ):
        return [list(group) if isinstance(group, Iterator) else group for group in groups]
    return groups


class Part(_Fields):
    """The part of a tie that lies in one parameter: a named tuple.

    Attributes:
        param: the parameter, or its name; of :meth:`Tie.equal` also a module.
        groups: the labels, int64 on the CPU, if ``param`` is a tensor; else what the user gave.
        dim: the dimension along which the slices lie.
        scale: as ``groups``, float64 on the CPU, or None.
        offset: of the shape of ``param`` if that is a tensor, or None; else what the user gave.
    """

    # The name of a parameter that is a tensor, to be shown; no field.
    _name: str | None = None

    def slices(self, tensor: Tensor, name: str) -> Slices:
        """Return the labelled slices of a tensor, checked as by :func:`slices_for`; frozen ones as they are now."""
        slices = slices_for(tensor, self.groups, self.dim, self.scale, name, self.offset)
        return slices.frozen_at(tensor) if self.offset is FROZEN else slices

    def __repr__(self) -> str:
        if self.groups is Whole:
            return shown(self.param) if isinstance(self.param, Tensor) else " ".join(repr(self.param).split())
        if isinstance(self.param, Tensor):
            name = "parameter" if self._name is None else repr(self._name)
            is_frozen = self.offset is FROZEN
            sharding = sharding_of(self.groups) if are_sharded(self.groups) else None
            slices = Slices(local(self.groups), None if is_frozen else self.scale, self.dim, sharding=sharding)
            more = ", frozen" if is_frozen else ", with an offset" * (self.offset is not None)
            return f"Tie({name} of shape {tuple(self.param.shape)}, {slices}{more})"
        dim = f", dim={self.dim!r}" if self.dim != 0 else ""
        scale = f", scale={shown(self.scale)}" if self.scale is not None else ""
        offset = f", offset={shown(self.offset)}" if self.offset is not None else ""
        offset = ", frozen" if self.offset is FROZEN else offset
        return f"Tie({self.param!r}, {shown(self.groups)}{dim}{scale}{offset})"


def are_sharded(groups: Any) -> bool:
    """Return whether groups are labels of which each rank has those of its own slices."""
    return sharding_of(groups)[0] is not None


# --- one tie of one tensor, read and checked ---

_EIGHT_BITS = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# The dtypes that have a mean and that torch converts to the others.
_DTYPES = _EIGHT_BITS | _FLOATS | {torch.complex32, torch.complex64, torch.complex128}

# For scales up to here and down to its inverse, squares, quotients and long sums are neither infinite nor zero.
_LARGEST_SCALE = 2.0**100

# Multiples of offsets up to here, and long sums of them, are finite.
_LARGEST_OFFSET = 2.0**512

_GROUPS = "a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels"


def slices_for(tensor: Tensor, groups: Any, dim: Any, scale: Any, name: str, offset: Any = None) -> Slices:
    """Read a tie of a tensor into labelled slices.

    Args:
        tensor: the tensor to be tied.
        groups: as in :class:`Tie`.
        dim: as in :class:`Tie`.
        scale: as in :class:`Tie`.
        name: the name of the tensor in errors.
        offset: as in :class:`Tie`; or ``FROZEN``, which pins slices, at zero as long as they are not bound.

    Returns:
        The slices, with labels as they were given; lists are numbered from 0 on. Of sharded labels they are the slices
        that this rank has.

    Raises:
        TypeError, IndexError, ValueError: as :class:`Tie`.
    """
    _check_can_be_tied(tensor, name)
    ndim = max(tensor.dim(), 1)
    dim = integer_between(dim, f"dim for {name}", -ndim, ndim - 1, IndexError, parameter=tuple(tensor.shape)) % ndim
    if groups is Whole:
        groups = torch.arange(len(in_front(tensor, dim)), device="cpu")
    # As tensors and NumPy arrays have it.
    read = _read_labels if hasattr(groups, "__array__") else _read_lists
    labels = read(groups, dim, tensor, name)
    if offset is FROZEN:
        return Slices(labels, torch.zeros(labels.shape, dtype=torch.float64, device="cpu"), dim)
    if are_sharded(groups):
        if scale is not None or offset is not None:
            what, got = f"The tie of {name} has sharded labels.", f"scale={shown(scale)}, offset={shown(offset)}"
            raise refusal(ValueError, what, expected="no scale and no offset; or labels of all slices", got=got)
        return Slices(labels, dim=dim, sharding=sharding_of(groups))
    scale, entries = _read_scale(scale, labels, tensor, name), _read_offset(offset, tensor, name)
    return Slices(labels, scale, dim, None if entries is None else Offset.of_entries(entries, labels, dim))


def _check_can_be_tied(tensor: Any, name: str) -> None:
    if not isinstance(tensor, Tensor) or is_lazy(tensor):
        hint = "call the module once, which gives it one" if isinstance(tensor, Tensor) else ""
        got = type(tensor).__name__
        raise refusal(TypeError, f"This cannot be tied: {name}.", hint, expected="a tensor, with a shape", got=got)
    cannot = f"This cannot be tied: {name} of shape {tuple(tensor.shape)}"
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        expected = "a dense tensor of a floating or complex dtype, on a device that holds its data"
        got = f"{tensor.dtype}, {tensor.layout}, device {tensor.device}"
        raise refusal(TypeError, f"{cannot}.", _way_to_a_plain_tensor(tensor), expected=expected, got=got)
    if not _writes_through_views(tensor):
        what = f"{cannot}, whose entries cannot be written one by one."
        expected = "a plain tensor: tie and train the weights as they are before they are quantised or packed"
        raise refusal(TypeError, what, expected=expected, got=f"{type(tensor).__name__} of {tensor.dtype}")


def _way_to_a_plain_tensor(tensor: Tensor) -> str:
    """Return how to get from a tensor to one that can be tied; nothing if there is no general way."""
    if tensor.is_meta:
        return "give it data first, as module.to_empty(device=...) does"
    if tensor.layout != torch.strided:
        return "to_dense() makes it dense" if tensor.layout != torch.jagged else ""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return "tie and train the floating weights, and quantise them afterwards"
    return ""


def _writes_through_views(tensor: Tensor) -> bool:
    """Return whether what is written to a view of a tensor is then read from the tensor, as tying relies on.

    Plain tensors do so. Classes that replace torch's operators, such as those of quantised weights, may have
    no views, views that are copies, or round what they are given, so it is tried on a copy.
    """
    is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    # A DTensor, which has placements, is written shard by shard.
    if is_plain or hasattr(tensor, "placements"):
        return True
    try:
        copy = tensor.detach().clone()
        written = torch.linspace(1, 2, copy.numel(), device=copy.device).to(copy.dtype).view(copy.shape).movedim(-1, 0)
        copy.movedim(-1, 0).copy_(written)
        return bool((copy.movedim(-1, 0) == written).all())
    except Exception:  # Whatever such a class raises, it cannot be tied.
        return False


def _read_labels(values: Any, dim: int, tensor: Tensor, name: str) -> Tensor:
    is_shard = are_sharded(values) and values.dim() == 1
    labels = values if is_shard else as_tensor(values, "Labels", "an integer dtype", name)
    if not torch.can_cast(labels.dtype, torch.int64) or labels.dtype in (torch.bool, torch.uint64):
        expected = "an integer dtype that fits into int64"
        raise refusal(TypeError, f"Labels for {name} have the wrong dtype.", expected=expected, got=labels.dtype)
    shape = in_front(tensor, dim).shape
    if not labels.dim() or labels.shape != shape[: labels.dim()]:
        fitting = [other for other, size in enumerate(tensor.shape) if labels.shape == (size,)]
        hint = f"as many as there are slices along dimension {fitting[0]}" if fitting else ""
        more = f", or more of the leading dimensions of {tuple(shape)}" if len(shape) > 1 else ""
        expected = f"{tuple(shape[:1])}, one label for each slice along dimension {dim}{more}"
        lines = {"parameter": tuple(tensor.shape), "expected": expected, "got": tuple(labels.shape)}
        raise refusal(ValueError, f"Labels for {name} have the wrong shape.", hint, **lines)
    if is_shard:
        wanted, given = sharding_of_slices(tensor, dim), sharding_of(labels)
        if wanted != given or not tensor.dim():
            is_plain = wanted[0] is None or not tensor.dim()
            expected = "labels of all slices, in a plain tensor" if is_plain else f"{wanted[1]} on {wanted[0]}"
            what = f"Labels for {name} are not sharded as its slices."
            raise refusal(ValueError, what, expected=expected, got=f"{given[1]} on {given[0]}")
    labels = local(labels).to("cpu", torch.int64, copy=True)
    wrong = labels < FREE
    if wrong.any():
        expected, got = f"group numbers from 0 on, or {FREE} for a free slice", shown_entry(labels, wrong)
        raise refusal(ValueError, f"Labels for {name} have a negative value.", expected=expected, got=got)
    return labels


def _read_lists(groups: Any, dim: int, tensor: Tensor, name: str) -> Tensor:
    """Return labels for lists of indices: 0 for the indices in the first list, 1 for the second, and so on."""
    lists = _checked_lists(groups, name)
    indices = list(chain.from_iterable(lists))
    # There may be millions of indices, and most are plain integers, which need no conversion.
    if not set(map(type, indices)) <= {int}:
        indices = [as_integer(index, f"An index for {name}", expected=_GROUPS) for index in indices]
    count = len(in_front(tensor, dim))
    outside = [index for index in indices if not 0 <= index < count]
    if outside:
        expected = f"indices from 0 to {count - 1}" if count else "none, as there is nothing to index"
        lines = {"parameter": tuple(tensor.shape), "expected": expected, "got": outside[0]}
        raise refusal(IndexError, f"An index for {name} is out of range.", **lines)
    members = torch.tensor(indices, dtype=torch.int64, device="cpu")
    numbers = torch.tensor([n for n, group in enumerate(lists) for _ in group], dtype=torch.int64, device="cpu")
    repeated = (torch.bincount(members, minlength=count) > 1).nonzero()
    if len(repeated):
        index = int(repeated[0])
        got = f"{index} in groups {numbers[members == index].tolist()}"
        expected = "each index in one group, once"
        raise refusal(ValueError, f"An index for {name} occurs more than once.", expected=expected, got=got)
    return torch.full((count,), FREE, device="cpu").index_put_((members,), numbers)


def _checked_lists(groups: Any, name: str) -> list[list[Any]]:
    if isinstance(groups, tuple) and len(groups) == 2 and all(isinstance(group, Tensor) for group in groups):
        labels, scale = groups
        if labels.dim() and labels.shape == scale.shape and scale.is_floating_point():
            expected, got = "Tie(parameter, labels, scale=scale)", f"{shown(labels)}, and {shown(scale)}"
            raise refusal(TypeError, f"Groups for {name} are labels and a scale.", expected=expected, got=got)
    try:
        if isinstance(groups, (str, bytes)):
            raise TypeError
        # There may be millions of lists, and isinstance(group, Tensor) is slow.
        return [
            group if type(group) is list else list(group.tolist() if isinstance(group, Tensor) else group)
            for group in groups
        ]
    except TypeError:
        hint = "a Tie goes into a list of Ties; tie_ and is_tied take its groups" if hasattr(groups, "parts") else ""
        hint = "labels go into a tensor: torch.tensor(labels)" if isinstance(groups, (list, tuple)) else hint
        what = f"Groups for {name} are not groups."
        raise refusal(TypeError, what, hint, expected=_GROUPS, got=shown(groups)) from None


def _read_scale(scale: Any, labels: Tensor, tensor: Tensor, name: str) -> Tensor | None:
    if scale is None:
        return None
    if not hasattr(scale, "__array__"):
        expected = f"a tensor of real numbers of shape {tuple(labels.shape)}, or None"
        raise refusal(TypeError, f"The scale for {name} is no tensor.", expected=expected, got=shown(scale))
    scale = as_tensor(scale, "Scales", "a real dtype", name)
    if scale.is_complex() or scale.dtype == torch.bool:
        what = f"The scale for {name} has the wrong dtype."
        raise refusal(TypeError, what, expected="a real dtype", got=scale.dtype)
    if scale.shape != labels.shape:
        expected = f"{tuple(labels.shape)}, one number for each label"
        lines = {"parameter": tuple(tensor.shape), "expected": expected, "got": tuple(scale.shape)}
        raise refusal(ValueError, f"The scale for {name} has the wrong shape.", **lines)
    scale = scale.detach().to("cpu", torch.float64, copy=True)
    size = scale.abs()
    wrong = ~((size == 0) | ((size >= 1 / _LARGEST_SCALE) & (size <= _LARGEST_SCALE)))
    if wrong.any():
        what = f"The scale for {name} has a value that scales nothing."
        expected = "finite numbers, zero or from 2**-100 to 2**100 in magnitude"
        raise refusal(ValueError, what, expected=expected, got=shown_entry(scale, wrong))
    return None if bool((scale == 1).all()) else scale


def _read_offset(offset: Any, tensor: Tensor, name: str) -> Tensor | None:
    if offset is None:
        return None
    largest = min(torch.finfo(tensor.dtype).max, _LARGEST_OFFSET)
    what, expected = f"The offset for {name} is out of range.", f"numbers of a magnitude up to {largest}"
    if isinstance(offset, (int, float, complex)) and not isinstance(offset, bool):
        try:
            offset = torch.tensor(offset, dtype=torch.complex128 if isinstance(offset, complex) else torch.float64)
        except OverflowError:
            raise refusal(ValueError, what, expected=expected, got=shown(offset)) from None
    if not hasattr(offset, "__array__"):
        expected = f"a tensor of numbers that broadcasts to {tuple(tensor.shape)}, or None"
        raise refusal(TypeError, f"The offset for {name} is no tensor.", expected=expected, got=shown(offset))
    offset = as_tensor(offset, "Offsets", "a floating or complex dtype", name)
    if offset.dtype == torch.bool or (offset.is_complex() and not tensor.is_complex()):
        dtype = f"numbers that {tensor.dtype} has"
        raise refusal(TypeError, f"The offset for {name} has the wrong dtype.", expected=dtype, got=offset.dtype)
    is_number = offset.is_floating_point() or offset.is_complex()
    try:
        offset = not_repeated(offset.detach().expand(tensor.shape))
    except RuntimeError:
        shape = f"one that broadcasts to {tuple(tensor.shape)}, the shape of the parameter"
        raise refusal(
            ValueError, f"The offset for {name} has the wrong shape.", expected=shape, got=tuple(offset.shape)
        ) from None
    # A copy without -0.0, of a dtype that torch calculates with.
    offset = calculable(offset if is_number else offset.double()) + 0.0
    # NaN is not at most anything.
    wrong = ~(real(offset).abs() <= largest)
    if wrong.any():
        raise refusal(ValueError, what, expected=expected, got=shown_entry(real(offset), wrong))
    return offset.expand(tensor.shape) if bool(offset.any()) else None


def as_tensor(values: Any, what: str, dtype: str, name: str) -> Tensor:
    """Return labels or scales, given as a tensor or a NumPy array, as a tensor that can be read on every rank."""
    if not isinstance(values, Tensor):
        try:
            # A copy, because torch takes no array that is read-only or reversed.
            return torch.as_tensor(values.__array__().copy())
        except (TypeError, ValueError):
            expected, got = f"{dtype}, in the byte order of this machine", repr(values.dtype)
            raise refusal(TypeError, f"{what} for {name} have the wrong dtype.", expected=expected, got=got) from None
    if values.layout != torch.strided or values.is_meta or values.is_nested or values.is_quantized:
        expected = "a dense tensor, on a device that holds its data"
        got = f"{shown(values)}, {values.layout}, device {values.device}"
        raise refusal(TypeError, f"{what} for {name} cannot be read.", expected=expected, got=got)
    if hasattr(values, "placements"):
        expected = "those of the whole parameter on every rank, as full_tensor() returns them"
        got = f"{type(values).__name__} with placements {values.placements}"
        raise refusal(TypeError, f"{what} for {name} are sharded.", expected=expected, got=got)
    return values


# --- tensors that are joined, or written ---


def check_one_shape(slices: Sequence[tuple[Slices, Tensor]], names: Sequence[str] | None = None) -> None:
    """Refuse to join slices of different shapes.

    Raises:
        ValueError: they differ.
    """
    shapes = [labelled.slice_shape(tensor.shape) for labelled, tensor in slices]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            first, other = (f"{names[i] if names else f'part {i}'} {tuple(slices[i][1].shape)}" for i in (0, number))
            expected = f"slices of shape {tuple(shapes[0])}, as in {first}"
            got = f"{tuple(shape)} in {other}"
            raise refusal(ValueError, "Joined slices have different shapes.", expected=expected, got=got)


def check_writable(tensor: Tensor, name: str) -> None:
    """Refuse a dense tensor in which entries share memory.

    Raises:
        ValueError: it is one.
    """
    if overlaps(tensor):
        what = f"{name} of shape {tuple(tensor.shape)} cannot be written."
        expected = "a place in memory for every entry, as after clone()"
        raise refusal(ValueError, what, expected=expected, got=f"strides {tensor.stride()}")
