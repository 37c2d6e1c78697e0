"""Hypothesis strategies for tensors, groupings and optimizers.

Small tensors are drawn bit by bit, so that every NaN, infinity, subnormal and signed zero turns up and
a failure shrinks to a readable example. Larger ones are filled from a drawn seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tieopt.testing import labels as labels  # what the library ships, by the name that the tests know

HALF = (torch.float16, torch.bfloat16)
REAL = (*HALF, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
TINY = (torch.float8_e4m3fn, torch.float8_e5m2)
ALL = (*REAL, *COMPLEX, *TINY)

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# For properties that are tested once for each optimizer, or in many other cases, which together still draw many
# examples, and no two of them the same ones. Also for properties of which one example takes a second.
few_examples = settings(max_examples=max(3, settings().max_examples // 4))

seeds = st.integers(0, 2**32 - 1)
reductions = st.sampled_from(["mean", "sum"])


def generator(seed: int) -> torch.Generator:
    """A generator of its own for each draw; on the CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Normally distributed entries of any dtype, complex and 8-bit ones too."""
    source = dtype if dtype in (torch.float32, torch.float64, *COMPLEX) else torch.float32
    return torch.randn(tuple(shape), dtype=source, generator=generator(seed)).to(dtype)


# -- shapes and groupings --------------------------------------------------------------------------------------

small_shapes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)

# Slices so long that a handful of members does not fit into what the library gathers at once.
WIDE = (40_000,)


@st.composite
def shapes(draw: st.DrawFn, *, wide: bool = False, empty: bool = False, max_count: int = 9) -> tuple[int, ...]:
    """Shapes of one to five dimensions: some slices, many slices, or long ones."""
    kinds = ["few", "few", "many"] + ["wide"] * wide + ["empty"] * empty
    match draw(st.sampled_from(kinds)):
        case "few":
            return (draw(st.integers(1, max_count)), *draw(small_shapes))
        case "many":
            return (draw(st.integers(33, 300)), *draw(st.sampled_from([(), (1,), (3,), (2, 2)])))
        case "wide":
            return (draw(st.integers(2, 12)), *WIDE)
        case _:
            return draw(st.sampled_from([(0,), (0, 3), (4, 0), (3, 2, 0), (0, 0)]))


@st.composite
def spelled(draw: st.DrawFn, names: Tensor) -> Any:
    """One of the ways to write a grouping: indices in any order, or labels of any name."""
    members = [(names == name).nonzero().squeeze(1).tolist() for name in names.unique().tolist() if name >= 0]
    kind = draw(st.sampled_from(["lists", "tuples", "tensors", "labels", "array"]))
    if kind in ("labels", "array"):
        largest = 120 if len(members) <= 120 else 1000
        chosen = torch.randperm(largest, generator=generator(draw(seeds))).tolist()[: len(members)]
        written = torch.full((len(names),), -1)
        for name, group in zip(chosen, members, strict=True):
            written[group] = name
        fits = [dtype for dtype in LABEL_DTYPES if torch.equal(written.to(dtype).to(torch.int64), written)]
        written = written.to(draw(st.sampled_from(fits)))
        return written.numpy() if kind == "array" else written
    groups = [
        draw(st.permutations(group)) if len(group) <= 12 else group[::-1] for group in draw(st.permutations(members))
    ]
    if kind == "tuples":
        return tuple(map(tuple, groups))
    return [torch.tensor(group) for group in groups] if kind == "tensors" else groups


# What arithmetic treats differently from other numbers: signed zeros, infinities, NaN and the very small.
SPECIAL = (0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 6e-8, -1e-45, 5e-324)


# -- tensors ---------------------------------------------------------------------------------------------------


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype] = ALL,
    *,
    finite: bool = False,
) -> Tensor:
    """Contiguous tensors on the CPU: any bits, numbers that are special, or normal ones of any magnitude."""
    dtype = draw(st.sampled_from(list(dtypes)))
    size = math.prod(shape) * dtype.itemsize
    kind = draw(st.sampled_from(["normal", "special", "bits"]))
    if kind == "special":
        picks = torch.randint(len(SPECIAL), shape, generator=generator(draw(seeds)))
        tensor = torch.tensor(SPECIAL, dtype=torch.float64)[picks].to(dtype)
        return _made_finite(tensor) if finite else tensor
    if kind == "bits" and size <= 256:
        raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
        tensor = torch.frombuffer(raw, dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
        tensor = tensor.reshape(shape)
        return _made_finite(tensor) if finite else tensor
    tensor = normal(shape, dtype, draw(seeds))
    if dtype in TINY or draw(st.booleans()):
        return _made_finite(tensor) if finite else tensor
    info = torch.finfo(dtype)
    power = draw(st.integers(math.frexp(info.tiny)[1], math.frexp(info.max)[1] - 4))
    return (tensor * 2.0 ** (power // 2)) * 2.0 ** (power - power // 2)


def _made_finite(tensor: Tensor) -> Tensor:
    if tensor.dtype in TINY:
        wide = tensor.float()
        return torch.where(wide.isfinite(), wide, 1.0).to(tensor.dtype)
    return torch.where(tensor.isfinite(), tensor, torch.ones((), dtype=tensor.dtype))


@st.composite
def tied_tensors(draw: st.DrawFn, shape: tuple[int, ...], names: Tensor, dtypes: Sequence[torch.dtype] = ALL) -> Tensor:
    """Tensors whose members agree already: any bits but NaNs, which equal nothing."""
    tensor = draw(tensors(shape, dtypes))
    dtype = tensor.dtype
    tensor = torch.where(tensor == tensor, _moved(tensor), _moved(torch.ones((), dtype=dtype)))
    lead = torch.arange(len(names))
    for name in names.unique().tolist():
        if name >= 0:
            lead[names == name] = int((names == name).nonzero()[0])
    return tensor[lead].view(dtype)


def _moved(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes, which torch can index."""
    return tensor.view(torch.uint8) if tensor.dtype in TINY else tensor


