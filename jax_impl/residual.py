"""The residual matrix H from its logits (docs/mathematics.md, "The residual matrix").

Sinkhorn starts from a softmax over one axis and makes N iterations of two passes::

    P = softmax(logits, axis)                   # [n, n]; or exp(logits - their maximum over the axis normalised first)
    for _ in range(N):                          # the softmax takes the place of the first pass along the same axis
        P = P / P.sum(rows)                     # columns before rows where order = "columns-first"
        P = P / P.sum(columns)
    H = P                                       # [n, n]; with eps in the sums as guard says
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jax_impl.config import MHCConfig

HIGHEST = jax.lax.Precision.HIGHEST
ROWS, COLUMNS = 1, 0
"""The axes of a pass over rows and over columns of ``[n, n, ...]``."""
AXES = {"rows": ROWS, "columns": COLUMNS}
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(*static: str) -> Callable[[Function], Function]:
    """Makes one program of a function, for a caller who compiles nothing; within his `jax.jit` XLA inlines it.

    Operation by operation a site's forward pass has some 90 programs, each compiled for each shape, and `jax.vjp`
    traces all of it at every call. With ``inline=True`` its transpose would run operation by operation still.

    Args:
        static: arguments that aren't arrays, by name.
    """
    return lambda function: cast(Function, jax.jit(function, static_argnames=static))


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that coefficients are computed in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def check_shape(name: str, value: Array, tail: tuple[int, ...]) -> None:
    """Checks the last axes of an argument.

    Raises:
        ValueError: they aren't ``tail``.
    """
    if value.ndim < len(tail) or value.shape[value.ndim - len(tail) :] != tail:
        raise ValueError(f"{name} must end in {list(tail)}, got {list(value.shape)}")


def tokens_last(value: Array, axes: int) -> Array:
    """Moves the last ``axes`` axes to the front."""
    return jnp.moveaxis(value, range(-axes, 0), range(axes))  # [..., n, n] -> [n, n, ...] for 2 axes


def tokens_first(value: Array, axes: int) -> Array:
    """Moves the first ``axes`` axes to the end."""
    return jnp.moveaxis(value, range(axes), range(-axes, 0))  # [n, n, ...] -> [..., n, n] for 2 axes


def _normalise(p: Array, axis: int, config: MHCConfig) -> Array:
    total, eps = p.sum(axis, keepdims=True), config.eps or 0.0  # [1, n, ...] or [n, 1, ...]
    if config.guard in ("add", "denominator"):
        total = total + eps
    elif config.guard == "clip":
        total = _at_least(total, eps)
    return p / total if p.dtype.itemsize >= 4 else _divided(p, total)


def _at_least(total: Array, eps: float) -> Array:
    """The larger of a sum and eps; a sum that is exactly eps has its gradient still.

    The gradient of `jnp.maximum` compares the sum with the result. In bfloat16 XLA may compute the sum again in another
    fusion and without rounding it (on a CPU from 1,366 tokens on where n = 3): the two aren't equal, and the gradient
    is lost.
    """
    return jnp.where(total < eps, eps, total)  # so that NaN stays NaN


@jax.custom_jvp
def _divided(p: Array, total: Array) -> Array:
    """A quotient in float16 or bfloat16. In float32 it isn't worth the bytes: a TPU would move 2% more in all."""
    return p / total


@_divided.defjvp
def _divided_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Divides twice where JAX's own rule has total^-2, which overflows in float16 from a total of 2^-8 down."""
    (p, total), (dp, dtotal) = primals, tangents
    quotient = p / total
    return quotient, (dp - quotient * dtotal) / total


def _largest(logits: Array, axis: int) -> Array:
    """The maximum along ``axis``, whose gradient goes to the entry that it is.

    By its index: the gradient of `jnp.max` looks for an equal entry, and where XLA computes the logits again for the
    way back, in another fusion, none is equal: a division by zero.
    """
    where = jnp.expand_dims(jnp.argmax(logits, axis), axis) == jax.lax.broadcasted_iota(int, logits.shape, axis)
    return jnp.where(where, logits, 0).sum(axis, keepdims=True)  # [1, n, ...] or [n, 1, ...]


