"""The layer as plain functions (mathematics.md is the source of every equation).

Shapes: ``n`` streams, ``dim`` width of one; ``...`` is any leading shape, also none or with zero tokens. Where ``dim``
is sharded, every tensor has this shard's part of it and ``shards`` is the collective over the others (`Shards`).

TF32: on CUDA, ``torch.backends.cuda.matmul.allow_tf32`` (or ``fp32_precision = "tf32"``) rounds the operands of
the projections to 10 bits, about 5e-4 of a coefficient's logit. The coefficients then keep the ``tf32`` contract,
not ``float32``. PyTorch's default is off; nothing here changes the setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.residual import check_shape, residual_matrix, wide_dtype

Weights = Mapping[str, Tensor]
SHARDED = ("mhc_norm.scale", "pre_alpha", "post_alpha", "res_alpha", "head_fn")  # [streams, dim, ...]: split with dim


class Shards(Protocol):
    """The shards of dim, one a process: x, u, y, φ and the norm weight are split, all the rest is whole on each.

    Inside the layer a whole value has a whole cotangent on every shard, and both functions keep that so: a sum over
    dim is made whole by `add`, and a whole value is used on a part of dim through `share` alone.
    """

    @property
    def count(self) -> int:
        """Number of shards; each has ``config.dim // count``."""
        ...

    def add(self, partial: Tensor) -> Tensor:
        """The sum over the shards; each shard's cotangent is the sum's own, unchanged."""
        ...

    def share(self, value: Tensor) -> Tensor:
        """The value as it is; its cotangent is the sum of the shards' cotangents."""
        ...


class Context(NamedTuple):
    """What `post` needs of the `pre` before it: the streams, their coefficients and the configuration."""

    x: Tensor
    post: Tensor
    H: Tensor
    config: MHCConfig
    shards: Shards | None = None


def _coefficient_dtype(x: Tensor, config: MHCConfig) -> torch.dtype:
    return x.dtype if config.coefficients == "activation" else wide_dtype(x.dtype)


def _local_dim(config: MHCConfig, shards: Shards | None) -> int:
    return config.dim // shards.count if shards else config.dim


def _check_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]], dim: int) -> None:
    for name, whole in shapes.items():
        shape = (whole[0], dim, *whole[2:]) if name in SHARDED else whole
        if name not in weights:
            raise ValueError(f"weights must have {name} {list(shape)}, got {sorted(weights)}")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(weights[name].shape)}")


def weight_shapes(config: MHCConfig) -> dict[str, tuple[int, ...]]:
    """Name and in-memory shape of each weight of the layer."""
    n, dim = config.streams, config.dim
    shapes: dict[str, tuple[int, ...]] = {"mhc_norm.scale": (n, dim)} if config.norm_weight else {}
    beta = {"pre": (n,), "post": (n,), "res": (n, n) if config.residual == "sinkhorn" else (config.residual_columns,)}
    columns = {"pre": n, "post": n, "res": config.residual_columns}
    for kind in ("pre", "post", "res"):
        if columns[kind]:
            shapes[f"{kind}_alpha"] = (n, dim, columns[kind])
            shapes[f"{kind}_alpha_scale"] = (1,)
            shapes[f"{kind}_beta"] = beta[kind]
    return shapes


def head_shapes(config: MHCConfig) -> dict[str, tuple[int, ...]]:
    """Name and in-memory shape of each weight of the head."""
    n = config.streams
    return {"head_fn": (n, config.dim, n), "head_base": (n,), "head_scale": (1,)}


def expand(x: Float[Tensor, "... dim"], streams: int) -> Float[Tensor, "... streams dim"]:
    """One stream repeated ``streams`` times.

    Raises:
        ValueError: ``streams`` below 1.
    """
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    return x.unsqueeze(-2).expand(*x.shape[:-1], streams, x.shape[-1])


def one_hot(x: Float[Tensor, "... streams dim"]) -> Float[Tensor, "... streams"]:
    """What the first site of a single-pass stack reads with: 1 for stream 0, in float32 (float64 for float64)."""
    first = torch.arange(x.shape[-2], device=x.device) == 0
    return first.to(wide_dtype(x.dtype)).expand(x.shape[:-1])  # [..., n]


