"""The slow, obvious implementation that everything is compared with.

Python loops over groups, members and entries, in exact or float64 arithmetic; nothing here is shared with
the library. There are three references:

- :func:`exact_means`, the mean of each group as a fraction;
- :class:`SharedTraining`, training of the one shared parameter: what a tie *means*;
- :class:`SlowTraining`, training of all the members, tied by loops: what a tied optimizer *does*, also
  where no shared parameter does the same (weights written from outside, optimizers that couple entries).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tieopt import Tie

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Build = Callable[[list[Parameter]], Optimizer]


def bits(tensor: Tensor) -> Tensor:
    """The bits of each entry as an integer, so that -0.0 is not 0.0 and a NaN is itself."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_WORDS[tensor.element_size()])


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same dtype, the same shape, and the same bits in every entry."""
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


def members_of(labels: Tensor) -> list[list[int]]:
    """The members of each group, in order."""
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels.tolist()):
        if label != -1:
            members.setdefault(label, []).append(position)
    return list(members.values())


def free_of(labels: Tensor) -> list[int]:
    """The free slices, in order."""
    return [position for position, label in enumerate(labels.tolist()) if label == -1]


def all_tied(tensor: Tensor, labels: Tensor) -> bool:
    """Whether all the members of each group have the same bits."""
    return all(same_bits(tensor[member], tensor[group[0]]) for group in members_of(labels) for member in group[1:])


def entries_of(tensor: Tensor) -> list[tuple[float, ...]]:
    """The entries of each slice as Python floats, which hold every dtype exactly; complex ones as two."""
    tensor = tensor.detach().resolve_conj().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    entries, width = tensor.double().flatten().tolist(), math.prod(tensor.shape[1:])
    # To make lists within a list takes several times as long.
    return list(zip(*[iter(entries)] * width, strict=True)) if width else [()] * len(tensor)


def exact_means(tensor: Tensor, labels: Tensor) -> list[list[Fraction]]:
    """For each group of :func:`members_of` the mean of each entry of its slices, without any error."""
    rows = entries_of(tensor)
    means = []
    for group in members_of(labels):
        columns = zip(*(rows[member] for member in group), strict=True)
        means.append([_exact_mean(column) for column in columns])
    return means


def _exact_mean(values: Sequence[float]) -> Fraction:
    # Large groups have few values.
    counts = Counter(values)
    ratios = [(*value.as_integer_ratio(), count) for value, count in counts.items()]
    common = max(denominator for _, denominator, _ in ratios)  # all are powers of two
    total = sum(numerator * count * (common // denominator) for numerator, denominator, count in ratios)
    return Fraction(total, common * len(values))


def unit_in_the_last_place(value: float, dtype: torch.dtype) -> Fraction:
    """The distance between neighbouring numbers of a dtype around a value; at zero that of its subnormals."""
    if value == 0:
        return smallest_step(dtype)
    return max(Fraction(2) ** (math.frexp(value)[1] - 1) * Fraction(torch.finfo(dtype).eps), smallest_step(dtype))


def smallest_step(dtype: torch.dtype) -> Fraction:
    """The smallest positive number of a dtype."""
    info = torch.finfo(dtype)
    return Fraction(info.smallest_normal) * Fraction(info.eps)


def mean_tolerance(mean: Fraction, members: Sequence[float], dtype: torch.dtype, *, pairs: bool) -> Fraction:
    """What the mean of a group may be off by.

    Types of up to 32 bits are added up in float64. That is half a unit in the last place of the mean itself, and
    what a running float64 sum may lose, in units of the members' mean size one for each of them. Of float32 rows,
    halves of a group may be added to each other in float32 first, as long as their number is even: ``h`` times for
    a size that can be halved so often, and every time the sum of the magnitudes grows by half a float32 unit of itself.
    Their mean may then be rounded twice, at the lower end of the range of float32 as well.

    float64 is added up in blocks: the length of a block and their number, about twice the square root of the
    group's size, and no more than the square root in units of the largest member; and near zero, where
    differences cannot be scaled down without loss, a few subnormal numbers for each member.

    Args:
        mean: the exact one.
        members: of the group.
        dtype: theirs.
        pairs: whether the members are entries of rows.
    """
    real, size = dtype.to_real(), len(members)
    magnitudes = list(map(abs, members))
    average = _exact_mean(magnitudes)
    wide = unit_in_the_last_place(float(average), torch.float64)
    if real == torch.float64:
        block = min(size, max(32, math.isqrt(size)))
        root = Fraction(math.sqrt(size)) * unit_in_the_last_place(float(max(magnitudes)), torch.float64)
        return min((block + -(-size // block) + 2) * wide, root) + smallest_step(real) * 4 * size
    tolerance = unit_in_the_last_place(float(mean), real) / 2 + size * wide
    halvings = (size & -size).bit_length() - 1
    if pairs and halvings and real == torch.float32:
        half = Fraction(torch.finfo(torch.float32).eps) / 2
        tolerance += ((1 + half) ** halvings - 1) * average + smallest_step(torch.float32)
    return tolerance


def slowly_tied(tensor: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Means or sums of each group in float64 or complex128, by loops; the same layout is not kept."""
    rows = list(map(list, entries_of(tensor)))
    for group in members_of(labels):
        for entry in range(len(rows[group[0]])):
            total = math.fsum(rows[member][entry] for member in group)
            for member in group:
                rows[member][entry] = total if reduction == "sum" else total / len(group)
    if tensor.is_complex():
        flat = torch.tensor(rows, dtype=torch.float64).reshape(*tensor.shape, 2)
        return torch.view_as_complex(flat).to(tensor.dtype)
    return torch.tensor(rows, dtype=torch.float64).reshape(tensor.shape).to(tensor.dtype)


