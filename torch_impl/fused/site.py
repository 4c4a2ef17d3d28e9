"""From x to u and the coefficients with a derivative of its own::

    sums = [x phi, sum x^2]                              # [T, m + 1], all that is kept beside x
    z = scale * sums / rms + shift                       # [T, m]
    pre, post, H = gates and residual matrix of z        # computed again on the way back
    u = sum_i pre[i] * x[i]                              # [T, dim]

Where coefficients are rounded to x's dtype, the norm is applied and rounded before the projection: the sums are then
``[round(x / rms * norm) phi, sum x^2]``, and z is made of them as they are. Derivatives pass over every rounding, so
that on the way back there is no other difference.

x is an output too: what is computed of it afterwards sends its cotangent here, where it is added while x's is made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_impl.config import MHCConfig
from torch_impl.fused import engine, transforms
from torch_impl.projections import (
    Packed,
    Weights,
    coefficient_dtype,
    gates_and_matrix,
    gates_apart,
    logits,
    packed_gates,
    side_by_side,
)
from torch_impl.residual import wide_dtype, without_autocast
from torch_impl.streams import weighted


def of_head(config: MHCConfig) -> MHCConfig:
    """The configuration that the norm and the projection of a head follow."""
    if torch.compiler.is_compiling():
        from torch_impl.fused import constant

        return constant.of_head(config)
    return made_of_head(config)


@functools.cache
def made_of_head(config: MHCConfig) -> MHCConfig:
    """`of_head`, which a compiler can't trace."""
    eps = config.norm_eps if config.head_norm_eps is None else config.head_norm_eps
    return dataclasses.replace(config, coefficients="float32", matrix="float32", norm_eps=eps)


@dataclass(frozen=True)
class Reading:
    """What a site or a head computes of x.

    Attributes:
        layer: its configuration.
        engine: what computes it (`fused.engine`).
        u: whether u is wanted, by the gates that are carried where there are any, else by the site's own.
        head: the projections are those of the head's gates alone.
    """

    layer: MHCConfig
    engine: str
    u: bool = True
    head: bool = False

    @property
    def config(self) -> MHCConfig:
        """The configuration that the norm and the projections follow."""
        return of_head(self.layer) if self.head else self.layer

    def rounds(self, x: Tensor) -> bool:
        """Whether coefficients of x are rounded to its dtype, and the normed streams before them."""
        return coefficient_dtype(x, self.config) != wide_dtype(x.dtype)


Read = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""u, pre, post, H, and x as it is to be used further on."""


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
        if reading.engine == "triton":
            x = x.contiguous()  # once, for this kernel and for those that mix x later
        phis = [weights[phi] for phi, _, _ in names]
        if reading.engine == "lean" and not transforms.transformed((x, carried, *weights.values())):
            # To put gates side by side takes longer than to multiply by each; but then their gradients come as one.
            scales, shifts = gates_apart(x, weights, names, reading.config)
            *read, _ = engine("lean").read(x, carried, reading, scales, shifts, norm, phis)
            return shaped(x, read, reading)
        gates = packed_gates(x, weights, names, reading.config)
        return transforms.called(Site, TracedSite, x, carried, reading, *gates, norm, *phis)[:5]


def shaped(x: Tensor, read: Sequence[Tensor], reading: Reading) -> Read:
    """u, pre, post and H of an engine with x's leading axes, and x."""
    u, pre, post, H = read
    if x.ndim != 3:
        u = leading(x, u) if reading.u else u
        pre, post, H = leading(x, pre), leading(x, post), leading(x, H)
    return u, pre, post, H, x


def leading(x: Tensor, value: Tensor) -> Tensor:
    """A value ``[T, ...]`` of the tokens of x, with the leading axes of x."""
    return value.view(x.shape[:-2] + value.shape[1:])


class TracedSite(Function):
    """Takes x ``[..., n, dim]``, gates ``[..., n]`` that are carried (None for others), a `Reading`, scale and shift
    ``[m]``, the norm's weight ``[n, dim]`` or None, and each projection ``[n, dim, columns]``, with m columns in all.

    Returns u ``[..., dim]``, pre, post ``[..., n]``, H ``[..., n, n]``, x, and the sums ``[..., m + 1]``; u is empty
    where none is wanted, post and H are where there is a head.
    """

    @staticmethod
    @transforms.forward
    def forward(
        x: Tensor,
        carried: Tensor | None,
        reading: Reading,
        scale: Tensor,
        shift: Tensor,
        norm: Tensor | None,
        *phis: Tensor,
    ) -> tuple[Tensor, ...]:
        *read, sums = engine(reading.engine).read(x, carried, reading, scale, shift, norm, phis)
        return *shaped(x.view_as(x), read, reading), leading(x, sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, carried, ctx.reading, *weights = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(x, carried, *weights, output[-1])
        ctx.save_for_forward(x, carried, *weights)

    @staticmethod
    @transforms.backward
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, carried, *weights, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (x, carried, ctx.reading, *weights)
            return transforms.pulled_back(twin, inputs, (*cotangents[:-1], None), ctx.needs_input_grad)
        u, pre, post, H, further, _ = cotangents
        u = u if ctx.reading.u else None  # a compiled program hands zeros on for an output that is empty
        post, H = (None, None) if ctx.reading.head else (post, H)
        received = (u, pre, post, H, further)
        name, wanted = ctx.reading.engine, ctx.needs_input_grad
        return engine(name).read_back(x, carried, ctx.reading, weights, sums, received, wanted)


class Site(TracedSite):
    """`TracedSite` with forward mode and `torch.func.vmap`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        x, carried, *weights = ctx.saved_tensors
        pushed = transforms.pushed_forward(twin, (x, carried, ctx.reading, *weights), tangents)
        return *pushed[:-1], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        del info
        return transforms.batched(twin, in_dims, inputs, 6)


def twin(
    x: Tensor,
    carried: Tensor | None,
    reading: Reading,
    scale: Tensor,
    shift: Tensor,
    norm: Tensor | None,
    *phis: Tensor,
) -> tuple[Tensor, ...]:
    """What `TracedSite` computes, by operators."""
    c = reading.config
    z = logits(x, Packed(*side_by_side(x, phis, norm, c), scale, shift), c, None)  # [..., m]
    if reading.head:
        pre = torch.sigmoid(z) + c.pre_eps
        post = H = z[..., :0]
    else:
        pre, post, H = gates_and_matrix(z, c, coefficient_dtype(x, c))
    u = x.new_empty(0, x.shape[-1]) if not reading.u else weighted(x, pre if carried is None else carried)
    nothing = torch.nn.functional.pad(z, (0, 1))  # in place of the sums: nobody goes back by those of a twin
    return u, pre, post, H, x.view_as(x), nothing
