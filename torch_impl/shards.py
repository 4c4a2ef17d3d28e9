"""The two collectives that a sharded dim needs, with their gradients (`functional.Shards`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Add(torch.autograd.Function):
    """`Shards.add`; it and `_Share` are each other's transpose."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        wide = torch.promote_types(partial.dtype, torch.float32)
        total = partial.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.to(partial.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _Share.apply(cotangents[0], ctx.group), None


class _Share(torch.autograd.Function):
    """`Shards.share`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _Add.apply(cotangents[0], ctx.group), None


@dataclasses.dataclass(frozen=True)
class TensorShards:
    """`functional.Shards` over the processes of one group."""

    group: dist.ProcessGroup

    @property
    def count(self) -> int:
        return self.group.size()

    def add(self, partial: Tensor) -> Tensor:
        return _Add.apply(partial, self.group)

    def share(self, value: Tensor) -> Tensor:
        return _Share.apply(value, self.group)
