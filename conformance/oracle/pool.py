"""A pool of processes that never outlives the process it works for, however that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import pool, resource_tracker
from multiprocessing.connection import wait


@contextlib.contextmanager
def processes(jobs: int) -> Iterator[pool.Pool]:
    """Processes for tasks in Python, whose calls of native code are short.

    Ctrl-C reaches the parent alone, which ends them.
    """
    resource_tracker.ensure_running()  # its own start would let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits it
    try:
        workers = multiprocessing.get_context("spawn").Pool(jobs, _end_with_parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with workers:
        yield workers


def _end_with_parent() -> None:
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    """Without it a worker of a killed parent goes on until its task ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
