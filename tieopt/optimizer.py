"""When the ties are applied: an optimizer that keeps them, and is an optimizer to everybody.

A tied optimizer *is* the optimizer that was wrapped: the same object, whose class is from then on a
subclass of both :class:`TiedOptimizer` and its own class, as ``torch.nn.utils.parametrize`` does with
modules. So there is one state and one list of parameter groups, ``isinstance`` holds, and whatever a
scheduler, a gradient scaler or a framework reads or writes, before or after, it reads or writes there.

What the class adds is held in one attribute, and its public names say ``tie``, so that it hides nothing that the
optimizer has.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import CodeType, new_class
from typing import Any, Self, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable

from tieopt.engine.engine import Pairs
from tieopt.engine.graphs import between_graphs, copied, untraced
from tieopt.errors import shown, users_level
from tieopt.modes import summary
from tieopt.modes.compact import CompactStep, check_served
from tieopt.modes.conversion import Lost, compacted, expanded, without_history
from tieopt.modes.full import FullStep, is_differentiable
from tieopt.modes.gradients import tie_gradients, with_gradients
from tieopt.modes.mode import Binding
from tieopt.modes.state import settings_in, tied_state
from tieopt.modes.twin import compact_namespace, held_optimizers, states_of
from tieopt.numbers.reduction import Reduction
from tieopt.numbers.start import Start, check_start, start_from_first_
from tieopt.ties.components import components
from tieopt.ties.places import ParamGroups, all_places, given_name, name_of, parameters_of
from tieopt.ties.slices import is_idle
from tieopt.ties.tie import Tie, Ties, with_name

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

# Where what the ties add stands in a state_dict, beside "state" and "param_groups".
_TIEOPT = "tieopt"


class TiedOptimizer(Optimizer):
    r"""Keeps entries of the parameters of any optimizer equal.

    Before a step the gradients of each group are replaced by their mean (or sum), and after it the
    members by their mean:

    .. math::

        g \leftarrow P g, \qquad w \leftarrow \operatorname{step}(w, g), \qquad w \leftarrow P w,
        \qquad (P w)_i = s_i \frac{\sum_j s_j w_j}{\sum_j s_j^2}

    where the sums are over the group of entry :math:`i`, :math:`s_i` is its scale, 1 unless a :class:`Tie`
    says otherwise, and free entries stay as they are. :math:`P` is the orthogonal projection onto tied
    weights. For an optimizer that works entry by entry this is exactly training the one value that the
    members share.

    The wrapped optimizer becomes the tied one, as ``torch.nn.utils.parametrize`` does it with modules:
    ``TiedOptimizer(optimizer, ties) is optimizer``, still an instance of its own class. The weights are tied
    at once, but for frozen parameters (``requires_grad`` is False), which are not written.

    The idea is from a `forum question
    <https://discuss.pytorch.org/t/tying-weights-from-different-neurons-and-averaging-the-gradients/20934>`_:
    rows that stay equal, and whose gradients are averaged.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`. What is tied may have any dtype, layout and device that
            :class:`Tie` says; parameters without ties, any.
        ties: a mapping from parameters to groups (lists of lists of indices, or labels; see :class:`Tie`), or a
            :class:`Tie`, or an iterable of them. Names may stand for parameters if the optimizer was built from
            ``named_parameters()``. No entry may be in two ties.
        reduction: ``"mean"`` steps on the mean of the members' gradients, ``"sum"`` on their sum, which
            is the gradient that autograd gives to one parameter used in several places. After the
            step ``.grad`` holds the mean in either case (but for the rounding of multiplying and
            dividing by the size), so that gradients accumulate; in the compact mode it is left alone. With
            scales the sum is :math:`\sum_i s_i g_i`, the gradient of the shared value, times the scale of each
            member. LBFGS and other optimizers that compare the loss with its gradient take ``"mean"`` by default, and
            ``"sum"`` with ``compact=True``.
        strength: how far a projection moves the weights towards the mean, from 0, not at all, to 1.
        every: after every how many steps the weights are projected; 1 or more. Steps with a learning rate of zero,
            in which nothing moves, do not count.
        compact: trains one entry for each group instead of all its members: the optimizer has state, and does
            arithmetic, for what is distinct alone. See below.
        start: what the shared values start from: ``"mean"`` is the mean of the members, ``"first"`` the first member,
            as it is where modules share a Parameter. It is the slice with the lowest index or, of parameters
            that are joined, that in the one which was given first to :meth:`Tie.join`; with scales the first one that
            is not pinned. Take it for weights that were just initialised: the mean of K independent random numbers has
            their standard deviation divided by the square root of K.

    With ``compact=True`` the inner optimizer steps on compact parameters, which have the shared value of each
    group once, and after these the free slices. To everything else it looks the same: ``param_groups`` has the
    parameters of the model, whose gradients are read and not written. The state is that of
    the compact parameters. So every optimizer trains the shared values exactly, those that couple entries
    (Adafactor, Muon, LAMB, and LBFGS with ``reduction="sum"``) as well. What is written to the weights between steps
    counts; where it was written through ``.data`` and is not tied, call :meth:`tie_weights` first.

    With another ``strength`` or ``every`` than 1 the ties are *relaxed*: the members are trained by their own
    gradients, which are left alone, and at once and after every ``every`` steps they are pulled together:

    .. math:: w \leftarrow w + \mathtt{strength} \, (P w - w)

    as in locally connected layers that share weights now and then (`Pogodin et al., 2021
    <https://arxiv.org/abs/2106.13031>`_). They are approximate then, and :meth:`tie_drift` says by how much;
    :meth:`tie_weights` ties them exactly.

    An optimizer that has state already is made to look as if its weights had been tied all along: what it
    keeps of each entry is averaged per group, too, or is that of the first member with ``start="first"``, unless the
    ties are relaxed.

    Raises:
        TypeError: ``optimizer`` is no optimizer, is tied already, or its ``step`` was replaced on the instance;
            ``ties`` are not ties; groups hold something other than integers; a parameter has a dtype, layout or class
            that cannot be tied; or ``strength``, ``every`` or ``compact`` is of the wrong type.
        IndexError: an index, or a dimension, is out of range.
        ValueError: a tie is for a parameter that the optimizer does not hold, or does not fit it; two ties
            share an entry; joined parameters differ in dtype, device or settings, or only some of them
            are frozen; ``reduction``, ``strength``, ``every`` or ``start`` is out of range, or they exclude each other,
            or do not fit the optimizer; entries of a parameter share memory, or it is sharded in a way that cannot be
            tied; the compact mode cannot serve the ties, the optimizer, or what it has in its state. Nothing was
            written in any of these cases.

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

    _tieopt: Binding
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
        _check_wrappable(optimizer)
        binding = Binding(optimizer.param_groups, ties, reduction, strength, every, compact)
        check_start(start, relaxed=binding.relaxed)
        tied_class = _tied_class(cls, type(optimizer), compact)
        states = _tie_all(optimizer, states_of(optimizer), binding, start)

        # Nothing fails from here on.
        vars(optimizer).pop("step", None)
        for name in _HOOKS:
            if not isinstance(vars(optimizer).get(name), OrderedDict):
                setattr(optimizer, name, OrderedDict(vars(optimizer).get(name) or {}))
        optimizer.__class__ = tied_class
        tied = cast(Self, optimizer)
        tied._tieopt = binding
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
        """What is tied, one :class:`Tie` for each that was given, with the parameters that the optimizer has now.

        Labels are numbered anew, in the order of first members. The ties can be given to another optimizer of these
        parameters, or to :meth:`retie`.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone.
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
        return tuple(
            Tie.join(
                *(
                    with_name(
                        Tie(param, slices.labels, dim=slices.dim, scale=slices.scale),
                        given_name(self.param_groups, place),
                    )
                    for param, slices, place in zip(params, tie.slices, tie.places, strict=True)
                )
            )
            for tie, params in self._tieopt.parameters(self.param_groups)
        )

    @between_graphs
    def tie_gradients(self) -> None:
        r"""Replaces the gradients of the members of each group by their mean, in ``.grad``.

        .. math:: g_i \leftarrow s_i \frac{\sum_j s_j g_j}{\sum_j s_j^2}

        ``step()`` does so itself; call this to read or to clip the tied gradients before. Idempotent
        bit for bit. A gradient that is None stays None, unless a joined parameter has one: then it counts as
        zero. It is the mean for ``reduction="sum"`` too: the sum stands in ``.grad`` only while the inner
        optimizer reads it. Dense gradients are written in place, in their own dtype; sparse ones are replaced,
        and stay sparse where rows of one parameter are tied.

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
        tie_gradients(_with_gradients(self), self._tieopt.batches)

    @between_graphs
    def tie_weights(self) -> None:
        r"""Replaces the members of each group by their mean; for when anything else wrote to the weights.

        .. math:: w_i \leftarrow s_i \frac{\sum_j s_j w_j}{\sum_j s_j^2}

        Idempotent bit for bit. A frozen parameter, whose ``requires_grad`` is False, is not written.
        Relaxed ties are tied exactly.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone.
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
        pairs = _trained(self._tieopt.parameters(self.param_groups))
        self._tieopt.tie_weights(pairs, differentiable=is_differentiable(self))
        self._tieopt.note_all(self.param_groups)

    def retie(self, ties: Ties, *, start: Start = "mean") -> None:
        """Replaces all ties by others, in the middle of a training.

        The weights are tied at once, and the state of the optimizer is made to look as if they had been
        tied all along: what it keeps of each entry is averaged per group or, with ``start="first"``, is that of the
        first member. What has not the shape of its parameter is left alone: joined parameters that were trained for
        different numbers of steps keep their step counts.

        It binds to the parameters that are in the parameter groups now, whatever has become of those that were tied.
        In the compact mode, state that cannot be converted, as the history of LBFGS, is dropped with a warning, and the
        optimizer begins it anew; what has the shape of its parameter as it is now is kept.

        Args:
            ties: as for :class:`TiedOptimizer`, all that there are to be. Parameters that were added since may be
                among them.
            start: as for :class:`TiedOptimizer`, for this change of the ties alone. Groups that are tied already, and
                get no other members, stay as they are.

        Raises:
            TypeError: as for :class:`TiedOptimizer`; or it is called on what a framework has put in the place of the
                optimizer.
            IndexError: an index, or a dimension, is out of range.
            ValueError: as for :class:`TiedOptimizer`, except for state that cannot be converted.
            RuntimeError: a step is running, as it is in a closure. Everything stays as it is in any of these cases.

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
            raise RuntimeError(
                "Ties cannot change in the middle of a step, which goes on with the old ones.\n"
                "  Expected: retie() or untie() between steps\n"
                "  Got:      a call from within step(), its closure, or another method of the optimizer"
            )
        compact = kept.compact is not None
        binding = Binding(self.param_groups, ties, kept.reduction, kept.strength, kept.every, compact)
        check_start(start, relaxed=binding.relaxed)
        binding.replace(kept)
        states: Sequence[Mapping[Any, Any]] = states_of(self)
        lost = Lost()
        if kept.compact is not None:
            states = [kept.compact.released(self, state, lost) for state in states]
        states = _tie_all(self, states, binding, start, lost)
        # What was compiled goes on as far as it is for what is still there.
        binding.batches.copies = kept.batches.copies
        if binding.compact is not None and kept.compact is not None:
            binding.compact.twin = kept.compact.twin
        if not compact and not any(states):
            binding.inner_copies = kept.inner_copies
        self._tieopt = binding
        self._replace_states(states)
        _warn_of(lost, self.param_groups)

    def _replace_states(self, states: Sequence[Mapping[Any, Any]]) -> None:
        # The same objects: the optimizer and those that it holds may share them.
        held = states_of(self)
        if self._tieopt.compact is not None:
            for kept in held:
                kept.clear()
        self.state.update(states[0])
        for kept, state in zip(held[1:], states[1:], strict=True):
            kept.update(state)

    def untie(self) -> None:
        """Ends all ties: from here on every entry is trained for itself.

        The weights stay as they are, and so does the state; after the compact mode each member gets that of its group.
        It works whatever has become of the parameters that were tied. In the compact mode, state that cannot be
        converted, as the history of LBFGS or that of a parameter which was replaced by one of another shape, is dropped
        with a warning, and the optimizer begins it anew.

        Raises:
            TypeError: it is called on what a framework has put in the optimizer's place.
            RuntimeError: a step is running, as it is in a closure.

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

    def tie_drift(self) -> float:
        r"""The largest distance of a member from its group's mean, over all ties; 0.0 if all are tied.

        .. math:: \max_i \left| w_i - (P w)_i \right|

        over single entries, with :math:`P` as for :class:`TiedOptimizer`; of complex entries the modulus counts.

        Returns:
            The drift, in the unit of the weights; NaN if a tied entry is NaN. Of sharded parameters it is that of
            all ranks, each of which has to call this.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone.
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
        drifts = [self._tieopt.drift(*pair) for pair in self._tieopt.parameters(self.param_groups)]
        # Unlike Python's, this maximum is NaN if a drift is.
        return float(torch.tensor([0.0, *drifts], dtype=torch.float64, device="cpu").max())

    def tie_summary(self) -> str:
        """A table of the ties, a line for each tied parameter, to be printed.

        It counts the slices: ``members`` are in one of the ``groups``, ``free`` ones in none, and ``distinct`` are
        the shared values and the free slices, those that are pinned at zero left out. ``drift`` is as for
        :meth:`tie_drift`, over all parameters of a tie. A parameter with several ties has a line for each, and lines
        below the table say which parameters are joined, as these have distinct slices in common.

        Returns:
            The lines of the table, without a line break at the end.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone.
            ValueError: joined parameters have come to differ in dtype, device or settings.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> layer = torch.nn.Linear(3, 6)
            >>> optimizer = torch.optim.SGD(layer.named_parameters(), lr=0.1)
            >>> optimizer = TiedOptimizer(optimizer, {"weight": [[0, 2], [1, 3, 4]]})
            >>> print(optimizer.tie_summary())
            parameter  shape   slices  groups  members  free  distinct  drift
            weight     (6, 3)       6       2        5     1         3      0
        """
        return summary.table(self._tieopt, self.param_groups)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state of the wrapped optimizer, and beside it the fingerprints of the ties.

        As :meth:`torch.optim.Optimizer.state_dict`, with one more key. A bare optimizer goes on with it, unless the
        mode is compact: then it is the state of compact parameters. :meth:`load_state_dict` loads a bare
        optimizer's, too. ``torch.load`` reads it with ``weights_only=True``.

        Args:
            *args: as for the wrapped optimizer.
            **kwargs: as for the wrapped optimizer.

        Returns:
            ``"state"`` and ``"param_groups"`` as the wrapped optimizer has them; and, if anything is tied,
            ``"tieopt"``: the fingerprints by the numbers of the parameters, for relaxed ties how many steps there
            were, and whether the mode is compact.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> weight = torch.nn.Parameter(torch.randn(4, 2))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([weight]), {weight: [[0, 1]]})
            >>> list(optimizer.state_dict())
            ['state', 'param_groups', 'tieopt']
            >>> torch.optim.Adam([weight]).load_state_dict(optimizer.state_dict())
        """
        state_dict = super().state_dict(*args, **kwargs)
        if not self._tieopt.ties:
            return state_dict
        saved: dict[str, Any] = {"ties": self._tieopt.fingerprints(self.param_groups)}
        if self._tieopt.relaxed:
            saved["steps"] = self._tieopt.steps
        if self._tieopt.compact is not None:
            saved["compact"] = True
        return {**state_dict, _TIEOPT: saved}

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Loads a state that was saved with the same ties, in either mode, or without any.

        One without any, or with relaxed ones, is averaged per group, as if the weights had been tied all along.
        With the weights, which ``model.load_state_dict`` loads, training goes on bit for bit as if never stopped.

        Args:
            state_dict: what :meth:`state_dict` returned, or that of a bare optimizer of the same parameters. It is
                not written to.
            *args: as for the wrapped optimizer.
            **kwargs: as for the wrapped optimizer.

        Raises:
            ValueError: it was saved with other ties, or it is of the other mode and has something that cannot be
                converted, as the history of LBFGS; or it does not fit the parameter groups, as torch says.
            RuntimeError: a parameter has another shape than when it was tied, or is gone. Nothing is loaded in any
                of these cases.

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
        binding, saved = self._tieopt, state_dict.get(_TIEOPT)
        pairs, settings = binding.parameters(self.param_groups), settings_in(self.param_groups)
        if _TIEOPT in state_dict:
            binding.check_saved(saved, self.param_groups)
        was_compact = None if saved is None else saved.get("compact", False)
        convert = _converter(self, binding, was_compact)
        state_dict = {key: value for key, value in state_dict.items() if key != _TIEOPT}
        if convert is not None:
            # As load_state_dict finds them: some checkpoints have names in the places of numbers.
            numbers, params = (
                [one for settings in each for one in settings["params"]]
                for each in (state_dict["param_groups"], self.param_groups)
            )
            held = dict(zip(numbers, params, strict=False))
            convert({held[number]: one for number, one in state_dict["state"].items() if number in held})
        super().load_state_dict(state_dict, *args, **kwargs)
        if saved is not None:
            binding.steps = saved.get("steps", 0)
        if not binding.relaxed and (saved is None or "steps" in saved):
            self.state.update(tied_state(self.state, pairs, settings))
        if convert is not None:
            self.state.update(convert(self.state))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; its parameters are free until :meth:`retie`.

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
        if self._tieopt.compact is not None:
            self._tieopt.compact.mirror(self.param_groups)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({summary.line(self._tieopt)})"

    def __str__(self) -> str:
        # With every setting of every parameter group, as torch prints an optimizer.
        return f"{super().__repr__()}\nTies: {summary.line(self._tieopt)}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made at run time; pickle would not find it by its name.
        return _restored, (*self._tieopt_bases, self._tieopt), self.__getstate__()


def _tied_step(inner: type[Optimizer]) -> Callable[..., Any]:
    """The step of a tied optimizer: hooks, tie the gradients, inner step, tie the weights, hooks."""

    # torch's optimizers turn gradients off outside of the graph that torch.compile makes of their step: that is how the
    # compiler knows that it may write in place. Here the ties have graphs, too, so gradients are turned off around all.
    @between_graphs
    def step(self: TiedOptimizer, *args: Any, **kwargs: Any) -> Any:
        inner_step = _below(inner.step, _HOOKED_CODE)
        below = _below(inner_step, _USE_GRAD_CODE)
        grad = is_differentiable(self) if below is not inner_step else torch.is_grad_enabled()
        self._opt_called = True
        mode = FullStep(self) if self._tieopt.compact is None else CompactStep(self)
        if args and callable(args[0]):
            args = (mode.around(args[0]), *args[1:])
        elif callable(kwargs.get("closure")):
            kwargs["closure"] = mode.around(kwargs["closure"])
        with self._tieopt.step(), torch.set_grad_enabled(grad), mode:
            result = mode.step(below, *args, **kwargs)
            mode.finish()
            return result

    step.__doc__ = inner.step.__doc__
    step.__signature__ = inspect.signature(inner.step)  # type: ignore[attr-defined]
    # A graph of it would be for one optimizer, and torch.compile makes no more than 8 for one function.
    hooked: Callable[..., Any] = between_graphs(copied(Optimizer.profile_hook_step(step)))
    hooked.hooked = True  # type: ignore[attr-defined]
    # Schedulers wrap the step of an instance to set `_opt_called`, unless it is marked so. This step
    # sets it itself, so that a scheduler built before the ties, whose wrapper is gone, goes on as well.
    hooked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return hooked


def _tied_method(inner: type[Optimizer], name: str) -> Callable[..., Any]:
    """A method other than ``step()``, such as ``first_step()`` or ``eval()``, with the gradients and weights tied.

    It may read gradients and write weights as ``step()`` does, and whether it does cannot be seen.
    """
    inner_method = getattr(inner, name)
    # Those of schedule-free and other optimizers, which exchange the weights that are trained and those to evaluate.
    reads = name not in ("train", "eval")
    names = list(inspect.signature(inner_method).parameters)
    closure_at = names.index("closure") - 1 if "closure" in names else len(names)
    below = inspect.unwrap(inner_method)
    goes_on = inspect.isgeneratorfunction(below) or inspect.iscoroutinefunction(below)

    @wraps(inner_method)
    def method(self: TiedOptimizer, *args: Any, **kwargs: Any) -> Any:
        if self._tieopt.running:
            # The step that calls it ties.
            return inner_method(self, *args, **kwargs)
        if self._tieopt.compact is not None:
            # The twin has the attributes of the optimizer.
            _check_itself(self)
            if goes_on:
                raise TypeError(
                    "The compact mode cannot follow a method that goes on after it has returned.\n"
                    "  Expected: a method that is done when it returns, or compact=False\n"
                    f"  Got:      {inner.__name__}.{name}(), a generator, a context manager or a coroutine"
                )
        mode = FullStep(self, gradients=reads) if self._tieopt.compact is None else CompactStep(self)
        if callable(kwargs.get("closure")):
            kwargs["closure"] = mode.around(kwargs["closure"])
        elif closure_at < len(args) and callable(args[closure_at]):
            args = (*args[:closure_at], mode.around(args[closure_at]), *args[closure_at + 1 :])
        with self._tieopt.step(), mode:
            return mode.call(inner_method, *args, **kwargs)

    return method


def _methods(inner: type[Optimizer]) -> set[str]:
    """The names of the public methods that an optimizer's classes add to those of ``Optimizer``."""
    return {
        name
        for kind in inner.__mro__
        if not issubclass(Optimizer, kind)
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("_") and not hasattr(Optimizer, name)
    }


