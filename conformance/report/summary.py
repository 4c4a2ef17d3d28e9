"""A merged report in the shape that the page and the Markdown show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from conformance.cases.corpus import corpus_hash, load_corpus
from conformance.judge.groups import ORDER, PART_OF
from conformance.judge.rule import EDGES, GOOD
from conformance.report import borrowing
from conformance.report.read import Header, Run, Selftest
from conformance.report.shown import Shown
from conformance.report.sinkhorn import convergence

WITH_SINKHORN = tuple(stage for stage in ORDER if stage == "residual_matrix" or stage in PART_OF["residual_matrix"])
UNDIAGNOSED = "the run wrote no diagnosis"
UNKNOWN = "no cause was found"
Key = tuple[str, str, str, str]


def summary(runs: Sequence[Run], selftest: Selftest | None) -> dict[str, Any]:
    """Everything that is shown: diagnoses, groups, and a cell for each implementation, stage, dtype and dialect."""
    cells: dict[Key, dict[str, Any]] = {}
    for run in runs:
        for check in run.checks:
            key = (check.implementation, check.stage, check.x, check.dialect)
            cell = cells.setdefault(key, {"verdicts": Counter(), "ratio": 0.0, "where": ""})
            cell["verdicts"][check.verdict] += 1
            ratio = check.ratio if check.ratio is not None else float("inf")
            if check.verdict in GOOD and ratio >= cell["ratio"]:
                cell["ratio"], cell["where"] = ratio, f"{check.case}, {check.tensor}"
    names = ("implementation", "stage", "x", "dialect")
    shown = Shown(check for run in runs for check in run.checks)
    return {
        "corpus": runs[0].header.corpus,
        "runs": [{"file": run.path.name, **_without_kind(run.header)} for run in runs],
        "diagnoses": _diagnoses(runs, [group["implementation"] for group in shown.groups]),
        "warnings": [line for run in runs for line in _warnings(run)],
        "stages": list(dict.fromkeys([*ORDER, *(stage for _, stage, _, _ in cells)])),
        "cells": [
            {**dict(zip(names, key, strict=True)), **cell, "verdicts": dict(cell["verdicts"])}
            for key, cell in cells.items()
        ],
        "groups": shown.groups,
        "failures": shown.failures,
        "hidden": shown.hidden,
        "edges": EDGES,
        "sinkhorn": _pictures(shown.failures, runs[0].header.corpus),
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


def _diagnoses(runs: Sequence[Run], failed: Sequence[str]) -> list[dict[str, Any]]:
    """One for each implementation that failed, in the order of the groups; ``found`` says whether it has a cause."""
    said = [line for run in runs for line in run.diagnoses]
    names = dict.fromkeys([*failed, *(line.implementation for line in said)])
    rows: list[dict[str, Any]] = []
    for name in names:
        lines = [line for line in said if line.implementation == name]
        rows += [
            {"implementation": name, "cause": line.cause or UNKNOWN, "lines": line.lines, "found": bool(line.cause)}
            for line in lines
        ] or [{"implementation": name, "cause": UNDIAGNOSED, "lines": (), "found": False}]
    return rows


def _without_kind(line: Header) -> dict[str, Any]:
    return {k: v for k, v in msgspec.to_builtins(line).items() if k != "kind"}


def _pictures(failures: Sequence[dict[str, Any]], corpus: str) -> dict[str, Any]:
    """Convergence of the cases that failed in a stage with Sinkhorn; nothing where another corpus is at hand."""
    if corpus != corpus_hash():
        return {}
    wanted = {failure["case"] for failure in failures if failure["stage"] in WITH_SINKHORN}
    pictures = {case.id: convergence(case) for case in load_corpus() if case.id in wanted}
    return {name: picture for name, picture in pictures.items() if picture}
