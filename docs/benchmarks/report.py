"""The page and the figure of what ``benchmark.py`` measured; ``benchmark.py --render`` makes them without measuring."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import FORMULA, INDEX, ONE, SELECT
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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


def fastest(rounds: Rounds, ways: Sequence[str]) -> tuple[float, str] | None:
    """Return the lowest median ratio to the untied step of these ways to tie, and the way, if one was measured."""
    return min(((compare(rounds, way, UNTIED).median, way) for way in ways if way in rounds), default=None)


def fastest_steps(jobs: Sequence[Job], ways: Sequence[str]) -> list[tuple[float, str]]:
    """Return the fastest of these ways for each job and optimizer."""
    found = [fastest(rounds, ways) for job in jobs for rounds in job["steps"].values()]
    return [pair for pair in found if pair]


# --- The first tables -----------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """Return a markdown table; numbers are aligned to the right."""
    marks = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


KINDS = {
    "a whole weight, in several places or transposed": ("joined", "transposed"),
    "a symmetric matrix": ("pattern",),
    "single elements": ("elements",),
    "rows of a large weight": ("rows",),
    "rows of small weights": ("small",),
}

WITHOUT = "without tieopt"

# Medians that differ by less are as good as equal.
EVEN = 1.03

COLUMNS = {"tieopt": (FULL,), "compact": (COMPACT,), WITHOUT: (ONE, FORMULA, SELECT, INDEX)}


# What a way to tie is called in a sentence, where its name alone is not clear.
SENTENCE = {FORMULA: "a formula", SELECT: "`index_select`", INDEX: "`w[idx]`", COMPACT: "tieopt with `compact=True`"}


def by_kind(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Return the jobs by what they tie, the kinds that have any."""
    found = {text: [job for job in jobs if job["kind"] in kinds] for text, kinds in KINDS.items()}
    return {text: some for text, some in found.items() if some}


def listing(names: Sequence[str]) -> str:
    """Return names as a list in a sentence."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def summarize(jobs: Sequence[Job]) -> dict[str, tuple[float, str]]:
    """Return for each column the median over jobs and optimizers, and the way to tie that is most often its fastest."""
    pairs = {column: fastest_steps(jobs, ways) for column, ways in COLUMNS.items()}
    return {
        column: (statistics.median(value for value, _ in some), statistics.mode(way for _, way in some))
        for column, some in pairs.items()
        if some
    }


def kind_row(text: str, jobs: Sequence[Job]) -> list[str]:
    """Return the row of a kind of tie: medians over its jobs and all optimizers, the lowest in bold."""
    return [text, *cells(summarize(jobs))]


def fastest_ways(jobs: Sequence[Job]) -> str:
    """Return for a sentence which way is the fastest for each kind of tie."""
    ways: dict[str, list[str]] = {}
    for text, some in by_kind(jobs).items():
        medians = summarize(some)
        lowest, _ = min(medians.values())
        names = [way for value, way in medians.values() if value <= EVEN * lowest]
        ways.setdefault(" or ".join(SENTENCE.get(way, way) for way in names), []).append(text)
    return "; ".join(f"{way} for {listing(texts)}" for way, texts in ways.items())


def cells(found: dict[str, tuple[float, str]]) -> list[str]:
    """Return the cells of a row, the lowest in bold, with the way that is the fastest without tieopt."""
    lowest = min(value for value, _ in found.values())
    texts = []
    for column in COLUMNS:
        value, way = found.get(column, (0, ""))
        text = f"{value:.2f}" if way else ""
        bold = f"**{text}**" if value == lowest else text
        texts.append(f"{bold} {way}" if column == WITHOUT else bold)
    return texts


def job_row(job: Job, optimizer: str) -> list[str]:
    """Return the row of a job for one optimizer, with the fastest way in bold."""
    rounds = job["steps"][optimizer]
    found = {column: pair for column, ways in COLUMNS.items() if (pair := fastest(rounds, ways))}
    return [job["title"], f"{1000 * statistics.median(rounds[UNTIED]):.3g}", *cells(found)]


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
        Target("large rows: tieopt at most 1.96 times the untied step, as 1.0.0", 1.96, steps("rows", FULL, UNTIED)),
        Target("large rows: compact ahead of the indices", 1, steps("rows", COMPACT, *ways)),
        Target("compiled: compact at most 1.0 times the untied fused optimizer step", 1, compiled),
    ]


# --- The page -------------------------------------------------------------------------------------

QUICK = (
    "> **A quick run: few rounds, and neither large matrices nor compiled steps. The numbers are rough;** those of a\n"
    "> single job can be off by a third."
)

ANSWER = """\
**A training step takes {full:.1f} times as long with ties as without, and {compact:.1f} times with `compact=True`**:
the median of {jobs} jobs with small batches, each with {optimizers}. The jobs range from {full_range} times, and with
`compact=True` from {compact_range} times. tieopt works in `optimizer.step()` alone, so what it adds does not grow with
the batch: the larger the batch, the nearer the ratio is to 1."""

FASTEST = """\
Which way to tie is the fastest depends on what is tied: {ways}. tieopt leaves the model as it is; the other ways change
it."""

DOTS = """\
*A dot is a job with one optimizer; a bar, and the number on the right, is the median.*"""

KIND = """\
Each number is the time of a training step divided by that of the same model without ties: 1.10 is a tenth more, 0.90 a
tenth less. It is the median over the jobs and the optimizers. The fastest way is **bold**. For the last column the
fastest of several ways is taken in each job; the name is that of the one that is the fastest most often."""

CHOICE = """\
**Which way to choose.** If nothing but the time of a step matters, take the fastest for what you tie:

