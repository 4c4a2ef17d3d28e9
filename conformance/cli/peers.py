"""``mhc-conformance peers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conformance.cli.app import USAGE, app, stop


@app.command()
def peers(
    runs: Annotated[list[Path], typer.Argument(help="Files that run --jsonl wrote, of one corpus.")],
    known: Annotated[Path | None, typer.Option(help="The list of known results that the runs were given.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="Put the table between the witnesses markers of this Markdown file.")
    ] = None,
) -> None:
    """Show how each row's own software did in the cases of its row.

    The table has items, failures and the worst passing ratio.

    Exit status: 0, 2 for files that can't be read, are cut off or don't go together.
    """
    from conformance.cases.case import CaseError
    from conformance.files import document
    from conformance.judge.known import load_known
    from conformance.report import read
    from conformance.report.peers import table

    try:
        text = table(read.merge(runs), load_known(known) if known else [])
        if write:
            document.rewrite(write, "witnesses", text)
        else:
            typer.echo(text, nl=False)
    except (read.ReportError, CaseError, OSError, ValueError) as error:
        stop(str(error), USAGE)
