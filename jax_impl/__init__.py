"""mHC in JAX: plain functions and modules. Nothing here imports PyTorch or the conformance suite."""

from jax_impl.config import MHCConfig
from jax_impl.functional import (
    Context,
    coefficients,
    expand,
    head,
    one_hot,
    post,
    post_mix,
    pre,
    pre_mix,
    reduce,
    rms_norm,
)
from jax_impl.models import load_model, save_model
from jax_impl.modules import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections
from jax_impl.residual import permutations, residual_matrix, sinkhorn
from jax_impl.weights import from_flat, load_weights, save_weights

__all__ = [
    "Context",
    "HyperConnectionType",
    "HyperHead",
    "MHCConfig",
    "ManifoldConstrainedHyperConnections",
    "coefficients",
    "expand",
    "from_flat",
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
]
