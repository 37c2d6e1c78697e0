"""Numbers of one dtype as numbers of another, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from tieopt.tensors import column, wide_dtype

# The lowest bits of a float64. For rounding to 16 bits it matters only whether all of them are zero.
_CUT_OFF = 2**40 - 1

# To see tensors bit for bit.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in another dtype, rounded once.

    torch takes float64 to 8 and 16 bits by way of float32. A value that float32 rounds to the middle between two
    numbers may then be rounded to the wrong one. So first all but 13 significant bits, which float32 represents, are
    cut off, and the last of these is set if anything was lost. With two bits more than float16 has it is known on which
    side of the middle a value is (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    if values.is_complex():
        return torch.view_as_complex(rounded(torch.view_as_real(values), dtype.to_real()))
    if values.dtype != torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    pattern = values.view(torch.int64)
    # A carry goes into the last bit that is kept, unless all bits that are cut off are zero.
    odd = pattern.bitwise_and(_CUT_OFF).add_(_CUT_OFF).bitwise_or_(pattern).bitwise_and_(~_CUT_OFF)
    return odd.view(torch.float64).to(dtype)


def signed_(values: Tensor, signs: Tensor) -> Tensor:
    """Multiply slices by 1 or -1, in place; bit for bit, so that a NaN that is negated has the other sign, too."""
    if values.element_size() == 1:
        # Some 8-bit floats have no negative zero. What is not negated keeps its bits.
        negated = values.float().neg_().to(values.dtype).view(torch.uint8)
        bits = values.view(torch.uint8)
        bits.copy_(torch.where(column(signs < 0, values), negated, bits))
        return values
    dtype = INTEGERS[values.element_size()]
    flipped = signs.to(dtype) & torch.iinfo(dtype).min
    values.view(dtype).bitwise_xor_(column(flipped, values))
    return values


def multiplied(values: Tensor, multiples: Tensor | None, shifts: Tensor | None, stored: torch.dtype) -> Tensor:
    """Return multiples of slices plus shifts, rounded once to the dtype in which they are stored.

    Args:
        values: the slices. Of finite ones the results are finite.
        multiples: one for each slice; None if all are 1.
        shifts: of a shape that broadcasts to that of the slices; None if all are 0.
        stored: the dtype in which the results are stored, which have it.
    """
    wide = values.to(wide_dtype(values.device))
    results = wide if multiples is None else wide * column(multiples.to(wide.dtype), wide)
    return rounded(clamped(results if shifts is None else results + shifts, wide, stored), stored)


def clamped(values: Tensor, origins: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values, limited to the range of a dtype where their origins are finite."""
    largest = torch.finfo(dtype).max
    return torch.where(origins.isfinite(), values.clamp(-largest, largest), values)


def times(slices: Tensor, factors: Tensor) -> Tensor:
    """Return slices, each times its factor, rounded once."""
    if bool((factors == 1).all()):
        return slices
    wide = wide_dtype(slices.device)
    factors = factors.to(slices.device, wide)
    return rounded(
        slices.to(wide.to_complex() if slices.is_complex() else wide) * column(factors, slices), slices.dtype
    )
