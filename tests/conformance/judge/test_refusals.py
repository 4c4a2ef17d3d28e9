"""Every reason to skip an item, each with capabilities that lack that one thing and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.judge.item import refusal
from tests.conformance.judge.made import claims, made

BRANCH = {"x": [[[[1.0], [2.0]]]]}
WEIGHTS = {"head_fn": [[1.0], [1.0]], "head_base": [0.0], "head_scale": [1.0]}


def head(variant, **changes):
    return made("head", inputs=BRANCH, weights=WEIGHTS, variant=variant, **changes)


def without(kind, *names):
    return claims(**{kind: getattr(claims(), kind) - set(names)})


@pytest.mark.parametrize(
    ("item", "claimed", "reason"),
    [
        (made(), without("stages", "reduce"), "stage reduce not claimed"),
        (made("head"), without("stages", "reduce"), ""),
        (made(), without("dialects", "paper"), "dialect paper not claimed"),
        (made(), without("dtypes", "float32"), "float32 not claimed"),
        (made(variant="bfloat16-float32"), without("dtypes", "bfloat16"), "bfloat16 not claimed"),
        (made(variant="bfloat16-float32"), without("dtypes", "float32"), ""),
        (made(), claims(dtypes={"reduce": ("float16",), "head": ("float32",)}), "float32 not claimed"),
        (made(), claims(dtypes={"head": ("float32",)}), "float32 not claimed"),
        (made(), claims(dtypes={"reduce": ("float32",)}), ""),
        (head("float32-float32"), claims(weights=("x",)), "weights in float32 not claimed"),
        (head("float32-float32"), claims(weights=("float32",)), ""),
        (head("bfloat16-float32"), claims(weights=("x",)), "weights in float32 not claimed"),
        (head("bfloat16-float32"), claims(weights=("float32",)), ""),
        (head("bfloat16-bfloat16"), claims(weights=("float32",)), "weights in bfloat16 not claimed"),
        (head("bfloat16-bfloat16"), claims(weights=("x",)), ""),
        (head("float64-float64"), claims(weights=("x",)), "weights in float64 not claimed"),  # the wide dtype there
        (head("float64-float64"), claims(weights=("float32",)), ""),
        (head("float64-float32"), claims(weights=("x",)), "weights in float32 not claimed"),
        (head("float64-float32"), claims(weights=("float32",)), ""),
        (head("float16-float16"), claims(weights={"head": ("float32",)}), "weights in float16 not claimed"),
        (head("float16-float16"), claims(weights={"reduce": ("x",)}), "weights in float16 not claimed"),
        (head("float16-float16"), claims(weights={"head": ("x",)}), ""),
        (made(variant="bfloat16-bfloat16"), claims(weights=("float32",)), ""),  # a stage without weights
        (made(contract="float32"), without("contracts", "float32"), "contract float32 not claimed"),
        (made(contract="mixing"), without("contracts", "mixing"), "contract mixing not claimed"),
        (made(contract="mixing"), without("contracts", "float32"), ""),
        (made(variant="float64-float64"), without("contracts", "float64"), "contract float64 not claimed"),
        (made(contract="tf32", variant="float32-float32-tf32"), claims(), "contract tf32 not claimed"),
        (made(), claims(streams=frozenset({4})), "2 streams not claimed"),
        (made(), claims(streams=frozenset({2, 4})), ""),
        (made(), claims(streams=frozenset()), "2 streams not claimed"),
        (made(inputs={"x": np.zeros((0, 1, 2, 1))}), claims(empty=False), "zero tokens not claimed"),
        (made(inputs={"x": np.zeros((0, 1, 2, 1))}), claims(empty=True), ""),
        (made(inputs={"x": [[[[1.0]]]], "carried": np.zeros((0, 2))}), claims(empty=False), "zero tokens not claimed"),
        (made(), claims(empty=False), ""),
        (made(overrides={"eps": 1.0}), claims(overrides=frozenset()), "other values of eps not claimed"),
        (made(overrides={"eps": 1.0}), claims(overrides=frozenset({"eps"})), ""),
        (made(overrides={"eps": 1.0}), claims(overrides={"eps": (2.0,)}), "other values of eps not claimed"),
        (made(overrides={"eps": 1.0}), claims(overrides={"eps": (1.0,)}), ""),
        (made(overrides={"eps": 1.0}), claims(overrides={"eps": None}), ""),
        (made(overrides={"eps": 1.0}), claims(overrides=None), ""),
        (
            made(overrides={"pre_eps": 1.0, "eps": 1.0, "order": "rows-first"}),
            claims(overrides=frozenset({"order"})),
            "other values of eps, pre_eps not claimed",
        ),
        (made(), claims(overrides=frozenset()), ""),
        (made(), claims(), ""),
    ],
)
def test_a_reason_for_each_thing_that_is_not_claimed(item, claimed, reason):
    assert refusal(item, claimed) == reason


@pytest.mark.parametrize(
    ("dialect", "dialects", "overrides", "reason"),
    [
        ("paper", {"glm-5"}, None, "dialect paper not claimed"),  # a published one is claimed by its name alone
        ("mine", {"glm-5"}, None, ""),  # a row of one's own is claimed with every value
        ("mine", {"glm-5"}, frozenset({"eps"}), "dialect mine not claimed"),
        ("mine", {"mine"}, frozenset(), ""),
    ],
)
def test_a_dialect_that_is_not_published_needs_any_value(dialect, dialects, overrides, reason):
    item = made(dialect=dialect)
    assert refusal(item, claims(dialects=frozenset(dialects), overrides=overrides)) == reason


def test_tf32_takes_the_place_of_float32_where_a_case_has_both():
    both, one = made(other_variants=("float32-float32-tf32",)), made()
    with_tf32 = claims(contracts=claims().contracts | {"tf32"})
    assert refusal(both, with_tf32) == "judged by the tf32 contract instead"
    assert refusal(one, with_tf32) == "" and refusal(both, claims()) == ""
    tf32 = made(variant="float32-float32-tf32", contract="tf32", other_variants=("float32-float32",))
    assert refusal(tf32, with_tf32) == ""
