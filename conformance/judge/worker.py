"""A worker process of the runner: it sets an implementation up and runs its items, handed to it one by one."""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

from conformance.cases.case import Case, CaseError, Item
from conformance.files.plain import name_of
from conformance.interface import Implementation, SetupError
from conformance.judge import garbage
from conformance.judge.guard import Guard
from conformance.judge.item import Outcome, run_item, skipped
from conformance.judge.modes_plan import Plan

COLLECTED = 32  # items between two collections of garbage
Key = tuple[str, str, str]
"""As in `judge.run`."""
ELSEWHERE = {"sizes:": "conformance.questions.sizes.judging"}
"""Modules that put items which aren't cases of a file, by how their keys begin."""


class Begin(NamedTuple):
    """Which implementation a worker sets up, and how it asks it; as `run.run` has them."""

    reference: str
    limit: float
    probe: bool
    plan: Plan | None


def work(connection: Connection) -> None:
    """Takes what to `Begin` with, says that it is ready, then judges items, until it is handed None.

    It sends ``("ready", name)``, then ``("done", outcome)`` for each item, and before it ``("mode", names)`` for each
    further call, so that it is known where the process died. Handed a list of items it sends ``("unclaimed",
    outcomes)``: those that it would skip, by key. Handed another implementation in the place of an item, it goes on
    with that. After ``("setup", reason)`` or ``("case", reason)`` it sends nothing more.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    handed = connection.recv()
    try:
        guard = Guard()
        while handed is not None:
            handed = _judge(connection, guard, handed)
    except (SetupError, CaseError) as error:
        connection.send(("setup" if isinstance(error, SetupError) else "case", str(error)))


def _judge(connection: Connection, guard: Guard, begin: Begin) -> Begin | None:
    """Judges the items of one implementation; returns what comes after them."""
    implementation = guard.load(begin.reference, begin.limit)
    if begin.plan is not None:
        begin.plan.announce = partial(_announce, connection)
    garbage.begin()
    connection.send(("ready", name_of(implementation.name)))
    judge = _Judge(guard, implementation, begin.probe, begin.plan)
    for count in itertools.count(1):
        asked = connection.recv()
        if asked is None or isinstance(asked, Begin):
            return asked
        if isinstance(asked, list):
            connection.send(("unclaimed", judge.unclaimed(cast("list[Key]", asked))))
        else:
            connection.send(("done", judge.put(asked)))
        if count % COLLECTED == 0:
            garbage.collect()
    raise AssertionError("counting has no end")


@dataclass
class _Judge:
    """Judges the items of keys; a case is read once."""

    guard: Guard
    implementation: Implementation
    probe: bool
    plan: Plan | None
    cases: dict[str, Case] = field(default_factory=dict[str, Case])

    def put(self, key: Key) -> Outcome:
        """The outcome of one item, with all that it took."""
        began = time.perf_counter()
        elsewhere = self._elsewhere(key)
        if elsewhere is not None:
            outcome = elsewhere.put(self.implementation, key)
        else:
            outcome = run_item(self.implementation, self._item(key), self.probe, self.plan)
        self.guard.tell(outcome, key[0])
        outcome.whole = time.perf_counter() - began
        return outcome

    def unclaimed(self, keys: Sequence[Key]) -> dict[Key, Outcome]:
        """The outcomes of those items that aren't claimed, which needs no call; none where they are probed."""
        return {key: outcome for key in keys if (outcome := self._unclaimed(key)) is not None}

    def _unclaimed(self, key: Key) -> Outcome | None:
        elsewhere = self._elsewhere(key)
        if elsewhere is not None:
            return elsewhere.unclaimed(self.implementation, key)
        return None if self.probe else skipped(self.implementation, self._item(key), self.plan)

    def _elsewhere(self, key: Key) -> Any:
        name = next((module for scheme, module in ELSEWHERE.items() if key[0].startswith(scheme)), None)
        return importlib.import_module(name) if name else None

    def _item(self, key: Key) -> Item:
        path, stage, variant = key
        case = self.cases.get(path) or self.cases.setdefault(path, self.guard.read(Path(path)))
        return next(i for i in case.items() if i.stage == stage and i.variant.name == variant)


def _announce(connection: Connection, mode: str) -> None:
    connection.send(("mode", mode))
