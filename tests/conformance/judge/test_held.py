"""Arrays that an implementation changes, in the call or after it, are told once."""

from __future__ import annotations

import numpy as np

from conformance.judge.held import Held, changes
from tests.conformance.judge.made import Answers


def test_a_change_is_told_once_by_its_bytes_and_a_weight_is_an_input():
    weight, cotangent = np.zeros(3), np.zeros(2)
    held = Held({"head_fn": weight, "x": np.zeros(1)}, {"out": cotangent})
    assert held.changed() == []
    weight[0], cotangent[1] = -0.0, np.nan
    assert held.changed() == ["input head_fn", "cotangent of out"] and held.changed() == []
    weight[0] = 0.0
    assert held.changed() == ["input head_fn"]
    assert Held({}, None).changed() == []


def test_a_change_in_the_call_is_told_there_and_one_afterwards_at_the_next_call():
    mine, arrays = Answers(), [np.zeros(2) for _ in range(3)]
    first = Held({"x": arrays[0]}, {"out": arrays[1]})
    arrays[1][0] = 1
    assert changes(mine, first) == [("cotangent of out", "changed its cotangent of out")]
    arrays[0][0] = 1
    second = Held({"x": arrays[2]}, None)
    assert changes(mine, second) == [("x", "changed the input x of the call before, after it had returned")]
    assert changes(mine, Held({"x": np.zeros(1)}, None)) == []


def test_what_another_implementation_was_handed_is_not_asked_about():
    mine, other, array = Answers(), Answers(), np.zeros(2)
    changes(mine, Held({"x": array}, None))
    changes(other, Held({}, None))
    array[0] = 1
    assert changes(mine, Held({}, None)) == []
