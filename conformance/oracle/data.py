"""Deterministic test data: numbers from a hash of a label, on grids that every dtype holds exactly.

No random generator of a library is involved, so the same label gives the same numbers everywhere.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

SMALLEST = 2.0**-16  # below it a bfloat16 number may not be a float16 one


def normal(label: str, shape: tuple[int, ...]) -> np.ndarray:
    """Nearly normal numbers: twelve uniform 16-bit integers added, exact in float64."""
    count = math.prod(shape)
    raw = np.frombuffer(hashlib.shake_256(label.encode()).digest(24 * count), dtype="<u2")
    total = raw.reshape(count, 12).astype(np.int64).sum(-1) - 6 * 65535
    return (total / 65536.0).reshape(shape)


def uniform(label: str, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Integers from ``low`` to ``high`` inclusive, as float64."""
    raw = np.frombuffer(hashlib.shake_256(label.encode()).digest(4 * math.prod(shape)), dtype="<u4")
    return (raw.astype(np.int64) % (high - low + 1) + low).astype(np.float64).reshape(shape)


def shared_grid(values: np.ndarray) -> np.ndarray:
    """float32 values that are exact in bfloat16 and float16 too."""
    narrow = np.asarray(values).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(np.abs(narrow) < SMALLEST, np.float32(0), narrow)


def powers_of_two(label: str, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    return np.exp2(uniform(label, shape, low, high)).astype(np.float32)


@dataclass(frozen=True)
class Draws:
    """The functions above for one seed: every label gives other numbers. Without a seed they are the golden files'."""

    seed: int | None = None

    def _label(self, label: str) -> str:
        return label if self.seed is None else f"fresh/{self.seed}/{label}"

    def normal(self, label: str, shape: tuple[int, ...]) -> np.ndarray:
        return normal(self._label(label), shape)

    def uniform(self, label: str, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
        return uniform(self._label(label), shape, low, high)

    def powers_of_two(self, label: str, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
        return powers_of_two(self._label(label), shape, low, high)

    def shuffled(self, label: str, matrix: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
        """One matrix ``[n, n]`` for every token, ``[*lead, n, n]``; with a seed each has its rows and columns in an
        order of its own."""
        repeated = np.broadcast_to(matrix, (*lead, *matrix.shape))
        if self.seed is None:
            return repeated
        for axis in (-2, -1):
            keys = self.uniform(f"{label}/{axis}", (*lead, matrix.shape[0]), 0, 10**6)
            order = np.argsort(keys, axis=-1, kind="stable")  # [*lead, n]
            repeated = np.take_along_axis(repeated, np.expand_dims(order, -3 - axis), axis)  # [*lead, n, n]
        return repeated
