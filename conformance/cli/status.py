"""``mhc-conformance status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conformance.cli.app import USAGE, app, stop


@app.command()
def status(
    write: Annotated[Path | None, typer.Option(help="Write the page to this file instead of printing it.")] = None,
) -> None:
    """What the corpus covers: families by stage and dtype, and clauses of the specification without a case."""
    from conformance import atomic
    from conformance.cases import CaseError
    from conformance.corpus import load_corpus
    from conformance.status import status as page

    try:
        text = page(load_corpus())
        if write:
            atomic.write(write, text)
        else:
            typer.echo(text, nl=False)
    except (CaseError, OSError) as error:
        stop(str(error), USAGE)
