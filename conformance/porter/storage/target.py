"""Writes a checkpoint whole or not at all: a file, a directory of shards, or an Orbax tree."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from conformance.files import atomic
from conformance.porter.errors import CONTRADICTED, PortError
from conformance.porter.layout import Layout
from conformance.porter.storage import gguf_copy, gguf_file, gguf_header, orbax_tree, torch_file
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.shards import (
    SafetensorsCheckpoint,
    config_beside,
    index_of,
    read_index,
    safetensors_in,
)

TORCH = (".pt", ".pth", ".bin")
CONFIG = "config.json"
FRAGMENT = "hyper-connections alone"
"""The mark in a ``config.json`` that this project wrote; a digest follows it."""
OF_ORBAX = re.compile(r"_.*|d|manifest\.ocdbt|ocdbt\..*|array_metadatas|commit_success\.txt")
"""Names in the directory of an Orbax tree as `orbax_tree.save` writes it."""
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def kind_of(path: Path, layout: Layout) -> str:
    """The kind of checkpoint to write at ``path``: ``orbax``, ``gguf``, ``torch``, ``safetensors`` or ``directory``.

    Raises:
        PortError: the layout isn't kept in such a file.
    """
    if layout.containers[0] == "gguf":
        if path.suffix != gguf_file.SUFFIX:
            raise PortError(f"{path}: {layout.name} is one file: name it {path.stem}{gguf_file.SUFFIX}")
        gguf_header.package()
        return "gguf"
    if path.suffix == gguf_file.SUFFIX:
        raise PortError(f"{path}: a GGUF file has the layout gguf, not {layout.name}: port --to gguf, or name another")
    if layout.containers[0] == "orbax":
        if path.suffix in (".safetensors", *TORCH):
            raise PortError(f"{path}: {layout.name} is an Orbax checkpoint, a directory: name one")
        orbax_tree.check_path(path)
        return "orbax"
    if path.suffix in TORCH:
        return "torch"
    return "safetensors" if path.suffix == ".safetensors" else "directory"


def check_target(path: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuses a target that exists, or that is a source, lies inside of one, or contains one.

    Raises:
        PortError: the target can't be written for one of these reasons.
    """
    try:
        where = Path(os.path.realpath(path))
        places = {source: Path(os.path.realpath(source)) for source in sources}
        for source, place in places.items():
            if where == place or place in where.parents:
                raise PortError(f"{path}: is {source}, or inside of it: the source is never written to")
        if os.path.lexists(path) and not overwrite:
            raise PortError(f"{path}: exists; --overwrite replaces it")
        for source, place in places.items():
            if where in place.parents:
                raise PortError(f"{path}: has the source {source} in it, which would be lost: name another")
        if not path.parent.is_dir():
            raise PortError(f"{path.parent}: is no directory to write {path.name} into")
    except OSError as error:  # a loop of links, a name that is too long
        raise PortError(f"{path}: can't be written ({error.strerror})") from error


def write(
    path: Path,
    kind: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    shard_bytes: int,
    read_back: bool = False,
    config: Mapping[str, Any] | None = None,
    model: Path | None = None,
) -> None:
    """Writes a new checkpoint at ``path``, and replaces the one that was there.

    Args:
        config: the content of a directory's ``config.json``; it gets none if this is empty.
        model: a GGUF file that is copied, with the tensors put into the copy.
        read_back: whether the new checkpoint is read before it takes its place, and every bit compared.

    Raises:
        PortError: it can't be written; the former checkpoint is then still there.
    """
    try:
        check_form(path, kind)
        if path.is_dir():
            check_other_files(path)
        with atomic.whole(path) as temporary:
            if kind == "orbax":
                orbax_tree.save(temporary, tensors, metadata, path)
            elif kind == "gguf" and model is not None:
                gguf_copy.save_copy(temporary, model, tensors, metadata, path)
            elif kind == "gguf":
                gguf_file.save(temporary, tensors, metadata, path)
            elif kind == "torch":
                torch_file.save(temporary, tensors, metadata)
            elif kind == "safetensors":
                save_shard(temporary, tensors, metadata)
            else:
                temporary.mkdir()
                _shards(temporary, tensors, metadata, shard_bytes)
                if config:
                    (temporary / CONFIG).write_text(json.dumps({**config, PORT_KEY: _marked(config)}, indent=1) + "\n")
            if read_back:
                compare(temporary, kind, tensors)
    except PortError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where its writer fails
        raise PortError(f"{path}: can't be written ({reason(error)})") from error