# What torch puts around the step of every optimizer, to fire the hooks and mark the profile, and around those of its
# own, to turn gradients off. They are told by their code: functools.wraps copies marks to whatever wraps them.
_HOOKED_CODE = Optimizer.profile_hook_step(lambda self: None).__code__
_USE_GRAD_CODE = _use_grad_for_differentiable(lambda self: None).__code__


def _below(step: Any, code: CodeType) -> Any:
    """The step without a wrapper of this code, so that what it does is done once, around the ties.

    A decorator around the wrapper stays, as it may matter; then what is inside is done as well.
    """
    return step.__wrapped__ if getattr(step, "__code__", None) is code else step


_tied_classes: dict[tuple[type, type, bool], type[TiedOptimizer]] = {}


def _tied_class(cls: type[TiedOptimizer], inner: type[Optimizer], compact: bool) -> type[TiedOptimizer]:
    """The subclass of both, one for all optimizers of a class and mode."""
    if (cls, inner, compact) not in _tied_classes:
        namespace = {
            "__doc__": inner.__doc__,
            "__module__": inner.__module__,
            "_tieopt_bases": (cls, inner),
            "step": _tied_step(inner),
            **{name: _tied_method(inner, name) for name in _methods(inner) if not hasattr(cls, name)},
            **(compact_namespace(inner) if compact else {}),
        }
        name = f"Tied{inner.__name__}"
        if Optimizer in _laid_out_from(inner):
            made = new_class(name, (cls, inner), exec_body=lambda body: body.update(namespace))
        else:
            keywords = {"metaclass": _inner_first(cls, inner)}
            made = new_class(name, (inner, cls), keywords, lambda body: body.update(namespace))
        _tied_classes[cls, inner, compact] = made
    return _tied_classes[cls, inner, compact]


