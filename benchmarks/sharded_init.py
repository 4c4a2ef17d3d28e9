"""How much memory it takes to initialise a model in its shards: 43 layers of two sites, C = 7168, n = 4, float32.

Each figure is the rise of a process's peak resident memory (VmHWM) while the parameters are made, after JAX has
started and has run a small program, next to what is expected from their bytes alone. The rise includes what
compiling takes, 20 to 50 MB a process.

* ``sharded``: `jax_impl.sharding.create` over fsdp=4, tensor=2 on 8 virtual devices of one process, where the shards
  together are one whole; the layers are drawn one after the other (`nnx.scan`);
* ``at once``: the same by `nnx.vmap`, where `jax.random` holds counters and bits for all layers besides;
* ``whole``: the same made on one device and put into its shards by `jax.device_put`, two wholes;
* ``processes``: `create` in 4 processes of 2 devices each (`jax.distributed`, gloo on 127.0.0.1), a quarter each.

    python benchmarks/sharded_init.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from conformance.files import atomic
from jax_impl import HyperConnectionType, ManifoldConstrainedHyperConnections, MHCConfig, sharding

LAYERS, STREAMS, DIM = 43, 4, 7168
MESH: dict[str, Any] = {"fsdp": 4, "tensor": 2}
PROCESSES = 4
EXPECTED = {"sharded": 1.0, "at once": 1.0, "whole": 2.0, "processes": 1 / PROCESSES}
"""By the way of making them, how many times all parameters a process should come to hold."""
MOST = {"sharded": 1.5, "processes": 0.6}
"""How many times all parameters its memory may rise by, with what compiling takes; else the exit status is 1."""
LIMIT = 300  # seconds
RESULTS = Path(__file__).parent / "results" / "sharded-init.json"
CONFIG = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=DIM)


class Block(nnx.Module):
    """A layer's two sites; the sub-layers are `jax.lax.optimization_barrier`."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = ManifoldConstrainedHyperConnections(CONFIG, rngs=rngs)
        self.mlp = ManifoldConstrainedHyperConnections(CONFIG, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def attention(inputs_q: jax.Array, inputs_kv: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.optimization_barrier(inputs_q), None

        def mlp(inputs: jax.Array) -> jax.Array:
            return jax.lax.optimization_barrier(inputs)

        x, _ = self.attention(lambda u: u, attention, x, HyperConnectionType.ATTENTION)
        x, _ = self.mlp(lambda u: u, mlp, x, HyperConnectionType.MLP_DENSE)
        return x


class Stack(nnx.Module):
    """All layers, stacked on a first axis of their parameters and run by `nnx.scan`; coefficients are kept."""

    def __init__(self, rngs: nnx.Rngs, one_by_one: bool = True):
        over = nnx.scan if one_by_one else nnx.vmap

        @nnx.split_rngs(splits=LAYERS)
        @over(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def build(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.layers = build(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: "layers"})
        @nnx.remat(policy=sharding.keep_coefficients)
        def run(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        return run(x, self.layers)


def stack(one_by_one: bool = True) -> Stack:
    """The model with its initial values, the same either way.

    Args:
        one_by_one: draw a layer after the other (`nnx.scan`), so that what `jax.random` needs besides its result is
            of one layer; `nnx.vmap` draws all at once.
    """
    return Stack(nnx.Rngs(0), one_by_one)


def parameter_bytes(model: Any) -> int:
    """Of all parameters, whole."""
    return sum(math.prod(v.shape) * v.dtype.itemsize for v in jax.tree.leaves(nnx.state(model, nnx.Param)))


def peak() -> int:
    """Peak resident bytes of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(how: str) -> dict[str, int]:
    """The rise of the peak; runs in a process of its own, which has done nothing else."""
    mesh = sharding.make_mesh(**MESH)
    small = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=64)
    jax.block_until_ready(
        nnx.state(sharding.create(lambda: ManifoldConstrainedHyperConnections(small, rngs=nnx.Rngs(0)), mesh))
    )
    before = peak()
    if how == "whole":
        model = nnx.jit(stack)()
        jax.block_until_ready(nnx.state(model))
        with sharding.use(mesh):
            where = jax.tree.map(
                lambda v: jax.NamedSharding(mesh, sharding.partition((None, *sharding.logical_axes("", v.shape[1:])))),
                nnx.state(model),
            )
        jax.block_until_ready(jax.device_put(nnx.state(model), where))
    else:
        model = sharding.create(partial(stack, how != "at once"), mesh)
        jax.block_until_ready(nnx.state(model))
    after = peak()
    held = sum(
        shard.data.nbytes for v in jax.tree.leaves(nnx.state(model, nnx.Param)) for shard in v.addressable_shards
    )
    return {"rise bytes": after - before, "held bytes": held, "parameter bytes": parameter_bytes(model)}


def run(how: str) -> list[dict[str, int]]:
    """The figures of every process."""
    processes = PROCESSES if how == "processes" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    devices = math.prod(MESH.values()) // processes
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    call = [sys.executable, __file__, "--measure", how, "--port", str(port), "--rank"]
    started = [
        subprocess.Popen([*call, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    try:
        printed = [child.communicate(timeout=LIMIT)[0] for child in started]
    finally:
        for child in started:
            child.kill()
    if any(child.returncode for child in started):
        raise RuntimeError(f"{how}: a process ended with {[child.returncode for child in started]}")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the figures to this file")
    parser.add_argument("--measure", choices=EXPECTED, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        if arguments.measure == "processes":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(f"127.0.0.1:{arguments.port}", PROCESSES, arguments.rank)
        print(json.dumps(measure(arguments.measure)))
        return 0
    over = []
    result: dict[str, Any] = {
        "versions": {name: metadata.version(name) for name in ("flax", "jax", "jaxlib")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "layers": LAYERS, "streams": STREAMS, "dim": DIM,
        "mesh": MESH,
    }  # fmt: skip
    for how, wholes in EXPECTED.items():
        found = run(how)
        whole = found[0]["parameter bytes"]
        result["parameter bytes"] = whole
        result[how] = {
            "devices a process": math.prod(MESH.values()) // len(found), "expected bytes": round(wholes * whole),
            **{key: [one[key] for one in found] for key in ("rise bytes", "held bytes")},
        }  # fmt: skip
        rises = ", ".join(f"{one['rise bytes'] / 1e6:.1f}" for one in found)
        over += [how] if max(one["rise bytes"] for one in found) > MOST.get(how, math.inf) * whole else []
        print(f"{how:9} rise {rises} MB, expected {wholes * whole / 1e6:.1f} MB, of {whole / 1e6:.1f} MB")
    atomic.write(arguments.json, json.dumps(result, indent=1) + "\n")
    for how in over:
        print(f"{how}: a process' memory rose by more than {MOST[how]} times the parameters", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
