"""Sums and signs of H, by numbers that were worked out by hand (docs/bound.md, "Stochasticity of H")."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.cases.case import DTYPES
from conformance.judge.rule import Check
from conformance.judge.stochasticity import check_stochasticity
from tests.conformance.judge.made import array, made

EXACT = [[0.25, 0.75], [0.75, 0.25]]
"""Sums of 1 along both axes."""
U = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def checked(H, expected=EXACT, dtype="float32", bound=0.0, own=None, **parameters):
    bounds = {"H": bound} if own is None else {"H": bound, "H stochastic": own}
    item = made("residual_matrix", inputs={"logits": expected}, outputs={"H": expected}, bounds=bounds,
                parameters={"streams": len(expected[-1]), **parameters})  # fmt: skip
    return check_stochasticity(item, array(H, dtype) if isinstance(H, list) else H)


def off(first, last=None, dtype="float64"):
    """EXACT with its first entry, and its last one, moved by a multiple of the dtype's unit roundoff."""
    H = np.array(EXACT)
    H[0, 0] += first * U[dtype]
    H[1, 1] += (first if last is None else last) * U[dtype]
    return H.tolist()


def test_exact_sums():
    check = checked(EXACT)
    assert check == Check("H stochastic", "passed", 0.0, 0.0, 4 * 2.0**-24 + 2 * 2.0**-54)


@pytest.mark.parametrize(
    ("dtype", "n_plus_two_u"),
    [("float64", 4.440892098500626e-16), ("float32", 2.384185791015625e-07), ("bfloat16", 0.015625),
     ("float16", 0.001953125)],
)  # fmt: skip
def test_for_two_streams_four_units_are_allowed_and_what_the_stored_entries_were_rounded_by(dtype, n_plus_two_u):
    check = checked(EXACT, dtype=dtype)
    assert check is not None
    assert check.bound == pytest.approx(n_plus_two_u + 1.1102230246251565e-16, rel=1e-15)  # and 2 * 2^-54


def test_for_four_streams_it_is_six_units():
    H = [[0.25] * 4] * 4
    check = checked(H, H)
    assert check is not None
    assert check.bound == pytest.approx(3.5762786865234375e-07 + 2.220446049250313e-16, rel=1e-15)


