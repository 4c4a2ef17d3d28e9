"""The weights of an upcycled stack compute the plain residual network in every dialect, with and without noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from conformance.cases.dialects import dialect_names, parse
from conformance.oracle import formulas
from conformance.oracle.floats import Quick
from conformance.porter.errors import CANNOT, PortError
from conformance.porter.site import HEAD, SiteKey
from conformance.porter.upcycling.constants import Constants
from conformance.porter.upcycling.plain import PlainProbe

DIM = 6
SITES = [SiteKey("layers", layer, kind) for layer in range(6) for kind in ("attention", "ffn")]


def parameters(dialect):
    return dict(parse(dialect).parameters)


def run(p, streams, noise=0.0, dtype: Any = "float64", change=lambda site, weights: weights, norm_eps=1e-6):
    """The probe after all sites, the constants, and the largest change of the output."""
    constants = Constants(p, streams, DIM, np.dtype(dtype), noise, seed=3)
    probe = PlainProbe(p, streams, DIM, norm_eps, tokens=5, seed=1)
    for site in SITES:
        probe.step(change(site, constants.site(site)))
    head = constants.head(HEAD) if p["reduce"] == "head" else None
    return probe, constants, probe.change(head)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("streams", [2, 4, 5])
@pytest.mark.parametrize("dialect", dialect_names())
def test_every_dialect_computes_the_plain_network(dialect, streams, noise):
    p = parameters(dialect)
    if p["reduce"] == "sum":
        p["reduce"] = "mean"
    probe, constants, change = run(p, streams, noise)
    # where Sinkhorn's eps is added and nothing divides by the scale, the last norm's eps sees it
    assert change <= 1e-14 + 1e-3 * abs(constants.factor - 1)
    assert (probe.spread() > 0.01) == (noise > 0)
    assert abs(constants.factor - 1) < 2e-5


@pytest.mark.parametrize("dialect", ["deepseek-v4", "deepseek-v4.1", "hunyuan-v4"])
def test_the_stream_is_the_plain_one_times_the_scale_before_any_norm(dialect):
    probe, constants, _ = run(parameters(dialect), 4, noise=0.1)
    assert np.abs(probe.x.mean(1) / constants.scale - probe.plain).max() < 1e-14 * np.abs(probe.plain).max()


def test_a_sum_hands_n_times_the_stream_to_the_last_norm():
    p = parameters("paper")
    _, constants, change = run(p, 4)
    assert constants.factor == pytest.approx(4, abs=1e-12) and 1e-9 < change < 1e-3
    assert run(p, 4, norm_eps=0.0)[2] < 1e-14


@pytest.mark.parametrize(
    ("name", "value", "largest"),
    [
        ("post_beta", 0.0, 1e-4),  # post = 1: the branch is weighed as if Sinkhorn's eps took nothing from the stream
        ("post_beta", 0.01, 1.0),
        ("pre_beta", -math.log(2), 1.0),
        ("res_beta", np.array([[8.0, 8, 0, 1], [8, 7, 2, 0], [0, 3, 8, 8], [1, 0, 8, 6]]), 1.0),
    ],
)
def test_the_probe_sees_other_biases(name, value, largest):
    def spoil(site, weights):
        return {**weights, name: np.zeros_like(weights[name]) + value}

    sensitive = 1e-2 if name == "pre_beta" else 1e-6  # u's size shows in its norm's eps alone
    noise = 0.2 if name == "res_beta" else 0.0  # equal streams don't tell how they are mixed
    change = run(parameters("deepseek-v4"), 4, noise=noise, change=spoil, norm_eps=sensitive)[2]
    assert 1e-7 < change < largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_weights_change_the_output_by_their_rounding(dtype):
    from conformance.cases.format import DTYPES

    change = run(parameters("deepseek-v4"), 4, noise=0.1, dtype=DTYPES[dtype])[2]
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    assert 0 < change < unit


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("dialect", ["paper", "deepseek-v4", "liger", "megatron", "xing-4", "mhc-lite", "big"])
def test_rows_and_columns_of_H_have_one_sum(dialect, noise):
    p = parameters("deepseek-v4,eps=0.05,iterations=3" if dialect == "big" else dialect)
    constants = Constants(p, 4, DIM, np.dtype("float64"), noise, seed=5)
    logits = constants.site(SITES[0])["res_beta"]
    H = formulas.residual_matrix(logits[None], {**p, "streams": 4}, Quick())[0][0]
    assert np.ptp([*H.sum(0), *H.sum(1)]) < 1e-14 and H.sum(0)[0] == pytest.approx(constants.kept, abs=1e-14)
    if not noise and dialect != "big":
        staying = 0.75 + (0.25 * 5 / 23 if dialect == "mhc-lite" else 0)  # 5 of the 23 others leave one too
        assert np.diag(H) == pytest.approx(np.full(4, staying), abs=1e-5)


def test_a_large_eps_is_compensated_at_every_depth():
    p = parameters("deepseek-v4,eps=0.01,pre_eps=0.05")
    _, constants, change = run(p, 4, noise=0.1)
    assert constants.scale == pytest.approx(constants.kept ** len(SITES)) and constants.scale < 0.9
    assert change < 1e-14


@pytest.mark.parametrize(
    ("dialect", "streams", "message"),
    [
        ("deepseek-v4", 1, "pre would have to be 1 to 1.*take two streams or more"),
        ("paper", 1, "take two streams or more"),
        ("hunyuan-v4,post_scale=1,post_eps=0", 4, "post would have to be 1 to 1.*post_scale=2"),
        ("deepseek-v4,pre_eps=0.3", 4, "pre would have to be 0.25.*take a smaller pre_eps"),
        ("mhc-lite", 6, "permutations of more than 5 streams"),
    ],
)
def test_a_gate_that_would_be_closed_is_refused(dialect, streams, message):
    with pytest.raises(PortError, match=message) as refused:
        run(parameters(dialect), streams)
    assert refused.value.status == CANNOT


def test_too_much_noise_for_the_gates_is_refused():
    with pytest.raises(PortError, match="lower --noise"):
        run(parameters("deepseek-v4"), 4, noise=0.9)


def test_the_seed_draws_the_projections_and_the_noise():
    p = parameters("deepseek-v4")
    first, again, other = (
        dataclasses.replace(Constants(p, 4, DIM, np.dtype("float32"), 0.1), seed=seed).site(SITES[0])
        for seed in (1, 1, 2)
    )
    for name in ("pre_alpha", "post_alpha", "res_alpha", "post_beta", "res_beta"):
        assert np.array_equal(first[name], again[name]) and not np.array_equal(first[name], other[name])
    assert not any(first[f"{part}_alpha_scale"].any() for part in ("pre", "post", "res"))
    assert first["res_alpha"].std() == pytest.approx((4 * DIM) ** -0.5, rel=0.1)
