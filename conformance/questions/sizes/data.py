"""Numbers for production sizes: each element is a function of (seed, case, tensor, index) alone.

Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is keyed by a hash of seed, case
and tensor, and its counter is the index, so that any tile can be made by itself, on any machine, without a file. All
that follows is integers, and float32 products, which IEEE rounds the same everywhere. The values are exact in bfloat16
and in float16, so that one truth serves every dtype.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

BLOCK = 4
"""Words of 64 bits that one value of the counter gives."""
SMALLEST = 2.0**-14
"""The smallest normal number of float16: below it the two narrow dtypes have no common grid of 8 bits."""


@dataclass(frozen=True)
class Source:
    """The tensors of one case."""

    seed: int
    case: str

    def words(self, tensor: str, start: int, count: int) -> np.ndarray:
        """``count`` words of 64 bits of a tensor, from word ``start`` on."""
        label = f"{self.seed}/{self.case}/{tensor}".encode()
        key = np.frombuffer(hashlib.sha256(label).digest()[:16], "<u8")
        first = start // BLOCK
        generator = np.random.Philox(key=key, counter=[first, 0, 0, 0])
        words = np.asarray(generator.random_raw(start - first * BLOCK + count), np.uint64)
        return words[start - first * BLOCK :]

    def bits(self, tensor: str, start: int, count: int) -> np.ndarray:
        """``count`` words of 32 bits, from word ``start`` on; the lower half of 64 comes first."""
        first = start // 2
        words = self.words(tensor, first, (start + count + 1) // 2 - first)
        halves = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], -1).reshape(-1)
        return halves[start - 2 * first :][:count].astype(np.uint32)

    def normal(self, tensor: str, start: int, count: int) -> np.ndarray:
        """Nearly normal float32 numbers of deviation 1.15, multiples of 2^-7: four bytes, added."""
        bits = self.bits(tensor, start, count)
        total = np.zeros(count, np.int32)
        for shift in (0, 8, 16, 24):
            total += ((bits >> np.uint32(shift)) & np.uint32(255)).astype(np.int32)
        return (total - 510).astype(np.float32) * np.float32(2.0**-7)

    def uniform(self, tensor: str, start: int, count: int, low: int, high: int) -> np.ndarray:
        """Integers from ``low`` to ``high`` inclusive, as float32."""
        bits = self.bits(tensor, start, count).astype(np.int64)
        return (bits % (high - low + 1) + low).astype(np.float32)


def on_grid(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to 8 bits, which bfloat16 and float16 hold exactly; 0 where they are below `SMALLEST`."""
    narrow = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(np.abs(narrow) < SMALLEST, np.float32(0), narrow)


def projection(source: Source, tensor: str, width: int, columns: int, scale: float) -> np.ndarray:
    """``[width, columns]`` whose product with a token of unit deviation has about the deviation ``scale``."""
    values = source.normal(tensor, 0, width * columns) * np.float32(scale / math.sqrt(width))
    return on_grid(values).reshape(width, columns)
