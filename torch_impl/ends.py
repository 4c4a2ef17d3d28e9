"""Where a stack begins and ends: one stream becomes n, n become one. Shapes are those of `functional`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.projections import Shards
from torch_impl.residual import wide_dtype
from torch_impl.streams import weighted


def expand(x: Float[Tensor, "... dim"], streams: int) -> Float[Tensor, "... streams dim"]:
    """Repeats one stream ``streams`` times.

    Args:
        x: ``[..., dim]``, the embedding.
        streams: n, at least 1.

    Raises:
        ValueError: ``streams`` is below 1.
    """
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    return x.unsqueeze(-2).expand(*x.shape[:-1], streams, x.shape[-1])  # [..., n, dim]


def one_hot(x: Float[Tensor, "... streams dim"]) -> Float[Tensor, "... streams"]:
    """The gates that the first site of a single-pass stack reads with: 1 for stream 0, else 0 (docs/mathematics.md,
    "Single pass").

    Args:
        x: ``[..., streams, dim]``; its values don't matter.

    Returns:
        ``[..., streams]`` in float32 (float64 for float64).
    """
    first = torch.arange(x.shape[-2], device=x.device) == 0  # [n]
    return first.to(wide_dtype(x.dtype)).expand(x.shape[:-1])  # [..., n]


def reduce(
    x: Float[Tensor, "... streams dim"],
    how: str,
    carried: Float[Tensor, "... streams"] | None = None,
    *,
    reduction: str = "float32",
    shards: Shards | None = None,
) -> Float[Tensor, "... dim"]:
    """Reduces the streams to one: their sum, their mean, or the sum weighted by the pre of the last site
    (docs/mathematics.md, "Single pass").

    Args:
        x: ``[..., streams, dim]``.
        how: ``"sum"``, ``"mean"`` or ``"carried"``.
        carried: ``[..., streams]``, the last site's pre, for ``"carried"`` alone; float32 (float64 for float64).
        reduction: ``"float32"`` accumulates in float32 or wider and rounds once, ``"activation"`` adds stream by stream
            in x's dtype.
        shards: the shards of dim, for ``"carried"``, whose cotangent they add up.

    Raises:
        ValueError: ``how`` is another word, or ``carried`` is missing, surplus, of another shape or narrower dtype.
    """
    if how not in ("sum", "mean", "carried"):
        head = "; a dialect that ends with a head takes HyperHead(config)" if how == "head" else ""
        raise ValueError(f"how must be sum, mean or carried, got {how!r}{head}")
    if how == "carried":
        gates = check_carried(x, carried)  # [..., n]
        return weighted(x, shards.share(gates) if shards else gates)
    if carried is not None:
        raise ValueError(f"carried goes with how='carried' alone, got it with {how!r}")
    if reduction == "activation":
        total = x[..., 0, :]  # [..., dim]
        for index in range(1, x.shape[-2]):
            total = total + x[..., index, :]
    else:
        total = x.sum(-2, dtype=wide_dtype(x.dtype))  # [..., n, dim] -> [..., dim]
    return (total if how == "sum" else total / x.shape[-2]).to(x.dtype)


def check_carried(x: Tensor, carried: Tensor | None) -> Tensor:
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
