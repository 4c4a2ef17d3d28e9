"""MaxText's own modules, imported as they are, and its layer made of the suite's weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import yaml  # which flax requires
from flax import nnx

from conformance.adapters.site import settings_of
from conformance.stages import LAYER_WEIGHTS
from conformance.witnesses import loading
from conformance.witnesses.fetch import folder

COMPUTES = ("common.common_types", "layers.initializers", "layers.normalizations", "layers.nnx_wrappers")
"""The modules that compute, beside the layer's. The kernels that 0.2.5 imports are for TPU, in Python 3.12's syntax,
and are called only where its configuration asks for them: they are stood in for."""
ABSENT = ("aqt", "qwix")
NAMES = {"norm_eps": "normalization_layer_epsilon", "iterations": "sinkhorn_iterations"}
"""What of a dialect MaxText reads from its configuration, and its names of it."""
HEAD = {"hc_fn": "head_fn", "hc_base": "head_base", "hc_scale": "head_scale"}
"""MaxText's names of a head's weights, and ours."""


def load(version: str) -> ModuleType:
    """``maxtext.layers.mhc`` of a version.

    Raises:
        WitnessError: the version hasn't been fetched, or can't be loaded.
    """
    real = [f"maxtext.{name}" for name in COMPUTES]
    return loading.load(f"maxtext=={version}", "maxtext.layers.mhc", real, ABSENT)


def configuration(
    version: str, config: dict[str, Any], dtype: Any, weight_dtype: Any, lite: bool = False
) -> SimpleNamespace:
    """The part of MaxText's configuration that its layer and head read.

    The norm's eps and the iterations are the package's defaults, but where a case departs from its dialect.
    """
    return SimpleNamespace(
        **{key: defaults(version)[key] for key in NAMES.values()} | settings_of(config, NAMES),
        dtype=dtype,
        weight_dtype=weight_dtype,
        matmul_precision="highest",
        mhc_expansion_rate=config["streams"],
        emb_dim=config["dim"],
        enable_mhc_lite=lite,
    )


@functools.cache
def defaults(version: str) -> dict[str, Any]:
    """``configs/base.yml`` of a version: what MaxText's users get who set nothing."""
    return yaml.safe_load((folder(f"maxtext=={version}") / "maxtext/configs/base.yml").read_text())


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
        config: what `configuration` makes.
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


def mixed(mhc: ModuleType, config: SimpleNamespace, values: dict[str, jax.Array]) -> jax.Array:
    """``out`` from y, x, post and H: the class called whole, its gates and its H replaced by these."""

    class Layer(mhc.ManifoldConstrainedHyperConnections):
        def mapping(self, *_: Any, **__: Any) -> jax.Array:
            return values["post"]

        def res_mapping(self, *_: Any) -> jax.Array:
            return values["H"]

    module: Any = Layer(config, config.emb_dim, None, nnx.Rngs(0))
    out, _ = module(lambda u: u, lambda inputs: values["y"], values["x"], mhc.HyperConnectionType("mlp_dense"))
    return out


def permutation_matrix(mhc: ModuleType, config: SimpleNamespace, logits: jax.Array) -> jax.Array:
    """H of mHC-lite from its logits, by the class's ``res_mapping`` with a scale of 1 and a bias of 0."""
    weights = {"res_alpha_scale": jnp.ones(1, logits.dtype), "res_beta": jnp.zeros(logits.shape[-1], logits.dtype)}

    def make() -> nnx.Module:
        return mhc.ManifoldConstrainedHyperConnections(config, config.emb_dim, None, nnx.Rngs(0))

    return with_weights(make, weights).res_mapping(logits)


def head(mhc: ModuleType, config: SimpleNamespace, values: dict[str, jax.Array]) -> jax.Array:
    """``DeepSeek4HyperHead`` on the suite's weights."""
    weights = {theirs: values[ours] for theirs, ours in HEAD.items()}
    return with_weights(lambda: mhc.DeepSeek4HyperHead(config, None, nnx.Rngs(0)), weights)(values["x"])
