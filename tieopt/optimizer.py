"""When the ties are applied: an optimizer that keeps them, and is an optimizer to everybody.

A tied optimizer *is* the optimizer that was wrapped: the same object, whose class is from then on a
subclass of both :class:`TiedOptimizer` and its own class, as ``torch.nn.utils.parametrize`` does with
modules. So there is one state and one list of parameter groups, ``isinstance`` holds, and whatever a
scheduler, a gradient scaler or a framework reads or writes, before or after, it reads or writes there.

What the class adds is held in one attribute, and its public names say ``tie``, so that it hides nothing that the
optimizer has. The methods for the norm of gradients have the names that everybody knows, and give way to its own.
"""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from types import new_class
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable

from tieopt.engine.agreement import failing_together, tell_of_failure
from tieopt.engine.graphs import between_graphs, copied, untraced
from tieopt.errors import refusal, shown, users_level
from tieopt.modes import mode_class, norm, summary
from tieopt.modes.conversion import converter
from tieopt.modes.gradients import check_gradients, tie_gradients
from tieopt.modes.mode import Mode
from tieopt.modes.state import Lost, by_number, settings_in, states_of, tied_state
from tieopt.modes.summary import TieSummary
from tieopt.numbers.start import Start
from tieopt.ties.options import Options, Reduction
from tieopt.ties.part import FROZEN, Part
from tieopt.ties.places import ParamGroups, all_parameters, all_places, given_name, name_of
from tieopt.ties.slices import FREE
from tieopt.ties.tie import Tie, Ties, process_groups_in, tie_of

_HOOKS = [
    f"_optimizer_{method}_{when}_hooks"
    for method in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
]

# Methods that an optimizer which has them keeps.
_YIELDING = {"grad_norm", "clip_grad_norm_"}

# Where what the ties add stands in a state_dict, beside "state" and "param_groups".
_TIEOPT = "tieopt"


F = TypeVar("F", bound=Callable[..., Any])


