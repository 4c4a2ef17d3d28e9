"""A list of known results excuses what it names, and nothing else, and may not go stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import conformance
from conformance.cases.case import CaseError
from conformance.judge.item import Outcome
from conformance.judge.known import FORMAT, judge, load_known
from conformance.judge.rule import Check

ENTRY = {"implementation": "a", "version": "a 1", "why": "because", "source": "a.py", "cases": ["smoke-*"]}


def entries(tmp_path, *changes):
    path = tmp_path / "known.json"
    path.write_text(json.dumps({"format": FORMAT, "entries": [{**ENTRY, **change} for change in changes]}))
    return load_known(path)


def outcome(case="smoke-paper-2", verdicts=("failed",), name="a", tensors=("H", "d/logits")):
    checks = [Check(t, v) for t, v in zip(tensors, verdicts, strict=False)]
    return Outcome(name, case, "residual_matrix", "float32-float32", "float32", "paper", checks)


def test_what_is_known_is_excused(tmp_path):
    judged = judge([outcome(), outcome("generic-n4-paper-2", ("passed",))], entries(tmp_path, {}))
    assert (len(judged.known[0]), judged.unknown, judged.stale) == (1, [], [])


def test_what_is_not_is_not(tmp_path):
    other, worse = outcome("wide-paper-2"), outcome(verdicts=("failed", "non-finite"))
    judged = judge([outcome(), other, worse], entries(tmp_path, {}))
    assert judged.unknown == [other, worse] and not judged.stale


def test_several_entries_may_explain_one_item(tmp_path):
    found = entries(tmp_path, {"tensors": ["H"]}, {"tensors": ["d/*"], "verdicts": ["non-finite"]})
    judged = judge([outcome(verdicts=("failed", "non-finite"))], found)
    assert not judged.unknown and not judged.stale


def test_an_entry_that_matches_nothing_or_passes_is_stale(tmp_path):
    judged = judge([outcome(verdicts=("passed",))], entries(tmp_path, {}, {"cases": ["nothing-*"]}))
    assert "but smoke-paper-2 did not fail so" in judged.stale[0] and "matches nothing that ran" in judged.stale[1]


def test_an_entry_of_an_implementation_that_did_not_run_is_left_alone(tmp_path):
    assert judge([outcome(name="b", verdicts=("passed",))], entries(tmp_path, {})).stale == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "expected a JSON file"),
        ("[]", "expected a JSON file of known results, got an empty list"),
        (
            json.dumps({"format": FORMAT, "entries": [{"implementation": "a"}]}),
            r"entries\[0\]: expected the key 'version'",
        ),
        (
            json.dumps({"format": FORMAT, "entries": [{**ENTRY, "color": "red"}]}),
            r"entries\[0\]: unknown key 'color', expected some of",
        ),
        (
            json.dumps({"format": FORMAT, "entries": [{**ENTRY, "cases": "smoke"}]}),
            r"entries\[0\].cases: expected a list that isn't empty, got 'smoke'",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "known.json"
    path.write_text(text)
    with pytest.raises(CaseError, match=said) as caught:
        load_known(path)
    assert "\n" not in str(caught.value)


def test_the_peers_list_is_well_formed_and_says_why():
    found = load_known(Path(conformance.__file__).with_name("known_results.json"))
    assert {e.implementation for e in found} >= {"maxtext-0.2.2", "mlx-mhc", "mhc-mlx"}
    assert all(len(e.why) > 30 and e.version.split()[1][0].isdigit() for e in found)
