"""The layer on a mesh: batch over data and fsdp, seq over sequence, dim over tensor, the streams whole everywhere.

With dim sharded a site's forward is one all-reduce of n² + 2n + 1 numbers a token, and its backward one of n² + 2n
(`functional.coefficients` has the exceptions); data, fsdp and sequence move no activations. Parameters are FSDP2's:
gathered before use and their gradients reduced over data, fsdp and sequence together, which for these parameters are
one kind of data parallelism.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torch_impl import ends, functional, models
from torch_impl.config import MHCConfig
from torch_impl.modules import ManifoldConstrainedHyperConnections, Mixing, Site
from torch_impl.shards import TensorShards, agreed, agreed_seed, broadcast, mesh_of, whole

__all__ = [
    "AXES",
    "Sharding",
    "agreed",
    "agreed_seed",
    "check_divisible",
    "data_mesh",
    "gather",
    "load_weights",
    "make_mesh",
    "mesh_of",
    "parallelize",
    "save_weights",
    "shard",
    "whole",
]

AXES = ("data", "fsdp", "sequence", "tensor")
Module = TypeVar("Module", bound=nn.Module)


def make_mesh(
    *, data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, device_type: str | None = None
) -> DeviceMesh:
    """A mesh of all processes with the dimensions `AXES`; tensor ranks are neighbours.

    Args:
        data, fsdp: parts of the batch; parameters are whole over data and sharded over fsdp.
        sequence: parts of seq.
        tensor: parts of dim.
        device_type: ``"cuda"``, ``"cpu"``, ...; this machine's accelerator, or the CPU under gloo, unless given.

    Raises:
        RuntimeError: torch.distributed isn't initialised.
        ValueError: an axis below 1, or the product isn't the number of processes.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed must be initialised, it isn't: start the program with torchrun and call "
            "torch.distributed.init_process_group() before make_mesh"
        )
    sizes = (data, fsdp, sequence, tensor)
    for axis, size in zip(AXES, sizes, strict=True):
        if type(size) is not int or size < 1:
            raise ValueError(f"{axis} must be an integer of at least 1, got {size!r}")
    if math.prod(sizes) != dist.get_world_size():
        product = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"{product} must multiply to the number of processes, {dist.get_world_size()}, got {math.prod(sizes)}: "
            f"change an axis or start {math.prod(sizes)} processes"
        )
    if device_type is None:
        accelerator = torch.accelerator.current_accelerator() if dist.get_backend() != "gloo" else None
        device_type = accelerator.type if accelerator else "cpu"
    return init_device_mesh(device_type, sizes, mesh_dim_names=AXES)


def _size(mesh: DeviceMesh, axis: str) -> int:
    """Processes along one axis.

    Raises:
        ValueError: a mesh of other dimensions.
    """
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"mesh must have the dimensions {AXES}, got {mesh.mesh_dim_names}: use sharding.make_mesh")
    return mesh.size(AXES.index(axis))


def check_divisible(mesh: DeviceMesh, shape: Sequence[int], gates: bool = False) -> None:
    """Checks that every process can have an equal part of ``[batch, seq, streams, dim]`` or ``[batch, seq, dim]``.

    Args:
        gates: the shape is ``[batch, seq, streams]``, of gates, whose last axis is whole everywhere.

    Raises:
        ValueError: another number of dimensions, or one that its axes don't divide.
    """
    if gates and len(shape) != 3:
        raise ValueError(f"gates must be [batch, seq, streams], got {list(shape)}")
    if len(shape) not in (3, 4):
        raise ValueError(f"x must be [batch, seq, streams, dim] or [batch, seq, dim], got {list(shape)}")
    for name, size, axes in (
        ("batch", shape[0], ("data", "fsdp")),
        ("seq", shape[1], ("sequence",)),
        ("dim", shape[-1], () if gates else ("tensor",)),
    ):
        parts = math.prod(_size(mesh, axis) for axis in axes)
        if size % parts:
            product = " x ".join(f"{axis}={_size(mesh, axis)}" for axis in axes)
            raise ValueError(
                f"{name} must be a multiple of {product}, got {size}: change {name} or the mesh's {' or '.join(axes)}"
            )


def _placements(names: Sequence[str], ndim: int) -> list[Shard]:
    """Where x, u, y and out of ``ndim`` dimensions stand on mesh dimensions of these names."""
    where = {"data": 0, "fsdp": 0, "sequence": 1, "tensor": ndim - 1}
    return [Shard(where[name]) for name in names]


def shard(x: Tensor, mesh: DeviceMesh, *, gates: bool = False) -> Tensor:
    """This process's part of a whole tensor that all processes have; no communication.

    Args:
        x: ``[batch, seq, streams, dim]`` or ``[batch, seq, dim]``.
        gates: x is ``[batch, seq, streams]``, gates or what a single-pass site reads with, whole over tensor.

    Raises:
        ValueError: an axis doesn't divide its dimension (`check_divisible`).
    """
    check_divisible(mesh, x.shape, gates)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement, index, parts in zip(AXES, _placements(AXES, x.ndim), coordinate, mesh.shape, strict=True):
        if not (gates and axis == "tensor"):
            x = x.chunk(parts, placement.dim)[index]
    return x.contiguous()


