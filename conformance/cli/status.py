"""``mhc-conformance status``."""

from __future__ import annotations

from pathlib import Path

import click

from conformance.cli.app import USAGE, stop
from conformance.cli.options import FILE, command, option


@command()
@option("--write", type=FILE, help="Write the page to this file instead of printing it.")
@option(
    "--rows", type=FILE, help="Put the table of what each row rests on between the rows markers of this Markdown file."
)
def status(write: Path | None, rows: Path | None) -> None:
    """Show what the corpus covers.

    The page has the families by stage and dtype, and the clauses of the specification without a case.

    Exit status: 0, 2 for a corpus that can't be read or a file that can't be written.
    """
    from conformance.cases.case import CaseError
    from conformance.cases.corpus import load_corpus
    from conformance.files import atomic, document
    from conformance.files.reading import told
    from conformance.report.status import grounds
    from conformance.report.status import status as page

    try:
        if rows:
            document.rewrite(rows, "rows", grounds())
            if not write:
                return
        text = page(load_corpus())
        if write:
            atomic.write(write, text)
        else:
            click.echo(text, nl=False)
    except (CaseError, OSError, ValueError) as error:
        stop(told(error), USAGE)
