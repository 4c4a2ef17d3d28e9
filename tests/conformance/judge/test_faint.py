"""The smallest entries of H: they may be off by a quarter of themselves, whatever the bound of H allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conformance.cases.format import DTYPES
from conformance.judge.faint import TENSOR, check_faint

EXPECTED = np.array([[1.0, 2.0**-24], [2.0**-30, 0.5]])


def checked(changes=(), expected=EXPECTED, dtype="float32", contract="float32") -> Any:
    H = expected.astype(DTYPES[dtype])
    for place, value in changes:
        H[place] = value
    return check_faint(H, expected, contract)


@pytest.mark.parametrize(
    ("changes", "verdict", "ratio"),
    [
        ((), "passed", 0.0),
        ((((0, 1), 2.0**-24 * 1.0625),), "passed", 0.25),
        ((((1, 0), 2.0**-30 * 0.8125),), "marginal", 0.75),
        ((((1, 0), 2.0**-30 * 1.5),), "failed", 2.0),
        ((((0, 1), 0.0),), "failed", 4.0),
        ((((0, 0), 0.0),), "passed", 0.0),
    ],
)
def test_an_entry_is_judged_relative_to_itself(changes, verdict, ratio):
    check = checked(changes)
    assert (check.tensor, check.verdict) == (TENSOR, verdict) and check.ratio == pytest.approx(ratio, abs=1e-6)
    assert (check.error, check.bound) == (pytest.approx(ratio / 4, abs=1e-6), 0.25)


def test_the_message_names_the_entry():
    assert checked((((1, 0), 0.0),)).message == "an entry of 9.31e-10 came out as 0"
    assert checked((((1, 0), 2.0**-30),)).message == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, True),
        ({"dtype": "float64"}, True),
        ({"contract": "tf32"}, True),
        ({"contract": "activation"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"expected": np.array([2.0**-20, 1.0])}, True),
        ({"expected": np.array([2.0**-19, 2.0**-61])}, False),
        ({"expected": np.array([2.0**-60])}, True),
        ({"expected": np.zeros((0, 2))}, False),
    ],
)
def test_it_says_something_where_faint_entries_are_kept(change, says):
    assert (checked(**change) is not None) is says


def test_what_other_checks_tell_is_left_to_them():
    assert check_faint(None, EXPECTED, "float32") is None
    assert check_faint(EXPECTED, None, "float32") is None
    assert check_faint(EXPECTED[0], EXPECTED, "float32") is None
    assert checked((((0, 0), np.nan),)) is None
