"""What a worker looks at beside the verdicts: whether files are as promised, and what was taken that isn't its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from conformance.cases.case import Case, load_case
from conformance.cases.corpus import manifest
from conformance.files.places import fixtures
from conformance.implementations.borrowed import borrowed
from conformance.implementations.registry import load, module_of
from conformance.interface import Implementation
from conformance.judge.integrity import at_reading
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.judge.watch import Watch, Watched

BORROWED = "imported of ours"
"""The key, among an implementation's settings, of a list of those of our modules that it imported."""
NAMED = 3
"""Golden files that a failure names."""


class Guard:
    """Accompanies the implementations of a process, one after the other.

    Raises:
        CaseError: the manifest can't be read.
    """

    def __init__(self) -> None:
        self._promised = manifest()
        self._watch = Watch(fixtures() / "golden")
        self._altered: dict[str, str] = {}
        self._opened: list[str] = []
        self._adapter = ""
        self._modules, self._borrowed = 0, list[str]()

    def load(self, reference: str, limit: float) -> Implementation:
        """The implementation, watched (`registry.load`)."""
        self._adapter = module_of(reference)
        with self._watch.listening():
            implementation = load(reference, limit)
        self._implementation = implementation
        return Watched(implementation, self._watch)

    def read(self, path: Path) -> Case:
        """A case, whose file is hashed."""
        case = load_case(path)
        self._watch.add(path)
        self._altered[str(path)] = at_reading(path, self._promised)
        return case

    def tell(self, outcome: Outcome, path: str) -> None:
        """Adds what was noticed to the outcome of an item of this file, or of one that is of none."""
        outcome.altered = self._altered.get(path, "")
        if len(sys.modules) != self._modules:  # looking at each takes a millisecond
            self._modules, self._borrowed = len(sys.modules), borrowed(self._adapter)
        names = [*self._borrowed, *getattr(self._implementation, "borrowed", [])]
        if names:
            outcome.about[BORROWED] = names
        self._opened += self._watch.take()
        if self._opened and not outcome.skipped:
            rest = len(self._opened) - NAMED
            files = ", ".join(self._opened[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
            message = f"opened {files}: golden files, which have the expected values"
            outcome.checks.append(Check("-", "failed", np.inf, message=message))
            self._opened = []
