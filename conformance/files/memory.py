"""A limit of memory for a block that reads what a stranger wrote."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def at_most(size: int) -> Generator[None]:
    """In the block this process may take so many bytes more than it has; beyond them allocating raises MemoryError.

    Only Linux has such a limit for memory that isn't touched yet; elsewhere nothing is limited.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        yield
        return
    limit = pages * resource.getpagesize() + size
    for known in (soft, hard):
        if known != resource.RLIM_INFINITY:
            limit = min(limit, known)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
