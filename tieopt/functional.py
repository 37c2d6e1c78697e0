"""Ties of a tensor, without an optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tieopt.index import Index, Indices
from tieopt.reduction import Workspace, project_, tied
from tieopt.sharded import is_sharded, shards_for
from tieopt.slices import numbered
from tieopt.ties import check_writable, slices_for


def tie_(tensor: Tensor, groups: Any, *, dim: int = 0, scale: Any = None) -> Tensor:
    r"""Replaces the members of each group by their mean, in place.

    Idempotent bit for bit; free slices are not touched. Not recorded by autograd, as the functions of
    ``torch.nn.init``. With scales :math:`s` a member becomes :math:`s_i w_0`, where
    :math:`w_0 = \sum_i s_i w_i / \sum_i s_i^2`: the orthogonal projection.

    Args:
        tensor: any floating or complex dtype, any memory layout.
        groups: a list of lists of indices along ``dim``, or integer labels with -1 for free slices, as for
            :class:`~tieopt.Tie`.
        dim: the dimension along which the slices lie.
        scale: what multiple of its group's shared value each slice is, as for :class:`~tieopt.Tie`.

    Returns:
        ``tensor``.

    Raises:
        TypeError, IndexError, ValueError: ``groups``, ``dim`` or ``scale`` do not fit, as for
            :class:`~tieopt.Tie`. Nothing is written then.

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
        >>> tie_(torch.tensor([1.0, -3.0, 5.0]), [[0, 1, 2]], scale=torch.tensor([1.0, -1.0, 0.0]))
        tensor([ 2., -2.,  0.])
    """
    slices = numbered([slices_for(tensor, groups, dim, scale, "the tensor")])
    check_writable(tensor, "the tensor")
    if is_sharded(tensor):
        shards_for(Indices(slices), [tensor], ["the tensor"]).project_([tensor], Workspace())
        return tensor
    project_([tensor], Index.compile(slices, [tensor]), Workspace())
    return tensor


def is_tied(tensor: Tensor, groups: Any, *, dim: int = 0, scale: Any = None) -> bool:
    """Whether all the members of each group are equal, exactly; with scales, what :func:`tie_` would write.

    Equal means ``==`` as in :func:`torch.equal`: a group that holds a NaN is not tied.

    Args:
        tensor: as for :func:`tie_`.
        groups: as for :func:`tie_`.
        dim: as for :func:`tie_`.
        scale: as for :func:`tie_`.

    Raises:
        TypeError, IndexError, ValueError: as for :func:`tie_`.

    Example:
        >>> import torch
        >>> from tieopt import is_tied
        >>> is_tied(torch.tensor([1.0, 2.0, 1.0]), [[0, 2]])
        True
        >>> is_tied(torch.tensor([1.0, 2.0, 1.0]), [[0, 1]])
        False
    """
    slices = numbered([slices_for(tensor, groups, dim, scale, "the tensor")])
    if is_sharded(tensor):
        return shards_for(Indices(slices), [tensor], ["the tensor"]).tied([tensor], Workspace())
    return tied([tensor.detach()], Index.compile(slices, [tensor]), Workspace())
