"""One process judges implementations of one framework one after the other."""

from __future__ import annotations

import os

from conformance.judge import run as runner
from tests.conformance.judge.cheats import Honest


class First(Honest):
    """Says in which process it was made, and how many had been made there."""

    made = 0

    def __init__(self):
        First.made += 1
        self.name = f"{os.getpid()} {First.made}"


class Second(First):
    pass


FIRST, SECOND = f"{__name__}:First", f"{__name__}:Second"


def names(monkeypatch, alike: bool) -> list[list[str]]:
    from tests.conformance.judge.test_cheats import REDUCE  # here: a worker that imports this file opens no case

    monkeypatch.setattr(runner, "together", lambda first, second: alike)
    outcomes = list(runner.run([FIRST, SECOND], REDUCE, jobs=1))
    assert all(outcome.checks and not outcome.failed for outcome in outcomes)
    found = {outcome.reference: outcome.implementation.split() for outcome in outcomes}
    assert len(outcomes) == 2 * len(REDUCE) and list(found) == [FIRST, SECOND]
    return list(found.values())


def test_a_process_goes_on_with_what_is_alike(monkeypatch):
    (process, first), (same, second) = names(monkeypatch, True)
    assert process == same and (first, second) == ("1", "2")


def test_others_have_a_process_each(monkeypatch):
    (process, first), (another, second) = names(monkeypatch, False)
    assert process != another and (first, second) == ("1", "1")
