"""Runs items on implementations in worker processes and collects their verdicts."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conformance.cases import CaseError, Item, load_case
from conformance.compare import GOOD, Check, check_item
from conformance.interface import Capabilities, SetupError, describe
from conformance.registry import load
from conformance.stochasticity import check_stochasticity

POLL = 0.5  # seconds between looks at whether a worker still lives


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
    device: str = ""
    seconds: float = 0.0
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """The arrays that were judged by their figures, for comparing implementations with one another."""

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
    if case.dialect not in claimed.dialects:
        return f"dialect {case.dialect} not claimed"
    if variant.x not in claimed.dtypes:
        return f"{variant.x} not claimed"
    wide = "float64" if variant.x == "float64" else "float32"
    kind = "float32" if variant.weights in (wide, "float32") else "x"
    if case.stages[item.stage]["weights"] and kind not in claimed.weights:
        return f"weights in {variant.weights} not claimed"
    if "tf32" in claimed.contracts and variant.name + "-tf32" in case.bounds[item.stage]:
        return "judged by the tf32 contract instead"
    if variant.contract not in claimed.contracts:
        return f"contract {variant.contract} not claimed"
    if claimed.streams is not None and case.parameters["streams"] not in claimed.streams:
        return f"{case.parameters['streams']} streams not claimed"
    if not claimed.empty and not all(case.tensors[f"input/{k}"].size for k in case.stages[item.stage]["inputs"]):
        return "zero tokens not claimed"
    if claimed.overrides is not None and not set(case.overrides) <= claimed.overrides:
        return f"other values of {', '.join(sorted(set(case.overrides) - claimed.overrides))} not claimed"
    return ""


def run_item(implementation: Any, item: Item) -> Outcome:
    """One call, judged. Never raises for what the implementation does."""
    outcome = Outcome(
        implementation.name, item.case.id, item.stage, item.variant.name, item.variant.x, item.case.dialect
    )
    claimed = implementation.capabilities
    outcome.device = claimed.device
    outcome.skipped = refusal(item, claimed)
    if outcome.skipped:
        return outcome
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
        return outcome
    except Exception as error:
        outcome.checks.append(Check("-", "errored", np.inf, message=describe(error)[:500]))
        return outcome
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
    return outcome


def order(items: Iterable[Item]) -> list[Item]:
    """Items that compile to the same graph next to one another."""
    return sorted(items, key=lambda i: (i.stage, str(sorted(i.config.items(), key=str)), i.variant.name, i.case.id))


def _work(reference: str, paths: list[str], wanted: list[tuple[int, str, str]], results: Any) -> None:
    """A worker: announces each item before it is run, so that its death can be laid at the right door."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        implementation = load(reference)
    except SetupError as error:
        results.send(("setup", str(error)))
        return
    results.send(("ready", implementation.name))
    cases: dict[str, Any] = {}
    for index, stage, variant in wanted:
        path = paths[index]
        try:
            case = cases.get(path) or cases.setdefault(path, load_case(Path(path)))
            item = next(i for i in case.items() if i.stage == stage and i.variant.name == variant)
            results.send(("start", (index, stage, variant)))
            results.send(("done", run_item(implementation, item)))
        except CaseError as error:
            results.send(("case", str(error)))
            return
    results.send(("end", None))


def run(references: Sequence[str], items: Sequence[Item], jobs: int = 2, stop_early: bool = False) -> Iterator[Outcome]:
    """Outcomes of every implementation and item, as they come.

    Args:
        references: registered names or ``module:attribute``.
        jobs: workers at a time, one implementation each.
        stop_early: stop at the first failure.

    Raises:
        SetupError: an implementation can't be set up.
        CaseError: a case file doesn't keep the format.
    """
    paths = sorted({str(item.case.path) for item in items})
    index = {path: k for k, path in enumerate(paths)}
    ordered = [(index[str(i.case.path)], i.stage, i.variant.name) for i in order(items)]
    by_key = {(index[str(i.case.path)], i.stage, i.variant.name): i for i in items}
    context = multiprocessing.get_context("spawn")
    waiting = [(reference, ordered) for reference in references]
    active: list[_Worker] = []
    try:
        while waiting or active:
            while waiting and len(active) < max(1, jobs):
                reference, remaining = waiting.pop(0)
                active.append(_Worker(context, reference, paths, remaining))
            for worker in list(active):
                for outcome in worker.collect(by_key, POLL / len(active)):
                    yield outcome
                    if stop_early and outcome.failed:
                        return
                if worker.finished:
                    active.remove(worker)
                    if worker.remaining:
                        waiting.insert(0, (worker.reference, worker.remaining))
    finally:
        for worker in active:
            worker.process.kill()


class _Worker:
    """A process that runs one implementation over the items that remain."""

    def __init__(self, context: Any, reference: str, paths: list[str], remaining: list[tuple[int, str, str]]):
        self.reference, self.remaining = reference, list(remaining)
        self.name = reference
        self.current: tuple[int, str, str] | None = None
        self.finished = False
        # A pipe, not a queue: what was sent is there even when the process dies in the next instruction.
        self.results, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(reference, paths, self.remaining, sender), daemon=True)
        self.process.start()
        sender.close()

    def collect(self, items: dict[Any, Item], timeout: float) -> Iterator[Outcome]:
        while True:
            if not self.results.poll(timeout):
                return
            try:
                kind, content = self.results.recv()
            except EOFError:
                self.process.join()
                yield from self._died(items)
                return
            if kind == "setup":
                raise SetupError(content)
            if kind == "case":
                raise CaseError(content)
            if kind == "ready":
                self.name = content
            elif kind == "start":
                self.current = content
            elif kind == "done":
                if self.current is not None:
                    self.remaining.remove(self.current)
                self.current = None
                yield content
            else:
                self.finished = True
                self.process.join()
                return

    def _died(self, items: dict[Any, Item]) -> Iterator[Outcome]:
        self.finished = True
        if self.current is None:
            raise SetupError(f"{self.reference}: its process died with status {self.process.exitcode} outside any case")
        self.remaining.remove(self.current)
        item = items[self.current]
        message = f"the process died with status {self.process.exitcode}"
        yield Outcome(
            self.name, item.case.id, item.stage, item.variant.name, item.variant.x, item.case.dialect,
            [Check("-", "errored", np.inf, message=message)],
        )  # fmt: skip
