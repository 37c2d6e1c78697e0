"""The page and the figure of what ``benchmark.py`` measured; ``benchmark.py --render`` makes them without measuring."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import FORMULA, INDEX, ONE, SELECT
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

UNTIED, FULL, COMPACT, UNTIED_FUSED = "untied", "tieopt", "tieopt compact", "untied fused"
COPY, TIE_WEIGHTS = "copy", "tie_weights()"

ORDER = (UNTIED, UNTIED_FUSED, ONE, FORMULA, SELECT, INDEX, FULL, COMPACT, COPY, TIE_WEIGHTS)

Rounds = dict[str, list[float]]
"""For each contender, its seconds in each round."""

Job = dict[str, Any]
"""What was measured for a job."""


class Quartiles(NamedTuple):
    """Quartiles of the ratios of paired rounds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def compare(rounds: Rounds, name: str, base: str) -> Quartiles:
    """Return the ratios of the seconds of two contenders in the same round."""
    ratios = [a / b for a, b in zip(rounds[name], rounds[base], strict=True)]
    return Quartiles(*statistics.quantiles(ratios, n=4, method="inclusive"))


def ratio(rounds: Rounds, *names: str) -> float | None:
    """Return the median ratio to the untied step, the lowest of the contenders of these names that were measured."""
    return min((compare(rounds, name, UNTIED).median for name in names if name in rounds), default=None)


# --- The first table ------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """Return a markdown table; numbers are aligned to the right."""
    marks = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


COLUMNS = {
    FULL: (FULL,),
    COMPACT: (COMPACT,),
    "one Parameter, or a formula": (ONE, FORMULA),
    "an indexed parameter": (SELECT, INDEX),
}


def front_row(job: Job) -> list[str]:
    """Return the row of a job, with the fastest tied step in bold for each optimizer."""
    steps = job["steps"].values()
    ways = {name for names in COLUMNS.values() for name in names}

    def shown(names: Sequence[str]) -> str:
        values = [ratio(rounds, *names) for rounds in steps]
        fastest = [ratio(rounds, *ways) for rounds in steps]
        texts = [f"**{a:.2f}**" if a == b else f"{a:.2f}" for a, b in zip(values, fastest, strict=True) if a]
        return " / ".join(texts)

    untied = " / ".join(f"{1000 * statistics.median(rounds[UNTIED]):.3g}" for rounds in steps)
    return [job["title"], untied, *map(shown, COLUMNS.values())]


def median_row(jobs: Sequence[Job], optimizers: Sequence[str]) -> list[str]:
    """Return the row of the medians over all jobs, for the two modes of tieopt."""
    medians = [
        " / ".join(f"{statistics.median(ratio(job['steps'][o], name) for job in jobs):.2f}" for o in optimizers)
        for name in (FULL, COMPACT)
    ]
    return ["*median of these jobs*", "", *medians, "", ""]


# --- Details --------------------------------------------------------------------------------------


def details(measured: dict[str, Rounds], base: str) -> str:
    """Return a table with a row for each job: the base in milliseconds, the others as ratios to it."""
    found = {name for rounds in measured.values() for name in rounds}
    names = [name for name in ORDER if name in found and name != base]
    return table(
        ["job", f"{base}, ms", *names],
        (
            [
                title,
                f"{1000 * statistics.median(rounds[base]):.3g}",
                *(str(compare(rounds, name, base)) if name in rounds else "" for name in names),
            ]
            for title, rounds in measured.items()
        ),
    )


# --- Targets --------------------------------------------------------------------------------------


class Target(NamedTuple):
    """An upper limit for the values of some jobs, each named by where it was measured."""

    text: str
    limit: float
    values: dict[str, dict[str, float]]

    @property
    def row(self) -> list[str]:
        """The row of the table of targets, with the largest miss of each job, the worst first."""
        values = [value for job in self.values.values() for value in job.values()]
        if not values:
            return [self.text, "not measured", ""]
        worst = [
            (*max((value, where) for where, value in job.items()), title) for title, job in self.values.items() if job
        ]
        misses = [
            f"{value:.2f} {title}" + (f" ({where})" if where else "")
            for value, where, title in sorted(worst, reverse=True)
            if value > self.limit
        ]
        missed = sum(value > self.limit for value in values)
        verdict = f"**missed** in {missed} of {len(values)}" if missed else f"met in all {len(values)}"
        return [self.text, verdict, "<br>".join(misses)]


