"""``mhc-conformance doctor``."""

from __future__ import annotations

import click

from conformance.cli.app import FAILED, say
from conformance.cli.options import command


@command()
def doctor() -> None:
    """Say what is installed here, what can run, and what is broken.

    It names versions, devices, missing extras and the line that installs each, which implementations run, tools, the
    state of the fixtures, and settings of the environment that change results. What is broken comes first. It takes a
    few seconds; a framework is imported in a process of its own.

    Exit status: 0, or 1 where something that is installed is broken.
    """
    from conformance.report.examination import look

    examination = look()
    for line in examination.broken:
        say(f"broken: {line}")
    if not examination.broken:
        say("nothing that is installed is broken")
    for heading, lines in examination.sections.items():
        say("")
        say(heading)
        for line in lines:
            say(f"  {line}")
    raise click.exceptions.Exit(FAILED if examination.broken else 0)
