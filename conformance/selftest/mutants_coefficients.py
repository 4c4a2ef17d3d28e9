"""Mistakes in the gates, in the norm and in the projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conformance.selftest.mutant import Mutant
from conformance.selftest.plain import Choice, Values
from conformance.selftest.sums import Sums

# Gates


class NoPreEps(Mutant):
    """pre_eps dropped."""

    def pre_gate(self, z: Tensor, c: Any) -> Tensor:
        return self.sigmoid(z)


class NoPostEps(Mutant):
    """post_eps dropped."""

    def post_gate(self, z: Tensor, c: Any) -> Tensor:
        return c.post_scale * self.sigmoid(z)


class PostScaleOne(Mutant):
    """post_scale 1."""

    def post_gate(self, z: Tensor, c: Any) -> Tensor:
        return self.sigmoid(z) + c.post_eps


class SwappedSlices(Mutant):
    """pre and post slices swapped."""

    def slices(self, h: Values) -> Values:
        return {**h, "pre": h["post"], "post": h["pre"]} if "pre" in h else h


class ScaledBias(Mutant):
    """α applied to the bias."""

    def logits(self, h: Tensor, alpha: Tensor, beta: Tensor, kept: torch.dtype) -> Tensor:
        return super().logits(h, alpha, beta * alpha, kept)


class TransposedBias(Mutant):
    """b_res transposed."""

    def bias(self, kind: str, weights: Values) -> Tensor:
        value = weights[f"{kind}_beta"]
        return value.T if value.ndim == 2 else value


class AlphaFromOneRow(Mutant):
    """Gradient of α from one batch row."""

    def alpha(self, kind: str, weights: Values, h: Tensor) -> Tensor:
        value = weights[f"{kind}_alpha_scale"]
        rows = torch.arange(h.shape[0]).reshape(-1, *[1] * (h.ndim - 1)) == 0
        return torch.where(rows, value, value.detach())


class HeadWithTheLayersEps(Mutant):
    """Head with the layer's norm eps, where it has its own."""

    def of_head(self, c: Any) -> Any:
        return super().of_head(type(c)(**{**vars(c), "head_norm_eps": None}))


class HeadWithoutEps(Mutant):
    """Head without eps."""

    def head_gate(self, z: Tensor, c: Any) -> Tensor:
        return self.sigmoid(z)


# Norm and projection


class EpsOutsideTheRoot(Mutant):
    """Norm eps outside the root (inside where it is outside)."""

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        other = "root" if c.norm_eps_position == "mean" else "mean"
        return super().rms(flat, type(c)(**{**vars(c), "norm_eps_position": other}))


class LargeNormEps(Mutant):
    """Norm eps 10 times larger."""

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        return super().rms(flat, type(c)(**{**vars(c), "norm_eps": 10 * c.norm_eps}))


class NoNormWeight(Mutant):
    """w ignored."""

    def scale(self, weights: Values, c: Any) -> Tensor | None:
        return None


class NormEpsOfSinkhorn(Mutant):
    """Norm eps taken from Sinkhorn's eps."""

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        eps = c.norm_eps if c.eps is None else c.eps
        return super().rms(flat, type(c)(**{**vars(c), "norm_eps": eps}))


class OnePlusW(Mutant):
    """1 + w for w."""

    def scale(self, weights: Values, c: Any) -> Tensor | None:
        w = super().scale(weights, c)
        return None if w is None else 1 + w


class NormPerStream(Mutant):
    """Norm per stream."""

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        streams = flat.unflatten(-1, (c.streams, c.dim))
        return super().rms(streams, c).expand(streams.shape).flatten(-2)


class NarrowAccumulation(Mutant):
    """Projection accumulated in bfloat16."""

    choice = Choice(sums=Sums("sequential", block=8))

    def contract(self, a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.bfloat16)
        for x, y in zip(a.split(8, -1), b.split(8, 0), strict=True):
            total = total + (x @ y).to(torch.bfloat16)
        return total.to(a.dtype)


class Tf32(Mutant):
    """TF32 where float32 is claimed."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = Choice(tf32=True)  # after the claims were made: the contract tf32 isn't among them


class ConstantDenominator(Mutant):
    """Gradient of the norm's denominator dropped."""

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        return super().rms(flat, c).detach()


class FoldedGradient(Mutant):
    """Gradient of w folded into φ's."""

    choice = Choice(norm_after=True)

    def fold(self, w: Tensor, phi: Tensor) -> Tensor:
        folded = w[:, None] * phi
        product = phi + (folded - phi).detach()  # what is trained is w φ, and φ gets its gradient
        own = w[:, None] * phi.detach()
        return product + (own - own.detach())


class BatchDependent(Mutant):
    """Result depends on the batch a token is in."""

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        own = super().rms(flat, c)
        return own.mean(0, keepdim=True).expand_as(own) if flat.shape[0] > 1 else own
