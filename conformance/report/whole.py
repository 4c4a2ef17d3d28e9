"""What may be shown of a run: only one that ended, of a corpus whose files were as promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from conformance.judge.rule import GOOD
from conformance.report.read import ReportError, Run

NARROWING = ("quick", "dtype", "stage", "case", "sizes", "fresh", "modes", "failed")
"""The options that leave something out of a run, or put something else in its place. Dialects are named anyway."""


class Result(Struct, frozen=True, forbid_unknown_fields=True):
    """The checks of one implementation, all runs together.

    Attributes:
        dialects: those that were checked, those with most checks first.
    """

    implementation: str
    passed: int
    failed: int
    dialects: tuple[str, ...]

    @property
    def said(self) -> str:
        """For instance ``passed 1,234 checks``."""
        if self.failed:
            return f"{self.failed:,} of {self.passed + self.failed:,} checks failed"
        return f"passed {self.passed:,} {'check' if self.passed == 1 else 'checks'}"


def results(runs: Sequence[Run]) -> list[Result]:
    """The result of each implementation that was checked, in the order of the runs.

    Raises:
        ReportError: a run was cut off, files of its corpus were altered, or nothing was checked.
    """
    for run in runs:
        if run.cut:
            raise ReportError(f"{run.path}: expected a whole run, it was {run.cut}")
        if run.header.altered:
            raise ReportError(f"{run.path}: expected a run of the corpus as it is, got {run.header.altered[0]}")
    verdicts: dict[str, Counter[bool]] = {}
    dialects: dict[str, Counter[str]] = {}
    for check in (check for run in runs for check in run.checks):
        verdicts.setdefault(check.implementation, Counter())[check.verdict in GOOD] += 1
        dialects.setdefault(check.implementation, Counter())[check.dialect] += 1
    if not verdicts:
        raise ReportError(f"{', '.join(str(run.path) for run in runs)}: expected a run that checked something")
    return [
        Result(name, counts[True], counts[False], tuple(dialect for dialect, _ in dialects[name].most_common()))
        for name, counts in verdicts.items()
    ]


def part(runs: Sequence[Run]) -> str:
    """What the runs were asked for, where it isn't everything: ``quick; stage pre, post``; empty where it is."""
    asked = [{k: v for k, v in run.header.asked.items() if k in NARROWING} for run in runs]
    if not all(asked):  # one of them left nothing out
        return ""
    return "; ".join(dict.fromkeys(_said(name, value) for options in asked for name, value in options.items()))


def _said(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
