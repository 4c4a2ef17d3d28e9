"""A kernel and its plain twin: the kernel computes, the twin is what is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax


def twinned(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs ``kernel``; its derivative, of any order and in both modes, is that of ``plain``.

    Args:
        kernel: takes what isn't differentiated as its first argument, then arrays.
        plain: the same function of operators that JAX differentiates.
    """

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    def function(settings: Any, *arrays: Any) -> Any:
        return kernel(settings, *arrays)

    @function.defjvp
    def _(settings: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        return function(settings, *primals), jax.jvp(partial(plain, settings), primals, tangents)[1]

    return function
