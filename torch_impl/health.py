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

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.projections import Weights
from torch_impl.residual import check_shape, wide_dtype

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

    forward_sums: Tensor
    backward_sums: Tensor
    forward: Tensor
    backward: Tensor
    off: Tensor


class GateHealth(NamedTuple):
    """The sigmoids of pre or post, without their scale and eps.

    Attributes:
        mean: ``[n]``.
        closed, open: ``[n]``, the fractions of tokens for which the sigmoid is below `SATURATED`, or above 1 minus it.
        spread: ``[]``, the standard deviation over tokens, as root mean square over the streams.
    """

    mean: Tensor
    closed: Tensor
    open: Tensor
    spread: Tensor


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
    entropy: Tensor
    from_permutation: Tensor
    from_uniform: Tensor
    from_identity: Tensor
    spread: Tensor
    pre: GateHealth
    post: GateHealth
    share: Tensor | None
    alpha: Tensor | None


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
    H: Float[Tensor, "... n n"], config: MHCConfig, before: Float[Tensor, "... n n"] | None = None
) -> Float[Tensor, "... n n"]:
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
    M = M.transpose(-1, -2) if config.mix == "out-in" else M  # [..., n of inputs, n of outputs]
    if before is None:
        return M
    products = _wide(before).unsqueeze(-1) * M.unsqueeze(-3)  # [..., n, n, n]: no autocast, no TF32
    return products.sum(-2)  # [..., n, n]


def gains(C: Float[Tensor, "... n n"]) -> Gains:
    """Computes the sums and gains of a matrix that leads from input streams (rows) to output streams (columns).

    Args:
        C: ``[..., n, n]``, a `composite`; of one site alone where ``before`` was None.
    """
    forward, backward = C.sum(-2), C.sum(-1)  # [..., n] each
    off = torch.maximum((forward - 1).abs().amax(-1), (backward - 1).abs().amax(-1))  # [...]
    return Gains(
        _mean(forward, 1),
        _mean(backward, 1),
        forward.abs().amax(-1).mean(),
        backward.abs().amax(-1).mean(),
        off.mean(),
    )


def site_health(
    pre: Float[Tensor, "... streams"],
    post: Float[Tensor, "... streams"],
    H: Float[Tensor, "... streams streams"],
    config: MHCConfig,
    x: Float[Tensor, "... streams dim"] | None = None,
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
    identity = torch.eye(n, dtype=M.dtype, device=M.device)  # [n, n]
    nats = torch.special.xlogy(M.abs(), M.abs()).sum((-2, -1))  # [...]
    share = None
    if x is not None:
        check_shape("x", x, (n, config.dim))
        squares = _wide(x).square().sum(-1)  # [..., n]
        share = _mean(squares / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny), 1)
    return SiteHealth(
        gains=gains(M),
        entropy=-nats.mean() / (n * math.log(max(n, 2))),
        from_permutation=1 - M.amax(-2).mean(),
        from_uniform=(M - 1 / n).abs().sum(-2).mean() / 2,
        from_identity=(M - identity).abs().sum(-2).mean() / 2,
        spread=_spread(M, 2),
        pre=_gates(pre, 1.0, config.pre_eps),
        post=_gates(post, config.post_scale, config.post_eps),
        share=share,
        alpha=None if weights is None else _alpha(weights),
    )


def stack_health(
    sites: Sequence[tuple[Tensor, Tensor, Tensor]],
    config: MHCConfig,
    xs: Sequence[Tensor] | None = None,
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
    before: Tensor | None = None
    for index, (pre, post, H) in enumerate(sites):
        x, held = xs[index] if xs else None, weights[index] if weights else None
        every.append(site_health(pre, post, H, config, x, held))
        before = composite(H, config, before)
        composites.append(gains(before))
    return StackHealth(_stacked(every), _stacked(composites))


def _wide(value: Tensor) -> Tensor:
    """The value without its gradient, in the dtype that figures are computed in."""
    return value.detach().to(wide_dtype(value.dtype))


def _mean(value: Tensor, kept: int) -> Tensor:
    """The mean over all axes but the last ``kept``."""
    return value.flatten(0, -1 - kept).mean(0) if value.ndim > kept else value


def _spread(value: Tensor, kept: int) -> Tensor:
    """The standard deviation over all axes but the last ``kept``, as root mean square over those."""
    return (value - _mean(value, kept)).square().mean().sqrt()


def _gates(gate: Tensor, scale: float, eps: float) -> GateHealth:
    """The health of gates ``scale * sigmoid + eps`` ``[..., n]``."""
    s = (_wide(gate) - eps) / scale  # [..., n]
    closed, opened = (s < SATURATED).to(s.dtype), (s > 1 - SATURATED).to(s.dtype)
    return GateHealth(_mean(s, 1), _mean(closed, 1), _mean(opened, 1), _spread(s, 1))


def _alpha(weights: Weights) -> Tensor:
    """The gating scalars of pre, post and H where they are there, ``[3]`` or ``[2]``."""
    names = [name for kind in ("pre", "post", "res") if (name := f"{kind}_alpha_scale") in weights]
    return torch.cat([_wide(weights[name]) for name in names])


def _stacked(rows: Sequence[Any]) -> Any:
    """One tuple of tensors with a first axis, of several tuples of tensors; None stays None."""
    first = rows[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        return type(first)(*(_stacked(values) for values in zip(*rows, strict=True)))
    return torch.stack(list(rows))
