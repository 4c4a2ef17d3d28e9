"""What adapters of JAX code share: vector-Jacobian products, and calls that take and return NumPy arrays.

It imports nothing of `jax_impl`, so that an adapter of other code runs without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


class StageCalls:
    """Calls stages of JAX code on NumPy arrays, eagerly or compiled once for each function that differs.

    Args:
        jit: outputs and gradients come from one compiled function.
    """

    def __init__(self, jit: bool):
        self._jit = jit
        self._last: tuple[Any, Callable[..., Any]] = (None, dict)

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
        with jax.enable_x64(wide):
            # A compiled function can't see whether a gradient is asked for.
            unasked = () if self._jit else tuple(name for name in inputs if not asked_for(name))
            key = (stage, relevant(stage, config), wide, unasked)
            if self._last[0] != key:  # items of one graph come together; the executables of the others are let go
                run = vector_jacobian(function, (*STAGES[stage].constants, *unasked))
                self._last = (key, jax.jit(run) if self._jit else run)
            # XLA has no strided arrays: a copy in order is what any caller gets.
            arrays = {k: jnp.asarray(np.ascontiguousarray(v).reshape(v.shape)) for k, v in inputs.items()}
            outputs, gradients = self._last[1](arrays, cotangents)
            return {k: np.asarray(v) for k, v in outputs.items()}, {k: np.asarray(v) for k, v in gradients.items()}
