"""What `jax_impl` costs on a TPU, without one: libtpu compiles ahead of time, and the optimised HLO is counted.

Programs, each with x in bfloat16 and weights in float32:

* ``forward``: one layer;
* ``both``: one layer and its gradients, of x and of every weight;
* ``stack``: four by `jax.lax.scan` under `jax.checkpoint` with `sharding.keep_coefficients`, and gradients; two a
  round, as a transformer's layer has (with one, x is copied in each round, since it is carried from one to the next);
* ``model``: 43 layers of two sites on 256 chips, Flax NNX modules (`sharded_init.stack`), with gradients.

The sub-layer between pre and post is `jax.lax.optimization_barrier`: as with a real one, u is written and y is read,
and nothing is fused across it. Of every program are recorded the collectives by kind, count and bytes; the temporary
memory; and the bytes moved to and from main memory (`hlo.traffic`), in units of tokens x dim x 2 bytes,
both of one device, next to the floor of the mathematics: 3n + 2 forward, 5n + 3 backward. The floor of the stack is
four times both; what checkpointing computes again isn't part of it. Where a device's part of x is small, arrays stay in
on-chip memory and less than the floor is moved.

    python benchmarks/tpu_aot.py [--only 'v5e/*/both'] [--json FILE] [--write docs/tpu.md]
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
}  # fmt: skip
for _name, _value in SETTINGS.items():  # libtpu then asks no metadata server, and is needed for its compiler alone
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from hlo.collectives import collectives, tally  # noqa: E402
from hlo.text import Module, parse  # noqa: E402
from hlo.traffic import total  # noqa: E402
from jax import lax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from sharded_init import DIM, LAYERS, STREAMS, Stack, parameter_bytes, stack  # noqa: E402

from conformance.files import atomic, document  # noqa: E402
from jax_impl import MHCConfig, functional, post, pre, sharding  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "tpu-aot.json"
KINDS = ("forward", "both", "stack")
STACKED = 4
SHAPES = ((1, 4096, 4, 2048), (1, 4096, 4, 4096), (4, 4096, 4, 7168))
TOPOLOGIES = {
    "v5e": {1: "v5e:1x1", 8: "v5e:2x4", 16: "v5e:4x4", 64: "v5e:8x8"},
    "v5p": {1: "v5p:2x2x1", 8: "v5p:2x2x2", 64: "v5p:4x4x4"},
    "v6e": {1: "v6e:1x1", 8: "v6e:2x4", 64: "v6e:8x8"},
    "tpu7x": {1: "tpu7x:2x2x1", 8: "tpu7x:2x2x1", 128: "tpu7x:4x4x4"},
}
"""By number of devices; a TPU7x chip is two. Of a topology with more devices than asked for the first is taken."""
MESHES = {
    1: {
        8: {"sequence": 2, "tensor": 4}, 16: {"sequence": 4, "tensor": 4}, 64: {"sequence": 8, "tensor": 8},
        128: {"sequence": 16, "tensor": 8},
    },
    4: {
        8: {"data": 2, "tensor": 4}, 16: {"data": 4, "tensor": 4}, 64: {"data": 4, "sequence": 2, "tensor": 8},
        128: {"data": 4, "sequence": 4, "tensor": 8},
    },
}  # fmt: skip
"""By batch and number of devices."""
MODEL: dict[str, Any] = {"topology": "v5e:16x16", "mesh": {"data": 4, "fsdp": 8, "tensor": 8}, "batch": 32, "seq": 4096}


@dataclass(frozen=True)
class Program:
    """What is compiled: ``kind`` is ``forward``, ``both`` or ``stack``."""

    generation: str
    devices: int
    dialect: str
    shape: tuple[int, int, int, int]
    kind: str

    @property
    def name(self) -> str:
        return f"{self.generation}/{self.devices}/{self.dialect}/{'x'.join(map(str, self.shape))}/{self.kind}"

    @property
    def topology(self) -> str:
        return TOPOLOGIES[self.generation][self.devices]

    @property
    def sizes(self) -> dict[str, Any]:
        """Of the mesh's axes; of one device there is no mesh."""
        if self.devices == 1:
            return {}
        return MESHES[self.shape[0]][self.devices]

    @property
    def config(self) -> MHCConfig:
        return MHCConfig.from_dialect(self.dialect, streams=self.shape[2], dim=self.shape[3])

    @property
    def floor(self) -> int:
        """Units that the mathematics moves."""
        n = self.shape[2]
        both = (3 * n + 2) + (5 * n + 3)
        return {"forward": 3 * n + 2, "both": both, "stack": STACKED * both}[self.kind]

    @property
    def unit(self) -> int:
        """Bytes of one stream on one device: tokens x dim x 2."""
        batch, seq, _, dim = self.shape
        return batch * seq * dim * 2 // math.prod(self.sizes.values())


