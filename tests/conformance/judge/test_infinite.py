"""Tensors whose true values aren't all finite, by hand: NaN asks for NaN or an infinity, and an infinity is free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conformance.cases.case import DTYPES
from conformance.judge.agreement import distance
from conformance.judge.item import run_item
from conformance.judge.rule import GOOD, Check, check_tensor
from conformance.judge.stochasticity import check_stochasticity
from tests.conformance.judge.made import Answers, array, made

INF, NAN = float("inf"), float("nan")


def checked(actual, expected, bound=0.25, dtype="float32", contract="float32", magnitude=None):
    parts = None if magnitude is None else array(magnitude)
    return check_tensor("t", array(actual, dtype), array(expected), DTYPES[dtype], contract, bound, parts, {})


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_nan_or_either_infinity_is_right_where_nan_is_expected(number):
    check = checked([1.125, number], [1.0, NAN])
    assert (check.verdict, check.ratio, check.error, check.message) == ("passed", 0.5, 0.125, "")
    assert checked([number], [NAN]) == Check("t", "passed", bound=0.25)


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, 3e38])
def test_a_finite_number_hides_what_had_to_come_out(number):
    check = checked([[1.0, 2.0], [number, NAN]], [[1.0, 2.0], [NAN, NAN]])
    said = f"first at [1, 0]: {np.float64(np.float32(number))}, where NaN or an infinity must come out"
    assert replace(check, map={}) == Check("t", "hidden", message=said)
    assert check.map["cells"] == [[0.0], [0.0], [INF], [0.0]]
    assert check.verdict not in GOOD


@pytest.mark.parametrize("number", [NAN, INF, -INF, 0.0, 3e38])
def test_anything_goes_where_the_expected_is_an_infinity(number):
    for free in (INF, -INF):
        assert checked([number, 1.0], [free, 1.0]).verdict == "passed"
        assert checked([number], [free]) == Check("t", "passed", bound=0.25)


@pytest.mark.parametrize(
    ("actual", "verdict", "message"),
    [
        ([NAN, NAN, 1.0], "passed", ""),
        ([1.0, NAN, 1.0], "hidden", "first at [0]: 1.0, where NaN or an infinity must come out"),
        ([NAN, NAN, INF], "non-finite", "first at [2]: inf"),
        ([1.0, NAN, INF], "hidden", "first at [0]: 1.0, where NaN or an infinity must come out"),  # it comes first
        ([NAN, NAN, 1.5], "failed", ""),
        ([INF, 7.0, 1.1875], "marginal", ""),
    ],
)
def test_one_of_each(actual, verdict, message):
    check = checked(actual, [NAN, INF, 1.0])
    assert (check.verdict, check.message) == (verdict, message)


def test_only_finite_elements_are_ranked_and_counted():
    check = checked([NAN, 2.0, 5.0, 1.0, INF, 1.5], [NAN, 1.0, INF, 1.0, NAN, 1.0])
    assert (check.verdict, check.ratio, check.error) == ("failed", 4.0, 1.0)
    assert check.worst == [
        {"index": [1], "actual": 2.0, "expected": 1.0, "error": 1.0},
        {"index": [5], "actual": 1.5, "expected": 1.0, "error": 0.5},
        {"index": [3], "actual": 1.0, "expected": 1.0, "error": 0.0},
    ]
    #                          0  1e-3 1e-2 0.1 0.5 1  2  10 100 1e3 1e4 1e5
    assert check.histogram == [1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]


def test_the_last_rounding_is_taken_off_the_finite_elements():
    # bfloat16, e = 1: the allowance is 0.0039453125, the next number up is 2^-7 = 0.0078125 away
    check = checked([NAN, 1.0078125], [NAN, 1.0], 0.0078125, "bfloat16")
    assert check.ratio == pytest.approx(0.495, rel=1e-3)
    # with parts of magnitude 1 it is 0.0118359375
    check = checked([NAN, 1.0078125], [NAN, 1.0], 0.0, "bfloat16", magnitude=[NAN, 1.0])
    assert (check.verdict, check.ratio) == ("passed", 0.0)


def test_a_bound_of_zero_still_demands_equality_of_what_is_finite():
    assert checked([NAN, 1.0], [NAN, 1.0], 0.0).verdict == "passed"
    assert checked([NAN, 1.5], [NAN, 1.0], 0.0).ratio == INF


def test_all_zeros_hide():
    assert checked([0.0, 0.0], [NAN, 1.0]).verdict == "hidden"


H = [[[[0.5, 0.5], [0.5, 0.5]], [[NAN, NAN], [NAN, NAN]]]]  # [batch, seq, n, n]


def sums(actual, expected=H, dtype="float32"):
    item = made("residual_matrix", inputs={"logits": np.zeros_like(array(expected))}, outputs={"H": expected})
    return check_stochasticity(item, array(actual, dtype))


def test_the_sums_of_a_token_that_is_not_finite_are_not_looked_at():
    allowed = 4 * 2.0**-24 + 2 * 2.0**-54
    assert sums(H) == Check("H stochastic", "passed", bound=allowed)
    assert sums([[[[0.5, 0.5], [0.5, 0.5]], [[9.0, -9.0], [INF, 1.0]]]]) == Check(
        "H stochastic", "passed", bound=allowed
    )
    wrong = sums([[[[0.75, 0.5], [0.5, 0.5]], [[NAN, NAN], [NAN, NAN]]]])
    assert wrong is not None and (wrong.verdict, wrong.error) == ("failed", 0.25)
    assert sums([[[[0.5, NAN], [0.5, 0.5]], [[NAN] * 2] * 2]]) == Check(
        "H stochastic", "non-finite", message="an entry isn't finite"
    )
    negative = sums([[[[1.5, -0.5], [-0.5, 1.5]], [[NAN, NAN], [NAN, NAN]]]])
    assert negative is not None and negative.message == "an entry is negative: -0.5"


def test_a_token_with_a_single_entry_that_is_not_finite_is_left_out_whole():
    expected = [[[[0.5, 0.5], [0.5, 0.5]], [[0.5, INF], [0.5, 0.5]]]]
    check = sums([[[[0.5, 0.5], [0.5, 0.5]], [[0.5, 9.0], [0.5, 0.5]]]], expected)
    assert check is not None and check.verdict == "passed"


def test_sums_say_nothing_where_no_token_is_finite():
    assert sums([[[[NAN, NAN], [NAN, NAN]]]], [[[[NAN, NAN], [NAN, NAN]]]]) is None


def test_two_results_are_compared_where_they_are_finite():
    item = made(outputs={"out": [[[NAN, 1.0]]]}, gradients={"x": [[[[INF], [2.0]]]]}, bounds={"out": 0.25},
                magnitudes={"x": [[[[NAN], [1.0]]]]})  # fmt: skip
    a, b = array([[[NAN, 1.0]]], "float32"), array([[[INF, 1.5]]], "float32")
    assert distance(item, "out", a, b) == 1.0  # half apart, both bounds together are half
    x, other = array([[[[NAN], [2.0]]]], "bfloat16"), array([[[[3.0], [2.0]]]], "bfloat16")
    assert distance(item, "d/x", x, other) == 0.0


def test_an_item_with_nan_among_its_inputs_is_handed_over_and_judged():
    item = made(inputs={"x": [[[[NAN], [2.0]]]]}, outputs={"out": [[[NAN]]]})
    right = Answers({"out": array([[[NAN]]], "float32")}, {})
    assert [check.verdict for check in run_item(right, item).checks] == ["passed"]
    (handed,) = right.handed
    assert np.isnan(handed[1]["x"]).sum() == 1
    hiding = Answers({"out": array([[[2.0]]], "float32")}, {})
    assert [check.verdict for check in run_item(hiding, item).checks] == ["hidden"]


def test_numpy_does_not_warn_of_a_number_that_it_was_handed():
    item = made(inputs={"x": [[[[INF], [2.0]]]]}, outputs={"out": [[[NAN]]]})
    handed = replace(item, case=replace(item.case, infinite=True))
    handed.case.__dict__["tensors"] = item.case.tensors
    with np.errstate(all="warn"):
        for judged, state in ((handed, "ignore"), (item, "warn")):
            seen: list[Any] = []
            answers = Answers(
                {"out": array([[[NAN]]], "float32")}, {}, meanwhile=lambda _, s=seen: s.append(np.geterr())
            )
            assert [check.verdict for check in run_item(answers, judged).checks] == ["passed"]
            assert seen == [dict.fromkeys(("divide", "over", "under", "invalid"), state)]
        assert set(np.geterr().values()) == {"warn"}
