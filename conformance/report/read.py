"""Reads the files of `run --jsonl` and `selftest --json`, and puts several runs of one corpus together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from msgspec import Struct, structs

from conformance.files.places import CaseError
from conformance.files.reading import Reader, too_deep
from conformance.judge.heat import MOST
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
    asked: dict[str, Any] = {}
    """The options that select what is measured, where they aren't as they are by default."""


class Element(Struct, frozen=True):
    """One of the elements of a tensor that are furthest off; null where a figure isn't finite."""

    index: tuple[int, ...]
    actual: float | None
    expected: float | None
    error: float | None


class Map(Struct, frozen=True):
    """Where a tensor is wrong (`conformance.judge.heat`); null for a cell with an element that isn't finite."""

    tokens: bool
    rows: int
    columns: int
    cells: tuple[tuple[float | None, ...], ...]

    @property
    def fits(self) -> bool:
        """Whether there are as many cells as a tensor of this size has."""
        widths = {len(row) for row in self.cells}
        return len(self.cells) == min(self.rows, MOST) and widths == {min(self.columns, MOST)}


class Line(Struct, frozen=True):
    """What a check and a skip have in common: the item."""

    implementation: str
    case: str
    stage: str
    variant: str
    x: str
    dialect: str
    seconds: float = 0.0
    family: str = ""
    elements: int = 0

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
    map: Map | None = None
    trace: tuple[str, ...] = ()


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


class ItemLine(Line, frozen=True, kw_only=True, tag_field="kind", tag="item"):
    """The end of an item: so many lines before it are its own."""

    lines: int
    reference: str = ""
    asked: str = ""
    file: str = ""
    modes: tuple[str, ...] = ()
    repeats: int = 0


class ImplementationLine(Struct, frozen=True, tag_field="kind", tag="implementation"):
    """The settings of an implementation as they are from here on."""

    name: str
    settings: dict[str, Any]


class DiagnosisLine(Struct, frozen=True, tag_field="kind", tag="diagnosis"):
    """What an implementation's failures come from; the cause is empty where none was found."""

    implementation: str
    cause: str
    lines: tuple[str, ...] = ()


class Footer(Struct, frozen=True, tag_field="kind", tag="footer"):
    """The last line, without which the run was cut off; corpus and altered files as they were after it."""

    lines: int
    failed: int = 0
    interrupted: bool = False
    corpus: str = ""
    altered: tuple[str, ...] = ()


@dataclass
class Run:
    """One file: its header, checks and skips."""

    path: Path
    header: Header
    checks: list[CheckLine] = field(default_factory=list[CheckLine])
    skips: list[SkipLine] = field(default_factory=list[SkipLine])
    differences: list[DifferenceLine] = field(default_factory=list[DifferenceLine])
    refusals: list[RefusalLine] = field(default_factory=list[RefusalLine])
    items: list[ItemLine] = field(default_factory=list[ItemLine])
    diagnoses: list[DiagnosisLine] = field(default_factory=list[DiagnosisLine])
    cut: str = ""
    """Why it isn't the whole run; empty where it is."""


Entry = CheckLine | SkipLine | DifferenceLine | RefusalLine | ItemLine | ImplementationLine | DiagnosisLine | Footer
OfItem = CheckLine | SkipLine | DifferenceLine | RefusalLine
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
    """One report; of a run that was cut off, the items that were finished.

    Raises:
        ReportError: not a report, another format, or lines that don't go together.
    """
    lines = ENTRY.lines(path)
    header = FIRST.decode(next(lines, b""), f"{path}: line 1")
    run, settings, own, footer, counted = Run(path, header), dict[str, dict[str, Any]](), list[OfItem](), None, 0
    for number, line in enumerate(lines, 2):
        place = f"{path}: line {number}"
        if footer:
            raise ReportError(f"{place}: expected no line after the footer")
        if not line.endswith(b"\n"):
            break  # a process that died wrote a part of it
        entry = ENTRY.decode(line, place)
        if isinstance(entry, ItemLine):
            _keep(run, entry, own, place)
            own, counted = [], counted + entry.lines + 1
        elif isinstance(entry, ImplementationLine):
            settings[entry.name] = entry.settings
            if too_deep(entry.settings):
                raise ReportError(f"{place}: settings: expected settings, got lists that are nested too deeply")
        elif isinstance(entry, DiagnosisLine):
            run.diagnoses.append(entry)
        elif isinstance(entry, Footer):
            footer = entry
            if own:
                item = ", ".join(own[-1].item)
                raise ReportError(f"{place}: expected the line that ends the item {item}, got the footer")
        else:
            own.append(entry)
    if footer is None:
        run.cut = f"cut off after {len(run.items)} items: the run didn't end"
    elif footer.lines != counted:
        raise ReportError(f"{path}: expected a footer that counts {counted} lines, got {footer.lines}")
    elif footer.interrupted:
        run.cut = f"interrupted after {len(run.items)} items"
    after = {"corpus": footer.corpus, "altered": footer.altered} if footer and footer.altered else {}
    run.header = structs.replace(header, implementations=settings, **after)
    return run


def _keep(run: Run, item: ItemLine, own: Sequence[OfItem], place: str) -> None:
    """Adds the lines of an item to a run.

    Raises:
        ReportError: they aren't as many as it says, or are of another one.
    """
    if len(own) != item.lines or any(line.item != item.item for line in own):
        raise ReportError(f"{place}: expected the {item.lines} lines of {', '.join(item.item)} before it")
    run.items.append(item)
    for line in own:
        if isinstance(line, CheckLine):
            if line.map and not line.map.fits:
                raise ReportError(f"{place}: {line.tensor}: expected a map of at most {MOST} x {MOST} equal cells")
            run.checks.append(line)
        elif isinstance(line, SkipLine):
            run.skips.append(line)
        elif isinstance(line, DifferenceLine):
            run.differences.append(line)
        else:
            run.refusals.append(line)


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