Member = tuple[int, int, float]


def groups_of_entries(tie: Tie, parameters: Sequence[Tensor]) -> list[list[Member]]:
    """The members of each group entry by entry: the number of the parameter, the flat position, the scale."""
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    groups: dict[tuple[int, int], list[Member]] = {}
    for part in tie.parts:
        number = numbers[id(part.param)]
        positions = torch.arange(part.param.numel()).view(part.param.shape).movedim(part.dim, 0)
        for place in product(*map(range, part.groups.shape)):
            label = int(part.groups[place])
            scale = 1.0 if part.scale is None else float(part.scale[place])
            for inner, position in enumerate(positions[place].flatten().tolist()):
                if label != -1:
                    groups.setdefault((label, inner), []).append((number, position, scale))
    return list(groups.values())


def flat(tensor: Tensor) -> list[complex]:
    """All entries as Python numbers, in the order of the indices."""
    return tensor.detach().resolve_conj().cpu().to(torch.complex128).flatten().tolist()


def slowly_tied_entries(
    tensors: Sequence[Tensor], groups: Sequence[Sequence[Member]], reduction: str = "mean"
) -> list[Tensor]:
    """``w_i = s_i sum(s_j w_j) / sum(s_j^2)``, or without the division, in float64 or complex128, by loops."""
    entries = [flat(tensor) for tensor in tensors]
    for group in groups:
        total = _sum(scale * entries[number][position] for number, position, scale in group)
        norm = 1.0 if reduction == "sum" else math.fsum(scale * scale for _, _, scale in group)
        for number, position, scale in group:
            entries[number][position] = scale * total / norm if norm else 0.0
    return [
        (values if tensor.is_complex() else values.real).view(tensor.shape).to(tensor.dtype)
        for values, tensor in zip((torch.tensor(one, dtype=torch.complex128) for one in entries), tensors, strict=True)
    ]


