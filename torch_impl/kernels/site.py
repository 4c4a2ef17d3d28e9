"""From x to u and the coefficients, in two kernels on blocks of tokens::

    sums = [x phi, sum x^2]                     # `sums_kernel`: reads x; with carried gates it writes u as well
    z = scale * sums / rms + shift              # `finish_kernel`: gates, Sinkhorn in registers, u by a second read
    u = sum_i pre[i] * x[i]

Where coefficients are rounded to x's dtype, `squares_kernel` comes first, and the sums are those of the normed streams,
rounded: ``[round(x / rms * norm) phi, sum x^2]``.

The sums over channels are made chunk by chunk, and the chunks are added in their order; how many depends on C alone.
A program takes one chunk where tokens are few and all of them where they are many: a token's bits are the same.
"""

# Triton compiles this file: its constants and tuples are not those that a type checker sees.
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from torch_impl.kernels.arithmetic import exp, rounded, sigmoid
from torch_impl.kernels.balancing import balanced, matrices
from torch_impl.kernels.mixing import streams, written


@triton.jit
def gate_columns(N: tl.constexpr, NP: tl.constexpr, HEAD: tl.constexpr):
    """Which of the m sums a padded column ``[16]`` of gates is, and where it is one: pre from 0, post from NP."""
    column = tl.arange(0, 16)
    if HEAD:
        return column, column < N
    post = column >= NP
    return tl.where(post, N + column - NP, column), (column < N) | (post & (column < NP + N))