def _together(method: F) -> F:
    """A method that ranks call together: if it fails on one, it fails on those that have ties with it."""

    @wraps(method)
    @between_graphs
    def together(self: TiedOptimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            tell_of_failure(self._tieopt.process_groups, error)
            raise

    return cast(F, together)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause garbage collection while ties are made.

    Thousands of ties make a hundred thousand objects, and all of them stay. To look through all objects of the process
    again and again takes as long as to make them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class TiedOptimizer(Optimizer):
    r"""Keep entries of the parameters of any optimizer equal.

    Before a step, the gradients of each group are replaced by their mean (or sum), and after it the members by their
    mean:

    .. math::

        g \leftarrow P g, \qquad w \leftarrow \operatorname{step}(w, g), \qquad w \leftarrow P w,
        \qquad (P w)_i = s_i \frac{\sum_j s_j w_j}{\sum_j s_j^2}

    where the sums are over the group of entry :math:`i`, and :math:`s_i` is its scale, 1 by default. Free entries stay
    as they are. Offsets of a :class:`Tie` are subtracted from the weights before, and added again. :math:`P` is the
    orthogonal projection onto tied weights. For an optimizer that works entry by entry, this is exactly training the
    one value that the members share.

    The wrapped optimizer becomes the tied one: ``TiedOptimizer(optimizer, ties) is optimizer``, which is still an
    instance of its own class, as modules are with ``torch.nn.utils.parametrize``. The weights are tied at once, except
    for frozen parameters (``requires_grad`` is False), which are not written.

    The idea is from a `forum question
    <https://discuss.pytorch.org/t/tying-weights-from-different-neurons-and-averaging-the-gradients/20934>`_:
    rows that stay equal, and whose gradients are averaged.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`. Tied parameters may have any dtype, layout and device that
            :class:`Tie` takes; other parameters, any.
        ties: a mapping from parameters to groups (lists of lists of indices, or labels; see :class:`Tie`), or a
            :class:`Tie`, or an iterable of them. Names may stand for parameters if the optimizer was built from
            ``named_parameters()``; names with wildcards, such as ``"layers.*.weight"``, stand for each parameter that
            matches. No entry may be in two ties.
        reduction: ``"mean"`` steps on the mean of the members' gradients, ``"sum"`` on their sum, which is the gradient
            that autograd gives to one parameter used in several places. After the step, ``.grad`` holds the mean in
            either case (up to the rounding of multiplying and dividing by the size), so that gradients accumulate; in
            the compact mode it is left alone. With scales, the sum is :math:`\sum_i s_i g_i`, the gradient of the
            shared value, times the scale of each member. LBFGS and other optimizers that compare the loss with its
            gradient need ``"mean"`` by default, and ``"sum"`` with ``compact=True``.
        strength: how far a projection moves the weights towards the mean, from 0 (not at all) to 1.
        every: the number of steps from one projection of the weights to the next, 1 or more. Steps with a learning rate
            of zero, in which nothing moves, do not count.
        compact: whether to train one entry for each group instead of all its members, with state and arithmetic of this
            size. See below.
        start: what the shared values start from: ``"mean"`` is the mean of the members, ``"first"`` the first member,
            as if modules shared a Parameter. The first member is the slice with the lowest index, in the parameter that
            was given first to :meth:`Tie.join`; with scales, the first one that is not pinned. Use it for freshly
            initialised weights: the mean of K independent random numbers has their standard deviation divided by the
            square root of K.

    With ``compact=True``, the inner optimizer steps on compact parameters, which have the shared value of each group
    once, followed by the free slices. The state is that of the compact parameters. So every optimizer trains the shared
    values exactly, including those that couple entries (Adafactor, Muon, LAMB, and LBFGS with ``reduction="sum"``).
    Between steps, ``param_groups`` has the parameters of the model; their gradients are read and not written. Call
    :meth:`tie_weights` after a write through ``.data`` that leaves members unequal.

    With a ``strength`` or ``every`` other than 1, the ties are *relaxed*: the members are trained by their own
    gradients, which are left alone. They are pulled together at once and after every ``every`` steps:

    .. math:: w \leftarrow w + \mathtt{strength} \, (P w - w)

    as in locally connected layers that share weights now and then (`Pogodin et al., 2021
    <https://arxiv.org/abs/2106.13031>`_). :meth:`tie_drift` returns how far members are from their mean, and
    :meth:`tie_weights` ties them exactly.

    If the optimizer already has state, the state of each entry is averaged per group, or taken from the first member
    with ``start="first"``, unless the ties are relaxed.

    Raises:
        TypeError: ``optimizer`` is no optimizer, is tied already, or its ``step`` was replaced on the instance;
            ``ties`` are not ties; groups hold something other than integers; a parameter has a dtype, layout or class
            that cannot be tied; or ``strength``, ``every`` or ``compact`` is of the wrong type.
        IndexError: an index, or a dimension, is out of range.
        ValueError: a tie is for a parameter that the optimizer does not hold, or does not fit it; two ties share an
            entry; joined parameters differ in dtype, device or settings, or only some of them are frozen;
            ``reduction``, ``strength``, ``every`` or ``start`` is out of range, or they exclude each other, or do not
            fit the optimizer; entries of a parameter share memory, or it is sharded in a way that cannot be tied; the
            compact mode cannot serve the ties, the optimizer, or its state. Nothing was written in any of these cases.
        RuntimeError: ranks that are tied to each other do different things, or have different ties or settings. All
            methods that make or check ties raise this, on all of these ranks.

    Warns:
        UserWarning: a tie has groups, but ties nothing, because each has one member; it shows what was probably meant.

    Example:
        >>> import torch
        >>> from tieopt import TiedOptimizer, is_tied
        >>> layer, groups = torch.nn.Linear(3, 5), [[0, 2], [1, 3, 4]]
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        >>> optimizer = TiedOptimizer(optimizer, {layer.weight: groups})
        >>> layer(torch.ones(2, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> is_tied(layer.weight, groups)
        True
        >>> isinstance(optimizer, torch.optim.AdamW)
        True
        >>> optimizer
        TiedAdamW(2 groups of 5 members in all, in 1 parameter, reduction='mean')
    """

    _tieopt: Mode
    _tieopt_bases: tuple[type[TiedOptimizer], type[Optimizer]]
    _opt_called: bool

    def __new__(  # noqa: D102
        cls,
        optimizer: Optimizer,
        ties: Ties,
        *,
        reduction: Reduction = "mean",
        strength: float = 1.0,
        every: int = 1,
        compact: bool = False,
        start: Start = "mean",
    ) -> Self:
        with _without_collections(), failing_together(process_groups_in(ties := _read_once(ties))):
            _check_wrappable(optimizer)
            options = Options(reduction, strength, every)
            mode = mode_class(compact)(optimizer.param_groups, ties, options)
            tied_class = _tied_class(cls, type(optimizer))
            states = mode.bind(optimizer, states_of(optimizer), start)

        # Nothing fails from here on.
        vars(optimizer).pop("step", None)
        for name in _HOOKS:
            if not isinstance(vars(optimizer).get(name), OrderedDict):
                setattr(optimizer, name, OrderedDict(vars(optimizer).get(name) or {}))
        optimizer.__class__ = tied_class
        tied = cast(Self, optimizer)
        tied._tieopt = mode
        tied._replace_states(states)
        return tied

    def __init__(
        self,
        optimizer: Optimizer,
        ties: Ties,
        *,
        reduction: Reduction = "mean",
        strength: float = 1.0,
        every: int = 1,
        compact: bool = False,
        start: Start = "mean",
    ) -> None:
        # __new__ did it all; Optimizer.__init__ would begin a second state.
        pass

    @property
    def ties(self) -> tuple[Tie, ...]:
        """The ties, one :class:`Tie` for each that was given, with the parameters that the optimizer has now.

        Labels are renumbered in the order of first members, except sharded ones and those of ties across ranks. The
        ties can be given to another optimizer of these parameters, or to :meth:`retie`.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, is gone, or has moved.
            ValueError: joined parameters have come to differ in dtype, device or settings.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> weight = torch.nn.Parameter(torch.randn(4, 2))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([weight]), {weight: [[0, 3]]})
            >>> optimizer.ties
            (Tie(parameter of shape (4, 2), 1 group of 2 members, 2 free),)
            >>> optimizer.ties[0].parts[0].groups
            tensor([ 0, -1, -1,  0])
        """
        param_groups, ties = self._tieopt.param_groups_of(self), []
        for tie, params in self._tieopt.parameters(param_groups):
            parts = []
            for number in tie.order:
                param, slices = params[number], tie.slices[number]
                # Copies, so that a user who writes to them changes no tie.
                labels, scale, dim, *_ = copy.deepcopy(slices._replace(offset=None, sharding=None))
                if tie.labels_are_sharded:
                    labels = slices.labels_for(param)
                if tie.across is not None:
                    labels[labels != FREE] = tie.across.labels[labels[labels != FREE]]
                part = Part(param, labels, dim, scale, FROZEN if slices.is_frozen else slices.offset_of(param))
                parts.append((part, given_name(param_groups, tie.places[number])))
            process_group = None if tie.across is None else tie.across.process_group
            ties.append(tie_of(parts, tie.given, process_group))
        return tuple(ties)

    @untraced
    @_together
    def tie_gradients(self) -> None:
        r"""Replace the gradients of the members of each group by their mean, in ``.grad``.

        .. math:: g_i \leftarrow s_i \frac{\sum_j s_j g_j}{\sum_j s_j^2}

        ``step()`` does this itself; call it to read or change the tied gradients before a step. A second call changes
        no bit. A gradient that is None stays None, unless a joined parameter has one: then it counts as zero. ``.grad``
        holds the mean with ``reduction="sum"`` as well, and the sum only while the inner optimizer reads it. Dense
        gradients are written in place, in their own dtype. Sparse ones are replaced, and stay sparse if rows of one
        parameter are tied.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone; or the gradient of a
                sharded one is sparse, has a graph, or is not sharded over its mesh.
            ValueError: joined parameters have come to differ in dtype, device or settings.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer, is_tied
            >>> layer = torch.nn.Linear(3, 5)
            >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            >>> optimizer = TiedOptimizer(optimizer, {layer.weight: [[0, 2]]})
            >>> layer(torch.randn(2, 3)).square().sum().backward()
            >>> optimizer.tie_gradients()
            >>> norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), max_norm=1.0)
            >>> is_tied(layer.weight.grad, [[0, 2]])
            True
        """
        param_groups = self._tieopt.param_groups_of(self)
        pairs = self._tieopt.taking_part(self._tieopt.parameters(param_groups), param_groups)
        check_gradients(pairs)
        tie_gradients(pairs, all_parameters(param_groups), self._tieopt.engine)

    @_together
    def grad_norm(self, norm_type: float = 2.0) -> Tensor:
        r"""Return the norm of all gradients, in which every shared value counts once.

        .. math:: \Big( \sum_k |g_k|^p \Big)^{1/p}

        over the shared values and free entries of all parameters. The gradient of a shared value is the one that it is
        trained with: :math:`\sum_i s_i g_i` for ``reduction="sum"``, and this divided by :math:`\sum_i s_i^2` for
        ``"mean"``. So this is the norm that ``torch.nn.utils.get_total_norm`` would return if the shared values were
        the parameters. Pinned entries do not count. Members of relaxed ties count as free entries, because they are
        trained by their own gradients.

        Gradients may be tied or not, and are not written. Call it after ``scaler.unscale_(optimizer)``. If the
        optimizer has a method of this name, it keeps its own; ``TiedOptimizer.grad_norm(optimizer)`` is this one.

        Args:
            norm_type: p, a number above 0; ``float("inf")`` for the largest modulus.

        Returns:
            The norm, a tensor without dimensions; 0 if there are no gradients. With sharded parameters, and with ties
            across ranks, it is that of the parameters of all ranks, and each of them has to call this.

        Raises:
            TypeError: ``norm_type`` is no number.
            ValueError: ``norm_type`` is 0, negative or NaN; or joined parameters have come to differ in dtype, device
                or settings.
            RuntimeError: as for :meth:`tie_gradients`.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = TiedOptimizer(torch.optim.SGD([weight], lr=1.0), {weight: [[0, 1]]}, reduction="sum")
            >>> weight.grad = torch.ones(2)
            >>> optimizer.grad_norm()
            tensor(2.)
        """
        return norm.grad_norm(self._tieopt, self._tieopt.param_groups_of(self), norm_type)

    @_together
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        r"""Scale all gradients so that :meth:`grad_norm` is no larger than ``max_norm``.

        .. math:: g \leftarrow g \cdot \min \Big( 1, \frac{\mathtt{max\_norm}}{\mathtt{norm} + 10^{-6}} \Big)

        as ``torch.nn.utils.clip_grad_norm_`` does. For optimizers that work entry by entry, the step is then that of
        the shared values with their gradients clipped. Call it when all gradients are accumulated, after
        ``scaler.unscale_(optimizer)`` and before ``step()``. It does not tie gradients, and they need not be tied. A
        second call clips no further, except for the :math:`10^{-6}`.

        Args:
            max_norm: a number, 0 or more.
            norm_type: as for :meth:`grad_norm`.

        Returns:
            The norm before clipping, as :meth:`grad_norm` returns it.

        Raises:
            TypeError: ``max_norm`` or ``norm_type`` is no number.
            ValueError: ``max_norm`` is negative or NaN; or as for :meth:`grad_norm`.
            RuntimeError: as for :meth:`tie_gradients`. Nothing was written in any of these cases.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = TiedOptimizer(torch.optim.SGD([weight], lr=1.0), {weight: [[0, 1]]}, reduction="sum")
            >>> weight.grad = torch.ones(2)
            >>> optimizer.clip_grad_norm_(max_norm=1.0)
            tensor(2.)
            >>> optimizer.step()
            >>> weight.data
            tensor([-1.0000, -1.0000])
        """
        return norm.clip_grad_norm_(self._tieopt, self._tieopt.param_groups_of(self), max_norm, norm_type)

    @between_graphs
    @_together
    def tie_weights(self) -> None:
        r"""Replace the members of each group by their mean, after something else has written to the weights.

        .. math:: w_i \leftarrow s_i \frac{\sum_j s_j w_j}{\sum_j s_j^2}

        Idempotent bit for bit, but for the bits of NaN. A frozen parameter, whose ``requires_grad`` is False, is not
        written. Relaxed ties are tied exactly.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, is gone, or has moved.
            ValueError: joined parameters have come to differ in dtype, device or settings.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer, is_tied
            >>> weight = torch.nn.Parameter(torch.randn(4, 2))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([weight]), {weight: [[0, 1]]})
            >>> _ = torch.nn.init.xavier_uniform_(weight)
            >>> optimizer.tie_weights()
            >>> is_tied(weight, [[0, 1]])
            True
        """
        self._tieopt.tie_all(self)

    def retie(
        self,
        ties: Ties,
        *,
        start: Start = "mean",
        reduction: Reduction | None = None,
        strength: float | None = None,
        every: int | None = None,
    ) -> None:
        """Replace all ties by others, also during training.

        The weights are tied at once. The state of each entry is averaged per group or, with ``start="first"``, taken
        from the first member. State of another shape than its parameter is left alone: joined parameters that were
        trained for different numbers of steps keep their step counts.

        The ties are for the parameters that are in the parameter groups now, even if tied ones were replaced or
        removed. In the compact mode, state that cannot be converted, such as the history of LBFGS, is dropped with a
        warning, and starts anew; state that has the shape of its parameter as it is now is kept.

        Args:
            ties: all new ties, as for :class:`TiedOptimizer`. They may include parameters that were added since.
            start: as for :class:`TiedOptimizer`, for this change of the ties only. Groups that are tied already, and
                get no other members, stay as they are.
            reduction: as for :class:`TiedOptimizer`, from now on; None keeps it.
            strength: as for :class:`TiedOptimizer`, from now on; None keeps it. So the pull can follow a schedule:
                ``optimizer.retie(optimizer.ties, strength=0.1 * epoch)``.
            every: as for :class:`TiedOptimizer`, from now on; None keeps it.

        Raises:
            TypeError: as for :class:`TiedOptimizer`; or this is called on a framework's wrapper of the optimizer.
            IndexError: an index, or a dimension, is out of range.
            ValueError: as for :class:`TiedOptimizer`, except for state that cannot be converted.
            RuntimeError: a step is running, for example in a closure. Everything stays as it is in any of these cases.

        Warns:
            UserWarning: as for :class:`TiedOptimizer`.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer, is_tied
            >>> weight = torch.nn.Parameter(torch.randn(4, 2))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([weight]), {weight: [[0, 1]]})
            >>> optimizer.retie({weight: [[0, 1, 2]]})
            >>> is_tied(weight, [[0, 1, 2]])
            True
        """
        _check_itself(self)
        kept = self._tieopt
        if kept.running:
            raise refusal(
                RuntimeError,
                "Ties cannot change in the middle of a step, which goes on with the old ones.",
                expected="retie() or untie() between steps",
                got="a call from within step(), its closure, or another method of the optimizer",
            )
        said = zip((reduction, strength, every), kept.options, strict=True)
        process_groups = process_groups_in(ties := _read_once(ties))
        with _without_collections(), failing_together([*kept.process_groups, *process_groups]):
            kept.agree_to(f"retie() with {len(process_groups)} ties across ranks")
            options = Options(*(option if new is None else new for new, option in said))
            mode = type(kept)(self.param_groups, ties, options)
            lost = Lost()
            states = mode.bind(self, [kept.state_without(self, state, lost) for state in states_of(self)], start, lost)
        mode.replace(kept, states)
        self._tieopt = mode
        self._replace_states(states)
        _warn_of(lost, self.param_groups)

    def _replace_states(self, states: Sequence[Mapping[Any, Any]]) -> None:
        # The same objects: the optimizer and those that it holds may share them.
        for kept, state in zip(states_of(self), states, strict=True):
            kept.clear()
            kept.update(state)

    def untie(self) -> None:
        """Remove all ties: from now on, every entry is trained separately.

        The weights stay as they are, and so does the state; after the compact mode, each member gets the state of its
        group. This works even if tied parameters were replaced or removed. In the compact mode, state that cannot be
        converted is dropped with a warning, and starts anew: the history of LBFGS, or the state of a parameter that was
        replaced by one of another shape.

        Raises:
            TypeError: this is called on a framework's wrapper of the optimizer.
            RuntimeError: a step is running, for example in a closure.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer, is_tied
            >>> weight = torch.nn.Parameter(torch.ones(2, 3))
            >>> optimizer = TiedOptimizer(torch.optim.SGD([weight]), {weight: [[0, 1]]})
            >>> optimizer.untie()
            >>> optimizer.ties, is_tied(weight, [[0, 1]])
            ((), True)
            >>> weight.grad = torch.tensor([[1.0], [2.0]]).expand(2, 3)
            >>> optimizer.step()
            >>> is_tied(weight, [[0, 1]])
            False
        """
        self.retie(())

    @_together
    def tie_drift(self) -> float:
        r"""Return the largest distance of a member from its group's mean, over all ties; 0.0 if all are tied.

        .. math:: \max_i \left| w_i - (P w)_i \right|

        over single entries, with :math:`P` as for :class:`TiedOptimizer`, and the modulus of complex entries.

        Returns:
            The drift, in the unit of the weights; NaN if a tied entry is NaN. For sharded parameters it is that of all
            ranks, and each of them has to call this.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, is gone, or has moved.
            ValueError: joined parameters have come to differ in dtype, device or settings.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> weight = torch.nn.Parameter(torch.zeros(3))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([weight]), {weight: [[0, 1]]})
            >>> _ = weight.data.copy_(torch.tensor([1.0, 2.0, 9.0]))
            >>> optimizer.tie_drift()
            0.5
            >>> optimizer.tie_weights()
            >>> optimizer.tie_drift()
            0.0
        """
        return self._tieopt.engine.drift(self._tieopt.parameters(self._tieopt.param_groups_of(self)))

    @_together
    def tie_summary(self) -> TieSummary:
        """Return a table of the ties, to be printed or read as numbers, with a line for each tied parameter.

        The table counts slices: ``members`` are in one of the ``groups``, and ``free`` ones in none. ``distinct``
        counts values, not slices: the entries of the shared values and of the free slices, without pinned ones.
        ``drift`` is as for :meth:`tie_drift`, over all parameters of a tie. A parameter with several ties has a line
        for each.

        Lines below the table list joined parameters, which have distinct values in common, and regular ties, which are
        computed as views, without an index: joined parameters, perhaps transposed or flipped, and matrices with
        symmetries.

        Returns:
            The table as a string, without a line break at the end. It has the numbers as ``rows`` for the lines, and as
            ``entries``, ``distinct``, ``ratio`` and ``state_bytes`` for the whole optimizer; see
            :class:`~tieopt.modes.summary.TieSummary`.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, is gone, or has moved.
            ValueError: joined parameters have come to differ in dtype, device or settings.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> layer = torch.nn.Linear(3, 6)
            >>> optimizer = torch.optim.SGD(layer.named_parameters(), lr=0.1)
            >>> optimizer = TiedOptimizer(optimizer, {"weight": [[0, 2], [1, 3, 4]]})
            >>> print(optimizer.tie_summary())
            parameter  shape   slices  groups  members  free  distinct  drift
            weight     (6, 3)       6       2        5     1         9      0
            >>> summary = optimizer.tie_summary()
            >>> f"{summary.distinct} of {summary.entries} values are left, {summary.ratio:.1%}"
            '15 of 24 values are left, 62.5%'
        """
        return summary.summarized(self._tieopt, self)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state of the optimizer, with the fingerprints of the ties.

        This is :meth:`torch.optim.Optimizer.state_dict` with one more key. An optimizer without ties can load it,
        unless the mode is compact: then it is the state of compact parameters. ``torch.load`` reads it with
        ``weights_only=True``.

        Args:
            *args: as for the wrapped optimizer.
            **kwargs: as for the wrapped optimizer.

        Returns:
            ``"state"`` and ``"param_groups"`` of the optimizer and, if anything is tied, ``"tieopt"``, which has the
            fingerprints by the numbers of the parameters, the number of steps of relaxed ties, and whether the mode is
            compact.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, is gone, or has moved.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> weight = torch.nn.Parameter(torch.randn(4, 2))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([weight]), {weight: [[0, 1]]})
            >>> list(optimizer.state_dict())
            ['state', 'param_groups', 'tieopt']
            >>> torch.optim.Adam([weight]).load_state_dict(optimizer.state_dict())
        """
        # In the middle of a step in another thread the state has other keys.
        with self._tieopt.lock:
            self._tieopt.follow(self)
            state_dict = super().state_dict(*args, **kwargs)
            saved = self._tieopt.saved(self._tieopt.param_groups_of(self))
            state_dict = self._tieopt.to_save(self, state_dict)
        return {**state_dict, _TIEOPT: saved} if saved else state_dict

    @_together
    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load a state that was saved with the same ties, in either mode, or without ties.

        A state that was saved without ties, or with relaxed ones, is averaged per group. Load the weights with
        ``model.load_state_dict``. Training then continues bit for bit as if it had not stopped.

        Args:
            state_dict: a result of :meth:`state_dict`, or of an optimizer without ties for the same parameters. It is
                not written to.
            *args: as for the wrapped optimizer.
            **kwargs: as for the wrapped optimizer.

        Raises:
            ValueError: it was saved with other ties; it was saved in the other mode and cannot be converted, such as
                the history of LBFGS; or it does not fit the parameter groups.
            RuntimeError: a parameter has another shape than when it was tied, is gone, or has moved.
                Nothing is loaded in any of these cases.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> weight = torch.nn.Parameter(torch.randn(4, 2))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([weight]), {weight: [[0, 1]]})
            >>> saved = optimizer.state_dict()
            >>> optimizer.load_state_dict(saved)
            >>> optimizer.retie({weight: [[0, 2]]})
            >>> optimizer.load_state_dict(saved)
            Traceback (most recent call last):
            ...
            ValueError: The state was saved with other ties.
            ...
        """
        mode = self._tieopt
        mode.follow(self)
        pairs, settings = mode.parameters(self.param_groups), settings_in(self.param_groups)
        saved, convert, is_checked = state_dict.get(_TIEOPT), None, False

        def checked(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            nonlocal saved, convert, is_checked
            if is_checked:
                return given
            is_checked = True
            saved = given.get(_TIEOPT, saved)
            if _TIEOPT in {**state_dict, **given}:
                mode.check_saved(saved, self.param_groups)
            convert = converter(mode, self, None if saved is None else saved.get("compact", False))
            given = mode.to_load(_without_ties(given))
            mode.agree_to("load_state_dict()")
            if convert is not None:
                params = by_number(given, self.param_groups)
                convert({params[number]: state for number, state in given["state"].items() if number in params})
            return given

        # An inner class with a method of its own may never come to the hooks.
        is_torchs = self._tieopt_bases[1].load_state_dict is Optimizer.load_state_dict
        if is_torchs and self._optimizer_load_state_dict_pre_hooks:
            # The last hook checks what the others have made of the state.
            hook = self.register_load_state_dict_pre_hook(checked)
            try:
                super().load_state_dict(_without_ties(state_dict), *args, **kwargs)
            finally:
                hook.remove()
        else:
            super().load_state_dict(checked(self, state_dict), *args, **kwargs)
        if saved is not None:
            mode.steps = saved.get("steps", 0)
        tied = mode.tied_since(saved, self.param_groups)
        self.state.update(tied_state(self.state, [pair for pair in pairs if pair[0] in tied], settings))
        if convert is not None:
            converted = convert(self.state)
            self.state.update(converted)
            for param, state in converted.items():
                if not state:
                    # Adagrad looks for a step count in all that there is.
                    del self.state[param]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, whose parameters are free until :meth:`retie`.

        Args:
            param_group: parameters and their settings, as for :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: ``param_group`` is no dict, or its parameters are no tensors, as torch says.
            ValueError: a parameter is in a group already, or is no leaf, as torch says.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer, is_tied
            >>> first, second = (torch.nn.Parameter(torch.randn(4, 2)) for _ in range(2))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([first]), {first: [[0, 1]]})
            >>> optimizer.add_param_group({"params": [second]})
            >>> is_tied(second, [[0, 1]])
            False
            >>> optimizer.retie({first: [[0, 1]], second: [[0, 1]]})
            >>> is_tied(second, [[0, 1]])
            True
        """
        super().add_param_group(param_group)
        self._tieopt.remember_places(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy has other parameters, and is to notice as well if they are reordered.
        self._tieopt.remember_places(self._tieopt.param_groups_of(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({summary.line(self._tieopt)})"

    def __str__(self) -> str:
        # With every setting of every parameter group, as torch prints an optimizer.
        return f"{super().__repr__()}\nTies: {summary.line(self._tieopt)}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made at run time; pickle would not find it by its name.
        return _restored, (*self._tieopt_bases, self._tieopt), self._tieopt.at_rest(self, self.__getstate__())


def _without_ties(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state_dict.items() if key != _TIEOPT}


def _tied_step(inner: type[Optimizer]) -> Callable[..., Any]:
    """The step of a tied optimizer: hooks, tie the gradients, inner step, tie the weights, hooks."""

    # torch's optimizers turn gradients off outside of the graph that torch.compile makes of their step: that is how the
    # compiler knows that it may write in place. Here the ties have graphs, too, so gradients are turned off around all.
    @between_graphs
    def step(self: TiedOptimizer, *args: Any, **kwargs: Any) -> Any:
        # Looked up now, as hosts patch the step of a class. What torch puts around it is done once, around the ties.
        inner_step: Any = inner.step
        if getattr(inner_step, "__code__", None) is _HOOKED_CODE:
            inner_step = inner_step.__wrapped__
        self._opt_called = True
        stepping, grad = self._tieopt.step_class(self._tieopt, self), torch.is_grad_enabled()
        if getattr(inner_step, "__code__", None) is _USE_GRAD_CODE:
            inner_step, grad = inner_step.__wrapped__, self.defaults.get("differentiable", False)
        if args and callable(args[0]):
            args = (stepping.around(args[0]), *args[1:])
        elif callable(kwargs.get("closure")):
            kwargs["closure"] = stepping.around(kwargs["closure"])
        with torch.set_grad_enabled(grad), stepping:
            return stepping.run(inner_step, None, *args, **kwargs)

    step.__doc__ = inner.step.__doc__
    step.__signature__ = inspect.signature(inner.step)  # type: ignore[attr-defined]
    # A graph of it would be for one optimizer, and torch.compile makes no more than 8 for one function.
    hooked: Callable[..., Any] = between_graphs(copied(Optimizer.profile_hook_step(step)))
    hooked.hooked = True  # type: ignore[attr-defined]
    # Schedulers wrap the step of an instance to set `_opt_called`, unless it is marked so. This step
    # sets it itself, so that a scheduler built before the ties, whose wrapper is gone, goes on as well.
    hooked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return hooked


# What torch puts around the step of every optimizer, to fire the hooks and mark the profile, and around those of its
# own, to turn gradients off. They are told by their code: functools.wraps copies marks to whatever wraps them.
_HOOKED_CODE = Optimizer.profile_hook_step(lambda self: None).__code__
_USE_GRAD_CODE = _use_grad_for_differentiable(lambda self: None).__code__


def _tied_method(inner: type[Optimizer], name: str) -> Callable[..., Any]:
    """A method other than ``step()``, such as ``first_step()`` or ``eval()``, with the gradients and weights tied.

    It may read gradients and write weights as ``step()`` does, and whether it does cannot be seen.
    """
    inner_method = getattr(inner, name)
    # Those of schedule-free and other optimizers, which exchange the weights that are trained and those to evaluate.
    reads_gradients = name not in ("train", "eval")
    names = list(inspect.signature(inner_method).parameters)
    closure_at = names.index("closure") - 1 if "closure" in names else len(names)

    @wraps(inner_method)
    def method(self: TiedOptimizer, *args: Any, **kwargs: Any) -> Any:
        if self._tieopt.running:
            # The step that calls it ties.
            return inner_method(self, *args, **kwargs)
        self._tieopt.check_method(self, inner_method)
        stepping = self._tieopt.step_class(self._tieopt, self, reads_gradients=reads_gradients)
        if callable(kwargs.get("closure")):
            kwargs["closure"] = stepping.around(kwargs["closure"])
        elif closure_at < len(args) and callable(args[closure_at]):
            args = (*args[:closure_at], stepping.around(args[closure_at]), *args[closure_at + 1 :])
        with stepping:
            return stepping.run(inner_method, self._tieopt.pairs_of_calls(self), *args, **kwargs)

    return method


def _tied_zero_grad(cls: type[TiedOptimizer], inner: type[Optimizer]) -> Callable[..., Any]:
    """``zero_grad`` that also clears the gradients of the model, in the middle of a step of other parameters."""
    below = cls if cls.zero_grad is not Optimizer.zero_grad else inner

    @wraps(below.zero_grad)
    def zero_grad(self: TiedOptimizer, *args: Any, **kwargs: Any) -> None:
        super(_tied_classes[cls, inner], self).zero_grad(*args, **kwargs)
        self._tieopt.clear_set_aside(self.param_groups)

    return zero_grad


def _methods(inner: type[Optimizer]) -> set[str]:
    """The names of the public methods that an optimizer's classes add to those of ``Optimizer``."""
    return {
        name
        for kind in inner.__mro__
        if not issubclass(Optimizer, kind)
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("_") and not hasattr(Optimizer, name)
    }


