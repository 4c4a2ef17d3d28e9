"""The items that ``run`` is asked for: of the corpus, of case files, and of rows that the corpus has no cases of."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.cli.app import USAGE, stop
from conformance.cli.fresh import Workshop, making

if TYPE_CHECKING:
    from conformance.cases.case import Case, Item
    from conformance.cases.dialects import Dialect

CASE_FILE = ".safetensors"


@dataclass(frozen=True)
class Choice:
    """The options that select items.

    Attributes:
        dialects: the rows; all published ones where none is named.
        named: whether the rows were named.
        dtypes: those of x.
        cases: globs of case ids, and paths of case files.
        quick: whether a covering subset is enough.
        fresh: the seed of new numbers, which take the place of the corpus; None for the corpus.
        every: whether all families get new numbers.
    """

    dialects: Sequence[Dialect]
    named: bool
    dtypes: Sequence[str]
    stages: Sequence[str]
    cases: Sequence[str]
    quick: bool
    fresh: int | None = None
    every: bool = False

    @property
    def files(self) -> list[Path]:
        return [Path(text) for text in self.cases if text.endswith(CASE_FILE)]

    @property
    def patterns(self) -> list[str]:
        return [text for text in self.cases if not text.endswith(CASE_FILE)]

    @property
    def unmade(self) -> list[Dialect]:
        """Rows whose cases have to be made; none where case files alone are asked for."""
        made = [row for row in self.dialects if self.fresh is not None or not row.published]
        return made if self.patterns or not self.cases else []

    def wishes_of(self, row: Dialect) -> list[Any]:
        """The cases of a row that have to be made; of new numbers a covering subset, unless more is asked for."""
        covering = self.fresh is not None and not (self.every or self.patterns)
        return making(self.unmade).chosen(
            row, self.stages, self.dtypes, self.patterns, quick=self.quick, seed=self.fresh, covering=covering
        )

    def takes(self, case: Case) -> bool:
        """Whether a case of the corpus is selected."""
        from conformance.cases.corpus import quick_of_its_row

        published = {row.told for row in self.dialects if row.published}
        return (
            self.fresh is None
            and case.dialect in published
            and (not self.quick or case.quick or (self.named and quick_of_its_row(case)))
            and (not self.cases or any(fnmatch.fnmatchcase(case.id, pattern) for pattern in self.patterns))
        )

    def items_of(self, cases: Sequence[Case]) -> list[Item]:
        return [
            item
            for case in cases
            for item in case.items()
            if item.stage in self.stages
            and item.variant.x in self.dtypes
            and not (self.quick and item.variant.secondary)
        ]


@dataclass(frozen=True)
class Selection:
    """Cases that are there, and by the name of its row those that have to be made."""

    choice: Choice
    cases: list[Case]
    wishes: dict[str, list[Any]]

    def ids(self) -> list[str]:
        """Ids of all items; nothing is made for them."""
        rows = self.choice.unmade
        lines = [
            line
            for row in rows
            for wish in self.wishes[row.name]
            for line in making(rows).item_ids(wish, self.choice.stages)
        ]
        return [item.id for item in self.choice.items_of(self.cases)] + lines

    def items(self, workshop: Workshop, jobs: int) -> list[Item]:
        """All items; the cases that are missing are made."""
        rows = self.choice.unmade
        made = workshop.cases(rows, lambda row: self.wishes[row.name], jobs) if rows else []
        return self.choice.items_of([*self.cases, *made])


def selected(choice: Choice, corpus: Sequence[Case]) -> Selection:
    """What a choice selects; the command ends where a case file can't be read or a glob matches nothing."""
    from conformance.cases.case import CaseError, load_case

    try:
        files = [load_case(path) for path in choice.files]
        for case in files:
            _ = case.tensors  # read and checked before anything runs
    except CaseError as error:
        stop(str(error), USAGE)
    rows = choice.unmade
    wishes = {row.name: choice.wishes_of(row) for row in rows}
    ids = [case.id for case in corpus if choice.fresh is None]
    ids += [wish.id for row in rows for wish in wishes[row.name]]
    for pattern in choice.patterns:
        if not fnmatch.filter(ids, pattern):
            example = f"for instance {ids[0]}" if ids else f"those of new numbers begin with fresh-{choice.fresh}-"
            stop(f"no case matches {pattern!r}; {example}", USAGE)
    told = {row.told for row in choice.dialects}
    cases = [case for case in corpus if choice.takes(case)]
    cases += [case for case in files if not choice.named or case.dialect in told]
    return Selection(choice, cases, wishes)
