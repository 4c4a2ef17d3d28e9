"""The version of the distribution that this package is a part of."""

from __future__ import annotations

import tomllib
from pathlib import Path

DISTRIBUTION = "mhc-conformance"


def version() -> str:
    """The version that the checkout or the source archive around this package states, or else the installed one's.

    The files come first, since a checkout on the path may stand beside an installation of another version. Without
    either, as in a folder that was copied, it is ``"0+unknown"``.
    """
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text()).get("project", {})
        if table.get("name") == DISTRIBUTION:
            return table["version"]
    from importlib import metadata  # 20 ms, which a checkout doesn't need

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+unknown"
