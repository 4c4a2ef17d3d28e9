"""mHC in JAX: plain functions and modules. Nothing here imports PyTorch or the conformance suite. In a model::

config = MHCConfig(streams=4, dim=7168)                 # the paper's layer; from_dialect makes the others
layer = ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0))
x = expand(embedding, config.streams)                   # [batch, seq, dim] -> [batch, seq, streams, dim]
x, _ = layer(norm, branch, x, HyperConnectionType.MLP_DENSE)    # calls branch(inputs=norm(u))
x = reduce(x, "sum")                                    # [batch, seq, dim]
"""

try:
    from jax_impl.config import MHCConfig
    from jax_impl.ends import expand, one_hot, reduce
    from jax_impl.functional import (
        Context,
        coefficients,
        head,
        post,
        post_mix,
        pre,
        pre_mix,
        rms_norm,
    )
    from jax_impl.health import composite, drifting, gains, site_health, stack_health
    from jax_impl.models import load_model, save_model
    from jax_impl.modules import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections
    from jax_impl.residual import permutations, residual_matrix, sinkhorn
    from jax_impl.weights import from_flat, load_weights, save_weights
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("jax", "jaxlib", "flax"):
        raise
    reason = f"jax_impl needs JAX and Flax, and {error.name} is missing: pip install 'mhc-conformance[jax]'"
    raise ModuleNotFoundError(reason, name=error.name) from None

from jax_impl.version import version

__version__ = version()
__all__ = [
    "Context",
    "HyperConnectionType",
    "HyperHead",
    "MHCConfig",
    "ManifoldConstrainedHyperConnections",
    "__version__",
    "coefficients",
    "composite",
    "drifting",
    "expand",
    "from_flat",
    "gains",
    "head",
    "load_model",
    "load_weights",
    "one_hot",
    "permutations",
    "post",
    "post_mix",
    "pre",
    "pre_mix",
    "reduce",
    "residual_matrix",
    "rms_norm",
    "save_model",
    "save_weights",
    "sinkhorn",
    "site_health",
    "stack_health",
]
