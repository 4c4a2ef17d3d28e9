"""Honest ways to evaluate the same layer: the choices that are free to a careful implementation.

`conformance.selftest.arithmetic.Choice` has a list of choices too, and several of them are these. The lists stay two.
`Style` belongs to the formulas of the oracle, in NumPy, and its ensemble makes the bounds; `Choice` belongs to a layer
in PyTorch that is derived by autograd, and its variants test the bounds. If one list were made from the other, a choice
forgotten in the bounds would be forgotten in their test.
"""

from __future__ import annotations

from dataclasses import dataclass

GATES = ("pre", "post", "H")
"""Outputs whose scale is 1, whatever their largest value is."""
K_FLOAT32, K_ROUNDED = 32.0, 4.0
"""Multiples of the honest error: K_ROUNDED where narrow intermediates dominate it (docs/bound.md, "The bound")."""
K_STACK = 8.0
"""For a stack under a narrow x: streams are stored between its sites, and a rounding that flips there moves all that
follows by a whole unit. At 4 released code (vllm's mhc_pre_delayed_torch, two sites in bfloat16) came to 1.15."""
SUMS = "H stochastic"
"""The name of the bound of H's sums along the axis that is normalised last."""
K_SUMS = 4.0
ORDERS = ("forward", "backward", "pairwise", "lanes4", "lanes8", "scattered")


@dataclass(frozen=True)
class Style:
    """One honest evaluation; in exact arithmetic every style gives the same value.

    Attributes:
        order: order of summation, one of `ORDERS`.
        log_domain: Sinkhorn and softmax are evaluated on logarithms.
        potentials: Sinkhorn is evaluated on the logarithms of the scalings of rows and columns, if no eps guards a sum.
        norm_after: the norm is divided out after the projection.
        reciprocal: a division is a multiplication by the reciprocal.
        round_logits: where coefficients are kept in the activations' dtype, the logits and their gradients are too.
        round_weights: there, weights are used, and their gradients made, in that dtype.
        round_products: narrow products are rounded before they are summed in a gradient.
        round_parts: the parts of a gradient are rounded before they are added.
        round_sums: there, a gradient that is a sum over tokens is added up in that dtype.
        round_gates: there, every step of a gate and of its derivative is rounded, as a narrow sigmoid is made.
    """

    order: str = "forward"
    log_domain: bool = False
    potentials: bool = False
    norm_after: bool = False
    reciprocal: bool = False
    round_logits: bool = False
    round_weights: bool = False
    round_products: bool = False
    round_parts: bool = False
    round_sums: bool = False
    round_gates: bool = False


def ensemble() -> tuple[Style, ...]:
    """The sixteen members, a fixed design: each choice meets each other choice."""
    return tuple(
        Style(
            order=ORDERS[k % len(ORDERS)],
            log_domain=k % 4 == 3,
            potentials=k % 8 == 5,
            norm_after=(k // 2) % 2 == 1,
            reciprocal=(k // 3) % 2 == 1,
            round_logits=(k // 4) % 2 == 1,
            round_weights=k % 2 == 1,
            round_products=(k // 2 + k) % 2 == 1,
            round_parts=(k // 8 + k) % 2 == 1,
            round_sums=k % 4 >= 2,
            round_gates=(k // 2 + k // 8) % 2 == 1,
        )
        for k in range(16)
    )
