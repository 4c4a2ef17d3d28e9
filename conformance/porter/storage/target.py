"""Writes a checkpoint whole, or nothing: a file, a directory of shards, an Orbax tree, or a shard into a directory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from conformance import atomic
from conformance.porter.errors import CONTRADICTED, PortError
from conformance.porter.layout import Layout
from conformance.porter.storage import gguf_copy, gguf_file, gguf_header, orbax_tree, torch_file
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.shards import SafetensorsCheckpoint, Shard, config_beside, index_of, read_index

TORCH = (".pt", ".pth", ".bin")
CONFIG = "config.json"
FRAGMENT = "hyper-connections alone"
"""What a ``config.json`` that was written here says of itself."""
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def kind_of(path: Path, layout: Layout) -> str:
    """What is written at ``path``: ``orbax``, ``gguf``, ``torch``, ``safetensors`` or ``directory``.

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
    """Refuses a target that is something that is read, or lies in it or around it, or exists.

    Raises:
        PortError: it does.
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
    """A new checkpoint at ``path``, in the place of what was there.

    Args:
        config: what a directory's ``config.json`` states; it has none where this is empty.
        model: a GGUF file that is copied, with the tensors put into the copy.
        read_back: read it again before it takes its place, and compare every bit.

    Raises:
        PortError: it can't be written; what was there before still is.
    """
    try:
        if path.exists() and path.is_dir() != (kind in ("directory", "orbax")):
            raise PortError(f"{path}: a {'directory' if path.is_dir() else 'file'} is in the way: remove it first")
        if path.is_dir():
            _check_other_files(path)
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
                _save(temporary, tensors, metadata)
            else:
                temporary.mkdir()
                _shards(temporary, tensors, metadata, shard_bytes)
                if config:
                    (temporary / CONFIG).write_text(json.dumps({**config, PORT_KEY: FRAGMENT}, indent=1) + "\n")
            if read_back:
                _compare(temporary, kind, tensors)
    except PortError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where its writer fails
        raise PortError(f"{path}: can't be written ({_reason(error)})") from error


def _check_other_files(directory: Path) -> None:
    """Refuses to replace a directory with more in it than a checkpoint of this command: a whole model, say.

    Raises:
        PortError: it names a file that would be lost.
    """
    if (directory / orbax_tree.MARK).exists():
        return
    ours = (config_beside(directory) or {}).get(PORT_KEY) == FRAGMENT
    others = [
        p.name
        for p in directory.iterdir()
        if not p.name.endswith((".safetensors", ".safetensors.index.json")) and not (ours and p.name == CONFIG)
    ]
    if others:
        raise PortError(
            f"{directory}: has {sorted(others)[0]} in it, which would be lost: port --into it, or remove it"
        )


def _compare(path: Path, kind: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises for a tensor that doesn't lie in the file as it was in memory.

    Raises:
        PortError: it names the tensor.
    """
    kinds = {
        "orbax": orbax_tree.OrbaxCheckpoint, "torch": torch_file.TorchCheckpoint, "gguf": gguf_file.GGUFCheckpoint,
    }  # fmt: skip
    with kinds.get(kind, SafetensorsCheckpoint)(path) as checkpoint:
        checkpoint.prepare(tensors)
        for name, value in tensors.items():
            found = checkpoint.read(name) if name in checkpoint.tensors else None
            if found is None or found.dtype != value.dtype or found.tobytes() != np.ascontiguousarray(value).tobytes():
                raise PortError(
                    f"{path}: {name} was read back differently from how it was written: a broken disk?", CONTRADICTED
                )


def _reason(error: Exception) -> str:
    cause = error if isinstance(error, OSError) else error.__context__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error).split("\n")[0]


def _save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    contiguous = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # the library's files are for their owner alone
    try:
        save_file(contiguous, path, metadata=dict(metadata))
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
        _save(directory / name, group, metadata)
    total = sum(value.nbytes for value in tensors.values())
    weight_map = {t: name for name, group in zip(names, groups, strict=True) for t in group}
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_into(
    directory: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], read_back: bool = False
) -> Path:
    """One new shard in a directory of shards, and an index that names it; the old files stay as they are.

    The shard's name sorts after all others, since readers that load every listed shard let the last one win. The
    index is renamed into place when the shard is whole, so that the directory loads at every moment.

    Returns:
        The shard.

    Raises:
        PortError: the directory has no index, or it can't be written.
    """
    index = index_of(directory)
    if index is None:
        raise PortError(f"{directory}: has no *.safetensors.index.json; a directory without one is read file by file")
    read_index(index)
    content: dict[str, Any] = json.loads(index.read_text())  # with all that others wrote into it
    weight_map: dict[str, str] = content["weight_map"]
    last = max(weight_map.values(), default="")
    shard = directory / _next_name(directory, last)
    replaced = 0
    for file in sorted({weight_map[t] for t in tensors if t in weight_map}):
        old = Shard(directory / file)
        replaced += sum(old.tensor(t).nbytes for t in tensors if weight_map.get(t) == file and t in old.header)
        old.close()
    noted = dict(content.get("metadata") or {})
    if isinstance(noted.get("total_size"), int):
        noted["total_size"] += sum(v.nbytes for v in tensors.values()) - replaced
    content["metadata"] = {**noted, PORT_KEY: metadata[PORT_KEY]}
    content["weight_map"] = dict(sorted({**weight_map, **dict.fromkeys(tensors, shard.name)}.items()))
    try:
        with atomic.whole(shard) as temporary:
            _save(temporary, tensors, metadata)
            if read_back:
                _compare(temporary, "safetensors", tensors)
        try:
            atomic.write(index, json.dumps(content, indent=2) + "\n")
        except OSError:  # the index is the old one still
            shard.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PortError(f"{shard}: can't be written ({_reason(error)})") from error
    return shard


def _next_name(directory: Path, last: str) -> str:
    """``model-mhc-00001.safetensors``, or the next number, or with letters before it where others sort later."""
    stem = "model-mhc-" if last < "model-mhc-" or re.match(r"model-mhc-\d", last) else "zz-mhc-"
    if not last < stem and not last.startswith(stem):
        stem = last.removesuffix(".safetensors") + "-mhc-"
    taken = [
        int(m[1]) for p in os.listdir(directory) if (m := re.fullmatch(re.escape(stem) + r"(\d{5})\.safetensors", p))
    ]
    return f"{stem}{max(taken, default=0) + 1:05d}.safetensors"
