"""A merged report in the shape that the page and the Markdown show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from conformance.cases.corpus import corpus_hash, load_corpus
from conformance.judge.rule import EDGES, GOOD
from conformance.report import borrowing
from conformance.report.read import CheckLine, DiagnosisLine, Header, Run, Selftest
from conformance.report.sinkhorn import convergence
from conformance.stages import STAGES

MOST = 400
"""Failing checks shown in full; the rest is counted."""
Key = tuple[str, str, str, str]


def summary(runs: Sequence[Run], selftest: Selftest | None) -> dict[str, Any]:
    """Everything that is shown: a cell for each implementation, stage, dtype and dialect, and every failure."""
    cells: dict[Key, dict[str, Any]] = {}
    failures: list[CheckLine] = []
    for run in runs:
        for check in run.checks:
            key = (check.implementation, check.stage, check.x, check.dialect)
            cell = cells.setdefault(key, {"verdicts": Counter(), "ratio": 0.0, "where": ""})
            cell["verdicts"][check.verdict] += 1
            ratio = check.ratio if check.ratio is not None else float("inf")
            if check.verdict in GOOD and ratio >= cell["ratio"]:
                cell["ratio"], cell["where"] = ratio, f"{check.case}, {check.tensor}"
            if check.verdict not in GOOD:
                failures.append(check)
    names = ("implementation", "stage", "x", "dialect")
    shown = failures[:MOST]
    return {
        "corpus": runs[0].header.corpus,
        "runs": [{"file": run.path.name, **_without_kind(run.header)} for run in runs],
        "diagnoses": [_without_kind(diagnosis) for run in runs for diagnosis in run.diagnoses],
        "warnings": [line for run in runs for line in _warnings(run)],
        "stages": list(STAGES),
        "cells": [
            {**dict(zip(names, key, strict=True)), **cell, "verdicts": dict(cell["verdicts"])}
            for key, cell in cells.items()
        ],
        "failures": [_without_kind(check) for check in shown],
        "hidden": len(failures) - len(shown),
        "edges": EDGES,
        "sinkhorn": _pictures(shown, runs[0].header.corpus),
        "skips": [
            {"implementation": name, "reason": reason, "count": count}
            for (name, reason), count in sorted(
                Counter((s.implementation, s.reason) for run in runs for s in run.skips).items()
            )
        ],
        "selftest": msgspec.to_builtins(selftest),
    }


def _warnings(run: Run) -> list[str]:
    """What makes a run's figures worth less: an early end, files that weren't as promised, modules of ours in use."""
    cut = [run.cut] if run.cut else []
    said = (*cut, *run.header.altered, *borrowing.lines(run.header.implementations))
    return [f"{run.path.name}: {line}" for line in said]


def _without_kind(line: Header | CheckLine | DiagnosisLine) -> dict[str, Any]:
    return {k: v for k, v in msgspec.to_builtins(line).items() if k != "kind"}


def _pictures(failures: Sequence[CheckLine], corpus: str) -> dict[str, Any]:
    """Convergence of the cases that failed; nothing where the corpus at hand is another one."""
    if corpus != corpus_hash():
        return {}
    wanted = {check.case for check in failures}
    pictures = {case.id: convergence(case) for case in load_corpus() if case.id in wanted}
    return {name: picture for name, picture in pictures.items() if picture}
