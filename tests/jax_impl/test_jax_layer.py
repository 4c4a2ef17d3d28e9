"""The layer under JAX's own transformations, and where its parameters lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.test_util import check_grads

import jax_impl
from jax_impl import HyperConnectionType, ManifoldConstrainedHyperConnections, MHCConfig


def layer(name="deepseek-v4", n=3, dim=5, dtype=jnp.float32, **overrides):
    config = MHCConfig.from_dialect(name, streams=n, dim=dim, **overrides)
    module = ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0), param_dtype=dtype)
    for k in ("pre", "post", "res"):
        if f"{k}_alpha" in module.weights():
            getattr(module, f"{k}_alpha_scale")[...] = jnp.full(1, 1.3, dtype)
            beta = getattr(module, f"{k}_beta")
            beta[...] = jax.random.normal(jax.random.key(len(k)), beta[...].shape, dtype)
    return module


def streams(n=3, dim=5, dtype=jnp.float32, lead=(2, 4)):
    return jax.random.normal(jax.random.key(7), (*lead, n, dim), jnp.float32).astype(dtype)


def run(module, x):
    """Runs a site around a doubling."""
    return module(lambda u: u, lambda inputs: 2 * inputs, x, HyperConnectionType.MLP_DENSE)[0]


def test_gradients_are_those_of_the_iterations_as_written(unchecked):
    with jax.enable_x64(True):
        module, x = layer(dtype=jnp.float64), streams(dtype=jnp.float64, lead=(1, 2))
        check_grads(lambda x: run(module, jnp.asarray(x)), (x,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_jit_vmap_checkpoint_and_nnx_jit_agree_with_plain_calls():
    module, x = layer(), streams()
    plain = run(module, x)
    weights, config = module.weights(), module.config
    halves = jax.jit(lambda x: jax_impl.pre(x, weights, config))  # the context crosses jit's border
    u, context, _ = halves(x)
    np.testing.assert_allclose(jax_impl.post(2 * u, context), plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nnx.jit(run)(module, x), plain, rtol=1e-5, atol=1e-6)
    one = lambda x: jax_impl.pre(x, weights, config)[0]  # noqa: E731
    np.testing.assert_allclose(jax.vmap(one)(x), one(x), rtol=1e-5, atol=1e-6)
    loss = lambda x: jnp.square(one(x)).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(x), jax.grad(loss)(x), rtol=1e-5, atol=1e-6)


def test_parameters_name_their_logical_axes_and_are_placed_under_rules():
    module = layer("maxtext")
    assert vars(module)["pre_alpha"].out_sharding == (None, "embed", None)
    assert vars(module)["mhc_norm_scale"].out_sharding == (None, "norm")
    mesh = jax.make_mesh((5,), ("tensor",), devices=jax.devices()[:5])
    with jax.set_mesh(mesh), nnx.logical_axis_rules((("embed", "tensor"), ("norm", "tensor"))):
        placed = ManifoldConstrainedHyperConnections(module.config, rngs=nnx.Rngs(0))
    assert vars(placed)["pre_alpha"][...].sharding.spec == jax.P(None, "tensor", None)
