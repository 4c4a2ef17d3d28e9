"""An implementation that runs on a mesh: as many processes as it needs, which all get every call.

None of them may leave the others waiting: if one ends, fails alone or takes too long, all are ended, the call is an
error that says which, and the next call starts new ones.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any, cast

from conformance.implementations.child import DIRTY, Deadline, PythonChild, end_all
from conformance.implementations.wire import Wire
from conformance.interface import Arrays, Capabilities, Result, SetupError
from conformance.mesh import MARK, Member, Mesh, cropped, filled, refuse_indivisible

SERVE = "conformance.implementations.member:serve"
START = 120.0  # seconds for the processes to meet, each of which imports a framework first
LINGER = 2.0  # seconds in which the others may report the same, or a process end that has hung up


class GroupError(RuntimeError):
    """A process of the group died, failed or took too long."""


class CallError(RuntimeError):
    """All processes failed alike, so that none waits for another: they go on with the next call."""


class GroupImplementation:
    """Starts the processes and hands every call to all of them.

    Args:
        reference: a registered name or ``module:attribute``, which is called with a `Member` in each process.
        mesh: its sizes, and the number of processes.
        processes: how many that is.
        limit: seconds for one call, and at least for the start.

    Raises:
        SetupError: they can't be set up or don't meet.
    """

    def __init__(self, reference: str, mesh: Mesh, processes: int, limit: float):
        self.name = f"{reference}{MARK}{mesh}"
        self._reference, self._mesh, self._count, self._limit = reference, mesh, processes, limit
        self._processes: list[PythonChild] = []
        self.borrowed: list[str] = []
        """Which of our implementations the processes have imported that theirs isn't (`borrowed`)."""
        try:
            self.capabilities: Capabilities = replace(self._start(), copies=True)  # arrays are sent to the processes
        except (GroupError, CallError, NotImplementedError, OSError) as error:
            self._stop()
            raise SetupError(f"{self.name}: {error}") from error

    def call(self, stage: str, inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
        """The stage on all processes (`Implementation.call`)."""
        refuse_indivisible(config, self._mesh)
        if not self._processes:
            self._restart()
        try:
            given, wanted = filled(stage, inputs, cotangents, self._mesh)
            result, self.borrowed = self._exchange((stage, given, config, wanted), f"in {stage}", self._limit)
        except GroupError:
            self._stop()
            raise
        return cropped(result, stage, inputs)

    def _restart(self) -> None:
        """After a call that has ended all of them."""
        try:
            self._start()
        except BaseException:
            self._stop()
            raise

    def _start(self) -> Any:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {"OMP_NUM_THREADS": "1", **DIRTY, **os.environ}
        for _ in range(self._count):
            self._processes.append(PythonChild(SERVE, kept="12", environment=environment))
        for rank, process in enumerate(self._processes):
            process.send((self._reference, Member(self._mesh, rank, self._count, address, self._limit)))
        return self._exchange(None, "while the processes met", max(START, self._limit))

    def _exchange(self, call: Any, when: str, limit: float) -> Any:
        """Sends a call to all and returns what the first answered.

        Raises:
            GroupError: one died, failed alone or took longer than ``limit`` seconds.
            CallError: all failed alike.
            NotImplementedError: all of them refuse.
        """
        for process in self._processes if call is not None else ():
            process.send(call)
        answers: dict[int, tuple[str, Any]] = {}
        deadline = Deadline(limit)
        while len(answers) < self._count:
            waiting = {p.connection: rank for rank, p in enumerate(self._processes) if rank not in answers}
            ready = wait(list(waiting), timeout=deadline.left)
            if not ready:
                problem = self._failure(answers, alone=True)
                late = ", ".join(map(str, waiting.values()))
                raise GroupError(problem or f"no answer {when} from process {late} of {self._count} in {limit:g} s")
            for connection in ready:
                rank = waiting[cast(Wire, connection)]
                try:
                    answers[rank] = self._processes[rank].receive()
                except EOFError:
                    death = self._processes[rank].death(LINGER) or "closed its connection without ending"
                    died = f"process {rank} of {self._count} {death} {when}; the others were ended"
                    also = self._failure(answers)
                    raise GroupError(f"{died} ({also})" if also else died) from None
            if any(kind != "done" for kind, _ in answers.values()):
                deadline.advance(LINGER)
        if all(answer[0] == "error" and answer == answers[0] for answer in answers.values()):
            raise CallError(f"all {self._count} processes: {answers[0][1]}")
        problem = self._failure(answers)
        if problem:
            raise GroupError(problem)
        kind, content = answers[0]
        if kind == "refused":
            raise NotImplementedError(content)
        return content

    def _failure(self, answers: dict[int, tuple[str, Any]], alone: bool = False) -> str:
        """What a process reported, or that they don't agree; ``alone``: others haven't answered."""
        for rank, (kind, content) in sorted(answers.items()):
            if kind == "error":
                return f"process {rank} of {self._count}: {content}"
        refusing = [rank for rank, (kind, _) in sorted(answers.items()) if kind == "refused"]
        if refusing and (alone or len(refusing) < len(answers)):
            return f"process {refusing[0]} of {self._count} refuses, others don't: {answers[refusing[0]][1]}"
        return ""

    def _stop(self) -> None:
        processes, self._processes = self._processes, []
        end_all(processes)

    def __del__(self) -> None:
        if hasattr(self, "_processes"):
            self._stop()
