"""Implementations out of process: one in C passes; whatever a program does wrong is a verdict, not the end."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_rows
from conformance.implementations.registry import load
from conformance.interface import SetupError
from conformance.judge.item import run_item
from conformance.judge.run import run

COMMAND = f"exec:{sys.executable} -m tests.conformance.implementations.program"
SOURCE = Path(__file__).parents[3] / "examples" / "harness_c" / "residual_matrix.c"
SETTINGS = ("softmax", "order", "guard", "logit_limit")
ITEMS = [i for c in load_corpus() for i in c.items() if i.stage == "reduce" and i.variant.name == "float32-float32"]
ITEM = next(i for i in ITEMS if i.case.id == "generic-n4-paper-2")


def verdict(how, limit=20.0):
    outcome = run_item(load(f"{COMMAND} {how}".strip(), limit), ITEM)
    return [c.verdict for c in outcome.failed], " ".join(c.message for c in outcome.failed) or outcome.skipped


def test_one_that_behaves_passes():
    assert verdict("") == ([], "")


@pytest.mark.parametrize(
    "how, said",
    [
        ("killed", "died of SIGKILL without an answer"),
        ("crashes", "ended with status 1 without an answer: end"),
        ("garbage", "its answer 'hello?': expected one JSON object on a line, got text that isn't JSON"),
        ("list", "its answer '[1, 2]': expected one JSON object on a line, got a list"),
        ("floods", "expected a line of at most"),
        ("talks-on", "expected one line for one request, got more"),
        ("other-id", "got one to 'other'"),
        ("wrong-header", "got 'something/else'"),
        ("other-header-id", "and '7'"),
        ("surplus", "got gradient/unknown too"),
        ("no-file", "no such file"),
        ("truncated", "expected a whole safetensors file"),
        ("reports", "status 'error': no such kernel"),
        ("fills-the-disk", "File too large"),
    ],
)
def test_each_way_to_be_wrong_is_said(how, said):
    verdicts, message = verdict(how)
    assert verdicts == ["errored"] and said in message and "\n" not in message


def test_its_memory_is_filled_unless_its_user_says_how(monkeypatch):
    assert verdict("memory")[1].endswith("status 'error': 128")
    monkeypatch.setenv("MALLOC_PERTURB_", "7")
    assert verdict("memory")[1].endswith("status 'error': 7")


@pytest.mark.parametrize("how, said", [("hangs", "no answer within 1.5 s"), ("silent", "standard output")])
def test_one_that_hangs_is_ended(how, said):
    verdicts, message = verdict(how, limit=1.5)
    assert verdicts == ["errored"] and said in message


def test_a_refusal_is_skipped():
    assert verdict("refuses") == ([], "refused: NotImplementedError: not today")


@pytest.mark.parametrize("how", ["killed", "garbage", "hangs", "other-id"])
def test_it_is_started_again_and_the_run_goes_on(how, tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_TEST_FLAG", str(tmp_path / "flag"))
    chosen = [i for i in ITEMS if i.case.dialect in ("paper", "glm-5")][:5]
    outcomes = list(run([f"{COMMAND} once-{how}"], chosen, jobs=1, limit=2.0))
    assert len(outcomes) == 5 and sum(bool(o.failed) for o in outcomes) == 1
    assert not any(o.skipped for o in outcomes)


@pytest.mark.parametrize(
    "reference, said",
    [
        ("exec:", "expected a command"),
        ("exec:/nowhere/at/all", "No such file"),
        ("exec:true", "ended with status 0"),
        ("exec:echo hello", "expected one JSON object"),
        (f"{COMMAND} other-protocol", "expected protocol"),
        (f"{COMMAND} unknown-claim", "capabilities: unknown key 'color'"),
    ],
)
def test_one_that_cannot_be_set_up_is_said(reference, said):
    with pytest.raises(SetupError) as caught:
        load(reference, 10.0)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def in_c(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    program = tmp_path_factory.mktemp("c") / "residual_matrix"
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE, "-lm"], check=True)
    return program


def test_the_example_in_c_passes_every_case_it_claims(in_c):
    items = [i for c in load_corpus() for i in c.items() if i.stage == "residual_matrix"]
    outcomes = [o for o in run([f"exec:{in_c}"], items, jobs=1) if not o.skipped]
    assert [o.case for o in outcomes if o.failed] == []
    assert {o.x for o in outcomes} == {"float32", "float64"} and len(outcomes) > 200
    read = [{i.case.parameters[name] for i in items if i.case.id in {o.case for o in outcomes}} for name in SETTINGS]
    assert read == [{"rows", "columns", "none"}, {"rows-first", "columns-first"},
                    {"none", "add", "denominator", "clip"}, {None, 2.5078125, 30.0}]  # fmt: skip
    assert all("d/logits" in {c.tensor for c in o.checks} for o in outcomes if o.case.startswith("wide"))


@pytest.mark.parametrize("setting", SETTINGS[:3])
def test_the_example_in_c_refuses_what_it_does_not_know(in_c, setting):
    config = {**dialect_rows()["paper"], "dialect": "paper", "streams": 2, "dim": 1, setting: "diagonal"}
    with pytest.raises(NotImplementedError, match="a softmax, an order and a guard that it knows"):
        load(f"exec:{in_c}", 10.0).call("residual_matrix", {"logits": np.zeros((1, 1, 2, 2), np.float32)}, config, None)
