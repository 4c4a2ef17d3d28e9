"""``mhc-conformance dialects``."""

from __future__ import annotations

import json
from typing import Any

import click

from conformance.cli.app import say
from conformance.cli.fresh import HELP, dialects_given
from conformance.cli.options import DIALECT, argument, command, option


@command()
@argument("name", type=DIALECT, required=False, help=f"A dialect: {HELP}.")
@argument("other", type=DIALECT, required=False, help="A second one: what differs between the two.")
@option(
    "--json", "machine", is_flag=True, help="Print JSON; of one dialect it is a row that --dialect FILE.json takes."
)
def dialects(name: str | None, other: str | None, machine: bool) -> None:
    """List the dialects, explain one, or say what differs between two.

    The list has what each row rests on: the software that was run as it is, or what was only read, and when.

    Exit status: 0, 2 for a name or a file that is no dialect.
    """
    from conformance.cases.dialects import Dialect, evidence, published, summary
    from conformance.cases.dialects import dialect_names as names
    from conformance.questions import rows

    def whole(row: Dialect) -> dict[str, Any]:
        grounds = {"summary": summary(row.base), "evidence": evidence(row.base)} if row.base and row.published else {}
        return {**grounds, "parameters": dict(row.parameters)}

    given = [dialects_given([text])[0] for text in (name, other) if text]
    if machine and len(given) == 2:
        apart = {key: list(values) for key, values in rows.differing(*given).items()}
        content: Any = {"dialects": [row.name for row in given], "differing": apart}
    elif machine:
        content = whole(given[0]) if given else {"dialects": {known: whole(published(known)) for known in names()}}
    else:
        lines = rows.compared(*given) if len(given) == 2 else rows.described(given[0]) if given else rows.listing()
        for line in lines:
            say(line)
        return
    click.echo(json.dumps(content, indent=1, ensure_ascii=False))
