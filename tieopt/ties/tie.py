"""Ties as a user writes them: which slices of one parameter or several share a value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor
from torch.nn import Module

from tieopt.errors import as_integer, refusal, shown, shown_list
from tieopt.ties.names import expanded
from tieopt.ties.options import Options, Reduction, check_options, joined_options
from tieopt.ties.part import (
    FROZEN,
    Frozen,
    Groups,
    Part,
    SupportsArray,
    Whole,
    are_sharded,
    as_tensor,
    check_one_shape,
    readable_again,
    slices_for,
)
from tieopt.ties.slices import FREE, counted
from tieopt.ties.union import united

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Tie:
    r"""A partition of a parameter's slices into groups, each of which shares one value.

    A *slice* is the unit that is tied, with one label: a row of a matrix, a kernel of a convolution, an entry of a
    bias, or a single element. Slices in one *group* are tied to each other; slices in no group are *free* and never
    touched.

    The members of a group are multiples of its shared value :math:`w_0`, plus an offset. Tying chooses :math:`w_0` by
    least squares, so that the tied members are nearest to what they were:

    .. math:: w_i = s_i w_0 + c_i, \qquad w_0 = \frac{\sum_j s_j (w_j - c_j)}{\sum_j s_j^2}

    Without ``scale`` every :math:`s_i` is 1, without ``offset`` every :math:`c_i` is 0, and without both :math:`w_0` is
    the mean. A scale of -1 flips the sign, and a scale of 0 *pins* a slice at its offset.

    A tie of a named parameter is checked when an optimizer is wrapped. Labels and scales are copied.

    Args:
        param: the parameter, or its name if the optimizer was built from ``named_parameters()``: dense, of any complex
            dtype or signed floating dtype (8 to 64 bits), in any memory layout. A parameter without dimensions is tied
            as one of shape ``[1]``. A name with wildcards, as for :meth:`equal`, stands for a separate tie of each
            parameter that matches.
        groups: a list of lists of indices along ``dim``, each index at most once; or a tensor (or NumPy array) of
            labels, of any integer dtype but uint64: slices with the same label are tied, -1 is free. The shape of the
            labels is that of the parameter or of its first dimensions: for a convolution's weight ``[out, in, k, k]``,
            ``[out]`` labels rows, ``[out, in]`` kernels, and ``[out, in, k, k]`` single elements. For a sharded
            parameter, labels of shape ``[n]`` may be a ``DTensor`` that is sharded as the slices are, so that no rank
            has all of them; this excludes ``scale``, ``offset`` and the compact mode.
        dim: the dimension in which slices are counted: 0 for rows, 1 for the columns of a matrix; negative ones count
            from the end. The shape of the labels is that of ``param.movedim(dim, 0)``, or of its first dimensions.
        scale: the factor :math:`s_i` of each slice, a tensor (or NumPy array) in the shape of the labels (for lists,
            one for each index of ``dim``), of any real dtype: finite, and zero or from 2**-100 to 2**100 in magnitude.
        offset: the offset :math:`c_i` of each entry, a tensor (or NumPy array, or number) that broadcasts to the shape
            of ``param``: finite, and real if ``param`` is. Free slices have none.
        reduction: as for :class:`~tieopt.TiedOptimizer`, for this tie; None for the optimizer's.
        strength: as for :class:`~tieopt.TiedOptimizer`, for this tie; None for the optimizer's.
        every: as for :class:`~tieopt.TiedOptimizer`, for this tie; None for the optimizer's.
        across: a process group whose ranks have different parameters, such as the stages of a pipeline. Each rank gives
            a tie of its own parameter, without scale and offset, and the same label is the same group on all ranks.

    Raises:
        TypeError: ``param`` is neither a tensor nor a name, or has a dtype, layout or class that cannot be tied;
            ``groups`` or ``dim`` hold something other than integers, or ``scale`` or ``offset`` something other than
            numbers; ``strength`` or ``every`` is no number; or ``across`` is no process group that this rank is in.
        IndexError: an index, or ``dim``, is out of range.
        ValueError: an index occurs twice, a label is below -1, ``scale`` or ``offset`` has a number that it must not
            have, or labels, scale or offset have the wrong shape; or ``reduction``, ``strength`` or ``every`` is out of
            range, or they exclude each other, as ``across`` does with ``scale`` and ``offset``.

    Example:
        >>> import torch
        >>> from tieopt import Tie, TiedOptimizer
        >>> weight = torch.nn.Parameter(torch.randn(5, 3))
        >>> Tie(weight, [[4, 1], [0, 2]])
        Tie(parameter of shape (5, 3), 2 groups of 4 members in all, 1 free)
        >>> Tie(weight, torch.tensor([0, 1, 0]), dim=1)
        Tie(parameter of shape (5, 3), 2 groups of 3 members in all, 0 free, dim=1)

        Row 2 is the opposite of row 0, and row 3 is zero:

        >>> labels = torch.tensor([0, -1, 0, 0, -1])
        >>> tie = Tie(weight, labels, scale=torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0]))
        >>> optimizer = TiedOptimizer(torch.optim.SGD([weight]), tie)
        >>> torch.equal(weight[2], -weight[0]), bool(weight[3].any())
        (True, False)

        Entry 1 is entry 0 plus one:

        >>> bias = torch.nn.Parameter(torch.zeros(3))
        >>> tie = Tie(bias, [[0, 1]], offset=torch.tensor([0.0, 1.0, 0.0]))
        >>> optimizer = TiedOptimizer(torch.optim.SGD([bias]), tie)
        >>> bias
        Parameter containing:
        tensor([-0.5000,  0.5000,  0.0000], requires_grad=True)

    Attributes:
        parts: a named tuple of ``param``, ``groups``, ``dim``, ``scale`` and ``offset`` for each joined parameter. If
            ``param`` is a tensor, ``groups`` are int64 labels, ``scale`` is None or float64, and ``offset`` is None or
            has the shape of the parameter, all on the CPU; for a name, they are what was given. Sharded labels are a
            ``DTensor``. Frozen slices, and whole parameters that are not found yet, have placeholders.
        options: a named tuple of ``reduction``, ``strength`` and ``every``, as they were given.
        across: the process group, or None.
    """

    parts: tuple[Part, ...]
    options = Options()
    across: ProcessGroup | None = None
    # Whether it says that whole parameters are equal on all ranks.
    is_whole = False

    def __init__(
        self,
        param: Tensor | str,
        groups: Groups,
        *,
        dim: int = 0,
        scale: Tensor | SupportsArray | None = None,
        offset: Tensor | SupportsArray | complex | None = None,
        reduction: Reduction | None = None,
        strength: float | None = None,
        every: int | None = None,
        across: ProcessGroup | None = None,
    ) -> None:
        self.options = Options(reduction, strength, every)
        check_options(self.options)
        self.across = across
        # What torch gives to ranks outside a process group is a number.
        if across is not None and not hasattr(across, "rank"):
            expected = "a process group, on the ranks that are in it"
            raise refusal(TypeError, "This is no process group to tie across.", expected=expected, got=shown(across))
        if across is not None and (scale is not None or offset is not None):
            what, expected = "Members on different ranks are equal.", "a tie across ranks without scale and offset"
            raise refusal(ValueError, what, expected=expected, got=f"scale={shown(scale)}, offset={shown(offset)}")
        if across is not None and are_sharded(groups):
            expected, got = "labels of the slices of this rank, in a plain tensor", f"a DTensor, {shown(groups)}"
            raise refusal(ValueError, "A tie across ranks has sharded labels.", expected=expected, got=got)
        if not isinstance(param, (Tensor, str)):
            hint = "tie its parameters, such as its .weight" if isinstance(param, Module) else ""
            expected = "a tensor, or the name of a parameter"
            raise refusal(TypeError, "A tie needs a parameter.", hint, expected=expected, got=shown(param))
        if isinstance(param, Tensor):
            slices = slices_for(param, groups, dim, scale, "the parameter", offset)
            groups, dim, scale = slices.labels_for(param), slices.dim, slices.scale
            offset = offset if isinstance(offset, Frozen) else slices.offset_of(param)
        else:
            # A tie may be given to several optimizers.
            groups = readable_again(groups)
        self.parts = (Part(param, groups, dim, scale, offset),)

    @classmethod
    def join(cls, *ties: Tie) -> Tie:
        """Tie slices of several parameters, or along several dimensions: the same label is the same group.

        The slices must have one shape, and the parameters one dtype and device. Lists of indices are numbered in their
        order: the first lists of all ties are one group.

        A group starts from the mean of its members, which is too small for independent random weights. With
        ``TiedOptimizer(..., start="first")`` it starts from its first member, in the tie that is given first, as if
        modules shared a Parameter.

        Args:
            *ties: the ties to join, at least one.

        Returns:
            One tie, with the ``parts`` of all. Dtypes and devices, and the shapes of parameters that are joined by
            name, are checked when an optimizer is wrapped.

        Raises:
            TypeError: something is no :class:`Tie`, or there is nothing.
            ValueError: the slices have different shapes, or the ties different options; or some ties are of frozen
                slices, or across other ranks.

        Example:
            An autoencoder whose decoder is the encoder transposed:

            >>> import torch
            >>> from tieopt import Tie, TiedOptimizer
            >>> encoder, decoder = torch.nn.Linear(8, 3), torch.nn.Linear(3, 8)
            >>> rows = Tie(encoder.weight, torch.arange(3))
            >>> columns = Tie(decoder.weight, torch.arange(3), dim=1)
            >>> inner = torch.optim.Adam([encoder.weight, decoder.weight])
            >>> before = encoder.weight.detach().clone()
            >>> optimizer = TiedOptimizer(inner, Tie.join(rows, columns), start="first")
            >>> torch.equal(encoder.weight, decoder.weight.T), torch.equal(encoder.weight, before)
            (True, True)
        """
        _check_ties("join", ties)
        joined = cls.__new__(cls)
        joined.parts = tuple(part for tie in ties for part in tie.parts)
        if len({part.offset is FROZEN for part in joined.parts}) > 1:
            expected = "frozen(...) as a tie of its own, beside the joined one"
            raise refusal(ValueError, "Frozen slices are in no group, and are not joined.", expected=expected, got=ties)
        _check_whole_labels("joined", ties)
        joined.options = joined_options(tie.options for tie in ties)
        joined.across = ties[0].across
        if any(tie.across is not joined.across for tie in ties):
            what = "Joined ties are across different ranks."
            raise refusal(ValueError, what, expected="one process group for all of them, or none", got=ties)
        known = [(part, part.param) for part in joined.parts if isinstance(part.param, Tensor)]
        check_one_shape([(part.slices(param, "the parameter"), param) for part, param in known])
        return joined

    @classmethod
    def equal(
        cls,
        *params: Tensor | str | Module,
        reduction: Reduction | None = None,
        strength: float | None = None,
        every: int | None = None,
        across: ProcessGroup | None = None,
    ) -> Tie:
        """Tie whole parameters to each other, so that all of them are equal.

        This is like one Parameter in several modules, for parameters that have to stay separate, such as shards of
        separate modules.

        Args:
            *params: parameters of one shape, or their names if the optimizer was built from ``named_parameters()``; or
                modules, each of whose parameters is equal to its counterparts.

                Names may have wildcards as in ``fnmatch``: ``*`` matches any text, also with dots, ``?`` one character,
                and ``[2-4]`` one of several; the first wildcards of a name match as little as possible. With a single
                name, parameters are equal if only the first wildcard differs: ``"layers.[2-4].ffn.*.weight"`` makes the
                weights of three layers equal, each to its counterparts. With several names, parameters are equal if all
                wildcards match the same texts: ``"encoder.*.weight", "decoder.*.weight"``. If a parameter has exactly
                the given name, only this parameter is meant.
            reduction: as for :class:`Tie`.
            strength: as for :class:`Tie`.
            every: as for :class:`Tie`.
            across: as for :class:`Tie`: the parameters are also equal to those of the other ranks. One parameter is
                enough then, and names and modules are not allowed.

        Returns:
            One tie. A parameter that is given twice, or that modules share, counts once. Names are checked when an
            optimizer is wrapped.

        Raises:
            TypeError: an argument is no parameter, name or module, or there is none; or as for :class:`Tie`.
            ValueError: there are fewer than two parameters to join, their shapes differ, modules have parameters of
                different names, or a name with wildcards has no counterpart.

        Example:
            >>> import torch
            >>> from tieopt import Tie, TiedOptimizer
            >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(6)))
            >>> inner = torch.optim.AdamW(model.named_parameters())
            >>> optimizer = TiedOptimizer(inner, [Tie.equal("[2-4].*"), Tie.equal(model[0], model[5])])
            >>> torch.equal(model[2].weight, model[4].weight), torch.equal(model[0].bias, model[5].bias)
            (True, True)
        """
        for param in params or (None,):
            if not isinstance(param, (Tensor, str, Module)):
                hint = "Tie.equal(*params) takes those of a list" if isinstance(param, Iterable) else ""
                expected = "parameters, names of parameters, or modules"
                raise refusal(TypeError, "Tie.equal joins parameters.", hint, expected=expected, got=shown(param))
        equal = cls.__new__(cls)
        equal.options = Options(reduction, strength, every)
        check_options(equal.options)
        equal.parts = tuple(Part(param, Whole, 0, None) for param in params)  # type: ignore[arg-type]
        if across is not None:
            if not all(isinstance(param, Tensor) for param in params):
                what, expected = "Names and modules are not tied across ranks.", "parameters, one tie for each"
                raise refusal(TypeError, what, expected=expected, got=shown(params))
            sets = [equal.parts]
        elif any(isinstance(param, str) for param in params):
            return equal
        else:
            sets = expanded(equal.parts, {})
        if len(sets) > 1:
            return equal
        options = {**equal.options._asdict(), "across": across}
        joined = cls.join(*(cls(part.param, Whole, **options) for part in sets[0]))  # type: ignore[arg-type]
        joined.is_whole = True
        return joined

    @classmethod
    def union(cls, *ties: Tie) -> list[Tie]:
        """Merge ties that share entries into ties that share none.

        Two entries are equal if a chain of ties leads from one to the other; with scales, they are multiples of each
        other by the scales along the chain.

        Args:
            *ties: at least one tie, of parameters and not of names.

        Returns:
            The ties that share no entry with others, as they are, and the unions of the others. A union is of whole
            slices if all its ties have slices of one kind, and otherwise of single entries.

        Raises:
            TypeError: something is no :class:`Tie`, or there is nothing, or a parameter is given by its name.
            ValueError: ties that share entries have offsets, different options, or scales that only zero can satisfy;
                or a tie is across ranks.

        Example:
            The neurons of two consecutive layers:

            >>> import torch
            >>> from tieopt import Tie, TiedOptimizer, is_tied, neurons
            >>> first, second, third = model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
            >>> ties = [
            ...     *neurons(first, [[0, 1]], following=second),
            ...     *neurons(second, [[2, 3]], following=third),
            ... ]
            >>> optimizer = TiedOptimizer(torch.optim.Adam(model.parameters()), Tie.union(*ties))
            >>> is_tied(second.weight, [[0, 1]], dim=1), is_tied(second.weight, [[2, 3]])
            (True, True)
        """
        _check_ties("union", ties)
        _check_whole_labels("united", ties)
        plain = [tie for given in ties for tie in _ties_of_tensors(given)]
        joined = [
            [
                (param, part.slices(param, "the parameter"))
                for part in tie.parts
                if isinstance(param := part.param, Tensor)
            ]
            for tie in plain
        ]
        unions = []
        for numbers, union in united(joined, list(map(repr, plain))):
            options = joined_options(plain[number].options for number in numbers)._asdict()
            unions.append(
                plain[numbers[0]]
                if union is None
                else cls.join(
                    *(cls(param, own.labels, dim=own.dim, scale=own.scale, **options) for param, own in union)
                )
            )
        return unions

    def __deepcopy__(self, memo: dict[int, Any]) -> Tie:
        copied = memo[id(self)] = type(self).__new__(type(self))
        # Process groups cannot be copied.
        memo[id(self.across)] = self.across
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def __repr__(self) -> str:
        if self.parts[0].groups is Whole:
            return f"Tie.equal({shown_list([repr(part) for part in self.parts])}{self.options})"
        if len(self.parts) == 1 and self.parts[0].offset is FROZEN:
            return repr(self.parts[0])
        across = f", across {counted(self.across.size(), 'rank')}" if self.across is not None else ""
        if len(self.parts) == 1:
            return f"{repr(self.parts[0])[:-1]}{self.options}{across})"
        return f"Tie.join({shown_list([repr(part) for part in self.parts])}{self.options}{across})"


def _check_ties(method: str, ties: Sequence[Any]) -> None:
    for tie in ties or (None,):
        if not isinstance(tie, Tie):
            hint = f"Tie.{method}(*ties) takes those of a list" if isinstance(tie, (list, tuple)) else ""
            what = f"Tie.{method} {'joins' if method == 'join' else 'unites'} ties."
            raise refusal(TypeError, what, hint, expected="Ties, at least one", got=shown(tie))


def _check_whole_labels(done: str, ties: Sequence[Tie]) -> None:
    if any(are_sharded(part.groups) for tie in ties for part in tie.parts):
        what = f"Ties with sharded labels cannot be {done}."
        got = shown_list([*map(repr, ties)])
        raise refusal(ValueError, what, expected="labels of all slices on every rank", got=got)


def _ties_of_tensors(tie: Tie) -> list[Tie]:
    """Return a tie of parameters, or the ties of parameters that a tie of modules stands for."""
    if tie.across is not None:
        expected = "ties of this rank alone"
        raise refusal(ValueError, "Ties across ranks cannot be united.", expected=expected, got=tie)
    if any(isinstance(part.param, str) for part in tie.parts):
        hint = "give the parameters, or write what is to be equal as one group of one Tie"
        expected = "ties of parameters: which entries names share is not known without an optimizer"
        raise refusal(TypeError, "These ties cannot be united.", hint, expected=expected, got=tie)
    if tie.parts[0].groups is not Whole:
        return [tie]
    return [Tie.equal(*(part.param for part in own), **tie.options._asdict()) for own in expanded(tie.parts, {})]


def process_groups_in(ties: Any) -> list[ProcessGroup]:
    """Return the process groups across which there are ties, of which nothing else has to be right."""
    several = ties if isinstance(ties, (list, tuple)) else [ties]
    return [tie.across for tie in several if isinstance(tie, Tie) and tie.across is not None]


def tie_of(parts: Sequence[tuple[Part, str | None]], options: Options, across: ProcessGroup | None = None) -> Tie:
    """Return a tie of parts that were checked before, each shown with a name."""
    tie = Tie.__new__(Tie)
    tie.options, tie.across = options, across
    tie.parts = tuple(part for part, _ in parts)
    for part, name in parts:
        part._name = name
    return tie


def frozen(param: Tensor | str, indices: Tensor | Iterable[SupportsIndex], *, dim: int = 0) -> Tie:
    """Return a tie that keeps slices of a parameter as they are, bit for bit.

    The slices keep the values that they have when the tie is given to a :class:`~tieopt.TiedOptimizer` or to ``retie``.
    Load weights before: what is written to frozen slices later is undone, with a warning. The optimizer gets zeros as
    their gradients, and weight decay, momentum and noise do not move them. The tie has scales of 0 and these values as
    offsets, and is exact even if the optimizer's ties are relaxed.

    To freeze a whole parameter, ``requires_grad_(False)`` is enough.

    Args:
        param: the parameter, or its name, as for :class:`Tie`.
        indices: indices along ``dim``, in any order; or a tensor (or NumPy array) in the shape of labels as for
            :class:`Tie`: booleans, where True is frozen, or integers, where -1 is not frozen.
        dim: the dimension in which slices are counted.

    Raises:
        TypeError, IndexError, ValueError: as for :class:`Tie`; or integers in a tensor freeze all slices.

    Example:
        Train only the last row of an embedding:

        >>> import torch
        >>> from tieopt import TiedOptimizer, frozen
        >>> embedding = torch.nn.Embedding(5, 3)
        >>> before = embedding.weight.detach().clone()
        >>> inner = torch.optim.AdamW(embedding.parameters(), lr=0.1, weight_decay=0.1)
        >>> optimizer = TiedOptimizer(inner, frozen(embedding.weight, range(4)))
        >>> embedding(torch.arange(5)).square().sum().backward()
        >>> optimizer.step()
        >>> (embedding.weight != before).any(1)
        tensor([False, False, False, False,  True])
    """
    groups: Groups
    if isinstance(indices, Tensor) or hasattr(indices, "__array__"):
        labels = as_tensor(indices, "Labels", "booleans or integers", "the frozen slices")
        if labels.dtype == torch.bool:
            groups = torch.where(labels, 0, FREE)
        elif labels.is_floating_point() or not labels.numel() or bool((labels == FREE).any()):
            groups = labels
        else:
            expected = f"a boolean mask; or integers, of which {FREE} is not frozen; or a list of indices, not a tensor"
            raise refusal(ValueError, "All slices would be frozen.", expected=expected, got=shown(labels))
    else:
        expected = "a list of indices, as [0, 3, 5]; or a mask in the shape of labels, where True is frozen"
        if not isinstance(indices, Iterable) or isinstance(indices, str):
            raise refusal(TypeError, "These slices cannot be frozen.", expected=expected, got=shown(indices))
        groups = [[as_integer(index, "An index of a frozen slice", expected=expected) for index in indices]]
    return Tie(param, groups, dim=dim, offset=FROZEN, strength=1.0, every=1)  # type: ignore[arg-type]


# What an optimizer takes: groups by parameter or name, or ties.
Ties = Mapping[Any, Any] | Tie | Iterable[Tie]
