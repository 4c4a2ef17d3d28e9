"""From y, the streams and the coefficients to the streams, with a derivative of its own::

    out[j] = post[j] * y + sum_i H[i, j] * x[i]         # H[j, i] for "out-in", x[j] for the identity

Where x comes from `site` (``tied``), what goes back for it is the cotangent of out, as it is: `site` mixes it itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jax_impl.config import MHCConfig
from jax_impl.kernels import spreading as kernels
from jax_impl.kernels.blocks import check_room
from jax_impl.kernels.parts import Add, Arrays, by_token, on_parts
from jax_impl.kernels.twins import twinned
from jax_impl.projections import Shards
from jax_impl.residual import HIGHEST, compiled, tokens_first, tokens_last

F32 = jnp.float32


@dataclass(frozen=True)
class Mixing:
    """How streams are mixed.

    Attributes:
        tied: whether x comes from `site`.
    """

    config: MHCConfig
    tied: bool = False
    shards: Shards | None = None


def _to_from(H: Array, config: MHCConfig) -> Array:
    """H, or a cotangent of it, with the stream that is read first: ``[..., from, to]``; it is its own inverse."""
    return jnp.swapaxes(H, -1, -2) if config.mix == "out-in" else H


def packed_matrix(H: Array, config: MHCConfig, dtype: jnp.dtype) -> Array:
    """H as the mixing takes it, ``[n * n, ...]`` in float32, from stream i to stream j in place ``i * n + j``."""
    H = tokens_last(_to_from(H, config), 2)  # [n, n, ...]
    return _taken(H.reshape(config.streams**2, *H.shape[2:]), config, dtype)


def _taken(coefficient: Array, config: MHCConfig, dtype: jnp.dtype) -> Array:
    """A coefficient in float32, rounded to x's dtype where the dialect has it so."""
    return (coefficient.astype(dtype) if config.mixing == "activation" else coefficient).astype(F32)


def between(H: Array, x: Array, config: MHCConfig, back: bool = False) -> Array:
    """``sum_i W[i, j] x_i``, or ``sum_j W[i, j] x_j`` for the way ``back``, by plain operators in float32."""
    if config.mix == "identity":
        return x.astype(F32)
    W = _taken(_to_from(H, config), config, x.dtype)  # [..., from, to]
    return jnp.einsum("...ij,...jc->...ic" if back else "...ij,...ic->...jc", W, x.astype(F32), precision=HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixed(mixing: Mixing, y: Array, x: Array, post: Array, H: Array) -> Array:
    """Computes the streams.

    Args:
        y: ``[..., dim]``.
        x: ``[..., n, dim]``.
        post: ``[..., n]`` in float32.
        H: ``[..., n, n]`` in float32.
    """
    return _spread(mixing, y, x, post, H)


def _forward(mixing: Mixing, y: Array, x: Array, post: Array, H: Array) -> tuple[Array, tuple[Array, ...]]:
    return _spread(mixing, y, x, post, H), (y, x, post, H)


def _backward(mixing: Mixing, held: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    dy, dx, dpost, dH = _pulled(mixing, *held, g)
    return dy, g if mixing.tied else dx, dpost, dH


mixed.defvjp(_forward, _backward)
compiled_mixed = compiled("mixing")(mixed)
"""`mixed` as one program, for a caller who compiles nothing."""


def _packed(part: Arrays, config: MHCConfig) -> Array:
    """post and H side by side, as the kernels take them, ``[T, n]`` or ``[T, n + n * n]``."""
    post = _taken(tokens_last(part["post"], 1), config, part["x"].dtype)  # [n, ...]
    rows = [post] if config.mix == "identity" else [post, packed_matrix(part["H"], config, part["x"].dtype)]
    return by_token(tokens_first(jnp.concatenate(rows), 1), 1)


def _spread_by_kernels(mixing: Mixing, y: Array, x: Array, post: Array, H: Array) -> Array:
    def of_part(part: Arrays, add: Add) -> dict[str, Array]:
        del add
        x, y = by_token(part["x"], 2), by_token(part["y"], 1)
        small = _packed(part, mixing.config)
        inputs, outputs = kernels.pulled_operands(y, x, small, not mixing.tied)
        check_room([*inputs.values(), *outputs.values()])
        out = kernels.spread(y, x, small, mixing.config.mixing == "activation")
        return {"out": out.reshape(part["x"].shape)}

    return on_parts(mixing.shards, of_part, {"y": y, "x": x, "post": post, "H": H}, ("out",))["out"]


def _spread_plainly(mixing: Mixing, y: Array, x: Array, post: Array, H: Array) -> Array:
    config = mixing.config
    own = _taken(post, config, x.dtype)[..., None] * y.astype(F32)[..., None, :]  # [..., n, dim]
    other = between(H, x, config)
    if config.mixing == "activation":
        own, other = own.astype(x.dtype), other.astype(x.dtype)
    return (own + other).astype(x.dtype)


_spread = twinned(_spread_by_kernels, _spread_plainly)


def _pulled_by_kernels(
    mixing: Mixing, y: Array, x: Array, post: Array, H: Array, g: Array
) -> tuple[Array, Array | None, Array, Array]:
    """The cotangents of y, x, post and H; none of x where it is tied."""
    config, n = mixing.config, mixing.config.streams
    identity = config.mix == "identity"

    def of_part(part: Arrays, add: Add) -> dict[str, Array]:
        x, y, g = by_token(part["x"], 2), by_token(part["y"], 1), by_token(part["g"], 2)
        dy, dsmall, dx = kernels.pulled(y, x, _packed(part, config), g, not (mixing.tied or identity))
        rows = tokens_last(dsmall.reshape(*part["x"].shape[:-2], dsmall.shape[1]), 1)  # [n or n + n * n, ...]
        rows = rows if add is None else add(rows)
        found = {"dy": dy.reshape(part["y"].shape), "dpost": tokens_first(rows[:n], 1)}
        if dx is not None:
            found["dx"] = dx.reshape(part["x"].shape)
        if not identity:
            dH = tokens_first(rows[n:].reshape(n, n, *rows.shape[1:]), 2)
            found["dH"] = _to_from(dH, config)
        return found

    results = ["dy", "dpost"] + ([] if mixing.tied or identity else ["dx"]) + ([] if identity else ["dH"])
    arrays = {"y": y, "x": x, "post": post, "H": H, "g": g}
    found = on_parts(mixing.shards, of_part, arrays, results)
    dx = None if mixing.tied else found.get("dx", g)
    return found["dy"], dx, found["dpost"], found.get("dH", jnp.zeros_like(H))


def _pulled_plainly(
    mixing: Mixing, y: Array, x: Array, post: Array, H: Array, g: Array
) -> tuple[Array, Array | None, Array, Array]:
    _, pull = jax.vjp(partial(_spread_plainly, mixing), y, x, post, H)
    dy, dx, dpost, dH = pull(g)
    return dy, None if mixing.tied else dx, dpost, dH


_pulled = twinned(_pulled_by_kernels, _pulled_plainly)
