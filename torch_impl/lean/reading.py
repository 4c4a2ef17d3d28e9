"""From x to u and the coefficients by operators on blocks of tokens, in one pass over x each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.fused.site import Reading
from torch_impl.lean.balancing import balanced, block, pulled
from torch_impl.lean.mixing import mix, parts, place, product
from torch_impl.projections import gates_and_matrix, of_weights, over_rms, side_by_side, times_norm
from torch_impl.residual import in_dtype, wide_dtype


def read(
    x: Tensor,
    carried: Tensor | None,
    reading: Reading,
    scale: Tensor | list[Tensor],
    shift: Tensor | list[Tensor],
    norm: Tensor | None,
    phis: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, pre, post, H and the sums of all tokens, flattened.

    Args:
        scale, shift: ``[m]``; or those of each projection, where nobody asks for a derivative: the last result is then
            not meant to be used.
    """
    c, wide, rounded = reading.config, wide_dtype(x.dtype), reading.rounds(x)
    n, dim = x.shape[-2:]
    phi, norm = side_by_side(x, phis, norm, c)
    flat, matrix = x.reshape(-1, n * dim), times_norm(phi, None if rounded else norm)
    tokens, m = flat.shape[0], matrix.shape[1]
    given = None if carried is None else in_dtype(carried.reshape(-1, n), wide)
    held, columns = parts(tokens, n * dim, x), [phi.shape[-1] for phi in phis]
    if len(held) == 1:
        values = in_dtype(flat, wide)
        projected, squares = _sums(values, matrix, norm, c, x.dtype, rounded)
        z = _logits(_normed(projected, squares, x, c, rounded), scale, shift, columns)
        pre, post, H = _small(z, reading, x, rounded)
        if reading.u:
            gates = in_dtype(pre, wide) if given is None else given
            u = in_dtype(torch.bmm(gates.unsqueeze(1), values.view(-1, n, dim)), x.dtype).view(tokens, dim)
        else:
            u = x.new_empty(0, dim)
        return u, pre, post, H, projected if isinstance(scale, list) else torch.cat([projected, squares], 1)
    sums = torch.empty(tokens, m + 1, dtype=wide, device=x.device)
    u = torch.empty(tokens if reading.u else 0, dim, dtype=x.dtype, device=x.device)
    for part in held:
        values = in_dtype(flat[part], wide)
        h, square = _sums(values, matrix, norm, c, x.dtype, rounded, sums[part])
        if reading.u:  # while the block is in its caches
            gates = _gates(h, square, scale, shift, x, c, rounded) if given is None else given[part]
            product(gates.unsqueeze(1), values.view(-1, n, dim), u.unsqueeze(1), part)
    z = _logits(_normed(sums[:, :m], sums[:, m:], x, c, rounded), scale, shift, columns)
    return u, *_small(z, reading, x, rounded), sums


