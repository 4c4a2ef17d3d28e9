"""``out_j = post_j y + sum_i H[i, j] x_i`` by operators: a block of tokens at a time, wide inside."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_impl.lean.balancing import block, blocks
from torch_impl.residual import in_dtype, wide_dtype

BLOCK_BYTES = 1 << 21
"""Bytes of x in float32 that a block of tokens has on a CPU: what its second cache holds. With 16 MiB each temporary is
mapped anew, page by page, and a site takes up to twice as long."""
WHOLE_BYTES = 1 << 22
"""Forward, an x of at most so many bytes in float32 is one block (64 tokens of 4,096 channels): to call each operator
twice takes longer than what smaller temporaries save. The way back has more of them."""


def parts(tokens: int, width: int, x: Tensor, *, back: bool = False) -> list[slice]:
    """Blocks of tokens of so many numbers each, forward or on the way back."""
    size = max(1, width * wide_dtype(x.dtype).itemsize)
    most = tokens if tokens * size <= WHOLE_BYTES and not back else BLOCK_BYTES // size
    return blocks(tokens, most, x.device)


def place(result: Tensor, part: slice, dtype: torch.dtype) -> Tensor | None:
    """Where a block of a result is written as it is computed; None where it has to be rounded first.

    A copy of a block in float32 takes as long as its product with the matrices.
    """
    return block(result, part) if result.dtype == dtype else None


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
    mixed = _rounded_block if rounded and x.dtype != wide_dtype(x.dtype) else _block
    held = parts(x3.shape[0], n * dim, x)
    if len(held) == 1:
        return mixed(y2, x3, gates, M).contiguous().view(x.shape)
    out = torch.empty_like(x3)
    for part in held:
        mixed(y2[part], x3[part], gates[part], None if M is None else M[part], out[part])
    return out.view(x.shape)


def _block(y: Tensor, x: Tensor, post: Tensor, M: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The streams of a block of tokens, rounded once; ``out`` is where they are written."""
    wide = wide_dtype(x.dtype)
    values, written = in_dtype(x, wide), out if x.dtype == wide else None
    own = torch.mul(in_dtype(post, wide).unsqueeze(2), in_dtype(y, wide).unsqueeze(1), out=written)
    own = own.add_(values) if M is None else own.baddbmm_(M, values)
    return in_dtype(own, x.dtype) if out is None or written is not None else out.copy_(own)


def _rounded_block(y: Tensor, x: Tensor, post: Tensor, M: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`_block` of a narrow x, with both terms rounded before they are added."""
    own = in_dtype(torch.mul(post.unsqueeze(2), y.unsqueeze(1), out=out), x.dtype)  # in the wider of both dtypes
    return own.add_(x if M is None else in_dtype(torch.bmm(M, in_dtype(x, M.dtype)), x.dtype))


def mix_back(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The cotangents of y, x, post and H."""
    n, dim = x.shape[-2:]
    x3, y2, gates, M = _flat(y, x, post, H, mix)
    gates = in_dtype(gates, wide_dtype(x.dtype))
    g3 = cotangent.reshape(x3.shape)
    dy, dx, dpost = torch.empty_like(y2), torch.empty_like(x3), torch.empty_like(gates)
    dM = None if M is None else torch.empty(M.shape, dtype=gates.dtype, device=x.device)
    for part in parts(x3.shape[0], n * dim, x, back=True):
        g, values = in_dtype(block(g3, part), gates.dtype), in_dtype(block(x3, part), gates.dtype)
        product(block(gates, part).unsqueeze(1), g, dy.unsqueeze(1), part)
        of_gates = g * in_dtype(block(y2, part), gates.dtype).unsqueeze(1)
        torch.sum(of_gates, 2, out=block(dpost, part))  # a third of a batched product's time
        if M is None or dM is None:
            dx[part] = g
        else:
            product(block(M, part).transpose(1, 2), g, dx, part)
            product(g, values.transpose(1, 2), dM, part)
    if dM is not None and H is not None:
        dM = in_dtype(dM.transpose(1, 2) if mix == "in-out" else dM, H.dtype).reshape(H.shape)
    return dy.view(y.shape), dx.view(x.shape), in_dtype(dpost, post.dtype).view(post.shape), dM


def _flat(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x ``[T, n, dim]``, y ``[T, dim]`` and post ``[T, n]`` as they are; the matrix ``[T, out, in]`` wide."""
    n, dim = x.shape[-2:]
    M = None if H is None else in_dtype(H.reshape(-1, n, n), wide_dtype(x.dtype))
    M = M.transpose(1, 2) if M is not None and mix == "in-out" else M
    return x.reshape(-1, n, dim), y.reshape(-1, dim), post.reshape(-1, n), M