def _sum(values: Iterable[complex]) -> complex:
    listed = [complex(value) for value in values]
    return complex(math.fsum(value.real for value in listed), math.fsum(value.imag for value in listed))


class SharedTraining:
    """Training of the compact parameters: one slice for each group, and one for each free slice.

    The weights that the model sees are built from them inside the forward pass, so that autograd adds up the
    members' gradients. For ``reduction="mean"`` a hook divides them by the number of members.

    Args:
        weights: the starting weights, float64 or complex128, all tied.
        labels: for each weight, labels of its slices.
        build: makes the optimizer from the list of parameters.
        reduction: "mean" or "sum".
    """

    def __init__(self, weights: Sequence[Tensor], labels: Sequence[Tensor], build: Build, reduction: str) -> None:
        self.shared: list[Parameter] = []
        self.slots: list[Tensor] = []
        self.counts: list[Tensor] = []
        for weight, names in zip(weights, labels, strict=True):
            groups = members_of(names) + [[position] for position in free_of(names)]
            slots = torch.empty(len(names), dtype=torch.int64, device=weight.device)
            for slot, group in enumerate(groups):
                slots[group] = slot
            leads = torch.tensor([group[0] for group in groups], dtype=torch.int64, device=weight.device)
            parameter = Parameter(weight.detach().index_select(0, leads).clone())
            sizes = torch.tensor([float(len(group)) for group in groups], dtype=torch.float64, device=weight.device)
            counts = sizes.view(-1, *[1] * (weight.dim() - 1))
            if reduction == "mean":
                parameter.register_hook(lambda grad, counts=counts: grad / counts)
            self.shared.append(parameter)
            self.slots.append(slots)
            self.counts.append(counts)
        self.reduction = reduction
        self.optimizer = build(self.shared)

    def weights(self) -> list[Tensor]:
        """The weights that the model sees, differentiable."""
        return [shared.index_select(0, slots) for shared, slots in zip(self.shared, self.slots, strict=True)]

    def gradients(self) -> list[Tensor | None]:
        """The mean gradients of the members, whatever the reduction."""
        gradients: list[Tensor | None] = []
        for shared, slots, counts in zip(self.shared, self.slots, self.counts, strict=True):
            grad = shared.grad
            if grad is not None:
                grad = (grad / counts if self.reduction == "sum" else grad).index_select(0, slots)
            gradients.append(grad)
        return gradients


