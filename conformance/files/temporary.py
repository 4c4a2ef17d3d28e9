"""Temporary folders that go with this process, however it ends.

A process that is killed can't remove what it made. So another one does it (`janitor`), which hears of each folder and
notices when this process is gone. The processes of workers make their folders inside of one of their parent's, which
they are told of in `VARIABLE`: they are killed together with everything that they started.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path

VARIABLE = "MHC_CONFORMANCE_TEMPORARY"
"""The folder in which a process makes its temporary ones."""
PREFIX = "mhc-conformance-"
JANITOR = Path(__file__).with_name("janitor.py")
PATIENCE = 5.0  # seconds for the janitor to end


class _Janitor:
    """The process that removes what this one leaves."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(JANITOR), str(self.owner)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._folders: set[Path] = set()
        atexit.register(self._leave)

    def tell(self, sign: str, folder: Path) -> None:
        """That a folder is there (``+``), or is no longer its business (``-``)."""
        (self._folders.add if sign == "+" else self._folders.discard)(folder)
        with contextlib.suppress(OSError):  # it was killed: the folders are removed by this process alone
            assert self._process.stdin
            self._process.stdin.write(sign.encode() + os.fsencode(folder) + b"\0")
            self._process.stdin.flush()

    def _leave(self) -> None:
        if self.owner != os.getpid():  # a copy that was forked off
            return
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=PATIENCE)


_janitors: list[_Janitor] = []


def _janitor() -> _Janitor:
    if not _janitors or _janitors[0].owner != os.getpid():
        _janitors[:] = [_Janitor()]
    return _janitors[0]


def folder() -> Path:
    """A new temporary folder, which goes when this process ends, unless it is kept."""
    above = os.environ.get(VARIABLE)
    if above and os.path.isdir(above):
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=above))
    made = Path(tempfile.mkdtemp(prefix=PREFIX))
    _janitor().tell("+", made)
    return made


_shared: dict[int, Path] = {}


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that this one may kill, with a folder for its temporary ones.

    Args:
        given: the rest of it; this process's own where there is none.
    """
    if os.getpid() not in _shared or not _shared[os.getpid()].is_dir():
        _shared[os.getpid()] = folder()
    return {**(os.environ if given is None else given), VARIABLE: str(_shared[os.getpid()])}


def keep(path: Path) -> None:
    """From now on a folder stays where it is."""
    if VARIABLE not in os.environ:
        _janitor().tell("-", path)


def remove(path: Path) -> None:
    """Removes a folder of `folder` before the process ends."""
    shutil.rmtree(path, ignore_errors=True)
    if VARIABLE not in os.environ and _janitors and _janitors[0].owner == os.getpid():
        _janitors[0].tell("-", path)


@contextlib.contextmanager
def within() -> Generator[Path]:
    """A temporary folder for a block."""
    made = folder()
    try:
        yield made
    finally:
        remove(made)
