"""Versions of installed packages, for an adapter's description."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """The installed version of a distribution, ``"?"`` where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
