"""A model's health as one self-contained HTML page: warnings, curves over depth, and the figures of every site."""

from __future__ import annotations

from typing import Any

from conformance.report.page import assembled, embedded

SCRIPTS = ("elements.js", "charts.js", "health.js")


def page(content: dict[str, Any]) -> str:
    """The page of what ``health --json`` prints."""
    return assembled("health.html", f"mHC health: {content['dialect']}", embedded(content), SCRIPTS)
