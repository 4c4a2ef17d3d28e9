"""Where an implementation rounds to a narrow dtype, as its outputs say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conformance.questions.identifying.candidates import Candidate
from conformance.questions.identifying.records import Record, excess

NARROW = ("bfloat16", "float16")
ONCE = 64.0
"""Units of 2^-24 of the largest value up to which an error beyond the last rounding is float32's."""


FEW = 16 * 2.0**-8
"""The largest error, as a fraction of the largest value, that a few roundings to bfloat16 come to."""


def words(records: Sequence[Record], candidate: Candidate) -> str:
    """What can be said, in words; the stages in which the candidate is near enough to measure against.

    A stage that did not run says nothing.
    """
    narrow = [r for r in records if r.item.variant.x in NARROW]
    parts = [_kept(narrow), _mixed(narrow, candidate), _passes(narrow, candidate), _reduced(narrow, candidate)]
    return ", ".join(part for part in parts if part)


def _kept(records: Sequence[Record]) -> str:
    dtypes = {
        str(r.outputs[k].dtype) for r in records if r.stage == "coefficients" for k in r.outputs
    }  # fmt: skip
    return f"coefficients in {' and '.join(sorted(dtypes))}" if dtypes else ""


def _mixed(records: Sequence[Record], candidate: Candidate) -> str:
    units = _units([r for r in records if r.stage == "post"], candidate)
    if units is None:
        return ""
    return f"mixing {'in float32, rounded once' if units < ONCE else 'rounded before it is added'}"


def _passes(records: Sequence[Record], candidate: Candidate) -> str:
    """Only narrow logits tell: wide ones come with a wide H."""
    asked = [r for r in records if r.stage == "residual_matrix" and r.item.dtype("logits").name in NARROW]
    units = _units(asked, candidate) if candidate.parameters["residual"] == "sinkhorn" else None
    if units is None:
        return ""
    return f"Sinkhorn's passes in {'float32' if units < ONCE else asked[0].item.variant.x}"


def _reduced(records: Sequence[Record], candidate: Candidate) -> str:
    asked = [r for r in records if r.stage == "reduce" and r.item.config["how"] in ("sum", "mean")]
    units = _units(asked, candidate)
    if units is None:
        return ""
    return f"reduce sums in {'float32' if units < ONCE else asked[0].item.variant.x}"


def _units(records: Sequence[Record], candidate: Candidate) -> float | None:
    """The largest error beyond the last rounding, in units of 2^-24; None where another function was computed."""
    largest = None
    for record in records:
        if not record.outputs:
            continue
        values = record.values(candidate)
        for tensor, actual in record.outputs.items():
            scale = float(np.max(np.abs(values[tensor]), initial=0.0)) or 1.0
            units = excess(record.item, actual, values[tensor]) / (2.0**-24 * scale)
            if not units < 2.0**20:  # a sixteenth of the largest value is no rounding
                return None
            largest = max(largest or 0.0, units)
    return largest


def rounded(records: Sequence[Record], rows: Sequence[Candidate]) -> dict[str, float]:
    """The rows that all outputs but stacks' differ from by a few roundings to bfloat16, and the largest difference."""
    asked = [record for record in records if record.stage != "stack"]
    errors = {row.dialect: max((_error(record, row) for record in asked), default=np.inf) for row in rows}
    return {name: error for name, error in errors.items() if error <= min(FEW, 2 * min(errors.values()))}


def _error(record: Record, row: Candidate) -> float:
    """The largest error of any output, as a fraction of its largest value."""
    values, errors = record.values(row), [0.0]
    for tensor, actual in record.outputs.items():
        error = np.abs(actual.astype(np.float64) - values[tensor]) / (
            np.max(np.abs(values[tensor]), initial=0.0) or 1.0
        )
        errors.append(float(np.nan_to_num(np.max(error, initial=0.0), nan=np.inf)))
    return max(errors)
