"""What `jax_impl` costs on a TPU, without one: libtpu compiles ahead of time, and the optimised HLO is counted.

Programs, each with x in bfloat16 and weights in float32:

* ``forward``: one layer;
* ``both``: one layer and its gradients, of x and of every weight;
* ``stack``: four by `jax.lax.scan` under `jax.checkpoint` with `sharding.keep_coefficients`, and gradients; two a
  round, as a transformer's layer has (with one, x is copied in each round, since it is carried from one to the next);
* ``unrolled``: the same scan with all four in one round;
* ``line``: the same four one after the other, without a scan: what XLA then doesn't copy to and from stacked buffers;
* ``line-inputs``: by `sharding.keep_inputs`, which keeps u too;
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
from collections.abc import Callable
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
from tpu_programs import KINDS, SHAPES, STACKED, TOPOLOGIES, WIDTHS, Program, programs  # noqa: E402

from conformance.files import atomic, document  # noqa: E402
from jax_impl import MHCConfig, functional, post, pre, sharding  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "tpu-aot.json"
MODEL: dict[str, Any] = {"topology": "v5e:16x16", "mesh": {"data": 4, "fsdp": 8, "tensor": 8}, "batch": 32, "seq": 4096}


def layer(x: jax.Array, weights: functional.Weights, config: MHCConfig, backend: str = "plain") -> jax.Array:
    """One site around a sub-layer that is a barrier."""
    u, context, _ = pre(x, weights, config, shards=sharding.current(), backend=backend)
    return post(lax.optimization_barrier(u), context)


def layers(x: jax.Array, weights: functional.Weights, config: MHCConfig, backend: str, unroll: int) -> jax.Array:
    """As many sites as the weights have on their first axis, so many a round."""

    # inside a scan nothing is there to be merged with what is computed again (documentation of `jax.checkpoint`)
    @partial(jax.checkpoint, policy=sharding.keep_coefficients, prevent_cse=False)
    def step(x: jax.Array, weights: functional.Weights) -> tuple[jax.Array, None]:
        return layer(x, weights, config, backend), None

    return lax.scan(step, x, weights, unroll=unroll)[0]


def line(x: jax.Array, weights: functional.Weights, config: MHCConfig, backend: str, policy: Any) -> jax.Array:
    """The same sites one after the other, each a checkpoint of this policy."""
    site = jax.checkpoint(partial(layer, config=config, backend=backend), policy=policy)
    for index in range(STACKED):
        x = site(x, {name: value[index] for name, value in weights.items()})
    return x


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
    functions: dict[str, Callable[..., jax.Array]] = {
        "stack": partial(layers, unroll=2),
        "unrolled": partial(layers, unroll=STACKED),
        "line": partial(line, policy=sharding.keep_coefficients),
        "line-inputs": partial(line, policy=sharding.keep_inputs),
    }
    function = partial(functions.get(program.kind, layer), config=config, backend=program.backend)
    lead = (STACKED,) if program.stacked else ()
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
    if program.backend != "plain":
        found["backend"] = program.backend
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
        document.rewrite(arguments.write, "tpu kernels", kernel_table(held))
    return 0


def kernel_table(held: dict[str, dict[str, Any]]) -> str:
    """A row for each topology that the kernels are compiled for, and the sites in a line under it."""
    lines = [
        f"| devices | {' | '.join(f'(4, 4096, 4, {width})' for width in WIDTHS)} |",
        f"|---|{'---|' * len(WIDTHS)}",
    ]
    placed = [
        (dialect, generation, devices, name)
        for dialect in ("deepseek-v4", "maxtext")
        for generation, topology in TOPOLOGIES.items()
        for devices, name in topology.items()
    ]
    for dialect, generation, devices, name in placed:
        cells = []
        for width in WIDTHS:
            made = [Program(generation, devices, dialect, (4, 4096, 4, width), k, "pallas") for k in KINDS]
            found = [held[one.name] for one in made if one.name in held]
            cells.append(" / ".join(f"{one['moved units']:.2f}" for one in found))
        if any(cells):
            title = f"{devices}, {name}" if devices > 1 else f"1, {generation}"
            title += ", maxtext's dialect" if dialect == "maxtext" else ""
            lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| one v5e, (4, 4096, 4, 7168), four checkpointed sites | kernels | plain path |", "|---|---|---|"]
    titles = {
        "stack": "in a scan",
        "unrolled": "in a scan, all in one round",
        "line": "one after the other",
        "line-inputs": "one after the other, u kept too",
    }
    for kind, title in titles.items():
        made = [Program("v5e", 1, "deepseek-v4", SHAPES[-1], kind, backend) for backend in ("pallas", "plain")]
        found = [held.get(one.name) for one in made]
        cells = [
            f"{one['moved units']:.1f}, {one['temporary bytes'] / 2**20:,.0f} MiB temporary" if one else "-"
            for one in found
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


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
