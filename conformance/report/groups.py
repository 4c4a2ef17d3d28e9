"""The failures of a report, ready to be grouped (`judge.groups`)."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from conformance.judge.groups import Failure, Where, example
from conformance.judge.rule import GOOD
from conformance.report.read import CheckLine


def of_lines(checks: Iterable[CheckLine]) -> list[Failure]:
    """The failing checks of a report."""
    return [
        Failure(
            c.implementation, c.case, c.family, c.stage, c.x, c.dialect, c.tensor, c.verdict, c.mode,
            float("inf") if c.ratio is None else c.ratio, c.elements, c.message, c.reproduce,
            example([{**msgspec.to_builtins(element), "index": list(element.index)} for element in c.worst]),
        )
        for c in checks
        if c.verdict not in GOOD
    ]  # fmt: skip


def clean_lines(checks: Iterable[CheckLine]) -> set[Where]:
    """The same of a report."""
    ran = [((c.implementation, c.stage, c.x, c.dialect), c.verdict not in GOOD) for c in checks]
    return {where for where, _ in ran} - {where for where, failed in ran if failed}
