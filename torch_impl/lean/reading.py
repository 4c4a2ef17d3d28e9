"""From x to u and the coefficients by operators on blocks of tokens, in one pass over x each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.fused.site import Reading
from torch_impl.lean.balancing import balanced, pulled
from torch_impl.lean.mixing import mix, parts, place, product
from torch_impl.projections import gates_and_matrix, joined, of_joined, over_rms
from torch_impl.residual import permutations, wide_dtype


def read(
    x: Tensor,
    carried: Tensor | None,
    reading: Reading,
    scale: Tensor,
    shift: Tensor,
    norm: Tensor | None,
    phis: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, pre, post, H and the sums of all tokens, flattened."""
    c, wide = reading.config, wide_dtype(x.dtype)
    n, dim = x.shape[-2:]
    flat, matrix = x.reshape(-1, n * dim), joined(phis, norm, wide)
    tokens, m = len(flat), matrix.shape[1]
    sums = torch.empty(tokens, m + 1, dtype=wide, device=x.device)
    u = torch.empty(tokens if reading.u else 0, dim, dtype=x.dtype, device=x.device)
    given = None if carried is None else carried.reshape(-1, n).to(wide)
    held, values = parts(tokens, n * dim, x), flat
    for part in held:
        values = flat[part].to(wide)
        sums[part, :m] = values @ matrix
        # As a product of vectors this takes ten times as long; its root and square round once each.
        sums[part, m] = torch.linalg.vector_norm(values, dim=1).square_()
        if reading.u and len(held) > 1:  # while the block is in its caches
            gates = _gates(sums[part], scale, shift, c, n) if given is None else given[part]
            product(gates.unsqueeze(1), values.view(-1, n, dim), u.unsqueeze(1), part)
    z = torch.addcmul(shift, scale, _normed(sums, c, n * dim))
    pre, post, H = _small(z, reading, n)
    if reading.u and len(held) == 1:
        product((pre if given is None else given).unsqueeze(1), values.view(-1, n, dim), u.unsqueeze(1), held[0])
    return u, pre, post, H, sums


def mix_read(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mixer: MHCConfig, carried: Tensor | None,
    reading: Reading, scale: Tensor, shift: Tensor, norm: Tensor | None, phis: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The streams that a site writes, and `read` of them, one after the other."""
    out = mix(y, x, post, H, str(mixer.mix), mixer.mixing == "activation")
    return out, *read(out, carried, reading, scale, shift, norm, phis)


def _normed(sums: Tensor, config: MHCConfig, count: int) -> Tensor:
    """The projections over the root of the mean square of ``count`` numbers."""
    return over_rms(sums[:, :-1], sums[:, -1:] / count, config)


def _gates(sums: Tensor, scale: Tensor, shift: Tensor, config: MHCConfig, n: int) -> Tensor:
    """The gates of u ``[T, n]``."""
    h = over_rms(sums[:, :n], sums[:, -1:] / (n * config.dim), config)
    return torch.addcmul(shift[:n], scale[:n], h).sigmoid_().add_(config.pre_eps)


def _small(z: Tensor, reading: Reading, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and H of the logits ``[T, m]``."""
    config = reading.config
    if reading.head:
        empty = z.new_empty(len(z), 0)
        return torch.sigmoid(z) + config.pre_eps, empty, empty
    if config.residual != "sinkhorn":
        pre, post, H = gates_and_matrix(z, config, z.dtype)
        return pre, post, H.contiguous()
    gates = torch.sigmoid(z[:, : 2 * n])
    pre, post = gates[:, :n] + config.pre_eps, config.post_scale * gates[:, n:] + config.post_eps
    return pre, post, balanced(z[:, 2 * n :].reshape(-1, n, n), config)


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
    scale, shift, norm, *phis = weights
    c, wide = reading.config, wide_dtype(x.dtype)
    n, dim = x.shape[-2:]
    flat, matrix = x.reshape(-1, n * dim), joined(phis, norm, wide)
    tokens, m = len(flat), matrix.shape[1]
    sums = sums.reshape(-1, m + 1)
    du, dpre, dpost, dH, further = (
        None if value is None else value.reshape(tokens, *value.shape[x.ndim - 2 :]) for value in cotangents[:5]
    )
    h = _normed(sums, c, n * dim)  # [T, m]
    z = torch.addcmul(shift, scale, h)
    dz = _of_small(z, reading, n, dpost, dH)  # [T, m], zero for pre
    sigmoid = torch.sigmoid(z[:, :n])
    slope = sigmoid * (1 - sigmoid)
    if dpre is not None:
        dz[:, :n] = dpre * slope
    gates = sigmoid + c.pre_eps if carried is None else carried.reshape(-1, n).to(wide)
    dcarried = None if carried is None else torch.zeros(tokens, n, dtype=wide, device=x.device)
    inverse, of_square = _of_norm(sums, c, n * dim)
    dx = torch.empty_like(flat) if wanted[0] else None
    dmatrix = torch.zeros(m, n * dim, dtype=wide, device=x.device) if any(wanted[5:]) else None
    for part in parts(tokens, n * dim, x):
        values = flat[part].to(wide)
        received = None if du is None else du[part].to(wide)
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
        *of_joined(dmatrix, norm, phis, wanted[5:]),
    )


def _of_norm(sums: Tensor, config: MHCConfig, count: int) -> tuple[Tensor, Tensor]:
    """1 / rms ``[T, 1]``, and its relative slope by the sum of squares."""
    mean = sums[:, -1:] / count
    if config.norm_eps_position == "mean":
        return (mean + config.norm_eps).rsqrt(), -0.5 / (mean + config.norm_eps) / count
    root = mean.sqrt()
    inverse = 1 / (root + config.norm_eps)
    return inverse, torch.where(mean == 0, 0.0, -0.5 * inverse / root / count)


def _of_small(z: Tensor, reading: Reading, n: int, dpost: Tensor | None, dH: Tensor | None) -> Tensor:
    """The cotangent of the logits by way of post and H; zero for those of pre."""
    dz, config = torch.zeros_like(z), reading.config
    if dpost is not None and not reading.head:
        sigmoid = torch.sigmoid(z[:, n : 2 * n])
        dz[:, n : 2 * n] = config.post_scale * dpost * sigmoid * (1 - sigmoid)
    if dH is None or reading.head or config.residual == "identity":
        return dz
    logits = z[:, 2 * n :]
    if config.residual == "sinkhorn":
        dz[:, 2 * n :] = pulled(logits.reshape(-1, n, n), config, dH).flatten(1)
    else:
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            dz[:, 2 * n :] = torch.autograd.grad(permutations(logits, config), logits, dH)[0]
    return dz
