"""When the ties are applied: an optimizer that keeps them, and is an optimizer to everybody.

A tied optimizer *is* the optimizer that was wrapped: the same object, whose class is from then on a
subclass of both :class:`TiedOptimizer` and its own class, as ``torch.nn.utils.parametrize`` does with
modules. So there is one state and one list of parameter groups, ``isinstance`` holds, and whatever a
scheduler, a gradient scaler or a framework reads or writes, before or after, it reads or writes there.

What the class adds is held in one attribute and has public names that say ``tie``, lest it shadow anything of
the optimizer's own.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import new_class
from typing import Any, Self, cast

import torch
from torch.optim import Optimizer

from tieopt.batches import Pairs
from tieopt.binding import Binding
from tieopt.gradients import StepGradients, tie_gradients, with_gradients
from tieopt.reduction import Reduction
from tieopt.state import tied_state
from tieopt.ties import Tie, shown

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
    members by their mean. For an optimizer that works entry by entry this is exactly training the one
    value that they share.

    The wrapped optimizer becomes the tied one: ``TiedOptimizer(optimizer, ties) is optimizer``, still an
    instance of its own class. The weights are tied at once.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        ties: a mapping from parameters to groups, or a :class:`Tie`, or an iterable of them. Names may
            stand for parameters if the optimizer was built from ``named_parameters()``.
        reduction: ``"mean"`` steps on the mean of the members' gradients, ``"sum"`` on their sum, which
            is the gradient that autograd gives to one parameter used in several places. After the
            step ``.grad`` holds the mean in either case (but for the rounding of multiplying and
            dividing by the size), so that gradients accumulate. With scales the sum is
            :math:`\sum_i s_i g_i`, the gradient of the shared value, times the scale of each member.
        strength: how far a projection moves the weights towards the mean, from 0, not at all, to 1.
        every: after every how many steps the weights are projected.

    With another ``strength`` or ``every`` than 1 the ties are *relaxed*: the members are trained by their own
    gradients and pulled together, as in locally connected layers that share weights now and then (Pogodin
    et al., "Towards Biologically Plausible Convolutional Networks", 2021). They are approximate then, and
    :meth:`tie_drift` says by how much; :meth:`tie_weights` ties them exactly.

    An optimizer that has state already is made to look as if its weights had been tied all along: what it
    keeps of each entry is averaged per group, too.

    Raises:
        TypeError: ``optimizer`` is none or is tied already, ``ties`` are none, or groups hold something
            other than integers.
        IndexError: an index is out of range.
        ValueError: a tie is for a parameter that the optimizer does not hold, or does not fit it; two ties
            share an entry; joined parameters differ in dtype, device or settings, or only some of them
            are frozen; ``reduction``, ``strength`` or ``every`` is none.

    Example:
        >>> import torch
        >>> from tieopt import TiedOptimizer, is_tied
        >>> layer, groups = torch.nn.Linear(3, 5), [[0, 2], [1, 3, 4]]
        >>> optimizer = TiedOptimizer(torch.optim.AdamW(layer.parameters()), {layer.weight: groups})
        >>> layer(torch.ones(2, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> is_tied(layer.weight, groups)
        True
        >>> isinstance(optimizer, torch.optim.AdamW)
        True
    """

    _tieopt: Binding
    _tieopt_bases: tuple[type[TiedOptimizer], type[Optimizer]]
    _opt_called: bool

    def __new__(  # noqa: D102
        cls,
        optimizer: Optimizer,
        ties: Mapping[Any, Any] | Tie | Iterable[Tie],
        *,
        reduction: Reduction = "mean",
        strength: float = 1.0,
        every: int = 1,
    ) -> Self:
        _check_wrappable(optimizer)
        binding = Binding(optimizer.param_groups, ties, reduction, strength, every)
        tied_class = _tied_class(cls, type(optimizer))
        _tie_all(optimizer, binding)

        # Nothing fails from here on.
        vars(optimizer).pop("step", None)
        for name in _HOOKS:
            if not isinstance(vars(optimizer).get(name), OrderedDict):
                setattr(optimizer, name, OrderedDict(vars(optimizer).get(name) or {}))
        optimizer.__class__ = tied_class
        tied = cast(Self, optimizer)
        tied._tieopt = binding
        return tied

    def __init__(
        self,
        optimizer: Optimizer,
        ties: Mapping[Any, Any] | Tie | Iterable[Tie],
        *,
        reduction: Reduction = "mean",
        strength: float = 1.0,
        every: int = 1,
    ) -> None:
        # __new__ did it all; Optimizer.__init__ would begin a second state.
        pass

    @property
    def ties(self) -> tuple[Tie, ...]:
        """What is tied."""
        return tuple(
            Tie.join(
                *(
                    Tie(param, slices.labels, dim=slices.dim, scale=slices.scale)
                    for param, slices in zip(params, tie.slices, strict=True)
                )
            )
            for tie, params in self._tieopt.parameters(self.param_groups)
        )

    def tie_gradients(self) -> None:
        """Replaces the gradients of the members of each group by their mean, in ``.grad``.

        :meth:`step` does so itself; call this to read or to clip the tied gradients before. Idempotent
        bit for bit. A gradient that is None stays None, unless a joined parameter has one: then it counts as
        zero. It is the mean for ``reduction="sum"`` too: the sum stands in ``.grad`` only while the inner
        optimizer reads it.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone.
        """
        tie_gradients(with_gradients(self._tieopt.parameters(self.param_groups)), self._tieopt.batches)

    def tie_weights(self) -> None:
        """Replaces the members of each group by their mean; for when anything else wrote to the weights.

        Idempotent bit for bit. A frozen parameter, whose ``requires_grad`` is False, is not written.
        Relaxed ties are tied exactly.

        Raises:
            RuntimeError: a parameter has another shape than when it was tied, or is gone.
        """
        _tie_weights(self, self._tieopt, _trained(self, self._tieopt))

    def retie(self, ties: Mapping[Any, Any] | Tie | Iterable[Tie]) -> None:
        """Replaces all ties by others, in the middle of a training.

        The weights are tied at once, and the state of the optimizer is made to look as if they had been
        tied all along: what it keeps of each entry is averaged per group. What has not the shape of its
        parameter is left alone: joined parameters that were trained for different numbers of steps keep their
        step counts.

        Args:
            ties: as for :class:`TiedOptimizer`. Parameters that were added since may be among them.

        Raises:
            TypeError, IndexError, ValueError: as for :class:`TiedOptimizer`. Everything stays as it is then.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer, is_tied
            >>> weight = torch.nn.Parameter(torch.randn(4, 2))
            >>> optimizer = TiedOptimizer(torch.optim.Adam([weight]), {weight: [[0, 1]]})
            >>> optimizer.retie({weight: [[0, 1, 2]]})
            >>> is_tied(weight, [[0, 1, 2]])
            True
            >>> optimizer.untie()
            >>> optimizer.ties
            ()
        """
        kept = self._tieopt
        binding = Binding(self.param_groups, ties, kept.reduction, kept.strength, kept.every)
        binding.steps = kept.steps
        _tie_all(self, binding)
        self._tieopt = binding

    def untie(self) -> None:
        """Ends all ties: from here on every entry is trained for itself.

        Weights and state stay as they are.
        """
        self.retie(())

    def tie_drift(self) -> float:
        """The largest distance of a member from its group's mean, over all ties; 0.0 if all are tied."""
        drifts = [self._tieopt.drift(*pair) for pair in self._tieopt.parameters(self.param_groups)]
        # Unlike Python's, this maximum is NaN if a drift is.
        return float(torch.tensor([0.0, *drifts], dtype=torch.float64, device="cpu").max())

    def tie_summary(self) -> str:
        """A table of the ties, a line for each tied parameter, to be printed.

        Example:
            >>> import torch
            >>> from tieopt import TiedOptimizer
            >>> layer = torch.nn.Linear(3, 6)
            >>> optimizer = torch.optim.SGD(layer.named_parameters(), lr=0.1)
            >>> print(TiedOptimizer(optimizer, {"weight": [[0, 2], [1, 3, 4]]}).tie_summary())
            parameter  shape   slices  groups  members  free  distinct  drift
            weight     (6, 3)       6       2        5     1         3      0
        """
        return self._tieopt.summary(self.param_groups)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state of the wrapped optimizer, and beside it the fingerprints of the ties.

        A bare optimizer loads it, and :meth:`load_state_dict` loads a bare optimizer's.
        """
        state_dict = super().state_dict(*args, **kwargs)
        if not self._tieopt.ties:
            return state_dict
        saved: dict[str, Any] = {"ties": self._tieopt.fingerprints(self.param_groups)}
        if self._tieopt.relaxed:
            saved["steps"] = self._tieopt.steps
        return {**state_dict, _TIEOPT: saved}

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Loads a state that was saved with the same ties, or without any.

        One without any, or with relaxed ones, is averaged per group, as if the weights had been tied all along.

        Raises:
            ValueError: it was saved with other ties. Nothing is loaded then.
        """
        pairs, saved = _trained(self, self._tieopt), state_dict.get(_TIEOPT)
        if _TIEOPT in state_dict:
            self._tieopt.check_saved(saved, self.param_groups)
        state_dict = {key: value for key, value in state_dict.items() if key != _TIEOPT}
        super().load_state_dict(state_dict, *args, **kwargs)
        if saved is not None:
            self._tieopt.steps = saved.get("steps", 0)
        if not self._tieopt.relaxed and (saved is None or "steps" in saved):
            self.state.update(tied_state(self.state, pairs))

    def __repr__(self) -> str:
        relaxed = self._tieopt.relaxed and self._tieopt.ties
        return super().__repr__() + (f"\n{self._tieopt.relaxation}" if relaxed else "")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made at run time; pickle would not find it by its name.
        return _restored, (*self._tieopt_bases, self._tieopt), self.__getstate__()


