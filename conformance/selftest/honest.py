"""Seeded honest variants of the plain implementation: none of them may fail.

Left out because it isn't honest here: the sigmoid by way of tanh, whose absolute error of 2^-25 is all of a closed
gate (`closed-gate`).
"""

from __future__ import annotations

import random

from conformance.selftest.plain import Choice, Plain
from conformance.selftest.sums import ORDERS, Sums


def choice(seed: int) -> Choice:
    """The choices of variant ``seed``; the first is the plain one, every tenth claims TF32."""
    if seed == 0:
        return Choice()
    draw = random.Random(seed)
    after = draw.random() < 0.5
    return Choice(
        sums=Sums(draw.choice(ORDERS), draw.choice((1, 2, 4, 8, 16, 64)), draw.randrange(1, 1 << 30)),
        log_domain=draw.random() < 0.3,
        potentials=seed % 8 == 5,
        reciprocal=draw.random() < 0.3,
        norm_after=after,
        fused=draw.random() < 0.5,
        exp2=draw.random() < 0.3,
        round_weights=draw.random() < 0.5,
        round_logits=draw.random() < 0.5,
        tokens=draw.randrange(1, 1 << 30) if draw.random() < 0.4 else 0,
        tf32=seed % 10 == 0,
    )


def variant(seed: int) -> Plain:
    return Plain(f"honest-{seed}", choice(seed))
