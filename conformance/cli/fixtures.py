"""``mhc-conformance fixtures verify`` and ``regenerate``."""

from __future__ import annotations

import sys

import click

from conformance.cli.app import FAILED, SETUP, USAGE, known_names, stop
from conformance.cli.options import Command, option


@click.group(no_args_is_help=True)
def fixtures() -> None:
    """Verify or regenerate the golden corpus.

    Exit status: see the help of each of its commands.
    """


@fixtures.command(cls=Command)
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
        click.echo(line)
    click.echo(f"{count} files promised, {len(problems)} problems")
    raise click.exceptions.Exit(FAILED if problems else 0)


@fixtures.command(cls=Command)
@option("--jobs", type=click.IntRange(min=1), default=2, help="Worker processes.")
@option("--check", is_flag=True, help="Write nothing; exit 1 where something would change.")
@option("--frozen", is_flag=True, help="Write, and exit 1 where something changed.")
@option("--family", multiple=True, help="Check only the cases of this family; repeatable, with --check.")
@option(
    "--sample",
    is_flag=True,
    help="Check some families, or all where the oracle isn't the one that made the corpus; with --check.",
)
def regenerate(jobs: int, check: bool, frozen: bool, family: tuple[str, ...], sample: bool) -> None:
    """Rewrite the corpus from the oracle and print what changed.

    Exit status: 0 written, or nothing changed; 1 something changed, with --check or --frozen; 2 usage; 3 python-flint
    is missing.
    """
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

    from conformance.files import places

    families = known_names("family", family, family_names()) if family else []
    if sample:
        changed = sources.changed()
        families = [] if changed else list(sources.SAMPLE)
        if changed:
            click.echo(f"not what the corpus was made with: {', '.join(changed)}; all of it is made again")
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("cases", total=None)
        changes = generate(
            places.fixtures() / "golden", jobs, check, lambda k, n: bar.update(task, completed=k, total=n), families
        )
    if not check:
        sources.record()
    for line in changes:
        click.echo(line)
    what = "would change" if check else "changed"
    click.echo(f"{len(changes)} files {what} ({', '.join(families) or 'all families'})")
    raise click.exceptions.Exit(FAILED if (check or frozen) and changes else 0)
