"""Whether a tensor in a narrow dtype is as a whole too large or too small: what no element can show (docs/bound.md).

In bfloat16 a factor of 1.001 is less than half of a rounding. Over many tokens roundings average out, since a number is
as often rounded up as down, and a factor doesn't.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from conformance.judge.rule import NARROW, UNIT_ROUNDOFF, Check, verdict_of, wide

NAME = "scale"
"""The end of the check's name, after the tensor's."""
CONTRACTS = ("float32", "mixing")
"""Under ``activation`` each step of a gate is rounded: near 1 that is no longer as often up as down."""
Z = 7.0
"""Deviations of a sum of independent symmetric numbers that it exceeds once in 2e10 cases: 2 exp(-Z^2/2)."""
FEWEST = 64
"""Tokens; a sum of Z^2 = 49 numbers can't exceed Z of its own deviations, whatever they are."""
SECOND_ORDER = 16.0
"""A rounded number's reciprocal, square or product with itself is off on the average, by a few u^2."""
FLOAT32 = 32 * 2.0**-24
"""What the computation before the last rounding may be off by in one direction, as a fraction of the largest value."""


@dataclass
class Scale:
    """Takes a tensor a tile at a time.

    With a the results and e the true values, the factor that fits best is 1 + sum (a - e) e / sum e^2. Elements of one
    token may be off together, since they share gates; tokens share nothing that is rounded.

    Args:
        dtype: that of the tensor.
        contract: the variant's.
    """

    dtype: np.dtype
    contract: str
    errors: list[np.ndarray] = field(default_factory=list[np.ndarray])
    """sum (a - e) e of each token."""
    energies: list[np.ndarray] = field(default_factory=list[np.ndarray])
    """sum e^2 of each token."""
    absolute: float = 0.0
    largest: float = 0.0

    @property
    def applies(self) -> bool:
        """Whether anything can be said of tensors in this dtype under this contract."""
        return self.dtype in NARROW and self.contract in CONTRACTS

    def add(self, actual: np.ndarray, expected: np.ndarray) -> None:
        """``[tokens, …]`` of finite numbers."""
        if not self.applies:
            return
        true = expected.reshape(len(expected), math.prod(expected.shape[1:]))
        off = wide(actual).reshape(true.shape) - true
        self.errors.append(np.einsum("tk,tk->t", off, true))
        self.energies.append(np.einsum("tk,tk->t", true, true))
        self.absolute += float(np.abs(true).sum())
        self.largest = max(self.largest, float(np.abs(true).max(initial=0.0)))

    def check(self, tensor: str) -> Check | None:
        """The check; None where it says nothing: another dtype or contract, too few tokens, or nothing but zeros."""
        if not self.errors:
            return None
        errors, energies = np.concatenate(self.errors), np.concatenate(self.energies)
        total, tokens = float(energies.sum()), len(energies)
        if tokens < FEWEST or not total:
            return None
        deviation = float(errors.sum()) / total
        allowed = self._allowed(errors - deviation * energies, total)
        check = Check(f"{tensor} {NAME}", "passed", abs(deviation) / allowed, abs(deviation), allowed)
        check.verdict = verdict_of(check.ratio)
        if check.verdict == "failed":
            check.message = (
                f"too {'large' if deviation > 0 else 'small'} as a whole, by a factor of {1 + deviation:.7g}"
            )
        return check

    def _allowed(self, rest: np.ndarray, total: float) -> float:
        """How far the factor may be from 1.

        Args:
            rest: what remains of each token's error beside the common factor.
        """
        tokens = len(rest)
        # Z deviations of the sum itself come to this many of what remains once the mean is taken out.
        factor = Z * math.sqrt((tokens - 1) / (tokens - Z * Z))
        spread = factor * math.sqrt(float(np.square(rest).sum()) * tokens / (tokens - 1)) / total
        systematic = FLOAT32 * self.largest * self.absolute / total
        return spread + systematic + SECOND_ORDER * UNIT_ROUNDOFF[self.dtype] ** 2