def programs() -> Iterator[Program]:
    """All of them but the model; MaxText's dialect, which rounds the norm's output, to compare with."""
    for generation, topology in TOPOLOGIES.items():
        for devices in topology:
            for shape in SHAPES:
                for kind in KINDS:
                    yield Program(generation, devices, "deepseek-v4", shape, kind)
                    if (generation, devices) == ("v5e", 1) and kind != "stack":
                        yield Program(generation, devices, "maxtext", shape, kind)


def layer(x: jax.Array, weights: functional.Weights, config: MHCConfig) -> jax.Array:
    """One site around a sub-layer that is a barrier."""
    u, context, _ = pre(x, weights, config, shards=sharding.current())
    return post(lax.optimization_barrier(u), context)


def layers(x: jax.Array, weights: functional.Weights, config: MHCConfig) -> jax.Array:
    """As many sites as the weights have on their first axis."""

    # inside a scan nothing is there to be merged with what is computed again (documentation of `jax.checkpoint`)
    @partial(jax.checkpoint, policy=sharding.keep_coefficients, prevent_cse=False)
    def step(x: jax.Array, weights: functional.Weights) -> tuple[jax.Array, None]:
        return layer(x, weights, config), None

    return lax.scan(step, x, weights, unroll=2)[0]


def with_gradients(function: Callable[..., jax.Array], x: jax.Array, weights: Any, cotangent: jax.Array) -> Any:
    """The output, and the gradients of x and the weights."""
    out, pull = jax.vjp(function, x, weights)
    return out, *pull(cotangent)


@dataclass(frozen=True)
class Compiled:
    """The optimised HLO, and the compiler's account of the memory."""

    module: Module
    memory: Any


def compiled(program: Program) -> Compiled:
    devices = topologies.get_topology_desc(program.topology, platform="tpu").devices[: program.devices]
    config, shapes = program.config, functional.weight_shapes(program.config)
    function = partial(layers if program.kind == "stack" else layer, config=config)
    lead = (STACKED,) if program.kind == "stack" else ()
    if program.devices == 1:
        where: Any = jax.sharding.SingleDeviceSharding(devices[0])
        held: Any = dict.fromkeys(shapes, where)
        mesh = None
    else:
        mesh = sharding.make_mesh(**program.sizes, devices=devices)
        where = jax.NamedSharding(mesh, sharding.partition(sharding.activation_axes(4), mesh, sharding.RULES))
        held = {
            name: jax.NamedSharding(mesh, jax.P(*(None,) * len(lead), *one.spec))
            for name, one in sharding.weight_shardings(shapes, mesh).items()
        }
    x = jax.ShapeDtypeStruct(program.shape, jnp.bfloat16, sharding=where)
    weights = {k: jax.ShapeDtypeStruct((*lead, *s), jnp.float32, sharding=held[k]) for k, s in shapes.items()}
    if program.kind == "forward":
        run, arguments = jax.jit(function, out_shardings=where), (x, weights)
    else:
        run = jax.jit(partial(with_gradients, function), out_shardings=(where, where, held))
        arguments = (x, weights, x)
    with sharding.use(mesh) if mesh else contextlib.nullcontext():
        return finished(run.lower(*arguments), dumped=program.generation == "tpu7x")


