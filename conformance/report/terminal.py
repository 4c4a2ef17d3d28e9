"""The result on a terminal: a live line, a table of worst figures, every failure with a line that repeats it."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from conformance.files.line import one_line
from conformance.judge.groups import Diagnosis, clean, following, group_lines, grouped, of_outcomes
from conformance.judge.item import Outcome
from conformance.judge.known import Known
from conformance.judge.modes import MODES
from conformance.judge.rule import MARGINAL
from conformance.mesh import MARK
from conformance.report import blind, borrowing
from conformance.stages import STAGES

MOST_GROUPS = 12
LONGEST_NAME = 60
SPEAKS = 30.0  # seconds between two lines where no terminal is
UNCLAIMED = "not claimed"
"""The end of a reason to skip what `Capabilities` leaves out."""


class Progress:
    """Says how far a run is: a live line with the time left on a terminal, elsewhere a line every 30 seconds.

    Args:
        expected: how many outcomes there will be, if everything is claimed.
        wanted: whether anything is said.
    """

    def __init__(self, expected: int, wanted: bool):
        self._skipped = self._ran = self._failed = 0
        self._expected = expected
        self._spoken = time.monotonic()
        self._bar = None
        self._quiet = not wanted
        if wanted and sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False),
                       TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
            self._bar = rich.progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=expected)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, outcome: Outcome) -> None:
        """Counts an outcome; what isn't claimed is taken from what will run."""
        if outcome.skipped:
            self._skipped += 1
        else:
            self._ran += 1
            self._failed += bool(outcome.failed)
        where = f"{outcome.implementation} {outcome.case} {outcome.stage} {outcome.variant}"
        if self._bar:
            said = one_line(f"{self._failed} failed  {where}")
            self._bar.update(self._task, completed=self._ran, total=self._expected - self._skipped, description=said)
        elif not self._quiet and time.monotonic() - self._spoken >= SPEAKS:
            self._spoken = time.monotonic()
            counts = f"{self._ran} of {self._expected - self._skipped} items ran, {self._failed} failed"
            print(one_line(f"{counts}; now {where}"), file=sys.stderr, flush=True)