def _tied_step(inner: type[Optimizer]) -> Callable[..., Any]:
    """The step of a tied optimizer: hooks, tie the gradients, inner step, tie the weights, hooks."""

    def step(self: TiedOptimizer, *args: Any, **kwargs: Any) -> Any:
        self._opt_called = True
        binding = self._tieopt
        gradients = StepGradients(binding, self.param_groups)
        if args and callable(args[0]):
            args = (gradients.around(args[0]), *args[1:])
        elif callable(kwargs.get("closure")):
            kwargs["closure"] = gradients.around(kwargs["closure"])
        try:
            gradients.tie()
            result = _below_hooks(inner.step)(self, *args, **kwargs)
            binding.steps += 1
            if binding.relaxed and binding.steps % binding.every == 0:
                _tie_weights(self, binding, gradients.pairs, binding.strength)
            return result
        finally:
            gradients.restore()
            # A closure may have changed the ties.
            if binding is self._tieopt and not binding.relaxed:
                _tie_weights(self, binding, gradients.pairs)

    step.__doc__ = inner.step.__doc__
    step.__signature__ = inspect.signature(inner.step)  # type: ignore[attr-defined]
    hooked = Optimizer.profile_hook_step(step)
    hooked.hooked = True  # type: ignore[attr-defined]
    # Schedulers wrap the step of an instance to set `_opt_called`, unless it is marked so. This step
    # sets it itself, so that a scheduler built before the ties, whose wrapper is gone, goes on as well.
    hooked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return hooked


