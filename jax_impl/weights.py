"""Canonical safetensors files (docs/mathematics.md, "Checkpoint layouts"): a prefix for each site, projections flat."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_impl.config import MHCConfig
from jax_impl.functional import head_shapes, weight_shapes
from jax_impl.metadata import check_metadata, metadata_of, warn_of_doubts

_WITH_ALL = MHCConfig(streams=1, dim=1, norm_weight=True)
KINDS = (tuple(weight_shapes(_WITH_ALL)), tuple(head_shapes(_WITH_ALL)))
"""The canonical names that a layer may have, and a head."""
Prefix = str | Sequence[str]
"""What stands before the canonical names of a site; of layers that are stacked along a first axis one for each."""
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
HELD = {
    "float64": tuple(DTYPES.values()),
    "float32": ("float32", "bfloat16", "float16"),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
}
"""The dtypes whose every value a dtype has."""


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
    path: str | Path,
    config: MHCConfig,
    prefix: Prefix = "",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    shardings: Mapping[str, Sharding] | None = None,
    *,
    dtypes: Mapping[str, Any] | None = None,
    insist: bool = False,
    round: bool = False,
) -> dict[str, Array]:
    """The weights under ``prefix`` in the file, in their own dtype and in-memory shapes.

    The dialect is compared as far as the file states it (`metadata.check_metadata`).
    What it says against itself is a warning: a port's note that it is approximate, partial or assumes a dialect, and
    parameters that are left open.

    Args:
        prefix: what stands before each canonical name, for instance ``"layers.0.attention."``; several are stacked
            along a new first axis, as `flax.nnx.scan` has its layers.
        shapes: names and in-memory shapes of one site; the layer's unless given (`functional.head_shapes` for a head).
        shardings: where each array lies. Only the parts that this process' devices hold are read, into their shards.
        dtypes: those that the weights are wanted in, their own unless given (for float64 JAX's default, float32
            without ``jax_enable_x64``); they must hold the file's values exactly.
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
        for before in listed(prefix):
            present = {name[len(before) :] for name in file.keys() if name.startswith(before)}  # noqa: SIM118
            missing, surplus = sorted(set(shapes) - present), sorted(present - set(shapes))
            if missing or surplus:
                raise ValueError(f"{path}: under {before!r} missing {missing or 'none'}, surplus {surplus or 'none'}")
        return read_site(path, file, prefix, shapes, shardings, dtypes, round)


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """The file, open for reading.

    Raises:
        ValueError: it can't be read.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe would wait for its other end
        raise ValueError(f"{path}: expected a whole safetensors file, got something that isn't a file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got one that can't be read ({error})") from error


def listed(prefix: Prefix) -> list[str]:
    """The prefix of one site, or those of a stack."""
    return [prefix] if isinstance(prefix, str) else list(prefix)


def read_site(
    path: str | Path,
    file: Any,
    prefix: Prefix,
    shapes: Mapping[str, tuple[int, ...]],
    shardings: Mapping[str, Sharding] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    round: bool = False,
) -> dict[str, Array]:
    """The weights under ``prefix`` in an open file (`load_weights`), whose names are checked already."""
    prefixes = listed(prefix)
    for before in prefixes:
        _check_headers(path, file, before, shapes)

    def held(before: str, name: str, index: tuple[slice, ...]) -> np.ndarray:
        value = _part(path, file, before + name, shapes[name], index)
        dtype = np.dtype(jax.dtypes.canonicalize_dtype(value.dtype) if dtypes is None else dtypes[name])
        return _held(f"{path}: {before + name}", value, dtype, round)

    def whole(name: str) -> Array:
        parts = [held(before, name, ()) for before in prefixes]
        return jnp.asarray(parts[0] if isinstance(prefix, str) else np.stack(parts))

    def sharded(name: str, where: Sharding) -> Array:
        shape = shapes[name] if isinstance(prefix, str) else (len(prefixes), *shapes[name])

        def part(index: Any) -> np.ndarray:
            if isinstance(prefix, str):
                return held(prefix, name, index)
            return np.stack([held(before, name, index[1:]) for before in prefixes[index[0]]])

        return jax.make_array_from_callback(shape, where, part)

    return {name: sharded(name, shardings[name]) if shardings else whole(name) for name in shapes}


def _held(said: str, value: np.ndarray, dtype: np.dtype, round: bool) -> np.ndarray:
    """The values in a dtype that has each of them, or by who says so in one that rounds them."""
    if value.dtype.name not in HELD.get(dtype.name, ()) and not round:
        wide = " (with jax_enable_x64)" if value.dtype == np.float64 else ""
        raise ValueError(
            f"{said} must fit the parameter's {dtype.name}, got {value.dtype.name}, which it rounds: make the layer in "
            f"{value.dtype.name}{wide}, or pass round=True"
        )
    with np.errstate(over="ignore"):  # it is checked
        held = value.astype(dtype, copy=False)
    if not np.isfinite(held).all():
        raise ValueError(f"{said} must fit the parameter's {dtype.name}, got values beyond its largest")
    return held


def _check_headers(path: str | Path, file: Any, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        header = file.get_slice(prefix + name)
        if header.get_dtype() not in DTYPES:
            raise ValueError(f"{path}: {prefix + name} must be {', '.join(DTYPES.values())}, got {header.get_dtype()}")
        if tuple(header.get_shape()) != _flat(name, shape):
            raise ValueError(
                f"{path}: {prefix + name} must be {list(_flat(name, shape))}, got {list(header.get_shape())}"
            )


def _part(path: str | Path, file: Any, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Of a tensor in memory shape ``shape``, the part ``index``: of each stream, the rows of a part of dim."""
    tensor = file.get_slice(name)
    if len(shape) == len(tensor.get_shape()) or not index:
        value = tensor[:].reshape(shape)[index]
    else:
        streams, dim = (range(*part.indices(size)) for part, size in zip(index[:2], shape[:2], strict=True))
        rows = [tensor[i * shape[1] + dim.start : i * shape[1] + dim.stop] for i in streams]
        value = np.stack(rows)[(slice(None), slice(None), *index[2:])]
    if not np.isfinite(value.astype(np.float64)).all():
        raise ValueError(f"{path}: {name} must be finite, got NaN or infinity")
    return value


