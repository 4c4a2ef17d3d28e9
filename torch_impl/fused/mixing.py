"""``out_j = post_j y + sum_i H[i, j] x_i`` with a derivative of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_impl.fused import engine, transforms
from torch_impl.streams import mixed


class TracedMixing(Function):
    """Takes y ``[..., dim]``, x ``[..., n, dim]``, post ``[..., n]`` and H ``[..., n, n]``, None for the identity; then
    the index that is summed over (`MHCConfig.mix`), and whether both terms are rounded to x's dtype before the
    sum, and the name of the engine.
    """

    @staticmethod
    @transforms.forward
    def forward(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, rounded: bool, name: str) -> Tensor:
        return engine(name).mix(y, x, post, H, mix, rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        *tensors, ctx.mix, ctx.rounded, ctx.name = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @transforms.backward
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        y, x, post, H = ctx.saved_tensors
        if torch.is_grad_enabled():
            return transforms.pulled_back(
                _twin, (y, x, post, H, ctx.mix, ctx.rounded, ctx.name), (cotangent,), ctx.needs_input_grad
            )
        dy, dx, dpost, dH = engine(ctx.name).mix_back(y, x, post, H, ctx.mix, cotangent)
        return dy, dx, dpost, dH, None, None, None


class Mixing(TracedMixing):
    """`TracedMixing` with forward mode and `torch.func.vmap`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        inputs = (*ctx.saved_tensors, ctx.mix, ctx.rounded, ctx.name)
        return transforms.pushed_forward(_twin, inputs, tangents)[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        del info
        outputs, dims = transforms.batched(_twin, in_dims, inputs, 1)
        return outputs[0], dims[0]


def _twin(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, rounded: bool, name: str
) -> tuple[Tensor, ...]:
    del name
    return (mixed(y, x, post, H, mix, rounded),)
