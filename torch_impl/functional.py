"""The layer as plain functions (mathematics.md is the source of every equation).

Shapes: ``n`` streams, ``dim`` width of one; ``...`` is any leading shape, also none or with zero tokens.

TF32: on CUDA, ``torch.backends.cuda.matmul.allow_tf32`` (or ``fp32_precision = "tf32"``) rounds the operands of
the projections to 10 bits, about 5e-4 of a coefficient's logit. The coefficients then keep the ``tf32`` contract,
not ``float32``. PyTorch's default is off; nothing here changes the setting.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.config import MHCConfig

Weights = Mapping[str, Tensor]


class Context(NamedTuple):
    """What `post` needs of the `pre` before it: the streams, their coefficients and the configuration."""

    x: Tensor
    post: Tensor
    H: Tensor
    config: MHCConfig


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that coefficients are computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _coefficient_dtype(x: Tensor, config: MHCConfig) -> torch.dtype:
    return x.dtype if config.coefficients == "activation" else _wide(x.dtype)


def _check(name: str, value: Tensor, tail: tuple[int, ...]) -> None:
    if tuple(value.shape[value.ndim - len(tail) :]) != tail or value.ndim < len(tail):
        raise ValueError(f"{name} must end in {list(tail)}, got {list(value.shape)}")


def _check_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
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
    wide = x.to(_wide(x.dtype))
    mean = wide.square().mean((-2, -1), keepdim=True)
    if config.norm_eps_position == "mean":
        rms = (mean + config.norm_eps).sqrt()
    else:
        nothing = mean == 0  # the root's slope is infinite there; the norm's is 1 / eps
        rms = torch.where(nothing, 0.0, torch.where(nothing, 1.0, mean).sqrt()) + config.norm_eps
    normed = wide / rms
    if scale is not None:
        normed = normed * scale.to(_coefficient_dtype(x, config)).to(wide.dtype)
    return normed.to(_coefficient_dtype(x, config))


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


def _project(normed: Tensor, phi: Tensor, dtype: torch.dtype) -> Tensor:
    """(streams, dim) contracted at once, accumulated in float32 or wider, rounded to ``dtype``."""
    wide = _wide(normed.dtype)
    return torch.einsum("...nc,ncm->...m", normed.to(wide), phi.to(dtype).to(wide)).to(dtype)


def _logits(h: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    wide = _wide(h.dtype)
    return scale.to(dtype).to(wide) * h.to(wide) + shift.to(dtype).to(wide)


def coefficients(
    x: Float[Tensor, "... streams dim"], weights: Weights, config: MHCConfig
) -> tuple[Float[Tensor, "... n"], Float[Tensor, "... n"], Float[Tensor, "... n n"]]:
    """pre, post and H of every token, in the dtype of the coefficients (mathematics.md, "Precision").

    Raises:
        ValueError: x or a weight of another shape than the configuration's.
    """
    n = config.streams
    _check("x", x, (n, config.dim))
    _check_weights(weights, weight_shapes(config))
    dtype = _coefficient_dtype(x, config)
    with torch.autocast(x.device.type, enabled=False):
        normed = rms_norm(x, weights.get("mhc_norm.scale"), config)

        def logits(kind: str) -> Tensor:
            h = _project(normed, weights[f"{kind}_alpha"], dtype)
            return _logits(h, weights[f"{kind}_alpha_scale"], weights[f"{kind}_beta"].reshape(-1), dtype)

        pre = (torch.sigmoid(logits("pre")) + config.pre_eps).to(dtype)
        post = (config.post_scale * torch.sigmoid(logits("post")) + config.post_eps).to(dtype)
        if config.residual == "identity":
            H = torch.eye(n, dtype=dtype, device=x.device).expand(*x.shape[:-2], n, n)
        else:
            z = logits("res")
            H = residual_matrix(z.unflatten(-1, (n, n)) if config.residual == "sinkhorn" else z, config).to(dtype)
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
) -> Float[Tensor, "... streams dim"]:
    """``out_j = post_j y + sum_i H[i, j] x_i`` (``H[j, i]`` for "out-in"), in x's dtype.

    Raises:
        ValueError: x or y of another shape than the configuration's.
    """
    _check("x", x, (config.streams, config.dim))
    _check("y", y, (config.dim,))
    wide = _wide(x.dtype)
    rounded = config.mixing == "activation"
    if rounded:
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
    x: Float[Tensor, "... streams dim"], weights: Weights, config: MHCConfig
) -> tuple[Float[Tensor, "... dim"], Context]:
    """The first half of the layer: u for the sub-layer, and what `post` needs afterwards."""
    gates, post_gates, H = coefficients(x, weights, config)
    return pre_mix(x, gates), Context(x, post_gates, H, config)


def post(y: Float[Tensor, "... dim"], context: Context) -> Float[Tensor, "... streams dim"]:
    """The second half of the layer: the sub-layer's output spread over the mixed streams."""
    return post_mix(y, context.x, context.post, context.H, context.config)


def head(x: Float[Tensor, "... streams dim"], weights: Weights, config: MHCConfig) -> Float[Tensor, "... dim"]:
    """The learned reduction: ``sum_i g_i x_i`` with gates g from one projection of the normed streams.

    Raises:
        ValueError: x or a weight of another shape than the configuration's.
    """
    _check("x", x, (config.streams, config.dim))
    _check_weights(weights, head_shapes(config))
    dtype = _coefficient_dtype(x, config)
    with torch.autocast(x.device.type, enabled=False):
        h = _project(rms_norm(x, None, config), weights["head_fn"], dtype)
        gates = torch.sigmoid(_logits(h, weights["head_scale"], weights["head_base"], dtype)) + config.pre_eps
    return pre_mix(x, gates.to(dtype))
