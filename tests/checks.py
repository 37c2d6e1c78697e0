"""What the tests of optimizers and their hosts share: equality to the last bit, and one small training run."""

import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TypeVar

import reference
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from tieopt import TiedOptimizer, tie_
from tieopt.numbers.index import Index
from tieopt.ties.slices import Slices, numbered

T = TypeVar("T")

# The fewest entries of a slice that is worked on as a row.
ROW = 16

SHAPE = (7, 5)
GROUPS = [[0, 3, 5], [1, 6]]
FREE = [2, 4]
REDUCTIONS = ["mean", "sum"]


def bits(tensor: Tensor) -> Tensor:
    """A copy of the entries as integers, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return reference.bits(tensor).clone()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in every bit; sparse ones in what they store, too."""
    if first.layout != second.layout or first.shape != second.shape:
        return False
    if first.layout == torch.sparse_coo:
        first, second = first.detach().coalesce(), second.detach().coalesce()
        return torch.equal(first.indices(), second.indices()) and same_bits(first.values(), second.values())
    return reference.same_bits(first, second)


def same_tree(first: object, second: object) -> bool:
    """Whether two nested states are equal in keys, types and values, their tensors to the last bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and same_bits(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same_tree(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_tree, first, second))
    return first == second


def tied_bitwise(tensor: Tensor, groups: list[list[int]] = GROUPS) -> bool:
    """Whether the members of each group are equal to the last bit."""
    words = bits(tensor)
    return all(torch.equal(words[member], words[group[0]]) for group in groups for member in group[1:])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal entries that depend on the arguments alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parameter:
    """A parameter of normal entries that depend on the arguments alone."""
    return Parameter(randn(*shape, seed=seed, dtype=dtype))


def one_bare(inner: type[Optimizer] = SGD, **kwargs: object) -> tuple[Parameter, Optimizer]:
    """A parameter, and an optimizer of it alone."""
    weight = parameter(*SHAPE)
    kwargs.setdefault("lr", 0.1)
    return weight, inner([weight], **kwargs)


def one_tied(
    inner: type[Optimizer] = SGD, reduction: str = "mean", compact: bool = False, **kwargs: object
) -> tuple[Parameter, Optimizer]:
    """The same, with rows of the parameter tied."""
    weight, optimizer = one_bare(inner, **kwargs)
    return weight, TiedOptimizer(optimizer, {weight: GROUPS}, reduction=reduction, compact=compact)


def train(optimizer: Optimizer, steps: int, seed: int = 100) -> None:
    """Steps on gradients that depend on the seed and on a parameter's place in its group alone."""
    for step in range(steps):
        for group in optimizer.param_groups:
            for position, param in enumerate(group["params"]):
                param.grad = randn(*param.shape, seed=seed + 10 * step + position)
        optimizer.step()


def mean_gradient(gradient: Tensor) -> Tensor:
    """Each member of a group has the group's mean."""
    return tie_(gradient.clone(), GROUPS)


def sum_gradient(gradient: Tensor) -> Tensor:
    """Each member of a group has the group's sum."""
    result = mean_gradient(gradient)
    for group in GROUPS:
        result[group] *= len(group)
    return result


def times_signs(tensor: Tensor, signs: Tensor | None) -> Tensor:
    """Slices of any dtype times 1 or -1."""
    if signs is None:
        return tensor
    # torch does not always turn the sign of a complex zero.
    wide = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()
    turned = torch.where(signs.view(-1, *[1] * (wide.dim() - 1)) < 0, -wide, wide)
    return (torch.view_as_complex(turned) if tensor.is_complex() else turned).to(tensor.dtype)


def check_means(before: Tensor, after: Tensor, labels: Tensor, *, pairs: bool | None = None) -> None:
    """Asserts that each group has its mean, to the precision of the dtype.

    Args:
        before: slices along the first dimension, finite.
        after: the same when they are tied.
        labels: of the slices.
        pairs: whether the slices are, or are cut from, rows; None if they are whole.
    """
    pairs = math.prod(before.shape[1:]) >= ROW if pairs is None else pairs
    old, new = reference.entries_of(before), reference.entries_of(after)
    real = before.dtype.to_real()
    for group, means in zip(reference.members_of(labels), reference.exact_means(before, labels), strict=True):
        for entry, mean in enumerate(means):
            found = new[group[0]][entry]
            assert math.isfinite(found), (found, float(mean), before.dtype)
            error = abs(Fraction(found) - mean)
            members = [old[member][entry] for member in group]
            assert error <= reference.mean_tolerance(mean, members, before.dtype, pairs=pairs), (
                f"{found!r} for the mean {float(mean)!r} of {len(group)} members in {before.dtype}, "
                f"off by {float(error / reference.unit_in_the_last_place(float(mean), real)):.3g} units"
            )


def index_of(labels: Tensor, tensor: Tensor) -> Index:
    """The compiled tie of the rows of a tensor."""
    return Index.compile(numbered([Slices(labels)]), [tensor])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch with another default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pickled(value: T) -> T:
    """What comes out of a pickle of the value."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301
