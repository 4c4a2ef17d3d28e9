"""Production sizes on the command line: which are asked, and where their truths are kept."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conformance.cli.app import USAGE, stop
from conformance.files import temporary

if TYPE_CHECKING:
    from conformance.cases.dialects import Dialect
    from conformance.questions.sizes.item import Question

NONE, SHORT, QUICK, FULL = "none", "short", "quick", "full"
FORMS = (SHORT, QUICK, FULL, NONE)
PREFIX = "size-"
"""Begins the ids of sizes."""
LONG = 3600.0
"""Seconds that an item of the full form may take, truth and bound included."""
PROOF = {FULL: 10.0}
"""Seconds for which ball arithmetic looks at the truth of a size, where it isn't one."""


@dataclass
class SizeChoice:
    """The options that select sizes.

    Attributes:
        form: one of `FORMS`; with ``quick`` and ``full`` the golden cases aren't run.
        patterns: globs of ids, or ids; where there are any, nothing else is asked.
        cases_named: whether cases were named, be they sizes or not.
        once: whether each size is asked in one stage and dtype.
        jobs: workers at a time, which share the memory.
        copies: how many processes hold the arrays of a size, the worker and those of a mesh.
    """

    form: str
    rows: Sequence[Dialect]
    stages: Sequence[str]
    dtypes: Sequence[str]
    patterns: Sequence[str] = ()
    cases_named: bool = False
    once: bool = False
    jobs: int = 1
    copies: int = 1
    notes: list[str] = field(default_factory=list)
    """Lines about pairs of sizes that the memory doesn't hold."""

    @property
    def alone(self) -> bool:
        """Whether sizes take the place of the golden cases."""
        return self.form in (QUICK, FULL)

    def questions(self) -> list[Question]:
        """What is asked; the command ends where a pattern matches nothing."""
        from conformance.questions.sizes import design, item

        largest = design.largest_here(self.jobs * self.copies)
        named = [(known, text) for text in self.patterns if (known := design.parsed(text))]
        globs = [text for text in self.patterns if not design.parsed(text)]
        chosen: list[Question] = []
        for (size, row), text in named:
            elements = max(size.tokens, size.streams * (size.streams + 2)) * size.streams * size.dim
            if elements > largest or (size.iterations or 0) > design.MOST_ITERATIONS:
                stop(
                    f"{text}: memory holds {largest} elements of x or of the projections here, and at most "
                    f"{design.MOST_ITERATIONS} iterations are asked for; got {elements} and {size.iterations}", USAGE
                )  # fmt: skip
            rows = [r for r in self.rows if r.name == row] if row else list(self.rows)
            if not rows:
                stop(f"{text}: no such row is selected: {row}", USAGE)
            chosen += item.questions([size], rows, self.stages, self.dtypes, _folder())
        if self.form == NONE or (self.cases_named and not globs):
            return chosen
        sizes = design.sizes(self.form, largest)
        if not self.cases_named:
            self.notes += _left_out(design.left_out(self.form, sizes), largest)
        if globs:
            sizes = [size for size in sizes if any(fnmatch.fnmatchcase(size.id, glob) for glob in globs)]
            if not sizes:
                known = design.sizes(SHORT, largest)[0].id
                stop(f"no size of the form {self.form} matches {' or '.join(map(repr, globs))}; one is {known}", USAGE)
        return chosen + item.questions(
            sizes, self.rows, self.stages, self.dtypes, _folder(), once=self.once, proof=PROOF.get(self.form, 1.0)
        )


def _left_out(pairs: Sequence[str], largest: int) -> list[str]:
    if not pairs:
        return []
    return [f"left out, since memory holds {largest / 1e6:.0f} million elements of x here: {', '.join(pairs)}"]


_FOLDERS: list[str] = []


def _folder() -> str:
    """A temporary folder for the truths of this command; it goes when the command ends."""
    if not _FOLDERS:
        _FOLDERS.append(str(temporary.folder()))
    return _FOLDERS[0]
