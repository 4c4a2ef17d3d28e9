"""The command line's root, its exit statuses and its way to stop."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import click

from conformance.cli.completion import completion_options
from conformance.cli.ending import INTERRUPTED, PROGRAM, USAGE, ended
from conformance.files.line import one_line
from conformance.files.problems import unknown

FAILED, SETUP = 1, 3  # USAGE and INTERRUPTED are of `ending`

COMMANDS = {
    "Test an implementation": (
        "doctor",
        "new",
        "run",
        "identify",
        "search",
        "train",
        "compare",
        "bitwise",
        "report",
        "dialects",
    ),
    "Move weights, and look at them": ("inspect", "health", "port", "upcycle", "verdicts"),
    "Keep the corpus": ("fixtures", "selftest", "status", "peers"),
}
"""The commands in the order in which they are needed, under the headings of --help; each has a file of its name."""
RENAMED = {"power": "selftest"}
"""The files of commands that only say what they are called now."""


class Root(click.Group):
    """The group of all commands: a command's file is imported when the command is called, completed or described."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in COMMANDS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in (*self.list_commands(ctx), *RENAMED):
            return None
        module = importlib.import_module(f"conformance.cli.{RENAMED.get(cmd_name, cmd_name)}")
        return getattr(module, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:  # click looks for near names among commands that are imported
            raise click.UsageError(unknown("command", args[0], self.list_commands(ctx)), ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for heading, names in COMMANDS.items():
            with formatter.section(heading):
                rows = ((name, self.get_command(ctx, name)) for name in names)
                formatter.write_dl(
                    [(f"{name:{width}}", c.get_short_help_str(formatter.width)) for name, c in rows if c]
                )

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Runs a command and ends the process; whatever is wrong for its user is one line (`ending.ended`)."""
        with_defaults = {"prog_name": PROGRAM, **extra, "standalone_mode": False}
        run = super().main
        sys.exit(ended(lambda: run(*args, **with_defaults)))


def _print_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import conformance

        click.echo(f"{PROGRAM} {conformance.__version__}")
        ctx.exit()


@click.group(
    PROGRAM,
    cls=Root,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@completion_options
def app() -> None:
    """Conformance of mHC implementations to certified golden values, and ports of their weights.

    Exit status of every command: 0 it is as it should be, 1 something failed, 2 usage, 3 something couldn't be set up,
    130 interrupted; the help of a command says more.
    """


def stop(message: str, status: int) -> NoReturn:
    """Ends the command with one line on standard error."""
    click.echo(f"{PROGRAM}: {one_line(message)}", err=True)
    raise click.exceptions.Exit(status)


def say(text: str) -> None:
    """Prints one line; names, files and exceptions in it may hold whatever a terminal acts on."""
    click.echo(one_line(text))


def known_names(kind: str, names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """What was given, all of it known; everything where nothing was given."""
    for name in names or ():
        if name not in known:
            stop(unknown(kind, name, known), USAGE)
    return list(names or known)


@contextlib.contextmanager
def interruptible(told: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C ends the command with one line, which says what was interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        stop(f"interrupted {told()}", INTERRUPTED)
