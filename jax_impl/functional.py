"""The layer as plain functions (mathematics.md is the source of every equation).

Shapes: ``n`` streams, ``dim`` width of one; ``...`` is any leading shape, also none or with zero tokens.

``precision`` is that of the projections (`jax.lax.Precision`); None means HIGHEST, since the default of a TPU
rounds the operands to bfloat16 and that of a GPU to TF32, which no dialect's ``float32`` allows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jax_impl import mixing, sharding
from jax_impl.config import MHCConfig
from jax_impl.residual import HIGHEST, check_shape, residual_matrix, tokens_first, tokens_last, wide_dtype

Weights = Mapping[str, Array]


@partial(jax.tree_util.register_dataclass, data_fields=["x", "post", "H"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class Context:
    """What `post` needs of the `pre` before it: the streams, their coefficients and the configuration."""

    x: Array
    post: Array
    H: Array
    config: MHCConfig


def _coefficient_dtype(x: Array, config: MHCConfig) -> jnp.dtype:
    return x.dtype if config.coefficients == "activation" else wide_dtype(x.dtype)


def _check_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"weights must have {name} {list(shape)}, got {sorted(weights)}")
        if weights[name].shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(weights[name].shape)}")


def weight_shapes(config: MHCConfig) -> dict[str, tuple[int, ...]]:
    """Name and in-memory shape of each weight of the layer."""
    n, dim, columns = config.streams, config.dim, config.residual_columns
    shapes: dict[str, tuple[int, ...]] = {}
    if config.norm_weight:
        shapes["mhc_norm.scale"] = (n, dim)
    for kind in ("pre", "post"):
        shapes |= {f"{kind}_alpha": (n, dim, n), f"{kind}_alpha_scale": (1,), f"{kind}_beta": (n,)}
    if columns:
        beta = (n, n) if config.residual == "sinkhorn" else (columns,)
        shapes |= {"res_alpha": (n, dim, columns), "res_alpha_scale": (1,), "res_beta": beta}
    return shapes


def head_shapes(config: MHCConfig) -> dict[str, tuple[int, ...]]:
    """Name and in-memory shape of each weight of the head."""
    n = config.streams
    return {"head_fn": (n, config.dim, n), "head_base": (n,), "head_scale": (1,)}


def expand(x: Float[Array, "... dim"], streams: int) -> Float[Array, "... streams dim"]:
    """One stream repeated ``streams`` times.

    Raises:
        ValueError: ``streams`` below 1.
    """
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], streams, x.shape[-1]))


def one_hot(x: Float[Array, "... streams dim"]) -> Float[Array, "... streams"]:
    """What the first site of a single-pass stack reads with: 1 for stream 0, in float32 (float64 for float64)."""
    first = jnp.arange(x.shape[-2]) == 0
    gates = jnp.broadcast_to(first.astype(wide_dtype(x.dtype)), x.shape[:-1])  # [..., n]
    return sharding.constrain(gates, sharding.gate_axes(gates.ndim))  # laid out as the pre of a site: a scan's carry


def reduce(
    x: Float[Array, "... streams dim"],
    how: str,
    carried: Float[Array, "... streams"] | None = None,
    *,
    reduction: str = "float32",
) -> Float[Array, "... dim"]:
    """Sum or mean over the streams, or the sum that the last site's pre weights (mathematics.md, "Single pass").

    Args:
        how: ``"sum"``, ``"mean"`` or ``"carried"``.
        carried: the last site's pre, for ``"carried"`` alone; float32 (float64 for float64).
        reduction: ``"float32"`` accumulates in float32 or wider and rounds once, ``"activation"`` adds stream by stream
            in x's dtype.

    Raises:
        ValueError: another ``how``, or a ``carried`` that is missing, surplus, of another shape or narrower dtype.
    """
    if how not in ("sum", "mean", "carried"):
        raise ValueError(f"how must be sum, mean or carried, got {how!r}")
    if how == "carried":
        return pre_mix(x, _check_carried(x, carried))
    if carried is not None:
        raise ValueError(f"carried goes with how='carried' alone, got it with {how!r}")
    if reduction == "activation":
        total = x[..., 0, :]
        for index in range(1, x.shape[-2]):
            total = total + x[..., index, :]
    else:
        total = x.sum(-2, dtype=wide_dtype(x.dtype))
    return (total if how == "sum" else total / x.shape[-2]).astype(x.dtype)


def _check_carried(x: Array, carried: Array | None) -> Array:
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
    return sharding.constrain(carried, sharding.gate_axes(carried.ndim))


def rms_norm(
    x: Float[Array, "... streams dim"], scale: Float[Array, "streams dim"] | None, config: MHCConfig
) -> Float[Array, "... streams dim"]:
    """x over its root mean square across streams and dim together, times ``scale``.

    Returns:
        float32 (float64 for float64), rounded to x's dtype where the coefficients are kept in it.
    """
    mean = jnp.mean(jnp.square(x.astype(wide_dtype(x.dtype))), axis=(-2, -1), keepdims=True)
    return _normed(x, mean, scale, config)


def _normed(x: Array, mean: Array, scale: Array | None, config: MHCConfig) -> Array:
    """x over the root of its mean square, times ``scale``, in the dtype of the coefficients."""
    dtype, wide = _coefficient_dtype(x, config), wide_dtype(x.dtype)
    normed = _over_rms(x.astype(wide), mean, config)
    if scale is not None:
        normed = normed * scale.astype(dtype).astype(wide)
    return normed.astype(dtype)


def _over_rms(value: Array, mean: Array, config: MHCConfig) -> Array:
    """``value`` over the root of the mean square, with eps where the configuration has it."""
    if config.norm_eps_position == "mean":
        return value * jax.lax.rsqrt(mean + config.norm_eps)
    empty = mean == 0  # the root's slope is infinite there; the norm's is 1 / eps
    root = jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, mean)))
    return value / (root + config.norm_eps)


def _kept(value: Array) -> Array:
    return checkpoint_name(value, sharding.COEFFICIENTS)


def _contract(phi: Array, x: Array, precision: jax.lax.PrecisionLike) -> Array:
    """``[m, ...]``: (streams, dim) contracted at once, accumulated in float32 or wider.

    Never by way of ``[..., n*C]``: a flattened axis can't be sharded as dim is, and x would be gathered.
    """
    wide = wide_dtype(x.dtype)
    return jnp.einsum(
        "ncm,...nc->m...",
        phi.astype(wide),
        x.astype(wide),
        precision=HIGHEST if precision is None else precision,
        preferred_element_type=wide,
    )


def _logits(
    x: Array,
    weights: Weights,
    names: Sequence[tuple[str, str, str]],
    norm: Array | None,
    config: MHCConfig,
    precision: jax.lax.PrecisionLike,
) -> list[Array]:
    """``scale * (normed x @ phi) + shift`` of every ``(phi, scale, shift)``, tokens last ``[m, ...]``, wide."""
    dtype, wide = _coefficient_dtype(x, config), wide_dtype(x.dtype)

    def rounded(value: Array) -> Array:
        """Held wide from here on, so that gradients are added up before they are rounded."""
        return value.astype(dtype).astype(wide)

    phis, scales, shifts = ([rounded(weights[name]) for name in part] for part in zip(*names, strict=True))
    widths = [phi.shape[-1] for phi in phis]
    whole = jnp.concatenate([jnp.broadcast_to(value, width) for value, width in zip(scales, widths, strict=True)])
    phi, shift = jnp.concatenate(phis, axis=-1), jnp.concatenate([value.reshape(-1) for value in shifts])
    norms = [] if norm is None else [rounded(norm)]

    def of_shard(x: Array, held: list[Array], shared: list[Array], add: Callable[[Array], Array]) -> Array:
        phi, *norms = held
        h = _projected(x, phi, norms[0] if norms else None, config, precision, add)
        scale, shift = (value.reshape(-1, *(1,) * (h.ndim - 1)) for value in shared)
        return scale * h + shift

    logits = sharding.over_shards(of_shard, x, [phi, *norms], [whole, shift])
    return jnp.split(logits, list(itertools.accumulate(widths))[:-1])


def _projected(
    x: Array,
    phi: Array,
    norm: Array | None,
    config: MHCConfig,
    precision: jax.lax.PrecisionLike,
    add: Callable[[Array], Array],
) -> Array:
    """The normed streams times phi, ``[m, ...]``, from this device's part of dim; ``add`` sums over the parts.

    The norm's division comes after the product, so that partial sums of both are added up at once, m + 1 numbers a
    token. Where the norm's output is rounded to a narrow dtype (``coefficients="activation"``) the division has to
    come first, and the norm's sum and the projections are added up one after the other.
    """
    dtype, wide = _coefficient_dtype(x, config), wide_dtype(x.dtype)
    squares = jnp.square(x.astype(wide)).sum((-2, -1))
    count = config.streams * config.dim
    if dtype == wide:
        phi = phi if norm is None else phi * norm[..., None]
        sums = _kept(add(jnp.concatenate([_contract(phi, x, precision), squares[None]])))
        return _over_rms(sums[:-1], sums[-1] / count, config)
    mean = _kept(add(squares)) / count
    normed = _normed(x, mean[..., None, None], norm, config)
    return _kept(add(_contract(phi, normed, precision)).astype(dtype)).astype(wide)


def coefficients(
    x: Float[Array, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    *,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "... n"], Float[Array, "... n"], Float[Array, "... n n"]]:
    """pre, post and H of every token, in the dtype of the coefficients (mathematics.md, "Precision").

    They and the sums that they come from carry the name `sharding.COEFFICIENTS` for `jax.checkpoint`.

    Raises:
        ValueError: x or a weight of another shape than the configuration's.
    """
    n = config.streams
    check_shape("x", x, (n, config.dim))
    _check_weights(weights, weight_shapes(config))
    dtype = _coefficient_dtype(x, config)
    kinds = ("pre", "post", "res") if config.residual_columns else ("pre", "post")
    names = [(f"{kind}_alpha", f"{kind}_alpha_scale", f"{kind}_beta") for kind in kinds]
    logits = _logits(x, weights, names, weights.get("mhc_norm.scale"), config, precision)
    pre = (jax.nn.sigmoid(logits[0]) + config.pre_eps).astype(dtype)
    post = (config.post_scale * jax.nn.sigmoid(logits[1]) + config.post_eps).astype(dtype)
    pre, post = tokens_first(_kept(pre), 1), tokens_first(_kept(post), 1)
    if config.residual == "identity":
        return pre, post, jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*x.shape[:-2], n, n))
    z = logits[2]  # [n*n or n!, ...]
    if config.matrix == "activation":
        z = z.astype(dtype)
    z = tokens_first(z.reshape(n, n, *z.shape[1:]), 2) if config.residual == "sinkhorn" else tokens_first(z, 1)
    H = tokens_last(residual_matrix(z, config).astype(dtype), 2)  # [n, n, ...]
    return pre, post, tokens_first(_kept(H), 2)


def pre_mix(x: Float[Array, "... streams dim"], pre: Float[Array, "... n"]) -> Float[Array, "... dim"]:
    """``u = sum_i pre_i x_i``, summed in float32 or wider and rounded once to x's dtype."""
    return mixing.weighted_sum(x, jnp.broadcast_to(pre, x.shape[:-1]))


