"""Runs items on implementations in worker processes and collects their verdicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import cast

import numpy as np

from conformance.cases.case import CaseError, Item
from conformance.implementations.child import Deadline, PythonChild, end_all
from conformance.implementations.registry import together
from conformance.interface import SetupError
from conformance.judge.item import Outcome, order
from conformance.judge.modes_plan import Plan
from conformance.judge.rule import Check
from conformance.judge.worker import Begin

POLL = 0.5  # seconds after which it is considered again whether to start a second worker
SHARED = 20.0  # seconds of work that must be left for one
GRACE = 10.0  # seconds by which an implementation's own time limit comes first
YOUNG = 60.0  # seconds of work after which a process takes no other implementation: what its framework keeps slows it
LEAVE = 5.0  # seconds for workers that have no more to do to leave

Key = tuple[str, str, str]
"""Path of the case, stage and variant of an item; or of another scheme, which `worker.ELSEWHERE` knows."""


@dataclass(frozen=True)
class Label:
    """The names of an item, for a notice that its process has died."""

    case: str
    stage: str
    variant: str
    x: str
    dialect: str
    slot: str = ""
    """Tells a size's questions from one another; empty for others."""

    @property
    def id(self) -> str:
        """The same in every run with the same options."""
        return f"{self.case}::{self.slot}" if self.slot else f"{self.case}::{self.stage}::{self.variant}"


def run(
    references: Sequence[str],
    items: Sequence[Item],
    jobs: int = 2,
    stop_early: bool = False,
    limit: float = 300.0,
    probe: bool = False,
    sizes: Mapping[Key, Label] | None = None,
    plan: Plan | None = None,
    leave: Mapping[str, Collection[str]] | None = None,
) -> Iterator[Outcome]:
    """Outcomes of every implementation and item, as they come.

    Args:
        references: registered names, ``module:attribute`` or ``exec:COMMAND``.
        jobs: worker processes at a time; an implementation gets a second one where none is waiting for its first.
        stop_early: stop at the first failure.
        limit: seconds for one item; its process is ended after them, and the rest goes on in another.
        probe: hand over what isn't claimed too.
        sizes: items of other sizes than the corpus has, by their keys; they come last.
        plan: the further calls of each item; none where it is None.
        leave: by reference the ids (`Label.id`) of items that it isn't asked for.

    Raises:
        SetupError: an implementation can't be set up.
        CaseError: a case file doesn't keep the format.
    """
    by_key: dict[Key, Label] = {(str(i.case.path), i.stage, i.variant.name): _label(i) for i in order(items)}
    by_key.update(sizes or {})
    leave = leave or {}
    tasks = [
        _Task(reference, deque(k for k, label in by_key.items() if label.id not in leave.get(reference, ())))
        for reference in references
    ]
    active: dict[Connection, _Worker] = {}
    leaving: list[_Worker] = []
    try:
        while True:
            while len(active) < max(1, jobs):
                task = _next_task(tasks, [worker.task for worker in active.values()])
                if task is None:
                    break
                worker = _Worker(task, limit, probe, plan, backwards=any(w.task is task for w in active.values()))
                active[worker.connection] = worker
            if not active:
                deadline = Deadline(LEAVE)
                for worker in leaving:
                    worker.process.death(deadline.left)
                return
            for worker in active.values():
                worker.end_if_late()
            for ready in wait(list(active), timeout=POLL):
                worker = active[cast(Connection, ready)]
                outcomes = worker.receive(by_key)
                if worker.finished:
                    alike = _alike(tasks, [w.task for w in active.values()], worker.task)
                    if alike is None or worker.gone or worker.late or worker.seconds > YOUNG:
                        worker.leave()
                        leaving.append(active.pop(worker.connection))
                    else:
                        worker.begin(alike)
                for outcome in outcomes:
                    yield outcome
                    if stop_early and outcome.failed:
                        return
    finally:
        end_all(worker.process for worker in (*active.values(), *leaving))


def _label(item: Item) -> Label:
    return Label(item.case.id, item.stage, item.variant.name, item.variant.x, item.case.dialect)


@dataclass
class _Task:
    """One implementation and the items that it still has to run."""

    reference: str
    queue: deque[Key]
    ran: int = 0
    seconds: float = 0.0
    """Of the items that ran, with all that they took."""
    claims_known: bool = False
    """Whether what isn't claimed has been taken out of the queue."""

    @property
    def left(self) -> float:
        """Seconds of work left, by the pace so far; 0 where it isn't known yet."""
        return self.seconds / self.ran * len(self.queue) if self.ran else 0.0


