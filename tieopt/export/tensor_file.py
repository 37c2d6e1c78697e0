"""Safetensors files, written tensor by tensor, and read with a check of every tensor.

The `format <https://github.com/huggingface/safetensors#format>`_ is a header, which says where each tensor is, followed
by the tensors. The safetensors package, which reads the files here, can only write all tensors at once. To hold one
tensor at a time, the writer collects them in temporary files and copies these behind the header at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tieopt.errors import imported, refusal, shown
from tieopt.tensors import local, raw_bytes

_NAMES = {
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_METADATA = "__metadata__"
# The keys in the metadata of the writer's contents, as JSON, and of the hash of this text.
_CONTENTS, _HASH = "tieopt", "tieopt.sha256"


class Writer(ExitStack):
    """Context manager that writes a file as a whole, or not at all.

    Args:
        file: the path of the file. An existing file is replaced, and its permissions are kept.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        super().__init__()
        # Of a symbolic link, the file that it points to is replaced.
        self._file = Path(os.path.realpath(os.fsdecode(file)))
        self._tensors: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._hashes: dict[str, str] = {}
        # By the size of an entry: with the large ones first, every tensor is aligned for its dtype.
        folder = self._file.parent
        self._data = {size: self.enter_context(TemporaryFile(dir=folder)) for size in (8, 4, 2, 1)}  # noqa: SIM115

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, which may be changed or deleted afterwards.

        Raises:
            TypeError: the format does not have its dtype.
            ValueError: the file has a tensor of that name, or the format itself uses the name.
        """
        if tensor.dtype not in _NAMES:
            expected = f"a dtype that safetensors has: {', '.join(map(str, _NAMES))}"
            raise refusal(TypeError, f"{name} cannot be written to a file.", expected=expected, got=tensor.dtype)
        if name in self._tensors or name == _METADATA:
            endings = ".codebook, .indices, .groups, .scales or .free"
            expected = f"names that are not another name followed by {endings}, and not {_METADATA}"
            raise refusal(ValueError, "Two tensors of a file would have one name.", expected=expected, got=name)
        tensor = plain(tensor).contiguous()
        self._data[tensor.dtype.itemsize].write(raw_bytes(tensor))
        self._tensors[name] = tensor.dtype, tensor.shape
        self._hashes[name] = _hash(name, tensor)

    def finish(self, contents: dict[str, Any]) -> None:
        """Write the file, with ``contents`` as JSON in its metadata."""
        text = json.dumps({**contents, "sha256": self._hashes})
        metadata = {"format": "pt", _CONTENTS: text, _HASH: hashlib.sha256(text.encode()).hexdigest()}
        entries: dict[str, Any] = {_METADATA: metadata}
        end = 0
        for name, (dtype, shape) in sorted(self._tensors.items(), key=lambda tensor: -tensor[1][0].itemsize):
            start, end = end, end + shape.numel() * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        header = json.dumps(entries, ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)

        replaces = self._file.exists()
        # The file may replace a private one, so nobody else may read it before it has the same permissions.
        opener = partial(os.open, mode=0o600) if replaces else None
        unfinished = self._file.parent / f".{secrets.token_hex(8)}.partial"
        self.callback(unfinished.unlink, missing_ok=True)
        with open(unfinished, "xb", opener=opener) as target:
            target.write(len(header).to_bytes(8, "little") + header)
            for data in self._data.values():
                data.seek(0)
                shutil.copyfileobj(data, target, 2**20)
        if replaces:
            shutil.copymode(self._file, unfinished)
        unfinished.replace(self._file)


class Reader(ExitStack):
    """Context manager that reads a file of :class:`Writer`, and refuses it if it was altered.

    Args:
        file: the path of the file.

    Attributes:
        contents: the contents that :meth:`Writer.finish` was given.
        names: the names of the tensors.

    Raises:
        ImportError: safetensors is missing.
        OSError: the file cannot be opened.
        ValueError: the file was cut off or altered, or was not written by :class:`Writer`.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        super().__init__()
        safetensors = imported("safetensors", "Files are read with safetensors.", "export")
        self._file = os.fsdecode(file)
        # torch raises one of the last two for a shape that no tensor can have.
        self._unreadable = safetensors.SafetensorError, TypeError, RuntimeError
        try:
            self._handle = self.enter_context(safetensors.safe_open(self._file, framework="pt", device="cpu"))
            metadata = self._handle.metadata() or {}
        except safetensors.SafetensorError as error:
            raise self.error("a whole safetensors file", error) from None
        text = metadata.get(_CONTENTS)
        if text is None:
            raise self.error("a file that tieopt.export.save has written", "one without its metadata")
        if hashlib.sha256(text.encode()).hexdigest() != metadata.get(_HASH):
            raise self.error("metadata as they were written", "others")
        try:
            self.contents: dict[str, Any] = json.loads(text)
            self._hashes: dict[str, str] = self.contents.pop("sha256")
            self.names = self._hashes.keys()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self.error("metadata that tieopt.export.save has written", "others") from None
        if unlike := sorted(self.names ^ set(self._handle.keys())):
            raise self.error("the tensors that were written", f"others: {', '.join(unlike)}")
        for name in self.names:
            if (dtype := self._handle.get_slice(name).get_dtype()) not in _DTYPES:
                raise self.error("dtypes that tieopt.export.save writes", f"{name} of {dtype}")

    def error(self, expected: str, got: object) -> ValueError:
        """Return the error for a file that is not as it should be."""
        return refusal(ValueError, f"{self._file} cannot be read.", expected=expected, got=got)

    def described(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """Return the dtype and the shape of a tensor, without reading it.

        Raises:
            ValueError: there is no tensor of that name.
        """
        if name not in self.names:
            raise self.error(f"{name} as it was written", "no tensor of that name")
        entry = self._handle.get_slice(name)
        return _DTYPES[entry.get_dtype()], torch.Size(entry.get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor of the file.

        Raises:
            ValueError: it is not as it was written.
        """
        try:
            # A copy, because the handle's tensor is mapped to the file and changes with it.
            tensor: Tensor = self._handle.get_tensor(name).clone()
        except self._unreadable as error:
            raise self.error(f"{name} as it was written", error) from None
        if _hash(name, tensor) != self._hashes[name]:
            raise self.error(f"{name} as it was written", "other values")
        return tensor


def checked_dense(name: str, value: Any) -> Tensor:
    """Return a value if it is a dense tensor with memory of its own.

    Raises:
        TypeError: it is not.
    """
    if isinstance(value, Tensor):
        special = is_lazy(value) or local(value) is not value or value.is_nested or value.is_quantized
        # Wrappers of other tensors, and tensors on the meta device, have no address.
        if not special and value.layout == torch.strided and (not value.numel() or value.data_ptr()):
            return value
        got = f"{type(value).__name__} of {value.dtype}, {value.layout}, device {value.device}"
    else:
        got = shown(value)
    expected = "a dense tensor that is whole in the memory of this process"
    raise refusal(TypeError, f"{name} cannot be written as it is.", expected=expected, got=got)


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, without a graph, with lazy negation and conjugation carried out."""
    return tensor.detach().cpu().resolve_conj().resolve_neg()


def _hash(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()
