"""Every optimizer of timm, pytorch_optimizer, schedulefree, heavyball, torchao and bitsandbytes, tied.

They are what the extra ``hosts`` installs. How each fares is recorded in docs/third-party-optimizers.md, which is
written by this module: ``pytest tests/test_third_party.py --write-page``.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import logging
import random
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checks import GROUPS, randn, same_bits, tied_bitwise
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList
from torch.optim import SGD, AdamW, Optimizer
from torch.testing import assert_close

from tieopt import TiedOptimizer, tie_

PACKAGES = ("timm", "pytorch_optimizer", "schedulefree", "heavyball", "torchao", "bitsandbytes")
PAGE = Path(__file__).parents[1] / "docs" / "third-party-optimizers.md"
# Of the tied parameter. Some factor, block or quantise only what is larger than a threshold.
SHAPES = [(12, 5), (256, 384)]
# torchao quantises multiples of 256 entries; with a pair more, what the compact mode trains of the larger one is one.
TIES = dict(zip(SHAPES, [GROUPS, [*GROUPS, [100, 255]]], strict=True))
STEPS = 8
# Before it, those that have them go to evaluation and back.
SWITCH = 3
MODES = ["default", "compact"]

for name in PACKAGES:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"could not find {name!r}, see docs/contributing.md", allow_module_level=True)


def timm_optim() -> ModuleType:
    """``timm.optim`` without torchvision, which the models of timm need and its optimizers do not.

    To import it is to import ``timm`` first, and that imports the models. An empty package stands in its place so long.
    """
    stubs = {"timm": ModuleType("timm"), "timm.models": ModuleType("timm.models")}
    stubs["timm"].__path__ = importlib.util.find_spec("timm").submodule_search_locations
    # The one name that timm.optim takes from there, to sort the layers of a model.
    stubs["timm.models"].group_parameters = None
    kept = {name: sys.modules.pop(name) for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        return importlib.import_module("timm.optim")
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(kept)


def import_packages() -> dict[str, ModuleType]:
    """What has the optimizers of each package, imported without what some say of libraries for other devices."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = {"torchao": "torchao.optim", "bitsandbytes": "bitsandbytes.optim"}
            others = {package: importlib.import_module(names.get(package, package)) for package in PACKAGES[1:]}
            return {"timm": timm_optim(), **others}
    finally:
        logging.disable(logging.NOTSET)


MODULES = import_packages()

pytestmark = pytest.mark.filterwarnings("ignore")


# --- the optimizers ---


class Case(NamedTuple):
    """An optimizer of a package, and what makes one from a list of parameters."""

    package: str
    name: str
    build: Callable[[list[Parameter]], Any]

    @property
    def id(self) -> str:
        return f"{self.package}-{self.name}"


def model_of(params: list[Parameter]) -> Module:
    """A model that has these parameters."""
    model = Module()
    model.params = ParameterList(params)
    return model


class Radius:
    """The schedule that GSAM asks for its radius."""

    def step(self) -> float:
        return 0.05


