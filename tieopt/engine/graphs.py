"""What ``torch.compile`` and CUDA graphs may see of a step.

All that relies on the inside of torch's compiler stands here. For each trick tests/test_compiled.py has a test, under
"what graphs.py relies on", that fails where torch changes it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# Earlier compilers are not given the ties: in torch 2.6 inductor was seen to leave members of a group unequal, sizes
# that are marked as static become variables, and each call of the getter below drops a reference too many, which
# crashes Python in the end.
_GETS_TIES = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 13)

# Its get_eval_frame_callback() returns what torch.compile has set to look at each function that is called, and None or
# False where nothing is compiled.
_frames = torch._C._dynamo.eval_frame

# Steps of a torch that is built without CUDA do not ask for it again.
_HAS_CUDA = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]

# Functions of which an optimizer keeps copies. Which of its parameters have gradients may change.
_COPIES = 32


def between_graphs(function: Function) -> Function:
    """Mark a function that ``torch.compile`` does not trace, but what it calls; graphs end where it is called.

    The compiler skips the code object of the function, which it does not count as a graph break.
    ``torch.compiler.disable(recursive=False)`` does not do for a function that is itself compiled, nor where a
    recompilation is an error.
    """
    return cast(Function, torch._dynamo.decorators.skip(function))


def untraced(function: Function) -> Function:
    """Mark a function that ``torch.compile`` does not trace, nor anything that it calls.

    While it runs :func:`is_under_compiler` is False; the caller has to pass on the answer.
    """
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    if not _GETS_TIES:
        return disabled

    # Without a compiler a step does not pay for disabling it.
    @between_graphs
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (disabled if _frames.get_eval_frame_callback() not in (None, False) else function)(*args, **kwargs)

    return cast(Function, called)


@between_graphs
def is_under_compiler() -> bool:
    """Return whether ``torch.compile`` gets the functions that are called now, and may be given those of the ties."""
    return _GETS_TIES and _frames.get_eval_frame_callback() not in (None, False)


@between_graphs
def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured, in which nothing can be waited for."""
    return _HAS_CUDA and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def static(tensor: Tensor) -> Tensor:
    """Return a view of a tensor whose sizes the compiler takes as constants.

    By default sizes become variables once other sizes were seen on the same line of code, also in a copy of the
    function, and such graphs were seen to fail for some values of ``PYTHONHASHSEED``. The tensor itself is not marked.
    """
    tensor = tensor.detach()
    torch._dynamo.mark_static(tensor)
    return tensor


def copied(function: Any) -> Any:
    """Return a copy of a function, with a code object of its own.

    ``torch.compile`` keeps no more than 8 graphs for one code object, and also those for optimizers that are gone.
    """
    if not isinstance(function, types.FunctionType):
        return function
    code, name = function.__code__.replace(), function.__name__
    copy = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


class Copies:
    """Functions as one optimizer has them compiled: what was made of them ends with it.

    Its own copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._copies: dict[Any, Any] = {}

    @untraced
    def of(self, function: Any, *shapes: Any) -> Any:
        """Return the copy of a function for tensors of these shapes."""
        key = function, shapes
        if key not in self._copies:
            if len(self._copies) == _COPIES:
                self._copies.clear()
            self._copies[key] = copied(function)
        return self._copies[key]

    def __reduce__(self) -> tuple[type[Copies], tuple[()]]:
        return Copies, ()
