"""Measure what a training step costs with ties, without them, and with what one would write instead.

``python docs/benchmarks/benchmark.py`` takes ten minutes or so and writes, next to itself, the numbers
(``results.json``), a page (``results.md``) and a figure (``results.png``). ``--quick`` takes less than two minutes: it
leaves out large matrices and compiled steps, and its numbers are rough. ``--render results.json`` makes the page and
the figure again without measuring.

A step is a whole training step: forward, the mean of the squared outputs as loss, backward, the optimizer's step and
``zero_grad``. Machines are noisy, so contenders take turns: each round runs each of them once, in random order, and the
result is the median over the rounds of the ratio to the untied step of the same round.

It needs matplotlib, tqdm and scikit-learn, a C++ compiler for the compiled steps, and 8 GiB of memory.
"""

import argparse
import gc
import json
import os
import platform
import re
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jobs import JOBS, Job
from report import COMPACT, COPY, FULL, TIE_WEIGHTS, UNTIED, UNTIED_FUSED, Rounds, write_report
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

import tieopt
from tieopt import Tie, TiedOptimizer

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-4, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-4, fused=True),
    "SGD": partial(torch.optim.SGD, lr=1e-4, momentum=0.9, foreach=True),
}
COMPILED = "AdamW foreach"
WARM_UP = 3
FEWEST_ROUNDS, MOST_ROUNDS = 5, 21
# A buffer of this size is larger than any cache, so writing to it flushes them.
FLUSHED_BYTES = 2**28

Run = Callable[[], tuple[float, ...]]
"""Runs a contender once, and returns its seconds, for training steps also those of the optimizer alone."""


# --- Contenders -----------------------------------------------------------------------------------


def timed(*parts: Callable[[], Any]) -> tuple[float, ...]:
    """Call functions one after the other, and return the seconds of each."""
    marks = []
    for part in (lambda: None, *parts):
        part()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return tuple(end - start for start, end in pairwise(marks))


def training(model: nn.Module, inputs: torch.Tensor, optimizer: Optimizer, step: Callable[[], Any]) -> Run:
    """Return a function that runs a training step."""

    def run() -> tuple[float, ...]:
        seconds = timed(lambda: model(inputs).square().mean().backward(), step, optimizer.zero_grad)
        return sum(seconds), seconds[1]

    return run


