"""How commands declare their options: click's decorators, with headings in --help and names that the shell completes.

    @command()
    @argument("path", type=FILE, help="The file to read.")
    @option("--stage", type=STAGE, multiple=True, heading="What is run", help="Only this stage; repeatable.")
    def example(path: Path, stage: tuple[str, ...]) -> None: ...

Nothing here imports NumPy, since --help and the shell's completion must answer at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from conformance.files.places import CaseError, fixtures
from conformance.files.problems import unknown
from conformance.files.reading import read_text
from conformance.stages import DTYPES_OF_X, STAGES


class Names(click.ParamType[str]):
    """A name of a list, which --help shows and the shell completes.

    Args:
        kind: what it names, for messages.
        names: gives the list when it is asked for.
        others: whether a text that isn't in the list may be given too.
    """

    def __init__(self, kind: str, names: Callable[[], Sequence[str]], others: bool = False):
        self.name, self._names, self._others = kind, names, others

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not self._others and value not in self._names():
            self.fail(unknown(self.name, value, self._names()), param, ctx)
        return value

    def listed_with_commas(self) -> NamesWithCommas:
        """The type of an option that takes several of these names at once."""
        return NamesWithCommas(self)

    def listed(self) -> str:
        """The sentence of --help."""
        return f"{'A name is one' if self._others else 'One'} of {', '.join(self._names())}."

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]


class NamesWithCommas(click.ParamType[tuple[str, ...]]):
    """Several names of a list with commas between them; the last of them is completed."""

    def __init__(self, names: Names):
        self.names, self.name = names, names.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(self.names.convert(name.strip(), param, ctx) for name in value.split(","))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{item.value}") for item in self.names.shell_complete(ctx, param, last)]


def dialects() -> list[str]:
    """The names of the published rows, without a look at the rows; none where the fixtures are broken."""
    try:
        return list(json.loads(read_text(fixtures() / "dialects.json"))["dialects"])
    except (CaseError, OSError, ValueError, KeyError, TypeError):  # what needs the rows says so
        return []


STAGE = Names("stage", lambda: list(STAGES))
DTYPE = Names("dtype", lambda: DTYPES_OF_X)
DIALECT = Names("dialect", dialects, others=True)
"""A published row, or one that `conformance.cases.dialects.parse` makes of the text."""
FILE = click.Path(path_type=Path)


METAVARS: dict[type, str] = {
    type(click.INT): "N", click.IntRange: "N", type(click.FLOAT): "NUMBER", click.FloatRange: "NUMBER",
    click.Path: "FILE",
}  # fmt: skip
"""What stands for a value in --help."""


def one_of(kind: str, names: Sequence[str]) -> Names:
    """The type of an option that takes one of a few names."""
    return Names(kind, lambda: names)


def _described(help_text: str, kind: Any) -> str:
    kind = kind.names if isinstance(kind, NamesWithCommas) else kind
    return f"{help_text} {kind.listed()}" if isinstance(kind, Names) else help_text


class Option(click.Option):
    """An option that stands under a heading of its command's --help."""

    def __init__(self, *args: Any, heading: str = "Options", **attributes: Any):
        super().__init__(*args, **attributes)
        self.heading = heading
        if self.metavar is None and not self.is_flag:
            self.metavar = METAVARS.get(type(self.type))

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        plain, self.help = self.help, _described(self.help or "", self.type)
        try:
            return super().get_help_record(ctx)
        finally:
            self.help = plain


class Argument(click.Argument):
    """An argument whose --help lists the names that it may be."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        name, text = super().get_help_record(ctx)
        return name, _described(text, self.type)


class Command(click.Command):
    """A command whose options stand under headings, in the order in which they are declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = None if isinstance(parameter, click.Argument) else parameter.get_help_record(ctx)
            if record is not None:
                rows.setdefault(getattr(parameter, "heading", "Options"), []).append(record)
        for heading, records in rows.items():
            with formatter.section(heading):
                formatter.write_dl(records)


command = functools.partial(click.command, cls=Command)
option = functools.partial(click.option, cls=Option)
argument = functools.partial(click.argument, cls=Argument)
