"""Whether H is as doubly stochastic as its own iterations make it (docs/bound.md, "Stochasticity of H")."""

from __future__ import annotations

import math

import numpy as np

from conformance.cases.case import Item
from conformance.judge.rule import UNIT_ROUNDOFF, Check, is_array, verdict_of, wide

TENSOR = "H stochastic"
"""The name of this check, and of the bound that a case may have for it."""


def check_stochasticity(item: Item, H: object) -> Check | None:
    """Entries and both axes' sums of a returned H against the oracle's; None where it doesn't apply.

    Along the axis that is normalised last, each sum must agree with the oracle's to (n + 2) u. (With a guard that sum
    isn't exactly 1.) Where no eps guards the sums, an implementation may work on logarithms, whose exponentials don't
    keep a sum that well: there the case has a bound of its own. Along the other axis a sum may differ by n times the
    bound of H more. Under ``permutations`` each sum runs over all n! weights of one softmax, so that (n! + 2) u takes
    its place, on both axes. A token whose true H isn't finite is left out.
    """
    residual, expected = item.case.parameters["residual"], item.expected.get("H")
    if residual == "identity" or expected is None or not is_array(H):
        return None
    if H.shape != expected.shape or H.dtype not in UNIT_ROUNDOFF or not H.size:
        return None
    whole = np.isfinite(expected).all((-2, -1))  # [batch, seq]: the other tokens' sums say nothing
    value, expected = wide(H)[whole], expected[whole]  # [tokens, n, n]
    if not value.size:
        return None
    if not np.isfinite(value).all():
        return Check(TENSOR, "non-finite", message="an entry isn't finite")
    least = float(value.min())
    if least < 0:
        return Check(TENSOR, "failed", np.inf, -least, 0.0, f"an entry is negative: {least:g}")
    tight, loose = _allowed(item, H.dtype)
    last = -2 if item.case.parameters["order"] == "rows-first" else -1
    worst = Check(TENSOR, "passed", bound=tight)
    for axis, name in ((-1, "rows"), (-2, "columns")):
        allowed = tight if axis == last or residual == "permutations" else loose
        both = np.concatenate([value, -expected], axis)  # [tokens, n, 2n] or [tokens, 2n, n]
        error = float(np.abs(np.apply_along_axis(math.fsum, axis, both)).max())  # the check itself must not round
        ratio = error / allowed
        if ratio > worst.ratio:
            worst = Check(TENSOR, verdict_of(ratio), ratio, error, allowed, f"sums of the {name}")
    return worst


def _allowed(item: Item, dtype: np.dtype) -> tuple[float, float]:
    """How far a sum may be from the oracle's along the axis that is normalised last, and along the other one."""
    n = item.case.parameters["streams"]
    terms = math.factorial(n) if item.case.parameters["residual"] == "permutations" else n
    stored = n * 2.0**-54  # the oracle's entries, at most 1, are rounded to float64 themselves
    tight = (terms + 2) * UNIT_ROUNDOFF[dtype] + stored
    if TENSOR in item.bounds:
        tight = max(tight, item.bounds[TENSOR].bound)
    return tight, tight + n * item.bounds["H"].bound
