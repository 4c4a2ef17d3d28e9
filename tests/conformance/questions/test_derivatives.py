"""Gradients that aren't those of the values are named: which ones, and what they are instead."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.cases.dialects import dialect_rows
from conformance.questions.identifying.candidates import Candidate
from conformance.questions.identifying.derivatives import Question, named
from conformance.questions.identifying.forward import STAGES, STRUCTURE
from conformance.questions.identifying.records import Record
from tests.conformance.questions.test_identify import ITEMS, said, wrong

ROWS = dialect_rows()


@pytest.mark.parametrize("family", ("generic", "eps-floor", "tiny", "parameters", "cancel-branch"))
def test_a_complex_step_has_the_true_gradients(family):
    seen = set()
    for item in ITEMS:
        tensors = [tensor for tensor in item.expected if tensor.startswith("d/")]
        key = (item.case.id, item.stage)
        if item.case.family != family or item.stage not in STAGES or key in seen or not tensors:
            continue
        if item.stage in ("layer", "stack") and "load_balance_loss" in item.inputs():
            continue  # the router's outputs are handed through by the test's own branch
        seen.add(key)
        record = Record(item, given={k: v.astype(np.float64) for k, v in item.inputs().items()})
        record.vjps = {tensor: item.expected[tensor] for tensor in tensors}
        told = Candidate(item.case.dialect, {**STRUCTURE, **item.case.parameters})
        for tensor in tensors:
            question = Question(record, [tensor])
            scale = float(np.abs(item.expected[tensor]).sum())
            for due, shares in zip(question.returned, question.derivatives(told), strict=True):
                assert abs(due - float(shares.sum())) <= 1e-11 * scale, f"{item.id}, {tensor}"
    assert seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "mistake, told, sentence",
    [
        ("LastIterationOnly", "paper", "through the last iteration only"),
        ("ImplicitGradient", "deepseek-v4", "of infinitely many iterations"),
        ("AlphaFromOneRow", "deepseek-v4", "pre_alpha_scale, res_alpha_scale: of the first batch row"),
        ("ConstantDenominator", "liger", "gradients of x: of a constant norm"),
        ("NotTransposedBack", "liger", "gradients of x: with x's not transposed through H"),
        ("CarriedGradientCut", "deepseek-v4.1", "gradients of carried: zero"),
        ("BackwardOfFewer", "paper", "of another function: 10 iterations, not 20"),
        ("HalfOfPhi", "deepseek-v4", "pre_alpha: 0.5 times what they should be"),
    ],
)
def test_what_the_gradients_are_is_said(mistake, told, sentence, dtype):
    found, text = said(wrong(mistake), told, dtype)
    assert found.nearest.candidate.words == told and not found.as_told, text
    assert "its gradients are not this function's" in text and sentence in text, text


def test_a_weight_that_is_folded_into_the_projections_is_said():
    _, text = said(wrong("FoldedGradient"), "maxtext")
    assert "gradients of post_alpha, pre_alpha, res_alpha: with w folded into φ" in text, text


def test_no_cause_is_made_up_for_a_gradient_with_noise():
    found, text = said(wrong("NoisyGradient"), "deepseek-v4")
    assert found.gradients and not found.findings and not found.as_told, text


def test_the_weights_of_one_projection_have_one_name():
    assert named(["d/x", "d/res_alpha", "d/res_beta", "d/res_alpha_scale"]) == "x, res_*"
    assert named(["d/res_alpha", "d/res_beta"]) == "res_alpha, res_beta"
