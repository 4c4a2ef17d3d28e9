"""The two mixings of streams by operators: read with gates, written with gates and the residual matrix.

Shapes at line ends are those of `functional`.
"""

from __future__ import annotations

from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.residual import in_dtype, wide_dtype, without_autocast


def weighted(x: Tensor, gates: Tensor) -> Tensor:
    """``sum_i gates_i x_i``, summed in float32 or wider and rounded once to x's dtype."""
    wide = wide_dtype(x.dtype)
    product = gates.to(wide).unsqueeze(-1) * x.to(wide)  # [..., n, 1] * [..., n, dim]
    return product.sum(-2).to(x.dtype)  # [..., dim]


def mixed(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, rounded: bool) -> Tensor:
    """``out_j = post_j y + sum_i H[i, j] x_i`` (``H[j, i]`` for "out-in"; H None is the identity), in x's dtype.

    Args:
        rounded: whether both terms are rounded to x's dtype before they are added.
    """
    wide = wide_dtype(x.dtype)
    own = post.to(wide).unsqueeze(-1) * y.to(wide).unsqueeze(-2)  # [..., n, 1] * [..., 1, dim]
    if H is None:
        across = x.to(wide)
    else:
        M = H.to(wide).transpose(-1, -2) if mix == "in-out" else H.to(wide)  # [..., n of out, n of x]
        with without_autocast(x.device):
            across = M @ x.to(wide)  # [..., n, dim]
    if rounded:
        own, across = own.to(x.dtype), across.to(x.dtype)
    return (own + across).to(x.dtype)


def rounded_gates(x: Tensor, post: Tensor, H: Tensor, config: MHCConfig) -> tuple[Tensor, Tensor]:
    """post and H in x's dtype where the configuration mixes in it."""
    return (in_dtype(post, x.dtype), in_dtype(H, x.dtype)) if config.mixing == "activation" else (post, H)


def expanded(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, post and H, None for the identity, with an entry for each token of x.

    Raises:
        RuntimeError: one of them doesn't broadcast to x.
    """
    lead, n, dim = x.shape[:-2], x.shape[-2:-1], x.shape[-1:]
    return _expanded(y, lead + dim), _expanded(post, lead + n), None if H is None else _expanded(H, lead + n + n)


def _expanded(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    return value if value.shape == shape else value.expand(shape)
