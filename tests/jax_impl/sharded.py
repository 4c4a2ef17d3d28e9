"""Modules with values of order 1, in float64, for the tests on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl import (
    HyperConnectionType,
    ManifoldConstrainedHyperConnections,
    MHCConfig,
    sharding,
)

STREAMS, DIM, LAYERS = 4, 16, 3


def example(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((8, 8, STREAMS, DIM))


def randomised(module: Any) -> Any:
    """Values of order 1, so that no gradient is small; the same however the module is laid out."""
    state = nnx.state(module, nnx.Param)
    generator = np.random.default_rng(7)
    for _, leaf in sorted(nnx.to_flat_state(state), key=lambda item: str(item[0])):
        value = leaf.get_value()
        fresh = generator.standard_normal(value.shape).astype(value.dtype)
        leaf.set_value(sharding.place(fresh, value.sharding) if hasattr(value.sharding, "mesh") else jnp.asarray(fresh))
    nnx.update(module, state)
    return module


def layer(config: MHCConfig) -> ManifoldConstrainedHyperConnections:
    return ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)


def difference(actual: Any, expected: Any) -> float:
    """The largest error over all leaves, as a fraction of each leaf's largest value."""

    def one(a: Any, b: Any) -> float:
        b = np.asarray(b)
        return float(np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-3)) if b.size else 0.0

    return max(jax.tree.leaves(jax.tree.map(one, actual, expected)))


class Block(nnx.Module):
    """Two sites around branches without parameters."""

    def __init__(self, rngs: nnx.Rngs):
        config = MHCConfig.from_dialect("maxtext", streams=STREAMS, dim=DIM)
        self.attention = ManifoldConstrainedHyperConnections(config, rngs=rngs, param_dtype=jnp.float64)
        self.mlp = ManifoldConstrainedHyperConnections(config, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: Any) -> Any:
        both = lambda inputs_q, inputs_kv: (jnp.tanh(inputs_q + inputs_kv), None)  # noqa: E731
        x, _ = self.attention(lambda u: u, both, x, HyperConnectionType.ATTENTION)
        x, _ = self.mlp(lambda u: u, lambda inputs: jnp.sin(inputs), x, HyperConnectionType.MLP_DENSE)
        return x


class Stack(nnx.Module):
    """Blocks in a scan, recomputed from their coefficients on the way back."""

    def __init__(self, rngs: nnx.Rngs, policy: Any = sharding.keep_coefficients):
        split = nnx.split_rngs(splits=LAYERS)
        self.policy = policy
        self.blocks = split(nnx.vmap(Block, transform_metadata={nnx.PARTITION_NAME: "layers"}))(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: "layers"})
        @nnx.remat(policy=self.policy)
        def layers(x: Any, block: Block) -> Any:
            return block(x)

        return layers(x, self.blocks)
