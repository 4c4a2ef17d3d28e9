"""`jax_impl` on a mesh for the suite: virtual CPU devices in one process or several (gloo), or in one the machine's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jax_impl
import jax_impl.config
from conformance.adapters import branch
from conformance.adapters.jax_adapter import SHARDABLE, configuration
from conformance.adapters.jax_gradients import vector_jacobian
from conformance.cases.case import DTYPES
from conformance.interface import Arrays, Capabilities, Result, SetupError
from conformance.mesh import Member
from conformance.stages import STAGES, relevant
from jax_impl import sharding


class JaxMesh:
    """The stages whose x can be sharded, outputs and gradients from one compiled function.

    Raises:
        SetupError: the machine's devices aren't as many as the mesh's.
    """

    def __init__(self, member: Member, name: str, axis_types: bool):
        self.name = name
        _join(member)
        try:
            sizes: dict[str, Any] = dict(member.mesh.sizes)
            self._mesh = sharding.make_mesh(**sizes, explicit=axis_types)
        except ValueError as error:
            raise SetupError(str(error)) from error
        self._last: tuple[Any, Any] = (None, None)
        self.capabilities = Capabilities(
            stages=frozenset(SHARDABLE),
            dialects=frozenset(jax_impl.config.dialects()),
            dtypes=frozenset(DTYPES),
            overrides=None,
            device=jax.default_backend(),
            description=f"jax_impl, jax {jax.__version__}, {name}, {member.processes} processes",
            settings={"mesh": str(member.mesh), "devices": jax.device_count()},
            compiled=True,
        )
        for stage in SHARDABLE:
            setattr(self, stage, self._method(stage))

    def _method(self, stage: str) -> Any:
        return lambda inputs, config, cotangents: self._call(stage, inputs, config, cotangents)

    def _call(self, stage: str, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        wide = any(v.dtype == np.float64 for v in inputs.values())
        with jax.enable_x64(wide), sharding.use(self._mesh):
            key = (stage, relevant(stage, config), wide)
            c = configuration(config)
            if self._last[0] != key:
                run = vector_jacobian(lambda v: SHARDABLE[stage](v, c, config), STAGES[stage].constants)
                self._last = (key, jax.jit(run))
            placed = self._placed(inputs, c)
            wanted = cotangents and {k: self._activation(k, v) for k, v in cotangents.items()}
            outputs, gradients = self._last[1](placed, wanted)
            flat = {k: v.reshape(inputs[k].shape) for k, v in self._whole(gradients).items()}
            return self._whole(outputs), flat

    def _placed(self, inputs: Arrays, c: jax_impl.MHCConfig) -> dict[str, jax.Array]:
        """Weights in their shards and in-memory shapes, activations in theirs, the rest on every device."""
        others, flat = branch.split(inputs)
        lead = flat["pre_alpha"].shape[:-2] if "pre_alpha" in flat else ()
        weights = branch.in_memory(flat, c.streams, c.dim, lead)
        placed = {k: self._activation(k, v) for k, v in others.items()}
        for name, value in weights.items():
            names = sharding.logical_axes(name, value.shape[len(lead) :])
            spec = sharding.partition((*(None,) * len(lead), *names), self._mesh)
            placed[name] = sharding.place(value, jax.NamedSharding(self._mesh, spec))
        return placed

    def _activation(self, name: str, value: np.ndarray) -> jax.Array:
        if value.ndim >= 3:
            return sharding.shard(value, self._mesh, gates=name in branch.GATES)
        return sharding.place(value, jax.NamedSharding(self._mesh, jax.P(*(None,) * value.ndim)))

    def _whole(self, values: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        return {k: sharding.gather(v) for k, v in values.items()}


def _join(member: Member) -> None:
    """Makes the virtual devices, and meets the other processes.

    Raises:
        SetupError: a process is missing.
    """
    if (jax.config.jax_platforms or "cpu") == "cpu":  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", member.devices)
    if member.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        seconds = max(1, int(member.limit))
        try:
            jax.distributed.initialize(
                member.address,
                member.processes,
                member.rank,
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=min(seconds, 60),
            )
        except RuntimeError as error:
            raise SetupError(f"not all of {member.processes} processes came within {seconds} s ({error})") from error


def automatic(member: Member) -> JaxMesh:
    return JaxMesh(member, "jax", False)


def explicit(member: Member) -> JaxMesh:
    return JaxMesh(member, "jax-explicit", True)
