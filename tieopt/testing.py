"""Assertions and hypothesis strategies for tests of ties.

The assertions need only torch. The strategies need `hypothesis <https://hypothesis.readthedocs.io>`_: ``pip install
hypothesis``.
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
from tieopt.engine.sharded import spans_ranks
from tieopt.errors import refusal, shown
from tieopt.numbers.reduction import Operation, lead_
from tieopt.optimizer import TiedOptimizer
from tieopt.ties.options import Reduction
from tieopt.ties.part import Groups
from tieopt.ties.places import bind_ties
from tieopt.ties.slices import FREE, Slices, is_idle, numbered
from tieopt.ties.tie import Tie, Ties

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["assert_equivalent", "assert_tied", "labels", "scales", "ties"]

MakeOptimizer = Callable[[Iterable[tuple[str, Parameter]]], Optimizer]


def assert_tied(model_or_tensor: nn.Module | Tensor, ties: Ties | Groups) -> None:
    r"""Assert that entries are tied, bit for bit except for the sign of zero.

    .. math:: w_i = s_i w_0 \quad \text{for every member } i \text{ of a group, and some } w_0

    This is :func:`~tieopt.is_tied` as an assertion, also for a whole model. Unlike :func:`torch.testing.assert_close`
    it has no tolerance, and a NaN is not equal to itself.

    Args:
        model_or_tensor: a model, or a tensor of any dtype that :class:`~tieopt.Tie` takes.
        ties: for a model, ties as for :class:`~tieopt.TiedOptimizer`, with the names of
            ``model.named_parameters()``; for a tensor, groups as for :func:`~tieopt.is_tied`, or a
            :class:`~tieopt.Tie` of one parameter, whose labels, dimension and scale are used.

    Raises:
        AssertionError: a member differs from the others of its group; the message shows its place and its value.
        TypeError: ``model_or_tensor`` is neither a model nor a tensor, or a tied tensor is sharded, or ``ties`` are not
            ties.
        IndexError: an index, or a dimension, is out of range.
        ValueError: ``ties`` do not fit, or are of frozen slices, for which nothing can be compared; or a tensor was
            given a joined tie.

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

        A model whose weights were tied:

        >>> from tieopt import TiedOptimizer
        >>> layer, ties = torch.nn.Linear(3, 4), {"weight": [[0, 2], [1, 3]]}
        >>> _ = TiedOptimizer(torch.optim.SGD(layer.named_parameters()), ties)
        >>> assert_tied(layer, ties)
    """
    if isinstance(model_or_tensor, Tensor):
        named = {"the tensor": model_or_tensor.detach().clone()}
        if not isinstance(ties, Tie):
            ties = {"the tensor": ties}
        elif len(ties.parts) == 1:
            _, groups, dim, scale, offset = ties.parts[0]
            ties = Tie("the tensor", groups, dim=dim, scale=scale, offset=offset)
        else:
            raise refusal(ValueError, "A tensor cannot have a joined tie.", expected="a tie of one parameter", got=ties)
    elif isinstance(model_or_tensor, nn.Module):
        named = dict(model_or_tensor.named_parameters())
    else:
        got = shown(model_or_tensor)
        raise refusal(TypeError, "This cannot be tied.", expected="a model or a tensor", got=got)
    param_groups: list[dict[str, Any]] = [{"params": list(named.values()), "param_names": list(named)}]
    for tie in bind_ties(param_groups, ties, "model"):
        if tie.is_frozen:
            what, expected = "Frozen slices have no other members.", "ties without them; compare them with a copy"
            raise refusal(ValueError, what, expected=expected, got=f"frozen slices of {', '.join(tie.names)}")
        params = [param_groups[0]["params"][place.position] for place in tie.places]
        if spans_ranks(params, tie):
            what, expected = (
                "Members on several ranks are not compared here.",
                "is_tied(), or what full_tensor() returns",
            )
            raise refusal(TypeError, what, parameters=", ".join(tie.names), expected=expected, got="sharded parameters")
        tied = [param.detach().clone() for param in params]
        Engine().apply_(Operation(lead_), [(tie, tied)])
        for name, slices, expected, param in zip(tie.names, tie.slices, tied, params, strict=True):
            wide = torch.complex128 if param.is_complex() else torch.float64
            expected, got = expected.cpu().to(wide), param.detach().cpu().to(wide)
            wrong = ((expected != got) & (slices.entries(param.shape)[0] != FREE)).nonzero()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                says = f"{expected[at].item()} at {at}, as another member of its group says"
                raise refusal(AssertionError, f"{name} is not tied.", expected=says, got=got[at].item())


def assert_equivalent(
    make_model: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    ties: Ties | Callable[[nn.Module], Ties],
    batches: Iterable[Any],
    *,
    reduction: Reduction = "mean",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    tolerance: float = 1e-12,
) -> None:
    r"""Assert that tied training is training of the shared values, step by step in float64.

    A copy of the model is trained for comparison. Its weights are built inside ``forward`` from one parameter with a
    slice for each group, as by ``torch.nn.utils.parametrize``. For an optimizer that works entry by entry, the two
    trajectories are the same; with scales other than -1, 0 and 1, only if its update is linear in the gradient. After
    every step, for every entry of a parameter :math:`w`,

    .. math:: \left| w_i - v_i \right| \le \mathtt{tolerance} \cdot \max \left( 1, \max_j |v_j| \right)

    where :math:`w` is the tied weight, and :math:`v_i = s_i w_0 + c_i` the weight that the copy builds.

    Args:
        make_model: a function that returns the model, which is converted to float64 and trained; called once.
        make_optimizer: a function that makes an optimizer from pairs of names and parameters; called for the model and
            for the copy.
        ties: as for :class:`~tieopt.TiedOptimizer`, with names for parameters; or a function of the model that returns
            them.
        batches: a batch for each step, of any shape; floating-point tensors have to be float64, like the model.
        reduction: as for :class:`~tieopt.TiedOptimizer`.
        loss: the loss of a model on a batch; by default the mean square of ``model(batch)``. It may only call the
            model. Random numbers, such as those of dropout, are the same for model and copy.
        tolerance: the largest difference that passes, relative to the largest entry of a parameter, or to 1
            if that is larger.

    Raises:
        AssertionError: the two differ. The message shows the step, the parameter and the difference, and says whether
            the optimizer couples entries, which is a reason to differ.
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
    measure = loss or (lambda model, batch: model(batch).square().mean())
    model = make_model().double()
    listed = ties(model) if callable(ties) else ties
    optimizer = TiedOptimizer(make_optimizer(list(model.named_parameters())), listed, reduction=reduction)
    shared = _SharedModel(model, optimizer, reduction)
    shared_optimizer = make_optimizer(list(shared.named_parameters()))

    step = 0
    for step, batch in enumerate(batches, start=1):
        for trained, trainer in ((model, optimizer), (shared, shared_optimizer)):
            with torch.random.fork_rng():
                torch.manual_seed(step)
                _step(trainer, partial(measure, trained, batch))
        built = shared.weights()
        for name, param in model.named_parameters():
            expected, got = built[name].detach(), param.detach()
            limit = tolerance * (max(1.0, float(expected.abs().max())) if param.numel() else 1.0)
            difference = (got - expected).abs()
            wrong = (~(difference <= limit)).nonzero()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                what = f"Tied training is not training of the shared values: step {step}, {name}."
                wanted = f"{expected[at].item()} at {at}, to {limit:.3g}"
                differs = f"{got[at].item()}, which differs by {difference[at].item():.3g}"
                why = _reason(optimizer, make_optimizer)
                raise refusal(AssertionError, what, expected=wanted, got=f"{differs}; {why}")
    if not step:
        raise refusal(ValueError, "There is nothing to train on.", expected="one batch or more", got="none")


