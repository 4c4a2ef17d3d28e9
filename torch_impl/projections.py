"""From the streams to the coefficients of a site: norm, projections, gates and residual matrix. In short::

    z = scale * (rms_norm(x) @ phi) + shift                     # [..., m], m = n + n + n*n: pre, post and H together
    pre = sigmoid(z[:n]) + pre_eps                              # [..., n]
    post = post_scale * sigmoid(z[n : 2 * n]) + post_eps        # [..., n]
    H = residual_matrix(z[2 * n :])                             # [..., n, n]

Shapes at line ends are those of `functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.residual import in_dtype, residual_matrix, wide_dtype

Weights = Mapping[str, Tensor]
NAMES = [(f"{kind}_alpha", f"{kind}_alpha_scale", f"{kind}_beta") for kind in ("pre", "post", "res")]
SHARDED = ("mhc_norm.scale", "pre_alpha", "post_alpha", "res_alpha", "head_fn")  # [streams, dim, ...]: split with dim


@runtime_checkable
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


def coefficient_dtype(x: Tensor, config: MHCConfig) -> torch.dtype:
    return x.dtype if config.coefficients == "activation" else wide_dtype(x.dtype)


def local_dim(config: MHCConfig, shards: Shards | None) -> int:
    """The width of this shard's part of dim."""
    return config.dim // shards.count if shards else config.dim


def check_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]], dim: int) -> dict[str, Tensor]:
    """The weights of these names, once they are known to have these shapes, with ``dim`` for a dim that is split.

    Raises:
        ValueError: one is missing or has another shape; it names it.
    """
    held: dict[str, Tensor] = {}
    for name, whole in shapes.items():
        shape = (whole[0], dim, *whole[2:]) if name in SHARDED else whole
        if name not in weights:
            raise ValueError(f"weights must have {name} {list(shape)}, got {sorted(weights)}")
        held[name] = weights[name]
        if held[name].shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(held[name].shape)}")
    return held


def weight_shapes(config: MHCConfig) -> dict[str, tuple[int, ...]]:
    """Name and in-memory shape of each weight of the layer."""
    n, dim, columns = config.streams, config.dim, config.residual_columns
    shapes: dict[str, tuple[int, ...]] = {"mhc_norm.scale": (n, dim)} if config.norm_weight else {}
    of_H = (n, n) if config.residual == "sinkhorn" else (columns,)
    for (phi, scale, shift), count, beta in zip(layer_names(config), (n, n, columns), ((n,), (n,), of_H), strict=False):
        shapes[phi], shapes[scale], shapes[shift] = (n, dim, count), (1,), beta
    return shapes


def head_shapes(config: MHCConfig) -> dict[str, tuple[int, ...]]:
    """Name and in-memory shape of each weight of the head."""
    n = config.streams
    return {"head_fn": (n, config.dim, n), "head_base": (n,), "head_scale": (1,)}


def rms_norm(
    x: Float[Tensor, "... streams dim"], scale: Float[Tensor, "streams dim"] | None, config: MHCConfig
) -> Float[Tensor, "... streams dim"]:
    """Divides x by its root mean square across streams and dim together, times ``scale`` (docs/mathematics.md,
    "Forward").

    Args:
        x: ``[..., streams, dim]``.
        scale: ``[streams, dim]``, the norm weight, or None for a dialect without one.

    Returns:
        float32 (float64 for float64), rounded to x's dtype where the coefficients are kept in it.
    """
    squares = x.to(wide_dtype(x.dtype)).square()  # [..., n, dim]
    return _normed(x, squares.mean((-2, -1), keepdim=True), scale, config)  # mean [..., 1, 1]


def _normed(x: Tensor, mean: Tensor, scale: Tensor | None, config: MHCConfig) -> Tensor:
    """x over the root of its mean square, times ``scale``, in the dtype of the coefficients."""
    dtype, wide = coefficient_dtype(x, config), wide_dtype(x.dtype)
    normed = over_rms(x.to(wide), mean, config)
    if scale is not None:
        normed = normed * scale.to(dtype).to(wide)
    return normed.to(dtype)


