"""``mhc-conformance compare``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from conformance.cli.app import FAILED, SETUP, USAGE, say, stop
from conformance.cli.fresh import HELP, dialects_given
from conformance.cli.limits import LARGEST_SEED, LONGEST, MOST_DIM, MOST_ELEMENTS, MOST_STREAMS, MOST_TOKENS
from conformance.cli.options import DIALECT, DTYPE, STAGE, argument, command, one_of, option
from conformance.cli.sizes import NONE, QUICK, SHORT

if TYPE_CHECKING:
    from conformance.interface import Implementation
    from conformance.questions.compare import Call


@command()
@argument("a", help="An implementation: a registered name, module:attribute or exec:COMMAND.")
@argument("b", help="The other implementation.")
@option("--dialect", type=DIALECT, help=f"Compare in this dialect: {HELP}. Default: the first that both claim.")
@option(
    "--streams",
    type=click.IntRange(1, MOST_STREAMS),
    help="Number of residual streams. Default: 4, or the least that both take.",
)
@option("--dim", type=click.IntRange(1, MOST_DIM), default=64, help="Width of one stream.")
@option("--batch", type=click.IntRange(1, MOST_TOKENS), default=2, help="Number of sequences.")
@option("--seq", type=click.IntRange(1, MOST_TOKENS), default=8, help="Tokens in a sequence.")
@option("--dtype", type=DTYPE, help="Dtype of x. Default: float32, or else the first that both claim.")
@option("--stage", type=STAGE, multiple=True, help="Only this stage; repeatable. Default: those that both claim.")
@option("--deviation", type=click.FloatRange(0, 1e6), default=2.0, help="Standard deviation of the logits.")
@option("--seed", type=click.IntRange(0, LARGEST_SEED), default=0, help="Seed of the data.")
@option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=64.0,
    help="Largest difference allowed, in units in the last place of the tensor's largest value.",
)
@option(
    "--sizes",
    type=one_of("sizes", (NONE, SHORT, QUICK)),
    default=NONE,
    help="Compare at production sizes, short or quick, in place of one shape.",
)
@option("--layouts", is_flag=True, help="Hand arrays over as views, each in another layout in memory.")
@option("--time-limit", type=click.FloatRange(0.1, LONGEST), default=60.0, help="Seconds for one answer of a program.")
def compare(
    a: str,
    b: str,
    dialect: str | None,
    streams: int | None,
    dim: int,
    batch: int,
    seq: int,
    dtype: str | None,
    stage: tuple[str, ...],
    deviation: float,
    seed: int,
    tolerance: float,
    sizes: str,
    layouts: bool,
    time_limit: float,
) -> None:
    """Compare two implementations with each other on fresh data.

    What both claim is compared, in a dialect and a dtype that both claim; the first line says in which. The data have
    any shape, and the oracle isn't needed. Stages are compared from the inside out; the first that differs is where to
    look.

    Exit status: 0 no stage differs, 1 one does, 2 usage, 3 one could not be set up.
    """
    from conformance.implementations import registry
    from conformance.interface import SetupError
    from conformance.questions import compare as comparison
    from conformance.questions.sizes.item import DTYPES_OF_SIZES

    row = dialects_given([dialect])[0] if dialect else None
    if sizes != NONE and dtype and dtype not in DTYPES_OF_SIZES:
        stop(f"--sizes takes --dtype {', '.join(DTYPES_OF_SIZES)}, got {dtype}", USAGE)
    try:
        first, second = (registry.load(name, time_limit) for name in (a, b))
    except SetupError as error:
        stop(str(error), SETUP)
    both = comparison.shared(first.capabilities, second.capabilities)
    if sizes != NONE:
        both = replace(both, dtypes=tuple(name for name in both.dtypes if name in DTYPES_OF_SIZES))
    named = {"stage": stage, "dialect": dialect, "dtype": dtype, "number of streams": streams}
    lacking = [kind for kind in both.missing if not named[kind]]
    if lacking:
        stop(
            f"{first.name} and {second.name} claim no {lacking[0]} together; {_claims(first, second, lacking[0])}",
            USAGE,
        )
    row = row or dialects_given([both.dialects[0]])[0]
    dtype = dtype or ("float32" if "float32" in both.dtypes else both.dtypes[0])
    streams = streams or both.streams
    elements = max(batch * seq, streams * (streams + 2)) * streams * dim  # of x, and of the projections together
    if sizes == NONE and elements > MOST_ELEMENTS:
        stop(f"x and the projections may have {MOST_ELEMENTS} elements each, got {elements}: give smaller sizes", USAGE)
    stages = stage or both.stages
    say(f"{row.name}, {dtype}{f', {streams} streams' if sizes == NONE else ''}: {', '.join(stages)}")
    for kind, names in (("dialect", both.dialects), ("dtype", both.dtypes)):
        others = [name for name in names if name not in (row.name, dtype)]
        if others and not named[kind]:
            say(f"both also claim {', '.join(others)}: --{kind} names another")
    calls = comparison.calls(row, streams, dim, (batch, seq), dtype, seed, deviation)
    if sizes != NONE:
        calls = comparison.calls_at_sizes(row, sizes, dtype, seed)
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
        stop("none of these stages is claimed by both in this dialect, dtype and shape", USAGE)
    say(f"the first that differs: {differing}" if differing else f"no difference in {compared} stages")
    raise click.exceptions.Exit(FAILED if differing else 0)


def _claims(first: Implementation, second: Implementation, kind: str) -> str:
    """What each of them claims of a kind of which they have nothing in common."""
    texts = []
    for implementation in (first, second):
        claimed = implementation.capabilities
        names: Collection[object] = {
            "stage": claimed.stages,
            "dialect": claimed.dialects,
            "dtype": {dtype for stage in claimed.stages for dtype in claimed.dtypes_of(stage)},
            "number of streams": claimed.streams or ("any",),
        }[kind]
        texts.append(f"{implementation.name} has {', '.join(sorted(map(str, names))) or 'none'}")
    return ", ".join(texts)


def _ended_by_a_usage_error(calls: Iterator[Call]) -> Iterator[Call]:
    """The calls, made one at a time; the command ends where the sizes are none that such a layer has."""
    try:
        yield from calls
    except ValueError as error:
        stop(str(error), USAGE)
