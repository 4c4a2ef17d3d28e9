"""Failures of one reason are one group, and what follows from an earlier stage is folded under it."""

from __future__ import annotations

from typing import Any

from conformance.judge.groups import Failure, grouped


def failure(stage, tensor, case="generic-n4-paper", x="float32", mode="", ratio=5.0, elements=100, **changes):
    content = {
        "implementation": "mine", "case": case, "family": case.partition("-")[0], "stage": stage, "x": x,
        "dialect": "paper", "tensor": tensor, "verdict": "failed", "mode": mode, "ratio": ratio, "elements": elements,
        "message": "", "reproduce": f"run {case} {stage} {x}",
    }  # fmt: skip
    return Failure(**{**content, **changes})


def shown(groups):
    return [(g.stage, g.tensor, g.follows) for g in groups]


def test_the_first_stage_of_the_computation_leads_and_what_it_is_part_of_follows():
    failures = [failure(s, t) for s, t in (("stack", "out"), ("layer", "d/x"), ("layer", "out"), ("coefficients", "H"),
                                           ("residual_matrix", "H"))]  # fmt: skip
    assert shown(grouped(failures)) == [
        ("residual_matrix", "H", ""),
        ("coefficients", "H", "residual_matrix"),
        ("layer", "out", "residual_matrix"),
        ("layer", "d/x", "residual_matrix"),
        ("stack", "out", "residual_matrix"),
    ]


def test_a_stages_gradients_and_what_it_is_checked_for_as_a_whole_follow_from_its_output():
    failures = [failure("residual_matrix", t) for t in ("d/logits", "H stochastic", "H")]
    assert shown(grouped(failures)) == [
        ("residual_matrix", "H", ""),
        ("residual_matrix", "H stochastic", "residual_matrix"),
        ("residual_matrix", "d/logits", "residual_matrix"),
    ]


def test_a_stage_that_is_handed_its_coefficients_does_not_follow_from_them():
    assert shown(grouped([failure("coefficients", "H"), failure("post", "out")])) == [
        ("coefficients", "H", ""),
        ("post", "out", ""),
    ]


def test_what_fails_where_the_earlier_stage_is_right_does_not_follow():
    widenings: tuple[dict[str, Any], ...] = ({"x": "bfloat16"}, {"dialect": "liger"})
    for wider in widenings:
        failures = [failure("pre", "u"), failure("layer", "out"), failure("layer", "out", **wider)]
        where = {"x": "float32", "dialect": "paper", **wider}
        right = {("mine", "pre", where["x"], where["dialect"])}
        assert shown(grouped(failures, right)) == [("pre", "u", ""), ("layer", "out", "")]
        assert shown(grouped(failures)) == [("pre", "u", ""), ("layer", "out", "pre")]  # it wasn't asked there


def test_an_output_does_not_follow_from_a_gradient_nor_a_plain_failure_from_one_in_a_mode():
    assert shown(grouped([failure("pre", "d/x"), failure("layer", "out")]))[1] == ("layer", "out", "")
    assert shown(grouped([failure("pre", "u", mode="layout"), failure("layer", "out")]))[1] == ("layer", "out", "")
    assert shown(grouped([failure("pre", "u"), failure("layer", "d/x")]))[1] == ("layer", "d/x", "pre")


def test_a_group_names_its_families_dtypes_and_smallest_item():
    failures = [
        failure("post", "out", case="wide-a", elements=9, mode="layout"),
        failure("post", "out", case="generic-a", elements=50, ratio=3.0),
        failure("post", "out", case="generic-b", elements=40, ratio=7.0, x="bfloat16"),
    ]
    (group,) = grouped(failures)
    assert group.items == 3 and group.dtypes == ("float32", "bfloat16") and group.families == ("generic", "wide")
    assert group.smallest.case == "generic-b" and group.worst.ratio == 7.0 and group.modes == ()


def test_implementations_are_apart():
    groups = grouped([failure("pre", "u"), failure("layer", "out", implementation="other")])
    assert shown(groups) == [("pre", "u", ""), ("layer", "out", "")]
