"""The layer as plain functions (docs/mathematics.md is the source of every equation). One site computes::

    z = scale * (rms_norm(x) @ phi) + shift         # [..., n + n + n*n], for pre, post and H together
    pre, post, H = sigmoid(z_pre) + pre_eps, post_scale * sigmoid(z_post) + post_eps, residual_matrix(z_res)
    u = sum_i pre[i] * x[i]                         # [..., dim]
    y = branch(u)                                   # [..., dim]
    out[j] = post[j] * y + sum_i H[i, j] * x[i]     # [..., n, dim]

Shapes at line ends: ``n`` streams, ``dim`` width of one, ``m`` columns of the projections; ``...`` is any leading
shape, also none or with zero tokens.

``shards`` is the collective over the shards of dim (`Shards`), of which every tensor then has its own part; None
where each is whole.

TF32: on CUDA, ``torch.backends.cuda.matmul.allow_tf32`` (or ``fp32_precision = "tf32"``) rounds the operands of
the projections to 10 bits, about 5e-4 of a coefficient's logit. The coefficients then keep the ``tf32`` contract,
not ``float32``. PyTorch's default is off; nothing here changes the setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl import kernels
from torch_impl.config import MHCConfig
from torch_impl.ends import check_carried
from torch_impl.fused import chosen
from torch_impl.fused.balancing import Balancing, TracedBalancing
from torch_impl.fused.mixing import Mixing, TracedMixing
from torch_impl.fused.site import Reading, of_head, read_site
from torch_impl.fused.transforms import called
from torch_impl.projections import (
    SHARDED,
    Shards,
    Weights,
    check_weights,
    coefficient_dtype,
    gates_and_matrix,
    head_shapes,
    layer_names,
    local_dim,
    logits,
    packed,
    rms_norm,
    weight_shapes,
)
from torch_impl.residual import check_shape, wide_dtype, without_autocast
from torch_impl.residual import residual_matrix as plain_matrix
from torch_impl.streams import expanded, mixed, rounded_gates, weighted

__all__ = [
    "SHARDED",
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
    "residual_matrix",
    "rms_norm",
    "weight_shapes",
]


class Context(NamedTuple):
    """The values that `pre` hands to `post`: x ``[..., n, dim]``, post ``[..., n]`` and H ``[..., n, n]``."""

    x: Tensor
    post: Tensor
    H: Tensor
    config: MHCConfig
    shards: Shards | None = None
    backend: str = "auto"


def pre_mix(x: Float[Tensor, "... streams dim"], pre: Float[Tensor, "... streams"]) -> Float[Tensor, "... dim"]:
    """Computes ``u = sum_i pre_i x_i``, summed in float32 or wider and rounded once to x's dtype.

    Args:
        x: ``[..., streams, dim]``.
        pre: ``[..., streams]``.
    """
    return weighted(x, pre)


def post_mix(
    y: Float[Tensor, "... dim"],
    x: Float[Tensor, "... streams dim"],
    post: Float[Tensor, "... streams"],
    H: Float[Tensor, "... streams streams"],
    config: MHCConfig,
    *,
    shards: Shards | None = None,
    backend: str = "auto",
) -> Float[Tensor, "... streams dim"]:
    """Computes ``out_j = post_j y + sum_i H[i, j] x_i`` (``H[j, i]`` for "out-in"), in x's dtype.

    Args:
        y: ``[..., dim]``, the sub-layer's output.
        x: ``[..., streams, dim]``.
        post: ``[..., streams]``.
        H: ``[..., streams, streams]``.
        shards: the shards of dim; post and H are taken as `pre` shares them, rounded already.
        backend: as for `pre`.

    Raises:
        ValueError: x or y of another shape than the configuration's, or a backend that can't be had.
    """
    dim = local_dim(config, shards)
    check_shape("x", x, (config.streams, dim))
    check_shape("y", y, (dim,))
    rounded = config.mixing == "activation"
    if shards is None:
        post, H = rounded_gates(x, post, H, config)
    matrix = None if config.mix == "identity" else H
    others = (y, post) if matrix is None else (y, post, matrix)
    name = chosen(backend, x, others, "shards of dim" if shards else "", lambda: kernels.hindrance(x, config, shards))
    if not name:
        return mixed(y, x, post, matrix, str(config.mix), rounded)
    y, post, matrix = expanded(y, x, post, matrix)
    with without_autocast(x.device):
        return called(Mixing, TracedMixing, y, x, post, matrix, config.mix, rounded, name)


def engine_of(backend: str, x: Tensor, others: Iterable[Tensor], config: MHCConfig, shards: Shards | None) -> str:
    """The engine that a site or a head takes (`fused.chosen`)."""

    def triton() -> str:
        if config.matrix == "activation" and coefficient_dtype(x, config) != wide_dtype(x.dtype):
            return "passes of Sinkhorn that are rounded to x's dtype"
        return kernels.hindrance(x, config, shards)

    return chosen(backend, x, others, "shards of dim" if shards else "", triton)


def coefficients(
    x: Float[Tensor, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    *,
    shards: Shards | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "... streams"], Float[Tensor, "... streams"], Float[Tensor, "... streams streams"]]:
    """Computes pre, post and H of every token (docs/mathematics.md, "Forward").

    Args:
        x: ``[..., streams, dim]``.
        weights: in the shapes of `weight_shapes`.
        shards: the shards of dim. They add ``m + 1`` numbers a token once, for m columns of all projections
            together; twice (1, then m) where the coefficients are kept in an x.dtype narrower than float32, since the
            normed x is rounded there before it is projected. The results are whole on every shard, and so must their
            cotangents be: a result that is used on a part of dim goes through `Shards.share` first.
        backend: as for `pre`.

    Returns:
        pre ``[..., streams]``, post ``[..., streams]`` and H ``[..., streams, streams]``, in the dtype of the
        coefficients (docs/mathematics.md, "Precision").

    Raises:
        ValueError: x or a weight of another shape than the configuration's, or a backend that can't be had.
    """
    dim, norm = local_dim(config, shards), "mhc_norm.scale"
    check_shape("x", x, (config.streams, dim))
    held = check_weights(weights, weight_shapes(config), dim)
    name = engine_of(backend, x, held.values(), config, shards)
    if name:
        _, pre, post, H, _ = read_site(x, held, layer_names(config), held.get(norm), Reading(config, name, u=False))
        return pre, post, H
    with without_autocast(x.device):
        side = packed(x, held, layer_names(config), held.get(norm), config)
        return gates_and_matrix(logits(x, side, config, shards), config, coefficient_dtype(x, config))


def residual_matrix(
    logits: Float[Tensor, ...], config: MHCConfig, *, backend: str = "auto"
) -> Float[Tensor, "... n n"]:
    """Computes H from its logits (docs/mathematics.md, "The residual matrix").

    Args:
        logits: ``[..., n, n]`` for Sinkhorn, ``[..., n!]`` for permutations.
        backend: as for `pre`.

    Returns:
        H ``[..., n, n]`` in the dtype of the logits.

    Raises:
        ValueError: the logits have another shape, the dialect's H is the identity and has no logits, or a backend can't
            be had.
    """
    narrow = config.matrix == "activation" and logits.dtype != wide_dtype(logits.dtype)
    reason = "passes in a narrow dtype" if narrow else "" if config.residual == "sinkhorn" else "this residual matrix"
    name = chosen(backend, logits, (), reason, lambda: reason or kernels.hindrance(logits, config))
    with without_autocast(logits.device):
        if not name:
            return plain_matrix(logits, config)
        check_shape("logits", logits, (config.streams, config.streams))
        return called(Balancing, TracedBalancing, logits, config, name)


def check_site(
    x: Tensor, weights: Weights, config: MHCConfig, carried: Tensor | None, shards: Shards | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Checks what `pre` is given.

    Returns:
        The weights of the configuration, and the gates that u is read with where they are carried, else None.

    Raises:
        ValueError: as `pre`.
    """
    dim = local_dim(config, shards)
    check_shape("x", x, (config.streams, dim))
    if carried is not None and config.pre_from != "previous":
        raise ValueError("carried goes with pre_from='previous' alone: this configuration reads with its own pre")
    held = check_weights(weights, weight_shapes(config), dim)
    return held, check_carried(x, carried) if config.pre_from == "previous" else None


