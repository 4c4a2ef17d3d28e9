"""The layer as plain functions (mathematics.md is the source of every equation).

Shapes: ``n`` streams, ``dim`` width of one; ``...`` is any leading shape, also none or with zero tokens. Where ``dim``
is sharded, every tensor has this shard's part of it and ``shards`` is the collective over the others (`Shards`).

TF32: on CUDA, ``torch.backends.cuda.matmul.allow_tf32`` (or ``fp32_precision = "tf32"``) rounds the operands of
the projections to 10 bits, about 5e-4 of a coefficient's logit. The coefficients then keep the ``tf32`` contract,
not ``float32``. PyTorch's default is off; nothing here changes the setting.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.config import MHCConfig

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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that coefficients are computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _coefficient_dtype(x: Tensor, config: MHCConfig) -> torch.dtype:
    return x.dtype if config.coefficients == "activation" else _wide(x.dtype)


def _check(name: str, value: Tensor, tail: tuple[int, ...]) -> None:
    if tuple(value.shape[value.ndim - len(tail) :]) != tail or value.ndim < len(tail):
        raise ValueError(f"{name} must end in {list(tail)}, got {list(value.shape)}")


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


def reduce(x: Float[Tensor, "... streams dim"], how: str) -> Float[Tensor, "... dim"]:
    """Sum or mean over the streams, accumulated in float32 or wider and rounded once.

    Raises:
        ValueError: ``how`` is neither ``"sum"`` nor ``"mean"``.
    """
    if how not in ("sum", "mean"):
        raise ValueError(f"how must be sum or mean, got {how!r}")
    wide = x.to(_wide(x.dtype))
    return (wide.sum(-2) if how == "sum" else wide.mean(-2)).to(x.dtype)


def rms_norm(
    x: Float[Tensor, "... streams dim"], scale: Float[Tensor, "streams dim"] | None, config: MHCConfig
) -> Float[Tensor, "... streams dim"]:
    """x over its root mean square across streams and dim together, times ``scale``.

    Returns:
        float32 (float64 for float64), rounded to x's dtype where the coefficients are kept in it.
    """
    mean = x.to(_wide(x.dtype)).square().mean((-2, -1), keepdim=True)
    return _normed(x, mean, scale, config)


def _normed(x: Tensor, mean: Tensor, scale: Tensor | None, config: MHCConfig) -> Tensor:
    """x over the root of its mean square, times ``scale``, in the dtype of the coefficients."""
    dtype, wide = _coefficient_dtype(x, config), _wide(x.dtype)
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


def sinkhorn(logits: Float[Tensor, "... n n"], config: MHCConfig) -> Float[Tensor, "... n n"]:
    """``config.iterations`` Sinkhorn iterations as written, in float32 or wider.

    Returns:
        H in the dtype of the logits. The axis normalised last sums to 1 to rounding, the other need not.
    """
    first, second = (-1, -2) if config.order == "rows-first" else (-2, -1)
    eps = config.eps or 0.0

    def normalise(p: Tensor, axis: int) -> Tensor:
        total = p.sum(axis, keepdim=True)
        if config.guard == "add":
            total = total + eps
        elif config.guard == "clip":
            total = total.clamp(min=eps)
        return p / total

    p = torch.softmax(logits.to(_wide(logits.dtype)), first)
    if config.guard == "add":
        p = p + eps
    p = normalise(p, second)
    for _ in range(config.iterations - 1):  # type: ignore[operator]
        p = normalise(normalise(p, first), second)
    return p.to(logits.dtype)


def permutations(logits: Float[Tensor, "... factorial"], config: MHCConfig) -> Float[Tensor, "... n n"]:
    """A softmax over the n! permutation matrices in `itertools.permutations` order, ``P[i, p(i)] = 1``."""
    weight = torch.softmax(logits.to(_wide(logits.dtype)), -1)
    matrices = torch.zeros(config.residual_columns, config.streams, config.streams, dtype=torch.bool)
    for index, order in enumerate(itertools.permutations(range(config.streams))):
        for i, j in enumerate(order):
            matrices[index, i, j] = True
    chosen = matrices.to(logits.device, weight.dtype)
    return torch.einsum("...p,pij->...ij", weight, chosen).to(logits.dtype)


def residual_matrix(logits: Float[Tensor, ...], config: MHCConfig) -> Float[Tensor, "... n n"]:
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


def _contract(phi: Tensor, x: Tensor) -> Tensor:
    """``[..., m]``: (streams, dim) contracted at once, accumulated in float32 or wider."""
    wide = _wide(x.dtype)
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
    dtype, wide = _coefficient_dtype(x, config), _wide(x.dtype)

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
    dtype, wide = _coefficient_dtype(x, config), _wide(x.dtype)
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
    _check("x", x, (n, dim))
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
            z = logits[2].unflatten(-1, (n, n)) if config.residual == "sinkhorn" else logits[2]
            H = residual_matrix(z, config).to(dtype)
    return pre, post, H


def pre_mix(x: Float[Tensor, "... streams dim"], pre: Float[Tensor, "... n"]) -> Float[Tensor, "... dim"]:
    """``u = sum_i pre_i x_i``, summed in float32 or wider and rounded once to x's dtype."""
    wide = _wide(x.dtype)
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
    _check("x", x, (config.streams, dim))
    _check("y", y, (dim,))
    wide = _wide(x.dtype)
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
    x: Float[Tensor, "... streams dim"], weights: Weights, config: MHCConfig, *, shards: Shards | None = None
) -> tuple[Float[Tensor, "... dim"], Context]:
    """The first half of the layer: u for the sub-layer, and what `post` needs afterwards.

    Args:
        shards: the shards of dim: those of `coefficients`, and one sum of all three coefficients' cotangents.
    """
    gates, post_gates, H = coefficients(x, weights, config, shards=shards)
    if shards:
        n, wide = config.streams, _wide(x.dtype)
        if config.mixing == "activation":
            post_gates, H = post_gates.to(x.dtype), H.to(x.dtype)
        mixing = [gates, post_gates] if config.residual == "identity" else [gates, post_gates, H.flatten(-2)]
        # Wide from here on: of a narrow dtype each part's cotangent would be rounded before they are added up.
        shared = shards.share(torch.cat([part.to(wide) for part in mixing], -1))
        gates, post_gates, *rest = shared.split([part.shape[-1] for part in mixing], -1)
        H = rest[0].unflatten(-1, (n, n)) if rest else H
    return pre_mix(x, gates), Context(x, post_gates, H, config, shards)


def post(y: Float[Tensor, "... dim"], context: Context) -> Float[Tensor, "... streams dim"]:
    """The second half of the layer: the sub-layer's output spread over the mixed streams."""
    return post_mix(y, context.x, context.post, context.H, context.config, shards=context.shards)


def head(
    x: Float[Tensor, "... streams dim"], weights: Weights, config: MHCConfig, *, shards: Shards | None = None
) -> Float[Tensor, "... dim"]:
    """The learned reduction: ``sum_i g_i x_i`` with gates g from one projection of the normed streams.

    Args:
        shards: the shards of dim; they add as in `coefficients`, and the cotangents of g once.

    Raises:
        ValueError: x or a weight of another shape than the configuration's.
    """
    dim = _local_dim(config, shards)
    _check("x", x, (config.streams, dim))
    _check_weights(weights, head_shapes(config), dim)
    with torch.autocast(x.device.type, enabled=False):
        (logits,) = _logits(x, weights, [("head_fn", "head_scale", "head_base")], None, config, shards)
        gates = torch.sigmoid(logits) + config.pre_eps
        gates = gates.to(_coefficient_dtype(x, config))
    return pre_mix(x, shards.share(gates.to(_wide(x.dtype))) if shards else gates)
