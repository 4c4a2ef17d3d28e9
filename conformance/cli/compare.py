"""``mhc-conformance compare``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from conformance.cli.app import FAILED, SETUP, USAGE, app, known_names, say, stop
from conformance.cli.fresh import HELP, dialects_given
from conformance.cli.limits import LARGEST_SEED, LONGEST, MOST_DIM, MOST_ELEMENTS, MOST_STREAMS, MOST_TOKENS
from conformance.cli.sizes import NONE, QUICK, SHORT

if TYPE_CHECKING:
    from conformance.questions.compare import Call


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="An implementation: a registered name, module:attribute or exec:COMMAND.")],
    b: Annotated[str, typer.Argument(help="The other implementation.")],
    dialect: Annotated[str, typer.Option(help=f"Compare in this dialect: {HELP}.")] = "paper",
    streams: Annotated[int, typer.Option(min=1, max=MOST_STREAMS, help="Number of residual streams.")] = 4,
    dim: Annotated[int, typer.Option(min=1, max=MOST_DIM, help="Width of one stream.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Number of sequences.")] = 2,
    seq: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens in a sequence.")] = 8,
    dtype: Annotated[str, typer.Option(help="Dtype of x.")] = "float32",
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
    deviation: Annotated[float, typer.Option(min=0, max=1e6, help="Standard deviation of the logits.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the data.")] = 0,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, help="Largest difference allowed, in units in the last place of the tensor's largest value."
        ),
    ] = 64.0,
    sizes: Annotated[
        str, typer.Option(help="Compare at production sizes, short or quick, in place of one shape.")
    ] = NONE,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Hand arrays over as views, each in another layout in memory.")
    ] = False,
    time_limit: Annotated[
        float, typer.Option(min=0.1, max=LONGEST, help="Seconds for one answer of a program.")
    ] = 60.0,
) -> None:
    """Compare two implementations with each other on fresh data.

    The data have any shape, and the oracle isn't needed. Stages are compared from the inside out; the first that
    differs is where to look.

    Exit status: 0 no stage differs, 1 one does, 2 usage, 3 one could not be set up.
    """
    from conformance.cases.case import DTYPES
    from conformance.implementations import registry
    from conformance.interface import SetupError
    from conformance.questions import compare as comparison
    from conformance.questions.sizes.item import DTYPES_OF_SIZES
    from conformance.stages import STAGES

    (row,) = dialects_given([dialect])
    known_names("dtype", [dtype], list(DTYPES))
    stages = known_names("stage", stage, list(STAGES))
    (form,) = known_names("sizes", [sizes], [NONE, SHORT, QUICK])
    elements = max(batch * seq, streams * (streams + 2)) * streams * dim  # of x, and of the projections together
    if form == NONE and elements > MOST_ELEMENTS:
        stop(f"x and the projections may have {MOST_ELEMENTS} elements each, got {elements}: give smaller sizes", USAGE)
    try:
        first, second = (registry.load(name, time_limit) for name in (a, b))
    except SetupError as error:
        stop(str(error), SETUP)
    calls = comparison.calls(row, streams, dim, (batch, seq), dtype, seed, deviation)
    if form != NONE:
        if dtype not in DTYPES_OF_SIZES:
            stop(f"--sizes takes --dtype {', '.join(DTYPES_OF_SIZES)}, got {dtype}", USAGE)
        calls = comparison.calls_at_sizes(row, form, dtype, seed)
    compared, differing, place = 0, "", ""
    for call in _ended_by_a_usage_error(calls):
        if call.stage not in stages:
            continue
        if call.place != place:
            place = call.place
            say(place)
        rows = comparison.compare(first, second, call, layouts)
        if isinstance(rows, str):
            say(f"{call.stage:16} {rows}")
            continue
        compared += 1
        for line in rows:
            apart = line.apart(tolerance)
            where = f" at {line.index}: {line.a:.9g} and {line.b:.9g}" if line.largest else ""
            say(
                f"{call.stage:16} {line.tensor:22} {line.largest:10.3g} {line.units:10.3g} units{where}"
                f"{'   differs' if apart else ''}{' ' + line.note if line.note else ''}"
            )
            if apart and not differing:
                differing = ", ".join(filter(None, (call.place, call.stage, line.tensor)))
    if not compared:
        stop("no stage is claimed by both in this dialect, dtype and shape", USAGE)
    say(f"the first that differs: {differing}" if differing else f"no difference in {compared} stages")
    raise typer.Exit(FAILED if differing else 0)


def _ended_by_a_usage_error(calls: Iterator[Call]) -> Iterator[Call]:
    """The calls, made one at a time; the command ends where the sizes are none that such a layer has."""
    try:
        yield from calls
    except ValueError as error:
        stop(str(error), USAGE)