def over_rms(value: Tensor, mean: Tensor, config: MHCConfig) -> Tensor:
    """``value`` over the root of the mean square, with eps where the configuration has it."""
    if config.norm_eps_position == "mean":
        return value / (mean + config.norm_eps).sqrt()
    empty = mean == 0  # the root's slope is infinite there; the norm's is 1 / eps
    root = torch.where(empty, 0.0, torch.where(empty, 1.0, mean).sqrt())
    return value / (root + config.norm_eps)


def contract(phi: Tensor, x: Tensor) -> Tensor:
    """``[..., m]``: (streams, dim) contracted at once, accumulated in float32 or wider."""
    wide = wide_dtype(x.dtype)
    return x.to(wide).flatten(-2) @ phi.to(wide).flatten(0, 1)  # as an einsum it copies x transposed


def side_by_side(
    x: Tensor, phis: Sequence[Tensor], norm: Tensor | None, config: MHCConfig
) -> tuple[Tensor, Tensor | None]:
    """All projections ``[n, dim, m]`` and the norm's weight ``[n, dim]`` as they are computed with: wide, rounded first
    where coefficients are.
    """
    rounded = rounding(x, config)
    if all(phi.dtype == phis[0].dtype for phi in phis):
        phi = rounded(torch.cat(list(phis), -1))
    else:  # not every pair of dtypes has a common one
        phi = torch.cat([rounded(phi) for phi in phis], -1)
    return phi, None if norm is None else rounded(norm)


def times_norm(phi: Tensor, norm: Tensor | None) -> Tensor:
    """The projections ``[n, dim, m]`` times the norm's weight, as one matrix ``[n * dim, m]``."""
    return (phi if norm is None else phi * norm.unsqueeze(-1)).flatten(0, 1)


def of_weights(
    dmatrix: Tensor | None, phi: Tensor, norm: Tensor | None, held: Sequence[Tensor | None], wanted: Sequence[bool]
) -> Iterator[Tensor | None]:
    """The cotangents of the norm's weight and of each projection, from that of `times_norm`, ``[m, n * dim]``.

    Args:
        phi, norm: what was multiplied.
        held: the weights that they were made of, norm's first, whose dtypes the cotangents have.
    """
    if dmatrix is None:
        yield from (None for _ in wanted)
        return
    of_phi = dmatrix.t().reshape(phi.shape)  # [n, dim, m]
    if norm is None:
        yield None
    else:
        assert held[0] is not None
        yield (of_phi * phi).sum(-1).to(held[0].dtype)
        of_phi = of_phi * norm.unsqueeze(-1)
    phis = [value for value in held[1:] if value is not None]
    for value, part in zip(phis, of_phi.split([value.shape[-1] for value in phis], -1), strict=True):
        yield part.to(value.dtype).contiguous()


class Packed(NamedTuple):
    """The weights of several projections side by side: phi ``[n, dim, m]``, norm ``[n, dim]`` or None, scale and shift
    ``[m]``; wide, rounded first where the coefficients are.
    """

    phi: Tensor
    norm: Tensor | None
    scale: Tensor
    shift: Tensor


def rounding(x: Tensor, config: MHCConfig) -> Callable[[Tensor], Tensor]:
    """Rounds a weight to the dtype of the coefficients; it is wide from there on, so that gradients are added up
    before they are rounded.
    """
    dtype, wide = coefficient_dtype(x, config), wide_dtype(x.dtype)
    if dtype == wide:
        return lambda value: value if value.dtype == wide else value.to(wide)
    return lambda value: in_dtype(in_dtype(value, dtype), wide)


