"""`torch_impl` on a mesh for the suite: a process a device, gloo on CPUs and nccl on GPUs."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import torch_impl
import torch_impl.config
from conformance.adapters import branch
from conformance.adapters.torch_adapter import configuration
from conformance.adapters.torch_gradients import settings, to_numpy, to_torch
from conformance.cases.case import DTYPES
from conformance.interface import Arrays, Capabilities, Result, SetupError
from conformance.mesh import Member
from conformance.stages import STAGES, relevant
from torch_impl import sharding
from torch_impl.weights import local_part

STAGES_HERE = ("pre", "head", "layer", "stack")


class TorchMesh:
    """Modules of `torch_impl` under FSDP2 and tensor parallelism; gradients of the sum of all processes' losses.

    Raises:
        SetupError: not a process for each device, too few GPUs, or a process is missing.
    """

    def __init__(self, member: Member):
        self.name = "torch"
        self._device = _join(member)
        self._mesh = sharding.make_mesh(**member.mesh.sizes, device_type=self._device.type)
        self._modules: dict[Any, nn.ModuleList] = {}
        self.capabilities = Capabilities(
            stages=frozenset(STAGES_HERE),
            dialects=frozenset(torch_impl.config.dialects()),
            dtypes=frozenset(DTYPES),
            overrides=None,
            device=self._device.type,
            description=f"torch_impl, torch {torch.__version__}, {dist.get_backend()}, {member.processes} processes",
            settings={**settings(), "mesh": str(member.mesh)},
        )

    def pre(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._call("pre", inputs, config, cotangents)

    def head(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._call("head", inputs, config, cotangents)

    def layer(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._call("layer", inputs, config, cotangents)

    def stack(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._call("stack", inputs, config, cotangents)

    def _call(self, stage: str, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        others, weights = branch.split({k: to_torch(np.array(v)).to(self._device) for k, v in inputs.items()})
        c = configuration(config)
        lead = (config["layers"],) if stage == "stack" else ()
        shaped = branch.in_memory(weights, c.streams, c.dim, lead)
        dtype = next(iter(shaped.values())).dtype
        computed = torch.float64 if torch.float64 in {v.dtype for v in others.values()} - {dtype} else None
        sites = self._sites(stage, c, dtype, computed, config)
        for index, site in enumerate(sites):
            _fill(site, {k: v[index] if lead else v for k, v in shaped.items()})
        leaves = {k: self._part(k, v).detach() for k, v in others.items()}
        wanted = [k for k in leaves if k not in STAGES[stage].constants]
        for name in wanted:
            leaves[name].requires_grad_(cotangents is not None)
        with torch.set_grad_enabled(cotangents is not None):
            outputs = _run(stage, sites, leaves, config)
        gradients: dict[str, np.ndarray] = {}
        if cotangents is not None:
            parts = {k: self._part(k, to_torch(np.array(v)).to(self._device)) for k, v in cotangents.items()}
            reached = [k for k, v in outputs.items() if v.requires_grad]
            torch.autograd.backward([outputs[k] for k in reached], [parts[k].to(outputs[k].dtype) for k in reached])
            for name in wanted:
                gradient = leaves[name].grad
                gradients[name] = self._whole(name, torch.zeros_like(leaves[name]) if gradient is None else gradient)
            layers = [_gradients(site) for site in sites]
            for name, value in weights.items():
                stacked = torch.stack([layer[name] for layer in layers]) if lead else layers[0][name]
                gradients[name] = to_numpy(stacked).reshape(tuple(value.shape))
        return {k: self._whole(k, v.detach()) for k, v in outputs.items()}, gradients

    def _part(self, name: str, value: Tensor) -> Tensor:
        """This process's part of an activation or of the branch's scales ``[dim]``; the rest is whole."""
        if value.ndim >= 3:
            return sharding.shard(value, self._mesh, gates=name in branch.GATES)
        axis = self._mesh["tensor"]
        return value.chunk(axis.size())[axis.get_local_rank()] if name in ("norm_scale", "branch_scale") else value

    def _whole(self, name: str, value: Tensor) -> np.ndarray:
        gates = name in branch.GATES
        return to_numpy(sharding.gather(value, self._mesh, gates=gates) if value.ndim >= 3 else value)

    def _sites(
        self, stage: str, c: torch_impl.MHCConfig, dtype: torch.dtype, wide: torch.dtype | None, config: dict[str, Any]
    ) -> nn.ModuleList:
        """Sharded modules of this configuration: made once, since that takes longer than a case.

        Args:
            wide: what parameters are gathered and their gradients added up in, where x is wider than they are.
        """
        key = (stage == "head", relevant(stage, config), dtype, wide)
        if key not in self._modules:
            self._modules.clear()
            kind = torch_impl.HyperHead if stage == "head" else torch_impl.ManifoldConstrainedHyperConnections
            sites = nn.ModuleList([kind(c, device=self._device, dtype=dtype) for _ in range(config.get("layers", 1))])
            policy = (
                MixedPrecisionPolicy(param_dtype=wide, reduce_dtype=wide, cast_forward_inputs=False) if wide else None
            )
            self._modules[key] = sharding.parallelize(sites, self._mesh, gradients="sum", policy=policy)
        return self._modules[key]


@torch.no_grad()
def _fill(site: Any, values: Mapping[str, Tensor]) -> None:
    """A site's parameters from whole values, of which each process takes its parts."""
    site.zero_grad()
    weights = site.weights()
    if isinstance(site, FSDPModule):
        site.reshard()
        weights = cast(Any, site).weights()
    for name, parameter in weights.items():
        local, part = local_part(parameter)
        local.copy_(values[name][part])


