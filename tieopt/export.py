"""Tied weights as a codebook and indices, in memory and in a file.

What is tied need not be written down for each member. A codebook has what there is once, and an index says for each
slice which entry it is: `Deep Compression <https://arxiv.org/abs/1510.00149>`_ stores k-means clusters in this way. An
index takes as many bits as it needs: one with two shared values, five with thirty-two.

Files are of the safetensors format. They have the ties and what was written, by its hash, in their metadata.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from tieopt.components import components
from tieopt.optimizer import TiedOptimizer
from tieopt.places import found, parameters_of
from tieopt.reduction import bits
from tieopt.sharded import is_sharded
from tieopt.slices import FREE, Slices, numbered
from tieopt.ties import Tie, slices_for

# Indices are packed and unpacked so many at a time; a multiple of 8.
_CHUNK = 2**20
_FORMAT = "1"
# The tensors of which a file has one for each tie.
_STORED = ("codebook", "indices", "groups", "scales")


class Encoded(NamedTuple):
    """Tied slices as a codebook and indices.

    Attributes:
        codebook: what there is, ``[entries, *slice]``: first an entry for each group, or for each multiple of its
            shared value that occurs; then all free slices, in their order.
        indices: for each slice the number of its entry, and one more for a free slice. So many bits for each as the
            largest takes, the lowest first, the slices of all tensors one after the other; uint8.
        groups: for each entry that is no free slice, which group it is of, int64.
        scales: which multiple of the shared value it is, float64; None if all are 1.
        shapes: the shape of each tensor.
        labelled: the shape of the labels of each.
        dims: along which dimension the slices of each lie.
    """

    codebook: Tensor
    indices: Tensor
    groups: Tensor
    scales: Tensor | None
    shapes: list[list[int]]
    labelled: list[list[int]]
    dims: list[int]

    @property
    def bits(self) -> int:
        """How many bits an index has."""
        count = len(self.groups) + (len(self.codebook) > len(self.groups))
        return max(count - 1, 0).bit_length()

    def decode(self) -> list[Tensor]:
        """The tensors, bit for bit, and contiguous.

        Raises:
            ValueError: the numbers of entries and indices do not fit each other.

        Example:
            >>> import torch
            >>> from tieopt import export, tie_
            >>> weight = torch.randn(6, 4)
            >>> _ = tie_(weight, [[0, 5], [1, 2, 3]])
            >>> (decoded,) = export.encode(weight, [[0, 5], [1, 2, 3]]).decode()
            >>> torch.equal(decoded, weight)
            True
        """
        symbols, count = self._symbols(), len(self.groups)
        # The free slices follow each other.
        at = torch.where(symbols < count, symbols, count - 1 + (symbols >= count).cumsum(0))
        if len(at) and int(at.max()) >= len(self.codebook):
            raise ValueError(
                "Indices lead out of the codebook.\n"
                f"  Expected: numbers below {len(self.codebook)}, one for each entry\n"
                f"  Got:      {int(at.max())}"
            )
        slices = bits(self.codebook).index_select(0, at).view(self.codebook.dtype)
        return [
            part.view(*labelled, *self.codebook.shape[1:]).movedim(0, dim).reshape(shape).contiguous()
            for part, labelled, shape, dim in zip(
                torch.split(slices, self._counts), self.labelled, self.shapes, self.dims, strict=True
            )
        ]

    def labels(self) -> list[tuple[Tensor, Tensor | None]]:
        """For each tensor its labels, -1 for a free slice, and its scale, as :class:`~tieopt.Tie` takes them."""
        symbols = self._symbols()
        groups = torch.cat([self.groups, torch.tensor([FREE], device="cpu")])[symbols]
        scales = (
            None
            if self.scales is None
            else torch.cat([self.scales, torch.ones(1, dtype=torch.float64, device="cpu")])[symbols]
        )
        parts = [None] * len(self.shapes) if scales is None else torch.split(scales, self._counts)
        return [
            (own.view(shape), None if scale is None else scale.view(shape))
            for own, scale, shape in zip(torch.split(groups, self._counts), parts, self.labelled, strict=True)
        ]

    @property
    def _counts(self) -> list[int]:
        return [torch.Size(shape).numel() for shape in self.labelled]

    def _symbols(self) -> Tensor:
        return _unpacked(self.indices, self.bits, sum(self._counts))


def encode(param: Tensor, groups: Any, *, dim: int = 0, scale: Any = None) -> Encoded:
    """A tied tensor as a codebook and indices.

    Args:
        param: the tensor, tied; any dtype and layout that :class:`~tieopt.Tie` takes.
        groups: as in :class:`~tieopt.Tie`.
        dim: as in :class:`~tieopt.Tie`.
        scale: as in :class:`~tieopt.Tie`.

    Returns:
        Both, on the CPU. :meth:`Encoded.decode` gives the tensor back.

    Raises:
        TypeError, IndexError, ValueError: as :class:`~tieopt.Tie` says; or the tensor is not tied.

    Example:
        Sixteen values for a matrix, each with both signs: an index has five bits.

        >>> import torch
        >>> from tieopt import export, patterns, tie_
        >>> weight = torch.randn(64, 64)
        >>> labels, signs = patterns.hashed(weight.shape, 16)
        >>> _ = tie_(weight, labels, scale=signs)
        >>> encoded = export.encode(weight, labels, scale=signs)
        >>> encoded.codebook.shape, encoded.bits, encoded.indices.nbytes
        (torch.Size([32]), 5, 2560)
    """
    return _encoded([slices_for(param, groups, dim, scale, "the tensor")], [param], ["the tensor"])


def _encoded(slices: Sequence[Slices], tensors: Sequence[Tensor], names: Sequence[str]) -> Encoded:
    tensors = [tensor.detach().cpu() for tensor in tensors]
    labels = torch.cat([each.labels.flatten() for each in slices])
    scales = torch.cat([each.scales.flatten() for each in slices])
    multiples, which = torch.unique(scales, return_inverse=True)
    # An entry for each multiple of each group that occurs.
    (entries,) = numbered([Slices(torch.where(labels == FREE, FREE, labels * len(multiples) + which))])
    count = int(entries.labels.max()) + 1 if len(labels) else 0
    symbols = torch.where(entries.labels == FREE, count, entries.labels)
    first = torch.full((count + 1,), len(labels), device="cpu").scatter_reduce_(
        0, symbols, torch.arange(len(labels), device="cpu"), "amin"
    )[:count]
    kept = torch.cat([first, (labels == FREE).nonzero().squeeze(1)])
    rows = torch.cat([_slices_of(each, tensor) for each, tensor in zip(slices, tensors, strict=True)])
    encoded = Encoded(
        bits(rows).index_select(0, kept).view(rows.dtype),
        torch.empty(0, dtype=torch.uint8, device="cpu"),
        labels[first],
        None if bool((scales == 1).all()) else scales[first],
        [list(tensor.shape) for tensor in tensors],
        [list(each.labels.shape) for each in slices],
        [each.dim for each in slices],
    )
    encoded = encoded._replace(indices=_packed(symbols, encoded.bits))
    for tensor, decoded, name in zip(tensors, encoded.decode(), names, strict=True):
        if not torch.equal(_bytes(tensor), _bytes(decoded)):
            raise ValueError(
                "What is not tied cannot be written as a codebook.\n"
                f"  Parameter: {name} of shape {tuple(tensor.shape)}\n"
                "  Expected:  members that are equal bit for bit, as after tie_weights()\n"
                "  Got:       others"
            )
    return encoded


def save(file: str | os.PathLike[str], model: Module, ties: Any) -> None:
    """Writes the state of a model to a safetensors file, its tied parameters as codebooks and indices.

    The file is there as a whole, or not at all.

    Args:
        file: where to.
        model: whose ``state_dict()`` is written: parameters and buffers.
        ties: the tied optimizer; or what it takes, with parameters of the model or their names.

    Raises:
        ImportError: safetensors is missing.
        TypeError, IndexError, ValueError: as :class:`~tieopt.TiedOptimizer` says; or a parameter is not tied, or
            sharded, or not the model's, or of a dtype that the format has not.

    Example:
        >>> import tempfile, torch
        >>> from tieopt import TiedOptimizer, export
        >>> model = torch.nn.Linear(8, 6)
        >>> optimizer = TiedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {model.weight: [[0, 5], [1, 2, 3]]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export.save(f"{folder}/model.safetensors", model, optimizer)
        ...     state = export.load(f"{folder}/model.safetensors")
        ...     ties = export.ties(f"{folder}/model.safetensors")
        >>> torch.equal(state["weight"], model.weight), ties
        (True, [Tie('weight', a tensor of shape (6,) and torch.int64)])
    """
    safetensors = _optional("safetensors.torch")
    tensors, stated = _contents(model, ties)
    contents = json.dumps(
        {"format": _FORMAT, **stated, "sha256": {key: _digest(key, tensor) for key, tensor in tensors.items()}}
    )
    metadata = {"format": "pt", "tieopt": contents, "tieopt.sha256": hashlib.sha256(contents.encode()).hexdigest()}
    partial = f"{os.fspath(file)}.partial"
    try:
        safetensors.save_file(tensors, partial, metadata)
        os.replace(partial, file)
    except KeyError as error:
        raise TypeError(
            f"The safetensors format has not every dtype.\n  Expected: another one\n  Got:      {error}"
        ) from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state that :func:`save` has written, bit for bit, for ``load_state_dict``.

    Args:
        file: where it is.

    Returns:
        For each name the tensor, contiguous, on the CPU.

    Raises:
        ImportError, OSError, ValueError: as :func:`stream`.
    """
    return dict(stream(file))


def stream(file: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a file, one after the other: only those that are tied to each other are held at once.

    Args:
        file: where it is.

    Raises:
        ImportError: safetensors is missing.
        OSError: the file cannot be opened.
        ValueError: it was cut off or altered, or was not written by :func:`save`. What was given before is as it was
            written.

    Example:
        >>> import tempfile, torch
        >>> from tieopt import export
        >>> model = torch.nn.Linear(8, 6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export.save(f"{folder}/model.safetensors", model, {})
        ...     for name, tensor in export.stream(f"{folder}/model.safetensors"):
        ...         print(name, tuple(tensor.shape))
        bias (6,)
        weight (6, 8)
    """
    with _opened(file) as written:
        for name in written.stated["free"]:
            yield from written.named(name, written.read(name))
        for tie in written.stated["ties"]:
            for name, tensor in zip(tie["names"], written.encoded(tie).decode(), strict=True):
                yield from written.named(name, tensor)


def ties(file: str | os.PathLike[str]) -> list[Tie]:
    """The ties of a file, by the names of the parameters, to go on training.

    Args:
        file: where it is.

    Returns:
        What :class:`~tieopt.TiedOptimizer` takes, if the optimizer was built from ``named_parameters()``.

    Raises:
        ImportError, OSError, ValueError: as :func:`stream`.
    """
    with _opened(file) as written:
        return [_tie(tie["names"], written.encoded(tie)) for tie in written.stated["ties"]]


def _tie(names: Sequence[str], encoded: Encoded) -> Tie:
    parts = zip(names, encoded.labels(), encoded.dims, strict=True)
    each = [Tie(name, labels, dim=dim, scale=scale) for name, (labels, scale), dim in parts]
    return each[0] if len(each) == 1 else Tie.join(*each)


def _contents(model: Module, ties: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what its metadata says of them."""
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or is_sharded(tensor):
            raise TypeError(
                f"{name} cannot be written to a file.\n"
                "  Expected: a tensor that is whole on this rank\n"
                f"  Got:      {type(tensor).__name__}"
            )
    names: dict[Any, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, tensor in state.items():
        first = names.setdefault(_memory(tensor), name)
        if first != name:
            aliases.setdefault(first, []).append(name)
    tensors: dict[str, Tensor] = {}
    stated, written = [], {name for others in aliases.values() for name in others}
    for slices, params in _tied(model, ties):
        own = []
        for param in params:
            if _memory(param) not in names:
                raise ValueError(
                    "A tied parameter is not in the state of the model.\n"
                    f"  Expected: one of {', '.join(state)}\n"
                    f"  Got:      a parameter of shape {tuple(param.shape)}"
                )
            own.append(names[_memory(param)])
        encoded = _encoded(slices, params, own)
        described = {"names": own, **{field: getattr(encoded, field) for field in ("shapes", "labelled", "dims")}}
        for field in _STORED:
            if (tensor := getattr(encoded, field)) is not None:
                tensors[f"{own[0]}.{field}"] = tensor
        stated.append(described)
        written.update(own)
    free = sorted(state.keys() - written)
    if clash := tensors.keys() & set(free):
        raise ValueError(
            "Names of the model are those of codebooks.\n"
            f"  Expected: none that ends in {', '.join(_STORED)} after that of a tied parameter\n"
            f"  Got:      {', '.join(sorted(clash))}"
        )
    # Views of one memory are written out: the format has no two tensors in one place.
    tensors.update((name, state[name].detach().cpu().contiguous().clone()) for name in free)
    return tensors, {"free": free, "ties": stated, "aliases": aliases}


def _tied(model: Module, ties: Any) -> list[tuple[Sequence[Slices], list[Tensor]]]:
    """The slices of ties, each parameter in one of them, and the parameters."""
    if isinstance(ties, TiedOptimizer):
        bound, param_groups = ties._tieopt.ties, ties.param_groups
    else:
        names, params = zip(*model.named_parameters(), strict=True)
        param_groups = [{"params": list(params), "param_names": list(names)}]
        bound = found(param_groups, ties)
    return [(tie.slices, params) for tie, params in parameters_of(components(bound, param_groups), param_groups)]


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What is the same for a parameter and for what a state has of it."""
    place = tensor.data_ptr() if tensor.numel() else id(tensor)
    return place, tensor.dtype, tensor.shape, tensor.stride(), tensor.device


class _Written:
    """An open file, of which nothing is given that is not as it was written."""

    def __init__(self, file: str | os.PathLike[str], handle: Any) -> None:
        self._file, self._handle = file, handle
        metadata = handle.metadata() or {}
        contents = metadata.get("tieopt", "")
        if not contents:
            raise self.error("a file that tieopt.export.save has written", "one without its metadata")
        if hashlib.sha256(contents.encode()).hexdigest() != metadata.get("tieopt.sha256"):
            raise self.error("metadata as they were written", "others")
        self.stated = json.loads(contents)
        if self.stated["format"] != _FORMAT:
            raise self.error(f"format {_FORMAT}", f"{self.stated['format']}, of another version of tieopt")
        if (found := set(handle.keys())) != self.stated["sha256"].keys():
            differing = sorted(found ^ self.stated["sha256"].keys())
            raise self.error("the tensors that were written", f"others: {', '.join(differing)}")

    def error(self, expected: str, got: str) -> ValueError:
        return ValueError(f"{os.fspath(self._file)} cannot be read.\n  Expected: {expected}\n  Got:      {got}")

    def read(self, key: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(key)
        if _digest(key, tensor) != self.stated["sha256"][key]:
            raise self.error(f"{key} as it was written", "other values")
        return tensor

    def encoded(self, tie: dict[str, Any]) -> Encoded:
        first = tie["names"][0]
        keys = {field: f"{first}.{field}" for field in _STORED}
        tensors: dict[str, Any] = {
            field: self.read(key) if key in self.stated["sha256"] else None for field, key in keys.items()
        }
        return Encoded(**tensors, **{field: tie[field] for field in ("shapes", "labelled", "dims")})

    def named(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for each in (name, *self.stated["aliases"].get(name, ())):
            yield each, tensor


@contextmanager
def _opened(file: str | os.PathLike[str]) -> Iterator[_Written]:
    safetensors = _optional("safetensors")
    try:
        with safetensors.safe_open(os.fspath(file), framework="pt", device="cpu") as handle:
            yield _Written(file, handle)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{os.fspath(file)} cannot be read.\n  Expected: a whole safetensors file\n  Got:      {error}"
        ) from None


def _digest(key: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.nbytes:
        digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def _slices_of(slices: Slices, tensor: Tensor) -> Tensor:
    """The slices of a tensor, in the order of their labels."""
    front = tensor.movedim(slices.dim, 0)
    return front.reshape(slices.labels.numel(), *front.shape[slices.labels.dim() :])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _packed(numbers: Tensor, width: int) -> Tensor:
    """Numbers of so many bits, without gaps; the lowest bit first, uint8."""
    return torch.cat(
        [
            torch.empty(0, dtype=torch.uint8, device="cpu"),
            *(_pack(each, width) for each in torch.split(numbers, _CHUNK)),
        ]
    )


def _pack(numbers: Tensor, width: int) -> Tensor:
    each = (numbers[:, None] >> torch.arange(width, device="cpu")) & 1
    return (
        (torch.nn.functional.pad(each.view(-1), (0, -each.numel() % 8)).view(-1, 8) << torch.arange(8, device="cpu"))
        .sum(1)
        .byte()
    )


def _unpacked(packed: Tensor, width: int, count: int) -> Tensor:
    """So many numbers, int64."""
    numbers = torch.zeros(count, dtype=torch.int64, device="cpu")
    for start, own in enumerate(torch.split(packed, _CHUNK // 8 * width)) if width else ():
        each = ((own[:, None].long() >> torch.arange(8, device="cpu")) & 1).view(-1)
        part = numbers[start * _CHUNK : (start + 1) * _CHUNK]
        part.copy_((each[: len(part) * width].view(-1, width) << torch.arange(width, device="cpu")).sum(1))
    return numbers


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Files need safetensors.\n  Expected: pip install 'tieopt[export]'\n  Got:      {error}"
        ) from None
