"""``out_j = post_j y + sum_i H[i, j] x_i`` by operators: a block of tokens at a time, wide inside."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_impl.lean.balancing import blocks
from torch_impl.residual import wide_dtype

BLOCK_BYTES = 1 << 21
"""Bytes of x in float32 that a block of tokens has on a CPU: what its second cache holds. With 16 MiB each temporary is
mapped anew, page by page, and a site takes up to twice as long."""


def parts(tokens: int, width: int, x: Tensor) -> list[slice]:
    """Blocks of tokens of so many numbers each."""
    most = BLOCK_BYTES // max(1, width * wide_dtype(x.dtype).itemsize)
    return list(blocks(tokens, most, x.device))


def place(result: Tensor, part: slice, dtype: torch.dtype) -> Tensor | None:
    """Where a block of a result is written as it is computed; None where it has to be rounded first.

    A copy of a block in float32 takes as long as its product with the matrices.
    """
    return result[part] if result.dtype == dtype else None


def product(a: Tensor, b: Tensor, result: Tensor, part: slice) -> None:
    """Puts a batched product into its block of a result."""
    written = place(result, part, a.dtype)
    value = torch.bmm(a, b, out=written)
    if written is None:
        result[part] = value


def mix(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, rounded: bool) -> Tensor:
    """The streams ``[..., n, dim]``."""
    n, dim = x.shape[-2:]
    x3, y2, gates, M = _flat(y, x, post, H, mix)
    out = torch.empty_like(x3)
    for part in parts(len(x3), n * dim, x):
        wide, written = x3[part].to(gates.dtype), None if rounded else place(out, part, gates.dtype)
        own = torch.mul(gates[part].unsqueeze(2), y2[part].to(gates.dtype).unsqueeze(1), out=written)
        if rounded:
            across = wide if M is None else torch.bmm(M[part], wide)
            torch.add(own.to(x.dtype), across.to(x.dtype), out=out[part])
            continue
        own = own.add_(wide) if M is None else own.baddbmm_(M[part], wide)
        if written is None:
            out[part] = own
    return out.view(x.shape)


def mix_back(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The cotangents of y, x, post and H."""
    n, dim = x.shape[-2:]
    x3, y2, gates, M = _flat(y, x, post, H, mix)
    g3 = cotangent.reshape(x3.shape)
    dy, dx, dpost = torch.empty_like(y2), torch.empty_like(x3), torch.empty_like(gates)
    dM = None if M is None else torch.empty(M.shape, dtype=gates.dtype, device=x.device)
    for part in parts(len(x3), n * dim, x):
        g, values = g3[part].to(gates.dtype), x3[part].to(gates.dtype)
        product(gates[part].unsqueeze(1), g, dy.unsqueeze(1), part)
        torch.sum(g * y2[part].to(gates.dtype).unsqueeze(1), 2, out=dpost[part])  # a third of a batched product's time
        if M is None or dM is None:
            dx[part] = g
        else:
            product(M[part].transpose(1, 2), g, dx, part)
            product(g, values.transpose(1, 2), dM, part)
    if dM is not None and H is not None:
        dM = (dM.transpose(1, 2) if mix == "in-out" else dM).to(H.dtype).reshape(H.shape)
    return dy.view(y.shape), dx.view(x.shape), dpost.to(post.dtype).view(post.shape), dM


def _flat(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x ``[T, n, dim]`` and y ``[T, dim]`` as they are; post ``[T, n]`` and the matrix ``[T, out, in]`` wide."""
    n, dim = x.shape[-2:]
    wide = wide_dtype(x.dtype)
    M = None if H is None else H.reshape(-1, n, n).to(wide)
    M = M.transpose(1, 2) if M is not None and mix == "in-out" else M
    return x.reshape(-1, n, dim), y.reshape(-1, dim), post.reshape(-1, n).to(wide), M
