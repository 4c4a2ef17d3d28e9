"""The table of witnesses says what ran for each row, what was only read, and what is missing."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.cases.dialects import dialect_names
from conformance.files import document
from conformance.judge.item import Outcome
from conformance.judge.known import Known
from conformance.judge.rule import Check
from conformance.report import files, read
from conformance.report.peers import table
from conformance.report.read import ReportError

KNOWN = Known("fla-core", "fla-core 0.6.0", "because", "a.py", ("wide-*",), tensors=("H",))


def outcome(case, dialect, *checks, name="fla-core", package="fla-core==0.6.0", x="float32", stage="residual_matrix"):
    about = {"description": f"{package}, torch 2"}
    return Outcome(name, case, stage, f"{x}-float32", x, dialect, [Check(*c) for c in checks], about=about)


OUTCOMES = (
    outcome("smoke-paper-2", "paper", ("H", "passed", 0.25), ("d/logits", "marginal", 0.75)),
    outcome("slow-paper-2", "paper", ("H", "failed", 2.0), ("d/logits", "passed", 0.9)),
    outcome("wide-paper-2", "paper", ("H", "failed", math.inf), x="bfloat16"),
    outcome("smoke-liger", "liger", ("u", "passed", 0.5), name="liger", package="liger-kernel 0.9.9", stage="pre"),
    outcome("smoke-megatron", "megatron", ("H", "passed", 0.5), name="peer", package="peer 1.0"),
)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "peers.jsonl"
    files.write_jsonl(path, OUTCOMES)
    return path


def lines_of(text, row):
    return [line for line in text.splitlines() if line.startswith(f"| {row} |")]


def test_a_witness_has_its_evidence_and_its_figures_and_known_results_count_apart(written):
    (line,) = lines_of(table(read.merge([written]), [KNOWN]), "paper")
    assert line == (
        "| paper | fla-core 0.6.0, ops/utils/sinkhorn/naive.py (H alone) | fla-core | residual_matrix "
        "| float32 bfloat16 | 3 | 1 | 1 | 0.90: slow-paper-2, residual_matrix, d/logits, float32 |"
    )
    (line,) = lines_of(table(read.merge([written]), []), "paper")
    assert "| 3 | 2 | 0 |" in line


def test_a_row_that_was_only_read_says_so_even_where_another_package_claims_it(written):
    text = table(read.merge([written]), [])
    first, second = lines_of(text, "megatron")
    assert "read, not run: Megatron-LM main, August 2026, transformer/hyper_connection.py, 2026-08" in first
    assert second.startswith("| megatron | peer 1.0, torch 2 | peer |")
    (line,) = lines_of(text, "megatron-dev")
    assert "read, not run" in line and "2026-11-25" in line


def test_evidence_that_did_not_run_is_missing_and_another_version_is_not_it(written):
    text = table(read.merge([written]), [])
    first, second = lines_of(text, "liger")
    assert "liger-kernel 0.8.5, ops/mhc.py: not in these runs" in first
    assert "liger-kernel 0.9.9, torch 2" in second
    assert len(lines_of(text, "deepseek-v4.1")) == 3
    assert all("not in these runs" in line for line in lines_of(text, "deepseek-v4.1"))


def test_runs_without_items_or_with_rows_of_their_own_are_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    files.write_jsonl(path, [outcome("smoke-mine", "mine", ("H", "passed"))])
    with pytest.raises(ReportError, match="some of mine: leave --dialect out"):
        table(read.merge([path]), [])
    files.write_jsonl(path, [])
    with pytest.raises(ReportError, match="nothing ran"):
        table(read.merge([path]), [])


def test_the_command_puts_the_table_between_the_markers(written, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- witnesses: begin -->\nold\n<!-- witnesses: end -->\nafter\n")
    command = [sys.executable, "-m", "conformance.cli", "peers", str(written)]
    done = subprocess.run([*command, "--write", str(page)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert page.read_text().startswith("before\n") and document.split(page, "witnesses")[1] == table(
        read.merge([written]), []
    )
    done = subprocess.run([*command, "--known", str(page)], capture_output=True, text=True)
    assert done.returncode == 2 and "expected a JSON file of known results" in done.stderr


def test_the_page_has_a_line_of_every_row():
    page = Path(__file__).parents[3] / "docs/peers.md"
    inner = document.split(page, "witnesses")[1]
    assert all(lines_of(inner, row) for row in dialect_names())
