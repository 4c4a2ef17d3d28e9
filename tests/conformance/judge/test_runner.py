"""Every way to be wrong is a verdict of its own, and the run goes on."""

from __future__ import annotations

import re

import pytest

from conformance.cases.corpus import load_corpus
from conformance.implementations.registry import load
from conformance.implementations.wrapping import wrap
from conformance.interface import SetupError
from conformance.judge import run as runner
from conformance.judge.item import run_item
from conformance.judge.run import run
from tests.conformance import strangers

CASES = {case.id: case for case in load_corpus()}


def item(name="generic-n4-paper-2", stage="reduce", variant="float32-float32"):
    return next(i for i in CASES[name].items() if i.stage == stage and i.variant.name == variant)


def verdicts(implementation):
    return {(check.tensor, check.verdict) for check in run_item(wrap(implementation), item()).failed}


@pytest.mark.parametrize(
    "stranger, expected",
    [
        (strangers.Honest, set()),
        (strangers.Raises, {("-", "errored")}),
        (strangers.WrongShape, {("out", "wrong-shape")}),
        (strangers.WrongDtype, {("out", "wrong-dtype")}),
        (strangers.NotANumber, {("out", "non-finite")}),
        (strangers.Zeros, {("out", "mistrusted")}),
        (strangers.ReturnsInput, {("d/x", "mistrusted")}),
        (strangers.Mutates, {("x", "failed")}),
        (strangers.SlightlyOff, {("out", "failed")}),
    ],
)
def test_each_misbehaviour_has_its_verdict(stranger, expected):
    assert verdicts(stranger()) == expected


def test_an_exception_is_told_in_one_line():
    message = run_item(wrap(strangers.Raises()), item()).failed[0].message
    assert re.fullmatch(r"RuntimeError: no such kernel \(strangers\.py, line \d+, in reduce\)", message)


def test_a_refusal_is_a_skip():
    outcome = run_item(wrap(strangers.Refuses()), item())
    assert not outcome.failed and outcome.skipped.startswith("refused")


def test_what_is_not_claimed_is_skipped_with_the_reason():
    honest = strangers.Honest()
    assert run_item(wrap(honest), item(variant="bfloat16-float32")).skipped == "bfloat16 not claimed"
    assert run_item(wrap(honest), item(name="generic-n4-maxtext-2")).skipped == "dialect maxtext not claimed"
    assert run_item(wrap(honest), item(stage="pre")).skipped == "stage pre not claimed"


def test_a_dying_process_is_a_verdict_and_the_rest_is_run():
    chosen = [item(name) for name in ("generic-n4-glm-5-2", "generic-n4-paper-2", "smoke-glm-5-2", "smoke-paper-2")]
    outcomes = {o.case: o for o in run(["tests.conformance.strangers:Dies"], chosen)}
    assert len(outcomes) == 4
    assert not outcomes["generic-n4-paper-2"].failed and not outcomes["smoke-paper-2"].failed
    for name in ("generic-n4-glm-5-2", "smoke-glm-5-2"):
        assert [c.verdict for c in outcomes[name].failed] == ["errored"]
        assert "status 9" in outcomes[name].failed[0].message


@pytest.mark.parametrize(
    "stranger, name, said",
    [
        (strangers.Honest, "generic-n4-liger", "dialect liger not claimed, yet right"),
        (strangers.OnlyPaper, "generic-n4-glm-5-2", "dialect glm-5 not claimed, and refused"),
    ],
)
def test_what_is_not_claimed_may_be_refused_or_right(stranger, name, said):
    assert run_item(wrap(stranger()), item(name), probe=True).skipped == said
    assert run_item(wrap(stranger()), item(name)).skipped == said.split(", ")[0]


def test_what_is_not_claimed_and_accepted_and_wrong_is_a_verdict():
    outcome = run_item(wrap(strangers.SumAlways()), item("generic-n4-glm-5-2"), probe=True)
    assert {check.verdict for check in outcome.failed} == {"unsupported-not-refused"}
    assert "dialect glm-5 not claimed, yet accepted: failed" in outcome.failed[0].message


def test_one_that_hangs_is_ended_and_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.0)
    chosen = [item("generic-n4-paper-2"), item("smoke-glm-5-2"), item("smoke-paper-2")]
    outcomes = {o.case: o for o in run(["tests.conformance.strangers:Hangs"], chosen, jobs=1, limit=1.0)}
    assert not outcomes["generic-n4-paper-2"].failed and not outcomes["smoke-paper-2"].failed
    (check,) = outcomes["smoke-glm-5-2"].failed
    assert check.verdict == "errored" and "no result within 1 s" in check.message


@pytest.mark.parametrize(
    "reference, said",
    [
        ("nobody", "or a registered name"),
        ("tests.conformance.strangers:Nobody", "could not be set up"),
        ("conformance.nowhere:x", "could not be set up"),
        ("tests.conformance.strangers:NoMethod", "neither a method of that name"),
        ("tests.conformance.strangers:CLAIMED", "could not be set up"),
    ],
)
def test_an_implementation_that_cannot_be_set_up_is_said(reference, said):
    with pytest.raises(SetupError, match=said):
        load(reference)
