"""From one site to the next: the streams that a site writes, and what the next site reads of them, in one call::

    x = post(y, context)                            # [..., n, dim]
    u, context, carried = pre(x, weights, config)

By kernels the streams are projected while they are written, so that x is read once less: 28 C bytes a token for 36 C,
with four streams of C channels in bfloat16. By any other backend this is the two calls.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from torch_impl import functional
from torch_impl.config import MHCConfig
from torch_impl.functional import Context
from torch_impl.fused.crossing import Crossing, TracedCrossing
from torch_impl.fused.site import Reading
from torch_impl.fused.transforms import called
from torch_impl.projections import Weights, layer_names, packed_gates
from torch_impl.residual import check_shape, without_autocast
from torch_impl.streams import expanded, rounded_gates


def post_pre(
    y: Float[Tensor, "... dim"],
    context: Context,
    weights: Weights,
    config: MHCConfig,
    carried: Float[Tensor, "... streams"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "... dim"], Context, Float[Tensor, "... streams"] | None]:
    """Computes `functional.post` of a site and `functional.pre` of the next.

    Args:
        y: ``[..., dim]``, the output of the sub-layer between them.
        context: the one that the site's `functional.pre` returned.
        weights: of the next site.
        config: of the next site; streams and dim are those of the site before.
        carried: as for `functional.pre` of the next site.
        backend: as for `functional.pre`.

    Returns:
        What `functional.pre` of the next site returns.

    Raises:
        ValueError: as `functional.post` and `functional.pre`.
    """
    if backend != "triton":
        return functional.pre(functional.post(y, context), weights, config, carried, backend=backend)
    x, mixer = context.x, context.config
    held, _ = functional.check_site(x, weights, config, carried)
    check_shape("y", y, (config.dim,))
    gates, H = rounded_gates(x, context.post, context.H, mixer)
    y, gates, H = expanded(y, x, gates, None if mixer.mix == "identity" else H)
    others = (y, gates, *(() if H is None else (H,)), *held.values(), *(() if carried is None else (carried,)))
    name = functional.engine_of(backend, x, others, config, context.shards)
    with without_autocast(x.device):
        names = layer_names(config)
        scale, shift = packed_gates(x, held, names, config)
        phis = [held[phi] for phi, _, _ in names]
        inputs = (y, x, gates, H, mixer, carried, Reading(config, name), scale, shift, held.get("mhc_norm.scale"))
        u, own, post, H, x, _ = called(Crossing, TracedCrossing, *inputs, *phis)
    return u, Context(x, post, H, config, None, backend), own if carried is not None else None
