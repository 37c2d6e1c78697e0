"""Measure the cost of a tied training step, compared with the untied step and with other ways to tie weights.

``python docs/benchmarks/benchmark.py`` measures everything and writes, next to itself, the numbers
(``results.json``), a page (``results.md``) and a figure (``results.png``). ``--quick`` tries everything with
tiny matrices, whose numbers mean nothing; ``--render results.json`` makes the page and the figure again
without measuring.

A step is a whole training step: a linear map of a batch of 64, the mean squared error, backward, the
optimizer's step and ``zero_grad``. A matrix ``[rows, width]`` is applied to an input ``[64, width]`` or, if it
is tall, transposed to an input ``[64, rows]``. The output is then never longer than the shorter side, and the
cost of forward and backward is proportional to the number of entries, like all other costs. Otherwise, 200000
rows of 16 would have an output four times as large as the weights.

Machines are noisy, so contenders take turns: each round runs each contender once, in random order, and the
result is the median over the rounds of the ratio to the untied step of the same round.

It needs matplotlib and tqdm, a C++ compiler for the compiled steps, and at most 8 GiB of memory.
"""

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

# Deterministic matrix products need this on CUDA, which reads it when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from contenders import (
    CELLS,
    COMPILED,
    ONLY_COMPILED,
    OPTIMIZERS,
    OURS,
    PEERS,
    PROJECTIONS,
    Cell,
    Contender,
    LeftOutError,
    Problem,
    build_problem,
    tie,
    untied,
)
from report import write_report
from torch import Tensor, nn
from tqdm import tqdm

import tieopt
from tieopt import TiedOptimizer, is_tied

WARM_UP = 3
FEWEST_ROUNDS = 3
# A buffer of this size is larger than any cache, so writing to it flushes them.
FLUSHED_BYTES = 2**28


# --- Measuring ------------------------------------------------------------------------------------


class Clock:
    """Marks in time, by the processor's clock or as events in the stream of the accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Set a mark now."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Return the seconds between the marks, and clear the marks."""
        synchronize(self.device)
        pairs, self.marks = list(pairwise(self.marks)), []
        if self.device.type == "cuda":
            return [first.elapsed_time(second) / 1000 for first, second in pairs]
        return [second - first for first, second in pairs]


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator, outside of the timed region."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_step(contender: Contender, problem: Problem, clock: Clock) -> tuple[float, float]:
    """Run one training step, and return its seconds and those of the optimizer's step."""
    torch.use_deterministic_algorithms(contender.deterministic)
    tall = problem.cell.rows > problem.cell.width
    try:
        synchronize(clock.device)
        clock.mark()
        outputs = [problem.inputs @ (weight if tall else weight.T) for weight in contender.weights()]
        nn.functional.mse_loss(torch.cat(outputs), problem.target).backward()
        del outputs
        clock.mark()
        contender.step()
        clock.mark()
        contender.optimizer.zero_grad()
        clock.mark()
    finally:
        torch.use_deterministic_algorithms(False)
    laps = clock.laps()
    return sum(laps), laps[1]


