"""``mhc-conformance fixtures verify``, ``regenerate`` and ``export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from conformance.cli.app import FAILED, SETUP, USAGE, app, interruptible, known_names, stop

fixtures_app = typer.Typer(
    help="Verify, regenerate or export the golden corpus.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(fixtures_app, name="fixtures")


@fixtures_app.command()
def verify() -> None:
    """Check every golden file against the manifest, to the bit, and dialects.json against the corpus's record.

    Exit status: 0 every file is as promised, 1 one isn't, 2 the manifest can't be read.
    """
    from conformance.cases import corpus
    from conformance.cases.case import CaseError
    from conformance.judge import integrity

    try:
        problems = corpus.verify() + integrity.altered_dialects()
        count = len(corpus.manifest())
    except CaseError as error:
        stop(str(error), USAGE)
    for line in problems:
        typer.echo(line)
    typer.echo(f"{count} files promised, {len(problems)} problems")
    raise typer.Exit(FAILED if problems else 0)


@fixtures_app.command()
def regenerate(
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where something would change.")] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="Write, and exit 1 where something changed.")] = False,
    family: Annotated[
        list[str] | None, typer.Option(help="Check only the cases of this family; repeatable, with --check.")
    ] = None,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample",
            help="Check some families, or all where the oracle isn't the one that made the corpus; with --check.",
        ),
    ] = False,
) -> None:
    """Rewrite the corpus from the oracle and print what changed."""
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

    from conformance.cases.corpus import fixtures

    families = known_names("family", family, family_names()) if family else []
    if sample:
        changed = sources.changed()
        families = [] if changed else list(sources.SAMPLE)
        if changed:
            typer.echo(f"not what the corpus was made with: {', '.join(changed)}; all of it is made again")
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("cases", total=None)
        changes = generate(
            fixtures() / "golden", jobs, check, lambda k, n: bar.update(task, completed=k, total=n), families
        )
    if not check:
        sources.record()
    for line in changes:
        typer.echo(line)
    what = "would change" if check else "changed"
    typer.echo(f"{len(changes)} files {what} ({', '.join(families) or 'all families'})")
    raise typer.Exit(FAILED if (check or frozen) and changes else 0)


@fixtures_app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder to write: a new one, or an empty one.")],
    to: Annotated[str, typer.Option("--to", help="Whose format: flashinfer-bench.")],
    dialect: Annotated[list[str] | None, typer.Option(help="Only this dialect; repeatable.")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Only this stage: pre, post, residual_matrix or head; repeatable.")
    ] = None,
    dim: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1 << 16, help="Also this width, with 4 streams and random numbers; repeatable."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1 << 20, help="How many tokens with --dim; repeatable. Default: 1, 128 and 4096."),
    ] = None,
    solution: Annotated[
        str | None, typer.Option(help="Write an implementation beside each definition: torch, for torch_impl.")
    ] = None,
) -> None:
    """Write golden cases as a data set for benchmarks of kernels, which neither need this package nor are needed here.

    Exit status: 0 it is written, 2 it can't be.
    """
    known_names("format", [to], ["flashinfer-bench"])
    known_names("solution", [solution] if solution else None, ["torch"])
    if tokens and not dim:
        stop("--tokens goes with --dim: golden cases have the tokens that they have", USAGE)
    from conformance.cases.case import CaseError
    from conformance.cases.corpus import load_corpus
    from conformance.cases.dialects import dialect_names
    from conformance.cases.flashinfer_bench.export import ExportError, Wish
    from conformance.cases.flashinfer_bench.export import export as write
    from conformance.cases.flashinfer_bench.kernel import STAGES
    from conformance.files.problems import one_line

    try:
        dialects = known_names("dialect", dialect, dialect_names())
        stages = known_names("stage", stage, list(STAGES))
        sizes = {"tokens": tokens} if tokens else {}
        wish = Wish(dialects, stages, widths=dim or (), solution=solution is not None, **sizes)
        with interruptible(lambda: "before the folder was whole; nothing is left of it"):
            exported = write(folder, load_corpus(), wish)
    except (ExportError, CaseError) as error:
        stop(one_line(str(error)), USAGE)
    except OSError as error:
        stop(one_line(f"{folder}: can't be written ({error.strerror or error})"), USAGE)
    solutions = f", {exported.solutions} solutions" if solution else ""
    typer.echo(
        f"{exported.definitions} definitions, {exported.workloads} workloads{solutions}: {one_line(str(folder))}"
    )
