"""The dialect that an implementation computes is named, and what differs where it computes another."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import time

import numpy as np
import pytest

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_rows
from conformance.implementations.wrapping import wrap
from conformance.questions.identify import FAMILIES, identify, same_layer
from conformance.questions.identifying import words
from conformance.questions.identifying.forward import STAGES, STRUCTURE, evaluate

ROWS = dialect_rows()
ITEMS = [item for case in load_corpus() for item in case.items()]
FEW = ("generic", "slowest", "eps-floor", "closed-gate", "tiny", "zero", "cancel-branch")


def wrong(name, *arguments, **more):
    """A layer of `selftest.mutants` or of `wrong_layers`."""
    pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")
    modules = [
        importlib.import_module(m) for m in ("conformance.selftest.mutants", "tests.conformance.questions.wrong_layers")
    ]
    return next(getattr(m, name) for m in modules if hasattr(m, name))(*arguments, **more)


def said(implementation, told, dtype="float32", verbose=False):
    """What was found, and all that is said of it."""
    found = identify(wrap(implementation), told, ROWS, ITEMS, dtype)
    return found, "\n".join(words.lines(implementation.name, dtype, found, ROWS, verbose))


@pytest.mark.parametrize("family", (*FAMILIES, "big-eps", "parameters"))
def test_the_forward_layer_has_the_corpus_true_values(family):
    for case in {id(i.case): i.case for i in ITEMS if i.case.family == family}.values():
        for item in {i.stage: i for i in case.items() if i.stage in STAGES and not i.variant.secondary}.values():
            given = {k: v.astype(np.float64) for k, v in item.inputs().items()}
            parameters = {**STRUCTURE, **case.parameters}
            found = evaluate(item.stage, given, parameters, case.stages[item.stage].options)
            for tensor, value in item.expected.items():
                if not tensor.startswith("d/"):
                    error = np.max(np.abs(found[tensor] - value)) / np.max(np.abs(value))
                    assert error < 1e-12, f"{item.id}, {tensor}: {error:.3g} of the largest value, expected 1e-12"


@functools.cache
def adapter(framework):
    module = importlib.import_module(f"conformance.adapters.{framework}_adapter")
    return {"jax": "jitted", "torch": "eager"}[framework], module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("told", ROWS)
@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_each_dialect_is_named_right(framework, told, dtype):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    name, module = adapter(framework)
    # a few families are enough for jax, which compiles every shape
    chosen = [i for i in ITEMS if framework == "torch" or (i.case.family in FEW and i.case.parameters["streams"] == 4)]
    found = identify(wrap(getattr(module, name)()), told, ROWS, chosen, dtype)
    assert found.as_told and found.raised == [] and found.gradients == []
    assert found.nearest.candidate.words == told and found.nearest.ratio <= 1
    row = {**ROWS[told], "norm_weight": True}  # where there is no weight, rows with one aren't another function
    alike = [d for d in found.dialects if not same_layer({**ROWS[d], "norm_weight": True}, row)]
    assert alike == [], "dialects of another function must not match"
    if dtype == "bfloat16":
        kept = "bfloat16" if ROWS[told]["coefficients"] == "activation" else "float32"
        assert f"coefficients in {kept}" in found.precision
        mixed = "rounded before it is added" if ROWS[told]["mixing"] == "activation" else "rounded once"
        assert mixed in found.precision
        if ROWS[told]["coefficients"] == "activation" and ROWS[told]["residual"] == "sinkhorn":
            made = "bfloat16" if ROWS[told]["matrix"] == "activation" else "float32"
            assert f"Sinkhorn's passes in {made}" in found.precision


@pytest.mark.parametrize(
    "mistake, told, change",
    [
        ("OneIterationLess", "paper", "19 iterations, not 20"),
        ("HalfTheIterations", "paper", "10 iterations, not 20"),
        ("OtherOrder", "paper", "one pass more, over columns, at the end"),
        ("OtherSoftmax", "deepseek-v4", "softmax over columns, not rows, and the other passes as they were"),
        ("SoftmaxOfTheOtherDialect", "deepseek-v4", "softmax over columns, not rows"),
        ("SoftmaxOfTheOtherDialect", "maxtext-v1", "softmax over rows, not columns"),
        ("OnePassMoreOrLess", "maxtext-v1", "19 iterations, not 20"),
        ("EndsOnRows", "deepseek-v4", "one pass more, over rows, at the end"),
        ("ClipForAdd", "deepseek-v4", "eps as a floor, not eps added"),
        ("NoEps", "deepseek-v4", "no eps, not eps added"),
        ("LargeEps", "deepseek-v4", "eps 0.0001, not 1e-06"),
        ("NoLogitLimit", "xing-4", "no limit of the logits"),
        ("Transposed", "liger", "H transposed"),
        ("TransposedBias", "liger", "b_res transposed"),
        ("NotApplied", "deepseek-v4", "H not applied: each stream keeps its own"),
        ("NoPostGate", "deepseek-v4", "no post gate in a layer, but in post"),
        ("ReadsTheMean", "deepseek-v4", "no pre gate: reads the mean of the streams"),
        ("Swapped", "deepseek-v4", "pre and post swapped"),
        ("SwappedSlices", "deepseek-v4", "pre and post swapped in φ"),
        ("ScaledBias", "deepseek-v4", "α on the bias too"),  # noqa: RUF001
        ("NoPreEps", "maxtext", "pre_eps 0, not 1e-06, but in the head"),
        ("NoPostEps", "hunyuan-v4", "post_eps 0, not 1e-06"),
        ("PostScaleOne", "paper", "post_scale 1, not 2"),
        ("HeadWithoutEps", "deepseek-v4", "no eps on the head's gates"),
        ("EpsOutsideTheRoot", "glm-5", "norm eps added to the root"),
        ("EpsOutsideTheRoot", "megatron", "norm eps added to the mean"),
        ("NoNormWeight", "maxtext", "the norm weight is ignored"),
        ("OnePlusW", "maxtext", "1 + w for the norm weight w"),
        ("NormPerStream", "deepseek-v4", "the root mean square of each stream over C alone"),
        ("MeanForSum", "deepseek-v4", "mean for sum and sum for mean in the reduction"),
        ("OwnPre", "deepseek-v4.1", "reads with its own pre"),
        ("StartsWithAll", "deepseek-v4.1", "the first site reads with all streams, not with stream 0"),
        ("SinglePassAlways", "deepseek-v4", "reads with the previous site's pre"),
    ],
)
def test_what_differs_is_said(mistake, told, change):
    found, text = said(wrong(mistake), told)
    assert not found.as_told, text
    # another change may be the same function to these cases: it is said beside the first
    assert (change,) in [answer.candidate.changes for answer in found.matches], text
    assert text.startswith(f"{wrong(mistake).name}, told {told}, float32: computes {told}, except: "), text


@pytest.mark.parametrize("mistake, told, change", [
    ("SinglePassAlways", "deepseek-v4", "reads with the previous site's pre"),
    ("OwnPre", "deepseek-v4.1", "reads with its own pre"),
    ("OneIterationLess", "maxtext-v1", "19 iterations, not 20"),
    ("Swapped", "megatron", "pre and post swapped"),
])  # fmt: skip
def test_what_differs_is_said_in_bfloat16(mistake, told, change):
    found, text = said(wrong(mistake), told, "bfloat16")
    assert found.nearest.ratio <= 1 and found.nearest.candidate.changes == (change,), text


@pytest.mark.parametrize("eps", [1e-7, 1e-5, 1e-4])
def test_megatrons_norm_eps_is_told(eps):
    found, text = said(wrong("NormEps", eps), "megatron")
    assert found.nearest.ratio <= 1 and found.nearest.candidate.changes == (f"norm_eps {eps:g}, not 1e-06",), text


def test_two_mistakes_at_a_time_are_found():
    found, text = said(wrong("TwoMistakes"), "deepseek-v4")
    assert set(found.nearest.candidate.changes) == {"post_scale 1, not 2", "19 iterations, not 20"}, text
    assert found.nearest.ratio <= 1


@pytest.mark.parametrize("told, computed", [("deepseek-v4", "liger"), ("liger", "xing-4"), ("paper", "maxtext-v1")])
def test_the_row_of_every_software_is_tried(told, computed):
    found, text = said(wrong("Computes", computed), told)
    assert found.nearest.candidate.words == computed and found.nearest.ratio <= 1, text
    assert f"{computed} differs from {told}, which it was told: " in text


def test_the_row_of_every_software_is_tried_with_a_change():
    found, text = said(wrong("Computes", "xing-4", iterations=19), "paper")
    assert found.nearest.candidate.words == "xing-4, except: 19 iterations, not 20", text
    assert found.nearest.ratio <= 1


def test_a_row_that_was_read_is_said_to_be():
    _, text = said(wrong("Computes", "megatron-dev"), "deepseek-v4")
    assert "computes megatron-dev (" in text and "megatron-dev was read, not run: Megatron-LM dev" in text


def test_the_stages_that_are_right_are_named():
    _, text = said(wrong("NotApplied"), "deepseek-v4")
    right = "residual_matrix, coefficients, pre, reduce, head: deepseek-v4; "
    assert f"stage by stage: {right}post, layer, stack: deepseek-v4, except: H not applied" in text


@pytest.mark.slow
def test_where_nothing_fits_the_stages_that_are_right_are_named_in_time():
    started = time.monotonic()
    found, text = said(wrong("StaleContext"), "deepseek-v4")
    assert "computes none of the dialects; nearest deepseek-v4 (" in text
    assert "coefficients, pre, post, reduce, head: deepseek-v4; layer: none, nearest deepseek-v4 (" in text
    assert not found.matches and time.monotonic() - started < 60


def test_what_is_not_claimed_is_no_difference():
    found, text = said(wrong("Claims", "paper", "residual_matrix"), "paper", verbose=True)
    assert found.as_told and "mixing" not in text
    assert not any(word in text for word in ("pre_eps", "post_eps", "norm", "post_scale", "gate", "φ")), text
    assert "same as" not in text, "no other row has the paper's H"


def test_rows_that_agree_in_all_that_is_claimed_are_one():
    found, text = said(wrong("Claims", "deepseek-v4", "coefficients", outputs={"coefficients": ("H",)}), "deepseek-v4")
    assert found.as_told and found.dialects == ["deepseek-v4", "deepseek-v4-transformers", "liger"], text
    assert text.count("liger") == 1 and "pre_eps" not in text, text


def test_no_mixing_is_stated_where_none_ran():
    few, _ = said(wrong("Claims", "deepseek-v4", "coefficients", "pre"), "deepseek-v4", "bfloat16")
    assert "coefficients in float32" in few.precision and "mixing" not in few.precision


@pytest.mark.slow
def test_more_roundings_than_the_dialect_has_are_not_another_dialect():
    found, text = said(wrong("Narrow"), "deepseek-v4", "bfloat16")
    assert not found.as_told and found.nearest.candidate.words == "deepseek-v4", text
    assert "it may be deepseek-v4 (within" in text and "mixing rounded before it is added" in text
    found, text = said(wrong("Tf32"), "deepseek-v4")
    assert "it may be deepseek-v4 (within" in text and "TF32" in text, text


def test_numbers_that_are_not_finite_do_not_hide_the_rest():
    found, text = said(wrong("NoShift"), "deepseek-v4")
    assert not found.as_told and found.nearest.candidate.words == "deepseek-v4"
    assert "not finite" in text and "is the maximum subtracted before exp?" in text


@pytest.mark.parametrize("mistake, told, sentence", [
    (("NormEpsOfSinkhorn",), "deepseek-v4", "the norm's eps is taken from Sinkhorn's eps"),
    (("HeadWithTheLayersEps",), "maxtext", "the head's norm eps is taken from the layer's"),
    (("NormEps", 1e-6), "deepseek-v4", "the norm's eps is 1e-06 whatever it is told"),
])  # fmt: skip
def test_a_configuration_that_is_not_followed_is_said(mistake, told, sentence):
    found, text = said(wrong(*mistake), told)
    assert found.nearest.candidate.words == told and not found.as_told and sentence in text, text


def test_the_eps_of_sinkhorn_in_the_norm_is_called_so():
    _, text = said(wrong("NormEpsOfSinkhorn"), "glm-5")
    assert "norm_eps 1e-06, Sinkhorn's eps, not 1e-05" in text, text


def test_the_command_answers_and_its_status_says_whether_it_was_told_so():
    pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")
    command = [sys.executable, "-m", "conformance.cli", "identify", "--dialect", "paper", "--impl"]
    done = subprocess.run([*command, "torch"], capture_output=True, text=True)
    assert done.returncode == 0 and "torch, told paper, float32: computes paper" in done.stdout
    done = subprocess.run([*command, "conformance.selftest.mutants:Transposed", "-v"], capture_output=True, text=True)
    assert done.returncode == 1 and "computes paper, except: H transposed" in done.stdout
    done = subprocess.run([*command, "tests.conformance.strangers:Raises"], capture_output=True, text=True)
    assert done.returncode == 2 and "none of the separating cases of paper" in done.stderr
