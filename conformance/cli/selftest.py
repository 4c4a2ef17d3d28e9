"""``mhc-conformance selftest``, which was called ``power``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from conformance.cli.app import FAILED, SETUP, USAGE, app, known_names, say, stop
from conformance.cli.limits import MOST_JOBS, MOST_VARIANTS

BOTH, WHAT, WHERE = "both", "what", "where"


@app.command()
def selftest(
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a small subset of the cases, and ten honest variants.")
    ] = False,
    mutant: Annotated[
        list[str] | None, typer.Option(help="Only mutants whose name contains this text; repeatable.")
    ] = None,
    kind: Annotated[str, typer.Option(help="Mistakes in what is computed (what), in where (where), or both.")] = BOTH,
    variants: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_VARIANTS, help="Number of honest variants. Default: 200, or 10 with --quick."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=MOST_JOBS, help="Worker processes.")] = 2,
    write: Annotated[
        Path | None,
        typer.Option(help="Put the tables between the selftest and the where markers of this Markdown file."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file, for report.")] = None,
) -> None:
    """Measure the suite itself.

    Mistakes are planted, and it must notice them; honest variants must pass.

    Exit status: 0 every mutant is killed and no honest variant fails, 1 otherwise, 2 usage, 3 PyTorch is missing.
    """
    try:
        from conformance.selftest import measure, measure_where, table
    except ImportError as error:
        stop(f"selftest needs PyTorch: pip install 'mhc-conformance[torch]' ({error})", SETUP)
    from rich.console import Console
    from rich.progress import Progress

    from conformance.files import atomic, document
    from conformance.files.reading import told

    (kind,) = known_names("kind", [kind], [BOTH, WHAT, WHERE])
    titles = [[m.title() for m in mutants] for mutants in (measure.MUTANTS, measure_where.WHERE)]
    chosen, of_where = (
        [k for k, title in enumerate(names) if not mutant or any(m.lower() in title.lower() for m in mutant)]
        for names in titles
    )
    chosen, of_where = [] if kind == WHERE else chosen, [] if kind == WHAT else of_where
    if not chosen and not of_where:
        known = ", ".join(title for names in titles for title in names)
        stop(f"no mutant's name has {' or '.join(map(repr, mutant or []))}; they are: {known}", USAGE)
    count = (measure.QUICK_VARIANTS if quick else measure.VARIANTS) if variants is None else variants
    if kind == WHERE and variants is None:
        count = 0
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("mutants and honest variants", total=None)
        result = measure.measure(
            chosen, list(range(count)), quick, jobs, lambda k, n: bar.update(task, completed=k, total=n)
        )
        task = bar.add_task("mutants of where", total=None)
        places = measure_where.measure_places(
            of_where, quick, jobs, lambda k, n: bar.update(task, completed=k, total=n)
        )
    console = Console(width=None if sys.stdout.isatty() else 220)
    for part in (table.terminal(result), table.terminal_of_places(places)):
        console.print(part)
    for line in [*table.reasons(result), *([table.honest_line(result)] if result.honest else [])]:
        say(line)
    if write or json:
        try:
            if write:
                if kind != WHERE:
                    document.rewrite(write, "selftest", table.markdown(result))
                if kind != WHAT:
                    document.rewrite(write, "where", table.markdown_of_places(places))
            if json:
                atomic.write(json, table.as_json(result, places))
        except (OSError, ValueError) as error:
            stop(told(error), USAGE)
    problems = [*result.survivors, *places.survivors, *result.false_alarms]
    for line in problems:
        say(line)
    say(f"{len(chosen) + len(of_where)} mutants, {count} honest variants: {len(problems)} problems")
    raise typer.Exit(FAILED if problems else 0)


@app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def power() -> None:
    """Say what this command is called now."""
    stop("power is called selftest now: mhc-conformance selftest takes the same options", USAGE)
