"""From one site to the next in one function: `mixing` of a site, and `site` of the streams that it writes.

What is written is projected while it is there: a kernel then reads x of the next site once less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_impl.config import MHCConfig
from torch_impl.fused import engine, site, transforms
from torch_impl.fused.site import Reading
from torch_impl.streams import mixed


class TracedCrossing(Function):
    """Takes y, x, post and H (None for the identity) of a site, its configuration, and what `site.TracedSite` takes
    after x; returns what that returns, x being the streams that are written.
    """

    @staticmethod
    @transforms.forward
    def forward(
        y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mixer: MHCConfig, carried: Tensor | None,
        reading: Reading, scale: Tensor, shift: Tensor, norm: Tensor | None, *phis: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        mixing = (y, x, post, H, mixer)
        out, *read, sums = engine(reading.engine).mix_read(*mixing, carried, reading, scale, shift, norm, phis)
        return *site.shaped(out, read, reading), site.leading(out, sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        y, x, post, H, ctx.mixer, carried, ctx.reading, *weights = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(y, x, post, H, carried, *weights, output[-2], output[-1])
        ctx.save_for_forward(y, x, post, H, carried, *weights)

    @staticmethod
    @transforms.backward
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        y, x, post, H, carried, *weights, out, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (y, x, post, H, ctx.mixer, carried, ctx.reading, *weights)
            return transforms.pulled_back(_twin, inputs, (*cotangents[:-1], None), ctx.needs_input_grad)
        computing = engine(ctx.reading.engine)
        wanted = (True, *ctx.needs_input_grad[5:])
        dout, *rest = computing.read_back(out, carried, ctx.reading, weights, sums, cotangents, wanted)
        assert dout is not None
        return *computing.mix_back(y, x, post, H, str(ctx.mixer.mix), dout), None, *rest


class Crossing(TracedCrossing):
    """`TracedCrossing` with forward mode and `torch.func.vmap`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        y, x, post, H, carried, *weights = ctx.saved_tensors
        inputs = (y, x, post, H, ctx.mixer, carried, ctx.reading, *weights)
        return *transforms.pushed_forward(_twin, inputs, tangents)[:-1], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        del info
        return transforms.batched(_twin, in_dims, inputs, 6)


def _twin(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mixer: MHCConfig, *inputs: Any) -> tuple[Tensor, ...]:
    return site.twin(mixed(y, x, post, H, str(mixer.mix), mixer.mixing == "activation"), *inputs)