def pre(
    x: Float[Tensor, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    carried: Float[Tensor, "... streams"] | None = None,
    *,
    shards: Shards | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "... dim"], Context, Float[Tensor, "... streams"] | None]:
    """Computes the first half of the layer: the sub-layer's input, and the coefficients for `post`
    (docs/mathematics.md, "Forward").

    Args:
        x: ``[..., streams, dim]``.
        weights: in the shapes of `weight_shapes`.
        carried: ``[..., streams]``, for ``pre_from="previous"`` the pre of the site before (`one_hot` for the first),
            else None.
        shards: the shards of dim; they add as in `coefficients`, and the cotangents of the gates and H once.
        backend: ``"auto"``, ``"plain"``, ``"lean"`` or ``"triton"``. The lean path (`torch_impl.lean`) reads x a block
            at a time and computes what is small again on the way back; ``"triton"`` does so by kernels
            (`torch_impl.kernels`). ``"auto"`` takes the lean path in eager calls where it can, ``"plain"``
            runs operators that PyTorch differentiates itself; the other two raise where they can't be taken.

    Returns:
        u ``[..., dim]``, the context for `post`, and this site's own pre ``[..., streams]`` for the next site; None for
        ``pre_from="own"``, which hands none on.

    Raises:
        ValueError: x, a weight or ``carried`` isn't what the configuration needs, or a backend that can't be had.
    """
    previous = config.pre_from == "previous"
    held, read = check_site(x, weights, config, carried, shards)
    given = held.values() if read is None else (*held.values(), read)
    name = engine_of(backend, x, given, config, shards)
    if name:
        norm = held.get("mhc_norm.scale")
        u, own, post_gates, H, x = read_site(x, held, layer_names(config), norm, Reading(config, name), read)
        return u, Context(x, post_gates, H, config, None, backend), own if previous else None
    own, post_gates, H = coefficients(x, weights, config, shards=shards, backend="plain")
    gates = own if read is None else read
    if shards:
        n, wide = config.streams, wide_dtype(x.dtype)
        if config.mixing == "activation":
            post_gates, H = post_gates.to(x.dtype), H.to(x.dtype)
        mixing = [gates, post_gates] if config.residual == "identity" else [gates, post_gates, H.flatten(-2)]
        # Wide from here on: of a narrow dtype each part's cotangent would be rounded before they are added up.
        shared = shards.share(torch.cat([part.to(wide) for part in mixing], -1))  # [..., n + n + n*n]
        gates, post_gates, *rest = shared.split([part.shape[-1] for part in mixing], -1)
        H = rest[0].unflatten(-1, (n, n)) if rest else H  # [..., n, n]
    return pre_mix(x, gates), Context(x, post_gates, H, config, shards, backend), own if previous else None


