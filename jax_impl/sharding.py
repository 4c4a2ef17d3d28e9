"""The layer on many devices: a mesh, MaxText's logical axes, and where inputs and parameters lie.

A mesh has the axes ``data``, ``fsdp``, ``sequence`` and ``tensor``, each of any size. Of x ``[batch, seq, streams,
dim]`` batch lies on data and fsdp, seq on sequence, dim on tensor; streams never are sharded. Parameters with a dim
axis hold it on tensor and fsdp, and are gathered over fsdp where they are used; the others are whole everywhere.

The same code runs with automatic sharding (XLA propagates it) and with explicit axis types (it is part of every
array's type), since nothing in `functional` flattens (streams, dim). Communication, on either: none forward for data
and sequence; for tensor one all-reduce of n*n + 2n + 1 numbers a token and site (of a dialect that rounds the norm's
output, two), backward n*n + 2n numbers (one more of such a dialect); for fsdp a gather of the projections; backward one
reduction of the parameters' gradients, those of fsdp scattered first, so that small ones are reduced apart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "sequence", "tensor")
Rules = Sequence[tuple[str, Any]]  # a mesh axis, several, or None
RULES: Rules = (
    ("activation_batch", ("data", "fsdp")),
    ("activation_length", "sequence"),
    ("activation_embed", "tensor"),
    ("embed", ("tensor", "fsdp")),
    ("norm", ("tensor", "fsdp")),
    ("layers", None),
)
"""MaxText's logical names to mesh axes; ``layers`` is that of a scan."""


COEFFICIENTS = "mhc_coefficients"
"""The name, for policies of `jax.checkpoint`, of what is small and takes a pass over x or a collective to make again:
projections, sum of squares, pre, post and H, 49 numbers a token at n = 4."""
keep_coefficients = jax.checkpoint_policies.save_only_these_names(COEFFICIENTS)
"""A policy of `jax.checkpoint`: what has the name `COEFFICIENTS` is kept, u and the mixed streams are computed again.
Of collectives only fsdp's gather is repeated, as elsewhere with parameters that aren't kept whole."""


def activation_axes(axes: int, streams: bool = True) -> tuple[str | None, ...]:
    """The logical axes of x ``[batch, seq, …, streams, dim]``, or of one stream ``[batch, seq, …, dim]``."""
    tail = (None, "activation_embed") if streams else ("activation_embed",)
    before = max(axes - len(tail), 0)
    lead = (*("activation_batch", "activation_length")[:before], *(None,) * (before - 2))
    return (*lead, *tail)