# -- layouts ---------------------------------------------------------------------------------------------------

STORED = ("contiguous", "reversed", "swapped", "gaps", "offset", "channels_last", "channels_last_3d")
LAZY = ("conjugated", "negated")


def fitting_layouts(dim: int, dtype: torch.dtype, *, lazy: bool = False) -> list[str]:
    """The layouts that tensors of so many dimensions can have; lazy ones negate or conjugate on reading."""
    needed = {"reversed": 2, "swapped": 2}
    exact = {"channels_last": 4, "channels_last_3d": 5}
    layouts = [name for name in STORED if dim >= needed.get(name, 0) and exact.get(name, dim) == dim]
    if lazy and dtype.is_complex:
        layouts.append("conjugated")
    if lazy and dtype in (torch.float32, torch.float64):
        layouts.append("negated")
    return layouts


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same entries in memory of another layout."""
    match layout:
        case "reversed":
            order = list(reversed(range(tensor.dim())))
            return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
        case "swapped":
            return tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        case "gaps":
            view, _ = with_gaps(tensor)
            return view
        case "offset":
            buffer = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
            return buffer[3:].view(tensor.shape).copy_(tensor)
        case "channels_last":
            return tensor.clone(memory_format=torch.channels_last)
        case "channels_last_3d":
            return tensor.clone(memory_format=torch.channels_last_3d)
        case "conjugated":
            return tensor.conj().resolve_conj().conj()
        case "negated":
            return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        case _:
            return tensor.clone(memory_format=torch.contiguous_format)


def with_gaps(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The same entries in every second place of a larger buffer, and that buffer, whose other entries are 1."""
    buffer = torch.ones([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    view = buffer[tuple(slice(1, None, 2) for _ in tensor.shape)]
    _moved(view).copy_(_moved(tensor.contiguous()))
    return view, buffer


@st.composite
def layouts(draw: st.DrawFn, tensor: Tensor, *, lazy: bool = False) -> str:
    """The name of a layout that fits the tensor."""
    return draw(st.sampled_from(fitting_layouts(tensor.dim(), tensor.dtype, lazy=lazy)))


# -- optimizers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Recipe:
    """An optimizer and its settings.

    Attributes:
        optimizer: its class.
        settings: its keyword arguments.
        entrywise: whether an entry's update depends on the gradients of that entry alone.
        closure: whether its step needs one.
        real: whether it refuses complex parameters.
        matrices: whether it takes nothing but matrices.
        filled: whether it refuses parameters without entries.
        contiguous: whether it refuses gradients that are not contiguous.
        wide: whether 16 bits are too few: on the CPU the fused SGD with momentum rounds them by where they are in
            memory, so that not even two bare optimizers agree.
    """

    optimizer: type[Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    entrywise: bool = True
    closure: bool = False
    real: bool = False
    matrices: bool = False
    filled: bool = False
    contiguous: bool = False
    wide: bool = False

    def __call__(self, parameters: Any) -> Optimizer:
        return self.optimizer(parameters, **self.settings)

    def __repr__(self) -> str:
        return f"{self.optimizer.__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of the parameters that it can train."""
        dtypes = REAL if self.real else (*REAL, *COMPLEX)
        return tuple(dtype for dtype in dtypes if not self.wide or dtype.to_real().itemsize > 2)

    def shapes(self) -> st.SearchStrategy[tuple[int, ...]]:
        """Those of the parameters that it can train."""
        if self.matrices:
            return st.tuples(st.integers(1, 9), st.integers(1, 4))
        return shapes(empty=not self.filled)

    def takes(self, parameter: Tensor) -> bool:
        """Whether it can train such a parameter."""
        return not (
            parameter.dtype not in self.dtypes
            or (self.matrices and parameter.dim() != 2)
            or (self.filled and parameter.numel() == 0)
            or (self.contiguous and not parameter.is_contiguous())
        )


_LR = {"lr": 0.01}

ENTRYWISE = [
    Recipe(torch.optim.SGD, _LR),
    Recipe(torch.optim.SGD, {**_LR, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": True}),
    Recipe(torch.optim.SGD, {**_LR, "momentum": 0.5, "dampening": 0.1, "maximize": True, "foreach": False}),
    Recipe(torch.optim.SGD, {**_LR, "momentum": 0.9, "fused": True}, real=True, wide=True),
    Recipe(torch.optim.SGD, {**_LR, "weight_decay": 0.1, "fused": True}, real=True),
    Recipe(torch.optim.Adam, {**_LR, "foreach": False}),
    Recipe(torch.optim.Adam, {**_LR, "foreach": True, "amsgrad": True, "weight_decay": 0.1}),
    Recipe(torch.optim.Adam, {**_LR, "fused": True}, real=True),
    Recipe(torch.optim.AdamW, {**_LR, "foreach": True}),
    Recipe(torch.optim.AdamW, {**_LR, "fused": True, "amsgrad": True}, real=True),
    Recipe(torch.optim.RMSprop, {**_LR, "momentum": 0.9, "centered": True}),
    Recipe(torch.optim.Adagrad, {**_LR, "lr_decay": 0.1, "foreach": True}),
    Recipe(torch.optim.Adagrad, {**_LR, "weight_decay": 0.1}),
    Recipe(torch.optim.Adadelta, {"weight_decay": 0.1}),
    Recipe(torch.optim.Adamax, _LR),
    Recipe(torch.optim.NAdam, {**_LR, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    Recipe(torch.optim.RAdam, _LR),
    Recipe(torch.optim.Rprop, _LR),
    Recipe(torch.optim.ASGD, {**_LR, "t0": 2.0}),
]


class NoisySGD(torch.optim.SGD):
    """Moves every entry by something of its own, as optimizers with quantised or noisy updates do."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 + 0.1 * normal(parameter.shape, torch.float64, 0).to(parameter))
        return loss


COUPLING = [
    Recipe(NoisySGD, {**_LR, "momentum": 0.9}, entrywise=False),
    *(
        Recipe(torch.optim.LBFGS, settings, entrywise=False, closure=True, filled=True, contiguous=True)
        for settings in ({"lr": 0.1, "max_iter": 4}, {"max_iter": 4, "line_search_fn": "strong_wolfe"})
    ),
]
if hasattr(torch.optim, "Adafactor"):
    COUPLING.append(Recipe(torch.optim.Adafactor, _LR, entrywise=False, real=True, filled=True))
if hasattr(torch.optim, "Muon"):
    COUPLING.append(Recipe(torch.optim.Muon, _LR, entrywise=False, real=True, matrices=True, filled=True))


def recipes_for(*parameters: Tensor, entrywise: bool = False, closure: bool = True) -> st.SearchStrategy[Recipe]:
    """The optimizers that can train all these parameters.

    Args:
        parameters: what is to be trained.
        entrywise: only those that work entry by entry.
        closure: also those that need one.
    """
    return st.sampled_from(
        [
            recipe
            for recipe in ENTRYWISE + COUPLING * (not entrywise)
            if all(map(recipe.takes, parameters)) and (closure or not recipe.closure)
        ]
    )


def reductions_for(recipe: Recipe, compact: bool = False) -> st.SearchStrategy[str]:
    """The reductions that an optimizer takes: a line search needs the gradient of what it trains."""
    return st.just("sum" if compact else "mean") if recipe.closure else reductions


# -- training --------------------------------------------------------------------------------------------------


def loss_of(weights: Sequence[Tensor], seed: int) -> Tensor:
    """A smooth loss of any weights, in which everything depends on everything; another one for each seed.

    Divided by the number of slices, so that training on the sum of the members' gradients does not diverge.
    """
    source = generator(seed)
    loss: Any = 0.0
    coupling: Any = 0.0
    for weight in weights:
        dtype = torch.complex128 if weight.is_complex() else torch.float64
        target = torch.randn(weight.shape, dtype=dtype, generator=source).to(weight.device, weight.dtype)
        curvature = torch.rand(weight.shape, dtype=torch.float64, generator=source).to(target.real)
        distance = torch.view_as_real(weight - target) if weight.is_complex() else (weight - target).unsqueeze(-1)
        loss = loss + (curvature.unsqueeze(-1) * distance.square()).sum() / max(len(weight), 1)
        coupling = coupling + (weight * target).real.sum() / max(weight.numel(), 1)
    return loss + coupling.sin() if weights else torch.zeros((), requires_grad=True)


def closure_of(optimizer: Optimizer, parameters: Sequence[Parameter], seed: int) -> Callable[[], Tensor]:
    """What ``optimizer.step`` takes: forward and backward anew."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(parameters, seed)
        loss.backward()
        return loss

    return closure