def _reason(optimizer: TiedOptimizer, make_optimizer: MakeOptimizer) -> str:
    """Return why tied training may differ from training of the shared values."""
    name = type(optimizer).__name__.removeprefix("Tied")
    if _couples_entries(make_optimizer, optimizer.param_groups[0]["params"][0].device):
        return f"{name} couples entries, so that it cannot follow the shared values"
    scales = [part.scale for tie in optimizer.ties for part in tie.parts if part.scale is not None]
    if any(bool(((scale != 0) & (scale.abs() != 1)).any()) for scale in scales):
        return f"{name} works entry by entry, but with scales other than -1, 0 and 1 it has to be linear, too"
    return f"{name} works entry by entry"


class _SharedModel(nn.Module):
    """A model that builds its weights in ``forward``, from parameters with one slice for each group.

    The sources of a weight are parameters: one for each tie, and one for the free entries, which are groups of one.
    Entry ``i`` of the weight is entry ``indices[i]`` of all its sources together, times ``scales[i]``, plus
    ``offsets[i]``.
    """

    def __init__(self, model: nn.Module, optimizer: TiedOptimizer, reduction: Reduction) -> None:
        super().__init__()
        self._model = [copy.deepcopy(model)]  # in a list, so that its parameters are not trained
        self._params = dict(model.named_parameters())
        params = self._params.values()
        self._sources: dict[Any, list[Parameter]] = {param: [] for param in params}
        self._indices = {param: torch.full(param.shape, FREE, device=param.device) for param in params}
        self._scales = {param: torch.ones(param.shape, dtype=torch.float64, device=param.device) for param in params}
        self._offsets = {param: torch.zeros_like(param) for param in params}
        for tie, tied in optimizer._tieopt.parameters(optimizer.param_groups):
            if tied[0].requires_grad:  # Frozen parameters are not tied.
                self._share(tie.slices, cast(list[Parameter], tied), tie.options.reduction)
        for param in params:
            free = self._indices[param].cpu() == FREE
            if bool(free.any()) or not self._sources[param]:
                labels = free.flatten().cumsum(0).view(param.shape) - 1
                self._share([Slices(torch.where(free, labels, FREE))], [param], reduction)

    def _share(self, slices: Sequence[Slices], params: Sequence[Parameter], reduction: Reduction) -> None:
        """Add the source for a tie whose groups are numbered, from which its members are built."""
        first = params[0]
        groups = 1 + max((int(labelled.labels.max()) for labelled in slices if labelled.labels.numel()), default=FREE)
        # A matrix for matrices, because some optimizers take nothing else.
        shape = (groups, slices[0].slice_shape(first.shape).numel()) if first.dim() > 1 else (groups,)
        source = Parameter(first.new_zeros(shape), first.requires_grad)
        shared, norms = source.data.view(-1), torch.zeros(shape, dtype=torch.float64, device=first.device)
        for labelled, param in zip(slices, params, strict=True):
            indices, scales = (column.to(first.device) for column in labelled.entries(param.shape))
            tied, scaled = indices != FREE, (indices != FREE) & (scales != 0)
            norms.view(-1).index_add_(0, indices[tied], scales[tied].square())
            offset = labelled.offset_of(param)
            if offset is not None:
                self._offsets[param][tied] = offset.to(param.device, param.dtype)[tied]
            shared[indices[scaled]] = (param.detach() - self._offsets[param])[scaled] / scales[scaled]
            self._indices[param][tied] = indices[tied] + sum(other.numel() for other in self._sources[param])
            self._scales[param][tied] = scales[tied]
            self._sources[param].append(source)
        # The gradient of a source is a sum over members, each times its scale.
        if reduction == "mean" and source.requires_grad:
            divide = partial(torch.mul, 1 / torch.where(norms == 0, 1.0, norms))
            source.register_hook(divide)  # type: ignore[no-untyped-call]
        self.register_parameter(f"shared_{len(self._parameters)}", source)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the model, differentiable."""
        weights = {}
        for name, param in self._params.items():
            shared = torch.cat([source.flatten() for source in self._sources[param]])
            weights[name] = shared[self._indices[param]] * self._scales[param] + self._offsets[param]
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
    """Return whether the update of an entry depends on other entries, or on its position among them."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(3, 12, dtype=torch.float64, generator=generator, device="cpu")
    order = torch.randperm(12, generator=generator, device="cpu").to(device)
    start, goal, other_goal = drawn.to(device)

    def end(start: Tensor, goal: Tensor) -> Tensor:
        weight = Parameter(start.view(4, 3).clone())
        optimizer = make_optimizer([("weight", weight)])
        for _ in range(3):
            _step(optimizer, lambda: (weight - goal.view(4, 3)).pow(4).sum())
        return weight.detach().flatten()

    usual, elsewhere = end(start, goal), end(start[order], goal[order])
    others = end(start, torch.cat([goal[:6], other_goal[6:]]))
    alike = partial(torch.allclose, rtol=1e-9, atol=1e-9)
    return not (alike(usual[:6], others[:6]) and alike(usual[order], elsewhere))


