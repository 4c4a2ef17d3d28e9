"""Launches of the kernels: each function fills results that its caller has made. All tensors are packed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.kernels import balancing, interpreted, mixing, site, site_back
from torch_impl.kernels.plans import (
    Columns,
    aligned,
    blocks,
    blocks_of,
    columns_of,
    fills,
    kept_of,
    kind,
    launch,
    options_of,
    padded,
    plan_of_back,
    plan_of_sums,
    projections,
    registers,
    segments_of,
    sinkhorn,
    split,
    streams_alone,
    table,
)
from torch_impl.projections import coefficient_dtype


def normed(x: Tensor, config: MHCConfig) -> bool:
    """Whether the streams are normed and rounded before they are projected, and coefficients are rounded."""
    return coefficient_dtype(x, config) != torch.float32


def read(
    x: Tensor, carried: Tensor | None, matrix: Tensor, norm: Tensor | None, scale: Tensor, shift: Tensor,
    config: MHCConfig, head: bool,
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fills u, pre, post, H and the sums."""
    u, x = results[0], aligned(x)
    columns, wanted = columns_of(config, head), len(u) > 0
    reading = (carried, u) if wanted and carried is not None else None
    parts, count = _sums(x, matrix, norm, config, columns, reading)
    _finish(x, parts, count, scale, shift, config, columns, results, wanted and carried is None)
    if config.residual == "identity" and not head:
        results[3].copy_(torch.eye(config.streams, device=x.device))


