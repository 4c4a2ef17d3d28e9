"""Reads the files of `run --jsonl` and `selftest --json`, and puts several runs of one corpus together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.report.files import FORMAT

SELFTEST_FORMAT = "mhc-conformance-power/1"


class ReportError(ValueError):
    """A file isn't a whole report, or reports don't go together; the message is one line for the user."""


@dataclass
class Run:
    """One file: its header, checks and skips."""

    path: Path
    header: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    skips: list[dict[str, Any]] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """One report.

    Raises:
        ReportError: not a report, another format, or cut off before its footer.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: can't be read ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            cut = " (cut off?)" if number == len(lines) else ""
            raise ReportError(f"{path}: line {number} isn't JSON{cut}: {error}") from error
        if not isinstance(row, dict) or row.get("kind") not in ("header", "check", "skip", "footer"):
            raise ReportError(f"{path}: line {number} is neither header, check, skip nor footer")
        found.append(row)
    if not found or found[0]["kind"] != "header" or found[0].get("format") != FORMAT:
        raise ReportError(f"{path}: expected a first line with format {FORMAT!r}")
    if found[-1]["kind"] != "footer" or found[-1].get("lines") != len(found) - 2:
        raise ReportError(f"{path}: cut off: expected a footer that counts {max(0, len(found) - 1)} lines or fewer")
    if not isinstance(found[0].get("corpus"), str):
        raise ReportError(f"{path}: its header has no corpus")
    run = Run(path, found[0])
    run.checks = [row for row in found if row["kind"] == "check"]
    run.skips = [row for row in found if row["kind"] == "skip"]
    needed = ("implementation", "case", "stage", "variant", "x", "dialect", "tensor", "verdict", "ratio", "message")
    for row in run.checks:
        missing = [k for k in needed if k not in row]
        if missing:
            raise ReportError(f"{path}: a check lacks {', '.join(missing)}")
    return run


def merge(paths: Sequence[Path]) -> list[Run]:
    """Several reports of one corpus.

    Raises:
        ReportError: one can't be read, two have different corpora, or the same item of one implementation twice.
    """
    runs = [read_run(path) for path in paths]
    first = runs[0]
    seen: dict[tuple[str, str, str, str], Path] = {}
    for run in runs:
        if run.header["corpus"] != first.header["corpus"]:
            raise ReportError(
                f"reports of different corpora: {first.path} has {first.header['corpus']}, {run.path} has "
                f"{run.header['corpus']}"
            )
        for key in {(c["implementation"], c["case"], c["stage"], c["variant"]) for c in run.checks}:
            if key in seen:
                raise ReportError(f"{run.path} and {seen[key]} both have {', '.join(key)}: give one of them")
            seen[key] = run.path
    return runs


def read_selftest(path: Path, corpus: str) -> dict[str, Any]:
    """The figures of a self-test of the same corpus.

    Raises:
        ReportError: it isn't one, or is of another corpus.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path}: expected the file that selftest --json writes, got {error}") from error
    if not isinstance(found, dict) or found.get("format") != SELFTEST_FORMAT:
        raise ReportError(f"{path}: expected format {SELFTEST_FORMAT!r}")
    if found["corpus"] != corpus:
        raise ReportError(f"reports of different corpora: the runs have {corpus}, {path} has {found['corpus']}")
    return found
