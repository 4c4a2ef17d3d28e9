"""Removes the temporary folders of a process that is gone: ``python janitor.py PARENT``, started by `temporary`.

It reads ``+folder`` and ``-folder``, each with a NUL behind it, on standard input. When that is closed, or the parent
has become another one, it removes the folders that it was told of. It imports nothing that takes time.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time

POLL = 1.0  # seconds between looks at the parent, should a copy of the other end have outlived it
TRIES, PAUSE = 20, 0.25  # processes that are being killed may still write into a folder


def heard(parent: int) -> set[str]:
    """The folders that are there when the parent is gone."""
    folders: set[str] = set()
    rest = b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    gone = False
    while not gone:
        gone = os.getppid() != parent  # looked at first: what it said before it went is still to be heard
        if not poll.poll(0 if gone else POLL * 1000):
            continue
        gone = False
        words = os.read(0, 1 << 16)
        if not words:
            break
        *lines, rest = (rest + words).split(b"\0")
        for line in lines:
            (folders.add if line[:1] == b"+" else folders.discard)(os.fsdecode(line[1:]))
    return folders


def main(parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who ends the parent needn't spare this process
    left = heard(parent)
    for _ in range(TRIES):
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        left = {folder for folder in left if os.path.lexists(folder)}
        if not left:
            return
        time.sleep(PAUSE)


if __name__ == "__main__":
    main(int(sys.argv[1]))
