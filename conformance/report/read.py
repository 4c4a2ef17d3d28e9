"""Reads the files of `run --jsonl` and `selftest --json`, and puts several runs of one corpus together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from msgspec import Struct

from conformance.files.places import CaseError
from conformance.files.reading import Reader, too_deep
from conformance.report.files import FORMAT

SELFTEST_FORMAT = "mhc-conformance-power/1"


class ReportError(CaseError):
    """A file isn't a whole report, or reports don't go together; the message is one line for the user."""


class Header(Struct, frozen=True, tag_field="kind", tag="header"):
    """What one must know to read the figures of a run (`conformance.report.files.header`)."""

    corpus: str
    format: str
    versions: dict[str, str] = {}
    python: str = ""
    implementations: dict[str, dict[str, Any]] = {}
    machine: str = ""
    system: str = ""
    processors: int | None = None
    environment: dict[str, str] = {}
    altered: tuple[str, ...] = ()
    """A line for each file of the corpus that wasn't as promised."""


class Element(Struct, frozen=True):
    """One of the elements of a tensor that are furthest off; null where a figure isn't finite."""

    index: tuple[int, ...]
    actual: float | None
    expected: float | None
    error: float | None


class Line(Struct, frozen=True):
    """What a check and a skip have in common: the item."""

    implementation: str
    case: str
    stage: str
    variant: str
    x: str
    dialect: str
    seconds: float = 0.0

    @property
    def item(self) -> tuple[str, str, str, str]:
        return self.implementation, self.case, self.stage, self.variant


class CheckLine(Line, frozen=True, kw_only=True, tag_field="kind", tag="check"):
    """The verdict on one tensor of an item; the ratio is null where it is infinite."""

    tensor: str
    verdict: str
    ratio: float | None
    message: str
    error: float | None = None
    bound: float | None = None
    worst: tuple[Element, ...] = ()
    histogram: tuple[int, ...] = ()
    reproduce: str = ""
    mode: str = ""


class SkipLine(Line, frozen=True, kw_only=True, tag_field="kind", tag="skip"):
    """An item that wasn't run, and why."""

    reason: str


class DifferenceLine(Line, frozen=True, kw_only=True, tag_field="kind", tag="difference"):
    """A tensor whose bits weren't the same in every call with the same content."""

    message: str


class RefusalLine(Line, frozen=True, kw_only=True, tag_field="kind", tag="refusal"):
    """A mode that an implementation refused in an item that it claims."""

    mode: str
    reason: str


class Footer(Struct, frozen=True, tag_field="kind", tag="footer"):
    """The last line, without which the file was cut off."""

    lines: int


@dataclass
class Run:
    """One file: its header, checks and skips."""

    path: Path
    header: Header
    checks: list[CheckLine] = field(default_factory=list[CheckLine])
    skips: list[SkipLine] = field(default_factory=list[SkipLine])
    differences: list[DifferenceLine] = field(default_factory=list[DifferenceLine])
    refusals: list[RefusalLine] = field(default_factory=list[RefusalLine])


Entry = CheckLine | SkipLine | DifferenceLine | RefusalLine | Footer
WHAT = "a line that run --jsonl writes"
FIRST = Reader(Header, WHAT, ReportError, FORMAT)
ENTRY = Reader(cast("type[Entry]", Entry), WHAT, ReportError)


class MutantFigures(Struct, frozen=True):
    """What the suite noticed of a mutant in one dtype: the cases that kill it, and the best of them."""

    cases: int
    ratio: float | None
    where: str


class MutantLine(Struct, frozen=True):
    """One planted mistake; ``blind`` says in which dtypes it can't be seen, and why."""

    name: str
    figures: dict[str, MutantFigures]
    blind: dict[str, str]


class PlaceFigures(Struct, frozen=True):
    """What killed a mistake of *where* in one dtype: the tier, the modes or sizes, and the worst check."""

    tier: str
    places: tuple[str, ...]
    ratio: float | None
    where: str


class WhereLine(Struct, frozen=True):
    """One planted mistake of *where*; null for a dtype in which nothing killed it."""

    name: str
    figures: dict[str, PlaceFigures | None]
    blind: dict[str, str]


class Selftest(Struct, frozen=True):
    """The figures of a self-test (`conformance.selftest.table.as_json`)."""

    mutants: tuple[MutantLine, ...]
    honest: str
    problems: tuple[str, ...]
    format: str
    corpus: str
    quick: bool = False
    where: tuple[WhereLine, ...] = ()


class SelftestOrigin(Struct, frozen=True):
    """What a self-test was of; read first, since figures of another corpus are of no use."""

    corpus: str


SELFTEST_WHAT = "the file that selftest --json writes"
ORIGIN = Reader(SelftestOrigin, SELFTEST_WHAT, ReportError, SELFTEST_FORMAT)
SELFTEST = Reader(Selftest, SELFTEST_WHAT, ReportError, SELFTEST_FORMAT)


def read_run(path: Path) -> Run:
    """One report.

    Raises:
        ReportError: not a report, another format, or cut off before its footer.
    """
    lines = ENTRY.lines(path)
    run, footer = Run(path, FIRST.decode(next(lines, b""), f"{path}: line 1")), None
    if too_deep(run.header.implementations):
        raise ReportError(f"{path}: line 1: implementations: expected settings, got lists that are nested too deeply")
    for number, (line, last) in enumerate(_marked(lines), 2):
        place = f"{path}: line {number}"
        if footer:
            raise ReportError(f"{place}: expected no line after the footer")
        entry = ENTRY.decode(line, f"{place} (cut off?)" if last else place)
        if isinstance(entry, CheckLine):
            run.checks.append(entry)
        elif isinstance(entry, SkipLine):
            run.skips.append(entry)
        elif isinstance(entry, DifferenceLine):
            run.differences.append(entry)
        elif isinstance(entry, RefusalLine):
            run.refusals.append(entry)
        else:
            footer = entry
    count = len(run.checks) + len(run.skips) + len(run.differences) + len(run.refusals)
    if footer is None or footer.lines != count:
        came = "no footer" if footer is None else f"one of {footer.lines}"
        raise ReportError(f"{path}: cut off: expected a footer that counts {count} lines, got {came}")
    return run


def _marked(lines: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each line, and whether it is the last."""
    line = next(lines, None)
    while line is not None:
        following = next(lines, None)
        yield line, following is None
        line = following


def merge(paths: Sequence[Path]) -> list[Run]:
    """Several reports of one corpus.

    Raises:
        ReportError: one can't be read, two have different corpora, or the same item of one implementation twice.
    """
    runs = [read_run(path) for path in paths]
    first = runs[0]
    seen: dict[tuple[str, str, str, str], Path] = {}
    for run in runs:
        if run.header.corpus != first.header.corpus:
            raise ReportError(
                f"reports of different corpora: {first.path} has {first.header.corpus}, {run.path} has "
                f"{run.header.corpus}"
            )
        for key in {check.item for check in run.checks}:
            if key in seen:
                raise ReportError(f"{run.path} and {seen[key]} both have {', '.join(key)}: give one of them")
            seen[key] = run.path
    return runs


def read_selftest(path: Path, corpus: str) -> Selftest:
    """The figures of a self-test of the same corpus.

    Raises:
        ReportError: it isn't one, or is of another corpus.
    """
    text = SELFTEST.content(path)
    origin = ORIGIN.decode(text, str(path))
    if origin.corpus != corpus:
        raise ReportError(f"reports of different corpora: the runs have {corpus}, {path} has {origin.corpus}")
    return SELFTEST.decode(text, str(path))