def post(y: Float[Tensor, "... dim"], context: Context) -> Float[Tensor, "... streams dim"]:
    """Computes the second half of the layer: the sub-layer's output spread over the mixed streams.

    Args:
        y: ``[..., dim]``, the sub-layer's output.
        context: the one that `pre` returned.

    Raises:
        ValueError: y of another width than the configuration's.
    """
    mixing = (context.x, context.post, context.H, context.config)
    return post_mix(y, *mixing, shards=context.shards, backend=context.backend)


def head(
    x: Float[Tensor, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    *,
    shards: Shards | None = None,
    backend: str = "auto",
) -> Float[Tensor, "... dim"]:
    """Reduces the streams by learned gates: ``sum_i g_i x_i``, g from one projection of the normed streams
    (docs/mathematics.md, "Forward").

    The gates are float32 (float64 for float64) in every dialect, whatever ``config.coefficients`` says of the layer's.

    Args:
        x: ``[..., streams, dim]``.
        weights: in the shapes of `head_shapes`.
        shards: the shards of dim; they add as in `coefficients`, and the cotangents of g once.
        backend: as for `pre`.

    Raises:
        ValueError: x or a weight of another shape than the configuration's, or a backend that can't be had.
    """
    dim = local_dim(config, shards)
    check_shape("x", x, (config.streams, dim))
    held = check_weights(weights, head_shapes(config), dim)
    names, own = [("head_fn", "head_scale", "head_base")], of_head(config)
    name = engine_of(backend, x, held.values(), own, shards)
    if name:
        return read_site(x, held, names, None, Reading(config, name, head=True))[0]
    with without_autocast(x.device):
        gates = torch.sigmoid(logits(x, packed(x, held, names, None, own), own, shards)) + config.pre_eps  # [..., n]
    return pre_mix(x, shards.share(gates) if shards else gates)
