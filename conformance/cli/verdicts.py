"""The command ``mhc-conformance verdicts``."""

from __future__ import annotations

from pathlib import Path

import click

from conformance.cli.app import USAGE, say, stop
from conformance.cli.fresh import HELP, dialects_given
from conformance.cli.options import DIALECT, FILE, argument, command, option


@command()
@argument("source", type=DIALECT, required=False, help=f"A dialect: {HELP}.")
@argument("target", type=DIALECT, required=False, help="A second dialect: explain a port from the first to this one.")
@option(
    "--write",
    type=FILE,
    help="Write the tables of verdicts and of layouts between their markers in this Markdown file.",
)
def verdicts(source: str | None, target: str | None, write: Path | None) -> None:
    """Say how exact a port between two dialects is.

    It is exact, exact to rounding, approximate or impossible. Without dialects, print the table of all pairs. An
    approximate port has the deviation of out on a made-up site.

    Exit status: 0, whatever the verdict is; 2 for dialects that are none, or a file that can't be written.
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
            click.echo(text, nl=False)
    except (OSError, ValueError) as error:
        stop(told(error), USAGE)
