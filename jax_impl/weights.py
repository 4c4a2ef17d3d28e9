"""Canonical safetensors: a prefix per site, projections flat ``[n*C, m]`` (mathematics.md, "Checkpoint layouts")."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_impl.config import MHCConfig
from jax_impl.functional import weight_shapes

FORMAT = "mhc-canonical/1"
DTYPES = ("float64", "float32", "bfloat16", "float16")


def _flat(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a file: streams and dim are one axis there."""
    if name == "mhc_norm.scale":
        return (shape[0] * shape[1],)
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


def from_flat(
    flat: Mapping[str, Array], config: MHCConfig, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Array]:
    """One site's weights in their in-memory shapes, from flat ones as files and MaxText's trees have them.

    Args:
        flat: arrays under the canonical names, projections ``[n*C, m]`` and the norm weight ``[n*C]``.
        shapes: names and in-memory shapes; the layer's unless given (`functional.head_shapes` for a head).

    Raises:
        ValueError: a name is missing or surplus, or a shape is another.
    """
    shapes = weight_shapes(config) if shapes is None else shapes
    missing, surplus = sorted(set(shapes) - set(flat)), sorted(set(flat) - set(shapes))
    if missing or surplus:
        raise ValueError(f"weights: missing {missing or 'none'}, surplus {surplus or 'none'}")
    for name, value in flat.items():
        if tuple(value.shape) != _flat(name, shapes[name]):
            raise ValueError(f"{name} must be {list(_flat(name, shapes[name]))}, got {list(value.shape)}")
    return {name: flat[name].reshape(shape) for name, shape in shapes.items()}


def load_weights(
    path: str | Path, config: MHCConfig, prefix: str = "", shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Array]:
    """The weights under ``prefix`` in the file, in their own dtype and in-memory shapes.

    Args:
        prefix: what stands before each canonical name, for instance ``"layers.0.attention."``.
        shapes: names and in-memory shapes; the layer's unless given (`functional.head_shapes` for a head).

    Raises:
        ValueError: the file can't be read, contradicts ``config``, or a tensor is missing, surplus, of another dtype
            or shape, or not finite.
    """
    shapes = weight_shapes(config) if shapes is None else shapes
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            present = {name[len(prefix) :]: name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            missing, surplus = sorted(set(shapes) - set(present)), sorted(set(present) - set(shapes))
            if missing or surplus:
                raise ValueError(f"{path}: under {prefix!r} missing {missing or 'none'}, surplus {surplus or 'none'}")
            found = {name: file.get_tensor(present[name]) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got one that can't be read ({error})") from error
    if "parameters" in metadata:
        stated = json.loads(metadata["parameters"])
        for key in ("streams", "dim"):
            if stated.get(key) != getattr(config, key):
                raise ValueError(f"{path}: {key} must be {getattr(config, key)}, the file says {stated.get(key)}")
    for name, value in found.items():
        expected = _flat(name, shapes[name])
        if value.dtype.name not in DTYPES:
            raise ValueError(f"{path}: {present[name]} must be {', '.join(DTYPES)}, got {value.dtype}")
        if value.shape != expected:
            raise ValueError(f"{path}: {present[name]} must be {list(expected)}, got {list(value.shape)}")
        if not np.isfinite(value.astype(np.float64)).all():
            raise ValueError(f"{path}: {present[name]} must be finite, got NaN or infinity")
    return from_flat({name: jnp.asarray(value) for name, value in found.items()}, config, shapes)


def save_weights(path: str | Path, weights: Mapping[str, Array], config: MHCConfig, prefix: str = "") -> None:
    """Writes the weights flat under ``prefix``; the file appears whole or not at all.

    Raises:
        OSError: the target can't be written; a former file is left as it was.
    """
    path = Path(path)
    flat = {
        prefix + name: np.ascontiguousarray(np.asarray(value).reshape(_flat(name, value.shape)))
        for name, value in weights.items()
    }
    metadata = {"format": FORMAT, "parameters": json.dumps(config.parameters(), sort_keys=True)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(flat, str(temporary), metadata=metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: can't be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
