"""A factor on a whole tensor in a narrow dtype: what fires the check, what doesn't, and where it says nothing."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conformance.cases.format import DTYPES
from conformance.judge.rule import allowance, wide
from conformance.judge.scale import FEWEST, FLOAT32, SECOND_ORDER, Scale, Z

BFLOAT16, FLOAT16 = DTYPES["bfloat16"], DTYPES["float16"]


def checked(actual, expected, dtype=BFLOAT16, contract="float32", tile=0) -> Any:
    scale, tile = Scale(dtype, contract), tile or max(1, len(expected))
    for start in range(0, len(expected), tile):
        scale.add(actual[start : start + tile], expected[start : start + tile])
    return scale.check("d/x")


def drawn(tokens, width=256, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, width))


def rounded(values, dtype=BFLOAT16):
    return values.astype(np.float32).astype(dtype)


# ------------------------------------------------------------------------------------- figures that are worked by hand


def test_the_figures_of_a_factor_without_any_other_error():
    expected = np.ones((100, 2))
    check = checked(expected * 1.125, expected)
    allowed = 32 * 2.0**-24 + 16 * 2.0**-16
    assert (check.tensor, check.verdict) == ("d/x scale", "failed")
    assert check.error == pytest.approx(0.125, rel=1e-12) and check.bound == pytest.approx(allowed, rel=1e-12)
    assert check.ratio == pytest.approx(0.125 / allowed, rel=1e-12)
    assert check.message == "too large as a whole, by a factor of 1.125"
    assert checked(expected * 0.5, expected).message == "too small as a whole, by a factor of 0.5"


def test_the_figures_of_errors_that_differ_from_token_to_token():
    """Of 100 tokens whose one element is 1, 75 are 1 + 2^-7 and 25 are 1 - 2^-7: the factor is 1 + 2^-8."""
    expected = np.ones((100, 1))
    actual = expected + np.where(np.arange(100) % 4 < 3, 2.0**-7, -(2.0**-7))[:, None]
    check = checked(actual, expected)
    rest = 75 * (2.0**-7 - 2.0**-8) ** 2 + 25 * (2.0**-7 + 2.0**-8) ** 2
    spread = Z * math.sqrt(99 / 51) * math.sqrt(rest * 100 / 99) / 100
    assert check.error == pytest.approx(2.0**-8, rel=1e-12)
    assert check.bound == pytest.approx(spread + FLOAT32 + SECOND_ORDER * 2.0**-16, rel=1e-12)
    assert check.verdict == "marginal" and check.message == ""


def test_the_allowance_of_float16_and_of_a_tensor_with_one_large_element():
    expected = np.zeros((64, 3))
    expected[0], expected[5, 1] = 1.0, 4.0
    check = checked(expected, expected, FLOAT16)
    assert check.bound == pytest.approx(FLOAT32 * 4 * 7 / 19 + 16 * 2.0**-22, rel=1e-12)
    assert (check.verdict, check.ratio, check.error) == ("passed", 0, 0)


def test_a_tile_at_a_time_gives_the_same_figures():
    expected = drawn(100)
    actual = rounded(expected * 1.001)
    whole, tiled = checked(actual, expected), checked(actual, expected, tile=7)
    assert (tiled.ratio, tiled.bound) == pytest.approx((whole.ratio, whole.bound), rel=1e-12)


# ------------------------------------------------------------------------------------- where it says nothing


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, True),
        ({"dtype": DTYPES["float32"]}, False),
        ({"dtype": DTYPES["float64"]}, False),
        ({"dtype": FLOAT16}, True),
        ({"contract": "mixing"}, True),
        ({"contract": "activation"}, False),
        ({"contract": "tf32"}, False),
    ],
)
def test_it_says_something_of_narrow_dtypes_that_are_rounded_to_nearest(change, says):
    expected = np.ones((FEWEST, 2))
    assert (checked(expected * 2, expected, **change) is not None) is says


def test_it_says_nothing_of_few_tokens_of_zeros_and_of_nothing():
    assert checked(np.ones((63, 4)) * 2, np.ones((63, 4))) is None
    assert checked(np.ones((64, 4)), np.zeros((64, 4))) is None
    assert Scale(BFLOAT16, "float32").check("d/x") is None
    assert checked(np.ones((0, 4)), np.ones((0, 4))) is None


# ------------------------------------------------------------------------------------- what it can tell


@pytest.mark.parametrize("tokens", [128, 1025])
@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_a_thousandth_shows_in_bfloat16_though_every_element_is_within_a_gradients_allowance(tokens, factor):
    expected = drawn(tokens)
    actual = rounded(expected * factor)
    assert (np.abs(wide(actual) - expected) <= allowance(BFLOAT16, "float32", expected, np.abs(expected))).all()
    assert checked(actual, expected).ratio > 2


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("tokens", [64, 129, 1024])
def test_rounding_to_nearest_never_fires_it(dtype, tokens):
    ratios = [checked(rounded(e, dtype), e, dtype).ratio for e in (drawn(tokens, 64, seed) for seed in range(40))]
    assert max(ratios) < 0.5


def test_parts_that_are_rounded_and_errors_that_a_token_shares_do_not_fire_it():
    for seed in range(40):
        generator = np.random.default_rng(seed)
        parts = generator.standard_normal((3, 200, 64))
        shared = 1 + (generator.random((200, 1)) - 0.5) * 2.0**-7  # a gate of the token that was rounded
        total = sum(rounded(part).astype(np.float64) for part in parts)
        assert checked(rounded(total * shared), parts.sum(0)).ratio < 0.75


def test_what_is_cut_off_in_place_of_rounded_fires_it():
    expected = drawn(512)
    single = expected.astype(np.float32)
    cut = (single.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(ml_dtypes.bfloat16)
    check = checked(cut, expected)
    assert check.verdict == "failed" and check.message.startswith("too small")
