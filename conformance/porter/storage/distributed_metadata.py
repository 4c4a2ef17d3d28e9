"""Reads the ``.metadata`` of a `torch.distributed.checkpoint` directory without running anything in it.

The file is a pickle, and torch's own reader unpickles it whatever it names. Here each class that it may name stands for
an inert record: nothing of torch is imported or called, and a pickle that names anything else is refused.

The classes and their fields are those of `torch.distributed.checkpoint.metadata` and ``filesystem`` (torch 2.13).
"""

from __future__ import annotations

import gc
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from conformance.files.memory import at_most
from conformance.files.reading import open_bytes
from conformance.porter.errors import PortError
from conformance.porter.untyped import is_mapping, is_sequence, is_tuple

NAME = ".metadata"
LARGEST = 1 << 30
"""Bytes of the metadata; those of a million tensors have 200 MB."""
MOST_OF_A_BYTE, ROOM = 100, 1 << 28
"""Bytes of memory for a byte of a pickle, an empty list being the largest; and what is there beside."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, for the dtypes that weights have."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: where it stands in the whole, its shape, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    length: int
    transformed: bool


@dataclass(frozen=True)
class Entry:
    """A tensor of the directory."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


class _Record:
    """Stands for an instance of a class that a pickle may name; keeps what it was made with and what was set on it."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if is_mapping(self.state) else None


class _Metadata(_Record):
    """``Metadata``, or a class of another package that derives from it."""


class _OfTensor(_Record):
    """``TensorStorageMetadata``."""


class _Place(_Record):
    """``MetadataIndex``: the name of a tensor, and where a chunk of it stands."""


class _Properties(_Record):
    """``TensorProperties``: its state is a tuple, and the dtype comes first."""


class _Dtype(str):
    """The name of a dtype; it has no fields that a pickle could set."""

    __slots__ = ()


METADATA, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
CLASSES: dict[tuple[str, str], Any] = {
    (METADATA, "Metadata"): _Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Metadata,
    (METADATA, "TensorStorageMetadata"): _OfTensor,
    (METADATA, "MetadataIndex"): _Place,
    (METADATA, "TensorProperties"): _Properties,
    **{(METADATA, name): _Record for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta",
                                              "_MEM_FORMAT_ENCODING")},
    **{(FILES, name): _Record for name in ("_StorageInfo", "_StoragePrefix")},
    ("torch.serialization", "_get_layout"): _Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, name): _Record for module in ("pathlib", "pathlib._local")
       for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")},
}  # fmt: skip
DTYPES = frozenset(
    f"{kind}{bits}" for kind, sizes in {"float": (16, 32, 64), "int": (8, 16, 32, 64), "uint": (8, 16, 32, 64),
                                        "complex": (32, 64, 128), "qint": (8, 32)}.items() for bits in sizes
) | {"bfloat16", "bool", "quint8", "quint4x2", "quint2x4", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
     "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", *(f"{k}{b}" for k in ("int", "uint", "bits")
     for b in range(1, 8)), "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Makes records, tuples, dictionaries and lists, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return _Dtype(name)
        try:
            return CLASSES[module, name]
        except KeyError:
            raise PortError(
                f"names {module}.{name}, which the metadata of a checkpoint has no use for: nothing of it is run"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise PortError("refers to something outside of it: nothing of it is run")


class Described:
    """The contents of the metadata. An entry is made when it is asked for, since there may be a million chunks.

    Attributes:
        names: the names of all tensors in the saved state dict, with nested keys joined by dots.
        paths: the nested keys of each tensor, if the metadata has them.
        files: the number of files that hold chunks.

    Raises:
        PortError: it doesn't describe tensors.
    """

    def __init__(self, path: Path, unpickled: Any):
        self._path = path
        if not isinstance(unpickled, _Metadata):
            raise PortError(
                f"{path}: expected the metadata of a torch.distributed.checkpoint, got {type(unpickled).__name__}"
            )
        described, stored = unpickled.get("state_dict_metadata"), unpickled.get("storage_data")
        if not is_mapping(described) or not is_mapping(stored):
            raise PortError(f"{path}: doesn't say which file holds which tensor")
        self._described = {k: v for k, v in described.items() if isinstance(k, str) and isinstance(v, _OfTensor)}
        self.names = list(self._described)
        nested = unpickled.get("planner_data")
        self.paths = [
            tuple(map(str, nested[name]))
            for name in (self.names if is_mapping(nested) else ())
            if isinstance(nested.get(name), tuple)
        ]
        self._places: dict[str, list[tuple[Any, _Record]]] = {}
        files = set[str]()
        for place, info in stored.items():
            if isinstance(place, _Place) and isinstance(info, _Record) and isinstance(name := place.get("fqn"), str):
                self._places.setdefault(name, []).append((place.get("offset"), info))
                files.add(str(info.get("relative_path")))
        self.files = len(files)

    def entry(self, name: str) -> Entry:
        """The entry of a tensor.

        Raises:
            PortError: the metadata doesn't describe it as a tensor.
        """
        try:
            places = {_sizes(at, name): info for at, info in self._places.get(name, []) if at is not None}
            return _entry(name, self._described[name], places)
        except PortError as error:
            raise PortError(f"{self._path}: {error}") from error


def read_metadata(directory: Path) -> Described:
    """Reads the metadata of a directory.

    Raises:
        PortError: the file can't be read, names a class that it has no use for, or doesn't describe tensors.
    """
    path = directory / NAME
    collecting = gc.isenabled()
    gc.disable()  # millions of records, none of them garbage: more than half of the time
    try:
        content = _content(path)
        with at_most(len(content) * MOST_OF_A_BYTE + ROOM):  # a place in its memo may be any number
            unpickled = _Unpickler(io.BytesIO(content)).load()
        return Described(path, unpickled)
    except OSError as error:
        raise PortError(f"{path}: can't be read ({error.strerror})") from error
    except PortError as error:
        raise error if str(error).startswith(str(path)) else PortError(f"{path}: {error}") from error
    except Exception as error:  # a pickle machine raises what its bytes make it
        raise PortError(
            f"{path}: expected the metadata of a torch.distributed.checkpoint ({type(error).__name__}): it is cut "
            f"short, or something else"
        ) from error
    finally:
        if collecting:
            gc.enable()


def _content(path: Path) -> bytes:
    with open_bytes(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise PortError(f"{path}: expected metadata of at most {LARGEST} bytes, got more")
    return content


def _entry(name: str, value: _OfTensor, places: Mapping[tuple[int, ...], _Record]) -> Entry:
    properties, chunks = value.get("properties"), value.get("chunks")
    state = properties.state if isinstance(properties, _Properties) else None
    dtype = state[0] if is_tuple(state) and state else None
    if not isinstance(dtype, _Dtype) or not is_sequence(chunks):
        raise PortError(f"{name}: has no dtype, or no chunks")
    return Entry(_sizes(value.get("size"), name), str(dtype), tuple(_chunk(name, chunk, places) for chunk in chunks))


def _chunk(name: str, chunk: Any, places: Mapping[tuple[int, ...], _Record]) -> Chunk:
    if not isinstance(chunk, _Record):
        raise PortError(f"{name}: has a chunk that isn't described as one")
    offsets, shape = _sizes(chunk.get("offsets"), name), _sizes(chunk.get("sizes"), name)
    info = places.get(offsets)
    if info is None:
        raise PortError(f"{name}: no file holds its chunk at {list(offsets)}")
    file, begin, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(file, str) or not all(type(n) is int and n >= 0 for n in (begin, length)):
        raise PortError(f"{name}: its chunk at {list(offsets)} has no place in a file")
    within = PurePosixPath(file)
    if within.is_absolute() or ".." in within.parts or not within.parts or "\0" in file:
        raise PortError(f"{name}: lies in {file!r}, outside of the directory")
    return Chunk(offsets, shape, file, begin, length, bool(info.get("transform_descriptors")))


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    if not is_tuple(value) or not all(type(n) is int and 0 <= n < 2**63 for n in value) or len(value) > 64:
        raise PortError(f"{name}: has no shape of whole numbers")
    return value


def size_of(entry: Entry) -> int:
    """Bytes of a tensor of floating point numbers; of another dtype, its elements."""
    return math.prod(entry.shape) * BYTES.get(entry.dtype, 1)
