"""What of many failures is shown in full: the smallest of every group first, within a number and a size."""

from __future__ import annotations

import json

import pytest

from conformance.report import shown
from conformance.report.markdown import MOST, markdown
from conformance.report.read import CheckLine, DiagnosisLine, Header, Map, Run
from conformance.report.shown import Shown, place
from conformance.report.summary import UNDIAGNOSED, UNKNOWN, summary


def check(stage="residual_matrix", tensor="H", case="a", elements=10, ratio: float | None = 3.0, **more):
    item = {"implementation": "mine", "case": case, "stage": stage, "variant": "float32-float32", "x": "float32"}
    values = {"verdict": "failed", "message": "", "dialect": "paper", "reproduce": f"run --case {case}", **more}
    return CheckLine(**{**item, "tensor": tensor, "elements": elements, "ratio": ratio, **values})


def test_the_smallest_of_each_group_come_first_then_the_worst(monkeypatch):
    monkeypatch.setattr(shown, "MOST", 5)
    checks = [check(case=f"h{k}", elements=10 - k, ratio=3.0 + k % 3) for k in range(5)]
    checks += [check("layer", "out", case=f"l{k}", elements=k, ratio=9.0 - k) for k in range(3)]
    checks += [check("post", "out", case="p"), check("reduce", "out", verdict="passed")]
    found = Shown(checks)
    assert [(f["stage"], f["case"]) for f in found.failures] == [
        ("residual_matrix", "h4"), ("post", "p"), ("layer", "l0"), ("residual_matrix", "h2"), ("layer", "l1"),
    ]  # fmt: skip
    assert found.hidden == 4
    groups = {group["stage"]: group for group in found.groups}
    assert [group["stage"] for group in found.groups] == ["residual_matrix", "post", "layer"]
    assert groups["layer"]["follows"] == "residual_matrix" and not groups["post"]["follows"]
    assert groups["residual_matrix"]["shown"] == [0, 3] and groups["residual_matrix"]["checks"] == 5
    assert groups["residual_matrix"]["reproduce"] == "run --case h4"
    assert groups["residual_matrix"]["counts"] == [("paper", "float32", "failed", 5)]


def test_they_have_a_size_together(monkeypatch):
    monkeypatch.setattr(shown, "LARGEST", 2000)
    found = Shown(check(case=f"c{k}", message="x" * 400) for k in range(10))
    assert 1 <= len(found.failures) < 4 and found.hidden == 10 - len(found.failures)
    assert len(json.dumps(found.failures)) < 2200


def test_nothing_failed():
    found = Shown([check(verdict="passed"), check(verdict="marginal")])
    assert (found.groups, found.failures, found.hidden) == ([], [], 0)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "cells", "said"),
    [
        (True, 3, 2, [[0, 0], [0, 0], [2, None]], "token 2 of 3, all 2 channels"),
        (True, 3, 2, [[0, 0], [1, 1.1], [None, 0]], "tokens 1 to 2 of 3, all 2 channels"),
        (True, 2, 3, [[0, 2, 0], [0, 2, 0]], "all 2 tokens, channel 1 of 3"),
        (False, 1, 2, [[0, 2]], "the only row, column 1 of 2"),
        (True, 1, 1, [[1.0]], ""),
        (True, 64, 1, [[0]] * 24 + [[3]] * 8, "tokens 48 to 63 of 64, the only channel"),
        (True, 33, 1, [[0]] * 31 + [[3]], "tokens 31 to 32 of 33, the only channel"),
    ],
)
def test_the_place_of_a_map_is_said(tokens, rows, columns, cells, said):
    assert place(Map(tokens, rows, columns, tuple(map(tuple, cells)))) == said


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], [("mine", UNDIAGNOSED, False)]),
        ([DiagnosisLine("mine", "", ("seen",))], [("mine", UNKNOWN, False)]),
        ([DiagnosisLine("mine", "H is transposed")], [("mine", "H is transposed", True)]),
        ([DiagnosisLine("other", "a cause")], [("mine", UNDIAGNOSED, False), ("other", "a cause", True)]),
    ],
)
def test_every_implementation_that_failed_has_a_diagnosis_or_a_word_that_there_is_none(tmp_path, lines, expected):
    run = Run(tmp_path / "run.jsonl", Header(corpus="a" * 64, format=""), [check()], diagnoses=lines)
    found = summary([run], None)["diagnoses"]
    assert [(d["implementation"], d["cause"], d["found"]) for d in found] == expected


def test_the_text_opens_with_the_diagnosis_and_names_groups_of_every_implementation(tmp_path):
    checks = [check(tensor=f"t{k}", ratio=None) for k in range(20)]
    checks += [check(implementation="other", stage=stage, case=f"c{k}", dialect=f"d{k}") for k in range(6)
               for stage in ("residual_matrix", "layer")]  # fmt: skip
    lines = [DiagnosisLine("mine", "H is applied *transposed*", ("a", "b", "c", "d"))]
    text = markdown(summary([Run(tmp_path / "a", Header(corpus="a" * 64, format=""), checks, diagnoses=lines)], None))
    rows = text.splitlines()
    assert rows[2:7] == [r"* **mine**: H is applied \*transposed\*", "  * a", "  * b", "  * c",
                         f"* **other**: {UNDIAGNOSED}"]  # fmt: skip
    named = [row for row in rows if (row.startswith("* ") and "in 1 item" in row) or "in 6 items" in row]
    assert len(named) == MOST and named[-1] == (
        "* other: residual_matrix, `H`: failed in 6 items (float32; d0, d1, d2 and 3 more), up to 3 times the bound"
    )
    assert "∞ times the bound" in named[0] and rows[-3].startswith("  `run --case ")
    assert rows[-2:] == ["* and 11 more groups", "* 6 failures of other stages only follow from these"]
