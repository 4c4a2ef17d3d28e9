"""Arrays in parts on many devices: MaxText's logical axes, and the layer's work on each device's part.

`MeshShards` is what `functional` takes as its argument ``shards``, and `current` makes it of the mesh in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax.core.spmd import get_logical_axis_rules
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jax_impl.projections import COEFFICIENTS, INPUTS

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

keep_coefficients = jax.checkpoint_policies.save_only_these_names(COEFFICIENTS)
"""A policy of `jax.checkpoint`: it keeps the values named `COEFFICIENTS`; u and the mixed streams are computed again.
Of collectives only fsdp's gather is repeated, as elsewhere with parameters that aren't kept whole."""
keep_inputs = jax.checkpoint_policies.save_only_these_names(COEFFICIENTS, INPUTS)
"""A policy that keeps u too, one stream more beside the n of x: x isn't read again to make it."""


def activation_axes(axes: int, streams: bool = True) -> tuple[str | None, ...]:
    """The logical axes of x ``[batch, seq, …, streams, dim]``, or of one stream ``[batch, seq, …, dim]``."""
    tail = (None, "activation_embed") if streams else ("activation_embed",)
    before = max(axes - len(tail), 0)
    lead = (*("activation_batch", "activation_length")[:before], *(None,) * (before - 2))
    return (*lead, *tail)


def gate_axes(axes: int) -> tuple[str | None, ...]:
    """The logical axes of gates ``[batch, seq, …, streams]``."""
    return (*activation_axes(axes, streams=False)[:-1], None)


