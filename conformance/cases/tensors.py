"""Reads safetensors files of cases and of results, each at once and by its bytes.

The library's own `safe_open` maps a file, and a file that is cut while it is mapped kills the process. So a file is
read here, whole, and the library takes its bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import msgspec
import numpy as np
import safetensors

from conformance.cases.format import DTYPES
from conformance.files.places import CaseError
from conformance.files.reading import open_bytes, reason

T = TypeVar("T")
LARGEST = 1 << 28
"""Bytes of a file; the largest case of ours has 1.2 MB."""
NAMES: dict[str, np.dtype[Any]] = {
    "F64": DTYPES["float64"], "F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"],
    **{name: np.dtype(kind) for name, kind in (
        ("I64", "i8"), ("I32", "i4"), ("I16", "i2"), ("I8", "i1"), ("U64", "u8"), ("U32", "u4"), ("U16", "u2"),
        ("U8", "u1"), ("BOOL", "?"), ("C64", "c8"),
    )},
}  # fmt: skip
"""The format's names of dtypes that an array can have."""
WRONG = (
    safetensors.SafetensorError,
    msgspec.MsgspecError,
    UnicodeError,
    OSError,
    ValueError,
    RecursionError,
    MemoryError,
)
"""What reading raises for files that aren't whole."""


class Entry(msgspec.Struct):
    """A tensor in a header; the metadata are one of another form."""

    data_offsets: tuple[int, int] = (0, 0)


class File(NamedTuple):
    """What a safetensors file held at one moment."""

    metadata: dict[str, str]
    tensors: dict[str, np.ndarray]


def read_file(path: Path) -> File:
    """Metadata and every tensor of a safetensors file, from the same bytes; bfloat16 by ml_dtypes.

    Raises:
        CaseError: it can't be read, or has a tensor that no array can be.
    """
    library: Any = safetensors  # its functions have no types

    def both() -> tuple[dict[str, str], list[tuple[str, dict[str, Any]]]]:
        content = _content(path)
        return _metadata(io.BytesIO(content), len(content)), library.deserialize(content)

    metadata, parts = _whole(path, both)
    tensors: dict[str, np.ndarray] = {}
    for name, part in sorted(parts, key=lambda named: named[0]):  # the library's order is another each time
        if part["dtype"] not in NAMES:
            raise CaseError(f"{path}: a tensor can't be read ({name} has the dtype {part['dtype']})")
        try:
            tensors[name] = np.frombuffer(part["data"], NAMES[part["dtype"]]).reshape(part["shape"])
        except ValueError as error:  # more axes than an array has
            raise CaseError(f"{path}: a tensor can't be read ({name}: {error})") from error
    return File(metadata, tensors)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file, whose size is what the header says.

    Raises:
        CaseError: it can't be read, or is cut short.
    """

    def header() -> dict[str, str]:
        with open_bytes(path) as file:
            return _metadata(file, os.fstat(file.fileno()).st_size)

    return _whole(path, header)


def _metadata(file: BinaryIO, size: int) -> dict[str, str]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8 or size > LARGEST:
        raise ValueError(f"it has {size} bytes, and its header would have {length}")
    entries = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
    noted = entries.pop("__metadata__", None)
    ends = [msgspec.json.decode(raw, type=Entry).data_offsets[1] for raw in entries.values()]
    if max(ends, default=0) != size - 8 - length:
        raise ValueError(f"its tensors end at byte {max(ends, default=0)} of {size - 8 - length}")
    return msgspec.json.decode(noted, type=dict[str, str]) if noted is not None else {}


def _content(path: Path) -> bytes:
    with open_bytes(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    return content


def _whole(path: Path, read: Callable[[], T]) -> T:
    """What ``read`` returns.

    Raises:
        CaseError: the file isn't there, or isn't a whole safetensors file.
    """
    try:
        return read()
    except FileNotFoundError as error:
        raise CaseError(f"{path}: no such file") from error
    except WRONG as error:
        raise CaseError(
            f"{path}: expected a whole safetensors file, got one that can't be read ({reason(error)})"
        ) from error
