"""The result of a self-test for people: a table on the terminal, and the same as Markdown inside a document."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from conformance.cases.corpus import corpus_hash
from conformance.report.read import SELFTEST_FORMAT
from conformance.selftest.measure import DTYPES, FACTOR, Figures, Findings
from conformance.selftest.measure_where import Deaths, Places
from conformance.selftest.mutants import MUTANTS
from conformance.selftest.mutants_where import WHERE

MOST_PLACES = 3
"""Modes or sizes that a cell names."""


def figure(ratio: float) -> str:
    return "∞" if ratio == float("inf") else f"{ratio:.2g}" if ratio < 100 else f"{ratio:.1e}".replace("e+0", "e")


def _cell(f: Figures, blind: str) -> str:
    return "the same bits" if blind else f"{len(f.cases)} · {figure(f.ratio)} · {f.where}"


def rows(findings: Findings) -> list[list[str]]:
    """One row a mutant: its name, and for each dtype cases that kill it, largest multiple of the bound, best case."""
    return [
        [MUTANTS[number].title(), *(_cell(figures[d], MUTANTS[number].blind.get(d, "")) for d in DTYPES)]
        for number, figures in sorted(findings.mutants.items())
    ]


def reasons(findings: Findings) -> list[str]:
    """Why a mutant can't be seen in a dtype."""
    return [
        f"{MUTANTS[number].title()}, {dtype}: {reason} ({figures[dtype].items} items, every result the same bits as "
        "the plain implementation's)."
        for number, figures in sorted(findings.mutants.items())
        for dtype, reason in MUTANTS[number].blind.items()
    ]


def honest_line(findings: Findings) -> str:
    worst = max(findings.honest.values(), key=lambda f: f.ratio)
    items = sum(f.items for f in findings.honest.values())
    return (
        f"{len(findings.honest)} honest variants, {items} items: {len(findings.false_alarms)} false alarms, "
        f"largest ratio {figure(worst.ratio)} of the bound ({worst.where})."
    )


def _of_dtypes(title: str, rows: list[list[str]]) -> Table:
    """A table for the terminal: a mutant a row, a dtype a column."""
    table = Table(title=title)
    for column in ("mutant", *DTYPES):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def _as_markdown(cell: str, rows: list[list[str]]) -> list[str]:
    """The lines of the same in Markdown; ``cell`` says what stands in each."""
    head = ["mutant", *(f"{dtype}: {cell}" for dtype in DTYPES)]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def terminal(findings: Findings) -> Table:
    return _of_dtypes("cases that kill it · largest multiple of the bound · best case", rows(findings))


def markdown(findings: Findings) -> str:
    lines = _as_markdown("cases · multiple of the bound · best case", rows(findings))
    notes = [*reasons(findings), *([honest_line(findings)] if findings.honest else [])]
    return "\n".join([*lines, "", *notes]) + "\n"


def _killed_by(deaths: Deaths, blind: str) -> str:
    worst = deaths.worst
    if blind:
        return "the same bits"
    if worst is None:
        return "**survives**"
    places = ", ".join(place for place in deaths.places[:MOST_PLACES] if place)
    tier = f"{worst.tier}: {places}" if places else worst.tier
    return f"{tier} · {figure(worst.ratio)} · {worst.where}"


def rows_of_places(places: Places) -> list[list[str]]:
    """One row a mistake of *where*: what kills it in each dtype, the largest multiple of the bound, the best case."""
    return [
        [WHERE[number].title(), *(_killed_by(figures[d], WHERE[number].blind.get(d, "")) for d in DTYPES)]
        for number, figures in sorted(places.mutants.items())
    ]


def terminal_of_places(places: Places) -> Table:
    title = "what kills it: tier, mode or size · largest multiple of the bound · best case"
    return _of_dtypes(title, rows_of_places(places))


def markdown_of_places(places: Places) -> str:
    lines = _as_markdown("killed by · multiple of the bound · best case", rows_of_places(places))
    return "\n".join(lines) + "\n"


def as_json(findings: Findings, places: Places) -> str:
    """The same for `report`: corpus, mutants with their figures by dtype, reasons, and a line on the honest side."""
    content = {
        "format": SELFTEST_FORMAT,
        "corpus": corpus_hash(),
        "quick": findings.quick,
        "mutants": [
            {
                "name": MUTANTS[number].title(),
                "figures": {
                    d: {"cases": len(f.cases), "ratio": None if f.ratio == float("inf") else f.ratio, "where": f.where}
                    for d, f in figures.items()
                },
                "blind": MUTANTS[number].blind,
            }
            for number, figures in sorted(findings.mutants.items())
        ],
        "where": [
            {
                "name": WHERE[number].title(),
                "figures": {dtype: _place(deaths) for dtype, deaths in figures.items()},
                "blind": WHERE[number].blind,
            }
            for number, figures in sorted(places.mutants.items())
        ],
        "honest": honest_line(findings) if findings.honest else "",
        "problems": [*findings.survivors, *places.survivors, *findings.false_alarms],
    }
    return json.dumps(content, indent=1) + "\n"


def as_seen(findings: Findings) -> str:
    """For `report.blind`: the stages that see each mistake with x in float32."""
    content = {
        MUTANTS[number].title(): sorted(stage for stage, ratio in figures["float32"].stages.items() if ratio > FACTOR)
        for number, figures in sorted(findings.mutants.items())
    }
    return (
        json.dumps({title: stages for title, stages in content.items() if stages}, indent=1, ensure_ascii=False) + "\n"
    )


def _place(deaths: Deaths) -> dict[str, Any] | None:
    """The worst check that killed a mutant; None where nothing did."""
    worst = deaths.worst
    if worst is None:
        return None
    ratio = None if worst.ratio == float("inf") else worst.ratio
    return {"tier": worst.tier, "places": deaths.places, "ratio": ratio, "where": worst.where}
