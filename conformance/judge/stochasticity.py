"""Whether H is as doubly stochastic as its own iterations make it (docs/bound.md, "Stochasticity of H")."""

from __future__ import annotations

import math

import numpy as np

from conformance.cases.case import DTYPES, Item
from conformance.judge.rule import Check

ROUNDOFF = {
    DTYPES["float64"]: 2.0**-53,
    DTYPES["float32"]: 2.0**-24,
    DTYPES["bfloat16"]: 2.0**-8,
    DTYPES["float16"]: 2.0**-11,
}


def check_stochasticity(item: Item, H: object) -> Check | None:
    """Entries and both axes' sums of a returned H against the oracle's; None where it doesn't apply.

    Along the axis that is normalised last, each sum must agree with the oracle's to (n + 2) u. (With a guard that sum
    isn't exactly 1.) Where no eps guards the sums, an implementation may work on logarithms, whose exponentials don't
    keep a sum that well: there the case has a bound of its own. Along the other axis a sum may differ by n times the
    bound of H. Under ``permutations`` each sum runs over all n! weights of one softmax, so that (n! + 2) u takes its
    place, on both axes.
    """
    residual = item.case.parameters["residual"]
    if residual == "identity" or not isinstance(H, np.ndarray):
        return None
    expected = item.expected["H"]
    if H.shape != expected.shape or H.dtype not in ROUNDOFF or not H.size:
        return None
    value = H.astype(np.float64)
    n, u = H.shape[-1], ROUNDOFF[H.dtype]
    terms = math.factorial(n) if residual == "permutations" else n
    if not np.isfinite(value).all():
        return Check("H stochastic", "non-finite", message="an entry isn't finite")
    if value.min() < 0:
        return Check(
            "H stochastic", "failed", np.inf, float(-value.min()), 0.0, f"an entry is negative: {value.min():g}"
        )
    last = -2 if item.case.parameters["order"] == "rows-first" else -1
    rounding = (terms + 2) * u + n * ROUNDOFF[DTYPES["float64"]] / 2  # the stored entries are rounded themselves
    if "H stochastic" in item.bounds:
        rounding = max(rounding, item.bounds["H stochastic"].bound)
    worst = Check("H stochastic", "passed", bound=rounding)
    for axis in (-1, -2):
        tight = residual == "permutations" or axis == last
        allowed = max(rounding, 0.0 if tight else n * item.bounds["H"].bound + rounding)
        both = np.concatenate([value, -expected], axis)  # added exactly: the check must not round in float64
        error = max(abs(math.fsum(row)) for row in np.moveaxis(both, axis, -1).reshape(-1, 2 * n))
        if error / allowed > worst.ratio:
            verdict = "failed" if error > allowed else "marginal" if error > allowed / 2 else "passed"
            name = "rows" if axis == -1 else "columns"
            worst = Check("H stochastic", verdict, error / allowed, error, allowed, f"sums of the {name}")
    return worst
