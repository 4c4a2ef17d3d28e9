"""MaxText's own modules, imported as they are, and its layer made of the suite's weights."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from conformance.stages import LAYER_WEIGHTS
from conformance.witnesses import loading

COMPUTES = ("common.common_types", "layers.initializers", "layers.normalizations", "layers.nnx_wrappers")
"""The modules that compute, beside the layer's. The kernels that 0.2.5 imports are for TPU, in Python 3.12's syntax,
and are called only where its configuration asks for them: they are stood in for."""
ABSENT = ("aqt", "qwix")
HEAD = {"hc_fn": "head_fn", "hc_base": "head_base", "hc_scale": "head_scale"}
"""MaxText's names of a head's weights, and ours."""


def load(version: str) -> ModuleType:
    """``maxtext.layers.mhc`` of a version.

    Raises:
        WitnessError: the version hasn't been fetched, or can't be loaded.
    """
    real = [f"maxtext.{name}" for name in COMPUTES]
    return loading.load(f"maxtext=={version}", "maxtext.layers.mhc", real, ABSENT)


def settings(config: dict[str, Any], dtype: Any, weight_dtype: Any, lite: bool) -> SimpleNamespace:
    """The part of MaxText's configuration that its layer and head read."""
    return SimpleNamespace(
        dtype=dtype,
        weight_dtype=weight_dtype,
        matmul_precision="highest",
        normalization_layer_epsilon=config["norm_eps"],
        sinkhorn_iterations=config["iterations"],
        mhc_expansion_rate=config["streams"],
        emb_dim=config["dim"],
        enable_mhc_lite=lite,
    )


def with_weights(make: Callable[[], nnx.Module], weights: dict[str, jax.Array]) -> Any:
    """The module that ``make`` makes, its parameters replaced; the initial ones are never computed.

    Args:
        weights: by the parameters' paths, dots between the parts.
    """
    module = nnx.eval_shape(make)
    for path, value in weights.items():
        *parents, name = path.split(".")
        owner: Any = module
        for parent in parents:
            owner = getattr(owner, parent)
        shape = getattr(owner, name).get_value().shape
        if shape != value.shape:
            raise ValueError(f"{path}: expected MaxText's shape {shape}, got {value.shape}")
        setattr(owner, name, nnx.Param(value))
    return module


def run(
    mhc: ModuleType,
    config: SimpleNamespace,
    values: dict[str, jax.Array],
    norm_fn: Callable[[jax.Array], jax.Array],
    branch_fn: Callable[..., Any],
    kind: str,
) -> tuple[jax.Array, dict[str, Any], list[jax.Array]]:
    """Calls ``ManifoldConstrainedHyperConnections`` whole, on the suite's weights.

    Args:
        mhc: MaxText's module.
        config: what `settings` makes.
        values: ``x`` and the layer's weights.
        norm_fn, branch_fn, kind: as the class takes them, ``kind`` by its value.

    Returns:
        The output, the metadata, and pre, post and H as the class's own methods returned them.
    """
    kept: list[jax.Array] = []

    class Layer(mhc.ManifoldConstrainedHyperConnections):
        def mapping(self, *arguments: Any, **options: Any) -> jax.Array:
            kept.append(super().mapping(*arguments, **options))
            return kept[-1]

        def res_mapping(self, *arguments: Any, **options: Any) -> jax.Array:
            kept.append(super().res_mapping(*arguments, **options))
            return kept[-1]

    weights = {k: v for k, v in values.items() if k in LAYER_WEIGHTS}
    module = with_weights(lambda: Layer(config, config.emb_dim, None, nnx.Rngs(0)), weights)
    out, metadata = module(norm_fn, branch_fn, values["x"], mhc.HyperConnectionType(kind))
    return out, metadata, kept


def permutation_matrix(mhc: ModuleType, config: SimpleNamespace, logits: jax.Array) -> jax.Array:
    """H of mHC-lite from its logits, by the class's ``res_mapping`` with a scale of 1 and a bias of 0."""
    weights = {"res_alpha_scale": jnp.ones(1, logits.dtype), "res_beta": jnp.zeros(logits.shape[-1], logits.dtype)}
    make = lambda: mhc.ManifoldConstrainedHyperConnections(config, config.emb_dim, None, nnx.Rngs(0))  # noqa: E731
    return with_weights(make, weights).res_mapping(logits)


def head(mhc: ModuleType, config: SimpleNamespace, values: dict[str, jax.Array]) -> jax.Array:
    """``DeepSeek4HyperHead`` on the suite's weights."""
    weights = {theirs: values[ours] for theirs, ours in HEAD.items()}
    return with_weights(lambda: mhc.DeepSeek4HyperHead(config, None, nnx.Rngs(0)), weights)(values["x"])