def logical_axes(name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The logical axes of a weight; streams are never sharded."""
    if name == "mhc_norm.scale":
        return (None, "norm")
    return (None, "embed", None) if len(shape) == 3 else (None,) * len(shape)


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


def partition(names: Sequence[str | None], mesh: Any = None, rules: Rules | None = None) -> PartitionSpec:
    """The mesh axes of logical ones; those that the mesh lacks, or has in size 1, are left out.

    Args:
        mesh: that of the context (`use`) unless given; the rules likewise.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    table = dict(reversed(tuple(get_logical_axis_rules() if rules is None else rules)))  # the first of a name counts

    def axes(name: str | None) -> str | tuple[str, ...] | None:
        found = table.get(name) if name else None
        kept = tuple(axis for axis in _listed(found) if mesh.shape.get(axis, 1) > 1)
        return kept[0] if len(kept) == 1 else kept or None

    return PartitionSpec(*(axes(name) for name in names))


def check_divisible(mesh: Mesh, shape: Sequence[int], rules: Rules = RULES) -> None:
    """Checks that every device can have an equal part of ``[batch, seq, streams, dim]`` or ``[batch, seq, dim]``.

    Raises:
        ValueError: another number of axes, or a size that the mesh doesn't divide.
    """
    _activation_spec(mesh, shape, rules)


def gate_axes(axes: int) -> tuple[str | None, ...]:
    """The logical axes of gates ``[batch, seq, …, streams]``."""
    return (*activation_axes(axes, streams=False)[:-1], None)


def _activation_spec(mesh: Mesh, shape: Sequence[int], rules: Rules, gates: bool = False) -> PartitionSpec:
    if gates and len(shape) != 3:
        raise ValueError(f"gates must be [batch, seq, streams], got {list(shape)}")
    if len(shape) not in (3, 4):
        raise ValueError(f"x must be [batch, seq, streams, dim] or [batch, seq, dim], got {list(shape)}")
    names = gate_axes(len(shape)) if gates else activation_axes(len(shape), streams=len(shape) == 4)
    spec = partition(names, mesh, rules)
    _check_even(shape, spec, mesh.shape)
    return spec


def _check_even(shape: Sequence[int], spec: PartitionSpec, sizes: Mapping[str, int], what: str = "x") -> None:
    """That every axis is shared out evenly.

    Raises:
        ValueError: the mesh axes don't divide a size; it names them.
    """
    for axis, (size, part) in enumerate(zip(shape, spec, strict=False)):
        names = _listed(part)
        shards = math.prod(sizes[name] for name in names)
        if size % shards:
            over = " x ".join(f"{name}={sizes[name]}" for name in names)
            raise ValueError(
                f"{what} {list(shape)}: axis {axis} of size {size} must be a multiple of {shards}, since it lies on "
                f"{over}: pad it, or use a smaller mesh axis"
            )


def constrain(value: Array, names: Sequence[str | None]) -> Array:
    """``value`` laid out by its logical axes; as it is without a mesh or rules (`use`).

    Raises:
        ValueError: an axis can't be shared out evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not get_logical_axis_rules():
        return value
    spec = partition(names)
    _check_even(value.shape, spec, mesh.shape)
    if _explicit():
        return jax.sharding.reshard(value, spec)
    return jax.lax.with_sharding_constraint(value, spec)


def random_sharding(names: Sequence[str | None]) -> PartitionSpec | None:
    """Where random values by these logical axes are drawn; None where XLA finds it out from `constrain`."""
    return partition(names) if _explicit() and get_logical_axis_rules() else None


def _explicit() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def over_shards(
    function: Callable[..., Array],
    x: Array,
    held: list[Array],
    shared: list[Array],
) -> Array:
    """``function`` on each device's part of x and of the weights; with no mesh or no rules, on the whole.

    By hand (`jax.shard_map`), since XLA's partitioner sums gradients over data and over sequence one after the other,
    each time the whole, and outside TPUs doesn't scatter those of fsdp.

    Args:
        function: takes a part of x, of ``held`` and of ``shared``, and ``add``, which sums a value over the parts of
            dim; returns ``[m, *leading axes of x]``.
        x: ``[..., streams, dim]``; the first axis is batch, the second seq.
        held: weights ``[streams, dim, ...]``, kept in parts over fsdp too, and gathered over it here.
        shared: weights that every device has.

    Raises:
        ValueError: an axis can't be shared out evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not get_logical_axis_rules():
        return function(x, held, shared, add=lambda value: value)
    where, weight = partition(activation_axes(x.ndim)), partition((None, "embed"))
    on_dim = _listed(where[-1])
    over = tuple(axis for axis in _listed(weight[1]) if axis not in on_dim)
    copies = tuple(axis for part in where[:-2] for axis in _listed(part) if axis not in over)
    parts = [PartitionSpec(None, on_dim + over, *(None,) * (value.ndim - 2)) for value in held]
    _check_even(x.shape, where, mesh.shape)
    _check_even(held[0].shape, parts[0], mesh.shape, "the projections")

    def local(x: Array, held: list[Array], shared: list[Array]) -> Array:
        if over:  # copies first: backward, gradients are scattered over fsdp, and only their parts added over copies
            held = [jax.lax.pcast(value, copies, to="varying") for value in held] if copies else held
            held = [jax.lax.all_gather(value, over, axis=1, tiled=True) for value in held]
        # Of what it computes only the sums are kept: else x is written in float32 for the way back, 77 units for 61
        # with gradients on a v5e 2x4 at (4, 4096, 4, 7168) (benchmarks/tpu_aot.py).
        run = jax.checkpoint(partial(function, add=add), policy=keep_coefficients, prevent_cse=False)
        return run(x, held, shared)

    def add(value: Array) -> Array:
        return jax.lax.psum(value, on_dim) if on_dim else value

    if _explicit():  # there a shard_map takes its inputs only where they lie already
        held = [jax.sharding.reshard(value, part) for value, part in zip(held, parts, strict=True)]
    everywhere = [PartitionSpec(*(None,) * value.ndim) for value in shared]
    out = PartitionSpec(None, *where[:-2])
    return jax.shard_map(local, in_specs=(where, parts, everywhere), out_specs=out)(x, held, shared)


def _listed(part: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def shard(x: Any, mesh: Mesh, rules: Rules = RULES, *, gates: bool = False) -> Array:
    """A whole x ``[batch, seq, streams, dim]`` or ``[batch, seq, dim]``, laid out on the mesh.

    With several processes each is handed the whole and keeps its own part.

    Args:
        gates: x is ``[batch, seq, streams]``, gates or what a single-pass site reads with, whole over tensor.

    Raises:
        ValueError: another number of axes, or a size that the mesh doesn't divide.
    """
    return place(x, NamedSharding(mesh, _activation_spec(mesh, np.shape(x), rules, gates)))


def place(value: Any, where: NamedSharding) -> Array:
    """A whole host array of any shape in its shards, each process making those of its own devices."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def gather(value: Array) -> np.ndarray:
    """The whole of a sharded array of any shape, on every process; all of them must call it."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What fails on one process fails on all, once all have come here.

    Raises:
        Exception: this process's own; else RuntimeError, that another's failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        failed = np.asarray(multihost_utils.process_allgather(np.array([error is not None]))).reshape(-1)
        if error is None and failed.any():
            raise RuntimeError(f"process {int(failed.argmax())} of {failed.size} failed here: see its own message")
    if error is not None:
        raise error


def weight_shardings(
    shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, rules: Rules = RULES
) -> dict[str, NamedSharding]:
    """Where each weight lies.

    Args:
        shapes: in-memory shapes by canonical name, of `functional.weight_shapes` or `functional.head_shapes`.

    Raises:
        ValueError: the mesh doesn't divide dim.
    """
    found = {}
    for name, shape in shapes.items():
        spec = partition(logical_axes(name, shape), mesh, rules)
        _check_even(shape, spec, mesh.shape, name)
        found[name] = NamedSharding(mesh, spec)
    return found


def create(make: Callable[[], Any], mesh: Mesh, rules: Rules = RULES) -> Any:
    """The module that ``make`` makes, its parameters drawn in their shards: none is ever whole anywhere.

    Args:
        make: makes the module, or a stack of them; takes nothing.

    The values don't depend on the mesh, with JAX's default random numbers (partitionable threefry).
    """
    with use(mesh, rules):
        return nnx.jit(make)()
