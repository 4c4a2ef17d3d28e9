"""A run of the suite: what is selected, who is asked, what is measured, and what is said and written of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from conformance.cli import last
from conformance.cli.app import FAILED, INTERRUPTED, SETUP, USAGE, known_names, say, stop
from conformance.cli.fresh import Workshop, dialects_given
from conformance.cli.selection import Choice, selected
from conformance.cli.sizes import FULL, LONG, PREFIX, QUICK, SHORT, SizeChoice

if TYPE_CHECKING:
    from conformance.cases.case import Item
    from conformance.judge.groups import Diagnosis
    from conformance.judge.integrity import Corpus
    from conformance.judge.item import Outcome
    from conformance.judge.known import Known
    from conformance.questions.sizes.item import Question
    from conformance.report.files import Lines

REASONS = 3
"""The commonest reasons to skip items that a line names."""


@dataclass
class Request:
    """The options of ``run``, under their names there."""

    impl: tuple[str, ...] = ()
    dialect: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    stage: tuple[str, ...] = ()
    case: tuple[str, ...] = ()
    mesh: tuple[str, ...] = ()
    processes: int = 0
    quick: bool = False
    sizes: str = SHORT
    fresh: int | None = None
    every: bool = False
    modes: bool = True
    repeats: int | None = None
    probe: bool = False
    known: Path | None = None
    jsonl: Path | None = None
    junit: Path | None = None
    resume: bool = False
    stop_early: bool = False
    jobs: int = 2
    time_limit: float = 300.0
    strict: bool = False
    listing: bool = False
    verbose: bool = False
    skipped: bool = False
    diagnose: bool = True
    progress: bool = True
    only: Mapping[str, Sequence[str]] | None = field(default=None, repr=False)
    """By reference the ids of the items that are run; all that are selected where it is None."""

    SELECTS = ("impl", "dialect", "dtype", "stage", "case", "mesh", "processes", "quick", "sizes", "fresh", "every",
               "modes", "repeats", "probe", "strict")  # fmt: skip
    """The options on which it depends what is measured."""

    def selection(self) -> dict[str, Any]:
        """Those of `SELECTS` that aren't as they are by default, as JSON has them."""
        plain = Request()
        values = {name: getattr(self, name) for name in self.SELECTS}
        failed = {} if self.only is None else {"failed": True}
        changed = {k: v for k, v in values.items() if v != getattr(plain, k)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()} | failed

    def check(self) -> None:
        """Ends the command where options contradict each other."""
        from conformance.implementations import registry

        if self.every and (self.fresh is None or self.quick or self.case):
            stop("--all goes with --fresh SEED, and neither with --quick nor with --case", USAGE)
        if self.mesh and any(name.startswith(registry.EXEC) for name in self.impl):
            stop("--mesh doesn't go with exec:COMMAND, which is one process: name module:attribute instead", USAGE)
        if self.processes and not self.mesh:
            stop("--processes goes with --mesh, for instance --mesh data=2,tensor=2 --processes 2", USAGE)
        if self.fresh is not None and (self.sizes in (QUICK, FULL) or self.sizes_named):
            stop("sizes have new numbers anyway: --fresh goes neither with --sizes nor with the id of a size", USAGE)
        if self.resume and not self.jsonl:
            stop("--resume goes on with a file: name it by --jsonl FILE", USAGE)

    @property
    def sizes_named(self) -> list[str]:
        return [text for text in self.case if text.startswith(PREFIX)]


def repeat_failed(options: Mapping[str, Any]) -> NoReturn:
    """Runs what failed in the last run from this folder, with what was selected there."""
    try:
        before = last.load()
    except (OSError, ValueError, RuntimeError) as error:
        stop(f"--failed repeats a run from this folder, and none is known ({error}): run without it first", USAGE)
    if not before.failed:
        say("nothing failed in the last run from this folder")
        raise click.exceptions.Exit(0)
    known = {f.name for f in fields(Request)}
    asked = {k: tuple(v) if isinstance(v, list) else v for k, v in before.selection.items() if k in known}
    given = {k: v for k, v in options.items() if k not in Request.SELECTS}
    carry_out(Request(**{**given, **asked, "impl": tuple(before.failed), "mesh": (), "only": before.failed}))