def _gradients(site: Any) -> dict[str, Tensor]:
    return {name: _gradient(value) for name, value in site.weights().items()}


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _run(stage: str, sites: Any, values: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    carried = values.get("carried")
    if stage == "pre":
        u, _, handed = sites[0].pre(values["x"], carried)
        return {"u": u} if handed is None else {"u": u, "pre": handed}
    if stage == "head":
        return {"out": sites[0](values["x"])}
    kind = config["branch"] if stage == "layer" else "mlp_dense"
    call = branch.norm_fn(values), branch.branch_fn(kind, values)
    if stage == "layer":
        out, metadata = sites[0](*call, values["x"], torch_impl.HyperConnectionType(kind), carried=carried)
        return {"out": out, **{"pre" if k == "carried" else k: v for k, v in metadata.items()}}
    x = torch_impl.expand(values["embedding"], config["streams"])
    carried = torch_impl.one_hot(x) if config["pre_from"] == "previous" else None
    for site in sites:
        x, metadata = site(*call, x, torch_impl.HyperConnectionType(kind), carried=carried)
        carried = metadata.get("carried")
    if config["reduce"] == "none":
        return {"out": x}
    shards = sites[0].sharding.shards
    return {"out": torch_impl.reduce(x, config["reduce"], carried, reduction=config["reduction"], shards=shards)}


def _join(member: Member) -> torch.device:
    """Meets the other processes.

    Raises:
        SetupError: not a process for each device, too few GPUs, or a process is missing.
    """
    if member.processes != member.mesh.devices:
        raise SetupError(
            f"torch has a process for each device: expected {member.mesh.devices} processes, got {member.processes}"
        )
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if torch.cuda.device_count() < member.processes:
            raise SetupError(
                f"the mesh needs {member.processes} GPUs, there are {torch.cuda.device_count()}: make it smaller, or "
                "hide them (CUDA_VISIBLE_DEVICES=) to use the CPU"
            )
        device = torch.device("cuda", member.rank)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{member.address}",
            rank=member.rank,
            world_size=member.processes,
            timeout=datetime.timedelta(seconds=max(1.0, member.limit)),
        )
    except (RuntimeError, dist.DistStoreError) as error:
        raise SetupError(f"not all of {member.processes} processes came within {member.limit:g} s ({error})") from error
    return device


def sharded(member: Member) -> TorchMesh:
    return TorchMesh(member)
