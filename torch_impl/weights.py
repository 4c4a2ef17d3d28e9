"""Canonical safetensors: a prefix per site, projections flat ``[n*C, m]`` (mathematics.md, "Checkpoint layouts")."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.functional import SHARDED, weight_shapes

FORMAT = "mhc-canonical/1"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Index = tuple[slice, ...]  # where a part stands in the whole, one slice for each axis in memory


def _flat(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a file: streams and dim are one axis there."""
    if name == "mhc_norm.scale":
        return (shape[0] * shape[1],)
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


def local_part(value: Any) -> tuple[Tensor, Index]:
    """This process's part of a parameter and where it stands in the whole: all of it unless a DTensor is sharded."""
    if not hasattr(value, "device_mesh"):
        return value, tuple(slice(0, size) for size in value.shape)
    (chunk,) = value.__create_chunk_list__()  # what torch.distributed.checkpoint asks a DTensor for
    part = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return value.to_local(), part


def from_flat(
    flat: Mapping[str, Tensor], config: MHCConfig, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
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
    path: str | Path,
    config: MHCConfig,
    prefix: str = "",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    parts: Mapping[str, Index] | None = None,
) -> dict[str, Tensor]:
    """The weights under ``prefix`` in the file, in their own dtype and in-memory shapes.

    Args:
        prefix: what stands before each canonical name, for instance ``"layers.0.attention."``.
        shapes: names and in-memory shapes; the layer's unless given (`functional.head_shapes` for a head).
        parts: the slices of each weight that are wanted; only these are read. The whole unless given.

    Raises:
        ValueError: the file can't be read, contradicts ``config``, or a tensor is missing, surplus, of another dtype
            or shape, or not finite.
    """
    shapes = weight_shapes(config) if shapes is None else shapes
    found: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            present = {name[len(prefix) :]: name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            missing, surplus = sorted(set(shapes) - set(present)), sorted(set(present) - set(shapes))
            if missing or surplus:
                raise ValueError(f"{path}: under {prefix!r} missing {missing or 'none'}, surplus {surplus or 'none'}")
            if "parameters" in metadata:
                stated = json.loads(metadata["parameters"])
                for key in ("streams", "dim"):
                    if stated.get(key) != getattr(config, key):
                        raise ValueError(
                            f"{path}: {key} must be {getattr(config, key)}, the file says {stated.get(key)}"
                        )
            for name, shape in shapes.items():
                part = tuple(slice(0, size) for size in shape) if parts is None else parts[name]
                found[name] = _read(f"{path}: {present[name]}", file.get_slice(present[name]), name, shape, part)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got one that can't be read ({error})") from error
    return found


def _read(said: str, entry: Any, name: str, shape: tuple[int, ...], part: Index) -> Tensor:
    """A part of a tensor that stands flat in a file, in its in-memory shape: rows of one stream after another."""
    if entry.get_dtype() not in DTYPES:
        raise ValueError(f"{said} must be float64, float32, bfloat16 or float16, got {entry.get_dtype()}")
    expected = _flat(name, shape)
    if tuple(entry.get_shape()) != expected:
        raise ValueError(f"{said} must be {list(expected)}, got {list(entry.get_shape())}")
    if name in SHARDED:
        streams, rows, *columns = part
        value = torch.empty([s.stop - s.start for s in part], dtype=DTYPES[entry.get_dtype()])
        for stream in range(streams.start, streams.stop) if value.numel() else ():
            first = stream * shape[1]
            value[stream - streams.start] = entry[(slice(first + rows.start, first + rows.stop), *columns)]
    else:
        value = entry[:][part]
    if not torch.isfinite(value).all():
        raise ValueError(f"{said} must be finite, got NaN or infinity")
    return value


def save_weights(path: str | Path, weights: Mapping[str, Tensor], config: MHCConfig, prefix: str = "") -> None:
    """Writes the weights flat under ``prefix``; the file appears whole or not at all.

    Raises:
        OSError: the target can't be written; a former file is left as it was.
    """
    path = Path(path)
    flat = {
        prefix + name: value.detach().to("cpu").reshape(_flat(name, tuple(value.shape))).contiguous().clone()
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
