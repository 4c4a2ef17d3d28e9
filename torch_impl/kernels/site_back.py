"""The way back from u and the coefficients to x and the projections, in three kernels on blocks of tokens::

of_gates[i] = sum_c x[i, c] du[c]                                   # `read_back_kernel`
dz, dsums, slope = by way of the gates, Sinkhorn and the norm       # `small_back_kernel`: m numbers a token
dx = dsums phi^T + slope x + gates du + further                     # `large_back_kernel`: dx is written once
dphi = dsums^T x                                                    # ... and each program has channels of its own
"""

# Triton compiles this file: its constants and tuples are not those that a type checker sees.
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from torch_impl.kernels.arithmetic import rounded, sigmoid
from torch_impl.kernels.balancing import matrices, pulled
from torch_impl.kernels.mixing import streams
from torch_impl.kernels.site import gate_columns, root, shares, total


@triton.jit(do_not_specialize=["T", "each"])
def read_back_kernel(
    x, du, parts, T, C, CHUNK, each,
    N: tl.constexpr, NP: tl.constexpr, B: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The cotangents of the gates that read u, ``[n]`` a token, over ``each`` chunks of channels."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    ok = t < T
    value = tl.zeros([B, NP], dtype=tl.float32)
    for chunk in range(tl.program_id(1) * each, (tl.program_id(1) + 1) * each):
        own = tl.zeros([B, NP], dtype=tl.float32)
        for c0 in range(chunk * CHUNK, (chunk + 1) * CHUNK, BC):
            c = c0 + tl.arange(0, BC)
            inside = ok[:, None] & (c < C)[None, :]
            xs = streams(x, t, c, inside, C, N, NP)
            at = t.to(tl.int64)[:, None] * C + c[None, :]
            own += tl.sum(xs * tl.load(du + at, mask=inside, other=0.0).to(tl.float32)[:, None, :], 2)
        value += own
    line = tl.arange(0, NP)[None, :]
    at = (tl.program_id(1) * T + t.to(tl.int64))[:, None] * N + line
    tl.store(parts + at, value, mask=ok[:, None] & (line < N))


@triton.jit
def _norm_slopes(squares, count, norm_eps, MEAN: tl.constexpr):
    """1 / rms, and its relative slope by the sum of squares."""
    by = 1.0 / root(squares, count, norm_eps, MEAN)
    if MEAN:
        return by, -0.5 / (squares / count + norm_eps) / count
    own = tl.sqrt(squares / count)
    return by, tl.where(own == 0.0, 0.0, -0.5 * by / own / count)


@triton.jit
def normed(sums, by, dtype: tl.constexpr, NORMED: tl.constexpr):
    """The projections of the normed streams: rounded, or divided by the root now."""
    if NORMED:
        return rounded(sums, dtype).to(tl.float32)
    return sums * by


@triton.jit(do_not_specialize=["T", "parts_count", "pairs"])
def small_back_kernel(
    sums, scale, shift, table, parts, dpre, dpost, dH, dz, dzh, dsums, slope, gates, dcarried,
    T, parts_count, m, count, norm_eps, pre_eps, post_scale, eps, limit, pairs,
    KIND: tl.constexpr, MEAN: tl.constexpr, NORMED: tl.constexpr, HEAD: tl.constexpr,
    OWN: tl.constexpr, CARRIED: tl.constexpr, OF_PRE: tl.constexpr, OF_POST: tl.constexpr, OF_H: tl.constexpr,
    START: tl.constexpr, A: tl.constexpr, ODD: tl.constexpr, GUARD: tl.constexpr, LIMITED: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """What is small: the cotangents of the logits dz, dz times the normed sums, of the sums, and the slope of x.

    Args:
        sums: ``[T, m + 1]``, as dz, dzh and dsums are ``[T, m]``; slope ``[T]``; ``count`` is n * C.
        scale, shift, table: as for `site.finish_kernel`.
        parts: ``[parts_count, T, n]`` of `read_back_kernel`; they belong to this site's own gates with OWN, to those
            that were carried with CARRIED, and there are none with neither.
        gates, dcarried: ``[T, n]``, written with OWN and with CARRIED; gates have the dtype of the coefficients.
        dpre, dpost, dH: read with OF_PRE, OF_POST and OF_H.
    """
    t = tl.program_id(0) * B + tl.arange(0, B)
    ok = t < T
    tall = t.to(tl.int64)[:, None]
    column = tl.arange(0, 16)[None, :]
    index, is_one = gate_columns(N, NP, HEAD)
    has = ok[:, None] & is_one[None, :]
    squares = tl.load(sums + t.to(tl.int64) * (m + 1) + m, mask=ok, other=1.0)
    by, relative = _norm_slopes(squares, count, norm_eps, MEAN)
    h = tl.load(sums + tall * (m + 1) + index[None, :], mask=has, other=0.0)
    h = normed(h, by[:, None], gates.dtype.element_ty, NORMED)
    scales = tl.load(scale + index, mask=is_one, other=0.0)[None, :]
    shifts = tl.load(shift + index, mask=is_one, other=0.0)[None, :]
    open_by = sigmoid(scales * h + shifts)
    g = tl.zeros([B, 16], dtype=tl.float32)
    of_pre = ok[:, None] & (column < N)
    if OF_PRE:
        g += tl.load(dpre + tall * N + column, mask=of_pre, other=0.0).to(tl.float32)
    if OWN or CARRIED:
        of_gates = total(parts, T, parts_count, N, tall * N + column, of_pre, [B, 16])
        if OWN:
            g += of_gates
            tl.store(gates + tall * N + column, rounded(open_by + pre_eps, gates.dtype.element_ty), mask=of_pre)
        else:
            tl.store(dcarried + tall * N + column, of_gates, mask=of_pre)
    if OF_POST:
        of_post = ok[:, None] & (column >= NP) & (column < NP + N)
        g += post_scale * tl.load(dpost + tall * N + column - NP, mask=of_post, other=0.0).to(tl.float32)
    g = g * open_by * (1.0 - open_by)
    tl.store(dz + tall * m + index[None, :], g, mask=has)
    tl.store(dzh + tall * m + index[None, :], g * h, mask=has)
    tl.store(dsums + tall * m + index[None, :], g * scales * by[:, None], mask=has)
    along = tl.sum(tl.where(has, g * scales * h, 0.0), 1)
    if KIND == "sinkhorn":
        entry, inside = matrices(2 * N, t.to(tl.int64), ok, m + 1, N, NP)
        h = tl.load(sums + entry, mask=inside, other=0.0)
        h = normed(h, by[:, None, None], gates.dtype.element_ty, NORMED)
        entry, beside = matrices(2 * N, tl.zeros([B], dtype=tl.int64), ok, 0, N, NP)
        scales = tl.load(scale + entry, mask=beside, other=0.0)
        g = tl.zeros([B, NP, NP], dtype=tl.float32)
        if OF_H:
            z = scales * h + tl.load(shift + entry, mask=beside, other=0.0)
            entry, inside = matrices(0, t.to(tl.int64), ok, N * N, N, NP)
            g = tl.load(dH + entry, mask=inside, other=0.0).to(tl.float32)
            g = pulled(z, g, eps, limit, pairs, START, A, ODD, GUARD, LIMITED, N, NP, B, K)
        entry, inside = matrices(2 * N, t.to(tl.int64), ok, m, N, NP)
        tl.store(dz + entry, g, mask=inside)
        tl.store(dzh + entry, g * h, mask=inside)
        tl.store(dsums + entry, g * scales * by[:, None, None], mask=inside)
        along += tl.sum(tl.sum(tl.where(inside, g * scales * h, 0.0), 2), 1)
    if KIND == "permutations":
        place = tl.arange(0, R)
        here = ok[:, None] & (place < WIDTH)[None, :]
        h = tl.load(sums + tall * (m + 1) + 2 * N + place[None, :], mask=here, other=0.0)
        h = normed(h, by[:, None], gates.dtype.element_ty, NORMED)
        scales = tl.load(scale + 2 * N + place, mask=place < WIDTH, other=0.0)[None, :]
        g = tl.zeros([B, R], dtype=tl.float32)
        if OF_H:
            z = scales * h + tl.load(shift + 2 * N + place, mask=place < WIDTH, other=0.0)[None, :]
            share = shares(tl.where((place < WIDTH)[None, :], z, float("-inf")))
            square = tl.arange(0, NP * NP)
            i, j = square // NP, square % NP
            real = ok[:, None] & ((i < N) & (j < N))[None, :]
            received = tl.load(dH + tall * (N * N) + (i * N + j)[None, :], mask=real, other=0.0).to(tl.float32)
            matrix = tl.load(table + place[None, :] * (NP * NP) + square[:, None])  # [NP * NP, R]
            g = share * tl.dot(received, matrix, input_precision="ieee")
            g = g - share * tl.sum(g, 1)[:, None]
        at = tall * m + 2 * N + place[None, :]
        tl.store(dz + at, g, mask=here)
        tl.store(dzh + at, g * h, mask=here)
        tl.store(dsums + at, g * scales * by[:, None], mask=here)
        along += tl.sum(tl.where(here, g * scales * h, 0.0), 1)
    tl.store(slope + t, 2.0 * relative * along, mask=ok)


@triton.jit(do_not_specialize=["T", "segment"])
def large_back_kernel(
    x, du, gates, further, of_gates, of_matrix, dsums, slope, dx, dphi, T, C, m, segment,
    READ: tl.constexpr, FURTHER: tl.constexpr, OF_X: tl.constexpr, OF_PHI: tl.constexpr, HEAD: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx ``[T, n, C]``, and dphi ``[m, n * C]`` of a segment of tokens; a program has channels of one stream.

    Args:
        of_gates, of_matrix: the projections, as `site.sums_kernel` has them.
        gates: ``[T, n]``, that u was read with, for READ.
        further: ``[T, n, C]``, what else comes to x, for FURTHER.
    """
    blocks = tl.cdiv(C, BC)
    i = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    index, is_one = gate_columns(N, NP, HEAD)
    WIDE: tl.constexpr = R if R > 0 else 16
    place = tl.arange(0, WIDE)
    k = (i * C + c)[:, None]
    here = (c < C)[:, None]
    phi_gates = tl.load(of_gates + k * 16 + tl.arange(0, 16)[None, :], mask=here, other=0.0)  # [BC, 16]
    if R > 0:
        phi_matrix = tl.load(of_matrix + k * R + place[None, :], mask=here, other=0.0)  # [BC, R]
    sum_gates, sum_matrix = tl.zeros([16, BC], dtype=tl.float32), tl.zeros([WIDE, BC], dtype=tl.float32)
    first = tl.program_id(1) * segment
    for t0 in range(first, tl.minimum(first + segment, T), B):
        t = t0 + tl.arange(0, B)
        ok = t < T
        tall = t.to(tl.int64)[:, None]
        inside = ok[:, None] & (c < C)[None, :]
        at = tall * (N * C) + i * C + c[None, :]
        xs = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        small = tl.load(dsums + tall * m + index[None, :], mask=ok[:, None] & is_one[None, :], other=0.0)
        if R > 0:
            has = ok[:, None] & (place < WIDTH)[None, :]
            more = tl.load(dsums + tall * m + 2 * N + place[None, :], mask=has, other=0.0)
        if OF_X:
            value = tl.load(slope + t, mask=ok, other=0.0)[:, None] * xs
            value = tl.dot(small, tl.trans(phi_gates), value, input_precision="ieee")
            if R > 0:
                value = tl.dot(more, tl.trans(phi_matrix), value, input_precision="ieee")
            if READ:
                gate = tl.load(gates + t.to(tl.int64) * N + i, mask=ok, other=0.0).to(tl.float32)
                value += gate[:, None] * tl.load(du + tall * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            if FURTHER:
                value += tl.load(further + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + at, rounded(value, dx.dtype.element_ty), mask=inside)
        if OF_PHI:
            sum_gates = tl.dot(tl.trans(small), xs, sum_gates, input_precision="ieee")
            if R > 0:
                sum_matrix = tl.dot(tl.trans(more), xs, sum_matrix, input_precision="ieee")
    if OF_PHI:
        to = dphi + tl.program_id(1).to(tl.int64) * m * N * C + (i * C + c)[None, :]
        kept = is_one[:, None] & (c < C)[None, :]
        tl.store(to + index[:, None].to(tl.int64) * (N * C), sum_gates, mask=kept)
        if R > 0:
            kept = (place < WIDTH)[:, None] & (c < C)[None, :]
            tl.store(to + (2 * N + place)[:, None].to(tl.int64) * (N * C), sum_matrix, mask=kept)
