"""Whether the smallest entries of H are there at all: the bound of H is one for all entries (docs/bound.md)."""

from __future__ import annotations

import numpy as np

from conformance.judge.rule import Check, is_array, verdict_of, wide

TENSOR = "H faint"
"""The name of this check."""
FAINT, FAINTEST = 2.0**-20, 2.0**-60
"""Entries between these are looked at; smaller ones may have been products below the smallest float32."""
SHARE = 0.25
"""Of itself, by which such an entry may be off. A flushed one is off by 1, an honest one by less than 0.01."""
KEPT = (np.dtype(np.float32), np.dtype(np.float64))
"""Dtypes of H that hold such entries to this accuracy after as many passes."""


def check_faint(H: object, expected: np.ndarray | None, contract: str) -> Check | None:
    """A returned H against the true one where entries are between 2^-60 and 2^-20; None where there are none.

    Args:
        contract: the variant's; under ``activation`` the passes themselves may be rounded.
    """
    if expected is None or contract == "activation" or not is_array(H):
        return None
    if H.shape != expected.shape or H.dtype not in KEPT:
        return None
    faint = (expected >= FAINTEST) & (expected <= FAINT)
    if not faint.any() or not np.isfinite(H).all():
        return None
    relative = np.abs(wide(H)[faint] / expected[faint] - 1)
    worst = int(relative.argmax())
    ratio = float(relative[worst]) / SHARE
    check = Check(TENSOR, verdict_of(ratio), ratio, float(relative[worst]), SHARE)
    if check.verdict == "failed":
        entry = float(wide(H)[faint][worst])
        check.message = f"an entry of {expected[faint][worst]:.3g} came out as {entry:.3g}"
    return check
