"""The layer's heavy parts as Pallas kernels for TPUs, each with a derivative of its own.

A kernel does what touches x, whose n*C numbers a token are nearly all that a site moves; what is small, m + 1 numbers a
token, stays with XLA and is the plain path's own code (`projections`, `residual`). In units of one stream, n = 4::

    reading.read      x -> u, sums                                        # reads 4, writes 1
    spreading.spread  y, x, post, H -> out                                # reads 5, writes 4
    spreading.pulled  cotangent of out, x, y -> those of y, post, H       # reads 9, writes 1
    reading.pulled    cotangents of u, sums and out, x -> those of x, phi # reads 9, writes 4

* `site`: from x to u and the coefficients; keeps x and m + 1 sums a token;
* `mixing`: from y, x and the coefficients to the streams; keeps its inputs.

x's cotangent is written once, where `mixing` alone would write it and `site` read it again: `site` returns x a second
time, for `mixing` only (`functional.Context.tied`), and what comes back for it is the cotangent of the streams.

Off a TPU the kernels run in Pallas' interpret mode. Each has a plain twin of operators, which serves derivatives of
derivatives (`twins`). Forward mode is refused, as by the plain path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from jax_impl.config import MHCConfig
from jax_impl.projections import Shards

BACKENDS = ("auto", "plain", "pallas")
DTYPES = ("bfloat16", "float32")
MOST_STREAMS = 8
"""Of more, H alone has more than 64 numbers a token, each a column of its own in the kernels."""
PRECISIONS = (None, jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT, "highest", "default")
"""Those that products within a kernel can have."""


def chosen(backend: str, reason: str) -> bool:
    """Whether a call runs the kernels.

    Args:
        backend: ``"auto"`` and ``"plain"`` don't: the kernels were never timed on a TPU.
        reason: why the kernels can't serve the call (`hindrance`); empty where they can.

    Raises:
        ValueError: ``backend`` is another word, or ``"pallas"`` and there is a reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "pallas" and reason:
        raise ValueError(f"backend='pallas' doesn't go with {reason}: take 'auto', which then runs the plain path")
    return backend == "pallas"


def hindrance(
    config: MHCConfig,
    shards: Shards | None,
    precision: jax.lax.PrecisionLike = None,
    **arrays: Array | None,
) -> str:
    """Why the kernels can't serve a call; empty where they can. Whether a block fits is seen where it is made.

    Args:
        arrays: what is read and written by the kernels, by name.
    """
    for name, value in arrays.items():
        if value is not None and jnp.dtype(value.dtype).name not in DTYPES:
            return f"{name} in {value.dtype}, only with {' and '.join(DTYPES)}"
    if config.streams > MOST_STREAMS:
        return f"{config.streams} streams, only with up to {MOST_STREAMS}"
    if precision not in PRECISIONS:
        return f"precision={precision}, only with HIGHEST and DEFAULT"
    mesh = jax.sharding.get_abstract_mesh()
    shared = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    if shards is None and any(mesh.shape[name] > 1 for name in shared):
        return f"a mesh ({', '.join(shared)}) without shards, which say what of x each device has"
    return ""
