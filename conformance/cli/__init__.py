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
from conformance.cli.app import USAGE, app

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
    """Runs a command; where the package's own fixtures are broken any command ends with one line about them."""
    try:
        app(prog_name="mhc-conformance")
    except ValueError as error:
        from conformance.files.places import CaseError

        if not isinstance(error, CaseError):
            raise
        print(f"mhc-conformance: {error}", file=sys.stderr)
        sys.exit(USAGE)
