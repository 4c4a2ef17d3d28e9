"""The comparison rule and the verdicts (docs/bound.md, "The bound" and "Verdicts")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import numpy as np

from conformance.cases.case import DTYPES, Item
from conformance.interface import Capabilities
from conformance.judge.heat import heat_map, units

UNIT_ROUNDOFF: dict[np.dtype, float] = {
    DTYPES["float64"]: 2.0**-53,
    DTYPES["float32"]: 2.0**-24,
    DTYPES["bfloat16"]: 2.0**-8,
    DTYPES["float16"]: 2.0**-11,
}
NARROW = (DTYPES["bfloat16"], DTYPES["float16"])
"""The last rounding to these is allowed on top of the bound; the bound of a wider dtype holds it already."""
SLACK = 1.01
"""The unit roundoff is relative to the rounded value, the allowance to the true one."""
ABSOLUTE = {DTYPES["float16"]: 2.0**-25}
"""Half of the smallest subnormal number, where it is large enough to matter."""
PARTS = 3.0
"""Separately rounded parts of a gradient: their magnitudes count three times."""
MOST_KEYS = 12
"""Keys of a result that a message names."""
MARGINAL = 0.5
"""A ratio above this is reported."""
WORST = 4
"""Elements that a check names."""
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
    worst: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    histogram: list[int] = field(default_factory=list[int])
    """Elements by error in units of the bound (`EDGES`), of a tensor that failed."""
    mode: str = ""
    """What was special about the call (`judge.modes`); empty for the plain one."""
    trace: list[str] = field(default_factory=list[str])
    """The frames of an exception, outermost first."""
    map: dict[str, Any] = field(default_factory=dict[str, Any])
    """Where a tensor that failed is wrong (`judge.heat`)."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_array(value: object) -> TypeGuard[np.ndarray]:
    """Whether it is a NumPy array, of any dtype."""
    return isinstance(value, np.ndarray)


def is_of_numbers(value: object) -> TypeGuard[np.ndarray]:
    """Whether it is a NumPy array of a dtype that a result may have; others may hold anything."""
    return is_array(value) and value.dtype in UNIT_ROUNDOFF


def wide(array: np.ndarray) -> np.ndarray:
    """The same numbers in float64, which holds those of every narrower dtype."""
    with np.errstate(invalid="ignore"):  # memory that was never written may be any kind of NaN
        return np.asarray(array, np.float64)


def verdict_of(ratio: float) -> str:
    """The verdict on an error that is this fraction of what is allowed."""
    return "failed" if ratio > 1 else "marginal" if ratio > MARGINAL else "passed"


def allowance(dtype: np.dtype, contract: str, expected: np.ndarray, magnitude: np.ndarray | None) -> np.ndarray:
    """How far the last rounding to ``dtype`` may move each element; 0 where the bound has that precision already."""
    narrower = contract == "float64" and dtype == DTYPES["float32"]  # a gradient of float32 weights under a float64 x
    if dtype not in NARROW and not narrower:
        return np.zeros_like(expected)
    absolute = ABSOLUTE.get(dtype, 0.0)
    if magnitude is None:
        return SLACK * UNIT_ROUNDOFF[dtype] * np.abs(expected) + absolute
    return SLACK * UNIT_ROUNDOFF[dtype] * (PARTS * magnitude) + PARTS * absolute


