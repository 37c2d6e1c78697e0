"""Ties found among the parameters of an optimizer, held by place.

Parameters are held by their place in the parameter groups and not by identity, because hosts replace
the Parameter objects.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tieopt.errors import message, refusal, shown, users_level
from tieopt.tensors import check_sharding, local, sharing
from tieopt.ties.across import Across
from tieopt.ties.hints import IdleTie, not_held, warn_of_idle
from tieopt.ties.names import Held, expanded
from tieopt.ties.options import EXACT, Options
from tieopt.ties.part import Part, check_one_shape, check_writable, readable_again
from tieopt.ties.slices import Partition, Slices, all_numbered, in_order, is_idle, labels_before, numbered
from tieopt.ties.tie import Tie, tie_of
from tieopt.ties.union import are_alike, shared_entries

ParamGroups = list[dict[str, Any]]


class Place(NamedTuple):
    """Where a tied parameter stands.

    Attributes:
        group: the number of its parameter group.
        position: its place in the group.
        shape: its shape when it was tied.
    """

    group: int
    position: int
    shape: torch.Size

    def __str__(self) -> str:
        return f"param_groups[{self.group}]['params'][{self.position}]"


# Where parameters stand, by identity. They are not kept alive: an identity counts while its parameter lives.
Standing = dict[int, tuple[ReferenceType[Tensor], Place]]


class BoundTie(Partition):
    """The tie of one parameter, or of several that were joined.

    Args:
        places: of the parameters.
        slices: of each.
        names: how errors call them.
        given: the options that were given with the tie.
        options: with those of the optimizer where nothing was said.
        across: as for :class:`~tieopt.ties.across.Across`, without the labels; None if it is of this rank alone.
        numbered_slices: the slices in the order of their parameters, numbered; None if that is still to be done.

    Attributes:
        places: of the parameters.
        slices: of each parameter; groups are numbered in the order of their first members.
        given: the options that were given with the tie.
        options: how the tie is applied.
        order: the numbers of the parameters in the order in which they were joined.
    """

    def __init__(
        self,
        places: Sequence[Place],
        slices: Sequence[Slices],
        names: Sequence[str] | None = None,
        given: Options | None = None,
        options: Options = EXACT,
        across: tuple[Any, int, bool] | None = None,
        numbered_slices: Sequence[Slices] | None = None,
    ) -> None:
        by_place = _order_of(places, slices)
        self.places = tuple([places[number] for number in by_place])
        names = names or list(map(str, places))
        given_slices = [slices[number] for number in by_place]
        ordered = in_order(numbered_slices or numbered(given_slices))
        ranks = None if across is None else Across(*across, labels_before(ordered, given_slices))
        super().__init__(ordered, [names[number] for number in by_place], across=ranks)
        self.given = given or Options()
        self.options = options
        self.order = tuple(sorted(range(len(places)), key=by_place.__getitem__))

    @property
    def is_frozen(self) -> bool:
        """Whether all slices are pinned at the values that they had."""
        return all(slices.is_frozen for slices in self.slices)


def _order_of(places: Sequence[Place], slices: Sequence[Slices]) -> list[int]:
    """Return the numbers of slices in the order of their parameters, however they were joined: sums depend on it."""
    if len(places) == 1:
        return [0]
    return sorted(range(len(places)), key=lambda number: (*places[number][:2], slices[number].dim))


def given_name(param_groups: ParamGroups, place: Place) -> str | None:
    """Return the name that a parameter was given with, if it was."""
    names = param_groups[place.group].get("param_names", ()) if place.group < len(param_groups) else ()
    return str(names[place.position]) if place.position < len(names) else None


def name_of(param_groups: ParamGroups, place: Place) -> str:
    """Return what errors and tables call a parameter."""
    return given_name(param_groups, place) or str(place)


def parameter_at(param_groups: ParamGroups, place: Place) -> Tensor:
    """Return the parameter that stands at a place now.

    Raises:
        RuntimeError: it has another shape than when it was tied, or is gone.
    """
    param = _param_or_none(param_groups, place)
    if param is None or param.shape != place.shape:
        now = "no parameter there" if param is None else tuple(param.shape)
        raise refusal(
            RuntimeError,
            f"A tied parameter {'is gone' if param is None else 'no longer has the shape that it was tied in'}.",
            parameter=name_of(param_groups, place),
            expected=tuple(place.shape),
            got=f"{now}; call retie() with ties that fit it, or untie()",
        )
    return param


def _param_or_none(param_groups: ParamGroups, place: Place) -> Tensor | None:
    try:
        return _param(param_groups, place)
    except IndexError:
        return None


def _param(param_groups: ParamGroups, place: Place) -> Tensor:
    param: Tensor = param_groups[place.group]["params"][place.position]
    return param


T = TypeVar("T", bound=BoundTie)


def parameters_of(ties: Iterable[T], param_groups: ParamGroups) -> list[tuple[T, list[Tensor]]]:
    """Return ties with the parameters that stand in their places now.

    Raises:
        RuntimeError: a parameter has another shape than when it was tied, or is gone.
        ValueError: joined parameters have come to differ in what has to be the same.
    """
    pairs = []
    for tie in ties:
        params = [parameter_at(param_groups, place) for place in tie.places]
        if len(params) > 1:
            check_joined(param_groups, tie.places, params)
        pairs.append((tie, params))
    return pairs


def still_there(pairs: Sequence[tuple[T, list[Tensor]]], param_groups: ParamGroups) -> bool:
    """Return whether these parameters stand in the places of their ties; without a call for each of many.

    Raises:
        ValueError: joined parameters have come to differ in what has to be the same.
    """
    count = len(param_groups)
    for tie, params in pairs:
        for place, param in zip(tie.places, params, strict=True):
            number, position, shape = place
            there = param_groups[number]["params"] if number < count else ()
            if position >= len(there) or there[position] is not param or param.shape != shape:
                return False
        if len(params) > 1:
            check_joined(param_groups, tie.places, params)
    return True


def standing(ties: Iterable[BoundTie], param_groups: ParamGroups) -> Standing:
    """Return where the parameters stand that have the shape of a tied one, by identity.

    A parameter that is there twice, of which torch warns, stands in its first place.
    """
    shapes = {place.shape for tie in ties for place in tie.places}
    found: Standing = {}
    for place in all_places(param_groups):
        if place.shape in shapes:
            param = _param(param_groups, place)
            found.setdefault(id(param), (ref(param), place))
    return found


def check_moved(ties: Iterable[BoundTie], stood: Standing, param_groups: ParamGroups) -> None:
    """Refuse parameters that have come to the place of a tied one from elsewhere. One that replaces it is new.

    Args:
        ties: of parameters.
        stood: where parameters stood before.
        param_groups: as they are now.

    Raises:
        RuntimeError: a tie would go to another parameter.
    """
    if not stood:
        return
    for place in (place for tie in ties for place in tie.places):
        param = _param_or_none(param_groups, place)
        if param is None or id(param) not in stood:
            continue
        known, before = stood[id(param)]
        if known() is param and before[:2] != place[:2]:
            raise refusal(
                RuntimeError,
                "Parameters were removed from the parameter groups or reordered: a tie would go to another one.",
                parameter=name_of(param_groups, place),
                expected=f"the parameter that was tied at {place}, or one that replaces it",
                got=f"the one that stood at {before}; call retie() with ties of what is there now, or untie()",
            )


def all_places(param_groups: ParamGroups) -> list[Place]:
    """Return all places, in the order of the numbers that parameters have in a ``state_dict``."""
    return [
        # A lazy parameter has no shape yet.
        Place(group, position, torch.Size() if is_lazy(param) else param.shape)
        for group, settings in enumerate(param_groups)
        for position, param in enumerate(settings["params"])
    ]


def all_parameters(param_groups: ParamGroups) -> list[Tensor]:
    """Return all parameters, each once, in the order of :func:`all_places`."""
    return list(dict.fromkeys(param for settings in param_groups for param in settings["params"]))


def listed(ties: Any) -> list[Tie]:
    """Return ties that may be a mapping, one tie, or an iterable, as a list.

    Raises:
        TypeError: they are no ties.
    """
    if isinstance(ties, Mapping):
        parts = [Part(param, readable_again(groups), 0, None) for param, groups in ties.items()]
        return [tie_of([(part, None)], Options()) for part in parts]
    several = list(ties) if isinstance(ties, Iterable) and not isinstance(ties, Tensor) else [ties]
    for tie in several:
        if not isinstance(tie, Tie):
            got = shown(tie) if tie is ties else f"{shown(tie)} in {shown(ties)}"
            expected = "a mapping {parameter: groups}, a Tie, or an iterable of Ties"
            raise refusal(TypeError, "These are no ties.", expected=expected, got=got)
    return several


class _Found(NamedTuple):
    """A tie whose parameters were found, with what was read and checked of each, in the order in which it has them."""

    tie: Tie
    options: Options
    places: list[Place]
    names: list[str]
    params: list[Tensor]
    slices: list[Slices]


def bind_ties(
    param_groups: ParamGroups, ties: Any, holder: str = "optimizer", options: Options = EXACT
) -> list[BoundTie]:
    """Bind ties to the places of their parameters, and check them against these.

    Args:
        param_groups: of the optimizer.
        ties: a mapping ``{parameter or name: groups}``, a :class:`Tie`, or an iterable of them.
        holder: what has these parameters, as errors call it.
        options: of ties for which nothing else was said.

    Warns:
        UserWarning: a tie has groups, and ties nothing.

    Raises:
        TypeError, IndexError, ValueError: as :class:`~tieopt.TiedOptimizer` says.
    """
    several = _find(param_groups, ties, holder, options)
    orders = [_order_of(found.places, found.slices) for found in several]
    ordered = all_numbered([[found.slices[n] for n in order] for found, order in zip(several, orders, strict=True)])
    bound = []
    numbers: Counter[Any] = Counter()
    for found, order, slices in zip(several, orders, ordered, strict=True):
        tie = found.tie
        across = None if tie.across is None else (tie.across, numbers[tie.across], tie.is_whole)
        numbers[tie.across] += 1
        bound.append(BoundTie(found.places, found.slices, found.names, tie.options, found.options, across, slices))
        check_read_as_stored(param_groups, bound[-1], [found.params[n] for n in order])
    _check_disjoint(param_groups, bound)
    check_apart(param_groups, bound)
    # Whether one ties nothing across ranks is known to all of them together.
    warn_of_idle(
        [
            _idle(found)
            for found, own in zip(several, bound, strict=True)
            if own.across is None and not own.labels_are_sharded and is_idle(own.slices)
        ]
    )
    return bound


def _idle(found: _Found) -> IdleTie:
    written = [
        name if name == str(place) else f'"{name}"' for name, place in zip(found.names, found.places, strict=True)
    ]
    slice_shape = found.slices[0].slice_shape(found.params[0].shape)
    return IdleTie(found.names, written, found.slices, slice_shape)


def _find(param_groups: ParamGroups, ties: Any, holder: str, options: Options) -> list[_Found]:
    """Find the parameters of ties, and read and check what is said of them; arguments as for :func:`bind_ties`."""
    places: dict[Any, Place] = {}
    repeated: dict[Any, tuple[Place, Place]] = {}
    for place in all_places(param_groups):
        places.setdefault(_param(param_groups, place), place)
        first = places.setdefault(given_name(param_groups, place), place)
        if first is not place:
            repeated[given_name(param_groups, place)] = first, place

    named = {name: _param(param_groups, place) for name, place in places.items() if isinstance(name, str)}
    found = []
    expanded_ties = [(tie, parts) for tie in listed(ties) for parts in expanded(tie.parts, named)]
    for tie, parts in expanded_ties:
        for part in parts:
            if not isinstance(part.param, (Tensor, str)) or part.param not in places:
                known = {name_of(param_groups, place): _param(param_groups, place) for place in places.values()}
                is_named = any("param_names" in settings for settings in param_groups)
                raise ValueError(not_held(part.param, known, holder, named=is_named))
            if isinstance(part.param, str) and part.param in repeated:
                what, got = (
                    f'Several parameters have the name "{part.param}".',
                    " and ".join(map(str, repeated[part.param])),
                )
                raise refusal(ValueError, what, expected="a name of one parameter, or the parameter itself", got=got)
        held = [places[part.param] for part in parts]
        names = [name_of(param_groups, place) for place in held]
        params = [_param(param_groups, place) for place in held]
        slices = [part.slices(param, name) for part, param, name in zip(parts, params, names, strict=True)]
        for param, name in zip(params, names, strict=True):
            check_sharding(param, name)
            check_writable(param, name)
        if len(params) > 1:
            check_one_shape(list(zip(slices, params, strict=True)), names)
            check_joined(param_groups, held, params, joining=True)
        if isinstance(tie.parts[0].param, Held):
            _warn_if_apart(params, names)
        found.append(_Found(tie, tie.options.or_else(options), held, names, params, slices))
    return found


def _warn_if_apart(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Warn, at the user's call, of parameters that were made of one, and of which one was written alone since."""
    first, *others = map(local, params)
    if any(other.shape == first.shape and not torch.equal(other, first) for other in others):
        what = f"Parameters that were shared differ: {', '.join(names)}. They start from their mean, or the first one."
        expected = "weights that are loaded into all of them, or before split_shared_()"
        warnings.warn(message(what, expected=expected), UserWarning, stacklevel=users_level())


