"""Keeps JAX, on which Orbax stands, from starting an accelerator's runtime.

Orbax asks JAX for this process's number, and JAX then starts every backend that it finds: on a machine with a TPU or a
GPU it takes the device and most of its memory, for arrays that go from one file to another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any

_LOCK = threading.RLock()


@contextlib.contextmanager
def processor_only() -> Generator[None, None, None]:
    """Restricts JAX to the CPU within the block, unless JAX has been started before.

    If the program has started JAX, nothing changes, and Orbax uses its backends. If it hasn't, JAX is unstarted again
    after the block, with the platforms that were set before. A thread that starts JAX within the block would get the
    CPU and lose it at the end.
    """
    import jax
    from jax._src import xla_bridge  # no public function says whether JAX has been started
    from jax.extend.backend import clear_backends

    with _LOCK:
        if xla_bridge.backends_are_initialized():
            yield
            return
        config: Any = jax.config
        platforms = config.values["jax_platforms"]
        config.update("jax_platforms", "cpu")
        try:
            yield
        finally:
            clear_backends()
            config.update("jax_platforms", platforms)
