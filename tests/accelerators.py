"""Accelerators on a machine without one: their branches with numbers on the CPU, and their tensors without numbers."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tieopt.numbers import devices
from tieopt.numbers.folding import Folding
from tieopt.numbers.index import Index
from tieopt.numbers.sparse import TiedRows
from tieopt.ties import part

# A build of torch without CUDA does not know how to enter a device, which Python's indexing and autograd do.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>); }
"""


@contextmanager
def as_on_accelerators() -> Iterator[None]:
    """What is compiled and run within takes the branches of accelerators."""
    with patch.object(devices, "is_accelerator", lambda device: True):
        yield


# What has to know numbers on the device, and what copies numbers to it.
WAITING = {
    "_coalesce",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class Recorder(TorchDispatchMode):
    """Records operators, with parts of torch or of the library replaced meanwhile.

    Attributes:
        operators: the names of those that were recorded.
        patches: what is replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.patches: list[Any] = []

    def __enter__(self) -> Any:
        for started in self.patches:
            started.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for started in self.patches:
            started.stop()


class Waits(Recorder):
    """Records what waits for an accelerator, of steps on the CPU: fake tensors have no sparse layout.

    Args:
        compiles: whether ties may be compiled.

    Attributes:
        operators: the names of those that wait.
    """

    def __init__(self, *, compiles: bool) -> None:
        super().__init__()
        self.patches = [patch.object(Tensor, name, self._recording(name)) for name in ("cpu", "numpy", "tolist")]
        if not compiles:
            self.patches += [patch.object(kind, "compile", None) for kind in (Folding, Index, TiedRows)]

    def _recording(self, name: str) -> Any:
        method = getattr(Tensor, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.operators.append(name)
            return method(*args, **kwargs)

        return recorded

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.__name__.partition(".")[0], kwargs or {}
        has_unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        has_mask = name.startswith("index") and any(
            leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)
        )
        if name in WAITING or has_unknown_size or has_mask:
            self.operators.append(name)
        return function(*args, **kwargs)


def enter_devices() -> None:
    """Let tensors without numbers have the device "cuda", on a build of torch without CUDA as well."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        if not torch.cuda.is_available() and not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
            pytest.skip("a CUDA build of torch 2.6 enters no device where there is none")
        return
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler, and torch is built without CUDA")
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", "-o", library, source]
        subprocess.run([compiler, *options, f"-L{home / 'lib'}", "-lc10"], check=True)  # noqa: S603
        torch.ops.load_library(library)


class FakeAccelerator(Recorder):
    """Runs what is done with tensors on "cuda" without their numbers, and records it.

    Indices of ties are made of labels on the CPU, and copied. What can be known from those is known here, too, so that
    Python may read it, until :attr:`is_warm` is set: a warm step must neither read nor copy between devices.

    Attributes:
        operators: the names of those that a warm step has run since :meth:`begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_warm = False
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.patches = [
            patch.object(torch.cuda, "_lazy_init", lambda: None),
            # Fake tensors are a class of their own.
            patch.object(part, "_check_can_be_tied", lambda *_: None),
        ]

    def begin(self) -> None:
        """Begin a step, and record what it does."""
        self.is_warm, self.operators = True, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        wanted = kwargs.get("device")
        if not fakes and (wanted is None or torch.device(wanted).type == "cpu"):
            return function(*args, **kwargs)
        name = function.__name__.partition(".")[0]
        if self.is_warm and name != "device":
            self.operators.append(name)
            before = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            assert len({device.type for device in before}) <= 1, f"{name} of tensors on {before}"
            assert wanted is None or torch.device(wanted).type != "cpu", f"{name} waits for the device"
        known = None if self.is_warm else self._known(function, args, kwargs)
        if name == "_local_scalar_dense" and not self.is_warm:
            # What is asked of parameters is whether they are finite.
            return known if known is not None else torch.ones((), dtype=args[0].dtype, device="cpu").item()
        with self._mode:
            result = function(*args, **kwargs)
        results, known = (leaves if isinstance(leaves, (list, tuple)) else [leaves] for leaves in (result, known))
        for fake, number in zip(results, known, strict=False):
            if isinstance(fake, FakeTensor) and isinstance(number, torch.Tensor):
                if fake.device.type == "cpu":
                    return number
                fake.known = number  # type: ignore[attr-defined]
        return result

    @staticmethod
    def _known(function: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator whose arguments are known; None if one is not, or is written to."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_unknown = any(isinstance(leaf, FakeTensor) and not hasattr(leaf, "known") for leaf in leaves)
        if function._schema.is_mutable:
            for leaf in leaves:
                vars(leaf).pop("known", None)
        if function._schema.is_mutable or is_unknown or function.__name__.startswith("empty"):
            return None
        args, kwargs = tree_map(lambda leaf: getattr(leaf, "known", leaf), (args, dict(kwargs)))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)
