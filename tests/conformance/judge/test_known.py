"""A list of known results excuses what it names, and nothing else, and may not go stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import conformance
from conformance.cases.case import CaseError
from conformance.judge.item import Outcome
from conformance.judge.known import FORMAT, Judged, Known, judge, load_known
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


def test_an_entry_may_be_about_a_mode_alone(tmp_path):
    checks = [Check("H", "failed", mode="layout: logits slice"), Check("H", "failed", mode="repeated")]
    strided, repeated = (Outcome("a", "smoke-x", "residual_matrix", "v", "float32", "paper", [c]) for c in checks)
    (entry,) = entries(tmp_path, {"modes": ["layout*"]})
    assert judge([strided, repeated], [entry]).unknown == [repeated]
    assert judge([outcome()], entries(tmp_path, {"modes": [""]})).unknown == []
    assert judge([strided, repeated], entries(tmp_path, {})).unknown == []


def test_an_entry_that_matches_nothing_or_passes_is_stale(tmp_path):
    judged = judge([outcome(verdicts=("passed",))], entries(tmp_path, {}, {"cases": ["nothing-*"]}))
    assert "but smoke-paper-2 did not fail so" in judged.stale[0] and "matches nothing that ran" in judged.stale[1]


def test_other_numbers_are_excused_as_the_golden_case_in_whose_place_they_are_and_make_no_entry_stale(tmp_path):
    fresh, other = outcome("fresh-17-smoke-paper-2"), outcome("fresh-17-wide-paper-2")
    judged = judge([fresh, other], entries(tmp_path, {}))
    assert judged.unknown == [other] and judged.known == {0: [fresh]} and not judged.stale
    passing = outcome("fresh-17-smoke-paper-2", ("passed",))
    assert not judge([passing], entries(tmp_path, {}, {"cases": ["nothing-*"]})).stale


def test_an_entry_about_sizes_goes_stale_by_sizes_and_one_about_golden_cases_by_these(tmp_path):
    size = outcome("size-1x1-C128-n4-paper", ("passed",))
    about = entries(tmp_path, {}, {"cases": ["size-1x1-*"]})
    (line,) = judge([size], about).stale
    assert "but size-1x1-C128-n4-paper did not fail so" in line
    assert judge([outcome()], about).stale == judge([outcome("size-2x2-C128-n4-paper")], about).stale == []
    assert judge([outcome("size-1x1-C128-n4-paper")], about).unknown == []


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


def known(**changes):
    return Known(**{"implementation": "a", "version": "a 1", "why": "because", "source": "a.py", "cases": ("smoke-*",),
                    **changes})  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({}, True),
        ({"implementation": "b"}, False),
        ({"implementation": "?"}, False),  # a name, and no glob
        ({"cases": ("smoke-paper-2",)}, True),
        ({"cases": ("generic-*",)}, False),
        ({"cases": ("generic-*", "smoke-paper-?")}, True),
        ({"cases": ("SMOKE-*",)}, False),
        ({"cases": ("smoke",)}, False),
        ({"cases": ()}, False),
        ({"stage": "residual_matrix"}, True),
        ({"stage": "residual_*"}, True),
        ({"stage": "Residual_*"}, False),
        ({"stage": "layer"}, False),
        ({"variant": "float32-*"}, True),
        ({"variant": "FLOAT32-*"}, False),
        ({"variant": "bfloat16-*"}, False),
    ],
)
def test_which_items_an_entry_is_about(changes, about):
    assert known(**changes).concerns(outcome()) is about


def test_what_was_skipped_no_entry_is_about():
    skipped = outcome()
    skipped.skipped = "stage layer not claimed"
    assert not known().concerns(skipped)
    assert judge([skipped], [known()]).stale == ["known result 1 (a, smoke-*) matches nothing that ran"]


@pytest.mark.parametrize(
    ("changes", "tensor", "verdict", "covered"),
    [
        ({}, "H", "failed", True),
        ({}, "H", "errored", False),
        ({}, "H", "marginal", False),
        ({"verdicts": ("errored", "non-finite")}, "H", "non-finite", True),
        ({"verdicts": ("errored", "non-finite")}, "H", "failed", False),
        ({"tensors": ("d/*",)}, "d/logits", "failed", True),
        ({"tensors": ("d/*",)}, "H", "failed", False),
        ({"tensors": ("H", "pre")}, "pre", "failed", True),
        ({"tensors": ("h",)}, "H", "failed", False),
        ({"tensors": ()}, "H", "failed", False),
    ],
)
def test_which_checks_an_entry_covers(changes, tensor, verdict, covered):
    assert known(**changes).covers(Check(tensor, verdict)) is covered


def test_a_known_item_is_filed_under_the_first_entry_about_it():
    both = outcome(verdicts=("failed", "failed"))
    first, second = known(tensors=("d/*",)), known(tensors=("H",))
    judged = judge([both, both], [known(implementation="b"), first, second])
    assert judged.known == {1: [both, both]} and judged.unknown == [] and judged.stale == []


def test_every_failing_check_must_be_covered_and_what_passes_need_not():
    mixed = outcome(verdicts=("failed", "marginal"))
    assert judge([mixed], [known(tensors=("H",))]).known == {0: [mixed]}
    worse = outcome(verdicts=("failed", "errored"))
    judged = judge([worse], [known()])
    assert (judged.known, judged.unknown, judged.stale) == ({}, [worse], [])


def test_a_failure_that_no_entry_is_about_is_unknown():
    other = outcome(name="b")
    assert judge([other], []).unknown == [other] and judge([other], [known()]).unknown == [other]
    assert judge([outcome(verdicts=("passed",))], []) == Judged()


def test_what_is_said_of_an_entry_that_no_longer_holds():
    passes, fails = outcome(verdicts=("passed",)), outcome(case="smoke-glm-5")
    entry = known(cases=("smoke-*", "other"), verdicts=("failed", "errored"))
    judged = judge([passes, fails], [known(implementation="b"), entry, known(cases=("nothing",))])
    assert judged.stale == [
        "known result 2 (a, smoke-*, other) says failed, errored, but smoke-paper-2 did not fail so",
        "known result 3 (a, nothing) matches nothing that ran",
    ]
    assert judged.known == {1: [fails]}


def test_an_entry_is_read_whole(tmp_path):
    (entry,) = entries(tmp_path, {"verdicts": ["errored"], "tensors": ["H"], "stage": "layer", "variant": "float16-*"})
    assert entry == known(verdicts=("errored",), tensors=("H",), stage="layer", variant="float16-*")
    assert entries(tmp_path, {}) == [known(verdicts=("failed",), tensors=("*",), stage="*", variant="*")]


@pytest.mark.parametrize(
    "content",
    [
        {"format": "mhc-conformance-known/2", "entries": []},
        {"entries": []},
        {"format": None, "entries": []},
        {"format": "mhc-conformance-known/1"},
        *(
            {"format": "mhc-conformance-known/1", "entries": [{**ENTRY, field: ""}]}
            for field in ("implementation", "version", "why", "source")
        ),
        {"format": "mhc-conformance-known/1", "entries": [{**ENTRY, "cases": []}]},
    ],
)
def test_a_list_of_another_format_or_with_empty_entries_is_refused(tmp_path, content):
    path = tmp_path / "known.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CaseError) as caught:
        load_known(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_text(json.dumps({"format": "mhc-conformance-known/1", "entries": [ENTRY]}))
    assert load_known(path) == [known()]


def test_an_entry_stays_as_it_was_read():
    with pytest.raises(AttributeError):
        known().why = "another reason"  # type: ignore[misc]


def test_the_peers_list_is_well_formed_and_says_why():
    found = load_known(Path(conformance.__file__).with_name("known_results.json"))
    assert {e.implementation for e in found} >= {"maxtext-0.2.2", "mlx-mhc", "mhc-mlx"}
    assert all(len(e.why) > 30 and e.version.split()[1][0].isdigit() for e in found)
