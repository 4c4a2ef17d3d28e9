"""safetensors files, their headers and single tensors, and directories of them with an index.

The header is read here and not by the safetensors library, which maps the whole file: page faults then read
around each tensor, a file that is cut while it is mapped kills the process, and its errors don't name the tensor.
Files are written by the library.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conformance.files.reading import read_text
from conformance.porter.errors import PortError
from conformance.porter.names import without_optimiser
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint, Tensor, check_dtype
from conformance.porter.storage.holding import hyper_connections
from conformance.porter.storage.numbering import check_numbers, check_whole, of_one_model
from conformance.porter.untyped import is_mapping

NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""The errors that decoding of wrong JSON raises."""
LARGEST_HEADER = 100_000_000  # the format's own limit


class Entry(msgspec.Struct, gc=False):
    """The entry of one tensor in a header; all fields have defaults, since the metadata has none of them."""

    dtype: str = ""
    shape: list[int] = []
    data_offsets: tuple[int, int] = (0, 0)


class Noted(msgspec.Struct):
    """The metadata of a header, whose tensors are skipped."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict[str, str])


class Index(msgspec.Struct):
    """``*.safetensors.index.json``: which shard holds which tensor."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


_HEADER = msgspec.json.Decoder(dict[str, Entry])
_NOTED = msgspec.json.Decoder(Noted)
_INDEX = msgspec.json.Decoder(Index)


def _header_of(text: bytes) -> dict[str, Entry]:
    """A header's entries; if its metadata has keys named like an entry's fields, it is separated first."""
    try:
        return _HEADER.decode(text)
    except msgspec.ValidationError:
        entries = msgspec.json.decode(text)
        if not isinstance(entries, dict) or "__metadata__" not in entries:
            raise
        return {**msgspec.convert({**entries, "__metadata__": {}}, dict[str, Entry])}