# What torch puts around the step of every optimizer, to fire the hooks and mark the profile. It is told by
# its code: functools.wraps copies its mark `hooked` to whatever wraps it.
_HOOKED_CODE = Optimizer.profile_hook_step(lambda self: None).__code__


def _below_hooks(step: Any) -> Any:
    """The step without torch's wrapper, so that the hooks fire once, around the ties.

    A decorator around the wrapper stays, as it may matter; then the hooks inside it fire as well.
    """
    return step.__wrapped__ if getattr(step, "__code__", None) is _HOOKED_CODE else step


_tied_classes: dict[tuple[type, type], type[TiedOptimizer]] = {}


def _tied_class(cls: type[TiedOptimizer], inner: type[Optimizer]) -> type[TiedOptimizer]:
    """The subclass of both, one for all optimizers of a class."""
    if (cls, inner) not in _tied_classes:
        namespace = {
            "__doc__": inner.__doc__,
            "__module__": inner.__module__,
            "_tieopt_bases": (cls, inner),
            "step": _tied_step(inner),
        }
        name = f"Tied{inner.__name__}"
        _tied_classes[cls, inner] = new_class(name, (cls, inner), exec_body=lambda body: body.update(namespace))
    return _tied_classes[cls, inner]


def _restored(cls: type[TiedOptimizer], inner: type[Optimizer], binding: Binding) -> TiedOptimizer:
    """An optimizer without state, for ``pickle`` and ``copy`` to fill."""
    optimizer = object.__new__(_tied_class(cls, inner))
    optimizer._tieopt = binding
    return optimizer


def _tie_all(optimizer: Optimizer, binding: Binding) -> None:
    """Ties the weights, and the state that an optimizer has already."""
    pairs = _trained(optimizer, binding)
    state = {} if binding.relaxed else tied_state(optimizer.state, pairs)
    _tie_weights(optimizer, binding, pairs, binding.strength)
    optimizer.state.update(state)


def _trained(optimizer: Optimizer, binding: Binding) -> Pairs:
    """The ties whose parameters are not frozen."""
    return [pair for pair in binding.parameters(optimizer.param_groups) if pair[1][0].requires_grad]


def _tie_weights(optimizer: Optimizer, binding: Binding, pairs: Pairs, strength: float = 1.0) -> None:
    differentiable = bool(getattr(optimizer, "defaults", {}).get("differentiable", False))
    binding.tie_weights(pairs, differentiable=differentiable, strength=strength)


def _check_wrappable(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"TiedOptimizer wraps an optimizer.\n  Expected: a torch.optim.Optimizer\n  Got:      {shown(optimizer)}"
        )
    if isinstance(optimizer, TiedOptimizer):
        raise TypeError(
            "The optimizer is tied already.\n"
            "  Expected: an optimizer without ties; give it all of them at once\n"
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
