"""Parameters that are a single number, of shape (): tied as those of shape (1,) are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import every_pair
from checks import same_bits
from ranks import Ranks
from strategies import ALL
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn import Parameter
from torch.optim import ASGD, LBFGS, SGD, Adagrad, Adam, NAdam, Optimizer, RMSprop, Rprop

from tieopt import Tie, TiedOptimizer, export, frozen, is_tied, plot, tie_
from tieopt.testing import assert_equivalent, assert_tied

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, lr=0.1, momentum=0.9),
    "Adam": partial(Adam, lr=0.1),
    "Adam, foreach": partial(Adam, lr=0.1, foreach=True, amsgrad=True),
    "Adam, fused": partial(Adam, lr=0.1, fused=True),
    "NAdam": partial(NAdam, lr=0.1),
    "ASGD": partial(ASGD, lr=0.1, t0=1),
    "Adagrad": partial(Adagrad, lr=0.1),
    "RMSprop": partial(RMSprop, lr=0.1, momentum=0.9),
    "Rprop": partial(Rprop, lr=0.1),
}


def joined(params: Sequence[Tensor], **second: Any) -> Tie:
    return Tie.join(Tie(params[0], [[0]]), Tie(params[1], torch.tensor([0]), **second))


TIES: dict[str, Callable[[Sequence[Tensor]], Tie]] = {
    "equal": lambda params: Tie.equal(*params[:2]),
    "negative": partial(joined, scale=torch.tensor([-1.0])),
    "multiple": partial(joined, scale=torch.tensor([-2.0])),
    "offset": partial(joined, offset=3.0),
    "frozen": lambda params: frozen(params[0], [0]),
    "pinned": lambda params: Tie(params[0], torch.tensor([0]), scale=torch.tensor([0.0])),
}


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(torch.full(shape, value).to(dtype)) for value in (0.75, 2.0, 5.0)]


def train(optimizer: Optimizer, params: Sequence[Parameter], steps: range) -> None:
    for step in steps:
        for number, param in enumerate(params):
            param.grad = torch.full_like(param, 0.5 * number + step - 1)
        optimizer.step(lambda: 0.0)


@every_pair(optimizer=OPTIMIZERS, tie=TIES, reduction=["mean", "sum"], compact=[False, True])
def test_a_number_is_trained_as_a_vector_of_one_entry(optimizer: str, tie: str, reduction: str, compact: bool) -> None:
    make, made, results = OPTIMIZERS[optimizer], TIES[tie], []
    others = [not compact, compact]
    for shape in ((), (1,)):
        params = numbers(shape)
        # Numbers that were trained before, one of them longer.
        inner = make(params)
        for step in range(2):
            for number, param in enumerate(params[: 3 - step]):
                param.grad = torch.full_like(param, 1.0 + number)
            inner.step()
            inner.zero_grad()
        tied = TiedOptimizer(inner, made(params), reduction=reduction, compact=compact, start="first")
        train(tied, params, range(3))
        # There and back again through the state of the other mode, and without ties.
        for other in others:
            params = [Parameter(param.detach().clone()) for param in params]
            state, tied = (
                tied.state_dict(),
                TiedOptimizer(make(params), made(params), reduction=reduction, compact=other),
            )
            tied.load_state_dict(state)
            train(tied, params, range(3, 5))
        assert tied.tie_drift() == 0
        tied.untie()
        results.append((params, tied.state_dict()["state"]))
    for number, vector in zip(*(params for params, _ in results), strict=True):
        assert number.shape == ()
        assert torch.equal(number, vector[0])
    for key, held in results[1][1].items():
        for name, value in held.items():
            assert torch.equal(torch.as_tensor(results[0][1][key][name]), torch.as_tensor(value).squeeze()), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_new_number_goes_on_with_the_state_of_the_one_that_it_is_joined_with(optimizer: str, compact: bool) -> None:
    make, results = OPTIMIZERS[optimizer], []
    for shape in ((), (1,)):
        trained, new, _ = numbers(shape)
        inner = make([trained])
        train(inner, [trained], range(2))
        inner.add_param_group({"params": [new]})
        tied = TiedOptimizer(inner, Tie.equal(trained, new), compact=compact, start="first")
        train(tied, [trained, new], range(2, 4))
        results.append(new.detach().flatten())
    assert torch.equal(*results)


def test_lbfgs_trains_numbers(compact: bool) -> None:
    params = numbers(())
    reduction = "sum" if compact else "mean"
    optimizer = TiedOptimizer(LBFGS(params), Tie.equal(*params[:2]), reduction=reduction, compact=compact)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0] * params[1] - 4).square() + params[2].square()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(params[0], params[1])
    torch.testing.assert_close(params[0].detach(), torch.tensor(2.0))


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("start", ["mean", "first"])
def test_numbers_of_every_dtype_are_joined(dtype: torch.dtype, start: str) -> None:
    params, vectors = numbers((), dtype), numbers((1,), dtype)
    for tensors in (params, vectors):
        TiedOptimizer(SGD(tensors), Tie.equal(*tensors), start=start)
    for number, vector in zip(params, vectors, strict=True):
        assert same_bits(number, vector[0])


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.temperature = Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.temperature


def test_a_temperature_in_two_modules_is_shared() -> None:
    assert_equivalent(
        lambda: nn.Sequential(Scored(), nn.Tanh(), Scored()),
        lambda named: Adam(named, lr=0.01),
        Tie.equal("*.temperature"),
        [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double() for seed in range(4)],
        loss=lambda model, batch: model(batch).square().mean(),
    )


def test_what_ties_and_shows_tensors_takes_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, loaded = nn.Sequential(Scored(), Scored()), nn.Sequential(Scored(), Scored())
    with torch.no_grad():
        model[1].temperature.fill_(3.0)
    optimizer = TiedOptimizer(SGD(model.named_parameters(), lr=0.1), Tie.equal(*model))
    assert model[0].temperature == model[1].temperature == 2.25
    assert_tied(model, Tie.equal("*.temperature"))
    assert "0.temperature" in str(optimizer.tie_summary())
    assert "1.temperature\n()" in [axes.get_title() for axes in plot.draw_groups(optimizer).axes]
    export.save(model, optimizer, tmp_path / "model.safetensors")
    loaded.load_state_dict(export.load(tmp_path / "model.safetensors"))
    assert loaded[1].temperature == 2.25
    with torch.no_grad():
        model[1].temperature.fill_(7.0)
    with pytest.raises(
        AssertionError, match=re.escape("2.25 at (), as another member of its group says\n  Got:      7.0")
    ):
        assert_tied(model, Tie.equal("*.temperature"))


def test_a_number_is_an_element_of_a_matrix(compact: bool) -> None:
    number, matrix = Parameter(torch.tensor(1.0)), Parameter(torch.arange(12.0).view(4, 3))
    element = torch.full((4, 3), -1)
    element[3, 1] = 0
    ties = [Tie.join(Tie(number, [[0]]), Tie(matrix, element)), Tie(matrix, [[0, 1]])]
    optimizer = TiedOptimizer(Adam([number, matrix], lr=0.1), ties, compact=compact)
    for step in range(3):
        number.grad, matrix.grad = torch.tensor(1.0 + step), torch.ones(4, 3)
        optimizer.step()
    assert number == matrix[3, 1]
    assert torch.equal(matrix[0], matrix[1])
    (united,) = Tie.union(ties[0], Tie(matrix, [[2, 3]]))
    TiedOptimizer(Adam([number, matrix]), united, compact=compact)
    assert number == matrix[2, 1] == matrix[3, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_numbers_with_offsets_are_written_and_read(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.ParameterList(numbers((), dtype))
    ties = [Tie.join(Tie("0", [[0]]), Tie("1", [[0]], offset=1.0)), frozen("2", [0])]
    optimizer = TiedOptimizer(SGD(model.named_parameters(), lr=0.1), ties)
    export.save(model, optimizer, tmp_path / "model.safetensors")
    loaded = export.load(tmp_path / "model.safetensors")
    assert all(same_bits(value, loaded[name]) for name, value in model.state_dict().items())


def trained_on_ranks(shape: tuple[int, ...], tie: str) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [Parameter(distribute_tensor(param.detach(), mesh, [Replicate()])) for param in numbers(shape)]
    optimizer = TiedOptimizer(Adam(params, lr=0.1), TIES[tie](params), reduction="sum")
    for number, param in enumerate(params):
        param.grad = distribute_tensor(torch.full(shape, 1.0 + number), mesh, [Replicate()])
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.tie_drift() == 0
    whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in (*params, norm))
    return [tensor.detach() for tensor in whole]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.parametrize("tie", TIES)
def test_numbers_on_a_mesh_are_trained_as_vectors(two_ranks: Ranks, tie: str) -> None:
    scalars, vectors = (two_ranks.run(trained_on_ranks, shape, tie) for shape in ((), (1,)))
    for some, others in zip(scalars, vectors, strict=True):
        for number, vector in zip(some, others, strict=True):
            assert torch.equal(number, vector.squeeze())
            assert number.shape == ()


def test_functions_of_tensors_take_numbers() -> None:
    number = torch.tensor(2.0)
    assert is_tied(number, [[0]])
    assert tie_(number, [[0]], scale=torch.tensor([0.0])) is number
    assert number == 0
    with pytest.raises(IndexError, match="indices from 0 to 0"):
        tie_(number, [[1]])
    with pytest.raises(ValueError, match=re.escape("Expected:  (1,), one label for each slice along dimension 0")):
        Tie(number, torch.tensor(0))
    with pytest.raises(IndexError, match="an integer from -1 to 0"):
        Tie(number, [[0]], dim=1)
    with pytest.raises(ValueError, match="differ in shape"):
        Tie.equal(number, torch.zeros(1))
