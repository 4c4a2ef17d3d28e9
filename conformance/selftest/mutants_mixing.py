"""Mistakes in mixing, in what a site hands on, and in the layer as a whole."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from conformance.selftest.mutant import Mutant
from conformance.selftest.plain import Values


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

    def reads_with(self, pre: Tensor, values: Values, c: Any) -> Tensor:
        return pre if c.pre_from == "own" else pre + 0 * values["carried"]


class CarriedGradientCut(Mutant):
    """Gradient of the carried pre cut."""

    def reads_with(self, pre: Tensor, values: Values, c: Any) -> Tensor:
        result = super().reads_with(pre, values, c)
        return result.detach() if c.pre_from == "previous" else result


class NarrowCarried(Mutant):
    """Carried pre in bfloat16."""

    def reads_with(self, pre: Tensor, values: Values, c: Any) -> Tensor:
        result = super().reads_with(pre, values, c)
        return result.to(torch.bfloat16).to(result.dtype) if c.pre_from == "previous" else result


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
        result = self._kept.get(key, (post, H))
        self._kept[key] = (post.detach(), H.detach())
        return result


class ChangesItsInput(Mutant):
    """In-place change of x."""

    def gates(self, x: Tensor, weights: Values, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        result = super().gates(x, weights, c)
        if x.is_leaf:
            x.data.mul_(0.5)
        return result