# --- strategies ---


def labels(shape: int | Sequence[int]) -> SearchStrategy[Tensor]:
    """Return a strategy for labels: any partition of any of the slices, one large group, pairs, or all free.

    Args:
        shape: the shape of the labels; a number ``n`` for ``[n]``, labels of rows. It may have no entries.

    Returns:
        A strategy for int64 tensors of that shape on the CPU, with -1 for free slices.

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
    generators = st.integers(0, 2**32 - 1).map(torch.Generator("cpu").manual_seed)

    def at_random(last: int, generator: torch.Generator) -> Tensor:
        return torch.randint(FREE, last + 1, (count,), generator=generator, device="cpu")

    lasts = st.integers(0, min(count, 20))
    listed = lasts.flatmap(lambda last: st.lists(st.integers(FREE, last), min_size=count, max_size=count))
    partitions = listed if count <= 12 else st.builds(at_random, lasts, generators)
    exceptions = st.sets(st.integers(0, count - 1), max_size=2)
    one_group = exceptions.map(lambda free: [FREE if number in free else 0 for number in range(count)])
    pairs = generators.map(lambda generator: torch.randperm(count, generator=generator, device="cpu") // 2)
    all_free = st.just([FREE] * count)
    kinds = [partitions, partitions, one_group, pairs, all_free] if count else [all_free]
    names = st.sampled_from(kinds).flatmap(lambda kind: kind)
    return names.map(lambda drawn: torch.as_tensor(drawn, dtype=torch.int64, device="cpu").view(sizes))


def scales(
    shape: Sequence[int], kinds: Sequence[str] = ("none", "signs", "zeros", "any")
) -> SearchStrategy[Tensor | None]:
    """Return a strategy for scales, or None.

    Args:
        shape: the shape of the labels.
        kinds: one or more of ``"none"``, for None; ``"signs"``, for 1 and -1; ``"zeros"``, for these and 0;
            ``"any"``, for these and other numbers.

    Returns:
        A strategy for float64 tensors of that shape on the CPU, or None.

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

    values = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 3.0, 0.1, -1 / 3], dtype=torch.float64, device="cpu")
    counts = {"signs": 2, "zeros": 3, "any": len(values)}
    generators = st.integers(0, 2**32 - 1).map(torch.Generator("cpu").manual_seed)

    def at_random(kind: str, generator: torch.Generator) -> Tensor | None:
        if kind == "none":
            return None
        return values[torch.randint(counts[kind], tuple(shape), generator=generator, device="cpu")]

    return st.builds(at_random, st.sampled_from(list(kinds)), generators)


