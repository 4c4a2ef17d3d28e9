"""The part of a diagnosis that calls the implementation again, in a process that can be ended at any time."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from conformance.cases.case import Case
from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_rows, published
from conformance.implementations import registry
from conformance.interface import Implementation
from conformance.judge.item import run_item
from conformance.questions.diagnosis.places import Asked, Over, place
from conformance.questions.identify import Identity, identify
from conformance.questions.sizes.design import Size, parsed
from conformance.questions.sizes.tensors import STAGES_OF_SIZES

SPARE = 2.0
"""Seconds before the end in which the answer is sent."""


@dataclass(frozen=True)
class Task:
    """What is asked.

    Attributes:
        reference: of the implementation.
        dialect, dtype: what it is told to compute, and in which dtype of x.
        case, stage, x: a failing item, to look where it fails; no stage where that isn't asked.
        gradient: whether what fails there is a gradient.
        golden: whether golden cases fail, so that its function is looked for.
        seconds: for all of it.
    """

    reference: str
    dialect: str
    dtype: str
    case: str
    stage: str
    x: str
    gradient: bool
    golden: bool
    seconds: float


@dataclass(frozen=True)
class Function:
    """What `identify` found, as far as a diagnosis says it."""

    words: str
    ratio: float
    changes: tuple[str, ...]
    told: str
    as_told: bool
    gradients: tuple[str, ...]
    precision: str
    rounded: tuple[str, ...]
    configured: str
    extreme: str
    infinite: str
    stages: tuple[str, ...]


def work(connection: Connection) -> None:
    """Takes a `Task`, and sends what it finds as it finds it.

    ``("alone", passes)``: whether the golden item passes as the first call of a process; ``("function", Function)``;
    ``("place", words)``; ``("end", None)``.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    task: Task = connection.recv()
    ends = time.monotonic() + task.seconds
    implementation = registry.load(task.reference, task.seconds)
    cases = load_corpus()
    if task.golden:
        connection.send(("alone", _alone(implementation, task, cases)))
        connection.send(("function", _function(implementation, task, cases)))
    size = _size(task, cases) if task.stage in STAGES_OF_SIZES else None
    if size is not None:
        asked = Asked(implementation, published(task.dialect), task.stage, task.x, task.gradient, ends - SPARE)
        try:
            connection.send(("place", place(asked, size)))
        except Over:
            connection.send(("place", asked.said))
    connection.send(("end", None))


def _alone(implementation: Implementation, task: Task, cases: list[Case]) -> bool:
    items = [item for case in cases if case.id == task.case for item in case.items()]
    item = next((i for i in items if i.stage == task.stage and i.variant.x == task.x), None)
    return item is not None and not run_item(implementation, item).failed


def _function(implementation: Implementation, task: Task, cases: list[Case]) -> Function:
    items = [item for case in cases for item in case.items()]
    found = identify(implementation, task.dialect, dialect_rows(), items, task.dtype)
    return _plain(found) if found.answers else _nothing(task.dialect, found)


def _plain(found: Identity) -> Function:
    nearest = found.nearest
    infinite = "{2} of {0}, {1}".format(*found.infinite[0]) if found.infinite else ""
    stages = tuple(stage for stage, answer in found.by_stage.items() if answer.ratio > 1 or answer.candidate.changes)
    return Function(
        nearest.candidate.words, nearest.ratio, nearest.candidate.changes, found.told, found.as_told,
        tuple(map(str, found.findings)), found.precision, tuple(found.rounded), found.configured, found.extreme,
        infinite, stages,
    )  # fmt: skip


def _nothing(told: str, found: Identity) -> Function:
    infinite = "{2} of {0}, {1}".format(*found.infinite[0]) if found.infinite else ""
    return Function("", np.inf, (), told, False, (), "", (), "", "", infinite, ())


def _size(task: Task, cases: list[Case]) -> Size | None:
    """The size of the failing item: of its id, or of the golden case's arrays."""
    known = parsed(task.case)
    if known is not None:
        return known[0]
    case = next((case for case in cases if case.id == task.case), None)
    return _of_case(case, task.stage) if case else None


def _of_case(case: Case, stage: str) -> Size | None:
    p: dict[str, Any] = dict(case.parameters)
    inputs = case.stages[stage].inputs
    first = next((name for name in ("x", "y") if name in inputs), None)
    if first is None:
        return None
    batch, seq = case.tensors[f"input/{first}"].shape[:2]
    return Size(batch, seq, p["dim"], p["streams"], None, 0) if batch and seq else None
