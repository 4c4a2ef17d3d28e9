"""``mhc-conformance run``."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from conformance.cli.app import FAILED, SETUP, USAGE, interruptible, known_names, stop
from conformance.cli.fresh import HELP, Workshop, dialects_given
from conformance.cli.options import DIALECT, DTYPE, FILE, STAGE, command, one_of, option
from conformance.cli.selection import Choice, selected
from conformance.cli.sizes import FORMS, FULL, LONG, PREFIX, QUICK, SHORT, SizeChoice

if TYPE_CHECKING:
    from conformance.cases.dialects import Dialect

REASONS = 3
"""The commonest reasons to skip items that a line names."""


def _search(
    impl: Sequence[str],
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

    if len(impl) != 1:
        stop(f"--search takes one --impl, got {len(impl)}", USAGE)
    try:
        result = search(load(impl[0]), dialects, stages, dtypes, seconds, seed)
    except SetupError as error:
        stop(str(error), SETUP)
    except ValueError as error:
        stop(str(error), USAGE)
    click.echo(f"{result.drawn} cases drawn, {result.rejected} rejected")
    if result.outcome is None:
        click.echo("none fails")
        raise click.exceptions.Exit(0 if result.drawn else USAGE)
    case = result.outcome.case  # the id of a size says all of it; other cases need a file
    if result.content is not None:
        case = str(to)
        try:
            atomic.write(to, result.content)
        except OSError as error:
            stop(f"{to}: can't be written ({error.strerror})", USAGE)
    for check in result.outcome.failed:
        click.echo(f"  {check.verdict}: {check.tensor}, {check.ratio:.3g} of the bound {check.message}".rstrip())
    click.echo(f"  {result.why}")
    outcome = result.outcome
    click.echo(
        f"  mhc-conformance run --impl {shlex.quote(impl[0])} --case {shlex.quote(case)} --stage {outcome.stage} "
        f"--dtype {outcome.x}"
    )
    raise click.exceptions.Exit(FAILED)


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


@command()
@option(
    "--impl",
    multiple=True,
    heading="What is run",
    help="A registered name, module:attribute or exec:COMMAND; repeatable. Default: every registered "
    "implementation that is installed.",
)
@option(
    "--dialect",
    type=DIALECT,
    multiple=True,
    heading="What is run",
    help=f"Test this dialect only: {HELP}. Cases of changed rows are made on the spot. Repeatable.",
)
@option("--stage", type=STAGE, multiple=True, heading="What is run", help="Only this stage; repeatable.")
@option("--dtype", type=DTYPE, multiple=True, heading="What is run", help="Only this dtype of x; repeatable.")
@option(
    "--case",
    multiple=True,
    heading="What is run",
    help="Only cases whose id matches this glob, or a case file; repeatable.",
)
@option(
    "--quick", is_flag=True, heading="What is run", help="Run a small subset that covers every stage but the stack."
)
@option(
    "--sizes",
    type=one_of("sizes", FORMS),
    default=SHORT,
    heading="What is run",
    help="Production sizes with fresh data: short (a few, beside the golden cases), quick or full (instead of "
    "them), none.",
)
@option(
    "--fresh",
    type=click.IntRange(min=0),
    metavar="SEED",
    heading="What is run",
    help="Instead of the golden cases, run the like with new numbers, made on the spot (a covering subset).",
)
@option("--all", "every", is_flag=True, heading="What is run", help="Make all cases of --fresh, not a subset of them.")
@option(
    "--mesh",
    multiple=True,
    heading="What is run",
    help="Run sharded, for instance data=2,tensor=2 (data, fsdp, sequence, tensor); repeatable.",
)
@option(
    "--processes",
    type=click.IntRange(min=0),
    default=0,
    heading="What is run",
    help="Number of processes for each mesh; 0 lets the framework decide.",
)
@option(
    "--search",
    type=click.FloatRange(min=0),
    default=0.0,
    heading="What is run",
    help="Instead of the golden cases, draw fresh ones for this many seconds.",
)
@option("--seed", type=int, default=0, heading="What is run", help="The seed of --search.")
@option("--list", "listing", is_flag=True, heading="What is run", help="Only print what would run, an item a line.")
@option(
    "--modes/--no-modes",
    is_flag=True,
    default=True,
    heading="How it is judged",
    help="Call each item again without gradients, with arrays that are views, with other values and in memory "
    "full of NaN.",
)
@option(
    "--repeats",
    type=click.IntRange(min=1),
    heading="How it is judged",
    help="Calls with the same content, of one item of each stage and dtype, to find races. Default: 32, or 4 "
    "with --quick.",
)
@option(
    "--probe",
    is_flag=True,
    heading="How it is judged",
    help="Also run items that the implementation does not claim; it must refuse them or get them right.",
)
@option(
    "--strict", is_flag=True, heading="How it is judged", help="Fail where a call with the same content has other bits."
)
@option("--known", type=FILE, heading="How it is judged", help="Known results: a file of failures with their reasons.")
@option("-x", "stop_early", is_flag=True, heading="How it runs", help="Stop at the first failure.")
@option("--jobs", type=click.IntRange(min=1), default=2, heading="How it runs", help="Worker processes at a time.")
@option(
    "--time-limit", type=click.FloatRange(min=0.1), default=300.0, heading="How it runs", help="Seconds for one item."
)
@option("--jsonl", type=FILE, heading="What comes out", help="Write every check to this file.")
@option("--junit", type=FILE, heading="What comes out", help="Write a JUnit report.")
@option(
    "--found",
    type=FILE,
    default=Path("found.safetensors"),
    heading="What comes out",
    help="File for the smallest case that fails.",
)
@option("--verbose", "-v", is_flag=True, heading="What comes out", help="Print every reason to skip an item.")
@option(
    "--progress/--no-progress",
    is_flag=True,
    default=True,
    heading="What comes out",
    help="Show a live line on a terminal.",
)
@interruptible(lambda: "while cases were prepared or a report was written")
def run(
    impl: tuple[str, ...],
    dialect: tuple[str, ...],
    dtype: tuple[str, ...],
    stage: tuple[str, ...],
    case: tuple[str, ...],
    mesh: tuple[str, ...],
    processes: int,
    quick: bool,
    sizes: str,
    fresh: int | None,
    every: bool,
    jsonl: Path | None,
    junit: Path | None,
    known: Path | None,
    repeats: int | None,
    stop_early: bool,
    jobs: int,
    time_limit: float,
    modes: bool,
    strict: bool,
    probe: bool,
    search: float,
    seed: int,
    found: Path,
    listing: bool,
    verbose: bool,
    progress: bool,
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
    if mesh and any(name.startswith(registry.EXEC) for name in impl):
        stop("--mesh doesn't go with exec:COMMAND, which is one process: name module:attribute instead", USAGE)
    if search:
        _search(impl, dialects, stages, dtypes, search, seed, found)
    patterns = [text for text in case if text.startswith(PREFIX)]
    if fresh is not None and (sizes in (QUICK, FULL) or patterns):
        stop("sizes have new numbers anyway: --fresh goes neither with --sizes nor with the id of a size", USAGE)
    new_or_named = bool(case) or fresh is not None
    of_sizes = SizeChoice(sizes, dialects, stages, dtypes, patterns, new_or_named, once=quick, jobs=jobs)
    named = [text for text in case if not text.startswith(PREFIX)]
    choice = Choice(dialects, bool(dialect), dtypes, stages, named, quick, fresh, every)
    selection = selected(choice, [] if of_sizes.alone or (patterns and not named) else cases)
    questions = of_sizes.questions()
    if listing:
        lines = selection.ids() + [f"{question.case}::{question.slot}" for question in questions]
        for line in lines:
            click.echo(line)
        raise click.exceptions.Exit(0 if lines else USAGE)
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
        click.echo(f"left out: {name} ({reason})")
    for line in of_sizes.notes:
        click.echo(line)
    total = (len(items) + len(questions)) * len(chosen)
    by_key = {question.key: Label(question.case, "-", "-", "-", "-") for question in questions}
    limit = max(time_limit, LONG) if sizes == FULL else time_limit
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
        click.echo(line)
    corpus.look_again(o.altered for o in outcomes if o.altered)
    _write(jsonl, lambda path: files.write_jsonl(path, outcomes, corpus.hash, corpus.problems))
    _write(junit, lambda path: files.write_junit(path, outcomes))
    if any(o.failed and o.file.startswith(str(workshop.folder)) for o in outcomes):
        workshop.keep()
        click.echo(f"the cases that were made are in {workshop.folder}")
    if broken:
        stop(f"{broken[0]}; the run ended there", broken[1])
    if corpus.problems:
        stop(corpus.told(), USAGE)
    idle = {o.implementation for o in outcomes} - {o.implementation for o in outcomes if not o.skipped}
    if idle and (impl or len(idle) == len(chosen)):
        stop(f"nothing was checked for {', '.join(sorted(idle))}: {_unclaimed(outcomes, idle)}", USAGE)
    if idle:
        click.echo(f"nothing was checked for {', '.join(sorted(idle))}: {_unclaimed(outcomes, idle)}")
    raise click.exceptions.Exit(FAILED if judged.unknown or judged.stale else 0)
