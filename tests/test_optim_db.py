"""Every optimizer of torch with every setting that torch tests it with, tied.

``torch.testing._internal.common_optimizers.optim_db`` holds the optimizers and the settings. Each is tried
as it is, and with each of the implementations ``foreach`` and ``fused`` that it has on the CPU;
``differentiable`` and ``capturable`` ones have tests of their own.
"""

import copy
import io
from itertools import groupby
from typing import Any, NamedTuple

import pytest
import torch
from checks import GROUPS, bits, mean_gradient, parameter, pickled, randn, same_bits, same_tree, tied_bitwise
from test_schedulers import SCHEDULERS, advance, settings_of
from torch.amp import GradScaler
from torch.nn.functional import embedding
from torch.optim import LBFGS, SparseAdam
from torch.testing._internal.common_optimizers import optim_db

from tieopt import TiedOptimizer

pytestmark = pytest.mark.host("torch.optim", "every optimizer with every setting of torch's own tests")

SHAPES = [(7, 5), (4, 3)]
STEPS = 10


class Variant(NamedTuple):
    inner: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    info: Any
    setting: int


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny: to wake a second thread takes ten times as long as the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def variants():
    """The settings of the database, with each implementation that runs on the CPU."""
    for info in optim_db:
        implementations = ["foreach"] if "foreach" in info.supported_impls else []
        if "fused" in info.supported_impls and "cpu" in info.supports_fused_on:
            implementations.append("fused")
        for number, setting in enumerate(info.optim_inputs_func(device="cpu")):
            name = f"{info.optim_cls.__name__}-{number}-{setting.desc.replace(' ', '_')}"
            yield pytest.param(Variant(info.optim_cls, setting.kwargs, info, number), id=name)
            for implementation in implementations:
                kwargs = {**setting.kwargs, implementation: True}
                yield pytest.param(Variant(info.optim_cls, kwargs, info, number), id=f"{name}-{implementation}")


VARIANTS = list(variants())


def those(condition):
    return pytest.mark.parametrize("variant", [param for param in VARIANTS if condition(*param.values)])


every_variant = those(lambda variant: True)


