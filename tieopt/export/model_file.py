"""Models in files: tied parameters as codebooks, everything else as it is.

The metadata of a file are not trusted: all of them are checked before a tensor is read or made.
"""

from __future__ import annotations

import copy
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import pad

from tieopt.errors import refusal, shown
from tieopt.export.codebook import codebook_of, fill_, largest_block, packed, unpacked
from tieopt.export.tensor_file import Reader, Writer, checked_dense, plain
from tieopt.optimizer import TiedOptimizer
from tieopt.tensors import bits, in_front
from tieopt.ties.places import BoundTie, bind_ties, parameters_of
from tieopt.ties.slices import FREE, Slices, are_scaled, numbered
from tieopt.ties.tie import Tie, Ties

# The format of files without blocks, which version 1.0.0 reads, and of files with blocks.
_FORMATS = "1", "2"

# The most numbers in slices that are worth an index for each block of them.
_NARROW = 16

# The most slices whose indices may take no bits, as version 1.0.0 wrote them where all slices are one entry. The size
# of the file does not limit the number of such slices.
_MOST_WITHOUT_BITS = 2**24

# The dtypes for the groups and the scales of entries; the first that represents all of them exactly is used.
_GROUPS = torch.uint8, torch.int16, torch.int32, torch.int64
_SCALES = torch.int8, torch.float32, torch.float64

# The slices of each tied parameter, by its name.
_Tied = defaultdict[str, list[Slices]]


def save(model: Module, ties: TiedOptimizer | Ties, file: str | os.PathLike[str]) -> None:
    """Write the state of a model to a safetensors file, its tied parameters as codebooks and indices.

    The file is written completely or not at all; while it is written, the folder needs room for the old and the new
    file. Memory is needed for one tie at a time.

    Members that have an offset, such as frozen slices, are written as they are, like free slices.

    Args:
        model: the model whose ``state_dict()`` is written: parameters and buffers, of any layout, on any device.
        ties: the tied optimizer; or ties as for :class:`~tieopt.TiedOptimizer`, with parameters of the model or their
            names.
        file: the path of the file. An existing file is replaced, and its permissions are kept.

    Raises:
        TypeError, IndexError, ValueError: as for :class:`~tieopt.TiedOptimizer`; or a parameter is not tied, or not in
            the model; or something in the state is not a dense tensor, is sharded, or has a dtype that the format does
            not have.
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
        raise refusal(TypeError, "This cannot be written.", expected="a torch.nn.Module", got=shown(model))
    state = {name: checked_dense(name, value) for name, value in model.state_dict(keep_vars=True).items()}
    names: dict[Any, list[str]] = {}
    # Parameters first: a tensor that is a buffer as well has the name by which an optimizer knows it.
    for name in sorted(state, key=lambda name: not isinstance(state[name], Parameter)):
        names.setdefault(_identity(state[name]), []).append(name)
    tied: _Tied = defaultdict(list)
    with Writer(file) as writer:
        written = [
            _write_tie(writer, tie, params, [_name_of(param, names) for param in params], tied)
            for tie, params in _bound(model, ties)
        ]
        for name, slices in tied.items():
            _write_free(writer, name, state[name], slices)
        whole = [name for name, *_ in names.values() if name not in tied]
        for name in whole:
            writer.add(name, state[name])
        sizes = {name: state[name].shape for name in tied}
        aliases = {name: others for name, *others in names.values() if others}
        has_blocks = any("block" in part for parts in written for part in parts)
        writer.finish(
            {"format": _FORMATS[has_blocks], "ties": written, "tied": sizes, "whole": whole, "aliases": aliases}
        )


def load(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state that :func:`save` has written, bit for bit, for ``load_state_dict``.

    Args:
        file: the path of the file.

    Returns:
        The tensors by name, contiguous, on the CPU. Names that shared a tensor in the model share one here, too.

    Raises:
        ImportError, OSError, ValueError: as for :func:`stream`.

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
    """Yield the names and tensors of a file, one after the other, with one tensor in memory at a time.

    The sizes of all tensors are checked against the file before any is made. A small file can still contain a large
    tensor: the file limits the number of slices and the size of a slice, but not their product.

    Args:
        file: the path of the file.

    Yields:
        The items of what :func:`load` returns, in another order.

    Raises:
        ImportError: safetensors is missing.
        OSError: the file cannot be opened.
        ValueError: the file was truncated or changed, or was not written by :func:`save`; or a tensor is larger than
            the memory. Tensors that were yielded before are as they were written.

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
    with _ModelReader(file) as reader:
        for name in (*reader.whole, *reader.tied):
            tensor = reader.read_tied(name) if name in reader.tied else reader.read(name)
            for alias in (name, *reader.aliases.get(name, ())):
                yield alias, tensor
            del tensor  # before the next is read


