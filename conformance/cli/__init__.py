"""The command line, a file a command. Frameworks, NumPy and the oracle are imported inside the commands."""

from __future__ import annotations

import sys

from conformance.cli.app import PROGRAM, USAGE, app

__all__ = ["app", "main"]


def main() -> None:
    """Runs a command; where the package's own fixtures are broken any command ends with one line about them."""
    try:
        app()
    except ValueError as error:
        from conformance.files.places import CaseError

        if not isinstance(error, CaseError):
            raise
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(USAGE)
