"""How far the float64 truth of a size is from the proved values, at chosen tokens.

Ball arithmetic evaluates the tokens at which something changes: the first, the last, both sides of the edges of blocks,
and a few drawn ones. What doesn't depend on other tokens is compared there; the gradients of the weights are compared
as sums over these tokens alone, and the sum over all tokens can't be off by more than as many times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conformance.questions.sizes.bound import at
from conformance.questions.sizes.tensors import Tensors
from conformance.questions.sizes.truth import Truth, Wide, evaluated

EDGES = (16, 32, 64, 128, 256, 512, 1024, 4096)
"""Blocks that implementations cut tokens into."""
DRAWN = 8


@dataclass(frozen=True)
class Proof:
    """The largest errors of a truth, as fractions of each tensor's scale, and how many tokens were looked at."""

    tokens: int
    errors: dict[str, float]


def chosen_tokens(tensors: Tensors, most: int) -> list[int]:
    """The first and the last token, both sides of the first and of the last edge of each block, and drawn ones.

    Args:
        most: how many are taken, in this order.
    """
    total = tensors.size.tokens
    edges = [edge for block in EDGES for edge in (block, (total - 1) // block * block) if 0 < edge < total]
    drawn = tensors.source.uniform("proved tokens", 0, DRAWN, 0, total - 1)
    wanted = [0, total - 1, *(token for edge in edges for token in (edge - 1, edge)), *(int(token) for token in drawn)]
    return sorted(dict.fromkeys(wanted[:most] if most < len(wanted) else wanted))


def prove(tensors: Tensors, truth: Truth, tokens: Sequence[int]) -> Proof:
    """Compares a truth with ball arithmetic.

    Raises:
        ImportError: python-flint, of the extra ``regenerate``, is missing.
    """
    from conformance.oracle.balls import BallArithmetic, certified

    inputs, cotangents = at(tensors, tokens)
    proved = certified(lambda: evaluated(tensors, inputs, cotangents, BallArithmetic()), tensors.size.id)
    here = evaluated(tensors, inputs, cotangents, Wide())
    scales, errors = truth.scales, dict[str, float]()
    for name, value in proved.items():
        if name.startswith("m/"):
            continue
        if name in truth.sums:
            # the error of a sum over all tokens, if each of them adds as much as those that were looked at
            error = np.max(np.abs(here[name] - value), initial=0.0) * (tensors.size.tokens / len(tokens))
        else:
            error = np.max(np.abs(truth.tokens[name][list(tokens)] - value), initial=0.0)
        errors[name] = float(error) / (scales[name] or 1.0)
    return Proof(len(tokens), errors)
