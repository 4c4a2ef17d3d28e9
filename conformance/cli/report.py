"""``mhc-conformance report``."""

from __future__ import annotations

from pathlib import Path

import click

from conformance.cli.app import SETUP, USAGE, stop
from conformance.cli.options import FILE, argument, command, option


@command()
@argument("runs", type=FILE, nargs=-1, required=True, help="Files that run --jsonl wrote, of one corpus.")
@option("--html", type=FILE, help="Write a page: one file, nothing is fetched.")
@option("--markdown", type=FILE, help="Write a short text, for a pull request.")
@option("--selftest", "--power", "selftest", type=FILE, help="A file that selftest --json wrote: adds the mutants.")
def report(runs: tuple[Path, ...], html: Path | None, markdown: Path | None, selftest: Path | None) -> None:
    """Merge runs of several machines into a page and a short text.

    The command prints the text if neither --html nor --markdown is given.

    Exit status: 0, 2 for files that can't be read, are cut off or don't go together, 3 where plotly is missing.
    """
    from conformance.cases.case import CaseError
    from conformance.files import atomic
    from conformance.files.reading import told
    from conformance.report import markdown as text
    from conformance.report import read
    from conformance.report.summary import summary

    try:
        merged = read.merge(runs)
        figures = read.read_selftest(selftest, merged[0].header.corpus) if selftest else None
        content = summary(merged, figures)
    except (read.ReportError, CaseError) as error:
        stop(str(error), USAGE)
    try:
        if markdown:
            atomic.write(markdown, text.markdown(content))
        if html:
            try:
                from conformance.report.page import page
            except ImportError as error:
                stop(f"the page needs plotly: pip install 'mhc-conformance[report]' ({error})", SETUP)
            atomic.write(html, page(content))
    except OSError as error:
        stop(told(error), USAGE)
    if not html and not markdown:
        click.echo(text.markdown(content), nl=False)
