"""Safetensors files, written tensor by tensor, and read with a check of every tensor.

The `format <https://github.com/huggingface/safetensors#format>`_ is a header, which says where each tensor stands, and
then the tensors. The safetensors package, which reads them here, writes a file only from all tensors at once. So the
tensors go into temporary files first, beside what they are to become, and are put behind the header in the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from tempfile import TemporaryFile
from typing import IO, Any, Self

import torch
from torch import Tensor

from tieopt.tensors import octets

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_METADATA = "__metadata__"
# Under which the metadata has what was written, and the hash of that.
_CONTENTS, _HASH = "tieopt", "tieopt.sha256"


class Writer:
    """Writes a file that is there as a whole in the end, or not at all; a context.

    Args:
        file: where to. What is there is replaced, and its permissions are kept.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        # Behind a symbolic link, which stays one.
        self._file = os.path.realpath(os.fsdecode(file))
        self._header: dict[str, dict[str, Any]] = {}
        self._hashes: dict[str, str] = {}
        # By the size of their entries: with the large ones first, all stand where their type may stand in memory.
        self._data: dict[int, IO[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor, which may be changed or forgotten then.

        Raises:
            TypeError: the format has not its dtype.
            ValueError: there is one of that name, or the format has another use for it.
        """
        if tensor.dtype not in _NAMES:
            raise TypeError(
                f"{name} cannot be written to a file.\n"
                f"  Expected: a dtype that safetensors has: {', '.join(map(str, _NAMES))}\n"
                f"  Got:      {tensor.dtype}"
            )
        if name in self._header or name == _METADATA:
            raise ValueError(
                "Two tensors of a file would have one name.\n"
                "  Expected: names that are no others followed by .codebook, .indices, .groups, .scales or .free, and "
                f"not {_METADATA}\n  Got:      {name}"
            )
        tensor = plain(tensor).contiguous()
        size = tensor.dtype.itemsize
        if size not in self._data:
            beside = TemporaryFile(dir=os.path.dirname(self._file))  # noqa: SIM115 - the stack closes it
            self._data[size] = self._stack.enter_context(beside)
        start = self._data[size].tell()
        self._data[size].write(octets(tensor))
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        self._hashes[name] = _hash(name, tensor)

    def finish(self, contents: dict[str, Any]) -> None:
        """Writes the file, with contents in its metadata that can be written as JSON."""
        text = json.dumps({**contents, "sha256": self._hashes})
        metadata = {"format": "pt", _CONTENTS: text, _HASH: hashlib.sha256(text.encode()).hexdigest()}
        data = [(size, self._data[size]) for size in sorted(self._data, reverse=True)]
        header: dict[str, Any] = {_METADATA: metadata}
        end = 0
        for size, part in data:
            for name, entry in self._header.items():
                if _DTYPES[entry["dtype"]].itemsize == size:
                    header[name] = {**entry, "data_offsets": [end + offset for offset in entry["data_offsets"]]}
            end += part.tell()
        written = json.dumps(header, ensure_ascii=False).encode()
        written += b" " * (-len(written) % 8)
        mode = _permissions(self._file)
        # Until it is complete, nobody else can read what may replace a private file.
        private = None if mode is None else partial(os.open, mode=0o600)
        beside = os.path.join(os.path.dirname(self._file), f".{secrets.token_hex(8)}.partial")
        try:
            with open(beside, "xb", opener=private) as whole:
                whole.write(len(written).to_bytes(8, "little") + written)
                for _, part in data:
                    part.seek(0)
                    shutil.copyfileobj(part, whole, 2**20)
            if mode is not None:
                os.chmod(beside, mode)
            os.replace(beside, self._file)
        finally:
            if os.path.exists(beside):
                os.remove(beside)


class Reader:
    """Reads a file that :class:`Writer` has written, and nothing of it that is not as it was written; a context.

    Args:
        file: where it is.

    Attributes:
        contents: what :meth:`Writer.finish` was given.
        names: of the tensors.

    Raises:
        ImportError: safetensors is missing.
        OSError: the file cannot be opened.
        ValueError: it is none, or was cut off or altered.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        safetensors = _safetensors()
        self._file = os.fsdecode(file)
        self._failure = safetensors.SafetensorError
        try:
            self._handle = safetensors.safe_open(self._file, framework="pt", device="cpu")
            metadata = self._handle.metadata() or {}
        except safetensors.SafetensorError as error:
            raise self.error("a whole safetensors file", str(error)) from None
        text = metadata.get(_CONTENTS)
        if text is None:
            raise self.error("a file that tieopt.export.save has written", "one without its metadata")
        if hashlib.sha256(text.encode()).hexdigest() != metadata.get(_HASH):
            raise self.error("metadata as they were written", "others")
        try:
            self.contents: dict[str, Any] = json.loads(text)
            self._hashes: dict[str, str] = self.contents.pop("sha256")
            self.names = set(self._hashes.keys())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self.error("metadata that tieopt.export.save has written", "others") from None
        if differing := sorted(self.names ^ set(self._handle.keys())):
            raise self.error("the tensors that were written", f"others: {', '.join(differing)}")
        for name in self.names:
            if (dtype := self._handle.get_slice(name).get_dtype()) not in _DTYPES:
                raise self.error("dtypes that tieopt.export.save writes", f"{name} of {dtype}")

    def __enter__(self) -> Self:
        self._handle.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.__exit__(*exception)

    def error(self, expected: str, got: str) -> ValueError:
        """What is raised where a file is not as it should be."""
        return ValueError(f"{self._file} cannot be read.\n  Expected: {expected}\n  Got:      {got}")

    def described(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """The dtype and the shape of a tensor, which is not read.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.names:
            raise self.error(f"{name} as it was written", "no tensor of that name")
        entry = self._handle.get_slice(name)
        return _DTYPES[entry.get_dtype()], torch.Size(entry.get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor of the file, with memory of its own.

        Raises:
            ValueError: it is not as it was written.
        """
        try:
            # What comes from the file is mapped, and changes with it.
            tensor: Tensor = self._handle.get_tensor(name).clone()
        # Of a shape that no tensor can have, torch raises one of the others.
        except (self._failure, TypeError, RuntimeError) as error:
            raise self.error(f"{name} as it was written", str(error)) from None
        if _hash(name, tensor) != self._hashes[name]:
            raise self.error(f"{name} as it was written", "other values")
        return tensor


def plain(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, without a graph; what torch negates or conjugates on reading is written out."""
    return tensor.detach().cpu().resolve_conj().resolve_neg()


def _permissions(file: str) -> int | None:
    """Those of a file that is there."""
    try:
        return stat.S_IMODE(os.stat(file).st_mode)
    except FileNotFoundError:
        return None


def _hash(name: str, tensor: Tensor) -> str:
    found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(octets(tensor))
    return found.hexdigest()


def _safetensors() -> Any:
    try:
        return import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            f"Files are read with safetensors.\n  Expected: pip install 'tieopt[export]'\n  Got:      {error}"
        ) from None
