"""What ``torch.compile`` sees of the ties, run without it: the same numbers for ties of every kind."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import same_bits
from strategies import laid_out, layouts, normal, reductions, seeds
from torch.nn import Parameter
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer
from tieopt.engine import graphs
from tieopt.testing import ties

small = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def as_compiled() -> Any:
    """What asks whether there is a compiler is told so, and what is for that runs."""
    return patch("torch._C._dynamo.eval_frame.get_eval_frame_callback", return_value=object())


@pytest.fixture(autouse=True, scope="module")
def _small_ties_are_written_out_as_well() -> Iterator[None]:
    with patch("tieopt.engine.compiled._LEAST", 1), patch("tieopt.engine.engine.ONE_PART", 0):
        yield


@pytest.mark.skipif(not graphs._GETS_TIES, reason="this compiler is not given the ties")
def test_what_is_for_a_compiler_runs_here() -> None:
    with as_compiled():
        assert graphs.is_under_compiler()


@given(st.data())
def test_a_step_as_it_is_traced_is_the_step(compact: bool, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    starts = [normal(data.draw(small), dtype, data.draw(seeds)) for _ in range(data.draw(st.integers(1, 3)))]
    ordered = [data.draw(layouts(start)) for start in starts]
    params = [Parameter(laid_out(start, layout)) for start, layout in zip(starts, ordered, strict=True)]
    twins = [Parameter(laid_out(start, layout)) for start, layout in zip(starts, ordered, strict=True)]
    drawn, reduction, steps = data.draw(ties(params)), data.draw(reductions), data.draw(st.lists(seeds, max_size=3))
    twin_of = {id(param): twin for param, twin in zip(params, twins, strict=True)}
    again = [
        Tie.join(*(Tie(twin_of[id(part.param)], part.groups, dim=part.dim, scale=part.scale) for part in tie.parts))
        for tie in drawn
    ]
    plain = TiedOptimizer(SGD(params, lr=0.1, momentum=0.9), drawn, reduction=reduction, compact=compact)
    traced = TiedOptimizer(SGD(twins, lr=0.1, momentum=0.9), again, reduction=reduction, compact=compact)

    for seed in steps:
        for each in (params, twins):
            for number, param in enumerate(each):
                param.grad = normal(param.shape, dtype, seed + number)
        plain.step()
        with as_compiled():
            traced.step()

    assert traced.tie_drift() == 0
    # Means are rounded once, but added up in another order; "sum" may have a factor of as many as there are members.
    close = {"rtol": 64 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(twin, param, **close)


@given(st.data())
def test_tied_weights_keep_their_bits_as_they_are_traced(data: st.DataObject) -> None:
    param = Parameter(normal(data.draw(small), data.draw(st.sampled_from(DTYPES)), data.draw(seeds)))
    optimizer = TiedOptimizer(SGD([param], lr=0.1), data.draw(ties([param])))
    before = param.detach().clone()

    with as_compiled():
        optimizer.tie_weights()

    assert same_bits(param, before)


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_relaxed_ties_are_pulled_together_as_they_are_traced(strength: float) -> None:
    ends = []
    for traced in (False, True):
        param = Parameter(normal((6, 3), torch.float32, 0))
        optimizer = TiedOptimizer(SGD([param], lr=0.1), {param: [[0, 2], [1, 3, 4]]}, strength=strength)
        param.grad = normal((6, 3), torch.float32, 1)
        if traced:
            with as_compiled():
                optimizer.step()
        else:
            optimizer.step()
        ends.append(param)

    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("free", [0, 40])
def test_large_groups_of_one_size_are_written_out(size: int, free: int, reduction: str, compact: bool) -> None:
    rows = 960
    names = (torch.arange(rows) * 7 % rows) // size
    names[names >= (rows - free) // size] = -1
    ends = []
    for traced in (False, True):
        param = Parameter(normal((rows, 40), torch.float32, 0))
        optimizer = TiedOptimizer(
            SGD([param], lr=0.1, momentum=0.9), {param: names}, reduction=reduction, compact=compact
        )
        for seed in range(1, 4):
            param.grad = normal((rows, 40), torch.float32, seed)
            with as_compiled() if traced else nullcontext():
                optimizer.step()
        assert optimizer.tie_drift() == 0
        ends.append(param)

    torch.testing.assert_close(*ends)
