"""``mhc-conformance identify``."""

from __future__ import annotations

from typing import Annotated

import typer

from conformance.cli.app import FAILED, SETUP, USAGE, app, known_names, stop
from conformance.cli.fresh import HELP, Workshop, dialects_given, making


@app.command()
def identify(
    impl: Annotated[str, typer.Option(help="A registered name, module:attribute or exec:COMMAND.")],
    dialect: Annotated[
        list[str] | None, typer.Option(help=f"{HELP}: told to compute this one; repeatable. Default: each claimed.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of x.")] = "float32",
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer of a program.")] = 60.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="The five nearest candidates.")] = False,
) -> None:
    """Say which dialect an implementation computes, or the nearest one and what differs.

    Exit status: 0 it computes what it was told, 1 it computes something else, 2 usage, 3 it could not be set up.
    """
    from conformance import registry
    from conformance.cases import DTYPES, CaseError
    from conformance.corpus import load_corpus
    from conformance.dialects import dialect_names, dialect_rows, unclaimed
    from conformance.identify import FAMILIES, STAGES, same_layer
    from conformance.identify import identify as run
    from conformance.interface import SetupError

    try:
        given = dialects_given(dialect or dialect_names())
        rows = {**dialect_rows(), **{row.name: dict(row.parameters) for row in given}}
        known_names("dtype", [dtype], list(DTYPES))
        implementation = registry.load(impl, time_limit)
        items = [i for c in load_corpus() for i in c.items() if i.variant.x == dtype and not i.variant.pure]
    except CaseError as error:
        stop(str(error), USAGE)
    except SetupError as error:
        stop(str(error), SETUP)
    fresh = [row for row in given if not row.published and not unclaimed(row, implementation.capabilities)]
    if fresh:
        choose = making(fresh).chosen
        made = Workshop().cases(fresh, lambda row: choose(row, STAGES, [dtype], families=FAMILIES), jobs=2)
        items += [i for c in made for i in c.items() if not i.variant.pure]
    wrong = False
    for told in [row.name for row in given if dialect or not unclaimed(row, implementation.capabilities)]:
        found = run(implementation, told, rows, items)
        for line in found.raised[:3]:
            typer.echo(f"{implementation.name}, told {told}, {dtype}: raised in {line}")
        if not found.items:
            stop(f"{implementation.name} claims, or answers, none of the separating cases of {told} in {dtype}", USAGE)
        nearest = found.nearest
        name = " with ".join((nearest.candidate.dialect, *nearest.candidate.changes))
        verb = "computes" if nearest.ratio <= 1 else "computes none of the dialects; nearest"
        typer.echo(
            f"{implementation.name}, told {told}, {dtype}: {verb} {name} "
            f"({nearest.ratio:.3g} of the bound, {found.items} items)"
        )
        same = [d for d in found.dialects if d != told and same_layer(rows[d], rows[told])]
        if nearest.ratio <= 1 and same and not nearest.candidate.changes:
            typer.echo(f"  the same layer, in another precision or with another reduction: {', '.join(same)}")
        if nearest.candidate.changes:
            typer.echo(f"  differs from {nearest.candidate.dialect}: {'; '.join(nearest.candidate.changes)}")
        alike = [a.candidate for a in found.matches if a is not nearest and a.candidate.dialect not in same]
        if alike:
            names = [" with ".join((c.dialect, *c.changes)) for c in alike]
            typer.echo(f"  not told apart by what it claims: {'; '.join(names)}")
        if found.precision:
            typer.echo(f"  precision: {found.precision}")
        for answer in found.answers[:5] if verbose else ():
            label = " with ".join((answer.candidate.dialect, *answer.candidate.changes))
            typer.echo(f"    {answer.ratio:9.3g}  {label} ({answer.where})")
        wrong |= told not in found.dialects
    raise typer.Exit(FAILED if wrong else 0)