# What stands around another optimizer, takes more than parameters, or has no use for its default settings here.
BUILDERS: dict[str, Callable[[Any, list[Parameter]], Any]] = {
    "timm-Lookahead": lambda make, params: make(AdamW(params, lr=0.01)),
    **dict.fromkeys(
        [
            f"pytorch_optimizer-{name}"
            for name in ("Lookahead", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC")
        ],
        lambda make, params: make(SGD(params, lr=0.01, momentum=0.9)),
    ),
    **dict.fromkeys(
        [f"pytorch_optimizer-{name}" for name in ("FriendlySAM", "LookSAM", "SAM")],
        lambda make, params: make(params, SGD, lr=0.01, momentum=0.9),
    ),
    **dict.fromkeys(
        [
            f"pytorch_optimizer-{name}"
            for name in ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
        ],
        lambda make, params: make([{"params": params, "use_muon": True}]),
    ),
    **dict.fromkeys(
        [f"pytorch_optimizer-{name}" for name in ("AdaLOMO", "AdamMini", "LOMO")],
        lambda make, params: make(model_of(params)),
    ),
    # What is random in an estimate of the curvature may cancel in a mean; without the eps it would be divided by.
    "timm-adahessian": lambda make, params: make(params, eps=0.01),
    "pytorch_optimizer-AdaHessian": lambda make, params: make(params, lr=0.01, eps=0.01),
    # These project to a lower rank only what they are told to.
    **dict.fromkeys(
        [f"pytorch_optimizer-{name}" for name in ("APOLLO", "Fira", "GaLore")],
        lambda make, params: make(
            [{"params": params, "rank": 3, "update_proj_gap": 3, "scale": 1.0, "projection_type": "std"}]
        ),
    ),
    # What these do every so many steps, or to blocks of so many entries, would not be seen.
    "pytorch_optimizer-AdaGC": lambda make, params: make(params, warmup_steps=3),
    "pytorch_optimizer-AdaShift": lambda make, params: make(params, keep_num=2),
    "pytorch_optimizer-Alice": lambda make, params: make(params, rank=3, leading_basis=1, update_interval=3),
    "pytorch_optimizer-Conda": lambda make, params: make(params, update_proj_gap=3),
    "pytorch_optimizer-DASH": lambda make, params: make(params, block_size=128, precondition_frequency=2),
    "pytorch_optimizer-SOAP": lambda make, params: make(params, precondition_frequency=2),
    "pytorch_optimizer-SPAM": lambda make, params: make(params, update_proj_gap=3),
    "pytorch_optimizer-SPlus": lambda make, params: make(params, inverse_steps=2),
    "pytorch_optimizer-ScalableShampoo": lambda make, params: make(
        params, block_size=128, start_preconditioning_step=2, preconditioning_compute_steps=2
    ),
    "pytorch_optimizer-SophiaH": lambda make, params: make(params, update_period=2),
    "pytorch_optimizer-StableSPAM": lambda make, params: make(params, update_proj_gap=3),
    "pytorch_optimizer-BSAM": lambda make, params: make(params, num_data=8),
    "pytorch_optimizer-GSAM": lambda make, params: make(params, SGD(params, lr=0.01), model_of(params), Radius()),
    "pytorch_optimizer-Ranger21": lambda make, params: make(params, num_iterations=100),
    "pytorch_optimizer-WSAM": lambda make, params: make(model_of(params), params, SGD, lr=0.01, momentum=0.9),
    **dict.fromkeys(
        ["schedulefree-ScheduleFreeWrapper", "schedulefree-ScheduleFreeWrapperReference"],
        lambda make, params: make(SGD(params, lr=0.01)),
    ),
    "heavyball-SOAP": lambda make, params: make(params, max_precond_dim=128, split=True, merge_dims=True),
    "heavyball-SplitOpt": lambda make, params: make([{"params": params, "optimizer": MODULES["heavyball"].AdamW}]),
    **dict.fromkeys(
        ["pytorch_optimizer-CPUOffloadOptimizer", "torchao-CPUOffloadOptimizer"],
        lambda make, params: make(params, AdamW),
    ),
    **dict.fromkeys(
        [f"bitsandbytes-{name}{bits}" for name in ("LARS", "SGD") for bits in ("", "8bit", "32bit")],
        lambda make, params: make(params, lr=0.01, momentum=0.9),
    ),
    "bitsandbytes-PytorchLARS": lambda make, params: make(params, lr=0.01, momentum=0.9),
}

# What takes no step without a closure.
CLOSURE = {
    *(
        f"pytorch_optimizer-{name}"
        for name in ("AliG", "BSAM", "FriendlySAM", "GSAM", "LBFGS", "LookSAM", "SAM", "WSAM")
    ),
    *(f"schedulefree-{name}ScheduleFreeClosure" for name in ("AdamW", "RAdam", "SGD")),
    "heavyball-SAMWrapper",
}

# What goes back through the gradients.
SECOND_ORDER = {"timm-adahessian", "pytorch_optimizer-AdaHessian", "pytorch_optimizer-SophiaH"}

# What does not run without CUDA, tied or not.
NOT_BARE = {
    **dict.fromkeys(
        [
            f"timm-bnb{name}"
            for name in (
                "adam", "adam8bit", "adamw", "adamw8bit", "ademamix", "ademamix8bit",
                "lion", "lion8bit", "sgd", "sgd8bit"
            )
        ],
        "timm makes it only where there is CUDA; those of bitsandbytes itself are below.",
    ),
    **dict.fromkeys(
        [f"timm-fused{name}" for name in ("adam", "adamw", "lamb", "novograd", "sgd")],
        "apex needs CUDA.",
    ),
    **dict.fromkeys(
        ["pytorch_optimizer-CPUOffloadOptimizer", "torchao-CPUOffloadOptimizer"],
        "It moves states between CUDA and the CPU.",
    ),
    **dict.fromkeys(
        ["bitsandbytes-AdEMAMix32bit", "bitsandbytes-PagedAdEMAMix32bit"],
        "It fails on the CPU, for the shape of the state that it makes.",
    ),
}  # fmt: skip

# What no wrapper can serve.
NO_WRAPPER = {
    **dict.fromkeys(
        ["pytorch_optimizer-AdaLOMO", "pytorch_optimizer-LOMO"],
        "It updates each parameter within backward, and has no step() after which to tie.",
    ),
    "pytorch_optimizer-SafeFP16Optimizer": "It has no parameter groups, and trains a flat copy of all parameters.",
    **dict.fromkeys(
        ["schedulefree-ScheduleFreeWrapper", "schedulefree-ScheduleFreeWrapperReference"],
        "It is no torch.optim.Optimizer.",
    ),
}

# What the compact mode does not refuse before the first step.
NOT_COMPACT = {
    **dict.fromkeys(
        ["pytorch_optimizer-AdaHessian", "pytorch_optimizer-SophiaH"],
        "It goes back through the gradients, and in the compact mode these have no graph.",
    ),
    "timm-adahessian": "It keeps what it estimates as attributes of the parameters, which compact ones do not have.",
    "pytorch_optimizer-DeMo": "It prepares for the shapes of the parameters when it is made.",
}


def cases() -> list[Case]:
    """Every optimizer of every package."""
    timm = MODULES["timm"]
    create = functools.partial(timm.create_optimizer_v2, lr=0.01, weight_decay=0.01)
    found = [("timm", name, functools.partial(create, opt=name)) for name in timm.list_optimizers()]
    found.append(("timm", "Lookahead", timm.Lookahead))
    for package in PACKAGES[1:]:
        module = MODULES[package]
        names = module.__all__ if package == "heavyball" else [name for name in vars(module) if name[0] != "_"]
        for name in sorted(names):
            kind = getattr(module, name)
            named_so = "Wrapper" in name or name.endswith("Optimizer")
            if inspect.isclass(kind) and (named_so or issubclass(kind, Optimizer)):
                found.append((package, name, kind))
    return [
        Case(
            package, name, functools.partial(BUILDERS.get(f"{package}-{name}", lambda make, params: make(params)), make)
        )
        for package, name, make in found
    ]


CASES = cases()
SERVED = [case for case in CASES if case.id not in {**NOT_BARE, **NO_WRAPPER}]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module", autouse=True)
def eager():
    """What the packages compile runs uncompiled: compiling takes minutes, and is not what is tested."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """One process, for the optimizers that want to talk to others."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# --- training ---


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - some packages draw from it.
    torch.manual_seed(seed)


class Run:
    """Training of a free parameter and of one whose rows are tied, on losses that couple no two rows.

    Args:
        case: the optimizer.
        shape: of the tied parameter.
        mode: of the tied optimizer; "shared" for a bare one of the parameter that the compact mode should train; None
            for a bare one of the parameter itself.
        alike: whether start and targets are tied already, so that tied rows have the same gradients.
    """

    def __init__(self, case: Case, shape: tuple[int, int], mode: str | None = None, alike: bool = False) -> None:
        self.case, self.shape, self.alike = case, shape, alike
        groups = sorted(TIES[shape], key=lambda group: (len(group), group))
        members = [member for group in groups for member in group]
        groups += [[row] for row in range(shape[0]) if row not in members]
        seed_all(0)
        # LoRARite wants pairs of matrices that can be multiplied.
        self.free, self.weight = Parameter(randn(shape[1], 4, seed=1)), Parameter(self._rows(shape, seed=2))
        # What of the weight is trained, and where each row of the weight is in it.
        self._leads = self._places = None
        if mode is not None:
            # Some look at the weights when they are made.
            tie_(self.weight.detach(), TIES[shape])
        if mode == "shared":
            self._leads = torch.tensor([group[0] for group in groups])
            self._places = torch.tensor([[row in group for group in groups].index(True) for row in range(shape[0])])
            self.weight = Parameter(self.weight.detach()[self._leads])
        self.optimizer = case.build([self.free, self.weight])
        if mode in MODES:
            TiedOptimizer(self.optimizer, {self.weight: TIES[shape]}, compact=mode == "compact")
        # That of SAMWrapper hands the call on to an optimizer that has none.
        self.switches = hasattr(self.optimizer, "eval") and case.id != "heavyball-SAMWrapper"
        self.exchanged: list[Tensor] = []
        if self.switches:
            self.optimizer.train()

    def rows(self) -> Tensor:
        """The weight as the model sees it."""
        rows = self.weight.detach()
        return rows if self._places is None else rows[self._places]

    def _rows(self, shape: tuple[int, int], seed: int) -> Tensor:
        rows = randn(*shape, seed=seed)
        return tie_(rows, TIES[shape]) if self.alike else rows

    def closure(self, step: int) -> Callable[[], Any]:
        targets = [randn(*self.free.shape, seed=10 + step), self._rows(self.shape, seed=100 + step)]

        def closure() -> Any:
            self.optimizer.zero_grad()
            # Some call it where gradients are off.
            with torch.enable_grad():
                seen = self.weight if self._places is None else self.rows().requires_grad_()
                loss = sum(
                    (param - target).square().sum() / 2 + param.sum(1).square().sum() / param.shape[1]
                    for param, target in zip([self.free, seen], targets, strict=True)
                )
                loss.backward(create_graph=self.case.id in SECOND_ORDER)
            if self._leads is not None:
                self.weight.grad = tie_(seen.grad, TIES[self.shape])[self._leads]
            return (None, loss) if self.case.name == "GSAM" else loss

        return closure

    def step(self, step: int) -> None:
        seed_all(step)
        if step == SWITCH and self.switches:
            self.optimizer.eval()
            self.exchanged.append(self.rows().clone())
            self.optimizer.train()
            self.exchanged.append(self.rows().clone())
        closure = self.closure(step)
        closure()
        self.optimizer.step(*[closure] * (self.case.id in CLOSURE))

    def train(self, steps: range) -> "Run":
        for step in steps:
            self.step(step)
        return self

    def resumed(self, mode: str | None = None) -> "Run":
        """Another run with the weights and the state of this one, through a file."""
        twin = Run(self.case, self.shape, mode)
        file = io.BytesIO()
        torch.save([self.free.detach(), self.weight.detach(), self.optimizer.state_dict()], file)
        file.seek(0)
        # The states of some hold what only their own packages know.
        free, weight, state = torch.load(file, weights_only=False)
        twin.free.data.copy_(free)
        twin.weight.data.copy_(weight)
        twin.optimizer.load_state_dict(state)
        return twin


def same_weights(first: Run, second: Run) -> bool:
    return same_bits(first.free, second.free) and same_bits(first.weight, second.weight)


def free_rows(run: Run) -> Tensor:
    members = {member for group in TIES[run.shape] for member in group}
    return run.rows()[[row for row in range(run.shape[0]) if row not in members]]


class Bare(NamedTuple):
    """What the bare optimizer does.

    Attributes:
        run: its training.
        moves: whether it trains the weight at all.
        reproducible: whether it does the same twice.
        couples: whether the gradients of one parameter act on another.
        rowwise: whether it trains each row of a parameter by the gradients of the row alone, and all rows alike.
        resumes: whether a run that is saved and loaded goes on bit for bit.
    """

    run: Run
    moves: bool
    reproducible: bool
    couples: bool
    rowwise: bool
    resumes: bool


@functools.cache
def bare(case: Case, shape: tuple[int, int]) -> Bare:
    run = Run(case, shape).train(range(STEPS))
    reproducible = same_weights(run, Run(case, shape).train(range(STEPS)))
    alike = Run(case, shape, alike=True).train(range(STEPS))
    halfway = Run(case, shape).train(range(STEPS // 2))
    try:
        resumes = same_weights(run, halfway.resumed().train(range(STEPS // 2, STEPS)))
    except Exception:
        resumes = False
    moves = not same_bits(run.weight, Run(case, shape).weight)
    rows = alike.rows()
    rowwise = same_bits(free_rows(run), free_rows(alike)) and torch.allclose(rows, tie_(rows.clone(), TIES[shape]))
    return Bare(run, moves, reproducible, not same_bits(run.free, alike.free), rowwise, reproducible and resumes)


@functools.cache
def shared(case: Case, shape: tuple[int, int]) -> Run:
    """What the bare optimizer does with the shared values."""
    return Run(case, shape, "shared").train(range(STEPS))


def resumes(case: Case) -> bool:
    """Whether the bare optimizer does; not by luck in one of the shapes."""
    return all(bare(case, shape).resumes for shape in SHAPES)


# What the page says of each optimizer and mode.
SEEN: defaultdict[str, dict[str, str]] = defaultdict(dict)


def tied_or_refused(case: Case, shape: tuple[int, int], mode: str) -> Run:
    """A tied run; skips where the compact mode refuses it, and has the page say why."""
    try:
        return Run(case, shape, mode)
    except ValueError as refusal:
        if mode == "default":
            raise
        reason = str(refusal).partition("\n")[0]
        SEEN[case.id][mode] = reason
        pytest.skip(reason)


# --- the tests ---


def test_there_is_one_case_for_each_optimizer_and_every_name_in_a_table_is_one():
    ids = [case.id for case in CASES]

    assert max(Counter(ids).values()) == 1
    assert {*BUILDERS, *CLOSURE, *SECOND_ORDER, *NOT_BARE, *NO_WRAPPER, *NOT_COMPACT} <= set(ids)
    least = {
        "timm": 101, "pytorch_optimizer": 128, "schedulefree": 10, "heavyball": 39, "torchao": 6, "bitsandbytes": 40
    }  # fmt: skip
    assert all(Counter(case.package for case in CASES)[package] >= number for package, number in least.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@each([case for case in CASES if case.id in NOT_BARE])
def test_what_does_not_run_without_cuda_fails_without_ties(case):
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|output with shape"):
        Run(case, SHAPES[0]).train(range(1))


@each([case for case in CASES if case.id in NO_WRAPPER])
def test_what_no_wrapper_can_serve_has_no_parameter_groups_or_no_step(case):
    params = [Parameter(randn(5, 4)), Parameter(randn(*SHAPES[0]))]
    optimizer = case.build(params)
    with pytest.raises((AttributeError, NotImplementedError, TypeError)):
        TiedOptimizer(optimizer, {params[1]: GROUPS}).step()


# What shows in the state of the larger shape that the code for it was reached.
REACHED: dict[str, Callable[[dict[Any, Any]], bool]] = {
    "timm-adafactor": lambda state: "exp_avg_sq_row" in state,
    "pytorch_optimizer-DASH": lambda state: len(state["blocks"][0]["exp_avg"]) > 1,
    "pytorch_optimizer-GaLore": lambda state: len(state["exp_avg"]) == 3,
    "pytorch_optimizer-ScalableShampoo": lambda state: len(state["pre_conditioner"].statistics) > 2,
    "heavyball-SOAP": lambda state: len(state) > 1,
    **{
        case.id: lambda state: any("OptimState" in type(value).__name__ for value in state.values())
        for case in SERVED
        if case.package == "torchao"
    },
    **{
        case.id: lambda state: state["state1"].dtype == torch.uint8
        for case in SERVED
        if case.package == "bitsandbytes" and case.name.endswith("8bit")
    },
}


@every_mode
@each([case for case in CASES if case.id in REACHED])
def test_the_larger_shape_is_factored_blocked_projected_or_quantised(case, mode):
    small, large = (Run(case, shape, mode).train(range(1)) for shape in SHAPES)
    assert REACHED[case.id](large.optimizer.state[large.weight])
    if case.package in ("torchao", "bitsandbytes"):
        assert not REACHED[case.id](small.optimizer.state[small.weight])


@every_mode
@each(SERVED)
def test_rows_stay_tied_to_the_last_bit_and_what_is_free_follows_the_bare_optimizer(case, mode):
    for shape in SHAPES:
        expected, run = bare(case, shape), tied_or_refused(case, shape, mode)
        start = run.weight.detach().clone()
        if mode == "compact" and case.id in NOT_COMPACT:
            SEEN[case.id][mode] = NOT_COMPACT[case.id]
            with pytest.raises((AttributeError, KeyError, RuntimeError)):
                run.step(0)
            return
        for step in range(STEPS):
            run.step(step)

            assert tied_bitwise(run.weight, TIES[shape])
        assert all(tied_bitwise(rows, TIES[shape]) for rows in run.exchanged)
        assert bool(run.weight.isfinite().all())
        assert same_bits(run.weight, start) != expected.moves
        if expected.reproducible and not expected.couples:
            assert same_bits(run.free, expected.run.free)
        # In the compact mode rows stand elsewhere in memory, where a kernel may round otherwise.
        if mode == "default" and expected.reproducible and expected.rowwise:
            assert same_bits(free_rows(run), free_rows(expected.run))
            if case.id not in SECOND_ORDER:
                assert_close(run.rows(), shared(case, shape).rows())
    SEEN[case.id][mode] = "yes"


@each(SERVED)
def test_the_compact_mode_does_to_the_last_bit_what_the_bare_optimizer_does_with_the_shared_values(case):
    if case.id in NOT_COMPACT:
        pytest.skip(NOT_COMPACT[case.id])
    for shape in SHAPES:
        run = tied_or_refused(case, shape, "compact").train(range(STEPS))
        if not bare(case, shape).reproducible:
            pytest.skip("the bare optimizer does not do the same twice")
        expected = shared(case, shape)
        assert same_bits(run.free, expected.free)
        assert same_bits(run.weight, expected.rows())
        assert all(map(same_bits, run.exchanged, expected.exchanged))


@every_mode
@each(SERVED)
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit_where_the_bare_one_does(case, mode):
    if mode == "compact" and case.id in NOT_COMPACT:
        pytest.skip(NOT_COMPACT[case.id])
    if not resumes(case):
        pytest.skip("the bare optimizer does not")
    for shape in SHAPES:
        run = tied_or_refused(case, shape, mode).train(range(STEPS // 2))
        twin = run.resumed(mode).train(range(STEPS // 2, STEPS))

        assert same_weights(run.train(range(STEPS // 2, STEPS)), twin)
        assert tied_bitwise(twin.weight, TIES[shape])


# --- the page ---

HEAD = """\
# Optimizers of other packages

<!-- Written by `pytest tests/test_third_party.py --write-page`; do not edit. -->

`TiedOptimizer` wraps any `torch.optim.Optimizer`. This is what was seen with every optimizer of some packages,
with torch {torch} on the CPU, in {steps} steps on parameters of shapes {shapes} in float32, uncompiled.

{summary}
An optimizer counts as served where

- tied rows were equal to the last bit after every step, and after `train()` and `eval()` of those that have them;
- a parameter without ties was trained bit for bit as by the bare optimizer, where that trains parameters apart from
  each other;
- in the default mode rows without ties were trained so as well, and tied ones as by the bare optimizer with one row
  for each group, where that trains each row by the gradients of the row alone;
- in the compact mode, everything was trained bit for bit as by the bare optimizer with one row for each group;
- a run that was saved and loaded went on bit for bit.

All but the first were asked only where the bare optimizer does the same twice, the last where it resumes.

## What no wrapper can serve

{no_wrapper}
## What does not run without CUDA, tied or not

{not_bare}
## What the compact mode does not serve

{not_compact}
## Every optimizer

| package | optimizer | default mode | compact mode | the bare one |
| --- | --- | --- | --- | --- |
{rows}"""


def summary() -> str:
    """A line for each package."""
    lines = [
        "| package | version | optimizers | default mode | compact mode | not without CUDA | no wrapper |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for package, version in [*((name, importlib.metadata.version(name)) for name in PACKAGES), ("all", "")]:
        own = [case for case in CASES if package in (case.package, "all")]
        served = [sum(SEEN[case.id][mode] == "yes" for case in own if case in SERVED) for mode in MODES]
        without = [sum(case.id in table for case in own) for table in (NOT_BARE, NO_WRAPPER)]
        cells = [package, version, len(own), *served, *without]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "".join(f"{line}\n" for line in lines)


def listed(reasons: dict[str, str]) -> str:
    """Each reason, and for what it is one."""
    names = defaultdict(lambda: defaultdict(list))
    for case in CASES:
        if case.id in reasons:
            names[reasons[case.id]][case.package].append(case.name)
    lines = []
    for reason, packages in names.items():
        of_each = "; ".join(f"{package}: {', '.join(own)}" for package, own in packages.items())
        lines.append(f"- {reason} {of_each}.\n")
    return "".join(lines)


def row(case: Case) -> str:
    if case.id in {**NOT_BARE, **NO_WRAPPER}:
        cells = ["—", "—", "does not run" if case.id in NOT_BARE else "cannot be wrapped"]
    else:
        seen = [bare(case, shape) for shape in SHAPES]
        notes = {
            "couples parameters": any(one.couples for one in seen),
            "couples rows": not all(one.rowwise for one in seen),
            "does not do the same twice": not all(one.reproducible for one in seen),
            "does not resume bit for bit": not resumes(case),
        }
        modes = ["yes" if SEEN[case.id][mode] == "yes" else "no" for mode in MODES]
        cells = [*modes, ", ".join(note for note, holds in notes.items() if holds)]
    return f"| {' | '.join([case.package, case.name, *cells])} |\n"


def test_the_page_says_what_was_seen(request):
    if any(mode not in SEEN[case.id] for case in SERVED for mode in MODES):
        pytest.skip("some optimizers were not tried")
    page = HEAD.format(
        torch=torch.__version__.partition("+")[0],
        steps=STEPS,
        shapes=" and ".join(map(str, SHAPES)),
        summary=summary(),
        no_wrapper=listed(NO_WRAPPER),
        not_bare=listed(NOT_BARE),
        not_compact=listed({name: seen["compact"] for name, seen in SEEN.items() if seen["compact"] != "yes"}),
        rows="".join(map(row, CASES)),
    )
    if request.config.getoption("--write-page"):
        PAGE.write_text(page, encoding="utf-8")

    assert PAGE.read_text(encoding="utf-8") == page