def _laid_out_from(kind: type) -> list[type]:
    """The classes from which a class has the layout of its objects in memory: of several bases, the first one."""
    bases = [kind]
    while bases[-1].__base__ is not None:
        bases.append(bases[-1].__base__)
    return bases


def _inner_first(cls: type, inner: type) -> type:
    """The metaclass of a tied class that has the inner one as its first base, and is asked before it all the same.

    The class of an object can only be replaced by one of the same layout. Where the inner class has its own from
    another base than ``Optimizer``, as in ``class Inner(ABC, Optimizer)``, it has to be the first base of the tied
    one.
    """
    order = new_class("_Order", (cls, inner)).__mro__[1:]

    def mro(made: type) -> list[type]:
        return [made, *order] if made.__bases__ == (inner, cls) else type.mro(made)

    return new_class("_InnerFirst", (type(inner),), exec_body=lambda body: body.update(mro=mro))


def _restored(cls: type[TiedOptimizer], inner: type[Optimizer], binding: Binding) -> TiedOptimizer:
    """An optimizer without state, for ``pickle`` and ``copy`` to fill."""
    optimizer = object.__new__(_tied_class(cls, inner, binding.compact is not None))
    optimizer._tieopt = binding
    return optimizer


def _tie_all(
    optimizer: Optimizer,
    states: Sequence[Mapping[Any, Any]],
    binding: Binding,
    start: Start,
    lost: Lost | None = None,
) -> list[dict[Any, Any]]:
    """Ties the weights, and returns what takes the places of the states that there are already.

    Args:
        optimizer: to be tied.
        states: of it, and of the optimizers that it holds.
        binding: of the ties.
        start: what the shared values start from.
        lost: gets what cannot be converted, which is an error without it.
    """
    _check_reduction(optimizer, binding)
    if binding.compact is not None:
        if binding.ties:
            check_served(optimizer, binding.compact)
        binding.compact.attach(optimizer.param_groups)
    changed = [_tied_with(optimizer, state, binding, start, lost) for state in states]
    trained = _trained(binding.parameters(optimizer.param_groups))
    if start == "first":
        for tie, params in trained:
            start_from_first_(tie, params, tie.order)
    # What starts from the first members is tied already, and keeps its bits.
    binding.tie_weights(trained, differentiable=is_differentiable(optimizer), strength=binding.strength)
    binding.note_all(optimizer.param_groups)
    return changed


