"""The parameters of a dialect one by one, against the layer in NumPy: Sinkhorn's, the reduction's and the head's."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.parity import reference
from tests.parity.tables import SINKHORN

pytestmark = pytest.mark.usefixtures("float64")
GUARDS = {"none": 0.0, "add": 1e-3, "denominator": 1e-3, "clip": 1e-3}
STARTS = [
    (softmax, order, guard)
    for softmax, order, guard in itertools.product(("rows", "columns", "none"), ("rows-first", "columns-first"), GUARDS)
    if (softmax, guard) != ("none", "add")  # no softmax to add to
]


def values(shape, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def dialect(backend, name, streams=3, dim=1, **changes):
    return backend.package.MHCConfig.from_dialect(name, streams=streams, dim=dim, **changes)


def pulled_back(backend, config, logits, weight):
    """The gradient of ``sum(H * weight)`` with respect to the logits, in float64."""
    weight = backend.array(weight, "float64")
    loss = lambda z: (backend.package.residual_matrix(z, config) * weight).sum()  # noqa: E731
    (gradient,) = backend.gradients(loss, backend.array(logits, "float64"))
    return gradient


def assert_is_numpys(backend, config, scale=3.0):
    """H and its gradient; the gradient's expected value is a central difference along a random direction."""
    shape = (2, 3, config.streams, config.streams)
    logits, weight, direction, step = values(shape, 1, scale), values(shape, 2), values(shape, 3), 1e-6
    H = backend.numpy(backend.package.residual_matrix(backend.array(logits, "float64"), config))
    np.testing.assert_allclose(
        H, reference.residual_matrix(logits, config), rtol=1e-10, atol=1e-14, err_msg=str(config)
    )
    ahead, behind = (reference.residual_matrix(logits + sign * step * direction, config) for sign in (1, -1))
    expected = (weight * (ahead - behind)).sum() / (2 * step)
    actual = (pulled_back(backend, config, logits, weight) * direction).sum()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7, err_msg=str(config))


@pytest.mark.parametrize("softmax, order, guard", STARTS)
def test_every_start_order_and_guard_of_sinkhorn_is_numpys(backend, softmax, order, guard):
    for iterations in (1, 3):
        assert_is_numpys(
            backend,
            backend.package.MHCConfig(
                streams=4, dim=1, softmax=softmax, order=order, guard=guard, eps=GUARDS[guard], iterations=iterations
            ),
        )


@pytest.mark.parametrize("name", ["paper", "maxtext-v1", "deepseek-v4", "xing-4"])
@pytest.mark.parametrize("iterations", [1, 2, 50])
@pytest.mark.parametrize("streams", [1, 6, 7, 12, 16])
def test_sizes_and_iterations_are_free(backend, streams, iterations, name):
    assert_is_numpys(backend, dialect(backend, name, streams, iterations=iterations), 1.0)


@pytest.mark.parametrize("name", ["deepseek-v4", "xing-4"])
def test_logits_beyond_the_limit_are_clipped_and_learn_nothing(backend, name):
    config = dialect(backend, name, logit_limit=2.0)
    assert_is_numpys(backend, config)
    logits = values((5, 3, 3), 1, 3.0)
    free = dataclasses.replace(config, logit_limit=None)
    H = backend.package.residual_matrix(backend.array(logits, "float64"), config)
    clipped = backend.package.residual_matrix(backend.array(np.clip(logits, -2, 2), "float64"), free)
    assert bool((clipped == H).all())
    gradient, beyond = pulled_back(backend, config, logits, values((5, 3, 3), 2)), np.abs(logits) > 2
    assert beyond.any() and not gradient[beyond].any() and gradient[~beyond].any()


def test_an_eps_in_the_denominators_alone_is_not_one_that_is_added(backend):
    shape = {"streams": 4, "dim": 1, "eps": 1e-3, "order": "rows-first", "softmax": "rows"}
    logits = backend.array(values((4, 4), 1, 3.0), "float64")
    added, divided = (
        backend.numpy(backend.package.residual_matrix(logits, backend.package.MHCConfig(guard=guard, **shape)))
        for guard in ("add", "denominator")
    )
    assert np.abs(added - divided).max() > 1e-5


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_reduction_is_summed_in_float32_or_in_the_activations_dtype(backend, dtype, how):
    x = backend.array(values((2, 4, 6, 5), 1), dtype)
    plain, narrow = backend.numpy(x), ml_dtypes.finfo(dtype).bits == 16
    share = plain.shape[-2] if how == "mean" else 1
    once = backend.package.reduce(x, how)
    stepwise = backend.package.reduce(x, how, reduction="activation")
    assert backend.dtype(once) == backend.dtype(stepwise) == dtype
    if narrow:
        rounded_once = (plain.astype(np.float32).sum(-2) / share).astype(dtype)
        assert np.array_equal(backend.numpy(once), rounded_once), "float32 rounds once"
        assert not bool((stepwise == once).all()), "every addition rounds"
    terms = np.abs(plain).sum(-2) / share
    limit = plain.shape[-2] * float(ml_dtypes.finfo(dtype).eps) * terms  # each addition rounds at most once
    assert (np.abs(backend.numpy(stepwise) - plain.sum(-2) / share) <= limit).all()