@dataclass
class Prepared:
    """What a run will ask, and whom."""

    request: Request
    items: list[Item]
    questions: list[Question]
    implementations: list[str]
    entries: list[Known]
    corpus: Corpus
    workshop: Workshop
    limit: float

    @property
    def total(self) -> int:
        return (len(self.items) + len(self.questions)) * len(self.implementations)


def prepare(request: Request) -> Prepared:
    """Selects items and implementations; the command ends where there are none, and after ``--list``."""
    from conformance.cases.case import DTYPES, CaseError
    from conformance.cases.corpus import load_corpus
    from conformance.cases.dialects import dialect_names
    from conformance.judge.integrity import Corpus
    from conformance.judge.known import load_known
    from conformance.stages import STAGES

    try:
        rows = dialects_given(request.dialect or dialect_names())
        dtypes = known_names("dtype", request.dtype, list(DTYPES))
        stages = known_names("stage", request.stage, list(STAGES))
        cases, corpus = load_corpus(), Corpus()
        entries = load_known(request.known) if request.known else []
    except CaseError as error:
        stop(str(error), USAGE)
    request.check()
    of_sizes = SizeChoice(
        request.sizes, rows, stages, dtypes, request.sizes_named, bool(request.case) or request.fresh is not None,
        once=request.quick, jobs=request.jobs, copies=1 + _most_processes(request),
    )  # fmt: skip
    named = [text for text in request.case if not text.startswith(PREFIX)]
    choice = Choice(rows, bool(request.dialect), dtypes, stages, named, request.quick, request.fresh, request.every)
    selection = selected(choice, [] if of_sizes.alone or (request.sizes_named and not named) else cases)
    questions = of_sizes.questions()
    if request.listing:
        lines = selection.ids() + [f"{question.case}::{question.slot}" for question in questions]
        for line in lines:
            say(line)
        raise click.exceptions.Exit(0 if lines else USAGE)
    workshop = Workshop()
    items = selection.items(workshop, request.jobs)
    if not items and not questions:
        stop("nothing selected: no case has these dialects, dtypes and stages together", USAGE)
    chosen = _implementations(request)
    for line in of_sizes.notes:
        say(line)
    limit = max(request.time_limit, LONG) if request.sizes == FULL else request.time_limit
    return Prepared(request, items, questions, chosen, entries, corpus, workshop, limit)


def _most_processes(request: Request) -> int:
    """Of the meshes that are asked, beside the worker's own; the command ends where one isn't a mesh."""
    from conformance.implementations import registry
    from conformance.interface import SetupError
    from conformance.mesh import MARK

    sharded = [f"{name}{MARK}{mesh}/{request.processes}" if request.processes else f"{name}{MARK}{mesh}"
               for name in request.impl or registry.registered(registry.SHARDED) for mesh in request.mesh]  # fmt: skip
    try:
        return max(map(registry.processes_of, [*request.impl, *sharded]), default=0)
    except SetupError as error:
        stop(str(error), USAGE)


def _implementations(request: Request) -> list[str]:
    """The references of those that are asked; the command ends where there are none."""
    from conformance.implementations import registry
    from conformance.interface import SetupError
    from conformance.mesh import MARK, parse_mesh

    group = registry.SHARDED if request.mesh else registry.GROUP
    chosen, left = (list(request.impl), {}) if request.impl else registry.defaults(group)
    try:
        meshes = [f"{MARK}{parse_mesh(one, request.processes)}" for one in request.mesh] or [""]
    except SetupError as error:
        stop(str(error), USAGE)
    if not chosen:
        stop("no implementation is installed: " + "; ".join(f"{k}: {v}" for k, v in left.items()), SETUP)
    for name, reason in left.items():
        say(f"left out: {name} ({reason})")
    return [f"{name}{mesh}" for mesh in meshes for name in chosen]


