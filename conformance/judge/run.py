"""Runs items on implementations in worker processes and collects their verdicts."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import shlex
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np

from conformance.cases.case import Case, CaseError, Item, load_case
from conformance.cases.corpus import is_golden
from conformance.implementations.registry import load
from conformance.interface import Capabilities, SetupError, describe
from conformance.judge.rule import GOOD, Check, check_item
from conformance.judge.stochasticity import check_stochasticity
from conformance.stages import relevant

POLL = 0.5  # seconds between looks at whether a second worker pays by now
SHARED = 20.0  # seconds of work left from which it does
GRACE = 10.0  # seconds by which an implementation's own time limit comes first
COLLECTED = 32  # items between two collections of garbage


@dataclass
class Outcome:
    """What one implementation did with one item."""

    implementation: str
    case: str
    stage: str
    variant: str
    x: str
    dialect: str
    checks: list[Check] = field(default_factory=list)
    skipped: str = ""
    reference: str = ""
    """What ``--impl`` was given: a registered name or ``module:attribute``."""
    file: str = ""
    """The case's file where it isn't one of the corpus."""
    about: dict[str, Any] = field(default_factory=dict)
    """The implementation's device, description and settings, read in the process that ran it."""
    seconds: float = 0.0
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """The arrays that were judged by their figures, for comparing implementations with one another."""

    @property
    def reproduce(self) -> str:
        """One command that runs this item alone."""
        return (
            f"mhc-conformance run --impl {shlex.quote(self.reference or self.implementation)} "
            f"--case {shlex.quote(self.file or self.case)} "
            f"--stage {self.stage} --dtype {self.x}"
        )

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.verdict not in GOOD]

    @property
    def ratio(self) -> float:
        return max((check.ratio for check in self.checks), default=0.0)


def refusal(item: Item, claimed: Capabilities) -> str:
    """Why an item isn't claimed; empty where it is."""
    case, variant = item.case, item.variant
    if item.stage not in claimed.stages:
        return f"stage {item.stage} not claimed"
    if case.dialect not in claimed.dialects and not (case.unpublished and claimed.overrides is None):
        return f"dialect {case.dialect} not claimed"
    if variant.x not in claimed.dtypes_of(item.stage):
        return f"{variant.x} not claimed"
    wide = "float64" if variant.x == "float64" else "float32"
    kind = "float32" if variant.weights in (wide, "float32") else "x"
    if case.stages[item.stage]["weights"] and kind not in claimed.weights_of(item.stage):
        return f"weights in {variant.weights} not claimed"
    if "tf32" in claimed.contracts and variant.name + "-tf32" in case.bounds[item.stage]:
        return "judged by the tf32 contract instead"
    if variant.contract not in claimed.contracts:
        return f"contract {variant.contract} not claimed"
    if claimed.streams is not None and case.parameters["streams"] not in claimed.streams:
        return f"{case.parameters['streams']} streams not claimed"
    if not claimed.empty and not all(case.tensors[f"input/{k}"].size for k in case.stages[item.stage]["inputs"]):
        return "zero tokens not claimed"
    unclaimed = sorted(k for k, v in case.overrides.items() if not claimed.allows(k, v))
    if unclaimed:
        return f"other values of {', '.join(unclaimed)} not claimed"
    return ""


def run_item(implementation: Any, item: Item, probe: bool = False) -> Outcome:
    """One call, judged. Never raises for what the implementation does.

    Args:
        probe: hand over what isn't claimed too: it must be refused, or come out right.
    """
    outcome = Outcome(
        implementation.name, item.case.id, item.stage, item.variant.name, item.variant.x, item.case.dialect
    )
    if not is_golden(item.case.path):
        outcome.file = str(item.case.path)
    claimed = implementation.capabilities
    outcome.about = {"device": claimed.device, "description": claimed.description, **claimed.settings}
    outcome.skipped = refusal(item, claimed)
    if not outcome.skipped:
        _call(implementation, item, outcome)
    elif probe and item.stage in claimed.stages and item.variant.contract in claimed.contracts:
        _probe(implementation, item, outcome)
    return outcome


def _probe(implementation: Any, item: Item, outcome: Outcome) -> None:
    """What isn't claimed, accepted and wrong, gets a verdict of its own."""
    reason, outcome.skipped = outcome.skipped, ""
    _call(implementation, item, outcome)
    failed, outcome.checks, outcome.values = outcome.failed, [], {}
    if outcome.skipped or any(check.verdict == "errored" for check in failed):
        outcome.skipped = f"{reason}, and refused"
    elif not failed:
        outcome.skipped = f"{reason}, yet right"
    for check in failed if not outcome.skipped else ():
        check.message = f"{reason}, yet accepted: {check.verdict} {check.message}".rstrip()
        check.verdict = "unsupported-not-refused"
        outcome.checks.append(check)


def _call(implementation: Any, item: Item, outcome: Outcome) -> None:
    """Calls the stage and fills in the verdicts."""
    claimed = implementation.capabilities
    inputs, cotangents = item.inputs(), item.cotangents() if claimed.gradients else None
    before = {k: v.tobytes() for k, v in inputs.items()}
    started = time.perf_counter()
    try:
        outputs, gradients = getattr(implementation, item.stage)(inputs, item.config, cotangents)
        if not isinstance(outputs, Mapping) or not isinstance(gradients, Mapping):
            kinds = f"{type(outputs).__name__} and {type(gradients).__name__}"
            raise TypeError(f"expected two mappings, outputs and gradients, got {kinds}")
    except NotImplementedError as error:
        outcome.skipped = f"refused: {describe(error)}"
        return
    except Exception as error:
        outcome.checks.append(Check("-", "errored", np.inf, message=describe(error)[:500]))
        return
    finally:
        outcome.seconds = time.perf_counter() - started
    outcome.checks = check_item(item, outputs, gradients, claimed)
    judged = {**outputs, **{f"d/{k}": v for k, v in gradients.items()}}
    outcome.values = {check.tensor: judged[check.tensor] for check in outcome.checks if check.worst}
    if "H" in outputs:
        stochastic = check_stochasticity(item, outputs["H"])
        if stochastic:
            outcome.checks.append(stochastic)
    changed = [k for k, v in inputs.items() if v.tobytes() != before[k]]
    if changed:
        outcome.checks.append(Check(changed[0], "failed", np.inf, message=f"changed its input {changed[0]}"))


def order(items: Iterable[Item]) -> list[Item]:
    """Items that one compiled graph serves next to one another."""
    return sorted(items, key=lambda i: (i.stage, str(relevant(i.stage, i.config)), i.variant.name, i.case.id))


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