def _next_task(tasks: list[_Task], running: list[_Task]) -> _Task | None:
    """The first that has no worker; then the one with most to do, where a second worker pays."""
    idle = _idle(tasks, running)
    if idle:
        # One for which a running process has imported what it needs had better wait for that process.
        unlike = (task for task in idle if not any(together(task.reference, other.reference) for other in running))
        return next(unlike, idle[0])
    longest = max((task for task in tasks if task.queue), key=lambda task: task.left, default=None)
    return longest if longest and longest.left > SHARED else None


def _idle(tasks: list[_Task], running: list[_Task]) -> list[_Task]:
    """The tasks that have no worker, and items left."""
    return [task for task in tasks if task.queue and not any(task is other for other in running)]


def _alike(tasks: list[_Task], running: list[_Task], last: _Task) -> _Task | None:
    """A task without a worker that a process may go on with after its last one."""
    return next((t for t in _idle(tasks, running) if together(last.reference, t.reference)), None)


class _Worker:
    """A process that runs an implementation, an item at a time, from either end of the task's queue."""

    finished: bool
    """Whether its task has nothing more to do; known after each `receive`."""

    def __init__(self, task: _Task, limit: float, probe: bool, plan: Plan | None, backwards: bool):
        self.limit, self.probe, self.plan = limit, probe, plan
        self.late = self.gone = False
        self.seconds = 0.0  # of all items that it ran
        self.process = PythonChild("conformance.judge.worker:work")
        self.begin(task, backwards)

    def begin(self, task: _Task, backwards: bool = False) -> None:
        """Hands the process an implementation, its first or another one after it."""
        self.task, self.backwards = task, backwards
        self.deadline = Deadline(self.limit + GRACE)
        self.name = task.reference
        self.current: Key | None = None
        self.mode = ""
        self.process.send(Begin(task.reference, self.limit, self.probe, self.plan))

    def leave(self) -> None:
        """Lets a process go that has no more to do."""
        if not self.gone:
            self.process.send(None)

    @property
    def connection(self) -> Connection:
        return self.process.connection

    def receive(self, labels: Mapping[Key, Label]) -> list[Outcome]:
        """Takes what the process sent and hands it its next item; before the first the whole queue, to say its claims.

        So the items that aren't claimed are known at once, and what is left is what will run.
        """
        try:
            kind, content = self.process.receive()
        except EOFError:
            return [self._died(labels)]
        if kind == "setup":
            raise SetupError(content)
        if kind == "case":
            raise CaseError(content)
        self.finished = False
        if kind == "mode":
            self.mode = content
            return []
        outcomes, self.mode = list[Outcome](), ""
        if kind == "ready":
            self.name = content
            if not self.task.claims_known:
                self.task.claims_known = True
                self.process.send(list(self.task.queue))
                return []
        elif kind == "unclaimed":
            skipped: dict[Key, Outcome] = content
            self.task.queue = deque(key for key in self.task.queue if key not in skipped)
            outcomes = [self._labelled(outcome, labels[key]) for key, outcome in skipped.items()]
        else:
            assert self.current is not None
            outcomes = [self._labelled(content, labels[self.current])]
            self.task.ran += 1
            self.task.seconds += content.whole
            self.seconds += content.whole
        queue = self.task.queue
        self.current = (queue.pop() if self.backwards else queue.popleft()) if queue else None
        self.deadline = Deadline(self.limit + GRACE)
        self.finished = self.current is None
        if not self.finished:
            self.process.send(self.current)
        return outcomes

    def _labelled(self, outcome: Outcome, label: Label) -> Outcome:
        outcome.reference, outcome.asked = self.task.reference, label.id
        return outcome

    def end_if_late(self) -> None:
        """Ends the process where its item takes longer than the limit; `receive` then finds it dead."""
        if self.current is not None and not self.late and not self.deadline.left:
            self.late = True
            self.process.end()

    def _died(self, labels: Mapping[Key, Label]) -> Outcome:
        self.finished = self.gone = True
        death = self.process.death(LEAVE)
        status = death.status if death else "unknown"
        if self.current is None:
            raise SetupError(f"{self.name}: its process died with status {status} outside any case")
        label = labels[self.current]
        message = f"the process died with status {status}"
        if self.late:
            message = f"no result within {self.limit + GRACE:g} s: its process was ended"
        return Outcome(
            self.name, label.case, label.stage, label.variant, label.x, label.dialect,
            [Check("-", "errored", np.inf, message=message, mode=self.mode)], reference=self.task.reference,
            asked=label.id,
        )  # fmt: skip
