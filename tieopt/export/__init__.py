"""Tied weights as a codebook and indices, in memory and in a file.

What is tied need not be written down for each member. A codebook has each value once, and an index says for each
slice which entry it is: `Deep Compression <https://arxiv.org/abs/1510.00149>`_ stores k-means clusters in this way. In
a file an index takes as many bits as it needs: one with two shared values, five with thirty-two.

Files are of the `safetensors <https://github.com/huggingface/safetensors>`_ format. Their metadata has the ties, and
the hash of everything. Of a parameter ``weight`` there are, instead of its entries,

- ``weight.codebook``: what the members of each group are, ``[entries, *slice]``;
- ``weight.indices``: which entry each slice is, and one more for a free one; packed, one bit or more for each, the
  lowest bit first, uint8;
- ``weight.free``: the entries that are in no group, if there are any, in the order of the parameter;
- ``weight.groups`` and ``weight.scales``, with scales: of which group each entry of the codebook is, and what multiple
  of its shared value.

Parameters that are joined have one codebook, under the name of the first of them. Where a parameter has several ties,
a second one is that of ``weight.1``.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from tieopt.errors import shown
from tieopt.export.codebook import codebook_of, differing, entries_of, fill_, packed, unpacked
from tieopt.export.tensor_file import Reader, Writer, plain
from tieopt.optimizer import TiedOptimizer
from tieopt.tensors import bits, is_sharded
from tieopt.ties.places import BoundTie, found, parameters_of
from tieopt.ties.slices import FREE, Slices, numbered
from tieopt.ties.tie import Groups, SupportsArray, Tie, Ties, slices_for

__all__ = ["encode", "load", "load_ties", "save", "stream"]

_FORMAT = "1"

# The most labels that are read of indices without bits, which version 1.0.0 wrote where all slices are one entry: the
# file does not show that there are so many.
_LABELS_WITHOUT_BITS = 2**24

# What the groups and the scales of the entries of a codebook are written as, whichever has them all exactly first.
_GROUPS = torch.uint8, torch.int16, torch.int32, torch.int64
_SCALES = torch.int8, torch.float32, torch.float64


def encode(
    param: Tensor, groups: Groups, *, dim: int = 0, scale: Tensor | SupportsArray | None = None
) -> tuple[Tensor, Tensor]:
    """A tied tensor as a codebook and indices: ``codebook[indices]`` is the tensor again, bit for bit.

    Along another dimension it is ``codebook[indices].movedim(0, dim)``.

    Args:
        param: the tensor, tied; of any dtype and layout that :class:`~tieopt.Tie` takes.
        groups: as in :class:`~tieopt.Tie`.
        dim: as in :class:`~tieopt.Tie`.
        scale: as in :class:`~tieopt.Tie`.

    Returns:
        The codebook, ``[entries, *slice]``, of the dtype of the tensor. It has an entry for each group, or for each
        multiple of its shared value that occurs, and for each free slice, in the order in which they occur. And the
        indices, which entry each slice is, int64, of the shape of the labels. Both on the device of the tensor.

    Raises:
        TypeError, IndexError, ValueError: as :class:`~tieopt.Tie` says; or the tensor is sharded, or is not tied.

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
    tensor = plain(_stored("the tensor", param))
    # Each free slice is a group of its own.
    labels = slices.labels
    alone = torch.arange(labels.numel(), device="cpu").view(labels.shape) + labels.numel()
    entries = entries_of(numbered([slices._replace(labels=torch.where(labels == FREE, alone, labels))]))
    codebook, (indices,) = codebook_of(entries, [slices], [tensor]), entries.symbols
    _check_tied(codebook, tensor, slices.dim, indices, "the tensor")
    return codebook.to(param.device), indices.to(param.device)