def list_targets(jobs: Sequence[Job]) -> list[Target]:
    """Return all targets, with the values that were measured."""

    def steps(kinds: str, name: str, *bases: str, only: str = "") -> dict[str, dict[str, float]]:
        return {
            job["title"]: {
                optimizer + (f", vs {base}" if len(bases) > 1 else ""): compare(rounds, name, base).median
                for optimizer, rounds in job["steps"].items()
                for base in bases
                if base in rounds and only in optimizer
            }
            for job in jobs
            if job["kind"] in kinds.split()
        }

    copies = {
        job["title"]: {"": compare(job["tie_weights"], TIE_WEIGHTS, COPY).median}
        for job in jobs
        if job["kind"] == "joined"
    }
    compiled = {
        job["title"]: {"": compare(job["compiled"]["optimizer step"], COMPACT, UNTIED_FUSED).median}
        for job in jobs
        if "compiled" in job
    }
    ways = (ONE, FORMULA, SELECT, INDEX)
    return [
        Target("joined parameters: `tie_weights()` at most 3 copies of the members", 3, copies),
        Target("joined parameters: tieopt at most 1.15 times the untied step", 1.15, steps("joined", FULL, UNTIED)),
        Target("joined parameters: compact at most 1.05 times one Parameter", 1.05, steps("joined", COMPACT, ONE)),
        Target("patterns: compact ahead of the formula and the index", 1, steps("pattern", COMPACT, FORMULA, SELECT)),
        Target(
            "patterns, transposed: tieopt at most 1.5 times the untied foreach step",
            1.5,
            steps("pattern transposed", FULL, UNTIED, only="foreach"),
        ),
        Target("single elements: compact ahead of the indices", 1, steps("elements", COMPACT, SELECT, INDEX)),
        Target(
            "512 x 512 and 200 parameters: tieopt at most 1.15 times the untied AdamW step",
            1.15,
            steps("small", FULL, UNTIED, only="AdamW"),
        ),
        Target("512 x 512 and 200 parameters: compact ahead of the indices", 1, steps("small", COMPACT, *ways)),
        Target("large rows: tieopt at most 1.96 times the untied step", 1.96, steps("rows", FULL, UNTIED)),
        Target("large rows: compact ahead of the indices", 1, steps("rows", COMPACT, *ways)),
        Target("compiled: compact at most 1.0 times the untied fused optimizer step", 1, compiled),
    ]


# --- The page -------------------------------------------------------------------------------------

QUICK = (
    "> **A quick run: few rounds, and neither large matrices nor compiled steps. The numbers are rough;** those of a\n"
    "> single job can be off by a third."
)

FRONT = """\
Each number says how many times as long a training step takes as the step of the same model without ties: 1.10 is a
tenth more, 0.90 a tenth less. The fastest way to tie is **bold**. The numbers of a cell are, in this order, for
{optimizers}."""

OWN_MODEL = """\
**Your own model.** Find the job that is tied most like it. The batches here are small, so ties weigh more than in most
models. tieopt works in `optimizer.step()` alone, so what it adds does not depend on the batch: take the milliseconds,
(ratio - 1) times the untied step, scale them with the number of tied entries, and add them to your own step.

- *tieopt* is `TiedOptimizer(optimizer, ties)`, and *compact* the same with `compact=True`. The model is unchanged.
- *One Parameter* is used in several places, `b.weight = a.weight`, or transposed in the decoder of the autoencoder. It
  can share only whole parameters, and is the cheapest way to do so.
- *A formula* computes the weight in each forward pass from a parameter of its own size, such as
  `w.triu() + w.triu(1).T`.
- *An indexed parameter* has only the distinct entries, and `w[idx]` or `w.index_select(0, idx)` makes the weight from
  them in each forward pass; the faster of the two is shown."""

HOW = """\
Written by `python docs/benchmarks/benchmark.py`.

- A step is a whole training step: forward, the mean of the squared outputs as loss, backward, the optimizer's step and
  `zero_grad`. The batch has 64 rows; for the transformers 4 sequences of 64. A tall matrix is applied transposed, so
  that the cost of forward and backward is proportional to its number of entries, like all other costs.
- Contenders start from the same tied weights and have the same loss. They take turns: each of 5 to 21 rounds runs each
  of them once, in random order. Ratios are medians, with quartiles in the details, of the ratios to the untied step *of
  the same round*.
- SGD has a momentum of 0.9 and `foreach=True`. On a CPU, torch uses `foreach` and `fused` only if they are asked for.
- Formulas: symmetric `w.triu() + w.triu(1).T`, antisymmetric `w.triu(1) - w.triu(1).T`; the others are the mean of `w`
  and its images. Formulas and indices are computed without the overhead of `torch.nn.utils.parametrize`.
- The transformers have width 256, 4 heads and 1024 hidden units; the one with tied embedding and head has two layers
  and 8192 tokens. Elements and rows are assigned to groups at random, the hashed layer has signs as in HashedNets."""

COMPILED = """\
`torch.compile(optimizer.step)` with AdamW foreach, as a ratio to the untied fused step without a compiler. The forward
and backward passes are not compiled."""

TYING = "Tying weights that are not tied, as a ratio to a copy of as many bytes as all members have, with cold caches."


