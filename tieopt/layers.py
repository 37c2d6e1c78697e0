"""The ties of whole neurons: what belongs to a unit of a layer, and what reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tieopt.slices import FREE, numbered
from tieopt.ties import Groups, Tie, shown, slices_for

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def neurons(module: nn.Module, groups: Groups, *, following: nn.Module | None = None) -> list[Tie]:
    r"""Ties whole units of a layer: the slices of its weight, and the entries of its bias.

    A unit is a row of a linear layer, an output channel of a convolution, the vector of an embedding's
    entry. Tied units compute the same. With ``following``, the weights by which the next layer reads them
    are tied, too: its input columns or, after flattening, the columns of a channel, position by position. For
    linear layers :math:`h = W x + b` and :math:`y = V h + c`, units :math:`i` and :math:`j` of one group have

    .. math:: W_{i,:} = W_{j,:}, \qquad b_i = b_j, \qquad V_{:,i} = V_{:,j}

    Args:
        module: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` or ``nn.Embedding``, whose weight has
            shape ``[units, ...]``; any dtype that :class:`~tieopt.Tie` takes.
        groups: of units, as for :class:`~tieopt.Tie`: lists of indices, or labels of shape ``[units]``.
        following: the linear layer, or the convolution without groups, that reads the outputs of
            ``module``, with a weight of shape ``[out, units, ...]`` or, after flattening,
            ``[out, units * positions]``; not for an embedding. None leaves it untied.

    Returns:
        One tie for each parameter, to be given to :class:`~tieopt.TiedOptimizer`. First that of the weight, then
        that of the bias, if there is one, and that of the weight of ``following``, if that is given.

    Raises:
        TypeError: ``module`` or ``following`` is another kind of layer, or is lazy and has no weight yet; or
            ``groups`` are no groups.
        IndexError: an index is out of range.
        ValueError: an index occurs twice, labels are not of shape ``[units]``, or ``following`` does not read
            the outputs of ``module``.

    Example:
        >>> import torch
        >>> from tieopt import TiedOptimizer, is_tied, neurons
        >>> hidden, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        >>> inner = torch.optim.SGD([*hidden.parameters(), *head.parameters()], lr=0.1)
        >>> optimizer = TiedOptimizer(inner, neurons(hidden, [[0, 2]], following=head))
        >>> is_tied(hidden.weight, [[0, 2]]), is_tied(hidden.bias, [[0, 2]])
        (True, True)
        >>> is_tied(head.weight, [[0, 2]], dim=1)
        True
    """
    if not isinstance(module, _LAYERS):
        raise TypeError(_wrong("This layer has no neurons to tie.", [layer.__name__ for layer in _LAYERS], module))
    (slices,) = numbered([slices_for(module.weight, groups, 0, None, f"the weight of {module}")])
    labels = slices.labels
    if labels.dim() != 1:
        raise ValueError(
            _wrong("Neurons are tied whole.", f"labels of shape {tuple(module.weight.shape[:1])}", tuple(labels.shape))
        )
    ties = [Tie(module.weight, labels)]
    if getattr(module, "bias", None) is not None:
        ties.append(Tie(module.bias, labels))  # type: ignore[arg-type]
    if following is not None:
        ties.append(_readers(module, labels, following))
    return ties


def _readers(module: nn.Module, labels: Tensor, following: nn.Module) -> Tie:
    """The tie of the weights by which the next layer reads the units."""
    readers = _LAYERS[:-1]
    if isinstance(module, nn.Embedding) or not isinstance(following, readers) or is_lazy(following.weight):
        expected = "a linear layer or a convolution with a shape, after one"
        raise TypeError(_wrong("No layer follows so that it reads these neurons.", expected, following))
    units, inputs = len(labels), following.weight.shape[1]
    # A channel that was flattened is read once at each of its positions.
    flattened = isinstance(following, nn.Linear) and not isinstance(module, nn.Linear)
    positions = inputs // units if flattened and units else 1
    if units * positions != inputs or getattr(following, "groups", 1) != 1:
        expected = f"a layer without groups and with {units} inputs{', or a multiple' * flattened}"
        raise ValueError(_wrong("The following layer does not read these neurons.", expected, following))
    spread = labels[:, None] * positions + torch.arange(positions, device="cpu")
    return Tie(following.weight, torch.where(labels[:, None] == FREE, FREE, spread).flatten(), dim=1)


def _wrong(what: str, expected: object, got: object) -> str:
    listed = ", ".join(map(str, expected)) if isinstance(expected, list) else expected
    return f"{what}\n  Expected: {listed}\n  Got:      {got if isinstance(got, nn.Module | tuple) else shown(got)}"
