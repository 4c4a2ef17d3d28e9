"""Copies a model's files, a block at a time and bit for bit, and adds shards of hyper-connections to the copy."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conformance.files.reading import read_text
from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.into import ALONE, FIRST
from conformance.porter.storage.shards import SafetensorsCheckpoint, index_of, read_index
from conformance.porter.storage.target import CONFIG, INDEX

BLOCK = 1 << 24
"""Bytes that are held of a file while it is copied."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".npz", ".safetensors")
"""Ends of files that hold weights: those that the model's own index doesn't list would be of a model without sites."""
UPCYCLED = "upcycled"
"""The key of a note that says that a checkpoint was made from a model without hyper-connections."""


def shard_names(checkpoint: SafetensorsCheckpoint) -> dict[str, str]:
    """For each file that holds the model's tensors its name in the copy.

    A file named model.safetensors is read before any index, so that it gets the name of a shard.
    """
    names = sorted({tensor.file.name for tensor in checkpoint.tensors.values()})
    return {name: FIRST if name == ALONE else name for name in names}


def other_files(source: Path, taken: Iterable[str]) -> tuple[list[str], list[str]]:
    """The further files of a model's directory: those that are copied, and those that are left behind.

    Copied are the tokenizer's files and the like. Left behind are weights in other formats, indices, hidden files, and
    whatever isn't a file.
    """
    if not source.is_dir():
        return [], []
    copied, left = list[str](), list[str]()
    for path in sorted(source.iterdir()):
        if path.name in taken or path.name == CONFIG or path.name.startswith("."):
            continue
        plain = path.is_file() and not path.name.endswith((*OTHER_WEIGHTS, ".index.json"))
        if not path.name.endswith(".safetensors.index.json"):
            (copied if plain else left).append(path.name)
    return copied, left


def copy(source: Path, target: Path) -> int:
    """Copies one file's bytes through a block of memory, and returns their number; a link is followed.

    Raises:
        PortError: it isn't a file, can't be read, or was changed meanwhile.
        OSError: the copy can't be written.
    """
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
    except OSError as error:
        raise PortError(f"{source}: can't be read ({error.strerror})") from error
    try:
        before, done = os.fstat(descriptor), 0
        if not stat.S_ISREG(before.st_mode):
            raise PortError(f"{source}: expected a file, got something else")
        with target.open("xb") as out:
            while block := _read(source, descriptor):
                out.write(block)
                done += len(block)
        after = os.fstat(descriptor)
        if (done, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise PortError(f"{source}: was changed while it was copied: let its writer finish first")
        return done
    finally:
        os.close(descriptor)


def _read(source: Path, descriptor: int) -> bytes:
    try:
        return os.read(descriptor, BLOCK)
    except OSError as error:
        raise PortError(f"{source}: can't be read ({error.strerror})") from error


def write_index(target: Path, checkpoint: SafetensorsCheckpoint, names: Mapping[str, str]) -> None:
    """Writes the index of the copied shards, under the name that the source's has; its other entries are kept."""
    index = index_of(checkpoint.path) if checkpoint.path.is_dir() else None
    content: dict[str, Any] = json.loads(read_text(index)) if index else {}
    metadata = dict(content.get("metadata") or {})
    metadata.setdefault("total_size", sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
    weight_map = {name: names[tensor.file.name] for name, tensor in sorted(checkpoint.tensors.items())}
    text = json.dumps({**content, "metadata": metadata, "weight_map": weight_map}, indent=2)
    (target / (index.name if index else INDEX)).write_text(text + "\n")


def check_replaceable(target: Path, names: Iterable[str]) -> None:
    """Refuses to replace a directory unless an upcycling has written it, and everything in it will be there again.

    Args:
        names: the files that will be copied.

    Raises:
        PortError: its message names what would be lost.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise PortError(f"{target}: a file is in the way: remove it first")
    present = sorted(path.name for path in target.iterdir())
    index = index_of(target)
    noted = str(read_index(index).metadata.get(PORT_KEY)) if index else ""
    if present and f'"{UPCYCLED}"' not in noted:
        raise PortError(f"{target}: wasn't written by upcycle, and {present[0]} would be lost: remove it first")
    again = {*names, CONFIG, *([index.name] if index else [])}
    lost = [name for name in present if name not in again and "mhc-0" not in name]
    if lost:
        raise PortError(f"{target}: has {lost[0]} in it, which would be lost: remove it first")
