"""A worker process of the runner: it sets one implementation up and runs the items that it is handed, one at a time."""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from conformance.cases.case import Case, CaseError
from conformance.files.plain import name_of
from conformance.interface import SetupError
from conformance.judge.guard import Guard
from conformance.judge.item import run_item

COLLECTED = 32  # items between two collections of garbage
ELSEWHERE = {"sizes:": "conformance.questions.sizes.judging"}
"""Modules that put items which aren't cases of a file, by how their keys begin."""


def work(connection: Connection) -> None:
    """Takes (reference, limit, probe, plan), says that it is ready, then judges items until it is handed none.

    It sends ``("ready", name)``, then ``("done", outcome)`` for each item, and before it ``("mode", names)`` for each
    further call, so that it is known where the process died. After ``("setup", reason)`` or
    ``("case", reason)`` it sends nothing more.
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
    gc.disable()  # tracing makes millions of small objects: a fifth of the time went into looking at them
    gc.freeze()
    connection.send(("ready", name_of(implementation.name)))
    cases: dict[str, Case] = {}
    for count in itertools.count(1):
        key = connection.recv()
        if key is None:
            return
        path, stage, variant = key
        began = time.perf_counter()
        try:
            module = next((module for scheme, module in ELSEWHERE.items() if path.startswith(scheme)), None)
            if module is not None:
                outcome = importlib.import_module(module).put(implementation, key)
            else:
                case = cases.get(path) or cases.setdefault(path, guard.read(Path(path)))
                item = next(i for i in case.items() if i.stage == stage and i.variant.name == variant)
                outcome = run_item(implementation, item, probe, plan)
            guard.tell(outcome, path)
            outcome.whole = time.perf_counter() - began
            connection.send(("done", outcome))
        except CaseError as error:
            connection.send(("case", str(error)))
            return
        if count % COLLECTED == 0:
            gc.collect()


def _announce(connection: Connection, mode: str) -> None:
    connection.send(("mode", mode))
