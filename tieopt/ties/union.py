"""The union of ties that share entries: the smallest tie that contains them all.

Entries are equal in it if a chain of ties leads from one to the other. These are the connected components of a graph of
slices and shared values, in which a slice and the shared value of its group are joined by an edge, with the scale of
the slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tieopt.errors import refusal, shown_list
from tieopt.ties.slices import FREE, Slices, flat_labels, flat_scales, numbered, of_one_kind

# A tie: the parameters that it joins, and their slices.
Joined = Sequence[tuple[Tensor, Slices]]

# Scales along two chains may have been rounded differently.
_ROUNDING = 2.0**-40


def are_alike(several: Sequence[Slices]) -> bool:
    """Return whether labellings of one tensor can be compared slice by slice, and not only entry by entry."""
    return len({(slices.dim, slices.labels.shape) for slices in several}) == 1 and several[0].dim == 0


def shared_entries(several: Sequence[Slices], shape: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield pairs of labellings of one tensor that label an entry both, and the first such entry.

    The pairs that are yielded, by their numbers, link all labellings that share entries, if only by a chain.

    Args:
        several: the labellings.
        shape: of the tensor.
    """
    if len(several) == 1:
        return
    compared = several[0].labels.shape if are_alike(several) else shape
    owner = torch.full(compared, FREE, dtype=torch.int32, device="cpu")
    for number, slices in enumerate(several):
        labelled = torch.zeros(owner.shape, dtype=torch.bool, device="cpu")
        labelled.movedim(slices.dim, 0)[slices.labels != FREE] = True
        shared = labelled & (owner != FREE)
        while shared.any():
            entry = tuple(shared.nonzero()[0].tolist())
            yield int(owner[entry]), number, entry + (0,) * (len(shape) - len(entry))
            shared &= owner != owner[entry]
        owner[labelled] = number


def united(ties: Sequence[Joined], texts: Sequence[str]) -> list[tuple[list[int], Joined | None]]:
    """Return ties that share no entries.

    Args:
        ties: each with its parameters and their slices.
        texts: the ties in errors.

    Returns:
        The numbers of ties that share entries, and their union; or one that shares none, and None. In the order of
        the first ones.

    Raises:
        ValueError: ties that share entries have offsets, or can only be zero together.
    """
    sets = {number: [number] for number in range(len(ties))}
    merged: set[int] = set()
    labellings: dict[Tensor, list[tuple[int, Slices]]] = {}
    for number, tie in enumerate(ties):
        for param, slices in tie:
            labellings.setdefault(param, []).append((number, slices))
    for param, several in labellings.items():
        for pair in shared_entries([slices for _, slices in several], param.shape):
            first, second = (several[number][0] for number in pair[:2])
            merged |= {first, second}
            if sets[first] is not sets[second]:
                sets[first] += sets[second]
                sets |= dict.fromkeys(sets[second], sets[first])
    results: list[tuple[list[int], Joined | None]] = []
    for number, together in sets.items():
        if number == min(together):
            together.sort()
            chosen, told = [ties[other] for other in together], [texts[other] for other in together]
            results.append((together, None if merged.isdisjoint(together) else _union(chosen, told)))
    return results


