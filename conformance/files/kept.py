"""What one run keeps for the next in the user's cache: all of it can be made again, and the oldest goes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def folder(name: str) -> Path | None:
    """The folder of that name in the user's cache, which is made; None where there is no home or it can't be made."""
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhc-conformance" / name
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return place


def make_room(place: Path, most: int) -> None:
    """Where the files of a folder take more than ``most`` bytes, removes the oldest until half of that is left."""
    files: list[tuple[float, int, str]] = []
    try:
        entries = list(os.scandir(place))
    except OSError:  # it can't be read, or was removed: then nothing is kept, and a run goes on
        return
    for entry in entries:
        with contextlib.suppress(OSError):  # another process removes them too
            files.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    left = sum(size for _, size, _ in files)
    if left <= most:
        return
    for _, size, path in sorted(files):
        with contextlib.suppress(OSError):
            os.unlink(path)
        left -= size
        if left <= most // 2:
            return
