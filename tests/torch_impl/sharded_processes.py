"""Processes of this machine (gloo) that run checks on sharded modules, and what the checks share."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, one_hot
from torch_impl import sharding as sharded

LIMIT = 150  # seconds for one launch
DIALECTS = ("deepseek-v4", "deepseek-v4.1", "paper", "maxtext", "megatron", "xing-4", "mhc-lite", "hunyuan-v4")
PLANS = {
    2: [{"data": 2}, {"fsdp": 2}, {"sequence": 2}, {"tensor": 2}],
    4: [
        {"data": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 2},
        {"data": 2, "fsdp": 2},
        {"sequence": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 2},
        {"data": 2, "sequence": 2},
        {"data": 4},
        {"tensor": 4},
    ],
}
N, DIM, BATCH, SEQ = 4, 8, 4, 4


def launch(world: int, *checks, path: Path | None = None) -> None:
    """Runs the checks on new processes one after another; the first failure ends all and is shown."""
    # Forked from a server that has imported all this: 4 processes start in 1 s instead of 7 on 2 cores.
    modules = ["pytest", "torch_impl.sharding", "torch.distributed.checkpoint", "torch.distributed.tensor.parallel"]
    multiprocessing.set_forkserver_preload(modules)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running: Any = start_processes(
        _process, (world, port, checks, path), nprocs=world, join=False, start_method="forkserver"
    )
    end = time.monotonic() + LIMIT
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < end, f"{[c.__name__ for c in checks]} took longer than {LIMIT} s"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()


def _process(rank: int, world: int, port: int, checks, path: Path | None) -> None:
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = f"tcp://127.0.0.1:{port}"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=limit)
    for check in checks:
        for plan in PLANS[world] if "mesh" in check.__annotations__ else [{}]:
            try:
                if plan:
                    check(mesh_of(plan))
                else:
                    check(path)
            except BaseException as error:
                error.add_note(f"{check.__name__} on {world} processes, {plan}, rank {rank}")
                raise
    dist.barrier()
    dist.destroy_process_group()


def mesh_of(plan: dict[str, int]) -> DeviceMesh:
    return sharded.make_mesh(device_type="cpu", **plan)


def make(name="maxtext", kind: type[Any] = ManifoldConstrainedHyperConnections, dtype=torch.float64, seed=0) -> Any:
    module = kind(MHCConfig.from_dialect(name, streams=N, dim=DIM), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.weights().values():
            value.normal_(generator=generator).mul_(0.5 if value.ndim == 3 else 1.0)
    return module


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, SEQ, N, DIM, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def first_carried(module, x):
    """What a single-pass site at the start of a stack reads with; None for any other site."""
    return one_hot(x) if module.config.pre_from == "previous" else None


def forward(module, x):
    if isinstance(module, HyperHead):
        return module(x)
    carried = first_carried(module, x)
    return module(lambda u: u * u, lambda inputs: inputs.sin(), x, HyperConnectionType.MLP_DENSE, carried=carried)[0]


def halves(module, x):
    u, context, _ = module.pre(x, first_carried(module, x))
    return module.post((u * u).sin(), context)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def distance(actual, expected):
    actual, expected = actual.detach(), expected.detach()
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1))
