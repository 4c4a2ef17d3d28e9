"""The command line. Frameworks, NumPy and the oracle are imported inside the commands that need them."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Conformance of mHC implementations to certified golden values.",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
fixtures_app = typer.Typer(
    help="The golden corpus: verify it, regenerate it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(fixtures_app, name="fixtures")

FAILED, USAGE, SETUP = 1, 2, 3
Names = Annotated[list[str] | None, typer.Option(show_default=False)]


def stop(message: str, status: int) -> None:
    typer.echo(f"mhc-conformance: {message}", err=True)
    raise typer.Exit(status)


def _known(kind: str, given: list[str] | None, known: list[str]) -> list[str]:
    for name in given or []:
        if name not in known:
            stop(f"unknown {kind} {name!r}, expected one of {', '.join(known)}", USAGE)
    return given or known


@app.command()
def run(
    impl: Annotated[list[str] | None, typer.Option(help="A registered name or module:attribute; repeatable.")] = None,
    dialect: Annotated[list[str] | None, typer.Option(help="Only this dialect; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype of x; repeatable.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only cases whose id matches this glob; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A covering subset.")] = False,
    jsonl: Annotated[Path | None, typer.Option(help="Write every check to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit report.")] = None,
    stop_early: Annotated[bool, typer.Option("-x", help="Stop at the first failure.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes at a time.")] = 2,
    listing: Annotated[bool, typer.Option("--list", help="Only print what would run, an item a line.")] = False,
    progress: Annotated[bool, typer.Option(help="A live line, on a terminal.")] = True,
) -> None:
    """Run the golden cases on implementations and judge every output and gradient.

    Exit status: 0 all passed, 1 something failed, 2 usage, 3 an implementation could not be set up.
    """
    from conformance import registry, report_files, report_terminal
    from conformance.cases import DTYPES, CaseError
    from conformance.corpus import dialect_names, load_corpus
    from conformance.crossframework import CrossFramework
    from conformance.interface import SetupError
    from conformance.runner import run as run_items
    from conformance.stages import STAGES

    try:
        dialects = _known("dialect", dialect, dialect_names())
        dtypes = _known("dtype", dtype, list(DTYPES))
        stages = _known("stage", stage, list(STAGES))
        cases = load_corpus()
    except CaseError as error:
        stop(str(error), USAGE)
    for pattern in case or []:
        if not fnmatch.filter([c.id for c in cases], pattern):
            stop(f"no case matches {pattern!r}; for instance {cases[0].id}", USAGE)
    items = [
        item
        for c in cases
        if c.dialect in dialects
        and (not quick or c.quick)
        and (not case or any(fnmatch.fnmatchcase(c.id, pattern) for pattern in case))
        for item in c.items()
        if item.stage in stages and item.variant.x in dtypes and not (quick and item.variant.pure)
    ]
    if not items:
        stop("nothing selected: no case has these dialects, dtypes and stages together", USAGE)
    if listing:
        for item in items:
            typer.echo(item.id)
        raise typer.Exit(0)
    chosen, left = (list(impl), {}) if impl else registry.defaults()
    if not chosen:
        stop("no implementation is installed: " + "; ".join(f"{k}: {v}" for k, v in left.items()), SETUP)
    for name, reason in left.items():
        typer.echo(f"left out: {name} ({reason})")
    report = report_terminal.Report(len(items) * len(chosen), live=progress and sys.stdout.isatty())
    crossed = CrossFramework(items)
    outcomes: list[Any] = []
    broken: tuple[str, int] | None = None
    try:
        with report:
            for outcome in run_items(chosen, items, jobs, stop_early):
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
    report.show()
    for path, write in ((jsonl, report_files.write_jsonl), (junit, report_files.write_junit)):
        if path:
            try:
                write(path, outcomes)
            except OSError as error:
                stop(f"{path}: can't be written ({error.strerror})", USAGE)
    if broken:
        stop(f"{broken[0]}; the run ended there", broken[1])
    idle = {o.implementation for o in outcomes} - {o.implementation for o in outcomes if not o.skipped}
    if idle and (impl or len(idle) == len(chosen)):
        stop(f"nothing was checked for {', '.join(sorted(idle))}: none of the selected cases is claimed", USAGE)
    if idle:
        typer.echo(f"nothing was checked for {', '.join(sorted(idle))}: none of the selected cases is claimed")
    raise typer.Exit(FAILED if any(o.failed for o in outcomes) else 0)


@fixtures_app.command()
def verify() -> None:
    """Check every golden file against the manifest, to the bit."""
    from conformance import corpus
    from conformance.cases import CaseError

    try:
        problems = corpus.verify()
        count = len(corpus.manifest())
    except CaseError as error:
        stop(str(error), FAILED)
    for line in problems:
        typer.echo(line)
    typer.echo(f"{count} files promised, {len(problems)} problems")
    raise typer.Exit(FAILED if problems else 0)


@fixtures_app.command()
def regenerate(
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where something would change.")] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="Write, and exit 1 where something changed.")] = False,
) -> None:
    """Rewrite the corpus from the oracle and print what changed."""
    try:
        from conformance.oracle.generate import regenerate as generate
    except ImportError as error:
        stop(f"regenerating needs the extra 'regenerate': pip install 'mhc-conformance[regenerate]' ({error})", SETUP)
    from rich.console import Console
    from rich.progress import Progress

    from conformance.corpus import fixtures

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("cases", total=None)
        changes = generate(fixtures() / "golden", jobs, check, lambda k, n: bar.update(task, completed=k, total=n))
    for line in changes:
        typer.echo(line)
    typer.echo(f"{len(changes)} files {'would change' if check else 'changed'}")
    raise typer.Exit(FAILED if (check or frozen) and changes else 0)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
