"""Hypothesis profiles and the fixtures that all tests share.

The profile is chosen with pytest's ``--hypothesis-profile``:

- ``quick``, the default: a few examples, the same ones on every run;
- ``thorough``, for continuous integration: many more, the same ones on every run, too;
- ``nightly``: a thousand, new ones on every run, and a failure prints the line that reproduces it;
- ``mutants``, for mutation testing: as quick, and a failure is not made smaller, because nobody reads it.

None has a deadline: the first call of a torch operator takes longer than the next thousand.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hosts import Hosts
from hypothesis import Phase, settings
from ranks import Ranks

settings.register_profile("quick", max_examples=9, stateful_step_count=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=50, stateful_step_count=40, deadline=None, derandomize=True)
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "distributed.md" and torch.__version__ < (2, 7):
            item.add_marker(pytest.mark.skip("fully_shard of torch 2.6 does not run on CPUs"))


# Of session scope, because hypothesis runs a test many times within one function-scoped fixture.
@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test is to run on; skipped where the machine has none of the kind."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
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


@pytest.fixture(scope="session", params=["two_ranks", "four_ranks"], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two of them, and four."""
    return request.getfixturevalue(request.param)
