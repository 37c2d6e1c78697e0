"""The compact mode: the inner optimizer trains one entry for each group, and one for each free slice.

Between steps the parameter groups and the state are those of the model's parameters, and the weights are what counts.
For the time of a step compact parameters, whose values and gradients are read from the weights and theirs, stand in
the places of the tied ones, in the groups and as keys of the state. After the step they are written to the weights.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Number
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from tieopt.engine.graphs import between_graphs, untraced
from tieopt.engine.sharded import on_any_rank
from tieopt.errors import refusal
from tieopt.modes.conversion import (
    begun,
    compacted,
    expanded,
    refolded,
    whole_state,
    without_history,
)
from tieopt.modes.gradients import check_gradients, grad_of, prepare_gradients, put_back, with_gradients
from tieopt.modes.mode import Mode, Pairs, Step, class_among
from tieopt.modes.state import KEPT_BY_TORCH, Lost, by_number, held_optimizers, settings_in, states_of
from tieopt.numbers.folding import fold_, fold_gradients_, unfold_
from tieopt.numbers.reduction import Operation, project_
from tieopt.numbers.start import Start
from tieopt.tensors import calculable, local, sharding_of
from tieopt.ties.components import components
from tieopt.ties.options import EXACT, Options, Reduction
from tieopt.ties.places import BoundTie, ParamGroups, all_places, name_of, parameters_of
from tieopt.ties.slices import are_scaled, described

# Optimizers to which it matters which rows a rank has, or whether there is padding.
_COUPLES_ROWS = {"Adafactor", "LBFGS", "Muon"}

_FOLD, _UNFOLD, _PROJECT = Operation(fold_), Operation(unfold_), Operation(project_)
_FOLD_GRADIENTS = {reduction: Operation(fold_gradients_, reduction=reduction) for reduction in ("mean", "sum")}


class CompactStep(Step):
    """One step in the compact mode; a step within it steps on the compact parameters as they are."""

    _mode: CompactMode
    _took_part: Pairs = ()
    _values: Sequence[Sequence[Tensor]] = ()
    # The optimizers that have compact parameters now.
    _exchanged: Sequence[Any] = ()

    @between_graphs
    def _run(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self._is_step:
            return inner(self._optimizer, *args, **kwargs)
        compacts = self._mode.compacts
        args = tuple(_replaced_by(arg, compacts) for arg in args)
        kwargs = {name: _replaced_by(arg, compacts) for name, arg in kwargs.items()}
        return _replaced_by(inner(self._optimizer, *args, **kwargs), self._mode.originals)

    @between_graphs
    def _prepare(self, pairs: Pairs | None = None) -> bool:
        compiled = super()._prepare(pairs)
        self._exchange()
        return compiled

    @untraced
    def _prepared(self, pairs: Pairs | None, compiled: bool) -> Sequence[Callable[[], None]]:
        """Read compact parameters and their gradients."""
        mode, optimizer = self._mode, self._optimizer
        if mode.set_aside:
            return ()
        mode.check_still_apart(optimizer.param_groups)
        attached = mode.attach(optimizer)
        if pairs is None:
            pairs = with_gradients(attached)
        check_gradients(pairs)
        replaced = prepare_gradients(pairs)
        if replaced:
            self._undo.append(partial(put_back, replaced))
        written = mode.written(pairs, optimizer.param_groups)
        # What a closure has left without a gradient is not trained any more.
        self._took_part = pairs
        self._values = [list(map(mode.compacts.__getitem__, map(id, params))) for _, params in pairs]
        self._match()
        if written:
            mode.check_ranges(written)
            # What was written from outside, or took the place of another parameter, may not be tied.
            optimizer.state.update(refolded(optimizer.state, written, optimizer, mode.engine))
            mode.engine.calls(_PROJECT, written, compiled=False)
        return self._fold(compiled)

    def _match(self) -> None:
        """Give compact parameters the dtype, the device and the kind of gradient of theirs."""
        trained = {id(param): param.grad for _, params in self._took_part for param in params if param.grad is not None}
        mode = self._mode
        for param, compact in zip(mode.originals.values(), mode.compacts.values(), strict=True):
            grad, given = compact.grad, trained.get(id(param))
            other_kind = compact.dtype != param.dtype or compact.device != param.device
            # What is as it is to be is left so: a compiled step is compiled again where it finds other attributes.
            if grad is not None and (other_kind or given is None or grad.is_sparse or grad.dtype != given.dtype):
                grad = compact.grad = None
            if other_kind:
                with torch.inference_mode(False):
                    compact.data = compact.data.to(param.device, param.dtype)
            if compact.requires_grad != param.requires_grad:
                compact.requires_grad_(param.requires_grad)
            if grad is not None or given is None:
                continue
            # Older versions of torch have gradients of the parameter's dtype alone.
            if getattr(compact, "grad_dtype", given.dtype) != given.dtype:
                compact.grad_dtype = given.dtype
            # Where nothing of a parameter is left there is nothing to train, and some optimizers divide by nothing.
            if compact.numel() and given.layout != torch.sparse_coo:
                compact.grad = mode.gradient_of(compact, given.dtype)

    def _fold(self, compiled: bool) -> Sequence[Callable[[], None]]:
        engine = self._mode.engine
        by_reduction: dict[Reduction, tuple[list[tuple[BoundTie, list[Tensor]]], list[list[Tensor]]]] = {}
        for (tie, params), compacts in zip(self._took_part, self._values, strict=True):
            grad = params[0].grad
            if grad is None:
                continue
            reduction = tie.options.reduction
            if grad.layout is torch.sparse_coo:
                compacts[0].grad = engine.folded_sparse(tie.linear, grad, params[0], compacts[0], reduction)
                continue
            grads, targets = by_reduction.setdefault(reduction, ([], []))
            grads.append((tie.linear, list(map(grad_of, params))))
            targets.append([])
            for compact in compacts:
                targets[-1].append(torch.empty_like(compact) if compact.grad is None else compact.grad)
        engine.calls(_FOLD, self._took_part, self._values, compiled=False)
        calls: list[Callable[[], None]] = []
        for reduction, (grads, targets) in by_reduction.items():
            calls += engine.calls(_FOLD_GRADIENTS[reduction], grads, targets, compiled=compiled)
        return calls

    @untraced
    def _exchange(self) -> None:
        """Put the compact parameters in the places of the tied ones."""
        mode = self._mode
        if mode.compacts and mode.outer is None:
            optimizers = [self._optimizer, *held_optimizers(self._optimizer)]
            mode.lock.acquire()
            self._exchanged = optimizers
            mode.outer, mode.set_aside = self, mode.originals
            _exchange_parameters(self._exchanged, mode.compacts)

    @untraced
    def _exchange_back(self) -> None:
        """Put the parameters of the model back, and their gradients, which are not to be written."""
        mode = self._mode
        if self._undo:
            self._restore()
        if self._exchanged:
            # What it has come to hold in the step may have compact parameters, too.
            exchanged, self._exchanged = [*self._exchanged, *held_optimizers(self._optimizer)], ()
            set_aside, mode.outer, mode.set_aside = mode.set_aside, None, {}
            _exchange_parameters(exchanged, set_aside)
            mode.lock.release()

    @untraced
    def _write(self) -> None:
        """Write the compact parameters that were trained to the weights."""
        self._mode.engine.calls(_UNFOLD, self._took_part, self._values, compiled=False)
        self._mode.note(self._took_part)

    @between_graphs
    def _pause(self) -> None:
        self._exchange_back()
        self._write()

    @between_graphs
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Put everything back, and write the weights unless the step has failed."""
        compacts = self._mode.compacts.values()
        if isinstance(error, KeyError) and any(key is compact for key in error.args for compact in compacts):
            error.add_note(
                "With compact=True the optimizer steps on compact parameters, and it has looked one up in a table of\n"
                "its own, by the parameters of the model. Expected: what it keeps in optimizer.state, or compact=False."
            )
        self._mode.running = self._was_running
        self._exchange_back()
        if kind is None:
            self._write()

    def around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return the closure as the inner step is to call it, also where that is a step within another one."""
        return Step.around(self._mode.outer or self, closure)


class CompactMode(Mode):
    """The ties of an optimizer that trains shared values.

    Copies and pickles know the ties, and make compact parameters anew.

    Args:
        param_groups: of the optimizer.
        ties: as for :class:`~tieopt.modes.mode.Mode`.
        options: as for :class:`~tieopt.modes.mode.Mode`; ties are exact.

    Raises:
        ValueError: the mode cannot serve these.
    """

    compact = True
    # Of the shared value.
    true_reduction = "sum"
    step_class = CompactStep

    def __init__(self, param_groups: ParamGroups, ties: Any, options: Options = EXACT) -> None:
        super().__init__(param_groups, ties, options)
        if self.relaxed:
            what = "Relaxed ties train every member by its own gradient, and not one entry for all of them."
            of_tie = next((tie.options for tie in self.ties if tie.options.relaxed), options)
            got = f"compact=True, strength={of_tie.strength}, every={of_tie.every}"
            raise _unserved(what, "strength=1 and every=1", got)
        # Each parameter is in one.
        self.applied: Sequence[BoundTie] = components(self.ties)
        for tie in self.applied:
            if tie.options.reduction is None:
                what = "Ties that have a parameter in common have different reductions."
                names = ", ".join(name_of(param_groups, place) for place in tie.places)
                raise _unserved(what, "one reduction for all of them", "'mean' and 'sum'", parameters=names)

    def reset(self) -> None:
        """Begin without anything that belongs to the steps of one optimizer."""
        super().reset()
        # The step that has put compact parameters in the places of the tied ones.
        self.outer: CompactStep | None = None
        # Compact parameters, by the places and by the identities of the tied ones; and these, as they were last seen.
        self._compact_at: dict[tuple[int, int], Parameter] = {}
        self.compacts: dict[int, Parameter] = {}
        self.originals: dict[int, Tensor] = {}
        self._attached: Pairs | None = None
        self._gradients: dict[int, Tensor] = {}

    def at_rest(self, optimizer: Any, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes of an optimizer as they are between steps."""
        param_groups = self.param_groups_of(optimizer)
        state = self.state_by_place(_with_keys(optimizer.state, self.set_aside), param_groups)
        return {**attributes, "param_groups": param_groups, "state": defaultdict(dict, state)}

    # --- compact parameters ---

    def attach(self, optimizer: Any) -> Pairs:
        """Make the compact parameters once, follow replaced parameters, and return the ties with their parameters.

        Raises:
            ValueError: a group has members on several ranks, or a parameter was sharded since it was tied; or with its
                scales, a shared value is beyond the range of the dtype.
        """
        pairs = self.applied_to(optimizer.param_groups)
        if pairs is not self._attached:
            self._check_ranks(pairs)
            if not self._compact_at:
                self._make(pairs)
            self.follow(optimizer)
            self._attached = pairs
        return pairs

    # Tensors that are made in inference mode could not be trained outside of it.
    @torch.inference_mode(False)
    def _make(self, pairs: Pairs) -> None:
        made: dict[tuple[int, int], Parameter] = {}
        originals: dict[int, Tensor] = {}
        is_canonical = True
        self.engine.prepare_compacts(pairs)
        for tie, params in pairs:
            for place, part, param in zip(tie.places, self.engine.compacts(tie, params), params, strict=True):
                made[place[:2]] = Parameter(part.new_like(param.detach()), requires_grad=param.requires_grad)
                originals[id(made[place[:2]])] = param
                is_canonical &= part.placement is None or part.placement.is_canonical
        self.saves_compact = is_canonical
        self.without_rows = frozenset(place for place, compact in made.items() if not compact.numel())
        # From here on they are read from the weights before each step.
        values: list[list[Tensor]] = [[made[place[:2]] for place in tie.places] for tie, _ in pairs]
        self.engine.apply_(_FOLD, pairs, values)
        self.engine.prepare([(tie.linear, params) for tie, params in pairs if not tie.is_linear], folded=True)
        for (tie, params), compacts in zip(pairs, values, strict=True):
            if _may_leave_range(tie):
                self._check_range(tie, params, compacts)
        for compact in made.values():
            compact.grad = self.gradient_of(compact, compact.dtype) if compact.numel() else None
        self._compact_at, self.originals = made, originals

    def _check_ranks(self, pairs: Pairs) -> None:
        known = self._known()
        for tie, params in pairs:
            names = ", ".join(tie.names)
            if tie.across is not None:
                what, expected = "Ranks cannot share compact parameters.", "ties of this rank alone"
                raise _unserved(what, expected, f"a tie across ranks of {described(tie.slices)}", parameters=names)
            for place, param in zip(tie.places, params, strict=True):
                before, now = sharding_of(known.get(place[:2], param)), sharding_of(param)
                if now != before:
                    what = "Parameters were resharded after they were tied."
                    raise _unserved(what, _sharding(*before), _sharding(*now), parameters=names)
            if self.engine.groups_span_ranks(tie, params):
                what = "A shared value of members on several ranks would have its state on none of them."
                expected = "groups whose members are on one rank, as rows of a parameter that is cut along its columns"
                got = f"{described(tie.slices)}, {_sharding(*now)}"
                raise _unserved(what, expected, got, parameters=names)

    @torch.inference_mode(False)
    def gradient_of(self, compact: Parameter, dtype: torch.dtype) -> Tensor:
        """Return the buffer that is kept for the gradient of a compact parameter, in the dtype of the gradient."""
        kept = self._gradients.get(id(compact))
        if kept is None or kept.dtype != dtype or kept.device != compact.device:
            kept = self._gradients[id(compact)] = torch.zeros_like(compact, dtype=dtype)
        return kept

    def check_ranges(self, pairs: Pairs) -> None:
        """Refuse weights whose shared values are beyond the range of their dtype.

        Raises:
            ValueError: there is one.
        """
        # Of shards, whose ranks would have to talk, another one may have been written.
        pairs = [pair for pair in self.engine.whole(pairs) if _may_leave_range(pair[0])]
        values: list[list[Tensor]] = [[self.compacts[id(param)] for param in params] for _, params in pairs]
        self.engine.calls(_FOLD, pairs, values, compiled=False)
        for (tie, params), compacts in zip(pairs, values, strict=True):
            self._check_range(tie, params, compacts)

    def _check_range(self, tie: BoundTie, params: Sequence[Tensor], compacts: Sequence[Tensor]) -> None:
        """Refuse weights, of which compact ones have just been made, whose shared values are beyond their range."""
        if not any(on_any_rank(not _is_finite(compact), compact) for compact in compacts):
            return
        # NaN where the weight is not finite itself.
        zeros = [(calculable(param.detach()) * 0).to(param.dtype) for param in params]
        marks = [torch.empty_like(compact) for compact in compacts]
        self.engine.apply_(_FOLD, [(tie, zeros)], [marks])
        for slices, param, compact, mark in zip(tie.slices, params, compacts, marks, strict=True):
            value, is_own = calculable(local(compact)), calculable(local(mark)).isnan()
            if on_any_rank(not bool(value.isfinite().logical_or_(is_own).all()), compact):
                scale = f"a scale of {float(slices.scales[slices.scales != 0].abs().min()):g}"
                raise _unserved(
                    "The compact mode trains shared values, and one is beyond the range of the weights.",
                    f"weights without their offsets, divided by their scales, within {param.dtype}",
                    scale if slices.offset is None else f"{scale}, and an offset",
                )

    @untraced
    def _check_memory(self, pairs: Pairs, param_groups: ParamGroups) -> None:
        super()._check_memory(pairs, param_groups)
        _check_read_as_stored(pairs, param_groups)

    # --- the optimizer and its state ---

    def check_served(self, optimizer: Any) -> None:
        """Refuse an optimizer that the mode cannot serve, and make the compact parameters.

        Raises:
            ValueError: the optimizer is differentiable; or it holds another one, and only hands it gradients, keeps
                parameters outside its groups or runs the model; or it couples rows that the ranks have in an order of
                their own; or it takes matrices where a compact parameter is none,
                or a parameter is lazily negated or conjugated; or as for :class:`~tieopt.modes.mode.Mode`.
        """
        super().check_served(optimizer)
        if self.ties:
            _check_served(optimizer, self.applied)
        self.attach(optimizer)
        coupling = class_among(optimizer, _COUPLES_ROWS)
        if coupling is not None and not self.saves_compact:
            what = f"{coupling} couples rows, and ranks have different numbers of them, or have them in another order."
            expected = "shards that torch.chunk makes of the compact parameter of one process"
            raise _unserved(what, expected, "groups that are distributed otherwise")

    def check_method(self, optimizer: Any, method: Callable[..., Any]) -> None:
        """Refuse a method that goes on after it has returned.

        Raises:
            TypeError: it is one.
        """
        below = inspect.unwrap(method)
        if inspect.isgeneratorfunction(below) or inspect.iscoroutinefunction(below):
            raise refusal(
                TypeError,
                "The compact mode cannot follow a method that goes on after it has returned.",
                expected="a method that is done when it returns, or compact=False",
                got=f"{type(optimizer).__name__}.{method.__name__}(), a generator, a context manager or a coroutine",
            )

    def state_within(self, optimizer: Any, state: Mapping[Any, Any], start: Start, lost: Lost | None) -> dict[Any, Any]:
        """Return the state of compact parameters that takes the place of that of whole ones."""
        changed = super().state_within(optimizer, state, start, lost)
        if not changed:
            return {}
        if self.ties:
            changed = without_history(optimizer, changed, lost)
        pairs = parameters_of(self.applied, optimizer.param_groups)
        changed = {**changed, **compacted(changed, pairs, self.engine, lost=lost)}
        return {key: value for key, value in changed.items() if value != {}}

    def state_without(self, optimizer: Any, state: Mapping[Any, Any], lost: Lost) -> dict[Any, Any]:
        """Return the state of whole parameters that takes the place of that of compact ones."""
        param_groups, settings = optimizer.param_groups, settings_in(optimizer.param_groups)
        state = self.state_by_place(state, param_groups)
        # The state of a parameter that is gone may have the values of others.
        now = _by_place(param_groups)
        held = set(map(id, now.values()))
        known = self._known()
        # What the state is of: a parameter that was tied, wherever it stands now; or what took its place.
        moved = {place: param for place, param in known.items() if id(param) in held or place not in now}
        params = {**now, **moved}
        pairs = [(tie, [params.get(place[:2], torch.empty(0)) for place in tie.places]) for tie in self.applied]
        whole = {**state, **expanded(state, pairs, self.engine, settings, lost)}
        if self.applied:
            whole = without_history(optimizer, whole, lost)
        # What is pinned as a whole had no state to be lost.
        lacking = [param for _, tied in pairs for param in tied if id(param) in held and not whole.get(param)]
        whole |= begun(optimizer, lacking, settings)
        gone = set(map(id, known.values())) - held
        return {key: value for key, value in whole.items() if id(key) not in gone}

    def to_save(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a ``state_dict`` with the state of whole parameters where that of compact ones depends on the mesh.

        Otherwise joined parameters whose compact ones have no entries get a state with none, because
        torch.distributed.checkpoint loads a state if every parameter has one.
        """
        if not {"state", "param_groups"} <= state_dict.keys():
            return state_dict
        state = dict(state_dict["state"])
        if not self.saves_compact:
            param_groups = self.param_groups_of(optimizer)
            params = by_number(state_dict, param_groups)
            held = {param: state[number] for number, param in params.items() if number in state}
            whole = whole_state(optimizer, held, self.applied_to(param_groups), self.engine)
            # A joined parameter may have no state yet.
            state |= {number: whole[param] for number, param in params.items() if whole.get(param)}
        elif self.without_rows and not isinstance(optimizer, torch.optim.LBFGS):
            numbers = _numbers_by_place(state_dict)
            for tie in self.applied:
                places = [place[:2] for place in tie.places if place[:2] in numbers]
                known = next(filter(None, (state.get(numbers[place]) for place in places)), None)
                for place in self.without_rows.intersection(places):
                    if known is not None:
                        state[numbers[place]] = _without_entries(known)
        return {**state_dict, "state": state}

    def to_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a ``state_dict`` without the states without entries that :meth:`to_save` has added."""
        if not {"state", "param_groups"} <= state_dict.keys():
            return state_dict
        numbers = _numbers_by_place(state_dict)
        maybe_empty = {numbers.get(place) for place in self.without_rows}
        state = {
            number: held
            for number, held in state_dict["state"].items()
            if number not in maybe_empty or any(map(_is_filled, held.values()))
        }
        return {**state_dict, "state": state}

    def state_by_place(self, state: Mapping[Any, Any], param_groups: ParamGroups) -> dict[Any, Any]:
        """Return the state, with the entries of replaced parameters moved to those that took their places."""
        now = _by_place(param_groups)
        held = set(map(id, now.values()))
        took_place = {
            id(before): now[place]
            for place, before in self._known().items()
            if place in now and id(before) not in held and now[place] not in state
        }
        return {took_place.get(id(key), key): value for key, value in state.items()}

    def follow(self, optimizer: Any) -> None:
        """Move the states of parameters that were replaced to the parameters that took their places."""
        if self.set_aside:
            return
        now, known = _by_place(optimizer.param_groups), self._known()
        for state in states_of(optimizer):
            moved = self.state_by_place(state, optimizer.param_groups)
            if any(map(is_not, moved, state)):
                state.clear()
                state.update(moved)
        self.originals = {id(compact): now.get(place, known[place]) for place, compact in self._compact_at.items()}
        self.compacts = dict(zip(map(id, self.originals.values()), self._compact_at.values(), strict=True))

    def _known(self) -> dict[tuple[int, int], Tensor]:
        """The parameters that stood in the places of the tied ones when they were last seen."""
        return {place: self.originals[id(compact)] for place, compact in self._compact_at.items()}


def _sharding(mesh: Any, placements: Any) -> str:
    return "parameters that are not sharded" if mesh is None else f"placements {placements} on {mesh}"


def _numbers_by_place(state_dict: Mapping[str, Any]) -> dict[tuple[int, int], Any]:
    """Return the numbers that parameters have in a ``state_dict``, by their groups and their positions in these."""
    return {
        (group, position): number
        for group, settings in enumerate(state_dict["param_groups"])
        for position, number in enumerate(settings["params"])
    }


def _without_entries(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of the state of a parameter, and tensors without entries in the places of larger ones."""
    state: dict[str, Any] = {}
    for key, value in held.items():
        if isinstance(value, Tensor):
            state[key] = torch.empty(0, dtype=value.dtype, device=value.device) if value.dim() else value.clone()
        elif isinstance(value, Number):
            state[key] = value
    return state


def _is_filled(value: Any) -> bool:
    """Whether a value of a state is a tensor with entries, and not one number."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 0


def _by_place(param_groups: ParamGroups) -> dict[tuple[int, int], Tensor]:
    return {place[:2]: param_groups[place.group]["params"][place.position] for place in all_places(param_groups)}


def _exchange_parameters(optimizers: Sequence[Any], others: Mapping[int, Any]) -> None:
    """Put other parameters, by the identities of those that are there, into parameter groups and states."""
    for holder in optimizers:
        # One that it came to hold after it was tied may have neither.
        if not hasattr(holder, "param_groups") or not hasattr(holder, "state"):
            continue
        # Groups and states that optimizers share have nothing left to exchange the second time.
        for settings in holder.param_groups:
            params = settings["params"]
            exchanged = [others.get(id(param), param) for param in params]
            if isinstance(params, list):
                # The same list, as some optimizers hold it.
                params[:] = exchanged
            else:
                settings["params"] = type(params)(exchanged)
        items = _with_keys(holder.state, others)
        holder.state.clear()
        holder.state.update(items)
        if isinstance(holder, torch.optim.LBFGS):
            # It keeps the list of its parameters, which copies of it lack, and counts their entries once.
            holder._params, holder._numel_cache = holder.param_groups[0]["params"], None


def _with_keys(state: Mapping[Any, Any], others: Mapping[int, Any]) -> dict[Any, Any]:
    """Return a state with other keys in the places of those that have one, by id."""
    items = {others.get(id(key), key): value for key, value in state.items()}
    if len(items) < len(state):
        # To look up what a defaultdict does not have leaves an empty state there, which is none.
        items.update((others.get(id(key), key), value) for key, value in state.items() if value != {})
    return items


def _replaced_by(value: Any, others: Mapping[int, Any]) -> Any:
    """The value, or its items if it is a list or tuple, with others in the places of those that have one, by id."""
    if id(value) in others or type(value) not in (list, tuple):
        return others.get(id(value), value)
    items = [_replaced_by(item, others) for item in value]
    # A method may write to a list that it is given.
    return value if all(map(is_, items, value)) else type(value)(items)


# --- what the mode cannot serve ---


def _unserved(what: str, expected: str, got: str, **lines: object) -> ValueError:
    """Return the refusal of what the full mode can serve alone."""
    return refusal(ValueError, what, **lines, expected=f"{expected}, or compact=False", got=got)


def _may_leave_range(tie: BoundTie) -> bool:
    """Return whether shared values may be beyond the range of the weights."""
    return are_scaled(tie.slices) or not tie.is_linear


def _check_read_as_stored(pairs: Pairs, param_groups: ParamGroups) -> None:
    for tie, params in pairs:
        for place, param in zip(tie.places, params, strict=True):
            if param.is_neg() or param.is_conj():
                expected = "a parameter that is not lazily negated or conjugated"
                what, name = "The compact mode reads weights as they are in memory.", name_of(param_groups, place)
                raise _unserved(what, expected, name)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all entries that this rank has are finite."""
    return bool(calculable(local(tensor)).isfinite().all())


def _has(value: Any, params: set[int], depth: int = 2) -> bool:
    """Whether something is one of some parameters, or contains one."""
    if isinstance(value, Tensor):
        return id(value) in params
    if not depth or not isinstance(value, (list, tuple, set, dict)):
        return False
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return any(_has(item, params, depth - 1) for item in items)


def _check_reached(optimizer: Any, held: Sequence[Optimizer], tied: set[int]) -> None:
    """Refuse optimizers that reach the tied parameters other than by their groups."""
    kind = type(optimizer).__name__
    tied_first = "ties of the optimizer within, before it is wrapped"
    around = f"{kind} around {type(held[0]).__name__}" if held else kind
    for inner in [optimizer, *held]:
        if held and not {"param_groups", "state"} <= vars(inner).keys():
            what = "The compact mode cannot serve an optimizer that only hands gradients to another one."
            raise _unserved(what, tied_first, around)
        attributes = {name: value for name, value in vars(inner).items() if name not in KEPT_BY_TORCH}
        # The lists of parameter groups have the compact ones during a step.
        lists = {id(settings["params"]) for settings in inner.param_groups}
        if isinstance(inner, torch.optim.LBFGS):
            attributes.pop("_params", None)
        # One that holds no other may look up more about each parameter by those of its groups, as heavyball does.
        looked_up = () if held_optimizers(inner) else dict
        reached = [
            name
            for name, value in attributes.items()
            if id(value) not in lists and not isinstance(value, looked_up) and _has(value, tied)
        ]
        if reached:
            what = "The compact mode cannot serve an optimizer that keeps parameters outside its parameter groups."
            way = tied_first if held else "an optimizer that steps on these"
            raise _unserved(what, way, f"{around}, with parameters in {reached[0]}")
        models = [name for name, value in attributes.items() if isinstance(value, Module)]
        if held and models:
            raise _unserved(
                "The compact mode cannot serve an optimizer that runs the model itself.",
                "an optimizer that runs the model in a closure alone",
                f"{type(inner).__name__} with a model as {models[0]}",
            )


def _check_served(optimizer: Any, ties: Sequence[BoundTie]) -> None:
    pairs = parameters_of(ties, optimizer.param_groups)
    _check_reached(optimizer, held_optimizers(optimizer), {id(param) for _, params in pairs for param in params})
    if any(settings.get("differentiable", False) for settings in optimizer.param_groups):
        got = f"{type(optimizer).__name__} with differentiable=True"
        raise _unserved("The compact mode has no graph through the step.", "differentiable=False", got)
    _check_read_as_stored(pairs, optimizer.param_groups)
    muon = getattr(torch.optim, "Muon", None)
    for tie, params in pairs:
        for place, slices, param in zip(tie.places, tie.slices, params, strict=True):
            name = name_of(optimizer.param_groups, place)
            if muon is not None and isinstance(optimizer, muon) and slices.labels.dim() != 1:
                raise _unserved(
                    "Muon trains matrices, and the compact parameter would be a list of single values.",
                    "ties of whole rows or columns",
                    f"labels of shape {tuple(slices.labels.shape)}",
                    parameter=f"{name} of shape {tuple(param.shape)}",
                )
