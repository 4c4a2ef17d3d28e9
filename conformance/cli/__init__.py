"""The command line, a file a command. Frameworks, NumPy and the oracle are imported inside the commands."""

from __future__ import annotations

from conformance.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Runs a command and ends the process."""
    app()
