"""The command line's root, its exit statuses and its way to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, NoReturn

import typer

import conformance
from conformance.files.line import one_line

FAILED, USAGE, SETUP = 1, 2, 3
INTERRUPTED = 130  # 128 and SIGINT, as a shell has it

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mhc-conformance {conformance.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Conformance of mHC implementations to certified golden values, and ports of their weights."""


def stop(message: str, status: int) -> NoReturn:
    """Ends the command with one line on standard error."""
    typer.echo(f"mhc-conformance: {one_line(message)}", err=True)
    raise typer.Exit(status)


def say(text: str) -> None:
    """Prints one line; names, files and exceptions in it may hold whatever a terminal acts on."""
    typer.echo(one_line(text))


def known_names(kind: str, names: list[str] | None, known: list[str]) -> list[str]:
    """What was given, all of it known; everything where nothing was given."""
    for name in names or []:
        if name not in known:
            stop(f"unknown {kind} {name!r}, expected one of {', '.join(known)}", USAGE)
    return names or known


@contextlib.contextmanager
def interruptible(told: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C ends the command with one line, which says what was interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        stop(f"interrupted {told()}", INTERRUPTED)
