"""The status page in the repository is that of the corpus."""

from __future__ import annotations

from pathlib import Path

import conformance
from conformance.corpus import load_corpus
from conformance.status import CLAUSES, status


def test_the_page_is_up_to_date():
    page = Path(conformance.__file__).with_name("STATUS.md")
    assert page.read_text() == status(load_corpus()), "run: mhc-conformance status --write conformance/STATUS.md"


def test_every_case_names_a_known_clause_and_a_clause_without_a_case_is_said():
    assert {c.metadata["clause"] for c in load_corpus()} <= set(CLAUSES)
    text = status(c for c in load_corpus() if c.metadata["clause"] != "Precision")
    assert "| Precision | where each dialect rounds | **none** |" in text
