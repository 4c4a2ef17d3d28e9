"""The layer as plain functions (docs/mathematics.md is the source of every equation). One site computes::

    z = scale * (rms_norm(x) @ phi) + shift         # [..., n + n + n*n], for pre, post and H together
    pre, post, H = sigmoid(z_pre) + pre_eps, post_scale * sigmoid(z_post) + post_eps, residual_matrix(z_res)
    u = sum_i pre[i] * x[i]                         # [..., dim]
    y = branch(u)                                   # [..., dim]
    out[j] = post[j] * y + sum_i H[i, j] * x[i]     # [..., n, dim]

Shapes at line ends: ``n`` streams, ``dim`` width of one, ``m`` columns of the projections; ``...`` is any leading
shape, also none or with zero tokens.

``shards`` says how the arrays lie on many devices (`Shards`); None where each is whole on one.

``precision`` is that of the projections (`jax.lax.Precision`); None means HIGHEST, since the default of a TPU
rounds the operands to bfloat16 and that of a GPU to TF32, which no dialect's ``float32`` allows.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jax_impl import mixing
from jax_impl.config import MHCConfig
from jax_impl.ends import check_carried
from jax_impl.kernels import chosen, hindrance
from jax_impl.kernels.mixing import Mixing, compiled_mixed
from jax_impl.kernels.site import Reading, read_coefficients, read_head, read_layer
from jax_impl.projections import (
    COEFFICIENTS,
    INPUTS,
    Shards,
    Weights,
    check_weights,
    coefficient_dtype,
    gates_and_matrix,
    head_shapes,
    layer_names,
    logits,
    own_gates,
    packed,
    rms_norm,
    weight_shapes,
)
from jax_impl.residual import check_shape, compiled, tokens_first, wide_dtype

__all__ = [
    "COEFFICIENTS",
    "INPUTS",
    "Context",
    "Shards",
    "Weights",
    "coefficients",
    "head",
    "head_shapes",
    "post",
    "post_mix",
    "pre",
    "pre_mix",
    "rms_norm",
    "weight_shapes",
]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "post", "H", "tied"],
    meta_fields=["config", "shards", "backend"],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """The values that `pre` hands to `post`: x ``[..., n, dim]``, post ``[..., n]`` and H ``[..., n, n]``.

    Attributes:
        backend: that of `pre`.
        tied: x once more where `pre` ran the kernels, for `post` alone: what it sends back for this x is the cotangent
            of its output, which `pre` mixes (`jax_impl.kernels`).
    """

    x: Array
    post: Array
    H: Array
    config: MHCConfig
    shards: Shards | None = None
    backend: str = "auto"
    tied: Array | None = None


@compiled()
def pre_mix(x: Float[Array, "... streams dim"], pre: Float[Array, "... streams"]) -> Float[Array, "... dim"]:
    """Computes ``u = sum_i pre_i x_i``, summed in float32 or wider and rounded once to x's dtype.

    Args:
        x: ``[..., streams, dim]``.
        pre: ``[..., streams]``.
    """
    return mixing.weighted_sum(x, jnp.broadcast_to(pre, x.shape[:-1]))  # [..., n, dim], [..., n] -> [..., dim]


def post_mix(
    y: Float[Array, "... dim"],
    x: Float[Array, "... streams dim"],
    post: Float[Array, "... streams"],
    H: Float[Array, "... streams streams"],
    config: MHCConfig,
    *,
    shards: Shards | None = None,
    backend: str = "auto",
) -> Float[Array, "... streams dim"]:
    """Computes ``out_j = post_j y + sum_i H[i, j] x_i`` (``H[j, i]`` for "out-in"), in x's dtype.

    Args:
        y: ``[..., dim]``, the sub-layer's output.
        x: ``[..., streams, dim]``.
        post: ``[..., streams]``.
        H: ``[..., streams, streams]``.
        shards: where x and y lie, for the kernels alone.
        backend: as for `pre`.

    Raises:
        ValueError: x or y of another shape than the configuration's, or a backend that can't be had.
    """
    check_shape("x", x, (config.streams, config.dim))
    check_shape("y", y, (config.dim,))
    if chosen(backend, hindrance(config, shards, x=x, y=y)):
        return _mixed_by_kernels(y, x, post, H, Mixing(config, shards=shards))
    return _post_mixed(y, x, post, H, config)


def _mixed_by_kernels(y: Array, x: Array, post: Array, H: Array, settings: Mixing) -> Array:
    n = settings.config.streams
    post = jnp.broadcast_to(post, x.shape[:-1]).astype(jnp.float32)  # [..., n]
    H = jnp.broadcast_to(H, (*x.shape[:-1], n)).astype(jnp.float32)  # [..., n, n]
    return compiled_mixed(settings, jnp.broadcast_to(y, (*x.shape[:-2], y.shape[-1])), x, post, H)


@compiled("config")
def _post_mixed(y: Array, x: Array, post: Array, H: Array, config: MHCConfig) -> Array:
    wide = wide_dtype(x.dtype)
    rounded = config.mixing == "activation"
    if rounded:
        post, H = post.astype(x.dtype), H.astype(x.dtype)
    own = mixing.spread(y, jnp.broadcast_to(post, x.shape[:-1]))  # [..., dim], [..., n] -> [..., n, dim]
    if config.mix == "identity":
        mixed = x.astype(wide)
    else:
        transposed = config.mix == "out-in"
        matrix = jnp.broadcast_to(H, (*x.shape[:-1], config.streams))  # [..., n, n]
        mixed: Array = mixing.across(matrix, x, transposed)  # [..., n, dim]
    if rounded:
        own, mixed = own.astype(x.dtype), mixed.astype(x.dtype)
    return (own + mixed).astype(x.dtype)


def coefficients(
    x: Float[Array, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    *,
    precision: jax.lax.PrecisionLike = None,
    shards: Shards | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "... streams"], Float[Array, "... streams"], Float[Array, "... streams streams"]]:
    """Computes pre, post and H of every token (docs/mathematics.md, "Forward").

    They and the sums that they come from carry the name `COEFFICIENTS` for `jax.checkpoint`.

    Args:
        x: ``[..., streams, dim]``.
        weights: in the shapes of `weight_shapes`.
        precision: of the projections; None means HIGHEST.
        shards: where x and the weights lie. Their parts add ``m + 1`` numbers a token once, for m columns of all
            projections together; twice (m, then 1) where the coefficients are kept in an x.dtype narrower than float32.
        backend: as for `pre`.

    Returns:
        pre ``[..., streams]``, post ``[..., streams]`` and H ``[..., streams, streams]``, in the dtype of the
        coefficients (docs/mathematics.md, "Precision").

    Raises:
        ValueError: x or a weight of another shape than the configuration's, or a backend that can't be had.
    """
    held = _layer_weights(x, weights, config)
    if chosen(backend, hindrance(config, shards, precision, x=x)):
        x = shards.activation(x) if shards else x
        return read_coefficients(x, held, Reading(config, precision, shards=shards))
    if shards is None:
        return _compiled_coefficients(x, held, config, precision)
    return _coefficients(x, held, config, precision, shards)


def _coefficients(
    x: Array, weights: Weights, config: MHCConfig, precision: jax.lax.PrecisionLike, shards: Shards | None = None
) -> tuple[Array, Array, Array]:
    held = packed(x, weights, layer_names(config), weights.get("mhc_norm.scale"), config)
    return gates_and_matrix(logits(x, held, config, precision, shards), config, coefficient_dtype(x, config))


_compiled_coefficients = compiled("config", "precision")(_coefficients)


def _layer_weights(x: Array, weights: Weights, config: MHCConfig) -> Weights:
    """The layer's weights and no others, once they and x are known to have the configuration's shapes."""
    check_shape("x", x, (config.streams, config.dim))
    check_weights(weights, weight_shapes(config))
    return {name: weights[name] for name in weight_shapes(config)}


def pre(
    x: Float[Array, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    carried: Float[Array, "... streams"] | None = None,
    *,
    precision: jax.lax.PrecisionLike = None,
    shards: Shards | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "... dim"], Context, Float[Array, "... streams"] | None]:
    """Computes the first half of the layer: the sub-layer's input, and the coefficients for `post`
    (docs/mathematics.md, "Forward").

    Args:
        x: ``[..., streams, dim]``.
        weights: in the shapes of `weight_shapes`.
        carried: ``[..., streams]``, for ``pre_from="previous"`` the pre of the site before (`one_hot` for the first),
            else None.
        precision: of the projections; None means HIGHEST.
        shards: where x and the weights lie.
        backend: ``"auto"``, ``"plain"`` or ``"pallas"``. ``"pallas"`` runs kernels for TPUs (`jax_impl.kernels`), on
            other platforms interpreted and slow, and raises where they can't serve; ``"plain"`` runs operators that XLA
            compiles, and so does ``"auto"`` as yet, since the kernels were never timed on a TPU.

    Returns:
        u ``[..., dim]``, the context for `post`, and this site's own pre ``[..., streams]`` for the next site; None for
        ``pre_from="own"``, which hands none on.

    Raises:
        ValueError: x, a weight or ``carried`` isn't what the configuration needs, or a backend that can't be had.
    """
    x = shards.activation(x) if shards else x
    held, previous = _layer_weights(x, weights, config), config.pre_from == "previous"
    if previous:
        carried = check_carried(x, carried, shards)
    elif carried is not None:
        raise ValueError("carried goes with pre_from='previous' alone: this configuration reads with its own pre")
    if chosen(backend, hindrance(config, shards, precision, x=x)):
        reading = Reading(config, precision, shards=shards)
        u, own, post_gates, H, tied = read_layer(x, held, reading, carried)
        context = Context(x, post_gates, H, config, shards, backend, tied)
        return checkpoint_name(u, INPUTS), context, own if previous else None
    own, post_gates, H = coefficients(x, held, config, precision=precision, shards=shards)
    u = pre_mix(x, own if carried is None else carried)
    context = Context(x, post_gates, H, config, shards, backend)
    return checkpoint_name(u, INPUTS), context, own if previous else None


def post(y: Float[Array, "... dim"], context: Context) -> Float[Array, "... streams dim"]:
    """Computes the second half of the layer: the sub-layer's output spread over the mixed streams.

    Args:
        y: ``[..., dim]``, the sub-layer's output.
        context: the one that `pre` returned.

    Raises:
        ValueError: y of another width than the configuration's, or of a dtype that the backend doesn't take.
    """
    y = context.shards.activation(y, streams=False) if context.shards else y
    config, shards, backend = context.config, context.shards, context.backend
    if context.tied is None:
        return post_mix(y, context.x, context.post, context.H, config, shards=shards, backend=backend)
    check_shape("y", y, (config.dim,))
    chosen(backend, hindrance(config, shards, y=y))
    return _mixed_by_kernels(y, context.tied, context.post, context.H, Mixing(config, True, shards))


def head(
    x: Float[Array, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    *,
    precision: jax.lax.PrecisionLike = None,
    shards: Shards | None = None,
    backend: str = "auto",
) -> Float[Array, "... dim"]:
    """Reduces the streams by learned gates: ``sum_i g_i x_i``, g from one projection of the normed streams
    (docs/mathematics.md, "Forward").

    The gates are float32 (float64 for float64) in every dialect, whatever ``config.coefficients`` says of the layer's.

    Args:
        x: ``[..., streams, dim]``.
        weights: in the shapes of `head_shapes`.
        precision: of the projection; None means HIGHEST.
        shards: where x and the weights lie.
        backend: as for `pre`.

    Raises:
        ValueError: x or a weight of another shape than the configuration's, or a backend that can't be had.
    """
    check_shape("x", x, (config.streams, config.dim))
    check_weights(weights, head_shapes(config))
    held = {name: weights[name] for name in head_shapes(config)}
    if chosen(backend, hindrance(config, shards, precision, x=x)):
        x = shards.activation(x) if shards else x
        return read_head(x, held, HEAD_NAMES, Reading(_of_head(config), precision, shards=shards))
    if shards is None:
        return _compiled_headed(x, held, config, precision)
    return _headed(shards.activation(x), held, config, precision, shards)


HEAD_NAMES = [("head_fn", "head_scale", "head_base")]


def _headed(
    x: Array, weights: Weights, config: MHCConfig, precision: jax.lax.PrecisionLike, shards: Shards | None = None
) -> Array:
    own = _of_head(config)
    z = logits(x, packed(x, weights, HEAD_NAMES, None, own), own, precision, shards)  # [n, ...]
    return pre_mix(x, tokens_first(own_gates(z, config), 1))  # gates [..., n]


_compiled_headed = compiled("config", "precision")(_headed)


def _of_head(config: MHCConfig) -> MHCConfig:
    """The configuration that the head's norm and projection follow."""
    eps = config.norm_eps if config.head_norm_eps is None else config.head_norm_eps
    return dataclasses.replace(config, coefficients="float32", matrix="float32", norm_eps=eps)
