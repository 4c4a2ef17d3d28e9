"""Writes a new shard into a directory of safetensors files, and an index that names it."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conformance.files import atomic
from conformance.files.reading import read_text
from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.opening import other_formats
from conformance.porter.storage.shards import Shard, config_beside, index_of, read_index, safetensors_in
from conformance.porter.storage.target import INDEX, compare, reason, save_shard

ALONE, FIRST = "model.safetensors", "model-00001-of-00001.safetensors"
"""The name of a model's only file, which transformers reads before any index, and its name with an index."""


def check_into(directory: Path) -> None:
    """Refuses a directory that can't take a shard.

    Raises:
        PortError: it has several files and no index that says which of them count, a file that is read before its
            index, or the hyper-connections in another format too.
    """
    also = other_formats(directory)
    if also:
        raise PortError(
            f"{directory}: has hyper-connections in {' and '.join(also)} too, and those would stay as they are: move "
            f"them out of the directory"
        )
    check_index(directory)


def check_index(directory: Path) -> None:
    """Refuses a directory of safetensors in which it isn't clear which files hold the model.

    Raises:
        PortError: it has several files and no index, or transformers reads a file before the index or in its place.
    """
    index, files = index_of(directory), safetensors_in(directory)
    if index is None and len(files) != 1:
        raise PortError(
            f"{directory}: has {len(files)} safetensors files and no *.safetensors.index.json that says which hold the "
            f"model; --into takes a directory with an index, as save_pretrained writes it, or with one file"
        )
    if ALONE not in files:
        return
    if index is not None and set(read_index(index).weight_map.values()) != {ALONE}:
        raise PortError(
            f"{directory}: has {ALONE} beside {index.name}, and transformers reads that file and not the index: remove "
            f"one of them"
        )
    named = (config_beside(directory) or {}).get("transformers_weights")
    if named not in (None, index.name if index else None):
        raise PortError(f"{directory}/config.json: names {named!r} as transformers_weights: remove that key first")


def write_into(
    directory: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], read_back: bool = False
) -> Path:
    """Writes one new shard into a directory, and an index that lists it; the old files keep their bytes.

    The shard's name sorts after all others, since readers that load every listed shard let the last one win. The
    index is renamed into place when the shard is whole, so that the directory loads at every moment.

    A model of one file has no index, and transformers wouldn't look at one beside ``model.safetensors``: that file is
    then called ``model-00001-of-00001.safetensors``. For the directory to load at every moment, a second one is made
    with links to the same files, and the two change places.

    Returns:
        The path of the shard.

    Raises:
        PortError: the directory can't take a shard (`check_into`), or it can't be written.
    """
    check_into(directory)
    try:
        if (directory / ALONE).exists():
            return directory / _write_beside_renamed(directory, tensors, metadata, read_back)
        index = index_of(directory) or directory / INDEX
        content = _index(directory, index)
        shard = directory / _next_name(directory, max(content["weight_map"].values(), default=""))
        replaced = _bytes_replaced(directory, content["weight_map"], tensors)
        with atomic.whole(shard) as temporary:
            save_shard(temporary, tensors, metadata)
            if read_back:
                compare(temporary, "safetensors", tensors)
        try:
            atomic.write(index, _with_shard(content, shard.name, tensors, metadata, replaced))
        except OSError:  # the index is the old one still
            shard.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PortError(f"{directory}: can't be written ({reason(error)})") from error
    return shard


def _write_beside_renamed(
    directory: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], read_back: bool
) -> str:
    """`write_into` where `ALONE` gets the name `FIRST`; returns the shard's name."""
    place = Path(os.path.realpath(directory))
    index = index_of(place) or place / INDEX
    content = _index(place, index)
    replaced = _bytes_replaced(place, content["weight_map"], tensors)
    content["weight_map"] = dict.fromkeys(content["weight_map"], FIRST)
    shard = _next_name(place, FIRST)
    with atomic.whole(place) as temporary:
        shutil.copytree(place, temporary, symlinks=True, copy_function=_link)
        (temporary / ALONE).rename(temporary / FIRST)
        save_shard(temporary / shard, tensors, metadata)
        if read_back:
            compare(temporary / shard, "safetensors", tensors)
        (temporary / index.name).unlink(missing_ok=True)  # a link: written through, it would change the old one
        (temporary / index.name).write_text(_with_shard(content, shard, tensors, metadata, replaced))
    return shard


def _link(source: str, target: str) -> None:
    """Gives a file a second name.

    Raises:
        PortError: it isn't a file, or can't have a second name here.
    """
    if not stat.S_ISREG(os.lstat(source).st_mode):
        raise PortError(f"{source}: is no file, directory or link: move it away, or port into a copy of the directory")
    try:
        os.link(source, target)
    except OSError as error:
        raise PortError(
            f"{source}: can't have a second name here ({error.strerror}), which a model of one file needs while its "
            f"directory takes a shard: port into a copy of the directory that is yours"
        ) from error


def _index(directory: Path, index: Path) -> dict[str, Any]:
    """The content of the index, whoever wrote it; for a directory without one, the content that it would have."""
    if index.exists():
        read_index(index)
        return json.loads(read_text(index))
    (file,) = safetensors_in(directory)
    only = Shard(directory / file)
    total = sum(only.tensor(name).nbytes for name in only.header)
    only.close()
    return {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(only.header, file)}


def _bytes_replaced(directory: Path, weight_map: Mapping[str, str], tensors: Mapping[str, Any]) -> int:
    """The size of the tensors that the new shard replaces, in bytes."""
    replaced = 0
    for file in sorted({weight_map[t] for t in tensors if t in weight_map}):
        old = Shard(directory / file)
        replaced += sum(old.tensor(t).nbytes for t in tensors if weight_map.get(t) == file and t in old.header)
        old.close()
    return replaced


def _with_shard(
    content: dict[str, Any], shard: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], replaced: int
) -> str:
    """The text of an index that lists the new shard too."""
    noted = dict(content.get("metadata") or {})
    if isinstance(noted.get("total_size"), int):
        noted["total_size"] += sum(v.nbytes for v in tensors.values()) - replaced
    content["metadata"] = {**noted, PORT_KEY: metadata[PORT_KEY]}
    content["weight_map"] = dict(sorted({**content["weight_map"], **dict.fromkeys(tensors, shard)}.items()))
    return json.dumps(content, indent=2) + "\n"


def _next_name(directory: Path, last: str) -> str:
    """``model-mhc-00001.safetensors``, or the next number, or with letters before it where others sort later."""
    stem = "model-mhc-" if last < "model-mhc-" or re.match(r"model-mhc-\d", last) else "zz-mhc-"
    if not last < stem and not last.startswith(stem):
        stem = last.removesuffix(".safetensors") + "-mhc-"
    taken = [
        int(m[1]) for p in os.listdir(directory) if (m := re.fullmatch(re.escape(stem) + r"(\d{5})\.safetensors", p))
    ]
    return f"{stem}{max(taken, default=0) + 1:05d}.safetensors"
