"""Random sequences of all that happens to an optimizer, against the slow reference."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import SlowTraining, all_tied, slowly_tied
from strategies import Recipe, labels, loss_of, normal, reductions, seeds, small_shapes, spelled
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR

from tieopt import Tie, TiedOptimizer

# One of the rules writes to weights, and leaves members unequal.
pytestmark = pytest.mark.filterwarnings("ignore:Tied weights were replaced")

# Both kinds of gradient scaling are here: fused optimizers unscale by themselves, the others are unscaled.
RECIPES = [
    Recipe(torch.optim.SGD, {"lr": 0.05}),
    Recipe(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    Recipe(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    Recipe(torch.optim.Adam, {"lr": 0.05, "foreach": True, "amsgrad": True}),
    Recipe(torch.optim.AdamW, {"lr": 0.05, "fused": True}),
    Recipe(torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5}),
    Recipe(torch.optim.Adagrad, {"lr": 0.05, "foreach": True}),
    Recipe(torch.optim.Adamax, {"lr": 0.05}),
]
DECAY = 0.9


class TiedTrainingBehavesAsTheReference(RuleBasedStateMachine):
    """One tied training and its slow twin, to which everything happens alike."""

    compact = False

    @initialize(
        data=st.data(),
        recipe=st.sampled_from(RECIPES),
        reduction=reductions,
        shapes=st.lists(st.tuples(st.integers(1, 6), small_shapes), min_size=1, max_size=2),
        own_groups=st.booleans(),
        seed=seeds,
    )
    def begin(
        self, data: st.DataObject, recipe: Recipe, reduction: str, shapes: list[Any], own_groups: bool, seed: int
    ) -> None:
        starts = [normal((count, *rest), torch.float64, seed + i) for i, (count, rest) in enumerate(shapes)]
        names = [data.draw(labels(len(start))) for start in starts]

        def build(parameters: list[Parameter]) -> torch.optim.Optimizer:
            return recipe([{"params": [p]} for p in parameters] if own_groups else parameters)

        self.slow = SlowTraining(starts, names, build, reduction)
        self.parameters = [Parameter(start.clone()) for start in starts]
        ties = {p: data.draw(spelled(each)) for p, each in zip(self.parameters, names, strict=True)}
        self.optimizer = TiedOptimizer(build(self.parameters), ties, reduction=reduction, compact=self.compact)
        self.scheduler = ExponentialLR(self.optimizer, DECAY)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        # Skipping its first step, torch's fused SGD keeps a momentum that was never written, tied or not.
        self.skips_cleanly = not (recipe.settings.get("fused") and "momentum" in recipe.settings)
        # Adagrad of torch 2.6 has no state for parameters that are added later.
        self.takes_parameters = recipe.optimizer is not torch.optim.Adagrad or torch.__version__ >= (2, 7)
        self.stepped = False
        self.saved: tuple[bytes, Any, int] | None = None
        # Which parameters were written to from outside, and not been tied since.
        self.written = [False] * len(starts)

    # -- gradients and steps -----------------------------------------------------------------------------------

    @rule(seed=seeds, only=st.sampled_from([slice(None), slice(0, 1)]))
    def backward(self, seed: int, only: slice) -> None:
        loss_of(self.parameters[only], seed).backward()
        loss_of(self.slow.parameters[only], seed).backward()

    @rule()
    def step(self) -> None:
        assert self.optimizer.step() is None
        self.slow.step()
        self._has_stepped()

    @rule(seed=seeds, by_name=st.booleans())
    def step_with_a_closure(self, seed: int, by_name: bool) -> None:
        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.parameters, seed)
            loss.backward()
            return loss

        def slow_closure() -> torch.Tensor:
            self.slow.optimizer.zero_grad()
            loss = loss_of(self.slow.parameters, seed)
            loss.backward()
            return loss

        if any(self.written) and (self.compact or any(parameter.grad is not None for parameter in self.parameters)):
            # Written weights are tied before the closure where there are gradients by then, or shared values, else
            # after it. The reference ties them after it.
            self.tie_weights()
        expected = loss_of(self.parameters, seed)
        returned = self.optimizer.step(closure=closure) if by_name else self.optimizer.step(closure)
        assert torch.equal(returned, expected)
        self.slow.step(slow_closure)
        self._has_stepped()

    @rule()
    def tie_gradients(self) -> None:
        self.optimizer.tie_gradients()
        self.slow.tie_gradients()

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=to_none)
        self.slow.optimizer.zero_grad(set_to_none=to_none)

    @rule(seed=seeds, infinite=st.booleans(), where=st.integers(0, 100), to_none=st.booleans())
    def scaled_step(self, seed: int, infinite: bool, where: int, to_none: bool) -> None:
        infinite = infinite and self.skips_cleanly
        self.zero_grad(to_none=True)
        self.scaler.scale(loss_of(self.parameters, seed)).backward()
        if infinite:
            gradient = self.parameters[where % len(self.parameters)].grad
            gradient.view(-1)[where % gradient.numel()] = math.inf
            before = [parameter.detach().clone() for parameter in self.parameters]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if infinite:
            for parameter, weight, written in zip(self.parameters, before, self.written, strict=True):
                assert written or torch.equal(parameter, weight)
        else:
            loss_of(self.slow.parameters, seed).backward()
            self.slow.step()
            self._has_stepped()
        self.zero_grad(to_none=to_none)
        if infinite:
            self.tie_weights()
            self._give_gradients_alike()

    def _give_gradients_alike(self) -> None:
        """Zero gradients stay None in the twin, which never had any; make them agree."""
        for parameter, slow in zip(self.parameters, self.slow.parameters, strict=True):
            slow.grad = None if parameter.grad is None else torch.zeros_like(slow)

    # -- hyperparameters ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.stepped)
    @rule()
    def schedule(self) -> None:
        self.scheduler.step()
        for group in self.slow.optimizer.param_groups:
            group["lr"] *= DECAY

    @precondition(lambda self: len(self.parameters) < 4 and self.takes_parameters)
    @rule(shape=st.tuples(st.integers(1, 4), small_shapes), seed=seeds, rate=st.sampled_from([0.01, 0.02]))
    def add_param_group(self, shape: Any, seed: int, rate: float) -> None:
        weight = normal((shape[0], *shape[1]), torch.float64, seed)
        self.parameters.append(Parameter(weight.clone()))
        self.written.append(False)
        self.optimizer.add_param_group({"params": [self.parameters[-1]], "lr": rate})
        self.slow.add(weight, rate)

    # -- copies ------------------------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        file = io.BytesIO()
        torch.save(
            {
                "weights": [parameter.detach() for parameter in self.parameters],
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "written": self.written,
            },
            file,
        )
        self.saved = file.getvalue(), self.slow.snapshot(), len(self.parameters)

    @precondition(lambda self: self.saved is not None and self.saved[2] == len(self.parameters))
    @rule()
    def load(self) -> None:
        saved, snapshot, _ = self.saved
        saved = torch.load(io.BytesIO(saved), weights_only=True)
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, saved["weights"], strict=True):
                parameter.copy_(weight)
                parameter.grad = None
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        self.written = saved["written"]
        self.slow.go_back_to(snapshot)

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, way: str) -> None:
        whole = (self.parameters, self.optimizer, self.scheduler)
        copied = copy.deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))  # noqa: S301
        # What the original does from here on must not reach the copy.
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.fill_(math.nan)
        self.optimizer.param_groups[0]["lr"] = math.nan
        self.parameters, self.optimizer, self.scheduler = copied
        self.stepped = False  # Copies of any optimizer have forgotten it, and schedulers warn.
        assert isinstance(self.optimizer, TiedOptimizer)
        for parameter in self.slow.parameters:  # Parameters are copied without their gradients.
            parameter.grad = None

    # -- the outside -------------------------------------------------------------------------------------------

    @rule(seed=seeds, through_data=st.booleans())
    def write_to_the_weights(self, seed: int, through_data: bool) -> None:
        for i, (parameter, slow) in enumerate(zip(self.parameters, self.slow.parameters, strict=True)):
            noise = normal(parameter.shape, torch.float64, seed + i)
            with torch.no_grad():
                (parameter.data if through_data else parameter).add_(noise)
                slow.add_(noise)
            self.written[i] = True
        if self.compact and through_data:
            # Such writing leaves no trace. The mode cannot know of it, and asks to be told.
            self.tie_weights()

    @rule()
    def tie_weights(self) -> None:
        self.optimizer.tie_weights()
        self.slow.tie_weights()
        self.written = [False] * len(self.parameters)

    def _has_stepped(self) -> None:
        self.stepped = True
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self.written[i] = False

    # -- what holds at all times -------------------------------------------------------------------------------

    @invariant()
    def members_are_equal_unless_written_to(self) -> None:
        for parameter, names, written in zip(self.parameters, self.slow.labels, self.written, strict=True):
            assert written or all_tied(parameter, names)

    @invariant()
    def weights_and_gradients_are_those_of_the_reference(self) -> None:
        for parameter, slow, names in zip(self.parameters, self.slow.parameters, self.slow.labels, strict=True):
            torch.testing.assert_close(parameter.detach(), slow.detach(), rtol=1e-10, atol=1e-10)
            assert (parameter.grad is None) == (slow.grad is None)
            if slow.grad is not None:
                ours, theirs = parameter.grad, slow.grad
                if self.compact:
                    # It does not write what it reads: the members' gradients have the mean, and do not become it.
                    ours, theirs = slowly_tied(ours, names), slowly_tied(theirs, names)
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    @invariant()
    def settings_are_those_of_the_reference(self) -> None:
        ours, theirs = self.optimizer.param_groups, self.slow.optimizer.param_groups
        assert [len(group["params"]) for group in ours] == [len(group["params"]) for group in theirs]
        assert [group["lr"] for group in ours] == [group["lr"] for group in theirs]
        held = [parameter for group in ours for parameter in group["params"]]
        assert all(map(lambda ours, theirs: ours is theirs, held, self.parameters))


class CompactTrainingBehavesAsTheReference(TiedTrainingBehavesAsTheReference):
    """The same in the other mode."""

    compact = True


TestTiedTrainingBehavesAsTheReference = TiedTrainingBehavesAsTheReference.TestCase
TestCompactTrainingBehavesAsTheReference = CompactTrainingBehavesAsTheReference.TestCase

# --- both modes side by side ---

# Joined parameters have no free entry: with one, they would begin apart where only one of them was trained before.
TIES = {
    "none": lambda first, second: (),
    "one": lambda first, second: {first: [[0, 2], [1, 3]]},
    "signs": lambda first, second: Tie(first, [[0, 1, 3]], scale=torch.tensor([1.0, -1.0, 1.0, -1.0])),
    "pinned": lambda first, second: Tie(first, [[0, 1, 2]], scale=torch.tensor([1.0, 0.0, 1.0, 1.0])),
    "both": lambda first, second: {first: [[0, 1, 2, 3]], second: [[1, 2]]},
    "joined": lambda first, second: Tie.join(Tie(first, torch.tensor([0, 1, 2, 0])), Tie(second, torch.arange(3))),
}
SIDE_BY_SIDE = [
    Recipe(torch.optim.SGD, {"lr": 0.5, "momentum": 0.5}),
    Recipe(torch.optim.Adam, {"lr": 0.1}),
    Recipe(torch.optim.Rprop, {"lr": 0.1}),
    Recipe(torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}),
]
events = st.one_of(
    st.tuples(st.just("freeze"), st.sampled_from([(True, False), (False, True), (True, True), (False, False)])),
    st.tuples(st.just("step"), st.integers(0, 9)),
    st.tuples(st.just("retie"), st.sampled_from(sorted(TIES))),
    st.tuples(st.just("untie"), st.none()),
    st.tuples(st.just("load a bare state"), st.integers(0, 9)),
    st.tuples(st.just("save"), st.none()),
    st.tuples(st.just("load"), st.sampled_from(["own", "other"])),
)


class InBothModes:
    """One training in each mode, to which everything happens alike."""

    def __init__(self, recipe: Recipe, ties: str, reduction: str) -> None:
        self.recipe = recipe
        self.weights, self.optimizers = [], []
        for compact in (False, True):
            weights = [Parameter(normal((count,), torch.float64, count)) for count in (4, 3)]
            self.weights.append(weights)
            drawn = TIES[ties](*weights)
            self.optimizers.append(TiedOptimizer(recipe(weights), drawn, reduction=reduction, compact=compact))
        self.saved = None

    def happens(self, what: str, how: Any) -> None:
        outcomes = []
        for number, (weights, optimizer) in enumerate(zip(self.weights, self.optimizers, strict=True)):
            try:
                self._happens(what, how, number, weights, optimizer)
                outcomes.append(None)
            except (ValueError, RuntimeError) as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        if what == "save" and outcomes == [None, None]:
            self.saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]

    def _happens(self, what: str, how: Any, number: int, weights: list[Parameter], optimizer: TiedOptimizer) -> None:
        if what == "freeze":
            for weight, frozen in zip(weights, how, strict=True):
                weight.requires_grad_(not frozen)
        elif what == "step":
            for seed, weight in enumerate(weights):
                weight.grad = normal(weight.shape, torch.float64, 2 * how + seed) if weight.requires_grad else None
            optimizer.step()
        elif what == "retie":
            optimizer.retie(TIES[how](*weights))
        elif what == "untie":
            optimizer.untie()
        elif what == "load a bare state":
            others = [Parameter(normal(weight.shape, torch.float64, how)) for weight in weights]
            bare = self.recipe(others)
            for step in range(2):
                for other in others:
                    other.grad = normal(other.shape, torch.float64, how + step)
                bare.step()
            optimizer.load_state_dict(bare.state_dict())
        elif what == "load" and self.saved is not None:
            optimizer.load_state_dict(copy.deepcopy(self.saved[number if how == "own" else 1 - number]))

    def assert_alike(self) -> None:
        for first, second in zip(*self.weights, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


@given(
    recipe=st.sampled_from(SIDE_BY_SIDE),
    ties=st.sampled_from(sorted(TIES)),
    reduction=reductions,
    history=st.lists(events, min_size=4, max_size=16),
)
def test_whatever_happens_both_modes_do_the_same(recipe: Recipe, ties: str, reduction: str, history: list[Any]) -> None:
    training = InBothModes(recipe, ties, reduction)
    for what, how in history:
        training.happens(what, how)
        training.assert_alike()
    training.happens("freeze", (False, False))
    for seed in (10, 11):
        training.happens("step", seed)
        training.assert_alike()
