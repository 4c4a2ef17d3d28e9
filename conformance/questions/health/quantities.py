"""The figures of docs/health.md, "Quantities", in NumPy; every one is a mean over tokens.

Shapes at line ends: ``T`` tokens, ``n`` streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SATURATED = 1e-3
"""A gate whose sigmoid is below this is closed, above 1 minus this open."""


@dataclass(frozen=True)
class Gains:
    """Sums of a matrix that mixes streams, and its Amax gains.

    Attributes:
        forward_sums: for each output stream the sum over input streams.
        backward_sums: for each input stream the sum over output streams.
        forward, backward: the mean over tokens of the largest absolute sum of each kind.
        off: the mean over tokens of the largest distance of any sum from 1.
    """

    forward_sums: list[float]
    backward_sums: list[float]
    forward: float
    backward: float
    off: float


@dataclass(frozen=True)
class Gate:
    """The sigmoids of pre, of post or of a head, without their scale and eps.

    Attributes:
        mean: for each stream.
        closed, open: for each stream the fraction of tokens for which the gate is closed, or open.
        spread: the standard deviation over tokens, as root mean square over the streams.
    """

    mean: list[float]
    closed: list[float]
    open: list[float]
    spread: float


@dataclass(frozen=True)
class Matrix:
    """How sharp a residual matrix is.

    Attributes:
        entropy: 0 for a permutation, 1 where every entry is 1/n.
        from_permutation, from_uniform, from_identity: the part of an output stream's weight that lies elsewhere than in
            its largest entry, than in equal parts, than in the stream of the same number.
        spread: the standard deviation of entries over tokens, as root mean square over the entries.
    """

    entropy: float
    from_permutation: float
    from_uniform: float
    from_identity: float
    spread: float


def mixing(H: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    """M ``[T, n, n]`` from input streams (rows) to output streams (columns), of the dialect's own H ``[T, n, n]``."""
    return H.swapaxes(-1, -2) if p["mix"] == "out-in" else H


def gains(C: np.ndarray) -> Gains:
    """The gains of a matrix ``[T, n, n]`` from input to output streams."""
    forward, backward = C.sum(-2), C.sum(-1)  # [T, n] each
    off = np.maximum(np.abs(forward - 1).max(-1), np.abs(backward - 1).max(-1))  # [T]
    return Gains(
        forward.mean(0).tolist(), backward.mean(0).tolist(), float(np.abs(forward).max(-1).mean()),
        float(np.abs(backward).max(-1).mean()), float(off.mean()),
    )  # fmt: skip


def matrix(M: np.ndarray) -> Matrix:
    """The sharpness of ``[T, n, n]``, from input to output streams."""
    n = M.shape[-1]
    logarithms = np.log(np.where(M == 0, 1.0, np.abs(M)))  # an entry of 0 adds nothing
    nats = -(np.abs(M) * logarithms).sum((-2, -1))  # [T]
    return Matrix(
        entropy=float(nats.mean()) / (n * math.log(max(n, 2))),
        from_permutation=float(1 - M.max(-2).mean()),
        from_uniform=float(np.abs(M - 1 / n).sum(-2).mean() / 2),
        from_identity=float(np.abs(M - np.eye(n)).sum(-2).mean() / 2),
        spread=spread(M),
    )


def gate(sigmoids: np.ndarray) -> Gate:
    """The saturation of sigmoids ``[T, n]``."""
    closed, opened = sigmoids < SATURATED, sigmoids > 1 - SATURATED
    return Gate(sigmoids.mean(0).tolist(), closed.mean(0).tolist(), opened.mean(0).tolist(), spread(sigmoids))


def share(x: np.ndarray) -> list[float]:
    """The part of the squares of ``[T, n, C]`` that each stream has."""
    squares = np.square(x).sum(-1)  # [T, n]
    return (squares / np.maximum(squares.sum(-1, keepdims=True), np.finfo(np.float64).tiny)).mean(0).tolist()


def spread(values: np.ndarray) -> float:
    """The standard deviation over tokens, the first axis, as root mean square over the rest."""
    return float(np.sqrt(values.var(0).mean()))


def drifting(p: Mapping[str, Any]) -> str:
    """The sums that leave 1 where Sinkhorn's iterations haven't converged: ``forward``, ``backward`` or ``neither``."""
    if p["residual"] != "sinkhorn":
        return "neither"
    return "backward" if (p["order"] == "rows-first") == (p["mix"] == "in-out") else "forward"