class CompactTraining:
    """Training of compact parameters by a bare optimizer, and weights that are built from them in the forward pass.

    Each weight has a compact parameter with a slice for each group, the smaller groups first, and then the free
    slices in their order. A group of several weights has its slice in one of them; what is pinned has none. What is
    tied in slices of several kinds is tied entry by entry.

    Args:
        weights: the starting weights, all tied.
        ties: of them.
        build: makes the optimizer from the list of parameters.
        reduction: "mean" or "sum".
    """

    def __init__(self, weights: Sequence[Tensor], ties: Sequence[Tie], build: Build, reduction: str) -> None:
        kinds = _kinds(weights, ties)
        self._shapes = [weight.shape for weight in weights]
        positions = [_positions(weight, *kind) for weight, kind in zip(weights, kinds, strict=True)]
        groups = _groups_of_slices(weights, ties, kinds)
        tied = {member[:2] for group in groups for member in group}
        trained = [[member for member in group if member[2] != 0] for group in groups]
        free = [[(number, at, 1.0)] for number, each in enumerate(positions) for at in range(len(each))]
        free = [group for group in free if group[0][:2] not in tied]
        # A group of one that is no multiple is as free as it was.
        free += [group for group in trained if len(group) == 1 and abs(group[0][2]) == 1]
        trained = [group for group in trained if len(group) > 1 or (group and abs(group[0][2]) != 1)]
        trained.sort(key=lambda group: (len(group), _lead(group)[0]))

        rows: list[list[Tensor]] = [[] for _ in weights]
        norms: list[list[float]] = [[] for _ in weights]
        home: dict[tuple[int, int], tuple[int, int, float]] = {}
        for group in trained + sorted(free):
            number, at, scale = _lead(group)
            for member, position, multiple in group:
                home[member, position] = number, len(rows[number]), multiple
            rows[number].append(weights[number].detach().flatten()[positions[number][at]] / scale)
            norms[number].append(math.fsum(multiple * multiple for _, _, multiple in group))

        self.compact = []
        starts = []
        for weight, (dim, depth), own, norm in zip(weights, kinds, rows, norms, strict=True):
            inner = weight.movedim(dim, 0).shape[depth:]
            values = torch.stack(own) if own else weight.new_zeros((0, inner.numel()))
            dim = dim if depth == 1 else 0
            starts.append((sum(one.numel() for one in self.compact), dim))
            parameter = Parameter(values.detach().view(-1, *inner).movedim(0, dim).contiguous())
            if reduction == "mean":
                sizes = torch.tensor(norm, dtype=torch.float64).view(-1, *[1] * len(inner)).movedim(0, dim)
                parameter.register_hook(lambda grad, sizes=sizes: grad / sizes)
            self.compact.append(parameter)
        self._dims = [dim for _, dim in starts]

        # For each entry of a weight where it stands among all entries of all compact parameters, and how often.
        self._sources, self._scales = [], []
        end = sum(one.numel() for one in self.compact)
        for number, (weight, each) in enumerate(zip(weights, positions, strict=True)):
            source = torch.full((weight.numel(),), end)
            scales = torch.zeros(weight.numel(), dtype=torch.float64)
            for at in range(len(each)):
                if (number, at) in home:
                    lead, row, multiple = home[number, at]
                    source[each[at]] = starts[lead][0] + row * each.shape[1] + torch.arange(each.shape[1])
                    scales[each[at]] = multiple
            self._sources.append(source)
            self._scales.append(scales)
        # Some optimizers refuse parameters without entries, and all of them an empty list.
        trained = [parameter for parameter in self.compact if parameter.numel()]
        self.optimizer = build(trained or [Parameter(torch.zeros(1, 1))])

    def weights(self) -> list[Tensor]:
        """The weights that the model sees, differentiable."""
        values = [one.movedim(dim, 0).flatten() for one, dim in zip(self.compact, self._dims, strict=True)]
        flat_values = torch.cat([*values, values[0].new_zeros(1)])
        return [
            (flat_values[source] * scales).view(shape)
            for source, scales, shape in zip(self._sources, self._scales, self._shapes, strict=True)
        ]


def _lead(group: Sequence[Member]) -> Member:
    return max(group, key=lambda member: math.inf if abs(member[2]) == 1 else abs(member[2]))


def _kinds(weights: Sequence[Tensor], ties: Sequence[Tie]) -> list[tuple[int, int]]:
    """For each weight the dimension of its slices, and how many dimensions their labels have."""
    numbers = {id(weight): number for number, weight in enumerate(weights)}
    kinds: list[set[tuple[int, int]]] = [set() for _ in weights]
    joined = [{numbers[id(part.param)] for part in tie.parts} for tie in ties]
    for tie in ties:
        for part in tie.parts:
            kinds[numbers[id(part.param)]].add((part.dim, part.groups.dim()))
    mixed = {number for number, own in enumerate(kinds) if len(own) > 1}
    for _ in ties:
        mixed |= {number for own in joined if own & mixed for number in own}
    return [
        (0, weight.dim()) if number in mixed else next(iter(kinds[number]), (0, 1))
        for number, weight in enumerate(weights)
    ]


def _positions(weight: Tensor, dim: int, depth: int) -> Tensor:
    """The flat positions of the entries of each slice."""
    front = torch.arange(weight.numel()).view(weight.shape).movedim(dim, 0)
    return front.reshape(math.prod(front.shape[:depth]), math.prod(front.shape[depth:]))


