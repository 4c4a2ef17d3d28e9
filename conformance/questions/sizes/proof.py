"""How far the float64 truth of a size is from the proved values, at chosen tokens.

Ball arithmetic evaluates the tokens at which something changes: the first, the last, both sides of the edges of blocks,
and a few drawn ones. What doesn't depend on other tokens is compared there; the gradients of the weights are compared
as sums over these tokens alone, and the sum over all tokens can't be off by more than as many times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conformance.questions.sizes.bound import at, products
from conformance.questions.sizes.tensors import Tensors
from conformance.questions.sizes.truth import Truth, Wide, evaluated

EDGES = (16, 32, 64, 128, 256, 512, 1024, 4096)
"""Blocks that implementations cut tokens into."""
DRAWN = 8
LARGEST_PROJECTION = 1 << 23
"""Products in the projections of one token beyond which no token is evaluated: each is a ball of 100 bytes."""
ONCE, PRODUCT, ELEMENT = 1.4e-6, 0.15e-6, 11e-6
"""Seconds, roughly: for a number of a projection once, for each of its products, and for an element of x."""


@dataclass(frozen=True)
class Proof:
    """The largest errors of a truth, as fractions of each tensor's scale, and how many tokens were looked at."""

    tokens: int
    errors: dict[str, float]


def chosen_tokens(tensors: Tensors, most: int) -> list[int]:
    """The first and the last token, both sides of the first and of the last edge of each block, and drawn ones.

    Args:
        most: how many are taken, in this order; the drawn ones come after the first two.
    """
    total = tensors.size.tokens
    edges = [edge for block in EDGES for edge in (block, (total - 1) // block * block) if 0 < edge < total]
    drawn = tensors.source.uniform("proved tokens", 0, DRAWN, 0, total - 1)
    wanted = [0, total - 1, *(int(token) for token in drawn), *(token for edge in edges for token in (edge - 1, edge))]
    return sorted(list(dict.fromkeys(wanted))[:most])


def affordable(tensors: Tensors, seconds: float) -> int:
    """How many tokens ball arithmetic evaluates in about so many seconds; 0 where a projection alone is too large."""
    projections, width = products(tensors), tensors.size.streams * tensors.size.dim
    if projections > LARGEST_PROJECTION:
        return 0
    return max(1, int((seconds - projections * ONCE) / (projections * PRODUCT + width * ELEMENT)))


def prove(tensors: Tensors, truth: Truth, tokens: Sequence[int]) -> Proof:
    """Compares a truth with ball arithmetic.

    Raises:
        ImportError: python-flint, of the extra ``regenerate``, is missing.
    """
    from conformance.oracle.balls import BallArithmetic, enclosed

    inputs, cotangents = at(tensors, tokens)
    proved = enclosed(lambda: _without_magnitudes(evaluated(tensors, inputs, cotangents, BallArithmetic())))
    here = evaluated(tensors, inputs, cotangents, Wide())
    scales, errors = truth.scales, dict[str, float]()
    for name, (value, radius) in proved.items():
        if name in truth.sums:
            # the error of a sum over all tokens, if each of them adds as much as those that were looked at
            error = np.max(np.abs(here[name] - value) + radius, initial=0.0) * (tensors.size.tokens / len(tokens))
        else:
            error = np.max(np.abs(truth.tokens[name][list(tokens)] - value) + radius, initial=0.0)
        errors[name] = float(error) / (scales[name] or 1.0)
    return Proof(len(tokens), errors)


def _without_magnitudes(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Only what a truth is judged by; magnitudes are an allowance."""
    return {name: value for name, value in values.items() if not name.startswith("m/")}