class Shard:
    """One safetensors file: its header, and the place of each tensor."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
        except OSError as error:
            raise PortError(f"{path}: can't be read ({error.strerror})") from error
        try:
            self._header()
        except OSError as error:
            self.close()
            raise PortError(f"{path}: can't be read ({error.strerror})") from error
        except PortError:
            self.close()
            raise

    def _header(self) -> None:
        status = self._status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            got = "a directory" if stat.S_ISDIR(status.st_mode) else "something that isn't a file"
            raise PortError(f"{self.path}: expected a safetensors file, got {got}")
        size = status.st_size
        length = int.from_bytes(self._bytes(8, 0), "little")
        if size < 8 or length > LARGEST_HEADER or 8 + length > size:
            raise PortError(
                f"{self.path}: expected a safetensors file, but its header of {length} bytes doesn't fit in {size}"
            )
        try:
            text = self._bytes(length, 8)
            header = _header_of(text)
            noted = header.pop("__metadata__", None)
            self.metadata: dict[str, str] = _NOTED.decode(text).metadata if noted else {}
        except UNREADABLE as error:
            raise PortError(f"{self.path}: expected a safetensors header, got something else ({error})") from error
        entries = sorted([entry.data_offsets for entry in header.values()])
        begins, ends = zip(*entries, strict=True) if entries else ((), ())
        self._start, room = 8 + length, size - 8 - length
        if begins != (0, *ends)[: len(ends)] or (ends[-1] if ends else 0) != room:
            self._explain(header, room)
        self.header = header
        if hasattr(os, "posix_fadvise"):  # nothing around a tensor is wanted
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def _explain(self, header: Mapping[str, Entry], room: int) -> None:
        """Raises the error that names the tensor with a wrong place."""
        before = 0
        for (begin, end), name in sorted((entry.data_offsets, name) for name, entry in header.items()):
            if begin != before:
                problem = "overlaps the tensor before it" if begin < before else "leaves a hole before it"
                raise PortError(f"{self.path}: {name} at bytes {begin} to {end} {problem}, which ends at {before}")
            if end > room:
                raise PortError(
                    f"{self.path}: is cut short: {name} ends at byte {end} of the data, and {room} are there"
                )
            before = end
        raise PortError(f"{self.path}: has {room - before} bytes after its last tensor")

    def _bytes(self, length: int, offset: int) -> bytes:
        """Reads ``length`` bytes of the file, in as many calls as that takes; fewer at its end."""
        content = b""
        while len(content) < length and (
            block := os.pread(self.descriptor, length - len(content), offset + len(content))
        ):
            content += block
        return content

    def tensor(self, name: str) -> Tensor:
        """The description of a tensor in the header.

        Raises:
            PortError: its size contradicts its shape.
        """
        entry = self.header[name]
        (begin, end), dtype, shape = entry.data_offsets, entry.dtype, tuple(entry.shape)
        wrong = begin > end or any(n < 0 for n in shape)
        wrong |= dtype in BYTES and end - begin != BYTES[dtype] * math.prod(shape)
        if wrong:
            raise PortError(f"{self.path}: {name} {dtype} {list(shape)} can't take {end - begin} bytes")
        return Tensor(name, shape, NAMES.get(dtype, str(dtype)), end - begin, self.path)

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensor(name)
        value = np.empty(tensor.shape, check_dtype(tensor))
        view, offset = (
            memoryview(value.reshape(-1).view(np.uint8).data),
            self._start + self.header[name].data_offsets[0],
        )
        while len(view):
            try:
                got = os.preadv(self.descriptor, [view], offset)
            except OSError as error:
                raise PortError(f"{self.path}: {name} can't be read ({error.strerror})") from error
            if not got:
                raise PortError(f"{self.path}: is cut short in {name}")
            view, offset = view[got:], offset + got
        self._check_unchanged(name)
        return value

    def _check_unchanged(self, name: str) -> None:
        """Raises `PortError` where the file was written to since its header was read, which may be of other data.

        One that was replaced by another is still open here, and whole.
        """
        before, now = self._status, os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise PortError(f"{self.path}: was changed while it was read, at {name}: let its writer finish first")

    def close(self) -> None:
        os.close(self.descriptor)


class Tensors(Mapping[str, Tensor]):
    """The tensors of several shards, made when they are looked at: a large checkpoint has tens of thousands."""

    def __init__(self, holders: Mapping[str, str], shards: Mapping[str, Shard]):
        self.holders, self._shards = holders, shards

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self.holders[name]].tensor(name)

    def __eq__(self, other: object) -> bool:
        """A mapping equals only itself, because it is the key under which facts about it are kept."""
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __contains__(self, name: object) -> bool:
        return name in self.holders

    def __iter__(self) -> Iterator[str]:
        return iter(self.holders)

    def __len__(self) -> int:
        return len(self.holders)


class SafetensorsCheckpoint(Checkpoint):
    """One file, or a directory of shards; an index, if there is one, says which shard holds a tensor."""

    def __init__(self, path: Path):
        super().__init__(path, "safetensors")
        self._shards: dict[str, Shard] = {}
        try:
            self._directory() if path.is_dir() else self._file()
        except BaseException:
            self.close()
            raise

    def _file(self) -> None:
        check_whole(self.path)
        shard = self._shards[self.path.name] = Shard(self.path)
        self._hold(dict.fromkeys(shard.header, self.path.name))
        self.metadata = shard.metadata
        self.config = config_beside(self.path.parent)

    def _hold(self, holders: Mapping[str, str]) -> None:
        self._holders, self.tensors = holders, Tensors(holders, self._shards)
        kept, self.aside = without_optimiser(self.tensors)
        if self.aside:
            self._holders = {name: holders[name] for name in kept}
            self.tensors = Tensors(self._holders, self._shards)

    def _directory(self) -> None:
        index = index_of(self.path)
        weight_map: dict[str, str] | None = None
        if index:
            content = read_index(index)
            weight_map, self.metadata = content.weight_map, content.metadata
            files = sorted(set(weight_map.values()))
        else:
            files = safetensors_in(self.path)
        check_numbers(self.path, {*files, *safetensors_in(self.path)})
        for name in files:
            self._shards[name] = Shard(self.path / name)
        holders: dict[str, str] = {}
        repeated: set[str] = set()
        for name, shard in self._shards.items():
            repeated |= holders.keys() & shard.header.keys()
            holders |= dict.fromkeys(shard.header, name)
        for tensor in sorted(repeated):
            self._check_repeated(tensor, weight_map)
        if weight_map is not None and weight_map != holders:
            for tensor, name in weight_map.items():
                if tensor not in self._shards[name].header:
                    raise PortError(f"{index}: says that {tensor} is in {name}, which lacks it")
        if index and weight_map is not None:
            self._check_unlisted(index, weight_map)
        self._hold(holders if weight_map is None else weight_map)
        if not index:
            holding = {name: hyper_connections(shard.header) for name, shard in self._shards.items()}
            holding = {name: ours for name, ours in holding.items() if ours}
            of_one_model(self.path, holding, "an index, *.safetensors.index.json")
            files = list(holding) if len(holding) == 1 else files  # what lies beside it says nothing of the model
        if len(files) == 1 and not self.metadata:
            self.metadata = self._shards[files[0]].metadata
        self.config, self.files = config_beside(self.path), len(self._shards)

    def _check_unlisted(self, index: Path, weight_map: Mapping[str, str]) -> None:
        """Refuses hyper-connections in the directory that the index doesn't list.

        A shard of a port that died before it could list it is allowed.
        """
        others = [name for name in safetensors_in(self.path) if name not in self._shards]
        whole = sum(len(shard.header) for shard in self._shards.values()) == len(weight_map)  # every tensor is listed
        for name in sorted(others if whole else {*self._shards, *others}):
            listed = name in self._shards
            shard = self._shards[name] if listed else Shard(self.path / name)
            unlisted = hyper_connections([tensor for tensor in shard.header if tensor not in weight_map])
            if not listed:
                shard.close()
            if unlisted and (listed or PORT_KEY not in shard.metadata):
                raise unlisted_in(self.path / name, index, unlisted)

    def _check_repeated(self, tensor: str, weight_map: dict[str, str] | None) -> None:
        """A tensor in several shards: right only where each but the first replaces, and the index names the last.

        Readers that load every listed shard, transformers among them, let the last one win.
        """
        holders = [name for name, shard in self._shards.items() if tensor in shard.header]
        replaced = all(PORT_KEY in self._shards[name].metadata for name in holders[1:])
        if weight_map is None or weight_map.get(tensor) != holders[-1] or not replaced:
            raise PortError(f"{self.path}: {tensor} is in both {holders[0]} and {holders[1]}: keep one of them")

    def read(self, name: str) -> np.ndarray:
        return self._shards[self._holders[name]].read(name)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
        self._shards = {}


def safetensors_in(directory: Path) -> list[str]:
    """Names of the safetensors files in a directory; hidden ones are left overs of a process that died."""
    return sorted(p.name for p in directory.glob("*.safetensors") if not p.name.startswith("."))


def index_of(directory: Path) -> Path | None:
    """The index of a directory of shards.

    Raises:
        PortError: there are several.
    """
    indices = sorted(p for p in directory.glob("*.safetensors.index.json") if not p.name.startswith("."))
    if len(indices) > 1:
        raise PortError(f"{directory}: has {len(indices)} indices, {indices[0].name} and {indices[1].name}: keep one")
    return indices[0] if indices else None


def read_index(index: Path) -> Index:
    """A checked index: every file that it names lies in its directory.

    Raises:
        PortError: it isn't one.
    """
    try:
        content = _INDEX.decode(read_text(index))
    except OSError as error:
        raise PortError(f"{index}: can't be read ({error.strerror})") from error
    except UNREADABLE as error:
        raise PortError(f"{index}: expected an index of shards with a weight_map ({error})") from error
    weight_map, names = content.weight_map, set(content.weight_map.values())
    for name in sorted(names):
        outside = len(Path(name).parts) != 1 or name in ("..", ".")
        if outside or not os.path.lexists(index.parent / name):
            tensor = next(t for t, n in weight_map.items() if n == name)
            problem = "outside of the directory" if outside else "and there is no such file"
            raise PortError(f"{index}: puts {tensor} into {name!r}, {problem}")
    return content


def unlisted_in(file: Path, index: Path, names: Sequence[str]) -> PortError:
    """The error for hyper-connections in a file of a directory that its index doesn't list."""
    examples = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
    return PortError(
        f"{file}: has {len(names)} hyper-connection tensors that {index.name} doesn't list, {examples}: list them, or "
        f"move files of other models out of the directory"
    )


def config_beside(directory: Path) -> dict[str, Any] | None:
    """``config.json`` of a model directory.

    Raises:
        PortError: it is there and isn't JSON.
    """
    path = directory / "config.json"
    if not os.path.lexists(path):
        return None
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise PortError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise PortError(f"{path}: expected JSON, got {error}") from error
    return dict(content) if is_mapping(content) else None
