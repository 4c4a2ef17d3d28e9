"""Runs and self-tests that are nearly right are reported, or refused in one line that names the file."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conformance.cases.corpus import corpus_hash
from conformance.cli.app import app
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report import files, markdown, peers, read, summary
from conformance.report.read import ReportError
from tests.conformance.files.mutations import mutations, refused

WORST = [{"index": [0, 1], "actual": 1.5, "expected": 0.5, "error": math.inf}]
CHECKS = (
    Check("H", "passed", 0.25, 1e-9, 4e-9),
    Check("d/logits", "failed", math.inf, 1.0, 0.0, "half a \ud800 character\nand a line", WORST, [0, 1]),
)
ITEM = ("smoke-paper-2", "residual_matrix", "float32-float32", "float32", "paper")
ABOUT = {"device": "cpu", "description": "a 1", "threads": np.int64(2), "seeds": {1, 2}, "deep": {"a": [math.nan]}}
OUTCOMES = (
    Outcome("mine", *ITEM, [CHECKS[0]], about=ABOUT),
    Outcome("theirs", *ITEM, [*CHECKS]),
    Outcome("none", *ITEM, skipped="stage residual_matrix not claimed"),
)
FIGURES = {dtype: {"cases": 5, "ratio": None, "where": "there"} for dtype in ("float32", "bfloat16", "float16")}
SELFTEST: dict[str, Any] = {
    "format": read.SELFTEST_FORMAT, "corpus": corpus_hash(), "quick": True, "honest": "fine", "problems": ["a problem"],
    "mutants": [{"name": "one", "figures": FIGURES, "blind": {"float16": "because"}}],
}  # fmt: skip


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "_pictures", lambda failures, corpus: {})
    path = tmp_path / "run.jsonl"
    files.write_jsonl(path, OUTCOMES)
    return path


def reported(path, selftest=None) -> str:
    runs = read.merge([path])
    peers.table(runs, [])
    return markdown.markdown(summary.summary(runs, selftest))


def test_what_a_run_writes_is_read_whatever_an_implementation_said(written):
    text = written.read_text()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    run = read.read_run(written)
    assert run.header.implementations["mine"] == {
        "device": "cpu", "description": "a 1", "threads": "2", "seeds": [1, 2], "deep": {"a": [None]},
    }  # fmt: skip
    passed, again, failed = run.checks
    assert (passed.tensor, passed.ratio, passed.bound, passed.worst) == ("H", 0.25, 4e-9, ())
    assert again.item == ("theirs", *ITEM[:3])
    assert failed.ratio is None and failed.message == "half a ? character\nand a line"
    assert failed.worst[0].index == (0, 1) and failed.worst[0].error is None and failed.histogram == (0, 1)
    assert [skip.reason for skip in run.skips] == ["stage residual_matrix not claimed"]
    assert "**1 failed**" in reported(written)


def test_a_run_of_which_a_line_is_nearly_right(written):
    random_ = random.Random(1)
    lines, count = written.read_bytes().splitlines(), 0
    for number, line in enumerate(lines):
        for text in mutations(json.loads(line), 60, seed=number):
            changed = [*lines[:number], text.replace(b"\n", b" "), *lines[number + 1 :]]
            if random_.random() < 0.1:
                changed.insert(random_.randrange(len(changed)), random_.choice(lines))
            written.write_bytes(b"\n".join(changed) + b"\n")
            count += refused(lambda: reported(written), ReportError)
    assert count > 200


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda lines: [lines[0], lines[1].replace(b'"name": "mine"', b'"name": 3'), *lines[2:]],
         "line 2: name: expected a text, got 3"),
        (lambda lines: [lines[0], *lines],
         "line 2: kind: expected one of check, skip, difference, refusal, item, implementation, diagnosis, footer"),
        (lambda lines: [*lines, lines[-1]], "line 11: expected no line after the footer"),
        (lambda lines: [*lines[:3], *lines[2:]], "line 5: expected the 1 lines of mine, smoke-paper-2"),
        (lambda lines: lines[1:], "line 1: expected format"),
        (lambda lines: [], "line 1: expected a line that run --jsonl writes, got text that isn't JSON (it is empty)"),
        (lambda lines: [lines[0], lines[1].replace(b'"deep": {', b'"deep": {"b": ' + b"[" * 40 + b"]" * 40 + b", "),
                        *lines[2:]],
         "line 2: settings: expected settings, got lists that are nested too deeply"),
    ],
)  # fmt: skip
def test_the_line_and_the_place_in_it_are_named(written, change, said):
    written.write_bytes(b"".join(line + b"\n" for line in change(written.read_bytes().splitlines())))
    with pytest.raises(ReportError) as caught:
        read.read_run(written)
    assert str(caught.value).startswith(str(written)) and said in str(caught.value)


def test_a_last_line_without_its_end_was_cut_off(written):
    written.write_bytes(written.read_bytes()[:-10])
    assert read.read_run(written).cut == "cut off after 3 items: the run didn't end"


def test_a_selftest_that_is_nearly_right(written, tmp_path):
    path, count = tmp_path / "selftest.json", 0
    for text in mutations(SELFTEST, 300, seed=2):
        path.write_bytes(text)
        count += refused(lambda: reported(written, read.read_selftest(path, corpus_hash())), ReportError, str(path))
    assert count > 180
    path.write_text(json.dumps(SELFTEST))
    assert "1 mutants, 1 problems. fine" in reported(written, read.read_selftest(path, corpus_hash()))


def test_the_command_says_it_in_one_line_and_writes_nothing(written, tmp_path):
    page = tmp_path / "report.md"
    good, selftest = written.read_bytes(), tmp_path / "selftest.json"
    selftest.write_text(json.dumps({**SELFTEST, "mutants": [{"name": 1}]}))
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(good.replace(b'"message": ""', b'"message": []', 1))
    for arguments, said in (
        ([str(broken)], f"{broken}: line 3: message: expected a text, got an empty list"),
        ([str(tmp_path)], f"{tmp_path}: can't be read (Is a directory)"),
        ([str(tmp_path / "none")], f"{tmp_path}/none: can't be read (No such file or directory)"),
        ([str(written), "--selftest", str(selftest)], f"{selftest}: mutants[0].name: expected a text, got 1"),
    ):
        done = CliRunner().invoke(app, ["report", *arguments, "--markdown", str(page)])
        assert done.exit_code == 2 and done.output == f"mhc-conformance: {said}\n"
        assert not page.exists()