@contextmanager
def silence() -> Iterator[None]:
    """Redirect stderr to nowhere, because the profiler logs its start and stop at any log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Memory(NamedTuple):
    """The most bytes that were allocated at once, and those at the end, less those before."""

    peak: int
    kept: int


def measure_memory(run: Callable[[], Any], device: torch.device) -> Memory:
    """Measure the memory that a call takes.

    On the processor, the profiler reports what PyTorch's allocator hands out and takes back, including inside an
    operation. Memory that a library allocates for itself is not counted, on either device.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        peak, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return Memory(peak - before, kept - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silence(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    recorded = profiler.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    # The million events of the Python loop take gigabytes, and are in reference cycles.
    del profiler, recorded
    gc.collect()
    return Memory(peak, held)


def count_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a nested state."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(count_bytes, state.values()))
    return sum(map(count_bytes, state)) if isinstance(state, (list, tuple)) else 0


def reason(error: Exception) -> str:
    """Return the first line of an error's message, for a note under a table."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return first if isinstance(error, LeftOutError) else f"{type(error).__name__}: {first[:150]}"


def rounded(seconds: float) -> float:
    """Round to four digits, more than are significant."""
    return float(f"{seconds:.4g}")


def interleave(plan: dict[str, int], generator: torch.Generator) -> Iterable[str]:
    """Yield who runs when: in each round, all contenders that have rounds left, in random order."""
    for turn in range(max(plan.values())):
        names = [name for name, rounds in plan.items() if turn < rounds]
        yield from (names[i] for i in torch.randperm(len(names), generator=generator).tolist())


def measure_steps(cell: Cell, optimizer: str, args: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    """Measure all contenders with one optimizer: the seconds of each round, peak memory and state."""
    problem, clock = build_problem(cell, args.device), Clock(args.device)
    builders = {"untied": untied, **PEERS, **OURS, **(ONLY_COMPILED if args.compile and optimizer == COMPILED else {})}
    contenders: dict[str, Contender] = {}
    plan: dict[str, int] = {}
    measured: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name, build in builders.items():
        note(f"{cell.name}, {optimizer}: {name}")
        torch._dynamo.utils.counters.clear()
        try:
            if name != "untied" and "untied" not in contenders:
                raise LeftOutError("nothing to compare it with")
            contender = build(problem, OPTIMIZERS[optimizer])
            seconds = 0.0
            for _ in range(WARM_UP):
                seconds = train_step(contender, problem, clock)[0]
                if seconds > args.limit and "compiled" not in name:
                    raise LeftOutError(f"a step takes {seconds:.0f} s, more than the {args.limit:g} s of --limit")
                if seconds > 1 and "compiled" not in name:
                    break
            memory = measure_memory(partial(train_step, contender, problem, clock), args.device)
        except Exception as error:
            left_out[name] = reason(error)
            continue
        contenders[name] = contender
        plan[name] = min(max(int(args.budget / seconds), FEWEST_ROUNDS), args.rounds)
        measured[name] = {"step": [], "optimizer": [], "peak": memory.peak}
        measured[name]["state"] = count_bytes(contender.optimizer.state_dict()["state"])
        if "compiled" in name:
            measured[name]["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())

    if contenders:
        plan["untied"] = max(plan.values())
        gc.collect()
        gc.disable()
        for name in interleave(plan, torch.Generator().manual_seed(0)):
            note(f"{cell.name}, {optimizer}: rounds")
            seconds, alone = train_step(contenders[name], problem, clock)
            measured[name]["step"].append(rounded(seconds))
            measured[name]["optimizer"].append(rounded(alone))
        gc.enable()
    for name in contenders:
        if not name.startswith("untied") and not all(map(is_tied, contenders[name].weights(), problem.labels)):
            del measured[name]
            left_out[name] = "its weights are not tied after the last step"
    return {"cell": cell.name, "optimizer": optimizer, "contenders": measured, "left_out": left_out}


def tie_weights_of(
    params: Sequence[Tensor], problem: Problem, compact: bool, keep: Callable[[TiedOptimizer], None]
) -> None:
    """Call ``tie_weights()`` for the first time, and pass the optimizer to ``keep`` with everything that it caches."""
    optimizer = tie(torch.optim.SGD(params), params, problem, compact)
    optimizer.tie_weights()
    keep(optimizer)


def measure_projections(cell: Cell, args: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    """Measure ``tie_weights()`` on untied weights with cold caches, and a copy of the same number of bytes."""
    problem, clock = build_problem(cell, args.device), Clock(args.device)
    kept_random = [torch.randn_like(weight) for weight in problem.weights()]
    buffer = torch.ones(FLUSHED_BYTES // 4, device=args.device)
    source, target = torch.ones(2, problem.tied_bytes // 4, device=args.device)

    def prepared(params: Sequence[Tensor], run: Callable[[], Any]) -> float:
        with torch.no_grad():
            for param, random in zip(params, kept_random[: len(params)], strict=True):
                param.copy_(random)
        buffer.add_(1)
        synchronize(args.device)
        clock.mark()
        run()
        clock.mark()
        return clock.laps()[0]

    runs: dict[str, Callable[[], float]] = {"copy": partial(prepared, (), lambda: target.copy_(source))}
    measured: dict[str, dict[str, Any]] = {"copy": {"seconds": [], "peak": 0, "kept": 0}}
    left_out: dict[str, str] = {}
    for name in PROJECTIONS:
        note(f"{cell.name}, tie_weights: {name}")
        try:
            if "compiled" in name and not args.compile:
                raise LeftOutError("--no-compile")
            params = problem.weights()
            optimizers: list[TiedOptimizer] = []
            make = partial(tie_weights_of, params, problem, "compact" in name, optimizers.append)
            kept = measure_memory(make, args.device).kept
            project = optimizers[0].tie_weights
            run = partial(prepared, params, torch.compile(project) if "compiled" in name else project)
            for _ in range(WARM_UP):
                run()
            peak = kept + measure_memory(run, args.device).peak
            if not all(map(is_tied, params, problem.labels)):
                raise LeftOutError("the weights are not tied after it")
        except Exception as error:
            left_out[name] = reason(error)
            continue
        measured[name] = {"seconds": [], "peak": peak, "kept": kept}
        runs[name] = run
    for name in interleave(dict.fromkeys(runs, args.rounds), torch.Generator().manual_seed(0)):
        measured[name]["seconds"].append(rounded(runs[name]()))
    return {"cell": cell.name, "contenders": measured, "left_out": left_out}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions that the numbers were measured with."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tieopt": tieopt.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def measure(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Measure everything that was asked for, and write the file after each part."""
    cells = [cell.quick() if args.quick else cell for cell in CELLS if cell.name in args.cells]
    results: dict[str, Any] = {
        "machine": describe_machine(args.device),
        "settings": {
            "quick": args.quick,
            "rounds": args.rounds,
            "budget": args.budget,
            "limit": args.limit,
            "peers": list(PEERS),
            "compiled_with": COMPILED,
        },
        "cells": {},
        "steps": [],
        "tie_weights": [],
    }
    with tqdm(total=len(cells) * (1 + len(args.optimizers)), unit="part", disable=None) as progress:
        for cell in cells:
            problem = build_problem(cell, torch.device("cpu"))
            about = {"title": cell.title, "kept": problem.kept, "tied_bytes": problem.tied_bytes}
            results["cells"][cell.name] = asdict(cell) | about
            del problem
            for optimizer in (None, *args.optimizers):
                # The next part does not use the compiled code of the last one.
                torch._dynamo.reset()
                if optimizer is None:
                    results["tie_weights"].append(measure_projections(cell, args, progress.set_description))
                else:
                    results["steps"].append(measure_steps(cell, optimizer, args, progress.set_description))
                text = json.dumps(results, indent=1, default=str)
                numbers_on_one_line = re.sub(r"\[[^][{}\"]*\]", lambda match: " ".join(match[0].split()), text)
                path.write_text(numbers_on_one_line + "\n", encoding="utf-8")
                progress.update()
    return results


# --- The command ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Parse what to measure, and for how long."""
    parser = argparse.ArgumentParser(description="Compare tied training steps with untied ones.")
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", choices=names, default=names, metavar="CELL", help=f"some of {names}")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=OPTIMIZERS,
        default=list(OPTIMIZERS),
        metavar="OPTIMIZER",
        help=f"some of {list(OPTIMIZERS)}",
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each contender runs (default: 15)")
    parser.add_argument("--budget", type=float, default=10, help="seconds for each, at least 3 rounds (default: 10)")
    parser.add_argument("--limit", type=float, default=20, help="skip contenders with longer steps (default: 20 s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (the default) or cuda")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="measure compiled steps as well"
    )
    parser.add_argument("--quick", action="store_true", help="tiny matrices, few rounds: the numbers mean nothing")
    parser.add_argument("--render", type=Path, metavar="JSON", help="make the page from this file, without measuring")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="the folder to write to (default: that of this script)",
    )
    args = parser.parse_args()
    if args.quick:
        args.rounds = min(args.rounds, 5)
    if args.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}, for quartiles")
    return args


def main() -> None:
    """Measure, or read earlier measurements, and write the page."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.render:
        results = json.loads(args.render.read_text(encoding="utf-8"))
    else:
        if args.threads:
            torch.set_num_threads(args.threads)
        results = measure(args, args.output / "results.json")
    write_report(results, args.output)
    print(f"Page and figure written to {args.output}")


if __name__ == "__main__":
    main()
