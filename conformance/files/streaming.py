"""A file that is written as its content comes, or what stands for one: a device, a pipe, a descriptor."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from conformance.files import through


class Stream:
    """Takes texts one after the other, and hands each to the system at once.

    A link is followed. A device, a pipe and a descriptor of this process (``/dev/stdout``) are written through.

    Args:
        more: whether what the file has stays, and the texts come after it.

    Raises:
        OSError: it can't be written: a directory, a pipe that nobody reads.
    """

    def __init__(self, path: Path, more: bool = False):
        self._place = str(path)
        self._stack = contextlib.ExitStack()
        if through.leads_elsewhere(path):
            self._descriptor = self._stack.enter_context(through.opened(path))
        else:
            self._descriptor = _opened(path, more)
            self._stack.callback(os.close, self._descriptor)

    def write(self, text: str) -> None:
        """Hands over all of a text.

        Raises:
            OSError: it can't be written, or nothing was taken of it for `through.PATIENCE` seconds.
        """
        through.pour(self._descriptor, text.encode(errors="replace"), self._place)

    def close(self) -> None:
        """Ends it; a second time does nothing."""
        self._stack.close()


def _opened(path: Path, more: bool) -> int:
    """The descriptor of a file. One that has become a pipe meanwhile is not waited for, and not written."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (os.O_APPEND if more else 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except ValueError as error:  # a NUL or half a character in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EEXIST, f"it is {through.named(mode)} by now", str(path))
        if not more:
            os.ftruncate(descriptor, 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
