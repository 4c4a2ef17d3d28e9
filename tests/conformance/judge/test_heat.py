"""The coarse map of a tensor that failed, with cells that are worked out by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from conformance.cases.case import DTYPES
from conformance.judge.heat import MOST, WEIGHTS, Heat, heat_map, units
from conformance.judge.rule import check_tensor

INF, NAN = float("inf"), float("nan")


def shape_of(tensor, *shape):
    record = heat_map(tensor, np.zeros(shape))
    return record["tokens"], record["rows"], record["columns"], np.shape(record["cells"])


@pytest.mark.parametrize(
    ("value", "expected", "allowed", "bound", "error"),
    [
        (1.5, 1.0, 0.0, 0.25, 2.0),
        (0.5, 1.0, 0.0, 0.25, 2.0),
        (1.5, 1.0, 0.25, 0.25, 1.0),  # what the last rounding may move it by doesn't count
        (1.125, 1.0, 0.25, 0.25, 0.0),
        (1.0, 1.0, 0.0, 0.0, 0.0),
        (1.5, 1.0, 0.0, 0.0, INF),  # a bound of 0 has no units
        (1.5, 1.0, 0.5, 0.0, 0.0),
        (NAN, 1.0, 0.0, 0.25, INF),
        (INF, 1.0, 0.0, 0.25, INF),
        (NAN, NAN, NAN, 0.25, 0.0),
        (INF, NAN, NAN, 0.25, 0.0),
        (1.0, NAN, NAN, 0.25, INF),  # hidden
        (1.0, INF, INF, 0.25, 0.0),  # an infinity is free
        (INF, INF, INF, 0.25, 0.0),
        (NAN, -INF, INF, 0.25, 0.0),
        (1e300, 0.0, 0.0, 1e-300, INF),
    ],
)
def test_the_units_of_an_element(value, expected, allowed, bound, error):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = units(np.array([value]), np.array([expected]), np.array([allowed]), bound)
    assert found.shape == (1,) and found[0] == error
    assert units(np.array(value), np.array(expected), np.array(allowed), bound) == error


def test_the_axes_of_a_map():
    assert shape_of("out", 2, 3, 4, 5) == (True, 6, 20, (6, 20))
    assert shape_of("d/x", 2, 3, 5) == (True, 6, 5, (6, 5))
    assert shape_of("pre", 2, 3) == (True, 6, 1, (6, 1))
    assert shape_of("d/res_alpha", 8, 16) == (False, 8, 16, (8, 16))
    assert shape_of("d/res_beta", 4, 4) == (False, 4, 4, (4, 4))
    assert shape_of("d/pre_beta", 4) == (False, 1, 4, (1, 4))
    assert shape_of("moe_bias_updates", 4) == (False, 1, 4, (1, 4))
    assert shape_of("load_balance_loss") == (False, 1, 1, (1, 1))
    assert shape_of("out", 5, 13, 1, 100) == (True, 65, 100, (MOST, MOST))
    assert {"res_alpha", "mhc_norm.scale", "head_fn"} <= WEIGHTS


def test_a_cell_has_the_worst_of_its_elements():
    errors = np.zeros((1, 64, 33))  # two tokens a row, and one column more than there are cells
    errors[0, 6, 0], errors[0, 7, 0], errors[0, 8, 32], errors[0, 63, 31] = 2.0, 3.0, 4.0, 5.0
    cells = np.array(heat_map("out", errors)["cells"])
    assert cells.shape == (32, 32) and np.count_nonzero(cells) == 3
    assert cells[3, 0] == 3.0 and cells[4, 31] == 4.0
    assert cells[31, 31] == 5.0  # cell k of 32 has the columns from k * 33 // 32 on: the last has two


def test_every_element_is_in_one_cell():
    for count in (1, 2, 31, 32, 33, 63, 64, 65, 1000):
        errors = np.eye(count)[None]
        cells = np.array(heat_map("out", errors)["cells"])
        assert cells.shape == (min(count, 32),) * 2
        assert (np.diag(cells) == 1).all() and cells.sum() == len(cells)


def test_a_map_in_pieces_is_the_same():
    errors = np.random.default_rng(0).exponential(size=(77, 40))
    whole, pieces = Heat(77, 40, True), Heat(77, 40, True)
    whole.add(0, errors)
    for start in range(0, 77, 10):
        pieces.add(start, errors[start : start + 10])
    pieces.add(77, errors[:0])
    assert whole.record() == pieces.record() == heat_map("out", errors[None])
    assert np.array(whole.record()["cells"]).min() > 0


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (0.0, 0.0),
        (9.9e-4, 0.0),
        (1e-3, 1e-3),
        (0.00123, 0.0013),
        (0.5, 0.5),
        (0.991, 1.0),
        (1.0, 1.0),
        (1.0000001, 1.1),  # what is beyond the bound stays so
        (1.14, 1.2),
        (9.91, 10.0),
        (12.3, 13.0),
        (1234.0, 1300.0),
        (0.07, 0.07),
        (INF, INF),
    ],
)
def test_errors_are_rounded_up_to_two_digits(error, kept):
    assert heat_map("out", np.array(error))["cells"] == [[kept]]


def test_the_rule_maps_what_failed_and_nothing_else():
    def cells(actual, expected=0.0, dtype="float32", magnitude=None, contract="float32"):
        true = np.full((1, 2, 2), expected)
        given = np.array([[[expected, expected], [expected, actual]]], dtype)
        parts = None if magnitude is None else np.full((1, 2, 2), magnitude)
        check = check_tensor("out", given, true, DTYPES[dtype], contract, 0.25, parts, {})
        return check.verdict, check.map.get("cells")

    assert cells(0.25) == ("marginal", None)
    assert cells(0.5) == ("failed", [[0.0, 0.0], [0.0, 2.0]])
    assert cells(NAN) == ("non-finite", [[0.0, 0.0], [0.0, INF]])
    assert cells(1.0, NAN) == ("hidden", [[0.0, 0.0], [0.0, INF]])
    assert cells(1.5, 1.0, "float16") == ("failed", [[0.0, 0.0], [0.0, 2.0]])
    assert cells(2.25, 1.0, "float16", 512.0) == ("failed", [[0.0, 0.0], [0.0, 2.0]])  # its parts are allowed 0.76
    # a gradient of float32 weights under a float64 x is rounded once more: by 3 * 2^-24 * 2^24 * 1.01 at most
    assert cells(4.28, 1.0, "float32", 2.0**24, "float64") == ("failed", [[0.0, 0.0], [0.0, 1.1]])