@torch.no_grad()
def gather(x: Tensor, mesh: DeviceMesh, *, gates: bool = False) -> Tensor:
    """The whole tensor from every process's part, on every process; without gradient.

    Args:
        x: this process's part of ``[batch, seq, streams, dim]`` or ``[batch, seq, dim]``, or the DTensor of it.
        gates: x is a part of ``[batch, seq, streams]``, whole over tensor.
    """
    if isinstance(x, DTensor):
        return x.full_tensor()
    for index, placement in reversed(list(enumerate(_placements(AXES, x.ndim)))):
        if mesh.size(index) > 1 and not (gates and AXES[index] == "tensor"):
            parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(mesh.size(index))]
            dist.all_gather(parts, x.contiguous(), group=mesh.get_group(index))
            x = torch.cat(parts, placement.dim)
    return x


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a parallelised module computes: on this process's parts, DTensors unwrapped and wrapped again."""

    mesh: DeviceMesh
    shards: TensorShards | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        return self  # process groups can't be copied

    def _local(self, value: Tensor, name: str) -> Tensor:
        if not isinstance(value, DTensor):
            return value
        names, mesh = value.device_mesh.mesh_dim_names or (), value.device_mesh
        if not set(names) <= set(AXES):
            raise ValueError(f"{name} must be on a mesh with dimensions among {AXES}, got {names}")
        expected = _placements(names, value.ndim)
        for axis, size, placement, right in zip(names, mesh.shape, value.placements, expected, strict=True):
            if size > 1 and placement != right:
                raise ValueError(f"{name} must be {right} on {axis!r}, got {placement}: redistribute it first")
        return value.to_local(grad_placements=value.placements)

    def _like(self, value: Tensor, model: Tensor) -> Tensor:
        if not isinstance(model, DTensor):
            return torch.ops.aten._unsafe_view(value, value.shape)  # the same memory, and no view: FSDP warns of views
        mesh = model.device_mesh
        return DTensor.from_local(value, mesh, _placements(mesh.mesh_dim_names or (), value.ndim), run_check=False)

    def _weights(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters as FSDP hands them over, without the tensor axis: each part's gradient is that part's own."""
        return {
            name: v.to_local(grad_placements=v.placements) if isinstance(v, DTensor) else v for name, v in whole.items()
        }

    def pre(
        self, x: Tensor, parameters: Mapping[str, Tensor], config: MHCConfig, carried: Tensor | None, backend: str
    ) -> Mixing:
        """u, post, H and the pre handed on of `functional.pre` on parts; all but u are this process's tokens, whole."""
        local, weights = self._local(x, "x"), self._weights(parameters)
        u, context, handed = functional.pre(local, weights, config, carried, shards=self.shards, backend=backend)
        # Copies, since FSDP hangs its hooks on what is returned, and warns of views.
        return self._like(u, x), context.post.clone(), context.H.clone(), None if handed is None else handed.clone()

    def post(self, y: Tensor, context: functional.Context) -> Tensor:
        """`functional.post` on parts.

        Raises:
            ValueError: one of y and the context's x is a DTensor, the other isn't.
        """
        if isinstance(y, DTensor) != isinstance(context.x, DTensor):
            kinds = [type(value).__name__ for value in (context.x, y)]
            raise ValueError(f"y must be a DTensor where x is one, got x {kinds[0]} and y {kinds[1]}: wrap or unwrap y")
        out = functional.post(self._local(y, "y"), context._replace(x=self._local(context.x, "x")))
        return self._like(out, context.x)

    def one_hot(self, x: Tensor) -> Tensor:
        """`ends.one_hot` of this process's tokens."""
        return ends.one_hot(self._local(x, "x"))

    def reduce(self, x: Tensor, config: MHCConfig, carried: Tensor | None) -> Tensor:
        """`ends.reduce` on parts; ``carried`` is this process's tokens', whole."""
        local, options = self._local(x, "x"), {"reduction": config.reduction, "shards": self.shards}
        return self._like(ends.reduce(local, str(config.reduce), carried, **options), x)

    def head(self, x: Tensor, parameters: Mapping[str, Tensor], config: MHCConfig, backend: str) -> Tensor:
        """`functional.head` on parts."""
        local, weights = self._local(x, "x"), self._weights(parameters)
        return self._like(functional.head(local, weights, config, shards=self.shards, backend=backend), x)


def parallelize(
    module: Module,
    mesh: DeviceMesh,
    *,
    gradients: str = "mean",
    policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | None = None,
) -> Module:
    """Shards the parameters of every layer and head in ``module``, in place; all else in it is left as it is.

    Projections and norm weights are split over dim by tensor, and by fsdp within that; gates and biases are whole over
    tensor. Afterwards the modules take this process's parts of x (`shard`), or DTensors and return such. Values are
    those of the mesh's first process, or none yet: parameters on the meta device are made by ``to_empty`` and
    ``reset_parameters``. The remaining modules' `fully_shard` and the optimizer must come later, as FSDP has it.

    Args:
        gradients: ``"mean"``, FSDP's default: of the mean of all processes' losses over data, fsdp and sequence;
            ``"sum"``: of their sum. Over tensor a loss is the sum of what the processes compute from their parts.
        policy: of FSDP; parameters are kept in their dtype, gathered and their gradients reduced in float32 or wider,
            and activations taken as they come, unless given.
        reshard_after_forward: of FSDP.

    Raises:
        ValueError: no layer or head, another word for ``gradients``, or a dim that fsdp x tensor doesn't divide.
    """
    sites = {name: child for name, child in module.named_modules() if isinstance(child, Site)}
    if not sites:
        raise ValueError(f"module must have a ManifoldConstrainedHyperConnections or a HyperHead, got {module}")
    if gradients not in ("mean", "sum"):
        raise ValueError(f"gradients must be mean or sum, got {gradients!r}")
    parts = _size(mesh, "fsdp") * _size(mesh, "tensor")
    for name, site in sites.items():
        if site.sharding is not None:
            raise ValueError(f"{name or 'module'} must not be sharded yet, it is: call parallelize once")
        if site.config.dim % parts:
            raise ValueError(
                f"dim of {name or 'module'} must be a multiple of fsdp={_size(mesh, 'fsdp')} x "
                f"tensor={_size(mesh, 'tensor')}, got {site.config.dim}: change dim, or replace fsdp by data"
            )
    reduced = data_mesh(mesh)
    for site in sites.values():
        _distribute(site, mesh)
        if reduced is not None:
            _fully_shard(site, reduced, gradients, policy, reshard_after_forward)
    return module


def _distribute(site: Site, mesh: DeviceMesh) -> None:
    """The first process's values on every one, each with its part of dim over tensor."""
    count = _size(mesh, "tensor")
    site.sharding = Sharding(mesh, TensorShards(mesh.get_group("tensor")) if count > 1 else None)
    if not any(value.is_meta for value in site.parameters()):
        site.to(mesh.device_type)
        for value in site.parameters():
            broadcast(value.detach(), mesh)
    if count == 1:
        return
    for name, value in site.weights().items():
        placement = Shard(1) if name in functional.SHARDED else Replicate()
        part = distribute_tensor(value.detach(), mesh["tensor"], [placement], src_data_rank=None)
        site.register_parameter(name.replace(".", "_"), nn.Parameter(part, requires_grad=value.requires_grad))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """What FSDP reduces gradients over: data and sequence as one replicated dimension, and fsdp.

    Returns:
        The mesh for `fully_shard` of a model's other modules too; None where all the processes are along tensor.
    """
    replicated = tuple(axis for axis in ("data", "sequence") if _size(mesh, axis) > 1)
    if not replicated:
        return mesh["fsdp"] if _size(mesh, "fsdp") > 1 else None
    outer = mesh[replicated]
    return DeviceMesh._concatenate([outer._flatten() if outer.ndim > 1 else outer, mesh["fsdp"]])


def _fully_shard(
    site: Site, mesh: DeviceMesh, gradients: str, policy: MixedPrecisionPolicy | None, reshard: bool | None
) -> None:
    split = {id(value) for name, value in site.weights().items() if name in functional.SHARDED}
    if policy is None:
        # Of narrow parameters each process's gradient would be rounded before they are added up: 145 times the bound.
        wide = torch.float32 if any(value.dtype.itemsize < 4 for value in site.parameters()) else None
        policy = MixedPrecisionPolicy(param_dtype=wide, reduce_dtype=wide, cast_forward_inputs=False)
    fully_shard(
        site,
        mesh=mesh,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda value: Shard(1 if id(value) in split else 0),
        mp_policy=policy,
    )
    assert isinstance(site, FSDPModule)
    if gradients == "sum":
        site.set_gradient_divide_factor(1.0)
    # Gloo and premultiplied sums: neither ReduceOp.AVG nor PREMUL_SUM is there, a plain sum is everywhere.
    site.set_force_sum_reduction_for_comms(True)
    if isinstance(site, ManifoldConstrainedHyperConnections):
        register_fsdp_forward_method(site, "_pre")


def load_weights(site: Site, path: str | Path, prefix: str = "", *, insist: bool = False, round: bool = False) -> None:
    """Fills a sharded layer or head from a canonical file; each process reads only its own parts of it.

    Raises:
        ValueError: as `weights.load_weights`, on every process if on one.
    """
    models.load_sites(path, {prefix: site}, insist, round, whole=False)


def save_weights(site: Site, path: str | Path, prefix: str = "", *, replace: bool = False) -> None:
    """Writes a sharded layer or head as the canonical file of the whole one; the mesh's first process writes.

    Raises:
        ValueError: as `weights.save_weights`, on every process.
        OSError: as `weights.save_weights`, on every process.
    """
    models.save_sites(path, {prefix: site}, replace)