def check_joined(
    param_groups: ParamGroups, places: Sequence[Place], params: Sequence[Tensor], *, joining: bool = False
) -> None:
    """Refuse to join parameters that cannot be tied, or that the optimizer would update differently.

    Args:
        param_groups: of the optimizer.
        places: of the parameters.
        params: the parameters, which must have one dtype and device, and be frozen all or none.
        joining: whether they are being joined now. Then settings that are tensors on an accelerator are compared as
            well, which waits for it.

    Raises:
        ValueError: they differ.
    """
    for place, param in zip(places, params, strict=True):
        _check_settings(param_groups, places[0], place, joining)
        for attribute, way in _WAYS_TO_JOIN.items():
            expected, got = getattr(params[0], attribute), getattr(param, attribute)
            if expected != got:
                way = way.format(expected) if joining else "retie or untie them first"
                raise refusal(
                    ValueError,
                    f"Joined parameters differ in {attribute}.",
                    expected=f"{expected}, as {name_of(param_groups, places[0])} has",
                    got=f"{got} of {name_of(param_groups, place)}; {way}",
                )


def check_read_as_stored(param_groups: ParamGroups, tie: BoundTie, params: Sequence[Tensor]) -> None:
    """Refuse parameters that torch conjugates or negates when it reads them, where a tie is not of their memory alone.

    Raises:
        ValueError: there is one in a tie that joins parameters, or that has offsets.
    """
    if len(params) == 1 and tie.is_linear:
        return
    for place, param in zip(tie.places, params, strict=True):
        if param.is_conj() or param.is_neg():
            raise refusal(
                ValueError,
                f"{name_of(param_groups, place)} is conjugated or negated when it is read.",
                expected="parameters after resolve_conj() and resolve_neg(), where they are joined, or have an offset",
                got=f"is_conj() is {param.is_conj()}, is_neg() is {param.is_neg()}",
            )