class TerminalReport:
    """Prints a run: a table of worst figures, what belongs to it, failures in groups, and their cause at the end.

    Args:
        verbose: whether every failure is listed, not their groups alone.
        skipped: whether every reason to skip an item is listed.
    """

    def __init__(self, console: Console | None = None, verbose: bool = False, skipped: bool = False):
        self.console = console or Console(width=None if sys.stdout.isatty() else 140)
        self.outcomes: Sequence[Outcome] = []
        self._verbose, self._list_skipped = verbose, skipped
        self.crossed: list[str] = []
        self.known: list[tuple[Known, int]] = []
        self.notes: list[str] = []

    def show(
        self, outcomes: Sequence[Outcome], failures: Sequence[Outcome], diagnoses: Sequence[Diagnosis] = ()
    ) -> None:
        """Prints the result.

        Args:
            failures: those that no known result covers.
            diagnoses: what they come from.
        """
        self.outcomes = outcomes
        self.console.print(self.table())
        for line in [*self.crossed, *borrowing.lines(borrowing.settings(self.outcomes))]:
            self._line(line)
        self._skipped()
        self._modes()
        for entry, count in self.known:
            self._line(f"known: {entry.implementation}: {count} items: {entry.why} ({entry.version}; {entry.source})")
        for line in self.notes:
            self._line(line)
        if self._verbose:
            for outcome in failures:
                self._failure(outcome)
        else:
            self._groups(failures)
        self._marginal()
        for line in blind.lines(self.outcomes):
            self._line(line)
        verdicts = Counter(c.verdict for o in self.outcomes for c in o.checks)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "nothing checked"
        ran = sum(not o.skipped for o in self.outcomes)
        known = f", {sum(count for _, count in self.known)} failed as known" if self.known else ""
        self.console.print(
            f"{ran} {'item' if ran == 1 else 'items'} ran, {len(failures)} failed{known}; checks: {counts}",
            highlight=False,
        )
        self._diagnoses(failures, diagnoses)

    def _skipped(self) -> None:
        """One line for each implementation; with `skipped`, one for each reason."""
        reasons = Counter((o.implementation, o.skipped) for o in self.outcomes if o.skipped)
        unclaimed: Counter[str] = Counter()
        for (name, reason), count in sorted(reasons.items()):
            if reason.endswith(UNCLAIMED) and not self._list_skipped:
                unclaimed[name] += count
            else:
                self._line(f"skipped: {name}: {count} x {reason}")
        for name, count in unclaimed.items():
            self._line(f"skipped: {name}: {count} items that it doesn't claim (--skipped names each reason)")

    def _marginal(self) -> None:
        """What the verdict means, where there is one."""
        checks = [check for o in self.outcomes for check in o.checks if check.verdict == "marginal"]
        if checks:
            worst = max(check.ratio for check in checks)
            self._line(
                f"marginal: {len(checks)} checks passed with over {MARGINAL:g} of their bound, at most {worst:.2f}: "
                "right, but as near as honest implementations seldom come; look there before you change precision"
            )

    def _groups(self, failures: Sequence[Outcome]) -> None:
        """The failures in groups, those that only follow from others in one line."""
        groups = grouped(of_outcomes(failures), clean(self.outcomes))
        leaders = [group for group in groups if not group.follows]
        for group in leaders[:MOST_GROUPS]:
            for line in ("", *group_lines(group)):
                self._line(line)
        if len(leaders) > MOST_GROUPS:
            self._line("")
            self._line(f"and {len(leaders) - MOST_GROUPS} groups more (-v lists every failure)")
        for line in following(groups):
            self._line(line)

    def _diagnoses(self, failures: Sequence[Outcome], diagnoses: Sequence[Diagnosis]) -> None:
        for diagnosis in diagnoses:
            self._line("")
            self._line(f"diagnosis of {diagnosis.implementation}: {diagnosis.cause or 'no cause was found'}")
            for line in diagnosis.lines:
                self._line(f"  {line}")
        alone = next((outcome for outcome in failures if MARK not in outcome.reference), None)
        if alone and any(not diagnosis.cause for diagnosis in diagnoses):
            reference = shlex.quote(alone.reference or alone.implementation)
            self._line(f"  mhc-conformance identify --impl {reference} -v names the nearest functions")

    def _modes(self) -> None:
        """A line for each implementation that was called again, with the items of each mode; then what differed."""
        for name in dict.fromkeys(o.implementation for o in self.outcomes):
            mine = [o for o in self.outcomes if o.implementation == name]
            counts = Counter(mode for o in mine for mode in o.modes)
            if counts:
                said = ", ".join(f"{mode} {counts[mode]}" for mode in MODES if counts[mode])
                thinned = "".join(f"; {reason}" for reason in next(o.about.get("modes", ()) for o in mine if o.modes))
                self._line(f"modes: {name}, items: {said}{thinned}")
            refused = Counter((mode, reason) for o in mine for mode, reason in o.refused.items())
            for (mode, reason), count in refused.items():
                self._line(f"refused: {name}: {mode}: {count} x {reason.removeprefix('refused: ')}")
            for o in mine:
                for line in o.differences:
                    self._line(f"not repeated: {name}: {o.case}, {o.stage}, {o.variant}: {line}")

    def _line(self, text: str) -> None:
        self.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """Implementation x stage: the worst error as a fraction of its bound, or the number of failed items."""
        worst: dict[tuple[str, str], float] = defaultdict(float)
        failed: Counter[tuple[str, str]] = Counter()
        for o in self.outcomes:
            if not o.skipped:
                key = (o.implementation, o.stage)
                worst[key] = max(worst[key], o.ratio)
                failed[key] += bool(o.failed)
        table = Table(title="worst error as a fraction of its bound")
        table.add_column("implementation", no_wrap=True)
        stages = [s for s in STAGES if any(stage == s for _, stage in worst)]
        for stage in stages:
            table.add_column(stage, justify="right")
        for name in dict.fromkeys(o.implementation for o in self.outcomes):
            cells = []
            for stage in stages:
                key = (name, stage)
                if key not in worst:
                    cells.append("-")
                elif failed[key]:
                    cells.append(f"[red]{failed[key]} failed[/red]")
                else:
                    cells.append(f"{worst[key]:.2f}")
            table.add_row(Text(one_line(name, LONGEST_NAME)), *cells)
        return table

    def _failure(self, outcome: Outcome) -> None:
        out = self._line
        out("")
        out(f"{outcome.implementation}: {outcome.case}, stage {outcome.stage}, {outcome.variant}")
        for check in outcome.failed:
            figure = f" {check.ratio:.3g} x the bound {check.bound:.3g}" if check.worst else ""
            mode = f" ({check.mode})" if check.mode else ""
            out(f"  {check.verdict}{mode}: {check.tensor}{figure} {check.message}".rstrip())
            for line in check.trace:
                out(f"    {line}")
            for element in check.worst[:3]:
                out(f"    {element['index']}: got {element['actual']:.9g}, expected {element['expected']:.9g}, "
                    f"off by {element['error']:.3g}")  # fmt: skip
        out(f"  {outcome.reproduce}")