def save_weights(
    path: str | Path,
    weights: Mapping[str, Array | np.ndarray],
    config: MHCConfig,
    prefix: Prefix = "",
    *,
    replace: bool = False,
) -> None:
    """Writes the weights flat under ``prefix``; the file appears whole or not at all.

    Args:
        prefix: of one site; several are those of layers that are stacked along a first axis.
        replace: replace a file whatever it holds, also other sites.

    Raises:
        ValueError: a weight has no values (of `jax.eval_shape`), or `load_weights` would refuse it: it is not finite,
            or of another dtype.
        FileExistsError: the file holds other tensors than this site's, or can't be read (`check_replaceable`).
        OSError: the target can't be written; a former file is left as it was.
    """
    for name, value in weights.items():
        if isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(f"{path}: {listed(prefix)[0] + name} must have values, got a ShapeDtypeStruct")
    flat = flattened(weights, prefix)
    check_replaceable(path, flat, replace)
    write(path, flat, config)


def flattened(weights: Mapping[str, Array | np.ndarray], prefix: Prefix) -> dict[str, np.ndarray]:
    """The weights as a file has them; no copies of those that are on the host already."""
    flat: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        parts = [np.asarray(value)] if isinstance(prefix, str) else list(np.asarray(value))
        for before, part in zip(listed(prefix), parts, strict=True):
            flat[before + name] = np.ascontiguousarray(part.reshape(_flat(name, part.shape)))
    return flat


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


def write(path: str | Path, flat: Mapping[str, np.ndarray], config: MHCConfig) -> None:
    """Writes arrays that are flat already; the file appears whole or not at all.

    Raises:
        ValueError: a tensor that `read_site` would refuse: a file that is written can be loaded.
        OSError: the target can't be written; a former file is left as it was.
    """
    for name, value in flat.items():
        if value.dtype.name not in DTYPES.values():
            raise ValueError(
                f"{path}: {name} must be float64, float32, bfloat16 or float16 to be saved, got {value.dtype.name}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} must be finite to be saved, got NaN or infinity")
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file or nothing in the target's place, got something else")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(flat), str(temporary), metadata=metadata_of(config))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: can't be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
