"""What ties cost past the machines at hand: who would send how much to whom, and what each rank has to know.

``python docs/benchmarks/scale.py`` hands labels to the code that ties sharded parameters, for 1024 ranks of which there
is none, and writes what it plans into the page beside it, ``scale.md``. No weight exists and none is moved. It takes
some minutes and 4 GiB, and is the same on every machine.

Two sizes are planned in full. What a size of 10^9 rows comes to is read off the growth from one to the other.
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

from tieopt.engine.exchange import Holdings, Plan
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
    """Groups of one size, their members anywhere."""
    return torch.randperm(rows, generator=generator) // size


def in_order(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Groups of one size, their members beside each other."""
    return torch.arange(rows) // size


def hot(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Groups of so many members on average, the i-th largest with about 1/i of the largest; anywhere."""
    count = rows // size
    # The inverse of the logarithm, which is about the sum of 1/i.
    draws = torch.rand(rows, generator=generator, dtype=torch.float64)
    return (count**draws).long().sub_(1).clamp_(max=count - 1)


def hot_in_order(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """The same, their members beside each other."""
    return hot(rows, size, generator).sort().values


LAYOUTS: dict[str, tuple[Callable[[int, int, torch.Generator], Tensor], int]] = {
    "pairs at random": (at_random, 2),
    "groups of 8 at random": (at_random, 8),
    "hot groups at random": (hot, 8),
    "groups of 8, sorted": (in_order, 8),
    "hot groups, sorted": (hot_in_order, 8),
}


class Cost(NamedTuple):
    """What one rank has and does, the mean over some of them.

    Attributes:
        rows: of its shard.
        spanning: groups that it has members of and others, too.
        moved: rows that it sends to other ranks in a step.
        all_reduced: rows that it would send if all ranks reduced all spanning groups, around a ring.
        index_bytes: what tells its members and what it exchanges.
    """

    rows: float
    spanning: float
    moved: float
    all_reduced: float
    index_bytes: float


def nbytes(value: Any) -> int:
    """What the tensors within take."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(map(nbytes, value))
    if isinstance(value, dict):
        return sum(map(nbytes, value.values()))
    return 0


def index_bytes(labels: Tensor, plan: Plan, width: int) -> int:
    """Of the index of a shard and of the plan of its rank."""
    sent = rows_sent(Slices(labels), plan)
    shard = torch.empty(1, 1).expand(len(labels), width)
    (whole,) = numbered([Slices(torch.where(sent == FREE, labels, FREE))])
    inner = Index.compile([whole], [shard])
    spanning = Index.compile([Slices(sent)], [shard], singles=True)
    return nbytes([inner.runs, spanning.runs]) + plan.nbytes


def costs(labels: Tensor, ranks: int, sampled: Iterator[int] | range, width: int = WIDTH) -> list[Cost]:
    """What some of the ranks have and do, where a matrix is cut into shards of rows."""
    shards = labels.chunk(ranks)
    shards += (labels[:0],) * (ranks - len(shards))
    holdings = Holdings.of(shards)
    found = []
    for rank in sampled:
        plan = Plan.of(holdings, rank, ranks)
        found.append(
            Cost(
                rows=len(shards[rank]),
                spanning=len(plan.groups),
                # Once for the gradients and once for the weights.
                moved=2 * plan.rows_moved(rank),
                all_reduced=2 * 2 * (ranks - 1) / ranks * len(holdings.groups),
                index_bytes=index_bytes(shards[rank], plan, width),
            )
        )
    return found


def mean(found: list[Cost]) -> Cost:
    return Cost(*(sum(column) / len(found) for column in zip(*found, strict=True)))


def extrapolated(small: Cost, large: Cost, factor: float, target: float) -> Cost:
    """What grows by some power of the number of rows goes on growing by it."""

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
