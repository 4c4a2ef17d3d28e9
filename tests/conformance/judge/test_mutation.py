"""What is asked of a run of mutants: a reason for each survivor, no reason that is out of date, and a score."""

from __future__ import annotations

import tomllib

from tests.conformance.judge.mutation import REASONS, Mutant, problems, score
from tests.conformance.judge.planting import ROOT

KILLED, SURVIVED = Mutant("rule.py", "", "", True), Mutant("rule.py", "a > b", "a >= b", False)
REASON = {"file": "rule.py", "was": "a > b", "becomes": "a >= b", "reason": "They are never equal here."}


def test_a_survivor_must_be_listed():
    assert problems([KILLED] * 9 + [SURVIVED], [REASON]) == []
    (line,) = problems([KILLED] * 9 + [SURVIVED], [])
    assert line == "survived, and no reason is given: rule.py\n    - a > b\n    + a >= b"


def test_a_listed_one_that_dies_is_out_of_date():
    (line,) = problems([KILLED], [REASON])
    assert line == "a reason is given, but it did not survive: rule.py\n    - a > b\n    + a >= b"


def test_a_reason_is_a_sentence():
    (line,) = problems([KILLED] * 9 + [SURVIVED], [{**REASON, "reason": "equivalent"}])
    assert line == "no reason in words: rule.py, a > b"


def test_the_score_must_be_90_percent():
    assert score([KILLED] * 9 + [SURVIVED]) == 0.9
    assert problems([KILLED] * 8 + [SURVIVED], [REASON]) == ["expected a score of at least 90%"]


def test_the_listed_ones_are_in_the_code():
    for row in tomllib.loads(REASONS.read_text())["survivor"]:
        lines = [line.strip() for line in (ROOT / row["file"]).read_text().splitlines()]
        assert set(row["was"].splitlines()) <= set(lines), row
