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
    # It solves an equation to 1e-8, even if that takes hundreds of products of matrices.
    "pytorch_optimizer-SpectralSphere": lambda make, params: make(params, solver_max_iterations=5),
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
    "torch-LBFGS",
    "torch-LBFGS-strong_wolfe",
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
        "timm creates it only with CUDA; the optimizers of bitsandbytes itself are below.",
    ),
    **dict.fromkeys(
        [f"timm-fused{name}" for name in ("adam", "adamw", "lamb", "novograd", "sgd")],
        "apex needs CUDA.",
    ),
    **dict.fromkeys(
        ["pytorch_optimizer-CPUOffloadOptimizer", "torchao-CPUOffloadOptimizer"],
        "It moves state between CUDA and the CPU.",
    ),
    **dict.fromkeys(
        ["bitsandbytes-AdEMAMix32bit", "bitsandbytes-PagedAdEMAMix32bit"],
        "It fails on the CPU because of the shape of the state that it creates.",
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
        "It is not a torch.optim.Optimizer.",
    ),
}

# What the compact mode does not refuse before the first step.
NOT_COMPACT = {
    **dict.fromkeys(
        ["pytorch_optimizer-AdaHessian", "pytorch_optimizer-SophiaH"],
        "It differentiates the gradients, which have no graph in the compact mode.",
    ),
    "timm-adahessian": "It stores estimates as attributes of the parameters, which compact parameters do not have.",
    "pytorch_optimizer-DeMo": "It adapts to the shapes of the parameters when it is created.",
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
# They have no row on the page, but some properties are asked of them, too. SparseAdam takes no dense gradients.
UNLISTED = [
    *(
        Case("torch", name, kind)
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and name not in ("Optimizer", "SparseAdam")
    ),
    Case("torch", "LBFGS-strong_wolfe", functools.partial(torch.optim.LBFGS, line_search_fn="strong_wolfe")),
    *(
        Case("torchao", f"{name}-stochastic", functools.partial(kind, bf16_stochastic_round=True))
        for name, kind in vars(MODULES["torchao"]).items()
        if name in ("_AdamW", "AdamW8bit", "AdamWFp8")
    ),
]


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
    # torch.manual_seed would note where it was called, for devices that are not there; that takes longer than a step.
    torch.default_generator.manual_seed(seed)


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
    assert {*BUILDERS, *CLOSURE, *SECOND_ORDER, *NOT_BARE, *NO_WRAPPER, *NOT_COMPACT} <= {
        *ids, *(case.id for case in UNLISTED)
    }  # fmt: skip
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


# --- the gradient of what is trained ---


def reads_loss(case: Case) -> bool:
    """Whether the value of the loss has a part in what the bare optimizer does, besides its gradient."""
    if "closure" not in inspect.signature(case.build([Parameter(torch.ones(3, 3))]).step).parameters:
        return False
    weights = []
    for value in (lambda loss: loss, lambda loss: 1.7 * loss + 0.3, lambda loss: loss + 100):
        run = Run(case, SHAPES[0])
        for step in range(4):
            seed_all(step)
            closure = run.closure(step)
            closure()

            def revalued(closure: Callable[[], Any] = closure, value: Callable[[Any], Any] = value) -> Any:
                loss = closure()
                return (None, value(loss[1])) if isinstance(loss, tuple) else value(loss)

            run.optimizer.step(revalued)
        weights.append([run.free, run.weight])
    return not all(same_bits(new, old) for other in weights[1:] for new, old in zip(other, weights[0], strict=True))


def slopes(case: Case, reduction: str, mode: str) -> tuple[float, float]:
    """The slope of the loss along the gradient that the tied optimizer is given, and the square of this gradient."""
    targets = [randn(5, 4, seed=3).double(), randn(*SHAPES[0], seed=4).double()]
    params = [Parameter(randn(*target.shape, seed=seed).double()) for seed, target in enumerate(targets)]
    optimizer = case.build(params)
    found = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = sum((param - target).cosh().sum() for param, target in zip(params, targets, strict=True))
            loss.backward()
        return loss

    class Compares(type(optimizer)):
        @torch.no_grad()
        def step(self, closure: Callable[[], Tensor]) -> None:
            closure()
            trained = [param for settings in self.param_groups for param in settings["params"]]
            grads = [param.grad.clone() for param in trained]
            losses = []
            for way in (1e-5, -2e-5):
                torch._foreach_add_(trained, grads, alpha=way)
                losses.append(closure().item())
            found.extend([(losses[0] - losses[1]) / 2e-5, sum(grad.square().sum().item() for grad in grads)])

    optimizer.__class__ = Compares
    ties = {params[1]: TIES[SHAPES[0]]}
    TiedOptimizer(optimizer, ties, reduction=reduction, compact=mode == "compact").step(closure)
    slope, square = found
    return slope, square


@each([*SERVED, *UNLISTED])
def test_what_reads_the_loss_is_given_the_gradient_of_what_it_trains_or_is_refused(case):
    reads = reads_loss(case)
    SEEN[case.id]["loss"] = "reads the loss" if reads else ""
    if not reads:
        return
    for mode, right in zip(MODES, ["mean", "sum"], strict=True):
        slope, square = slopes(case, right, mode)
        assert_close(slope, square, rtol=1e-6, atol=0)
        weight = Parameter(randn(*SHAPES[0], seed=1))
        start = weight.detach().clone()
        (wrong,) = {"mean", "sum"} - {right}
        # It says which reduction to use.
        with pytest.raises(ValueError, match=rf"{right}(.|\n)*Got: .*{wrong}"):
            TiedOptimizer(case.build([weight]), {weight: GROUPS}, reduction=wrong, compact=mode == "compact")
        assert same_bits(weight, start)


# --- small steps in bfloat16 ---

# Rows of one parameter that have the same weights and gradients.
ALIKE = (8, 128)
ALIKE_GROUPS = [[0, 1], [2, 3, 4, 5]]
ALIKE_LEADS = [0, 2, 6, 7]
START = 1.5
# In the last place of a weight.
UNIT = 2.0**-7
PACE = 0.15 * UNIT


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer and of those that it holds, each once."""
    values = [value if isinstance(value, (list, tuple)) else [value] for value in vars(optimizer).values()]
    held = [one for several in values for one in several if isinstance(one, Optimizer)]
    return list({id(settings): settings for one in [optimizer, *held] for settings in one.param_groups}.values())


class Alike:
    """Training of rows that are alike, by gradients of 1 and -1 in turn: an optimizer treats them alike, but for noise.

    Args:
        case: the optimizer.
        mode: that of a tied optimizer; "shared" is the bare one with a row for each group, None that with all rows.
        dtype: of the weights.
        times: what its learning rate is multiplied with.
        seed: of what is random.
    """

    def __init__(
        self,
        case: Case,
        mode: str | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        times: float = 1.0,
        seed: int = 0,
    ) -> None:
        seed_all(seed)
        self.case = case
        shape = (len(ALIKE_LEADS), ALIKE[1]) if mode == "shared" else ALIKE
        self.weight = Parameter(torch.full(shape, START, dtype=dtype))
        self.signs = torch.tensor([1.0, -1.0]).repeat(shape[1] // 2).expand(shape)
        self.optimizer = case.build([self.weight])
        if mode in MODES:
            TiedOptimizer(self.optimizer, {self.weight: ALIKE_GROUPS}, compact=mode == "compact")
        for settings in settings_of(self.optimizer):
            if "lr" in settings:
                settings["lr"] *= times
        if hasattr(self.optimizer, "train") and case.id != "heavyball-SAMWrapper":
            self.optimizer.train()

    def closure(self) -> Any:
        if self.case.id in SECOND_ORDER:
            self.optimizer.zero_grad()
            with torch.enable_grad():
                loss = (self.weight * self.signs).sum() + (self.weight - START).square().sum() / 1000
                loss.backward(create_graph=True)
        else:
            self.weight.grad = self.signs.to(self.weight.dtype, copy=True)
            loss = (self.weight.detach() * self.signs).sum()
        return (None, loss) if self.case.name == "GSAM" else loss

    def train(self, steps: int) -> Tensor:
        """How far each entry went down the loss."""
        for _ in range(steps):
            self.closure()
            self.optimizer.step(*[self.closure] * (self.case.id in CLOSURE))
        return (START - self.weight.detach().float()) * self.signs


class Bfloat16(NamedTuple):
    """What the bare optimizer does to rows that are alike.

    Attributes:
        runs: whether it trains weights of bfloat16 at all.
        noisy: whether it draws something for each entry, as where it rounds at random.
        times: what its learning rate is to be multiplied with to have small steps.
        steps: after how many of them it was looked at.
        moved: how far each entry went then.
    """

    runs: bool
    noisy: bool = False
    times: float = 1.0
    steps: int = 0
    moved: Tensor | None = None


@functools.cache
def in_bfloat16(case: Case) -> Bfloat16:
    try:
        runs = bool(Alike(case).train(2).isfinite().all())
    except Exception:
        runs = False
    if not runs:
        return Bfloat16(runs=False)
    pace = abs(Alike(case, dtype=torch.float32).train(20).mean().item()) / 20
    times = PACE / pace if pace > 1e-8 else 1.0
    # APOLLO and others draw once for a row, or for all of them.
    first, second = (Alike(case, times=times, seed=seed).train(20).diff(dim=1) for seed in (0, 1))
    noisy = not torch.equal(first, second)
    # Where there is no noise all steps are alike.
    steps = 200 if noisy else 20
    return Bfloat16(True, noisy, times, steps, Alike(case, times=times).train(steps))


@every_mode
@each([*SERVED, *UNLISTED])
def test_tied_rows_go_as_far_as_free_ones_where_a_step_is_below_half_a_unit_of_bfloat16(case, mode):
    expected = in_bfloat16(case)
    SEEN[case.id]["bfloat16"] = "noisy" if expected.noisy else "runs" if expected.runs else "fails"
    if not expected.runs or (mode == "compact" and case.id in NOT_COMPACT):
        pytest.skip("the bare optimizer fails in bfloat16, or the compact mode does not serve it")
    try:
        run = Alike(case, mode, times=expected.times)
    except ValueError as refusal:
        if mode == "default":
            raise
        pytest.skip(str(refusal).partition("\n")[0])
    moved = run.train(20 if mode == "compact" else expected.steps)
    assert tied_bitwise(run.weight, ALIKE_GROUPS)
    if mode == "compact":
        other = Alike(case, "shared", times=expected.times).train(20)
        # PSGDLRA chooses a rank by the number of entries that there are when it is made.
        assert case.id == "heavyball-PSGDLRA" or same_bits(moved[ALIKE_LEADS], other)
        return
    for group in ALIKE_GROUPS:
        members, row = expected.moved[group], moved[group[0]]
        if expected.noisy:
            slack = 5 * (row - members.mean(0)).std() / ALIKE[1] ** 0.5 + UNIT
            # SOAP goes another way with each of rows that are alike, as nothing but noise tells it their basis.
            assert members.mean(1).min() - slack <= row.mean() <= members.mean(1).max() + slack
        elif same_bits(expected.moved, expected.moved[:1].expand(ALIKE)):
            assert same_bits(row, members[0])


# --- methods other than step() ---

# What they are called with, by the names of their arguments.
ARGUMENTS: dict[str, Callable[["Run", int], Any]] = {
    "closure": lambda run, step: run.closure(step),
    "group": lambda run, step: run.optimizer.param_groups[0],
    "loss": lambda run, step: 1.0,
    "model": lambda run, step: model_of([run.free, run.weight]),
    "objectives": lambda run, step: [
        sum((param - target).square().sum() for param in (run.free, run.weight)) for target in (step, -1)
    ],
    "p": lambda run, step: run.weight,
    "params": lambda run, step: [run.free, run.weight],
    "rho": lambda run, step: 0.05,
}


# After how many steps they are called; at first there are no gradients, and then those of a closure each time.
TRAINED = [0, 11]


def method_names(kind: type) -> list[str]:
    """The public methods that the classes of an optimizer add to those of ``Optimizer``, but for generators."""
    return sorted(
        {
            name
            for base in kind.__mro__
            if not issubclass(Optimizer, base)
            for name, value in vars(base).items()
            if inspect.isfunction(value) and name[0] != "_" and not hasattr(Optimizer, name)
            if not inspect.isgeneratorfunction(inspect.unwrap(value))
        }
    )


def has_arguments(method: Callable[..., Any]) -> bool:
    """Whether a method can be called here; some take what only their own step has."""
    return needed(method) <= ARGUMENTS.keys()


def needed(method: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def call(run: Run, name: str, step: int, trained: int) -> set[str]:
    """Calls a method of an optimizer, and says what it wrote, "weights" or "gradients"."""
    if trained:
        run.closure(step)()
    params = [run.free, run.weight]
    weights = [param.detach().clone() for param in params]
    grads = [param.grad for param in params]
    kept = [None if grad is None else grad.detach().clone() for grad in grads]
    method = getattr(run.optimizer, name)
    given = {argument: ARGUMENTS[argument](run, step) for argument in needed(method)}
    seed_all(step)
    method(**given)
    same_weights = all(map(same_bits, params, weights))
    same_grads = all(
        param.grad is grad and (grad is None or same_bits(grad.detach(), copy))
        for param, grad, copy in zip(params, grads, kept, strict=True)
    )
    return {what for what, same in (("weights", same_weights), ("gradients", same_grads)) if not same}


@functools.cache
def writes(case: Case, trained: int) -> list[tuple[str, set[str]]]:
    """The methods that the bare optimizer has, twice in this order, with what each call wrote; none that fails."""
    kind = type(Run(case, SHAPES[0]).optimizer)
    names = [name for name in method_names(kind) if has_arguments(functools.partial(getattr(kind, name), None))]
    while True:
        run, seen = Run(case, SHAPES[0]).train(range(trained)), []
        try:
            for step, name in enumerate(names * 2, start=trained):
                seen.append((name, call(run, name, step, trained)))
        except Exception:
            names.remove(name)
        else:
            return seen


@functools.cache
def first_of_each_kind() -> set[Case]:
    """A case for each class of optimizers."""
    return set({type(case.build([Parameter(torch.ones(3, 3))])): case for case in reversed(SERVED + UNLISTED)}.values())


@every_mode
@each([*SERVED, *UNLISTED])
def test_methods_other_than_step_that_write_to_weights_or_gradients_keep_the_ties(case, mode):
    if case not in first_of_each_kind() or not any(what for trained in TRAINED for _, what in writes(case, trained)):
        return
    if mode == "compact" and case.id in NOT_COMPACT:
        pytest.skip(NOT_COMPACT[case.id])
    expected = bare(case, SHAPES[0])
    for trained in TRAINED:
        run = tied_or_refused(case, SHAPES[0], mode).train(range(trained))
        same = Run(case, SHAPES[0], "shared").train(range(trained))
        for step, (name, what) in enumerate(writes(case, trained), start=trained):
            seen = call(run, name, step, trained)
            call(same, name, step, trained)

            assert tied_bitwise(run.weight, GROUPS), name
            assert ("weights" in what) <= ("weights" in seen), name
            if mode == "compact" and expected.reproducible:
                assert same_bits(run.rows(), same.rows()), name
            elif expected.rowwise:
                assert_close(run.rows(), same.rows(), msg=name)


PHASES = ["first_step", "second_step", "third_step"]


@every_mode
@each([case for case in SERVED if case.name in ("BSAM", "FriendlySAM", "LookSAM", "SAM", "WSAM")])
def test_a_step_that_is_called_in_its_phases_is_the_step_with_a_closure(case, mode):
    run, other = (tied_or_refused(case, SHAPES[0], mode) for _ in range(2))
    for step in range(STEPS):
        run.step(step)

        seed_all(step)
        closure = other.closure(step)
        for phase in [name for name in PHASES if hasattr(other.optimizer, name)]:
            closure()
            getattr(other.optimizer, phase)()

        assert tied_bitwise(other.weight, GROUPS)
        # In the full mode step() lets the closure see what BSAM has drawn for each member.
        assert same_weights(run, other) or (case.name == "BSAM" and mode == "default")


# --- the page ---

HEAD = """\
# Optimizers of other packages

<!-- Written by `pytest tests/test_third_party.py --write-page`; do not edit. -->

`TiedOptimizer` wraps any `torch.optim.Optimizer`. This page lists the optimizers of six packages, and which of them
work in which mode. Each was run with torch {torch} on the CPU, in {steps} steps on parameters
of shapes {shapes} in float32, not compiled.

{summary}
The columns of the modes count the optimizers that work. An optimizer works if

- tied rows were equal to the last bit after every step, and after `train()` and `eval()` if it has these methods;
- a parameter without ties was trained bit for bit as by the bare optimizer, unless the optimizer couples parameters;
- in the full mode, rows without ties were trained bit for bit as by the bare optimizer, and tied rows as by the bare
  optimizer with one row for each group, unless the optimizer couples rows;
- in the compact mode, everything was trained bit for bit as by the bare optimizer with one row for each group;
- a run that was saved and loaded continued bit for bit.

The first is required of all optimizers, the others only if the bare optimizer is reproducible, and the last only if it
resumes bit for bit.

## What no wrapper can serve

{no_wrapper}
## What does not run without CUDA, tied or not

{not_bare}
## What the compact mode does not serve

{not_compact}
## bfloat16

Equal rows were trained with equal gradients, in steps of about {pace:g} units in the last place. In the full mode,
tied rows moved as far as the same rows of the bare optimizer. (If it treats equal rows differently, as SOAP does, they
moved by a distance between theirs.) In the compact mode, they moved bit for bit like those of the bare optimizer with
one row for each group. Most optimizers round to nearest: steps this small leave all rows where they are, tied or not.

{bfloat16}
## Methods other than `step()`

These methods write to weights or gradients; each class is listed once. In both modes, tied rows were equal to the last
bit after each call, and in the compact mode, all rows were bit for bit those of the bare optimizer with one row for
each group. Methods with arguments that only the `step()` of the optimizer can provide were not called.

{methods}
## Every optimizer

The last column has notes on the bare optimizer. If it reads the loss, it compares it with the gradient, and
`TiedOptimizer` requires `reduction="mean"` in the full mode and `reduction="sum"` in the compact mode.

| package | optimizer | full mode | compact mode | the bare optimizer |
| --- | --- | --- | --- | --- |
{rows}"""


def summary() -> str:
    """A line for each package."""
    lines = [
        "| package | version | optimizers | full mode | compact mode | not without CUDA | no wrapper |",
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


# What the page says of what the bare optimizer does in bfloat16.
IN_BFLOAT16 = {
    "noisy": "It draws a random number for each entry, mostly for stochastic rounding: averages of rows were compared.",
    "fails": "It fails in bfloat16, tied or not.",
}


def methods_listed() -> str:
    """Each method, what it writes, and whose it is."""
    writers = {}
    for case in first_of_each_kind() & set(SERVED):
        for name, what in (one for trained in TRAINED for one in writes(case, trained)):
            writers.setdefault(name, {}).setdefault(case.id, set()).update(what)
    reasons = {
        name: {
            key: f"`{name}()` writes to {' and '.join(sorted(what, reverse=True))}."
            for key, what in seen.items()
            if what
        }
        for name, seen in sorted(writers.items())
    }
    return "".join(map(listed, reasons.values()))


def row(case: Case) -> str:
    if case.id in {**NOT_BARE, **NO_WRAPPER}:
        cells = ["—", "—", "does not run" if case.id in NOT_BARE else "cannot be wrapped"]
    else:
        seen = [bare(case, shape) for shape in SHAPES]
        notes = {
            "couples parameters": any(one.couples for one in seen),
            "couples rows": not all(one.rowwise for one in seen),
            "is not reproducible": not all(one.reproducible for one in seen),
            "does not resume bit for bit": not resumes(case),
            "reads the loss": SEEN[case.id]["loss"],
        }
        modes = ["yes" if SEEN[case.id][mode] == "yes" else "no" for mode in MODES]
        cells = [*modes, ", ".join(note for note, holds in notes.items() if holds)]
    return f"| {' | '.join([case.package, case.name, *cells])} |\n"


def test_the_page_says_what_was_seen(request):
    if any(what not in SEEN[case.id] for case in SERVED for what in (*MODES, "loss", "bfloat16")):
        pytest.skip("some optimizers were not tried")
    page = HEAD.format(
        torch=torch.__version__.partition("+")[0],
        steps=STEPS,
        shapes=" and ".join(map(str, SHAPES)),
        summary=summary(),
        no_wrapper=listed(NO_WRAPPER),
        not_bare=listed(NOT_BARE),
        not_compact=listed({case.id: SEEN[case.id]["compact"] for case in SERVED if SEEN[case.id]["compact"] != "yes"}),
        pace=PACE / UNIT,
        bfloat16=listed(
            {
                case.id: IN_BFLOAT16[SEEN[case.id]["bfloat16"]]
                for case in SERVED
                if SEEN[case.id]["bfloat16"] in IN_BFLOAT16
            }
        ),
        methods=methods_listed(),
        rows="".join(map(row, CASES)),
    )
    if request.config.getoption("--write-page"):
        PAGE.write_text(page, encoding="utf-8")

    assert PAGE.read_text(encoding="utf-8") == page