def settings_across(tie: BoundTie, param_groups: ParamGroups) -> dict[str, Any]:
    """Return what has to be alike on all ranks that have members of a tie across them, by its name."""
    settings = {
        key: _comparable(value)
        for key, value in param_groups[tie.places[0].group].items()
        if _counts(key) and isinstance(value, _PLAIN)
    }
    shape = {"shape": tuple(tie.places[0].shape)} if tie.across is not None and tie.across.is_whole else {}
    return {**settings, **shape, **tie.options._asdict()}


# Other objects have texts that differ from process to process.
_PLAIN = (bool, int, float, complex, str, list, tuple, type(None), Tensor)


def _comparable(value: Any) -> Any:
    """Return a setting of which the text is the same where the value is."""
    if isinstance(value, Tensor):
        # An accelerator would have to be waited for.
        return value.tolist() if value.device.type == "cpu" else None
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _counts(key: str) -> bool:
    """Whether a setting has to be the same for joined parameters."""
    return key != "params" and "name" not in key


# In what joined parameters have to be alike, and how to make them so.
_WAYS_TO_JOIN = {
    "dtype": "convert one of their modules first, as with module.to({})",
    "device": "move one of their modules first, as with module.to('{}')",
    "requires_grad": "freeze all of them or none, with requires_grad_()",
}


