"""Ties of whole neurons: the weights of a unit of a layer, and the weights by which other layers read it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tieopt.errors import message, refusal, shown, users_level
from tieopt.functional import tie_
from tieopt.ties.part import Groups, check_writable, slices_for
from tieopt.ties.slices import FREE, numbered
from tieopt.ties.tie import Tie

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_READERS = (nn.Linear, *_CONVOLUTIONS)
_LAYERS = (*_READERS, nn.Embedding)

# Layers that have entries for each unit.
_SHAPED_NORMS = (nn.LayerNorm, nn.RMSNorm)
_READ_FLATTENED = (*_SHAPED_NORMS, nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.GroupNorm, nn.PReLU)
_NORMS = (*_READ_FLATTENED, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Their attributes that hold the shape of these entries, even without parameters.
_SIZES = ("normalized_shape", "num_features", "num_channels", "num_parameters", "out_channels")
# Layers without weights that do the same to each unit. All of them are listed, because others may mix units.
_PASSED_OVER = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus),
    *(nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.Flatten, nn.Identity, nn.Upsample),
)

_NO_READER = "No layer in following reads these neurons."
_FOLLOWING = (
    "norms, then a linear layer or a convolution, none of them lazy, and all after a linear layer or a convolution; "
    "leave out other layers without weights, and add a Tie for each weight of those that have some"
)


def neurons(
    module: nn.Module, groups: Groups, *, following: nn.Module | Iterable[nn.Module] | None = None
) -> list[Tie]:
    r"""Return ties of whole units of a layer: of the slices of its weight, and of the entries of its bias.

    A unit is a neuron of a linear layer, an output channel of a convolution, or the vector of an embedding's entry.
    With ``following``, the weights of the units in the next layers are tied, too: their entries in norms, and the
    columns of the layer that reads them or, after flattening, the columns of a channel, position by position. For
    linear layers :math:`h = W x + b` and :math:`y = V h + c`, units :math:`i` and :math:`j` of one group have

    .. math:: W_{i,:} = W_{j,:}, \qquad b_i = b_j, \qquad V_{:,i} = V_{:,j}

    The weights of tied units are equal bit for bit. Their outputs are equal up to the order in which a kernel adds,
    also after pointwise functions, pooling over positions, flattening, dropout in ``eval()`` mode, and the norms in
    ``following``. After dropout in ``train()`` mode, or after a norm that is not in ``following``, they may differ.

    Running statistics of the norms are buffers, which no optimizer holds. ``neurons`` itself replaces them by the mean
    of each group, in place. Forward passes in ``train()`` mode then keep them equal up to the order in which a kernel
    adds; :func:`~tieopt.tie_` makes them equal bit for bit again. With ``start="first"`` they are the mean, too, and
    fit the first units only after some training.

    The ties of consecutive layers share the weight between them; make one tie of these with :meth:`Tie.union()
    <tieopt.Tie.union>`. For freshly initialised layers, use ``start="first"`` of :class:`~tieopt.TiedOptimizer`: the
    mean of :math:`n` independent random units is about :math:`\sqrt n` times smaller than each of them.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` or ``nn.Embedding``, whose weight has
            shape ``[units, ...]``; any dtype that :class:`~tieopt.Tie` takes.
        groups: groups of units, as for :class:`~tieopt.Tie`: lists of indices, or labels of shape ``[units]``.
        following: one or several layers that come next, in their order; not for an embedding. None leaves them untied.
            ``nn.Sequential`` and ``nn.ModuleList`` stand for the layers in them, so a part of a model, ``model[1:4]``,
            can be given as it is.

            - Batch, instance, group, layer and RMS norms, and ``nn.PReLU``, with an entry for each unit or, after
              flattening, for each of its positions. A ``GroupNorm`` has to normalise the units of one group by equal
              statistics. The shape of a ``LayerNorm`` or ``RMSNorm`` ends in the units after a linear layer; after a
              convolution it is ``(units, height, width)``, or ``(units,)`` if channels were moved last. A depthwise
              convolution, with one kernel for each unit, counts as a norm.
            - Then at most one layer that reads the units: a linear layer, or a convolution without groups, with a
              weight of shape ``[out, units, ...]`` or, after flattening, ``[out, units * positions]``.
            - The pointwise functions, pooling, dropout and flattening of ``torch.nn`` are skipped.

    Returns:
        A tie for each parameter, in the order of the weight, the bias, if there is one, and the parameters of the
        layers in ``following``.

    Raises:
        TypeError: ``module`` or a layer in ``following`` is another kind of layer, or is lazy and has no weight yet;
            all layers in ``following`` are skipped; or ``groups`` are no groups.
        IndexError: an index is out of range.
        ValueError: an index occurs twice, labels are not of shape ``[units]``, a layer in ``following`` does not
            fit the outputs of ``module`` or comes after the one that reads them, or a ``GroupNorm`` normalises
            units of one group by different statistics. Nothing is written in any of these cases.

    Warns:
        UserWarning: ``module`` is an embedding with ``max_norm``, whose lookups write to some members of a group and
            not to others; or a convolution with groups, in which units that are to be tied read different inputs.

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

        With a norm between the layers:

        >>> model = torch.nn.Sequential(hidden, torch.nn.BatchNorm1d(4), torch.nn.ReLU(), head)
        >>> inner = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = TiedOptimizer(inner, neurons(model[0], [[0, 2]], following=model[1:]))
        >>> is_tied(model[1].weight, [[0, 2]]), is_tied(model[1].running_var, [[0, 2]])
        (True, True)
    """
    if not isinstance(module, _LAYERS):
        expected = (
            f"{', '.join(layer.__name__ for layer in _LAYERS)}, or ties of another layer's parameters, "
            "as Tie(layer.weight, groups, dim=1) if its units are columns"
        )
        raise refusal(TypeError, "This layer has no neurons to tie.", expected=expected, got=_shown_layer(module))
    (slices,) = numbered([slices_for(module.weight, groups, 0, None, f"the weight of {module}")])
    labels = slices.labels
    if labels.dim() != 1:
        expected = f"labels of shape {tuple(module.weight.shape[:1])}"
        raise refusal(ValueError, "Neurons are tied whole.", expected=expected, got=tuple(labels.shape))
    ties = _ties_of(module, labels)
    statistics: list[tuple[Tensor, Tensor]] = []
    given = [] if following is None else list(_unpacked(following))
    layers = [(layer, text) for layer, text in given if not _is_passed_over(layer)]
    if given and (isinstance(module, nn.Embedding) or not layers):
        raise refusal(TypeError, _NO_READER, expected=_FOLLOWING, got=given[0][1])
    for number, (layer, text) in enumerate(layers, start=1):
        if isinstance(layer, _NORMS) or _is_depthwise(layer, len(labels)):
            entries, dim = _entries(module, labels, layer, text)
            ties += _ties_of(layer, entries, dim)
            for statistic in _tensors(layer, "running_mean", "running_var"):
                slices_for(statistic, entries, 0, None, f"a running statistic of {layer}")
                check_writable(statistic, f"a running statistic of {layer}")
                statistics.append((statistic, entries))
        else:
            ties.append(_reader_tie(module, labels, layer, text))
            if number < len(layers):
                what = "A layer comes after the one that reads these neurons."
                raise refusal(ValueError, what, expected=f"nothing after {text}", got=layers[number][1])
    _warn_of_different_units(module, labels)
    for statistic, entries in statistics:
        tie_(statistic, entries)
    return ties


def _tensors(layer: nn.Module, *names: str) -> list[Tensor]:
    """Return the parameters or buffers of these names, where a layer has them."""
    return [tensor for name in names if (tensor := getattr(layer, name, None)) is not None]


def _ties_of(layer: nn.Module, labels: Tensor, dim: int = 0) -> list[Tie]:
    return [Tie(param, labels, dim=dim) for param in _tensors(layer, "weight", "bias")]


def _unpacked(following: Any, position: str = "") -> Iterator[tuple[Any, str]]:
    """Yield single layers, each with its text for errors.

    A layer in a Sequential at position 2 has the position 2.0, and a layer that is given alone has none.
    """
    is_layer = isinstance(following, nn.Module) and not isinstance(following, nn.Sequential | nn.ModuleList)
    if is_layer or isinstance(following, Tensor | str) or not isinstance(following, Iterable):
        yield following, _shown_layer(following) + (f", at position {position} of following" if position else "")
        return
    for number, layer in enumerate(following):
        yield from _unpacked(layer, f"{position}.{number}" if position else str(number))


def _shown_layer(layer: Any) -> str:
    return str(layer) if isinstance(layer, nn.Module) else shown(layer)


def _is_passed_over(layer: Any) -> bool:
    return isinstance(layer, _PASSED_OVER) or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1)


def _is_depthwise(layer: Any, units: int) -> bool:
    """Return whether a layer is a convolution with one kernel, and one output channel, for each unit."""
    return isinstance(layer, _CONVOLUTIONS) and layer.in_channels == layer.out_channels == layer.groups == units > 1


def _entries(module: nn.Module, labels: Tensor, layer: nn.Module, text: str) -> tuple[Tensor, int]:
    """Return the labels of the entries that a norm or a depthwise convolution has for the units, and their dimension.

    A linear layer has its units in the last dimension of its output, and a convolution in the first after the batch.
    """
    size = next(getattr(layer, name) for name in _SIZES if hasattr(layer, name))
    shape = tuple(size) if isinstance(layer, _SHAPED_NORMS) else (size,)
    after_linear = isinstance(module, nn.Linear)
    # (channels, height, width), and so on: as many dimensions as an output has without its batch.
    channels_first = module.weight.dim() - 1  # type: ignore[operator]
    known = len(shape) > 0 if after_linear else len(shape) in (1, channels_first)
    flattened = not after_linear and len(shape) == 1 and isinstance(layer, _READ_FLATTENED)
    dim = len(shape) - 1 if after_linear else 0
    entries = _spread(labels, shape[dim], flattened) if known else None
    if entries is None:
        expected = f"an entry for each of {len(labels)} units{', or for each of their positions' * flattened}"
        if isinstance(layer, _SHAPED_NORMS):
            where = "last dimension" if after_linear else f"first of {channels_first} dimensions, or in the only one"
            expected = f"{expected}, in the {where}"
        raise refusal(ValueError, "The following layer does not fit these neurons.", expected=expected, got=text)
    if isinstance(layer, nn.GroupNorm):
        _check_statistics(layer, len(labels), entries, text)
    return entries, dim


def _check_statistics(norm: nn.GroupNorm, count: int, entries: Tensor, text: str) -> None:
    """Refuse a norm whose statistics differ for tied units.

    Two norm groups have equal statistics if they hold the same tied units.
    """
    # Each free entry gets a label of its own, below -1.
    distinct = torch.where(entries == FREE, FREE - 1 - torch.arange(len(entries), device="cpu"), entries)
    held = distinct.view(norm.num_groups, -1).sort(dim=1).values
    _, kinds = torch.unique(held, dim=0, return_inverse=True)
    members = _first_mixed_group(entries, kinds.repeat_interleave(held.shape[1]))
    if members:
        what = "The following norm has different statistics for tied neurons."
        expected = "tied units in one norm group, or in norm groups of the same tied units"
        units = sorted({member // (len(entries) // count) for member in members})
        raise refusal(ValueError, what, expected=expected, got=f"{text}, with {units} as one group")


def _first_mixed_group(labels: Tensor, kinds: Tensor) -> list[int]:
    """Return the members of the first group that are not all of one kind; none if there is no such group."""
    pairs = torch.unique(torch.stack([labels, kinds])[:, labels != FREE], dim=1)
    repeated = pairs[0, 1:][pairs[0, 1:] == pairs[0, :-1]]
    return (labels == repeated[0]).nonzero().flatten().tolist() if len(repeated) else []


def _reader_tie(module: nn.Module, labels: Tensor, following: nn.Module, text: str) -> Tie:
    """Return the tie of the weights by which a layer reads the units."""
    if not isinstance(following, _READERS) or is_lazy(following.weight):
        raise refusal(TypeError, _NO_READER, expected=_FOLLOWING, got=text)
    flattened = isinstance(following, nn.Linear) and not isinstance(module, nn.Linear)
    entries = _spread(labels, following.weight.shape[1], flattened)
    if entries is None or getattr(following, "groups", 1) != 1:
        expected = f"a layer without groups and with {len(labels)} inputs{', or a multiple' * flattened}"
        raise refusal(ValueError, "The following layer does not read these neurons.", expected=expected, got=text)
    return Tie(following.weight, entries, dim=1)


def _spread(labels: Tensor, count: int, flattened: bool) -> Tensor | None:
    """Return labels of ``count`` entries: one for each unit or, if channels are flattened, for each position of a unit.

    None if the entries are not equally many for all units.
    """
    units = len(labels)
    positions = count // units if flattened and units else 1
    if units * positions != count:
        return None
    spread = labels[:, None] * positions + torch.arange(positions, device="cpu")
    return torch.where(labels[:, None] == FREE, FREE, spread).flatten()


def _warn_of_different_units(module: nn.Module, labels: Tensor) -> None:
    """Warn if tied units do not compute the same for a reason that lies in the layer itself."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        what = "A lookup with max_norm writes to the rows that it looks up, but not to the rows that are tied to them."
        expected = (
            "an embedding without max_norm; instead, after each step, weight.renorm_(...) in torch.no_grad(), and then "
            "tie_weights()"
        )
        warnings.warn(message(what, expected=expected, got=module), stacklevel=users_level())
    if isinstance(module, _CONVOLUTIONS) and module.groups != 1:
        units = _first_mixed_group(labels, torch.arange(len(labels), device="cpu") // (len(labels) // module.groups))
        if units:
            what = "Tied units of a convolution with groups read different inputs."
            expected = "units in one of its groups, or a depthwise convolution in following of the layer before it"
            got = f"{module}, with {units} as one group"
            warnings.warn(message(what, expected=expected, got=got), stacklevel=users_level())
