"""The page and the figure of what ``benchmark.py`` measured; ``benchmark.py --render`` makes them without measuring."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Entry = dict[str, Any]
MIB = 2**20


class Quartiles(NamedTuple):
    """Quartiles of the ratios of paired rounds."""

    low: float
    median: float
    high: float


def compare(entry: Entry, name: str, base: str, key: str = "step") -> Quartiles | None:
    """Return the ratios of the times of two contenders in the same round, or None if one was not measured."""
    mine, theirs = (entry["contenders"].get(contender, {}).get(key) for contender in (name, base))
    if not mine or not theirs:
        return None
    # A slow contender takes part in the first rounds only.
    ratios = [a / b for a, b in zip(mine, theirs, strict=False)]
    return Quartiles(*statistics.quantiles(ratios, n=4, method="inclusive"))


# --- The targets ----------------------------------------------------------------------------------


class Target(NamedTuple):
    """An upper limit for some values, which are named by where they were measured."""

    text: str
    limit: float
    values: dict[str, float]
    unit: str = ""

    @property
    def row(self) -> list[str]:
        """The row of the table of targets."""
        if not self.values:
            return [self.text, "not measured", ""]
        worst = max(self.values, key=lambda where: self.values[where])
        missed = sum(value > self.limit for value in self.values.values())
        verdict = f"**missed** in {missed} of {len(self.values)}" if missed else f"met in all {len(self.values)}"
        return [self.text, verdict, f"{self.values[worst]:.2f}{self.unit}: {worst}"]


def medians(entries: Iterable[Entry], name: str, *bases: str, key: str = "step") -> dict[str, float]:
    """Return the median ratios of a contender to each of the bases, wherever both were measured."""
    found = {}
    for entry in entries:
        where = ", ".join(filter(None, (entry["cell"], entry.get("optimizer"))))
        for base in bases:
            if quartiles := compare(entry, name, base, key):
                found[where + (f", vs {base}" if len(bases) > 1 else "")] = quartiles.median
    return found


def list_targets(results: dict[str, Any]) -> list[Target]:
    """Return all targets, with the values that were measured."""
    settings, steps = results["settings"], results["steps"]

    def where(holds: Callable[[dict[str, Any]], bool], entries: Iterable[Entry] = steps) -> list[Entry]:
        return [entry for entry in entries if holds(results["cells"][entry["cell"]])]

    halved = where(lambda cell: cell["kept"] <= 0.5)
    foreach, fused = ([e for e in halved if e["optimizer"].endswith(kind)] for kind in ("foreach", "fused"))
    compiled = [entry for entry in steps if entry["optimizer"] == settings["compiled_with"]]
    pairs, larger = where(lambda cell: cell["size"] == 2, compiled), where(lambda cell: cell["size"] != 2, compiled)
    many = where(lambda cell: cell["parameters"] > 1)
    # Rows of 512 and more. Quick runs have only smaller ones, and show the targets all the same.
    least = 0 if settings["quick"] else 512
    wide = where(lambda cell: cell["size"] and cell["width"] >= least, results["tie_weights"])
    extra = {e["cell"]: e["contenders"]["tieopt"]["peak"] / MIB for e in wide if "tieopt" in e["contenders"]}
    states = {
        f"{entry['cell']}, {entry['optimizer']}": both["tieopt compact"]["state"] / both["index_select"]["state"]
        for entry in steps
        if (both := entry["contenders"]).keys() >= {"tieopt compact", "index_select"}
    }

    copies = "copies of the tied bytes, for rows of 512 and more"
    compact, alone = "tieopt compact", "the optimizer step alone at most"
    halving = "where the ties halve the entries"
    return [
        Target(f"`tie_weights()`: at most 3 {copies}", 3, medians(wide, "tieopt", "copy", key="seconds")),
        Target(
            f"`tie_weights()`, compiled: at most 1.6 {copies}",
            1.6,
            medians(wide, "tieopt compiled", "copy", key="seconds"),
        ),
        Target("`tie_weights()`: at most 16 MiB of extra memory", 16, extra, " MiB"),
        Target("tieopt: faster than the loop and `w[idx]`", 1, medians(steps, "tieopt", "loop", "w[idx]")),
        Target("compact: faster than all other ways to tie", 1, medians(steps, compact, *settings["peers"])),
        Target(
            f"compact: at most 1.0 times the untied foreach step, {halving}", 1, medians(foreach, compact, "untied")
        ),
        Target(f"compact: at most 1.2 times the untied fused step, {halving}", 1.2, medians(fused, compact, "untied")),
        Target("compact: the optimizer's state no larger than with `index_select`", 1, states),
        Target(
            f"compact, compiled: {alone} 1.0 times the untied fused one, for groups of 4 and more",
            1,
            medians(larger, "tieopt compact compiled", "untied fused", key="optimizer"),
        ),
        Target(
            f"compact, compiled: {alone} 1.3 times the untied fused one, for pairs",
            1.3,
            medians(pairs, "tieopt compact compiled", "untied fused", key="optimizer"),
        ),
        Target("tieopt: 200 parameters at most 1.5 times the untied step", 1.5, medians(many, "tieopt", "untied")),
        Target("compact: 200 parameters at most 1.5 times the untied step", 1.5, medians(many, compact, "untied")),
    ]


# --- The tables -----------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """Return a markdown table; numbers are aligned to the right."""
    marks = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def spread(quartiles: Quartiles | None) -> str:
    """Format a median with its quartiles."""
    return f"{quartiles.median:.2f} ({quartiles.low:.2f}-{quartiles.high:.2f})" if quartiles else ""


def time_table(entries: Sequence[Entry], base: str, key: str) -> str:
    """Return a table with a row for each cell: the base in milliseconds, the others as ratios to it."""
    names = [name for name in column_names(entries) if name != base]
    return table(
        ["cell", f"{base}, ms", *names],
        (
            [
                entry["cell"],
                f"{1000 * statistics.median(entry['contenders'][base][key]):.3g}",
                *(spread(compare(entry, name, base, key)) for name in names),
            ]
            for entry in entries
            if base in entry["contenders"]
        ),
    )


def memory_table(entries: Sequence[Entry], key: str) -> str:
    """Return a table in MiB, with a row for each cell."""
    names = column_names(entries)

    def shown(entry: Entry, name: str) -> str:
        contender = entry["contenders"].get(name)
        return f"{contender[key] / MIB:.3g}" if contender else ""

    return table(["cell", *names], ([entry["cell"], *(shown(entry, name) for name in names)] for entry in entries))


def column_names(entries: Iterable[Entry]) -> list[str]:
    """Return every contender that was measured anywhere."""
    return list(dict.fromkeys(name for entry in entries for name in entry["contenders"]))


def notes(entries: Sequence[Entry], rounds: int) -> str:
    """List the contenders that were left out and why, that ran fewer rounds, and that had graph breaks."""
    said: dict[str, list[str]] = {}
    for entry in entries:
        for name, why in entry["left_out"].items():
            said.setdefault(f"{name} is left out: {why}", []).append(entry["cell"])
        for name, contender in entry["contenders"].items():
            measured = len(contender.get("step", range(rounds)))
            if measured < rounds:
                said.setdefault(f"{name}: {measured} rounds", []).append(entry["cell"])
            if breaks := contender.get("graph_breaks"):
                said.setdefault(f"{name}: {breaks} graph breaks", []).append(entry["cell"])
    everywhere = len({entry["cell"] for entry in entries})
    return "\n".join(
        f"- {text} ({'all cells' if len(cells) == everywhere > 1 else ', '.join(cells)})"
        for text, cells in said.items()
    )


# --- The page -------------------------------------------------------------------------------------

HOW = """\
Written by `python docs/benchmarks/benchmark.py`.