@pytest.mark.parametrize("head_norm_eps", [None, 0.5])
@pytest.mark.parametrize("name", ["deepseek-v4", "maxtext"])
def test_the_head_may_have_a_norm_eps_of_its_own(backend, name, head_norm_eps):
    config = dialect(backend, name, dim=5, norm_eps=0.01, head_norm_eps=head_norm_eps)
    head, x = backend.head(config, "float64"), values((2, 4, 3, 5), 1, 0.3)
    weights = {key: values(tuple(value.shape), number) for number, (key, value) in enumerate(head.weights().items())}
    expected = reference.head(x, weights, config)
    actual = backend.numpy(backend.fill(head, weights)(backend.array(x, "float64")))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)
    other = reference.head(x, weights, dataclasses.replace(config, head_norm_eps=0.02))
    assert np.abs(expected - other).max() > 1e-4


def test_passes_in_the_activations_dtype_round_where_float32_does_not(backend):
    logits = backend.array(values((16, 4, 4), 3, 2.0), "bfloat16")
    shape: dict[str, Any] = {"streams": 4, "dim": 1, "guard": "clip", "eps": 1e-6, "coefficients": "activation"}
    narrow, wide = (
        backend.package.residual_matrix(logits, backend.package.MHCConfig(matrix=kept, **shape))
        for kept in ("activation", "float32")
    )
    assert backend.dtype(narrow) == backend.dtype(wide) == "bfloat16" and not bool((narrow == wide).all())


def gradient(backend, logits, **parameters):
    config = backend.package.MHCConfig(
        streams=2, dim=1, order="rows-first", guard="denominator", eps=0.5, iterations=1, softmax="none", **parameters
    )
    return pulled_back(backend, config, np.array(logits), np.array([[1.0, -2.0], [0.5, 3.0]]))


def test_a_logit_at_its_limit_keeps_its_gradient(backend):
    at = gradient(backend, [[2.0, -1.0], [0.5, 1.0]], logit_limit=2.0)
    free = gradient(backend, [[2.0, -1.0], [0.5, 1.0]])
    np.testing.assert_array_equal(at, free)
    beyond = gradient(backend, [[2.5, -1.0], [0.5, 1.0]], logit_limit=2.0)
    assert beyond[0, 0] == 0 and free[0, 0] != 0


def test_of_equal_maxima_the_first_has_the_gradient_of_the_shift(backend):
    """Just above the tie the first entry is the maximum: its gradient there is the limit of this one's."""
    tied = gradient(backend, [[1.0, 1.0], [0.5, -1.0]])
    above = gradient(backend, [[1.0 + 1e-9, 1.0], [0.5, -1.0]])
    below = gradient(backend, [[1.0, 1.0 + 1e-9], [0.5, -1.0]])
    np.testing.assert_allclose(tied, above, atol=1e-7)
    assert np.abs(tied - below).max() > 1e-3


@pytest.mark.parametrize("name", SINKHORN)
def test_logits_of_ten_thousand_stay_finite(backend, name):
    """An offset cancels along the axis that the softmax runs over; without a softmax, the one normalised first."""
    config, offsets = dialect(backend, name), np.array([1e4, -1e4, 0.0])
    noise = values((5, 3, 3), 0)
    logits = backend.array(noise + (offsets if config.softmax == "columns" else offsets[:, None]))
    weight = backend.array(noise)
    loss = lambda z: (backend.package.residual_matrix(z, config) * weight).sum()  # noqa: E731
    assert np.isfinite(backend.numpy(backend.package.residual_matrix(logits, config))).all()
    assert np.isfinite(backend.gradients(loss, logits)[0]).all()


@pytest.mark.parametrize("offset", [90.0, 1e4])
@pytest.mark.parametrize("softmax", ["rows", "columns", "none"])
@pytest.mark.parametrize("order", ["rows-first", "columns-first"])
def test_without_an_eps_offsets_along_either_axis_are_those_of_the_iterations_on_logarithms(
    backend, order, softmax, offset
):
    """A line far below the others comes back in the next pass, which divides by nothing but its sum."""
    config = backend.package.MHCConfig(streams=3, dim=1, order=order, softmax=softmax, iterations=20)
    noise = np.round(values((5, 3, 3), 0) * 64) / 64
    rows, columns = -1, -2
    axes = (rows, columns) if order == "rows-first" else (columns, rows)
    for axis in (rows, columns):
        logits = noise + np.expand_dims(np.array([offset, -offset, 0.0]), axis)
        level, start = logits, {"rows": rows, "columns": columns, "none": axes[0]}[softmax]
        for pass_axis in [start, *(axes * 20)[start == axes[0] :]]:
            largest = level.max(pass_axis, keepdims=True)
            level = level - largest - np.log(np.exp(level - largest).sum(pass_axis, keepdims=True))
        narrow, weight = backend.array(logits), backend.array(noise)
        H = backend.numpy(backend.package.residual_matrix(narrow, config))
        np.testing.assert_allclose(H, np.exp(level), atol=3e-6)
        loss = lambda z, weight=weight: (backend.package.residual_matrix(z, config) * weight).sum()  # noqa: E731
        assert np.isfinite(backend.gradients(loss, narrow)[0]).all()
