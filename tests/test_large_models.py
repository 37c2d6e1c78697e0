"""The program of docs/how-to/large-models.md: one process, shards and stages print the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "docs" / "how-to" / "gpt.py"

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 7) or not dist.is_gloo_available(),
    reason="fully_shard of torch 2.6 does not run on CPUs, and there is gloo alone",
)


def losses(*arguments: str) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    assert not done.returncode, done.stderr
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.slow
def test_one_process_shards_and_stages_print_the_same_losses() -> None:
    expected = losses(str(PROGRAM))
    assert len(expected) == 10
    assert float(expected[-1].split()[1]) < 2
    for where in ("shards", "stages"):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        assert losses(*launch, str(PROGRAM), where) == expected
