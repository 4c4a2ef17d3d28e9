"""Finds the logits that N - 1 iterations get most wrong: ``python -m conformance.oracle.slowest``.

Objective: the largest entry of |H after N - after N - 1 iterations|, rows first, relative to the bound of H, the
smaller of that without a guard and with 1e-6 added (so that one matrix serves every dialect), over logits on the
bfloat16 grid with |logit| <= 20. Hill climbing from two nearly decoupled blocks, seeded, climbs the difference itself,
since the bound hardly moves (its floor is 32 * 2^-24); the best of the restarts is then chosen by the ratio. The result
is stored in ``slowest.json`` and frozen there, since the search itself runs in machine arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from conformance.cases.dialects import dialect_rows
from conformance.files import atomic
from conformance.oracle import residual
from conformance.oracle.floats import FloatArithmetic, Quick
from conformance.oracle.style import K_FLOAT32, ensemble

STORE = Path(__file__).with_name("slowest.json")
LARGEST = 20.0


def difference(logits: np.ndarray, iterations: int) -> float:
    """max |H_N - H_{N-1}| for one ``[n, n]`` of logits, the smaller of two guards."""
    return min(_difference(logits, iterations, eps) for eps in (0.0, 1e-6))


def _difference(logits: np.ndarray, iterations: int, eps: float) -> float:
    value = np.exp(logits - logits.max(-1, keepdims=True))
    value = value / value.sum(-1, keepdims=True) + eps
    value = value / (value.sum(-2, keepdims=True) + eps)
    before = value
    for _ in range(iterations - 1):
        before, value = value, value / (value.sum(-1, keepdims=True) + eps)
        value = value / (value.sum(-2, keepdims=True) + eps)
    return float(np.abs(value - before).max())


def relative(logits: np.ndarray, iterations: int) -> float:
    """`difference` as a multiple of the bound of H for these logits in float32."""
    return min(_difference(logits, iterations, eps) / _bound(logits, iterations, eps) for eps in (0.0, 1e-6))


def _bound(logits: np.ndarray, iterations: int, eps: float) -> float:
    """K times the honest error, with float64 in the place of the true value: it is nearer than float32 by 2^29."""
    guard = "add" if eps else "none"
    p = {
        **dialect_rows()["deepseek-v4"], "guard": guard, "eps": eps, "iterations": iterations,
    }  # fmt: skip
    true = residual.sinkhorn(logits[None], p, Quick())[0]
    honest = 0.0
    for style in ensemble():
        rounded = residual.sinkhorn(logits[None].astype(np.float32), p, FloatArithmetic(style, "float32", None))[0]
        honest = max(honest, float(np.abs(rounded.astype(np.float64) - true).max()))
    return K_FLOAT32 * max(honest, 2.0**-24)


def grid(logits: np.ndarray) -> np.ndarray:
    return np.clip(logits, -LARGEST, LARGEST).astype(ml_dtypes.bfloat16).astype(np.float64)


def search(streams: int, iterations: int, seed: int = 0, restarts: int = 12, steps: int = 2500) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed))
    best, best_value = np.zeros((streams, streams)), 0.0  # by the ratio
    for _ in range(restarts):
        blocks = np.arange(streams) < max(1, streams // 2)
        start = np.where(blocks[:, None] == blocks[None, :], 0.0, -generator.uniform(2, 8))
        logits = grid(start + generator.normal(size=start.shape) * 2)
        value, width = difference(logits, iterations), 4.0
        for step in range(steps):
            move = generator.normal(size=logits.shape) * (generator.random(logits.shape) < 0.4) * width
            trial = grid(logits + move)
            trial_value = difference(trial, iterations)
            if trial_value > value:
                logits, value = trial, trial_value
            elif step % 100 == 99:
                width = max(0.05, width * 0.85)
        ratio = relative(logits, iterations)
        if ratio > best_value:
            best, best_value = logits, ratio
    return best


def main() -> None:
    slowest = {}
    for streams in (2, 3, 4, 8):
        for iterations in (10, 20):
            logits = search(streams, iterations)
            slowest[f"n{streams}-N{iterations}"] = logits.tolist()
            change, ratio = difference(logits, iterations), relative(logits, iterations)
            print(f"n={streams} N={iterations}: {change:.2e}, {ratio:.3g} times the bound", flush=True)
    atomic.write(STORE, json.dumps(slowest, indent=1))


if __name__ == "__main__":
    main()