- *tieopt* is `TiedOptimizer(optimizer, ties)`, and *compact* the same with `compact=True`. The model stays as it is.
  Any entries can be tied, at any time, in a model that somebody else wrote as well.
- *one Parameter* is used in several places, `b.weight = a.weight`, or transposed. It can share whole weights only.
- a *formula* computes the weight in each forward pass from a parameter of its own size, such as
  `w.triu() + w.triu(1).T`.
- `index_select` and `w[idx]` make the weight in each forward pass from a parameter with only the distinct entries."""

JOBS = """\
The same for each job, with {optimizer}. The other optimizers, and each way with its quartiles, are in the
[details](#details)."""

OWN_MODEL = """\
**Your own model.** Find the job that is tied most like it. The batches here are small, so ties weigh more than in most
models. Take the milliseconds that tieopt adds, (ratio - 1) times the untied step, scale them with the number of tied
entries, and add them to your own step."""

DETAILS = """\
Whole training steps as ratios to the untied one: the median, and the quartiles in brackets. Five more patterns of a
1024 x 1024 matrix are in the details and the targets, and do not count above."""

LIMITS = """\
How near a step can come at best, by the memory that it moves:

- **Joined parameters.** A fused AdamW step moves seven times the bytes of the weights: it reads weights, gradients and
  two moments, and writes all but the gradients. The ties read and write the gradients, and read the weights: three
  times more, so that the optimizer's step takes at least 10/7 = 1.43 times as long. A whole step is below 1.15 only
  where forward and backward take about twice as long as the optimizer. With `compact=True`, what one Parameter does not
  need is to read the gradients of all members and to write all weights.
- **Patterns.** Half of the entries of a symmetric matrix lie across the order of memory. To transpose takes two to
  three copies, and gradients and weights are both transposed in each step; a formula does it in the forward and in the
  backward pass. The shared values of the compact mode are a triangle, which is gathered entry by entry, as an index
  does. Mirrored and centrosymmetric matrices are not transposed, so that their formulas cost little.
- **Single elements.** Memory is read 64 bytes at a time, for 4 that are asked for. An index does this once for the
  weight and once for the gradient; tieopt adds up the gradients, in float64, and writes the weights, and in the full
  mode it also writes the gradients and reads the weights.
- **Small parameters.** A step of one small parameter makes about twice the Python calls of the bare optimizer.
- **Compiled steps** are compared without forward and backward. Single elements are gathered and written in no order,
  which takes several times as long as the optimizer; the compiler does not change that."""

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
    full, compact = ([value for value, _ in fastest_steps(front, ways)] for ways in ((FULL,), (COMPACT,)))
    answer = ANSWER.format(
        full=statistics.median(full),
        compact=statistics.median(compact),
        jobs=len(front),
        optimizers=listing(optimizers),
        full_range=f"{min(full):.1f} to {max(full):.1f}",
        compact_range=f"{min(compact):.1f} to {max(compact):.1f}",
    )
    measured = (
        f"Measured with **tieopt {machine['tieopt']}** and **torch {machine['torch']}** on {machine['device']}, "
        f"{machine['threads']} of {machine['cores']} cores, {machine['date']}."
    )
    compiled = [job for job in jobs if "compiled" in job]
    parts = [
        "# Benchmark: what a step costs",
        QUICK if results["quick"] else "",
        textwrap.fill(answer, 120),
        textwrap.fill(FASTEST.format(ways=fastest_ways(front)), 120),
        "![Time of a training step, divided by that without ties](results.png)",
        DOTS,
        measured,
        "## By what is tied",
        KIND,
        table(["what is tied", *COLUMNS], (kind_row(text, some) for text, some in by_kind(front).items())),
        CHOICE,
        "## Each job",
        JOBS.format(optimizer=optimizers[0]),
        table(["job", "untied, ms", *COLUMNS], (job_row(job, optimizers[0]) for job in front)),
        OWN_MODEL,
        "## Details",
        DETAILS,
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
        LIMITS,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- The figure -----------------------------------------------------------------------------------

# The colour of each column, and what the legend says of it.
STYLES = {
    "tieopt": ("#0072B2", "tieopt"),
    "compact": ("#D55E00", "tieopt, compact=True"),
    WITHOUT: ("#777777", "the fastest way without tieopt"),
}


MEDIAN = {"marker": "|", "linestyle": "none", "markersize": 13, "markeredgewidth": 3.5}


def draw_kind(axes: Axes, y: float, jobs: Sequence[Job]) -> None:
    """Draw a line for each column: a dot for each job and optimizer, and their median."""
    for column, (median, _) in summarize(jobs).items():
        color, _ = STYLES[column]
        at = y + 0.27 * (list(COLUMNS).index(column) - 1)
        ratios = [value for value, _ in fastest_steps(jobs, COLUMNS[column])]
        axes.plot(ratios, [at] * len(ratios), "o", color=color, markersize=5, alpha=0.35, markeredgewidth=0)
        axes.plot(median, at, color=color, **MEDIAN)
        axes.annotate(
            f"{median:.2f}", (1.02, at), xycoords=("axes fraction", "data"), color=color, fontsize=10, va="center"
        )


def figure(results: dict[str, Any]) -> Figure:
    """Draw how much longer a step takes with ties, for each kind of tie."""
    kinds = by_kind([job for job in results["jobs"] if job["in_front"]])
    drawn = Figure(figsize=(6.4, 1.7 + 0.75 * len(kinds)), layout="constrained")
    axes = drawn.subplots()
    for y, jobs in enumerate(kinds.values()):
        draw_kind(axes, y, jobs)
    axes.set_yticks(range(len(kinds)), [textwrap.fill(text, 22) for text in kinds], fontsize=11)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    for y in range(1, len(kinds)):
        axes.axhline(y - 0.5, color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("time of a step, divided by that without ties\n(left of 1: faster than without ties)", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [axes.plot([], [], color=color, label=text, **MEDIAN)[0] for color, text in STYLES.values()]
    drawn.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    return drawn


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write the page and its figure."""
    (folder / "results.md").write_text(page(results), encoding="utf-8")
    figure(results).savefig(folder / "results.png", dpi=200)
