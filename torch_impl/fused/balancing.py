"""Sinkhorn with a derivative of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_impl.config import MHCConfig
from torch_impl.fused import engine, transforms
from torch_impl.residual import sinkhorn


class TracedBalancing(Function):
    """H of logits ``[..., n, n]`` in any dtype, which it has too, by a configuration and an engine of that name."""

    @staticmethod
    @transforms.forward
    def forward(logits: Tensor, config: MHCConfig, name: str) -> Tensor:
        return engine(name).balance(logits, config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        logits, ctx.config, ctx.name = inputs
        ctx.save_for_backward(logits)
        ctx.save_for_forward(logits)

    @staticmethod
    @transforms.backward
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (logits,), (cotangent,) = ctx.saved_tensors, cotangents
        if torch.is_grad_enabled():
            return transforms.pulled_back(_twin, (logits, ctx.config, ctx.name), (cotangent,), (True, False, False))
        return engine(ctx.name).balance_back(logits, ctx.config, cotangent), None, None


class Balancing(TracedBalancing):
    """`TracedBalancing` with forward mode and `torch.func.vmap`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return transforms.pushed_forward(_twin, (*ctx.saved_tensors, ctx.config, ctx.name), tangents)[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        del info
        outputs, dims = transforms.batched(_twin, in_dims, inputs, 1)
        return outputs[0], dims[0]


def _twin(logits: Tensor, config: MHCConfig, name: str) -> tuple[Tensor, ...]:
    del name
    return (sinkhorn(logits, config),)
