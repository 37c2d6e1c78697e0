"""What is tied: from what the user wrote to labelled slices.

Lists of indices, or a tensor of labels -> :class:`~tieopt.ties.slices.Slices`. Everything that a user can get
wrong about a tie is found here, before anything is written; whoever holds slices may trust them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import index as as_int
from typing import Any, NamedTuple, Protocol, SupportsIndex

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from tieopt.errors import shown, shown_position
from tieopt.tensors import is_sharded, overlaps
from tieopt.ties.slices import FREE, Slices

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


# Scales whose squares and quotients, and sums of many of them, are neither infinite nor zero.
_LARGEST_SCALE = 2.0**100

# Of a joined tie, so that it is shown on one line that can be read.
_SHOWN_PARTS = 4

# Labels, or lists of indices. A NumPy array is an iterable of anything.
Groups = Tensor | Iterable[Iterable[SupportsIndex]]


class SupportsArray(Protocol):
    """What can be read as a NumPy array."""

    def __array__(self) -> Any: ...


class _Fields(NamedTuple):
    param: Tensor | str
    groups: Any
    dim: int
    scale: Any


class Part(_Fields):
    """What a tie labels in one parameter: a named tuple.

    Attributes:
        param: the parameter, or its name.
        groups: the labels, int64 on the CPU, if a :class:`Tie` was made for a tensor; else what was given.
        dim: the dimension along which the slices lie.
        scale: as ``groups``, float64 on the CPU, or None.
    """

    # The name of a parameter that is a tensor, to be shown; not a field, because the four are unpacked.
    _name: str | None = None

    def slices(self, tensor: Tensor, name: str) -> Slices:
        """The slices of a tensor that it labels; raises as :class:`Tie`."""
        return slices_for(tensor, self.groups, self.dim, self.scale, name)

    def __repr__(self) -> str:
        if isinstance(self.param, Tensor):
            name = "parameter" if self._name is None else repr(self._name)
            return f"Tie({name} of shape {tuple(self.param.shape)}, {Slices(self.groups, self.scale, self.dim)})"
        dim = f", dim={self.dim!r}" if self.dim != 0 else ""
        scale = f", scale={shown(self.scale)}" if self.scale is not None else ""
        return f"Tie({self.param!r}, {shown(self.groups)}{dim}{scale})"


class Tie:
    r"""Which slices of a parameter share one value.

    A *slice* is what one label labels: a row of a matrix, a kernel of a convolution, an entry of a bias,
    or a single element. Slices in one *group* are tied to each other; slices in no group are
    *free* and never touched.

    The members of a group are multiples of its shared value :math:`w_0`. Tying takes the :math:`w_0` whose
    multiples come nearest to the members as they were, by least squares:

    .. math:: w_i = s_i w_0, \qquad w_0 = \frac{\sum_j s_j w_j}{\sum_j s_j^2}

    Without ``scale`` every :math:`s_i` is 1, and :math:`w_0` the mean. A scale of -1 is a flipped sign, and
    0 pins a slice at zero; a group whose scales are all 0 is pinned as a whole.

    A tie for a name is checked when an optimizer finds the parameter. Labels and scales are copied.

    Args:
        param: the parameter, or its name if the optimizer was built from ``named_parameters()``: of one
            dimension or more, dense, any complex dtype or floating dtype with a sign (8 to 64 bits), any
            memory layout.
        groups: a list of lists of indices along ``dim``, each index at most once; or a tensor (or NumPy
            array) of labels, any integer dtype but uint64: slices with the same label are tied, -1 is free.
            The shape of labels is a leading part of the parameter's: for a convolution's weight
            ``[out, in, k, k]``, ``[out]`` labels rows, ``[out, in]`` kernels, and ``[out, in, k, k]`` single
            elements.
        dim: the dimension along which the slices lie; 1 ties the columns of a matrix, and negative ones
            count from the end. The shape of labels is then that of ``param.movedim(dim, 0)``, or how it begins.
        scale: what multiple of its group's shared value each slice is, a tensor (or NumPy array) in the
            shape of the labels (for lists, one for each index of ``dim``), any real dtype: finite, and if
            not zero from 2**-100 to 2**100 in magnitude.

    Raises:
        TypeError: ``param`` is neither a tensor nor a name, or has a dtype, layout or class that cannot be tied;
            ``groups`` or ``dim`` hold something other than integers, or ``scale`` something other than real
            numbers.
        IndexError: an index, or ``dim``, is out of range.
        ValueError: ``param`` has no dimension, an index occurs twice, a label is below -1, ``scale`` has a
            number that it must not have, or labels or scale have the wrong shape.

    Example:
        >>> import torch
        >>> from tieopt import Tie, TiedOptimizer
        >>> weight = torch.nn.Parameter(torch.randn(5, 3))
        >>> Tie(weight, [[4, 1], [0, 2]])
        Tie(parameter of shape (5, 3), 2 groups of 4 members in all, 1 free)
        >>> Tie(weight, torch.tensor([0, 1, 0]), dim=1)
        Tie(parameter of shape (5, 3), 2 groups of 3 members in all, 0 free, dim=1)

        Row 2 is the opposite of row 0, and row 3 is zero:

        >>> labels = torch.tensor([0, -1, 0, 0, -1])
        >>> tie = Tie(weight, labels, scale=torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0]))
        >>> optimizer = TiedOptimizer(torch.optim.SGD([weight]), tie)
        >>> torch.equal(weight[2], -weight[0]), bool(weight[3].any())
        (True, False)

    Attributes:
        parts: what it labels, for each parameter that was joined a named tuple of ``param``, ``groups``,
            ``dim`` and ``scale``. If ``param`` is a tensor, ``groups`` are int64 labels and ``scale`` is None
            or float64, both on the CPU; for a name they are what was given.
    """

    parts: tuple[Part, ...]

    def __init__(
        self, param: Tensor | str, groups: Groups, *, dim: int = 0, scale: Tensor | SupportsArray | None = None
    ) -> None:
        if not isinstance(param, (Tensor, str)):
            hint = " (tie its parameters, such as its .weight)" if isinstance(param, Module) else ""
            raise TypeError(
                "A tie needs a parameter.\n"
                "  Expected: a tensor, or the name of a parameter\n"
                f"  Got:      {shown(param)}{hint}"
            )
        if isinstance(param, Tensor):
            slices = slices_for(param, groups, dim, scale, "the parameter")
            groups, scale, dim = slices.labels, slices.scale, slices.dim
        elif isinstance(groups, Iterator):
            groups = [list(group) for group in groups]
        self.parts = (Part(param, groups, dim, scale),)

    @classmethod
    def join(cls, *ties: Tie) -> Tie:
        """Ties slices of several parameters, or along several dimensions: the same label, the same group.

        The slices must have one shape, and the parameters one dtype and device. Lists of indices are
        labelled by their place: the first list of each tie is one group.

        Sharing between two layers is most often done by assigning one Parameter to both modules; this also
        does it for a part of a parameter, or across a transposition.

        A group starts from the mean of its members, which of independent random weights is smaller than they are. With
        ``TiedOptimizer(..., start="first")`` it starts from the first of them, as where modules share a Parameter:
        that of the tie which is given first.

        Args:
            *ties: those to join, at least one.

        Returns:
            One tie, whose ``parts`` are those of all. A :class:`~tieopt.TiedOptimizer` checks dtypes and
            devices, and the shapes of what is joined by name.

        Raises:
            TypeError: something is no :class:`Tie`, or there is nothing.
            ValueError: the slices have different shapes.

        Example:
            An autoencoder whose decoder is the encoder transposed:

            >>> import torch
            >>> from tieopt import Tie, TiedOptimizer
            >>> encoder, decoder = torch.nn.Linear(8, 3), torch.nn.Linear(3, 8)
            >>> rows = Tie(encoder.weight, torch.arange(3))
            >>> columns = Tie(decoder.weight, torch.arange(3), dim=1)
            >>> inner = torch.optim.Adam([encoder.weight, decoder.weight])
            >>> before = encoder.weight.detach().clone()
            >>> optimizer = TiedOptimizer(inner, Tie.join(rows, columns), start="first")
            >>> torch.equal(encoder.weight, decoder.weight.T), torch.equal(encoder.weight, before)
            (True, True)
        """
        for tie in ties or (None,):
            if not isinstance(tie, Tie):
                hint = " (Tie.join(*ties) joins those of a list)" if isinstance(tie, (list, tuple)) else ""
                raise TypeError(f"Tie.join joins ties.\n  Expected: Ties, at least one\n  Got:      {shown(tie)}{hint}")
        joined = cls.__new__(cls)
        joined.parts = tuple(chain.from_iterable(tie.parts for tie in ties))
        known = [part for part in joined.parts if isinstance(part.param, Tensor)]
        check_one_shape([(part.slices(part.param, "the parameter"), part.param) for part in known])  # type: ignore
        return joined

    def __repr__(self) -> str:
        if len(self.parts) == 1:
            return repr(self.parts[0])
        more = [f"and {len(self.parts) - _SHOWN_PARTS} more"] if len(self.parts) > _SHOWN_PARTS else []
        return f"Tie.join({', '.join([*map(repr, self.parts[:_SHOWN_PARTS]), *more])})"


def with_name(tie: Tie, name: str | None) -> Tie:
    """Show a tie of one parameter, which is a tensor, with the name that the parameter has."""
    tie.parts[0]._name = name
    return tie


# What an optimizer takes: groups by parameter or name, or ties.
Ties = Mapping[Any, Any] | Tie | Iterable[Tie]


def slices_for(tensor: Tensor, groups: Any, dim: Any, scale: Any, name: str) -> Slices:
    """Validates a tie against the tensor that it is for.

    Args:
        tensor: what is to be tied.
        groups: as in :class:`Tie`.
        dim: as in :class:`Tie`.
        scale: as in :class:`Tie`.
        name: how the errors call the tensor.

    Returns:
        The slices, with the labels that were given.
    """
    if not isinstance(tensor, Tensor) or is_lazy(tensor):
        hint = " (call the module once, which gives it one)" if isinstance(tensor, Tensor) else ""
        raise TypeError(
            f"{name} cannot be tied.\n  Expected: a tensor, with a shape\n  Got:      {type(tensor).__name__}{hint}"
        )
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"{name} of shape {tuple(tensor.shape)} cannot be tied.\n"
            "  Expected: a dense tensor of a floating or complex dtype, on a device that holds its data\n"
            f"  Got:      {tensor.dtype}, {tensor.layout}, device {tensor.device}{_way_to_plain(tensor)}"
        )
    if tensor.dim() == 0:
        raise ValueError(
            f"{name} has no slices to tie.\n"
            "  Expected: a tensor of one or more dimensions, for example of shape (1,)\n"
            "  Got:      a tensor of shape ()"
        )
    if not writes_through_views(tensor):
        raise TypeError(
            f"{name} of shape {tuple(tensor.shape)} cannot be tied, because its entries cannot be written one by one.\n"
            "  Expected: a plain tensor: tie and train the weights as they are before they are quantised or packed\n"
            f"  Got:      {type(tensor).__name__} of {tensor.dtype}"
        )
    dim = _checked_dim(dim, tensor, name)
    shape = tensor.movedim(dim, 0).shape
    along = f"along dimension {dim}"
    if isinstance(groups, Tensor):
        labels = _checked_labels(groups, tensor, shape, along, name)
    elif hasattr(groups, "__array__"):
        labels = _checked_labels(_from_array(groups, "Labels", "an integer dtype", name), tensor, shape, along, name)
    else:
        labels = _labels_from_lists(groups, tensor, shape[0], name)
    return Slices(labels, _checked_scale(scale, labels, tensor, name), dim)


def _way_to_plain(tensor: Tensor) -> str:
    """How a tensor can be tied that is not as it has to be, in brackets; nothing where there is no general way."""
    if tensor.is_meta:
        return " (give it data first, as module.to_empty(device=...) does)"
    if tensor.layout != torch.strided:
        return " (to_dense() makes it dense)" if tensor.layout != torch.jagged else ""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return " (tie and train the floating weights, and quantise them afterwards)"
    return ""


def writes_through_views(tensor: Tensor) -> bool:
    """Whether what is written to a view of a tensor is then read from it, as tying relies on.

    It always is for plain tensors. Classes that replace torch's operators, such as those of quantised weights, may have
    no views, views that are copies, or round what they are given, so it is tried on a copy.
    """
    own_operators = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if not own_operators or is_sharded(tensor):
        return True
    try:
        copy = tensor.detach().clone()
        written = torch.linspace(1, 2, copy.numel(), device=copy.device).to(copy.dtype).view(copy.shape).movedim(-1, 0)
        copy.movedim(-1, 0).copy_(written)
        return bool((copy.movedim(-1, 0) == written).all())
    except Exception:  # Whatever such a class raises, it cannot be tied.
        return False


def check_one_shape(slices: Sequence[tuple[Slices, Tensor]], names: Sequence[str] | None = None) -> None:
    """Refuses to join slices of different shapes.

    Raises:
        ValueError: they differ.
    """
    for number, (each, tensor) in enumerate(slices):
        first, other = slices[0][0].slice_shape(slices[0][1]), each.slice_shape(tensor)
        if first != other:
            called = [names[i] if names else f"part {i}" for i in (0, number)]
            raise ValueError(
                "Joined slices have different shapes.\n"
                f"  Expected: slices of shape {tuple(first)}, as in {called[0]} {tuple(slices[0][1].shape)}\n"
                f"  Got:      {tuple(other)} in {called[1]} {tuple(tensor.shape)}"
            )


def _checked_dim(dim: Any, tensor: Tensor, name: str) -> int:
    expected = (
        f"  Parameter: {tuple(tensor.shape)}\n  Expected:  an integer from {-tensor.dim()} to {tensor.dim() - 1}\n"
    )
    try:
        if isinstance(dim, bool):
            raise TypeError
        number = as_int(dim)
    except TypeError:
        raise TypeError(f"dim for {name} is not an integer.\n{expected}  Got:       {shown(dim)}") from None
    if not -tensor.dim() <= number < tensor.dim():
        raise IndexError(f"dim for {name} is out of range.\n{expected}  Got:       {number}")
    return number % tensor.dim()


def _checked_scale(scale: Any, labels: Tensor, tensor: Tensor, name: str) -> Tensor | None:
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        if not hasattr(scale, "__array__"):
            raise TypeError(
                f"The scale for {name} is no tensor.\n"
                f"  Expected: a tensor of real numbers of shape {tuple(labels.shape)}, or None\n"
                f"  Got:      {shown(scale)}"
            )
        scale = _from_array(scale, "Scales", "a real dtype", name)
    _check_readable(scale, "Scales", name)
    if scale.is_complex() or scale.dtype == torch.bool:
        raise TypeError(
            f"The scale for {name} has the wrong dtype.\n  Expected: a real dtype\n  Got:      {scale.dtype}"
        )
    if scale.shape != labels.shape:
        raise ValueError(
            f"The scale for {name} has the wrong shape.\n"
            f"  Parameter: {tuple(tensor.shape)}\n"
            f"  Expected:  {tuple(labels.shape)}, one number for each label\n"
            f"  Got:       {tuple(scale.shape)}"
        )
    scale = scale.detach().to("cpu", torch.float64, copy=True)
    size = scale.abs()
    wrong = ~((size == 0) | ((size >= 1 / _LARGEST_SCALE) & (size <= _LARGEST_SCALE)))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"The scale for {name} has a value that scales nothing.\n"
            "  Expected: finite numbers, zero or from 2**-100 to 2**100 in magnitude\n"
            f"  Got:      {float(scale[at])} at position {shown_position(at)}"
        )
    return None if bool((scale == 1).all()) else scale


def _from_array(array: Any, what: str, expected: str, name: str) -> Tensor:
    """A NumPy array as a tensor; a copy, because torch takes none that is read-only or reversed."""
    try:
        return torch.as_tensor(array.copy())
    except (TypeError, ValueError):
        raise TypeError(
            f"{what} for {name} have the wrong dtype.\n"
            f"  Expected: {expected}, in the byte order of this machine\n"
            f"  Got:      {array.dtype!r}"
        ) from None


def _check_readable(tensor: Tensor, what: str, name: str) -> None:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        raise TypeError(
            f"{what} for {name} cannot be read.\n"
            "  Expected: a dense tensor, on a device that holds its data\n"
            f"  Got:      {shown(tensor)}, {tensor.layout}, device {tensor.device}"
        )
    if is_sharded(tensor):
        raise TypeError(
            f"{what} for {name} are sharded.\n"
            "  Expected: those of the whole parameter on every rank, as full_tensor() returns them\n"
            f"  Got:      {type(tensor).__name__} with placements {tensor.placements}"  # type: ignore[attr-defined]
        )


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


def _checked_labels(labels: Tensor, tensor: Tensor, shape: torch.Size, along: str, name: str) -> Tensor:
    _check_readable(labels, "Labels", name)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype in (torch.bool, torch.uint64):
        raise TypeError(
            f"Labels for {name} have the wrong dtype.\n"
            "  Expected: an integer dtype that fits into int64\n"
            f"  Got:      {labels.dtype}"
        )
    if not labels.dim() or labels.shape != shape[: labels.dim()]:
        deeper = f", or more of the leading dimensions of {tuple(shape)}" if len(shape) > 1 else ""
        raise ValueError(
            f"Labels for {name} have the wrong shape.\n"
            f"  Parameter: {tuple(tensor.shape)}\n"
            f"  Expected:  {tuple(shape[:1])}, one label for each slice {along}{deeper}\n"
            f"  Got:       {tuple(labels.shape)}{_fitting_dim(labels, tensor)}"
        )
    labels = labels.detach().to("cpu", torch.int64, copy=True)
    wrong = (labels < FREE).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise ValueError(
            f"Labels for {name} have a negative value.\n"
            f"  Expected: group numbers from 0 on, or {FREE} for a free slice\n"
            f"  Got:      {int(labels[at])} at position {shown_position(at)}"
        )
    return labels


def _fitting_dim(labels: Tensor, tensor: Tensor) -> str:
    """Along which dimension labels fit that do not fit as they were given, in brackets."""
    fitting = [dim for dim, size in enumerate(tensor.shape) if labels.shape == (size,)]
    return f" (as many as there are slices along dimension {fitting[0]})" if fitting else ""


def _labels_from_lists(groups: Any, tensor: Tensor, count: int, name: str) -> Tensor:
    expected = "  Expected: a list of lists of indices, as [[0, 3], [1, 2, 5]], or an integer tensor of labels\n"
    try:
        if isinstance(groups, (str, bytes)):
            raise TypeError
        # To ask for the type of a million lists takes longer than to read them.
        members = [
            group if type(group) is list else list(group.tolist() if isinstance(group, Tensor) else group)
            for group in groups
        ]
    except TypeError:
        hint = " (labels go into a tensor: torch.tensor(labels))" if isinstance(groups, (list, tuple)) else ""
        hint = " (a Tie stands for itself, in a list of Ties)" if isinstance(groups, Tie) else hint
        raise TypeError(f"Groups for {name} are not groups.\n{expected}  Got:      {shown(groups)}{hint}") from None
    if isinstance(groups, tuple) and len(groups) == 2 and all(isinstance(one, Tensor) and one.dim() for one in groups):
        first, second = groups
        if first.shape == second.shape and second.is_floating_point():
            got = f"  Got:      {shown(first)}, and {shown(second)}"
            raise TypeError(
                f"Groups for {name} are labels and a scale.\n  Expected: Tie(parameter, labels, scale=scale)\n{got}"
            )
    flat = list(chain.from_iterable(members))
    if not set(map(type, flat)) <= {int}:
        flat = [_integer(i, name, expected) for i in flat]

    outside = [i for i in flat if not 0 <= i < count]
    if outside:
        raise IndexError(
            f"An index for {name} is out of range.\n"
            f"  Parameter: {tuple(tensor.shape)}\n"
            f"  Expected:  {f'indices from 0 to {count - 1}' if count else 'none, as there is nothing to index'}\n"
            f"  Got:       {outside[0]}"
        )
    indices = torch.tensor(flat, dtype=torch.int64, device="cpu")
    numbers = torch.arange(len(members), device="cpu").repeat_interleave(
        torch.tensor([len(m) for m in members], dtype=torch.int64, device="cpu")
    )
    repeated = (torch.bincount(indices, minlength=count) > 1).nonzero()
    if len(repeated):
        at = int(repeated[0])
        raise ValueError(
            f"An index for {name} occurs more than once.\n"
            "  Expected: each index in one group, once\n"
            f"  Got:      {at} in groups {numbers[indices == at].tolist()}"
        )
    return torch.full((count,), FREE, device="cpu").index_put_((indices,), numbers)


def _integer(value: Any, name: str, expected: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return as_int(value)
    except TypeError:
        raise TypeError(f"An index for {name} is not an integer.\n{expected}  Got:      {shown(value)}") from None
