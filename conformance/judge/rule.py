"""The comparison rule and the verdicts (docs/bound.md, "The bound" and "Verdicts")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from conformance.cases.case import DTYPES, Item

UNIT_ROUNDOFF = {DTYPES["bfloat16"]: 2.0**-8, DTYPES["float16"]: 2.0**-11}
ABSOLUTE = {DTYPES["float16"]: 2.0**-25}
PARTS = 3.0
"""Separately rounded parts of a gradient: their magnitudes count three times."""
MARGINAL = 0.5
EDGES = (0.0, 1e-3, 1e-2, 1e-1, 0.5, 1.0, 2.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Bins of the errors of a tensor that failed, in units of its bound; the last is open."""
GOOD = ("passed", "marginal")
CLOSED_GATE = ("pre", "post", "u", "out")
"""Outputs that show how a gate was rounded, in the family of cases whose gates are closed."""


@dataclass
class Check:
    """The verdict on one tensor of one item.

    ``ratio`` is the largest error beyond the unavoidable last rounding, as a fraction of the bound.
    """

    tensor: str
    verdict: str
    ratio: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    message: str = ""
    worst: list[dict[str, Any]] = field(default_factory=list)
    histogram: list[int] = field(default_factory=list)
    """Elements by error in units of the bound (`EDGES`), of a tensor that failed."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def allowance(dtype: np.dtype, contract: str, expected: np.ndarray, magnitude: np.ndarray | None) -> np.ndarray:
    """What the last rounding to ``dtype`` may cost, elementwise; 0 where the bound already has that precision."""
    roundoff = UNIT_ROUNDOFF.get(dtype, 0.0)
    if contract == "float64" and dtype == DTYPES["float32"]:  # float32 weights under a float64 x
        roundoff = 2.0**-24
    if not roundoff:
        return np.zeros_like(expected)
    size = np.abs(expected) if magnitude is None else PARTS * magnitude
    return 1.01 * roundoff * size + ABSOLUTE.get(dtype, 0.0) * (1 if magnitude is None else PARTS)


def compare(
    tensor: str,
    actual: Any,
    expected: np.ndarray,
    dtype: np.dtype,
    contract: str,
    bound: float,
    magnitude: np.ndarray | None,
    inputs: Mapping[str, np.ndarray],
) -> Check:
    """One tensor against its true value.

    Args:
        actual: what the implementation returned.
        expected: float64 true values.
        dtype: the dtype it must have.
        contract: the variant's, ``float64`` among them.
        bound: allowed error beyond the last rounding; 0 demands equality.
        magnitude: sums of magnitudes of a gradient's parts, where there are several.
        inputs: to recognise an output that is one of them.
    """
    if not isinstance(actual, np.ndarray):
        return Check(tensor, "wrong-dtype", message=f"expected a NumPy array, got {type(actual).__name__}")
    if actual.shape != expected.shape:
        return Check(tensor, "wrong-shape", message=f"expected {list(expected.shape)}, got {list(actual.shape)}")
    if actual.dtype != dtype:
        return Check(tensor, "wrong-dtype", message=f"expected {dtype}, got {actual.dtype}")
    value = actual.astype(np.float64)
    if not np.isfinite(value).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        return Check(tensor, "non-finite", message=f"first at {list(where)}: {value[where]}")
    if expected.size == 0:
        return Check(tensor, "passed", bound=bound)
    error = np.abs(value - expected)
    excess = np.maximum(0.0, error - allowance(dtype, contract, expected, magnitude))
    largest = float(excess.max())
    ratio = largest / bound if bound > 0 else (np.inf if largest > 0 else 0.0)
    order = np.argsort(excess, axis=None)[::-1][:4]
    worst = [
        {"index": [int(i) for i in index], "actual": float(value[index]), "expected": float(expected[index]),
         "error": float(error[index])}
        for index in (np.unravel_index(k, expected.shape) for k in order)
    ]  # fmt: skip
    verdict = "failed" if ratio > 1 else "marginal" if ratio > MARGINAL else "passed"
    check = Check(tensor, verdict, ratio, float(error.max()), bound, worst=worst)
    if verdict == "failed":
        units = excess / bound if bound > 0 else np.where(excess > 0, np.inf, 0.0)
        check.histogram = [int(k) for k in np.bincount(np.digitize(units, EDGES).ravel() - 1, minlength=len(EDGES))]
        if not value.any():
            check.verdict, check.message = "mistrusted", "all zeros where the expected values are not"
        for name, given in inputs.items():
            if given.shape == value.shape and np.array_equal(given.astype(np.float64), value):
                check.verdict, check.message = "mistrusted", f"equal to the input {name}, where the expected is not"
    return check


def check_item(item: Item, outputs: Mapping[str, Any], gradients: Mapping[str, Any], claimed: Any) -> list[Check]:
    """Every expected tensor of an item; ``claimed`` are the implementation's capabilities."""
    inputs, checks = item.inputs(), []
    partial = claimed.outputs.get(item.stage)
    for tensor, expected in item.expected.items():
        gradient = tensor.startswith("d/")
        name = tensor.removeprefix("d/")
        if gradient and (not claimed.gradients or partial is not None):
            continue
        if not gradient and partial is not None and name not in partial:
            continue
        found = (gradients if gradient else outputs).get(name)
        if found is None:
            checks.append(Check(tensor, "wrong-shape", message=f"expected {list(expected.shape)}, got nothing"))
            continue
        dtype = inputs[name].dtype if gradient else item.output_dtype(name)
        bound = item.bounds[tensor].bound
        parts = item.magnitude(tensor) if gradient else None
        check = compare(tensor, found, expected, dtype, item.variant.contract, bound, parts, inputs)
        hint = closed_gate(item, check, inputs)
        check.message = f"{check.message}; {hint}" if check.message and hint else check.message or hint
        checks.append(check)
    return checks


def closed_gate(item: Item, check: Check, inputs: Mapping[str, np.ndarray]) -> str:
    """A hint where a closed gate is off by no more than a rounding of an open one; empty in every other failure.

    The sigmoid by way of tanh has such an error: 2^-25 where a gate at z = -18 is 1.5e-8. An error of the gate reaches
    u by as much as a token's streams add up to, and out by the sub-layer's factors besides.
    """
    if item.case.family != "closed-gate" or check.tensor not in CLOSED_GATE or not check.worst or check.verdict in GOOD:
        return ""
    if "x" not in inputs:  # a stack, whose streams are none of its inputs
        return ""
    rounding = -53 if item.variant.x == "float64" else -24
    reach = 1.0
    if check.tensor in ("u", "out"):
        reach = max(1.0, float(np.abs(inputs["x"].astype(np.float64)).sum(-2).max()))  # [batch, seq, n, C]
    if item.stage == "layer" and check.tensor == "out":
        reach *= float(np.abs(inputs["norm_scale"].astype(np.float64) * inputs["branch_scale"]).max())
    if check.ratio * check.bound > 2.0**rounding * reach:
        return ""
    return (
        f"a gate is off by less than 2^{rounding}: if the other families pass, the sigmoid keeps no relative accuracy "
        'where the gate is closed, for instance (1 + tanh(z/2))/2 (docs/contract.md, "A closed gate")'
    )
