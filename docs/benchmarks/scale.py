"""Plan the communication and memory of ties at a scale that cannot be run here.

``python docs/benchmarks/scale.py`` passes labels for 1024 simulated ranks to the code that ties sharded parameters, and
writes what it plans to ``scale.md``, next to this script. No weights are allocated or moved. It takes some minutes and
4 GiB of memory, and gives the same result on every machine.

Two sizes are planned in full. The size of 10^9 rows is extrapolated from the growth between them.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tieopt.engine.exchange import Plan, plan_exchange
from tieopt.engine.sharded import rows_sent
from tieopt.numbers.index import Index
from tieopt.ties.slices import FREE, Slices, numbered

HERE = Path(__file__).parent
WIDTH = 1024
RANKS = 1024
SIZES = (10**6, 10**7)
TARGET = 10**9
SAMPLED = 4
FLOAT32 = 4
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->\n)", re.DOTALL)


def at_random(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Return labels of groups of one size, with members at random rows."""
    return torch.randperm(rows, generator=generator) // size


def in_order(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Return labels of groups of one size, with members at adjacent rows."""
    return torch.arange(rows) // size


def hot(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Return labels of groups of ``size`` members on average, the i-th largest with about 1/i of the largest."""
    count = rows // size
    # Inverse transform sampling: the sum of 1/i is about the logarithm.
    draws = torch.rand(rows, generator=generator, dtype=torch.float64)
    return (count**draws).long().sub_(1).clamp_(max=count - 1)


def hot_in_order(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Return the labels of :func:`hot`, with members at adjacent rows."""
    return hot(rows, size, generator).sort().values


LAYOUTS: dict[str, tuple[Callable[[int, int, torch.Generator], Tensor], int]] = {
    "pairs at random": (at_random, 2),
    "groups of 8 at random": (at_random, 8),
    "hot groups at random": (hot, 8),
    "groups of 8, sorted": (in_order, 8),
    "hot groups, sorted": (hot_in_order, 8),
}


class Cost(NamedTuple):
    """Costs of one rank, or their mean over several ranks.

    Attributes:
        rows: number of rows of its shard.
        spanning: number of groups with members on this rank and on others.
        moved: rows that it sends to other ranks in a step.
        all_reduced: rows that it would send in a ring all-reduce of all spanning groups.
        index_bytes: memory of the index of its members and of the exchange.
    """

    rows: float
    spanning: float
    moved: float
    all_reduced: float
    index_bytes: float


def nbytes(value: Any) -> int:
    """Return the bytes of all tensors in a nested value."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(map(nbytes, value))
    if isinstance(value, dict):
        return sum(map(nbytes, value.values()))
    return 0


def index_bytes(labels: Tensor, plan: Plan, width: int) -> int:
    """Return the bytes of the index of a shard and of the plan of its rank."""
    sent = rows_sent(Slices(labels), plan)
    shard = torch.empty(1, 1).expand(len(labels), width)
    (whole,) = numbered([Slices(torch.where(sent == FREE, labels, FREE))])
    inner = Index.compile([whole], [shard])
    spanning = Index.compile([Slices(sent)], [shard], singles=True)
    return nbytes([inner.runs, spanning.runs, plan])


def costs(labels: Tensor, ranks: int, sampled: Iterator[int] | range, width: int = WIDTH) -> list[Cost]:
    """Return the costs of the sampled ranks for a matrix that is sharded by rows."""
    shards = labels.chunk(ranks)
    shards += (labels[:0],) * (ranks - len(shards))
    found = []
    for rank in sampled:
        plan, all_spanning = plan_exchange(shards, rank)
        found.append(
            Cost(
                rows=len(shards[rank]),
                spanning=len(plan.groups),
                # Once for the gradients and once for the weights.
                moved=2 * plan.rows_moved,
                all_reduced=2 * 2 * (ranks - 1) / ranks * len(all_spanning),
                index_bytes=index_bytes(shards[rank], plan, width),
            )
        )
    return found


def mean(found: list[Cost]) -> Cost:
    return Cost(*(sum(column) / len(found) for column in zip(*found, strict=True)))


def extrapolated(small: Cost, large: Cost, factor: float, target: float) -> Cost:
    """Extrapolate each cost with the power of the number of rows with which it grew from ``small`` to ``large``."""

    def onward(first: float, second: float) -> float:
        if not first or not second:
            return second
        return second * target ** (math.log(second / first) / math.log(factor))

    return Cost(*(onward(first, second) for first, second in zip(small, large, strict=True)))


def counted(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ") if number < 10**6 else f"{number / 10**6:,.2f} M"


def sized(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def lines(name: str, found: dict[int, Cost]) -> Iterator[str]:
    small, large = (found[rows] for rows in SIZES)
    planned = {**found, TARGET: extrapolated(small, large, SIZES[1] / SIZES[0], TARGET / SIZES[1])}
    for rows, cost in planned.items():
        shard = cost.rows * WIDTH * FLOAT32
        moved = cost.moved * WIDTH * FLOAT32
        cells = [
            name,
            f"10^{math.log10(rows):.0f}{' (extrapolated)' * (rows == TARGET)}",
            counted(cost.rows),
            counted(cost.spanning),
            sized(moved),
            f"{moved / shard:.3g}",
            sized(cost.all_reduced * WIDTH * FLOAT32),
            sized(cost.index_bytes),
        ]
        yield f"| {' | '.join(cells)} |\n"


HEAD = """\
| groups | rows | rows of a shard | spanning groups | sent in a step | in shards | all-reduced | index |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    sampled = torch.randperm(RANKS, generator=torch.Generator().manual_seed(0))[:SAMPLED].tolist()
    found: dict[str, dict[int, Cost]] = {}
    with tqdm(total=len(LAYOUTS) * len(SIZES)) as progress:
        for name, (labels, size) in LAYOUTS.items():
            for rows in SIZES:
                progress.set_description(f"{name}, {rows} rows")
                drawn = labels(rows, size, torch.Generator().manual_seed(1))
                found.setdefault(name, {})[rows] = mean(costs(drawn, RANKS, sampled))
                progress.update()
    page = HERE / "scale.md"
    table = HEAD + "".join(line for name in found for line in lines(name, found[name]))
    page.write_text(TABLE.sub(lambda _: table, page.read_text(encoding="utf-8")), encoding="utf-8")
    results = {name: {str(rows): cost._asdict() for rows, cost in own.items()} for name, own in found.items()}
    (HERE / "scale.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
