"""``mhc-conformance bitwise``."""

from __future__ import annotations

import click

from conformance.cli.app import FAILED, SETUP, USAGE, say, stop
from conformance.cli.limits import LONGEST, MOST_JOBS
from conformance.cli.options import command, one_of, option
from conformance.cli.sizes import NONE, QUICK, SHORT
from conformance.files.line import one_line


@command()
@option(
    "--impl",
    multiple=True,
    help="A registered name, module:attribute or exec:COMMAND; repeatable. Default: every registered "
    "implementation that is installed.",
)
@option("--most", type=click.IntRange(min=0), default=40, help="Items for each implementation, 0 for all.")
@option(
    "--sizes",
    type=one_of("sizes", (NONE, SHORT, QUICK)),
    default=NONE,
    help="Production sizes in the place of the golden cases: short or quick.",
)
@option("--jobs", type=click.IntRange(1, MOST_JOBS), default=2, help="Worker processes.")
@option("--strict", is_flag=True, help="Exit 1 where a bit differs.")
@option("--time-limit", type=click.FloatRange(0.1, LONGEST), default=60.0, help="Seconds for one answer of a program.")
def bitwise(impl: tuple[str, ...], most: int, sizes: str, jobs: int, strict: bool, time_limit: float) -> None:
    """Check whether results repeat to the last bit.

    An item is called twice, with a token alone, with its batch split in two, with the same values in other layouts in
    memory, and after it is set up and compiled anew.

    Exit status: 0, 1 with --strict where a bit differs, 2 usage, 3 an implementation could not be set up.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from conformance.implementations import registry
    from conformance.interface import SetupError
    from conformance.questions import bitwise as tier

    table = Table(title="tensors that differ in a bit, of those compared")
    table.add_column("implementation", no_wrap=True)
    for question in tier.QUESTIONS:
        table.add_column(question, justify="right")
    lines, differ = [], False
    try:
        for report in tier.measure_all(
            impl or registry.defaults()[0], time_limit, most, jobs, "" if sizes == NONE else sizes
        ):
            if not report.items:
                stop(f"{report.name} claims none of the cases, or answered none of them", USAGE)
            table.add_row(
                Text(one_line(report.name, 60)),
                *(f"{bits.differ} of {bits.tensors}" for bits in report.answers.values()),
            )
            for question, bits in report.answers.items():
                differ |= bool(bits.differ)
                if bits.differ:
                    lines.append(f"{report.name}, {question}: at most {bits.largest:.3g} apart ({bits.where})")
                if bits.raised:
                    lines.append(f"{report.name}, {question}: raised in {bits.raised}")
    except SetupError as error:
        stop(str(error), SETUP)
    Console(width=140).print(table)
    for line in lines:
        say(line)
    raise click.exceptions.Exit(FAILED if strict and differ else 0)
