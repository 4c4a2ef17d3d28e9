"""Canonical safetensors files (docs/mathematics.md, "Checkpoint layouts"): a prefix for each site, projections flat."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.functional import SHARDED, head_shapes, weight_shapes
from torch_impl.metadata import check_metadata, metadata_of, warn_of_doubts

_WITH_ALL = MHCConfig(streams=1, dim=1, norm_weight=True)
KINDS = (tuple(weight_shapes(_WITH_ALL)), tuple(head_shapes(_WITH_ALL)))
"""The canonical names that a layer may have, and a head."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HELD = {
    torch.float64: tuple(DTYPES.values()),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}
"""The dtypes whose every value a dtype has."""
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
    dtypes: Mapping[str, torch.dtype] | None = None,
    insist: bool = False,
    round: bool = False,
) -> dict[str, Tensor]:
    """The weights under ``prefix`` in the file, in their own dtype and in-memory shapes.

    The dialect is compared as far as the file states it (`metadata.check_metadata`).
    What it says against itself is a warning: a port's note that it is approximate, partial or assumes a dialect, and
    parameters that are left open.

    Args:
        prefix: what stands before each canonical name, for instance ``"layers.0.attention."``.
        shapes: names and in-memory shapes; the layer's unless given (`functional.head_shapes` for a head).
        parts: the slices of each weight that are wanted; only these are read. The whole unless given.
        dtypes: those that the weights are wanted in, their own unless given; they must hold the file's values exactly.
        insist: take weights whose file states another dialect than ``config``, or another format; streams and dim must
            agree always.
        round: take weights that ``dtypes`` round.

    Raises:
        ValueError: the file can't be read, states a parameter that ``config`` contradicts (`metadata.check_metadata`),
            or a tensor is missing, surplus, of another dtype or shape, not finite, or would be rounded.
    """
    shapes = weight_shapes(config) if shapes is None else shapes
    with opened(path) as file:
        check_metadata(path, file.metadata() or {}, config, insist)
        warn_of_doubts(path, file.metadata() or {}, config)
        present = {name[len(prefix) :] for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        missing, surplus = sorted(set(shapes) - present), sorted(present - set(shapes))
        if missing or surplus:
            raise ValueError(f"{path}: under {prefix!r} missing {missing or 'none'}, surplus {surplus or 'none'}")
        return read_site(path, file, prefix, shapes, parts, dtypes, round)


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """The file, open for reading.

    Raises:
        ValueError: it can't be read.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe would wait for its other end
        raise ValueError(f"{path}: expected a whole safetensors file, got something that isn't a file")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got one that can't be read ({error})") from error


def read_site(
    path: str | Path,
    file: Any,
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, Index] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    round: bool = False,
) -> dict[str, Tensor]:
    """The weights under ``prefix`` in an open file (`load_weights`), whose names are checked already."""
    values: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        part = tuple(slice(0, size) for size in shape) if parts is None else parts[name]
        said, entry = f"{path}: {prefix + name}", file.get_slice(prefix + name)
        value = _read(said, entry, name, shape, part)
        values[name] = value if dtypes is None else _held(said, value, dtypes[name], round)
    return values


def _held(said: str, value: Tensor, dtype: torch.dtype, round: bool) -> Tensor:
    """The values in a dtype that has each of them, or by who says so in one that rounds them."""
    if value.dtype not in HELD.get(dtype, ()) and not round:
        raise ValueError(
            f"{said} must fit the parameter's {_named(dtype)}, got {_named(value.dtype)}, which it rounds: make the "
            f"layer in {_named(value.dtype)}, or pass round=True"
        )
    held = value.to(dtype)
    if not torch.isfinite(held).all():
        raise ValueError(f"{said} must fit the parameter's {_named(dtype)}, got values beyond its largest")
    return held


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def save_weights(
    path: str | Path,
    weights: Mapping[str, Tensor],
    config: MHCConfig,
    prefix: str = "",
    *,
    replace: bool = False,
) -> None:
    """Writes the weights flat under ``prefix``; the file appears whole or not at all.

    Args:
        replace: replace a file whatever it holds, also other sites.

    Raises:
        ValueError: a weight has no values (on the device meta), or `load_weights` would refuse it: it is not finite,
            or of another dtype.
        FileExistsError: the file holds other tensors than this site's, or can't be read (`check_replaceable`).
        OSError: the target can't be written; a former file is left as it was.
    """
    for name, value in weights.items():
        if value.is_meta:
            raise ValueError(f"{path}: {prefix + name} must have values, got a tensor on the device meta")
    flat = flattened(weights, prefix)
    check_replaceable(path, flat, replace)
    write(path, flat, config)


def flattened(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights as a file has them, on the CPU; no copies of those that are there already."""
    return {
        prefix + name: value.detach().to("cpu").reshape(_flat(name, tuple(value.shape))).contiguous()
        for name, value in weights.items()
    }


def check_replaceable(path: str | Path, names: Collection[str], replace: bool = False) -> None:
    """Checks that a file with these tensors may take the place of what is there.

    Raises:
        FileExistsError: a file that holds other sites, or anything else that would be lost, or can't be read.
    """
    if replace or not Path(path).exists():
        return
    told = "or pass replace=True, which replaces the file"
    try:
        with opened(path) as file:
            present = set(file.keys())
    except ValueError as error:
        raise FileExistsError(
            f"{path}: is there already and can't be read: remove it, {told} ({error.__cause__})"
        ) from error
    written = {prefix_of(name) for name in names}
    alike = {prefix_of(name) + other for name in names for kind in KINDS if _ending(name) in kind for other in kind}
    sites = {prefix_of(name) for name in present - alike}
    lost = sorted(sites - written) or sorted(present - alike)
    if lost:
        others = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise FileExistsError(
            f"{path}: holds {', '.join(lost[:3])}{others} too, which would be lost: save_model writes several sites in "
            f"one file; name another file, {told}"
        )


def _ending(name: str) -> str:
    """The canonical name that a tensor's ends in; empty for another tensor's."""
    return next((known for kind in KINDS for known in kind if name.endswith(known)), "")


def prefix_of(name: str) -> str:
    """What stands before the canonical name; all of another tensor's name."""
    return name.removesuffix(_ending(name))


def write(path: str | Path, flat: Mapping[str, Tensor], config: MHCConfig) -> None:
    """Writes tensors that are flat already; the file appears whole or not at all.

    Raises:
        ValueError: a tensor that `read_site` would refuse: a file that is written can be loaded.
        OSError: the target can't be written; a former file is left as it was.
    """
    for name, value in flat.items():
        if value.dtype not in DTYPES.values():
            raise ValueError(
                f"{path}: {name} must be float64, float32, bfloat16 or float16 to be saved, got {_named(value.dtype)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name} must be finite to be saved, got NaN or infinity")
    path, held = Path(path), set[int]()
    single = dict(flat)
    for name, value in flat.items():  # safetensors refuses two tensors in one storage: a module under two prefixes
        storage = value.untyped_storage().data_ptr()
        single[name] = value.clone() if value.numel() and storage in held else value
        held.add(storage)
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file or nothing in the target's place, got something else")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(single, str(temporary), metadata=metadata_of(config))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: can't be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
