"""``out_j = post_j y + sum_i H[i, j] x_i`` and its way back on blocks of tokens and channels, ``[B, NP, BC]``.

Streams lie inside a thread, so that a sum over them costs no exchange; n is padded to NP with zeros.
"""

# Triton compiles this file: its constants and tuples are not those that a type checker sees.
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from torch_impl.kernels.arithmetic import rounded


@triton.jit
def streams(x, t, c, inside, C, N: tl.constexpr, NP: tl.constexpr):
    """All streams of some channels ``[B, NP, BC]`` in float32; 0 beyond n and where ``inside [B, BC]`` is False."""
    line = tl.arange(0, NP)
    at = t.to(tl.int64)[:, None, None] * (N * C) + line[None, :, None] * C + c[None, None, :]
    return tl.load(x + at, mask=inside[:, None, :] & (line < N)[None, :, None], other=0.0).to(tl.float32)


@triton.jit
def gates_of(post, t, ok, N: tl.constexpr, NP: tl.constexpr):
    """Gates ``[B, NP]`` in float32, 0 beyond n."""
    line = tl.arange(0, NP)
    at = t.to(tl.int64)[:, None] * N + line[None, :]
    return tl.load(post + at, mask=ok[:, None] & (line < N)[None, :], other=0.0).to(tl.float32)


@triton.jit
def row(H, t, ok, index, FROM: tl.constexpr, TO: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """The entries of H at ``index`` of one side, ``[B, NP]``: ``index * FROM`` and every line times ``TO``."""
    line = tl.arange(0, NP)
    at = t.to(tl.int64)[:, None] * (N * N) + index * FROM + line[None, :] * TO
    return tl.load(H + at, mask=ok[:, None] & (line < N)[None, :], other=0.0).to(tl.float32)


@triton.jit
def written(
    j, xs, y, post, H, t, ok, dtype: tl.constexpr,
    MIX: tl.constexpr, ROUNDED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Stream j of the output ``[B, BC]`` of streams ``[B, NP, BC]`` and y ``[B, BC]``."""
    line = tl.arange(0, NP)
    own = tl.load(post + t.to(tl.int64) * N + j, mask=ok, other=0.0).to(tl.float32)[:, None] * y
    if MIX == "identity":
        across = tl.sum(tl.where((line == j)[None, :, None], xs, 0.0), 1)
    elif MIX == "in-out":
        across = tl.sum(xs * row(H, t, ok, j, 1, N, N, NP)[:, :, None], 1)
    else:
        across = tl.sum(xs * row(H, t, ok, j, N, 1, N, NP)[:, :, None], 1)
    if ROUNDED:
        own, across = rounded(own, dtype).to(tl.float32), rounded(across, dtype).to(tl.float32)
    return rounded(own + across, dtype)


@triton.jit(do_not_specialize=["T"])
def mix_kernel(
    y, x, post, H, out, T, C, MIX: tl.constexpr, ROUNDED: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, B: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The streams ``[T, n, C]`` of y ``[T, C]``, x ``[T, n, C]``, post ``[T, n]`` and H ``[T, n, n]``."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = t < T
    inside = ok[:, None] & (c < C)[None, :]
    tall = t.to(tl.int64)[:, None]
    xs = streams(x, t, c, inside, C, N, NP)
    ys = tl.load(y + tall * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(N):
        value = written(j, xs, ys, post, H, t, ok, out.dtype.element_ty, MIX, ROUNDED, N, NP)
        tl.store(out + tall * (N * C) + j * C + c[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["T", "each"])
def mix_back_kernel(
    y, x, post, H, g, dy, dx, parts, T, C, CHUNK, each, MIX: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, B: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dy ``[T, C]``, dx ``[T, n, C]``, and the sums of ``each`` chunks of channels: dpost ``[n]`` and dH ``[n, n]``."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    ok = t < T
    tall = t.to(tl.int64)[:, None]
    line = tl.arange(0, NP)
    gates = gates_of(post, t, ok, N, NP)
    dpost, dH = tl.zeros([B, NP], dtype=tl.float32), tl.zeros([B, NP, NP], dtype=tl.float32)
    for chunk in range(tl.program_id(1) * each, (tl.program_id(1) + 1) * each):
        own, across = tl.zeros([B, NP], dtype=tl.float32), tl.zeros([B, NP, NP], dtype=tl.float32)
        for c0 in range(chunk * CHUNK, (chunk + 1) * CHUNK, BC):
            c = c0 + tl.arange(0, BC)
            inside = ok[:, None] & (c < C)[None, :]
            gs = streams(g, t, c, inside, C, N, NP)
            ys = tl.load(y + tall * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            value = rounded(tl.sum(gs * gates[:, :, None], 1), dy.dtype.element_ty)
            tl.store(dy + tall * C + c[None, :], value, mask=inside)
            own += tl.sum(gs * ys[:, None, :], 2)
            for i in tl.static_range(N):
                at = tall * (N * C) + i * C + c[None, :]
                if MIX == "identity":
                    value = tl.sum(tl.where((line == i)[None, :, None], gs, 0.0), 1)
                elif MIX == "in-out":
                    value = tl.sum(gs * row(H, t, ok, i, N, 1, N, NP)[:, :, None], 1)
                else:
                    value = tl.sum(gs * row(H, t, ok, i, 1, N, N, NP)[:, :, None], 1)
                tl.store(dx + at, rounded(value, dx.dtype.element_ty), mask=inside)
                if MIX != "identity":
                    xs = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
                    entry = tl.sum(gs * xs[:, None, :], 2)[:, None, :]  # [B, 1, NP], of every stream of the output
                    across += tl.where((line == i)[None, :, None], entry, 0.0)
        dpost += own
        dH += across
    SIDE: tl.constexpr = 0 if MIX == "identity" else N * N
    to = parts + (tl.program_id(1) * T + t.to(tl.int64)) * (N + SIDE)
    tl.store(to[:, None] + line[None, :], dpost, mask=ok[:, None] & (line < N)[None, :])
    if MIX != "identity":
        i, j = line[None, :, None], line[None, None, :]
        entry = i * N + j if MIX == "in-out" else j * N + i
        tl.store(to[:, None, None] + N + entry, dH, mask=ok[:, None, None] & (i < N) & (j < N))


@triton.jit(do_not_specialize=["size", "count"])
def fold_kernel(parts, total, size, count, B: tl.constexpr):
    """The sum ``[size]`` of parts ``[count, size]``, one after the other."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < size
    value = tl.zeros([B], dtype=tl.float32)
    for index in range(count):
        value += tl.load(parts + index * size.to(tl.int64) + at, mask=ok, other=0.0)
    tl.store(total + at, value, mask=ok)
