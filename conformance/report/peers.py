"""The table of witnesses: what each row's software, run as it is, did with the cases of its row.

It is made of the files that ``run --jsonl`` wrote and of the evidence of the rows. A row that was only read has a
line that says so, and so has a package that a row names as its evidence and that none of the runs called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from conformance.cases.case import DTYPES
from conformance.cases.dialects import dialect_names, evidence
from conformance.judge.item import Outcome
from conformance.judge.known import Known, judge
from conformance.judge.rule import GOOD, Check
from conformance.report.read import ReportError, Run
from conformance.stages import STAGES

COLUMNS = (
    "row", "software", "implementation", "stages", "dtype of x", "items", "failed", "known", "worst passing ratio",
)  # fmt: skip


def table(runs: Sequence[Run], entries: Sequence[Known]) -> str:
    """The table as Markdown: a line for each row and implementation, in the order of the rows.

    Args:
        runs: of one corpus (`read.merge`).
        entries: known results; an item whose failures they cover is counted apart from the failed ones.

    Raises:
        ReportError: nothing ran, or a case belongs to no published row.
    """
    outcomes = _outcomes(runs)
    if not outcomes:
        raise ReportError("nothing ran: expected at least one item that was not skipped")
    strange = sorted({o.dialect for o in outcomes} - set(dialect_names()))
    if strange:
        raise ReportError(f"expected cases of published rows, got some of {', '.join(strange)}: leave --dialect out")
    known = {id(outcome) for excused in judge(outcomes, entries).known.values() for outcome in excused}
    about = {name: text for run in runs for name, text in run.header.implementations.items()}
    lines = [
        f"Corpus `{runs[0].header.corpus[:12]}`.",
        "",
        _line(*COLUMNS),
        _line(*["---"] * len(COLUMNS)).replace(" ", ""),
    ]
    for row in dialect_names():
        lines += _row(row, [o for o in outcomes if o.dialect == row], known, about)
    return "\n".join(lines) + "\n"


def _outcomes(runs: Sequence[Run]) -> list[Outcome]:
    """The items that ran, with the checks as the files have them."""
    outcomes: dict[tuple[str, ...], Outcome] = {}
    for run in runs:
        for line in run.checks:
            key = (*line.item, line.x, line.dialect)
            ratio = math.inf if line.ratio is None else line.ratio
            check = Check(line.tensor, line.verdict, ratio, message=line.message, mode=line.mode)
            outcomes.setdefault(key, Outcome(*key)).checks.append(check)
    return list(outcomes.values())


def _row(row: str, outcomes: Sequence[Outcome], known: set[int], about: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of one row: its evidence that didn't run, then every implementation that did."""
    grounds = evidence(row)
    named = grounds["ran"].split("; ") if "ran" in grounds else []
    software = {name: _software(about.get(name, {}), named) for name in sorted({o.implementation for o in outcomes})}
    lines = [_empty(row, f"{part}: not in these runs") for part in named if part not in software.values()]
    if "read" in grounds and not named:
        lines.append(_empty(row, f"read, not run: {grounds['read']}, {grounds['date']}"))
    for name, description in software.items():
        lines.append(_figures(row, description, name, [o for o in outcomes if o.implementation == name], known))
    return lines


def _software(about: dict[str, Any], named: Sequence[str]) -> str:
    """What an implementation called: the row's evidence where it is that package and version, else what it says."""
    described = str(about.get("description", "")).replace("==", " ")
    return next((part for part in named if described.split(", ")[0] == part.split(", ")[0]), described or "not said")


def _figures(row: str, software: str, name: str, outcomes: Sequence[Outcome], known: set[int]) -> str:
    failed = [o for o in outcomes if o.failed]
    excused = sum(id(o) in known for o in failed)
    stages = [stage for stage in STAGES if any(o.stage == stage for o in outcomes)]
    dtypes = [dtype for dtype in DTYPES if any(o.x == dtype for o in outcomes)]
    passing = [(check.ratio, o, check.tensor) for o in outcomes for check in o.checks if check.verdict in GOOD]
    worst = "-"
    if passing:
        ratio, where, tensor = max(passing, key=lambda figure: figure[0])
        worst = f"{ratio:.2f}: {where.case}, {where.stage}, {tensor}, {where.x}"
    counts = (str(len(outcomes)), str(len(failed) - excused), str(excused))
    return _line(row, software, name, " ".join(stages), " ".join(dtypes), *counts, worst)


def _empty(row: str, software: str) -> str:
    return _line(row, software, *["-"] * (len(COLUMNS) - 2))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