def finished(lowered: Any, dumped: bool = False) -> Compiled:
    """Compiled; the HLO is the executable's own, or ``dumped`` on the way.

    That of a TPU7x can't always be had from the executable: the operands of its asynchronous collectives come with
    their ``async-update``, and converting them fails.
    """
    if not dumped:
        executable = lowered.compile()
        return Compiled(parse(executable.as_text()), executable.memory_analysis())
    with tempfile.TemporaryDirectory() as folder:
        executable = lowered.compile(compiler_options={"xla_dump_to": folder})
        (file,) = Path(folder).glob("*.after_optimizations.txt")
        return Compiled(parse(file.read_text()), executable.memory_analysis())


def figures(made: Compiled) -> dict[str, Any]:
    return {
        "collectives": tally(collectives(made.module)),
        "temporary bytes": made.memory.temp_size_in_bytes,
        "moved bytes": total(made.module),
    }


def measure(program: Program) -> dict[str, Any]:
    """The program and its figures, as they are recorded."""
    found = figures(compiled(program))
    return {
        "topology": program.topology, "devices": program.devices, "mesh": program.sizes, "dialect": program.dialect,
        "shape": list(program.shape), "program": program.kind, **found, "unit bytes": program.unit,
        "moved units": round(found["moved bytes"] / program.unit, 2), "floor units": program.floor,
    }  # fmt: skip


def measure_model() -> dict[str, Any]:
    """43 layers of two sites on 256 chips: a loss's gradients, and the making of the parameters."""
    devices = topologies.get_topology_desc(MODEL["topology"], platform="tpu").devices
    mesh = sharding.make_mesh(**MODEL["mesh"], devices=devices)

    def loss(model: Stack, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(model(x).astype(jnp.float32)))

    with sharding.use(mesh):
        made: Any = nnx.jit(stack).lower().compile().memory_analysis()
        model = nnx.eval_shape(stack)
        where = jax.NamedSharding(mesh, sharding.partition(sharding.activation_axes(4)))
        shape = (MODEL["batch"], MODEL["seq"], STREAMS, DIM)
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
        program = finished(nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1))).lower(model, x))
    found = figures(program)
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))
    unit = math.prod(shape) // STREAMS * 2 // len(devices)
    return {
        "topology": MODEL["topology"], "devices": len(devices), "mesh": MODEL["mesh"], "dialect": "deepseek-v4",
        "shape": list(shape), "program": "model", "layers": LAYERS, "sites": 2 * LAYERS, **found,
        "largest collective bytes": max(one.bytes for one in collectives(program.module)),
        "parameter bytes": parameter_bytes(model),
        "parameter bytes a device": sum(4 * math.prod(v.sharding.shard_shape(v.shape)) for v in weights),
        "initialisation temporary bytes": made.temp_size_in_bytes, "unit bytes": unit,
        "moved units": round(found["moved bytes"] / unit, 2), "floor units": 2 * LAYERS * (8 * STREAMS + 5),
    }  # fmt: skip


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("flax", "jax", "jaxlib", "libtpu")}


