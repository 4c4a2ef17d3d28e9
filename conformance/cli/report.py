"""``mhc-conformance report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from conformance.cli.app import FAILED, SETUP, USAGE, say, stop
from conformance.cli.options import FILE, argument, command, option

VERIFY = Path("verify")


@command()
@argument(
    "runs",
    type=FILE,
    nargs=-1,
    required=True,
    help="Files that run --jsonl wrote, of one corpus; or the word verify and bundles.",
)
@option("--html", type=FILE, help="Write a page: one file, nothing is fetched.")
@option("--markdown", type=FILE, help="Write a short text, for a pull request.")
@option("--badge", type=FILE, help="Write a badge (SVG) of one implementation's result.")
@option("--implementation", default="", help="Whose result --badge shows, where there are several.")
@option("--bundle", type=FILE, help="Write the runs, what they are of and their hashes into one zip file.")
@option("--sha256", default="", help="With verify: the hash that the bundle should have.")
@option("--selftest", "--power", "selftest", type=FILE, help="A file that selftest --json wrote: adds the mutants.")
def report(
    runs: tuple[Path, ...],
    html: Path | None,
    markdown: Path | None,
    badge: Path | None,
    implementation: str,
    bundle: Path | None,
    sha256: str,
    selftest: Path | None,
) -> None:
    """Merge runs of several machines into a page, a short text, a badge or a bundle; or check a bundle.

    The command prints the text if no file is asked for. "report verify BUNDLE" says what a bundle holds.

    Exit status: 0, 1 for a bundle that doesn't hold what it says, 2 for files that can't be read, are cut off or don't
    go together, 3 where plotly is missing.
    """
    from conformance.cases.case import CaseError
    from conformance.files import atomic
    from conformance.files.reading import told
    from conformance.report import markdown as text
    from conformance.report import read
    from conformance.report.badge import badge as drawn
    from conformance.report.bundle import bundle as bundled
    from conformance.report.summary import summary

    if runs[0] == VERIFY:
        _verify(runs[1:], sha256)
        return
    if sha256:
        stop("--sha256 goes with verify: mhc-conformance report verify BUNDLE --sha256 HASH", USAGE)
    if implementation and not badge:
        stop("--implementation goes with --badge FILE", USAGE)
    written: dict[Path, str | bytes] = {}
    holds = None
    try:
        merged = read.merge(runs)
        figures = read.read_selftest(selftest, merged[0].header.corpus) if selftest else None
        if badge:
            written[badge] = drawn(merged, implementation)
        if bundle:
            written[bundle], holds = bundled(merged)
        content = summary(merged, figures) if html or markdown or not written else {}
    except (read.ReportError, CaseError) as error:
        stop(str(error), USAGE)
    if markdown:
        written[markdown] = text.markdown(content)
    if html:
        try:
            from conformance.report.page import page
        except ImportError as error:
            stop(f"the page needs plotly: pip install 'mhc-conformance[report]' ({error})", SETUP)
        written[html] = page(content)
    try:
        for path, part in written.items():
            atomic.write(path, part)
    except OSError as error:
        stop(told(error), USAGE)
    if holds:
        say(f"{bundle}: hash {holds.hash}")
    if not written:
        click.echo(text.markdown(content), nl=False)


def _verify(bundles: Sequence[Path], expected: str) -> None:
    """Says what bundles hold, a line for each of their implementations; ends with a line where one doesn't hold it."""
    from conformance.report.bundle import Broken, verify
    from conformance.report.read import ReportError

    if not bundles or (expected and len(bundles) > 1):
        stop(f"expected {'one bundle with --sha256' if expected else 'a bundle'}: report verify BUNDLE", USAGE)
    for path in bundles:
        try:
            checked = verify(path, expected)
        except Broken as error:
            stop(str(error), FAILED)
        except ReportError as error:
            stop(str(error), USAGE)
        say(f"{path}: whole, of corpus {checked.manifest.corpus}; hash {checked.hash}")
        if checked.manifest.part:
            say(f"  of a part of what there is to ask: {checked.manifest.part}")
        for result in checked.manifest.results:
            say(f"  {result.implementation}: {result.said} ({', '.join(result.dialects)})")
