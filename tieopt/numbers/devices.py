"""What is done otherwise on accelerators than on the CPU; the one place that decides it."""

from __future__ import annotations

import torch


def is_accelerator(device: torch.device) -> bool:
    """Return whether a device works while Python goes on, which has to wait for it to read a number.

    It also adds in parallel, in an order that changes from run to run, and needs more work at once.
    """
    return device.type != "cpu"