def _tied_with(
    optimizer: Optimizer, state: Mapping[Any, Any], binding: Binding, start: Start, lost: Lost | None
) -> dict[Any, Any]:
    """What takes the place of a state; arguments as for :func:`_tie_all`."""
    pairs, settings = binding.parameters(optimizer.param_groups), settings_in(optimizer.param_groups)
    # Also that of frozen parameters, which may be trained again.
    changed = {**state, **({} if binding.relaxed else tied_state(state, pairs, settings, start))}
    if binding.compact is None:
        return changed
    if binding.ties:
        changed = without_history(optimizer, changed, lost)
    own = parameters_of(binding.compact.components, optimizer.param_groups)
    changed = {**changed, **compacted(changed, own, lost=lost)}
    return {key: value for key, value in changed.items() if value != {}}


def _warn_of(lost: Lost, param_groups: ParamGroups) -> None:
    """Says of which parameters the optimizer begins the state anew."""
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


@untraced
def _with_gradients(optimizer: Any) -> Pairs:
    """The ties of which a parameter has a gradient."""
    return with_gradients(optimizer._tieopt.parameters(optimizer.param_groups))


def _trained(pairs: Pairs) -> Pairs:
    """The ties whose parameters are not frozen."""
    return [pair for pair in pairs if pair[1][0].requires_grad]


