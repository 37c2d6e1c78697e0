"""What both modes share: ties, options, what a checkpoint says of them, and what surrounds the step of an optimizer."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from itertools import accumulate, chain
from operator import attrgetter, itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from tieopt.engine.agreement import agree
from tieopt.engine.engine import Engine
from tieopt.engine.graphs import Copies, between_graphs, is_capturing, is_under_compiler, untraced
from tieopt.errors import message, refusal, shown, users_level
from tieopt.modes.gradients import with_gradients
from tieopt.modes.state import Lost, held_optimizers, settings_in, tied_state
from tieopt.numbers.reduction import Operation, project_, relax_
from tieopt.numbers.start import Start, check_start
from tieopt.tensors import traces, where_in_memory
from tieopt.ties.options import EXACT, Options, Reduction, check_options
from tieopt.ties.part import check_writable
from tieopt.ties.places import (
    BoundTie,
    ParamGroups,
    Standing,
    all_places,
    bind_ties,
    check_apart,
    check_moved,
    check_read_as_stored,
    name_of,
    parameters_of,
    settings_across,
    standing,
    still_there,
)
from tieopt.ties.slices import Totals, described, fingerprint, groups_of_members, has_shared_values, is_idle

Pairs = Sequence[tuple[BoundTie, list[Tensor]]]

# Optimizers that compare how the loss changes with what the gradient says, by their names: a line search of LBFGS, the
# step size of AliG. tests/test_third_party.py looks for more by running them on other losses with the same gradients.
_COMPARES_LOSS = {"LBFGS", "AliG"}

# Attributes that copies and pickles of a mode have; the rest belongs to the steps of one optimizer.
_COPIED = ("options", "relaxed", "steps", "ties", "applied", "totals", "saves_compact", "without_rows")

# Without a Python call for each of many parameters.
_graph_of = attrgetter("grad_fn")

_PROJECT, _PROJECT_STEPPED = Operation(project_), Operation(project_, stepped=True)


class Mode(ABC):
    """All the ties of an optimizer, and how they are applied.

    Args:
        param_groups: of the optimizer.
        ties: a mapping ``{parameter or name: groups}``, a :class:`Tie`, or an iterable of them.
        options: of ties for which nothing else was said.

    Attributes:
        options: of ties for which nothing else was said.
        relaxed: whether a tie is approximate, or would be if there were one.
        steps: how many there were, for relaxed ties.
        ties: as they were given, bound to the places of their parameters.
        across: the ranks across which there are ties, as the first of these knows them; None if there is no such tie.
        process_groups: of these ranks; one, or none.
        saves_compact: whether a ``state_dict`` has the state of compact parameters.
        without_rows: the places of parameters whose compact ones have no entries.
        applied: the ties as the mode applies them.
        totals: the counts of ties whose labels are sharded, over all ranks.
        engine: the numbers.
        inner_copies: of the methods of the optimizer that ``torch.compile`` gets.
        running: whether a step, or another method of the optimizer, is running.
        captured: whether a step was captured in a CUDA graph.
        set_aside: the model's parameters that compact ones replace now, by the identities of the compact ones.
        lock: held while they are replaced.
        norm_weights: what :mod:`~tieopt.modes.norm` has worked out for ties.

    Raises:
        TypeError, IndexError, ValueError: as :class:`~tieopt.TiedOptimizer` says.
    """

    compact: ClassVar[bool]
    # The reduction that gives the true gradient of what this mode trains.
    true_reduction: ClassVar[Reduction]
    step_class: ClassVar[type[Step]]

    def __init__(self, param_groups: ParamGroups, ties: Any, options: Options = EXACT) -> None:
        check_options(options, of_optimizer=True)
        self.options = options
        self.steps = 0
        self.ties = bind_ties(param_groups, ties, options=options)
        _check_across(self.ties)
        if self.compact and any(tie.labels_are_sharded for tie in self.ties):
            what, expected = "The compact mode takes no sharded labels.", "compact=False, or labels of all slices"
            raise refusal(ValueError, what, expected=expected, got="labels that are a DTensor")
        self.totals: dict[BoundTie, Totals] = {}
        self.saves_compact = self.compact
        self.without_rows: frozenset[tuple[int, int]] = frozenset()
        self.relaxed = any(tie.options.relaxed for tie in self.ties) if self.ties else options.relaxed
        self.applied: Sequence[BoundTie] = self.ties
        self.reset()

    def reset(self) -> None:
        """Begin without anything that belongs to the steps of one optimizer."""
        self.across = next((tie.across for tie in self.ties if tie.across is not None), None)
        self.process_groups = [] if self.across is None else [self.across.process_group]
        self.engine = Engine()
        self.inner_copies = Copies()
        self.running = False
        self.set_aside: Mapping[int, Tensor] = {}
        self.lock = threading.RLock()
        self.captured = False
        self._replaced: Mode | None = None
        self._seen: dict[BoundTie, list[tuple[object, ...]]] = {}
        self._fingerprints: dict[tuple[BoundTie, tuple[int, ...], torch.dtype], str] = {}
        self.norm_weights: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
        self._pairs: Pairs | None = None
        self._stood: Standing = {}
        self._where: list[tuple[object, ...]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()

    def param_groups_of(self, optimizer: Any) -> ParamGroups:
        """Return the parameter groups with the parameters of the model, also in the middle of a step."""
        param_groups: ParamGroups = optimizer.param_groups
        if not self.set_aside:
            return param_groups
        return [
            {**settings, "params": [self.set_aside.get(id(param), param) for param in settings["params"]]}
            for settings in param_groups
        ]

    def follow(self, optimizer: Any) -> None:  # noqa: B027
        """Let the state follow parameters that were replaced, where it goes by their places."""

    def clear_set_aside(self, param_groups: ParamGroups) -> None:
        """Clear the gradients of what is set aside as those of what stands in its place were."""
        if not self.set_aside:
            return
        for settings in param_groups:
            for stand_in in settings["params"]:
                param = self.set_aside.get(id(stand_in))
                if param is None or param.grad is None:
                    continue
                if stand_in.grad is None:
                    param.grad = None
                else:
                    param.grad.detach_().zero_()

    # --- what a mode does in its own way ---

    def at_rest(self, optimizer: Any, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes of an optimizer as they are between steps."""
        return attributes

    def check_served(self, optimizer: Any) -> None:
        """Refuse an optimizer that the mode cannot serve, before anything is written.

        Raises:
            ValueError: it compares the loss with gradients that would not be of what it trains, or across ranks.
        """
        comparing = class_among(optimizer, _COMPARES_LOSS)
        if comparing is None:
            return
        if self.process_groups:
            what = f"{comparing} compares the loss with its gradient, and each rank has a loss of its own."
            expected = "an optimizer that does not look at the loss, such as AdamW"
            raise refusal(ValueError, what, expected=expected, got="ties across ranks")
        for tie in self.ties:
            is_other = tie.options.reduction != self.true_reduction and not tie.options.relaxed
            # A rank knows its own of sharded labels, and all ranks have to refuse them.
            if is_other and (tie.labels_are_sharded or (not is_idle(tie.slices) and has_shared_values(tie.slices))):
                raise refusal(
                    ValueError,
                    f"{comparing} compares the loss with its gradient, which has to be that of what it trains.",
                    expected="reduction='mean' with compact=False, or reduction='sum' with compact=True",
                    got=f"reduction={tie.options.reduction!r}, compact={self.compact}",
                )

    def check_method(self, optimizer: Any, method: Callable[..., Any]) -> None:  # noqa: B027
        """Refuse a method of an optimizer that the mode cannot follow, before anything is written."""

    def state_within(self, optimizer: Any, state: Mapping[Any, Any], start: Start, lost: Lost | None) -> dict[Any, Any]:
        """Return the state that takes the place of that of an optimizer without ties.

        Args:
            optimizer: to be tied.
            state: of it, or of an optimizer that it holds.
            start: what the shared values start from.
            lost: gets what cannot be converted, which is an error without it.
        """
        # Other ranks may have a state where this one has none.
        if not state and self.across is None:
            return {}
        pairs, settings = self.parameters(optimizer.param_groups), settings_in(optimizer.param_groups)
        pairs = [pair for pair in pairs if not pair[0].options.relaxed]
        # Also that of frozen parameters, which may be trained again.
        return {**state, **tied_state(state, pairs, settings, start)}

    def state_without(self, optimizer: Any, state: Mapping[Any, Any], lost: Lost) -> dict[Any, Any]:
        """Return the state as an optimizer without ties has it; arguments as for :meth:`state_within`."""
        return dict(state)

    # --- the weights ---

    def bind(
        self, optimizer: Any, states: Sequence[Mapping[Any, Any]], start: Start, lost: Lost | None = None
    ) -> list[dict[Any, Any]]:
        """Tie the weights of an optimizer, and return what takes the places of its states.

        Args:
            optimizer: to be tied.
            states: of it, and of the optimizers that it holds.
            start: what the shared values start from.
            lost: as for :meth:`state_within`.
        """
        check_start(start, relaxed=self.relaxed and all(tie.options.relaxed for tie in self.ties))
        pairs = self.parameters(optimizer.param_groups)
        for tie, params in pairs:
            if tie.across is not None:
                settings = settings_across(tie, optimizer.param_groups)
                action = f"tie, start={start!r}, requires_grad={params[0].requires_grad}"
                agree(tie.across, action, {"optimizer": type(optimizer).__name__, **settings})
        # Compiled now, and not while a step is captured.
        self.engine.prepare(pairs)
        self.engine.prepare([(tie.linear, params) for tie, params in pairs if not tie.is_linear])
        self.totals = {tie: self.engine.totals(tie, params) for tie, params in pairs if tie.labels_are_sharded}
        self._warn_of_idle_across(pairs)
        self.check_served(optimizer)
        changed = [self.state_within(optimizer, state, start, lost) for state in states]
        self.tie_all(optimizer, start, exactly=False)
        return changed

    def _warn_of_idle_across(self, pairs: Pairs) -> None:
        for tie, params in pairs:
            if tie.across is None:
                continue
            _, members = self.engine.members_across(tie, params)
            if len(members) and int(members.max()) == 1:
                what = f"A tie across ranks ties nothing: {', '.join(tie.names)}."
                expected = "labels of which some are on several ranks"
                warnings.warn(message(what, expected=expected), stacklevel=users_level())
        for tie, totals in self.totals.items():
            if 0 < totals.members == totals.groups:
                what = f"A tie of sharded labels ties nothing: {', '.join(tie.names)}."
                got = groups_of_members(totals.groups, totals.members)
                expected = "a label that occurs twice, on whatever rank"
                warnings.warn(message(what, expected=expected, got=got), stacklevel=users_level())

    def replace(self, other: Mode, states: Sequence[Mapping[Any, Any]]) -> None:
        """Take the place of the ties that an optimizer had.

        Args:
            other: these ties.
            states: of the optimizer, and of those that it holds, from now on.
        """
        self.steps = other.steps
        # A CUDA graph that has captured one of their steps goes on to use their tensors, which therefore stay.
        self._replaced = other if other.captured else other._replaced
        # What was compiled for tensors that are still there goes on.
        self.engine.copies = other.engine.copies
        # The inner step is compiled for its state and parameters, and the compact ones are new.
        if not self.compact and not any(states):
            self.inner_copies = other.inner_copies

    @untraced
    def parameters(self, param_groups: ParamGroups) -> list[tuple[BoundTie, list[Tensor]]]:
        """Return the ties with the parameters that stand in their places now.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, is gone, or has moved.
            ValueError: joined parameters have come to differ in what has to be the same.
        """
        pairs = parameters_of(self.ties, param_groups)
        check_moved(self.ties, self._stood, param_groups)
        return pairs

    def remember_places(self, param_groups: ParamGroups) -> None:
        """Remember where parameters stand that were added, or loaded, or are those of a copy."""
        # Another parameter may have the identity of one that is gone.
        alive = {key: stood for key, stood in self._stood.items() if stood[0]() is not None}
        self._stood = standing(self.ties, param_groups) | alive

    def taking_part(
        self, pairs: Pairs, param_groups: ParamGroups, *, stepped: Container[BoundTie] | None = None
    ) -> Pairs:
        """Return the ties of parameters of which at least one has a gradient, on any rank of a tie across them.

        Args:
            pairs: ties and their parameters.
            param_groups: of the optimizer.
            stepped: in a step, the ties that have taken part in it before. Of others, weights that something else has
                written on any rank are tied.

        Raises:
            RuntimeError: the ranks do something else, or have come to differ in the settings of the parameters.
        """
        if not self.process_groups:
            return with_gradients(pairs)
        chosen = {tie for tie, _ in with_gradients([pair for pair in pairs if pair[0].across is None])}
        for pair in pairs:
            tie, params = pair
            if tie.across is None:
                continue
            action = (
                f"{'look at gradients' if stepped is None else 'begin a step'}, requires_grad={params[0].requires_grad}"
            )
            # What a rank without members has is its own.
            takes_part = bool(with_gradients([pair])) and len(tie.across.labels) > 0
            begins = stepped is not None and tie not in stepped
            is_trained = params[0].requires_grad and not tie.options.relaxed
            is_written = begins and is_trained and bool(self.written([pair], param_groups))
            settings = settings_across(tie, param_groups)
            told = agree(tie.across, action, settings, (takes_part, is_written))
            if not any(takes_part for takes_part, _ in told):
                continue
            chosen.add(tie)
            if is_trained and any(is_written for _, is_written in told):
                self.tie_weights([pair])
                self.note([pair])
            if len(tie.across.labels) and not tie.options.relaxed:
                # They get gradients of zeros where they have none. No other tie joins them, see _check_across.
                chosen |= {other for other, (param, *_) in pairs if any(param is joined for joined in params)}
        return [pair for pair in pairs if pair[0] in chosen]

    def agree_to(self, action: str) -> None:
        """Refuse what the ranks that have ties with this one do not do as well; a collective.

        Raises:
            RuntimeError: a rank does something else.
        """
        if self.across is not None:
            agree(self.across, action)

    def applied_to(self, param_groups: ParamGroups) -> Pairs:
        """Return the ties as the mode applies them, with their parameters; raises as :meth:`parameters`."""
        if self._pairs is None or not still_there(self._pairs, param_groups):
            pairs = parameters_of(self.applied, param_groups)
            check_moved(self.ties, self._stood, param_groups)
            self._pairs, self._stood = pairs, standing(self.ties, param_groups)
        return self._pairs

    @between_graphs
    def tie_all(self, optimizer: Any, start: Start = "mean", *, exactly: bool = True) -> None:
        """Tie the parameters that are not frozen.

        Args:
            optimizer: of the parameters.
            start: what the shared values start from.
            exactly: also relaxed ties.
        """
        param_groups = self.param_groups_of(optimizer)
        trained = [pair for pair in self.parameters(param_groups) if pair[1][0].requires_grad]
        if exactly:
            self._check_memory(trained, param_groups)
        if start == "first":
            for tie, params in trained:
                if not tie.options.relaxed:
                    self.engine.start_from_first_(tie, params, tie.order)
        # What starts from the first members is tied already, and keeps its bits.
        for strength, pairs in [(1.0, trained)] if exactly else by_strength(trained):
            self.tie_weights(pairs, strength=strength)
        self._note_all(param_groups)

    @between_graphs
    def tie_weights(self, pairs: Pairs, *, strength: float = 1.0, stepped: bool = False) -> None:
        """Tie parameters; where a step has made them part of a graph, the projection is too.

        Args:
            pairs: ties and their parameters.
            strength: how far members are moved towards their mean.
            stepped: whether a step of the inner optimizer has just written them.
        """
        if any(map(_graph_of, chain.from_iterable(map(itemgetter(1), pairs)))):
            pairs = self._tie_graphs(pairs, strength)
        if strength == 1:
            self.engine.apply_(_PROJECT_STEPPED if stepped else _PROJECT, pairs)
        elif strength > 0:
            self.engine.apply_(Operation(relax_, stepped=stepped, strength=strength), pairs)

    @untraced
    def _tie_graphs(self, pairs: Pairs, strength: float) -> Pairs:
        """Tie the parameters that are part of a graph, and return the other ones."""
        graphs = [pair for pair in pairs if any(map(_graph_of, pair[1]))]
        for tie, params in graphs:
            with torch.enable_grad():
                for param, result in zip(params, self.engine.projected(tie, params), strict=True):
                    param.copy_(result if strength == 1 else param.lerp(result, strength))
        return [pair for pair in pairs if pair not in graphs]

    @untraced
    def pairs_of_calls(self, optimizer: Any) -> Pairs:
        """Return the ties that a method other than ``step()`` may write.

        These are also frozen ones that the optimizer has state of, unless somebody has written their members apart:
        frozen parameters stay as they are.
        """
        return [
            (tie, params)
            for tie, params in self.applied_to(optimizer.param_groups)
            if params[0].requires_grad
            or (
                tie.across is None
                and any(optimizer.state.get(param) for param in params)
                and self._is_still_tied(tie, params)
            )
        ]

    @untraced
    def note(self, pairs: Iterable[tuple[BoundTie, list[Tensor]]]) -> None:
        """Remember ties whose parameters are tied now."""
        self._seen.update(traces(pairs))

    @untraced
    def _note_all(self, param_groups: ParamGroups) -> None:
        self.note(pair for pair in self.applied_to(param_groups) if pair[1][0].requires_grad)

    def check_still_apart(self, param_groups: ParamGroups) -> None:
        """Refuse tied parameters that have come to share memory with others; looks for them where something has moved.

        Raises:
            ValueError: there is one.
        """
        where = [
            # Without a call for each of many.
            (param.data_ptr(), param.shape, param.stride())
            if type(param) is Parameter and param.layout is torch.strided
            else where_in_memory(param)
            for settings in param_groups
            for param in settings["params"]
        ]
        if where != self._where:
            check_apart(param_groups, self.ties)
            self._where = where

    @untraced
    def _check_memory(self, pairs: Pairs, param_groups: ParamGroups) -> None:
        """Refuse parameters that the mode cannot tie as they are in memory now.

        Raises:
            ValueError: entries share memory, or torch negates or conjugates them as it reads them.
        """
        for tie, params in pairs:
            for place, param in zip(tie.places, params, strict=True):
                check_writable(param, name_of(param_groups, place))
            check_read_as_stored(param_groups, tie, params)

    def written(self, pairs: Pairs, param_groups: ParamGroups) -> Pairs:
        """Return the ties whose parameters were replaced, moved or written to since they were noted.

        Warns if the members of a group are not equal any more.

        Raises:
            ValueError: a parameter can no longer be tied as it is in memory.
        """
        now = traces(pairs)
        changed = [(tie, params) for tie, params in pairs if now[tie] != self._seen.get(tie)]
        if changed:
            self._check_written(changed, now, param_groups)
        return changed

    def _check_written(self, changed: Pairs, now: Mapping[Any, Any], groups: ParamGroups) -> None:
        # The last entry of a trace counts writes.
        moved = [
            (tie, params)
            for tie, params in changed
            if [trace[:-1] for trace in now[tie]] != [trace[:-1] for trace in self._seen.get(tie, ())]
        ]
        self._check_memory(moved, groups)
        seen, there = set(), set()
        for tie, _ in changed:
            before = self._seen.get(tie)
            there |= {place[:2] for place in tie.places}
            # Values that were rounded to another dtype are no longer the same multiples.
            if before is not None and [trace[1] for trace in before] == [trace[1] for trace in now[tie]]:
                seen |= {place[:2] for place in tie.places}
        # As they were given, because the mode may apply several as one.
        for tie, params in self.parameters(groups):
            places = {place[:2] for place in tie.places}
            is_known = places <= there if tie.is_frozen else places <= seen and not tie.options.relaxed
            if is_known and not self._is_tied_here(tie, params):
                names = ", ".join(name_of(groups, place) for place in tie.places)
                _warn_of_written(names, is_frozen=tie.is_frozen)

    def _is_still_tied(self, tie: BoundTie, params: list[Tensor]) -> bool:
        """Whether parameters are tied, as far as that can be asked: not of shards, whose ranks would have to talk."""
        return not self.engine.whole([(tie, params)]) or self._is_tied_here(tie, params)

    def _is_tied_here(self, tie: BoundTie, params: list[Tensor]) -> bool:
        """Whether parameters are tied, as far as this rank can tell."""
        unknown = any(map(_graph_of, params)) or is_capturing()
        return unknown or self.engine.is_tied_here(tie, [param.detach() for param in params])

    # --- what a checkpoint says ---

    def saved(self, param_groups: ParamGroups) -> dict[str, Any]:
        """Return what a ``state_dict`` says of the ties; nothing if there are none."""
        if not self.ties:
            return {}
        check_moved(self.ties, self._stood, param_groups)
        said: dict[str, Any] = {"ties": self.fingerprints(param_groups)}
        if self.relaxed:
            said["steps"] = self.steps
            if any(not tie.options.relaxed for tie in self.ties):
                said["relaxed"] = [text for tie, _, text in self._said_of_ties(param_groups) if tie.options.relaxed]
        if self.saves_compact:
            said["compact"] = True
        return said

    def to_save(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a ``state_dict`` of the optimizer as it is to be saved."""
        return state_dict

    def to_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a ``state_dict`` without what :meth:`to_save` has added."""
        return state_dict

    def fingerprints(self, param_groups: ParamGroups) -> dict[int, str]:
        """Return the fingerprints of the ties, for each parameter by the number that it has in a ``state_dict``."""
        by_number: dict[int, list[str]] = {}
        for _, numbers, text in self._said_of_ties(param_groups):
            for number in dict.fromkeys(numbers):
                by_number.setdefault(number, []).append(text)
        return {number: "; ".join(sorted(texts)) for number, texts in by_number.items()}

    def _said_of_ties(self, param_groups: ParamGroups) -> Iterator[tuple[BoundTie, tuple[int, ...], str]]:
        """Yield each tie, the numbers that its parameters have in a ``state_dict``, and its fingerprint."""
        before = [0, *accumulate(len(group["params"]) for group in param_groups)]
        for tie in self.ties:
            numbers = tuple(before[place.group] + place.position for place in tie.places)
            group, position, _ = tie.places[0]
            key = tie, numbers, param_groups[group]["params"][position].dtype
            if key not in self._fingerprints:
                slices = [part.frozen_in(key[2]) for part in tie.slices]
                shapes = [place.shape for place in tie.places]
                if tie.labels_are_sharded:
                    self._fingerprints[key] = self.totals[tie].fingerprint(numbers[0], slices[0].dim)
                else:
                    self._fingerprints[key] = fingerprint(slices, numbers, shapes, tie.across)
            yield tie, numbers, self._fingerprints[key]

    def tied_since(self, saved: Mapping[str, Any] | None, param_groups: ParamGroups) -> set[BoundTie]:
        """Return the exact ties that were relaxed when a state was saved, or of which it says nothing.

        Args:
            saved: what the state says of the ties; None if nothing.
            param_groups: of the optimizer.
        """
        exact = {tie for tie in self.ties if not tie.options.relaxed}
        if saved is None:
            return exact
        if "steps" not in saved:
            return set()
        relaxed = saved.get("relaxed")
        return {tie for tie, _, text in self._said_of_ties(param_groups) if relaxed is None or text in relaxed} & exact

    def check_saved(self, saved: Any, param_groups: ParamGroups) -> None:
        """Compare what a checkpoint says of its ties with these.

        Raises:
            ValueError: they differ, or it says nothing of ties.
        """
        if not isinstance(saved, Mapping) or not isinstance(saved.get("ties"), Mapping):
            raise refusal(
                ValueError,
                "The state does not say what its ties are.",
                expected="what state_dict() of a TiedOptimizer returned",
                got=shown(saved),
            )
        steps = saved.get("steps", 0)
        if not isinstance(steps, int):
            raise refusal(
                ValueError, "The state does not say how many steps there were.", expected="an integer", got=shown(steps)
            )
        # torch.distributed.checkpoint makes numbers strings, and puts what it has loaded beside what was there.
        ours, theirs = (
            {str(number): text for number, text in texts.items()}
            for texts in (self.fingerprints(param_groups), saved["ties"])
        )
        names = {str(number): name_of(param_groups, place) for number, place in enumerate(all_places(param_groups))}
        for number in {**ours, **theirs}:
            if ours.get(number) != theirs.get(number):
                raise refusal(
                    ValueError,
                    "The state was saved with other ties.",
                    parameter=names.get(number, f"number {number}"),
                    expected=ours.get(number, "no ties"),
                    got=f"{theirs.get(number, 'no ties')}\n"
                    "  To change the ties, tie as when it was saved, load the state, and then call retie(). What is\n"
                    "  frozen counts with its values: load the weights before the optimizer is wrapped.",
                )


def _warn_of_written(names: str, *, is_frozen: bool) -> None:
    if is_frozen:
        what = f"Frozen slices were written to: {names}. They go back to the values that they had when they were tied."
        expected = "weights that are loaded before the optimizer is wrapped; or retie(optimizer.ties) afterwards,\n"
        expected += "            which freezes what is there then"
    else:
        what = (
            "Tied weights were replaced or written to between two steps, and their members differ now: "
            f"{names}. They go on from their mean."
        )
        expected = "the same written to all members, or tie_weights() afterwards, as after loading untied weights;\n"
        expected += "            and no embedding with max_norm, whose lookups write to single rows; instead, after\n"
        expected += "            each step, weight.renorm_(...) in torch.no_grad(), and then tie_weights()"
    warnings.warn(message(what, expected=expected), stacklevel=users_level())


def _check_across(ties: Sequence[BoundTie]) -> None:
    """Refuse ties across ranks of which a rank cannot know alone whether they take part in a step, or with whom.

    Raises:
        ValueError: they are across several process groups, or one of their parameters is joined by another tie, too; or
            they are pulled together now and then.
    """
    across = [tie for tie in ties if tie.across is not None]
    groups = dict.fromkeys(tie.across.process_group for tie in across if tie.across is not None)
    if len(groups) > 1:
        expected = "one process group, of all ranks; those without members tie `Tie(param, [], across=process_group)`"
        got = f"ties across {len(groups)} process groups"
        raise refusal(ValueError, "An optimizer has ties across several process groups.", expected=expected, got=got)
    for tie in across:
        names, places = ", ".join(tie.names), {place[:2] for place in tie.places}
        if tie.options.every != 1:
            what, got = "Ties across ranks are pulled together after each step.", f"every={tie.options.every}"
            raise refusal(ValueError, what, parameters=names, expected="every=1", got=got)
        for other in ties:
            is_joined = other.across is not None or len(other.places) > 1
            if other is not tie and is_joined and places & {place[:2] for place in other.places}:
                what = "A parameter that is tied across ranks is joined by another tie, too."
                expected = "one tie for all of it, with labels or Tie.join"
                got = f"{described(tie.slices)}, and {described(other.slices)}"
                raise refusal(ValueError, what, parameters=names, expected=expected, got=got)


def class_among(optimizer: Any, names: Container[str]) -> str | None:
    """Return the name of a class that an optimizer, or one that it holds, is of, if it is one of these."""
    kinds = (kind.__name__ for held in [optimizer, *held_optimizers(optimizer)] for kind in type(held).__mro__)
    return next((kind for kind in kinds if kind in names), None)


def by_strength(pairs: Pairs) -> list[tuple[float, Pairs]]:
    """Return ties by how far a projection is to move their weights."""
    # In an order that is the same on all ranks.
    strengths = sorted({tie.options.strength for tie, _ in pairs}, reverse=True)
    return [(strength, [pair for pair in pairs if pair[0].options.strength == strength]) for strength in strengths]


class Step(ABC):
    """One step of an optimizer, or one call of another of its methods.

    ``torch.compile`` gets three graphs: what prepares gradients, the inner step, and what writes weights. In a single
    graph inductor copies whole tensors, and the optimizer could keep the buffer of a compact gradient as its momentum,
    which the next step overwrites.

    Args:
        mode: the ties.
        optimizer: the tied one.
        reads_gradients: whether the optimizer may read gradients.
    """

    def __init__(self, mode: Mode, optimizer: Any, *, reads_gradients: bool = True) -> None:
        self._mode = mode
        self._optimizer = optimizer
        self._ties_gradients = reads_gradients
        # Calls that turn gradients back into what accumulates.
        self._undo: list[Callable[[], None]] = []

    @between_graphs
    def __enter__(self) -> None:
        mode = self._mode
        self._was_running, mode.running = mode.running, True
        mode.captured = mode.captured or is_capturing()

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Put back the gradients, and write the weights."""

    @between_graphs
    def run(self, inner: Callable[..., Any], pairs: Pairs | None, /, *args: Any, **kwargs: Any) -> Any:
        """Run a step, or another method of the optimizer.

        Args:
            inner: the step or the method.
            pairs: ties that a method may write though there are no gradients; None for a step.
            *args: of it, after the optimizer.
            **kwargs: of it.
        """
        self._is_step = pairs is None
        if self._prepare(pairs):
            inner = self._mode.inner_copies.of(inner)
        return self._run(inner, *args, **kwargs)

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return the closure as the inner step is to call it: it sees weights, and gradients that accumulate."""

        @wraps(closure)
        @between_graphs
        def called_closure(*args: Any, **kwargs: Any) -> Any:
            self._pause()
            loss = closure(*args, **kwargs)
            self._prepare()
            return loss

        return called_closure

    @between_graphs
    def _prepare(self, pairs: Pairs | None = None) -> bool:
        """Prepare ties, by default those with gradients, and return whether ``torch.compile`` gets what follows."""
        compiled = is_under_compiler()
        for call in self._prepared(pairs, compiled):
            call()
        return compiled

    @abstractmethod
    def _prepared(self, pairs: Pairs | None, compiled: bool) -> Sequence[Callable[[], None]]:
        """Prepare weights and gradients but for what is worth compiling, and return the calls that do the rest."""

    @abstractmethod
    def _pause(self) -> None:
        """Let a closure see the weights and gradients of the model."""

    @abstractmethod
    def _run(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the step, or the other method, with its ties prepared."""

    @untraced
    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()
