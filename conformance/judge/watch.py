"""The golden files, which hold the answers, that an implementation opens.

It is noticed in the worker's process. A file that native code opens by itself isn't seen (safetensors' is), nor one
that another process opens which the implementation starts: fresh data tell those.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from conformance.interface import Arrays, Implementation, Result

Identity = tuple[int, int]
"""Device and number of a file, the same under each of its names."""


class Watch:
    """Notices the golden files that an implementation opens in this process; an audit hook stays to its end.

    Args:
        folder: that of the golden files.
    """

    def __init__(self, folder: Path):
        self._names: dict[Identity, str] = {}
        self._listens = False
        self.opened: list[str] = []
        """Names of the files that were opened, each once."""
        for path in folder.glob("*.safetensors"):
            self.add(path)
        sys.addaudithook(self._hear)
        self._hear_safetensors()

    def add(self, path: Path) -> None:
        """Watches one more file."""
        with contextlib.suppress(OSError):  # who reads it says what is wrong with it
            self._names[_identity(path)] = path.name

    @contextlib.contextmanager
    def listening(self) -> Generator[None]:
        """Code of the implementation runs; everything else is the suite's own."""
        self._listens = True
        try:
            yield
        finally:
            self._listens = False

    def take(self) -> list[str]:
        """The files that were opened since the last look."""
        names, self.opened = self.opened, []
        return names

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._listens and event == "open":
            self._look(arguments[0])

    def _look(self, path: object) -> None:
        if self._listens and isinstance(path, str | bytes | os.PathLike):
            with contextlib.suppress(OSError, ValueError):  # who opens it is told so
                name = self._names.get(_identity(path))
                if name and name not in self.opened:
                    self.opened.append(name)

    def _hear_safetensors(self) -> None:
        """Its files are opened natively, without an event: the function is replaced wherever it was imported."""
        original: Callable[..., Any] = safetensors.safe_open

        def safe_open(filename: Any, *arguments: Any, **named: Any) -> Any:
            self._look(filename)
            return original(filename, *arguments, **named)

        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get("safe_open") is original:
                module.safe_open = safe_open  # type: ignore[union-attr]


def _identity(path: Any) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino


class Watched:
    """An implementation whose calls are listened to."""

    def __init__(self, implementation: Implementation, watch: Watch):
        self._implementation, self._watch = implementation, watch
        self.name, self.capabilities = implementation.name, implementation.capabilities

    def __getattr__(self, name: str) -> Any:
        return getattr(self._implementation, name)

    def call(self, stage: str, inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
        with self._watch.listening():
            return self._implementation.call(stage, inputs, config, cotangents)
