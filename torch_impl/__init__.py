"""mHC in PyTorch: plain functions and modules. Nothing here imports JAX or the conformance suite. In a model::

config = MHCConfig(streams=4, dim=7168)                 # the paper's layer; from_dialect makes the others
layer = ManifoldConstrainedHyperConnections(config)
x = expand(embedding, config.streams)                   # [batch, seq, dim] -> [batch, seq, streams, dim]
x, _ = layer(norm, branch, x, HyperConnectionType.MLP_DENSE)    # calls branch(inputs=norm(u))
x = reduce(x, "sum")                                    # [batch, seq, dim]
"""

try:
    from torch_impl.config import MHCConfig
    from torch_impl.ends import expand, one_hot, reduce
    from torch_impl.functional import (
        Context,
        coefficients,
        head,
        post,
        post_mix,
        pre,
        pre_mix,
        residual_matrix,
        rms_norm,
    )
    from torch_impl.health import composite, drifting, gains, site_health, stack_health
    from torch_impl.models import load_model, save_model
    from torch_impl.modules import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections
    from torch_impl.residual import permutations, sinkhorn
    from torch_impl.weights import from_flat, load_weights, save_weights
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("torch",):
        raise
    reason = f"torch_impl needs PyTorch, and {error.name} is missing: pip install 'mhc-conformance[torch]'"
    raise ModuleNotFoundError(reason, name=error.name) from None

from torch_impl.version import version

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
