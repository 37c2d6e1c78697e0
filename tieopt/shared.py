"""Parameters that several modules share, made one for each module."""

from __future__ import annotations

import copy

from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from tieopt.engine.sharded import spans_ranks
from tieopt.errors import refusal
from tieopt.tensors import check_sharding
from tieopt.ties.names import Held
from tieopt.ties.options import Options
from tieopt.ties.part import Part, Whole
from tieopt.ties.tie import Tie, tie_of


def split_shared_(model: Module) -> list[Tie]:
    """Give each module that shares a Parameter its own copy, and return the ties that keep the copies equal.

    Modules that share a Parameter cannot be sharded separately: ``fully_shard`` refuses them. After this function they
    can be, and with the returned ties, training is that of the shared Parameter. Call it before the model is sharded,
    replicated or copied for averages, and before the optimizer is made. Clip by
    :meth:`~tieopt.TiedOptimizer.clip_grad_norm_`, which counts a shared Parameter once.

    Load a checkpoint in which one name stands for all copies, such as those of ``safetensors``, before this call.
    Later, load or initialise all copies alike. The ``state_dict`` has the same keys as before.

    The ties find the Parameters in their modules when an optimizer is wrapped. Until then they may be replaced, as
    ``fully_shard`` does.

    Args:
        model: the model. Except for the first, the modules that share a Parameter get a copy of it, with the same
            attributes and without its gradient.

    Returns:
        A tie for each Parameter that was shared, with ``reduction="sum"``.

    Raises:
        TypeError: a shared Parameter has no shape yet, or the model is or has a ``DistributedDataParallel``. The
            ``.module`` of one is not recognised.
        ValueError: a shared Parameter is sharded already, or has hooks.

    Warns:
        UserWarning: the copies differ when an optimizer is wrapped, because one of them was loaded or initialised
            alone; they start from their mean.

    Example:
        An embedding and a head that share their weight:

        >>> import torch
        >>> from tieopt import TiedOptimizer, split_shared_
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
        >>> model[1].weight = model[0].weight
        >>> ties = split_shared_(model)
        >>> ties
        [Tie.equal('0.weight', '1.weight', reduction='sum')]
        >>> optimizer = TiedOptimizer(torch.optim.AdamW(model.parameters()), ties)
        >>> model(torch.arange(5)).square().sum().backward()
        >>> optimizer.step()
        >>> model[0].weight is model[1].weight, torch.equal(model[0].weight, model[1].weight)
        (False, True)
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        expected = "the model before it is wrapped: the copies need hooks, too"
        raise refusal(TypeError, "A replica cannot be split.", expected=expected, got=type(model).__name__)
    holders: dict[Parameter, list[Held]] = {}
    for prefix, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is not None:
                holders.setdefault(param, []).append(Held(module, name, f"{prefix}.{name}" if prefix else name))
    shared = {param: held for param, held in holders.items() if len(held) > 1}
    for param, held in shared.items():
        names = " and ".join(str(place) for place in held)
        if is_lazy(param):
            what, expected = f"{names} share a parameter without a shape.", "a model that was called once"
            raise refusal(TypeError, what, expected=expected, got=type(param).__name__)
        check_sharding(param, names)
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            expected = "hooks that are registered afterwards, for the gradient of each module; or on modules"
            got = "hooks on the gradient of the shared one, which see the sum over all modules"
            raise refusal(ValueError, f"{names} share a parameter with hooks.", expected=expected, got=got)
        if spans_ranks([param]):
            expected = "a model before fully_shard, or another that shards, is applied to it"
            raise refusal(
                ValueError, f"{names} share a sharded parameter.", expected=expected, got=type(param).__name__
            )
    for param, held in shared.items():
        for module, name, _ in held[1:]:
            own = copy.deepcopy(param)
            own.__dict__.update(param.__dict__)
            if hasattr(param, "grad_dtype") and param.grad_dtype != own.grad_dtype:
                own.grad_dtype = param.grad_dtype
            setattr(module, name, own)
    parts = [[(Part(place, Whole, 0, None), None) for place in held] for held in shared.values()]  # type: ignore[arg-type]
    return [tie_of(part, Options("sum")) for part in parts]
