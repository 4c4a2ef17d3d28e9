"""Where a stack begins and ends: one stream becomes n, n become one. Shapes are those of `functional`."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jax_impl import mixing
from jax_impl.projections import Shards
from jax_impl.residual import compiled, wide_dtype


def expand(x: Float[Array, "... dim"], streams: int) -> Float[Array, "... streams dim"]:
    """Repeats one stream ``streams`` times.

    Args:
        x: ``[..., dim]``, the embedding.
        streams: n, at least 1.

    Raises:
        ValueError: ``streams`` is below 1.
    """
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], streams, x.shape[-1]))  # [..., n, dim]


def one_hot(x: Float[Array, "... streams dim"], *, shards: Shards | None = None) -> Float[Array, "... streams"]:
    """The gates that the first site of a single-pass stack reads with: 1 for stream 0, else 0 (docs/mathematics.md,
    "Single pass").

    Args:
        x: ``[..., streams, dim]``; its values don't matter.
        shards: where the gates are laid out, as the pre of a site is: a scan carries both.

    Returns:
        ``[..., streams]`` in float32 (float64 for float64).
    """
    first = jnp.arange(x.shape[-2]) == 0  # [n]
    gates = jnp.broadcast_to(first.astype(wide_dtype(x.dtype)), x.shape[:-1])  # [..., n]
    return shards.gates(gates) if shards else gates


def reduce(
    x: Float[Array, "... streams dim"],
    how: str,
    carried: Float[Array, "... streams"] | None = None,
    *,
    reduction: str = "float32",
    shards: Shards | None = None,
) -> Float[Array, "... dim"]:
    """Reduces the streams to one: their sum, their mean, or the sum weighted by the pre of the last site
    (docs/mathematics.md, "Single pass").

    Args:
        x: ``[..., streams, dim]``.
        how: ``"sum"``, ``"mean"`` or ``"carried"``.
        carried: ``[..., streams]``, the last site's pre, for ``"carried"`` alone; float32 (float64 for float64).
        reduction: ``"float32"`` accumulates in float32 or wider and rounds once, ``"activation"`` adds stream by stream
            in x's dtype.
        shards: where x lies, for ``"carried"``.

    Raises:
        ValueError: ``how`` is another word, or ``carried`` is missing, surplus, of another shape or narrower dtype.
    """
    if how not in ("sum", "mean", "carried"):
        head = "; a dialect that ends with a head takes HyperHead(config)" if how == "head" else ""
        raise ValueError(f"how must be sum, mean or carried, got {how!r}{head}")
    if how == "carried":
        return _weighted(x, check_carried(x, carried, shards))
    if carried is not None:
        raise ValueError(f"carried goes with how='carried' alone, got it with {how!r}")
    return _reduced(x, how, reduction)


@compiled()
def _weighted(x: Array, gates: Array) -> Array:
    """The streams weighted by gates ``[..., n]``."""
    return mixing.weighted_sum(x, gates)  # [..., n, dim], [..., n] -> [..., dim]


@compiled("how", "reduction")
def _reduced(x: Array, how: str, reduction: str) -> Array:
    """The sum or the mean of the streams."""
    if reduction == "activation":
        total = x[..., 0, :]  # [..., dim]
        for index in range(1, x.shape[-2]):
            total = total + x[..., index, :]
    else:
        total = x.sum(-2, dtype=wide_dtype(x.dtype))  # [..., n, dim] -> [..., dim]
    return (total if how == "sum" else total / x.shape[-2]).astype(x.dtype)


def check_carried(x: Array, carried: Array | None, shards: Shards | None) -> Array:
    """The pre that the site before handed on, once it is known to be one for this x."""
    if carried is None:
        raise ValueError("carried must be the pre of the site before: one_hot(x) for the first site, got None")
    if carried.shape != x.shape[:-1]:
        raise ValueError(f"carried must be {list(x.shape[:-1])}, got {list(carried.shape)}")
    kept = wide_dtype(x.dtype)
    if carried.dtype != kept:
        raise ValueError(
            f"carried must be {kept} for x in {x.dtype}, got {carried.dtype}: hand it on as it was returned, "
            "outside of what casts a layer's inputs or outputs to a narrow dtype"
        )
    return shards.gates(carried) if shards else carried