@pytest.mark.parametrize(
    ("units", "verdict"),
    [(0, "passed"), (1, "passed"), (2, "passed"), (3, "marginal"), (4, "marginal"), (5, "marginal"), (6, "failed")],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_both_sums_of_both_axes_in_units_of_float64(units, verdict, sign):
    # allowed are (2 + 2) u and 2 * 2^-54 = u: 5 u in all, so that half of it is between 2 and 3
    check = checked(off(sign * units), dtype="float64", own=0.0)
    assert check is not None
    assert (check.verdict, check.error, check.ratio) == (verdict, units * 2.0**-53, units / 5)
    assert check.bound == 5 * 2.0**-53 and check.message == ("sums of the rows" if units else "")


def columns_off(by):
    """Rows add up to 1, columns are off by ``by``."""
    return [[0.25 + by, 0.75 - by], [0.75, 0.25]]


def rows_off(by):
    """Columns add up to 1, rows are off by ``by``."""
    return [[0.25 + by, 0.75], [0.75 - by, 0.25]]


@pytest.mark.parametrize(
    ("order", "H", "bound", "verdict", "ratio", "message"),
    [
        # rows-first: columns are normalised last, and get nothing from the bound of H
        ("rows-first", columns_off(0.0625), 0.0625, "failed", 0.0625 / 2.38418579e-07, "sums of the columns"),
        ("rows-first", rows_off(0.0625), 0.0625, "passed", 0.5, "sums of the rows"),  # allowed: 2 * 0.0625 and a little
        ("rows-first", rows_off(0.125), 0.0625, "marginal", 1.0, "sums of the rows"),
        ("rows-first", rows_off(0.1875), 0.0625, "failed", 1.5, "sums of the rows"),
        ("columns-first", rows_off(0.0625), 0.0625, "failed", 0.0625 / 2.38418579e-07, "sums of the rows"),
        ("columns-first", columns_off(0.0625), 0.0625, "passed", 0.5, "sums of the columns"),
        ("columns-first", columns_off(0.1875), 0.0625, "failed", 1.5, "sums of the columns"),
        ("columns-first", columns_off(0.0625), 0.0, "failed", 0.0625 / 2.38418579e-07, "sums of the columns"),
    ],
)
def test_the_other_axis_gets_n_times_the_bound_of_H(order, H, bound, verdict, ratio, message):
    check = checked(H, bound=bound, order=order)
    assert check is not None
    assert (check.verdict, check.message) == (verdict, message)
    assert check.ratio == pytest.approx(ratio, rel=1e-5)
    loose = {"rows-first": "rows", "columns-first": "columns"}[order] in message
    assert check.bound == pytest.approx((2 * bound if loose else 0.0) + 2.38418579e-07, rel=1e-7)


def test_the_other_axis_gets_its_rounding_besides():
    # 2 * 2^-24 from the bound of H and (2 + 2) * 2^-24 of rounding: 6 * 2^-24, and a sum may be off by all of it
    check = checked(rows_off(4.5 * 2.0**-24), bound=2.0**-24, dtype="float64")
    assert check is not None and check.verdict == "failed"  # in float64 its rounding is 2^29 times smaller
    H = array(rows_off(6 * 2.0**-24), "float32")
    check = checked(H, bound=2.0**-24)
    assert check is not None
    assert check.verdict == "marginal" and check.ratio == pytest.approx(1.0, rel=1e-7)
    assert check.bound == pytest.approx(6 * 2.0**-24, rel=1e-7)


def test_sums_are_held_to_the_oracles_not_to_one():
    # a guard that adds to every sum leaves sums of 1 - 2^-4: to return those is right, and to return 1 is not
    expected = [[0.25, 0.6875], [0.6875, 0.25]]
    check = checked(expected, expected)
    assert check is not None and (check.verdict, check.error) == ("passed", 0.0)
    check = checked(EXACT, expected)
    assert check is not None and (check.verdict, check.error) == ("failed", 0.0625)


@pytest.mark.parametrize(
    ("own", "units", "verdict", "ratio"),
    [
        (2.0**-20, 8, "passed", 0.5),  # its own bound is 16 * 2^-24, and takes the place of (n + 2) u
        (2.0**-20, 16, "marginal", 1.0),
        (2.0**-20, 24, "failed", 1.5),
        (2.0**-30, 8, "failed", 2.0),  # a smaller one doesn't
        (2.0**-30, 4, "marginal", 1.0),
    ],
)
def test_a_case_may_have_a_bound_of_its_own(own, units, verdict, ratio):
    check = checked(off(units, dtype="float32"), own=own)
    assert check is not None
    assert check.verdict == verdict and check.ratio == pytest.approx(ratio, rel=1e-8)
    assert check.bound == pytest.approx(max(own, 4 * 2.0**-24), rel=1e-8)


def test_its_own_bound_counts_along_the_other_axis_too():
    check = checked(rows_off(0.25), own=0.25, bound=0.125)
    assert check is not None and (check.ratio, check.verdict, check.bound) == (0.5, "passed", 0.5)


def test_permutations_are_held_to_n_factorial_on_both_axes():
    # three streams: (3! + 2) u = 8 * 2^-24, on both axes, whatever the bound of H
    H = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    by = 8 * 2.0**-24
    wrong_rows = [[0.5 + by, 0.25, 0.25], [0.25 - by, 0.5, 0.25], [0.25, 0.25, 0.5]]
    wrong_columns = [list(row) for row in zip(*wrong_rows, strict=True)]
    for moved, name in ((wrong_rows, "rows"), (wrong_columns, "columns")):
        for order in ("rows-first", "columns-first"):
            check = checked(moved, H, bound=1.0, residual="permutations", order=order)
            assert check is not None
            assert (check.verdict, check.message) == ("marginal", f"sums of the {name}")
            assert check.ratio == pytest.approx(1.0, rel=1e-8) and check.bound == pytest.approx(by, rel=1e-8)
    check = checked(wrong_rows, H, bound=0.0)
    assert check is not None and check.verdict == "failed" and check.ratio == pytest.approx(1.6, rel=1e-8)  # (3 + 2) u


def test_a_negative_entry_fails_whatever_the_sums():
    check = checked([[1.125, -0.125], [-0.0625, 1.0625]], bound=100.0, own=100.0)
    assert check == Check("H stochastic", "failed", float("inf"), 0.125, 0.0, "an entry is negative: -0.125")
    zeros = checked([[1.0, -0.0], [0.0, 1.0]])
    assert zeros is not None and zeros.verdict == "passed"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_entry_that_is_not_finite(value):
    check = checked([[0.25, 0.75], [0.75, value]])
    assert check == Check("H stochastic", "non-finite", message="an entry isn't finite")


@pytest.mark.parametrize(
    "H",
    [
        None,
        ((0.25, 0.75), (0.75, 0.25)),
        array([[0.25, 0.75]], "float32"),
        array([[EXACT]], "float32"),
        np.array([[1, 0], [0, 1]]),  # of a dtype that no case has
        np.array(EXACT, "longdouble"),
    ],
)
def test_what_has_another_verdict_already_has_none_here(H):
    assert checked(H) is None


def test_it_does_not_apply_to_an_identity():
    assert checked([[9.0, 9.0], [9.0, 9.0]], residual="identity") is None


def test_nor_to_no_tokens():
    item = made("residual_matrix", inputs={"logits": np.zeros((0, 2, 2))}, outputs={"H": np.zeros((0, 2, 2))})
    assert check_stochasticity(item, np.zeros((0, 2, 2), np.float32)) is None


def test_nor_where_no_H_is_expected():
    assert check_stochasticity(made("reduce"), array(EXACT, "float32")) is None


def test_every_token_counts():
    expected = [[EXACT, EXACT], [EXACT, EXACT]]
    for token in ((0, 0), (0, 1), (1, 0), (1, 1)):
        H = np.array(expected)
        H[token][0, 0] = 0.5
        check = checked(H.tolist(), expected)
        assert check is not None and (check.verdict, check.error) == ("failed", 0.25)


def test_the_worse_axis_is_told():
    H = [[0.25, 0.75], [0.75 + 2.0**-22, 0.25 + 2.0**-22]]  # a row is off by 2^-21, columns are by half of that
    check = checked(H, bound=2.0**-10)
    assert check is not None
    assert (check.message, check.error) == ("sums of the columns", 2.0**-22)  # held to 2^-22, where rows get 2^-9
    check = checked(H, bound=0.0)
    assert check is not None and (check.message, check.error) == ("sums of the rows", 2.0**-21)


def test_the_sums_themselves_do_not_round():
    # in float64 a sum of these would round 2^-60 away, and 1 + 2^-60 would be 1
    H = array([[1.0, 2.0**-60], [2.0**-60, 1.0]])
    check = checked(H, [[1.0, 0.0], [0.0, 1.0]])
    assert check is not None and (check.verdict, check.error) == ("passed", 2.0**-60)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_stage_with_coefficients_is_checked_in_its_dtype(dtype):
    item = made("coefficients", inputs={"x": [[1.0]]}, outputs={"H": EXACT})
    check = check_stochasticity(item, array(EXACT, dtype))
    assert check is not None and check.verdict == "passed"
