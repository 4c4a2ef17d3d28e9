"""The kernels of a site's second half, from y and the streams to the streams, and back. Of one token::

    out[j] = post[j] * y + sum_i W[i, j] * x[i]             # [n, dim]; W None stands for the identity

    dy = sum_j post[j] * g[j]                               # [dim], g the cotangent of out
    dpost[j] = sum_c g[j, c] * y[c]                         # [n]
    dW[i, j] = sum_c x[i, c] * g[j, c]                      # [n, n]
    dx[i] = sum_j W[i, j] * g[j]                            # [n, dim], unless the site's first half makes it

post and W come side by side, ``[T, n]`` or ``[T, n + n * n]``, W from stream i to stream j in place ``n + i * n + j``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_impl.kernels.blocks import Operand, along, run
from jax_impl.kernels.reading import F32, Refs, added


def spread(y: Array, x: Array, small: Array, rounded: bool) -> Array:
    """Computes the streams.

    Args:
        y: ``[T, dim]``.
        x: ``[T, n, dim]``.
        small: post and W in float32.
        rounded: whether both terms are rounded to x's dtype before they are added.
    """
    kernel = partial(_spread, rounded=rounded)
    return run(kernel, "mhc_spread", {"y": y, "x": x, "small": small}, {"out": Operand(x.shape, x.dtype)})["out"]


def _spread(refs: Refs, rounded: bool) -> None:
    x, small = refs["x"], refs["small"][...]
    _, n, dim = x.shape
    identity = small.shape[1] == n

    def step(at: Any, state: Any) -> Any:
        y = refs["y"][:, at].astype(F32)  # [B, K]
        streams = [x[:, i, at].astype(F32) for i in range(n)]  # n of [B, K]
        for j in range(n):
            own, mixed = small[:, j : j + 1] * y, streams[j]
            if not identity:
                parts = [small[:, n + i * n + j : n + i * n + j + 1] * streams[i] for i in range(n)]
                mixed = added(parts)
            if rounded:
                own, mixed = own.astype(x.dtype).astype(F32), mixed.astype(x.dtype).astype(F32)
            refs["out"][:, j, at] = (own + mixed).astype(x.dtype)
        return state

    along(dim, step, 0)


def pulled_operands(y: Array, x: Array, small: Array, mixed: bool) -> tuple[dict[str, Operand], dict[str, Operand]]:
    """What `pulled` takes and makes, by name."""
    stream, streams, columns = (Operand(value.shape, value.dtype) for value in (y, x, small))
    inputs = {"g": streams, "y": stream, "small": columns} | ({"x": streams} if small.shape[1] > x.shape[1] else {})
    return inputs, {"dy": stream, "dsmall": columns} | ({"dx": streams} if mixed else {})


def pulled(y: Array, x: Array, small: Array, g: Array, mixed: bool) -> tuple[Array, Array, Array | None]:
    """Computes the cotangents of y, of ``small``, and of x where ``mixed``.

    Args:
        y, x, small: as for `spread`.
        g: ``[T, n, dim]``, the cotangent of the streams.
    """
    arrays = {"g": g, "y": y, "small": small, "x": x}
    inputs, outputs = pulled_operands(y, x, small, mixed)
    found = run(_pulled, "mhc_spread_back", {name: arrays[name] for name in inputs}, outputs)
    return found["dy"], found["dsmall"], found.get("dx")


def _pulled(refs: Refs) -> None:
    gs, small = refs["g"], refs["small"][...]
    tokens, n, dim = gs.shape
    width = small.shape[1]

    def step(at: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        y = refs["y"][:, at].astype(F32)  # [B, K]
        g = [gs[:, j, at].astype(F32) for j in range(n)]  # n of [B, K]
        parts = [small[:, j : j + 1] * g[j] for j in range(n)]
        refs["dy"][:, at] = added(parts).astype(refs["dy"].dtype)
        found = [y * g[j] for j in range(n)]
        if width > n:
            found += [refs["x"][:, i, at].astype(F32) * g[j] for i in range(n) for j in range(n)]
        if "dx" in refs:
            for i in range(n):
                into = [small[:, n + i * n + j : n + i * n + j + 1] * g[j] for j in range(n)] if width > n else [g[i]]
                refs["dx"][:, i, at] = added(into).astype(gs.dtype)
        sums = [jnp.sum(value, axis=1, keepdims=True) for value in found]  # [B, 1] each
        return tuple(known + new for known, new in zip(state, sums, strict=True))

    columns = along(dim, step, (jnp.zeros((tokens, 1), F32),) * width)
    for index, column in enumerate(columns):
        refs["dsmall"][:, index : index + 1] = column
