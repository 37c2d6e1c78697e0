"""The package from outside: its names, its version, its metadata."""

import configparser
import inspect
import re
import subprocess
import sys
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path

import pytest
from torch.optim import Optimizer

import tieopt
from tieopt import patterns, plot, testing

ROOT = Path(__file__).parents[1]
PUBLIC = [
    *(getattr(tieopt, name) for name in tieopt.__all__),
    *(
        thing
        for module in (patterns, plot, testing)
        for name, thing in vars(module).items()
        if inspect.isfunction(thing) and thing.__module__ == module.__name__ and not name.startswith("_")
    ),
]
METHODS = [
    member
    for name, member in inspect.getmembers(tieopt.TiedOptimizer)
    if not name.startswith("_") and getattr(Optimizer, name, None) is not member
]


def test_star_import_brings_what_is_public() -> None:
    names: dict[str, object] = {}
    exec("from tieopt import *", names)  # noqa: S102
    names.pop("__builtins__")
    assert sorted(names) == sorted(tieopt.__all__)


def test_public_names_say_where_they_are_from() -> None:
    assert all(thing.__module__.startswith("tieopt.") for thing in PUBLIC)


@pytest.mark.parametrize("thing", [*PUBLIC, *METHODS], ids=lambda thing: getattr(thing, "__name__", "property"))
def test_public_things_are_documented(thing: object) -> None:
    assert inspect.getdoc(thing)


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_public_names_have_an_example_that_runs(thing: object) -> None:
    assert ">>> " in (inspect.getdoc(thing) or "")


def test_every_public_name_stands_in_the_pages() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    methods = [name for name in vars(tieopt.TiedOptimizer) if not name.startswith("_")]
    missing = [
        name for name in [*(thing.__name__ for thing in PUBLIC), *methods] if not re.search(rf"\b{name}\b", pages)
    ]
    assert not missing


def test_type_hints_are_shipped() -> None:
    assert (files("tieopt") / "py.typed").is_file()


def test_there_is_one_version() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    latest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert latest is not None
    assert tieopt.__version__ == version("tieopt") == metadata["metadata"]["version"] == latest[1]


def test_the_library_requires_torch_alone_and_pins_nothing() -> None:
    required = requires("tieopt") or []
    assert [name for name in required if "extra ==" not in name] == ["torch>=2.6"]
    assert not [name for name in required if re.match(r"[\w.-]+\s*(==|~=|<)", name)]


def test_numpy_is_not_needed() -> None:
    program = """
        import sys, warnings
        sys.modules["numpy"] = None  # an import of it fails
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        import torch, tieopt
        layer = torch.nn.Linear(2, 3)
        optimizer = tieopt.TiedOptimizer(torch.optim.Adam(layer.parameters()), {layer.weight: [[0, 2]]})
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        print(optimizer.tie_summary(), optimizer.ties)
        assert tieopt.is_tied(layer.weight, [[0, 2]])
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(program)], check=True)  # noqa: S603


def test_continuous_integration_pins_what_it_requires() -> None:
    files = [
        ROOT / "tests" / name for name in ("constraints.txt", "hosts-constraints.txt", "frameworks-constraints.txt")
    ]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in requires("tieopt") or []}
    assert names <= {name.lower() for name in pins}
