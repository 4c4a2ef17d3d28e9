"""Copies a model's GGUF file with other hyper-connections in it; everything else is copied byte for byte.

The package's writer would encode every key and tensor anew, and refuses some that other writers make (empty arrays,
quantisations that it doesn't know). Here only the tensors that are replaced are decoded.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from conformance.files.reading import open_descriptor
from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.gguf_file import SPLIT, GGUFCheckpoint, counted, stored_as
from conformance.porter.storage.gguf_header import FLOAT32, MAGIC, STRING, UINT32, Header, blocks, package, read
from conformance.porter.storage.gguf_keys import (
    ARCHITECTURE,
    ARCHITECTURES,
    BLOCKS,
    NEXTN,
    PREFIX,
    keys_of,
    trunk,
)


@dataclass(frozen=True)
class Piece:
    """A tensor of the copy.

    Attributes:
        value: the array that is new or replaces the model's; None if the model's bytes from ``offset`` on are kept.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int
    offset: int
    value: np.ndarray | None


def save_copy(
    path: Path, model: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], target: Path
) -> None:
    """Writes ``model`` at ``path`` with these tensors in it, and with the keys of their dialect.

    Args:
        target: the path that the copy will get, for messages.

    Raises:
        PortError: the model is one part of a split one, of an architecture that isn't known, or broken.
        OSError: the copy can't be written.
    """
    if SPLIT.fullmatch(model.name):
        raise PortError(f"{model}: is one part of a split model: put it together first, with llama-gguf-split --merge")
    try:
        descriptor = open_descriptor(model)
    except OSError as error:
        raise PortError(f"{model}: can't be read ({error.strerror})") from error
    try:
        header = Header(model, descriptor)
        keys = _keys(header, descriptor, metadata)
        known = trunk(header.values)
        trunk_blocks = counted(tensors)[0] if known is None else known
        pieces = _pieces(header, {stored_as(name, trunk_blocks): value for name, value in tensors.items()})
        with path.open("wb", buffering=0) as file:
            _write_header(file, header, keys, pieces)
            for piece in pieces:
                _write_data(file, header, descriptor, piece, target)
    finally:
        os.close(descriptor)


def check_blocks(model: Path, tensors: Iterable[str]) -> None:
    """Refuses tensors of blocks that the model's keys don't count: its software would misread or ignore them.

    Args:
        tensors: names as `GGUFCheckpoint` shows them.

    Raises:
        PortError: there are such tensors, or the model can't be read.
    """
    with contextlib.closing(GGUFCheckpoint(model)) as checkpoint:
        keys = checkpoint.keys
    trunk_blocks = trunk(keys)
    if trunk_blocks is None:
        return
    ahead = keys.get(f"{keys.get(ARCHITECTURE)}.{NEXTN}", 0)
    needed = counted(tensors)
    for count, need, key, label in (
        (trunk_blocks, needed[0], BLOCKS, "blocks of its own"), (ahead, needed[1], NEXTN, "for multi-token prediction"),
    ):  # fmt: skip
        if isinstance(count, int) and need > count:
            raise PortError(f"{model}: has {count} {label} by its key {key}, and the source has {need}")


def _keys(header: Header, descriptor: int, metadata: Mapping[str, str]) -> list[bytes]:
    """The records of all keys: the model's own, but for those that state the dialect and this port."""
    noted, values = json.loads(metadata[PORT_KEY]), header.values
    architecture = values.get(ARCHITECTURE)
    if architecture not in ARCHITECTURES:
        raise PortError(
            f"{header.path}: is of the architecture {architecture!r}, and its hyper-connections are known for "
            f"{', '.join(ARCHITECTURES)}"
        )
    stated = keys_of(architecture, noted["parameters"], noted["streams"])
    changed: dict[str, bytes] = {PORT_KEY: _record(PORT_KEY, metadata[PORT_KEY])}
    for key, value in stated.items():
        name = f"{architecture}.{key}"
        if key.startswith(PREFIX) and values.get(name) != value:  # the norm's eps is that of all the model's norms
            changed[name] = _record(name, value)
    records = {name: read(descriptor, key.begin, key.end - key.begin) for name, key in header.keys.items()}
    return list({**records, **changed}.values())


def _record(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", STRING) + _text(value)
    kind, form = (UINT32, "I") if isinstance(value, int) else (FLOAT32, "f")
    return _text(name) + struct.pack(f"<I{form}", kind, value)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _pieces(header: Header, tensors: Mapping[str, np.ndarray]) -> list[Piece]:
    """The model's tensors in their order, then those that it lacks."""
    float32 = int(package().GGMLQuantizationType.F32)
    ours = {
        name: Piece(name, value.shape, float32, value.nbytes, 0, np.ascontiguousarray(value))
        for name, value in tensors.items()
    }
    sizes = header.sizes()
    kept = {
        name: Piece(name, info.shape, info.type, sizes[name], info.offset, None)
        for name, info in header.tensors.items()
    }
    return list({**kept, **ours}.values())


def _write_header(file: FileIO, header: Header, keys: list[bytes], pieces: list[Piece]) -> None:
    content = [MAGIC, struct.pack("<IQQ", header.version, len(pieces), len(keys)), *keys]
    offset = 0
    for piece in pieces:
        axes = piece.shape[::-1]
        content.append(_text(piece.name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, piece.type, offset))
        offset += piece.nbytes + -piece.nbytes % header.alignment
    _write(file, b"".join(content))
    _pad(file, header)


def _write_data(file: FileIO, header: Header, descriptor: int, piece: Piece, target: Path) -> None:
    if piece.value is not None:
        _write(file, piece.value.astype("<f4", copy=False).tobytes())
    else:
        copied = _copied_by_the_kernel(file, descriptor, piece.offset, piece.nbytes)
        for block in blocks(descriptor, piece.offset + copied, piece.nbytes - copied):
            _write(file, block)
            copied += len(block)
        if copied < piece.nbytes:
            raise PortError(f"{header.path}: was cut short in {piece.name} while {target} was written")
    _pad(file, header)


def _copied_by_the_kernel(file: FileIO, descriptor: int, offset: int, length: int) -> int:
    """Copies bytes in the kernel if the system can; returns their number (2 GB take 2.1 s, without it 2.8 s)."""
    copied = 0
    with contextlib.suppress(AttributeError, OSError):
        while copied < length:
            step = os.copy_file_range(descriptor, file.fileno(), length - copied, offset + copied)
            if not step:
                break
            copied += step
    return copied


def _pad(file: FileIO, header: Header) -> None:
    _write(file, bytes(-file.tell() % header.alignment))


def _write(file: FileIO, content: bytes) -> None:
    """All of it: an unbuffered file may take less at a time."""
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]
