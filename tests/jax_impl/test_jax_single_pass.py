"""Single-pass sites (mathematics.md, "Single pass"): what crosses from one site to the next, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import jax_impl
from jax_impl import HyperConnectionType, ManifoldConstrainedHyperConnections, MHCConfig
from tests.jax_impl import jax_expected

KINDS = (HyperConnectionType.ATTENTION, HyperConnectionType.MLP_DENSE, HyperConnectionType.MLP_MOE)
CONFIG = MHCConfig.from_dialect("deepseek-v4.1", streams=3, dim=5)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def values(shape, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def sites(count=4, config=CONFIG, dtype=jnp.float64):
    """Sites whose weights are all of order 1."""
    made = []
    for index in range(count):
        module = ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0), param_dtype=dtype)
        for number, name in enumerate(module.weights()):
            value = getattr(module, name)
            value[...] = jnp.asarray(values(value.shape, 10 * index + number, 0.5), dtype)
        made.append(module)
    return made


def attention(inputs_q, inputs_kv):
    return jnp.tanh(inputs_q) + inputs_kv.mean(1, keepdims=True), "cache"


def dense(inputs):
    return jnp.sin(inputs)


def experts(inputs):
    return inputs * inputs, 0.5, "updates"


def chain(x, modules, carried=None):
    """Attention, dense MLP and mixture of experts in turn, collapsed with the last pre."""
    carried = jax_impl.one_hot(x) if carried is None else carried
    for index, module in enumerate(modules):
        branch = (attention, dense, experts)[index % 3]
        x, metadata = module(lambda u: u, branch, x, KINDS[index % 3], carried=carried)
        carried = metadata["carried"]
    return jax_impl.reduce(x, "carried", carried)


def in_numpy(modules):
    return [{k: np.asarray(v, np.float64) for k, v in m.weights().items()} for m in modules]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_chain_of_mixed_kinds_is_the_loop_of_mathematics_md(count):
    x, modules = values((2, 4, 3, 5), 1), sites(count)
    expected = jax_expected.chain(x, in_numpy(modules), CONFIG)
    np.testing.assert_allclose(chain(jnp.asarray(x), modules), expected, rtol=1e-11, atol=1e-12)


def test_gradients_of_every_weight_are_those_of_the_loop():
    """Central differences of the NumPy loop, along a random direction in each weight of each site and in x."""
    x, modules = values((2, 3, 3, 5), 1), sites(3)
    weight, step = values((2, 3, 5), 2), 1e-6
    total = lambda modules, x: (chain(x, modules) * weight).sum()  # noqa: E731
    of_modules, of_x = nnx.jit(nnx.grad(total, argnums=(0, 1)))(nnx.List(modules), jnp.asarray(x))
    plain = in_numpy(modules)

    def loss(x, weights):
        return (jax_expected.chain(x, weights, CONFIG) * weight).sum()

    def check(name, gradient, moved):
        direction = values(gradient.shape, 3)
        ahead, behind = (loss(*moved(sign * step * direction)) for sign in (1, -1))
        slope = (np.asarray(gradient) * direction).sum()
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-5, atol=1e-7, err_msg=name)

    check("x", of_x, lambda change: (x + change, plain))
    for index, module in enumerate(modules):
        for name in module.weights():

            def moved(change, index=index, name=name):
                return x, [{**w, name: w[name] + change} if i == index else w for i, w in enumerate(plain)]

            check(f"{name} of site {index}", of_modules[index][name].get_value(), moved)


def test_the_first_site_learns_through_the_pre_that_it_hands_on():
    """Its projection of pre reaches the result by way of the next site alone."""
    x, modules = jnp.asarray(values((1, 2, 3, 5), 1)), nnx.List(sites(2))
    both = nnx.grad(lambda modules: chain(x, modules).sum())(modules)
    assert jnp.abs(both[0]["pre_alpha"].get_value()).max() > 1e-4
    call = lambda first: first(lambda u: u, dense, x, KINDS[1], carried=jax_impl.one_hot(x))[0].sum()  # noqa: E731
    assert not nnx.grad(call)(modules[0])["pre_alpha"].get_value().any()


def test_gradients_of_x_and_of_the_carried_pre_are_those_of_finite_differences():
    x, carried = jnp.asarray(values((1, 2, 3, 5), 1)), jnp.asarray(values((1, 2, 3), 2))
    modules = sites(2)
    call = lambda x, carried: chain(x, modules, carried)  # noqa: E731
    check_grads(call, (x, carried), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_carried_pre_stays_wide_whatever_x_is(dtype):
    x, (module,) = jnp.asarray(values((2, 4, 3, 5), 1), dtype), sites(1, dtype=jnp.float32)

    def call(carried):
        out, metadata = module(lambda u: u, experts, x, KINDS[2], carried=carried)
        assert set(metadata) == {"carried", "load_balance_loss", "moe_bias_updates"}
        assert out.dtype == dtype and metadata["carried"].dtype == jnp.float32
        return jax_impl.reduce(out, "carried", metadata["carried"]).astype(jnp.float32).sum()

    gradient = jax.grad(call)(jax_impl.one_hot(x))
    assert gradient.dtype == jnp.float32 and jnp.isfinite(gradient).all() and gradient.any()


def test_halves_equal_the_whole():
    x, (module,) = jnp.asarray(values((2, 4, 3, 5), 1)), sites(1)
    carried = jnp.asarray(values((2, 4, 3), 2))
    u, context, handed = module.pre(x, carried)
    out, metadata = module(lambda u: u, dense, x, KINDS[1], carried=carried)
    assert jnp.array_equal(module.post(dense(u), context), out) and jnp.array_equal(handed, metadata["carried"])
    assert jnp.array_equal(handed, jax_impl.coefficients(x, module.weights(), CONFIG)[0])
    assert jnp.array_equal(u, jax_impl.pre_mix(x, carried))


@pytest.mark.parametrize("lead", [(), (3,), (0, 4), (2, 1, 3)])
def test_one_hot_is_stream_0_in_the_dtype_that_is_carried(lead):
    for dtype, kept in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)):
        found = jax_impl.one_hot(jnp.zeros((*lead, 3, 5), dtype))
        assert found.dtype == kept and found.shape == (*lead, 3)
        assert jnp.array_equal(found, jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0], kept), (*lead, 3)))


def test_the_reduction_with_the_carried_pre_is_a_gated_sum_rounded_once():
    x, carried = values((2, 4, 3, 5), 1).astype(np.float32), values((2, 4, 3), 2).astype(np.float32)
    narrow = jnp.asarray(x, jnp.bfloat16)
    found = jax_impl.reduce(narrow, "carried", jnp.asarray(carried))
    exact = (carried[..., None].astype(np.float64) * np.asarray(narrow, np.float64)).sum(-2)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)
    assert jnp.array_equal(jax_impl.reduce(narrow, "carried", jax_impl.one_hot(narrow)), narrow[..., 0, :])


X = np.zeros((2, 4, 3, 5), np.float32)
OWN = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=5)


@pytest.mark.parametrize(
    "carried, said",
    [
        (None, r"carried must be the pre of the site before: one_hot\(x\) for the first site, got None"),
        (np.zeros((2, 4, 4), np.float32), r"carried must be \[2, 4, 3\], got \[2, 4, 4\]"),
        (np.zeros((4, 3), np.float32), r"carried must be \[2, 4, 3\], got \[4, 3\]"),
        (np.zeros((2, 1, 3), np.float32), r"carried must be \[2, 4, 3\], got \[2, 1, 3\]"),
        (np.zeros((2, 4, 3), jnp.bfloat16), "carried must be float32 for x in float32, got bfloat16"),
        (np.zeros((2, 4, 3), np.float64), "carried must be float32 for x in float32, got float64"),
    ],
)
def test_a_carried_pre_that_cannot_be_is_refused(carried, said):
    (module,) = sites(1, dtype=jnp.float32)
    x, carried = jnp.asarray(X), None if carried is None else jnp.asarray(carried)
    for call in (
        lambda: module(lambda u: u, dense, x, KINDS[1], carried=carried),
        lambda: module.pre(x, carried),
        lambda: jax_impl.reduce(x, "carried", carried),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_the_refusal_of_a_narrow_one_says_what_has_cast_it():
    (module,) = sites(1, dtype=jnp.float32)
    x = jnp.asarray(X, jnp.bfloat16)
    with pytest.raises(ValueError) as raised:
        module.pre(x, jax_impl.one_hot(x).astype(jnp.bfloat16))
    said = "hand it on as it was returned, outside of what casts a layer's inputs or outputs to a narrow dtype"
    assert said in str(raised.value)


def test_a_surplus_one_is_refused():
    own, x = ManifoldConstrainedHyperConnections(OWN, rngs=nnx.Rngs(0)), jnp.asarray(X)
    with pytest.raises(ValueError, match="carried goes with pre_from='previous' alone: this configuration reads with"):
        own(lambda u: u, dense, x, KINDS[1], carried=jax_impl.one_hot(x))
    with pytest.raises(ValueError, match="carried goes with how='carried' alone, got it with 'sum'"):
        jax_impl.reduce(x, "sum", jax_impl.one_hot(x))
    assert own.pre(x)[2] is None and "carried" not in own(lambda u: u, dense, x, KINDS[1])[1]
