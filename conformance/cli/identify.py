"""``mhc-conformance identify``."""

from __future__ import annotations

import click

from conformance.cli.app import FAILED, SETUP, USAGE, known_names, say, stop
from conformance.cli.fresh import HELP, Workshop, dialects_given, making
from conformance.cli.limits import LONGEST
from conformance.cli.options import DIALECT, DTYPE, command, option


@command()
@option("--impl", required=True, help="A registered name, module:attribute or exec:COMMAND.")
@option(
    "--dialect",
    type=DIALECT,
    multiple=True,
    help=f"Test this dialect only: {HELP}. Cases of changed rows are made on the spot. Repeatable. "
    "Default: each that the implementation claims.",
)
@option("--dtype", type=DTYPE, default="float32", help="Dtype of x.")
@option("--time-limit", type=click.FloatRange(0.1, LONGEST), default=60.0, help="Seconds for one answer of a program.")
@option("--verbose", "-v", is_flag=True, help="Also print the nearest candidates and what would look the same.")
def identify(impl: str, dialect: tuple[str, ...], dtype: str, time_limit: float, verbose: bool) -> None:
    """Say which dialect an implementation computes.

    If it computes none, the nearest one and what differs is printed, stage by stage.

    Exit status: 0 it computes what it was told, 1 it computes something else, 2 usage, 3 it could not be set up.
    """
    from conformance.cases.case import DTYPES, CaseError
    from conformance.cases.corpus import load_corpus
    from conformance.cases.dialects import dialect_names, dialect_rows, unclaimed
    from conformance.implementations import registry
    from conformance.interface import SetupError
    from conformance.questions.identify import FAMILIES, STAGES
    from conformance.questions.identify import identify as run
    from conformance.questions.identifying import words
    from conformance.questions.identifying.configured import FAMILY as BIG_EPS

    try:
        given = dialects_given(dialect or dialect_names())
        rows = {**dialect_rows(), **{row.name: dict(row.parameters) for row in given}}
        known_names("dtype", [dtype], list(DTYPES))
        implementation = registry.load(impl, time_limit)
        items = [i for c in load_corpus() for i in c.items()]
    except CaseError as error:
        stop(str(error), USAGE)
    except SetupError as error:
        stop(str(error), SETUP)
    fresh = [row for row in given if not row.published and not unclaimed(row, implementation.capabilities)]
    if fresh:
        choose = making(fresh).chosen
        made = Workshop().cases(fresh, lambda row: choose(row, STAGES, [dtype], families=(*FAMILIES, BIG_EPS)), jobs=2)
        items += [i for c in made for i in c.items()]
    wrong = False
    for told in [row.name for row in given if dialect or not unclaimed(row, implementation.capabilities)]:
        identity = run(implementation, told, rows, items, dtype)
        for line in identity.raised[:3]:
            say(f"{implementation.name}, told {told}, {dtype}: raised in {line}")
        if not identity.items:
            stop(f"{implementation.name} claims, or answers, none of the separating cases of {told} in {dtype}", USAGE)
        for line in words.lines(implementation.name, dtype, identity, rows, verbose):
            say(line)
        wrong = wrong or not identity.as_told
    if wrong:
        raise click.exceptions.Exit(FAILED)
