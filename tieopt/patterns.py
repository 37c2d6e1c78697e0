r"""Patterns: functions that return labels, and scales where a pattern has signs or zeros.

Entries with the same label share one value :math:`w_0`, and :math:`w_i = s_i w_0` with the scale :math:`s_i`: 1, -1 for
the opposite, or 0 for an entry pinned at zero. If a pattern returns only labels, every scale is 1. Labels are int64 and
scales float32, both on the CPU.

The matrix patterns label the first two dimensions of a shape, so that the entries of the weight of a linear
layer and whole kernels of the weight of a convolution are tied::

    ties = {layer.weight: patterns.toeplitz(layer.weight.shape)}

    labels, scale = patterns.antisymmetric(layer.weight.shape)
    ties = Tie(layer.weight, labels, scale=scale)

Patterns with a seed are the same on every run, and no argument is written to. Only :func:`clusters` and :func:`similar`
read the values of weights. :func:`orbits`, :func:`equivariant` and :func:`similar` need scipy, and :func:`hashed` and
:func:`clusters` need scikit-learn: ``pip install 'tieopt[patterns]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import frexp, inf, ldexp, prod
from operator import index
from typing import Any, Literal, SupportsIndex, overload

import torch
from torch import Tensor, nn

from tieopt.errors import imported, integer_between, refusal, shown, shown_entry
from tieopt.ties.slices import FREE, Slices, numbered

__all__ = [
    "antisymmetric",
    "block_circulant",
    "centrosymmetric",
    "circulant",
    "clusters",
    "convolution",
    "convolution_bias",
    "equivariant",
    "hankel",
    "hashed",
    "mirrored",
    "orbits",
    "persymmetric",
    "rotated",
    "similar",
    "symmetric",
    "toeplitz",
]

# A permutation, or one with its signs.
_Permutation = Tensor | tuple[Tensor, Tensor]

_INT32_MAX = 2**31 - 1
# k-means sees so many distinct values as they are, and a summary of more.
_SUMMARY = 2**12

# --- matrices ---


def symmetric(shape: Sequence[int]) -> Tensor:
    r"""A matrix that equals its transpose.

    .. math:: W_{i,j} = W_{j,i}

    Args:
        shape: ``[n, n, ...]``.

    Returns:
        Labels of shape ``[n, n]``, int64, ``n (n + 1) / 2`` groups.

    Raises:
        TypeError: ``shape`` is not a sequence of integers.
        ValueError: it has fewer than two dimensions, one is negative, or the first two differ.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.symmetric((3, 3))
        >>> labels
        tensor([[0, 1, 3],
                [1, 2, 4],
                [3, 4, 5]])
        >>> torch.equal(labels, labels.T)
        True
    """
    i, j = _grid(*_square(shape, "symmetric"))
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    return high * (high + 1) // 2 + low


def antisymmetric(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    r"""A matrix that is the negative of its transpose, and so zero on the diagonal.

    .. math:: W_{i,j} = -W_{j,i}

    Such a matrix keeps a recurrent network stable (`Chang et al., AntisymmetricRNN, 2019
    <https://arxiv.org/abs/1902.09689>`_).

    Args:
        shape: ``[n, n, ...]``.

    Returns:
        Labels of shape ``[n, n]``, int64, ``n (n - 1) / 2`` groups and one for each entry of the diagonal; and
        their scales, float32, 1 above the diagonal, -1 below, and 0 on it.

    Raises:
        TypeError: ``shape`` is not a sequence of integers.
        ValueError: it has fewer than two dimensions, one is negative, or the first two differ.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels, scale = patterns.antisymmetric((3, 3))
        >>> scale
        tensor([[ 0.,  1.,  1.],
                [-1.,  0.,  1.],
                [-1., -1.,  0.]])
        >>> weight = torch.randn(6)[labels] * scale
        >>> torch.equal(weight, -weight.T)
        True
    """
    i, j = _grid(*_square(shape, "antisymmetric"))
    return symmetric(shape), (j - i).sign().float()


def persymmetric(shape: Sequence[int]) -> Tensor:
    r"""A matrix that is symmetric about its anti-diagonal.

    .. math:: W_{i,j} = W_{n-1-j,\,n-1-i}

    Args:
        shape: ``[n, n, ...]``.

    Returns:
        Labels of shape ``[n, n]``, int64, ``n (n + 1) / 2`` groups.

    Raises:
        TypeError: ``shape`` is not a sequence of integers.
        ValueError: it has fewer than two dimensions, one is negative, or the first two differ.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.persymmetric((3, 3))
        >>> labels
        tensor([[3, 1, 0],
                [4, 2, 1],
                [5, 4, 3]])
        >>> torch.equal(labels, labels.T.flip(0, 1))
        True
    """
    _square(shape, "persymmetric")
    return symmetric(shape).flip(1)


def centrosymmetric(shape: Sequence[int]) -> Tensor:
    r"""A matrix that is symmetric about its center.

    .. math:: W_{i,j} = W_{m-1-i,\,n-1-j}

    Args:
        shape: ``[m, n, ...]``.

    Returns:
        Labels of shape ``[m, n]``, int64, ``m n / 2`` groups, rounded up.

    Raises:
        TypeError: ``shape`` is not a sequence of integers.
        ValueError: it has fewer than two dimensions, or one is negative.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.centrosymmetric((3, 2))
        >>> labels
        tensor([[0, 1],
                [2, 2],
                [1, 0]])
        >>> torch.equal(labels, labels.flip(0, 1))
        True
    """
    m, n = _sizes(shape, least=2)[:2]
    entries = torch.arange(m * n, device="cpu").view(m, n)
    return torch.minimum(entries, entries.flip(0, 1))


def circulant(shape: Sequence[int]) -> Tensor:
    r"""A matrix whose rows are rotations of the first.

    .. math:: W_{i,j} = W_{0,\,(j-i) \bmod n}

    Dense layers of this kind are those of `Cheng et al., 2015 <https://arxiv.org/abs/1502.03436>`_.

    Args:
        shape: ``[n, n, ...]``.

    Returns:
        Labels of shape ``[n, n]``, int64, ``n`` groups.

    Raises:
        TypeError: ``shape`` is not a sequence of integers.
        ValueError: it has fewer than two dimensions, one is negative, or the first two differ.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.circulant((3, 3))
        >>> labels
        tensor([[0, 1, 2],
                [2, 0, 1],
                [1, 2, 0]])
        >>> torch.equal(labels, labels.roll((1, 1), (0, 1)))
        True
    """
    i, j = _grid(*_square(shape, "circulant"))
    return (j - i) % len(i)


def block_circulant(shape: Sequence[int], block: int) -> Tensor:
    r"""A matrix of square blocks, each of which is circulant.

    .. math:: W_{bI+i,\,bJ+j} = W_{bI,\,bJ + (j-i) \bmod b}, \qquad 0 \le i, j < b

    for blocks of size :math:`b`. This is the structure of CirCNN (`Ding et al., 2017
    <https://arxiv.org/abs/1708.08917>`_), which has :math:`b` times fewer values.

    Args:
        shape: ``[m, n, ...]``.
        block: rows and columns of a block; a divisor of ``m`` and of ``n``.

    Returns:
        Labels of shape ``[m, n]``, int64, ``m n / block`` groups.

    Raises:
        TypeError: ``shape`` is not a sequence of integers, or ``block`` is not an integer.
        ValueError: ``shape`` has fewer than two dimensions or a negative one, or ``block`` does not divide
            the first two.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.block_circulant((2, 4), 2)
        >>> labels
        tensor([[0, 1, 2, 3],
                [1, 0, 3, 2]])
        >>> block = labels[:, 2:]
        >>> torch.equal(block, block.roll((1, 1), (0, 1)))
        True
    """
    m, n = _sizes(shape, least=2)[:2]
    block = integer_between(block, "The size of a block", 1, max(m, n) or _INT32_MAX)
    if m % block or n % block:
        expected = f"a divisor of {m} and of {n}"
        raise refusal(ValueError, "A matrix cannot be cut into such blocks.", expected=expected, got=block)
    i, j = _grid(m, n)
    return (i // block * (n // block) + j // block) * block + (j - i) % block


def toeplitz(shape: Sequence[int]) -> Tensor:
    r"""A matrix that is constant along its diagonals.

    .. math:: W_{i,j} = W_{i+1,\,j+1}

    Its product with a vector is a convolution. It is among the structured layers of `Sindhwani et al., 2015
    <https://arxiv.org/abs/1510.01722>`_.

    Args:
        shape: ``[m, n, ...]``.

    Returns:
        Labels of shape ``[m, n]``, int64, ``m + n - 1`` groups.

    Raises:
        TypeError: ``shape`` is not a sequence of integers.
        ValueError: it has fewer than two dimensions, or one is negative.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.toeplitz((2, 3))
        >>> labels
        tensor([[1, 2, 3],
                [0, 1, 2]])
        >>> torch.equal(labels[1:, 1:], labels[:-1, :-1])
        True
    """
    i, j = _grid(*_sizes(shape, least=2)[:2])
    return j - i + (len(i) - 1)


def hankel(shape: Sequence[int]) -> Tensor:
    r"""A matrix that is constant along its anti-diagonals: a Toeplitz matrix upside down.

    .. math:: W_{i,j} = W_{i+1,\,j-1}

    Args:
        shape: ``[m, n, ...]``.

    Returns:
        Labels of shape ``[m, n]``, int64, ``m + n - 1`` groups.

    Raises:
        TypeError: ``shape`` is not a sequence of integers.
        ValueError: it has fewer than two dimensions, or one is negative.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.hankel((2, 3))
        >>> labels
        tensor([[0, 1, 2],
                [1, 2, 3]])
        >>> torch.equal(labels[1:, :-1], labels[:-1, 1:])
        True
    """
    return toeplitz(shape).flip(0)


# --- symmetries of any shape ---


def mirrored(shape: Sequence[int], dims: Sequence[int] = (-1,)) -> Tensor:
    r"""Entries that equal their mirror image along each given dimension: ``W = W.flip(d)`` for each ``d``.

    .. math:: W_{\dots, i_d, \dots} = W_{\dots,\, n_d - 1 - i_d, \dots}

    where dimension :math:`d` has size :math:`n_d`.

    Args:
        shape: one dimension or more.
        dims: the mirrored dimensions, each once; negative ones count from the end. By default the last: the width of a
            convolution's weight ``[out, in, height, width]``.

    Returns:
        Labels of shape ``shape``, int64. The number of groups is the product of the sizes, with those of ``dims``
        halved and rounded up.

    Raises:
        TypeError: ``shape`` or ``dims`` is not a sequence of integers.
        IndexError: ``shape`` has not all of ``dims``.
        ValueError: ``shape`` has no dimension or a negative one, or ``dims`` have one twice.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.mirrored((2, 3))
        >>> labels
        tensor([[0, 1, 0],
                [2, 3, 2]])
        >>> torch.equal(labels, labels.flip(-1))
        True
        >>> patterns.mirrored((2, 3), dims=(0, 1))
        tensor([[0, 1, 0],
                [0, 1, 0]])
    """
    sizes = _sizes(shape, least=1)
    dims = _dims(dims, len(sizes))
    halves = [(size + 1) // 2 if dim in dims else size for dim, size in enumerate(sizes)]
    labels = torch.arange(prod(halves), device="cpu").view(halves)
    for dim in dims:
        labels = torch.cat([labels, labels.flip(dim).narrow(dim, sizes[dim] % 2, sizes[dim] // 2)], dim)
    return labels


def rotated(shape: Sequence[int], *, mirrored: bool = False) -> Tensor:
    r"""Square kernels that equal themselves rotated by 90 degrees: ``W = W.rot90(1, (-2, -1))``.

    .. math:: W_{\dots,i,j} = W_{\dots,j,\,k-1-i}, \qquad \text{and mirrored also} \quad
        W_{\dots,i,j} = W_{\dots,i,\,k-1-j}

    The rotations form the group :math:`C_4`; with the reflections, ``W = W.flip(-1)``, it is :math:`D_4`, the
    symmetries of the square. Entries are tied within each kernel ``[k, k]``, not across kernels. A convolution with
    such kernels rotates its output with its input.

    Args:
        shape: ``[..., k, k]``, such as that of a convolution's weight.
        mirrored: whether a kernel also equals its mirror images.

    Returns:
        Labels of shape ``shape``, int64. For each kernel ``k^2 / 4`` groups, rounded up; mirrored,
        ``h (h + 1) / 2``, where ``h`` is ``k / 2``, rounded up.

    Raises:
        TypeError: ``shape`` is not a sequence of integers.
        ValueError: it has fewer than two dimensions, one is negative, or the last two differ.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels = patterns.rotated((4, 4))
        >>> labels
        tensor([[0, 1, 2, 0],
                [2, 3, 3, 1],
                [1, 3, 3, 2],
                [0, 2, 1, 0]])
        >>> torch.equal(labels, labels.rot90())
        True
        >>> len(patterns.rotated((4, 4), mirrored=True).unique())
        3
    """
    sizes = _sizes(shape, least=2)
    *kernels, k, other = sizes
    if k != other:
        expected = "the last two dimensions to be equal"
        raise refusal(ValueError, "Such kernels cannot be rotated.", expected=expected, got=sizes)
    entries = torch.arange(k * k, device="cpu").view(k, k)
    views = [entries, entries.flip(0)] if mirrored else [entries]
    first = torch.stack([view.rot90(turns) for view in views for turns in range(4)]).amin(0)
    names, number = torch.unique(first, return_inverse=True)
    labels: Tensor = torch.arange(prod(kernels), device="cpu").view(*kernels, 1, 1) * len(names) + number
    return labels


@overload
def orbits(*permutations: Tensor) -> Tensor: ...


@overload
def orbits(*permutations: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]: ...


@overload
def orbits(*permutations: _Permutation) -> Tensor | tuple[Tensor, Tensor]: ...


def orbits(*permutations: _Permutation) -> Tensor | tuple[Tensor, Tensor]:
    r"""Entries that permutations map to each other or, with signs, to the opposite of each other.

    .. math:: W_i = \sigma_i W_{\pi(i)} \quad \text{for every permutation } \pi \text{ and its signs } \sigma

    Use this function for any symmetry that has no function here. Layers are made equivariant by sharing their
    parameters in this way (`Ravanbakhsh et al., 2017 <https://arxiv.org/abs/1702.08389>`_). Number the entries, and put
    in the place of each entry the number of the entry that it equals. For example, ``W[i, j, a, b] = W[j, i, k - 1 - a,
    k - 1 - b]`` says that swapping input and output mirrors a kernel of ``k x k`` entries about its center::

        entries = torch.arange(weight.numel()).view(weight.shape)
        labels = patterns.orbits(entries.transpose(0, 1).flip(2, 3))

    An entry that is the opposite of another one has the sign -1. An entry that would be its own opposite is zero.
    Inverses and products of the permutations need not be given. scipy finds the orbits, as the connected components of
    a graph.

    Args:
        *permutations: one or more permutations, all of one shape: a tensor of any integer dtype but uint64, a
            rearrangement of ``torch.arange(n).view(shape)``; or with signs a pair ``(permutation, signs)``, where
            ``signs`` is a tensor of that shape and any real dtype, 1 or -1.

    Returns:
        Labels of that shape, int64, one group for each orbit. If a permutation has signs, also the scales, float32,
        which are 1 for the first entry of an orbit, 1 or -1 for the others, and 0 for all entries of an orbit that is
        zero.

    Raises:
        TypeError: there is no permutation, or one is not an integer tensor, or its signs are not a real tensor.
        ValueError: the shapes differ, or one is not a permutation, or a sign is neither 1 nor -1.
        ImportError: scipy is not installed.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> entries = torch.arange(6).view(2, 3)
        >>> labels = patterns.orbits(entries.flip(0))
        >>> labels
        tensor([[0, 1, 2],
                [0, 1, 2]])
        >>> torch.equal(labels, labels.flip(0))
        True
        >>> patterns.orbits(entries.flip(0), entries.roll(1, 1))
        tensor([[0, 0, 0],
                [0, 0, 0]])

        Odd filters, ``W = -W.flip(1)``:

        >>> labels, scale = patterns.orbits((entries.flip(1), -torch.ones(2, 3)))
        >>> scale
        tensor([[ 1.,  0., -1.],
                [ 1.,  0., -1.]])
        >>> weight = torch.randn(4)[labels] * scale
        >>> torch.equal(weight, -weight.flip(1))
        True
    """
    if not permutations:
        raise refusal(TypeError, "Orbits need a permutation.", expected="one integer tensor or more", got="none")
    actions = _actions(permutations)
    shape = (permutations[0] if isinstance(permutations[0], Tensor) else permutations[0][0]).shape
    if all(isinstance(permutation, Tensor) for permutation in permutations):
        return _components([images for images, _ in actions]).view(shape)
    labels, scale = _signed_orbits(actions)
    return labels.view(shape), scale.view(shape)


def equivariant(inputs: Sequence[_Permutation] | None, outputs: Sequence[_Permutation]) -> tuple[Tensor, Tensor]:
    r"""The weight of a linear layer that commutes with a finite group, and the bias that the group leaves unchanged.

    .. math:: W \rho_\text{in}(g) = \rho_\text{out}(g)\, W, \qquad (\rho(g)\, x)_i = \sigma_i\, x_{\pi(i)}

    for each :math:`g` of the group, which permutes the entries of the input and of the output and flips the signs of
    some. Then :math:`W_{o,i} = \sigma_o \sigma_i W_{\pi(o), \pi(i)}`, so all such layers are found by tying entries
    (`Ravanbakhsh et al., 2017 <https://arxiv.org/abs/1702.08389>`_; `Finzi et al., 2021
    <https://arxiv.org/abs/2104.09459>`_, for any matrices). An entry that would be its own opposite is zero.

    A group is given by generators. A network of such layers commutes with the group if the functions between them act
    entry by entry, and are odd, such as ``tanh``, where there are signs.

    The weights are exact: applying a generator to both sides of a tied weight changes no bit. Outputs for transformed
    inputs are transformed up to rounding, because a kernel adds in another order.

    Args:
        inputs: how each generator acts on the entries of the input: a list of permutations, each a tensor of any
            integer dtype but uint64, so that the generator turns ``x`` into ``x[permutation]``; or, with signs, pairs
            ``(permutation, signs)`` of tensors of one shape, for ``x[permutation] * signs``, where signs are 1 or -1 of
            any real dtype. Permutations may have any shape, the same for all, as rearrangements of
            ``torch.arange(n).view(shape)``; the layer sees the input flattened. None gives the bias.
        outputs: how each generator acts on the entries of the output, in the same form, in the order of ``inputs``.

    Returns:
        Labels of shape ``[out, in]``, or for the bias ``[out]``, int64, one group for each orbit of entries; and their
        scales, as for :func:`orbits`.

    Raises:
        TypeError: ``inputs`` or ``outputs`` is not a list, a permutation is not an integer tensor, or signs are not a
            real tensor.
        ValueError: a list is empty, the lists differ in length, shapes in a list differ, one is not a permutation, or
            a sign is neither 1 nor -1.
        ImportError: scipy is not installed.

    Example:
        A controller of a left and a right leg. In a mirror, the legs are swapped, and the third input, how far the body
        leans to one side, changes its sign:

        >>> import torch
        >>> from tieopt import Tie, TiedOptimizer, patterns
        >>> swap, signs = torch.tensor([1, 0, 2]), torch.tensor([1, 1, -1])
        >>> legs = torch.tensor([1, 0])
        >>> labels, scale = patterns.equivariant([(swap, signs)], [legs])
        >>> labels
        tensor([[0, 1, 2],
                [1, 0, 2]])
        >>> scale
        tensor([[ 1.,  1.,  1.],
                [ 1.,  1., -1.]])
        >>> layer = torch.nn.Linear(3, 2)
        >>> bias_labels, bias_scale = patterns.equivariant(None, [legs])
        >>> ties = [Tie(layer.weight, labels, scale=scale), Tie(layer.bias, bias_labels, scale=bias_scale)]
        >>> optimizer = TiedOptimizer(torch.optim.SGD(layer.parameters()), ties)
        >>> torch.equal(layer.weight, layer.weight[legs][:, swap] * signs)
        True
        >>> x = torch.randn(3)
        >>> torch.allclose(layer(x[swap] * signs), layer(x)[legs])
        True
    """
    on_outputs = _actions(_generators(outputs, "outputs"), " of the outputs")
    if inputs is None:
        alone = torch.zeros(1, dtype=torch.int64, device="cpu")
        on_inputs = [(alone, alone.bool())] * len(on_outputs)
    else:
        on_inputs = _actions(_generators(inputs, "inputs"), " of the inputs")
    if len(on_inputs) != len(on_outputs):
        expected = "as many permutations of the inputs as of the outputs"
        got = f"{len(on_inputs)} of the inputs and {len(on_outputs)} of the outputs"
        raise refusal(ValueError, "Every generator acts on the inputs and on the outputs.", expected=expected, got=got)
    m, n = len(on_outputs[0][0]), len(on_inputs[0][0])
    actions = [
        ((rows[:, None] * n + columns).flatten(), (turned_rows[:, None] ^ turned_columns).flatten())
        for (rows, turned_rows), (columns, turned_columns) in zip(on_outputs, on_inputs, strict=True)
    ]
    labels, scale = _signed_orbits(actions)
    shape = (m,) if inputs is None else (m, n)
    return labels.view(shape), scale.view(shape)


# --- convolutions ---


def convolution(conv: nn.Conv1d | nn.Conv2d, input_size: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    r"""A convolution unrolled: the dense layer that computes the same from flattened inputs.

    For one dimension, with kernels :math:`K`, output position :math:`y` and input position :math:`x`,

    .. math::

        W_{(o,y),(c,x)} = \begin{cases}
            K_{o,c,t} & x = \mathtt{stride} \cdot y + \mathtt{dilation} \cdot t - \mathtt{padding} \\
            0 & \text{if there is no such } t
        \end{cases}

    and in the same way for each of two dimensions. With groups, :math:`c` counts the channels in the group of
    :math:`o`, and the entries between groups are 0. The convolution as a dense layer with shared weights is from LeCun,
    "Generalization and network design strategies", 1989.

    The label of an entry is the position of its value in ``conv.weight.flatten()``. Entries out of the kernel's reach
    are pinned at zero by scale 0, and have the label ``conv.weight.numel()``. So padding the weight with one zero gives
    the dense layer::

        dense.weight = nn.functional.pad(conv.weight.flatten(), (0, 1))[labels]

    Args:
        conv: a convolution of any stride, dilation, groups and zero padding, with a weight of shape
            ``[out_channels, in_channels / groups, *kernel_size]`` and any values.
        input_size: the length or ``(height, width)`` of the input, in entries; one number stands for both.

    Returns:
        Labels of shape ``[out_channels * out_positions, in_channels * in_positions]``, int64, in the order of
        :class:`torch.nn.Flatten`, with a group for each entry of the kernels that does not only see padding, and one
        for the zeros; and their scales, float32, 1 within the kernel's reach and 0 elsewhere.

    Raises:
        TypeError: ``conv`` is not such a layer, or ``input_size`` not one or more integers.
        ValueError: the padding is not by zeros, or the input is too small or of other dimensions.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> conv = torch.nn.Conv1d(1, 1, kernel_size=2)
        >>> labels, scale = patterns.convolution(conv, 3)
        >>> labels
        tensor([[0, 1, 2],
                [2, 0, 1]])
        >>> scale
        tensor([[1., 1., 0.],
                [0., 1., 1.]])
        >>> weight = torch.nn.functional.pad(conv.weight.flatten(), (0, 1))[labels]
        >>> x = torch.ones(1, 3)
        >>> torch.allclose(x @ weight.T + conv.bias, conv(x))
        True
    """
    taps = _taps(conv, input_size)
    inputs = conv.in_channels // conv.groups
    o, i = _grid(conv.out_channels, conv.in_channels)
    channels = torch.where(o // (conv.out_channels // conv.groups) == i // inputs, o * inputs + i % inputs, -1)
    labels = reduce(_nested, zip(taps, conv.kernel_size, strict=True), channels)
    reached = labels >= 0
    return torch.where(reached, labels, conv.weight.numel()), reached.float()


def convolution_bias(conv: nn.Conv1d | nn.Conv2d, input_size: int | Sequence[int]) -> Tensor:
    r"""The bias of the dense layer of :func:`convolution`, which repeats that of a channel at all its positions.

    .. math:: b_{(o,y)} = b_o

    for output channel :math:`o` and position :math:`y`.

    Args:
        conv: as for :func:`convolution`, with a bias, of shape ``[out_channels]``.
        input_size: as for :func:`convolution`.

    Returns:
        Labels of shape ``[out_channels * out_positions]``, int64, ``out_channels`` groups. They are the positions in
        ``conv.bias``, so that ``dense.bias = conv.bias[labels]``.

    Raises:
        TypeError: as for :func:`convolution`.
        ValueError: as for :func:`convolution`, or ``conv`` has no bias.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> conv = torch.nn.Conv1d(1, 2, kernel_size=2)
        >>> labels = patterns.convolution_bias(conv, 4)
        >>> labels
        tensor([0, 0, 0, 1, 1, 1])
        >>> zeros = torch.zeros(1, 1, 4)
        >>> torch.equal(conv.bias[labels], conv(zeros).flatten())
        True
    """
    positions = prod(len(taps) for taps in _taps(conv, input_size))
    if conv.bias is None:
        raise refusal(ValueError, "A convolution has no bias.", expected="bias=True", got=conv)
    return torch.arange(conv.out_channels, device="cpu").repeat_interleave(positions)


# --- compression ---


def hashed(shape: Sequence[int], buckets: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Entries that a hash function sorts into buckets, each with a sign.

    This is the layer of HashedNets (`Chen et al., 2015 <https://arxiv.org/abs/1504.04788>`_):

    .. math:: W_i = \xi(i)\, w_{h(i)}, \qquad h(i) \in \{0, \dots, B - 1\}, \quad \xi(i) \in \{-1, 1\}

    With the signs, the products of inputs that meet in a bucket cancel on average. Both hashes are the 32-bit
    MurmurHash3 of the position :math:`i` in the flattened weight, from scikit-learn, with different seeds. They are the
    same on every machine. Give each layer another seed.

    Args:
        shape: one dimension or more, of fewer than ``2^31`` entries.
        buckets: the number of values, 1 or more: :math:`B`.
        seed: the seed of both hashes, from 0 to ``2^32 - 1``.

    Returns:
        Labels of shape ``shape``, int64, at most ``buckets`` groups; and their scales, float32, 1 or -1.

    Raises:
        TypeError: ``shape`` is not a sequence of integers, or ``buckets`` or ``seed`` is not an integer.
        ValueError: ``shape`` has no dimension, a negative one or too many entries, or ``buckets`` or ``seed``
            is out of range.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from tieopt import patterns
        >>> labels, scale = patterns.hashed((2, 4), buckets=3)
        >>> labels
        tensor([[2, 1, 1, 0],
                [0, 0, 2, 2]])
        >>> scale
        tensor([[ 1., -1., -1.,  1.],
                [ 1.,  1.,  1.,  1.]])
        >>> weight = torch.randn(3)[labels] * scale
        >>> len(weight.abs().unique())
        3
    """
    sizes = _sizes(shape, least=1)
    buckets = integer_between(buckets, "The number of buckets", 1, _INT32_MAX)
    seed = integer_between(seed, "A seed", 0, 2**32 - 1)
    if prod(sizes) > _INT32_MAX:
        expected, got = f"{_INT32_MAX} or fewer", f"{prod(sizes)} in {sizes}"
        raise refusal(ValueError, "A shape has too many entries to be hashed.", expected=expected, got=got)
    murmur = _optional("sklearn.utils").murmurhash3_32
    keys = torch.arange(prod(sizes), dtype=torch.int32, device="cpu").numpy()
    label, sign = (
        torch.from_numpy(murmur(keys, seed=murmur(f"{use} {seed}", positive=True), positive=True).astype("int64"))
        for use in ("bucket", "sign")
    )
    return (label % buckets).view(sizes), (1 - 2 * (sign % 2)).float().view(sizes)