def page(results: dict[str, Any]) -> str:
    """Return the page in markdown."""
    machine, jobs = results["machine"], results["jobs"]
    optimizers = list(jobs[0]["steps"])
    front = [job for job in jobs if job["in_front"]]
    measured = (
        f"Measured with **tieopt {machine['tieopt']}** and **torch {machine['torch']}** on {machine['device']}, "
        f"{machine['threads']} of {machine['cores']} cores, {machine['date']}."
    )
    compiled = [job for job in jobs if "compiled" in job]
    parts = [
        "# Benchmark: what a step costs",
        measured,
        QUICK if results["quick"] else "",
        "![Time of a training step as a ratio to the untied one](results.png)",
        FRONT.format(optimizers=", ".join(optimizers)),
        table(["job", "untied, ms", *COLUMNS], [*map(front_row, front), median_row(front, optimizers)]),
        OWN_MODEL,
        "## Details",
        "Whole training steps as ratios to the untied one: the median, and the quartiles in brackets.",
    ]
    for optimizer in optimizers:
        parts += [f"### {optimizer}", details({job["title"]: job["steps"][optimizer] for job in jobs}, UNTIED)]
    parts += ["### Compiled steps", COMPILED] if compiled else []
    for part in ("whole step", "optimizer step") if compiled else ():
        rounds = {job["title"]: job["compiled"][part] for job in compiled}
        parts += [f"The {part}:", details(rounds, UNTIED_FUSED)]
    parts += [
        "### `tie_weights()`",
        TYING,
        details({job["title"]: job["tie_weights"] for job in jobs}, COPY),
        "## How it was measured",
        HOW,
        table(
            ["job", "distinct entries", "tied MiB"],
            ([job["title"], f"{job['distinct']:.1%}", f"{job['tied_bytes'] / 2**20:.3g}"] for job in jobs),
        ),
        table(["machine", ""], ([key, str(value)] for key, value in machine.items()), numbers=False),
        "## Targets and misses",
        "What the library aims at, and the largest miss of each job. *Ahead* is a ratio of at most 1.",
        table(["target", "verdict", "misses"], (target.row for target in list_targets(jobs)), numbers=False),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- The figure -----------------------------------------------------------------------------------

# Colour and marker. The markers of tieopt are filled, the others open.
STYLES = {
    ONE: ("#777777", "v"),
    FORMULA: ("#CC79A7", "^"),
    INDEX: ("#E69F00", "s"),
    SELECT: ("#009E73", "D"),
    FULL: ("#0072B2", "o"),
    COMPACT: ("#D55E00", "o"),
}


def draw_marker(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], **options: Any) -> list[Any]:
    """Draw a contender in its style."""
    color, marker = STYLES[name]
    face = color if "tieopt" in name else "white"
    return axes.plot(x, y, marker, color=color, markerfacecolor=face, markersize=6, **options)


def draw_ratios(axes: Axes, jobs: Sequence[Job], optimizer: str) -> None:
    """Draw the median of each contender in the line of its job."""
    for y, job in enumerate(jobs):
        rounds = job["steps"][optimizer]
        axes.axhline(y, color="#e4e4e4", linewidth=0.8, zorder=0)
        for name in STYLES:
            if name in rounds:
                draw_marker(axes, name, [compare(rounds, name, UNTIED).median], [y])
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(optimizer, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def figure(results: dict[str, Any]) -> Figure:
    """Draw a panel for each optimizer, with a line for each job of the first table."""
    jobs = [job for job in results["jobs"] if job["in_front"]]
    optimizers = list(jobs[0]["steps"])
    drawn = Figure(figsize=(3.4 + 2.8 * len(optimizers), 1.4 + 0.42 * len(jobs)), layout="constrained")
    panels = drawn.subplots(1, len(optimizers), sharex=True, sharey=True, squeeze=False)[0]
    for axes, optimizer in zip(panels, optimizers, strict=True):
        draw_ratios(axes, jobs, optimizer)
    panels[0].set_yticks(range(len(jobs)), [textwrap.fill(job["title"], 36) for job in jobs], fontsize=8.5)
    panels[0].set_ylim(len(jobs) - 0.5, -0.5)
    left, right = panels[0].get_xlim()
    panels[0].set_xlim(min(0.5, left), 1.15 * right)
    version = f"tieopt {results['machine']['tieopt']}, torch {results['machine']['torch']}"
    rough = ", a rough quick run" if results["quick"] else ""
    drawn.supxlabel(f"time of a training step as a ratio to the untied one, log scale ({version}{rough})", fontsize=10)

    shown = [name for name in STYLES if any(name in rounds for job in jobs for rounds in job["steps"].values())]
    handles = [handle for name in shown for handle in draw_marker(panels[0], name, [], [], label=name)]
    drawn.legend(handles=handles, loc="outside upper center", ncols=len(shown), frameon=False)
    return drawn


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write the page and its figure."""
    (folder / "results.md").write_text(page(results), encoding="utf-8")
    figure(results).savefig(folder / "results.png", dpi=150)
