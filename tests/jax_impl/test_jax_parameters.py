"""The parameters of a dialect one by one, against float64 NumPy: Sinkhorn's, the reduction's and the head's."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_impl
from jax_impl import HyperHead, MHCConfig
from tests.jax_impl import jax_expected

GUARDS = {"none": 0.0, "add": 1e-3, "denominator": 1e-3, "clip": 1e-3}
STARTS = [
    (softmax, order, guard)
    for softmax, order, guard in itertools.product(("rows", "columns", "none"), ("rows-first", "columns-first"), GUARDS)
    if (softmax, guard) != ("none", "add")
]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def values(shape, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def assert_is_numpys(config, scale=3.0):
    """H and its gradient; the gradient's expected value is a central difference along a random direction."""
    shape = (2, 3, config.streams, config.streams)
    logits, weight, direction, step = values(shape, 1, scale), values(shape, 2), values(shape, 3), 1e-6
    H, pullback = jax.vjp(lambda z: jax_impl.residual_matrix(z, config), jnp.asarray(logits))
    np.testing.assert_allclose(H, jax_expected.sinkhorn(logits, config), rtol=1e-10, atol=1e-14, err_msg=str(config))
    ahead, behind = (jax_expected.sinkhorn(logits + sign * step * direction, config) for sign in (1, -1))
    expected = (weight * (ahead - behind)).sum() / (2 * step)
    found = (np.asarray(pullback(jnp.asarray(weight))[0]) * direction).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=str(config))


@pytest.mark.parametrize("softmax, order, guard", STARTS)
def test_every_start_order_and_guard_of_sinkhorn_is_numpys(softmax, order, guard):
    for iterations in (1, 3):
        config = MHCConfig(
            streams=4, dim=1, softmax=softmax, order=order, guard=guard, eps=GUARDS[guard], iterations=iterations
        )
        assert_is_numpys(config)


@pytest.mark.parametrize("name", ["paper", "maxtext-v1", "deepseek-v4", "xing-4"])
@pytest.mark.parametrize("iterations", [1, 2, 50])
@pytest.mark.parametrize("streams", [1, 6, 7, 12, 16])
def test_sizes_and_iterations_are_free(streams, iterations, name):
    assert_is_numpys(MHCConfig.from_dialect(name, streams=streams, dim=1, iterations=iterations), 1.0)


@pytest.mark.parametrize("name", ["deepseek-v4", "xing-4"])
def test_logits_beyond_the_limit_are_clipped_and_learn_nothing(name):
    config = MHCConfig.from_dialect(name, streams=3, dim=1, logit_limit=2.0)
    assert_is_numpys(config)
    logits = jnp.asarray(values((5, 3, 3), 1, 3.0))
    H, pullback = jax.vjp(lambda z: jax_impl.residual_matrix(z, config), logits)
    free = dataclasses.replace(config, logit_limit=None)
    assert jnp.array_equal(H, jax_impl.residual_matrix(jnp.clip(logits, -2, 2), free))
    (gradient,), beyond = pullback(jnp.asarray(values((5, 3, 3), 2))), jnp.abs(logits) > 2
    assert beyond.any() and not gradient[beyond].any() and gradient[~beyond].any()


def test_an_eps_in_the_denominators_alone_is_not_one_that_is_added():
    shape = {"streams": 4, "dim": 1, "eps": 1e-3, "order": "rows-first", "softmax": "rows"}
    logits = jnp.asarray(values((4, 4), 1, 3.0))
    found = [jax_impl.residual_matrix(logits, MHCConfig(guard=guard, **shape)) for guard in ("add", "denominator")]
    assert jnp.abs(found[0] - found[1]).max() > 1e-5


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_reduction_is_summed_in_float32_or_in_the_activations_dtype(dtype, how):
    x = jnp.asarray(values((2, 4, 6, 5), 1), dtype)
    share = x.shape[-2] if how == "mean" else 1
    exact = np.asarray(x, np.float64).sum(-2) / share
    once = jax_impl.reduce(x, how)
    assert once.dtype == dtype
    if jnp.dtype(dtype).itemsize == 2:
        assert jnp.array_equal(once, (x.astype(jnp.float32).sum(-2) / share).astype(dtype)), "float32 rounds once"
    stepwise = jax_impl.reduce(x, how, reduction="activation")
    assert stepwise.dtype == dtype
    if jnp.dtype(dtype).itemsize == 2:
        assert not jnp.array_equal(stepwise, once), "every addition rounds"
    terms = np.abs(np.asarray(x, np.float64)).sum(-2) / share
    limit = x.shape[-2] * float(jnp.finfo(dtype).eps) * terms  # each addition rounds at most once
    assert (np.abs(np.asarray(stepwise, np.float64) - exact) <= limit).all()


