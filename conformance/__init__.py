"""Conformance suite for Manifold-Constrained Hyper-Connections. Importing it imports no framework."""

from conformance.version import version

__version__ = version()