def check_tensor(
    tensor: str,
    actual: object,
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
        expected: float64 true values; NaN where the result must be NaN or infinite, an infinity where it is free.
        dtype: the dtype it must have.
        contract: the variant's, ``float64`` among them.
        bound: allowed error beyond the last rounding; 0 demands equality.
        magnitude: sums of magnitudes of a gradient's parts, where there are several.
        inputs: to recognise an output that is one of them.
    """
    if not is_array(actual):
        return Check(tensor, "wrong-dtype", message=f"expected a NumPy array, got {type(actual).__name__:.100}")
    if actual.shape != expected.shape:
        return Check(tensor, "wrong-shape", message=f"expected {list(expected.shape)}, got {list(actual.shape)}")
    if actual.dtype != dtype:
        return Check(tensor, "wrong-dtype", message=f"expected {dtype}, got {actual.dtype}")
    value = wide(actual)
    finite = np.isfinite(value)

    def errors() -> np.ndarray:
        return units(value, expected, allowance(dtype, contract, expected, magnitude), bound)

    for wrong, verdict, due in (
        (finite & np.isnan(expected), "hidden", ", where NaN or an infinity must come out"),
        (~finite & np.isfinite(expected), "non-finite", ""),
    ):
        if wrong.any():
            index = tuple(np.argwhere(wrong)[0].tolist())
            message = f"first at {list(index)}: {value[index]}{due}"
            return Check(tensor, verdict, message=message, map=heat_map(tensor, errors()))
    judged = np.isfinite(expected)
    if not judged.any():
        return Check(tensor, "passed", bound=bound)
    places, true = np.argwhere(judged), expected[judged]  # [elements, axes], [elements]
    error = np.abs(value[judged] - true)
    parts = None if magnitude is None else magnitude[judged]
    excess = np.maximum(0.0, error - allowance(dtype, contract, true, parts))
    ratios = excess / bound if bound > 0 else np.where(excess > 0, np.inf, 0.0)
    ratio = float(ratios.max())
    check = Check(tensor, verdict_of(ratio), ratio, float(error.max()), bound)
    largest: list[int] = np.argsort(excess)[::-1][:WORST].tolist()
    for k in largest:
        index: tuple[int, ...] = tuple(places[k].tolist())
        row = {"actual": float(value[index]), "expected": float(expected[index]), "error": float(error[k])}
        check.worst.append({"index": list(index), **row})
    if check.verdict == "failed":
        bins = np.digitize(ratios, EDGES) - 1
        check.histogram = np.bincount(bins, minlength=len(EDGES)).tolist()
        check.map = heat_map(tensor, errors())
        _mistrust(check, value, inputs)
    return check


def _mistrust(check: Check, value: np.ndarray, inputs: Mapping[str, np.ndarray]) -> None:
    """Changes the verdict on a failed tensor that looks like a mistake of the harness: nothing written, or an input."""
    if not value.any():
        check.verdict, check.message = "mistrusted", "all zeros where the expected values are not"
    for name, array in inputs.items():
        if np.array_equal(wide(array), value):
            check.verdict, check.message = "mistrusted", f"equal to the input {name}, where the expected is not"


def check_item(
    item: Item,
    outputs: Mapping[str, Any],
    gradients: Mapping[str, Any],
    claimed: Capabilities,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> list[Check]:
    """A check for every expected tensor of an item that the implementation claims to return.

    Args:
        inputs: the item's, where they are at hand.
    """
    inputs = item.inputs() if inputs is None else inputs
    checks: list[Check] = []
    for tensor, expected in _returned(item, claimed).items():
        gradient, name = tensor.startswith("d/"), tensor.removeprefix("d/")
        actual = (gradients if gradient else outputs).get(name)
        if actual is None:
            part, given = ("gradients", gradients) if gradient else ("outputs", outputs)
            came = f"these have {', '.join(map(str, list(given)[:MOST_KEYS]))}" if given else "these are empty"
            message = f"expected {list(expected.shape)} under {name!r} of the {part}, got nothing; {came}"
            checks.append(Check(tensor, "wrong-shape", message=message))
            continue
        dtype = inputs[name].dtype if gradient else item.output_dtype(name)
        bound = item.bounds[tensor].bound
        magnitude = item.magnitude(tensor) if gradient else None
        check = check_tensor(tensor, actual, expected, dtype, item.variant.contract, bound, magnitude, inputs)
        check.message = "; ".join(filter(None, (check.message, closed_gate(item, check, inputs))))
        checks.append(check)
    return checks


def _returned(item: Item, claimed: Capabilities) -> dict[str, np.ndarray]:
    """The expected tensors that an implementation claims to return: gradients only where it returns every output."""
    outputs = claimed.outputs.get(item.stage)
    if outputs is not None:
        return {tensor: expected for tensor, expected in item.expected.items() if tensor in outputs}
    return {k: expected for k, expected in item.expected.items() if claimed.gradients or not k.startswith("d/")}


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
        streams = np.abs(wide(inputs["x"])).sum(-2)  # [batch, seq, n, C] -> [batch, seq, C]
        reach = max(1.0, float(streams.max()))
    if item.stage == "layer" and check.tensor == "out":
        reach *= float(np.abs(wide(inputs["norm_scale"]) * wide(inputs["branch_scale"])).max())
    if not check.ratio * check.bound <= 2.0**rounding * reach:  # NaN under a bound of 0, which says nothing of the size
        return ""
    return (
        f"a gate is off by less than 2^{rounding}: if the other families pass, the sigmoid keeps no relative accuracy "
        'where the gate is closed, for instance (1 + tanh(z/2))/2 (docs/contract.md, "A closed gate")'
    )
