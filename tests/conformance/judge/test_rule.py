"""The rule on single tensors, each number worked out by hand (docs/bound.md, "The bound" and "Verdicts")."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conformance.cases.case import DTYPES
from conformance.judge.rule import EDGES, GOOD, Check, check_tensor, verdict_of
from tests.conformance.judge.made import array

INF, NAN = float("inf"), float("nan")


def checked(actual, expected, bound=0.25, dtype="float32", contract="float32", magnitude=None, inputs=None):
    actual = array(actual, dtype) if isinstance(actual, list) else actual
    parts = None if magnitude is None else array(magnitude)
    return check_tensor("t", actual, array(expected), DTYPES[dtype], contract, bound, parts, inputs or {})


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (0.0, "passed"),
        (0.25, "passed"),
        (0.5, "passed"),
        (0.5000000001, "marginal"),
        (0.75, "marginal"),
        (1.0, "marginal"),
        (1.0000000001, "failed"),
        (2.0, "failed"),
        (INF, "failed"),
    ],
)
def test_the_verdict_on_a_ratio(ratio, verdict):
    assert verdict_of(ratio) == verdict
    assert (verdict in GOOD) == (verdict != "failed")


@pytest.mark.parametrize(
    ("actual", "expected", "bound", "ratio", "verdict"),
    [
        ([1.0], [1.0], 0.25, 0.0, "passed"),
        ([1.125], [1.0], 0.25, 0.5, "passed"),  # half of the bound is not above half
        ([0.875], [1.0], 0.25, 0.5, "passed"),
        ([1.1875], [1.0], 0.25, 0.75, "marginal"),
        ([0.8125], [1.0], 0.25, 0.75, "marginal"),
        ([1.25], [1.0], 0.25, 1.0, "marginal"),  # the bound itself is allowed
        ([1.5], [1.0], 0.25, 2.0, "failed"),
        ([-1.0], [1.0], 0.25, 8.0, "failed"),
        ([1.0, 2.0, 2.0], [1.0, 2.0, 3.0], 2.0, 0.5, "passed"),  # the largest error counts, wherever it is
        ([7.0, 2.0, 3.0], [1.0, 2.0, 3.0], 2.0, 3.0, "failed"),
        ([1.0], [1.0], 0.0, 0.0, "passed"),  # a bound of 0 demands equality
        ([1.0000001], [1.0], 0.0, INF, "failed"),
        ([1.5], [1.0], 1.0, 0.5, "passed"),
    ],
)
def test_a_float32_tensor(actual, expected, bound, ratio, verdict):
    check = checked(actual, expected, bound)
    assert (check.tensor, check.verdict, check.ratio, check.bound) == ("t", verdict, ratio, bound)
    error = max(abs(np.float32(a) - e) for a, e in zip(actual, expected, strict=True))
    assert check.error == error and check.message == ""


@pytest.mark.parametrize(
    ("dtype", "contract", "actual", "expected", "magnitude", "bound", "ratio"),
    [
        # bfloat16, e = 1: the allowance is 0.0039453125; the next number up is 2^-7 = 0.0078125 away
        ("bfloat16", "float32", 1.0078125, 1.0, None, 0.0078125, 0.495),
        ("bfloat16", "float32", 1.0078125, 1.0, None, 0.00390625, 0.99),
        ("bfloat16", "float32", 1.0078125, 1.0, None, 0.001953125, 1.98),
        ("bfloat16", "float32", 0.99609375, 1.0, None, 0.0, 0.0),  # 2^-8 below: within the allowance
        ("bfloat16", "float32", 1.0078125, 1.0, None, 0.0, INF),
        # with parts of magnitude 1 the allowance is 0.0118359375, and the second number up is within it no more
        ("bfloat16", "float32", 1.0078125, 1.0, 1.0, 0.0, 0.0),
        ("bfloat16", "float32", 1.015625, 1.0, 1.0, 0.00390625, 0.97),
        # float16, e = 0: 2^-25 is allowed, the smallest number is 2^-24
        ("float16", "float32", 2.0**-24, 0.0, None, 2.0**-25, 1.0),
        ("float16", "float32", 2.0**-24, 0.0, 0.0, 2.0**-25, 0.0),  # with parts three times 2^-25 are
        ("float16", "float32", 2.0**-23, 0.0, 0.0, 2.0**-25, 1.0),
        # a gradient in float32 under a float64 x, e = 1: 1.01 * 2^-24 is allowed, the next number up is 2^-23 away
        ("float32", "float64", 1.00000011920928955, 1.0, None, 2.0**-24, 0.99),
        ("float32", "float32", 1.00000011920928955, 1.0, None, 2.0**-24, 2.0),
        ("float64", "float64", 1.00000011920928955, 1.0, None, 2.0**-24, 2.0),
    ],
)
def test_the_last_rounding_is_taken_off_first(dtype, contract, actual, expected, magnitude, bound, ratio):
    parts = None if magnitude is None else [magnitude]
    check = checked([actual], [expected], bound, dtype, contract, parts)
    assert check.ratio == pytest.approx(ratio, rel=1e-6)
    assert check.verdict == ("failed" if ratio > 1 else "marginal" if ratio > 0.5 else "passed")
    assert check.error == abs(float(array([actual], dtype)[0]) - expected)  # the figure is of the whole error


@pytest.mark.parametrize(
    ("actual", "verdict", "message"),
    [
        ([[1.0, 2.0]], "wrong-shape", "expected [2], got [1, 2]"),
        ([1.0], "wrong-shape", "expected [2], got [1]"),
        (array([1.0, 2.0]), "wrong-dtype", "expected float32, got float64"),
        (array([1.0, 2.0], "bfloat16"), "wrong-dtype", "expected float32, got bfloat16"),
        (array([[1.0]]), "wrong-shape", "expected [2], got [1, 1]"),  # the shape comes first
        ((1.0, 2.0), "wrong-dtype", "expected a NumPy array, got tuple"),
        (None, "wrong-dtype", "expected a NumPy array, got NoneType"),
        ([1.0, NAN], "non-finite", "first at [1]: nan"),
        ([-INF, NAN], "non-finite", "first at [0]: -inf"),
    ],
)
def test_what_has_no_figure(actual, verdict, message):
    check = checked(actual, [1.0, 2.0])
    assert (check.map != {}) == (verdict == "non-finite")  # test_heat has its cells
    assert replace(check, map={}) == Check("t", verdict, message=message)
    assert check.verdict not in GOOD


def test_the_first_number_that_is_not_finite_is_told():
    check = checked([[1.0, 2.0], [INF, NAN]], [[1.0, 2.0], [3.0, 4.0]])
    assert check.message == "first at [1, 0]: inf"


def test_no_elements_pass():
    assert checked(array(np.zeros((0, 2)), "float32"), np.zeros((0, 2))) == Check("t", "passed", bound=0.25)
    wrong = checked(array(np.zeros((2, 0)), "float32"), np.zeros((0, 2)))
    assert (wrong.verdict, wrong.message) == ("wrong-shape", "expected [0, 2], got [2, 0]")


def test_the_worst_four_elements_are_told_the_worst_first():
    expected = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    check = checked([[1.0, 1.5, 2.0], [0.75, 4.0, 1.125]], expected, 4.0)
    assert check.worst == [
        {"index": [1, 1], "actual": 4.0, "expected": 1.0, "error": 3.0},
        {"index": [0, 2], "actual": 2.0, "expected": 1.0, "error": 1.0},
        {"index": [0, 1], "actual": 1.5, "expected": 1.0, "error": 0.5},
        {"index": [1, 0], "actual": 0.75, "expected": 1.0, "error": 0.25},
    ]
    assert (check.verdict, check.ratio, check.error, check.histogram) == ("marginal", 0.75, 3.0, [])


def test_the_worst_are_those_with_the_largest_excess_not_the_largest_error():
    # e = 256 is allowed 1.01: an error of 2 is 0.99 too much; e = 1 is allowed 0.004: an error of 1 is 0.996 too much
    check = checked([258.0, 2.0], [256.0, 1.0], 1.0, "bfloat16")
    assert [row["index"] for row in check.worst] == [[1], [0]]
    assert check.error == 2.0 and check.ratio == pytest.approx(0.9960546875)


def test_a_failure_has_a_histogram_of_its_elements():
    units = [0.0, 0.0009765625, 0.001953125, 0.015625, 0.125, 0.5, 0.75, 1.0, 1.5, 2.0, 16.0, 128.0, 1024.0, 16384.0,
             131072.0, 1048576.0]  # fmt: skip
    check = checked([u / 4 for u in units], [0.0] * len(units))
    assert check.verdict == "failed" and check.ratio == 1048576.0
    #               0  1e-3 1e-2 0.1 0.5 1  2  10 100 1e3 1e4 1e5
    assert check.histogram == [2, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1, 2]
    assert len(EDGES) == 12


def test_a_histogram_under_a_bound_of_zero_has_what_is_equal_and_what_is_not():
    check = checked([1.0, 2.5, 3.0], [1.0, 2.0, 3.0], 0.0)
    assert check.histogram == [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_a_histogram_has_all_its_bins_where_the_last_are_empty():
    assert checked([1.0, 2.375], [1.0, 2.0]).histogram == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_each_bin_begins_with_its_edge():
    edges = [0.0, 0.5, 1.0, 2.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0]
    assert checked(edges, [0.0] * len(edges), 1.0).histogram == [1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    under = [9.5, 99.5, 999.5, 9999.5, 99999.5]
    assert checked(under, [0.0] * len(under), 1.0).histogram == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0]


def test_what_passes_has_no_histogram():
    assert checked([1.25], [1.0]).histogram == []


def test_a_single_number_has_an_empty_index():
    check = checked(array(1.5, "float32"), 1.0)
    assert (check.ratio, check.worst) == (2.0, [{"index": [], "actual": 1.5, "expected": 1.0, "error": 0.5}])
    nan = checked(array(NAN, "float32"), 1.0)
    assert (nan.verdict, nan.message) == ("non-finite", "first at []: nan")


def test_all_zeros_are_mistrusted_where_they_are_wrong():
    check = checked([0.0, -0.0], [1.0, 0.0])
    assert (check.verdict, check.message) == ("mistrusted", "all zeros where the expected values are not")
    assert check.ratio == 4.0 and check.worst[0]["index"] == [0] and sum(check.histogram) == 2
    assert checked([0.0, 1.0], [1.0, 0.0]).verdict == "failed"
    right = checked([0.0, 0.0], [0.125, 0.0])
    assert (right.verdict, right.message) == ("passed", "")


def test_an_input_in_the_place_of_an_output_is_mistrusted_where_it_is_wrong():
    inputs = {"x": array([1.0, 2.0], "bfloat16"), "y": array([[3.0, 4.0]]), "z": array([3.0], "float32")}
    check = checked([1.0, 2.0], [5.0, 6.0], inputs=inputs)
    assert (check.verdict, check.message) == ("mistrusted", "equal to the input x, where the expected is not")
    assert checked([1.0, 2.5], [5.0, 6.0], inputs=inputs).verdict == "failed"
    assert checked([3.0, 4.0], [5.0, 6.0], inputs=inputs).verdict == "failed"  # of another shape
    assert checked([3.0, 3.0], [5.0, 6.0], inputs=inputs).verdict == "failed"
    right = checked([1.0, 2.0], [1.0, 2.0], inputs=inputs)
    assert (right.verdict, right.message) == ("passed", "")


def test_a_check_goes_into_a_report_whole():
    row = Check("t", "failed", 2.0, 0.5, 0.25, "why", [{"index": [0]}], [0, 1]).as_dict()
    assert row == {"tensor": "t", "verdict": "failed", "ratio": 2.0, "error": 0.5, "bound": 0.25, "message": "why",
                   "worst": [{"index": [0]}], "histogram": [0, 1], "mode": "", "trace": [], "map": {}}  # fmt: skip
    assert Check("t", "errored").as_dict() == {"tensor": "t", "verdict": "errored", "ratio": 0.0, "error": 0.0,
                                               "bound": 0.0, "message": "", "worst": [], "histogram": [],
                                               "mode": "", "trace": [], "map": {}}  # fmt: skip