def load_ties(file: str | os.PathLike[str]) -> list[Tie]:
    """Read the ties of a file, by the names of the parameters, to continue training.

    Args:
        file: the path of the file.

    Returns:
        Ties for a :class:`~tieopt.TiedOptimizer` of ``named_parameters()``. It can load the ``state_dict`` of the
        optimizer whose ties were saved, unless these had offsets: members with an offset are free in a file.

    Raises:
        ImportError, OSError, ValueError: as for :func:`stream`.

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
    with _ModelReader(file) as reader:
        return [reader.read_tie(tie) for tie in reader.ties]


class _Part(NamedTuple):
    """The labels of one parameter in a tie, as the metadata describe them.

    Attributes:
        name: the name of the parameter.
        key: the name under which the file has the indices; for the first part of a tie, the codebook as well.
        dim: the dimension along which the slices lie.
        shape: the shape of the labels.
        bits: the bits of an index.
        block: how many consecutive labels, along their last dimension, share an index. The block of index ``i`` has the
            entries from ``i * block`` on, one for each label.
    """

    name: str
    key: str
    dim: int
    shape: Size
    bits: int
    block: int = 1


# --- writing ---


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that two tensors have in common if they are the same entries in memory."""
    address = tensor.data_ptr() if tensor.numel() else id(tensor)
    return address, tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.is_conj(), tensor.is_neg()


def _bound(model: Module, ties: Any) -> list[tuple[BoundTie, list[Tensor]]]:
    """Return ties, those of an optimizer or checked against the model, each with its parameters."""
    if isinstance(ties, TiedOptimizer):
        pairs = ties._tieopt.parameters(ties.param_groups)
    else:
        named = dict(model.named_parameters())
        param_groups = [{"params": list(named.values()), "param_names": list(named)}]
        pairs = parameters_of(bind_ties(param_groups, ties, "model"), param_groups)
    return [(_without_offsets(tie), params) for tie, params in pairs]


def _without_offsets(tie: BoundTie) -> BoundTie:
    """Return a tie in which slices with an offset are free, because they have no multiple in a codebook."""
    if tie.is_linear:
        return tie
    linear = copy.copy(tie)
    linear.slices = numbered([slices.without_offset() for slices in tie.slices])
    return linear


def _write_tie(writer: Writer, tie: BoundTie, params: list[Tensor], names: list[str], tied: _Tied) -> list[Any]:
    """Write a tie, add its slices to those of its parameters, and return its metadata."""
    entries, indices, groups, scales = codebook_of(tie.slices, [plain(param) for param in params], names)
    # Entries without numbers take no room in the file, so they must not let a few indices stand for many slices. The
    # indices of wide slices take little of it, and version 1.0.0 reads a file without blocks.
    block = largest_block(indices, len(entries)) if 0 < entries.shape[1:].numel() <= _NARROW and len(entries) else 1
    parts = []
    for name, labelled, slices in zip(names, tie.slices, indices, strict=True):
        key = f"{name}.{len(tied[name])}" if tied[name] else name
        chosen = slices[..., ::block] // block
        # At least one bit for an index, so that the size of the file limits their number.
        width = max(int(chosen.max()).bit_length(), 1) if chosen.numel() else 0
        writer.add(f"{key}.indices", packed(chosen, width))
        parts.append(_Part(name, key, labelled.dim, labelled.labels.shape, width, block))
        tied[name].append(labelled)
    writer.add(f"{parts[0].key}.codebook", entries)
    if are_scaled(tie.slices):
        writer.add(f"{parts[0].key}.groups", _narrow(groups, _GROUPS))
        writer.add(f"{parts[0].key}.scales", _narrow(scales, _SCALES))
    return [{key: value for key, value in part._asdict().items() if (key, value) != ("block", 1)} for part in parts]


