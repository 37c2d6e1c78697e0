"""What ``torch.compile`` and CUDA graphs may see of a step."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# Its get_eval_frame_callback() returns what torch.compile has set to look at each function that is called.
_frames = torch._C._dynamo.eval_frame


def between_graphs(function: Function) -> Function:
    """A function that ``torch.compile`` leaves alone, but not what it calls; graphs end where it is called.

    ``torch.compiler.disable(recursive=False)`` does not do for a function that is itself compiled, nor where a
    recompilation is an error.
    """
    return cast(Function, torch._dynamo.decorators.skip(function))


def untraced(function: Function) -> Function:
    """A function that ``torch.compile`` leaves alone, with all that it calls."""
    disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    # To disable what is not there costs more Python than many a function.
    @between_graphs
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (disabled if _frames.get_eval_frame_callback() not in (None, False) else function)(*args, **kwargs)

    return cast(Function, called)


def copied(function: Any) -> Any:
    """A function with a code object of its own, by which ``torch.compile`` keeps what it made of it.

    It makes no more than 8 graphs for one code object, also where the optimizers that they were for are gone.
    """
    if not isinstance(function, types.FunctionType):
        return function
    code, name = function.__code__.replace(), function.__name__
    copy = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


_HAS_CUDA = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]


@between_graphs
def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be waited for."""
    return _HAS_CUDA and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# Functions of which an optimizer keeps copies. Which of its parameters have gradients may change.
_COPIES = 32


@between_graphs
def is_compiled() -> bool:
    """Whether ``torch.compile`` gets the functions that are called now."""
    return _frames.get_eval_frame_callback() not in (None, False)


class Copies:
    """Functions as one optimizer has them compiled: what was made of them ends with it.

    Its own copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._copies: dict[Any, Any] = {}

    def of(self, function: Any, *shapes: Any) -> Any:
        """The copy of a function for tensors of these shapes."""
        key = function, shapes
        if key not in self._copies:
            if len(self._copies) == _COPIES:
                self._copies.clear()
            self._copies[key] = copied(function)
        return self._copies[key]

    def __reduce__(self) -> tuple[type[Copies], tuple[()]]:
        return Copies, ()
