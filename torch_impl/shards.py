"""Tensors in parts on many processes: the two collectives that a sharded dim needs, and what all processes agree on.

`TensorShards` is what `functional` takes as its argument ``shards``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate


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


def broadcast(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """The value of the mesh's first process, in place, along one dimension after another."""
    for index, size in enumerate(mesh.shape):
        if size > 1:
            dist.broadcast(value, group=mesh.get_group(index), group_src=0)
    return value


def mesh_of(sites: Mapping[str, nn.Module]) -> DeviceMesh:
    """The one mesh of the parameters that are sharded, back in their parts if the last forward has left them whole.

    Raises:
        ValueError: none is sharded, or they are on several meshes.
    """
    meshes: dict[DeviceMesh, str] = {}
    for prefix, site in sites.items():
        if isinstance(site, FSDPModule):
            site.reshard()
        mesh = next((value.device_mesh for value in site.parameters() if isinstance(value, DTensor)), None)
        if mesh is not None:
            meshes.setdefault(mesh, prefix)
    if len(meshes) != 1:
        raise ValueError(f"the sites must be on one mesh, {' and '.join(map(repr, meshes.values())) or 'none'} are")
    return next(iter(meshes))


def agreed_seed(site: nn.Module, seed: Tensor) -> Tensor:
    """The first process's seed, on all that hold the site's parameters."""
    mesh = mesh_of({"": site})
    return broadcast(seed.to(mesh.device_type), mesh)


def whole(value: Tensor) -> Tensor:
    """A parameter gathered along one mesh dimension after another, which `full_tensor` warns of."""
    if not isinstance(value, DTensor):
        return value
    for index in range(value.device_mesh.ndim):
        value = value.redistribute(placements=[Replicate()] * (index + 1) + list(value.placements[index + 1 :]))
    return value.to_local()


@contextlib.contextmanager
def agreed(mesh: DeviceMesh) -> Iterator[None]:
    """A block that fails on all processes if it fails on one; each of them must enter it.

    Raises:
        Exception: the one that any of them met.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # of any kind: the others would wait forever
        error = raised
    for index, size in enumerate(mesh.shape):
        if size > 1:
            errors: list[Exception | None] = [None] * size
            dist.all_gather_object(errors, error, group=mesh.get_group(index))
            error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error