def recorded(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """By name, the programs that were recorded with these versions."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    return held["programs"] if held["versions"] == versions() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", action="append", metavar="PATTERN",
        help="compile what matches, e.g. 'v5e/8/*' (generation/devices/dialect/shape/program, or 'model'), and keep "
        "the other figures",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, default=RESULTS, help="the figures, kept and brought up to date")
    parser.add_argument("--write", type=Path, help="put the table between the tpu markers of this document")
    arguments = parser.parse_args()
    measures: dict[str, Callable[[], dict[str, Any]]] = {p.name: partial(measure, p) for p in programs()}
    measures["model"] = measure_model
    chosen = [n for n in measures if any(fnmatch.fnmatch(n, p) for p in arguments.only or ["*"])]
    if not chosen:
        parser.error(
            f"--only {' '.join(arguments.only)}: no program is called that, but e.g. {next(iter(measures))} is"
        )
    held = recorded(arguments.json)
    for name in chosen:
        start = time.perf_counter()
        held[name] = measures[name]()
        entry = held[name]
        print(f"{name:44} {entry['moved units']:8.2f} units, floor {entry['floor units']}", end="  ")
        print(f"sent: {sent(entry)}; {time.perf_counter() - start:.0f} s", flush=True)
        ordered = {key: held[key] for key in measures if key in held}
        atomic.write(arguments.json, json.dumps({"versions": versions(), "programs": ordered}, indent=1) + "\n")
    if arguments.write:
        document.rewrite(arguments.write, "tpu", table(held))
    return 0


def table(held: dict[str, dict[str, Any]]) -> str:
    """A row for each topology: units of each shape; of the largest, what is sent and the temporary memory."""
    shapes = [f"({', '.join(map(str, shape))})" for shape in SHAPES]
    floors = " / ".join(str(Program("v5e", 1, "deepseek-v4", SHAPES[0], kind).floor) for kind in KINDS)
    lines = [
        f"| devices | {' | '.join(shapes)} | sent | temporary, MiB |",
        f"|---|{'---|' * len(shapes)}---|---|",
        f"| floor | {' | '.join([floors] * len(shapes))} | | |",
    ]
    for dialect in ("deepseek-v4", "maxtext"):
        for generation, topology in TOPOLOGIES.items():
            for devices, name in topology.items():
                cells = []
                for shape in SHAPES:
                    found = [held.get(Program(generation, devices, dialect, shape, kind).name) for kind in KINDS]
                    cells.append(" / ".join(f"{one['moved units']:.1f}" if one else "-" for one in found))
                if any(found):
                    last = [one for one in found if one]
                    memory = " / ".join(f"{one['temporary bytes'] / 2**20:.0f}" for one in last)
                    parts = "; ".join(
                        f"{joined(last, kind, 'count', 1)} {kind}, {joined(last, kind, 'bytes', 2**20)} MiB"
                        for kind in sorted({kind for one in last for kind in one["collectives"]})
                    )
                    note = ", maxtext's dialect" if dialect == "maxtext" else ""
                    title = f"{devices}, {name}" if devices > 1 else f"1, {generation}{note}"
                    lines.append(f"| {title} | {' | '.join(cells)} | {parts or 'nothing'} | {memory} |")
    lines.append("")
    model = held.get("model")
    if model:
        lines += [describe(model), ""]
    return "\n".join(lines)


def joined(entries: list[dict[str, Any]], kind: str, what: str, unit: int) -> str:
    """Count or bytes of one kind of collective in each entry."""
    values = [entry["collectives"].get(kind, {}).get(what, 0) / unit for entry in entries]
    return " / ".join(f"{value:.{0 if unit == 1 else 2}f}" for value in values)


def describe(model: dict[str, Any]) -> str:
    """The model in a few sentences."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in model["mesh"].items())
    parameters = f"{model['parameter bytes'] / 1e6:.1f} MB, {model['parameter bytes a device'] / 1e6:.2f} MB a device"
    moved = f"{model['moved units']:.0f} units, floor {model['floor units']}"
    made = f"{model['initialisation temporary bytes'] / 2**20:.2f} MiB besides them"
    return (
        f"{model['layers']} layers of two sites, x {model['shape']}, on {model['devices']} devices "
        f"({model['topology']}; {mesh}), with gradients. Parameters: {parameters}; making them takes {made}. "
        f"Temporary: {model['temporary bytes'] / 2**20:.0f} MiB. Sent: {sent(model)}. Moved: {moved}."
    )


def sent(entry: dict[str, Any]) -> str:
    """The collectives in words: how many, and what arrives on a device in all."""
    parts = [f"{v['count']} {k}, {v['bytes'] / 2**20:.2f} MiB" for k, v in entry["collectives"].items()]
    return ", ".join(parts) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
