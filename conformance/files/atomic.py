"""Files and directories that are whole or not there.

A link is followed: what it leads to is replaced, beside its real place, and the link stays. A device, a pipe and a
descriptor of this process (``/dev/stdout``) are written through (`conformance.files.through`): a name that stands for
them is never given to a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Generator
from pathlib import Path

from conformance.files import temporary, through

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
LONGEST = 200
"""Bytes of a name that a temporary name has of it: with the rest it is no longer than a name may be."""


def write(path: Path, content: bytes | str) -> None:
    """All of the file or none of it; what isn't a file is written through.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    with whole(path) as temporary:
        temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


@contextlib.contextmanager
def whole(path: Path) -> Generator[Path]:
    """A path beside ``path`` to make a file or a directory at; it takes the place of ``path`` at the end of the block.

    It is synced first. A process that dies leaves ``path`` as it was, and a hidden file beside it. Where ``path`` is a
    device, a pipe or a descriptor the file is made elsewhere, and its content then written there.

    Raises:
        OSError: it can't be written, or takes the place of a directory on a file system that can't exchange two of
            them at once; what was there before still is.
    """
    try:
        with _written_through(path) if through.leads_elsewhere(path) else _in_place(path) as temporary:
            yield temporary
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary one


@contextlib.contextmanager
def _in_place(path: Path) -> Generator[Path]:
    """A path beside the file's place, which it takes."""
    place = _place(path)
    temporary = place.with_name(f".{os.fsdecode(os.fsencode(place.name)[:LONGEST])}.{os.getpid()}")
    _remove(temporary)  # of a process that died and had this number
    try:
        yield temporary
        for part in sorted(temporary.rglob("*")) if temporary.is_dir() else []:
            _sync(part)
        _sync(temporary)
        _check_form(place)
        if temporary.is_dir() and place.exists():
            _exchange(temporary, place)
        else:
            temporary.replace(place)
        with contextlib.suppress(OSError):  # it has taken its place: no failure from here on
            _sync(place.parent)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def _written_through(path: Path) -> Generator[Path]:
    """A path elsewhere, for a file whose content goes to what isn't a file."""
    with through.opened(path) as descriptor, temporary.within() as folder:
        made = folder / (path.name or "content")
        yield made
        if not made.is_file():
            raise OSError(errno.ENOTDIR, "a directory can't be written there", str(path))
        through.pour(descriptor, made.read_bytes(), str(path))


def _place(path: Path) -> Path:
    """Where the file really lies, or will: behind all links."""
    try:
        place = Path(os.path.realpath(path))
        if place.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not place.name:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return place


def _check_form(place: Path) -> None:
    """Refuses to replace what has become a device or a pipe meanwhile."""
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EEXIST, f"it is {through.named(mode)} by now", str(place))


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
