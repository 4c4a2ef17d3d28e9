"""From x to u and the coefficients with a derivative of its own, in one pass over x each way.

    sums = [x phi, sum x^2]                              # [T, m + 1], all that is kept beside x
    z = scale * sums / rms + shift                       # [T, m]
    pre, post, H = gates and residual matrix of z        # computed again on the way back
    u = sum_i pre[i] * x[i]                              # [T, dim]

x is an output too: what is computed of it afterwards sends its cotangent here, where it is added while x's is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from torch_impl.config import MHCConfig
from torch_impl.lean import balancing, transforms
from torch_impl.lean.mixing import parts
from torch_impl.projections import (
    Shards,
    Weights,
    coefficient_dtype,
    contract,
    gates_and_matrix,
    over_rms,
    packed_gates,
)
from torch_impl.residual import permutations, wide_dtype, without_autocast
from torch_impl.streams import weighted


@dataclass(frozen=True)
class Reading:
    """What a site computes of x.

    Attributes:
        u: whether u is wanted, by the gates that are carried where there are any, else by the site's own.
        head: the projections are those of the head's gates alone.
    """

    config: MHCConfig
    u: bool = True
    head: bool = False


Read = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""u, pre, post, H, and x as it is to be used further on."""


def hindrance(x: Tensor, config: MHCConfig, shards: Shards | None) -> str:
    """Why the lean path doesn't serve a site; empty where it does."""
    if shards:
        return "shards of dim"
    narrow = coefficient_dtype(x, config) != wide_dtype(x.dtype)
    return "coefficients that are rounded to x's dtype" if narrow else ""


def read_site(
    x: Tensor,
    weights: Weights,
    names: list[tuple[str, str, str]],
    norm: Tensor | None,
    reading: Reading,
    carried: Tensor | None = None,
) -> Read:
    """What a site computes of x by the (phi, scale, shift) of these names."""
    with without_autocast(x.device):
        scale, shift = packed_gates(x, weights, names, reading.config)
        phis = [weights[phi] for phi, _, _ in names]
        return cast(Read, Site.apply(x, carried, reading, scale, shift, norm, *phis)[:5])


