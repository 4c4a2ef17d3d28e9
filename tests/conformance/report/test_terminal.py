"""The terminal's summary: what wasn't run in a line, failures in groups, and their cause at the end."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from conformance.judge.groups import Diagnosis
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report import blind, terminal
from conformance.report.terminal import TerminalReport
from conformance.stages import STAGES

REASONS = ("stage pre not claimed", "dialect paper not claimed", "refused: NotImplementedError: dim 7")


ITEM = ("pre", "float32-float32", "float32", "paper")


def shown(outcomes, failures=(), diagnoses=(), **options) -> list[str]:
    text = io.StringIO()
    TerminalReport(Console(file=text, width=140), **options).show(outcomes, failures, diagnoses)
    return text.getvalue().splitlines()


def printed(skipped: bool) -> list[str]:
    outcomes = [Outcome("mine", "case", *ITEM, skipped=reason) for reason in REASONS]
    return [line for line in shown(outcomes, skipped=skipped) if line.startswith("skipped")]


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        (False, ["skipped: mine: 1 x refused: NotImplementedError: dim 7",
                 "skipped: mine: 2 items that it doesn't claim (--skipped names each reason)"]),
        (True, ["skipped: mine: 1 x dialect paper not claimed",
                "skipped: mine: 1 x refused: NotImplementedError: dim 7",
                "skipped: mine: 1 x stage pre not claimed"]),
    ],
)  # fmt: skip
def test_reasons_to_skip(skipped, expected):
    assert printed(skipped) == expected


def test_the_modes_of_a_run_and_what_did_not_hold_in_them():
    outcomes, reasons = [], ["layouts on a subset, since it copies its inputs"]
    for case in ("a", "b"):
        outcome = Outcome("mine", case, *ITEM, about={"modes": reasons})
        outcome.modes = ("without gradients", "layout") if case == "a" else ("without gradients", "repeated")
        outcome.checks = [Check("u", "failed", 2.0, mode="without gradients")] if case == "a" else []
        outcomes.append(outcome)
    outcome.differences, outcome.refused = ["u: other bits in 3 of 32 calls"], {"other values": "refused: not twice"}
    lines = shown(outcomes, outcomes[:1])
    assert (
        "modes: mine, items: without gradients 2, layout 1, repeated 1; layouts on a subset, since it copies its inputs"
        in lines
    )
    assert "refused: mine: other values: 1 x not twice" in lines
    assert "not repeated: mine: b, pre, float32-float32: u: other bits in 3 of 32 calls" in lines
    assert "mine: pre, u: failed in modes alone (without gradients) in 1 item, up to 2 x the bound" in lines
    assert "  failed (without gradients): u" in shown(outcomes, outcomes[:1], verbose=True)


def failing(case, stage, tensor, ratio=4.0, **more):
    outcome = Outcome("mine", case, stage, *ITEM[1:], family=case.partition("-")[0], elements=len(case), **more)
    outcome.checks = [Check(tensor, "failed", ratio, worst=[{"index": [0], "actual": 1, "expected": 2, "error": 1}])]
    return outcome


def test_failures_are_grouped_and_what_follows_is_folded_and_the_cause_stands_last():
    failures = [failing("wide-1", "layer", "out"), failing("generic-12", "pre", "u")]
    failures.append(failing("wide-1", "pre", "u", 9.0))
    diagnosis = Diagnosis("mine", "pre_eps 0, not 1e-06", ["first in pre"])
    lines = shown([*failures, Outcome("mine", "z", *ITEM)], failures, [diagnosis])
    assert "mine: pre, u: failed in 2 items, up to 9 x the bound" in lines
    assert "  families generic, wide; float32; paper" in lines
    assert "  smallest, wide-1: [0]: got 1, expected 2, off by 1" in lines
    assert "  mhc-conformance run --impl mine --case wide-1 --stage pre --dtype float32" in lines
    assert "mine: layer in 1 items fail too, which follows from pre" in lines
    assert lines[-2:] == ["diagnosis of mine: pre_eps 0, not 1e-06", "  first in pre"]


def test_no_cause_is_said_too():
    failures = [failing("wide-1", "pre", "u")]
    lines = shown(failures, failures, [Diagnosis("mine", "")])
    assert lines[-2] == "diagnosis of mine: no cause was found"
    assert lines[-1] == "  mhc-conformance identify --impl mine -v names the nearest functions"


def test_a_marginal_check_is_explained():
    outcome = failing("wide-1", "pre", "u", 0.75)
    outcome.checks[0].verdict = "marginal"
    assert any(line.startswith("marginal: 1 checks passed with over 0.5 of their bound, at most 0.75") for line in
               shown([outcome]))  # fmt: skip


def test_what_the_claimed_stages_cannot_show_is_said(monkeypatch):
    monkeypatch.setattr(blind, "seen", lambda: {"pre_eps dropped": ["pre"], "H transposed": ["layer", "pre"]})
    (line,) = blind.lines([Outcome("mine", "a", "layer", *ITEM[1:])])
    assert line == "not seen: mine claims layer, which can't show: pre_eps dropped; claim pre too"
    assert blind.lines([Outcome("mine", "a", "post", *ITEM[1:])]) == []  # post computes neither
    assert blind.lines([Outcome("mine", "a", s, *ITEM[1:]) for s in ("layer", "pre")]) == []


def test_the_measured_file_names_stages_and_mutants_that_there_are():
    pytest.importorskip("torch", reason="the mutants are in PyTorch, which is not installed")
    from conformance.selftest.mutants import MUTANTS

    assert set(blind.seen()) <= {mutant.title() for mutant in MUTANTS}
    assert len(blind.seen()) >= len(MUTANTS) - 2  # some show in narrow dtypes alone
    assert {stage for stages in blind.seen().values() for stage in stages} <= set(STAGES)


def test_the_counter_counts_what_will_run_and_speaks_every_30_seconds(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.Progress(5, wanted=True) as progress:
        for number in range(5):
            clock[0] += 16.0
            skipped = "not claimed" if number < 2 else ""
            progress.add(Outcome("mine", f"case-{number}", *ITEM, skipped=skipped))
    assert capsys.readouterr().err.splitlines() == [
        "0 of 3 items ran, 0 failed; now mine case-1 pre float32-float32",
        "2 of 3 items ran, 0 failed; now mine case-3 pre float32-float32",
    ]
    with terminal.Progress(1, wanted=False) as progress:
        clock[0] += 99.0
        progress.add(Outcome("mine", "case", *ITEM))
    assert capsys.readouterr().err == ""
