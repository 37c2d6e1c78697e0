"""Ranks that have members of the same groups in parameters of their own, as the stages of a pipeline have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Across:
    """The ranks that tie slices of different parameters to each other.

    Args:
        process_group: of the ranks.
        number: of the tie among those of the process group.
        is_whole: whether whole parameters are equal, which then have one shape on all ranks.
        labels: by which all ranks know the groups, for each group of this rank; int64 on the CPU.
    """

    def __init__(self, process_group: ProcessGroup, number: int, is_whole: bool, labels: Tensor) -> None:
        self.process_group = process_group
        self.number = number
        self.is_whole = is_whole
        self.labels = labels

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Process groups cannot be copied.
        return self
