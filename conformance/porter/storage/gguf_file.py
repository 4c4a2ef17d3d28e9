"""Reads GGUF files a tensor at a time, and writes new ones.

A block for multi-token prediction is one of the model's blocks by its name, ``blk.43.hc_attn_fn.weight``, and only the
keys say that it isn't. Here it is called ``nextn.0.hc_attn_fn.weight``, and its head ``nextn.0.hc_head_fn.weight``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conformance.files.reading import open_descriptor
from conformance.porter.errors import PortError
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint, Tensor, check_dtype
from conformance.porter.storage.gguf_header import ARRAY, Header, package, read
from conformance.porter.storage.gguf_keys import (
    BLOCKS,
    NEXTN,
    architecture_of,
    configuration,
    keys_of,
    left_open,
    trunk,
)

SUFFIX = ".gguf"
AN_ARRAY = "an array"
"""Stands for the value of a key that has an array, where a number or a text belongs."""
SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
BLOCK = re.compile(r"blk\.(\d+)\.(?:nextn\.(?=hc_head_))?(hc_.*)")
AHEAD = re.compile(r"nextn\.(\d+)\.(hc_.*)")


class GGUFCheckpoint(Checkpoint):
    """One file, or all parts of a split one; its keys stand for a ``config.json``."""

    def __init__(self, path: Path):
        super().__init__(path, "gguf")
        package()
        self.headers: list[Header] = []
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[Header, int, str]] = {}
        self.tensors = {}
        try:
            parts = parts_of(path)
            for part in parts:
                self._open(part)
        except BaseException:
            self.close()
            raise
        self.files = len(parts)

    @property
    def config_place(self) -> str:
        """Where the configuration is, for messages: in the file itself, if the user names no other."""
        return super().config_place if self.config_file else str(self.path)

    @property
    def config_name(self) -> str:
        return super().config_name if self.config_file else "keys"

    @property
    def config_states(self) -> str:
        return super().config_states if self.config_file else "the file's keys state"

    def left_open(self, row: str) -> str:
        return "" if self.config_file else " and ".join(left_open(self.keys, row)[:4])

    def _open(self, path: Path) -> None:
        try:
            descriptor = open_descriptor(path)
        except OSError as error:
            raise PortError(f"{path}: can't be read ({error.strerror})") from error
        self._descriptors.append(descriptor)
        header = Header(path, descriptor)
        self.headers.append(header)
        if self.config is None:  # the first part has the keys of all
            self.keys = {name: AN_ARRAY for name, key in header.keys.items() if key.type == ARRAY} | header.values
            try:
                self.config = configuration(self.keys)
            except PortError as error:
                raise PortError(f"{path}: {error}") from error
            if PORT_KEY in self.keys:
                self.metadata = {PORT_KEY: self.keys[PORT_KEY]}
        blocks, tensors = trunk(self.keys), dict(self.tensors)
        for name, info in header.tensors.items():
            shown = called(name, blocks)
            if shown in self._places:
                raise PortError(f"{path}: has the tensor {name}, and so has {self._places[shown][0].path}")
            self._places[shown] = header, descriptor, name
            tensors[shown] = Tensor(name, info.shape, info.dtype, info.nbytes or 0, path)
        self.tensors = tensors

    def read(self, name: str) -> np.ndarray:
        header, descriptor, stored = self._places[name]
        tensor, info = self.tensors[name], header.tensors[stored]
        dtype = check_dtype(tensor)
        data = bytearray(read(descriptor, info.offset, tensor.nbytes))
        if len(data) < tensor.nbytes:
            raise PortError(f"{tensor.file}: is cut short in {stored}")
        return np.frombuffer(data, dtype).reshape(tensor.shape)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def called(name: str, blocks: int | None) -> str:
    """The name of a tensor here: blocks beyond the model's own are numbered from 0 as ``nextn``."""
    match = BLOCK.fullmatch(name)
    if match and blocks is not None and int(match[1]) >= blocks:
        return f"nextn.{int(match[1]) - blocks}.{match[2]}"
    return name


def stored_as(name: str, blocks: int) -> str:
    """The name in a file of a tensor that is called ``name`` here, if the model has so many blocks of its own."""
    match = AHEAD.fullmatch(name)
    if not match:
        return name
    inside = f"nextn.{match[2]}" if match[2].startswith("hc_head_") else match[2]
    return f"blk.{int(match[1]) + blocks}.{inside}"


def parts_of(path: Path) -> list[Path]:
    """The file, or all parts of the split model that it is one of.

    Raises:
        PortError: a part is missing, or a directory has several models in it.
    """
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
        models = {match["stem"] if (match := SPLIT.fullmatch(file.name)) else file.name for file in files}
        if len(models) != 1:
            raise PortError(f"{path}: has {len(models)} GGUF models, {', '.join(sorted(models)[:4])}: name one file")
        path = files[0]
    match = SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{k:05d}-of-{count:05d}{SUFFIX}") for k in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise PortError(f"{path}: is one of {count} parts, and {', '.join(missing[:4])} isn't there")
    return parts


def save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], target: Path) -> None:
    """Writes a file with these tensors, the keys of their dialect and nothing else.

    Args:
        target: the path that the file will get, for messages.

    Raises:
        PortError: the package can't write it.
    """
    gguf = package()
    noted = json.loads(metadata[PORT_KEY])
    architecture = architecture_of(noted["row"], noted["parameters"])
    blocks, ahead = counted(tensors)
    keys: dict[str, Any] = {
        BLOCKS: blocks + ahead,
        "embedding_length": noted["dim"],
        **({NEXTN: ahead} if ahead else {}),
        **keys_of(architecture, noted["parameters"], noted["streams"]),
    }
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in keys.items():
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{architecture}.{key}", value)
        writer.add_string(PORT_KEY, metadata[PORT_KEY])
        for name, value in tensors.items():
            writer.add_tensor(stored_as(name, blocks), np.ascontiguousarray(value).reshape(value.shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except (ValueError, TypeError) as error:
        raise PortError(f"{target}: the package gguf can't write it ({error})") from error
    finally:
        writer.close()


def counted(tensors: Iterable[str]) -> tuple[int, int]:
    """The numbers of the model's blocks and of blocks for multi-token prediction that the names need."""
    numbers = [int(match[1]) for name in tensors if (match := BLOCK.fullmatch(name))]
    ahead = [int(match[1]) for name in tensors if (match := AHEAD.fullmatch(name))]
    return max(numbers, default=-1) + 1, max(ahead, default=-1) + 1
