"""The matrices and ties that ``benchmark.py`` measures, and the ways to train them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tieopt
from tieopt import TiedOptimizer

BATCH = 64


# --- What is tied ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Matrices and their ties: rows in groups of ``size``, or single elements in ``groups`` groups of random sizes."""

    name: str
    rows: int
    width: int
    size: int = 0
    share: float = 1.0
    parameters: int = 1
    groups: int = 0

    @property
    def title(self) -> str:
        """Describe the cell on the page."""
        if self.groups:
            return f"{self.rows} x {self.width}, its elements in {self.groups} groups"
        count = f"{self.parameters} of " if self.parameters > 1 else ""
        return f"{count}{self.rows} x {self.width}, {100 * self.share:g} % of the rows in groups of {self.size}"

    def quick(self) -> "Cell":
        """Return a tiny cell of the same kind."""
        rows, width = max(self.rows // 32, 64), max(self.width // 16, 16)
        return replace(self, rows=rows, width=width, parameters=-(-self.parameters // 20), groups=self.groups // 512)


CELLS = (
    Cell("10000x1024", 10000, 1024, 2),
    Cell("4096x4096", 4096, 4096, 64),
    Cell("50000x512", 50000, 512, 8, 0.5),
    Cell("512x512", 512, 512, 4, 0.5),
    Cell("200000x16", 200000, 16, 4),
    Cell("250000-groups", 2048, 2048, groups=250000),
    Cell("4000-groups", 2048, 2048, groups=4000),
    Cell("200-parameters", 64, 64, 4, 0.125, parameters=200),
)


class Problem(NamedTuple):
    """The parameters of a cell, and the data to train on.

    ``labels`` are for tieopt. ``places`` has, for each slice, tied or free, its index in ``raw``, so that
    ``raw[places]`` is the weight.
    """

    cell: Cell
    labels: list[Tensor]
    places: list[Tensor]
    raw: list[Tensor]
    inputs: Tensor
    target: Tensor

    def weights(self) -> list[nn.Parameter]:
        """Return new parameters whose members are already equal."""
        return [nn.Parameter(raw[places]) for raw, places in zip(self.raw, self.places, strict=True)]

    def raw_weights(self) -> list[nn.Parameter]:
        """Return new smaller parameters, with the distinct slices of the weights."""
        return [nn.Parameter(raw.clone()) for raw in self.raw]

    @property
    def kept(self) -> float:
        """The share of entries that are distinct."""
        return sum(raw.shape[0] for raw in self.raw) / sum(places.numel() for places in self.places)

    @property
    def tied_bytes(self) -> int:
        """The bytes of all members."""
        slice_bytes = self.raw[0][0].numel() * self.raw[0].element_size()
        return sum(int((labels >= 0).sum()) for labels in self.labels) * slice_bytes


def build_problem(cell: Cell, device: torch.device) -> Problem:
    """Assign rows or elements to groups at random, with a fixed seed, and draw weights and data."""
    generator = torch.Generator().manual_seed(0)
    labels = []
    for _ in range(cell.parameters):
        if cell.groups:
            drawn = torch.randint(cell.groups, (cell.rows, cell.width), generator=generator)
            labels.append(drawn.unique(return_inverse=True)[1])
        else:
            groups = int(cell.rows * cell.share) // cell.size
            members = torch.randperm(cell.rows, generator=generator)[: groups * cell.size]
            numbers = torch.arange(groups).repeat_interleave(cell.size)
            labels.append(torch.full((cell.rows,), -1).index_put_((members,), numbers))

    places, raw = [], []
    for label in labels:
        free = label < 0
        groups = int(label.max()) + 1
        places.append(label.masked_scatter(free, groups + torch.arange(int(free.sum()))).to(device))
        shape = (groups + int(free.sum()), *(() if cell.groups else (cell.width,)))
        raw.append((torch.randn(shape, generator=generator) / max(cell.rows, cell.width) ** 0.5).to(device))
    inputs = torch.randn(BATCH, max(cell.rows, cell.width), generator=generator).to(device)
    target = torch.randn(cell.parameters * BATCH, min(cell.rows, cell.width), generator=generator).to(device)
    return Problem(cell, labels, places, raw, inputs, target)


# --- How it is trained ----------------------------------------------------------------------------

Make = Callable[[Sequence[Tensor]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-3, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "SGD momentum foreach": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=True),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = partial(torch.optim.Muon, lr=1e-3)
# Compiling takes up to a minute each time, so it is done only where the targets ask for it.
COMPILED = "AdamW foreach"


class LeftOutError(Exception):
    """The reason why a contender does not take part."""


class Contender(NamedTuple):
    """A way to train: how the forward pass gets its weights, and what is run as ``optimizer.step()``."""

    optimizer: Optimizer
    weights: Callable[[], Sequence[Tensor]]
    step: Callable[[], Any]
    deterministic: bool = False


def untied(problem: Problem, make: Make, *, compiled: bool = False) -> Contender:
    """Train without ties, the baseline of all ratios."""
    params = problem.weights()
    optimizer = make(params)
    return Contender(optimizer, lambda: params, torch.compile(optimizer.step) if compiled else optimizer.step)


def loop(problem: Problem, make: Make) -> Contender:
    """Average the rows of each group in a loop, as the forum poster does: gradients before the step, weights after."""
    if problem.cell.groups:
        raise LeftOutError("averages rows, not single elements")
    params = problem.weights()
    optimizer = make(params)
    groups = [
        label.argsort(stable=True)[label.eq(-1).sum() :].view(-1, problem.cell.size).to(problem.inputs.device).unbind()
        for label in problem.labels
    ]

    @torch.no_grad()
    def average(tensors: Iterable[Tensor]) -> None:
        for tensor, members in zip(tensors, groups, strict=True):
            for group in members:
                tensor[group] = tensor[group].mean(0)

    def step() -> None:
        average(param.grad for param in params)
        optimizer.step()
        average(params)

    return Contender(optimizer, lambda: params, step)


def concatenated(problem: Problem, make: Make) -> Contender:
    """Build the weight by ``torch.cat`` from the rows of a smaller parameter."""
    if problem.cell.groups:
        raise LeftOutError("joins rows, not single elements")
    raw = problem.raw_weights()
    places = [place.tolist() for place in problem.places]

    def weights() -> list[Tensor]:
        rows = [param.split(1) for param in raw]
        return [torch.cat([own[i] for i in place]) for own, place in zip(rows, places, strict=True)]

    optimizer = make(raw)
    return Contender(optimizer, weights, optimizer.step)


def indexed(problem: Problem, make: Make) -> Contender:
    """Build the weight by ``w[idx]``, as a parametrization does, without the overhead of ``parametrize``."""
    raw = problem.raw_weights()
    optimizer = make(raw)
    return Contender(optimizer, lambda: [w[i] for w, i in zip(raw, problem.places, strict=True)], optimizer.step)


def selected(problem: Problem, make: Make) -> Contender:
    """Build the weight by ``index_select``."""
    raw = problem.raw_weights()
    optimizer = make(raw)

    def weights() -> list[Tensor]:
        pairs = zip(raw, problem.places, strict=True)
        return [w.index_select(0, i.flatten()).view(*i.shape, *w.shape[1:]) for w, i in pairs]

    return Contender(optimizer, weights, optimizer.step)


def tied(
    problem: Problem, make: Make, *, compact: bool = False, compiled: bool = False, deterministic: bool = False
) -> Contender:
    """Train with tieopt."""
    params = problem.weights()
    optimizer = tie(make(params), params, problem, compact)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    return Contender(optimizer, lambda: params, step, deterministic)


def tie(optimizer: Optimizer, params: Sequence[Tensor], problem: Problem, compact: bool) -> TiedOptimizer:
    """Tie the parameters of a problem, if this version of tieopt has the mode."""
    if compact and "compact" not in signature(TiedOptimizer).parameters:
        raise LeftOutError(f"TiedOptimizer of tieopt {tieopt.__version__} has no argument compact")
    ties = dict(zip(params, problem.labels, strict=True))
    return TiedOptimizer(optimizer, ties, **({"compact": True} if compact else {}))


PEERS = {"loop": loop, "torch.cat": concatenated, "w[idx]": indexed, "index_select": selected}
OURS = {
    "tieopt": tied,
    "tieopt deterministic": partial(tied, deterministic=True),
    "tieopt compact": partial(tied, compact=True),
}
# The targets compare the compiled steps with the fused one, so it is measured in the same rounds.
ONLY_COMPILED = {
    "untied fused": lambda problem, _: untied(problem, OPTIMIZERS["AdamW fused"]),
    "untied compiled": partial(untied, compiled=True),
    "tieopt compiled": partial(tied, compiled=True),
    "tieopt compact compiled": partial(tied, compact=True, compiled=True),
}
PROJECTIONS = ("tieopt", "tieopt compiled", "tieopt compact", "tieopt compact compiled")
