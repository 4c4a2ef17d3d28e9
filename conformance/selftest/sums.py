"""Honest orders of summation, and the rounding of TF32, in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = ("library", "sequential", "backward", "pairwise", "permuted", "wider")


@dataclass(frozen=True)
class Sums:
    """An order of summation.

    Attributes:
        order: ``library`` leaves it to PyTorch; ``wider`` adds in float64 and rounds once.
        block: terms that a contraction hands to one matrix product, where it adds blocks up itself.
        seed: of ``permuted``.
    """

    order: str = "library"
    block: int = 8
    seed: int = 0

    def total(self, a: Tensor, axis: int) -> Tensor:
        """The sum along ``axis``, which is kept with length 1."""
        if self.order == "library" or not a.shape[axis]:
            return a.sum(axis, keepdim=True)
        if self.order == "wider":
            return a.double().sum(axis, keepdim=True).to(a.dtype)
        if self.order == "permuted":
            return a.index_select(axis, self._permutation(a.shape[axis])).sum(axis, keepdim=True)
        return self._added(list(a.split(1, axis)))

    def contract(self, a: Tensor, b: Tensor) -> Tensor:
        """``[..., k] @ [k, m]``."""
        if self.order == "library":
            return a @ b
        if self.order == "wider":
            return (a.double() @ b.double()).to(a.dtype)
        if self.order == "permuted":
            order = self._permutation(b.shape[0])
            return a[..., order] @ b[order]
        return self._added([x @ y for x, y in zip(a.split(self.block, -1), b.split(self.block, 0), strict=True)])

    def _permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=torch.Generator().manual_seed(self.seed))

    def _added(self, terms: list[Tensor]) -> Tensor:
        if self.order == "backward":
            terms = terms[::-1]
        if self.order == "pairwise":
            while len(terms) > 1:
                pairs = [terms[k] + terms[k + 1] for k in range(0, len(terms) - 1, 2)]
                terms = pairs + terms[len(terms) - len(terms) % 2 :]
            return terms[0]
        result = terms[0]
        for term in terms[1:]:
            result = result + term
        return result


def to_tf32(a: Tensor) -> Tensor:
    """float32 rounded to 10 bits after the leading one, ties to even; other dtypes as they are."""
    if a.dtype != torch.float32:
        return a
    bits = a.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class _Tf32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):  # type: ignore[override]
        ctx.save_for_backward(a, b)
        return to_tf32(a) @ to_tf32(b)

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        a, b = ctx.saved_tensors
        flat, g_flat = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        return to_tf32(g) @ to_tf32(b).T, to_tf32(flat).T @ to_tf32(g_flat)


def contract_tf32(a: Tensor, b: Tensor) -> Tensor:
    """``[..., k] @ [k, m]`` as a tensor core in TF32 does it, in both directions."""
    return _Tf32Product.apply(a, b)  # type: ignore[return-value]
