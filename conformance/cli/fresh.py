"""Cases that a command makes: of rows that a user writes, and of new numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from conformance.cli.app import SETUP, USAGE, say, stop
from conformance.files import temporary

if TYPE_CHECKING:
    from conformance.cases.case import Case
    from conformance.cases.dialects import Dialect

HELP = "a name, NAME,key=value…, or a JSON file of a row"


def dialects_given(texts: Sequence[str]) -> list[Dialect]:
    """The rows that the texts stand for; the command ends where one stands for none."""
    from conformance.cases.dialects import DialectError, parse

    try:
        rows = [parse(text) for text in texts]
    except DialectError as error:
        stop(str(error), USAGE)
    different = {row.name: row for row in rows}
    for row in rows:
        if different[row.name].parameters != row.parameters:
            stop(f"two rows are called {row.name}: give one of the files another name", USAGE)
    return list(different.values())


def making(rows: Sequence[Dialect]) -> Any:
    """The module that makes cases; the command ends where python-flint is missing."""
    try:
        from conformance.oracle import making as module
    except ImportError as error:
        unmade = next((f"cases of {row.name}" for row in rows if not row.published), "these numbers")
        stop(
            f"the corpus has no {unmade}, and making them needs the extra 'regenerate': "
            f"pip install 'mhc-conformance[regenerate]' ({error})",
            SETUP,
        )
    return module


class Workshop:
    """A temporary folder of the cases made for one command; it goes when the command ends, unless it is kept."""

    def __init__(self) -> None:
        self.folder = temporary.folder()

    def keep(self) -> None:
        """Leaves the case files where they are, so that what failed can be repeated."""
        temporary.keep(self.folder)

    def cases(self, rows: Sequence[Dialect], choose: Callable[[Dialect], list[Any]], jobs: int) -> list[Case]:
        """Makes the cases that ``choose`` picks for each row, and says how many there are and how long it took."""
        cases: list[Case] = []
        shared = [row for row in rows if row.published]  # the names of their files differ
        groups = [shared] if shared else []
        for number, group in enumerate(groups + [[row] for row in rows if not row.published]):
            label = group[0].name if len(group) == 1 else f"{len(group)} dialects"
            cases += self._make(str(number), label, [wish for row in group for wish in choose(row)], group, jobs)
        return cases

    def _make(self, folder_name: str, label: str, wishes: list[Any], rows: Sequence[Dialect], jobs: int) -> list[Case]:
        from rich.console import Console
        from rich.progress import Progress

        folder, started = self.folder / folder_name, time.monotonic()
        folder.mkdir()
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(f"cases of {label}", total=None)
            made = making(rows).make(wishes, folder, jobs, lambda k, n: bar.update(task, completed=k, total=n))
        say(f"made {len(made.cases)} cases of {label} in {time.monotonic() - started:.0f} s")
        for line in made.left_out:
            say(f"  left out, {line}")
        return made.cases