def _check_settings(param_groups: ParamGroups, first: Place, second: Place, joining: bool) -> None:
    settings, others = param_groups[first.group], param_groups[second.group]
    if settings is others:
        return
    differing = [
        f"{key}: {shown(settings[key])} and {shown(others[key])}"
        # What only one of them has is nothing that the optimizer reads, as the `initial_lr` of a scheduler.
        for key in settings.keys() & others.keys()
        if _counts(key) and not _same(settings[key], others[key], joining)
    ]
    if differing:
        way = "set them alike, or put the parameters into one group" if joining else "or retie or untie them first"
        raise refusal(
            ValueError,
            "Joined parameters stand in parameter groups with different settings.",
            parameters=f"{name_of(param_groups, first)} and {name_of(param_groups, second)}",
            expected=f"the same settings in param_groups[{first.group}] and [{second.group}]; {way}",
            got="; ".join(sorted(differing)),
        )


def _same(first: Any, second: Any, tensors: bool) -> bool:
    values = [value for value in (first, second) if isinstance(value, Tensor)]
    if values:
        # An accelerator would have to be waited for.
        known = tensors or all(value.device.type == "cpu" for value in values)
        return not known or torch.equal(torch.as_tensor(first).cpu(), torch.as_tensor(second).cpu())
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second, repeat(tensors)))
    try:
        return first is second or bool(first == second)
    except ValueError:  # Arrays compare entry by entry.
        return False


