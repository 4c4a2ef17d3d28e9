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
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jax_impl import mixing, sharding
from jax_impl.config import MHCConfig

Weights = Mapping[str, Array]
HIGHEST = jax.lax.Precision.HIGHEST


@partial(jax.tree_util.register_dataclass, data_fields=["x", "post", "H"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class Context:
    """What `post` needs of the `pre` before it: the streams, their coefficients and the configuration."""

    x: Array
    post: Array
    H: Array
    config: MHCConfig


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that coefficients are computed in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def _coefficient_dtype(x: Array, config: MHCConfig) -> jnp.dtype:
    return x.dtype if config.coefficients == "activation" else _wide(x.dtype)


def _check(name: str, value: Array, tail: tuple[int, ...]) -> None:
    if value.ndim < len(tail) or value.shape[value.ndim - len(tail) :] != tail:
        raise ValueError(f"{name} must end in {list(tail)}, got {list(value.shape)}")


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


def reduce(x: Float[Array, "... streams dim"], how: str) -> Float[Array, "... dim"]:
    """Sum or mean over the streams, accumulated in float32 or wider and rounded once.

    Raises:
        ValueError: ``how`` is neither ``"sum"`` nor ``"mean"``.
    """
    if how not in ("sum", "mean"):
        raise ValueError(f"how must be sum or mean, got {how!r}")
    total = x.astype(_wide(x.dtype)).sum(-2)
    return (total if how == "sum" else total / x.shape[-2]).astype(x.dtype)


def rms_norm(
    x: Float[Array, "... streams dim"], scale: Float[Array, "streams dim"] | None, config: MHCConfig
) -> Float[Array, "... streams dim"]:
    """x over its root mean square across streams and dim together, times ``scale``.

    Returns:
        float32 (float64 for float64), rounded to x's dtype where the coefficients are kept in it.
    """
    mean = jnp.mean(jnp.square(x.astype(_wide(x.dtype))), axis=(-2, -1), keepdims=True)
    return _normed(x, mean, scale, config)


def _normed(x: Array, mean: Array, scale: Array | None, config: MHCConfig) -> Array:
    """x over the root of its mean square, times ``scale``, in the dtype of the coefficients."""
    dtype, wide = _coefficient_dtype(x, config), _wide(x.dtype)
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


def _normalise(p: Array, axis: int, guard: str, eps: float) -> Array:
    total = p.sum(axis, keepdims=True)
    if guard == "add":
        total = total + eps
    elif guard == "clip":
        total = jnp.maximum(total, eps)
    return p / total


@partial(jax.jit, static_argnums=1)
def _sinkhorn(logits: Array, settings: tuple[str, str, float, int]) -> Array:
    """On ``[n, n, ...]``, since a TPU pads the last axis to 128: with n there an array takes 32 times its size.

    Compiled on its own, so that an eager caller doesn't trace the loop at every call.
    """
    order, guard, eps, iterations = settings
    first, second = (1, 0) if order == "rows-first" else (0, 1)
    p = jax.nn.softmax(logits.astype(_wide(logits.dtype)), axis=first)
    if guard == "add":
        p = p + eps
    p = _normalise(p, second, guard, eps)

    def both(p: Array, _: None) -> tuple[Array, None]:
        return _normalise(_normalise(p, first, guard, eps), second, guard, eps), None

    return jax.lax.scan(both, p, None, length=iterations - 1)[0].astype(logits.dtype)


def sinkhorn(logits: Float[Array, "... n n"], config: MHCConfig) -> Float[Array, "... n n"]:
    """``config.iterations`` Sinkhorn iterations as written, in float32 or wider.

    Returns:
        H in the dtype of the logits. The axis normalised last sums to 1 to rounding, the other need not.
    """
    settings = (config.order, config.guard, config.eps, config.iterations)
    return _tokens_first(_sinkhorn(_tokens_last(logits, 2), settings), 2)


def permutations(logits: Float[Array, "... factorial"], config: MHCConfig) -> Float[Array, "... n n"]:
    """A softmax over the n! permutation matrices in `itertools.permutations` order, ``P[i, p(i)] = 1``."""
    orders = np.array(list(itertools.permutations(range(config.streams))))
    matrices = np.eye(config.streams)[orders]
    weight = jax.nn.softmax(logits.astype(_wide(logits.dtype)), axis=-1)
    return jnp.einsum("...p,pij->...ij", weight, jnp.asarray(matrices, weight.dtype), precision=HIGHEST).astype(
        logits.dtype
    )


def residual_matrix(logits: Float[Array, ...], config: MHCConfig) -> Float[Array, "... n n"]:
    """H from its logits, ``[..., n, n]`` for Sinkhorn and ``[..., n!]`` for permutations.

    Raises:
        ValueError: the logits' shape, or a dialect whose H is the identity and has none.
    """
    n = config.streams
    if config.residual == "identity":
        raise ValueError("residual='identity' has no logits: H is the identity")
    if config.residual == "permutations":
        _check("logits", logits, (config.residual_columns,))
        return permutations(logits, config)
    _check("logits", logits, (n, n))
    return sinkhorn(logits, config)


def _tokens_last(value: Array, axes: int) -> Array:
    """The last ``axes`` axes in front."""
    return jnp.moveaxis(value, range(-axes, 0), range(axes))


def _tokens_first(value: Array, axes: int) -> Array:
    """The first ``axes`` axes at the end."""
    return jnp.moveaxis(value, range(axes), range(-axes, 0))


def _kept(value: Array) -> Array:
    return checkpoint_name(value, sharding.COEFFICIENTS)


def _contract(phi: Array, x: Array, precision: jax.lax.PrecisionLike) -> Array:
    """``[m, ...]``: (streams, dim) contracted at once, accumulated in float32 or wider.

    Never by way of ``[..., n*C]``: a flattened axis can't be sharded as dim is, and x would be gathered.
    """
    wide = _wide(x.dtype)
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
    dtype, wide = _coefficient_dtype(x, config), _wide(x.dtype)

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
    dtype, wide = _coefficient_dtype(x, config), _wide(x.dtype)
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
    _check("x", x, (n, config.dim))
    _check_weights(weights, weight_shapes(config))
    dtype = _coefficient_dtype(x, config)
    kinds = ("pre", "post", "res") if config.residual_columns else ("pre", "post")
    names = [(f"{kind}_alpha", f"{kind}_alpha_scale", f"{kind}_beta") for kind in kinds]
    logits = _logits(x, weights, names, weights.get("mhc_norm.scale"), config, precision)
    pre = (jax.nn.sigmoid(logits[0]) + config.pre_eps).astype(dtype)
    post = (config.post_scale * jax.nn.sigmoid(logits[1]) + config.post_eps).astype(dtype)
    pre, post = _tokens_first(_kept(pre), 1), _tokens_first(_kept(post), 1)
    if config.residual == "identity":
        return pre, post, jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*x.shape[:-2], n, n))
    z = logits[2]
    z = _tokens_first(z.reshape(n, n, *z.shape[1:]), 2) if config.residual == "sinkhorn" else _tokens_first(z, 1)
    H = _tokens_last(residual_matrix(z, config).astype(dtype), 2)
    return pre, post, _tokens_first(_kept(H), 2)


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
    _check("x", x, (config.streams, config.dim))
    _check("y", y, (config.dim,))
    wide = _wide(x.dtype)
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
    *,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "... dim"], Context]:
    """The first half of the layer: u for the sub-layer, and what `post` needs afterwards."""
    x = sharding.constrain(x, sharding.activation_axes(x.ndim))
    gates, post_gates, H = coefficients(x, weights, config, precision=precision)
    return pre_mix(x, gates), Context(x, post_gates, H, config)


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

    Raises:
        ValueError: x or a weight of another shape than the configuration's.
    """
    _check("x", x, (config.streams, config.dim))
    _check_weights(weights, head_shapes(config))
    x = sharding.constrain(x, sharding.activation_axes(x.ndim))
    (logits,) = _logits(x, weights, [("head_fn", "head_scale", "head_base")], None, config, precision)
    gates = jax.nn.sigmoid(logits) + config.pre_eps
    return pre_mix(x, _tokens_first(gates.astype(_coefficient_dtype(x, config)), 1))
