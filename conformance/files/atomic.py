"""Files and directories that are whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Generator
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write(path: Path, content: bytes | str) -> None:
    """All of the file or none of it.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    with whole(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole(path: Path) -> Generator[Path]:
    """A path beside ``path`` to make a file or a directory at; it takes the place of ``path`` at the end of the block.

    It is synced first. A process that dies leaves ``path`` as it was, and a hidden file beside it.

    Raises:
        OSError: it can't be written, or takes the place of a directory on a file system that can't exchange two of
            them at once; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    _remove(temporary)  # of a process that died and had this number
    try:
        yield temporary
        for part in sorted(temporary.rglob("*")) if temporary.is_dir() else []:
            _sync(part)
        _sync(temporary)
        if temporary.is_dir() and path.exists():
            _exchange(temporary, path)
        else:
            temporary.replace(path)
        with contextlib.suppress(OSError):  # it has taken its place: no failure from here on
            _sync(path.parent)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> None:
    """Two paths change places at once: at no moment is either of them missing."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux
        raise OSError(
            errno.ENOTSUP, "directories can't be exchanged here: remove the former one first", str(b)
        ) from None
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(
            code, f"{os.strerror(code)}: directories can't be exchanged here, remove the former one first", str(b)
        )