def logical_axes(name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The logical axes of a weight; streams are never sharded."""
    if name == "mhc_norm.scale":
        return (None, "norm")
    return (None, "embed", None) if len(shape) == 3 else (None,) * len(shape)


def partition(names: Sequence[str | None], mesh: Any = None, rules: Rules | None = None) -> PartitionSpec:
    """The mesh axes of logical ones; those that the mesh lacks, or has in size 1, are left out.

    Args:
        mesh: that of the context (`sharding.use`) unless given; the rules likewise.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    table = dict(reversed(tuple(get_logical_axis_rules() if rules is None else rules)))  # the first of a name counts

    def axes(name: str | None) -> str | tuple[str, ...] | None:
        on = listed(table.get(name) if name else None)
        kept = tuple(axis for axis in on if mesh.shape.get(axis, 1) > 1)
        return kept[0] if len(kept) == 1 else kept or None

    return PartitionSpec(*(axes(name) for name in names))


def listed(part: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def check_even(shape: Sequence[int], spec: PartitionSpec, sizes: Mapping[str, int], name: str = "x") -> None:
    """Checks that every axis is shared out evenly.

    Raises:
        ValueError: the mesh axes don't divide a size; it names them.
    """
    for axis, (size, part) in enumerate(zip(shape, spec, strict=False)):
        names = listed(part)
        parts = math.prod(sizes[name] for name in names)
        if size % parts:
            over = " x ".join(f"{name}={sizes[name]}" for name in names)
            raise ValueError(
                f"{name} {list(shape)}: axis {axis} of size {size} must be a multiple of {parts}, since it lies on "
                f"{over}: pad it, or use a smaller mesh axis"
            )


@dataclasses.dataclass(frozen=True)
class MeshShards:
    """`functional.Shards` over the axes of a mesh, by the rules; to be used where the mesh is the context's."""

    mesh: AbstractMesh
    rules: Rules

    @property
    def explicit(self) -> bool:
        """Whether sharding is a part of the arrays' types."""
        return AxisType.Explicit in self.mesh.axis_types

    @property
    def whole(self) -> bool:
        """Whether each device has all of dim."""
        return not listed(self.spec(("activation_embed",))[0])

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """The mesh axes of logical ones."""
        return partition(names, self.mesh, self.rules)

    def constrain(self, value: Array, names: Sequence[str | None]) -> Array:
        """``value`` laid out by its logical axes.

        Raises:
            ValueError: an axis can't be shared out evenly.
        """
        spec = self.spec(names)
        check_even(value.shape, spec, self.mesh.shape)
        if self.explicit:
            return jax.sharding.reshard(value, spec)
        return jax.lax.with_sharding_constraint(value, spec)

    def activation(self, value: Array, *, streams: bool = True) -> Array:
        return self.constrain(value, activation_axes(value.ndim, streams))

    def gates(self, value: Array) -> Array:
        return self.constrain(value, gate_axes(value.ndim))

    def over_parts(self, function: Callable[..., Array], x: Array, held: list[Array], shared: list[Array]) -> Array:
        """By hand (`jax.shard_map`), since XLA's partitioner sums gradients over data and over sequence one after the
        other, each time the whole, and outside TPUs doesn't scatter those of fsdp.

        The first axis of x is batch, the second seq; ``held`` is kept in parts over fsdp too, and gathered over it.
        """
        where, weight = self.spec(activation_axes(x.ndim)), self.spec((None, "embed"))
        on_dim = listed(where[-1])
        over = tuple(axis for axis in listed(weight[1]) if axis not in on_dim)
        copies = tuple(axis for part in where[:-2] for axis in listed(part) if axis not in over)
        parts = [PartitionSpec(None, on_dim + over, *(None,) * (value.ndim - 2)) for value in held]
        check_even(x.shape, where, self.mesh.shape)
        check_even(held[0].shape, parts[0], self.mesh.shape, "the projections")

        def local(x: Array, held: list[Array], shared: list[Array]) -> Array:
            if (
                over
            ):  # copies first: backward, gradients are scattered over fsdp, and only their parts added over copies
                held = [jax.lax.pcast(value, copies, to="varying") for value in held] if copies else held
                held = [jax.lax.all_gather(value, over, axis=1, tiled=True) for value in held]
            # Of what it computes only the sums are kept: else x is written in float32 for the way back, 77 units for 61
            # with gradients on a v5e 2x4 at (4, 4096, 4, 7168) (benchmarks/tpu_aot.py).
            run = jax.checkpoint(partial(function, add=add), policy=keep_coefficients, prevent_cse=False)
            return run(x, held, shared)

        def add(value: Array) -> Array:
            return jax.lax.psum(value, on_dim) if on_dim else value

        if self.explicit:  # there a shard_map takes its inputs only where they lie already
            held = [jax.sharding.reshard(value, part) for value, part in zip(held, parts, strict=True)]
        everywhere = [PartitionSpec(*(None,) * value.ndim) for value in shared]
        out = PartitionSpec(None, *where[:-2])
        return jax.shard_map(local, in_specs=(where, parts, everywhere), out_specs=out)(x, held, shared)

    def by_layout(
        self,
        function: Callable[[Mapping[str, Array], Callable[[Array], Array] | None], dict[str, Array]],
        arrays: Mapping[str, Array],
        layouts: Mapping[str, str],
        results: Collection[str],
    ) -> dict[str, Array]:
        """By `jax.shard_map`, as `over_parts`, for functions that have derivatives of their own.

        Projections are gathered over fsdp, and what is made of them is scattered over it.
        """
        where, on_phi = self.spec(activation_axes(arrays["x"].ndim)), listed(self.spec((None, "embed"))[1])
        on_dim = listed(where[-1])
        over = tuple(axis for axis in on_phi if axis not in on_dim)
        tokens = tuple(axis for part in where[:-2] for axis in listed(part))
        copies = tuple(axis for axis in tokens if axis not in over)
        alike = math.prod(self.mesh.shape[axis] for axis in over if axis not in tokens)  # devices with the same tokens
        lead = where[:-2]
        specs = {
            "streams": where,
            "stream": PartitionSpec(*lead, where[-1]),
            "gates": PartitionSpec(*lead, None),
            "matrix": PartitionSpec(*lead, None, None),
            "sums": PartitionSpec(None, *lead),
            "projection": PartitionSpec(None, None, on_dim + over),
            "whole": PartitionSpec(),
        }
        for name, value in arrays.items():
            check_even(value.shape, specs[layouts[name]], self.mesh.shape, name)

        def local(part: dict[str, Array]) -> dict[str, Array]:
            for name, value in part.items():
                if layouts[name] == "projection" and over:
                    part[name] = jax.lax.all_gather(value, over, axis=2, tiled=True)
            found = function(part, (lambda value: jax.lax.psum(value, on_dim)) if on_dim else None)
            for name, value in found.items():
                if layouts[name] == "projection":
                    value = value / alike if alike > 1 else value
                    value = jax.lax.psum_scatter(value, over, scatter_dimension=2, tiled=True) if over else value
                    found[name] = jax.lax.psum(value, copies) if copies else value
                elif layouts[name] == "whole" and tokens:
                    found[name] = jax.lax.psum(value, tokens)
            return found

        taken, made = ({name: specs[layouts[name]] for name in names} for names in (arrays, results))
        held = dict(arrays)
        if self.explicit:
            held = {name: jax.sharding.reshard(value, taken[name]) for name, value in held.items()}
        # What varies over which axes isn't checked: a Pallas call has no rule for it.
        return jax.shard_map(local, in_specs=(taken,), out_specs=made, check_vma=False)(held)


def current() -> MeshShards | None:
    """The shards of the mesh and the rules that are in use (`sharding.use`), or None where one of them is missing."""
    mesh, rules = jax.sharding.get_abstract_mesh(), get_logical_axis_rules()
    if mesh.empty or not rules:
        return None
    return MeshShards(mesh, tuple((name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in rules))


def constrain(value: Array, names: Sequence[str | None]) -> Array:
    """``value`` laid out by its logical axes; as it is without a mesh or rules (`sharding.use`).

    Raises:
        ValueError: an axis can't be shared out evenly.
    """
    shards = current()
    return shards.constrain(value, names) if shards else value


def random_sharding(names: Sequence[str | None]) -> PartitionSpec | None:
    """Where random values by these logical axes are drawn; None where XLA finds it out from `constrain`."""
    shards = current()
    return shards.spec(names) if shards and shards.explicit else None


def gather(value: Array) -> np.ndarray:
    """The whole of a sharded array of any shape, on every process; all of them must call it."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block that fails on all processes if it fails on one; each of them must enter it.

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
