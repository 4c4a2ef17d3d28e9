"""The tables of dialects in docs/mathematics.md are those of fixtures/dialects.json."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "fixtures" / "dialects.json").read_text(encoding="utf-8"))["dialects"]
WORDS = {"-": None, "yes": True, "no": False}


def _tables() -> dict[str, dict[str, str]]:
    """The cells of every table whose first column is the dialect, by dialect and column."""
    cells: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8").splitlines():
        entries = [entry.strip().strip("`") for entry in line.strip("|").split("|")] if line.startswith("|") else []
        if entries[:1] == ["dialect"]:
            columns = entries[1:]
        elif not entries:
            columns = []
        elif columns and not entries[0].startswith("---"):
            cells.setdefault(entries[0], {}).update(zip(columns, entries[1:], strict=True))
    return cells


def _agree(cell: str, value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return WORDS.get(cell, cell) is value
    return cell == value if isinstance(value, str) else float(cell) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("name", ROWS)
def test_every_parameter_of_a_row_stands_in_the_tables(name: str):
    cells = _tables()[name]
    for parameter, entry in ROWS[name]["parameters"].items():
        assert _agree(cells[parameter], entry["value"]), f"{name}, {parameter}: {cells[parameter]}, {entry['value']}"


@pytest.mark.parametrize("name", ROWS)
def test_the_tables_say_what_a_row_rests_on(name: str):
    cells, evidence = _tables()[name], ROWS[name]["evidence"]
    read = f"{evidence['read']} ({evidence['date']})" if "read" in evidence else "-"
    assert cells["function"] == ROWS[name]["summary"]
    assert cells["software that was run as it is"] == evidence.get("ran", "-")
    assert cells["what was only read, and when"] == read


def test_no_row_stands_there_that_is_none():
    assert list(_tables()) == list(ROWS)
