"""``mhc-conformance fixtures verify``, ``regenerate`` and ``export``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from conformance.cli.app import FAILED, SETUP, USAGE, interruptible, known_names, say, stop
from conformance.cli.limits import MOST_JOBS
from conformance.cli.options import DIALECT, FILE, Command, argument, one_of, option
from conformance.cli.trajectories import trajectories


@click.group(no_args_is_help=True)
def fixtures() -> None:
    """Verify, regenerate or export the golden corpus.

    Exit status: see the help of each of its commands.
    """


@fixtures.command(cls=Command)
def verify() -> None:
    """Check every golden file and trajectory against its manifest, to the bit, and dialects.json against the record.

    Exit status: 0 every file is as promised, 1 one isn't, 2 the manifest can't be read.
    """
    from conformance.cases import corpus
    from conformance.cases.case import CaseError
    from conformance.cases.trajectories import fixture
    from conformance.judge import integrity

    try:
        problems = corpus.verify() + integrity.altered_dialects() + fixture.verify()
        count = len(corpus.manifest()) + len(fixture.manifest().files)
    except CaseError as error:
        stop(str(error), USAGE)
    for line in problems:
        say(line)
    say(f"{count} files promised, {len(problems)} problems")
    raise click.exceptions.Exit(FAILED if problems else 0)


@fixtures.command(cls=Command)
@option("--jobs", type=click.IntRange(1, MOST_JOBS), default=2, help="Worker processes.")
@option("--check", is_flag=True, help="Write nothing; exit 1 where something would change.")
@option("--frozen", is_flag=True, help="Write, and exit 1 where something changed.")
@option("--family", multiple=True, help="Check only the cases of this family; repeatable, with --check.")
@option(
    "--sample",
    is_flag=True,
    help="Check some families, or all where the oracle isn't the one that made the corpus; with --check.",
)
def regenerate(jobs: int, check: bool, frozen: bool, family: tuple[str, ...], sample: bool) -> None:
    """Rewrite the corpus from the oracle and print what changed.

    Exit status: 0 written, or nothing changed; 1 something changed, with --check or --frozen; 2 usage; 3 python-flint
    is missing.
    """
    if ((family or sample) and not check) or (family and sample):
        stop("--family and --sample only check a part of the corpus: give one of them, with --check", USAGE)
    try:
        from conformance.oracle import sources
        from conformance.oracle.generate import family_names
        from conformance.oracle.generate import regenerate as generate
    except ImportError as error:
        stop(f"regenerating needs the extra 'regenerate': pip install 'mhc-conformance[regenerate]' ({error})", SETUP)
    from rich.console import Console
    from rich.progress import Progress

    from conformance.files import places

    families = known_names("family", family, family_names()) if family else []
    if sample:
        changed = sources.changed()
        families = [] if changed else list(sources.SAMPLE)
        if changed:
            say(f"not what the corpus was made with: {', '.join(changed)}; all of it is made again")
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("cases", total=None)
        changes = generate(
            places.fixtures() / "golden", jobs, check, lambda k, n: bar.update(task, completed=k, total=n), families
        )
    if not check:
        sources.record()
    for line in changes:
        say(line)
    what = "would change" if check else "changed"
    say(f"{len(changes)} files {what} ({', '.join(families) or 'all families'})")
    raise click.exceptions.Exit(FAILED if (check or frozen) and changes else 0)


@fixtures.command(cls=Command)
@argument("folder", type=FILE, help="The folder to write: a new one, or an empty one.")
@option("--to", required=True, type=one_of("format", ("flashinfer-bench",)), help="Whose format.")
@option("--dialect", multiple=True, type=DIALECT, help="Only this dialect; repeatable.")
@option(
    "--stage",
    multiple=True,
    type=one_of("stage", ("pre", "post", "residual_matrix", "head")),
    help="Only this stage; repeatable.",
)
@option(
    "--dim",
    type=click.IntRange(1, 1 << 16),
    multiple=True,
    help="Also this width, with 4 streams and random numbers; repeatable.",
)
@option(
    "--tokens",
    type=click.IntRange(1, 1 << 20),
    multiple=True,
    help="How many tokens with --dim; repeatable. Default: 1, 128 and 4096.",
)
@option(
    "--solution",
    type=one_of("solution", ("torch",)),
    help="Write an implementation beside each definition: torch, for torch_impl.",
)
def export(
    folder: Path,
    to: str,
    dialect: tuple[str, ...],
    stage: tuple[str, ...],
    dim: tuple[int, ...],
    tokens: tuple[int, ...],
    solution: str | None,
) -> None:
    """Write golden cases as a data set for benchmarks of kernels, which neither need this package nor are needed here.

    Exit status: 0 it is written, 2 it can't be.
    """
    if tokens and not dim:
        stop("--tokens goes with --dim: golden cases have the tokens that they have", USAGE)
    from conformance.cases.case import CaseError
    from conformance.cases.corpus import load_corpus
    from conformance.cases.dialects import dialect_names
    from conformance.cases.flashinfer_bench.export import ExportError, Wish
    from conformance.cases.flashinfer_bench.export import export as write
    from conformance.cases.flashinfer_bench.kernel import STAGES

    try:
        dialects = known_names("dialect", dialect, dialect_names())
        stages = known_names("stage", stage, list(STAGES))
        sizes = {"tokens": tokens} if tokens else {}
        wish = Wish(dialects, stages, widths=dim or (), solution=solution is not None, **sizes)
        with interruptible(lambda: "before the folder was whole; nothing is left of it"):
            exported = write(folder, load_corpus(), wish)
    except (ExportError, CaseError) as error:
        stop(str(error), USAGE)
    except OSError as error:
        stop(f"{folder}: can't be written ({error.strerror or error})", USAGE)
    solutions = f", {exported.solutions} solutions" if solution else ""
    say(f"{exported.definitions} definitions, {exported.workloads} workloads{solutions}: {folder}")


fixtures.add_command(trajectories)