class Bench:
    """The contenders of a job, which all start from the same tied weights."""

    def __init__(self, job: Job, device: torch.device) -> None:
        torch.manual_seed(0)
        self.job = job
        self.start = job.model().to(device)
        self.inputs = job.inputs().to(device)
        self.ties = TiedOptimizer(torch.optim.SGD(self.start.parameters()), job.ties(self.start), start="first").ties
        with torch.no_grad():
            self.loss = float(self.start(self.inputs).square().mean())

    @property
    def tied_bytes(self) -> int:
        """The bytes of all members."""
        return sum(
            int(members(part) * part.param.nbytes / part.groups.numel()) for tie in self.ties for part in tie.parts
        )

    @property
    def distinct(self) -> float:
        """The share of the entries that differ from each other."""
        entries = sum(parameter.numel() for parameter in self.start.parameters())
        return 1 - sum(map(repeated, self.ties)) / entries

    def untied(self, make: Callable[..., Optimizer], *, compiled: bool = False) -> Run:
        """Train without ties, the baseline of all ratios."""
        return self.contender(deepcopy(self.start), make, compiled)

    def instead(self, make: Callable[..., Optimizer], rewrite: Callable[[Any], None]) -> Run:
        """Train a model that is rewritten for its ties."""
        model = deepcopy(self.start)
        rewrite(model)
        return self.contender(model, make)

    def tied(self, make: Callable[..., Optimizer], *, compact: bool = False, compiled: bool = False) -> Run:
        """Train with tieopt."""
        model = deepcopy(self.start)
        tie = partial(TiedOptimizer, ties=self.job.ties(model), compact=compact)
        return self.contender(model, lambda parameters: tie(make(parameters)), compiled)

    def contender(self, model: nn.Module, make: Callable[..., Optimizer], compiled: bool = False) -> Run:
        """Train a model, which must do the same as the others."""
        with torch.no_grad():
            loss = float(model(self.inputs).square().mean())
        if abs(loss - self.loss) > 1e-3 * self.loss:
            raise RuntimeError(
                f"{self.job.title}: the loss of a contender is {loss}, that of the tied model {self.loss}"
            )
        optimizer = make(model.parameters())
        return training(model, self.inputs, optimizer, torch.compile(optimizer.step) if compiled else optimizer.step)

    def steps(self, optimizer: str) -> dict[str, Run]:
        """Return all ways to train with one optimizer."""
        make = OPTIMIZERS[optimizer]
        return {
            UNTIED: self.untied(make),
            **{way: self.instead(make, rewrite) for way, rewrite in self.job.instead.items()},
            FULL: self.tied(make),
            COMPACT: self.tied(make, compact=True),
        }

    def compiled_steps(self) -> dict[str, Run]:
        """Return compiled steps, and the fused one to compare them with."""
        make = OPTIMIZERS[COMPILED]
        return {
            UNTIED_FUSED: self.untied(OPTIMIZERS["AdamW fused"]),
            UNTIED: self.untied(make, compiled=True),
            COMPACT: self.tied(make, compact=True, compiled=True),
        }

    def tyings(self) -> dict[str, Run]:
        """Return ``tie_weights()`` for untied weights in a cold cache, and a copy of as many bytes."""
        model = deepcopy(self.start)
        optimizer = TiedOptimizer(torch.optim.SGD(model.parameters()), self.job.ties(model))
        weights = [parameter.detach() for parameter in model.parameters()]
        noise = [torch.randn_like(weight) for weight in weights]
        source, target = torch.ones(2, self.tied_bytes // 4, device=self.inputs.device)
        flushed = torch.ones(FLUSHED_BYTES // 4, device=self.inputs.device)

        def prepared(run: Callable[[], Any]) -> tuple[float, ...]:
            torch._foreach_copy_(weights, noise)
            flushed.add_(1)
            return timed(run)

        return {
            COPY: partial(prepared, partial(target.copy_, source)),
            TIE_WEIGHTS: partial(prepared, optimizer.tie_weights),
        }


def members(part: Any) -> int:
    """Return how many slices of a parameter are tied."""
    return int((part.groups >= 0).sum())


def repeated(tie: Tie) -> int:
    """Return how many entries are equal to an earlier entry of their group."""
    labels = torch.cat([part.groups.flatten() for part in tie.parts])
    slice_size = tie.parts[0].param.numel() // tie.parts[0].groups.numel()
    return (sum(map(members, tie.parts)) - len(labels[labels >= 0].unique())) * slice_size


# --- Measuring ------------------------------------------------------------------------------------


def take_turns(contenders: dict[str, Run], budget: float) -> list[Rounds]:
    """Run all contenders in rounds, and return their seconds in each round, then those of the optimizer alone."""
    for _ in range(WARM_UP):
        start = time.perf_counter()
        for run in contenders.values():
            run()
        seconds = time.perf_counter() - start
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in contenders}
    names, generator = list(contenders), torch.Generator().manual_seed(0)
    gc.collect()
    gc.disable()
    for _ in range(min(max(int(budget / seconds), FEWEST_ROUNDS), MOST_ROUNDS)):
        for i in torch.randperm(len(names), generator=generator).tolist():
            measured[names[i]].append(contenders[names[i]]())
    gc.enable()
    kinds = len(measured[names[0]][0])
    return [{name: [float(f"{r[i]:.4g}") for r in rounds] for name, rounds in measured.items()} for i in range(kinds)]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions that the numbers were measured with."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    processor = models[0] if models else platform.processor() or platform.machine()
    unreleased = (
        (Path(__file__).parents[2] / "CHANGELOG.md").read_text().partition("## [Unreleased]")[2].partition("\n## ")
    )
    return {
        "tieopt": tieopt.__version__ + " with unreleased changes" * bool(unreleased[0].strip()),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def measure_job(job: Job, args: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    """Measure the steps of one job, and its ``tie_weights()``."""
    note(job.title)
    bench = Bench(job, args.device)
    budget = 0.3 if args.quick else 2.5
    measured: dict[str, Any] = {
        "title": job.title,
        "kind": job.kind,
        "in_front": job.in_front,
        "distinct": bench.distinct,
        "tied_bytes": bench.tied_bytes,
        "tie_weights": take_turns(bench.tyings(), budget)[0],
        "steps": {},
    }
    for optimizer in args.optimizers:
        note(f"{job.title}: {optimizer}")
        measured["steps"][optimizer] = take_turns(bench.steps(optimizer), budget)[0]
    if job.compiled and not args.quick:
        note(f"{job.title}: compiled")
        torch._dynamo.reset()
        whole, alone = take_turns(bench.compiled_steps(), budget)
        measured["compiled"] = {"whole step": whole, "optimizer step": alone}
    return measured


def measure(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Measure all jobs that were asked for, and write the file after each."""
    results: dict[str, Any] = {"quick": args.quick, "machine": describe_machine(args.device), "jobs": []}
    jobs = [job for job in JOBS if args.jobs in job.title and not (args.quick and (job.large or not job.in_front))]
    with tqdm(jobs, unit="job", disable=None) as progress:
        for job in progress:
            results["jobs"].append(measure_job(job, args, progress.set_description))
            text = json.dumps(results, indent=1)
            rounds_on_one_line = re.sub(r"\[[^][{}\"]*\]", lambda match: "".join(match[0].split()), text)
            path.write_text(rounds_on_one_line + "\n", encoding="utf-8")
    return results


# --- The command ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Parse what to measure."""
    here = Path(__file__).resolve().parent
    names = list(OPTIMIZERS)
    parser = argparse.ArgumentParser(description="Measure what a training step costs with ties.")
    parser.add_argument("--quick", action="store_true", help="small jobs and few rounds: the numbers are rough")
    parser.add_argument("--jobs", default="", metavar="TEXT", help="only jobs with this text in their titles")
    parser.add_argument(
        "--optimizers", nargs="+", choices=names, default=names, metavar="NAME", help=f"some of {names}"
    )
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (the default) or cuda")
    parser.add_argument("--output", type=Path, default=here, help="folder to write to (default: that of this script)")
    parser.add_argument("--render", type=Path, metavar="JSON", help="make the page of this file, without measuring")
    return parser.parse_args()


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
