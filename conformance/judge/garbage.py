"""Garbage is looked for between items, and among the objects that are new.

What a framework keeps, every graph that it has captured above all, is hundreds of thousands of objects: to look through
all of them each time took a third of a captured implementation's time.
"""

from __future__ import annotations

import gc
import itertools

EVERY = 64
"""Of so many collections one looks through everything: an object that was kept once may be garbage later."""

_number = itertools.count(1)


def begin() -> None:
    """From here on nothing is collected but by `collect`: tracing makes millions of objects that all live.

    What another implementation has left behind goes first.
    """
    if not gc.isenabled():
        gc.unfreeze()
        gc.collect()
    gc.disable()
    gc.freeze()


def collect(everything: bool = False) -> None:
    """Frees the unreachable among the objects that were made since the last time; one time in `EVERY` among all.

    Args:
        everything: among all this time too.
    """
    if next(_number) % EVERY == 0 or everything:
        gc.unfreeze()
    gc.collect()
    gc.freeze()
