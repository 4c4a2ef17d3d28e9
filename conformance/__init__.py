"""Conformance suite for Manifold-Constrained Hyper-Connections. Importing it imports no framework."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """``__version__``, which is read where it is asked for: in an installation that takes 30 ms."""
    if name == "__version__":
        from conformance.version import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