def save(model: Module, ties: TiedOptimizer | Ties, file: str | os.PathLike[str]) -> None:
    """Writes the state of a model to a safetensors file, its tied parameters as codebooks and indices.

    The file is there as a whole, or not at all. The tensors are written one after the other, so that memory is needed
    for one tie at a time, and for a moment room for two files in the folder.

    Args:
        model: whose ``state_dict()`` is written: parameters and buffers, of any layout, on any device.
        ties: the tied optimizer; or what it takes, with parameters of the model or their names.
        file: where to. What is there is replaced, and its permissions are kept.

    Raises:
        TypeError, IndexError, ValueError: as :class:`~tieopt.TiedOptimizer` says; or a parameter is not tied, or not
            the model's; or something in the state is no dense tensor, is sharded, or is of a dtype that the format
            has not.
        RuntimeError: a parameter of a tied optimizer has another shape than when it was tied, or is gone.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from tieopt import TiedOptimizer, export
        >>> model = torch.nn.Linear(8, 6)
        >>> optimizer = TiedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {model.weight: [[0, 5], [1, 2, 3]]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export.save(model, optimizer, f"{folder}/model.safetensors")
        ...     state = export.load(f"{folder}/model.safetensors")
        >>> torch.equal(state["weight"], model.weight)
        True
    """
    if not isinstance(model, Module):
        raise TypeError(f"This cannot be written.\n  Expected: a torch.nn.Module\n  Got:      {shown(model)}")
    state = {name: _stored(name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    names: dict[Any, str] = {}
    aliases: defaultdict[str, list[str]] = defaultdict(list)
    # What is a buffer, too, has the name that an optimizer knows.
    for name, tensor in sorted(state.items(), key=lambda item: not isinstance(item[1], Parameter)):
        first = names.setdefault(_place(tensor), name)
        if first != name:
            aliases[first].append(name)
    with Writer(file) as writer:
        tied: defaultdict[str, list[Slices]] = defaultdict(list)
        stated = [
            _write_tie(writer, tie.slices, params, [_name_of(param, names) for param in params], tied)
            for tie, params in _tied(model, ties)
        ]
        for name, every in tied.items():
            _write_free(writer, name, state[name], every)
        whole = [name for name in names.values() if name not in tied]
        for name in whole:
            writer.add(name, state[name])
        sizes = {name: state[name].shape for name in tied}
        writer.finish({"format": _FORMAT, "ties": stated, "tied": sizes, "whole": whole, "aliases": aliases})


def load(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state that :func:`save` has written, bit for bit, for ``load_state_dict``.

    Args:
        file: where it is.

    Returns:
        For each name the tensor, contiguous, on the CPU. What was one tensor in the model is one tensor here.

    Raises:
        ImportError, OSError, ValueError: as :func:`stream`.

    Example:
        >>> import tempfile, torch
        >>> from tieopt import export
        >>> model = torch.nn.Linear(8, 6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export.save(model, {}, f"{folder}/model.safetensors")
        ...     model.load_state_dict(export.load(f"{folder}/model.safetensors"))
        <All keys matched successfully>
    """
    return dict(stream(file))


def stream(file: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a file, one after the other: only one of them is held at a time.

    The sizes of all tensors are checked against the file before one is made. The number of slices is limited by the
    indices in the file, and the size of a slice by the codebook. Their product is not, because that is what a codebook
    saves: a small file may well have a large tensor.

    Args:
        file: where it is.

    Yields:
        What :func:`load` returns, in another order.

    Raises:
        ImportError: safetensors is missing.
        OSError: the file cannot be opened.
        ValueError: it was cut off or altered, or was not written by :func:`save`; or a tensor is larger than the
            memory. What was given before is as it was written.

    Example:
        >>> import tempfile, torch
        >>> from tieopt import export, tie_
        >>> model, groups = torch.nn.Linear(8, 6), [[0, 5], [1, 2, 3]]
        >>> _ = tie_(model.weight, groups)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export.save(model, {"weight": groups}, f"{folder}/model.safetensors")
        ...     for name, tensor in export.stream(f"{folder}/model.safetensors"):
        ...         print(name, tuple(tensor.shape))
        bias (6,)
        weight (6, 8)
    """
    with Reader(file) as reader:
        contents = _contents_of(reader)
        for name in contents.whole:
            yield from _by_names(contents, name, reader.read(name))
        for name in contents.tied:
            yield from _by_names(contents, name, _read_tied(reader, contents, name))


def load_ties(file: str | os.PathLike[str]) -> list[Tie]:
    """The ties of a file, by the names of the parameters, to go on training.

    Args:
        file: where it is.

    Returns:
        What :class:`~tieopt.TiedOptimizer` takes, if the optimizer was built from ``named_parameters()``. It loads the
        ``state_dict`` of the one that was saved.

    Raises:
        ImportError, OSError, ValueError: as :func:`stream`.

    Example:
        >>> import tempfile, torch
        >>> from tieopt import TiedOptimizer, export, tie_
        >>> model, groups = torch.nn.Linear(8, 6), [[0, 5], [1, 2, 3]]
        >>> _ = tie_(model.weight, groups)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export.save(model, {"weight": groups}, f"{folder}/model.safetensors")
        ...     ties = export.load_ties(f"{folder}/model.safetensors")
        >>> ties
        [Tie('weight', a tensor of shape (6,) and torch.int64)]
        >>> optimizer = TiedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), ties)
    """
    with Reader(file) as reader:
        return [_read_tie(reader, parts) for parts in _contents_of(reader).ties]


class _Part(NamedTuple):
    """What the metadata says of what a tie labels in one parameter.

    Attributes:
        name: of the parameter.
        key: under which its indices are, and for the first part of a tie the codebook.
        dim: the dimension along which the slices lie.
        shape: that of the labels.
        bits: how many each index takes.
    """

    name: str
    key: str
    dim: int
    shape: torch.Size
    bits: int


# --- writing ---


def _stored(name: str, value: Any) -> Tensor:
    """Refuses what has no memory of its own that could be written."""
    if isinstance(value, Tensor):
        unlike = is_lazy(value) or is_sharded(value) or value.is_nested or value.is_quantized
        # Those that are made of others, or are on the meta device, say that they are nowhere.
        if not unlike and value.layout == torch.strided and (not value.numel() or value.data_ptr()):
            return value
        got = f"{type(value).__name__} of {value.dtype}, {value.layout}, device {value.device}"
    else:
        got = shown(value)
    raise TypeError(
        f"{name} cannot be written as it is.\n"
        "  Expected: a dense tensor that is whole in the memory of this process\n"
        f"  Got:      {got}"
    )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What is the same for two tensors if they are one."""
    place = tensor.data_ptr() if tensor.numel() else id(tensor)
    kind = tensor.dtype, tensor.shape, tensor.stride(), tensor.device
    return place, *kind, tensor.is_conj(), tensor.is_neg()


def _name_of(param: Tensor, names: dict[Any, str]) -> str:
    name = names.get(_place(_stored("A tied parameter", param)))
    if name is None:
        raise ValueError(
            "A tied parameter is not in the state of the model.\n"
            "  Expected: a parameter that model.state_dict() has\n"
            f"  Got:      a parameter of shape {tuple(param.shape)}"
        )
    return name


def _tied(model: Module, ties: Any) -> list[tuple[BoundTie, list[Tensor]]]:
    """The ties, and the parameters of each."""
    if isinstance(ties, TiedOptimizer):
        bound, param_groups = ties._tieopt.ties, ties.param_groups
    else:
        named = dict(model.named_parameters())
        param_groups = [{"params": list(named.values()), "param_names": list(named)}]
        bound = found(param_groups, ties, "model")
    return parameters_of(bound, param_groups)


def _write_tie(
    writer: Writer,
    slices: Sequence[Slices],
    params: Sequence[Tensor],
    names: Sequence[str],
    tied: defaultdict[str, list[Slices]],
) -> list[dict[str, Any]]:
    """Writes a tie, adds its slices to those of each parameter, and returns what the metadata says of its parts."""
    entries = entries_of(slices)
    tensors = [plain(param) for param in params]
    codebook = codebook_of(entries, slices, tensors)
    parts = []
    for each, tensor, name, symbols in zip(slices, tensors, names, entries.symbols, strict=True):
        _check_tied(codebook, tensor, each.dim, symbols, name)
        key = f"{name}.{len(tied[name])}" if tied[name] else name
        # One bit, even where all are equal: a reader can tell from the file how many there are.
        width = max(int(symbols.max()).bit_length(), 1) if symbols.numel() else 0
        writer.add(f"{key}.indices", packed(symbols, width))
        parts.append(_Part(name, key, each.dim, each.labels.shape, width))
        tied[name].append(each)
    key = parts[0].key
    writer.add(f"{key}.codebook", codebook)
    if any(each.scale is not None for each in slices):
        writer.add(f"{key}.groups", _narrow(entries.groups, _GROUPS))
        writer.add(f"{key}.scales", _narrow(entries.scales, _SCALES))
    return [part._asdict() for part in parts]


def _write_free(writer: Writer, name: str, param: Tensor, slices: Sequence[Slices]) -> None:
    """Writes the entries of a parameter that are in no group."""
    free = torch.ones(param.shape, dtype=torch.bool, device="cpu")
    for each in slices:
        free.movedim(each.dim, 0)[each.labels != FREE] = False
    if bool(free.any()):
        writer.add(f"{name}.free", bits(plain(param))[free].view(param.dtype))


def _check_tied(codebook: Tensor, tensor: Tensor, dim: int, symbols: Tensor, name: str) -> None:
    if count := differing(codebook, tensor, dim, symbols):
        raise ValueError(
            "What is not tied cannot be written as a codebook.\n"
            f"  Parameter: {name} of shape {tuple(tensor.shape)}\n"
            "  Expected:  members that are equal bit for bit, as after tie_weights()\n"
            f"  Got:       {count} that differ from the first one of their group"
        )


def _narrow(numbers: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Numbers in the first dtype that has them all exactly."""
    casts = (numbers.to(dtype) for dtype in dtypes)
    return next(cast for cast in casts if torch.equal(cast.to(numbers.dtype), numbers))


# --- reading ---


class _Contents(NamedTuple):
    """What the metadata has: the ties, the shapes of tied parameters, and what else there is."""

    ties: list[list[_Part]]
    tied: dict[str, torch.Size]
    whole: list[str]
    aliases: dict[str, list[str]]


def _contents_of(reader: Reader) -> _Contents:
    """The metadata, so far as they are what :func:`save` writes."""
    stated = reader.contents
    if stated.get("format") != _FORMAT:
        raise reader.error(f"format {_FORMAT}", f"{shown(stated.get('format'))}, of another version of tieopt")
    try:
        contents = _Contents(
            [[_Part(**{**part, "shape": torch.Size(part["shape"])}) for part in parts] for parts in stated["ties"]],
            {name: torch.Size(shape) for name, shape in stated["tied"].items()},
            list(stated["whole"]),
            dict(stated["aliases"]),
        )
        sound = all(_conditions(contents))
    except (LookupError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise reader.error("metadata that tieopt.export.save has written", "others")
    _check_sizes(reader, contents)
    return contents


def _conditions(contents: _Contents) -> Iterator[bool]:
    """What reading relies on; each may be looked at once those before it hold."""
    for shape in contents.tied.values():
        # The strides of a tensor without entries are those of one that has an entry in each dimension.
        yield all(length >= 0 for length in shape) and math.prod(max(length, 1) for length in shape) < 2**59
    every_part = [part for parts in contents.ties for part in parts]
    for part in every_part:
        yield type(part.dim) is type(part.bits) is int and isinstance(part.key, str)
        yield part.dim >= 0 and 0 <= part.bits < 64
        yield len(part.shape) > 0 and part.shape == _moved(contents.tied[part.name], part.dim)[: len(part.shape)]
    yield all(contents.ties)
    yield contents.tied.keys() == {part.name for part in every_part}
    # Each has indices of its own, so that many cannot be made of a few.
    yield len({part.key for part in every_part}) == len(every_part)
    every = [*contents.tied, *contents.whole, *(name for own in contents.aliases.values() for name in own)]
    yield all(isinstance(name, str) for name in every) and len(set(every)) == len(every)


def _check_sizes(reader: Reader, contents: _Contents) -> None:
    """Refuses tensors that do not fit each other, before one is read, or made as large as the metadata say it is."""
    dtypes: dict[str, torch.dtype] = {}
    with_entries = set()
    for parts in contents.ties:
        key = parts[0].key
        dtype, shape = reader.described(f"{key}.codebook")
        # Entries of no numbers take no room: there are no more of them than labels.
        fits = (dtype.is_floating_point or dtype.is_complex) and len(shape) > 0
        fits = fits and shape[0] <= sum(part.shape.numel() for part in parts)
        for part in parts:
            inner = _moved(contents.tied[part.name], part.dim)[len(part.shape) :]
            if not fits or shape[1:] != inner or dtypes.setdefault(part.name, dtype) != dtype:
                raise _unfit(reader, f"{key}.codebook", part.name)
            _check_indices(reader, part, shape[0])
            if shape[0]:
                with_entries.add(part.name)
        if f"{key}.scales" in reader.names:
            for name, allowed in ((f"{key}.groups", _GROUPS), (f"{key}.scales", _SCALES)):
                if reader.described(name)[1] != shape[:1] or reader.described(name)[0] not in allowed:
                    raise _unfit(reader, name, parts[0].name)
    for name, shape in contents.tied.items():
        # What has no entry of a codebook is free as a whole.
        if shape.numel() and name not in with_entries and reader.described(f"{name}.free")[1] != (shape.numel(),):
            raise _unfit(reader, f"{name}.free", name)


def _check_indices(reader: Reader, part: _Part, count: int) -> None:
    key, labels = f"{part.key}.indices", part.shape.numel()
    if (
        reader.described(key) != (torch.uint8, (-(-part.bits * labels // 8),))
        or part.bits > max(count.bit_length(), 1)
        or (not part.bits and labels > _LABELS_WITHOUT_BITS)
    ):
        raise _unfit(reader, key, part.name)


def _moved(shape: torch.Size, dim: int) -> tuple[int, ...]:
    """The shape with a dimension moved to the front."""
    return (shape[dim], *shape[:dim], *shape[dim + 1 :])


def _by_names(contents: _Contents, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for each in (name, *contents.aliases.get(name, ())):
        yield each, tensor


def _read_tied(reader: Reader, contents: _Contents, name: str) -> Tensor:
    """A tied parameter, from the codebooks of its ties."""
    tensor = free = None
    for parts, part in ((own, part) for own in contents.ties for part in own if part.name == name):
        codebook = reader.read(f"{parts[0].key}.codebook")
        symbols = _read_symbols(reader, part, len(codebook))
        if tensor is None or free is None:
            tensor, free = _made(reader, name, contents.tied[name], codebook.dtype)
        fill_(tensor, codebook, part.dim, symbols)
        free.movedim(part.dim, 0)[symbols < len(codebook)] = False
    assert tensor is not None
    assert free is not None
    if bool(free.any()):
        rest = reader.read(f"{name}.free")
        if rest.shape != (int(free.sum()),) or rest.dtype != tensor.dtype:
            raise _unfit(reader, f"{name}.free", name)
        bits(tensor)[free] = bits(rest)
    return tensor


def _made(reader: Reader, name: str, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor to be filled, and which of its entries are free: all of them."""
    try:
        return torch.empty(shape, dtype=dtype, device="cpu"), torch.ones(shape, dtype=torch.bool, device="cpu")
    except RuntimeError:
        got = f"{name} of shape {tuple(shape)} and {dtype}"
        raise reader.error("tensors that fit into memory", got) from None


def _read_tie(reader: Reader, parts: Sequence[_Part]) -> Tie:
    key = parts[0].key
    count = len(reader.read(f"{key}.codebook"))
    groups, scales = torch.arange(count, device="cpu"), None
    if f"{key}.scales" in reader.names:
        groups, scales = reader.read(f"{key}.groups").long(), reader.read(f"{key}.scales").double()
        if bool((groups < 0).any()):
            raise _unfit(reader, f"{key}.groups", parts[0].name)
        if not bool(scales.isfinite().all()):
            raise _unfit(reader, f"{key}.scales", parts[0].name)
    ties = []
    for part in parts:
        symbols = _read_symbols(reader, part, count)
        labels = torch.cat([groups, groups.new_full((1,), FREE)])[symbols]
        scale = None if scales is None else torch.cat([scales, scales.new_ones(1)])[symbols]
        ties.append(Tie(part.name, labels, dim=part.dim, scale=scale))
    return Tie.join(*ties)


def _read_symbols(reader: Reader, part: _Part, count: int) -> Tensor:
    key = f"{part.key}.indices"
    symbols = unpacked(reader.read(key), part.bits, part.shape)
    if symbols.numel() and int(symbols.max()) > count:
        raise _unfit(reader, key, part.name)
    return symbols


def _unfit(reader: Reader, key: str, name: str) -> ValueError:
    return reader.error(f"tensors that make up {name}", f"{key} that does not fit the others")
