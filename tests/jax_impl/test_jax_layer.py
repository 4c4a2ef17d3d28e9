"""The layer against a float64 NumPy evaluation, under JAX's own transformations, and its checks of shapes."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import jax_impl
from jax_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig
from jax_impl.config import dialects
from tests.jax_impl import jax_expected


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
    """A site around a doubling; a single-pass one reads stream 0."""
    carried = jax_impl.one_hot(x) if module.config.pre_from == "previous" else None
    return module(lambda u: u, lambda inputs: 2 * inputs, x, HyperConnectionType.MLP_DENSE, carried=carried)[0]


def in_numpy(module, x):
    """The same as `run`, in float64 NumPy."""
    weights, x = {k: np.asarray(v, np.float64) for k, v in module.weights().items()}, np.asarray(x, np.float64)
    return jax_expected.site(x, weights, module.config, lambda u: 2 * u, jax_expected.one_hot(x))[0]


SINKHORN = [name for name, row in dialects().items() if row["residual"] == "sinkhorn"]


@pytest.mark.parametrize("name", dialects())
def test_the_layer_is_mathematics_md(name):
    with jax.enable_x64(True):
        module, x = layer(name, dtype=jnp.float64), streams(dtype=jnp.float64)
        np.testing.assert_allclose(run(module, x), in_numpy(module, x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", dialects())
def test_every_dialect_runs_in_every_dtype_with_finite_gradients(name, dtype):
    module, x = layer(name), streams(dtype=dtype)
    loss = lambda m, x: jnp.square(run(m, x).astype(jnp.float32)).sum()  # noqa: E731
    out = run(module, x)
    assert out.dtype == dtype and out.shape == x.shape and jnp.isfinite(out.astype(jnp.float32)).all()
    gradients = jax.tree.leaves(nnx.grad(loss)(module, x))
    assert all(jnp.isfinite(g).all() and g.dtype == jnp.float32 for g in gradients)


def test_gradients_are_those_of_the_iterations_as_written():
    with jax.enable_x64(True):
        module, x = layer(dtype=jnp.float64), streams(dtype=jnp.float64, lead=(1, 2))
        check_grads(lambda x: run(module, x), (x,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", SINKHORN)
def test_logits_of_ten_thousand_stay_finite(name):
    """An offset cancels along the axis that the softmax runs over; without a softmax, the one normalised first."""
    config = MHCConfig.from_dialect(name, streams=3, dim=1)
    offsets = jnp.array([1e4, -1e4, 0.0])
    over_columns = config.softmax == "columns"
    logits = jax.random.normal(jax.random.key(0), (5, 3, 3)) + (offsets if over_columns else offsets[:, None])
    H, pullback = jax.vjp(lambda z: jax_impl.residual_matrix(z, config), logits)
    assert jnp.isfinite(H).all() and jnp.isfinite(pullback(logits / 1e4)[0]).all()


@pytest.mark.parametrize("offset", [90.0, 1e4])
@pytest.mark.parametrize("softmax", ["rows", "columns", "none"])
@pytest.mark.parametrize("order", ["rows-first", "columns-first"])
def test_without_an_eps_offsets_along_either_axis_are_those_of_the_iterations_on_logarithms(order, softmax, offset):
    """A line far below the others comes back in the next pass, which divides by nothing but its sum."""
    config = MHCConfig(streams=3, dim=1, order=order, softmax=softmax, iterations=20)
    noise = np.round(np.random.default_rng(0).normal(size=(5, 3, 3)) * 64) / 64
    rows, columns = -1, -2
    axes = (rows, columns) if order == "rows-first" else (columns, rows)
    for axis in (rows, columns):
        logits = noise + np.expand_dims(np.array([offset, -offset, 0.0]), axis)
        level, start = logits, {"rows": rows, "columns": columns, "none": axes[0]}[softmax]
        for pass_axis in [start, *(axes * 20)[start == axes[0] :]]:
            largest = level.max(pass_axis, keepdims=True)
            level = level - largest - np.log(np.exp(level - largest).sum(pass_axis, keepdims=True))
        found, pullback = jax.vjp(lambda z: jax_impl.residual_matrix(z, config), jnp.asarray(logits, jnp.float32))
        np.testing.assert_allclose(found, np.exp(level), atol=3e-6)
        assert jnp.isfinite(pullback(jnp.asarray(noise, jnp.float32))[0]).all()


@pytest.mark.parametrize("lead", [(), (3,), (0, 4), (2, 1, 3)])
def test_functions_take_any_leading_shape(lead):
    module, x = layer(), streams(lead=lead)
    u, context, _ = jax_impl.pre(x, module.weights(), module.config)
    assert u.shape == (*lead, 5) and jax_impl.post(u, context).shape == x.shape


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


def test_branches_are_handed_what_maxtext_hands_them():
    module, x = layer(), streams()

    def attention(inputs_q, inputs_kv, deterministic):
        assert inputs_q is inputs_kv and deterministic
        return inputs_q, "cache"

    out, metadata = module(lambda u: u, attention, x, HyperConnectionType.ATTENTION, deterministic=True)
    assert metadata == {} and out.shape == x.shape
    moe = lambda inputs: (inputs, 0.5, "updates")  # noqa: E731
    _, metadata = module(lambda u: u, moe, x, HyperConnectionType.MLP_MOE)
    assert metadata == {"load_balance_loss": 0.5, "moe_bias_updates": "updates"}


def test_initial_values_are_maxtexts():
    weights = ManifoldConstrainedHyperConnections(MHCConfig(streams=4, dim=128), rngs=nnx.Rngs(0)).weights()
    assert float(jnp.var(weights["res_alpha"])) == pytest.approx(1 / 512, rel=0.1)
    assert float(weights["pre_alpha_scale"][0]) == pytest.approx(0.01) and not weights["res_beta"].any()


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m.pre(jnp.zeros((2, 4, 2, 5))), r"x must end in \[3, 5\], got \[2, 4, 2, 5\]"),
        (lambda m: run(m, jnp.zeros((4, 3, 5))), r"x must be \[batch, seq, streams, dim\]"),
        (lambda m: m.post(jnp.zeros((2, 4, 6)), m.pre(streams())[1]), r"y must end in \[5\]"),
        (lambda m: jax_impl.pre(streams(), {}, m.config), "weights must have pre_alpha"),
        (lambda m: jax_impl.reduce(streams(), "max"), "how must be sum, mean or carried"),
        (lambda m: jax_impl.expand(streams(), 0), "streams must be at least 1"),
        (lambda m: jax_impl.residual_matrix(jnp.zeros((2, 2)), m.config), r"logits must end in \[3, 3\]"),
    ],
)
def test_a_wrong_shape_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(layer())


def test_head_is_a_gated_sum():
    head = HyperHead(MHCConfig.from_dialect("deepseek-v4", streams=3, dim=5), rngs=nnx.Rngs(0))
    vars(head)["head_fn"][...] = jnp.zeros((3, 5, 3))
    np.testing.assert_allclose(head(streams()), (0.5 + 1e-6) * streams().sum(-2), rtol=1e-6, atol=1e-7)


def test_importing_needs_no_torch():
    code = "import sys, jax_impl; assert not {'torch', 'conformance'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