def mix_read(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mixer: MHCConfig, carried: Tensor | None, matrix: Tensor,
    scale: Tensor, shift: Tensor, config: MHCConfig, out: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fills the streams that a site writes, and u, pre, post, H and the sums of the next."""
    y, x, post, H = aligned(y), aligned(x), aligned(post), None if H is None else aligned(H)
    columns, reading = columns_of(config, False), None if carried is None else (carried, results[0])
    parts, count = _sums(x, matrix, None, config, columns, reading, (y, post, H, mixer, out))
    _finish(out, parts, count, scale, shift, config, columns, results, carried is None)
    if config.residual == "identity":
        results[3].copy_(torch.eye(config.streams, device=x.device))


def _sums(
    x: Tensor, matrix: Tensor, norm: Tensor | None, config: MHCConfig, columns: Columns,
    reading: tuple[Tensor, Tensor] | None,
    fused: tuple[Tensor, Tensor, Tensor | None, MHCConfig, Tensor] | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """The sums ``[parts, T, m + 1]`` over the parts of dim, and how many parts.

    Args:
        norm: ``[n * C]``, the norm's weight where the streams are normed first.
        reading: gates that are carried, and the u that they read.
        fused: y, post, H, the configuration of the site that mixes x first, and what it writes.
    """
    T, _, dim = x.shape
    m, block = matrix.shape[1], blocks(dim, columns, interpreted())
    pieces = split(dim, T, block.channels)
    parts = torch.empty(pieces.parts, T, m + 1, dtype=torch.float32, device=x.device)
    of_gates, of_matrix = projections(matrix, columns)
    carried, u = reading or (parts, x)
    y, post, H, mixer, out = fused or (x, parts, None, None, x)
    first = normed(x, config)
    before = first or fused is not None
    wide = x.dtype == torch.float32
    narrow, limit = (True, {}) if before else plan_of_sums(columns, reading is not None, wide)
    squares, count = _squares(x, columns) if first else (parts, 0)
    launch(
        site.sums_kernel, (blocks_of(T, block.tokens), pieces.parts),
        x, of_gates, of_matrix, parts, carried, u, y, post, parts if H is None else H, out, squares,
        parts if norm is None else norm, T, dim, pieces.size, pieces.each, m, count, float(config.norm_eps),
        NORMED=first, WEIGHTED=norm is not None, MEAN=config.norm_eps_position == "mean",
        FUSED=str(mixer.mix) if mixer else "", ROUNDED=bool(mixer and mixer.mixing == "activation"),
        READ=reading is not None, B=block.tokens, BC=block.mixed if narrow else block.channels,
        **columns._asdict(), **options_of(columns, before), **limit,
    )  # fmt: skip
    return parts, pieces.parts


def _squares(x: Tensor, columns: Columns) -> tuple[Tensor, int]:
    """The sums of squares ``[parts, T]`` over the parts of dim, and how many parts."""
    T, n, dim = x.shape
    block = blocks(dim, columns, interpreted())
    pieces = split(dim, T, block.plain_channels)
    squares = torch.empty(pieces.parts, T, dtype=torch.float32, device=x.device)
    launch(
        site.squares_kernel, (blocks_of(T, block.plain_tokens), pieces.parts),
        x, squares, T, dim, pieces.size, pieces.each, N=n, NP=columns.NP,
        B=block.plain_tokens, BC=block.plain_channels,
    )  # fmt: skip
    return squares, pieces.parts


def _finish(
    x: Tensor, parts: Tensor, count: int, scale: Tensor, shift: Tensor, config: MHCConfig, columns: Columns,
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], wanted: bool,
) -> None:  # fmt: skip
    """Fills pre, post, H, the sums, and u where it is wanted."""
    u, pre, post, H, sums = results
    T, _, dim = x.shape
    block, recipe = blocks(dim, columns, interpreted()), sinkhorn(config)
    grid = blocks_of(T, block.tokens), blocks_of(dim, block.last) if wanted else 1
    launch(
        site.finish_kernel, grid,
        x, parts, scale, shift, table(config, columns, scale), sums, pre, post, H, u, T, dim, count,
        parts.shape[2] - 1, float(config.norm_eps), float(config.pre_eps), float(config.post_scale),
        float(config.post_eps), **recipe.numbers,
        KIND=kind(config, columns.HEAD), MEAN=config.norm_eps_position == "mean",
        NORMED=normed(x, config), READ=wanted,
        B=block.tokens, BC=block.last, **options_of(columns), **recipe.constants, **columns._asdict(),
        **registers(96 if columns.NP > 4 else 80, told=not fills(columns.N)),
    )  # fmt: skip


def read_back(
    x: Tensor, carried: Tensor | None, matrix: Tensor, scale: Tensor, shift: Tensor, sums: Tensor,
    cotangents: Sequence[Tensor | None], config: MHCConfig, head: bool,
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fills the cotangents of x, carried, the matrix, scale and shift."""
    dx, dcarried, dmatrix, dscale, dshift = results
    du, dpre, dpost, dH, further = (None if value is None else aligned(value) for value in cotangents)
    x, sums = aligned(x), aligned(sums)
    T, n, dim = x.shape
    m, columns = matrix.shape[1], columns_of(config, head)
    block = blocks(dim, columns, interpreted())
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    count, parts = 1, sums
    if du is not None:
        pieces = split(dim, T, block.plain_channels)
        count, parts = pieces.parts, new(pieces.parts, T, n)
        launch(
            site_back.read_back_kernel, (blocks_of(T, block.plain_tokens), pieces.parts),
            x, du, parts, T, dim, pieces.size, pieces.each, N=n, NP=columns.NP,
            B=block.plain_tokens, BC=block.plain_channels,
        )  # fmt: skip
    dz, dzh, dsums, slope = new(T, m), new(T, m), new(T, m), new(T)
    gates = new(T, n, dtype=coefficient_dtype(x, config))
    recipe, kept = sinkhorn(config), kept_of(config)
    kept = {**kept, "B": 16} if config.residual == "permutations" else kept  # a product of matrices takes 16 rows
    launch(
        site_back.small_back_kernel, (blocks_of(T, kept["B"]),),
        sums, scale, shift, table(config, columns, scale), parts,
        *(sums if value is None else value for value in (dpre, dpost, dH)), dz, dzh, dsums, slope, gates, dcarried,
        T, count, m, n * dim, float(config.norm_eps), float(config.pre_eps), float(config.post_scale), **recipe.numbers,
        KIND=kind(config, head), MEAN=config.norm_eps_position == "mean", NORMED=normed(x, config),
        OWN=du is not None and carried is None, CARRIED=du is not None and carried is not None,
        OF_PRE=dpre is not None, OF_POST=dpost is not None, OF_H=dH is not None, **kept,
        **recipe.constants, **columns._asdict(),
    )  # fmt: skip
    dscale.copy_(dzh.sum(0))
    dshift.copy_(dz.sum(0))
    if not (len(dx) or len(dmatrix)):
        return
    of_gates, of_matrix = projections(matrix, columns)
    segments, size = segments_of(T)
    shares = new(segments, m, n * dim) if segments > 1 and len(dmatrix) else dmatrix
    narrow, options = plan_of_back(columns, x.dtype == torch.float32)
    channels = block.mixed if narrow else block.channels
    launch(
        site_back.large_back_kernel, (n * blocks_of(dim, channels), segments),
        x, x if du is None else du, gates if carried is None else carried, x if further is None else further,
        of_gates, of_matrix, dsums, slope, dx, shares, T, dim, m, size,
        READ=du is not None, FURTHER=further is not None, OF_X=len(dx) > 0,
        OF_PHI=len(dmatrix) > 0, B=block.tokens, BC=channels, **columns._asdict(), **options,
    )  # fmt: skip
    if shares is not dmatrix:
        torch.sum(shares, 0, out=dmatrix)


def mix(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, how: str, rounded: bool, out: Tensor) -> None:
    """Fills the streams."""
    y, x, post, H = aligned(y), aligned(x), aligned(post), None if H is None else aligned(H)
    T, n, dim = x.shape
    columns = streams_alone(n)
    block = blocks(dim, columns, interpreted())
    launch(
        mixing.mix_kernel, (blocks_of(T, block.plain_tokens), blocks_of(dim, block.plain_channels)),
        y, x, post, post if H is None else H, out, T, dim, MIX=how, ROUNDED=rounded, N=n, NP=columns.NP,
        B=block.plain_tokens, BC=block.plain_channels,
    )  # fmt: skip


def mix_back(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, how: str, cotangent: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fills the cotangents of y, x, post and H."""
    y, x, post, H = aligned(y), aligned(x), aligned(post), None if H is None else aligned(H)
    cotangent = aligned(cotangent)
    dy, dx, dpost, dH = results
    T, n, dim = x.shape
    columns, side = streams_alone(n), n if H is None else n + n * n
    told = n > 4 and not (fills(n) and x.dtype == torch.bfloat16)  # 8 streams in bfloat16 spill nothing as they are
    block = blocks(dim, columns, interpreted())
    pieces = split(dim, T, block.plain_channels)
    parts = torch.empty(pieces.parts, T, side, dtype=torch.float32, device=x.device)
    launch(
        mixing.mix_back_kernel, (blocks_of(T, block.plain_tokens), pieces.parts),
        y, x, post, post if H is None else H, cotangent, dy, dx, parts, T, dim, pieces.size, pieces.each, MIX=how, N=n,
        NP=columns.NP, B=block.plain_tokens, BC=block.plain_channels, **registers(168, told),
    )  # fmt: skip
    total = parts[0]
    if pieces.parts > 1:
        total = torch.empty_like(total)
        launch(mixing.fold_kernel, (blocks_of(T * side, 1024),), parts, total, T * side, pieces.parts, B=1024)
    dpost.copy_(total[:, :n])
    if H is not None:
        dH.copy_(total[:, n:].view(T, n, n))


def balance(logits: Tensor, config: MHCConfig, H: Tensor) -> None:
    """Fills H."""
    recipe, size = sinkhorn(config), 32
    launch(
        balancing.balance_kernel, (blocks_of(len(logits), size),),
        aligned(logits), H, len(logits), **recipe.numbers, **recipe.constants,
        N=config.streams, NP=padded(config.streams), B=size,
    )  # fmt: skip


def balance_back(logits: Tensor, config: MHCConfig, cotangent: Tensor, result: Tensor) -> None:
    """Fills the cotangent of the logits."""
    recipe, kept = sinkhorn(config), kept_of(config)
    launch(
        balancing.balance_back_kernel, (blocks_of(len(logits), kept["B"]),),
        aligned(logits), aligned(cotangent), result, len(logits), **recipe.numbers, **recipe.constants,
        N=config.streams, NP=padded(config.streams), **kept,
    )  # fmt: skip