def reduce(
    x: Float[Tensor, "... streams dim"],
    how: str,
    carried: Float[Tensor, "... streams"] | None = None,
    *,
    reduction: str = "float32",
    shards: Shards | None = None,
) -> Float[Tensor, "... dim"]:
    """Sum or mean over the streams, or the sum that the last site's pre weights (mathematics.md, "Single pass").

    Args:
        how: ``"sum"``, ``"mean"`` or ``"carried"``.
        carried: the last site's pre, for ``"carried"`` alone; float32 (float64 for float64).
        reduction: ``"float32"`` accumulates in float32 or wider and rounds once, ``"activation"`` adds stream by stream
            in x's dtype.
        shards: the shards of dim, for ``"carried"``, whose cotangent they add up.

    Raises:
        ValueError: another ``how``, or a ``carried`` that is missing, surplus, of another shape or narrower dtype.
    """
    if how not in ("sum", "mean", "carried"):
        raise ValueError(f"how must be sum, mean or carried, got {how!r}")
    if how == "carried":
        gates = _check_carried(x, carried)
        return pre_mix(x, shards.share(gates) if shards else gates)
    if carried is not None:
        raise ValueError(f"carried goes with how='carried' alone, got it with {how!r}")
    if reduction == "activation":
        total = x[..., 0, :]
        for index in range(1, x.shape[-2]):
            total = total + x[..., index, :]
    else:
        total = x.sum(-2, dtype=wide_dtype(x.dtype))
    return (total if how == "sum" else total / x.shape[-2]).to(x.dtype)


def _check_carried(x: Tensor, carried: Tensor | None) -> Tensor:
    """The pre that the site before handed on, once it is known to be one for this x."""
    if carried is None:
        raise ValueError("carried must be the pre of the site before: one_hot(x) for the first site, got None")
    if carried.shape != x.shape[:-1]:
        raise ValueError(f"carried must be {list(x.shape[:-1])}, got {list(carried.shape)}")
    kept = wide_dtype(x.dtype)
    if carried.dtype != kept:
        raise ValueError(
            f"carried must be {kept} for x in {x.dtype}, got {carried.dtype}: hand it on as it was returned; "
            "FSDP casts it unless its MixedPrecisionPolicy has cast_forward_inputs=False and output_dtype=None, and "
            "autocast must not be applied to it"
        )
    return carried


def rms_norm(
    x: Float[Tensor, "... streams dim"], scale: Float[Tensor, "streams dim"] | None, config: MHCConfig
) -> Float[Tensor, "... streams dim"]:
    """x over its root mean square across streams and dim together, times ``scale``.

    Returns:
        float32 (float64 for float64), rounded to x's dtype where the coefficients are kept in it.
    """
    mean = x.to(wide_dtype(x.dtype)).square().mean((-2, -1), keepdim=True)
    return _normed(x, mean, scale, config)


def _normed(x: Tensor, mean: Tensor, scale: Tensor | None, config: MHCConfig) -> Tensor:
    """x over the root of its mean square, times ``scale``, in the dtype of the coefficients."""
    dtype, wide = _coefficient_dtype(x, config), wide_dtype(x.dtype)
    normed = _over_rms(x.to(wide), mean, config)
    if scale is not None:
        normed = normed * scale.to(dtype).to(wide)
    return normed.to(dtype)


def _over_rms(value: Tensor, mean: Tensor, config: MHCConfig) -> Tensor:
    """``value`` over the root of the mean square, with eps where the configuration has it."""
    if config.norm_eps_position == "mean":
        return value / (mean + config.norm_eps).sqrt()
    empty = mean == 0  # the root's slope is infinite there; the norm's is 1 / eps
    root = torch.where(empty, 0.0, torch.where(empty, 1.0, mean).sqrt())
    return value / (root + config.norm_eps)


def _contract(phi: Tensor, x: Tensor) -> Tensor:
    """``[..., m]``: (streams, dim) contracted at once, accumulated in float32 or wider."""
    wide = wide_dtype(x.dtype)
    return torch.einsum("...nc,ncm->...m", x.to(wide), phi.to(wide))


def _logits(
    x: Tensor,
    weights: Weights,
    names: Sequence[tuple[str, str, str]],
    norm: Tensor | None,
    config: MHCConfig,
    shards: Shards | None,
) -> tuple[Tensor, ...]:
    """``scale * (normed x @ phi) + shift`` of every ``(phi, scale, shift)``, ``[..., m]``, wide."""
    dtype, wide = _coefficient_dtype(x, config), wide_dtype(x.dtype)

    def rounded(value: Tensor) -> Tensor:
        """Held wide from here on, so that gradients are added up before they are rounded."""
        return value.to(dtype).to(wide)

    phis, scales, shifts = ([rounded(weights[name]) for name in part] for part in zip(*names, strict=True))
    widths = [phi.shape[-1] for phi in phis]
    scale = torch.cat([value.expand(width) for value, width in zip(scales, widths, strict=True)])
    phi, shift = torch.cat(phis, -1), torch.cat([value.reshape(-1) for value in shifts])
    h = _projected(x, phi, None if norm is None else rounded(norm), config, shards)
    return (scale * h + shift).split(widths, -1)


