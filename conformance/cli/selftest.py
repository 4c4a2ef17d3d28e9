"""``mhc-conformance selftest``, which was called ``power``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from conformance.cli.app import FAILED, SETUP, USAGE, say, stop
from conformance.cli.limits import MOST_JOBS, MOST_VARIANTS
from conformance.cli.options import FILE, command, one_of, option

BOTH, WHAT, WHERE = "both", "what", "where"


@command()
@option("--quick", is_flag=True, help="Run a small subset of the cases, and ten honest variants.")
@option("--mutant", multiple=True, help="Only mutants whose name contains this text; repeatable.")
@option(
    "--kind",
    type=one_of("kind", (BOTH, WHAT, WHERE)),
    default=BOTH,
    help="Mistakes in what is computed (what), in where (where), or both.",
)
@option(
    "--variants",
    type=click.IntRange(0, MOST_VARIANTS),
    help="Number of honest variants. Default: 200, or 10 with --quick.",
)
@option("--jobs", type=click.IntRange(1, MOST_JOBS), default=2, help="Worker processes.")
@option("--write", type=FILE, help="Put the tables between the selftest and the where markers of this Markdown file.")
@option("--json", type=FILE, help="Write the figures to this file, for report.")
@option("--seen", type=FILE, help="Write the stages that see each mistake to this file, for what run says at its end.")
def selftest(
    quick: bool,
    mutant: tuple[str, ...],
    kind: str,
    variants: int | None,
    jobs: int,
    write: Path | None,
    json: Path | None,
    seen: Path | None,
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

    titles = [[m.title() for m in mutants] for mutants in (measure.MUTANTS, measure_where.WHERE)]
    chosen, of_where = (
        [k for k, title in enumerate(names) if not mutant or any(m.lower() in title.lower() for m in mutant)]
        for names in titles
    )
    chosen, of_where = [] if kind == WHERE else chosen, [] if kind == WHAT else of_where
    if not chosen and not of_where:
        known = ", ".join(title for names in titles for title in names)
        stop(f"no mutant's name has {' or '.join(map(repr, mutant))}; they are: {known}", USAGE)
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
    if write or json or seen:
        try:
            if write:
                if kind != WHERE:
                    document.rewrite(write, "selftest", table.markdown(result))
                if kind != WHAT:
                    document.rewrite(write, "where", table.markdown_of_places(places))
            if json:
                atomic.write(json, table.as_json(result, places))
            if seen:
                atomic.write(seen, table.as_seen(result))
        except (OSError, ValueError) as error:
            stop(told(error), USAGE)
    problems = [*result.survivors, *places.survivors, *result.false_alarms]
    for line in problems:
        say(line)
    say(f"{len(chosen) + len(of_where)} mutants, {count} honest variants: {len(problems)} problems")
    raise click.exceptions.Exit(FAILED if problems else 0)


@command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def power() -> None:
    """Say what this command is called now."""
    stop("power is called selftest now: mhc-conformance selftest takes the same options", USAGE)
