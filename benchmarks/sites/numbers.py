"""What the measurements of both frameworks share."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STREAMS = 4
LEAST_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 1.0, 5, 200
FLOOR_UNITS = {"forward": 3 * STREAMS + 2, "both": 8 * STREAMS + 5}
"""Streams that a site has to read or write at least (docs/performance.md), in units of T x dim numbers of x's dtype."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.04, "float16": 0.005}
"""Of the largest value, for outputs and the gradient of x: enough to tell a broken one. The suite judges precision."""


@dataclass(frozen=True)
class Shape:
    """T tokens of n = 4 streams."""

    tokens: int
    dim: int
    dtype: str


def rounds_are_enough(times: Mapping[Any, Sequence[float]]) -> bool:
    """Whether the slowest call has taken a second and every call had its rounds; or there were many of them."""
    rounds = min(len(values) for values in times.values())
    spent = max(sum(values) for values in times.values())
    return rounds >= MOST_ROUNDS or (rounds >= LEAST_ROUNDS and spent >= LEAST_SECONDS)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, the first and the third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high
