"""The bitwise tier tells what is repeated to the last bit and what isn't."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conformance.questions.bitwise import QUESTIONS, measure

STRANGERS = "tests.conformance.strangers"


@pytest.mark.parametrize(
    "stranger, differing",
    [
        ("Honest", set()),
        ("Wavers", {"called twice", "token alone", "batch split", "set up anew"}),
        ("Crowded", {"token alone", "batch split"}),
    ],
)
def test_each_question_has_its_answer(stranger, differing):
    report = measure(f"{STRANGERS}:{stranger}")
    assert report.items >= 2 and all(bits.tensors for bits in report.answers.values())
    found = {question for question, bits in report.answers.items() if bits.differ}
    assert found <= differing and (found == differing or (stranger == "Wavers" and "called twice" in found))


def test_sizes_are_asked_too():
    report = measure("tests.conformance.questions.sizes.exact:Exact", most=4, form="short")
    assert report.items >= 4 and {question for question, bits in report.answers.items() if bits.tensors} == set(
        QUESTIONS
    )
    assert not any(bits.raised for bits in report.answers.values())
    assert report.answers["called twice"].differ == report.answers["in layouts"].differ == 0


def test_a_view_that_is_read_as_packed_differs():
    report = measure(f"{STRANGERS}:ReadsPacked")
    assert {question for question, bits in report.answers.items() if bits.differ} == {"in layouts"}


def test_what_raises_is_said():
    report = measure(f"{STRANGERS}:Raises")
    assert report.items == 0 and report.answers[QUESTIONS[0]].raised == "RuntimeError: no such kernel"


def test_the_command_reports_apart_and_fails_only_when_strict():
    command = [sys.executable, "-m", "conformance.cli", "bitwise", "--impl"]
    done = subprocess.run([*command, f"{STRANGERS}:Crowded"], capture_output=True, text=True)
    assert done.returncode == 0 and "crowded, token alone: at most" in done.stdout
    done = subprocess.run([*command, f"{STRANGERS}:Crowded", "--strict"], capture_output=True, text=True)
    assert done.returncode == 1
    done = subprocess.run([*command, f"{STRANGERS}:Honest", "--strict"], capture_output=True, text=True)
    assert done.returncode == 0
    done = subprocess.run([*command, "nobody"], capture_output=True, text=True)
    assert done.returncode == 3
