"""The largest numbers that options take; each is far beyond any use, and far below what takes a machine down."""

from __future__ import annotations

MOST_JOBS = 256
MOST_PROCESSES = 1024
MOST_REPEATS = 100_000
LONGEST = 1e6
"""Seconds; 11.6 days."""
LARGEST_SEED = 2**63 - 1
MOST_STREAMS, MOST_DIM = 256, 1 << 20
MOST_TOKENS = 1 << 24
"""Sequences, and tokens of one."""
MOST_ELEMENTS = 1 << 25
"""Of x, and of all weights of a layer: float64 of them takes 256 MiB, and several such arrays are held at a time."""
MOST_VARIANTS = 100_000
MOST_PROBES = 4096
"""As `conformance.porter.options` has it, which the command line doesn't import for ``--help``."""
