"""Verdicts at sizes: what is right passes, what is wrong somewhere fails and is told where."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conformance.cases.dialects import parse, published
from conformance.judge.worker import ELSEWHERE
from conformance.questions.sizes import bound, tensors
from conformance.questions.sizes.design import Size
from conformance.questions.sizes.item import ENOUGH, SCHEME, Question, questions, sized
from conformance.questions.sizes.judging import judged, put
from tests.conformance.questions.sizes.exact import CLAIMED, Exact

STAGES = ("coefficients", "pre", "post", "layer", "head")
DTYPES = ("float32", "bfloat16", "float16")
ROW = published("deepseek-v4")
SIZE = Size(5, 9, 40, 4)


def item(stage="layer", x="float32", size=SIZE, row=ROW, claimed=CLAIMED):
    result = sized(size, row, stage, x, claimed)
    assert result is not None
    return result


def failures(change, stage="layer", x="float32"):
    return {c.tensor: c for c in judged(Exact(change), item(stage, x)).failed}


@pytest.mark.slow
@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_right_passes(stage, x, tmp_path):
    implementation = Exact()
    outcome = judged(implementation, item(stage, x), str(tmp_path))
    assert not outcome.failed and not outcome.skipped and len(outcome.checks) > 3, outcome.failed
    assert outcome.ratio < 0.3
    assert implementation.calls == [(stage, x, True), (stage, x, False)]
    again = judged(Exact(), item(stage, x), str(tmp_path))  # by the truth and the bounds that were kept
    assert again.checks == outcome.checks
    assert len(list(tmp_path.iterdir())) == 1


def add(tensor, where, amount=0.02):
    def change(results, with_gradients):
        if tensor in results:
            rows = results[tensor].reshape(45, *results[tensor].shape[2:])
            rows[where] = rows[where] + results[tensor].dtype.type(amount) * np.abs(rows).max()

    return change


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize(
    ("tensor", "where", "said"),
    [
        ("out", np.s_[13:], "tokens 13 to 44 (32 of 45); all 40 channels"),
        ("out", np.s_[:, :, 32:], "all 45 tokens; channels 32 to 39 (8 of 40)"),
        ("d/x", np.s_[44:, 2, 7:8], "tokens 44 to 44 (1 of 45); channels 7 to 7 (1 of 40)"),
    ],
)
def test_a_mistake_is_told_by_its_place(tensor, where, said, x):
    amount = 0.2 if (x, tensor) == ("bfloat16", "d/x") else 0.05
    found = failures(add(tensor, where, amount), x=x)
    assert set(found) == {tensor} and found[tensor].verdict == "failed" and found[tensor].message == said
    token = np.argwhere(_mask(where))[0][0]
    wrong = _mask(where).reshape(45, -1)  # [tokens, channels]
    heat, rows, columns = found[tensor].map, np.arange(32) * 45 // 32, np.arange(32) * 160 // 32
    assert (heat["tokens"], heat["rows"], heat["columns"]) == (True, 45, 160)
    cells = np.logical_or.reduceat(np.logical_or.reduceat(wrong, rows, axis=0), columns, axis=1)
    beyond = np.array(heat["cells"]) > 1
    assert not beyond[~cells].any() and beyond[cells].mean() > 0.5
    place = found[tensor].worst[0]["index"]
    assert place[0] * 9 + place[1] >= token and len(place) == 4


def _mask(where):
    mask = np.zeros((45, 4, 40), bool)
    mask[where] = True
    return mask


def test_a_weights_gradient_is_judged_as_a_whole():
    def change(results, with_gradients):
        if "d/res_alpha" in results:
            results["d/res_alpha"] = results["d/res_alpha"] * np.float32(1.01)

    assert set(failures(change)) == {"d/res_alpha"}


def test_a_call_without_gradients_has_its_own_verdict():
    def change(results, with_gradients):
        if not with_gradients:
            results["out"][4] = 0

    (check,) = failures(change).values()
    assert (check.tensor, check.verdict) == ("out", "failed")
    assert check.mode == "without gradients" and check.message == "tokens 36 to 44 (9 of 45); all 40 channels"


class Packed(Exact):
    """Without gradients it takes arrays for packed: it finds the first elements of the memory behind a view."""

    def __init__(self, *named):
        super().__init__()
        self.named = named

    def call(self, stage, inputs, config, cotangents):
        found = {k: self._found(v) if cotangents is None and k in self.named else v for k, v in inputs.items()}
        return super().call(stage, found, config, cotangents)

    def _found(self, value):
        whole = value
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        return value if value.flags.c_contiguous else np.nan_to_num(np.resize(whole, value.shape))


def test_an_array_that_is_read_as_packed_is_named_with_its_layout():
    found = judged(Packed("y"), item("post"))
    (check,) = found.failed
    assert check.tensor == "out" and re.fullmatch(r"without gradients \+ layout: y [a-z-]+", check.mode)
    assert found.modes == ("without gradients", "layout")
    copies = Packed("y")
    copies.capabilities = replace(copies.capabilities, copies=True)
    found = judged(copies, item("post"))
    assert not found.failed and found.modes == ("without gradients",)


def test_a_layout_that_is_refused_is_told_and_the_call_made_with_packed_arrays():
    class Refuses(Exact):
        def call(self, stage, inputs, config, cotangents):
            if not inputs["x"].flags.c_contiguous:
                raise NotImplementedError("packed arrays only")
            return super().call(stage, inputs, config, cotangents)

    found = judged(Refuses(), item("post"))
    ((mode, reason),) = found.refused.items()
    assert mode.startswith("without gradients + layout: x ") and reason.endswith("packed arrays only")
    assert not found.failed and found.modes == ("without gradients",)


def test_a_size_at_which_no_honest_evaluation_is_finite_is_left_out(monkeypatch):
    sharp = {"pre": 0.9, "post": -1.3, "res": 60.0}
    monkeypatch.setattr(tensors, "ALPHAS", sharp)
    row = published("megatron")
    claimed = replace(CLAIMED, dialects=frozenset({"megatron"}), contracts=frozenset({"float32", "activation"}))
    outcome = judged(Exact(), item("coefficients", "float16", Size(4, 16, 8, 4), row, claimed))
    assert outcome.skipped.startswith("left out: ") and outcome.skipped.endswith("(activation, float16)")


@pytest.mark.parametrize(
    ("narrow", "contract", "name", "largest", "left_out"),
    [
        ("float16", "activation", "d/pre_alpha", 65505.0, True),
        ("float16", "activation", "d/pre_alpha", 65504.0, False),
        ("float16", "activation", "d/head_fn", 94607.0, False),
        ("float16", "mixing", "d/pre_alpha", 94607.0, False),
        ("bfloat16", "activation", "d/pre_alpha", 94607.0, False),
        (None, "float32", "d/pre_alpha", 94607.0, False),
    ],
)
def test_a_sum_over_tokens_that_a_narrow_weight_cannot_have_as_its_gradient_is_left_out(
    narrow, contract, name, largest, left_out
):
    """65,536 tokens in float16: every honest evaluation is infinite there, and no sampled token is."""
    true: Any = SimpleNamespace(sums={name: np.array([1.0, -largest])})
    reason = r"d/pre_alpha reaches 6.55e\+04, more than float16 holds"
    with pytest.raises(ArithmeticError, match=reason) if left_out else nullcontext():
        bound._hold(true, contract, narrow)


def test_more_tokens_than_are_claimed_are_not_asked_for():
    (question, *_) = questions([SIZE], [ROW], STAGES, DTYPES, "")
    assert question.item(replace(CLAIMED, tokens=44)) == "more than 44 tokens not claimed"
    assert not isinstance(question.item(replace(CLAIMED, tokens=45)), str)


def test_no_value_at_all_is_mistrusted_and_one_that_is_missing_is_not_finite():
    def nothing(results, with_gradients):
        results["out"][:] = 0

    def unwritten(results, with_gradients):
        results["out"][4, 8, 3, 39] = np.nan

    assert failures(nothing)["out"].verdict == "mistrusted"
    check = failures(unwritten)["out"]
    assert check.verdict == "non-finite" and "tokens 44 to 44 (1 of 45)" in check.message


def test_wrong_shapes_dtypes_and_missing_tensors():
    def change(results, with_gradients):
        results["pre"] = results["pre"].astype(np.float64)
        results["H"] = results["H"][:, :8]
        if with_gradients:
            del results["d/x"]

    found = failures(change, "coefficients")
    assert {k: v.verdict for k, v in found.items()} == {
        "pre": "wrong-dtype", "H": "wrong-shape", "d/x": "wrong-shape",
    }  # fmt: skip


def test_a_matrix_that_is_not_stochastic_fails():
    def change(results, with_gradients):
        results["H"][0, 0, 0, 0] += np.float32(1e-5)

    assert failures(change, "coefficients")["H stochastic"].verdict == "failed"


def test_an_exception_is_a_verdict_and_a_refusal_a_skip():
    def raises(results, with_gradients):
        raise ValueError("no kernel")

    def refuses(results, with_gradients):
        raise NotImplementedError("no kernel")

    (check,) = judged(Exact(raises), item()).checks
    assert check.message.startswith("ValueError: no kernel (test_judging.py, line ") and check.verdict == "errored"
    assert check.trace[-1].endswith('raise ValueError("no kernel")')
    assert judged(Exact(refuses), item()).skipped.startswith("refused")


def test_an_implementation_without_gradients_is_called_once():
    implementation = Exact(capabilities=replace(CLAIMED, gradients=False))
    outcome = judged(implementation, item())
    assert implementation.calls == [("layer", "float32", False)]
    assert not outcome.failed and {c.tensor for c in outcome.checks} == {"out"}


def test_some_outputs_alone_may_be_claimed():
    outcome = judged(
        Exact(capabilities=replace(CLAIMED, outputs={"coefficients": ("post", "H")})), item("coefficients")
    )
    assert {c.tensor for c in outcome.checks} == {"post", "H", "H stochastic"}


# What is asked of whom


def asked(claimed, sizes=(SIZE,), rows=(ROW,), stages=STAGES, dtypes=DTYPES) -> list[Any]:
    return [question.item(claimed) for question in questions(sizes, rows, stages, dtypes, "")]


def test_a_size_is_asked_in_every_dtype_in_different_stages():
    items = asked(CLAIMED)
    assert [i.variant.x for i in items] == list(DTYPES) and len({i.stage for i in items}) == 3


def test_what_is_not_claimed_is_not_asked():
    only = replace(CLAIMED, stages=frozenset({"post"}), dtypes=frozenset({"bfloat16"}))
    items = asked(only)
    assert (items[0].stage, items[0].variant.x) == ("post", "bfloat16") and items[1:] == [ENOUGH, ENOUGH]
    reason = "every row, stage and dtype of this size not claimed"
    assert asked(replace(CLAIMED, dialects=frozenset({"paper"}), overrides=frozenset())) == [reason] * 3
    assert asked(replace(CLAIMED, streams=frozenset({2}))) == ["4 streams not claimed"] * 3


def test_rows_take_turns():
    rows = [published(name) for name in ("deepseek-v4", "paper", "maxtext")]
    claimed = replace(CLAIMED, dialects=frozenset({"deepseek-v4", "maxtext"}), overrides=frozenset({"iterations"}))
    items = asked(claimed, sizes=[replace(SIZE, batch=k) for k in range(1, 5)], rows=rows)
    assert [i.dialect for i in items[::3]] == ["deepseek-v4", "maxtext"] * 2


def test_large_sizes_are_asked_once():
    items = asked(CLAIMED, sizes=[Size(1, 1 << 13, 1 << 9, 4)] * 3)
    assert [i.variant.x for i in items] == list(DTYPES)


def test_iterations_are_changed_only_where_that_is_claimed():
    size = replace(SIZE, iterations=50)
    assert item(size=size).parameters["iterations"] == 50
    assert item(size=size, claimed=replace(CLAIMED, overrides=frozenset())).parameters["iterations"] == 20


def test_rows_of_permutations_have_few_streams():
    everything = replace(CLAIMED, dialects=frozenset({"mhc-lite"}))
    assert sized(replace(SIZE, streams=8), published("mhc-lite"), "layer", "float32", everything) is None


def test_a_question_is_its_key():
    rows = (ROW, parse("deepseek-v4,norm_eps=1e-20"))
    (question, *_) = questions([replace(SIZE, iterations=21, seed=3)], rows, STAGES, DTYPES, "/somewhere")
    assert question.key[0].startswith(SCHEME) and SCHEME in ELSEWHERE
    again = Question.of(question.key)
    assert again == question and again.rows[1].parameters == rows[1].parameters


def test_a_key_is_enough_for_a_worker():
    (question, *_) = questions([SIZE], [ROW], ("layer",), ("float32",), "")
    outcome = put(Exact(), question.key)
    assert outcome.case == "size-5x9-C40-n4-deepseek-v4" and outcome.stage == "layer" and not outcome.failed
    assert "--case size-5x9-C40-n4-deepseek-v4 --stage layer --dtype float32" in outcome.reproduce
