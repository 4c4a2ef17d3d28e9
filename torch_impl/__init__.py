"""mHC in PyTorch: plain functions and modules. Nothing here imports JAX or the conformance suite."""

from torch_impl.config import MHCConfig
from torch_impl.functional import (
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
from torch_impl.models import load_model, save_model
from torch_impl.modules import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections
from torch_impl.residual import permutations, residual_matrix, sinkhorn
from torch_impl.weights import from_flat, load_weights, save_weights

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
