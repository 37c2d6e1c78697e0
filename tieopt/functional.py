"""Ties of a tensor, without an optimizer."""

from __future__ import annotations

from torch import Tensor

from tieopt.engine.engine import Engine
from tieopt.numbers.reduction import Operation, project_
from tieopt.ties.part import Groups, SupportsArray, check_writable, slices_for
from tieopt.ties.slices import Partition, numbered


def tie_(tensor: Tensor, groups: Groups, *, dim: int = 0, scale: Tensor | SupportsArray | None = None) -> Tensor:
    r"""Replace the members of each group by their mean, in place.

    This is the orthogonal projection onto tied tensors: no tied tensor is nearer. With scales :math:`s`, which are 1
    if not given, member :math:`i` becomes

    .. math:: w_i \leftarrow s_i w_0, \qquad w_0 = \frac{\sum_j s_j w_j}{\sum_j s_j^2}

    where the sums are over its group. Tying again changes no bit, and free slices are not touched. As with the
    functions of ``torch.nn.init``, autograd does not record it.

    Args:
        tensor: a dense tensor of any dtype that :class:`~tieopt.Tie` takes, in any memory layout in which no two
            entries share memory.
        groups: as for :class:`~tieopt.Tie`: a list of lists of indices along ``dim``; or integer labels with -1 for
            free slices, of shape ``[n]`` for slices along ``dim``, or of more dimensions for smaller slices.
        dim: the dimension along which the slices lie.
        scale: the factor :math:`s_i` of each slice, in the shape of the labels, as for :class:`~tieopt.Tie`.

    Returns:
        ``tensor`` itself.

    Raises:
        TypeError: ``tensor``, ``groups``, ``dim`` or ``scale`` is of a type or dtype that :class:`~tieopt.Tie`
            does not take.
        IndexError: an index, or ``dim``, is out of range.
        ValueError: an index occurs twice, labels or scale do not fit as for :class:`~tieopt.Tie`, or entries
            of ``tensor`` share memory. Nothing is written in any of these cases.

    Example:
        >>> import torch
        >>> from tieopt import is_tied, tie_
        >>> weight = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 6.0]])
        >>> tie_(weight, [[1, 2]])
        tensor([[0., 0.],
                [2., 4.],
                [2., 4.]])
        >>> is_tied(weight, [[1, 2]])
        True

        With scales, each member is its scale times the shared value:

        >>> scale = torch.tensor([1.0, -1.0, 0.0])
        >>> tie_(torch.tensor([1.0, -3.0, 5.0]), [[0, 1, 2]], scale=scale)
        tensor([ 2., -2.,  0.])
    """
    tie = _tie(tensor, groups, dim, scale)
    check_writable(tensor, "the tensor")
    Engine().apply_(Operation(project_), [(tie, [tensor])])
    return tensor


def is_tied(tensor: Tensor, groups: Groups, *, dim: int = 0, scale: Tensor | SupportsArray | None = None) -> bool:
    r"""Return whether all members of each group are exactly equal or, with scales, exact multiples of one value.

    .. math:: w_i = s_i w_0 \quad \text{for every member } i \text{ of a group, and some } w_0

    as the dtype rounds it. Equal means ``==``, as in :func:`torch.equal`: 0.0 and -0.0 are equal, a group that holds a
    NaN is not tied, and there is no tolerance. Nothing is written.

    Args:
        tensor: as for :func:`tie_`; entries may share memory.
        groups: as for :func:`tie_`.
        dim: as for :func:`tie_`.
        scale: as for :func:`tie_`.

    Returns:
        True if every group is tied, also if there are no groups.

    Raises:
        TypeError: ``tensor``, ``groups``, ``dim`` or ``scale`` is of a type or dtype that :class:`~tieopt.Tie`
            does not take.
        IndexError: an index, or ``dim``, is out of range.
        ValueError: an index occurs twice, or labels or scale do not fit as for :class:`~tieopt.Tie`.

    Example:
        >>> import torch
        >>> from tieopt import is_tied
        >>> is_tied(torch.tensor([1.0, 2.0, 1.0]), [[0, 2]])
        True
        >>> is_tied(torch.tensor([1.0, 2.0, 1.0]), [[0, 1]])
        False
        >>> is_tied(torch.tensor([1.0, -1.0]), [[0, 1]], scale=torch.tensor([1.0, -1.0]))
        True
    """
    return Engine().is_tied([(_tie(tensor, groups, dim, scale), [tensor.detach()])])


def _tie(tensor: Tensor, groups: Groups, dim: int, scale: Tensor | SupportsArray | None) -> Partition:
    name = "the tensor"
    return Partition(numbered([slices_for(tensor, groups, dim, scale, name)]), [name])