def _converter(
    optimizer: Optimizer, binding: Binding, was_compact: bool | None
) -> Callable[[Mapping[Any, Any]], dict[Any, Any]] | None:
    """What converts a state that was saved in the other mode, or without a word; None if it was saved in this one."""
    if bool(was_compact) == (binding.compact is not None):
        return None
    compact, settings = binding.compact, settings_in(optimizer.param_groups)
    own = components(binding.ties, optimizer.param_groups) if compact is None else compact.components
    pairs = parameters_of(own, optimizer.param_groups)

    def convert(state: Mapping[Any, Any]) -> dict[Any, Any]:
        if own:
            without_history(optimizer, state, entries=compact.count() if compact and was_compact is None else None)
        return expanded(state, pairs, settings) if was_compact else compacted(state, pairs, was_compact is None)

    return convert


def _check_itself(optimizer: Any) -> None:
    """Refuses an object of the same class that only asks the tied optimizer for its attributes, as those of Lightning.

    What was written to it would not reach the optimizer.
    """
    if "_tieopt" not in vars(optimizer):
        raise TypeError(
            "Call this on the tied optimizer itself, and not on what a framework has put in its place.\n"
            "  Expected: the tied optimizer, for example `self.optimizers().optimizer` in Lightning\n"
            f"  Got:      {type(optimizer).__name__}"
        )