def ties(
    tensors: Sequence[Tensor], kinds: Sequence[str] = ("none", "signs", "zeros", "any")
) -> SearchStrategy[list[Tie]]:
    """Return a strategy for ties of every kind: of rows, columns, kernels or elements, scaled, joined, overlaid.

    Args:
        tensors: the tensors to tie, one or more, each of one dimension or more; all of one dtype that
            :class:`~tieopt.Tie` takes, and on one device.
        kinds: the kinds of scales, as for :func:`scales`.

    Returns:
        A strategy for lists of one or two ties that share no entry. The first tensor is in each of them; the others
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
        def drawn_tie(tensor: Tensor, dim: int, shape: torch.Size, taken: Tensor | None = None) -> Tie:
            names = draw(labels(shape))
            names = names if taken is None else names.masked_fill(taken, FREE)
            return Tie(tensor, names, dim=dim, scale=draw(scales(shape, kinds)))

        first, *others = tensors
        dim, shape, inner = draw(st.sampled_from(_ways_to_slice(first)))
        joined = [drawn_tie(first, dim, shape)]
        for other in others:
            fitting = [(at, outer) for at, outer, slice_shape in _ways_to_slice(other) if slice_shape == inner]
            if draw(st.booleans()) and fitting:
                joined.append(drawn_tie(other, *draw(st.sampled_from(fitting))))
        if draw(st.booleans()):  # one parameter twice in a tie
            joined.append(drawn_tie(first, dim, shape, joined[0].parts[0].groups != FREE))
        result = [Tie.join(*joined)]
        if draw(st.booleans()):  # two ties of one parameter
            tied = [_slices(tie)[0].entries(first.shape)[0] != FREE for tie in joined if tie.parts[0].param is first]
            result.append(drawn_tie(first, 0, first.shape, torch.stack(tied).any(0)))
        return [_free_if_idle(tie) for tie in result]

    return drawn()


def _free_if_idle(tie: Tie) -> Tie:
    """Return the tie; or one without groups if it ties nothing, because an optimizer would warn."""
    if not is_idle(numbered(_slices(tie))):
        return tie
    return Tie.join(*(Tie(part.param, torch.full_like(part.groups, FREE), dim=part.dim) for part in tie.parts))


def _ways_to_slice(tensor: Tensor) -> list[tuple[int, torch.Size, torch.Size]]:
    """Return the ways to slice a tensor: the dimension, the shape of the labels, and the shape of a slice."""
    shapes = [(dim, tensor.movedim(dim, 0).shape) for dim in range(tensor.dim())]
    return [(dim, shape[:depth], shape[depth:]) for dim, shape in shapes for depth in range(1, len(shape) + 1)]


def _slices(tie: Tie) -> list[Slices]:
    return [part.slices(cast(Tensor, part.param), "the parameter") for part in tie.parts]
