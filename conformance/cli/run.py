"""``mhc-conformance run``."""

from __future__ import annotations

from typing import Any

import click

from conformance.cli.app import interruptible
from conformance.cli.fresh import HELP
from conformance.cli.limits import LARGEST_SEED, LONGEST, MOST_JOBS, MOST_PROCESSES, MOST_REPEATS
from conformance.cli.options import DIALECT, DTYPE, FILE, STAGE, command, one_of, option
from conformance.cli.running import Request, carry_out, repeat_failed
from conformance.cli.sizes import FORMS, SHORT

WHAT, HOW, RUNNING, RESULT = "What is run", "How it is judged", "How it runs", "What comes out"
"""The headings of --help."""


@command()
@option(
    "--impl",
    multiple=True,
    heading=WHAT,
    help="A registered name, module:attribute or exec:COMMAND; repeatable. Default: every registered "
    "implementation that is installed.",
)
@option(
    "--dialect",
    type=DIALECT,
    multiple=True,
    heading=WHAT,
    help=f"Test this dialect only: {HELP}. Cases of changed rows are made on the spot. Repeatable.",
)
@option("--stage", type=STAGE, multiple=True, heading=WHAT, help="Only this stage; repeatable.")
@option("--dtype", type=DTYPE, multiple=True, heading=WHAT, help="Only this dtype of x; repeatable.")
@option(
    "--case",
    multiple=True,
    heading=WHAT,
    help="Only cases whose id matches this glob, or a case file; repeatable.",
)
@option("--quick", is_flag=True, heading=WHAT, help="Run a small subset that covers every stage but the stack.")
@option(
    "--sizes",
    type=one_of("sizes", FORMS),
    default=SHORT,
    heading=WHAT,
    help="Production sizes with fresh data: short (a few, beside the golden cases), quick or full (instead of "
    "them), none.",
)
@option(
    "--fresh",
    type=click.IntRange(0, LARGEST_SEED),
    metavar="SEED",
    heading=WHAT,
    help="Instead of the golden cases, run the like with new numbers, made on the spot (a covering subset).",
)
@option("--all", "every", is_flag=True, heading=WHAT, help="Make all cases of --fresh, not a subset of them.")
@option(
    "--mesh",
    multiple=True,
    heading=WHAT,
    help="Run sharded, for instance data=2,tensor=2 (data, fsdp, sequence, tensor); repeatable.",
)
@option(
    "--processes",
    type=click.IntRange(0, MOST_PROCESSES),
    default=0,
    heading=WHAT,
    help="Number of processes for each mesh; 0 lets the framework decide.",
)
@option(
    "--failed",
    is_flag=True,
    heading=WHAT,
    help="Only what failed in the last run from this folder, with the options of that run.",
)
@option("--list", "listing", is_flag=True, heading=WHAT, help="Only print what would run, an item a line.")
@option(
    "--modes/--no-modes",
    is_flag=True,
    default=True,
    heading=HOW,
    help="Call each item again without gradients, with arrays that are views, with other values and in memory "
    "full of NaN.",
)
@option(
    "--repeats",
    type=click.IntRange(1, MOST_REPEATS),
    heading=HOW,
    help="Calls with the same content, of one item of each stage and dtype, to find races. Default: 32, or 4 "
    "with --quick.",
)
@option(
    "--probe",
    is_flag=True,
    heading=HOW,
    help="Also run items that the implementation does not claim; it must refuse them or get them right.",
)
@option("--strict", is_flag=True, heading=HOW, help="Fail where a call with the same content has other bits.")
@option("--known", type=FILE, heading=HOW, help="Known results: a file of failures with their reasons.")
@option("-x", "stop_early", is_flag=True, heading=RUNNING, help="Stop at the first failure.")
@option("--jobs", type=click.IntRange(1, MOST_JOBS), default=2, heading=RUNNING, help="Worker processes at a time.")
@option(
    "--time-limit", type=click.FloatRange(0.1, LONGEST), default=300.0, heading=RUNNING, help="Seconds for one item."
)
@option("--jsonl", type=FILE, heading=RESULT, help="Write every check to this file, as it comes.")
@option("--junit", type=FILE, heading=RESULT, help="Write a JUnit report.")
@option(
    "--resume",
    is_flag=True,
    heading=RUNNING,
    help="Go on with the run whose --jsonl FILE was cut off: what it has is kept and not run again.",
)
@option("--verbose", "-v", is_flag=True, heading=RESULT, help="List every failure, and all of an exception's frames.")
@option("--skipped", is_flag=True, heading=RESULT, help="List what wasn't run, and why.")
@option(
    "--diagnose/--no-diagnose",
    is_flag=True,
    default=True,
    heading=RESULT,
    help="Where something fails, look for its cause, for up to 20 s an implementation.",
)
@option(
    "--progress/--no-progress",
    is_flag=True,
    default=True,
    heading=RESULT,
    help="Show a live line on a terminal.",
)
@interruptible(lambda: "while cases were prepared or a report was written")
def run(failed: bool, **options: Any) -> None:
    """Run the golden cases, and judge every output and gradient.

    Exit status: 0 all passed, 1 something failed, 2 usage, 3 an implementation is unknown or could not
    be set up, 130 it was interrupted.
    """
    if failed:
        repeat_failed(options)
    carry_out(Request(**options))
