"""The status page in the repository is that of the corpus."""

from __future__ import annotations

from pathlib import Path

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_names
from conformance.files import document
from conformance.report.status import CLAUSES, grounds, status


def test_the_page_is_up_to_date():
    page = Path(__file__).parents[3] / "docs/status.md"
    assert page.read_text() == status(load_corpus()), "run: mhc-conformance status --write docs/status.md"


def test_every_case_names_a_known_clause_and_a_clause_without_a_case_is_said():
    assert {c.clause for c in load_corpus()} <= set(CLAUSES)
    text = status(c for c in load_corpus() if c.clause != "Precision")
    assert "| Precision | where each dialect rounds | **none** |" in text


def test_the_page_says_what_ran_for_every_row():
    page = Path(__file__).parents[3] / "docs/peers.md"
    assert document.split(page, "rows")[1] == grounds(), "run: mhc-conformance status --rows docs/peers.md"


def test_a_row_has_run_or_says_that_it_was_read():
    lines = grounds().splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == dialect_names()
    (megatron,) = [line for line in lines if "`megatron`" in line]
    assert megatron.split(" | ")[1] == "**read**" and "(2026-08)" in megatron
    (paper,) = [line for line in lines if "`paper`" in line]
    assert "fla-core 0.6.0" in paper.split(" | ")[1] and "arXiv" in paper.split(" | ")[2]
