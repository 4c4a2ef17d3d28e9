"""The parameters of a dialect one by one, against float64 NumPy: Sinkhorn's, the reduction's and the head's."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

import torch_impl
from tests.torch_impl import torch_expected
from torch_impl import HyperHead, MHCConfig

GUARDS = {"none": 0.0, "add": 1e-3, "denominator": 1e-3, "clip": 1e-3}
STARTS = [
    (softmax, order, guard)
    for softmax, order, guard in itertools.product(("rows", "columns", "none"), ("rows-first", "columns-first"), GUARDS)
    if (softmax, guard) != ("none", "add")
]


def values(shape, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def gradient_of(leaf):
    assert leaf.grad is not None
    return leaf.grad


def assert_is_numpys(config, scale=3.0):
    """H and its gradient; the gradient's expected value is a central difference along a random direction."""
    shape = (2, 3, config.streams, config.streams)
    logits, weight, direction, step = values(shape, 1, scale), values(shape, 2), values(shape, 3), 1e-6
    given = torch.tensor(logits, requires_grad=True)
    H = torch_impl.residual_matrix(given, config)
    np.testing.assert_allclose(
        H.detach().numpy(), torch_expected.sinkhorn(logits, config), rtol=1e-10, atol=1e-14, err_msg=str(config)
    )
    (H * torch.tensor(weight)).sum().backward()
    ahead, behind = (torch_expected.sinkhorn(logits + sign * step * direction, config) for sign in (1, -1))
    expected = (weight * (ahead - behind)).sum() / (2 * step)
    found = (gradient_of(given).numpy() * direction).sum()
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
    logits = torch.tensor(values((5, 3, 3), 1, 3.0), requires_grad=True)
    H = torch_impl.residual_matrix(logits, config)
    assert torch.equal(
        H, torch_impl.residual_matrix(logits.clamp(-2, 2), dataclasses.replace(config, logit_limit=None))
    )
    (H * torch.tensor(values((5, 3, 3), 2))).sum().backward()
    beyond = logits.detach().abs() > 2
    gradient = gradient_of(logits)
    assert beyond.any() and not gradient[beyond].any() and gradient[~beyond].any()


def test_an_eps_in_the_denominators_alone_is_not_one_that_is_added():
    shape = {"streams": 4, "dim": 1, "eps": 1e-3, "order": "rows-first", "softmax": "rows"}
    logits = torch.tensor(values((4, 4), 1, 3.0))
    found = [torch_impl.residual_matrix(logits, MHCConfig(guard=guard, **shape)) for guard in ("add", "denominator")]
    assert (found[0] - found[1]).abs().max() > 1e-5


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_reduction_is_summed_in_float32_or_in_the_activations_dtype(dtype, how):
    x = torch.tensor(values((2, 4, 6, 5), 1)).to(dtype)
    exact = x.double().sum(-2) / (x.shape[-2] if how == "mean" else 1)
    once = torch_impl.reduce(x, how)
    assert once.dtype == dtype
    if dtype.itemsize == 2:
        wide = x.float().sum(-2) / (x.shape[-2] if how == "mean" else 1)
        assert torch.equal(once, wide.to(dtype)), "float32 rounds once"
    stepwise = torch_impl.reduce(x, how, reduction="activation")
    assert stepwise.dtype == dtype
    if dtype.itemsize == 2:
        assert not torch.equal(stepwise, once), "every addition rounds"
    terms = x.double().abs().sum(-2) / (x.shape[-2] if how == "mean" else 1)
    limit = x.shape[-2] * torch.finfo(dtype).eps * terms  # each addition rounds at most once
    assert ((stepwise.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("head_norm_eps", [None, 0.5])
@pytest.mark.parametrize("name", ["deepseek-v4", "maxtext"])
def test_the_head_may_have_a_norm_eps_of_its_own(name, head_norm_eps):
    config = MHCConfig.from_dialect(name, streams=3, dim=5, norm_eps=0.01, head_norm_eps=head_norm_eps)
    head, x = HyperHead(config, dtype=torch.float64), values((2, 4, 3, 5), 1, 0.3)
    with torch.no_grad():
        for number, value in enumerate(head.weights().values()):
            value.copy_(torch.tensor(values(value.shape, number)))
    weights = {k: v.detach().numpy() for k, v in head.weights().items()}
    expected = torch_expected.head(x, weights, config)
    np.testing.assert_allclose(head(torch.tensor(x)).detach().numpy(), expected, rtol=1e-12, atol=1e-13)
    other = torch_expected.head(x, weights, dataclasses.replace(config, head_norm_eps=0.02))
    assert np.abs(expected - other).max() > 1e-4


def test_passes_in_the_activations_dtype_round_where_float32_does_not():
    logits = torch.tensor(values((16, 4, 4), 3, 2.0)).to(torch.bfloat16)
    shape: dict[str, Any] = {"streams": 4, "dim": 1, "guard": "clip", "eps": 1e-6, "coefficients": "activation"}
    narrow, wide = (
        torch_impl.residual_matrix(logits, MHCConfig(matrix=kept, **shape)) for kept in ("activation", "float32")
    )
    assert narrow.dtype == wide.dtype == torch.bfloat16 and not torch.equal(narrow, wide)


def gradient(logits, weight, **parameters):
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    config = MHCConfig(streams=2, dim=1, order="rows-first", guard="denominator", eps=0.5, iterations=1, **parameters)
    (torch_impl.residual_matrix(z, config) * torch.tensor(weight, dtype=torch.float64)).sum().backward()
    assert z.grad is not None
    return z.grad.numpy()


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