def check_form(path: Path, kind: str) -> None:
    """Refuses to replace a directory by a file, or a file by a directory.

    Raises:
        PortError: the target is of the other form.
    """
    if path.exists() and path.is_dir() != (kind in ("directory", "orbax")):
        raise PortError(f"{path}: a {'directory' if path.is_dir() else 'file'} is in the way: remove it first")


def check_other_files(directory: Path) -> None:
    """Refuses to replace a directory that holds more than a checkpoint of this command, such as a whole model.

    Raises:
        PortError: its message names a file that would be lost.
    """
    names = sorted(p.name for p in directory.iterdir())
    if (directory / orbax_tree.MARK).exists():
        others = [name for name in names if not OF_ORBAX.fullmatch(name)]
    else:
        index = index_of(directory)
        listed = {index.name, *read_index(index).weight_map.values()} if index else {*safetensors_in(directory)}
        others = [name for name in names if name not in listed]
        config = config_beside(directory) or {}
        if CONFIG in others and config.get(PORT_KEY) == _marked(config):
            others.remove(CONFIG)
        elif others == [CONFIG] and str(config.get(PORT_KEY)).startswith(FRAGMENT):
            raise PortError(
                f"{directory / CONFIG}: was changed after it was written, and would be lost: remove it first"
            )
    if others:
        raise PortError(f"{directory}: has {others[0]} in it, which would be lost: port --into it, or remove it")


def _marked(config: Mapping[str, Any]) -> str:
    """The mark for a ``config.json`` that this project writes, with a digest of everything else in it."""
    content = {key: value for key, value in config.items() if key != PORT_KEY}
    return f"{FRAGMENT}, {hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]}"


def compare(path: Path, kind: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Checks that every tensor in the file has the bits that it has in memory.

    Raises:
        PortError: a tensor differs; the message names it.
    """
    kinds = {
        "orbax": orbax_tree.OrbaxCheckpoint, "torch": torch_file.TorchCheckpoint, "gguf": gguf_file.GGUFCheckpoint,
    }  # fmt: skip
    with kinds.get(kind, SafetensorsCheckpoint)(path) as checkpoint:
        checkpoint.prepare(tensors)
        for name, value in tensors.items():
            stored = checkpoint.read(name) if name in checkpoint.tensors else None
            if (
                stored is None
                or stored.dtype != value.dtype
                or stored.tobytes() != np.ascontiguousarray(value).tobytes()
            ):
                raise PortError(
                    f"{path}: {name} was read back differently from how it was written: a broken disk?", CONTRADICTED
                )


def reason(error: Exception) -> str:
    """Why the system or a library can't write, in a few words."""
    cause = error if isinstance(error, OSError) else error.__context__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error).split("\n")[0]


def save_shard(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it can't be written.
    """
    contiguous = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # the library's files are for their owner alone
    try:
        library: Any = safetensors.numpy  # the types of its functions are incomplete
        library.save_file(contiguous, path, metadata=dict(metadata))
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{error}") from error


def _shards(directory: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], limit: int) -> None:
    groups: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, value in tensors.items():
        if groups[-1] and size + value.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = value
        size += value.nbytes
    names = [f"model-{k:05d}-of-{len(groups):05d}.safetensors" for k in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        save_shard(directory / name, group, metadata)
    total = sum(value.nbytes for value in tensors.values())
    weight_map = {t: name for name, group in zip(names, groups, strict=True) for t in group}
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
