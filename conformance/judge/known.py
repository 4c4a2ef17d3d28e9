"""Known results: deviations of other projects that are understood, each with its reason.

A file of entries says what fails and why. A failure that an entry covers doesn't fail the run; an entry that matches
nothing, or whose items pass by now, is an error, so that the list can't go stale.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from conformance.files.line import one_line
from conformance.files.places import CaseError
from conformance.files.reading import Reader
from conformance.judge.item import Outcome
from conformance.judge.rule import Check

FORMAT = "mhc-conformance-known/1"
FRESH = re.compile(r"^fresh-\d+-")
"""Begins the id of a case of ``run --fresh SEED``; the rest is the id of the golden case in whose place it is."""
SIZE = "size-"
"""Begins the id of a size."""


Text = Annotated[str, Meta(min_length=1)]


class Known(Struct, frozen=True, forbid_unknown_fields=True):
    """One deviation.

    Attributes:
        implementation: its name.
        version: the package and version that it was seen in.
        why: a sentence.
        source: a link or a file of that package.
        verdicts, tensors: of the checks that fail.
        cases: globs of ids of golden cases, which those of ``--fresh`` match too; ``stage`` and ``variant`` are globs.
        modes: globs of the modes in which it fails so; the plain call's is empty.
    """

    implementation: Text
    version: Text
    why: Text
    source: Text
    cases: Annotated[tuple[str, ...], Meta(min_length=1)]
    verdicts: tuple[str, ...] = ("failed",)
    tensors: tuple[str, ...] = ("*",)
    stage: str = "*"
    variant: str = "*"
    modes: tuple[str, ...] = ("*",)

    def concerns(self, outcome: Outcome) -> bool:
        return (
            outcome.implementation == self.implementation
            and not outcome.skipped
            and any(fnmatch.fnmatchcase(FRESH.sub("", outcome.case), glob) for glob in self.cases)
            and fnmatch.fnmatchcase(outcome.stage, self.stage)
            and fnmatch.fnmatchcase(outcome.variant, self.variant)
        )

    def may_go_stale_by(self, outcome: Outcome) -> bool:
        """Whether an item is of the kind that the entry is about: of a size where all of its globs are, or golden."""
        return outcome.case.startswith(SIZE) == self.of_sizes and not FRESH.match(outcome.case)

    @property
    def of_sizes(self) -> bool:
        return all(glob.startswith(SIZE) for glob in self.cases)

    def covers(self, check: Check) -> bool:
        return (
            check.verdict in self.verdicts
            and any(fnmatch.fnmatchcase(check.tensor, glob) for glob in self.tensors)
            and any(fnmatch.fnmatchcase(check.mode, glob) for glob in self.modes)
        )


class List(Struct, frozen=True):
    """A file of known results."""

    entries: tuple[Known, ...]


LIST = Reader(List, "a JSON file of known results", CaseError, FORMAT)


@dataclass
class Judged:
    """A run against its list: items whose failures are all known, by entry, and what is wrong with the list."""

    known: dict[int, list[Outcome]] = field(default_factory=dict[int, list[Outcome]])
    unknown: list[Outcome] = field(default_factory=list[Outcome])
    stale: list[str] = field(default_factory=list[str])


def load_known(path: Path) -> list[Known]:
    """The entries of a file.

    Raises:
        CaseError: it can't be read, isn't of this format, or an entry lacks something.
    """
    return list(LIST.read(path).entries)


def judge(outcomes: Sequence[Outcome], entries: Sequence[Known]) -> Judged:
    """Which failures are known, and which entries no longer hold.

    An item is known where one entry or several together cover every one of its failing checks. Whether an entry still
    holds is asked of golden cases, or of sizes where it is about these: other numbers may pass.
    """
    found = Judged()
    for number, entry in enumerate(entries):
        asked = [o for o in outcomes if o.implementation == entry.implementation and entry.may_go_stale_by(o)]
        if not asked:
            continue
        concerned = [o for o in asked if entry.concerns(o)]
        what = f"known result {number + 1} ({entry.implementation}, {', '.join(entry.cases)})"
        if not concerned and not entry.of_sizes:  # each form of --sizes asks for other ones
            found.stale.append(one_line(f"{what} matches nothing that ran"))
        for outcome in concerned:
            if not any(entry.covers(check) for check in outcome.failed):
                found.stale.append(
                    one_line(f"{what} says {', '.join(entry.verdicts)}, but {outcome.case} did not fail so")
                )
    for outcome in outcomes:
        if outcome.failed:
            number = _covered(outcome, entries)
            if number is None:
                found.unknown.append(outcome)
            else:
                found.known.setdefault(number, []).append(outcome)
    return found


def _covered(outcome: Outcome, entries: Iterable[Known]) -> int | None:
    """The first entry about this item, where all of its failing checks are covered by some entry."""
    about = [(k, entry) for k, entry in enumerate(entries) if entry.concerns(outcome)]
    if all(any(entry.covers(check) for _, entry in about) for check in outcome.failed):
        return about[0][0]
    return None