def _name_of(param: Tensor, names: dict[Any, list[str]]) -> str:
    key = _identity(checked_dense("A tied parameter", param))
    if key not in names:
        what, expected = "A tied parameter is not in the state of the model.", "a parameter that model.state_dict() has"
        raise refusal(ValueError, what, expected=expected, got=f"a parameter of shape {tuple(param.shape)}")
    return names[key][0]


def _write_free(writer: Writer, name: str, param: Tensor, slices: Sequence[Slices]) -> None:
    """Write the entries of a parameter that are in no group."""
    free = torch.ones(param.shape, dtype=torch.bool, device="cpu")
    for labelled in slices:
        in_front(free, labelled.dim)[labelled.labels != FREE] = False
    if bool(free.any()):
        writer.add(f"{name}.free", bits(plain(param))[free].view(param.dtype))


def _narrow(numbers: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Convert numbers to the first dtype that represents all of them exactly."""
    casts = (numbers.to(dtype) for dtype in dtypes)
    return next(cast for cast in casts if torch.equal(cast.to(numbers.dtype), numbers))


# --- reading ---


class _ModelReader(Reader):
    """Context manager that reads the file of a model, after checking its metadata and the sizes of its tensors.

    Attributes:
        ties: the parts of each tie.
        tied: the shapes of tied parameters, by name.
        whole: the names of tensors that are stored as they are.
        aliases: the further names of tensors, by name.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        super().__init__(file)
        stated = self.contents
        if stated.get("format") not in _FORMATS:
            got = f"{shown(stated.get('format'))}, of another version of tieopt"
            raise self.error(f"format {' or '.join(_FORMATS)}", got)
        try:
            self.ties = [[_Part(**part | {"shape": Size(part["shape"])}) for part in tie] for tie in stated["ties"]]
            self.tied = {name: Size(shape) for name, shape in stated["tied"].items()}
            self.whole: list[str] = list(stated["whole"])
            self.aliases: dict[str, list[str]] = dict(stated["aliases"])
            if not all(self._conditions()):
                raise ValueError
        except (LookupError, TypeError, ValueError, AttributeError):
            raise self.error("metadata that tieopt.export.save has written", "others") from None
        self._check_sizes()

    def _conditions(self) -> Iterator[bool]:
        """Yield the conditions for the metadata; each may be evaluated only if all before it hold."""
        for shape in self.tied.values():
            # In the strides of a tensor without entries, a size of 0 counts as 1.
            yield all(size >= 0 for size in shape) and math.prod(max(size, 1) for size in shape) < 2**59
        parts = [part for tie in self.ties for part in tie]
        for part in parts:
            yield type(part.dim) is type(part.bits) is int and isinstance(part.key, str) and part.dim >= 0
            yield len(part.shape) > 0 and part.shape == self._moved_shape(part)[: len(part.shape)]
            yield type(part.block) is int and part.block > 0 and part.shape[-1] % part.block == 0
        yield all(self.ties)
        yield self.tied.keys() == {part.name for part in parts}
        # Parts that share indices would let a small file make many large tensors.
        yield len({part.key for part in parts}) == len(parts)
        names = [*self.tied, *self.whole, *(alias for others in self.aliases.values() for alias in others)]
        yield all(isinstance(name, str) for name in names) and len(set(names)) == len(names)

    def _check_sizes(self) -> None:
        """Refuse tensors whose sizes do not fit each other, before one is read or made."""
        dtypes: dict[str, torch.dtype] = {}
        entries: Counter[str] = Counter()
        for tie in self.ties:
            key = tie[0].key
            dtype, shape = self.described(f"{key}.codebook")
            # Entries without numbers take no room in the file, but there cannot be more of them than labels.
            fits = len(shape) > 0 and shape[0] <= sum(part.shape.numel() for part in tie)
            fits = fits and (dtype.is_floating_point or dtype.is_complex)
            for part in tie:
                fits = fits and shape[1:] == self._moved_shape(part)[len(part.shape) :]
                self._require(fits and dtypes.setdefault(part.name, dtype) == dtype, f"{key}.codebook", part.name)
                entries[part.name] += shape[0]
                # A block has its entries in the file, so that a few indices do not stand for many slices.
                fits = part.block == 1 or (shape.numel() > 0 and shape[0] % part.block == 0)
                labels = part.shape.numel()
                fewest, most = int(labels > _MOST_WITHOUT_BITS), max((shape[0] // part.block).bit_length(), 1)
                size = -(-part.bits * (labels // part.block) // 8)
                fits = fits and self.described(f"{part.key}.indices") == (torch.uint8, (size,))
                self._require(fits and fewest <= part.bits <= most, f"{part.key}.indices", part.name)
            if f"{key}.scales" in self.names:
                for name, allowed in ((f"{key}.groups", _GROUPS), (f"{key}.scales", _SCALES)):
                    dtype, numbers = self.described(name)
                    self._require(dtype in allowed and numbers == shape[:1], name, tie[0].name)
        for name, shape in self.tied.items():
            # Where codebooks have no entries for a parameter, all of it is free.
            if shape.numel() and not entries[name]:
                self._require(self.described(f"{name}.free")[1] == (shape.numel(),), f"{name}.free", name)

    def _moved_shape(self, part: _Part) -> tuple[int, ...]:
        """Return the shape of a parameter with the dimension of its slices moved to the front."""
        # A single number is a vector of one entry.
        shape = self.tied[part.name] or (1,)
        return (shape[part.dim], *shape[: part.dim], *shape[part.dim + 1 :])

    def _require(self, fits: bool, key: str, name: str) -> None:
        """Refuse a tensor that does not fit the others of a parameter."""
        if not fits:
            raise self.error(f"tensors that make up {name}", f"{key} that does not fit the others")

    def read_tied(self, name: str) -> Tensor:
        """Read a tied parameter from the codebooks of its ties and its free entries."""
        shape = self.tied[name]
        sources = [(f"{tie[0].key}.codebook", part) for tie in self.ties for part in tie if part.name == name]
        dtype, _ = self.described(sources[0][0])
        try:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            free = torch.ones(shape, dtype=torch.bool, device="cpu")
        except RuntimeError:
            raise self.error("tensors that fit into memory", f"{name} of shape {tuple(shape)} and {dtype}") from None
        for key, part in sources:
            entries = self.read(key)
            indices = self._read_indices(part, len(entries))
            fill_(tensor, entries, part.dim, indices)
            in_front(free, part.dim)[indices < len(entries)] = False
        if bool(free.any()):
            values = self.read(f"{name}.free")
            self._require(values.dtype == dtype and values.shape == (int(free.sum()),), f"{name}.free", name)
            bits(tensor)[free] = bits(values)
        return tensor

    def read_tie(self, tie: Sequence[_Part]) -> Tie:
        """Read a tie, by the names of its parameters."""
        key, name = tie[0].key, tie[0].name
        count = len(self.read(f"{key}.codebook"))
        groups, scales = torch.arange(count, device="cpu"), None
        if f"{key}.scales" in self.names:
            groups, scales = self.read(f"{key}.groups").long(), self.read(f"{key}.scales").double()
            self._require(bool((groups >= 0).all()), f"{key}.groups", name)
            self._require(bool(scales.isfinite().all()), f"{key}.scales", name)
            scales = pad(scales, (0, 1), value=1.0)
        groups = pad(groups, (0, 1), value=FREE)
        ties = []
        for part in tie:
            indices = self._read_indices(part, count)
            scale = None if scales is None else scales[indices]
            ties.append(Tie(part.name, groups[indices], dim=part.dim, scale=scale))
        return Tie.join(*ties)

    def _read_indices(self, part: _Part, count: int) -> Tensor:
        """Read the index of the entry of each slice, or ``count``, the number of entries, for a free slice."""
        shape = Size([*part.shape[:-1], part.shape[-1] // part.block])
        indices = unpacked(self.read(f"{part.key}.indices"), part.bits, shape)
        self._require(bool((indices * part.block <= count).all()), f"{part.key}.indices", part.name)
        if part.block == 1:
            return indices
        return (indices[..., None] * part.block + torch.arange(part.block, device="cpu")).flatten(-2).clamp(max=count)
