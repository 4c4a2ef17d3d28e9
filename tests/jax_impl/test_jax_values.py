"""Weights in float64, which JAX holds only when it is told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_impl import ManifoldConstrainedHyperConnections, MHCConfig, load_model, residual, weights

CONFIG = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=4)


def layer(dtype=jnp.float32):
    return ManifoldConstrainedHyperConnections(CONFIG, rngs=nnx.Rngs(0), param_dtype=dtype)


@pytest.mark.parametrize("x64", [False, True])
def test_the_dtype_of_a_float64_file_depends_on_x64(tmp_path, x64):
    path, held = tmp_path / "model.safetensors", {k: np.asarray(v, np.float64) for k, v in layer().weights().items()}
    weights.save_weights(path, held, CONFIG, "a.")
    with jax.enable_x64(x64):
        if not x64:
            with pytest.raises(ValueError, match=r"got float64, which it rounds: .* float64 \(with jax_enable_x64\)"):
                weights.load_weights(path, CONFIG, "a.")
        loaded = weights.load_weights(path, CONFIG, "a.", round=not x64)
        assert {value.dtype.name for value in loaded.values()} == {"float64" if x64 else "float32"}
        if x64:
            load_model(path, {"a.": (site := layer(dtype=jnp.float64))})
            assert all((value == loaded[name]).all() for name, value in site.weights().items())


def test_gradients_in_float16_stay_finite_where_a_sum_is_below_2_to_the_minus_8():
    config = MHCConfig.from_dialect("megatron", streams=4, dim=8, iterations=1)  # more of them leave no gradient
    assert config.matrix == "activation"
    logits = np.random.default_rng(0).normal(size=(4, 4)) / 4
    logits[:, 2] -= 6.5  # a column's sum is about 2^-9, and JAX's rule for a division has its square
    weights = np.arange(16.0).reshape(4, 4) % 5

    def gradient(dtype):
        def loss(z):
            return (residual.sinkhorn(z, config).astype(jnp.float32) * weights).sum()

        return np.asarray(jax.grad(loss)(jnp.asarray(logits, dtype)), np.float32)

    narrow, wide = gradient(jnp.float16), gradient(jnp.float32)
    assert np.abs(wide).max() > 0.1 and np.abs(narrow - wide).max() < 0.02 * np.abs(wide).max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_gradient_of_many_tokens_is_that_of_few(dtype):
    """XLA fuses otherwise from 1,366 tokens on, and may leave a rounding out: comparing with what was rounded fails."""
    config = MHCConfig.from_dialect("megatron", streams=3, dim=8)
    assert config.guard == "clip"
    z, cotangent = np.random.default_rng(0).normal(size=(2, 2048, 3, 3))

    def gradient(tokens):
        _, pull = jax.vjp(lambda z: residual.sinkhorn(z, config), jnp.asarray(z[:tokens], dtype))
        return np.asarray(pull(jnp.asarray(cotangent[:tokens], dtype))[0], np.float32)

    many, few = gradient(2048)[:512], gradient(512)
    assert np.abs(few).max() > 0.1 and np.abs(many - few).max() < 0.05 * np.abs(few).max()


def test_a_sum_at_eps_has_its_gradient_and_one_that_is_not_a_number_stays_so():
    totals = jnp.asarray([0.5, 1.0, 2.0, jnp.nan], jnp.float32)
    values, pull = jax.vjp(lambda total: residual._at_least(total, 1.0), totals)
    assert np.array_equal(values, [1, 1, 2, np.nan], equal_nan=True)
    assert np.array_equal(pull(jnp.ones(4))[0], [0, 1, 1, 1])
