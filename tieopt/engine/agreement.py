"""Ranks that are tied to each other agree on what they do.

What a rank alone sees may not decide whether it communicates: its message would be taken for another one. So before the
ranks exchange anything they tell each other what they are about to do, and refuse, all of them, if that differs.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tieopt.errors import refusal
from tieopt.ties.across import Across

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Answers of up to so many bytes take one collective. Those of a step have some 300.
_SHORT = 1024


class DisagreementError(RuntimeError):
    """The ranks of a process group do not do the same; all of them know."""


def agree(across: Across, action: str, settings: Mapping[str, Any] | None = None, payload: Any = None) -> list[Any]:
    """Return what the ranks tell each other, by their places in the process group, if they all do the same.

    Args:
        across: the ranks.
        action: what this rank is about to do.
        settings: by their names, what has to be alike on all ranks that have members and this setting.
        payload: what this rank tells the others.

    Raises:
        DisagreementError: a rank does something else, has other settings, or has failed.
    """
    ours = settings if settings is not None and len(across.labels) else {}
    answers = _gathered(across.process_group, (f"{action} (tie {across.number} across them)", ours, payload))
    actions = [action for action, *_ in answers]
    if len(set(actions)) > 1:
        raise _disagreement(across.process_group, "do different things", actions)
    known: dict[str, list[str]] = {}
    for _, theirs, _ in answers:
        for name, value in theirs.items():
            known.setdefault(name, []).append(repr(value))
    differing = {name for name, values in known.items() if len(set(values)) > 1}
    if differing:
        texts = [
            ", ".join(f"{name}={theirs[name]!r}" for name in sorted(differing & theirs.keys()))
            for _, theirs, _ in answers
        ]
        raise _disagreement(across.process_group, "have different ties or settings", texts)
    return [payload for *_, payload in answers]


@contextmanager
def failing_together(process_groups: Iterable[ProcessGroup]) -> Iterator[None]:
    """Let no rank of the process groups wait for this one when it fails by an error, and goes no further."""
    try:
        yield
    except Exception as error:
        tell_of_failure(process_groups, error)
        raise


def tell_of_failure(process_groups: Iterable[ProcessGroup], error: Exception) -> None:
    """Tell the ranks of the process groups, but those that know already, that this one has failed."""
    first_line = (str(error).splitlines() or [""])[0]
    for group in dict.fromkeys(process_groups):
        if group not in _told(error):
            _told(error).append(group)
            _gathered(group, (f"nothing, after {type(error).__name__}: {first_line}", {}, None))


def _told(error: Exception) -> list[ProcessGroup]:
    """The process groups whose ranks know of an error."""
    told: list[ProcessGroup] = vars(error).setdefault("_tieopt_told", [])
    return told


def _gathered(process_group: ProcessGroup, answer: tuple[str, Mapping[str, Any], Any]) -> list[Any]:
    try:
        return _all_gathered(process_group, answer)
    except Exception as error:
        # A rank is dead, or does not answer.
        _told(error).append(process_group)
        raise


def _all_gathered(process_group: ProcessGroup, answer: object) -> list[Any]:
    """Return the answers of all ranks, as ``all_gather_object`` does in two collectives; in one if all are short."""
    message = pickle.dumps(answer)
    # A zero, with which no pickle begins, stands for a message that is too long.
    padded = bytearray((message if len(message) <= _SHORT else b"").ljust(_SHORT, b"\0"))
    # The device that all_gather_object chooses.
    device = dist.distributed_c10d._get_object_coll_device(process_group)
    sent = torch.frombuffer(padded, dtype=torch.uint8).to(device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(received, sent, group=process_group)
    messages = [bytes(part.tolist()) for part in received]
    if all(message[0] for message in messages):
        # What follows a pickle is not read.
        return list(map(pickle.loads, messages))
    answers: list[Any] = [None] * len(received)
    dist.all_gather_object(answers, answer, group=process_group)
    return answers


def _disagreement(process_group: ProcessGroup, what: str, texts: list[str]) -> DisagreementError:
    firsts = {text: texts.index(text) for text in texts if text}
    got = [f"rank {dist.get_global_rank(process_group, rank)}: {text}" for text, rank in firsts.items()]
    error = refusal(
        DisagreementError,
        f"Ranks that are tied to each other {what}.",
        expected="the same calls in the same order, with ties and settings that are alike, on every rank",
        got="\n            ".join(got),
    )
    _told(error).append(process_group)
    return error
