"""Where the fixtures lie."""

from __future__ import annotations

from pathlib import Path

from conformance.files.line import one_line


class CaseError(ValueError):
    """A file of ours or of a user that can't be read or doesn't keep its format, or fixtures that are missing.

    Its message is one line, whatever a file has put into it.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def fixtures() -> Path:
    """The fixtures folder: beside the packages in a checkout, ``mhc_fixtures`` in an installation."""
    home = Path(__file__).resolve().parents[2]
    for place in (home / "fixtures", home / "mhc_fixtures"):
        if (place / "dialects.json").is_file():
            return place
    raise CaseError(f"no fixtures beside {home}: reinstall the package")