@overload
def clusters(
    tensor: Tensor,
    count: int,
    *,
    of: Literal["rows", "values"] | int = "rows",
    per: Literal["tensor", "channel"] = "tensor",
    keep_zeros: Literal[False] = False,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Tensor: ...


@overload
def clusters(
    tensor: Tensor,
    count: int,
    *,
    of: Literal["rows", "values"] | int = "rows",
    per: Literal["tensor", "channel"] = "tensor",
    keep_zeros: Literal[True],
    weights: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]: ...


def clusters(
    tensor: Tensor,
    count: int,
    *,
    of: Literal["rows", "values"] | int = "rows",
    per: Literal["tensor", "channel"] = "tensor",
    keep_zeros: bool = False,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Rows, values or subvectors, in clusters that k-means finds.

    .. math:: \min_{c, \mu} \sum_i h_i \left\| w_i - \mu_{c(i)} \right\|^2

    The labels :math:`c` are near a local minimum of this sum, where :math:`w_i` are the rows, values or subvectors, and
    :math:`h_i` are the ``weights``, 1 by default. Tying replaces the members of a cluster by their mean. Clusters of
    values are the shared weights of Deep Compression (`Han et al., 2016 <https://arxiv.org/abs/1510.00149>`_). Clusters
    of subvectors are product quantization (`Jégou et al., 2011 <https://doi.org/10.1109/TPAMI.2010.57>`_), which `Gong
    et al., 2014 <https://arxiv.org/abs/1412.6115>`_ applied to weights. The second derivatives of the loss as weights
    are from `Choi et al., 2017 <https://arxiv.org/abs/1612.01543>`_.

    Equal rows, values or subvectors are in one cluster, and the clusters do not depend on the order of the rows.
    scikit-learn runs k-means in float64, from one start by k-means++; another version of it may find other clusters.
    More than a few thousand distinct values are clustered by a fine histogram, and then each value goes to the nearest
    center.

    Args:
        tensor: the parameter now, shape ``[n, ...]``, dense, any real floating dtype. It is not written to.
        count: the number of clusters, at most the number of rows, values or subvectors; in each channel if
            ``per="channel"``.
        of: ``"rows"`` for the slices along dimension 0, ``"values"`` for the single entries, or a number for subvectors
            of so many consecutive entries of a flattened row; it divides the entries of a row. For the weight ``[out,
            in, k, k]`` of a convolution, ``of=k * k`` stands for its kernels.
        per: ``"tensor"`` for clusters of the whole tensor, or ``"channel"`` for separate clusters of values or
            subvectors in each slice along dimension 0.
        keep_zeros: whether entries that are zero, as in a pruned weight, stay zero: they are pinned by scale 0. Rows
            and subvectors of zeros are in no cluster. In others, k-means counts zeros as any number, but the mean that
            a tie starts from is that of the other entries.
        weights: the sensitivity of the loss to each entry, of the shape of ``tensor``, or to each row, of shape
            ``[n]``: a tensor of any real dtype, finite and not negative. The weight of a row or a subvector is the sum
            over its entries. Weights decide which cluster an entry is in; the mean that a tie starts from is without
            weights.
        seed: the seed of the start, from 0 to ``2^32 - 1``.

    Returns:
        Int64 labels, of shape ``[n]`` for rows and of the shape of ``tensor`` for values, with at most ``count``
        groups, for each channel if ``per="channel"``. Larger values of a channel have larger labels. For subvectors,
        labels have the shape of ``tensor``, and there are so many groups for each position in a subvector. With
        ``keep_zeros``, labels have the shape of ``tensor`` for rows, too, and all zeros have the largest label; scales
        are returned as well, float32, 0 for zeros and 1 for others.

    Raises:
        TypeError: ``tensor`` is not a dense floating tensor, ``weights`` is not a dense real tensor, or ``count``,
            ``of`` or ``seed`` is not an integer.
        ValueError: ``tensor`` has no rows or no entries or one that is not finite, ``count`` or ``seed``
            is out of range, ``of`` is another word or does not divide the entries of a row, ``per`` is another word or
            channels of rows are asked for, or ``weights`` has another shape, or an entry that is negative or not
            finite.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from tieopt import patterns, tie_
        >>> weight = torch.tensor([[0.0, 0.1], [5.0, 5.1], [5.2, 5.0]])
        >>> first, second, third = patterns.clusters(weight, 2)
        >>> bool(second == third), bool(first == second)
        (True, False)
        >>> labels = patterns.clusters(weight, 2, of="values")
        >>> labels
        tensor([[0, 0],
                [1, 1],
                [1, 1]])
        >>> len(tie_(weight, labels).unique())
        2

        Sixteen subvectors of four entries each, in a weight that keeps its zeros:

        >>> weight = torch.nn.functional.dropout(torch.randn(64, 64))
        >>> labels, scale = patterns.clusters(weight, 16, of=4, keep_zeros=True)
        >>> tied = tie_(weight.clone(), labels, scale=scale)
        >>> len(tied.unique()) <= 16 * 4 + 1
        True
        >>> torch.equal(tied == 0, weight == 0)
        True
    """
    entries = _entries(tensor)
    size = _subvector(of, entries)
    points = entries.reshape(-1, size)
    channels = _channels(per, of, len(entries))
    count = integer_between(count, "The number of clusters", 1, len(points) // channels)
    seed = integer_between(seed, "A seed", 0, 2**32 - 1)
    costs = None if weights is None else _costs(weights, entries).reshape(-1, size).sum(1)
    k_means = _optional("sklearn.cluster").KMeans(count, random_state=seed, n_init=1)

    labels, total = torch.zeros(len(points), dtype=torch.int64, device="cpu"), 0
    clustered = (points != 0).any(1) if keep_zeros else torch.ones_like(labels, dtype=torch.bool)
    for channel in torch.arange(len(points), device="cpu").view(channels, -1):
        chosen = channel[clustered[channel]]
        if len(chosen):
            labels[chosen] = total + _clusters(
                points[chosen], None if costs is None else costs[chosen], k_means, sort=of != "rows" and size == 1
            )
            total = int(labels[chosen].max()) + 1

    if of == "rows" and not keep_zeros:
        return labels
    labels = (labels[:, None] * size + torch.arange(size, device="cpu")).view(tensor.shape)
    if not keep_zeros:
        return labels
    is_zero = entries == 0
    return labels.masked_fill(is_zero, total * size), (~is_zero).float()


def similar(tensor: Tensor, distance: float, *, dim: int = 0) -> Tensor:
    r"""Slices in groups in which no two are farther apart than a distance.

    .. math:: \| w_i - w_j \|_2 \le d \quad \text{for all } i, j \text{ in one group}

    Use it to tie neurons that have become similar, without a number of clusters to choose. The groups are those of
    agglomerative clustering with complete linkage, which merges the two groups whose farthest members are nearest, as
    long as these are within the distance.

    scipy compares all pairs of slices: ``n`` slices need about ``8 n^2`` bytes for a moment, 0.8 GB for 10 000, and
    time that grows with ``n^2``.

    Args:
        tensor: the parameter now, dense, with one dimension or more, of any real floating dtype. It is not written to.
        distance: the largest Euclidean distance of two slices in a group, finite and not negative; 0 finds equal ones.
        dim: the dimension in which slices are counted; 1 compares the columns of a matrix, and negative ones count from
            the end.

    Returns:
        Labels of shape ``[n]`` for ``n`` slices, int64, -1 for a slice that is in no group. Groups are numbered in the
        order of their first slices.

    Raises:
        TypeError: ``tensor`` is not a dense floating tensor, ``distance`` is not a number, or ``dim`` not an integer.
        IndexError: ``dim`` is out of range.
        ValueError: ``tensor`` has no dimension or no entries or one that is not finite, or ``distance`` is negative or
            not finite.
        ImportError: scipy is not installed.

    Example:
        >>> import torch
        >>> from tieopt import patterns, tie_
        >>> weight = torch.tensor([[1.0, 2.0], [7.0, 7.0], [1.1, 2.0], [5.0, 0.0]])
        >>> labels = patterns.similar(weight, 0.2)
        >>> labels
        tensor([ 0, -1,  0, -1])
        >>> tie_(weight, labels)
        tensor([[1.0500, 2.0000],
                [7.0000, 7.0000],
                [1.0500, 2.0000],
                [5.0000, 0.0000]])
    """
    entries = _entries(tensor, "compare", "compared")
    dim = integer_between(dim, "dim", -entries.dim(), entries.dim() - 1, IndexError)
    farthest = _distance(distance)
    spatial, hierarchy = _optional("scipy.spatial.distance"), _optional("scipy.cluster.hierarchy")
    slices = entries.movedim(dim, 0).flatten(1) if entries.dim() > 1 else entries[:, None]
    if len(slices) == 1:
        return torch.tensor([FREE], device="cpu")
    # A power of two rounds nothing, and squares of what is left neither overflow nor vanish.
    unit = ldexp(1.0, frexp(float(slices.abs().max()))[1] - 1)
    tree = hierarchy.linkage(spatial.pdist((slices / unit).numpy()), method="complete")
    found = torch.from_numpy(hierarchy.fcluster(tree, farthest / unit, criterion="distance"))
    _, number, sizes = torch.unique(found, return_inverse=True, return_counts=True)
    (groups,) = numbered([Slices(torch.where(sizes[number] > 1, number, FREE))])
    return groups.labels


# --- what the patterns share ---


def _grid(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the indices of rows, as a column, and of columns, as a row."""
    return torch.arange(m, device="cpu").unsqueeze(1), torch.arange(n, device="cpu").unsqueeze(0)


def _sizes(shape: Sequence[int], least: int) -> tuple[int, ...]:
    """Return a shape, which must have at least so many dimensions."""
    sizes = _integers(shape, "A shape", "the sizes of a parameter, as weight.shape")
    if len(sizes) < least or min(sizes) < 0:
        expected = f"{least} dimension{'s' * (least > 1)} or more, of no negative size"
        raise refusal(ValueError, "A pattern does not fit this shape.", expected=expected, got=sizes)
    return sizes


def _square(shape: Sequence[int], name: str) -> tuple[int, int]:
    sizes = _sizes(shape, least=2)
    if sizes[0] != sizes[1]:
        expected = "the first two dimensions to be equal"
        raise refusal(ValueError, f"A matrix of this shape cannot be {name}.", expected=expected, got=sizes)
    return sizes[0], sizes[1]


def _integers(values: Any, what: str, expected: str) -> tuple[int, ...]:
    try:
        if isinstance(values, (Tensor, str, bytes)):
            raise TypeError
        return tuple(index(value) for value in values)
    except TypeError:
        what = f"{what} is not a sequence of integers."
        raise refusal(TypeError, what, expected=expected, got=shown(values)) from None


def _dims(dims: Sequence[int], count: int) -> list[int]:
    """Return dimensions counted from the front; each must be there, and once."""
    numbers = _integers(dims, "What is mirrored", "the numbers of dimensions, as (0, 1)")
    outside = [dim for dim in numbers if not -count <= dim < count]
    if outside:
        expected = f"from {-count} to {count - 1}"
        raise refusal(IndexError, "A dimension is out of range.", expected=expected, got=outside[0])
    from_front = [dim % count for dim in numbers]
    if len(set(from_front)) < len(from_front):
        raise refusal(ValueError, "A dimension occurs more than once.", expected="each dimension once", got=numbers)
    return from_front


def _generators(permutations: Any, name: str) -> Sequence[_Permutation]:
    if not isinstance(permutations, (list, tuple)):
        expected = "a list of permutations, one for each generator of the group"
        raise refusal(TypeError, f"The {name} are not a list.", expected=expected, got=shown(permutations))
    if not permutations:
        raise refusal(ValueError, f"The {name} are an empty list.", expected="one generator or more", got="none")
    return permutations


def _actions(permutations: Sequence[_Permutation], where: str = "") -> list[tuple[Tensor, Tensor]]:
    """Return for each permutation where it maps each entry, and whether it turns the entry's sign; both flattened."""
    pairs = [given if isinstance(given, tuple) and len(given) == 2 else (given, None) for given in permutations]
    actions = []
    for number, (permutation, signs) in enumerate(pairs):
        name = f"permutation {number}{where}"
        image = _image(permutation, name, pairs[0][0])
        turned = torch.zeros_like(image, dtype=torch.bool) if signs is None else _is_negative(signs, name, permutation)
        actions.append((image, turned))
    return actions


def _image(permutation: Any, name: str, first: Tensor) -> Tensor:
    """Return where a permutation, which must have the shape of the first one, maps each entry."""
    is_integer = isinstance(permutation, Tensor) and torch.can_cast(permutation.dtype, torch.int64)
    if not is_integer or permutation.dtype in (torch.bool, torch.uint64):
        what = f"{name.capitalize()} is not one of integers."
        expected = "an integer tensor, as torch.arange(n).view(shape) rearranged, or a pair of it and its signs"
        raise refusal(TypeError, what, expected=expected, got=shown(permutation))
    if permutation.shape != first.shape:
        what = f"{name.capitalize()} has another shape than the first."
        raise refusal(ValueError, what, expected=tuple(first.shape), got=tuple(permutation.shape))
    image: Tensor = permutation.detach().to("cpu", torch.int64).flatten()
    outside = (image < 0) | (image >= len(image))
    wrong = outside if outside.any() else torch.bincount(image)[image] > 1
    if wrong.any():
        expected = f"each number from 0 to {len(image) - 1}, once"
        got = f"{image[wrong][0].item()}{'' if outside.any() else ' more than once'}"
        raise refusal(ValueError, f"{name.capitalize()} is not a rearrangement.", expected=expected, got=got)
    return image


def _is_negative(signs: Any, name: str, permutation: Tensor) -> Tensor:
    """Return which signs of a permutation are -1, flattened; all others must be 1."""
    if not isinstance(signs, Tensor) or signs.is_complex() or signs.dtype == torch.bool:
        what, expected = f"The signs of {name} are not a real tensor.", "a tensor of 1 and -1"
        raise refusal(TypeError, what, expected=expected, got=shown(signs))
    if signs.shape != permutation.shape:
        what = f"The signs of {name} have another shape than it."
        raise refusal(ValueError, what, expected=tuple(permutation.shape), got=tuple(signs.shape))
    signs = signs.detach().cpu()
    wrong = (signs != 1) & (signs != -1)
    if wrong.any():
        what = f"The signs of {name} are not signs."
        raise refusal(ValueError, what, expected="1 or -1 for each entry", got=shown_entry(signs, wrong))
    negative: Tensor = (signs == -1).flatten()
    return negative


def _components(images: Sequence[Tensor]) -> Tensor:
    """Return the component of each node of a graph in which edges lead from each node to its images."""
    sparse, graphs = _optional("scipy.sparse"), _optional("scipy.sparse.csgraph")
    edges = torch.stack(list(images), dim=1)
    starts = torch.arange(len(edges) + 1, device="cpu") * len(images)
    ones = torch.ones(edges.numel(), dtype=torch.float64, device="cpu")
    graph = sparse.csr_matrix((ones.numpy(), edges.flatten().numpy(), starts.numpy()), shape=(len(edges),) * 2)
    _, labels = graphs.connected_components(graph, connection="weak")
    components: Tensor = torch.from_numpy(labels).long()
    return components


def _signed_orbits(actions: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the labels and scales of what :func:`_actions` returns."""
    # Node i of the graph is entry i, and node n + i is its opposite.
    n = len(actions[0][0])
    images = [torch.cat([image + n * turned, image + n * ~turned]) for image, turned in actions]
    positive, negative = _components(images).view(2, n)
    labels: Tensor = torch.unique(torch.minimum(positive, negative), return_inverse=True)[1]
    # Components are numbered in the order of their first nodes, so that the first entry of an orbit has the sign 1.
    return labels, (negative - positive).sign().float()


def _taps(conv: nn.Conv1d | nn.Conv2d, input_size: int | Sequence[int]) -> list[Tensor]:
    """Return for each dimension the tap by which an output sees an input: shape ``[out, in]``, -1 for none."""
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d)):
        expected = "torch.nn.Conv1d or torch.nn.Conv2d"
        raise refusal(TypeError, "Only a convolution can be unrolled.", expected=expected, got=shown(conv))
    if conv.padding_mode != "zeros":
        what, got = "Such padding cannot be unrolled.", repr(conv.padding_mode)
        raise refusal(ValueError, what, expected="padding_mode='zeros'", got=got)
    count = len(conv.kernel_size)
    sizes = (input_size,) * count if isinstance(input_size, SupportsIndex) else input_size
    expected = f"{count} integer{'s' * (count > 1)} from 1 on"
    sizes = _integers(sizes, "The size of an input", expected)
    if len(sizes) != count or min(sizes) < 1:
        raise refusal(ValueError, "The input of a convolution cannot have this size.", expected=expected, got=sizes)
    taps = []
    for dim, size in enumerate(sizes):
        stride, dilation = conv.stride[dim], conv.dilation[dim]
        reach = dilation * (conv.kernel_size[dim] - 1)
        padding = {"same": reach, "valid": 0}[conv.padding] if isinstance(conv.padding, str) else 2 * conv.padding[dim]
        if size + padding <= reach:
            what = f"The input of a convolution is too small in dimension {dim}."
            raise refusal(ValueError, what, expected=f"{reach + 1 - padding} or more, for {conv}", got=size)
        o, i = _grid((size + padding - reach - 1) // stride + 1, size)
        # An odd padding has one less on the left.
        offset = i + padding // 2 - o * stride
        seen = (offset >= 0) & (offset <= reach) & (offset % dilation == 0)
        taps.append(torch.where(seen, offset // dilation, -1))
    return taps


def _nested(outer: Tensor, inner: tuple[Tensor, int]) -> Tensor:
    """Replace each entry of a matrix by a matrix: ``outer * size + inner``, and -1 where either is -1."""
    labels, size = inner
    first, second = outer[:, None, :, None], labels[None, :, None, :]
    nested = torch.where((first >= 0) & (second >= 0), first * size + second, -1)
    return nested.flatten(2, 3).flatten(0, 1)


def _entries(tensor: Any, verb: str = "cluster", done: str = "clustered") -> Tensor:
    """Return the entries of a tensor in float64; errors say what they are needed for."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        got = f"{shown(tensor)}, {tensor.layout}" if isinstance(tensor, Tensor) else shown(tensor)
        expected = "a dense tensor of a real floating dtype"
        raise refusal(TypeError, f"This cannot be {done}.", expected=expected, got=got)
    if tensor.numel() == 0 or tensor.dim() == 0:
        raise refusal(ValueError, f"There is nothing to {verb}.", expected="one entry or more", got=shown(tensor))
    entries: Tensor = tensor.detach().to("cpu", torch.float64)
    wrong = ~entries.isfinite()
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        got = f"{entries[at].item()} at {at}"
        raise refusal(ValueError, f"A tensor cannot be {done}.", expected="finite entries", got=got)
    return entries


def _subvector(of: Any, entries: Tensor) -> int:
    """Return how many consecutive entries of a row are clustered as one."""
    columns = entries[0].numel()
    if isinstance(of, str):
        if of not in ("rows", "values"):
            what, expected = "This cannot be clustered.", "of='rows', of='values' or a number of entries"
            raise refusal(ValueError, what, expected=expected, got=shown(of))
        return columns if of == "rows" else 1
    size = integer_between(of, "The size of a subvector", 1, columns)
    if columns % size:
        what = "Rows cannot be cut into such subvectors."
        raise refusal(ValueError, what, expected=f"a divisor of {columns}", got=size)
    return size


def _channels(per: Any, of: Any, rows: int) -> int:
    """Return how many parts of a tensor are clustered separately."""
    if per not in ("tensor", "channel"):
        expected = "per='tensor' or per='channel'"
        raise refusal(ValueError, "Clusters are per something else.", expected=expected, got=shown(per))
    if per == "channel" and of == "rows":
        expected = "of='values' or a number of entries with per='channel'"
        raise refusal(ValueError, "A channel is one row.", expected=expected, got="of='rows'")
    return rows if per == "channel" else 1


def _costs(weights: Any, entries: Tensor) -> Tensor:
    """Return the weight of each entry, in float64 and at most 1."""
    if not isinstance(weights, Tensor) or weights.is_complex() or weights.layout != torch.strided:
        got = f"{shown(weights)}, {weights.layout}" if isinstance(weights, Tensor) else shown(weights)
        raise refusal(TypeError, "These are no weights of entries.", expected="a dense real tensor", got=got)
    if weights.shape not in (entries.shape, entries.shape[:1]):
        expected = f"{tuple(entries.shape)} or {tuple(entries.shape[:1])}"
        raise refusal(ValueError, "Weights have the wrong shape.", expected=expected, got=tuple(weights.shape))
    weights = weights.detach().to("cpu", torch.float64)
    wrong = ~(weights.isfinite() & (weights >= 0))
    if wrong.any():
        got = shown_entry(weights, wrong)
        raise refusal(ValueError, "A weight of an entry is wrong.", expected="finite numbers from 0 on", got=got)
    costs: Tensor = weights / (float(weights.max()) or 1.0)
    return costs.reshape(*costs.shape, *[1] * (entries.dim() - costs.dim())).expand(entries.shape)


def _clusters(points: Tensor, costs: Tensor | None, k_means: Any, *, sort: bool) -> Tensor:
    """Return the clusters of points, shape ``[n, size]``; those of single values can be sorted."""
    points = points.squeeze(1) if sort else points
    points, inverse, sizes = torch.unique(points, dim=None if sort else 0, return_inverse=True, return_counts=True)
    if costs is not None:
        # k-means divides by the sum of weights, which must not be zero.
        costs = costs + 1e-9 * (float(costs.max()) or 1.0)
        sizes = torch.zeros(len(points), dtype=torch.float64, device="cpu").index_add_(0, inverse, costs)
    if len(points) <= k_means.n_clusters:
        labels = torch.arange(len(points), device="cpu")
    elif sort:
        means, masses = _summary(points, sizes, max(_SUMMARY, 4 * k_means.n_clusters))
        k_means.fit(means.unsqueeze(1).numpy(), sample_weight=masses.numpy())
        centers = torch.from_numpy(k_means.cluster_centers_).flatten().sort().values
        labels = torch.bucketize(points, (centers[1:] + centers[:-1]) / 2)
    else:
        labels = torch.from_numpy(k_means.fit(points.numpy(), sample_weight=sizes.numpy()).labels_).long()
    clusters: Tensor = labels[inverse]
    return clusters


def _distance(distance: Any) -> float:
    try:
        if isinstance(distance, (bool, str, bytes)):
            raise TypeError
        number = float(distance)
    except (TypeError, ValueError, RuntimeError):
        what, expected = "A distance is not a number.", "a number from 0 on"
        raise refusal(TypeError, what, expected=expected, got=shown(distance)) from None
    if not 0 <= number < inf:
        raise refusal(ValueError, "A distance is out of range.", expected="a finite number from 0 on", got=number)
    return number


def _summary(values: Tensor, sizes: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return the means and masses of distinct, ascending values in bins, both of small width and of few values."""
    if len(values) <= 2 * bins:
        return values, sizes
    even = torch.linspace(values[0].item(), values[-1].item(), bins, dtype=torch.float64, device="cpu")
    ranks = values[torch.arange(bins, device="cpu") * (len(values) - 1) // (bins - 1)]
    numbers = torch.bucketize(values, torch.unique(torch.cat([even, ranks])))
    masses = torch.bincount(numbers, weights=sizes)
    filled = masses > 0
    return torch.bincount(numbers, weights=values * sizes)[filled] / masses[filled], masses[filled]


def _optional(module: str) -> Any:
    """Import a module that only some patterns need."""
    return imported(module, f"This pattern needs {module}.", "patterns")