@triton.jit(do_not_specialize=["T", "each"])
def squares_kernel(
    x, parts, T, C, CHUNK, each,
    N: tl.constexpr, NP: tl.constexpr, B: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sums of squares, one for each token, over ``each`` chunks of channels."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    ok = t < T
    value = tl.zeros([B], dtype=tl.float32)
    for chunk in range(tl.program_id(1) * each, (tl.program_id(1) + 1) * each):
        own = tl.zeros([B], dtype=tl.float32)
        for c0 in range(chunk * CHUNK, (chunk + 1) * CHUNK, BC):
            c = c0 + tl.arange(0, BC)
            xs = streams(x, t, c, ok[:, None] & (c < C)[None, :], C, N, NP)
            own += tl.sum(tl.sum(xs * xs, 2), 1)
        value += own
    tl.store(parts + tl.program_id(1) * T.to(tl.int64) + t, value, mask=ok)


@triton.jit(do_not_specialize=["T", "each", "squares_count"])
def sums_kernel(
    x, of_gates, of_matrix, parts, carried, u, y, post, H, out, of_squares, norm, T, C, CHUNK, each, m,
    squares_count, norm_eps, NORMED: tl.constexpr, WEIGHTED: tl.constexpr, MEAN: tl.constexpr,
    FUSED: tl.constexpr, ROUNDED: tl.constexpr, READ: tl.constexpr, HEAD: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sums ``[m + 1]`` of each token over ``each`` chunks of channels.

    of_gates ``[n * C, 16]`` and of_matrix ``[n * C, R]`` are the projections, of whose R columns WIDTH count; R is 0
    where H has none. FUSED says how x is mixed first and written to ``out`` ("" where it is there already), READ that
    u ``[T, C]`` is read by carried gates on the way. NORMED says that the streams are normed and rounded first, by the
    sums of squares ``[squares_count, T]``, and WEIGHTED that ``norm`` ``[n * C]`` is their weight. No row has both READ
    and NORMED.
    """
    t = tl.program_id(0) * B + tl.arange(0, B)
    ok = t < T
    tall = t.to(tl.int64)[:, None]
    gates, more, squares = _zeros(B, R)
    if NORMED:
        known = total(of_squares, T, squares_count, 1, t, ok, [B])
        by = root(known, N * C, norm_eps, MEAN)[:, None]
    for chunk in range(tl.program_id(1) * each, (tl.program_id(1) + 1) * each):
        gates_in, more_in, squares_in = _zeros(B, R)
        for c0 in range(chunk * CHUNK, (chunk + 1) * CHUNK, BC):
            c = c0 + tl.arange(0, BC)
            inside = ok[:, None] & (c < C)[None, :]
            value = tl.zeros([B, BC], dtype=tl.float32)
            if FUSED != "":
                former = streams(x, t, c, inside, C, N, NP)
                ys = tl.load(y + tall * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            for i in range(N):  # unrolled it takes six times the shared memory, and spills
                at = tall * (N * C) + i * C + c[None, :]
                if FUSED != "":
                    own = written(i, former, ys, post, H, t, ok, out.dtype.element_ty, FUSED, ROUNDED, N, NP)
                    tl.store(out + at, own, mask=inside)
                    xs = own.to(tl.float32)
                else:
                    xs = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
                if NORMED:
                    xs = xs / by
                    if WEIGHTED:
                        xs = xs * tl.load(norm + i * C + c, mask=c < C, other=0.0)[None, :]
                    xs = rounded(xs, x.dtype.element_ty).to(tl.float32)
                k = (i * C + c)[:, None]
                here = (c < C)[:, None]
                phi = tl.load(of_gates + k * 16 + tl.arange(0, 16)[None, :], mask=here, other=0.0)
                gates_in = tl.dot(xs, phi, gates_in, input_precision="ieee")
                if R > 0:
                    phi = tl.load(of_matrix + k * R + tl.arange(0, R)[None, :], mask=here, other=0.0)
                    more_in = tl.dot(xs, phi, more_in, input_precision="ieee")
                if not NORMED:
                    squares_in += tl.sum(xs * xs, 1)
                if READ:
                    value += tl.load(carried + t.to(tl.int64) * N + i, mask=ok, other=0.0).to(tl.float32)[:, None] * xs
            if READ:
                tl.store(u + tall * C + c[None, :], rounded(value, u.dtype.element_ty), mask=inside)
        gates += gates_in
        squares += squares_in
        if R > 0:
            more += more_in
    if NORMED:
        squares = tl.where(tl.program_id(1) == 0, known, 0.0)  # in one of the parts, which are added up
    to = (parts + (tl.program_id(1) * T + t.to(tl.int64)) * (m + 1))[:, None]
    index, is_one = gate_columns(N, NP, HEAD)
    tl.store(to + index[None, :], gates, mask=ok[:, None] & is_one[None, :])
    if R > 0:
        column = tl.arange(0, R)
        tl.store(to + 2 * N + column[None, :], more, mask=ok[:, None] & (column < WIDTH)[None, :])
    tl.store(parts + (tl.program_id(1) * T + t.to(tl.int64)) * (m + 1) + m, squares, mask=ok)


@triton.jit
def _zeros(B: tl.constexpr, R: tl.constexpr):
    WIDE: tl.constexpr = R if R > 0 else 1
    gates = tl.zeros([B, 16], dtype=tl.float32)
    return gates, tl.zeros([B, WIDE], dtype=tl.float32), tl.zeros([B], dtype=tl.float32)


@triton.jit
def root(squares, count, norm_eps, MEAN: tl.constexpr):
    """The root mean square of ``count`` numbers, with eps where the norm has it."""
    return tl.sqrt(squares / count + norm_eps) if MEAN else tl.sqrt(squares / count) + norm_eps


@triton.jit
def total(parts, T, count, stride, at, ok, SHAPE: tl.constexpr):
    """The sum of the parts at an offset of each token, one part after the other."""
    value = tl.zeros(SHAPE, dtype=tl.float32)
    for index in range(count):
        value += tl.load(parts + index * T.to(tl.int64) * stride + at, mask=ok, other=0.0)
    return value


@triton.jit(do_not_specialize=["T", "parts_count", "pairs"])
def finish_kernel(
    x, parts, scale, shift, table, sums, pre, post, H, u, T, C, parts_count, m, norm_eps, pre_eps, post_scale, post_eps,
    eps, limit, pairs, KIND: tl.constexpr, MEAN: tl.constexpr, NORMED: tl.constexpr, HEAD: tl.constexpr,
    READ: tl.constexpr,
    START: tl.constexpr, A: tl.constexpr, ODD: tl.constexpr, GUARD: tl.constexpr, LIMITED: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The coefficients of a block of tokens, by the program of its first channels, and u of a block of channels.

    Args:
        parts: ``[parts_count, T, m + 1]``, added up into sums ``[T, m + 1]``.
        scale, shift: ``[m]``.
        table: ``[R, NP * NP]``, the permutation matrices, for KIND "permutations".
        NORMED: whether the sums are of the normed streams; then all coefficients are rounded to x's dtype.
        READ: whether u is wanted; it isn't where carried gates read it, or where coefficients alone are.
    """
    t = tl.program_id(0) * B + tl.arange(0, B)
    ok = t < T
    tall = t.to(tl.int64)[:, None]
    index, is_one = gate_columns(N, NP, HEAD)
    has = ok[:, None] & is_one[None, :]
    stride = m + 1
    squares = total(parts, T, parts_count, stride, t.to(tl.int64) * stride + m, ok, [B])
    norm = root(squares, N * C, norm_eps, MEAN)
    gates = total(parts, T, parts_count, stride, tall * stride + index[None, :], has, [B, 16])
    scales = tl.load(scale + index, mask=is_one, other=0.0)[None, :]
    shifts = tl.load(shift + index, mask=is_one, other=0.0)[None, :]
    h = projected(gates, norm[:, None], x.dtype.element_ty, NORMED)
    open_by = sigmoid(scales * h + shifts)
    if tl.program_id(1) == 0:
        tl.store(sums + tall * stride + index[None, :], gates, mask=has)
        tl.store(sums + t.to(tl.int64) * stride + m, squares, mask=ok)
        column = tl.arange(0, 16)[None, :]
        tl.store(
            pre + tall * N + column, rounded(open_by + pre_eps, pre.dtype.element_ty), mask=ok[:, None] & (column < N)
        )
        if not HEAD:
            of_post = ok[:, None] & (column >= NP) & (column < NP + N)
            value = rounded(post_scale * open_by + post_eps, post.dtype.element_ty)
            tl.store(post + tall * N + column - NP, value, mask=of_post)
        if KIND == "sinkhorn":
            entry, inside = matrices(0, t.to(tl.int64), ok, stride, N, NP)
            raw = total(parts, T, parts_count, stride, entry + 2 * N, inside, [B, NP, NP])
            tl.store(sums + entry + 2 * N, raw, mask=inside)
            entry, beside = matrices(2 * N, tl.zeros([B], dtype=tl.int64), ok, 0, N, NP)
            of_H = projected(raw, norm[:, None, None], x.dtype.element_ty, NORMED)
            z = tl.load(scale + entry, mask=beside, other=0.0) * of_H
            z += tl.load(shift + entry, mask=beside, other=0.0)
            p = balanced(z, eps, limit, pairs, START, A, ODD, GUARD, LIMITED, N, NP)
            entry, inside = matrices(0, t.to(tl.int64), ok, N * N, N, NP)
            tl.store(H + entry, rounded(p, H.dtype.element_ty), mask=inside)
        if KIND == "permutations":
            here = ok[:, None] & (tl.arange(0, R) < WIDTH)[None, :]
            raw = total(parts, T, parts_count, stride, tall * stride + 2 * N + tl.arange(0, R)[None, :], here, [B, R])
            of_H = projected(raw, norm[:, None], x.dtype.element_ty, NORMED)
            z = permuted(of_H, scale, shift, N, R, WIDTH)
            column = tl.arange(0, R)[None, :]
            tl.store(sums + tall * stride + 2 * N + column, raw, mask=ok[:, None] & (column < WIDTH))
            square = tl.arange(0, NP * NP)
            matrix = tl.load(table + tl.arange(0, R)[:, None] * (NP * NP) + square[None, :])
            p = tl.dot(shares(z), matrix, input_precision="ieee")
            i, j = square // NP, square % NP
            p = rounded(p, H.dtype.element_ty)
            tl.store(H + tall * (N * N) + (i * N + j)[None, :], p, mask=ok[:, None] & ((i < N) & (j < N))[None, :])
    if READ:
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        inside = ok[:, None] & (c < C)[None, :]
        value = tl.zeros([B, BC], dtype=tl.float32)
        for i in tl.static_range(N):
            gate = tl.sum(tl.where((tl.arange(0, 16) == i)[None, :], open_by, 0.0), 1) + pre_eps
            if NORMED:
                gate = rounded(gate, x.dtype.element_ty).to(tl.float32)
            at = tall * (N * C) + i * C + c[None, :]
            value += gate[:, None] * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(u + tall * C + c[None, :], rounded(value, u.dtype.element_ty), mask=inside)


@triton.jit
def projected(sums, norm, dtype: tl.constexpr, NORMED: tl.constexpr):
    """The projections of the normed streams: rounded, or divided by the root now."""
    if NORMED:
        return rounded(sums, dtype).to(tl.float32)
    return sums / norm


@triton.jit
def permuted(h, scale, shift, N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr):
    """The logits ``[B, R]`` of the permutations, -inf where there is no column."""
    column = tl.arange(0, R)
    here = column < WIDTH
    z = tl.load(scale + 2 * N + column, mask=here, other=0.0)[None, :] * h
    z += tl.load(shift + 2 * N + column, mask=here, other=0.0)[None, :]
    return tl.where(here[None, :], z, float("-inf"))


@triton.jit
def shares(z):
    """A softmax over the columns ``[B, R]``."""
    e = exp(z - tl.max(z, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]
