"""What the last rounding may cost, by numbers that were worked out by hand (docs/bound.md, "The bound")."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.cases.case import DTYPES
from conformance.judge.rule import allowance
from tests.conformance.judge.made import array

NO_PARTS = None


@pytest.mark.parametrize(
    ("dtype", "contract", "expected", "magnitude", "allowed"),
    [
        # a wide dtype: the bound has its precision
        ("float32", "float32", 1.5, NO_PARTS, 0.0),
        ("float32", "float32", 1.5, 2.0, 0.0),
        ("float32", "mixing", 1.5, NO_PARTS, 0.0),
        ("float32", "activation", 1.5, NO_PARTS, 0.0),
        ("float64", "float64", 1.5, NO_PARTS, 0.0),
        ("float64", "float64", 1.5, 2.0, 0.0),
        # bfloat16: 1.01 * 2^-8 |e|
        ("bfloat16", "float32", 1.0, NO_PARTS, 0.0039453125),
        ("bfloat16", "mixing", -0.5, NO_PARTS, 0.00197265625),
        ("bfloat16", "activation", 3.0, NO_PARTS, 0.0118359375),
        ("bfloat16", "float32", 0.0, NO_PARTS, 0.0),
        ("bfloat16", "float32", 0.3, NO_PARTS, 0.00118359375),
        # float16: 1.01 * 2^-11 |e| + 2^-25
        ("float16", "float32", 1.0, NO_PARTS, 0.00049319386482238770),
        ("float16", "float32", -2.0, NO_PARTS, 0.00098635792732238770),
        ("float16", "activation", 0.0, NO_PARTS, 2.98023223876953125e-08),
        # a gradient with parts: three times the magnitude takes the place of |e|, and 2^-25 counts three times
        ("bfloat16", "float32", 100.0, 0.25, 0.002958984375),
        ("bfloat16", "float32", 0.0, 1.0, 0.0118359375),
        ("float16", "float32", 100.0, 0.25, 0.00036996245384216309),
        ("float16", "float32", 0.0, 0.0, 8.94069671630859375e-08),
        # a gradient of float32 weights under a float64 x: 1.01 * 2^-24 |e|
        ("float32", "float64", 1.0, NO_PARTS, 6.020069122314453125e-08),
        ("float32", "float64", -2.0, NO_PARTS, 1.20401382446289063e-07),
        ("float32", "float64", 100.0, 0.5, 9.0301036834716797e-08),
    ],
)
def test_the_allowance(dtype, contract, expected, magnitude, allowed):
    parts = None if magnitude is None else array([magnitude])
    found = allowance(DTYPES[dtype], contract, array([expected]), parts)
    assert found == pytest.approx(np.array([allowed]), rel=1e-14, abs=0)


def test_it_is_elementwise():
    found = allowance(DTYPES["bfloat16"], "float32", array([[1.0, -2.0], [0.0, 4.0]]), None)
    assert found.tolist() == [[0.0039453125, 0.007890625], [0.0, 0.01578125]]
    assert allowance(DTYPES["float32"], "float32", array([[1.0, 2.0]]), None).tolist() == [[0.0, 0.0]]
