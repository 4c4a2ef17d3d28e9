"""Runs items on implementations in worker processes and collects their verdicts."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np

from conformance.cases.case import Case, CaseError, Item, load_case
from conformance.implementations.registry import load
from conformance.interface import SetupError
from conformance.judge.item import Outcome, order, run_item
from conformance.judge.rule import Check

POLL = 0.5  # seconds between looks at whether a second worker pays by now
SHARED = 20.0  # seconds of work left from which it does
GRACE = 10.0  # seconds by which an implementation's own time limit comes first
COLLECTED = 32  # items between two collections of garbage


Key = tuple[str, str, str]
"""Path of the case, stage and variant of an item."""


def run(
    references: Sequence[str],
    items: Sequence[Item],
    jobs: int = 2,
    stop_early: bool = False,
    limit: float = 300.0,
    probe: bool = False,
) -> Iterator[Outcome]:
    """Outcomes of every implementation and item, as they come.

    Args:
        references: registered names, ``module:attribute`` or ``exec:COMMAND``.
        jobs: worker processes at a time; an implementation gets a second one where none is waiting for its first.
        stop_early: stop at the first failure.
        limit: seconds for one item; its process is ended after them, and the rest goes on in another.
        probe: hand over what isn't claimed too.

    Raises:
        SetupError: an implementation can't be set up.
        CaseError: a case file doesn't keep the format.
    """
    by_key = {(str(i.case.path), i.stage, i.variant.name): i for i in order(items)}
    tasks = [_Task(reference, deque(by_key)) for reference in references]
    context = multiprocessing.get_context("spawn")
    active: dict[Connection, _Worker] = {}
    try:
        while True:
            while len(active) < max(1, jobs):
                task = _next_task(tasks, [worker.task for worker in active.values()])
                if task is None:
                    break
                worker = _Worker(context, task, limit, probe, backwards=any(w.task is task for w in active.values()))
                active[worker.connection] = worker
            if not active:
                return
            for worker in active.values():
                worker.end_if_late()
            for ready in wait(list(active), timeout=POLL):
                worker = active[cast(Connection, ready)]
                outcome = worker.receive(by_key)
                if worker.finished:
                    del active[worker.connection]
                if outcome:
                    yield outcome
                    if stop_early and outcome.failed:
                        return
    finally:
        for worker in active.values():
            worker.process.kill()


@dataclass
class _Task:
    """One implementation and the items that it still has to run."""

    reference: str
    queue: deque[Key]
    ran: int = 0
    seconds: float = 0.0

    @property
    def left(self) -> float:
        """Seconds of work left, by the pace so far; 0 where it isn't known yet."""
        return self.seconds / self.ran * len(self.queue) if self.ran else 0.0


def _next_task(tasks: list[_Task], running: list[_Task]) -> _Task | None:
    """The first that has no worker; then the one with most to do, where a second worker pays."""
    idle = [task for task in tasks if task.queue and not any(task is other for other in running)]
    if idle:
        return idle[0]
    longest = max((task for task in tasks if task.queue), key=lambda task: task.left, default=None)
    return longest if longest and longest.left > SHARED else None


class _Worker:
    """A process that runs one implementation, an item at a time, from either end of the task's queue."""

    def __init__(self, context: Any, task: _Task, limit: float, probe: bool, backwards: bool):
        self.task, self.limit, self.backwards = task, limit, backwards
        self.since, self.late = time.monotonic(), False
        self.name = task.reference
        self.current: Key | None = None
        self.finished = False
        # A pipe, not a queue: what was sent is there even when the process dies in the next instruction.
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(task.reference, other, limit, probe), daemon=True)
        self.process.start()
        other.close()

    def receive(self, items: dict[Key, Item]) -> Outcome | None:
        """Takes what the process sent and hands it its next item."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionError):
            return self._died(items)
        if kind == "setup":
            raise SetupError(content)
        if kind == "case":
            raise CaseError(content)
        outcome = None
        if kind == "ready":
            self.name = content
        else:
            outcome = content
            outcome.reference = self.task.reference
            self.task.ran += 1
            self.task.seconds += outcome.seconds
        queue = self.task.queue
        self.current = (queue.pop() if self.backwards else queue.popleft()) if queue else None
        self.since = time.monotonic()
        with contextlib.suppress(ConnectionError):  # it died between two items: the next receive() finds out
            self.connection.send(self.current)
        self.finished = self.current is None
        return outcome

    def end_if_late(self) -> None:
        """Ends the process where its item takes longer than the limit; `receive` then finds it dead."""
        if self.current is not None and not self.late and time.monotonic() - self.since > self.limit + GRACE:
            self.late = True
            self.process.kill()

    def _died(self, items: dict[Key, Item]) -> Outcome:
        self.finished = True
        self.process.join()
        if self.current is None:
            raise SetupError(f"{self.name}: its process died with status {self.process.exitcode} outside any case")
        item = items[self.current]
        message = f"the process died with status {self.process.exitcode}"
        if self.late:
            message = f"no result within {self.limit + GRACE:g} s: its process was ended"
        return Outcome(
            self.name, item.case.id, item.stage, item.variant.name, item.variant.x, item.case.dialect,
            [Check("-", "errored", np.inf, message=message)], reference=self.task.reference,
        )  # fmt: skip


def _work(reference: str, connection: Connection, limit: float, probe: bool) -> None:
    """The worker process: says that it is ready, then runs the items it is handed until it is handed none."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        implementation = load(reference, limit)
    except SetupError as error:
        connection.send(("setup", str(error)))
        return
    gc.disable()  # tracing makes millions of small objects: a fifth of the time went into looking at them
    gc.freeze()
    connection.send(("ready", implementation.name))
    cases: dict[str, Case] = {}
    for count in itertools.count(1):
        key = connection.recv()
        if key is None:
            return
        path, stage, variant = key
        try:
            case = cases.get(path) or cases.setdefault(path, load_case(Path(path)))
            item = next(i for i in case.items() if i.stage == stage and i.variant.name == variant)
            connection.send(("done", run_item(implementation, item, probe)))
        except CaseError as error:
            connection.send(("case", str(error)))
            return
        if count % COLLECTED == 0:
            gc.collect()
