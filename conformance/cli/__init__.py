"""The command line, a file a command. Frameworks, NumPy and the oracle are imported inside the commands."""

from __future__ import annotations

import sys

from conformance.cli import (
    bitwise,
    compare,
    fixtures,
    identify,
    inspect,
    peers,
    port,
    report,
    run,
    selftest,
    status,
    verdicts,
)
from conformance.cli.app import app
from conformance.cli.ending import NAME, ended

__all__ = [
    "bitwise",
    "compare",
    "fixtures",
    "identify",
    "inspect",
    "main",
    "peers",
    "port",
    "report",
    "run",
    "selftest",
    "status",
    "verdicts",
]


def main() -> None:
    """Runs a command; whatever is wrong for its user ends it with one line (`ending.ended`)."""
    sys.exit(ended(lambda: app(prog_name=NAME, standalone_mode=False)))
