"""The package from outside: its names, its version, its metadata."""

import ast
import builtins
import configparser
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tieopt
from tieopt import export, patterns, plot, testing

ROOT = Path(__file__).parents[1]


def public_names(module: ModuleType) -> list[str]:
    """The functions and classes of a module, or of its files, that users call, whether it lists them or not."""
    if module is tieopt:
        return module.__all__
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or (inspect.isclass(thing) and not getattr(thing, "_is_protocol", False)))
        and f"{thing.__module__}.".startswith(f"{module.__name__}.")
    ]


PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (tieopt, export, patterns, plot, testing)
    for name in public_names(module)
}
METHODS = {
    f"{name}.{member}": thing
    for name, kind in PUBLIC.items()
    if inspect.isclass(kind)
    for member, thing in vars(kind).items()
    if not member.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, (classmethod, property)))
}
DOCUMENTED = {**PUBLIC, **METHODS}
documented = pytest.mark.parametrize("name", DOCUMENTED)


@pytest.mark.parametrize("module", [tieopt, export, patterns, plot, testing], ids=lambda module: module.__name__)
def test_star_import_brings_what_is_public(module: ModuleType) -> None:
    names: dict[str, object] = {}
    exec(f"from {module.__name__} import *", names)  # noqa: S102
    names.pop("__builtins__")
    assert sorted(names) == sorted(public_names(module))


def test_public_names_say_where_they_are_from() -> None:
    assert all(thing.__module__.startswith("tieopt.") for thing in PUBLIC.values())


def sections(name: str) -> dict[str, str]:
    """The sections of a docstring by their headings, dedented; what stands before them by ""."""
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    found = re.findall(r"^(Args|Returns|Raises|Example|Attributes):\n((?: .*\n|\n)*)", f"{text}\n", flags=re.MULTILINE)
    return {"": text, **{heading: textwrap.dedent(section) for heading, section in found}}


def entries(section: str) -> list[str]:
    """What an entry of a section is about, as it is written before the colon."""
    return re.findall(r"^(\*{0,2}\w+(?:, \w+)*):", section, flags=re.MULTILINE)


def functions(thing: Any) -> list[Callable[..., Any]]:
    """The functions that run when something is called."""
    if inspect.isclass(thing):
        return [vars(thing)[name] for name in ("__new__", "__init__") if inspect.isfunction(vars(thing).get(name))]
    thing = thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing)
    return [inspect.unwrap(thing)] if inspect.isfunction(thing) else []


def raised(thing: Any) -> set[str]:
    """The exceptions that a function of this library raises, and that the functions raise that it calls by name."""
    names: set[str] = set()
    seen, found = set(), functions(thing)
    while found:
        function = found.pop()
        if function in seen or not function.__module__.startswith("tieopt"):
            continue
        seen.add(function)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                names |= {each.id for each in ast.walk(node.exc) if isinstance(each, ast.Name) and is_error(each.id)}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called = function.__globals__.get(node.func.id)
                found.extend([] if inspect.isclass(called) else functions(called))
    return names


def is_error(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return inspect.isclass(kind) and issubclass(kind, Exception)


@documented
def test_docstrings_have_an_example(name: str) -> None:
    assert ">>> " in sections(name).get("Example", "")


@documented
def test_docstrings_name_every_argument(name: str) -> None:
    thing = DOCUMENTED[name]
    signature = inspect.signature(thing if inspect.isclass(thing) else functions(thing)[0])
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    expected = [
        stars.get(parameter.kind, "") + parameter.name
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    assert entries(sections(name).get("Args", "")) == expected


@documented
def test_docstrings_say_what_is_raised(name: str) -> None:
    said = [error for entry in entries(sections(name).get("Raises", "")) for error in entry.split(", ")]
    assert all(map(is_error, said))
    assert len(said) == len(set(said))
    assert raised(DOCUMENTED[name]) <= set(said)


def without_markup(line: str) -> str:
    return re.sub(r"(:\w+)?:`[^`]*`|``.*?``", "", line)


@documented
def test_docstrings_render_as_they_read(name: str) -> None:
    # What stands before a colon in their first line is rendered as a type, below the text.
    headings = ["", "Returns"] if isinstance(DOCUMENTED[name], property) else ["Returns"]
    lines = [sections(name)[heading].splitlines()[0] for heading in headings if heading in sections(name)]
    assert not [line for line in lines if re.search(r":(\s|$)", without_markup(line))]


def test_every_public_name_stands_in_the_pages() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    names = {name.rpartition(".")[2] for name in DOCUMENTED}
    assert not [name for name in names if not re.search(rf"\b{name}\b", pages)]


def test_type_hints_are_shipped() -> None:
    assert (files("tieopt") / "py.typed").is_file()


def test_there_is_one_version() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    assert metadata["metadata"]["version"] == "attr: tieopt.__version__"
    latest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert latest is not None
    assert tieopt.__version__ == version("tieopt") == latest[1]


def test_what_users_call_is_what_the_package_shows() -> None:
    shown = {name for name in dir(tieopt) if name != "__version__"}
    assert shown == {*tieopt.__all__, "export", "patterns", "plot", "testing"}
    with pytest.raises(AttributeError, match="module 'tieopt' has no attribute 'symmetric'"):
        tieopt.symmetric  # noqa: B018


@pytest.mark.slow
def test_the_package_alone_brings_its_modules_and_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "tieopt").symlink_to(files("tieopt"), target_is_directory=True)
    program = """
        import importlib.metadata, sys
        def missing(name): raise importlib.metadata.PackageNotFoundError(name)
        importlib.metadata.distribution = missing
        import tieopt
        optional = {"hypothesis", "matplotlib", "safetensors", "scipy", "sklearn"}
        assert not optional & set(sys.modules)
        modules = [tieopt.export, tieopt.patterns, tieopt.plot, tieopt.testing]
        assert not optional & set(sys.modules)
        print(tieopt.__version__, tieopt.__file__, *(module.__name__ for module in modules), sep="\\n")
    """
    lines = subprocess.run(  # noqa: S603
        [sys.executable, "-c", inspect.cleandoc(program)], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.splitlines()
    assert lines[0] == tieopt.__version__
    assert Path(lines[1]).is_relative_to(tmp_path)
    assert lines[2:] == [f"tieopt.{name}" for name in ("export", "patterns", "plot", "testing")]


def test_the_library_requires_torch_alone_and_pins_nothing() -> None:
    required = requires("tieopt") or []
    assert [name for name in required if "extra ==" not in name] == ["torch>=2.6"]
    assert not [name for name in required if re.match(r"[\w.-]+\s*(==|~=|<)", name)]


@pytest.mark.slow
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
    names = ("constraints.txt", "hosts-constraints.txt", "frameworks-constraints.txt")
    lines = [line for name in names for line in (ROOT / "tests" / name).read_text(encoding="utf-8").splitlines()]
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    required = {re.split(r"[^\w.-]", line)[0].lower() for line in requires("tieopt") or []}
    assert required <= {name.lower() for name in pins}


def test_the_page_for_contributors_lists_every_file_of_the_library() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text()
    package = ROOT / "tieopt"
    names = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"^\| `tieopt/([\w/]+\.py)` \|", page, re.MULTILINE)) == names
