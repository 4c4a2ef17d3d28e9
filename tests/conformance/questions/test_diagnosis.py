"""The cause of failures is named: what the run shows, which function is computed, from which size on it is wrong."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import published
from conformance.implementations.wrapping import wrap
from conformance.interface import Capabilities
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.judge.run import Label, run
from conformance.questions.diagnosis import measured
from conformance.questions.diagnosis.diagnose import diagnosed
from conformance.questions.diagnosis.places import Asked, Over, place
from conformance.questions.sizes.design import Size
from conformance.questions.sizes.item import questions

# Where it fails, by a stand-in that knows


class Known(Asked):
    """Fails where it is told to, without any call."""

    def __init__(self, wrong, steps=10**9):
        nobody: Any = SimpleNamespace()
        super().__init__(nobody, published("paper"), "post", "float32", False, time.monotonic() + 60)
        self.wrong, self.steps = wrong, steps

    def fails(self, size):
        self.steps -= 1
        if self.steps < 0:
            raise Over
        return self.wrong(size)


@pytest.mark.parametrize(
    ("wrong", "size", "words"),
    [
        (lambda s: s.tokens > 12, Size(129, 1, 512, 4), "only from 13 tokens on"),
        (lambda s: s.tokens > 1024, Size(1, 1025, 128, 3), "only from 1,025 tokens on"),
        (lambda s: s.tokens == 1, Size(1, 1, 4096, 4), "only for one token alone"),
        (lambda s: s.tokens % 16 == 0, Size(8, 2, 7168, 2), "only where the number of tokens is divisible by 16"),
        (lambda s: s.tokens % 128 == 0, Size(20, 32, 128, 6), "only where the number of tokens is divisible by 128"),
        (lambda s: s.seq > 64, Size(1, 1025, 128, 3), "only from 65 positions in a sequence on"),
        (lambda s: s.batch > 3, Size(129, 1, 512, 4), "only from 4 rows of a batch on"),
        (lambda s: s.dim >= 512, Size(1, 1, 4096, 4), "only from C = 512 on"),
        (lambda s: s.dim % 128 == 0, Size(1, 1, 4096, 4), "only where C is divisible by 128"),
        (lambda s: s.dim == 1000, Size(1, 7, 1000, 4), "only at C = 1000"),
        (lambda s: s.streams == 6, Size(20, 32, 128, 6), "only with 6 streams"),
        (lambda s: s.streams > 8, Size(1, 7, 128, 16), "only from 9 streams on"),
        (
            lambda s: s.elements > 65535,
            Size(129, 1, 512, 4),
            "only where x has more than some 65,532 to 65,535 elements",
        ),
        (lambda s: s.iterations == 50, Size(7, 1, 640, 8, 50), "only with 50 iterations, not with 20"),
        (lambda s: s.dim >= 512 and s.streams == 3, Size(1, 7, 640, 3), "only with 3 streams and only from C = 512 on"),
        (
            lambda s: s.tokens > 1,
            Size(1, 7, 640, 3),
            "where a token isn't alone: its result depends on the other tokens",
        ),
        (lambda s: True, Size(1, 7, 640, 3), ""),
        (lambda s: False, Size(1, 7, 640, 3), ""),
    ],
)
def test_the_place_is_found_and_named(wrong, size, words):
    assert place(Known(wrong), size) == words


def test_where_the_time_ends_the_best_answer_so_far_is_said():
    asked = Known(lambda s: s.tokens > 12, steps=9)
    with pytest.raises(Over):
        place(asked, Size(129, 1, 512, 4))
    assert asked.said == "only from more than 2 and at most 129 tokens on"


class TailUnwritten:
    """Multiplies the streams by post as it should, but for tokens from the 13th on."""

    name = "tail"
    capabilities = Capabilities(stages=frozenset({"post"}), dialects=frozenset({"transformer-engine"}), gradients=False)

    def post(self, inputs, config, cotangents):
        y, x, post, H = (inputs[k].astype(np.float64) for k in ("y", "x", "post", "H"))
        out = post[..., None] * y[..., None, :] + (np.swapaxes(H, -1, -2) if config["mix"] == "in-out" else H) @ x
        flat = out.reshape(-1, *out.shape[2:])
        flat[13:] = flat[12] if len(flat) > 13 else 0
        return {"out": out.astype(inputs["x"].dtype)}, {}


def test_a_size_is_asked_of_the_implementation_itself():
    row = published("transformer-engine")
    asked = Asked(wrap(TailUnwritten()), row, "post", "float32", False, time.monotonic() + 60)
    assert place(asked, Size(1, 129, 40, 4)) == "only from 14 tokens on"
    assert asked.coarse and len(asked.known) < 30
    over = Asked(wrap(TailUnwritten()), row, "post", "float32", False, time.monotonic() - 1)
    with pytest.raises(Over):
        place(over, Size(1, 129, 40, 4))


# What a run shows


def outcome(case, stage, tensor="", verdict="failed", x="float32", mode="", message="", family="", **more):
    made = Outcome("mine", case, stage, f"{x}-float32", x, "paper", family=family or case.partition("-")[0], **more)
    worst = [{"index": [0], "actual": 1.0, "expected": 2.0, "error": 1.0}]
    made.checks = [Check(tensor, verdict, 9.0, mode=mode, message=message, worst=worst)] if tensor else []
    return made


def at_once(*outcomes):
    return measured.at_once(measured.shown(outcomes, [o for o in outcomes if o.failed]))


def test_an_exception_comes_first_with_the_line_of_the_user():
    cause = at_once(
        outcome("generic-a", "layer", "out"),
        outcome("generic-a", "pre", "-", "errored", message="ValueError: no (mine.py, line 3, in pre)"),
        outcome("wide-a", "pre", "-", "errored", message="ValueError: no (mine.py, line 3, in pre)"),
    )
    assert cause == "raises in pre, 2 items: ValueError: no (mine.py, line 3, in pre)"


def test_a_wrong_return_says_what_to_return():
    cause = at_once(outcome("generic-a", "pre", "u", "wrong-shape", message="expected [1, 2] under 'u', got nothing"))
    assert cause == "pre returns the wrong thing for u: expected [1, 2] under 'u', got nothing"


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        (["without gradients"], "wrong where no gradients are asked for"),
        (["layout: x strided", "layout: x strided + other values"], "reads arrays as if they were packed (x strided"),
        (["without the gradient of x"], "wrong where no gradient of x is asked for"),
        (["unwritten memory"], "leaves elements unwritten"),
        (["same arrays"], "takes an array at a known address"),
        (["after another dtype"], "keeps state of an earlier call in another dtype"),
        (["called again"], "a second call with the same content gives another result"),
    ],
)
def test_a_failure_in_modes_alone_names_the_mode(modes, said):
    failing = [outcome(f"generic-{k}", "post", "out", mode=mode) for k, mode in enumerate(modes)]
    cause = at_once(*failing, outcome("wide-a", "post"))
    assert cause.startswith("right when called plainly; ") and said in cause


def test_views_and_small_entries_are_told_from_plain_failures():
    assert "as if they were packed" in at_once(outcome("shape-strided-paper", "post", "out"), outcome("wide-a", "post"))
    assert "small entries of H are lost" in at_once(outcome("faint-a", "residual_matrix", "H faint"))


def test_one_family_alone_names_its_cause_and_two_stages_hide_none():
    right, wrong = outcome("generic-a", "pre"), outcome("closed-gate-a", "pre", "u", family="closed-gate")
    seen = measured.shown([right, wrong], [wrong])
    assert measured.of_family(seen).startswith("the sigmoid loses relative accuracy where a gate is closed")
    both = [wrong, outcome("generic-b", "pre", "u")]
    assert measured.of_family(measured.shown([right, *both], both)) == ""


def test_one_dtype_alone_is_named_with_what_is_rounded():
    right, wrong = outcome("generic-a", "post"), outcome("generic-a", "post", "out", x="bfloat16")
    seen = measured.shown([right, wrong], [wrong])
    said = measured.of_dtype(seen, "mixing rounded before it is added")
    assert said == "right in float32; in bfloat16 the mixed sum is rounded before it is added, so twice in all"
    assert measured.of_dtype(measured.shown([wrong], [wrong])) == ""  # nothing else ran


def test_errors_as_large_as_narrow_roundings_are_told_from_another_function():
    def off(error):
        wrong = [outcome(f"generic-{k}", "coefficients", "H") for k in range(6)]
        for number, o in enumerate(wrong):
            o.checks[0].worst[0].update(expected=0.5, error=0.5 * error * (1 + number))
        return measured.of_rounding(measured.shown(wrong, wrong))

    assert off(2.0**-9).startswith(
        "H of coefficients is off by 0.002 to 0.01 of its value: a step is computed in bfloat16"
    )
    assert off(2.0**-5) == "" and off(2.0**-20) == ""


def test_a_parameter_that_tells_failing_cases_from_passing_ones_is_named():
    cases = {case.id: case for case in load_corpus() if "residual_matrix" in case.stages}
    named = {k: (c.parameters["iterations"] or 0) for k, c in cases.items()}
    outcomes = [outcome(k, "residual_matrix", "H" if n > 20 else "") for k, n in named.items()]
    seen = measured.shown(outcomes, [o for o in outcomes if o.failed])
    least, most = min(n for n in named.values() if n > 20), max(n for n in named.values() if n <= 20)
    said = measured.of_parameters(seen)
    assert said == f"wrong with {least} iterations and more, right up to {most} (residual_matrix)"


def test_few_passing_cases_are_no_ground_for_a_parameter():
    named = {case.id: case.parameters["dim"] for case in load_corpus() if "coefficients" in case.stages}
    smallest = min(named.values())
    outcomes = [outcome(k, "coefficients", "pre" if dim > smallest else "") for k, dim in named.items()]
    assert 0 < sum(not o.failed for o in outcomes) < sum(bool(o.failed) for o in outcomes)
    assert measured.of_parameters(measured.shown(outcomes, [o for o in outcomes if o.failed])) == ""


# From a run to its diagnosis


def diagnosis(reference, families, dialect="deepseek-v4", stages=None, sizes=(), dtypes=("float32",)):
    """The cause of what fails in a run over some families and sizes."""
    items = [
        item
        for case in load_corpus()
        if case.dialect == dialect and case.family in families
        for item in case.items()
        if item.variant.x in dtypes and (stages is None or item.stage in stages)
    ]
    asked = questions(sizes, [published(dialect)], ("post",), ("float32",), "", once=True) if sizes else []
    labels = {q.key: Label(q.case, "-", "-", "-", "-", str(q.slot)) for q in asked}
    outcomes = list(run([reference], items, sizes=labels))
    (found,) = diagnosed(outcomes, [o for o in outcomes if o.failed], seconds=60.0)
    return found


@pytest.mark.parametrize(
    ("mistake", "stages", "sizes", "cause"),
    [
        ("mutants:OneIterationLess", None, (), "19 iterations, not 20 (passes as deepseek-v4, except: 19 iterations"),
        ("mutants:LastIterationOnly", None, (), "the values are right; gradients of logits: through the last"),
        ("mutants_where:AnotherDtype", ("post",), (), "right as the first call of a process, wrong after others"),
        ("mutants_where:MultipleOf16", ("post",), [Size(8, 4, 40, 4)],
         "right at small sizes; wrong only where the number of tokens is divisible by 16"),
    ],
)  # fmt: skip
def test_the_first_line_names_the_cause(mistake, stages, sizes, cause):
    pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")
    dtypes = ("float32", "bfloat16") if "AnotherDtype" in mistake else ("float32",)
    found = diagnosis(
        f"conformance.selftest.{mistake}", ("smoke", "generic"), stages=stages, sizes=sizes, dtypes=dtypes
    )
    assert found.cause.startswith(cause), found
    assert any(line.startswith("first in ") for line in found.lines)
    assert any(line.startswith("mhc-conformance run --impl") for line in found.lines)


def test_an_implementation_that_dies_has_a_diagnosis_too():
    found = diagnosis("tests.conformance.strangers:Dies", ("generic",), "glm-5", ("reduce",))
    assert found.cause.startswith("raises in ") and "died with status" in found.cause
