"""Writing to what isn't a file: a terminal, ``/dev/null``, a pipe, a descriptor of this process."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import stat
import sys
from collections.abc import Generator
from pathlib import Path

DESCRIPTOR = re.compile(r"/(?:dev/fd|proc/(?:self|thread-self|\d+)(?:/task/\d+)?/fd)/(\d{1,9})")
MOST_LINKS = 40
"""Links that lead to one another, as many as the system follows."""
PIECE = 4096
"""Bytes that a pipe takes at once, or says that it doesn't (PIPE_BUF)."""
PATIENCE = 10.0
"""Seconds in which the other end of a pipe must take something."""


def named(mode: int) -> str:
    """What a path is that isn't a file, by its mode."""
    kinds = {
        stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a block device",
        stat.S_IFSOCK: "a socket",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else than a file")


def leads_elsewhere(path: Path) -> bool:
    """Whether a path stands for something that is neither a file nor a directory, or for a descriptor.

    A path that leads nowhere yet is one of a file.
    """
    if descriptor_of(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # who writes there is told
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def descriptor_of(path: Path) -> int | None:
    """The number of this process's descriptor that a path leads to, as ``/dev/stdout`` does; None where to none."""
    text = os.path.abspath(path)
    for _ in range(MOST_LINKS):
        match = DESCRIPTOR.fullmatch(text)
        if match and _is_own(text):
            return int(match[1])
        try:
            link = os.readlink(text)
        except (OSError, ValueError):
            return None
        text = os.path.normpath(os.path.join(os.path.dirname(text), link))
    return None


def _is_own(text: str) -> bool:
    """Whether the descriptors in this folder are those of this process."""
    folder = os.path.realpath(os.path.dirname(text))
    return folder in (os.path.realpath("/proc/self/fd"), os.path.realpath("/dev/fd"))


@contextlib.contextmanager
def opened(path: Path) -> Generator[int]:
    """A descriptor to write to, opened before anything is made for it.

    Raises:
        OSError: it can't be written to: a pipe that nobody reads, a disk, a socket.
    """
    number = descriptor_of(path)
    if number is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # what was printed before comes before
        descriptor = os.dup(number)
    else:
        descriptor = _opened(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    mode = os.stat(path).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise OSError(errno.EINVAL, f"it is {named(mode)}, and no file is written there", str(path))
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO and stat.S_ISFIFO(mode):
            raise OSError(errno.ENXIO, "it is a pipe that nobody reads", str(path)) from error
        raise


def pour(descriptor: int, content: bytes, place: str) -> None:
    """Writes all of a content, a piece whenever the other end takes one.

    Args:
        place: the path, for the error.

    Raises:
        OSError: it can't be written, or nothing was taken for `PATIENCE` seconds.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    rest = memoryview(content)
    while rest:
        if not poll.poll(PATIENCE * 1000):
            raise OSError(errno.ETIMEDOUT, f"nobody took anything from it for {PATIENCE:g} s", place)
        with contextlib.suppress(BlockingIOError):
            rest = rest[os.write(descriptor, rest[:PIECE]) :]