def _sums(
    values: Tensor, matrix: Tensor, norm: Tensor | None, config: MHCConfig, dtype: torch.dtype, rounded: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The projections ``[T, m]`` of a block of wide streams ``[T, n * dim]``, and its sums of squares ``[T, 1]``.

    Args:
        dtype, rounded: x's, and whether the streams are normed and rounded to it before they are projected.
        out: ``[T, m + 1]``, where they are written.
    """
    m = matrix.shape[1]
    h, square = (None, None) if out is None else (out[:, :m], out[:, m:])
    # As a product of vectors this takes ten times as long; its root and square round once each.
    square = torch.linalg.vector_norm(values, dim=1, keepdim=True, out=square)
    square.mul_(square)
    streams = _rounded_norm(values, square, norm, config, dtype) if rounded else values
    return torch.mm(streams, matrix, out=h), square


def mix_read(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mixer: MHCConfig, carried: Tensor | None,
    reading: Reading, scale: Tensor, shift: Tensor, norm: Tensor | None, phis: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The streams that a site writes, and `read` of them, one after the other."""
    out = mix(y, x, post, H, str(mixer.mix), mixer.mixing == "activation")
    return out, *read(out, carried, reading, scale, shift, norm, phis)


def _rounded_norm(
    values: Tensor, squares: Tensor, norm: Tensor | None, config: MHCConfig, dtype: torch.dtype
) -> Tensor:
    """Streams ``[T, n * dim]`` over the root of their mean square, times the norm's weight, rounded; wide still."""
    normed = over_rms(values, squares / values.shape[1], config)
    normed = normed if norm is None else normed.mul_(norm.flatten())
    return normed.to(dtype).to(values.dtype)


def _normed(projected: Tensor, squares: Tensor, x: Tensor, config: MHCConfig, rounded: bool) -> Tensor:
    """The projections of the normed streams: rounded, or divided by the root of x's mean square now."""
    if rounded:
        return projected.to(x.dtype).to(projected.dtype)
    return over_rms(projected, squares / (x.shape[-2] * x.shape[-1]), config)


def _logits(
    h: Tensor, scale: Tensor | list[Tensor], shift: Tensor | list[Tensor], columns: list[int]
) -> Sequence[Tensor]:
    """The logits of each projection, of so many columns, from the normed projections ``[T, m]``."""
    if isinstance(scale, Tensor) and isinstance(shift, Tensor):
        return torch.addcmul(shift, scale, h).split_with_sizes(columns, 1)
    return [torch.addcmul(b, a, part) for a, b, part in zip(scale, shift, h.split_with_sizes(columns, 1), strict=True)]


def _gates(
    projected: Tensor, squares: Tensor, scale: Tensor | list[Tensor], shift: Tensor | list[Tensor],
    x: Tensor, config: MHCConfig, rounded: bool,
) -> Tensor:  # fmt: skip
    """The gates of u ``[T, n]``, wide."""
    n = x.shape[-2]
    a, b = (value[:n] if isinstance(value, Tensor) else value[0] for value in (scale, shift))
    h = _normed(projected[:, :n], squares, x, config, rounded)
    gates = torch.addcmul(b, a, h).sigmoid_().add_(config.pre_eps)
    return gates.to(x.dtype).to(gates.dtype) if rounded else gates


def _small(z: Sequence[Tensor], reading: Reading, x: Tensor, rounded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and H of the logits of each projection ``[T, columns]``."""
    config, n = reading.config, x.shape[-2]
    if reading.head:
        empty = z[0].new_empty(len(z[0]), 0)
        return torch.sigmoid(z[0]) + config.pre_eps, empty, empty
    if not _in_place(config, rounded):
        pre, post, H = gates_and_matrix(torch.cat(list(z), 1), config, x.dtype if rounded else z[0].dtype)
        return pre, post, H.contiguous()
    pre, post = torch.sigmoid(z[0]).add_(config.pre_eps), torch.sigmoid(z[1]).mul_(config.post_scale)
    post = post.add_(config.post_eps) if config.post_eps else post
    H = balanced(z[2].view(-1, n, n), config)
    return (pre.to(x.dtype), post.to(x.dtype), H.to(x.dtype)) if rounded else (pre, post, H)


def _in_place(config: MHCConfig, rounded: bool) -> bool:
    """Whether H comes from `balanced`: passes that are rounded too are the plain ones, also on the way back."""
    return config.residual == "sinkhorn" and not (rounded and config.matrix == "activation")


def read_back(
    x: Tensor,
    carried: Tensor | None,
    reading: Reading,
    weights: Sequence[Any],
    sums: Tensor,
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The cotangents of all inputs."""
    scale, shift, *held = weights
    c, wide, rounded = reading.config, wide_dtype(x.dtype), reading.rounds(x)
    n, dim = x.shape[-2:]
    phi, norm = side_by_side(x, held[1:], held[0], c)
    flat, matrix = x.reshape(-1, n * dim), times_norm(phi, norm)
    tokens, m = flat.shape[0], matrix.shape[1]
    sums = sums.reshape(-1, m + 1)
    du, dpre, dpost, dH, further = (
        None if value is None else value.reshape(tokens, *value.shape[x.ndim - 2 :]) for value in cotangents[:5]
    )
    h = _normed(sums[:, :m], sums[:, m:], x, c, rounded)  # [T, m]
    z = torch.addcmul(shift, scale, h)
    dz = _of_small(z, reading, n, dpost, dH, rounded)  # [T, m], zero for pre
    sigmoid = torch.sigmoid(z[:, :n])
    slope = sigmoid * (1 - sigmoid)
    if dpre is not None:
        dz[:, :n] = dpre * slope
    own = sigmoid + c.pre_eps
    own = own.to(x.dtype).to(wide) if rounded else own
    gates = own if carried is None else carried.reshape(-1, n).to(wide)
    dcarried = None if carried is None else torch.zeros(tokens, n, dtype=wide, device=x.device)
    inverse, of_square = _of_norm(sums, c, n * dim)
    dx = torch.empty_like(flat) if wanted[0] else None
    dmatrix = torch.zeros(m, n * dim, dtype=wide, device=x.device) if any(wanted[5:]) else None
    for part in parts(tokens, n * dim, x, back=True):
        values = in_dtype(block(flat, part), wide)
        received = None if du is None else in_dtype(block(du, part), wide)
        if received is not None:
            of_gates = (values.view(-1, n, dim) * received.unsqueeze(1)).sum(2)
            if dcarried is None:
                dz[part, :n] += of_gates * slope[part]
            else:
                dcarried[part] = of_gates
        dh = dz[part] * scale
        dsums = dh * inverse[part]
        if dmatrix is not None:
            dmatrix.addmm_(dsums.t(), values)
        if dx is None:
            continue
        written = place(dx, part, wide)
        of_x = torch.mul(values, 2 * of_square[part] * (dh * h[part]).sum(1, keepdim=True), out=written)
        of_x.addmm_(dsums, matrix.t())
        if received is not None:
            of_x.view(-1, n, dim).addcmul_(gates[part].unsqueeze(2), received.unsqueeze(1))
        if further is not None:
            of_x += further.reshape(-1, n * dim)[part]
        if written is None:
            dx[part] = of_x
    return (
        None if dx is None else dx.view(x.shape),
        None if dcarried is None or carried is None else dcarried.to(carried.dtype).view(carried.shape),
        None,
        (dz * h).sum(0) if wanted[3] else None,
        dz.sum(0) if wanted[4] else None,
        *of_weights(dmatrix, phi, norm, held, wanted[5:]),
    )


def _of_norm(sums: Tensor, config: MHCConfig, count: int) -> tuple[Tensor, Tensor]:
    """1 / rms ``[T, 1]``, and its relative slope by the sum of squares."""
    mean = sums[:, -1:] / count
    if config.norm_eps_position == "mean":
        return (mean + config.norm_eps).rsqrt(), -0.5 / (mean + config.norm_eps) / count
    root = mean.sqrt()
    inverse = 1 / (root + config.norm_eps)
    return inverse, torch.where(mean == 0, 0.0, -0.5 * inverse / root / count)


def _of_small(z: Tensor, reading: Reading, n: int, dpost: Tensor | None, dH: Tensor | None, rounded: bool) -> Tensor:
    """The cotangent of the logits by way of post and H; zero for those of pre."""
    dz, config = torch.zeros_like(z), reading.config
    if dpost is not None:
        sigmoid = torch.sigmoid(z[:, n : 2 * n])
        dz[:, n : 2 * n] = config.post_scale * dpost * sigmoid * (1 - sigmoid)
    if dH is None or config.residual == "identity":
        return dz
    logits = z[:, 2 * n :]
    if _in_place(config, rounded):
        dz[:, 2 * n :] = pulled(logits.reshape(-1, n, n), config, dH).flatten(1)
    else:
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            H = gates_and_matrix(torch.cat([z[:, : 2 * n].detach(), logits], 1), config, dH.dtype)[2]
            dz[:, 2 * n :] = torch.autograd.grad(H, logits, dH)[0]
    return dz
