"""The table of docs/hosts.md: what was run with each host, and how it went.

A test, or a module as its ``pytestmark``, says what it runs of which host, and in which package that comes:

    @pytest.mark.host("Lightning", "manual optimisation", package="lightning")

Without ``package`` the host is torch. Each test that passes counts for the mode that the fixture ``compact`` gave it,
and without that fixture for the full mode. A test that has seen its mode refused says so, and counts as a refusal:

    record_property("refused", "differentiable=True")

With ``--write-page`` a run writes the rows of the modules it ran. Without, it compares them, and fails if they differ.
Rows that were written with other versions of the packages are left alone, and so is a module that was run in part.
"""

import os
import re
from collections import defaultdict
from collections.abc import Generator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HEAD = """\
| host | versions | what was run | full mode | compact mode | tests |
| --- | --- | --- | --- | --- | --- |
"""
# What stands between two comments of the page is written by the tests.
TABLE = re.compile(r"(?<=<!-- rows -->\n).*(?=<!-- end of rows -->\n)", re.DOTALL)


class Key(NamedTuple):
    """Which row it is: what was run of a host, and the module that has the tests, as the page links to it."""

    host: str
    what: str
    tests: str


class Passed(NamedTuple):
    """What one test that has passed saw of a row."""

    host: str
    what: str
    tests: str
    versions: str
    compact: bool
    refusals: list[str]


class Seen:
    """What the tests of a row have seen."""

    def __init__(self) -> None:
        self.versions = ""
        self.passed = {False: 0, True: 0}
        self.refused: dict[bool, set[str]] = {False: set(), True: set()}

    def add(self, test: Passed) -> None:
        self.versions = test.versions
        self.refused[test.compact].update(test.refusals)
        self.passed[test.compact] += not test.refusals

    def cell(self, compact: bool) -> str:
        """How it went in a mode."""
        passed = [f"{self.passed[compact]} passed"] if self.passed[compact] else []
        return "; ".join(passed + [f"refused: {reason}" for reason in sorted(self.refused[compact])]) or "—"


class Hosts:
    """The plugin of pytest that compares the table with what the tests see, or writes it.

    Args:
        page: that has the table.
        write: whether to write it.
    """

    def __init__(self, page: Path, *, write: bool) -> None:
        self._page = page
        self._write = write
        self._run: set[str] = set()
        self._run_in_part: set[str] = set()
        self._passed: list[Passed] = []
        self._differences: list[str] = []

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._run_in_part.update(map(self._link, items))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call":
            self._run.add(self._link(item))
            if report.passed:
                for marker in item.iter_markers("host"):
                    self._record(item, *marker.args, **marker.kwargs)
        return report

    def _link(self, item: pytest.Item) -> str:
        target = Path(os.path.relpath(item.path, self._page.parent)).as_posix()
        return f"[{item.path.name}]({target})"

    def _record(self, item: pytest.Item, host: str, what: str, package: str = "torch") -> None:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        # A machine without CUDA is to see the same table.
        if getattr(params.get("device"), "type", "cpu") != "cpu":
            return
        versions = ", ".join(f"{name} {installed(name)}" for name in dict.fromkeys([package, "torch"]))
        refusals = [value for name, value in item.user_properties if name == "refused"]
        compact = bool(params.get("compact", False))
        self._passed.append(Passed(host, what, self._link(item), versions, compact, refusals))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """What a worker of pytest-xdist has seen is compared where all of it comes together."""
        run, run_in_part, passed = getattr(node, "workeroutput", {}).get("hosts", ([], [], []))
        self._run.update(run)
        self._run_in_part.update(run_in_part)
        self._passed.extend(Passed(*test) for test in passed)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workeroutput"):
            # Of types that can be sent to another process.
            told = list(self._run), list(self._run_in_part), list(map(tuple, self._passed))
            session.config.workeroutput["hosts"] = told
            return
        # Tests that failed, or were not reached, have seen nothing to be written or to be compared.
        if exitstatus != pytest.ExitCode.OK or any("::" in argument for argument in session.config.args):
            return
        run = self._run - self._run_in_part
        rows: defaultdict[Key, Seen] = defaultdict(Seen)
        for test in self._passed:
            rows[Key(test.host, test.what, test.tests)].add(test)
        seen = {key: line_of(key, row) for key, row in rows.items() if key.tests in run}
        text = self._page.read_text(encoding="utf-8")
        page = {key_of(line): line for line in TABLE.search(text)[0].splitlines()[2:]}
        if self._write:
            lines = [*seen.values(), *(line for key, line in page.items() if key.tests not in run)]
            table = HEAD + "".join(f"{line}\n" for line in sorted(lines, key=str.casefold))
            self._page.write_text(TABLE.sub(lambda _: table, text), encoding="utf-8")
            return
        expected = {key: line for key, line in page.items() if key.tests in run and is_of_this_environment(line)}
        found = {key: line for key, line in seen.items() if key in expected or key not in page}
        self._differences = [f"- {line}" for key, line in expected.items() if found.get(key) != line]
        self._differences += [f"+ {line}" for key, line in found.items() if expected.get(key) != line]
        if self._differences:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._differences:
            terminalreporter.section(f"{self._page.name} differs from what was seen; --write-page writes it", red=True)
            terminalreporter.write("".join(f"{line}\n" for line in self._differences))


@cache
def installed(package: str) -> str:
    """The version of a package, without the build; nothing if there is none."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def line_of(key: Key, seen: Seen) -> str:
    """A row of the table."""
    return f"| {' | '.join([key.host, seen.versions, key.what, seen.cell(False), seen.cell(True), key.tests])} |"


def cells_of(line: str) -> list[str]:
    """What :func:`line_of` has joined."""
    return line.removeprefix("| ").removesuffix(" |").split(" | ")


def key_of(line: str) -> Key:
    """Which row a line of the table is."""
    host, _, what, _, _, tests = cells_of(line)
    return Key(host, what, tests)


def is_of_this_environment(line: str) -> bool:
    """Whether the packages of a row are installed in these versions."""
    return all(installed(name) == number for name, number in map(str.split, cells_of(line)[1].split(", ")))
