"""The code that graphs are made from, as it was when this process took it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path


class Sources:
    """Every Python file of packages, at one moment.

    A process holds the code that it has imported, and not what its files have become since. So this is made when the
    packages are imported, and what is made from them later is kept for other processes only while they are `unchanged`.

    Args:
        packages: names of packages.
    """

    def __init__(self, packages: Iterable[str]):
        self._packages = tuple(packages)
        self._seen = self._state()
        digest = hashlib.sha256()
        for path, *_ in self._seen:
            digest.update(path.encode() + b"\n" + hashlib.sha256(Path(path).read_bytes()).digest())
        self.digest = digest.hexdigest()
        """A hash of names and contents, hexadecimal."""

    def unchanged(self) -> bool:
        """Whether the files are those of before, by their times and sizes."""
        try:
            return self._state() == self._seen
        except OSError:  # one goes while it is looked at
            return False

    def _state(self) -> list[tuple[str, int, int]]:
        specs = [importlib.util.find_spec(package) for package in self._packages]
        folders = [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]
        # An editor's lock is a link to nothing, and may be called like a file of Python.
        files = sorted(path for folder in folders for path in folder.rglob("*.py") if path.is_file())
        return [(str(path), (stat := path.stat()).st_mtime_ns, stat.st_size) for path in files]
