"""The weights and the batches that a trajectory starts from: numbers from hashes of labels (`oracle.data`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.cases.trajectories.model import BATCH, SEQ, STEPS, shapes
from conformance.oracle.data import normal, shared_grid, uniform

STATES, STRIDE = 16, 4
ALPHAS = {"pre": 0.875, "post": -1.25, "res": 1.75, "head": 0.75}
"""Gating scalars of order 1: at MaxText's initial 0.01 dialects hardly differ (design of the golden cases)."""
SPREAD = {"embedding": 0.5, "positions": 0.25}


def initial_weights(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """float32 weights on a grid that bfloat16 and float16 have too; a tensor's numbers depend on its name alone."""
    return {name: shared_grid(_drawn(name, shape)) for name, shape in shapes(parameters).items()}


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    drawn = normal(f"trajectory/{name}", shape)
    last = name.rpartition(".")[2]
    if last.endswith("_scale"):
        return ALPHAS[last.partition("_")[0]] * (1 + drawn / 8)
    if last.endswith("norm") or last == "scale":
        return 1 + drawn / 8
    if last.endswith(("bias", "base", "beta")):
        return drawn / (1 if last == "res_beta" else 2)
    return drawn * SPREAD.get(last, shape[0] ** -0.5)


def batches() -> np.ndarray:
    """int32 ``[steps, batch, seq + 1]``: walks over 16 of the 64 words, whose next word is the likelier of two."""
    states = uniform("trajectory/first", (STEPS, BATCH, 1), 0, STATES - 1)
    odd = uniform("trajectory/turns", (STEPS, BATCH, SEQ), 0, 3) == 0
    for place in range(SEQ):
        following = (5 * states[..., -1:] + 1 + odd[..., place : place + 1]) % STATES
        states = np.concatenate([states, following], -1)
    return (STRIDE * states + 1).astype(np.int32)