def _projected(x: Tensor, phi: Tensor, norm: Tensor | None, config: MHCConfig, shards: Shards | None) -> Tensor:
    """The normed streams times phi, ``[..., m]``, from this shard's part of dim.

    The norm's division comes after the product, so that partial sums of both are added up at once, m + 1 numbers a
    token. Where the norm's output is rounded to a narrow dtype (``coefficients="activation"``) the division has to
    come first, and the norm's sum and the projections are added up one after the other.
    """
    dtype, wide = _coefficient_dtype(x, config), wide_dtype(x.dtype)
    squares = x.to(wide).square().sum((-2, -1))
    count = config.streams * config.dim
    if dtype == wide:
        phi = phi if norm is None else phi * norm.unsqueeze(-1)
        sums = torch.cat([_contract(phi, x), squares.unsqueeze(-1)], -1)
        sums = shards.add(sums) if shards else sums
        return _over_rms(sums[..., :-1], sums[..., -1:] / count, config)
    mean = (shards.add(squares) if shards else squares)[..., None, None] / count
    h = _contract(phi, _normed(x, shards.share(mean) if shards else mean, norm, config))
    return (shards.add(h) if shards else h).to(dtype).to(wide)


def coefficients(
    x: Float[Tensor, "... streams dim"], weights: Weights, config: MHCConfig, *, shards: Shards | None = None
) -> tuple[Float[Tensor, "... n"], Float[Tensor, "... n"], Float[Tensor, "... n n"]]:
    """pre, post and H of every token, in the dtype of the coefficients (mathematics.md, "Precision").

    Args:
        shards: the shards of dim. They add ``m + 1`` numbers a token once, for m columns of all projections
            together; twice (1, then m) where the coefficients are kept in an x.dtype narrower than float32, since the
            normed x is rounded there before it is projected. The results are whole on every shard, and so must their
            cotangents be: what is used on a part of dim goes through `Shards.share` first.

    Raises:
        ValueError: x or a weight of another shape than the configuration's.
    """
    n, dim = config.streams, _local_dim(config, shards)
    check_shape("x", x, (n, dim))
    _check_weights(weights, weight_shapes(config), dim)
    dtype = _coefficient_dtype(x, config)
    with torch.autocast(x.device.type, enabled=False):
        kinds = ("pre", "post", "res") if config.residual_columns else ("pre", "post")
        names = [(f"{kind}_alpha", f"{kind}_alpha_scale", f"{kind}_beta") for kind in kinds]
        logits = _logits(x, weights, names, weights.get("mhc_norm.scale"), config, shards)
        pre = (torch.sigmoid(logits[0]) + config.pre_eps).to(dtype)
        post = (config.post_scale * torch.sigmoid(logits[1]) + config.post_eps).to(dtype)
        if config.residual == "identity":
            H = torch.eye(n, dtype=dtype, device=x.device).expand(*x.shape[:-2], n, n)
        else:
            z = logits[2].to(dtype) if config.matrix == "activation" else logits[2]  # [..., n*n or n!]
            z = z.unflatten(-1, (n, n)) if config.residual == "sinkhorn" else z
            H = residual_matrix(z, config).to(dtype)
    return pre, post, H


def pre_mix(x: Float[Tensor, "... streams dim"], pre: Float[Tensor, "... n"]) -> Float[Tensor, "... dim"]:
    """``u = sum_i pre_i x_i``, summed in float32 or wider and rounded once to x's dtype."""
    wide = wide_dtype(x.dtype)
    return (pre.to(wide).unsqueeze(-1) * x.to(wide)).sum(-2).to(x.dtype)


