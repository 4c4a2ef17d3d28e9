"""Sinkhorn on a block of tokens in registers, ``[B, NP, NP]``; what is beyond n streams is 0.

The way back keeps the total of each pass, ``[B, K, NP]``: a pass divides by it, so a product gives its input again.
"""

# Triton compiles this file: its constants and tuples are not those that a type checker sees.
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from torch_impl.kernels.arithmetic import exp, rounded

LOWEST = tl.constexpr(float("-inf"))
"""A logit beyond n: it loses against every other, also where a whole line is -inf and must give NaN."""
COLUMNS = tl.constexpr(1)
"""The axis that a pass over columns sums over; a pass over rows sums over 2."""


@triton.jit
def inside(N: tl.constexpr, NP: tl.constexpr):
    """Where a matrix ``[1, NP, NP]`` has entries."""
    line = tl.arange(0, NP) < N
    return line[None, :, None] & line[None, None, :]


@triton.jit
def limited(z, limit, LIMITED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """The logits clipped, `LOWEST` beyond n."""
    if LIMITED:
        z = tl.where(z > limit, limit, tl.where(z < -limit, -limit, z))
    return tl.where(inside(N, NP), z, LOWEST)


@triton.jit
def softmax(z, AXIS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    e = tl.where(inside(N, NP), exp(z - tl.expand_dims(tl.max(z, AXIS), AXIS)), 0.0)
    total = tl.sum(e, AXIS)
    if N < NP:
        total = tl.where(tl.arange(0, NP)[None, :] < N, total, 1.0)
    return e / tl.expand_dims(total, AXIS)


@triton.jit
def start(z, eps, START: tl.constexpr, A: tl.constexpr, GUARD: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """What the passes begin with, as `residual.sinkhorn` writes it; A is the axis of the first of them."""
    if START == 0:
        p = exp(z - tl.expand_dims(tl.max(z, A), A))
    elif GUARD == "none":  # each line across times a factor, which the next pass divides out again
        level = tl.where(inside(N, NP), z - tl.expand_dims(tl.max(z, START), START), LOWEST)
        factor = tl.max(level, 3 - START)
        total = tl.sum(exp(level), START)
        p = exp(level - tl.expand_dims(factor, 3 - START)) / tl.expand_dims(total, START)
    else:
        p = softmax(z, START, N, NP)
        if GUARD == "add":
            p = p + eps
    return tl.where(inside(N, NP), p, 0.0)


@triton.jit
def divisor(total, eps, GUARD: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """What a pass divides by, of the totals ``[B, NP]``; 1 beyond n."""
    if GUARD == "add" or GUARD == "denominator":
        total = total + eps
    elif GUARD == "clip":
        total = tl.where(total < eps, eps, total)
    if N < NP:
        total = tl.where(tl.arange(0, NP)[None, :] < N, total, 1.0)
    return total


@triton.jit
def one_pass(p, eps, AXIS: tl.constexpr, GUARD: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    return p / tl.expand_dims(divisor(tl.sum(p, AXIS), eps, GUARD, N, NP), AXIS)


@triton.jit
def balanced(
    z, eps, limit, pairs, START: tl.constexpr, A: tl.constexpr, ODD: tl.constexpr, GUARD: tl.constexpr,
    LIMITED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """H ``[B, NP, NP]`` of the logits; ``pairs`` passes over A and the other axis, and one more over A if ODD."""
    p = start(limited(z, limit, LIMITED, N, NP), eps, START, A, GUARD, N, NP)
    for _ in range(pairs):
        p = one_pass(p, eps, A, GUARD, N, NP)
        p = one_pass(p, eps, 3 - A, GUARD, N, NP)
    if ODD:
        p = one_pass(p, eps, A, GUARD, N, NP)
    return p


@triton.jit
def kept_pass(p, totals, at, k, eps, AXIS: tl.constexpr, GUARD: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """A pass, and its total at the k-th place of those that are kept."""
    total = tl.sum(p, AXIS)
    totals = tl.where(at == k, total[:, None, :], totals)
    return p / tl.expand_dims(divisor(total, eps, GUARD, N, NP), AXIS), totals


@triton.jit
def pass_back(p, g, totals, at, k, eps, AXIS: tl.constexpr, GUARD: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """The input of the k-th pass from its output p, and the cotangent of the input from g."""
    total = tl.sum(tl.where(at == k, totals, 0.0), 1)  # [B, NP]
    by = tl.expand_dims(divisor(total, eps, GUARD, N, NP), AXIS)
    inner = tl.sum(p * g, AXIS)
    if GUARD == "clip":
        inner = tl.where(total < eps, 0.0, inner)
    g = (g - tl.expand_dims(inner, AXIS)) / by
    if N < NP:
        g = tl.where(inside(N, NP), g, 0.0)
    return p * by, g


@triton.jit
def pulled(
    raw, g, eps, limit, pairs, START: tl.constexpr, A: tl.constexpr, ODD: tl.constexpr, GUARD: tl.constexpr,
    LIMITED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The cotangent of the logits ``[B, NP, NP]`` from that of H, which is 0 beyond n."""
    z = limited(raw, limit, LIMITED, N, NP)
    first = start(z, eps, START, A, GUARD, N, NP)
    p = first
    at = tl.arange(0, K)[None, :, None]
    totals = tl.zeros([B, K, NP], dtype=tl.float32)
    for i in range(pairs):
        p, totals = kept_pass(p, totals, at, 2 * i, eps, A, GUARD, N, NP)
        p, totals = kept_pass(p, totals, at, 2 * i + 1, eps, 3 - A, GUARD, N, NP)
    if ODD:
        p, totals = kept_pass(p, totals, at, 2 * pairs, eps, A, GUARD, N, NP)
        p, g = pass_back(p, g, totals, at, 2 * pairs, eps, A, GUARD, N, NP)
    for back in range(pairs):
        i = pairs - 1 - back
        p, g = pass_back(p, g, totals, at, 2 * i + 1, eps, 3 - A, GUARD, N, NP)
        p, g = pass_back(p, g, totals, at, 2 * i, eps, A, GUARD, N, NP)
    if START == 0:
        g = g * first
        largest = tl.expand_dims(tl.argmax(z, A), A)  # the maximum that was taken off has its gradient at one entry
        line = tl.arange(0, NP)
        index = line[None, :, None] if A == COLUMNS else line[None, None, :]
        g = g - tl.where(index == largest, tl.expand_dims(tl.sum(g, A), A), 0.0)
    else:
        soft = softmax(z, START, N, NP)
        g = g * (first if GUARD == "none" else soft)
        g = g - soft * tl.expand_dims(tl.sum(g, START), START)
    if LIMITED:
        g = tl.where((raw <= limit) & (raw >= -limit), g, 0.0)  # 0 for NaN too, as `Tensor.clamp` has it
    return g


@triton.jit
def matrices(start_at, tokens, ok, stride, N: tl.constexpr, NP: tl.constexpr):
    """Pointers to the matrices ``[n, n]`` of a block of tokens, and where they point to something."""
    line = tl.arange(0, NP)
    entry = line[None, :, None] * N + line[None, None, :]
    return start_at + tokens[:, None, None] * stride + entry, ok[:, None, None] & inside(N, NP)


@triton.jit(do_not_specialize=["T", "pairs"])
def balance_kernel(
    logits, H, T, eps, limit, pairs, START: tl.constexpr, A: tl.constexpr, ODD: tl.constexpr, GUARD: tl.constexpr,
    LIMITED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """H ``[T, n, n]`` of logits ``[T, n, n]``."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    at, ok = matrices(logits, t.to(tl.int64), t < T, N * N, N, NP)
    z = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    p = balanced(z, eps, limit, pairs, START, A, ODD, GUARD, LIMITED, N, NP)
    at, ok = matrices(H, t.to(tl.int64), t < T, N * N, N, NP)
    tl.store(at, rounded(p, H.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["T", "pairs"])
def balance_back_kernel(
    logits, cotangent, result, T, eps, limit, pairs, START: tl.constexpr, A: tl.constexpr, ODD: tl.constexpr,
    GUARD: tl.constexpr, LIMITED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The cotangent of logits ``[T, n, n]`` from that of H."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    at, ok = matrices(logits, t.to(tl.int64), t < T, N * N, N, NP)
    z = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    at, ok = matrices(cotangent, t.to(tl.int64), t < T, N * N, N, NP)
    g = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    g = pulled(z, g, eps, limit, pairs, START, A, ODD, GUARD, LIMITED, N, NP, B, K)
    at, ok = matrices(result, t.to(tl.int64), t < T, N * N, N, NP)
    tl.store(at, rounded(g, result.dtype.element_ty), mask=ok)
