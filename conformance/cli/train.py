"""``mhc-conformance train``."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

import click

from conformance.cases.trajectories.model import STEPS, TRAJECTORIES
from conformance.cli.app import FAILED, SETUP, USAGE, interruptible, stop
from conformance.cli.limits import LONGEST
from conformance.cli.options import FILE, command, one_of, option

if TYPE_CHECKING:
    from pathlib import Path

    from conformance.interface import Implementation
    from conformance.questions.training import Training

FORMAT = "mhc-conformance-training/1"
TRAINERS = ("jax", "torch")
"""The registered implementations that train; asking the others would import a dozen packages."""


@command()
@option(
    "--impl",
    multiple=True,
    help="A registered name, module:attribute or exec:COMMAND; repeatable. Default: jax and torch, where installed.",
)
@option("--dialect", multiple=True, type=one_of("dialect", TRAJECTORIES), help="Only this dialect; repeatable.")
@option("--dtype", multiple=True, type=one_of("dtype", ("float64", "float32")), help="Only this dtype; repeatable.")
@option("--steps", type=click.IntRange(1, STEPS), default=STEPS, help="How many steps.")
@option("--time-limit", type=click.FloatRange(0.1, LONGEST), default=300.0, help="Seconds for one step of a program.")
@option("--json", "written", type=FILE, help="Write every figure to this file.")
@interruptible(lambda: "while steps were trained")
def train(
    impl: tuple[str, ...],
    dialect: tuple[str, ...],
    dtype: tuple[str, ...],
    steps: int,
    time_limit: float,
    written: Path | None,
) -> None:
    """Train a small model, and compare each step with the proved one.

    Losses, gradient norms and weights have bounds that grow with the steps.

    Exit status: 0 all of it is within the bounds, 1 something isn't, 2 usage or nothing was trained, 3 an
    implementation could not be set up.
    """
    from rich.console import Console
    from rich.progress import Progress

    from conformance.cases.trajectories import fixture
    from conformance.files import atomic
    from conformance.files.places import CaseError
    from conformance.questions import training

    loaded = _implementations(impl, time_limit)
    try:
        trajectories = [fixture.load(name) for name in dialect or TRAJECTORIES]
    except CaseError as error:
        stop(str(error), USAGE)
    asked = [(i, trajectory, kind) for i in loaded for trajectory in trajectories for kind in dtype or fixture.DTYPES]
    results: list[Training] = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("steps", total=len(asked) * (steps + 1))
        for implementation, trajectory, kind in asked:
            results.append(training.train(implementation, trajectory, kind, steps, lambda _: bar.advance(task)))
    _show(results, steps)
    if written is not None:
        content = {"format": FORMAT, "runs": [result.as_dict() for result in results]}
        try:
            atomic.write(written, json.dumps(content, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            stop(f"{written}: can't be written ({error.strerror or error})", USAGE)
    ran = [result for result in results if not result.skipped]
    if not ran:
        stop("nothing was trained: no implementation claims the stage step in what was asked for", USAGE)
    raise click.exceptions.Exit(0 if all(result.passed for result in ran) else FAILED)


def _implementations(names: tuple[str, ...], limit: float) -> list[Implementation]:
    """Those that are named, or those of `TRAINERS` that are installed."""
    from conformance.implementations import registry
    from conformance.interface import SetupError

    chosen = names or [name for name in TRAINERS if not registry.unavailable(name)]
    try:
        return [registry.load(name, limit) for name in chosen]
    except SetupError as error:
        stop(str(error), SETUP)


def _show(results: list[Training], steps: int) -> None:
    """A table of the worst errors, and a line for each training that left the bound, broke off or didn't run."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from conformance.cli.app import say
    from conformance.files.line import one_line
    from conformance.questions.training import GROUPS, MARKS

    marks = sorted({mark for mark in MARKS if mark < steps} | {steps})
    table = Table(title="largest error up to a step, as a fraction of the bound")
    for name in ("implementation", "dialect", "dtype", "figure"):
        table.add_column(name, no_wrap=True)
    for mark in marks:
        table.add_column(f"step {mark}", justify="right")
    ran = [result for result in results if not result.skipped]
    for result in ran:
        for group in GROUPS:
            first = group == next(iter(GROUPS))
            names = (result.implementation, result.dialect, result.dtype) if first else ("", "", "")
            figures = [_figure(result, group, mark) for mark in marks]
            table.add_row(
                *(Text(one_line(name, 40)) for name in names), group, *figures, end_section=group == "weights"
            )
    if ran:
        Console(width=140).print(table)
    for result in results:
        named = f"{result.implementation}, {result.dialect}, {result.dtype}"
        if result.skipped:
            say(f"{named}: skipped, {result.skipped}")
        if result.left:
            say(f"{named}: leaves the bound at {result.left}")
        if result.broken:
            say(f"{named}: {result.broken}")
    failed = [result for result in ran if not result.passed]
    say(f"{len(ran)} training{'' if len(ran) == 1 else 's'} of {steps} steps ran, {len(failed)} failed")


def _figure(result: Training, group: str, mark: int) -> Any:
    from rich.text import Text

    if len(result.ratios[group]) < mark:
        return "-"
    ratio = result.worst(group, mark)
    return "-" if math.isnan(ratio) else Text(f"{ratio:.2g}", style="" if ratio <= 1 else "bold red")