- A step is a whole training step: a linear map of a batch of 64, the mean squared error, backward, the
  optimizer's step and `zero_grad`. A tall matrix is applied to an input as long as its columns, so that the cost of
  forward and backward is proportional to its number of entries, like all other costs.
- Contenders take turns: each of up to {rounds} rounds runs each of them once, in random order. Ratios are
  medians, with quartiles, of the ratios to the untied step *of the same round*. A contender that needs more than
  {budget:g} seconds for all its rounds runs fewer, but at least 3. One that needs more than {limit:g} seconds for a
  step is left out.
- *loop* gathers the rows of a group, averages them and writes them back, group by group: gradients before the
  step, weights after it. *torch.cat*, *w[idx]* and *index_select* build the weight in each forward pass, from a
  parameter with one slice for each group and each free slice. Their optimizer step alone therefore has none of the
  cost of their ties, while that of the loop and of tieopt has all of it.
- *deterministic* is the whole step under `torch.use_deterministic_algorithms(True)`, compared with an untied step
  without it. *compiled* is `torch.compile(optimizer.step)`, or `torch.compile(optimizer.tie_weights)`.
- Extra memory is the most that PyTorch's allocator had handed out at once, less what it had handed out before: on
  the processor from the events of `torch.profiler`, on CUDA from `torch.cuda.max_memory_allocated`. The state of
  the optimizer is all tensors in the `"state"` of its `state_dict()`.
