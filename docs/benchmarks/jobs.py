"""The jobs that ``benchmark.py`` measures: models, their ties, and what one would write instead of tying."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tieopt import Tie, patterns

BATCH = 64
ONE, FORMULA, SELECT, INDEX = "one Parameter", "formula", "index_select", "w[idx]"


class Job(NamedTuple):
    """A model to train, and the ways to keep some of its weights equal.

    Attributes:
        title: the job in a few words, for a reader of the page.
        kind: what is tied, which decides the targets that apply.
        model: returns the untied model.
        inputs: returns a batch.
        ties: returns the ties of a model.
        instead: for each way that needs no tieopt, a function that rewrites a model whose weights are tied already.
        compiled: whether compiled steps are measured as well.
        in_front: whether the first table and the figure have the job.
        large: whether a quick run leaves it out.
    """

    title: str
    kind: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    ties: Callable[[Any], list[Tie]]
    instead: dict[str, Callable[[Any], None]]
    compiled: bool = False
    in_front: bool = True
    large: bool = False


def compute(module: nn.Module, raw: nn.Parameter, weight: Callable[[Tensor], Tensor]) -> None:
    """Compute the weight of a module from another parameter.

    ``torch.nn.utils.parametrize`` does the same, with more overhead in each forward pass.
    """
    del module.weight
    module.raw = raw
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"weight": property(lambda self: weight(self.raw))})


# --- Whole parameters that are equal --------------------------------------------------------------


def join_all(*parameters: Tensor) -> Tie:
    """Tie whole parameters of one shape."""
    return Tie.join(*(Tie(parameter, torch.arange(len(parameter))) for parameter in parameters))


def join_layers(layers: nn.Sequential) -> list[Tie]:
    """Tie all parameters of each layer to those of the first."""
    return [join_all(*parameters) for parameters in zip(*(layer.parameters() for layer in layers), strict=True)]


def repeat_first(layers: nn.Sequential) -> None:
    """Use the first layer in the place of all."""
    for i in range(1, len(layers)):
        layers[i] = layers[0]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer without a bias."""
    return nn.Linear(inputs, outputs, bias=False)


def encoder_layer() -> nn.Module:
    """Return a layer of a small transformer."""
    return nn.TransformerEncoderLayer(256, nhead=4, dim_feedforward=1024, dropout=0, batch_first=True)


def share_transposed(autoencoder: nn.Sequential) -> None:
    """Use the encoder's weight, transposed, in the decoder."""
    compute(autoencoder[2], autoencoder[0].weight, lambda weight: weight.T)


def share_embedding(model: nn.Sequential) -> None:
    """Use the embedding's weight in the head."""
    model[-1].weight = model[0].weight


WHOLE = (
    Job(
        "6 layers of 1024 x 1024 that share one weight",
        "joined",
        lambda: nn.Sequential(*(linear(1024, 1024) for _ in range(6))),
        lambda: torch.randn(BATCH, 1024),
        join_layers,
        {ONE: repeat_first},
    ),
    Job(
        "transformer of 4 layers that share all weights",
        "joined",
        lambda: nn.Sequential(*(encoder_layer() for _ in range(4))),
        lambda: torch.randn(4, 64, 256),
        join_layers,
        {ONE: repeat_first},
    ),
    Job(
        "transformer whose embedding and head are tied",
        "joined",
        lambda: nn.Sequential(nn.Embedding(8192, 256), encoder_layer(), encoder_layer(), linear(256, 8192)),
        lambda: torch.randint(8192, (4, 64)),
        lambda model: [join_all(model[0].weight, model[-1].weight)],
        {ONE: share_embedding},
    ),
    Job(
        "autoencoder 1024-256-1024, transposed",
        "transposed",
        lambda: nn.Sequential(linear(1024, 256), nn.Tanh(), linear(256, 1024)),
        lambda: torch.randn(BATCH, 1024),
        lambda model: [
            Tie.join(Tie(model[0].weight, torch.arange(256)), Tie(model[2].weight, torch.arange(256), dim=1))
        ],
        {ONE: share_transposed},
    ),
)


# --- Matrices with labels -------------------------------------------------------------------------

Labels = tuple[Tensor, Tensor | None]
"""Labels, and the scales or None."""


class Matrix(nn.Module):
    """A linear map; a tall matrix is applied transposed, so that the output has the length of its shorter side.

    The cost of forward and backward is then proportional to the number of entries, like all other costs.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.tall = rows > width
        self.weight = nn.Parameter(torch.randn(rows, width) / max(rows, width) ** 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ (self.weight if self.tall else self.weight.T)


class Side(nn.ModuleList):
    """Matrices that are all applied to the same inputs."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([matrix(inputs) for matrix in self], dim=1)


def places_of(labels: Tensor) -> Tensor:
    """Return for each slice its index in a parameter of the distinct slices: one for each group, then the free ones."""
    free = labels < 0
    _, places = labels.masked_scatter(free, labels.max() + 1 + torch.arange(int(free.sum()))).unique(
        return_inverse=True
    )
    return places