def _groups_of_slices(
    weights: Sequence[Tensor], ties: Sequence[Tie], kinds: Sequence[tuple[int, int]]
) -> list[list[Member]]:
    """The members of each group, in the order of the first ones."""
    numbers = {id(weight): number for number, weight in enumerate(weights)}
    found: list[list[Member]] = []
    for tie in ties:
        if all((part.dim, part.groups.dim()) == kinds[numbers[id(part.param)]] for part in tie.parts):
            groups: dict[int, list[Member]] = {}
            for part in tie.parts:
                scales = torch.ones(part.groups.shape) if part.scale is None else part.scale
                labelled = zip(part.groups.flatten().tolist(), scales.flatten().tolist(), strict=True)
                for at, (label, scale) in enumerate(labelled):
                    if label != -1:
                        groups.setdefault(label, []).append((numbers[id(part.param)], at, scale))
            found += groups.values()
        else:
            found += groups_of_entries(tie, weights)
    return sorted(sorted(group, key=lambda member: member[:2]) for group in found)


class SlowTraining:
    """Training of all the members with a bare optimizer, which loops tie before and after it.

    Args:
        weights: the starting weights.
        labels: for each weight, labels of its slices.
        build: makes the optimizer from the list of parameters.
        reduction: "mean" or "sum".
    """

    def __init__(self, weights: Sequence[Tensor], labels: Sequence[Tensor], build: Build, reduction: str) -> None:
        self.parameters = [Parameter(weight.detach().clone()) for weight in weights]
        self.labels = list(labels)
        self.reduction = reduction
        self.optimizer = build(self.parameters)
        self.tie_weights()

    def add(self, weight: Tensor, lr: float) -> None:
        """Another parameter, without ties, in a group of its own."""
        self.parameters.append(Parameter(weight.detach().clone()))
        self.labels.append(torch.full((len(weight),), -1))
        self.optimizer.add_param_group({"params": [self.parameters[-1]], "lr": lr})

    def tie_weights(self) -> None:
        for parameter, labels in zip(self.parameters, self.labels, strict=True):
            self._tie(parameter, labels)

    def tie_gradients(self) -> None:
        for parameter, labels in zip(self.parameters, self.labels, strict=True):
            if parameter.grad is not None:
                parameter.grad = slowly_tied(parameter.grad, labels)

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """A step; a closure is called once, as optimizers do that work entry by entry."""
        if closure is not None:
            closure()
        stepping = [
            (parameter, labels)
            for parameter, labels in zip(self.parameters, self.labels, strict=True)
            if parameter.grad is not None
        ]
        self.tie_gradients()
        means = [parameter.grad for parameter, _ in stepping]
        for parameter, labels in stepping:
            parameter.grad = slowly_tied(parameter.grad, labels, self.reduction)
        self.optimizer.step()
        for (parameter, labels), mean in zip(stepping, means, strict=True):
            parameter.grad = mean
            self._tie(parameter, labels)

    def snapshot(self) -> tuple[list[Tensor], dict]:
        """All that is needed to go on from here."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        return weights, copy.deepcopy(self.optimizer.state_dict())

    def go_back_to(self, snapshot: tuple[list[Tensor], dict]) -> None:
        """Weights and state as they were, without gradients."""
        weights, state = snapshot
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
                parameter.grad = None
        self.optimizer.load_state_dict(copy.deepcopy(state))

    @staticmethod
    def _tie(parameter: Parameter, labels: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(slowly_tied(parameter, labels))


def average_rows_(tensor: Tensor, rows: Sequence[int]) -> None:
    """The forum poster's own helper: gathers the rows of one group, averages them, writes them back."""
    with torch.no_grad():
        average = torch.zeros_like(tensor[rows[0]])
        for row in rows:
            average += tensor[row] / len(rows)
        for row in rows:
            tensor[row] = average
