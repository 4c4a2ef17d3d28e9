"""Memory in which an element that nobody writes shows: NaN, or numbers near the largest of their dtype."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Collection, Generator, Iterable
from typing import Any

import numpy as np

COPIES = 4
"""Buffers of each size; the first ones may be taken for copies of the inputs."""
ONES = 0xFF
"""A byte; a number of such bytes is NaN in every floating dtype and -1 in every integer one."""
WIDTHS = (2, 4, 8)
M_PERTURB, FREED = -6, 0x80
"""glibc fills what is freed with this byte, and what is allocated with its complement 0x7f: 3.39e38 in float32 and
bfloat16, NaN in float16. It leaves out small blocks that a thread keeps for itself."""
SMALLEST = 1032
"""Bytes of the largest of those."""


def sizes(arrays: Iterable[np.ndarray]) -> set[int]:
    """Bytes of such arrays in every dtype that a result or an intermediate may have."""
    return {array.size * width for array in arrays for width in WIDTHS if array.size}


@contextlib.contextmanager
def unwritten(lengths: Collection[int]) -> Generator[None]:
    """In it, memory that is allocated holds neither zeros nor an earlier result.

    Buffers of so many bytes are taken from NumPy, and from PyTorch where it is loaded, on the GPU too where it is in
    use, filled with NaN and given back. glibc fills the rest.
    """
    perturb = _perturb()
    kept = [length for length in sorted(lengths) if perturb is None or length <= SMALLEST]
    held: list[Any] = [np.full(length, ONES, np.uint8) for length in kept for _ in range(COPIES)]
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "full"):
        held += [torch.full((length,), ONES, dtype=torch.uint8) for length in kept for _ in range(COPIES)]
        if torch.cuda.is_initialized():
            held += [torch.full((n,), ONES, dtype=torch.uint8, device="cuda") for n in lengths for _ in range(COPIES)]
    held.clear()
    if perturb is not None:
        perturb(M_PERTURB, FREED)
    try:
        yield
    finally:
        if perturb is not None:
            perturb(M_PERTURB, 0)


def _perturb() -> Callable[[int, int], int] | None:
    """glibc's ``mallopt``; None with another C library."""
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return None
