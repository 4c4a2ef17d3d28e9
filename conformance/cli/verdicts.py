"""The command ``mhc-conformance verdicts``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conformance.cli.app import USAGE, app, say, stop
from conformance.cli.fresh import HELP, dialects_given


@app.command()
def verdicts(
    source: Annotated[str | None, typer.Argument(help=f"A dialect: {HELP}.")] = None,
    target: Annotated[
        str | None, typer.Argument(help="A second dialect: explain a port from the first to this one.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the tables of verdicts and of layouts between their markers in this Markdown file."),
    ] = None,
) -> None:
    """Say how exact a port between two dialects is.

    It is exact, exact to rounding, approximate or impossible. Without dialects, print the table of all pairs. An
    approximate port has the deviation of out on a made-up site.
    """
    from conformance.files import document
    from conformance.files.reading import told
    from conformance.porter import table

    if (source is None) != (target is None):
        stop("name two dialects, or none", USAGE)
    if source is not None and target is not None:
        before, after = (dict(dialects_given([text])[0].parameters) for text in (source, target))
        for line in table.reasons(before, after):
            say(line)
        return
    text = table.markdown()
    try:
        if write:
            document.rewrite(write, "verdicts", text)
            document.rewrite(write, "layouts", table.layout_table())
        else:
            typer.echo(text, nl=False)
    except (OSError, ValueError) as error:
        stop(told(error), USAGE)
