"""Conformance suite for Manifold-Constrained Hyper-Connections. Importing it imports no framework."""
