"""Memory that was freed full of NaN, so that an element that nobody writes shows."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

COPIES = 4
"""Buffers of each size; the first ones may be taken for copies of the inputs."""
ONES = 0xFF
"""A byte; a number of such bytes is NaN in every floating dtype and -1 in every integer one."""
WIDTHS = (2, 4, 8)


def sizes(arrays: Iterable[np.ndarray]) -> set[int]:
    """Bytes of such arrays in every dtype that a result or an intermediate may have."""
    return {array.size * width for array in arrays for width in WIDTHS if array.size}


def poison(lengths: Iterable[int]) -> None:
    """Takes buffers of so many bytes from every allocator here, fills them with NaN, and gives them back.

    PyTorch's allocators are asked too where it is loaded, that of the GPU where it is in use.
    """
    lengths = sorted(lengths)
    held: list[Any] = [np.full(length, ONES, np.uint8) for length in lengths for _ in range(COPIES)]
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "full"):
        devices = ["cpu", *(["cuda"] if torch.cuda.is_initialized() else [])]
        for device in devices:
            held += [
                torch.full((length,), ONES, dtype=torch.uint8, device=device)
                for length in lengths
                for _ in range(COPIES)
            ]
    held.clear()