_tied_classes: dict[tuple[type, type], type[TiedOptimizer]] = {}


def _tied_class(cls: type[TiedOptimizer], inner: type[Optimizer]) -> type[TiedOptimizer]:
    """The subclass of both, one for all optimizers of a class."""
    if (cls, inner) not in _tied_classes:
        namespace = {
            "__doc__": inner.__doc__,
            "__module__": inner.__module__,
            "_tieopt_bases": (cls, inner),
            "step": _tied_step(inner),
            "zero_grad": _tied_zero_grad(cls, inner),
            **{
                name: _tied_method(inner, name)
                for name in _methods(inner)
                if not hasattr(cls, name) or name in _YIELDING
            },
        }
        bases = (*_layout_base(inner), cls, inner)
        _tied_classes[cls, inner] = new_class(
            f"Tied{inner.__name__}", bases, exec_body=lambda body: body.update(namespace)
        )
    return _tied_classes[cls, inner]


def _layout_base(inner: type) -> tuple[type, ...]:
    """A first base that gives a tied class the layout in memory of the inner one.

    The class of an object can only be replaced by one of the same layout, which a class has from its first base. Where
    that of the inner class leads to another base than ``Optimizer``, as in ``class Inner(ABC, Optimizer)``, the
    attributes of objects were added to that one.
    """
    added: Any = inner
    while added.__base__.__dictoffset__:
        added = added.__base__
    return () if added is Optimizer else (new_class("Layout", (added.__base__,)),)