- `tie_weights()` runs on weights that are not tied, with cold caches, and is compared with `copy_` between two
  buffers of as many bytes as all members. Memory that tieopt keeps between calls is counted there only."""

QUICK = "> **A quick run with tiny matrices and few rounds: the numbers mean nothing.**"


def page(results: dict[str, Any]) -> str:
    """Return the page in markdown."""
    settings, projections = results["settings"], results["tie_weights"]
    cells = (
        [name, cell["title"], f"{cell['kept']:.1%}", f"{cell['tied_bytes'] / MIB:.3g}"]
        for name, cell in results["cells"].items()
    )
    parts = [
        "# Benchmarks",
        QUICK if settings["quick"] else "",
        "The cost of a tied training step, compared with the untied step and with other ways to tie weights.",
        "![Time of a training step as a ratio to the untied one](results.png)",
        "## Targets",
        table(["target", "verdict", "worst"], (target.row for target in list_targets(results)), numbers=False),
        "## Machine",
        table(["", ""], ([key, str(value)] for key, value in results["machine"].items()), numbers=False),
        "## How it was measured",
        HOW.format(**settings),
        table(["cell", "parameters and ties", "distinct entries", "tied MiB"], cells),
    ]
    for optimizer in dict.fromkeys(entry["optimizer"] for entry in results["steps"]):
        entries = [entry for entry in results["steps"] if entry["optimizer"] == optimizer]
        parts += [
            f"## {optimizer}",
            "Whole training step, as a ratio to the untied one:",
            time_table(entries, "untied", "step"),
            "Optimizer step alone, as a ratio to the untied one:",
            time_table(entries, "untied", "optimizer"),
            "Extra memory during the training step, MiB:",
            memory_table(entries, "peak"),
            "State of the optimizer, MiB:",
            memory_table(entries, "state"),
            notes(entries, settings["rounds"]),
        ]
    parts += [
        "## `tie_weights()`",
        "As a ratio to a plain copy of the tied bytes:",
        time_table(projections, "copy", "seconds"),
        "Extra memory during the call, including what was kept since the ties were made, MiB:",
        memory_table(projections, "peak"),
        "Of that, kept between calls (labels, indices and workspace), MiB:",
        memory_table(projections, "kept"),
        notes(projections, settings["rounds"]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- The figure -----------------------------------------------------------------------------------

# Colour and marker. The markers of tieopt are filled, the others open.
STYLES = {
    "loop": ("#777777", "v"),
    "torch.cat": ("#CC79A7", "^"),
    "w[idx]": ("#E69F00", "s"),
    "index_select": ("#009E73", "D"),
    "tieopt": ("#0072B2", "o"),
    "tieopt compact": ("#D55E00", "o"),
}


def draw_ratios(axes: Axes, entries: Sequence[Entry], cells: Sequence[str]) -> None:
    """Draw the median and quartiles of each contender in each cell; contenders of a cell are below each other."""
    for number, (name, (color, marker)) in enumerate(STYLES.items()):
        offset = (number - (len(STYLES) - 1) / 2) * 0.12
        for entry in entries:
            if quartiles := compare(entry, name, "untied"):
                y = cells.index(entry["cell"]) + offset
                axes.hlines(y, quartiles.low, quartiles.high, color=color, linewidth=1.5)
                face = color if "tieopt" in name else "white"
                axes.plot(quartiles.median, y, marker, color=color, markerfacecolor=face, markersize=5.5)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    for y in range(1, len(cells)):
        axes.axhline(y - 0.5, color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(entries[0]["optimizer"], loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def figure(results: dict[str, Any]) -> Figure:
    """Draw a panel for each optimizer, with a line for each cell."""
    cells, optimizers = list(results["cells"]), list(dict.fromkeys(e["optimizer"] for e in results["steps"]))
    drawn = Figure(figsize=(3 + 2.6 * len(optimizers), 1.6 + 0.62 * len(cells)), layout="constrained")
    panels = drawn.subplots(1, len(optimizers), sharex=True, sharey=True, squeeze=False)[0]
    for axes, optimizer in zip(panels, optimizers, strict=True):
        draw_ratios(axes, [entry for entry in results["steps"] if entry["optimizer"] == optimizer], cells)
    panels[0].set_yticks(range(len(cells)), [label(results["cells"][name]) for name in cells])
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    drawn.supxlabel(
        "time of a training step as a ratio to the untied one: median and quartiles, log scale", fontsize=10
    )

    shown = [name for name in STYLES if any(name in entry["contenders"] for entry in results["steps"])]
    handles = []
    for name in shown:
        color, marker = STYLES[name]
        face = color if "tieopt" in name else "white"
        handles += panels[0].plot([], [], marker, color=color, markerfacecolor=face, markersize=6, label=name)
    drawn.legend(handles=handles, loc="outside upper center", ncols=len(shown), frameon=False)
    return drawn


def label(cell: dict[str, Any]) -> str:
    """Describe a cell in two short lines."""
    shape = f"{cell['rows']} x {cell['width']}"
    if cell["groups"]:
        return f"{shape}\nelements in {cell['groups']} groups"
    count = f"{cell['parameters']} of {shape}" if cell["parameters"] > 1 else shape
    return f"{count}\n{100 * cell['share']:g} % in groups of {cell['size']}"


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write the page and its figure."""
    (folder / "results.md").write_text(page(results), encoding="utf-8")
    figure(results).savefig(folder / "results.png", dpi=150)
