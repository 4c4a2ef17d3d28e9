"""A mesh of devices for the suite: how it is written, which process has which part, how tokens are filled up to it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.files.problems import shown
from conformance.interface import Arrays, Result, SetupError
from conformance.stages import STAGES

AXES = ("data", "fsdp", "sequence", "tensor")
MARK = "@"
"""Stands between an implementation and its mesh: ``jax@data=2,tensor=2``."""
MOST_DEVICES = 1024
BATCH, SEQ = ("data", "fsdp"), ("sequence",)


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, and how many processes the devices are shared out to (0: as many as the framework has)."""

    sizes: Mapping[str, int]
    processes: int = 0

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    def __str__(self) -> str:
        sizes = ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "data=1"
        return f"{sizes}/{self.processes}" if self.processes else sizes


@dataclass(frozen=True)
class Member:
    """One process of a mesh, as an implementation is told of it.

    Attributes:
        mesh: the whole.
        rank: of this process, below ``processes``.
        processes: how many there are.
        address: ``host:port`` at which they meet.
        limit: seconds for one call.
    """

    mesh: Mesh
    rank: int
    processes: int
    address: str
    limit: float

    @property
    def devices(self) -> int:
        """Of this process."""
        return self.mesh.devices // self.processes


def parse_mesh(text: str, processes: int = 0) -> Mesh:
    """The mesh of ``data=2,tensor=2``, also with ``/processes`` behind it.

    Raises:
        SetupError: another axis, one given twice, or a size that isn't a number of at least 1.
    """
    listed, slash, count = text.partition("/")
    if slash:
        processes = _number("the number of processes", count, text)
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    seen: set[str] = set()
    for part in listed.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in seen:
            problem = "is given twice" if axis in seen else f"isn't one of {', '.join(AXES)}"
            raise SetupError(f"--mesh {text}: {axis!r} {problem}; expected for instance data=2,tensor=2")
        seen.add(axis)
        sizes[axis] = _number(axis, size, text)
    mesh = Mesh(sizes, processes)
    if mesh.devices > MOST_DEVICES:
        raise SetupError(f"--mesh {text}: it may have {MOST_DEVICES} devices, got {mesh.devices}")
    if processes and mesh.devices % processes:
        raise SetupError(
            f"--mesh {text}: {mesh.devices} devices can't be shared out evenly to {processes} processes: "
            "change a size, or the number of processes"
        )
    return mesh


def _number(what: str, text: str, mesh: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,3}", text) or int(text) > MOST_DEVICES:
        raise SetupError(f"--mesh {mesh}: {what} must be a whole number of 1 to {MOST_DEVICES}, got {shown(text)}")
    return int(text)


def refuse_indivisible(config: Mapping[str, Any], mesh: Mesh) -> None:
    """A dim that tensor and fsdp don't divide can't be shared out; tokens are filled up (`filled`).

    Raises:
        NotImplementedError: so the case is skipped, with this reason.
    """
    parts = mesh.sizes["tensor"] * mesh.sizes["fsdp"]
    if config["dim"] % parts:
        raise NotImplementedError(
            f"dim {config['dim']} isn't a multiple of tensor={mesh.sizes['tensor']} x fsdp={mesh.sizes['fsdp']}: "
            "a mesh of data and sequence takes it"
        )


def filled(stage: str, inputs: Arrays, cotangents: Arrays | None, mesh: Mesh) -> tuple[Arrays, Arrays | None]:
    """Inputs and cotangents with batch and seq filled up to what the mesh divides.

    The new tokens repeat the last ones, with cotangents of zero: they add nothing to any gradient.
    """
    parts = [math.prod(mesh.sizes[axis] for axis in axes) for axes in (BATCH, SEQ)]
    repeated = {k: _fill(v, parts, "edge") if k in _streams(stage) else v for k, v in inputs.items()}
    if cotangents is None:
        return repeated, None
    return repeated, {k: _fill(v, parts, "constant") if v.ndim >= 3 else v for k, v in cotangents.items()}


def cropped(result: Result, stage: str, inputs: Arrays) -> Result:
    """A result without the tokens that `filled` added."""
    outputs, gradients = result
    batch, seq = next(inputs[k] for k in _streams(stage) if k in inputs).shape[:2]
    cut = {k: v[:batch, :seq] if v.ndim >= 3 else v for k, v in outputs.items()}
    return cut, {k: v[:batch, :seq] if k in _streams(stage) else v for k, v in gradients.items()}


def _streams(stage: str) -> tuple[str, ...]:
    """The inputs that have tokens."""
    return tuple(name for name in STAGES[stage].inputs if name in ("x", "embedding", "carried"))


def _fill(value: np.ndarray, parts: list[int], how: Any) -> np.ndarray:
    missing = [-size % part for size, part in zip(value.shape, parts, strict=False)]
    return np.pad(value, [(0, m) for m in missing] + [(0, 0)] * (value.ndim - 2), mode=how)
