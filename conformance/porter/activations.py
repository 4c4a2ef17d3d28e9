"""Streams from a file, on which source and target are evaluated: ``--activations``."""

from __future__ import annotations

import ast
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np

from conformance.cases.format import DTYPES
from conformance.files.reading import open_bytes, reason
from conformance.porter.errors import PortError
from conformance.porter.options import MOST_ELEMENTS
from conformance.porter.storage.opening import open_checkpoint

MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 10_000
"""Bytes of an array's description, as NumPy itself allows."""


def read(path: Path) -> np.ndarray:
    """Streams ``[tokens, n, C]`` in float64: the array of a .npy file, or all tensors of a checkpoint.

    Raises:
        PortError: the file can't be read, or has no streams in it, or too many.
    """
    if path.suffix == ".npy":
        values = [_array(path)]
    else:
        with open_checkpoint(path) as checkpoint:
            tensors = checkpoint.tensors.values()
            _check_size(path, (math.prod(tensor.shape) for tensor in tensors))
            values = [checkpoint.read(name) for name in checkpoint.tensors]
    for value in values:
        if value.dtype not in DTYPES.values():
            raise PortError(f"{path}: must hold {', '.join(DTYPES)}, got {value.dtype}")
        if value.ndim < 2 or value.shape[-2:] != values[0].shape[-2:] or not np.isfinite(value).all():
            raise PortError(
                f"{path}: must hold finite streams [..., n, C], all with the same n and C, got {list(value.shape)}"
            )
    if not values:
        raise PortError(f"{path}: has no tensors")
    if not all(value.size for value in values):
        raise PortError(f"{path}: must hold at least one token in each array, got none")
    return np.concatenate([v.astype(np.float64).reshape(-1, *v.shape[-2:]) for v in values])  # [tokens, n, C]


def _check_size(path: Path, elements: Iterable[int]) -> None:
    total = sum(elements)
    if total > MOST_ELEMENTS:
        raise PortError(
            f"{path}: must hold at most {MOST_ELEMENTS} elements, got {total}: leave out some of the tokens"
        )


def _array(path: Path) -> np.ndarray:
    """The array of a .npy file; its size decides before any memory is taken.

    Raises:
        PortError: it isn't one, or states more elements than it holds.
    """
    try:
        with open_bytes(path) as file:
            size = os.fstat(file.fileno()).st_size
            dtype, shape, fortran = _described(file.read(8 + 4 + LONGEST_HEADER))
            _check_size(path, [math.prod(shape)])
            start = _start(file)
            stated, there = math.prod(shape) * dtype.itemsize, size - start
            if stated > there:
                raise PortError(f"{path}: states {list(shape)} {dtype}, {stated} bytes, and {there} are there")
            file.seek(start)
            content = file.read(stated)
    except OSError as error:
        raise PortError(f"{path}: can't be read ({reason(error)})") from error
    except (ValueError, struct.error, RecursionError, MemoryError) as error:
        raise PortError(f"{path}: expected an array of NumPy's .npy format, got {reason(error)}") from error
    if len(content) < stated:
        raise PortError(f"{path}: is cut short")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _start(file: Any) -> int:
    """The place of the first element."""
    file.seek(0)
    length, begin = _header(file.read(12))
    return begin + length


def _header(start: bytes) -> tuple[int, int]:
    """The length of an array's description, and where it begins."""
    if start[:6] != MAGIC or len(start) < 12 or start[6] not in (1, 2, 3):
        raise ValueError("something else")
    return (struct.unpack("<H", start[8:10])[0], 10) if start[6] == 1 else (struct.unpack("<I", start[8:12])[0], 12)


def _described(start: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """The dtype, the shape and whether the first axis is contiguous."""
    length, begin = _header(start)
    text = start[begin : begin + length]
    if len(text) < length:
        raise ValueError(f"a description of {length} bytes, which is cut short or too long")
    try:
        found: Any = ast.literal_eval(text.decode("latin1").strip())
    except SyntaxError as error:
        raise ValueError("a description that isn't one") from error
    if not isinstance(found, dict) or {*cast("dict[Any, Any]", found)} != {"descr", "fortran_order", "shape"}:
        raise ValueError("a description without descr, fortran_order and shape")
    described = cast("dict[str, Any]", found)
    shape, kind = described["shape"], described["descr"]
    if not isinstance(shape, tuple) or not all(
        type(n) is int and 0 <= n < 1 << 62 for n in cast("tuple[Any, ...]", shape)
    ):
        raise ValueError(f"a shape of {str(cast(Any, shape))[:60]}")
    if not isinstance(kind, str):
        raise ValueError("an array of records")
    try:
        return np.dtype(kind), cast("tuple[int, ...]", shape), bool(described["fortran_order"])
    except TypeError as error:
        raise ValueError(f"a dtype of {kind[:60]!r}") from error