def _balanced(logits: Array, axis: int) -> Array:
    """A softmax along ``axis``, each line across it times a factor that makes its largest entry of order 1.

    Where no eps guards a sum the next pass, across ``axis``, divides the factor out again: it changes no result.
    Without it a line far below the others vanishes, and the pass divides 0 by 0.
    """
    across = ROWS + COLUMNS - axis
    level = logits - jax.lax.stop_gradient(logits.max(axis, keepdims=True))  # [n, n, ...]
    factor = jax.lax.stop_gradient(level.max(across, keepdims=True))  # [1, n, ...] or [n, 1, ...]
    return jnp.exp(level - factor) / jnp.exp(level).sum(axis, keepdims=True)


def _limited(logits: Array, limit: float) -> Array:
    """The logits clipped; one that is exactly at the limit has its gradient still, of which `jnp.clip` takes half."""
    return jnp.where(jnp.abs(logits) <= limit, logits, jnp.sign(logits) * limit)


@partial(jax.jit, static_argnums=1)
def _sinkhorn(logits: Array, config: MHCConfig) -> Array:
    """Works on ``[n, n, ...]``, since a TPU pads the last axis to 128: with n there an array takes 32 times its size.

    Compiled on its own, so that an eager caller doesn't trace the loop at every call.
    """
    first, second = (ROWS, COLUMNS) if config.order == "rows-first" else (COLUMNS, ROWS)
    whole, start = config.iterations or 0, AXES.get(str(config.softmax))
    if config.guard == "none":  # from exp(z) the first pass is a softmax too
        p, start = _balanced(logits, first if start is None else start), first if start is None else start
    else:
        p = jnp.exp(logits - _largest(logits, first)) if start is None else jax.nn.softmax(logits, axis=start)
    if config.guard == "add":
        p = p + (config.eps or 0.0)

    def both(p: Array, _: None) -> tuple[Array, None]:
        return _normalise(_normalise(p, first, config), second, config), None

    if start == first:  # the softmax takes the place of the first pass
        p, whole = _normalise(p, second, config), whole - 1
    return jax.lax.scan(both, p, None, length=whole)[0]


def sinkhorn(logits: Float[Array, "... n n"], config: MHCConfig) -> Float[Array, "... n n"]:
    """Makes ``config.iterations`` Sinkhorn iterations as written (docs/mathematics.md, "The residual matrix").

    It computes in float32 or wider, and in the logits' own dtype where ``config.matrix`` is ``"activation"``.

    Args:
        logits: ``[..., n, n]``.

    Returns:
        H in the dtype of the logits. The axis normalised last sums to 1 to rounding, the other need not.
    """
    z = logits if config.matrix == "activation" else logits.astype(wide_dtype(logits.dtype))
    if config.logit_limit is not None:
        z = _limited(z, config.logit_limit)
    # One compiled loop serves all sizes of streams and dim.
    settings = dataclasses.replace(config, streams=1, dim=1)
    H = _sinkhorn(tokens_last(z, 2), settings)  # [n, n, ...]
    return tokens_first(H, 2).astype(logits.dtype)  # [..., n, n]


def permutations(logits: Float[Array, "... factorial"], config: MHCConfig) -> Float[Array, "... n n"]:
    """Weights the n! permutation matrices by a softmax, in `itertools.permutations` order with ``P[i, p(i)] = 1``
    (docs/mathematics.md, "The residual matrix").

    Args:
        logits: ``[..., n!]``.

    Returns:
        H in the dtype of the logits.
    """
    orders = np.array(list(itertools.permutations(range(config.streams))))  # [n!, n]
    weight = jax.nn.softmax(logits.astype(wide_dtype(logits.dtype)), axis=-1)  # [..., n!]
    matrices = jnp.asarray(np.eye(config.streams)[orders], weight.dtype)  # [n!, n, n]
    H = jnp.einsum("...p,pij->...ij", weight, matrices, precision=HIGHEST)
    return H.astype(logits.dtype)


def residual_matrix(logits: Float[Array, ...], config: MHCConfig) -> Float[Array, "... n n"]:
    """Computes H from its logits (docs/mathematics.md, "The residual matrix").

    Args:
        logits: ``[..., n, n]`` for Sinkhorn, ``[..., n!]`` for permutations.

    Returns:
        H ``[..., n, n]`` in the dtype of the logits.

    Raises:
        ValueError: the logits have another shape, or the dialect's H is the identity and has no logits.
    """
    n = config.streams
    if config.residual == "identity":
        raise ValueError("residual='identity' has no logits: H is the identity")
    if config.residual == "permutations":
        check_shape("logits", logits, (config.residual_columns,))
        return permutations(logits, config)
    check_shape("logits", logits, (n, n))
    return sinkhorn(logits, config)
