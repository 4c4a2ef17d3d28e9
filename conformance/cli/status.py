"""``mhc-conformance status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conformance.cli.app import USAGE, app, stop


@app.command()
def status(
    write: Annotated[Path | None, typer.Option(help="Write the page to this file instead of printing it.")] = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="Put the table of what each row rests on between the rows markers of this Markdown file."),
    ] = None,
) -> None:
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
            typer.echo(text, nl=False)
    except (CaseError, OSError, ValueError) as error:
        stop(told(error), USAGE)
