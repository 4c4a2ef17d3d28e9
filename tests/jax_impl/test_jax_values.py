"""Weights in float64, which JAX holds only when it is told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_impl import ManifoldConstrainedHyperConnections, MHCConfig, load_model, weights

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
