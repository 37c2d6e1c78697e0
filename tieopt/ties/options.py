"""How ties are applied: the reduction of gradients, and how far and how often weights are projected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from tieopt.errors import refusal, shown

Reduction = Literal["mean", "sum"]


class Options(NamedTuple):
    """The options of a tie, None where nothing was said; or of an optimizer, all of them.

    Attributes:
        reduction: ``"mean"`` or ``"sum"``, what the inner optimizer is to see of the gradients.
        strength: how far a projection moves the weights, from 0 to 1.
        every: they are projected after every so many steps.
    """

    reduction: Any = None
    strength: Any = None
    every: Any = None

    @property
    def relaxed(self) -> bool:
        """Whether the tie is approximate: gradients stay as they are, and weights may drift apart."""
        return bool(self.strength != 1 or self.every != 1)

    def or_else(self, others: Options) -> Options:
        """Return these options, and others where nothing was said.

        Raises:
            ValueError: they exclude each other.
        """
        if self == _UNSAID:
            return others
        options = Options(*(other if option is None else option for option, other in zip(self, others, strict=True)))
        if self.reduction is None and options.relaxed:
            # It leaves the gradients as they are.
            options = options._replace(reduction="mean")
        check_options(options)
        return options

    def __str__(self) -> str:
        said = zip(self._fields, self, strict=True)
        return "".join(f", {name}={option!r}" for name, option in said if option is not None)


_UNSAID = Options()
EXACT = Options("mean", 1.0, 1)


def joined_options(several: Iterable[Options]) -> Options:
    """Return the options of ties that are joined.

    Raises:
        ValueError: two of them say different things.
    """
    first, *others = several
    for options in others:
        for name, known, option in zip(options._fields, first, options, strict=True):
            if option != known:
                expected = f"the same {name} for all ties that are joined, None where nothing is said"
                what = f"Joined ties have different options: {name}."
                raise refusal(ValueError, what, expected=expected, got=f"{shown(known)} and {shown(option)}")
    return first


def check_options(options: Options, *, of_optimizer: bool = False) -> None:
    """Refuse options that no tie has.

    Args:
        options: None is for what was not said.
        of_optimizer: whether something has to be said of all of them.

    Raises:
        TypeError, ValueError: as :class:`~tieopt.TiedOptimizer` says.
    """
    reduction, strength, every = options
    if (of_optimizer or reduction is not None) and (not isinstance(reduction, str) or reduction not in ("mean", "sum")):
        raise refusal(ValueError, "Unknown reduction.", expected="'mean' or 'sum'", got=shown(reduction))
    is_number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if (of_optimizer or strength is not None) and (not is_number or not 0 <= strength <= 1):
        what, expected = "strength says how far a projection goes.", "a number from 0 to 1"
        raise refusal(ValueError if is_number else TypeError, what, expected=expected, got=shown(strength))
    is_whole = isinstance(every, int) and not isinstance(every, bool)
    if (of_optimizer or every is not None) and (not is_whole or every < 1):
        what, expected = "every says after how many steps the weights are projected.", "an integer from 1 on"
        raise refusal(ValueError if is_whole else TypeError, what, expected=expected, got=shown(every))
    if reduction == "sum" and (strength not in (None, 1) or every not in (None, 1)):
        raise refusal(
            ValueError,
            "Relaxed ties leave the gradients as they are, and do not add them up.",
            expected="reduction='mean', or strength=1 and every=1",
            got=str(options)[2:],
        )
