"""The terminal's summary: one line for what isn't claimed, unless every reason is asked for."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from conformance.judge.item import Outcome
from conformance.judge.rule import Check
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


def test_the_modes_of_a_run_and_what_did_not_hold_in_them():
    text = io.StringIO()
    report = TerminalReport(2, live=False, console=Console(file=text, width=140))
    reasons = ["layouts on a subset, since it copies its inputs"]
    for case in ("a", "b"):
        outcome = Outcome("mine", case, "pre", "float32-float32", "float32", "paper", about={"modes": reasons})
        outcome.modes = ("without gradients", "layout") if case == "a" else ("without gradients", "repeated")
        outcome.checks = [Check("u", "failed", 2.0, mode="without gradients")] if case == "a" else []
        report.add(outcome)
    outcome.differences, outcome.refused = ["u: other bits in 3 of 32 calls"], {"other values": "refused: not twice"}
    report.show(report.outcomes[:1])
    lines = text.getvalue().splitlines()
    assert (
        "modes: mine, items: without gradients 2, layout 1, repeated 1; layouts on a subset, since it copies its inputs"
        in lines
    )
    assert "refused: mine: other values: 1 x not twice" in lines
    assert "not repeated: mine: b, pre, float32-float32: u: other bits in 3 of 32 calls" in lines
    assert "  failed (without gradients): u" in lines
