"""``mhc-conformance search``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from conformance.cli.app import FAILED, SETUP, USAGE, known_names, say, stop
from conformance.cli.fresh import HELP, dialects_given
from conformance.cli.limits import LARGEST_SEED
from conformance.cli.options import DIALECT, DTYPE, FILE, STAGE, command, option


@command()
@option("--impl", required=True, help="A registered name, module:attribute or exec:COMMAND.")
@option("--dialect", type=DIALECT, multiple=True, help=f"Draw cases of this dialect only: {HELP}. Repeatable.")
@option("--stage", type=STAGE, multiple=True, help="Only this stage; repeatable.")
@option("--dtype", type=DTYPE, multiple=True, help="Only this dtype of x; repeatable.")
@option(
    "--seconds",
    type=click.FloatRange(0, 86400),
    default=60.0,
    help="Stop after so many seconds, or at the first failure.",
)
@option("--seed", type=click.IntRange(0, LARGEST_SEED), default=0, help="Seed of what is drawn.")
@option(
    "--found", type=FILE, default=Path("found.safetensors"), help="Write the smallest case that fails to this file."
)
def search(
    impl: str,
    dialect: tuple[str, ...],
    stage: tuple[str, ...],
    dtype: tuple[str, ...],
    seconds: float,
    seed: int,
    found: Path,
) -> None:
    """Draw fresh cases and sizes until one fails, and shrink it.

    Exit status: 0 none fails, 1 one fails, 2 usage or nothing was drawn, 3 the implementation couldn't be set up, or
    the extra 'regenerate' is missing.
    """
    try:
        from conformance.files import atomic
        from conformance.questions import search as question
    except ImportError as error:
        stop(f"search needs the extra 'regenerate': pip install 'mhc-conformance[regenerate]' ({error})", SETUP)
    from conformance.cases.case import DTYPES, CaseError
    from conformance.cases.dialects import dialect_names
    from conformance.implementations.registry import load
    from conformance.interface import SetupError
    from conformance.stages import STAGES

    try:
        rows = dialects_given(dialect or dialect_names())
        stages, dtypes = known_names("stage", stage, list(STAGES)), known_names("dtype", dtype, list(DTYPES))
        result = question.search(load(impl), rows, stages, dtypes, seconds, seed)
    except SetupError as error:
        stop(str(error), SETUP)
    except (CaseError, ValueError) as error:
        stop(str(error), USAGE)
    say(f"{result.drawn} cases drawn, {result.rejected} rejected")
    if result.outcome is None:
        say("none fails")
        raise click.exceptions.Exit(0 if result.drawn else USAGE)
    case = result.outcome.case  # the id of a size says all of it; other cases need a file
    if result.content is not None:
        case = str(found)
        try:
            atomic.write(found, result.content)
        except OSError as error:
            stop(f"{found}: can't be written ({error.strerror or error})", USAGE)
    for check in result.outcome.failed:
        say(f"  {check.verdict}: {check.tensor}, {check.ratio:.3g} of the bound {check.message}".rstrip())
    say(f"  {result.why}")
    outcome = result.outcome
    say(
        f"  mhc-conformance run --impl {shlex.quote(impl)} --case {shlex.quote(case)} --stage {outcome.stage} "
        f"--dtype {outcome.x}"
    )
    raise click.exceptions.Exit(FAILED)
