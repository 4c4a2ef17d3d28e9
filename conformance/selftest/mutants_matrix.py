"""Mistakes in the residual matrix and in its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conformance.selftest.mutant import Mutant


class OneIterationLess(Mutant):
    """Iterations - 1."""

    def iterations(self, c: Any) -> int:
        return max(1, c.iterations - 1)


class HalfTheIterations(Mutant):
    """Half the iterations."""

    def iterations(self, c: Any) -> int:
        return max(1, c.iterations // 2)


class OtherOrder(Mutant):
    """Columns first (rows first where columns are)."""

    def axes(self, c: Any) -> tuple[int, int]:
        return super().axes(c)[::-1]  # type: ignore[return-value]


class OtherSoftmax(Mutant):
    """Softmax over the other axis."""

    def start(self, logits: Tensor, c: Any) -> Tensor:
        axis = self.softmax_axis(c)
        if axis is None:
            return self.exp(self.shift(logits, self.axes(c)[1], c))
        p = self.softmax(logits, -3 - axis, c)
        return p + self.eps(c) if c.guard == "add" else p


class SoftmaxOfTheOtherDialect(Mutant):
    """Softmax over the axis of the other dialect, with its passes."""

    def softmax_axis(self, c: Any) -> int | None:
        axis = super().softmax_axis(c)
        return axis if axis is None else -3 - axis


class OnePassMoreOrLess(Mutant):
    """41 passes for 40, 40 for 41."""

    def passes(self, c: Any) -> list[int]:
        every = list(self.axes(c)) * self.iterations(c)
        return every[1:] if len(super().passes(c)) == len(every) else every


class NoEps(Mutant):
    """eps dropped."""

    def eps(self, c: Any) -> float:
        return 0.0


class LargeEps(Mutant):
    """eps 100 times larger."""

    def eps(self, c: Any) -> float:
        return 100 * c.eps


class EndsOnRows(Mutant):
    """Ends on rows."""

    def iterate(self, p: Tensor, c: Any) -> Tensor:
        return self.normalise(super().iterate(p, c), self.axes(c)[0], c)


class ClipForAdd(Mutant):
    """clip for add."""

    def start(self, logits: Tensor, c: Any) -> Tensor:
        axis = self.softmax_axis(c)
        return super().start(logits, c) if axis is None else self.softmax(logits, axis, c)

    def guarded(self, total: Tensor, c: Any) -> Tensor:
        return total.clamp(min=c.eps) if c.guard in ("add", "denominator") else super().guarded(total, c)


class AddForDenominator(Mutant):
    """eps added to the start too, where only denominators have it."""

    def start(self, logits: Tensor, c: Any) -> Tensor:
        p = super().start(logits, c)
        return p + self.eps(c) if c.guard == "denominator" else p


class NoLogitLimit(Mutant):
    """The logits' limit dropped."""

    def limited(self, logits: Tensor, c: Any) -> Tensor:
        return logits


class Transposed(Mutant):
    """H transposed."""

    def matrix(self, logits: Tensor, c: Any, kept: torch.dtype) -> Tensor:
        return super().matrix(logits, c, kept).transpose(-1, -2)


class NarrowSinkhorn(Mutant):
    """Sinkhorn in bfloat16."""

    def sinkhorn(self, logits: Tensor, c: Any) -> Tensor:
        return super().sinkhorn(logits.to(torch.bfloat16), c).to(logits.dtype)


class NoShift(Mutant):
    """No shift by the maximum."""

    def shift(self, logits: Tensor, axis: int, c: Any) -> Tensor:
        return logits


class LastIterationOnly(Mutant):
    """Gradient through the last iteration only."""

    def iterate(self, p: Tensor, c: Any) -> Tensor:
        *early, first, second = self.passes(c) if c.iterations > 1 else [*self.passes(c), None, None]
        before = p
        for axis in early:
            before = self.normalise(before, axis, c)
        before = p + (before - p).detach()
        return self.normalise(self.normalise(before, first, c), second, c) if c.iterations > 1 else before


class ImplicitGradient(Mutant):
    """Implicit-function gradient of Sinkhorn."""

    def sinkhorn(self, logits: Tensor, c: Any) -> Tensor:
        return _Converged.apply(logits, super().sinkhorn(logits.detach(), c))  # type: ignore[return-value]


class _Converged(torch.autograd.Function):
    """H as given, with the gradient of the limit of infinitely many iterations."""

    @staticmethod
    def forward(ctx, logits, H):  # type: ignore[override]
        ctx.save_for_backward(H)
        return H.clone()

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        (H,) = ctx.saved_tensors
        n, p, weighted = H.shape[-1], H.double(), (g * H).double()
        system = torch.cat(
            [
                torch.cat([torch.diag_embed(p.sum(-1)), p], -1),
                torch.cat([p.transpose(-1, -2), torch.diag_embed(p.sum(-2))], -1),
            ],
            -2,
        )
        sums = torch.cat([weighted.sum(-1), weighted.sum(-2)], -1)[..., None]
        duals = (torch.linalg.pinv(system, hermitian=True) @ sums).squeeze(-1)
        return (weighted - p * (duals[..., :n, None] + duals[..., None, n:])).to(g.dtype), None
