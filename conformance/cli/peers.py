"""``mhc-conformance peers``."""

from __future__ import annotations

from pathlib import Path

import click

from conformance.cli.app import USAGE, stop
from conformance.cli.options import FILE, argument, command, option


@command()
@argument("runs", type=FILE, nargs=-1, required=True, help="Files that run --jsonl wrote, of one corpus.")
@option("--known", type=FILE, help="The list of known results that the runs were given.")
@option("--write", type=FILE, help="Put the table between the witnesses markers of this Markdown file.")
def peers(runs: tuple[Path, ...], known: Path | None, write: Path | None) -> None:
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
            click.echo(text, nl=False)
    except (read.ReportError, CaseError, OSError, ValueError) as error:
        stop(str(error), USAGE)
