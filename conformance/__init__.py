"""Conformance suite for Manifold-Constrained Hyper-Connections. Importing it imports no framework."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mhc-conformance")
except PackageNotFoundError:  # a checkout that is on the path without being installed
    __version__ = "0+unknown"
