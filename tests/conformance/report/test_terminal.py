"""The terminal's summary: one line for what isn't claimed, unless every reason is asked for."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from conformance.judge.item import Outcome
from conformance.report.terminal import TerminalReport

REASONS = ("stage pre not claimed", "dialect paper not claimed", "refused: NotImplementedError: dim 7")


def printed(verbose: bool) -> list[str]:
    text = io.StringIO()
    report = TerminalReport(len(REASONS), live=False, console=Console(file=text, width=140), verbose=verbose)
    for reason in REASONS:
        report.add(Outcome("mine", "case", "pre", "float32-float32", "float32", "paper", skipped=reason))
    report.show([])
    return [line for line in text.getvalue().splitlines() if line.startswith("skipped")]


@pytest.mark.parametrize(
    ("verbose", "expected"),
    [
        (False, ["skipped: mine: 1 x refused: NotImplementedError: dim 7",
                 "skipped: mine: 2 items that it doesn't claim (--verbose names each reason)"]),
        (True, ["skipped: mine: 1 x dialect paper not claimed",
                "skipped: mine: 1 x refused: NotImplementedError: dim 7",
                "skipped: mine: 1 x stage pre not claimed"]),
    ],
)  # fmt: skip
def test_reasons_to_skip(verbose, expected):
    assert printed(verbose) == expected
