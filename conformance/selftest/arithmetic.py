"""The operations that all steps of the plain layer share, each in the form that a choice names.

`conformance.oracle.style.Style` lists such choices too, and several are the same. The lists stay two: the ensemble of
styles makes the bounds, and the variants made of `Choice` test them, so that neither may be derived from the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from conformance.selftest.sums import Sums


@dataclass(frozen=True)
class Choice:
    """The choices that are free to a careful implementation; in exact arithmetic all give the same value.

    Attributes:
        sums: how sums and contractions are ordered.
        log_domain: Sinkhorn on logarithms (where eps is not added to a sum, which has no such form).
        potentials: Sinkhorn on the logarithms of the scalings of rows and columns, where logits are at most
            ``POTENTIALS_UP_TO`` in `conformance.oracle.residual`.
        reciprocal: multiply by a reciprocal instead of dividing.
        norm_after: multiply the norm weight into the projections, divide by the root mean square after them.
        fused: one projection for pre, post and the residual matrix, sliced afterwards.
        exp2: exp(x) as 2^(x log2 e), as GPU kernels do.
        round_weights, round_logits: under coefficients in the activations' dtype, these are too.
        tokens: seed of a permutation of the tokens, 0 for none.
        tf32: operands of the projections rounded to 10 bits; claims the ``tf32`` contract alone.
    """

    sums: Sums = field(default_factory=Sums)
    log_domain: bool = False
    potentials: bool = False
    reciprocal: bool = False
    norm_after: bool = False
    fused: bool = False
    exp2: bool = False
    round_weights: bool = True
    round_logits: bool = False
    tokens: int = 0
    tf32: bool = False


class Arithmetic:
    """The elementary operations, each in the form that the choice names."""

    choice = Choice()

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def exp(self, a: Tensor) -> Tensor:
        return torch.exp2(a * 1.4426950408889634) if self.choice.exp2 else torch.exp(a)

    def divide(self, a: Tensor, b: Tensor) -> Tensor:
        return a * (1 / b) if self.choice.reciprocal else a / b