def index(model: Side, labels: Callable[[], Labels], method: str) -> None:
    """Compute each matrix from its distinct slices."""
    shape, device = model[0].weight.shape, model[0].weight.device
    numbers, scale = labels()
    places = places_of(numbers).to(device)
    signs = 1 if scale is None else scale.to(device)
    flat, slice_shape = places.flatten(), shape[places.ndim :]

    def weight(raw: Tensor) -> Tensor:
        gathered = raw[places] if method == INDEX else raw.index_select(0, flat).view(shape)
        return gathered if scale is None else gathered * signs

    for matrix in model:
        raw = torch.empty(int(places.max()) + 1, *slice_shape, device=device)
        raw[flat] = (matrix.weight.detach() * signs).view(-1, *slice_shape)
        compute(matrix, nn.Parameter(raw), weight)


def write_formula(model: Side, formula: Callable[[Tensor], Tensor]) -> None:
    """Compute each matrix by a formula, which leaves a matrix that is tied already as it is."""
    for matrix in model:
        compute(matrix, nn.Parameter(matrix.weight.detach().clone()), formula)


def job_of_labels(
    title: str,
    kind: str,
    shape: tuple[int, int],
    labels: Callable[[], Labels],
    *,
    count: int = 1,
    formula: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Job:
    """Return the job of one or more matrices with the same labels."""
    ways = [SELECT] if formula else [SELECT, INDEX]
    instead = {way: partial(index, labels=labels, method=way) for way in ways}
    if formula:
        instead = {FORMULA: partial(write_formula, formula=formula), **instead}

    def ties(model: Side) -> list[Tie]:
        numbers, scale = labels()
        return [Tie(matrix.weight, numbers, scale=scale) for matrix in model]

    return Job(
        title,
        kind,
        lambda: Side(Matrix(*shape) for _ in range(count)),
        lambda: torch.randn(BATCH, max(shape)),
        ties,
        instead,
        large=count * prod(shape) > 4_000_000,
        **options,
    )


def rows(count: int, size: int, share: float = 1.0) -> Labels:
    """Assign a share of the rows to groups of one size, at random."""
    groups = int(count * share) // size
    members = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: groups * size]
    return torch.full((count,), -1).index_put_((members,), torch.arange(groups).repeat_interleave(size)), None


def elements(shape: tuple[int, int], groups: int) -> Labels:
    """Assign each element to a group at random."""
    return torch.randint(groups, shape, generator=torch.Generator().manual_seed(0)), None


def pattern(name: str, shape: tuple[int, int]) -> Labels:
    """Return the labels of a pattern with its scales, if it has any."""
    labels = getattr(patterns, name)(shape)
    return labels if isinstance(labels, tuple) else (labels, None)


def symmetric_part(weight: Tensor) -> Tensor:
    """Return the symmetric matrix with the upper triangle of a matrix."""
    return weight.triu() + weight.triu(1).T


def across(weight: Tensor) -> Tensor:
    """Mirror a matrix at its antidiagonal."""
    return weight.flip(0, 1).T


PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "symmetric": symmetric_part,
    "antisymmetric": lambda weight: weight.triu(1) - weight.triu(1).T,
    "persymmetric": lambda weight: (weight + across(weight)) / 2,
    "centrosymmetric": lambda weight: (weight + weight.flip(0, 1)) / 2,
    "mirrored": lambda weight: (weight + weight.flip(-1)) / 2,
    "rotated": lambda weight: sum(weight.rot90(turns) for turns in range(4)) / 4,
}


def pattern_job(name: str, size: int, *, in_front: bool = True) -> Job:
    """Return the job of a square matrix with a pattern."""
    labels = partial(pattern, name, (size, size))
    title = f"{name} {size} x {size}"
    return job_of_labels(title, "pattern", (size, size), labels, formula=PATTERNS[name], in_front=in_front)


def row_job(count: int, width: int, size: int, share: float = 1.0, kind: str = "rows") -> Job:
    """Return the job of a matrix whose rows are tied in groups of one size."""
    title = f"{count} x {width}, {'half of the ' if share == 0.5 else ''}rows in groups of {size}"
    return job_of_labels(title, kind, (count, width), partial(rows, count, size, share), compiled=size >= 4)


def element_job(groups: int) -> Job:
    """Return the job of four million elements in groups of random sizes."""
    labels = partial(elements, (2048, 2048), groups)
    return job_of_labels(f"2048 x 2048 elements in {groups} groups", "elements", (2048, 2048), labels, compiled=True)


def clusters(shape: tuple[int, int], count: int) -> Labels:
    """Cluster normally distributed values."""
    return patterns.clusters(torch.randn(shape, generator=torch.Generator().manual_seed(0)), count, of="values"), None


JOBS = (
    *WHOLE,
    *(pattern_job("symmetric", size) for size in (256, 1024, 2048, 4096)),
    *(pattern_job(name, 1024, in_front=False) for name in PATTERNS if name != "symmetric"),
    element_job(250_000),
    element_job(4000),
    job_of_labels(
        "hashed layer 784-1000 with 12250 values",
        "elements",
        (1000, 784),
        partial(patterns.hashed, (1000, 784), 12250),
    ),
    job_of_labels(
        "clustered layer 784-1000 with 16 values", "elements", (1000, 784), partial(clusters, (1000, 784), 16)
    ),
    row_job(10_000, 1024, 2),
    row_job(4096, 4096, 64),
    row_job(50_000, 512, 8, 0.5),
    row_job(200_000, 16, 4),
    row_job(512, 512, 4, 0.5, kind="small"),
    job_of_labels(
        "200 of 64 x 64, an eighth of the rows in groups of 4",
        "small",
        (64, 64),
        partial(rows, 64, 4, 0.125),
        count=200,
    ),
)
