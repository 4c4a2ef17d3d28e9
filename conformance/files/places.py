"""Where the fixtures lie."""

from __future__ import annotations

from pathlib import Path


class CaseError(ValueError):
    """A case file that doesn't keep the format of fixtures/README.md, or fixtures that are missing."""


def fixtures() -> Path:
    """The fixtures folder: beside the packages in a checkout, ``mhc_fixtures`` in an installation."""
    home = Path(__file__).resolve().parents[2]
    for place in (home / "fixtures", home / "mhc_fixtures"):
        if (place / "dialects.json").is_file():
            return place
    raise CaseError(f"no fixtures beside {home}: reinstall the package")
