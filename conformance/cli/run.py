"""``mhc-conformance run``."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from conformance.cli.app import FAILED, SETUP, USAGE, app, interruptible, known_names, stop
from conformance.cli.fresh import HELP, Workshop, dialects_given
from conformance.cli.limits import LARGEST_SEED, LONGEST, MOST_JOBS, MOST_PROCESSES, MOST_REPEATS
from conformance.cli.selection import Choice, selected
from conformance.cli.sizes import FORMS, FULL, LONG, PREFIX, QUICK, SHORT, SizeChoice

if TYPE_CHECKING:
    from conformance.cases.dialects import Dialect

REASONS = 3
"""The commonest reasons to skip items that a line names."""


def _search(
    impl: list[str] | None,
    dialects: Sequence[Dialect],
    stages: list[str],
    dtypes: list[str],
    seconds: float,
    seed: int,
    to: Path,
) -> NoReturn:
    """Draws fresh cases for one implementation; what fails is written as a case file."""
    try:
        from conformance.files import atomic
        from conformance.questions.search import search
    except ImportError as error:
        stop(f"--search needs the extra 'regenerate': pip install 'mhc-conformance[regenerate]' ({error})", SETUP)
    from conformance.implementations.registry import load
    from conformance.interface import SetupError

    if not impl or len(impl) != 1:
        stop(f"--search takes one --impl, got {len(impl or [])}", USAGE)
    try:
        result = search(load(impl[0]), dialects, stages, dtypes, seconds, seed)
    except SetupError as error:
        stop(str(error), SETUP)
    except ValueError as error:
        stop(str(error), USAGE)
    typer.echo(f"{result.drawn} cases drawn, {result.rejected} rejected")
    if result.outcome is None:
        typer.echo("none fails")
        raise typer.Exit(0 if result.drawn else USAGE)
    case = result.outcome.case  # the id of a size says all of it; other cases need a file
    if result.content is not None:
        case = str(to)
        try:
            atomic.write(to, result.content)
        except OSError as error:
            stop(f"{to}: can't be written ({error.strerror})", USAGE)
    for check in result.outcome.failed:
        typer.echo(f"  {check.verdict}: {check.tensor}, {check.ratio:.3g} of the bound {check.message}".rstrip())
    typer.echo(f"  {result.why}")
    outcome = result.outcome
    typer.echo(
        f"  mhc-conformance run --impl {shlex.quote(impl[0])} --case {shlex.quote(case)} --stage {outcome.stage} "
        f"--dtype {outcome.x}"
    )
    raise typer.Exit(FAILED)


def _write(path: Path | None, write: Callable[[Path], None]) -> None:
    """Writes a report where one is asked for."""
    if path:
        try:
            write(path)
        except OSError as error:
            stop(f"{path}: can't be written ({error.strerror})", USAGE)


def _unclaimed(outcomes: Sequence[Any], names: set[str]) -> str:
    """The reasons for which nothing was checked: first those of items whose stage and dialect are claimed."""
    reasons = Counter(outcome.skipped for outcome in outcomes if outcome.implementation in names)
    ordered = sorted(reasons, key=lambda reason: (reason.startswith(("stage", "dialect")), reason.startswith("stage")))
    return "; ".join(f"{reasons[reason]} x {reason}" for reason in ordered[:REASONS])


@app.command()
@interruptible(lambda: "while cases were prepared or a report was written")
def run(
    impl: Annotated[
        list[str] | None,
        typer.Option(
            help="A registered name, module:attribute or exec:COMMAND; repeatable. Default: every registered "
            "implementation that is installed."
        ),
    ] = None,
    dialect: Annotated[
        list[str] | None,
        typer.Option(help=f"Test this dialect only: {HELP}. Cases of changed rows are made on the spot. Repeatable."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype of x; repeatable.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose id matches this glob, or a case file; repeatable.")
    ] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(help="Run sharded, for instance data=2,tensor=2 (data, fsdp, sequence, tensor); repeatable."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(min=0, max=MOST_PROCESSES, help="Number of processes for each mesh; 0 lets the framework decide."),
    ] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a small subset that covers every stage but the stack.")
    ] = False,
    sizes: Annotated[
        str,
        typer.Option(
            help="Production sizes with fresh data: short (a few, beside the golden cases), quick or full (instead of "
            "them), none."
        ),
    ] = SHORT,
    fresh: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            metavar="SEED",
            help="Instead of the golden cases, run the like with new numbers, made on the spot (a covering subset).",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Make all cases of --fresh, not a subset of them.")] = False,
    jsonl: Annotated[Path | None, typer.Option(help="Write every check to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit report.")] = None,
    known: Annotated[Path | None, typer.Option(help="Known results: a file of failures with their reasons.")] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_REPEATS,
            help="Calls with the same content, of one item of each stage and dtype, to find races. Default: 32, or 4 "
            "with --quick.",
        ),
    ] = None,
    stop_early: Annotated[bool, typer.Option("-x", help="Stop at the first failure.")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=MOST_JOBS, help="Worker processes at a time.")] = 2,
    time_limit: Annotated[float, typer.Option(min=0.1, max=LONGEST, help="Seconds for one item.")] = 300.0,
    modes: Annotated[
        bool,
        typer.Option(
            help="Call each item again without gradients, with arrays that are views, with other values and in memory "
            "full of NaN."
        ),
    ] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a call with the same content has other bits.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Also run items that the implementation does not claim; it must refuse them or get them right.",
        ),
    ] = False,
    search: Annotated[
        float,
        typer.Option(min=0, max=LONGEST, help="Instead of the golden cases, draw fresh ones for this many seconds."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="The seed of --search.")] = 0,
    found: Annotated[Path, typer.Option(help="File for the smallest case that fails.")] = Path("found.safetensors"),
    listing: Annotated[bool, typer.Option("--list", help="Only print what would run, an item a line.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every reason to skip an item.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a live line on a terminal.")] = True,
) -> None:
    """Run the golden cases, and judge every output and gradient.

    Exit status: 0 all passed, 1 something failed, 2 usage, 3 an implementation is unknown or could not
    be set up, 130 it was interrupted.
    """
    from conformance.cases.case import DTYPES, CaseError
    from conformance.cases.corpus import load_corpus
    from conformance.cases.dialects import dialect_names
    from conformance.implementations import registry
    from conformance.interface import SetupError
    from conformance.judge.agreement import Agreement
    from conformance.judge.integrity import Corpus
    from conformance.judge.known import judge, load_known
    from conformance.judge.modes import QUICK_REPEATS, REPEATS, fail_differences
    from conformance.judge.modes_plan import Plan
    from conformance.judge.run import Label
    from conformance.judge.run import run as run_items
    from conformance.mesh import MARK, parse_mesh
    from conformance.report import files, terminal
    from conformance.stages import STAGES

    try:
        dialects = dialects_given(dialect or dialect_names())
        dtypes = known_names("dtype", dtype, list(DTYPES))
        stages = known_names("stage", stage, list(STAGES))
        cases, corpus = load_corpus(), Corpus()
        entries = load_known(known) if known else []
    except CaseError as error:
        stop(str(error), USAGE)
    if every and (fresh is None or quick or case):
        stop("--all goes with --fresh SEED, and neither with --quick nor with --case", USAGE)
    if search and fresh is not None:
        stop("--search draws cases of its own: it doesn't go with --fresh", USAGE)
    if mesh and search:
        stop("--search draws cases for one device: it doesn't go with --mesh", USAGE)
    if mesh and any(name.startswith(registry.EXEC) for name in impl or []):
        stop("--mesh doesn't go with exec:COMMAND, which is one process: name module:attribute instead", USAGE)
    if search:
        _search(impl, dialects, stages, dtypes, search, seed, found)
    (form,) = known_names("sizes", [sizes], list(FORMS))
    patterns = [text for text in case or [] if text.startswith(PREFIX)]
    if fresh is not None and (form in (QUICK, FULL) or patterns):
        stop("sizes have new numbers anyway: --fresh goes neither with --sizes nor with the id of a size", USAGE)
    new_or_named = bool(case) or fresh is not None
    of_sizes = SizeChoice(form, dialects, stages, dtypes, patterns, new_or_named, once=quick, jobs=jobs)
    named = [text for text in case or [] if not text.startswith(PREFIX)]
    choice = Choice(dialects, bool(dialect), dtypes, stages, named, quick, fresh, every)
    selection = selected(choice, [] if of_sizes.alone or (patterns and not named) else cases)
    questions = of_sizes.questions()
    if listing:
        lines = selection.ids() + [f"{question.case}::{question.slot}" for question in questions]
        for line in lines:
            typer.echo(line)
        raise typer.Exit(0 if lines else USAGE)
    workshop = Workshop()
    items = selection.items(workshop, jobs)
    if not items and not questions:
        stop("nothing selected: no case has these dialects, dtypes and stages together", USAGE)
    chosen, left = (list(impl), {}) if impl else registry.defaults(registry.SHARDED if mesh else registry.GROUP)
    if processes and not mesh:
        stop("--processes goes with --mesh, for instance --mesh data=2,tensor=2 --processes 2", USAGE)
    try:
        chosen = [f"{name}{MARK}{parse_mesh(one, processes)}" for one in mesh for name in chosen] if mesh else chosen
    except SetupError as error:
        stop(str(error), USAGE)
    if not chosen:
        stop("no implementation is installed: " + "; ".join(f"{k}: {v}" for k, v in left.items()), SETUP)
    for name, reason in left.items():
        typer.echo(f"left out: {name} ({reason})")
    for line in of_sizes.notes:
        typer.echo(line)
    total = (len(items) + len(questions)) * len(chosen)
    by_key = {question.key: Label(question.case, "-", "-", "-", "-") for question in questions}
    limit = max(time_limit, LONG) if form == FULL else time_limit
    report = terminal.TerminalReport(total, live=progress and sys.stdout.isatty(), verbose=verbose)
    crossed = Agreement(items)
    outcomes: list[Any] = []
    broken: tuple[str, int] | None = None
    try:
        with interruptible(lambda: f"after {len(outcomes)} of {total} items; no report is written"), report:
            plan = Plan(items, limit, repeats or (QUICK_REPEATS if quick else REPEATS)) if modes else None
            for outcome in run_items(chosen, items, jobs, stop_early, limit, probe, by_key, plan):
                if strict:
                    fail_differences(outcome)
                crossed.add(outcome)
                outcomes.append(outcome)
                report.add(outcome)
    except SetupError as error:
        broken = str(error), SETUP
    except CaseError as error:
        broken = str(error), USAGE
    if broken and not outcomes:
        stop(*broken)
    report.crossed = crossed.lines(dict.fromkeys(o.implementation for o in outcomes))
    judged = judge(outcomes, entries)
    report.known = [(entries[k], len(items)) for k, items in sorted(judged.known.items())]
    report.show(judged.unknown)
    for line in judged.stale:
        typer.echo(line)
    corpus.look_again(o.altered for o in outcomes if o.altered)
    _write(jsonl, lambda path: files.write_jsonl(path, outcomes, corpus.hash, corpus.problems))
    _write(junit, lambda path: files.write_junit(path, outcomes))
    if any(o.failed and o.file.startswith(str(workshop.folder)) for o in outcomes):
        workshop.keep()
        typer.echo(f"the cases that were made are in {workshop.folder}")
    if broken:
        stop(f"{broken[0]}; the run ended there", broken[1])
    if corpus.problems:
        stop(corpus.told(), USAGE)
    idle = {o.implementation for o in outcomes} - {o.implementation for o in outcomes if not o.skipped}
    if idle and (impl or len(idle) == len(chosen)):
        stop(f"nothing was checked for {', '.join(sorted(idle))}: {_unclaimed(outcomes, idle)}", USAGE)
    if idle:
        typer.echo(f"nothing was checked for {', '.join(sorted(idle))}: {_unclaimed(outcomes, idle)}")
    raise typer.Exit(FAILED if judged.unknown or judged.stale else 0)