@pytest.mark.parametrize("head_norm_eps", [None, 0.5])
@pytest.mark.parametrize("name", ["deepseek-v4", "maxtext"])
def test_the_head_may_have_a_norm_eps_of_its_own(name, head_norm_eps):
    config = MHCConfig.from_dialect(name, streams=3, dim=5, norm_eps=0.01, head_norm_eps=head_norm_eps)
    head, x = HyperHead(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64), values((2, 4, 3, 5), 1, 0.3)
    weights = {key: values(value.shape, number) for number, (key, value) in enumerate(head.weights().items())}
    for key, value in weights.items():
        getattr(head, key)[...] = jnp.asarray(value)
    expected = jax_expected.head(x, weights, config)
    np.testing.assert_allclose(head(jnp.asarray(x)), expected, rtol=1e-12, atol=1e-13)
    other = jax_expected.head(x, weights, dataclasses.replace(config, head_norm_eps=0.02))
    assert np.abs(expected - other).max() > 1e-4


def test_passes_in_the_activations_dtype_round_where_float32_does_not():
    logits = jnp.asarray(values((16, 4, 4), 3, 2.0), jnp.bfloat16)
    shape: dict[str, Any] = {"streams": 4, "dim": 1, "guard": "clip", "eps": 1e-6, "coefficients": "activation"}
    narrow, wide = (
        jax_impl.residual_matrix(logits, MHCConfig(matrix=kept, **shape)) for kept in ("activation", "float32")
    )
    assert narrow.dtype == wide.dtype == jnp.bfloat16 and not jnp.array_equal(narrow, wide)


def gradient(logits, weight, **parameters):
    config = MHCConfig(streams=2, dim=1, order="rows-first", guard="denominator", eps=0.5, iterations=1, **parameters)
    loss = lambda z: (jax_impl.residual_matrix(z, config) * jnp.asarray(weight)).sum()  # noqa: E731
    return np.asarray(jax.grad(loss)(jnp.asarray(logits)))


WEIGHT = [[1.0, -2.0], [0.5, 3.0]]


def test_a_logit_at_its_limit_keeps_its_gradient():
    at = gradient([[2.0, -1.0], [0.5, 1.0]], WEIGHT, softmax="none", logit_limit=2.0)
    free = gradient([[2.0, -1.0], [0.5, 1.0]], WEIGHT, softmax="none")
    np.testing.assert_array_equal(at, free)
    beyond = gradient([[2.5, -1.0], [0.5, 1.0]], WEIGHT, softmax="none", logit_limit=2.0)
    assert beyond[0, 0] == 0 and free[0, 0] != 0


def test_of_equal_maxima_the_first_has_the_gradient_of_the_shift():
    """Just above the tie the first entry is the maximum: its gradient there is the limit of this one's."""
    tied = gradient([[1.0, 1.0], [0.5, -1.0]], WEIGHT, softmax="none")
    above = gradient([[1.0 + 1e-9, 1.0], [0.5, -1.0]], WEIGHT, softmax="none")
    below = gradient([[1.0, 1.0 + 1e-9], [0.5, -1.0]], WEIGHT, softmax="none")
    np.testing.assert_allclose(tied, above, atol=1e-7)
    assert np.abs(tied - below).max() > 1e-3
