"""Honest trainings outside of the ensemble that makes the bounds: ``python -m conformance.selftest.training_honest``.

It prints how far they come, as multiples of the ensemble's largest error, which K multiplies in the bound.
"""

from __future__ import annotations

import hashlib

from conformance.cases.trajectories import fixture
from conformance.cases.trajectories.model import TRAJECTORIES
from conformance.oracle.style import ORDERS, Style, ensemble
from conformance.oracle.trajectories.making import honest_errors

RUNS = 24


def others(count: int) -> list[Style]:
    """Styles that the ensemble doesn't have, drawn from their numbers."""
    members = {_choices(style) for style in ensemble()}
    found: list[Style] = []
    number = 0
    while len(found) < count:
        drawn = hashlib.sha256(f"trial {number}".encode()).digest()
        number += 1
        log_domain, potentials, norm_after, reciprocal = (bool(byte & 1) for byte in drawn[1:5])
        style = Style(ORDERS[drawn[0] % 6], log_domain, potentials, norm_after, reciprocal)
        if _choices(style) not in members and style not in found:
            found.append(style)
    return found


def _choices(style: Style) -> tuple[object, ...]:
    """Those of a style that matter in float32."""
    return style.order, style.log_domain, style.potentials, style.norm_after, style.reciprocal


def worst(dialect: str, styles: list[Style]) -> tuple[float, str]:
    """The largest error as a multiple of the ensemble's, and where it is."""
    recorded = fixture.load(dialect)
    errors, bounds = honest_errors(recorded.expected, dialect, styles), recorded.bounds["float32"]
    return max((recorded.told.K * float((errors[name] / bounds[name]).max()), name) for name in errors)


def main() -> None:
    for dialect in TRAJECTORIES:
        ratio, where = worst(dialect, others(RUNS))
        print(f"{dialect}: {ratio:.2f} times the ensemble's largest error, {where}", flush=True)


if __name__ == "__main__":
    main()