def _union(ties: Sequence[Joined], texts: Sequence[str]) -> Joined:
    if any(slices.offset is not None for tie in ties for _, slices in tie):
        expected = "one Tie of all these slices, with its offsets; or ties that share no entry"
        raise refusal(ValueError, "Ties with offsets share entries.", expected=expected, got=shown_list(texts))
    keyed = []
    for tie in ties:
        params, slices_of = zip(*tie, strict=True)
        keyed.append(list(zip(params, numbered(slices_of), strict=True)))
    parts = of_one_kind(keyed, lambda param: param.shape)
    keyed_slices = [slices for _, slices in parts]
    value, scale = flat_labels(keyed_slices), flat_scales(keyed_slices)
    # The nodes are all shared values, and then the slices of one parameter after the other.
    starts, end, nodes = {}, 1 + int(value.max()), []
    for param, slices in parts:
        if param not in starts:
            starts[param], end = end, end + slices.labels.numel()
        nodes.append(starts[param] + torch.arange(slices.labels.numel(), device="cpu"))
    members = (value != FREE).nonzero().squeeze(1)
    node, value, scale = (column[members] for column in (torch.cat(nodes), value, scale))
    is_pinned = torch.zeros(end, dtype=torch.bool, device="cpu").index_fill_(0, node[scale == 0], True)

    edges = (scale != 0).nonzero().squeeze(1)
    slice_node, value_node = node[edges], value[edges]
    root, multiple = _roots(end, slice_node, value_node, scale[edges])
    agree = torch.isclose(multiple[slice_node], scale[edges] * multiple[value_node], rtol=_ROUNDING, atol=0.0)
    if not bool((agree & ~is_pinned[slice_node]).all()):
        what = "Ties that share entries say of some that they can only be zero."
        expected = (
            "the same multiples in each of them; an entry that is to be zero gets a scale of 0 wherever it is tied"
        )
        raise refusal(ValueError, what, expected=expected, got=shown_list(texts))
    multiple = _equal_where_scales_are(multiple, slice_node, value_node, scale[edges])
    labels = torch.full((end,), FREE, device="cpu")
    # What is pinned in several groups is in any of them.
    labels.scatter_reduce_(0, node, root[value], "amax")
    scales = torch.where(is_pinned, 0.0, multiple)
    kinds, union = dict(parts), []
    for param, kind in kinds.items():
        shape, of_param = kind.labels.shape, slice(starts[param], starts[param] + kind.labels.numel())
        union.append(Slices(labels[of_param].view(shape), scales[of_param].view(shape), kind.dim))
    return list(zip(kinds, numbered(union), strict=True))


def _equal_where_scales_are(multiple: Tensor, node: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """Return multiples of slices, rounded alike where a group says that they are equal, or opposite.

    Args:
        multiple: of each node.
        node: of the slice of each edge.
        value: the node of its shared value.
        scale: of the slice in this group, not zero.
    """
    # Joined by an edge of 1 or -1 to all that have the same scale in the same group.
    pairs = torch.stack([value.double(), scale.abs()])
    which = torch.unique(pairs, dim=1, return_inverse=True)[1] + len(multiple)
    first, sign = _roots(len(multiple) + len(node), node, which, scale.sign())
    return multiple[first[: len(multiple)]] * sign[: len(multiple)]


def _roots(count: int, first: Tensor, second: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each node the least one that it is connected to, and which multiple of its value the node has.

    Args:
        count: the number of nodes.
        first: a node for each edge.
        second: the other node of each edge.
        scale: which multiple of the value of the second node the first one has.
    """
    root, multiple = torch.arange(count, device="cpu"), torch.ones(count, dtype=torch.float64, device="cpu")
    while True:
        apart = (root[first] != root[second]).nonzero().squeeze(1)
        if not len(apart):
            return root, multiple
        a, b = first[apart], second[apart]
        ratio = scale[apart] * multiple[b] / multiple[a]
        ratio = torch.where(root[a] > root[b], ratio, 1 / ratio)
        high, low = torch.maximum(root[a], root[b]), torch.minimum(root[a], root[b])
        # Each root becomes a multiple of the least of its neighbours; the edge is in the remainder.
        edge = low * len(apart) + torch.arange(len(apart), device="cpu")
        edge = torch.full((count,), -1, device="cpu").scatter_reduce_(0, high, edge, "amin", include_self=False)
        (hooked,) = (edge >= 0).nonzero(as_tuple=True)
        edge = edge[hooked] % len(apart)
        root[hooked], multiple[hooked] = low[edge], ratio[edge]
        while not torch.equal(root[root], root):
            root, multiple = root[root], multiple * multiple[root]
