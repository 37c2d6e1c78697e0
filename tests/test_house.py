"""The rules of the house, as docs/contributing.md draws it: who imports whom, and what a warm step does."""

from __future__ import annotations

import ast
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from checks import randn
from torch.nn import Parameter
from torch.optim import AdamW

import tieopt
from tieopt import TiedOptimizer

PACKAGE = Path(tieopt.__file__).parent
# From the ground up; a name with a dot is a room, another one a wing.
FLOORS = [
    {"errors"},
    {"tensors"},
    {"ties"},
    {"numbers"},
    {"engine"},
    {"modes"},
    {"functional", "optimizer"},
    {"layers", "patterns", "shared"},
    {"export", "plot", "testing"},
    {"__init__"},
]
ROOMS = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): ast.parse(path.read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py")
}


def floor(room: str) -> int:
    return next(number for number, wings in enumerate(FLOORS) if room.partition(".")[0] in wings)


def imports(room: str) -> Iterator[tuple[str, str]]:
    """The rooms that a room imports from at run time, and the names."""
    skipped = [
        node
        for branch in ast.walk(ROOMS[room])
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    ]
    for node in ast.walk(ROOMS[room]):
        if isinstance(node, ast.ImportFrom) and node not in skipped and (node.module or "").startswith("tieopt"):
            source = (node.module or "").removeprefix("tieopt").removeprefix(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix(".")
                known = next(
                    name for name in (inner, f"{inner}.__init__", source, f"{source}.__init__") if name in ROOMS
                )
                yield known, alias.name


def names(room: str) -> set[str]:
    """All names that the code of a room mentions."""
    nodes = list(ast.walk(ROOMS[room]))
    imported = {alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return imported | attributes | {node.id for node in nodes if isinstance(node, ast.Name)}


every_room = pytest.mark.parametrize("room", sorted(ROOMS))


@every_room
def test_a_room_imports_from_below_and_in_its_own_wing_alone(room: str) -> None:
    for other, _ in imports(room):
        same_wing = "." in room and room.partition(".")[0] == other.partition(".")[0]
        assert floor(other) < floor(room) or same_wing, f"{room} imports {other}"


@every_room
def test_a_room_knows_the_public_names_of_others_alone(room: str) -> None:
    assert not [f"{other}: {name}" for other, name in imports(room) if name.startswith("_")]


def test_no_rooms_import_each_other_in_a_circle() -> None:
    left = {room: {other for other, _ in imports(room)} for room in ROOMS}
    while left:
        ready = {room for room, others in left.items() if not others & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        left = {room: others for room, others in left.items() if room not in ready}


@every_room
def test_what_kind_of_tensor_it_is_is_asked_behind_the_door_alone(room: str) -> None:
    asked = {"is_sharded", "is_compiling", "DTensor", "device_mesh"} & names(room)
    assert not asked or room == "tensors" or room.startswith("engine."), f"{room} asks {asked}"


@every_room
def test_ties_and_numbers_know_no_optimizer(room: str) -> None:
    if room.startswith(("ties.", "numbers.")):
        assert not {"Optimizer", "optim", "state_dict"} & names(room)


def test_the_optimizer_does_not_ask_for_its_mode() -> None:
    branches = [node.test for node in ast.walk(ROOMS["optimizer"]) if isinstance(node, (ast.If, ast.IfExp, ast.While))]
    assert not [ast.unparse(test) for test in branches if "compact" in ast.unparse(test)]


# --- a warm step ---


def python_calls(run: Callable[[], Any]) -> int:
    """How many functions of Python are called."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    # Hypothesis has the garbage collector call it.
    gc.disable()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def warm_step(parameters: int, tie: Callable[[AdamW, list[Parameter]], Any]) -> int:
    params = [Parameter(randn(8, 16, seed=seed)) for seed in range(parameters)]
    optimizer = tie(AdamW(params), params)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    return python_calls(optimizer.step)


@pytest.mark.parametrize(("parameters", "bound"), [(1, 3.5), (200, 2)])
def test_a_warm_step_makes_few_calls(parameters: int, bound: float, compact: bool) -> None:
    """Each call is a fraction of a microsecond that small models wait for."""

    def tie(optimizer: AdamW, params: list[Parameter]) -> TiedOptimizer:
        return TiedOptimizer(optimizer, {param: [[0, 2], [1, 3, 4]] for param in params}, compact=compact)

    assert warm_step(parameters, tie) <= bound * warm_step(parameters, lambda optimizer, params: optimizer)
