"""Reports are whole or refused, merge only where they belong together, and make a page that works in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conformance.cases.case import load_case
from conformance.cases.corpus import fixtures, load_corpus
from conformance.judge.run import run
from conformance.report import files, read
from conformance.report.read import ReportError
from conformance.report.sinkhorn import convergence
from conformance.report.summary import summary

STRANGERS = "tests.conformance.strangers"


def written(path, *references):
    items = [i for c in load_corpus() for i in c.items() if i.stage == "reduce" and c.dialect == "glm-5"]
    files.write_jsonl(path, list(run(references, items, jobs=1)))
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return written(tmp_path_factory.mktemp("honest") / "honest.jsonl", f"{STRANGERS}:Honest")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return written(tmp_path_factory.mktemp("planted") / "planted.jsonl", f"{STRANGERS}:SlightlyOff")


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "conformance.cli", *arguments], capture_output=True, text=True)


def test_two_runs_are_merged_and_their_failures_counted(honest, planted):
    found = summary(read.merge([honest, planted]), None)
    assert {c["implementation"] for c in found["cells"]} == {"honest", "slightly-off"}
    assert found["failures"] and {f["implementation"] for f in found["failures"]} == {"slightly-off"}
    assert all(sum(f["histogram"]) > 0 for f in found["failures"] if f["worst"])


def test_the_text_is_short_and_its_line_reproduces_the_failure(honest, planted, tmp_path):
    path = tmp_path / "report.md"
    done = command("report", str(honest), str(planted), "--markdown", str(path))
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert (
        len(text) < 5000
        and "| honest | 0.00 |" in text
        and re.search(r"\| slightly-off \| \*\*\d+ failed\*\* \|", text)
    )
    line = next(line.strip(" `") for line in text.splitlines() if line.strip().startswith("`mhc-conformance run"))
    again = command(*shlex.split(line)[1:])
    assert again.returncode == 1 and "1 failed" in again.stdout


def changed(path, tmp_path, change):
    lines = path.read_text().splitlines()
    other = tmp_path / "changed.jsonl"
    other.write_text("\n".join(change(lines)) + "\n")
    return other


def header(lines, **values):
    return [json.dumps({**json.loads(lines[0]), **values}), *lines[1:]]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda lines: [*lines[:3], *lines[4:]], "expected the [0-9]+ lines of"),
        (
            lambda lines: [lines[0], "[]", *lines[1:]],
            "line 2: expected a line that run --jsonl writes, got an empty list",
        ),
        (
            lambda lines: header(lines, format="other/1"),
            "line 1: expected format 'mhc-conformance-report/2', got 'other/1'",
        ),
        (lambda lines: header(lines, corpus=None), "line 1: corpus: expected a text, got null"),
        (lambda lines: ["", *lines], "isn't JSON"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(honest, tmp_path, change, said):
    other = changed(honest, tmp_path, change)
    with pytest.raises(ReportError, match=said) as caught:
        read.read_run(other)
    assert "\n" not in str(caught.value)
    done = command("report", str(other))
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_reports_of_different_corpora_are_refused_and_both_hashes_named(honest, planted, tmp_path):
    other = changed(planted, tmp_path, lambda lines: header(lines, corpus="0" * 64))
    done = command("report", str(honest), str(other))
    ours = read.read_run(honest).header.corpus
    assert done.returncode == 2 and "0" * 64 in done.stderr and ours in done.stderr


def test_the_same_item_twice_is_refused(honest, tmp_path):
    copy = tmp_path / "copy.jsonl"
    shutil.copy(honest, copy)
    with pytest.raises(ReportError, match="both have honest"):
        read.merge([honest, copy])


@pytest.mark.parametrize(
    "row, last, other", [("transformer-engine", "columns", "rows"), ("paper-2", "rows", "columns")]
)
def test_convergence_ends_on_the_axis_that_the_row_normalises_last(row, last, other):
    picture = convergence(load_case(fixtures() / "golden" / f"slowest-n4-{row}.safetensors"))
    assert picture is not None and len(picture["rows"]) == 20
    assert picture[other][-1] > 1e-3 and max(picture[last]) < 1e-12
    layer = convergence(load_case(fixtures() / "golden" / f"shape-dim1-{row}.safetensors"))
    assert layer is not None and max(layer[last]) < 1e-12


def test_a_case_without_sinkhorn_has_no_convergence():
    assert convergence(load_case(fixtures() / "golden" / "generic-n4-mhc-lite-2.safetensors")) is None


def test_tokens_that_are_not_finite_have_no_part_in_the_convergence():
    picture = convergence(load_case(fixtures() / "golden" / "non-finite-tokens-paper-2.safetensors"))
    assert picture is not None and np.isfinite(picture["rows"]).all() and max(picture["rows"]) < 1e-12


def test_a_hidden_nan_is_in_every_report(tmp_path):
    items = [i for c in load_corpus() if c.id == "non-finite-tokens-glm-5-2" for i in c.items() if i.stage == "reduce"]
    outcomes = list(run([f"{STRANGERS}:HidesNan"], items, jobs=1))
    files.write_jsonl(tmp_path / "run.jsonl", outcomes)
    files.write_junit(tmp_path / "run.xml", outcomes)
    (failure,) = summary(read.merge([tmp_path / "run.jsonl"]), None)["failures"]
    assert (failure["verdict"], failure["tensor"], failure["worst"]) == ("hidden", "out", ())
    assert "out: hidden, 0 of the bound. first at [0, 1, 3]: " in (tmp_path / "run.xml").read_text()
    done = command("report", str(tmp_path / "run.jsonl"), "--markdown", str(tmp_path / "report.md"))
    assert done.returncode == 0 and "hidden" in (tmp_path / "report.md").read_text(), done.stderr


def test_a_mutant_table_of_another_corpus_is_refused(honest, tmp_path):
    path = tmp_path / "selftest.json"
    path.write_text(json.dumps({"format": read.SELFTEST_FORMAT, "corpus": "0" * 64}))
    done = command("report", str(honest), "--power", str(path))
    assert done.returncode == 2 and "0" * 64 in done.stderr
