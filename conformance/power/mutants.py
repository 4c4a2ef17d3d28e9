"""The mistakes that the suite must notice: each overrides one step of `plain.Plain` (conformance.md, "Mutants").

``blind`` gives, for a dtype in which a mutant can't be seen in principle, the reason with its figure.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from conformance.power.plain import Choice, Plain, Values
from conformance.power.sums import Sums


class Mutant(Plain):
    """One planted mistake; the class's docstring says which."""

    blind: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        super().__init__(type(self).title())

    @classmethod
    def title(cls) -> str:
        return " ".join((cls.__doc__ or cls.__name__).split()).rstrip(".")


# Sinkhorn


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


# Mixing and the layer


class NotApplied(Mutant):
    """H not applied."""

    def mixed(self, H: Tensor, x: Tensor, c: Any) -> Tensor:
        return x + 0 * super().mixed(H, x, c)


class NoPostGate(Mutant):
    """No post gate."""

    def context(self, x: Tensor, post: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + 0 * post, H


class RoundedTwice(Mutant):
    """Mixed sum rounded twice."""

    blind: ClassVar[dict[str, str]] = {
        "float32": "both terms are float32 already, so that the first rounding changes nothing"
    }

    def rounds_both(self, c: Any) -> bool:
        return True


class MeanForSum(Mutant):
    """Mean for sum (sum where it is the mean)."""

    def share(self, c: Any, how: str) -> float:
        return super().share(c, "mean" if how == "sum" else "sum")


class NotTransposedBack(Mutant):
    """x's gradient not transposed through H."""

    def mixed(self, H: Tensor, x: Tensor, c: Any) -> Tensor:
        value = super().mixed(H, x.detach(), c)
        if c.mix == "identity":
            return super().mixed(H, x, c)
        other = super().mixed(H.detach().transpose(-1, -2), x, c)
        return value + (other - other.detach())


class OwnPre(Mutant):
    """Single pass with its own pre."""

    def reads_with(self, pre: Tensor, given: Values, c: Any) -> Tensor:
        return pre if c.pre_from == "own" else pre + 0 * given["carried"]


class CarriedGradientCut(Mutant):
    """Gradient of the carried pre cut."""

    def reads_with(self, pre: Tensor, given: Values, c: Any) -> Tensor:
        found = super().reads_with(pre, given, c)
        return found.detach() if c.pre_from == "previous" else found


class NarrowCarried(Mutant):
    """Carried pre in bfloat16."""

    def reads_with(self, pre: Tensor, given: Values, c: Any) -> Tensor:
        found = super().reads_with(pre, given, c)
        return found.to(torch.bfloat16).to(found.dtype) if c.pre_from == "previous" else found


class StartsWithAll(Mutant):
    """Single pass that starts with all streams, not stream 0."""

    def one_hot(self, x: Tensor) -> Tensor:
        return torch.ones_like(super().one_hot(x))


class StaleContext(Mutant):
    """Stale context from an earlier call."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def context(self, x: Tensor, post: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.shape, x.dtype, post.dtype)
        found = self._kept.get(key, (post, H))
        self._kept[key] = (post.detach(), H.detach())
        return found


class ChangesItsInput(Mutant):
    """In-place change of x."""

    def gates(self, x: Tensor, weights: Values, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = super().gates(x, weights, c)
        if x.is_leaf:
            x.data.mul_(0.5)
        return found


MUTANTS: tuple[type[Mutant], ...] = tuple(Mutant.__subclasses__())