def sampled(condition=lambda variant: True):
    """Of each optimizer every setting, and every implementation in both modes, but not all that they make together.

    The numbers of a step are tested with all of them; this is for what surrounds a step.
    """
    params = [param for param in VARIANTS if condition(*param.values)]
    for _, of_optimizer in groupby(params, key=lambda param: param.values[0].inner):
        settings = [[*each] for _, each in groupby(of_optimizer, key=lambda param: param.values[0].setting)]
        implementations = max(map(len, settings))
        for number in range(max(len(settings), 2 * implementations)):
            setting = settings[number % len(settings)]
            yield setting[number % len(setting)], bool(number // implementations % 2)


def a_sample(condition=lambda variant: True):
    cases = [
        pytest.param(*param.values, compact, id=f"{param.id}-{'compact' if compact else 'full'}")
        for param, compact in sampled(condition)
    ]
    return pytest.mark.parametrize(("variant", "compact"), cases)


def reduction_for(variant, compact):
    """A line search needs the gradient of what it trains."""
    return "sum" if compact and variant.inner is LBFGS else "mean"


class Run:
    """Training of two parameters, the rows of the first tied, on losses that depend on the step alone.

    A variant whose optimizer takes a closure by need gets one, and one that takes only sparse gradients gets
    those.
    """

    def __init__(self, variant, ties=None, dtype=torch.float32, compact=False):
        self.variant = variant
        self.params = [parameter(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(SHAPES)]
        # A tensor learning rate is written in place by schedulers, and would be shared by all runs.
        self.optimizer = variant.inner(self.params, **copy.deepcopy(variant.kwargs))
        if ties is not None:
            ties = {self.params[number]: groups for number, groups in ties.items()}
            TiedOptimizer(self.optimizer, ties, reduction=reduction_for(variant, compact), compact=compact)

    @classmethod
    def tied(cls, variant, **kwargs):
        return cls(variant, ties={0: GROUPS}, **kwargs)

    def loss(self, step):
        """A sum over entries, so that the parameters do not act on each other."""
        loss = 0.0
        for number, param in enumerate(self.optimizer.param_groups[0]["params"]):
            used = param
            target = randn(*param.shape, seed=50 + 2 * step + number, dtype=param.dtype)
            if self.variant.inner is SparseAdam:
                rows = torch.tensor([step % len(param), (step + 1) % len(param), step % len(param)])
                used, target = embedding(rows, param, sparse=True), target[rows]
            loss = loss + (used - target).abs().pow(2).sum()
        # What is maximised needs a maximum.
        return -loss if self.variant.kwargs.get("maximize") else loss

    def closure(self, step):
        def closure():
            self.optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            return loss

        return closure

    def step(self, step, closure=False):
        if closure or self.variant.inner is LBFGS:
            return self.optimizer.step(self.closure(step))
        self.closure(step)()
        return self.optimizer.step()

    def train(self, steps, closure=False):
        for step in steps:
            self.step(step, closure=closure)
        return self

    @property
    def result(self):
        """All that a run leaves behind, but for the fingerprints of the ties."""
        state = self.optimizer.state_dict()
        state.pop("tieopt", None)
        return [[param.detach() for param in self.optimizer.param_groups[0]["params"]], state]


def test_the_database_holds_every_optimizer_of_torch():
    public = {getattr(torch.optim, name) for name in torch.optim.__all__ if name not in ("Optimizer", "lr_scheduler")}
    classes = {value for value in public if isinstance(value, type)}

    assert classes == {info.optim_cls for info in optim_db}


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other versions have other settings")
def test_the_database_has_91_settings_and_192_with_their_implementations():
    bare = those(lambda variant: not {"foreach", "fused"} & set(variant.kwargs))

    assert (len(optim_db), len(bare.args[1]), len(VARIANTS)) == (15, 91, 192)


# --- the ties, and what is not tied ---


@every_variant
def test_the_ties_are_kept_to_the_last_bit_over_many_steps(compact, variant):
    run = Run.tied(variant, compact=compact)
    (weight, other), start = run.params, bits(run.params[0])
    for step in range(STEPS):
        run.step(step)

        assert tied_bitwise(weight)
        assert bool(weight.isfinite().all())
    assert not tied_bitwise(weight, [[0, 1]])
    assert not tied_bitwise(weight, [[2, 4]])
    assert not torch.equal(bits(weight), start)
    assert not tied_bitwise(other, [[0, 1]])


@every_variant
def test_without_ties_a_run_is_bit_for_bit_that_of_the_bare_optimizer(variant):
    bare, tied = Run(variant), Run(variant, ties={})
    bare.train(range(STEPS))
    tied.train(range(STEPS))

    assert isinstance(tied.optimizer, TiedOptimizer)
    assert same_tree(tied.result, bare.result)


@a_sample(lambda variant: variant.inner is not LBFGS)
def test_a_parameter_without_ties_is_bit_for_bit_that_of_the_bare_optimizer(compact, variant):
    bare, tied = Run(variant), Run.tied(variant, compact=compact)
    bare.train(range(STEPS))
    tied.train(range(STEPS))

    assert same_bits(tied.params[1], bare.params[1])
    assert same_tree(tied.optimizer.state[tied.params[1]], bare.optimizer.state[bare.params[1]])


@a_sample(lambda variant: variant.info.supports_complex and not variant.kwargs.get("fused"))
def test_complex_parameters_are_kept_tied_to_the_last_bit(compact, variant):
    run = Run.tied(variant, dtype=torch.complex64, compact=compact)
    for step in range(3):
        run.step(step)

        assert tied_bitwise(run.params[0])
        assert bool(run.params[0].isfinite().all())


@a_sample(lambda variant: variant.inner is not SparseAdam)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_kept_tied_to_the_last_bit(compact, variant, dtype):
    run = Run.tied(variant, dtype=dtype, compact=compact)
    for step in range(3):
        run.step(step)

        assert tied_bitwise(run.params[0])


# --- closures ---


@a_sample()
def test_a_step_with_a_closure_is_bit_for_bit_the_step_without(compact, variant):
    without, within = Run.tied(variant, compact=compact), Run.tied(variant, compact=compact)
    without.train(range(4))
    for step in range(4):
        loss = within.step(step, closure=True)

        assert loss is not None
        assert tied_bitwise(within.params[0])
    assert same_tree(within.result, without.result)


# --- automatic mixed precision ---


@a_sample()
def test_scaled_gradients_keep_the_ties_and_a_skipped_step_changes_nothing(compact, variant):
    run = Run.tied(variant, compact=compact)
    weight, scaler = run.params[0], GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        before = bits(weight)
        run.optimizer.zero_grad()
        scaler.scale(run.loss(step)).backward()
        spoilt = step == 2
        if spoilt:
            values = weight.grad._values() if weight.grad.is_sparse else weight.grad
            values[0, 0] = float("inf")
        # The scaler takes a closure by position only, and leaves its scale to it.
        scaler.step(run.optimizer, *[run.closure(step)] * (variant.inner is LBFGS))
        scaler.update()

        assert tied_bitwise(weight)
        assert torch.equal(bits(weight), before) == spoilt
        assert bool(weight.isfinite().all())


# --- schedulers ---


def scheduled_rates(run, build):
    scheduler = build(run.optimizer)
    settings = []
    for step in range(3):
        run.optimizer.step(*[lambda: 0.0] * (run.variant.inner is LBFGS))
        advance(scheduler, step)
        settings.append(settings_of(run.optimizer))
    return settings


def cycles(name, variant):
    """Whether a scheduler that wants to cycle a momentum finds one."""
    return name not in ("CyclicLR", "OneCycleLR") or bool({"momentum", "betas"} & set(Run(variant).optimizer.defaults))


@a_sample()
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR of older versions warns of itself.
def test_all_schedulers_set_the_learning_rates_of_the_bare_optimizer(compact, variant):
    for name, build in SCHEDULERS.items():
        if cycles(name, variant):
            expected = scheduled_rates(Run(variant), build)

            assert same_tree(scheduled_rates(Run.tied(variant, compact=compact), build), expected), name


@a_sample()
def test_the_ties_are_kept_under_a_scheduler_that_was_built_before_them(compact, variant):
    run = Run(variant)
    scheduler = SCHEDULERS["CosineAnnealingLR"](run.optimizer)
    TiedOptimizer(run.optimizer, {run.params[0]: GROUPS}, reduction=reduction_for(variant, compact), compact=compact)
    for step in range(4):
        run.step(step)
        scheduler.step()

        assert tied_bitwise(run.params[0])


# --- save and load ---


def resumed(run, file, twin):
    """The twin with the weights and the state of a run, through a file."""
    torch.save([[param.detach() for param in run.params], run.optimizer.state_dict()], file)
    file.seek(0)
    params, state = torch.load(file, weights_only=True)
    for param, saved in zip(twin.params, params, strict=True):
        param.data.copy_(saved)
    twin.optimizer.load_state_dict(state)
    return twin


@a_sample()
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(compact, variant):
    run = Run.tied(variant, compact=compact).train(range(4))
    twin = resumed(run, io.BytesIO(), Run.tied(variant, compact=compact))
    run.train(range(4, 8))
    twin.train(range(4, 8))

    assert same_tree(twin.result, run.result)
    assert tied_bitwise(twin.params[0])


def averaged(result):
    """What a run leaves behind, but with the mean of the members in the state of the tied parameter."""
    params, state = result
    entries = {
        key: mean_gradient(value) if torch.is_tensor(value) and value.shape == SHAPES[0] else value
        for key, value in state["state"].get(0, {}).items()
    }
    return [params, {**state, "state": {**state["state"], **({0: entries} if entries else {})}}]


@pytest.mark.parametrize("variant", list({param.id: param for param, _ in sampled()}.values()))
def test_states_are_exchanged_with_the_bare_optimizer(variant):
    bare, tied = Run(variant).train(range(3)), Run.tied(variant).train(range(3))

    to_bare = resumed(tied, io.BytesIO(), Run(variant))
    to_tied = resumed(bare, io.BytesIO(), Run.tied(variant))

    assert same_tree(to_bare.result, tied.result)
    assert same_tree(to_tied.result, averaged(bare.result))
    assert tied_bitwise(to_tied.train(range(3, 6)).params[0])


# --- deepcopy and pickle ---


def continued_copy(run, copied):
    """Trains a copy of a run's optimizer, apart from the run."""
    twin = copy.copy(run)
    twin.optimizer = copied(run.optimizer)
    twin.params = twin.optimizer.param_groups[0]["params"]
    return twin.train(range(4, 8))


@a_sample(lambda variant: variant.inner is not LBFGS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_goes_on_bit_for_bit_and_leaves_the_original_alone(compact, variant, copied):
    run = Run.tied(variant, compact=compact).train(range(4))
    before = copy.deepcopy(run.result)
    twin = continued_copy(run, copied)

    assert same_tree(run.result, before)
    run.train(range(4, 8))
    assert same_tree(twin.result, run.result)
    assert tied_bitwise(twin.params[0])


@those(lambda variant: variant.inner is LBFGS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_optimizer_that_torch_copies_without_its_attributes_fails_as_the_bare_one_does(variant, copied):
    # torch keeps the groups, the state and the defaults of an optimizer, and not the list LBFGS._params.
    errors = []
    for run in (Run(variant), Run.tied(variant)):
        with pytest.raises(AttributeError) as caught:
            continued_copy(run, copied)
        errors.append(str(caught.value).replace("Tied", ""))

    assert errors[0] == errors[1]


# --- differentiable and capturable ---


@those(
    lambda variant: "differentiable" in variant.info.supported_impls and not {"foreach", "fused"} & set(variant.kwargs)
)
def test_a_differentiable_step_keeps_the_ties_and_the_graph(variant):
    start = parameter(*SHAPES[0])
    weight = start.clone()
    optimizer = variant.inner([weight], **variant.kwargs, differentiable=True)
    TiedOptimizer(optimizer, {weight: GROUPS})
    # One step: after a second one torch itself cannot go back through the states of some optimizers.
    weight.grad = randn(*SHAPES[0], seed=1)
    optimizer.step()
    assert tied_bitwise(weight)
    (gradient,) = torch.autograd.grad(weight, start, randn(*SHAPES[0], seed=2))

    # The weights were tied before the step, so that what comes back to the start is tied.
    assert tied_bitwise(gradient)
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


@those(lambda variant: variant.info.has_capturable_arg and not {"foreach", "fused"} & set(variant.kwargs))
def test_a_capturable_optimizer_answers_on_the_cpu_as_the_bare_one_does(variant):
    capturable = variant._replace(kwargs={**variant.kwargs, "capturable": True})
    answers = []
    for run in (Run(capturable), Run(capturable, ties={0: GROUPS})):
        try:
            run.train(range(2))
        except AssertionError as error:
            answers.append(str(error))
        else:
            answers.append("ran")

    assert answers[0] == answers[1]
    assert tied_bitwise(run.params[0])
