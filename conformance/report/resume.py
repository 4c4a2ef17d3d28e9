"""A run that was cut off, read back so that it can go on where it stopped."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from conformance.files.places import CaseError
from conformance.files.plain import plain
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report.files import versions
from conformance.report.read import CheckLine, Map, Run, read_run


class NotResumed(CaseError):
    """The run in a file can't go on; the message is one line for the user."""


def resumed(path: Path, corpus: str, selection: Mapping[str, Any]) -> list[Outcome]:
    """The outcomes of the items that a run had finished.

    Args:
        corpus: the hash that the corpus has now.
        selection: the options that select what is measured.

    Raises:
        NotResumed: it isn't a report, is whole already, or is of other options, versions or another corpus.
    """
    try:
        run = read_run(path)
    except CaseError as error:
        raise NotResumed(f"--resume: {error}") from error
    if not run.cut:
        raise NotResumed(f"--resume: {path} is whole already: its run ended")
    if run.header.corpus != corpus:
        raise NotResumed(f"--resume: {path} is of another corpus, {run.header.corpus[:12]}, not {corpus[:12]}")
    if run.header.asked != plain(dict(selection)):
        before, now = (_shown(asked) for asked in (run.header.asked, selection))
        raise NotResumed(f"--resume: {path} was run with {before}, not with {now}: give the same options")
    if run.header.versions != versions():
        changed = [k for k, v in versions().items() if run.header.versions.get(k) != v]
        raise NotResumed(f"--resume: {path} was run with other versions of {', '.join(changed) or 'its packages'}")
    return outcomes_of(run)


def _shown(asked: Mapping[str, Any]) -> str:
    said = [f"{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in asked.items()]
    return ", ".join(said) or "no options"


def outcomes_of(run: Run) -> list[Outcome]:
    """The outcome of each item, without the arrays."""
    checks: dict[tuple[str, ...], list[Check]] = defaultdict(list)
    for line in run.checks:
        checks[line.item].append(_check(line))
    skips = {line.item: line.reason for line in run.skips}
    differences: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for line in run.differences:
        differences[line.item].append(line.message)
    refused: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for line in run.refusals:
        refused[line.item][line.mode] = line.reason
    return [
        Outcome(
            i.implementation, i.case, i.stage, i.variant, i.x, i.dialect, checks.pop(i.item, []), skips.get(i.item, ""),
            reference=i.reference, asked=i.asked, file=i.file, seconds=i.seconds, modes=i.modes, repeats=i.repeats,
            about=run.header.implementations.get(i.implementation, {}), refused=refused[i.item],
            differences=differences[i.item], family=i.family, elements=i.elements,
        )
        for i in run.items
    ]  # fmt: skip


def _check(line: CheckLine) -> Check:
    worst = [msgspec.to_builtins(element) for element in line.worst]
    ratio = math.inf if line.ratio is None else line.ratio
    return Check(
        line.tensor, line.verdict, ratio, line.error or 0.0, line.bound or 0.0, line.message, worst,
        list(line.histogram), line.mode, list(line.trace), _map(line.map) if line.map else {},
    )  # fmt: skip


def _map(line: Map) -> dict[str, Any]:
    cells = [[math.inf if cell is None else cell for cell in row] for row in line.cells]
    return {**msgspec.to_builtins(line), "cells": cells}