def _restored(cls: type[TiedOptimizer], inner: type[Optimizer], mode: Mode) -> TiedOptimizer:
    """An optimizer without state, for ``pickle`` and ``copy`` to fill."""
    optimizer = object.__new__(_tied_class(cls, inner))
    optimizer._tieopt = mode
    return optimizer


def _warn_of(lost: Lost, param_groups: ParamGroups) -> None:
    """Warn of the parameters whose state the optimizer begins anew."""
    dropped = [
        f"{name_of(param_groups, place)} of shape {tuple(place.shape)}: {', '.join(map(str, lost[param]))}"
        for place in all_places(param_groups)
        if (param := param_groups[place.group]["params"][place.position]) in lost
    ]
    if dropped:
        warnings.warn(
            "The optimizer begins the state of a parameter anew: what it had cannot be converted to another shape.\n"
            f"  Dropped: {'; '.join(dropped)}",
            stacklevel=users_level(),
        )


def _read_once(ties: Any) -> Any:
    return list(ties) if isinstance(ties, Iterable) and not isinstance(ties, (Mapping, Tensor, str)) else ties


def _check_itself(optimizer: Any) -> None:
    """Refuse an object of the same class that only asks the tied optimizer for its attributes, as those of Lightning.

    What was written to it would not reach the optimizer.
    """
    if "_tieopt" not in vars(optimizer):
        raise refusal(
            TypeError,
            "Call this on the tied optimizer itself, and not on what a framework has put in its place.",
            expected="the tied optimizer, for example `self.optimizers().optimizer` in Lightning",
            got=type(optimizer).__name__,
        )


def _check_wrappable(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        what = "TiedOptimizer wraps an optimizer."
        raise refusal(TypeError, what, expected="a torch.optim.Optimizer", got=shown(optimizer))
    if isinstance(optimizer, TiedOptimizer):
        raise refusal(
            TypeError,
            "The optimizer is tied already.",
            expected="an optimizer without ties; optimizer.retie(ties) replaces them, all at once",
            got=f"{type(optimizer).__name__} with {shown(optimizer.ties)}",
        )
    step = vars(optimizer).get("step")
    # A scheduler replaced it, around the step of the class: that may go.
    scheduled = hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is type(optimizer).step
    if step is not None and not scheduled:
        raise refusal(
            TypeError,
            "The optimizer's step was replaced on the instance, and ties cannot go below that.",
            expected="an optimizer with the step of its class; tie it first, then replace the step",
            got=f"{type(optimizer).__name__} with step = {shown(step)}",
        )
