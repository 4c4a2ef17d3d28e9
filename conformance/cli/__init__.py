"""The command line, a file a command. Frameworks, NumPy and the oracle are imported inside the commands."""

from __future__ import annotations

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
    app()
