"""Claims may differ by stage and by a parameter's value, in Python and from a program; the plain form stays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conformance.cases.corpus import load_corpus
from conformance.implementations.greeting import ProgramError, read_greeting
from conformance.interface import Capabilities
from conformance.judge.item import refusal

GREETING = {"protocol": "mhc-conformance-harness/1", "name": "program"}
ITEMS = [
    i for c in load_corpus() for i in c.items() if c.dialect == "paper" and i.variant.contract == "float32"
]  # fmt: skip


def claims(**changes: Any):
    named: dict[str, Any] = {"overrides": None} | changes
    return Capabilities(frozenset({"pre", "post"}), frozenset({"paper"}), **named)


def reasons(claimed, stage, x="float32", weights="float32"):
    chosen = [i for i in ITEMS if (i.stage, i.variant.x, i.variant.weights) == (stage, x, weights)]
    assert chosen
    return {refusal(i, claimed) for i in chosen}


def test_dtypes_differ_by_stage():
    claimed = claims(dtypes={"pre": {"bfloat16"}, "post": {"float32", "bfloat16"}})
    assert reasons(claimed, "post") == {""}
    assert reasons(claimed, "pre") == {"float32 not claimed"}
    assert reasons(claimed, "pre", "bfloat16") == {""}


def test_a_stage_that_a_mapping_leaves_out_is_not_claimed_for_any_dtype():
    assert reasons(claims(dtypes={"post": {"float32"}}), "pre") == {"float32 not claimed"}


def test_weights_differ_by_stage():
    claimed = claims(dtypes=frozenset({"bfloat16"}), weights={"pre": ("x",)})
    assert reasons(claimed, "pre", "bfloat16", "bfloat16") == {""}
    assert reasons(claimed, "pre", "bfloat16") == {"weights in float32 not claimed"}
    assert reasons(claimed, "post", "bfloat16") == {""}  # it has none


@pytest.mark.parametrize(
    "overrides, allowed",
    [
        (None, {1, 20}),
        (frozenset(), set()),
        (frozenset({"iterations"}), {1, 20}),
        ({"iterations": None}, {1, 20}),
        ({"iterations": (20, 50)}, {20}),
        ({"eps": None}, set()),
    ],
)
def test_an_override_may_be_claimed_for_some_values(overrides, allowed):
    claimed = claims(overrides=overrides)
    assert {n for n in (1, 20) if claimed.allows("iterations", n)} == allowed


def test_a_case_with_another_value_is_skipped_with_the_reason():
    (item,) = (i for i in ITEMS if i.stage == "residual_matrix" and i.case.overrides == {"iterations": 1})
    claimed = Capabilities(frozenset({"residual_matrix"}), frozenset({"paper"}), overrides={"iterations": (20,)})
    assert refusal(item, claimed) == "other values of iterations not claimed"


def greeted(claims):
    return read_greeting(json.dumps({**GREETING, "capabilities": claims}).encode())


def test_a_program_says_the_same():
    told = {
        "stages": ["pre", "post"], "dialects": ["paper"], "weights": {"pre": ["x"]},
        "dtypes": {"pre": ["float32"], "post": ["float32", "bfloat16"]}, "overrides": {"iterations": [10], "eps": None},
    }  # fmt: skip
    _, claimed = greeted(told)
    assert claimed.dtypes_of("post") == {"float32", "bfloat16"} and claimed.dtypes_of("pre") == {"float32"}
    assert claimed.weights_of("pre") == {"x"} and claimed.weights_of("post") == set()
    assert claimed.allows("iterations", 10) and not claimed.allows("iterations", 20)
    assert claimed.allows("eps", 0.5) and not claimed.allows("norm_eps", 0.5)


@pytest.mark.parametrize(
    "claim, said",
    [
        ({"dtypes": "float32"}, "capabilities.dtypes: expected a list or an object, got 'float32'"),
        ({"dtypes": {"pre": None}}, "capabilities.dtypes.pre: expected a list, got null"),
        ({"overrides": {"iterations": 10}}, "capabilities.overrides.iterations: expected a list or null, got 10"),
        ({"streams": {"pre": [4]}}, "capabilities.streams: expected a list or null, got an object"),
        ({"streams": [4.5]}, r"capabilities.streams\[0\]: expected an integer, got 4.5"),
        ({"stages": ["pre", "pry"]}, "capabilities: stages must be among expand, .*, got 'pry'"),
    ],
)
def test_a_program_that_claims_it_another_way_is_told(claim, said):
    with pytest.raises(ProgramError, match=said):
        greeted({"stages": ["pre"], "dialects": ["paper"], **claim})