def post_mix(
    y: Float[Array, "... dim"],
    x: Float[Array, "... streams dim"],
    post: Float[Array, "... n"],
    H: Float[Array, "... n n"],
    config: MHCConfig,
) -> Float[Array, "... streams dim"]:
    """``out_j = post_j y + sum_i H[i, j] x_i`` (``H[j, i]`` for "out-in"), in x's dtype.

    Raises:
        ValueError: x or y of another shape than the configuration's.
    """
    check_shape("x", x, (config.streams, config.dim))
    check_shape("y", y, (config.dim,))
    wide = wide_dtype(x.dtype)
    rounded = config.mixing == "activation"
    if rounded:
        post, H = post.astype(x.dtype), H.astype(x.dtype)
    own = mixing.spread(y, jnp.broadcast_to(post, x.shape[:-1]))
    if config.mix == "identity":
        mixed = x.astype(wide)
    else:
        pattern = "...ij,...ic->...jc" if config.mix == "in-out" else "...ji,...ic->...jc"
        mixed = jnp.einsum(pattern, H.astype(wide), x.astype(wide), precision=HIGHEST)
    if rounded:
        own, mixed = own.astype(x.dtype), mixed.astype(x.dtype)
    return (own + mixed).astype(x.dtype)


def pre(
    x: Float[Array, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    carried: Float[Array, "... streams"] | None = None,
    *,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "... dim"], Context, Float[Array, "... streams"] | None]:
    """The first half of the layer: u for the sub-layer, what `post` needs, and what the next site reads with.

    Args:
        carried: for ``pre_from="previous"`` the pre of the site before (`one_hot` for the first), else None.

    Returns:
        u, the context, and this site's own pre for the next site; None for ``pre_from="own"``, which hands none on.

    Raises:
        ValueError: x, a weight or ``carried`` isn't what the configuration needs.
    """
    x = sharding.constrain(x, sharding.activation_axes(x.ndim))
    gates, post_gates, H = coefficients(x, weights, config, precision=precision)
    context = Context(x, post_gates, H, config)
    if config.pre_from == "previous":
        return pre_mix(x, _check_carried(x, carried)), context, gates
    if carried is not None:
        raise ValueError("carried goes with pre_from='previous' alone: this configuration reads with its own pre")
    return pre_mix(x, gates), context, None


