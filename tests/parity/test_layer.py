"""The layer of every dialect against the layer in NumPy, in every dtype, and its checks of shapes."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from tests.parity import reference
from tests.parity.tables import DIALECTS

DTYPES = ["float64", "float32", "bfloat16", "float16"]


def layer(backend, name="deepseek-v4", dtype="float32", streams=3, dim=5):
    """A layer whose gates aren't closed: scaling factors 1.3 and random biases."""
    config = backend.package.MHCConfig.from_dialect(name, streams=streams, dim=dim)
    module, generator = backend.layer(config, dtype), np.random.default_rng(0)
    weights = module.weights()
    scales = {name: np.full(1, 1.3) for name in weights if name.endswith("_alpha_scale")}
    biases = {name: generator.standard_normal(v.shape) for name, v in weights.items() if name.endswith("_beta")}
    return backend.fill(module, {**scales, **biases})


def streams(backend, dtype="float32", lead=(2, 4)):
    return backend.array(np.random.default_rng(7).standard_normal((*lead, 3, 5)), dtype)


def run(backend, module, x):
    """A site around a doubling; a single-pass one reads stream 0."""
    carried = module.one_hot(x) if module.config.pre_from == "previous" else None
    kind = backend.package.HyperConnectionType.MLP_DENSE
    return module(lambda u: u, lambda inputs: 2 * inputs, x, kind, carried=carried)[0]


@pytest.mark.parametrize("name", DIALECTS)
def test_the_layer_is_numpys(backend, float64, name):
    module, x = layer(backend, name, "float64"), streams(backend, "float64")
    weights, plain = {k: backend.numpy(v) for k, v in module.weights().items()}, backend.numpy(x)
    expected, _ = reference.site(plain, weights, module.config, lambda u: 2 * u, reference.one_hot(plain))
    np.testing.assert_allclose(backend.numpy(run(backend, module, x)), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_runs_in_every_dtype_with_finite_gradients(backend, float64, name, dtype):
    module, x = layer(backend, name), streams(backend, dtype)
    out = run(backend, module, x)
    assert backend.dtype(out) == dtype and tuple(out.shape) == tuple(x.shape) and np.isfinite(backend.numpy(out)).all()
    square = lambda out: (out * out).sum()  # noqa: E731
    (of_x,) = backend.gradients(lambda x: square(run(backend, module, x)), x)
    assert np.isfinite(of_x).all()
    (of_weights,) = backend.parameter_gradients(lambda modules: square(run(backend, modules[0], x)), [module])
    assert set(of_weights) == set(module.weights())
    assert all(np.isfinite(gradient).all() and gradient.dtype == np.float32 for gradient in of_weights.values())


@pytest.mark.parametrize("lead", [(), (3,), (0, 4), (2, 1, 3)])
def test_functions_take_any_leading_shape(backend, lead):
    module, x = layer(backend), streams(backend, lead=lead)
    u, context, _ = backend.package.pre(x, module.weights(), module.config)
    assert tuple(u.shape) == (*lead, 5) and tuple(backend.package.post(u, context).shape) == tuple(x.shape)


def test_halves_equal_the_whole(backend):
    module, x = layer(backend), streams(backend)
    u, context, _ = module.pre(x)
    assert bool((module.post(2 * u, context) == run(backend, module, x)).all())


def test_branches_are_handed_what_maxtext_hands_them(backend):
    module, x, kind = layer(backend), streams(backend), backend.package.HyperConnectionType

    def attention(inputs_q, inputs_kv, deterministic):
        assert inputs_q is inputs_kv and deterministic
        return inputs_q, "cache"

    out, metadata = module(lambda u: u, attention, x, kind.ATTENTION, deterministic=True)
    assert metadata == {} and tuple(out.shape) == tuple(x.shape)
    moe = lambda inputs: (inputs, 0.5, "updates")  # noqa: E731
    _, metadata = module(lambda u: u, moe, x, kind.MLP_MOE)
    assert metadata == {"load_balance_loss": 0.5, "moe_bias_updates": "updates"}


def test_initial_values_are_maxtexts(backend):
    """Projections have the variance of their fan-in."""
    weights = backend.layer(backend.package.MHCConfig(streams=4, dim=128)).weights()
    assert backend.numpy(weights["res_alpha"]).var() == pytest.approx(1 / 512, rel=0.1)
    assert backend.numpy(weights["pre_alpha_scale"]) == pytest.approx(0.01)
    assert not backend.numpy(weights["res_beta"]).any()


def test_a_head_with_a_closed_projection_halves_the_sum(backend):
    config = backend.package.MHCConfig.from_dialect("deepseek-v4", streams=3, dim=5)
    head, x = backend.fill(backend.head(config), {"head_fn": np.zeros((3, 5, 3))}), streams(backend)
    expected = (0.5 + 1e-6) * backend.numpy(x).sum(-2)
    np.testing.assert_allclose(backend.numpy(head(x)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda b, m: m.pre(b.array(np.zeros((2, 4, 2, 5)))), r"x must end in \[3, 5\], got \[2, 4, 2, 5\]"),
        (lambda b, m: run(b, m, b.array(np.zeros((4, 3, 5)))), r"x must be \[batch, seq, streams, dim\]"),
        (lambda b, m: m.post(b.array(np.zeros((2, 4, 6))), m.pre(streams(b))[1]), r"y must end in \[5\]"),
        (lambda b, m: b.package.pre(streams(b), {}, m.config), "weights must have pre_alpha"),
        (lambda b, m: b.package.reduce(streams(b), "max"), "how must be sum, mean or carried"),
        (lambda b, m: b.package.expand(streams(b), 0), "streams must be at least 1"),
        (lambda b, m: b.package.residual_matrix(b.array(np.zeros((2, 2))), m.config), r"logits must end in \[3, 3\]"),
    ],
)
def test_a_wrong_shape_is_named(backend, unchecked, call, said):
    with pytest.raises(ValueError, match=said):
        call(backend, layer(backend))


def test_shapes_are_checked_against_the_annotations_here(backend):
    """The check of these tests itself: y has another width than x, and gates another number of streams."""
    module, x = layer(backend), streams(backend)
    _, context, _ = module.pre(x)
    with pytest.raises(TypeCheckError):
        backend.package.post_mix(backend.array(np.zeros((2, 4, 6))), x, context.post, context.H, module.config)
    with pytest.raises(TypeCheckError):
        backend.package.pre_mix(x, backend.array(np.zeros((2, 4, 2))))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_the_gradient_of_a_gate_doesnt_depend_on_the_gate(backend, number):
    x, y = streams(backend), backend.array(np.random.default_rng(8).standard_normal((2, 4, 5)), "float32")
    config = backend.package.MHCConfig.from_dialect("deepseek-v4", streams=3, dim=5)
    H, gates = backend.array(np.ones((2, 4, 3, 3)), "float32"), np.ones((2, 4, 3))
    gates[1, 2, 0] = number
    (of_pre,) = backend.gradients(lambda pre: backend.package.pre_mix(x, pre).sum(), backend.array(gates, "float32"))
    np.testing.assert_allclose(of_pre, backend.numpy(x).sum(-1), rtol=1e-5, atol=1e-5)
    mixed = lambda post: backend.package.post_mix(y, x, post, H, config).sum()  # noqa: E731
    (of_post,) = backend.gradients(mixed, backend.array(gates, "float32"))
    np.testing.assert_allclose(of_post, np.repeat(backend.numpy(y).sum(-1)[..., None], 3, -1), rtol=1e-5, atol=1e-5)