def packed(
    x: Tensor, weights: Weights, names: Sequence[tuple[str, str, str]], norm: Tensor | None, config: MHCConfig
) -> Packed:
    """The weights of every ``(phi, scale, shift)``."""
    phi, norm = side_by_side(x, [weights[name] for name, _, _ in names], norm, config)
    return Packed(phi, norm, *packed_gates(x, weights, names, config))


def packed_gates(
    x: Tensor, weights: Weights, names: Sequence[tuple[str, str, str]], config: MHCConfig
) -> tuple[Tensor, Tensor]:
    """Every scale and every shift, ``[m]`` each."""
    scales, shifts = gates_apart(x, weights, names, config)
    return torch.cat([scale.expand(len(shift)) for scale, shift in zip(scales, shifts, strict=True)]), torch.cat(shifts)


def gates_apart(
    x: Tensor, weights: Weights, names: Sequence[tuple[str, str, str]], config: MHCConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """The scale ``[1]`` and the shift ``[columns]`` of each projection."""
    rounded = rounding(x, config)
    shifts = [rounded(weights[shift]) for _, _, shift in names]
    lines = [shift if shift.ndim == 1 else shift.reshape(-1) for shift in shifts]
    return [rounded(weights[scale]) for _, scale, _ in names], lines


def logits(x: Tensor, weights: Packed, config: MHCConfig, shards: Shards | None) -> Tensor:
    """``scale * (normed x @ phi) + shift``, ``[..., m]``, wide."""
    return weights.scale * _projected(x, weights.phi, weights.norm, config, shards) + weights.shift


def _projected(x: Tensor, phi: Tensor, norm: Tensor | None, config: MHCConfig, shards: Shards | None) -> Tensor:
    """The normed streams times phi, ``[..., m]``, from this shard's part of dim.

    The norm's division comes after the product, so that partial sums of both are added up at once, m + 1 numbers a
    token. Where the norm's output is rounded to a narrow dtype (``coefficients="activation"``) the division has to
    come first, and the norm's sum and the projections are added up one after the other.
    """
    dtype, wide = coefficient_dtype(x, config), wide_dtype(x.dtype)
    squares = x.to(wide).square().sum((-2, -1))  # [..., n, dim] -> [...]
    count = config.streams * config.dim
    if dtype == wide:
        phi = phi if norm is None else phi * norm.unsqueeze(-1)  # [n, dim, m] * [n, dim, 1]
        sums = torch.cat([contract(phi, x), squares.unsqueeze(-1)], -1)  # [..., m + 1]
        sums = shards.add(sums) if shards else sums
        return over_rms(sums[..., :-1], sums[..., -1:] / count, config)
    mean = (shards.add(squares) if shards else squares)[..., None, None] / count  # [..., 1, 1]
    h = contract(phi, _normed(x, shards.share(mean) if shards else mean, norm, config))  # [..., m]
    return (shards.add(h) if shards else h).to(dtype).to(wide)


def layer_names(config: MHCConfig) -> list[tuple[str, str, str]]:
    """The names of (phi, scale, shift) of every projection of a layer."""
    return NAMES[: 2 if config.residual == "identity" else 3]


def gates_and_matrix(z: Tensor, config: MHCConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and H from the logits of all three ``[..., m]``, rounded to ``dtype``."""
    n = config.streams
    z_pre, z_post, z_res = z.split([n, n, z.shape[-1] - 2 * n], -1)
    pre = (torch.sigmoid(z_pre) + config.pre_eps).to(dtype)  # [..., n]
    post = (config.post_scale * torch.sigmoid(z_post) + config.post_eps).to(dtype)  # [..., n]
    if config.residual == "identity":
        return pre, post, torch.eye(n, dtype=dtype, device=z.device).expand(*z.shape[:-1], n, n)  # [..., n, n]
    res = z_res.to(dtype) if config.matrix == "activation" else z_res  # [..., n*n or n!]
    res = res.unflatten(-1, (n, n)) if config.residual == "sinkhorn" else res  # [..., n, n]
    return pre, post, residual_matrix(res, config).to(dtype)  # [..., n, n]
