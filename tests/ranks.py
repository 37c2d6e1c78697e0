"""Processes that stay, each one rank of a process group, and do what the tests tell them.

To start one takes seconds, for torch is imported; so they are started once, when they are needed, and asked as often as
a property has examples.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Self

import pytest
import torch
import torch.distributed as dist

# What torch 2.6 cannot do on a CPU, by the error that says so.
LIMITS_OF_TORCH = {
    "'Stream' object has no attribute 'record_event'": "fully_shard of torch 2.6 does not run on CPUs",
    "RuntimeError: Invalid scalar type": "torch 2.6 gathers no 8-bit floats with gloo",
}


def refusal_of(error: type[Exception], call: Callable[..., Any], *args: Any) -> str:
    """Return what the error says by which a rank refuses a call; nothing if there is none."""
    try:
        call(*args)
    except error as refusal:
        return str(refusal)
    return ""


class Ranks:
    """Processes with a process group of gloo, one for each rank.

    Args:
        count: how many.
        timeout: how long a rank waits for the others.
    """

    def __init__(self, count: int, timeout: timedelta = timedelta(seconds=60)) -> None:
        self.count = count
        self._timeout = timeout
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        pipes = [context.Pipe() for _ in range(self.count)]
        self._pipes = [here for here, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, self.count, store, self._timeout, there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process, (_, there) in zip(self._processes, pipes, strict=True):
            process.start()
            # Only the process holds its end, so that one that has died is noticed.
            there.close()

    def _stop(self, patience: float) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(patience)
            process.kill()
            process.join()
        self._folder.cleanup()
        self._pipes, self._processes = [], []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function of some module returns on each rank.

        Raises:
            AssertionError: it raised something on a rank. Others may still wait for that one: all are started anew when
                they are asked again.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send((function, args))
        answers = [_answer(pipe) for pipe in self._pipes]
        failures = [f"rank {rank}: {answer}" for rank, (done, answer) in enumerate(answers) if not done]
        if failures:
            self._stop(patience=0)
            for limit, reason in LIMITS_OF_TORCH.items():
                if torch.__version__ < (2, 7) and any(limit in failure for failure in failures):
                    pytest.skip(reason)
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes:
            self._stop(self._timeout.total_seconds())


def _answer(pipe: Any) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return False, "the process has died"


def _serve(rank: int, count: int, store: str, timeout: timedelta, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            answer = True, function(*args)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)
    dist.destroy_process_group()
