"""A child process that can be lost without harm: it is ended with everything that it started, and says how it ended.

A `Child` is a command under a small program of ours (`supervisor`), which ends it when this process drops the child, or
is gone itself, even when it was killed. A `PythonChild` calls a function of ours in a new interpreter and talks to it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from conformance.files import temporary
from conformance.implementations.wire import Wire

SUPERVISOR = Path(__file__).with_name("supervisor.py")
START = 60.0  # seconds for the supervisor to start the command; alone it takes 0.03
PATIENCE = 10.0  # seconds for a supervisor to end everything, before it is killed itself
LONGEST_WORD = 200  # characters of a last line that are shown


DIRTY = {"MALLOC_PERTURB_": "128"}
"""glibc fills memory with large numbers when it is allocated, so that an element that nobody writes shows."""


class Deadline:
    """A moment so many seconds from now."""

    def __init__(self, seconds: float):
        self._moment = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then, 0 after it."""
        return max(0.0, self._moment - time.monotonic())

    def advance(self, seconds: float) -> None:
        """The deadline comes at the latest so many seconds from now."""
        self._moment = min(self._moment, time.monotonic() + seconds)


@dataclass(frozen=True)
class Death:
    """How a child ended.

    Attributes:
        status: its exit status, negative for the signal that killed it.
        said: the last line of the streams that were kept.
    """

    status: int
    said: str = ""

    @property
    def how(self) -> str:
        """For instance ``ended with status 3`` or ``died of SIGSEGV``."""
        if self.status >= 0:
            return f"ended with status {self.status}"
        try:
            return f"died of {signal.Signals(-self.status).name}"
        except ValueError:  # a real-time signal
            return f"died of signal {-self.status}"

    def __str__(self) -> str:
        return self.told()

    def told(self, more: str = "") -> str:
        """How it ended, more about it, and the last line."""
        return f"{self.how}{more}{': ' + self.said if self.said else ''}"


class Child:
    """Starts a command.

    Args:
        command: the program and its arguments.
        stdin, stdout: as `subprocess.Popen` takes them.
        kept: the streams whose last line belongs to the death notice: ``2``, or ``12`` for standard output too. What
            isn't kept, and isn't redirected, goes where this process writes.
        passed: descriptors that the command has too, under the same numbers.
        environment: of the command; this process's where none is given.
        largest: bytes of the largest file that it may write; 0 for any.

    Attributes:
        pid: the process id of the command.
        stdin, stdout: this process's ends, where they are pipes.

    Raises:
        OSError: the command can't be started.
    """

    stdin: IO[bytes] | None
    stdout: IO[bytes] | None

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = None,
        kept: str = "",
        passed: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        largest: int = 0,
    ):
        self._owner = os.getpid()
        self._heard, self._over = b"", False
        self._channel, theirs = socket.socketpair()
        with theirs:
            told = (theirs.fileno(), self._owner, kept, largest, ",".join(map(str, passed)))
            self._supervisor = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", str(SUPERVISOR), *map(str, told), *command],
                stdin=stdin, stdout=stdout, bufsize=0, env=environment, start_new_session=True,
                pass_fds=(theirs.fileno(), *passed),
            )  # fmt: skip
        self.stdin, self.stdout = self._supervisor.stdin, self._supervisor.stdout
        try:
            self.pid = self._started(command[0])
        except BaseException:
            self.end()
            raise

    def _started(self, program: str) -> int:
        deadline = Deadline(START)
        while b"\n" not in self._heard:
            if self._over or not self._hear(deadline):
                raise OSError(f"{program}: its supervisor ended, or didn't start it within {START:g} s")
        line, _, self._heard = self._heard.partition(b"\n")
        kind, number = line.split()
        if kind == b"failed":
            raise OSError(int(number), os.strerror(int(number)), program)
        return int(number)

    def _hear(self, deadline: Deadline) -> bool:
        """Takes what the supervisor says next, or that it says no more; false where it does neither until then."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not poll.poll(deadline.left * 1000):
            return False
        words = b""
        with contextlib.suppress(ConnectionError):
            words = self._channel.recv(1 << 12)
        self._heard += words
        self._over = not words
        return True

    def death(self, seconds: float) -> Death | None:
        """How it ended, which takes a moment to be known; None where it still lives after so many seconds."""
        deadline = Deadline(seconds)
        while not self._over:
            if not self._hear(deadline):
                return None
        line, _, words = self._heard.partition(b"\n")
        kind, _, status = line.partition(b" ")
        whole = kind == b"ended" and status != b"None"
        lines = words.decode(errors="replace").strip().splitlines()
        # without the notice the supervisor was killed, and the command with it
        return Death(int(status) if whole else -signal.SIGKILL, lines[-1][:LONGEST_WORD] if lines else "")

    def end(self) -> None:
        """Kills it and everything that it started, and returns when they are gone."""
        end_all([self])

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    def _join(self) -> None:
        if self._channel.fileno() < 0:
            return
        try:
            self._supervisor.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        self.death(0.0)
        self._over = True
        self._channel.close()
        for stream in (self.stdin, self.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __del__(self) -> None:
        # not in a copy that was forked off; where the interpreter ends, so does the child
        if hasattr(self, "_supervisor") and self._owner == os.getpid() and not sys.is_finalizing():
            self.end()


def end_all(children: Iterable[Child]) -> None:
    """Ends several at the same time."""
    children = list(children)
    for child in children:
        child._hang_up()
    for child in children:
        child._join()


ROOT = Path(__file__).parents[2]
BEGINNING = f"import sys; sys.path[0] = {str(ROOT)!r}; from {__name__} import answer; answer()"


class PythonChild(Child):
    """Calls a function in a new interpreter, which has this one's module path, with a connection to this process.

    Args:
        target: ``module:function``.
        kept, environment: as for `Child`.

    Attributes:
        connection: this process's end, for `multiprocessing.connection.wait`.
    """

    def __init__(self, target: str, *, kept: str = "", environment: Mapping[str, str] | None = None):
        ours, theirs = socket.socketpair()
        self.connection = Wire(ours.detach())
        with theirs:
            command = [sys.executable, "-c", BEGINNING, str(theirs.fileno()), target]
            super().__init__(
                command, kept=kept, passed=(theirs.fileno(),), environment=temporary.environment(environment)
            )
        self.send([entry or os.getcwd() for entry in sys.path])

    def send(self, message: Any) -> None:
        """Hands it a message; where it has died, receiving says so."""
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)

    def receive(self) -> Any:
        """Waits for the next message.

        Raises:
            EOFError: it has died, or hung up.
        """
        try:
            return self.connection.recv()
        except OSError as error:  # in the middle of a message
            raise EOFError from error


def answer() -> None:
    """The other side of a `PythonChild`."""
    connection, target = Wire(int(sys.argv[1])), sys.argv[2]
    with contextlib.suppress(EOFError, ConnectionError):  # the other process is gone, and this one is about to be
        sys.path[:] = connection.recv()
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(connection)
    _leave()


def _leave() -> NoReturn:
    """Ends this process without taking the interpreter apart, which takes a second, and in which libraries complain.

    Where PyTorch has compiled, Triton's bindings list some 600 objects of their own as leaked, on the user's terminal.
    What was registered with `atexit` is called.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)