class Site(Function):
    """Takes x ``[..., n, dim]``, gates ``[..., n]`` that are carried (None for others), a `Reading`, scale and shift
    ``[m]``, the norm's weight ``[n, dim]`` or None, and each projection ``[n, dim, columns]``, with m columns in all.

    Returns u ``[..., dim]``, pre, post ``[..., n]``, H ``[..., n, n]``, x, and the sums ``[..., m + 1]``; u is empty
    where none is wanted, post and H are where there is a head.
    """

    @staticmethod
    @transforms.unrounded
    def forward(
        x: Tensor,
        carried: Tensor | None,
        reading: Reading,
        scale: Tensor,
        shift: Tensor,
        norm: Tensor | None,
        *phis: Tensor,
    ) -> tuple[Tensor, ...]:
        c, lead, wide = reading.config, x.shape[:-2], wide_dtype(x.dtype)
        n, dim = x.shape[-2:]
        flat, matrix = x.reshape(-1, n * dim), _matrix(phis, norm, wide)
        tokens, m = len(flat), matrix.shape[1]
        sums = torch.empty(tokens, m + 1, dtype=wide, device=x.device)
        read = reading.u
        u = torch.empty(tokens if read else 0, dim, dtype=x.dtype, device=x.device)
        given = None if carried is None else carried.reshape(-1, n).to(wide)
        for part in parts(tokens, n * dim, x):
            values = flat[part].to(wide)
            sums[part, :m] = values @ matrix
            # As a product of vectors this takes ten times as long; its root and square round once each.
            sums[part, m] = torch.linalg.vector_norm(values, dim=1).square_()
            if read:
                gates = _gates(sums[part], scale, shift, c, n) if given is None else given[part]
                u[part] = torch.bmm(gates.unsqueeze(1), values.view(-1, n, dim)).squeeze(1)
        z = torch.addcmul(shift, scale, _normed(sums, c, n * dim))
        pre, post, H = _small(z, reading, n)
        u = u.view(*lead, dim) if read else u
        shaped = (pre.view(*lead, n), post.view(*lead, *post.shape[1:]), H.view(*lead, *H.shape[1:]))
        return u, *shaped, x.view_as(x), sums.view(*lead, m + 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, carried, ctx.reading, *weights = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(x, carried, *weights, output[-1])
        ctx.save_for_forward(x, carried, *weights)

    @staticmethod
    @transforms.unrounded
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, carried, *weights, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (x, carried, ctx.reading, *weights)
            return transforms.pulled_back(_twin, inputs, (*cotangents[:-1], None), ctx.needs_input_grad)
        return _pulled(x, carried, ctx.reading, weights, sums, cotangents, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        x, carried, *weights = ctx.saved_tensors
        pushed = transforms.pushed_forward(_twin, (x, carried, ctx.reading, *weights), tangents)
        return *pushed[:-1], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        del info
        return transforms.batched(_twin, in_dims, inputs, 6)


def _matrix(phis: Sequence[Tensor], norm: Tensor | None, wide: torch.dtype) -> Tensor:
    """All projections side by side, times the norm's weight: ``[n * dim, m]``. It is made again on the way back."""
    phi = torch.cat([value.to(wide) for value in phis], -1)  # [n, dim, m]
    return (phi if norm is None else phi * norm.to(wide).unsqueeze(-1)).flatten(0, 1)


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
    pre = torch.sigmoid(z[:, :n]) + config.pre_eps
    post = config.post_scale * torch.sigmoid(z[:, n : 2 * n]) + config.post_eps
    return pre, post, balancing.balanced(z[:, 2 * n :].reshape(-1, n, n), config)


def _pulled(
    x: Tensor,
    carried: Tensor | None,
    reading: Reading,
    weights: Sequence[Any],
    sums: Tensor,
    cotangents: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The cotangents of all inputs."""
    scale, shift, norm, *phis = weights
    c, wide = reading.config, wide_dtype(x.dtype)
    n, dim = x.shape[-2:]
    flat, matrix = x.reshape(-1, n * dim), _matrix(phis, norm, wide)
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
        of_x = values * (2 * of_square[part] * (dh * h[part]).sum(1, keepdim=True))
        of_x.addmm_(dsums, matrix.t())
        if received is not None:
            of_x.view(-1, n, dim).addcmul_(gates[part].unsqueeze(2), received.unsqueeze(1))
        if further is not None:
            of_x += further.reshape(-1, n * dim)[part]
        dx[part] = of_x
    return (
        None if dx is None else dx.view(x.shape),
        None if dcarried is None or carried is None else dcarried.to(carried.dtype).view(carried.shape),
        None,
        (dz * h).sum(0) if wanted[3] else None,
        dz.sum(0) if wanted[4] else None,
        *_of_matrix(dmatrix, norm, phis, wanted[5:]),
    )


def _of_matrix(
    dmatrix: Tensor | None, norm: Tensor | None, phis: Sequence[Tensor], wanted: Sequence[bool]
) -> Iterator[Tensor | None]:
    """The cotangents of the norm's weight and of each projection, from that of their matrix ``[m, n * dim]``."""
    if dmatrix is None:
        yield from (None for _ in wanted)
        return
    of_phi = dmatrix.t().reshape(*phis[0].shape[:2], -1)  # [n, dim, m]
    if norm is None:
        yield None
    else:
        yield (of_phi * torch.cat([phi.to(of_phi.dtype) for phi in phis], -1)).sum(-1).to(norm.dtype)
        of_phi = of_phi * norm.to(of_phi.dtype).unsqueeze(-1)
    for phi, part in zip(phis, of_phi.split([phi.shape[-1] for phi in phis], -1), strict=True):
        yield part.to(phi.dtype).contiguous()


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
        dz[:, 2 * n :] = balancing.pulled(logits.reshape(-1, n, n), config, dH).flatten(1)
    else:
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            dz[:, 2 * n :] = torch.autograd.grad(permutations(logits, config), logits, dH)[0]
    return dz


def _twin(
    x: Tensor,
    carried: Tensor | None,
    reading: Reading,
    scale: Tensor,
    shift: Tensor,
    norm: Tensor | None,
    *phis: Tensor,
) -> tuple[Tensor, ...]:
    c, wide = reading.config, wide_dtype(x.dtype)
    n, dim = x.shape[-2:]
    phi = _matrix(phis, norm, wide).unflatten(0, (n, dim))
    squares = x.to(wide).square().sum((-2, -1)).unsqueeze(-1)  # [..., 1]
    sums = torch.cat([contract(phi, x), squares], -1)  # [..., m + 1]
    z = scale * over_rms(sums[..., :-1], squares / (n * dim), c) + shift
    if reading.head:
        pre = torch.sigmoid(z) + c.pre_eps
        post = H = z[..., :0]
    else:
        pre, post, H = gates_and_matrix(z, c, z.dtype)
    u = x.new_empty(0, dim) if not reading.u else weighted(x, pre if carried is None else carried)
    return u, pre, post, H, x.view_as(x), sums
