"""``--show-completion`` and ``--install-completion``: click's completion for bash, zsh and fish."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from conformance.files.reading import read_text, reason
from conformance.files.streaming import Stream

SHELLS = ("bash", "zsh", "fish")
RC = {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}
"""The file of the home folder that a shell reads when it starts."""
LINE = {
    "bash": 'eval "$({program} --show-completion bash)"',
    "zsh": 'eval "$({program} --show-completion zsh)"',
    "fish": "{program} --show-completion fish | source",
}
"""The line in it that brings the completion."""


def completion_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds both options to the root of the command line."""
    for name, callback, text in (
        ("--show-completion", _show, "Print the completion script for a shell and exit."),
        ("--install-completion", _install, "Add a line to a shell's start file that completes this command, and exit."),
    ):
        function = click.option(
            name, type=click.Choice(SHELLS), expose_value=False, is_eager=True, callback=callback, help=text
        )(function)
    return function


def _show(ctx: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    if shell is None or ctx.resilient_parsing:
        return
    from click.shell_completion import get_completion_class

    kind, program = get_completion_class(shell), str(ctx.find_root().info_name)
    assert kind is not None
    variable = f"_{program.replace('-', '_')}_COMPLETE".upper()
    click.echo(kind(ctx.command, {}, program, variable).source())
    ctx.exit()


def _install(ctx: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    if shell is None or ctx.resilient_parsing:
        return
    path = Path(os.path.expanduser("~")) / RC[shell]
    line = LINE[shell].format(program=ctx.find_root().info_name)
    try:
        text = read_text(path) if path.exists() else ""
        if line not in text.splitlines():
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(Stream(path, more=True)) as file:
                file.write(f"{'' if text.endswith(chr(10)) or not text else chr(10)}{line}\n")
    except OSError as error:
        raise click.ClickException(f"{path}: the line {line!r} can't be added ({reason(error)})") from error
    click.echo(f"{path} has the line {line}; it works in the next shell")
    ctx.exit()
