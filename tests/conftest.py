"""Hypothesis profiles and the fixtures that all tests share.

The profile is chosen with pytest's ``--hypothesis-profile``:

- ``quick``, the default: a few examples, the same ones on every run; if nothing says what to run, also few cases of
  each test, and no test that is marked as slow;
- ``thorough``, for continuous integration: more, the same ones on every run, too;
- ``nightly``: a thousand, new ones on every run, and a failure prints the line that reproduces it;
- ``mutants``, for mutation testing: as quick, and a failure is not made smaller, because nobody reads it.

None has a deadline: the first call of a torch operator takes longer than the next thousand.
"""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from cases import few_of, runs_few
from hosts import Hosts
from hypothesis import Phase, settings
from ranks import Ranks

settings.register_profile("quick", max_examples=7, stateful_step_count=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=20, stateful_step_count=40, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, stateful_step_count=50, deadline=None, print_blob=True)
settings.register_profile("mutants", settings.get_profile("quick"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("quick")

# The tensors are small: a second thread gains nothing, and on a busy machine waiting for it takes ten times as long.
torch.set_num_threads(1)

# A sparse tensor that breaks its own rules is an error; torch warns as long as nobody has decided.
torch.sparse.check_sparse_tensor_invariants.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-page", action="store_true", help="write the page of docs/ that says what the tests saw")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run whole folders on all cores, where pytest-xdist is installed and ``-n`` does not say otherwise.

    Neighbouring tests stay together, because they share ranks and what is compiled. Each worker imports torch, which
    takes several hundred megabytes: hence a limit.
    """
    option = config.option
    told = getattr(option, "numprocesses", 0) is not None or option.tx or hasattr(config, "workerinput")
    # A debugger, ``-s`` and mutmut need the one process, and pytest-cov has prepared for it by now.
    needs_one = option.usepdb or option.capture == "no" or getattr(option, "cov_source", None)
    if told or needs_one or config.getoption("--hypothesis-profile", None) == "mutants":
        return
    if any(map(os.path.isdir, config.args)):
        option.numprocesses, option.maxprocesses = "auto", option.maxprocesses or 8
        option.dist = "worksteal" if option.dist == "no" else option.dist


def pytest_configure(config: pytest.Config) -> None:
    page = config.rootpath / "docs" / "hosts.md"
    config.pluginmanager.register(Hosts(page, write=config.getoption("--write-page")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "distributed.md" and torch.__version__ < (2, 7):
            item.add_marker(pytest.mark.skip("fully_shard of torch 2.6 does not run on CPUs"))
    if runs_few(config):
        few = few_of([item for item in items if not item.get_closest_marker("slow")])
        config.hook.pytest_deselected(items=[item for item in items if item not in few])
        items[:] = [item for item in items if item in few]


def pytest_collection_finish() -> None:
    # Thousands of tests stay alive, and each collection of garbage would go through them.
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    few = "few of each test, and none of slow ones; name a folder, a file or a profile to run all"
    return f"cases: {few if runs_few(config) else 'all'}"


# Of session scope, because hypothesis runs a test many times within one function-scoped fixture.
@pytest.fixture(scope="session", params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine that a test is to run on."""
    return torch.device(request.param)


@pytest.fixture(scope="session", params=[False, True], ids=["full", "compact"])
def compact(request: pytest.FixtureRequest) -> bool:
    """Each mode of a tied optimizer: it trains every member, or one entry for each group."""
    return request.param


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes with a process group, for all modules."""
    with Ranks(2) as started:
        yield started


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four of them."""
    with Ranks(4) as started:
        yield started


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("two_ranks", id="2 ranks"),
        pytest.param("four_ranks", id="4 ranks", marks=pytest.mark.slow),
    ],
)
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two of them, and four."""
    return request.getfixturevalue(request.param)