# Optimizers that compare how the loss changes with what the gradient says, by their names: a line search of LBFGS, the
# step size of AliG. tests/test_third_party.py looks for more by running them on other losses with the same gradients.
_COMPARES_LOSS = {"LBFGS", "AliG"}


def _check_reduction(optimizer: Optimizer, binding: Binding) -> None:
    """Refuses gradients that are not those of what the optimizer trains, where it compares them with the loss.

    The mean is the gradient along tied weights, and the sum that of the shared values.
    """
    right = "mean" if binding.compact is None else "sum"
    if binding.reduction == right or binding.relaxed or all(is_idle(tie.slices) for tie in binding.ties):
        return
    for one in [optimizer, *held_optimizers(optimizer)]:
        named = [kind.__name__ for kind in type(one).__mro__ if kind.__name__ in _COMPARES_LOSS]
        if named:
            raise ValueError(
                f"{named[0]} compares the loss with its gradient, which has to be that of what it trains.\n"
                "  Expected: reduction='mean' with compact=False, or reduction='sum' with compact=True\n"
                f"  Got:      reduction={binding.reduction!r}, compact={binding.compact is not None}"
            )


def _check_wrappable(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"TiedOptimizer wraps an optimizer.\n  Expected: a torch.optim.Optimizer\n  Got:      {shown(optimizer)}"
        )
    if isinstance(optimizer, TiedOptimizer):
        raise TypeError(
            "The optimizer is tied already.\n"
            "  Expected: an optimizer without ties; optimizer.retie(ties) replaces them, all at once\n"
            f"  Got:      {type(optimizer).__name__} with {shown(optimizer.ties)}"
        )
    step = vars(optimizer).get("step")
    # A scheduler replaced it, around the step of the class: that may go.
    scheduled = hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is type(optimizer).step
    if step is not None and not scheduled:
        raise TypeError(
            "The optimizer's step was replaced on the instance, and ties cannot go below that.\n"
            "  Expected: an optimizer with the step of its class; tie it first, then replace the step\n"
            f"  Got:      {type(optimizer).__name__} with step = {shown(step)}"
        )
