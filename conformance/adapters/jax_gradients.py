"""What adapters of JAX code share: vector-Jacobian products, and calls that take and return NumPy arrays.

It imports nothing of `jax_impl`, so that an adapter of other code runs without it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance.files import kept
from conformance.interface import Arrays, Result, asked_for
from conformance.stages import STAGES, relevant

Values = dict[str, jax.Array]


def vector_jacobian(function: Callable[[Values], Values], constants: tuple[str, ...]) -> Callable[..., Any]:
    """Makes a function of (inputs, cotangents) that returns the outputs and every input's gradient.

    Args:
        function: maps a stage's inputs and weights to its outputs.
        constants: inputs that aren't differentiated: those of the test's own branch, and what isn't asked for.
    """

    def run(inputs: Values, cotangents: Values | None) -> tuple[Values, Values]:
        fixed = {k: v for k, v in inputs.items() if k in constants}
        free = {k: v for k, v in inputs.items() if k not in constants}
        if cotangents is None:
            return function(inputs), {}
        outputs, pullback = jax.vjp(lambda values: function({**fixed, **values}), free)
        (gradients,) = pullback({k: jnp.asarray(cotangents[k], v.dtype) for k, v in outputs.items()})
        return outputs, gradients

    return run


CHEAP = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
"""Options of XLA for CPUs with which a graph that runs once is compiled in half the time."""
SEEN = ((0, 10),)
"""Versions of JAX whose XLA is known to have these options."""
ACCELERATED = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
"""Packages that read the same environment."""
LARGEST_CACHE = 1 << 28
"""Bytes of programs that a process finds on disk at most; the oldest go."""
UNREADABLE = "Error reading persistent compilation cache entry"
"""So JAX begins to warn of a program that isn't whole, since a process was killed while it wrote it."""


OPTIMISED, PLACES = "jax_disable_most_optimizations", "jax_traceback_in_locations_limit"
CHEAPLY = {OPTIMISED: True, PLACES: 0}


@contextlib.contextmanager
def compiled_cheaply() -> Generator[None]:
    """In it XLA leaves most of its optimisations out on a CPU: nearly all of the suite's time goes into compiling.

    Nor do programs say in which lines of Python their operations were written, unless the user's environment sets how
    much of that they say. Nobody reads it here, and code that runs operation by operation makes a program of each: it
    took a fifteenth of the time.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    before: dict[str, Any] = {OPTIMISED: jax.config.read(OPTIMISED)}
    if hasattr(jax.config, PLACES) and PLACES.upper() not in os.environ:
        before[PLACES] = getattr(jax.config, PLACES)
    for name in before:
        jax.config.update(name, CHEAPLY[name])
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def compile_all_cheaply() -> None:
    """Sets `CHEAP` for programs that take no compile options, those of code that runs operation by operation.

    They are set in XLA's environment, which it reads when it is first used. What the user has set there stays. An XLA
    that doesn't know an option ends the process, and so does libtpu: so it is done where neither can be.
    """
    known = jax.__version_info__[:2] in SEEN
    only_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, ACCELERATED))
    if not known or not only_cpu:
        return
    flags = os.environ.get("XLA_FLAGS", "").split()
    missing = {name: value for name, value in CHEAP.items() if not any(flag.startswith(f"--{name}") for flag in flags)}
    os.environ["XLA_FLAGS"] = " ".join([*flags, *(f"--{name}={value}".lower() for name, value in missing.items())])


def keep_programs() -> None:
    """Keeps compiled programs on disk for the next run, unless the user has chosen a place or none already.

    Code that isn't compiled as a whole runs operation by operation, and each shape of each is a program of its own.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) or jax.default_backend() != "cpu":
        return
    cache = kept.folder("jax")
    if cache is None:
        return
    kept.make_room(cache, LARGEST_CACHE)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # With a limit of its own JAX reads the age and the size of every program whenever it writes one: of 3,700
    # programs that took six times as long as making them.
    jax.config.update("jax_compilation_cache_max_size", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    warnings.filterwarnings("ignore", UNREADABLE)


def leave_caches() -> None:
    """Leaves JAX's caches and backends to the system when the process ends: emptying them takes JAX ten seconds.

    That is also where JAX leaves a group of processes, which an implementation of one process isn't in. JAX registers
    `clean_up`, and has no public way around it; a version that doesn't is left as it is.
    """
    with contextlib.suppress(ImportError, AttributeError):
        atexit.unregister(importlib.import_module("jax._src.api").clean_up)


MAPPED, MOST_MAPPED = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
"""Where Linux lists the parts of a process's memory, and says how many of them it may have."""


def programs_have_room() -> bool:
    """Whether the process may map as many parts of memory again as it has now.

    XLA maps a few parts for each of its programs: code that runs operation by operation comes to tens of thousands, and
    the process dies of the first that the system refuses.
    """
    try:
        most = int(MOST_MAPPED.read_text())
        with MAPPED.open("rb") as parts:
            held = sum(1 for _ in parts)
    except (OSError, ValueError):  # another system
        return True
    return 2 * held < most


class StageCalls:
    """Calls stages of JAX code on NumPy arrays, eagerly or compiled once for each function that differs.

    Args:
        jit: outputs and gradients come from one compiled function.
    """

    def __init__(self, jit: bool):
        self._jit = jit
        self._last: tuple[Any, Callable[..., Any]] = (None, dict)
        self._graphs = 0

    def __call__(
        self,
        stage: str,
        config: dict[str, Any],
        function: Callable[[Values], Values],
        inputs: Arrays,
        cotangents: Arrays | None,
    ) -> Result:
        """Outputs and gradients of one item.

        Args:
            function: maps the stage's inputs and weights to its outputs; equal for equal `stages.relevant`.
        """
        wide = any(v.dtype == np.float64 for v in inputs.values())
        with jax.enable_x64(wide), compiled_cheaply():
            # A compiled function can't see whether a gradient is asked for.
            unasked = () if self._jit else tuple(name for name in inputs if not asked_for(name))
            key = (stage, relevant(stage, config), wide, unasked)
            if self._last[0] != key:  # items of one graph come together; the executables of the others are let go
                self._graphs += 1
                if self._graphs % 16 == 0 and not programs_have_room():  # to count takes 20 ms
                    jax.clear_caches()
                run = vector_jacobian(function, (*STAGES[stage].constants, *unasked))
                self._last = (key, self._compiled(run) if self._jit else run)
            # XLA has no strided arrays: a copy in order is what any caller gets.
            arrays = {k: jnp.asarray(np.ascontiguousarray(v).reshape(v.shape)) for k, v in inputs.items()}
            outputs, gradients = self._last[1](arrays, cotangents)
            return {k: np.asarray(v) for k, v in outputs.items()}, {k: np.asarray(v) for k, v in gradients.items()}

    @staticmethod
    def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(run, compiler_options=CHEAP if jax.default_backend() == "cpu" else None)
