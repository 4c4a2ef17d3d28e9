"""``mhc-conformance fixtures verify`` and ``regenerate``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from conformance.cli.app import FAILED, SETUP, USAGE, app, known_names, say, stop
from conformance.cli.limits import MOST_JOBS

fixtures_app = typer.Typer(help="Verify or regenerate the golden corpus.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(fixtures_app, name="fixtures")


@fixtures_app.command()
def verify() -> None:
    """Check every golden file against the manifest, to the bit, and dialects.json against the corpus's record.

    Exit status: 0 every file is as promised, 1 one isn't, 2 the manifest can't be read.
    """
    from conformance.cases import corpus
    from conformance.cases.case import CaseError
    from conformance.judge import integrity

    try:
        problems = corpus.verify() + integrity.altered_dialects()
        count = len(corpus.manifest())
    except CaseError as error:
        stop(str(error), USAGE)
    for line in problems:
        say(line)
    say(f"{count} files promised, {len(problems)} problems")
    raise typer.Exit(FAILED if problems else 0)


@fixtures_app.command()
def regenerate(
    jobs: Annotated[int, typer.Option(min=1, max=MOST_JOBS, help="Worker processes.")] = 2,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where something would change.")] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="Write, and exit 1 where something changed.")] = False,
    family: Annotated[
        list[str] | None, typer.Option(help="Check only the cases of this family; repeatable, with --check.")
    ] = None,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample",
            help="Check some families, or all where the oracle isn't the one that made the corpus; with --check.",
        ),
    ] = False,
) -> None:
    """Rewrite the corpus from the oracle and print what changed."""
    if ((family or sample) and not check) or (family and sample):
        stop("--family and --sample only check a part of the corpus: give one of them, with --check", USAGE)
    try:
        from conformance.oracle import sources
        from conformance.oracle.generate import family_names
        from conformance.oracle.generate import regenerate as generate
    except ImportError as error:
        stop(f"regenerating needs the extra 'regenerate': pip install 'mhc-conformance[regenerate]' ({error})", SETUP)
    from rich.console import Console
    from rich.progress import Progress

    from conformance.cases.corpus import fixtures

    families = known_names("family", family, family_names()) if family else []
    if sample:
        changed = sources.changed()
        families = [] if changed else list(sources.SAMPLE)
        if changed:
            say(f"not what the corpus was made with: {', '.join(changed)}; all of it is made again")
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("cases", total=None)
        changes = generate(
            fixtures() / "golden", jobs, check, lambda k, n: bar.update(task, completed=k, total=n), families
        )
    if not check:
        sources.record()
    for line in changes:
        say(line)
    what = "would change" if check else "changed"
    say(f"{len(changes)} files {what} ({', '.join(families) or 'all families'})")
    raise typer.Exit(FAILED if (check or frozen) and changes else 0)
