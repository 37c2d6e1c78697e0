"""For users' own tests, and this library's: is it tied, is it the shared parameter, and what ties there are.

The assertions need nothing but torch. The strategies are for `hypothesis <https://hypothesis.readthedocs.io>`_:
``pip install hypothesis``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from tieopt.engine.engine import Engine
from tieopt.errors import shown
from tieopt.numbers.reduction import Operation, Reduction, lead_
from tieopt.optimizer import TiedOptimizer
from tieopt.ties.places import found
from tieopt.ties.slices import FREE, Slices, is_idle, numbered
from tieopt.ties.tie import Groups, Tie, Ties

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["assert_equivalent", "assert_tied", "labels", "scales", "ties"]

MakeOptimizer = Callable[[Iterable[tuple[str, Parameter]]], Optimizer]
Loss = Callable[[nn.Module, Any], Tensor]


def assert_tied(model_or_tensor: nn.Module | Tensor, ties: Ties | Groups) -> None:
    r"""Asserts that entries are tied, bit for bit but for the sign of zero.

    .. math:: w_i = s_i w_0 \quad \text{for every member } i \text{ of a group, and some } w_0

    It is :func:`~tieopt.is_tied`, for a whole model as well, with an error that says where. Unlike
    :func:`torch.testing.assert_close` it has no tolerance, and a NaN is not equal to itself.

    Args:
        model_or_tensor: a model, or a tensor of one dimension or more and of any dtype that
            :class:`~tieopt.Tie` takes.
        ties: for a model as for :class:`~tieopt.TiedOptimizer`, where names are those of
            ``model.named_parameters()``; for a tensor groups as for :func:`~tieopt.is_tied`, or a
            :class:`~tieopt.Tie` of one parameter, whose labels, dimension and scale are then taken.

    Raises:
        AssertionError: a member is not what another of its group says; which, and what it is.
        TypeError: this is neither a model nor a tensor, or ``ties`` are not ties.
        IndexError: an index, or a dimension, is out of range.
        ValueError: ``ties`` do not fit, or are joined and for a tensor.

    Example:
        >>> import torch
        >>> from tieopt.testing import assert_tied
        >>> assert_tied(torch.tensor([1.0, 2.0, 1.0]), [[0, 2]])
        >>> assert_tied(torch.tensor([1.0, 2.0, 1.0]), [[0, 1]])
        Traceback (most recent call last):
        ...
        AssertionError: the tensor is not tied.
          Expected: 1.0 at (1,), as another member of its group says
          Got:      2.0

        A model, after its weights were tied:

        >>> from tieopt import TiedOptimizer
        >>> layer, ties = torch.nn.Linear(3, 4), {"weight": [[0, 2], [1, 3]]}
        >>> _ = TiedOptimizer(torch.optim.SGD(layer.named_parameters()), ties)
        >>> assert_tied(layer, ties)
    """
    if isinstance(model_or_tensor, Tensor):
        tie = ties if isinstance(ties, Tie) else Tie(model_or_tensor, cast(Groups, ties))
        if len(tie.parts) != 1:
            raise ValueError(f"A tensor cannot have a joined tie.\n  Expected: one part\n  Got:      {tie}")
        (part,) = tie.parts
        named = {"the tensor": model_or_tensor.detach().clone()}
        ties = Tie("the tensor", part.groups, dim=part.dim, scale=part.scale)
    elif isinstance(model_or_tensor, nn.Module):
        named = dict(model_or_tensor.named_parameters())
    else:
        raise TypeError(
            f"Nothing to assert ties of.\n  Expected: a model or a tensor\n  Got:      {shown(model_or_tensor)}"
        )
    names = list(named)
    groups: list[dict[str, Any]] = [{"params": list(named.values()), "param_names": names}]
    for bound in found(groups, ties, "model"):
        params = [groups[0]["params"][place.position] for place in bound.places]
        led = [param.detach().clone() for param in params]
        Engine().apply_(Operation(lead_), [(bound, led)])
        for place, slices, expected, param in zip(bound.places, bound.slices, led, params, strict=True):
            wide = torch.complex128 if param.is_complex() else torch.float64
            expected, got = expected.cpu().to(wide), param.detach().cpu().to(wide)
            wrong = (expected != got) & (slices.entries(param)[0] != FREE)
            if wrong.any():
                at = tuple(wrong.nonzero()[0].tolist())
                raise AssertionError(
                    f"{names[place.position]} is not tied.\n"
                    f"  Expected: {expected[at].item()} at {at}, as another member of its group says\n"
                    f"  Got:      {got[at].item()}"
                )


def assert_equivalent(
    make_model: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    ties: Ties | Callable[[nn.Module], Ties],
    batches: Iterable[Any],
    *,
    reduction: Reduction = "mean",
    loss: Loss | None = None,
    tolerance: float = 1e-12,
) -> None:
    r"""Asserts that tied training is training of the shared values, step by step in float64.

    Beside the model under ties, its copy is trained, whose weights are built inside ``forward`` from one
    parameter with a slice for each group, as ``torch.nn.utils.parametrize`` would have it. For an optimizer
    that works entry by entry the two are one trajectory; with scales other than -1, 0 and 1 only if its update
    is linear in the gradient. After every step, for every entry of a parameter :math:`w`,

    .. math:: \left| w_i - s_i w_0 \right| \le \mathtt{tolerance} \cdot \max \left( 1, \max_j |s_j w_0| \right)

    where :math:`w` is from the one side and :math:`s w_0`, the weights as they are built, from the other.

    Args:
        make_model: returns the model, which is made float64 and trained; called once.
        make_optimizer: makes the optimizer from pairs of names and parameters; called for each side.
        ties: as for :class:`~tieopt.TiedOptimizer`, with names for parameters; or a function that returns
            them for the model.
        batches: one for each step, of any shape; floating tensors as float64, like the model.
        reduction: as for :class:`~tieopt.TiedOptimizer`.
        loss: of a model on a batch; by default the mean square of ``model(batch)``. It may do no more with the
            model than call it. Random numbers, as of dropout, are the same on both sides.
        tolerance: the largest difference that passes, relative to the largest entry of a parameter, or to 1
            if that is less.

    Raises:
        AssertionError: the two differ; it says at which step, in which parameter, by how much, and whether
            the optimizer couples entries, in which case it has to.
        TypeError: as :class:`~tieopt.TiedOptimizer`.
        IndexError: as :class:`~tieopt.TiedOptimizer`.
        ValueError: there is no batch; or as :class:`~tieopt.TiedOptimizer`.

    Example:
        >>> import torch
        >>> from tieopt.testing import assert_equivalent
        >>> assert_equivalent(
        ...     lambda: torch.nn.Linear(3, 4),
        ...     lambda params: torch.optim.Adam(params, lr=0.1),
        ...     {"weight": [[0, 2], [1, 3]]},
        ...     torch.randn(10, 5, 3, dtype=torch.float64),
        ... )
    """
    measure = loss or _mean_square
    model = make_model().double()
    listed = ties(model) if callable(ties) else ties
    optimizer = TiedOptimizer(make_optimizer(list(model.named_parameters())), listed, reduction=reduction)
    shared = _SharedModel(model, optimizer, reduction)
    shared_optimizer = make_optimizer(list(shared.named_parameters()))

    step = 0
    for step, batch in enumerate(batches, start=1):
        for each, trained in ((optimizer, model), (shared_optimizer, shared)):
            with torch.random.fork_rng():
                torch.manual_seed(step)
                _step(each, partial(measure, trained, batch))
        built = shared.weights()
        for name, param in model.named_parameters():
            size = max(1.0, float(built[name].detach().abs().max())) if param.numel() else 1.0
            difference = (param.detach() - built[name].detach()).abs()
            if not bool((difference <= tolerance * size).all()):
                at = tuple((~(difference <= tolerance * size)).nonzero()[0].tolist())
                raise AssertionError(
                    f"Tied training is not training of the shared values: step {step}, {name}.\n"
                    f"  Expected: {built[name][at].item()} at {at}, to {tolerance * size:.3g}\n"
                    f"  Got:      {param[at].item()}, which differs by {difference[at].item():.3g}; "
                    f"{_reason(optimizer, make_optimizer)}"
                )
    if not step:
        raise ValueError("There is nothing to train on.\n  Expected: one batch or more\n  Got:      none")


def _reason(optimizer: TiedOptimizer, make_optimizer: MakeOptimizer) -> str:
    """Why tied training may be another than that of the shared values."""
    name = type(optimizer).__name__.removeprefix("Tied")
    if _couples_entries(make_optimizer, optimizer.param_groups[0]["params"][0].device):
        return f"{name} couples entries, so that it cannot follow the shared values"
    scales = [part.scale for tie in optimizer.ties for part in tie.parts if part.scale is not None]
    if any(bool(((scale != 0) & (scale.abs() != 1)).any()) for scale in scales):
        return f"{name} works entry by entry, but with scales other than -1, 0 and 1 it has to be linear, too"
    return f"{name} works entry by entry"


def _mean_square(model: nn.Module, batch: Any) -> Tensor:
    output: Tensor = model(batch)
    return output.square().mean()


class _SharedModel(nn.Module):
    """A model whose tied weights are built from one slice for each group inside ``forward``."""

    def __init__(self, model: nn.Module, optimizer: TiedOptimizer, reduction: Reduction) -> None:
        super().__init__()
        self._model = [copy.deepcopy(model)]  # in a list, lest its parameters be trained
        params = {param: name for name, param in model.named_parameters()}
        # What stands behind each entry: of which parameter it is a multiple, at which position, times what.
        self._built: dict[str, list[tuple[str, Tensor, Tensor]]] = {name: [] for name in params.values()}
        untied = {
            name: torch.ones(param.shape, dtype=torch.bool, device=param.device) for param, name in params.items()
        }

        # Frozen parameters are not tied.
        ties = [tie for tie in optimizer.ties if tie.parts[0].param.requires_grad]  # type: ignore[union-attr]
        for number, tie in enumerate(ties):
            names = [params[part.param] for part in tie.parts]  # type: ignore[index]
            slices = [Slices(part.groups, part.scale, part.dim) for part in tie.parts]
            tensors = [part.param.detach() for part in tie.parts]  # type: ignore[union-attr]
            device = tensors[0].device
            entries = [each.entries(tensor) for each, tensor in zip(slices, tensors, strict=True)]
            count = 1 + max(int(ids.max()) if ids.numel() else FREE for ids, _ in entries)
            values = torch.zeros(count, dtype=tensors[0].dtype, device=device)
            norms = torch.zeros(count, dtype=torch.float64, device=device)
            for own, tensor, name in zip(entries, tensors, names, strict=True):
                ids, scale = (one.to(device) for one in own)
                tied = ids != FREE
                untied[name] &= ~tied
                norms.index_add_(0, ids[tied], scale[tied].square())
                led = tied & (scale != 0)
                values[ids[led]] = tensor[led] / scale[led]
                self._built[name].append((f"shared_{number}", ids, scale))
            # Some optimizers take nothing but matrices.
            shape = (-1, max(slices[0].slice_shape(tensors[0]).numel(), 1)) if tensors[0].dim() > 1 else (-1,)
            self.register_parameter(f"shared_{number}", Parameter(values.view(shape)))
            if reduction == "mean":
                divide = partial(torch.mul, 1 / torch.where(norms == 0, 1.0, norms).view(shape))
                self.get_parameter(f"shared_{number}").register_hook(divide)  # type: ignore[no-untyped-call]

        for number, (param, name) in enumerate(params.items()):
            if self._built[name] and not untied[name].any():
                continue
            ids = torch.full(param.shape, FREE, device=param.device)
            ids[untied[name]] = torch.arange(int(untied[name].sum()), device=param.device)
            ones = torch.ones(param.shape, dtype=torch.float64, device=param.device)
            self._built[name].append((f"free_{number}", ids, ones))
            values = param.detach()[untied[name]].clone().view((-1, 1) if param.dim() > 1 else (-1,))
            self.register_parameter(f"free_{number}", Parameter(values, requires_grad=param.requires_grad))

    def weights(self) -> dict[str, Tensor]:
        """The weights of the model, differentiable."""
        weights = {}
        for name, sources in self._built.items():
            weight = torch.zeros_like(sources[0][1], dtype=self.get_parameter(sources[0][0]).dtype)
            for source, ids, scale in sources:
                chosen = ids != FREE
                values = self.get_parameter(source).flatten()[ids[chosen]] * scale[chosen]
                weight = weight.masked_scatter(chosen, values)
            weights[name] = weight
        return weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._model[0], self.weights(), args, kwargs)


def _step(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        torch.autograd.backward(value)
        return value.item()

    optimizer.step(closure)


def _couples_entries(make_optimizer: MakeOptimizer, device: torch.device) -> bool:
    """Whether the update of an entry depends on others, or on its place among them."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(3, 12, dtype=torch.float64, generator=generator, device="cpu")
    order = torch.randperm(12, generator=generator, device="cpu").to(device)
    start, goal, other_goal = drawn.to(device)

    def end(start: Tensor, goal: Tensor) -> Tensor:
        weight = Parameter(start.view(4, 3).clone())
        optimizer = make_optimizer([("weight", weight)])
        for _ in range(3):
            _step(optimizer, partial(_distance, weight, goal.view(4, 3)))
        return weight.detach().flatten()

    usual, elsewhere = end(start, goal), end(start[order], goal[order])
    others = end(start, torch.cat([goal[:6], other_goal[6:]]))
    alike = partial(torch.allclose, rtol=1e-9, atol=1e-9)
    return not (alike(usual[:6], others[:6]) and alike(usual[order], elsewhere))


