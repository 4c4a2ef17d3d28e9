"""The result of a power run for people: a table on the terminal, and the same as Markdown inside a document."""

from __future__ import annotations

import json

from rich.table import Table

from conformance.cases.corpus import corpus_hash
from conformance.report.read import POWER_FORMAT
from conformance.selftest.measure import DTYPES, Figures, Power
from conformance.selftest.mutants import MUTANTS


def figure(ratio: float) -> str:
    return "∞" if ratio == float("inf") else f"{ratio:.2g}" if ratio < 100 else f"{ratio:.1e}".replace("e+0", "e")


def _cell(f: Figures, blind: str) -> str:
    return "the same bits" if blind else f"{len(f.cases)} · {figure(f.ratio)} · {f.where}"


def rows(power: Power) -> list[list[str]]:
    """One row a mutant: its name, and for each dtype cases that kill it, largest multiple of the bound, best case."""
    return [
        [MUTANTS[number].title(), *(_cell(figures[d], MUTANTS[number].blind.get(d, "")) for d in DTYPES)]
        for number, figures in sorted(power.mutants.items())
    ]


def reasons(power: Power) -> list[str]:
    """Why a mutant can't be seen in a dtype."""
    return [
        f"{MUTANTS[number].title()}, {dtype}: {reason} ({figures[dtype].items} items, every result the same bits as "
        "the plain implementation's)."
        for number, figures in sorted(power.mutants.items())
        for dtype, reason in MUTANTS[number].blind.items()
    ]


def honest_line(power: Power) -> str:
    worst = max(power.honest.values(), key=lambda f: f.ratio)
    items = sum(f.items for f in power.honest.values())
    return (
        f"{len(power.honest)} honest variants, {items} items: {len(power.false_alarms)} false alarms, largest ratio "
        f"{figure(worst.ratio)} of the bound ({worst.where})."
    )


def terminal(power: Power) -> Table:
    table = Table(title="cases that kill it · largest multiple of the bound · best case")
    table.add_column("mutant")
    for dtype in DTYPES:
        table.add_column(dtype)
    for row in rows(power):
        table.add_row(*row)
    return table


def markdown(power: Power) -> str:
    head = ["mutant", *(f"{dtype}: cases · multiple of the bound · best case" for dtype in DTYPES)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(row)} |" for row in rows(power)]
    notes = [*reasons(power), *([honest_line(power)] if power.honest else [])]
    return "\n".join([*lines, "", *notes]) + "\n"


def as_json(power: Power) -> str:
    """The same for `report`: corpus, mutants with their figures by dtype, reasons, and a line on the honest side."""
    found = {
        "format": POWER_FORMAT,
        "corpus": corpus_hash(),
        "quick": power.quick,
        "mutants": [
            {
                "name": MUTANTS[number].title(),
                "figures": {
                    d: {"cases": len(f.cases), "ratio": None if f.ratio == float("inf") else f.ratio, "where": f.where}
                    for d, f in figures.items()
                },
                "blind": MUTANTS[number].blind,
            }
            for number, figures in sorted(power.mutants.items())
        ],
        "honest": honest_line(power) if power.honest else "",
        "problems": [*power.survivors, *power.false_alarms],
    }
    return json.dumps(found, indent=1) + "\n"
