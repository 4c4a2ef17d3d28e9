"""The figures by which a trainer sees whether hyper-connections are healthy (docs/health.md). One site computes::

    M = H, or its transpose for "out-in"        # [..., n, n], from input stream i to output stream j
    forward, backward = M.sum(-2), M.sum(-1)    # [..., n] each, 1 where M is doubly stochastic
    C = M_1 @ M_2 @ ... @ M_l                   # [..., n, n], the composite of l sites

Every figure is a mean over the tokens that it is given, in float32 (float64 for float64). Nothing waits for the device,
no gradient flows, and all of it can be a part of a compiled program. Without tokens the means are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jax_impl.config import MHCConfig
from jax_impl.projections import Weights
from jax_impl.residual import check_shape, compiled, wide_dtype

SATURATED = 1e-3
"""A gate whose sigmoid is below this is closed, above 1 minus this open: its slope is below 1/250 of the steepest."""


class Gains(NamedTuple):
    """Sums of a matrix that mixes streams, and its Amax gains (arXiv:2512.24880).

    Attributes:
        forward_sums: ``[n]``, for each output stream the sum over input streams.
        backward_sums: ``[n]``, for each input stream the sum over output streams.
        forward: ``[]``, the mean over tokens of the largest absolute forward sum.
        backward: ``[]``, the same of the backward sums, by which gradients grow.
        off: ``[]``, the mean over tokens of the largest distance of any sum from 1.
    """

    forward_sums: Array
    backward_sums: Array
    forward: Array
    backward: Array
    off: Array


class GateHealth(NamedTuple):
    """The sigmoids of pre or post, without their scale and eps.

    Attributes:
        mean: ``[n]``.
        closed, open: ``[n]``, the fractions of tokens for which the sigmoid is below `SATURATED`, or above 1 minus it.
        spread: ``[]``, the standard deviation over tokens, as root mean square over the streams.
    """

    mean: Array
    closed: Array
    open: Array
    spread: Array


class SiteHealth(NamedTuple):
    """The health of one site.

    Attributes:
        gains: of its H.
        entropy: ``[]``, of H, 0 for a permutation and 1 where every entry is 1/n.
        from_permutation, from_uniform, from_identity: ``[]``, the part of an output stream's weight that lies elsewhere
            than in its largest entry, than in equal parts, than in the stream of the same number; 0 to 1.
        spread: ``[]``, the standard deviation of H's entries over tokens, as root mean square over the entries.
        pre, post: of its gates.
        share: ``[n]``, the part of x's squares that each stream has; None without x.
        alpha: ``[3]`` (``[2]`` where H is the identity), the gating scalars of pre, post and H; None without weights.
    """

    gains: Gains
    entropy: Array
    from_permutation: Array
    from_uniform: Array
    from_identity: Array
    spread: Array
    pre: GateHealth
    post: GateHealth
    share: Array | None
    alpha: Array | None


class StackHealth(NamedTuple):
    """The health of sites that follow one another.

    Attributes:
        sites: every field of `SiteHealth` with a first axis for the sites.
        composite: every field of `Gains` with a first axis: number l is that of the first l + 1 sites together.
    """

    sites: SiteHealth
    composite: Gains


def drifting(config: MHCConfig) -> str:
    """Says which sums of the composite leave 1 where Sinkhorn's iterations haven't converged (docs/health.md, "The side
    that drifts").

    Returns:
        ``"forward"`` or ``"backward"``: the sums over the axis that isn't normalised last; ``"neither"`` where H is
        doubly stochastic by construction.
    """
    if config.residual != "sinkhorn":
        return "neither"
    kept_over_first = config.order == "rows-first"  # it ends on columns, whose sums run over the first index
    return "backward" if kept_over_first == (config.mix == "in-out") else "forward"


def composite(
    H: Float[Array, "... n n"], config: MHCConfig, before: Float[Array, "... n n"] | None = None
) -> Float[Array, "... n n"]:
    """Computes what the sites up to this one do to the streams, the branches aside (docs/health.md, "Depth").

    Args:
        H: ``[..., n, n]``, this site's.
        before: ``[..., n, n]``, the result of the sites before it; None for the first.

    Returns:
        C ``[..., n, n]``, the weight of input stream i of the first site in output stream j of this one.

    Raises:
        ValueError: H has another shape than the configuration's.
    """
    check_shape("H", H, (config.streams, config.streams))
    M = _wide(H)
    M = M.swapaxes(-1, -2) if config.mix == "out-in" else M  # [..., n of inputs, n of outputs]
    if before is None:
        return M
    products = _wide(before)[..., None] * M[..., None, :, :]  # [..., n, n, n]: no matrix unit rounds its operands
    return products.sum(-2)  # [..., n, n]


def gains(C: Float[Array, "... n n"]) -> Gains:
    """Computes the sums and gains of a matrix that leads from input streams (rows) to output streams (columns).

    Args:
        C: ``[..., n, n]``, a `composite`; of one site alone where ``before`` was None.
    """
    forward, backward = C.sum(-2), C.sum(-1)  # [..., n] each
    off = jnp.maximum(jnp.abs(forward - 1).max(-1), jnp.abs(backward - 1).max(-1))  # [...]
    return Gains(
        _mean(forward, 1),
        _mean(backward, 1),
        jnp.abs(forward).max(-1).mean(),
        jnp.abs(backward).max(-1).mean(),
        off.mean(),
    )


@compiled("config")
def site_health(
    pre: Float[Array, "... streams"],
    post: Float[Array, "... streams"],
    H: Float[Array, "... streams streams"],
    config: MHCConfig,
    x: Float[Array, "... streams dim"] | None = None,
    weights: Weights | None = None,
) -> SiteHealth:
    """Computes the health of one site from its coefficients (docs/health.md, "Quantities").

    Args:
        pre: ``[..., streams]``, as `coefficients` returns it.
        post: ``[..., streams]``.
        H: ``[..., streams, streams]``.
        x: ``[..., streams, dim]``, the site's input; its share of streams takes a pass over x.
        weights: the site's, of which the gating scalars are reported.

    Raises:
        ValueError: pre, post, H or x of another shape than the configuration's.
    """
    n = config.streams
    check_shape("pre", pre, (n,))
    check_shape("post", post, (n,))
    M = composite(H, config)  # [..., n, n]
    identity = jnp.eye(n, dtype=M.dtype)  # [n, n]
    nats = jax.scipy.special.xlogy(jnp.abs(M), jnp.abs(M)).sum((-2, -1))  # [...]
    share = None
    if x is not None:
        check_shape("x", x, (n, config.dim))
        squares = jnp.square(_wide(x)).sum(-1)  # [..., n]
        share = _mean(squares / jnp.maximum(squares.sum(-1, keepdims=True), jnp.finfo(squares.dtype).tiny), 1)
    return SiteHealth(
        gains=gains(M),
        entropy=-nats.mean() / (n * math.log(max(n, 2))),
        from_permutation=1 - M.max(-2).mean(),
        from_uniform=jnp.abs(M - 1 / n).sum(-2).mean() / 2,
        from_identity=jnp.abs(M - identity).sum(-2).mean() / 2,
        spread=_spread(M, 2),
        pre=_gates(pre, 1.0, config.pre_eps),
        post=_gates(post, config.post_scale, config.post_eps),
        share=share,
        alpha=None if weights is None else _alpha(weights),
    )


@compiled("config")
def stack_health(
    sites: Sequence[tuple[Array, Array, Array]],
    config: MHCConfig,
    xs: Sequence[Array] | None = None,
    weights: Sequence[Weights] | None = None,
) -> StackHealth:
    """Computes the health of sites that follow one another, in one call: what a trainer logs (docs/health.md, "In
    training").

    Args:
        sites: pre ``[..., streams]``, post ``[..., streams]`` and H ``[..., streams, streams]`` of each, in order.
        xs: each site's input ``[..., streams, dim]``.
        weights: each site's.

    Raises:
        ValueError: no site, another number of inputs or weights than of sites, or as `site_health`.
    """
    for name, given in (("xs", xs), ("weights", weights)):
        if given is not None and len(given) != len(sites):
            raise ValueError(f"{name} must be one for each of {len(sites)} sites, got {len(given)}")
    if not sites:
        raise ValueError("sites must be at least one, got none")
    every: list[SiteHealth] = []
    composites: list[Gains] = []
    before: Array | None = None
    for index, (pre, post, H) in enumerate(sites):
        x, held = xs[index] if xs else None, weights[index] if weights else None
        every.append(site_health(pre, post, H, config, x, held))
        before = composite(H, config, before)
        composites.append(gains(before))
    return StackHealth(_stacked(every), _stacked(composites))


def _wide(value: Array) -> Array:
    """The value without its gradient, in the dtype that figures are computed in."""
    return jax.lax.stop_gradient(value).astype(wide_dtype(value.dtype))


def _mean(value: Array, kept: int) -> Array:
    """The mean over all axes but the last ``kept``."""
    return value.mean(tuple(range(value.ndim - kept)))


def _spread(value: Array, kept: int) -> Array:
    """The standard deviation over all axes but the last ``kept``, as root mean square over those."""
    return jnp.sqrt(jnp.square(value - _mean(value, kept)).mean())


def _gates(gate: Array, scale: float, eps: float) -> GateHealth:
    """The health of gates ``scale * sigmoid + eps`` ``[..., n]``."""
    s = (_wide(gate) - eps) / scale  # [..., n]
    closed, opened = (s < SATURATED).astype(s.dtype), (s > 1 - SATURATED).astype(s.dtype)
    return GateHealth(_mean(s, 1), _mean(closed, 1), _mean(opened, 1), _spread(s, 1))


def _alpha(weights: Weights) -> Array:
    """The gating scalars of pre, post and H where they are there, ``[3]`` or ``[2]``."""
    names = [name for kind in ("pre", "post", "res") if (name := f"{kind}_alpha_scale") in weights]
    return jnp.concatenate([_wide(weights[name]) for name in names])


def _stacked(rows: Sequence[Any]) -> Any:
    """One tuple of tensors with a first axis, of several tuples of tensors; None stays None."""
    first = rows[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        return type(first)(*(_stacked(values) for values in zip(*rows, strict=True)))
    return jnp.stack(rows)
