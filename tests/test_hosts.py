"""The table of docs/hosts.md has a row for what passed or was refused, and for nothing else."""

import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from hosts import TABLE, cells_of

pytest_plugins = ["pytester"]

PYTEST = f"pytest {version('pytest')}, torch {version('torch').partition('+')[0]}"
HEAD = """\
| host | versions | what was run | full mode | compact mode | tests |
| --- | --- | --- | --- | --- | --- |
"""
CONFTEST = f"""
    import sys
    import pytest
    sys.path.append({str(Path(__file__).parent)!r})  # for workers, which are processes of their own
    from hosts import Hosts

    def pytest_addoption(parser):
        parser.addoption("--write-page", action="store_true")

    def pytest_configure(config):
        config.addinivalue_line("markers", "host(host, what, package='torch')")
        config.pluginmanager.register(Hosts(config.rootpath / "hosts.md", write=config.getoption("--write-page")))
"""
TESTS = """
    import pytest

    @pytest.mark.host("Host", "training", package="pytest")
    @pytest.mark.parametrize("compact", [False, True])
    @pytest.mark.parametrize("number", range(3))
    def test_training(compact, number):
        if compact and number == 2:
            pytest.skip("not here")

    @pytest.mark.host("Host", "a second order", package="pytest")
    @pytest.mark.parametrize("compact", [False, True])
    @pytest.mark.parametrize("reason", ["no history", "no graph"])  # Workers tell them in any order.
    def test_refused(compact, reason, record_property):
        if compact:
            record_property("refused", reason)

    def test_of_no_host():
        pass
"""