def post_mix(
    y: Float[Tensor, "... dim"],
    x: Float[Tensor, "... streams dim"],
    post: Float[Tensor, "... n"],
    H: Float[Tensor, "... n n"],
    config: MHCConfig,
    *,
    shards: Shards | None = None,
) -> Float[Tensor, "... streams dim"]:
    """``out_j = post_j y + sum_i H[i, j] x_i`` (``H[j, i]`` for "out-in"), in x's dtype.

    Args:
        shards: the shards of dim; post and H are taken as `pre` shares them, rounded already.

    Raises:
        ValueError: x or y of another shape than the configuration's.
    """
    dim = _local_dim(config, shards)
    check_shape("x", x, (config.streams, dim))
    check_shape("y", y, (dim,))
    wide = wide_dtype(x.dtype)
    rounded = config.mixing == "activation"
    if rounded and shards is None:
        post, H = post.to(x.dtype), H.to(x.dtype)
    own = post.to(wide).unsqueeze(-1) * y.to(wide).unsqueeze(-2)
    if config.mix == "identity":
        mixed = x.to(wide)
    else:
        pattern = "...ij,...ic->...jc" if config.mix == "in-out" else "...ji,...ic->...jc"
        with torch.autocast(x.device.type, enabled=False):
            mixed = torch.einsum(pattern, H.to(wide), x.to(wide))
    if rounded:
        own, mixed = own.to(x.dtype), mixed.to(x.dtype)
    return (own + mixed).to(x.dtype)


def pre(
    x: Float[Tensor, "... streams dim"],
    weights: Weights,
    config: MHCConfig,
    carried: Float[Tensor, "... streams"] | None = None,
    *,
    shards: Shards | None = None,
) -> tuple[Float[Tensor, "... dim"], Context, Float[Tensor, "... streams"] | None]:
    """The first half of the layer: u for the sub-layer, what `post` needs, and what the next site reads with.

    Args:
        carried: for ``pre_from="previous"`` the pre of the site before (`one_hot` for the first), else None.
        shards: the shards of dim: those of `coefficients`, and one sum of all the cotangents of the gates and H.

    Returns:
        u, the context, and this site's own pre for the next site; None for ``pre_from="own"``, which hands none on.

    Raises:
        ValueError: x, a weight or ``carried`` isn't what the configuration needs.
    """
    own, post_gates, H = coefficients(x, weights, config, shards=shards)
    if config.pre_from == "previous":
        gates, handed = _check_carried(x, carried), own
    elif carried is not None:
        raise ValueError("carried goes with pre_from='previous' alone: this configuration reads with its own pre")
    else:
        gates, handed = own, None
    if shards:
        n, wide = config.streams, wide_dtype(x.dtype)
        if config.mixing == "activation":
            post_gates, H = post_gates.to(x.dtype), H.to(x.dtype)
        mixing = [gates, post_gates] if config.residual == "identity" else [gates, post_gates, H.flatten(-2)]
        # Wide from here on: of a narrow dtype each part's cotangent would be rounded before they are added up.
        shared = shards.share(torch.cat([part.to(wide) for part in mixing], -1))
        gates, post_gates, *rest = shared.split([part.shape[-1] for part in mixing], -1)
        H = rest[0].unflatten(-1, (n, n)) if rest else H
    return pre_mix(x, gates), Context(x, post_gates, H, config, shards), handed


def post(y: Float[Tensor, "... dim"], context: Context) -> Float[Tensor, "... streams dim"]:
    """The second half of the layer: the sub-layer's output spread over the mixed streams."""
    return post_mix(y, context.x, context.post, context.H, context.config, shards=context.shards)


def head(
    x: Float[Tensor, "... streams dim"], weights: Weights, config: MHCConfig, *, shards: Shards | None = None
) -> Float[Tensor, "... dim"]:
    """The learned reduction: ``sum_i g_i x_i`` with gates g from one projection of the normed streams.

    The gates are float32 (float64 for float64) in every dialect, whatever ``config.coefficients`` says of the layer's.

    Args:
        shards: the shards of dim; they add as in `coefficients`, and the cotangents of g once.

    Raises:
        ValueError: x or a weight of another shape than the configuration's.
    """
    dim = _local_dim(config, shards)
    check_shape("x", x, (config.streams, dim))
    _check_weights(weights, head_shapes(config), dim)
    with torch.autocast(x.device.type, enabled=False):
        (logits,) = _logits(x, weights, [("head_fn", "head_scale", "head_base")], None, _of_head(config), shards)
        gates = torch.sigmoid(logits) + config.pre_eps
    return pre_mix(x, shards.share(gates) if shards else gates)


def _of_head(config: MHCConfig) -> MHCConfig:
    """The configuration that the head's norm and projection follow."""
    eps = config.norm_eps if config.head_norm_eps is None else config.head_norm_eps
    return dataclasses.replace(config, coefficients="float32", matrix="float32", norm_eps=eps)
