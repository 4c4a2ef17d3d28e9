"""Runs one command and ends it, with everything that it started, as soon as nobody waits for it any more.

``python supervisor.py SOCKET PARENT KEPT LARGEST PASSED command…`` is started by `child.Child`, which holds the other
end of the socket: SOCKET is its number here, PARENT the process that holds it, KEPT the streams of the command whose
last words are reported (``12`` for both, or none), LARGEST the size of the largest file that it may write (0 for any),
and PASSED the descriptors that are for the command alone (``7,8``).

It answers ``started PID`` or ``failed ERRNO``, and ``ended STATUS`` followed by the last words. When the socket is
closed, however that comes, the command and all its descendants are killed. On Linux descendants are found in other
process groups too; elsewhere the command's own group is ended.

Each program costs one start of this file: it imports nothing that takes time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

NULL_DEVICE = os.devnull
LAST_WORDS = 2000  # bytes that are kept of a stream
POLL = 1.0  # seconds between looks at the parent, should a copy of the socket's other end have outlived it
PATIENCE = 5.0  # seconds for killed processes to go; one that the kernel holds can't be waited for
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def prctl(option: int, value: int) -> None:
    """Linux alone has it."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Supervisor:
    """The parent's end of the socket, the command, and the last words of its streams."""

    def __init__(self, channel: int, parent: int):
        self.channel, self.parent = channel, parent
        self.command = 0
        self.status: int | None = None
        self.streams: list[int] = []
        self.said = b""
        self.told: list[int] = []  # signals that ask this process to end
        self.awake, waker = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(self.awake, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: self.told.append(number))

    def start(self, command: list[str], kept: str, largest: int, passed: list[int]) -> int:
        """Starts the command in a session of its own; 0, or the number of the error."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        os.set_inheritable(self.channel, False)
        pipes = {int(stream): os.pipe() for stream in kept[:1]}
        failed, failure = os.pipe()
        self.command = os.fork()
        if not self.command:
            code = 1
            try:
                os.setsid()
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                for stream in kept:
                    os.dup2(pipes[int(kept[0])][1], int(stream))
                _limit(largest)
                for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
                    signal.signal(number, signal.SIG_DFL)
                os.execvp(command[0], command)
            except OSError as error:
                code = error.errno or 1
            finally:
                os.write(failure, str(code).encode())
                os._exit(127)
        for _, end in pipes.values():
            os.close(end)
        os.close(failure)
        null = os.open(NULL_DEVICE, os.O_RDWR)
        for descriptor in (0, 1, 2):  # what the command closes must be closed
            os.dup2(null, descriptor)
        for descriptor in passed:
            os.close(descriptor)
        self.streams = [end for end, _ in pipes.values()]
        for end in self.streams:
            os.set_blocking(end, False)
        return int(os.read(failed, 16) or 0)

    def tell(self, line: str, more: bytes = b"") -> None:
        """Says it to the parent; where it is gone, the next look at the socket says so."""
        with contextlib.suppress(OSError):
            os.write(self.channel, line.encode() + more)

    def watch(self) -> None:
        """Returns when the command has ended or nobody waits for it."""
        poll = select.poll()
        for descriptor in (self.channel, self.awake, *self.streams):
            poll.register(descriptor, select.POLLIN)
        while self.status is None and not self.told and os.getppid() == self.parent:
            ready = {descriptor for descriptor, _ in poll.poll(POLL * 1000)}
            if self.awake in ready:
                os.read(self.awake, 4096)
            for stream in self.listen():
                poll.unregister(stream)
            self.reap()
            if self.channel in ready:
                return

    def listen(self) -> list[int]:
        """Takes what the streams hold, and keeps the end of it; returns the streams that have been closed."""
        closed = []
        for stream in self.streams:
            try:
                while words := os.read(stream, 1 << 16):
                    self.said = (self.said + words)[-LAST_WORDS:]
                closed.append(stream)
            except BlockingIOError:
                continue
        self.streams = [stream for stream in self.streams if stream not in closed]
        return closed

    def reap(self) -> bool:
        """Takes leave of children that have ended, also adopted ones; whether any is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return True
                if pid == self.command:
                    self.status = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            return False

    def end(self) -> None:
        """Kills the command's group and all descendants, also those that are started meanwhile."""
        with contextlib.suppress(OSError):  # the group is empty
            os.killpg(self.command, signal.SIGKILL)
        until = time.monotonic() + PATIENCE
        while self.reap() and time.monotonic() < until:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        self.listen()


def _limit(largest: int) -> None:
    if largest:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def descendants(root: int) -> set[int]:
    """Living processes that descend from this one; none where the system has no ``/proc``."""
    parents: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:  # it has ended
                continue
            if state not in (b"Z", b"X"):
                parents[int(name)] = int(parent)
    family: set[int] = set()
    generation = {root}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        family |= generation
    return family


def main(channel: str, parent: str, kept: str, largest: str, passed: str, *command: str) -> None:
    supervisor = Supervisor(int(channel), int(parent))
    code = supervisor.start(list(command), kept, int(largest), [int(number) for number in passed.split(",") if number])
    supervisor.tell(f"failed {code}\n" if code else f"started {supervisor.command}\n")
    if not code:
        supervisor.watch()
    supervisor.end()
    supervisor.tell(f"ended {supervisor.status}\n", supervisor.said)


if __name__ == "__main__":
    main(*sys.argv[1:])
