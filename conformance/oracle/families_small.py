"""Cases of one point each: faint entries of H, iterations beyond the twentieth, streams as `expand` leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from conformance.oracle import data
from conformance.oracle.build import CORE, Wish
from conformance.oracle.data import Draws

NARROWEST = "float16-float32"
DENSE = ("layer", {"branch": "mlp_dense"})


def faint(name: str, p: dict[str, Any], draws: Draws) -> Wish:
    """Stream 0 is large and hardly mixed in: what H's smallest entries let through is as large as the rest of out."""
    width, shape = 2.0**-10, (3, 4, 4, 8)
    streams = np.array([2.0**13, width, width, width])[:, None]
    H = draws.uniform(f"faint/H/{name}", (3, 4, 4, 4), 128, 255)  # 8 bits
    H[..., 0, :] *= 2.0**-32  # 3.0e-8 to 5.9e-8
    H[..., 1:, :] *= 2.0**-9
    # In float16 such an entry is no number: where H is rounded to x's dtype it is lost by right.
    variants = [v for v in CORE if v != NARROWEST or p["mixing"] == "float32"]
    return Wish(
        "faint", "entries of H below 1e-7 that a large stream shows: flushed, or lost in a sum", "Forward", name,
        stages=["post"], variants=variants,
        tensors={
            "x": data.shared_grid(draws.normal(f"faint/x/{name}", shape) * streams),
            "y": data.shared_grid(draws.normal(f"faint/y/{name}", (3, 4, 8)) * width),
            "post": np.full((3, 4, 4), 0.5, np.float32),
            "H": np.asarray(np.swapaxes(H, -1, -2) if p["mix"] == "out-in" else H, np.float32),
        },
    )  # fmt: skip


def fifty_iterations(logits: np.ndarray, draws: Draws) -> Iterator[Wish]:
    """Logits that have not converged after 20 iterations, in rows that begin with either axis, with an eps and without.

    Args:
        logits: ``[4, 4]``, which converge slowly where rows come first.
    """
    for name in ("paper", "deepseek-v4", "liger", "transformer-engine"):
        turned = logits.T if name == "paper" else logits
        yield Wish(
            "slowest", "fifty iterations of what converges slowly: a loop that ends at 20", "The residual matrix", name,
            "n4-fifty", stages=("residual_matrix", "coefficients"), overrides={"iterations": 50},
            variants=("float32-float32", "bfloat16-float32", NARROWEST),
            tensors={"logits": data.shared_grid(draws.shuffled(f"fifty/{name}", turned, (3, 4)))},
            weights={"res_beta": turned, "res_alpha_scale": 2.0**-7},
        )  # fmt: skip


def expanded(name: str, draws: Draws) -> Wish:
    """All streams are equal, so that a caller may hand them over with the stride 0, as after ``expand``."""
    one = draws.normal(f"expanded/x/{name}", (3, 4, 1, 8))
    return Wish(
        "expanded", "streams that are equal, with the stride 0 between them: read as packed, or written into",
        "Forward", name, stages=["coefficients", "pre", "post", DENSE], variants=CORE,
        tensors={"x": data.shared_grid(np.broadcast_to(one, (3, 4, 4, 8)))},
    )  # fmt: skip
