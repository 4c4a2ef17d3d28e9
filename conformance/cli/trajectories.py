"""``mhc-conformance fixtures trajectories``."""

from __future__ import annotations

import click

from conformance.cases.trajectories.model import STEPS, TRAJECTORIES
from conformance.cli.app import FAILED, SETUP, USAGE, interruptible, say, stop
from conformance.cli.limits import MOST_JOBS
from conformance.cli.options import command, one_of, option


@command()
@option("--jobs", type=click.IntRange(1, MOST_JOBS), default=2, help="Worker processes.")
@option("--check", is_flag=True, help="Write nothing; exit 1 where something would change.")
@option(
    "--prove",
    type=click.IntRange(1, STEPS),
    metavar="STEPS",
    help="Instead, carry balls through so many steps and compare what is recorded with them; nothing is written.",
)
@option("--dialect", multiple=True, type=one_of("dialect", TRAJECTORIES), help="With --prove, only this; repeatable.")
@interruptible(lambda: "before all files were made; those that are there are whole")
def trajectories(jobs: int, check: bool, prove: int | None, dialect: tuple[str, ...]) -> None:
    """Rewrite the trajectories from the oracle and print what changed, or prove them.

    Exit status: 0 written, nothing changed, or all is proved; 1 something changed, with --check, or isn't what is
    proved; 2 usage; 3 python-flint is missing.
    """
    if dialect and prove is None:
        stop("--dialect goes with --prove: trajectories are made all together", USAGE)
    if prove is not None and check:
        stop("--check compares files that are made anew, and --prove makes none: give one of them", USAGE)
    try:
        from conformance.oracle.trajectories import making
    except ImportError as error:
        stop(f"this needs the extra 'regenerate': pip install 'mhc-conformance[regenerate]' ({error})", SETUP)
    from conformance.cases.trajectories import fixture
    from conformance.files.places import CaseError

    if prove is None:
        changes = making.regenerate(fixture.folder(), jobs, check)
        for line in changes:
            say(line)
        say(f"{len(changes)} files {'would change' if check else 'changed'} (trajectories)")
        raise click.exceptions.Exit(FAILED if check and changes else 0)
    wrong: list[str] = []
    for name in dialect or TRAJECTORIES:
        try:
            wrong += making.disagreements(name, fixture.load(name).expected, prove)
        except CaseError as error:
            stop(str(error), USAGE)
        say(f"{name}: {prove} steps")
    for line in wrong:
        say(line)
    say(f"{len(wrong)} recorded values aren't what balls prove")
    raise click.exceptions.Exit(FAILED if wrong else 0)
