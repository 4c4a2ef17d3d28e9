"""The layer on many devices: a mesh, and where inputs and parameters lie on it.

A mesh has the axes ``data``, ``fsdp``, ``sequence`` and ``tensor``, each of any size. Of x ``[batch, seq, streams,
dim]`` batch lies on data and fsdp, seq on sequence, dim on tensor; streams are never sharded. Parameters with a dim
axis hold it on tensor and fsdp, and are gathered over fsdp where they are used; the others are whole everywhere.

Modules that are made or called inside `use` are sharded; plain functions are handed the shards::

    with sharding.use(mesh):
        u, context, _ = pre(x, weights, config, shards=sharding.current())

The same code runs with automatic sharding (XLA propagates it) and with explicit axis types (it is part of every
array's type), since nothing in `functional` flattens (streams, dim). Communication, on either:

* Forward: none for data and sequence. For tensor one all-reduce of n*n + 2n + 1 numbers a token and site, or two where
  the dialect rounds the norm's output. For fsdp a gather of the projections.
* Backward: for tensor n*n + 2n numbers, one more where the norm's output is rounded. Gradients of fsdp-sharded
  parameters are reduce-scattered, then summed over the copies; small replicated parameters need one more all-reduce.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_impl.projections import COEFFICIENTS, INPUTS
from jax_impl.shards import (
    RULES,
    MeshShards,
    Rules,
    activation_axes,
    agreed,
    check_even,
    constrain,
    current,
    gate_axes,
    gather,
    keep_coefficients,
    keep_inputs,
    logical_axes,
    partition,
)

__all__ = [
    "AXES",
    "COEFFICIENTS",
    "INPUTS",
    "RULES",
    "MeshShards",
    "Rules",
    "activation_axes",
    "agreed",
    "check_divisible",
    "constrain",
    "create",
    "current",
    "gate_axes",
    "gather",
    "keep_coefficients",
    "keep_inputs",
    "logical_axes",
    "make_mesh",
    "partition",
    "place",
    "shard",
    "use",
    "weight_shardings",
]

AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    explicit: bool = False,
) -> Mesh:
    """A mesh of these sizes.

    Args:
        data, fsdp: parts of the batch; parameters are whole over data and sharded over fsdp.
        sequence: parts of seq.
        tensor: parts of dim.
        devices: all of `jax.devices` unless given.
        explicit: make sharding a part of the arrays' types (`jax.sharding.AxisType.Explicit`).

    Raises:
        ValueError: a size below 1, or a product that isn't the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    devices = list(jax.devices() if devices is None else devices)
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"{axis} must be at least 1, got {size}")
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"the mesh {asked} needs {math.prod(sizes.values())} devices, there are {len(devices)}: "
            f"change a size, or pass as many devices"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    # An axis may be made of parts of a torus' axes: tensor=8 of 4 x 4 x 4 chips.
    laid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=(kind,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[Mesh]:
    """Everything inside is sharded over ``mesh``: modules that are made, and modules that are called."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        yield mesh


def check_divisible(mesh: Mesh, shape: Sequence[int], rules: Rules = RULES) -> None:
    """Checks that every device can have an equal part of ``[batch, seq, streams, dim]`` or ``[batch, seq, dim]``.

    Raises:
        ValueError: another number of axes, or a size that the mesh doesn't divide.
    """
    _activation_spec(mesh, shape, rules)


def _activation_spec(mesh: Mesh, shape: Sequence[int], rules: Rules, gates: bool = False) -> PartitionSpec:
    if gates and len(shape) != 3:
        raise ValueError(f"gates must be [batch, seq, streams], got {list(shape)}")
    if len(shape) not in (3, 4):
        raise ValueError(f"x must be [batch, seq, streams, dim] or [batch, seq, dim], got {list(shape)}")
    names = gate_axes(len(shape)) if gates else activation_axes(len(shape), streams=len(shape) == 4)
    spec = partition(names, mesh, rules)
    check_even(shape, spec, mesh.shape)
    return spec


def shard(x: Any, mesh: Mesh, rules: Rules = RULES, *, gates: bool = False) -> Array:
    """A whole x ``[batch, seq, streams, dim]`` or ``[batch, seq, dim]``, laid out on the mesh.

    With several processes each is handed the whole and keeps its own part.

    Args:
        gates: x is ``[batch, seq, streams]``, gates or the carried pre of a single-pass stack, whole over tensor.

    Raises:
        ValueError: another number of axes, or a size that the mesh doesn't divide.
    """
    return place(x, NamedSharding(mesh, _activation_spec(mesh, np.shape(x), rules, gates)))


def place(value: Any, where: NamedSharding) -> Array:
    """A whole host array of any shape in its shards, each process making those of its own devices."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def weight_shardings(
    shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, rules: Rules = RULES
) -> dict[str, NamedSharding]:
    """Where each weight lies.

    Args:
        shapes: in-memory shapes by canonical name, of `functional.weight_shapes` or `functional.head_shapes`.

    Raises:
        ValueError: the mesh doesn't divide dim.
    """
    shardings = {}
    for name, shape in shapes.items():
        spec = partition(logical_axes(name, shape), mesh, rules)
        check_even(shape, spec, mesh.shape, name)
        shardings[name] = NamedSharding(mesh, spec)
    return shardings


def create(make: Callable[[], Any], mesh: Mesh, rules: Rules = RULES) -> Any:
    """The module that ``make`` makes, its parameters drawn in their shards: none is ever whole anywhere.

    The values don't depend on the mesh, with JAX's default random numbers (partitionable threefry).

    Args:
        make: makes the module, or a stack of them; takes nothing.
    """
    with use(mesh, rules):
        return nnx.jit(make)()
