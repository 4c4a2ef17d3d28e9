"""A worker process of the runner: it sets one implementation up and runs the items that it is handed, one at a time."""

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
from typing import Any, cast

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


def work(connection: Connection) -> None:
    """Takes (reference, limit, probe, plan), says that it is ready, then judges items until it is handed none.

    It sends ``("ready", name)``, then ``("done", outcome)`` for each item, and before it ``("mode", names)`` for each
    further call, so that it is known where the process died. Handed a list of items it sends ``("unclaimed",
    outcomes)``: those that it would skip, by key. After ``("setup", reason)`` or ``("case", reason)`` it sends nothing
    more.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    reference, limit, probe, plan = connection.recv()
    try:
        guard = Guard()
        implementation = guard.load(reference, limit)
    except (SetupError, CaseError) as error:
        connection.send(("setup" if isinstance(error, SetupError) else "case", str(error)))
        return
    if plan is not None:
        plan.announce = partial(_announce, connection)
    garbage.begin()
    connection.send(("ready", name_of(implementation.name)))
    judge = _Judge(guard, implementation, probe, plan)
    for count in itertools.count(1):
        asked = connection.recv()
        if asked is None:
            return
        try:
            if isinstance(asked, list):
                connection.send(("unclaimed", judge.unclaimed(cast("list[Key]", asked))))
            else:
                connection.send(("done", judge.put(asked)))
        except CaseError as error:
            connection.send(("case", str(error)))
            return
        if count % COLLECTED == 0:
            garbage.collect()


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