@pytest.fixture
def project(pytester):
    """Tests of a host, and a page that has its table but for the rows."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_host=TESTS)
    page = pytester.path / "hosts.md"
    page.write_text("# Hosts\n\n<!-- rows -->\n" + HEAD + "<!-- end of rows -->\n\nThe end.\n", encoding="utf-8")
    return pytester


def page(project):
    return (project.path / "hosts.md").read_text(encoding="utf-8")


def rows(project):
    return [line for line in page(project).splitlines() if line.startswith("| Host")]


def row(what, default, compact, tests="test_host.py"):
    return f"| Host | {PYTEST} | {what} | {default} | {compact} | [{tests}]({tests}) |"


WRITTEN = [
    row("a second order", "2 passed", "refused: no graph; refused: no history"),
    row("training", "3 passed", "2 passed"),
]


def run(project, *args):
    """The exit status of a run, and what it writes."""
    result = project.runpytest_inprocess(*args)
    return result.ret, result.stdout.str()


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_a_run_writes_what_it_saw_and_the_next_one_compares(project, workers):
    assert run(project, "--write-page", *workers)[0] == 0
    assert rows(project) == WRITTEN
    assert page(project).startswith("# Hosts\n\n<!-- rows -->\n" + HEAD)
    assert page(project).endswith("|\n<!-- end of rows -->\n\nThe end.\n")
    assert run(project, *workers)[0] == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("3 passed", "4 passed"),
        ("refused: no graph", "1 passed"),
        ("| training |", "| untold |"),
        (WRITTEN[0] + "\n", ""),
        ("<!-- end", row("more", "1 passed", "—") + "\n<!-- end"),
    ],
)
def test_a_run_fails_where_the_page_says_otherwise_and_leaves_it_so(project, old, new):
    run(project, "--write-page")
    changed = page(project).replace(old, new)
    assert changed != page(project)
    (project.path / "hosts.md").write_text(changed, encoding="utf-8")
    status, output = run(project)

    assert status == pytest.ExitCode.TESTS_FAILED
    assert "hosts.md differs from what was seen" in output
    assert page(project) == changed


@pytest.mark.parametrize(
    "outcome", ["raise ValueError", "pytest.fail()", "pytest.skip('not here')", "pytest.xfail('not yet')"]
)
def test_what_did_not_pass_has_no_row(project, outcome):
    project.makepyfile(
        test_other=f"""
            import pytest

            @pytest.mark.host("Host", "other", package="pytest")
            def test_other():
                {outcome}
        """
    )
    failed = run(project, "--write-page")[0] == pytest.ExitCode.TESTS_FAILED

    assert failed == (outcome in ("raise ValueError", "pytest.fail()"))
    assert rows(project) == ([] if failed else WRITTEN)


@pytest.mark.parametrize(
    "args", [["-k", "refused"], ["-k", "refused", "-n", "2"], ["test_host.py::test_refused"], ["--collect-only"]]
)
@pytest.mark.parametrize("write", [[], ["--write-page"]])
def test_a_run_in_part_is_not_compared_and_writes_nothing(project, args, write):
    run(project, "--write-page")
    changed = page(project).replace("refused: no graph", "1 passed")
    (project.path / "hosts.md").write_text(changed, encoding="utf-8")

    assert run(project, *args, *write)[0] == 0
    assert page(project) == changed


def test_rows_of_modules_that_are_not_run_are_left_alone(project):
    project.makepyfile(test_other="def test_other(): pass")
    run(project, "--write-page")

    assert run(project, "test_other.py")[0] == 0
    assert run(project, "test_other.py", "--write-page")[0] == 0
    assert rows(project) == WRITTEN


def test_rows_of_other_versions_are_not_compared_and_written_anew(project):
    run(project, "--write-page")
    other = page(project).replace(PYTEST, "pytest 1.0, torch 1.0").replace("3 passed", "4 passed")
    (project.path / "hosts.md").write_text(other, encoding="utf-8")

    assert run(project)[0] == 0
    assert page(project) == other
    run(project, "--write-page")
    assert rows(project) == WRITTEN


# --- the page itself ---

ROOT = Path(__file__).parents[1]
ROWS = [cells_of(line) for line in TABLE.search((ROOT / "docs" / "hosts.md").read_text("utf-8"))[0].splitlines()[2:]]


def test_the_versions_of_the_page_are_those_of_continuous_integration():
    # Rows of other versions are not compared, and would stay for good.
    lines = [
        line for file in (ROOT / "tests").glob("*constraints.txt") for line in file.read_text("utf-8").splitlines()
    ]
    pins = {line.replace("==", " ") for line in lines if not line.startswith("#")}

    assert not {version for _, versions, *_ in ROWS for version in versions.split(", ")} - pins


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_continuous_integration_runs_every_module_of_the_page():
    commands = re.findall(r"^(?:python -m )?pytest ([^&\n]*)", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    # With all the braces written out.
    written = subprocess.run(["bash", "-c", f"echo {' '.join(commands)}"], check=True, capture_output=True, text=True)  # noqa: S603, S607
    named = {word.removeprefix("tests/") for word in written.stdout.split()}
    modules = {re.search(r"\.\./tests/(.*)\)", tests)[1]: versions for _, versions, *_, tests in ROWS}

    assert all((ROOT / "tests" / module).is_file() for module in modules)
    # Those that need torch alone are run with all the others.
    assert {module for module, versions in modules.items() if not re.fullmatch(r"torch \S+", versions)} <= named


def test_the_page_begins_with_an_answer_for_each_host():
    page = (ROOT / "docs" / "hosts.md").read_text("utf-8")
    lines = re.findall(r"^\| ([^|]*) \| (yes|no) \| (yes|no) \|$", page, re.MULTILINE)
    answers = {host: modes for hosts, *modes in lines for host in hosts.split(", ")}
    seen: dict[str, list[str]] = {}
    for host, _, _, *cells, _ in ROWS:
        passed = ["yes" if "passed" in cell else "no" for cell in cells]
        seen[host] = list(map(max, passed, seen.get(host, passed)))

    # What is refused altogether has no tests that pass.
    assert answers == {**seen, "FullyShardedDataParallel (FSDP1)": ["no", "no"]}
    assert len(lines) <= 10