def _check_disjoint(param_groups: ParamGroups, ties: Sequence[BoundTie]) -> None:
    """Refuse ties that share an entry."""
    parts: dict[Place, list[Slices]] = {}
    for tie in ties:
        for place, slices in zip(tie.places, tie.slices, strict=True):
            parts.setdefault(place, []).append(slices)
    for place, several in parts.items():
        if any(slices.sharding is not None for slices in several):
            # A rank does not know where the labels of others are.
            if len(several) == 1:
                continue
            what, expected = f"{name_of(param_groups, place)} is tied twice.", "one tie, because its labels are sharded"
            raise refusal(ValueError, what, expected=expected, got="; ".join(map(str, several)))
        for first, second, entry in shared_entries(several, place.shape):
            what = f"{name_of(param_groups, place)} is tied twice."
            labels = "" if are_alike(several) else f", with a label for each entry, of shape {tuple(place.shape)}"
            ways = (
                "Tie.union(*ties) returns such ties of parameters; or write what is to be equal as one group of one "
                f"Tie{labels}; retie() takes new ties in the place of all old ones"
            )
            if any(several[number].offset is not None for number in (first, second)):
                ways = "what is frozen, or has an offset, is in one tie alone"
            got = f"entry {entry} in {several[first]}, and in {several[second]}"
            raise refusal(ValueError, what, expected=f"ties that share no entry: {ways}", got=got)


def check_apart(param_groups: ParamGroups, ties: Iterable[BoundTie]) -> None:
    """Refuse a tied parameter that has an entry in the memory of another parameter.

    A step would move this entry once for each of them.

    Raises:
        ValueError: there is one.
    """
    tied = {place[:2] for tie in ties for place in tie.places}
    held = {_param(param_groups, place): place for place in reversed(all_places(param_groups))}
    places = sorted(held.values())
    for numbers in sharing([local(_param(param_groups, place)) for place in places]):
        pair = sorted(places[number] for number in numbers)
        if any(place[:2] in tied for place in pair):
            first, second = (f"{name_of(param_groups, place)} {tuple(place.shape)}" for place in pair)
            raise refusal(
                ValueError,
                "A tied parameter shares memory with another parameter, so that each step would move it twice.",
                expected="memory of its own for each parameter, as after clone(); or one Parameter in both modules",
                got=f"{first} and {second}",
            )
