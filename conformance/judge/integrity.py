"""Whether the files that a run reads are those that were promised: before it, at each reading, and after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from conformance.cases.corpus import Promised, altered, corpus_hash, is_golden, manifest, verify
from conformance.files.places import CaseError, fixtures
from conformance.files.reading import Reader
from conformance.oracle.sources import RECORD

ALTERED = "altered-"
"""The beginning of what stands for the corpus's hash where a file isn't as promised."""
DURING = "; it changed while the run went on"
MOST = 3
"""Files that a message names."""


class Made(Struct, frozen=True):
    """The part of the record of the corpus's making that is looked at here."""

    dialects: str = ""


MADE = Reader(Made, "a record of the corpus's making", CaseError)


class Corpus:
    """What the corpus was when a run began, and what is wrong with it.

    The manifest is read once, so that nobody can alter it together with a file.

    Raises:
        CaseError: the manifest or the record can't be read.
    """

    def __init__(self) -> None:
        self._promised, self._hash = manifest(), corpus_hash()
        self._lines: dict[str, str] = {}
        self.note(self._wrong())

    @property
    def problems(self) -> list[str]:
        """A line for each file that was found missing, extra or altered, in the order in which this was noticed."""
        return list(self._lines.values())

    @property
    def hash(self) -> str:
        """The corpus's hash; where a file isn't as promised, a text that says so and stands for the problems."""
        if not self._lines:
            return self._hash
        return ALTERED + hashlib.sha256("\n".join(self._lines.values()).encode()).hexdigest()

    def told(self) -> str:
        """The problems in one line, with the command that looks at all files."""
        more = f"; and {len(self._lines) - MOST} more" if len(self._lines) > MOST else ""
        return (
            f"the corpus isn't what its manifest promises, so that this run says nothing of it: "
            f"{'; '.join(self.problems[:MOST])}{more} (mhc-conformance fixtures verify names all)"
        )

    def note(self, lines: Iterable[str], remark: str = "") -> None:
        """Adds lines about files that have none yet, each with the remark."""
        for line in lines:
            self._lines.setdefault(line.partition(":")[0], line + remark)

    def look_again(self, at_readings: Iterable[str] = ()) -> None:
        """Hashes all files once more, after the run.

        Args:
            at_readings: what was noticed when files were read (`at_reading`).
        """
        try:
            self.note((*at_readings, *self._wrong()), DURING)
        except CaseError as error:
            self.note([f"missing  MANIFEST.json: {error}"], DURING)

    def _wrong(self) -> list[str]:
        lines = verify(promised=self._promised)
        if corpus_hash() != self._hash:
            lines.append("altered  MANIFEST.json")
        return lines + altered_dialects()


def altered_dialects() -> list[str]:
    """A line where ``dialects.json`` isn't the file that the corpus was made with; none where the record has no hash.

    Raises:
        CaseError: the record can't be read.
    """
    promised = MADE.read(RECORD).dialects
    line = altered(fixtures() / "dialects.json", promised) if promised else ""
    return [line] if line else []


def at_reading(path: Path, promised: Mapping[str, Promised]) -> str:
    """A line where a file of the corpus isn't as promised at the moment in which it is read; empty otherwise."""
    if not is_golden(path) or path.name not in promised:
        return ""
    return altered(path, promised[path.name].sha256)
