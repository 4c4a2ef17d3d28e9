"""What every kernel computes with: exp and sigmoid to a few units in the last place, and rounding to x's dtype."""

# Triton compiles this file: its constants and tuples are not those that a type checker sees.
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, which cuts a bfloat16 off where hardware rounds it."""


@triton.jit
def exp(x):
    """``exp(x)`` of x <= 0 in float32: by one product with log2(e) it would be off by 7e-6 of itself at x = -80.

    Below -87.3 it is 0 on NVIDIA's GPUs, where a result has no subnormal numbers.
    """
    x = tl.where(x < -150.0, -150.0, x)  # so that -inf gives 0, and NaN stays NaN
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    # log(2) in two parts, the first of 9 bits: its product with a whole number is exact.
    rest = (x - whole * 0.693359375) + whole * 2.12194440054690583e-4
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """A float32 in another dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, even.to(tl.float32, bitcast=True), value)  # NaN stays
    return value.to(dtype)