@dataclass
class Measured:
    """What came of a run.

    Attributes:
        broken: why it ended too early and with which status; None where it didn't.
        interrupted: whether somebody ended it.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    broken: tuple[str, int] | None = None
    interrupted: bool = False
    crossed: list[str] = field(default_factory=list[str])


def carry_out(request: Request) -> NoReturn:
    """The whole command."""
    prepared = prepare(request)
    lines, before = _opened(prepared)
    measured = _measured(prepared, lines, before)
    if measured.broken and not measured.outcomes:
        stop(*measured.broken)
    _told(prepared, measured, lines)


def _opened(prepared: Prepared) -> tuple[Lines | None, list[Outcome]]:
    """The file that takes the run, and what it has already where a run is resumed."""
    from conformance.report.files import Lines
    from conformance.report.resume import NotResumed, resumed

    request, corpus = prepared.request, prepared.corpus
    if not request.jsonl:
        return None, []
    before: list[Outcome] = []
    try:
        if request.resume:
            before = resumed(request.jsonl, corpus.hash, request.selection())
        return Lines(request.jsonl, corpus.hash, corpus.problems, request.selection(), before), before
    except NotResumed as error:
        stop(str(error), USAGE)
    except OSError as error:
        stop(f"{request.jsonl}: can't be written ({error.strerror or error})", USAGE)


def _measured(prepared: Prepared, lines: Lines | None, before: list[Outcome]) -> Measured:
    """Asks for everything. What was measured is in the file before anything else is done with it."""
    from conformance.cases.case import CaseError
    from conformance.interface import SetupError
    from conformance.judge.agreement import Agreement
    from conformance.judge.modes import fail_differences
    from conformance.report.terminal import Progress

    measured, request, crossed = Measured(list(before)), prepared.request, Agreement(prepared.items)
    progress = Progress(prepared.total - len(before), request.progress)
    try:
        with progress:
            for outcome in _outcomes(prepared, before):
                if request.strict:
                    fail_differences(outcome)
                measured.outcomes.append(outcome)
                if lines:
                    lines.add(outcome)
                crossed.add(outcome)
                progress.add(outcome)
    except SetupError as error:
        measured.broken = str(error), SETUP
    except CaseError as error:
        measured.broken = str(error), USAGE
    except OSError as error:
        measured.broken = f"{request.jsonl}: can't be written ({error.strerror or error})", USAGE
    except KeyboardInterrupt:
        measured.interrupted = True
    measured.crossed = crossed.lines(dict.fromkeys(o.implementation for o in measured.outcomes))
    return measured


def _outcomes(prepared: Prepared, before: Sequence[Outcome]) -> Iterator[Outcome]:
    from conformance.files.plain import text_of
    from conformance.judge.modes import QUICK_REPEATS, REPEATS
    from conformance.judge.modes_plan import Plan
    from conformance.judge.run import Label, run

    request = prepared.request
    sizes = {q.key: Label(q.case, "-", "-", "-", "-", str(q.slot)) for q in prepared.questions}
    leave: dict[str, set[str]] = {reference: set() for reference in prepared.implementations}
    written = {text_of(reference): reference for reference in leave}  # as a file of results has them
    for outcome in before:
        leave.setdefault(written.get(outcome.reference, outcome.reference), set()).add(outcome.asked)
    if request.only is not None:
        ids = {item.id for item in prepared.items} | {label.id for label in sizes.values()}
        for reference in prepared.implementations:
            leave[reference] |= ids - set(request.only.get(reference, ()))
    repeats = request.repeats or (QUICK_REPEATS if request.quick else REPEATS)
    plan = Plan(prepared.items, prepared.limit, repeats) if request.modes else None
    yield from run(
        prepared.implementations, prepared.items, request.jobs, request.stop_early, prepared.limit, request.probe,
        sizes, plan, leave,
    )  # fmt: skip


def _told(prepared: Prepared, measured: Measured, lines: Lines | None) -> NoReturn:
    """Writes the files, then says it all; a terminal that fails loses nothing."""
    from conformance.judge.known import judge
    from conformance.report.terminal import TerminalReport

    request, corpus, outcomes = prepared.request, prepared.corpus, measured.outcomes
    judged = judge(outcomes, prepared.entries)
    corpus.look_again(o.altered for o in outcomes if o.altered)
    diagnoses: list[Diagnosis] = []
    if judged.unknown and not measured.interrupted and request.diagnose:
        from conformance.questions.diagnosis.diagnose import diagnosed

        try:
            diagnoses = diagnosed(outcomes, judged.unknown)
        except KeyboardInterrupt:  # nobody wants to wait for a cause; what was measured is whole
            say("the search for a cause was interrupted")
    _write_files(prepared, measured, lines, diagnoses)
    kept = any(o.failed and o.file.startswith(str(prepared.workshop.folder)) for o in outcomes)
    if kept:
        prepared.workshop.keep()
    report = TerminalReport(verbose=request.verbose, skipped=request.skipped)
    report.crossed = measured.crossed
    report.known = [(prepared.entries[k], len(items)) for k, items in sorted(judged.known.items())]
    report.notes = [*judged.stale, *([f"the cases that were made are in {prepared.workshop.folder}"] if kept else [])]
    report.show(outcomes, judged.unknown, diagnoses)
    if measured.interrupted:
        stop(
            f"interrupted after {len(outcomes)} of {prepared.total} items; the files have what was measured",
            INTERRUPTED,
        )
    if measured.broken:
        stop(f"{measured.broken[0]}; the run ended there", measured.broken[1])
    if corpus.problems:
        stop(corpus.told(), USAGE)
    _check_idle(prepared, outcomes)
    raise click.exceptions.Exit(FAILED if judged.unknown or judged.stale else 0)


def _write_files(prepared: Prepared, measured: Measured, lines: Lines | None, diagnoses: Sequence[Diagnosis]) -> None:
    from conformance.report import files

    request, corpus = prepared.request, prepared.corpus
    written = request.jsonl
    try:
        early = measured.interrupted or measured.broken is not None
        if lines:
            lines.end(diagnoses, corpus.hash, corpus.problems, interrupted=early)
        if request.junit:
            written = request.junit
            files.write_junit(request.junit, measured.outcomes)
    except OSError as error:
        measured.broken = measured.broken or (f"{written}: can't be written ({error.strerror or error})", USAGE)
    last.save(request.selection(), measured.outcomes)


def _check_idle(prepared: Prepared, outcomes: Sequence[Outcome]) -> None:
    """Says for whom nothing was checked; the command ends where somebody named it, or it is everyone."""
    idle = {o.implementation for o in outcomes} - {o.implementation for o in outcomes if not o.skipped}
    if not idle:
        return
    line = f"nothing was checked for {', '.join(sorted(idle))}: {_unclaimed(outcomes, idle)}"
    if prepared.request.impl or len(idle) == len(prepared.implementations):
        stop(line, USAGE)
    say(line)


def _unclaimed(outcomes: Sequence[Outcome], names: set[str]) -> str:
    """The reasons for which nothing was checked: first those of items whose stage and dialect are claimed."""
    reasons = Counter(outcome.skipped for outcome in outcomes if outcome.implementation in names)
    ordered = sorted(reasons, key=lambda reason: (reason.startswith(("stage", "dialect")), reason.startswith("stage")))
    return "; ".join(f"{reasons[reason]} x {reason}" for reason in ordered[:REASONS])
