"""A site by the kernels and by the plain path, on the same values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_impl
from jax_impl import MHCConfig
from jax_impl.functional import head_shapes, weight_shapes


def weights(config: MHCConfig, of_head: bool = False) -> dict[str, jax.Array]:
    """Values with which no gate is closed and no gradient small."""
    generator, made = np.random.default_rng(3), {}
    for name, shape in (head_shapes if of_head else weight_shapes)(config).items():
        value = generator.standard_normal(shape)
        if name.endswith("_alpha") or name == "head_fn":
            value = value * 2 / np.sqrt(config.streams * config.dim)
        made[name] = jnp.asarray(np.abs(value) + 0.5 if name == "mhc_norm.scale" else value, jnp.float32)
    return made


def normal(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def site(config: MHCConfig, backend: str, **options: Any) -> Any:
    """A function of x, weights and carried: the streams, u, and the own pre that a single-pass site hands on."""

    def run(x: jax.Array, held: Any, carried: jax.Array | None = None) -> Any:
        u, context, own = jax_impl.pre(x, held, config, carried, backend=backend, **options)
        return jax_impl.post(jnp.tanh(u), context), u, own

    return run


def pulled(function: Any, arguments: tuple[Any, ...], seed: int = 5) -> Any:
    """Outputs, and all gradients for random cotangents of every output."""
    outputs, pull = jax.vjp(function, *arguments)
    leaves, tree = jax.tree.flatten(outputs)
    cotangents = [normal(leaf.shape, seed + index, leaf.dtype) for index, leaf in enumerate(leaves)]
    return outputs, pull(jax.tree.unflatten(tree, cotangents))


def furthest(actual: Any, expected: Any) -> float:
    """The largest error over all leaves, as a fraction of each leaf's largest value; NaN where one has it."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def error(one: Any, other: Any) -> float:
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        return float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-3)) if other.size else 0.0

    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)), key=lambda value: (np.isnan(value), value))