def _distance(weight: Tensor, target: Tensor) -> Tensor:
    return (weight - target).pow(4).sum()


# --- strategies ---


def labels(shape: int | Sequence[int]) -> SearchStrategy[Tensor]:
    """Labels of a shape: any partition of any of the slices, or one large group, or pairs, or all free.

    Args:
        shape: of the labels; a number ``n`` for ``[n]``, those of rows. There may be no entries.

    Returns:
        A strategy of int64 tensors of that shape on the CPU, with -1 for free slices.

    Raises:
        ImportError: hypothesis is not installed.

    Example:
        >>> from hypothesis import given
        >>> from tieopt.testing import labels
        >>> @given(labels((2, 3)))
        ... def test_labels_have_their_shape(names):
        ...     assert names.shape == (2, 3)
        >>> test_labels_have_their_shape()
    """
    from hypothesis import strategies as st

    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(sizes)

    @st.composite
    def drawn(draw: st.DrawFn) -> Tensor:
        if count == 0:
            return torch.zeros(sizes, dtype=torch.int64, device="cpu")
        kind = draw(st.sampled_from(["any", "any", "one group", "pairs", "free"]))
        if kind == "free":
            return torch.full(sizes, FREE, device="cpu")
        if kind == "one group":
            names = torch.zeros(count, dtype=torch.int64, device="cpu")
            names[draw(st.lists(st.integers(0, count - 1), max_size=2))] = FREE
            return names.view(sizes)
        generator = torch.Generator("cpu").manual_seed(draw(st.integers(0, 2**32 - 1)))
        if kind == "pairs":
            return (torch.randperm(count, generator=generator, device="cpu") // 2).view(sizes)
        most = draw(st.integers(0, min(count, 20)))
        if count <= 12:
            listed = draw(st.lists(st.integers(FREE, most), min_size=count, max_size=count))
            return torch.tensor(listed, device="cpu").view(sizes)
        return torch.randint(FREE, most + 1, sizes, generator=generator, device="cpu")

    return drawn()


def scales(
    shape: Sequence[int], kinds: Sequence[str] = ("none", "signs", "zeros", "any")
) -> SearchStrategy[Tensor | None]:
    """Scales of a shape, or None.

    Args:
        shape: of the labels.
        kinds: what may be drawn, one or more of: ``"none"``, None; ``"signs"``, 1 and -1; ``"zeros"``, these
            and 0; ``"any"``, these and other multiples.

    Returns:
        A strategy of float64 tensors of that shape on the CPU, or None.

    Raises:
        ImportError: hypothesis is not installed.

    Example:
        >>> from hypothesis import given
        >>> from tieopt.testing import scales
        >>> @given(scales((2, 3), ["signs"]))
        ... def test_signs_are_signs(signs):
        ...     assert signs.abs().eq(1).all()
        >>> test_signs_are_signs()
    """
    from hypothesis import strategies as st

    values = {
        "signs": [1.0, -1.0],
        "zeros": [1.0, -1.0, 0.0],
        "any": [1.0, -1.0, 0.0, 2.0, -0.5, 3.0, 0.1, -1 / 3],
    }

    @st.composite
    def drawn(draw: st.DrawFn) -> Tensor | None:
        kind = draw(st.sampled_from(list(kinds)))
        if kind == "none":
            return None
        generator = torch.Generator("cpu").manual_seed(draw(st.integers(0, 2**32 - 1)))
        picks = torch.randint(len(values[kind]), tuple(shape), generator=generator, device="cpu")
        return torch.tensor(values[kind], dtype=torch.float64, device="cpu")[picks]

    return drawn()


def ties(
    tensors: Sequence[Tensor], kinds: Sequence[str] = ("none", "signs", "zeros", "any")
) -> SearchStrategy[list[Tie]]:
    """Ties of every kind: rows, columns, kernels or elements, scaled, joined, several of one parameter.

    Args:
        tensors: what is to be tied, one or more: of one dimension or more, of one dtype that
            :class:`~tieopt.Tie` takes, and on one device.
        kinds: of scales, as for :func:`scales`.

    Returns:
        A strategy of lists of ties, one or two, that share no entry. The first tensor is in all of them, others
        may be joined with it.

    Raises:
        ImportError: hypothesis is not installed.

    Example:
        >>> import torch
        >>> from hypothesis import given
        >>> from tieopt import TiedOptimizer
        >>> from tieopt.testing import ties
        >>> weight = torch.nn.Parameter(torch.randn(3, 4))
        >>> @given(ties([weight]))
        ... def test_tied_weights_do_not_drift(drawn):
        ...     assert TiedOptimizer(torch.optim.SGD([weight]), drawn).tie_drift() == 0
        >>> test_tied_weights_do_not_drift()
    """
    from hypothesis import strategies as st

    @st.composite
    def drawn(draw: st.DrawFn) -> list[Tie]:
        first, *others = tensors
        dim, depth = draw(st.sampled_from(_units(first)))
        unit = first.movedim(dim, 0).shape[depth:]
        chosen: list[tuple[Tensor, int, int]] = [(first, dim, depth)]
        for other in others:
            fitting = [place for place in _units(other) if other.movedim(place[0], 0).shape[place[1] :] == unit]
            if draw(st.booleans()) and fitting:
                at, deep = draw(st.sampled_from(fitting))
                chosen.append((other, at, deep))
        parts = []
        for tensor, at, deep in chosen:
            shape = tensor.movedim(at, 0).shape[:deep]
            parts.append(Tie(tensor, draw(labels(shape)), dim=at, scale=draw(scales(shape, kinds))))
        if draw(st.booleans()):  # one parameter twice in a tie
            taken = parts[0].parts[0].groups
            rest = torch.where(taken == FREE, draw(labels(taken.shape)), FREE)
            parts.append(Tie(first, rest, dim=dim, scale=draw(scales(taken.shape, kinds))))
        result = [Tie.join(*parts)]
        if draw(st.booleans()):
            untied = torch.ones(first.shape, dtype=torch.bool, device="cpu")
            for part in result[0].parts:
                if part.param is first:
                    untied &= part.slices(first, "the tensor").entries(first)[0] == FREE
            rest = torch.where(untied, draw(labels(first.shape)), FREE)
            result.append(Tie(first, rest, scale=draw(scales(first.shape, kinds))))
        return list(map(_not_idle, result))

    return drawn()


def _not_idle(tie: Tie) -> Tie:
    """The tie; if it ties nothing, of which an optimizer warns, one without any group."""
    if not is_idle(numbered([Slices(part.groups, part.scale, part.dim) for part in tie.parts])):
        return tie
    return Tie.join(*(Tie(part.param, torch.full_like(part.groups, FREE), dim=part.dim) for part in tie.parts))


def _units(tensor: Tensor) -> list[tuple[int, int]]:
    """The ways to slice a tensor: the dimension, and how many dimensions the labels have."""
    return [(dim, depth) for dim in range(tensor.dim()) for depth in range(1, tensor.dim() + 1)]
