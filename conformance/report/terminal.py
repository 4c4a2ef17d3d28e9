"""The result on a terminal: a live line, a table of worst figures, every failure with a line that repeats it."""

from __future__ import annotations

import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from conformance.files.line import one_line
from conformance.judge.item import Outcome
from conformance.judge.known import Known
from conformance.judge.modes import MODES
from conformance.mesh import MARK
from conformance.report import borrowing
from conformance.stages import STAGES

MOST_FAILURES = 40
LONGEST_NAME = 60
UNCLAIMED = "not claimed"
"""The end of a reason to skip what `Capabilities` leaves out."""


class TerminalReport:
    """Collects outcomes and prints them.

    Args:
        expected: how many outcomes there will be.
        live: whether a line says how far the run is.
        verbose: whether every reason to skip an item is printed.
    """

    def __init__(self, expected: int, live: bool, console: Console | None = None, verbose: bool = False):
        self.console = console or Console(width=None if sys.stdout.isatty() else 140)
        self.expected, self.outcomes = expected, []
        self._verbose = verbose
        self.crossed: list[str] = []
        self.known: list[tuple[Known, int]] = []
        self._live = Live(console=self.console, refresh_per_second=4, transient=True) if live else None

    def __enter__(self) -> TerminalReport:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if self._live:
            failures = sum(bool(o.failed) for o in self.outcomes)
            self._live.update(
                Text(one_line(f"{len(self.outcomes)}/{self.expected}  {failures} failed  {outcome.implementation} "
                              f"{outcome.case} {outcome.stage} {outcome.variant}"))
            )  # fmt: skip

    def show(self, failures: Sequence[Outcome]) -> None:
        """Prints the result; ``failures`` are those that no known result covers."""
        self.console.print(self.table())
        for line in [*self.crossed, *borrowing.lines(borrowing.settings(self.outcomes))]:
            self._line(line)
        self._skipped()
        self._modes()
        for entry, count in self.known:
            self._line(f"known: {entry.implementation}: {count} items: {entry.why} ({entry.version}; {entry.source})")
        for outcome in failures[:MOST_FAILURES]:
            self._failure(outcome)
        if len(failures) > MOST_FAILURES:
            self.console.print(f"… and {len(failures) - MOST_FAILURES} more failed")
        alone = next((outcome for outcome in failures if MARK not in outcome.reference), None)
        if alone:
            reference = shlex.quote(alone.reference or alone.implementation)
            self._line(
                f"\nmhc-conformance identify --impl {reference} says which dialect it computes, and what differs"
            )
        verdicts = Counter(c.verdict for o in self.outcomes for c in o.checks)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "nothing checked"
        ran = sum(not o.skipped for o in self.outcomes)
        known = f", {sum(count for _, count in self.known)} failed as known" if self.known else ""
        self.console.print(
            f"{ran} {'item' if ran == 1 else 'items'} ran, {len(failures)} failed{known}; checks: {counts}",
            highlight=False,
        )

    def _skipped(self) -> None:
        """A line for each reason to skip an item; without `verbose`, one line for all that isn't claimed."""
        reasons = Counter((o.implementation, o.skipped) for o in self.outcomes if o.skipped)
        unclaimed: Counter[str] = Counter()
        for (name, reason), count in sorted(reasons.items()):
            if reason.endswith(UNCLAIMED) and not self._verbose:
                unclaimed[name] += count
            else:
                self._line(f"skipped: {name}: {count} x {reason}")
        for name, count in unclaimed.items():
            self._line(f"skipped: {name}: {count} items that it doesn't claim (--verbose names each reason)")

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
        lines = "\n".join(one_line(line) for line in text.split("\n"))
        self.console.print(lines, markup=False, highlight=False, soft_wrap=True)

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
        out(f"\n{outcome.implementation}: {outcome.case}, stage {outcome.stage}, {outcome.variant}")
        for check in outcome.failed[:6]:
            figure = f" {check.ratio:.3g} x the bound {check.bound:.3g}" if check.worst else ""
            mode = f" ({check.mode})" if check.mode else ""
            out(f"  {check.verdict}{mode}: {check.tensor}{figure} {check.message}".rstrip())
            for element in check.worst[:3]:
                out(f"    {element['index']}: got {element['actual']:.9g}, expected {element['expected']:.9g}, "
                    f"off by {element['error']:.3g}")  # fmt: skip
        out(f"  {outcome.reproduce}")