def post(y: Float[Array, "... dim"], context: Context) -> Float[Array, "... streams dim"]:
    """The second half of the layer: the sub-layer's output spread over the mixed streams."""
    y = sharding.constrain(y, sharding.activation_axes(y.ndim, streams=False))
    return post_mix(y, context.x, context.post, context.H, context.config)


def head(
    x: Float[Array, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    *,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "... dim"]:
    """The learned reduction: ``sum_i g_i x_i`` with gates g from one projection of the normed streams.

    The gates are float32 (float64 for float64) in every dialect, whatever ``config.coefficients`` says of the layer's.

    Raises:
        ValueError: x or a weight of another shape than the configuration's.
    """
    check_shape("x", x, (config.streams, config.dim))
    _check_weights(weights, head_shapes(config))
    x = sharding.constrain(x, sharding.activation_axes(x.ndim))
    (logits,) = _logits(x, weights, [("head_fn", "head_scale", "head_base")], None, _of_head(config), precision)
    return pre_mix(x, tokens_first(jax.nn.sigmoid(logits) + config.pre_eps, 1))  # gates [n, ...] -> [..., n]


def _of_head(config: MHCConfig) -> MHCConfig:
    """The configuration that the head's norm and projection follow."""
    eps = config.norm_eps if config.head_norm_eps is None else config.head_norm_eps
    return dataclasses.replace(config, coefficients="float32", matrix="float32", norm_eps=eps)
