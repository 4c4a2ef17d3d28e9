"""Two implementations on one item, by numbers that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.judge.agreement import Agreement, Pair, distance
from conformance.judge.item import Outcome
from tests.conformance.judge.made import array, made

INF = float("inf")


@pytest.mark.parametrize(
    ("a", "b", "bound", "ratio"),
    [
        ([1.0], [1.0], 0.25, 0.0),
        ([1.0], [1.5], 0.25, 1.0),  # twice the bound is allowed
        ([1.5], [1.0], 0.25, 1.0),
        ([1.0, 3.0], [1.25, 1.0], 0.25, 4.0),
        ([1.0, 3.0], [-1.0, 3.0], 0.5, 2.0),
        ([1.0], [1.0], 0.0, 0.0),
        ([1.0], [1.5], 0.0, INF),
        ([1.0], [2.0], 1.0, 0.5),
    ],
)
def test_the_distance_in_float32(a, b, bound, ratio):
    item = made(outputs={"out": [1.0] * len(a)}, bounds={"out": bound})
    assert distance(item, "out", array(a, "float32"), array(b, "float32")) == ratio


@pytest.mark.parametrize(
    ("tensor", "bound", "ratio"),
    [
        # bfloat16, e = 1, and two numbers that are 2^-5 = 0.03125 apart; each may be 0.0039453125 off by its rounding
        ("out", 0.01, 1.16796875),
        ("out", 0.0, INF),
        ("x", 0.01, 1.16796875),  # no output has parts, whatever an input of this name has
        # with parts of magnitude 1 each may be 0.0118359375 off: 0.007578125 remain
        ("d/x", 0.01, 0.37890625),
        ("d/x", 0.0, INF),
        ("d/y", 0.01, 1.16796875),  # a gradient without parts
    ],
)
def test_both_last_roundings_are_taken_off(tensor, bound, ratio):
    ones = {"x": [1.0], "y": [1.0]}
    item = made(outputs={"x": [1.0], "out": [1.0]}, gradients=ones, magnitudes={"x": [1.0]}, bounds={tensor: bound},
                variant="bfloat16-float32")  # fmt: skip
    a, b = array([1.0], "bfloat16"), array([1.03125], "bfloat16")
    assert distance(item, tensor, a, b) == pytest.approx(ratio, rel=1e-12)
    assert distance(item, tensor, b, a) == pytest.approx(ratio, rel=1e-12)


def test_float32_gradients_under_a_float64_x():
    item = made(gradients={"x": [1.0]}, bounds={"d/x": 2.0**-24}, variant="float64-float32")
    a, b = array([1.0], "float32"), array([1.0 + 2.0**-22], "float32")
    assert distance(item, "d/x", a, b) == pytest.approx(0.99)  # (4 - 2 * 1.01) / 2


def test_within_both_roundings_there_is_no_distance():
    item = made(outputs={"out": [1.0]}, bounds={"out": 0.0}, variant="bfloat16-float32")
    assert distance(item, "out", array([1.0], "bfloat16"), array([1.0078125], "bfloat16")) == 0.0


@pytest.mark.parametrize("bound", [0.0, 0.25])
def test_no_elements_are_no_distance_apart(bound):
    empty = np.zeros((0, 2), np.float32)
    assert distance(made(outputs={"out": empty}, bounds={"out": bound}), "out", empty, empty) == 0.0


def test_numbers_of_a_narrow_dtype_are_subtracted_without_rounding():
    item = made(outputs={"out": [1024.0]}, bounds={"out": 511.5}, variant="bfloat16-float32")
    ratio = distance(item, "out", array([1024.0], "bfloat16"), array([1.0], "bfloat16"))
    assert ratio == pytest.approx((1023.0 - 2 * 4.04) / 1023.0, rel=1e-12)  # 1023 is no number of bfloat16


def test_a_pair_that_never_met_has_no_figure():
    assert (Pair().tensors, Pair().ratio, Pair().where) == (0, 0.0, "")


FIRST, SECOND = made(case="first"), made(case="second", outputs={"out": [[[3.0]]], "pre": [1.0]})


def outcome(name, item, **values):
    return Outcome(name, item.case.id, item.stage, item.variant.name, "float32", "paper",
                   values={tensor: array(value, "float32") for tensor, value in values.items()})  # fmt: skip


def agreed(*outcomes):
    agreement = Agreement([FIRST, SECOND])
    for each in outcomes:
        agreement.add(each)
    return agreement


def test_each_pair_has_its_worst_figure_and_where_it_was():
    agreement = agreed(
        outcome("a", FIRST, out=[[[3.0]]]),
        outcome("b", FIRST, out=[[[3.25]]]),
        outcome("c", FIRST, out=[[[3.0]]]),
        outcome("c", SECOND, out=[[[3.0]]], pre=[1.0]),
        outcome("b", SECOND, out=[[[3.125]]], pre=[3.0]),
        outcome("a", SECOND, out=[[[3.0]]]),
    )
    figures = {tuple(sorted(names)): (p.ratio, p.tensors, p.where) for names, p in agreement.pairs.items()}
    assert figures == {
        ("a", "b"): (0.5, 2, "first, reduce, float32-float32, out"),
        ("b", "c"): (4.0, 3, "second, reduce, float32-float32, pre"),
        ("a", "c"): (0.0, 2, "first, reduce, float32-float32, out"),
    }


def test_of_two_equal_figures_the_first_is_told():
    agreement = agreed(
        outcome("a", FIRST, out=[[[3.0]]]), outcome("b", FIRST, out=[[[3.5]]]),
        outcome("a", SECOND, out=[[[3.5]]]), outcome("b", SECOND, out=[[[3.0]]]),
    )  # fmt: skip
    (pair,) = agreement.pairs.values()
    assert (pair.ratio, pair.where, pair.tensors) == (1.0, "first, reduce, float32-float32, out", 2)


def test_only_the_same_item_is_compared():
    agreement = agreed(outcome("a", FIRST, out=[[[3.0]]]), outcome("b", SECOND, out=[[[4.0]]]))
    assert agreement.pairs == {}


def test_an_outcome_gives_its_arrays_away():
    given, empty = outcome("a", FIRST, out=[[[3.0]]]), outcome("b", FIRST)
    assert agreed(given, empty, outcome("c", FIRST, out=[[[3.0]]])).pairs.keys() == {frozenset({"a", "c"})}
    assert given.values == {}


def test_a_line_for_each_pair_that_met_in_the_order_of_the_names():
    agreement = agreed(*(outcome(name, FIRST, out=[[[3.0 + by]]]) for name, by in (("a", 0), ("b", 0.25), ("c", 0.5))))
    where = "over 1 tensors (worst: first, reduce, float32-float32, out)"
    assert agreement.lines(["c", "a", "nobody", "b"]) == [
        f"c against a: at most 1.00 of both bounds apart, {where}",
        f"c against b: at most 0.50 of both bounds apart, {where}",
        f"a against b: at most 0.50 of both bounds apart, {where}",
    ]
    assert agreement.lines(["a"]) == []
