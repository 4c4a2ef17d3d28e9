"""The dialect that an implementation computes is named, and what differs where it computes another."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from conformance.corpus import load_corpus
from conformance.dialects import dialect_rows
from conformance.identify import identify, same_layer

ROWS = dialect_rows()


def items(dtype):
    return [i for c in load_corpus() for i in c.items() if i.variant.x == dtype and not i.variant.pure]


ITEMS = {dtype: items(dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("dtype", ITEMS)
@pytest.mark.parametrize("told", ROWS)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_each_dialect_is_named_right(framework, told, dtype):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    adapter = importlib.import_module(f"conformance.adapters.{framework}_adapter")
    # a few families are enough for jax, which compiles every shape
    families = ("generic", "slowest", "eps-floor", "closed-gate", "tiny", "zero", "cancel-branch")
    chosen = [i for i in ITEMS[dtype] if i.case.family in families and i.case.parameters["streams"] == 4]
    found = identify(adapter.eager(), told, ROWS, chosen if framework == "jax" else ITEMS[dtype])
    assert found.nearest.candidate.dialect == told and not found.nearest.candidate.changes
    assert found.nearest.ratio <= 1
    alike = [d for d in found.dialects if not same_layer(ROWS[d], ROWS[told])]
    assert alike == [], "dialects of another function must not match"
    if dtype == "bfloat16":
        kept = "bfloat16" if ROWS[told]["coefficients"] == "activation" else "float32"
        assert f"coefficients in {kept}" in found.precision
        mixed = "rounded before it is added" if ROWS[told]["mixing"] == "activation" else "rounded once"
        assert mixed in found.precision


@pytest.mark.parametrize(
    "mutant, told, said",
    [
        ("OneIterationLess", "paper", "19 iterations, not 20"),
        ("HalfTheIterations", "paper", "10 iterations, not 20"),
        ("OtherOrder", "paper", "order columns-first, not rows-first"),
        ("ClipForAdd", "deepseek-v4", "eps as a floor, not eps added"),
        ("NoEps", "deepseek-v4", "no eps, not eps added"),
        ("LargeEps", "deepseek-v4", "eps 0.0001, not 1e-06"),
        ("Transposed", "liger", "H transposed"),
        ("NoPreEps", "maxtext", "pre_eps 0, not 1e-06"),
        ("NoPostEps", "hunyuan-v4", "post_eps 0, not 1e-06"),
        ("PostScaleOne", "paper", "post_scale 1, not 2"),
        ("EpsOutsideTheRoot", "glm-5", "norm eps added to the root"),
        ("NoNormWeight", "maxtext", "the norm weight is ignored"),
    ],
)
def test_what_differs_is_said(mutant, told, said):
    pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")
    mutants = importlib.import_module("conformance.power.mutants")
    found = identify(getattr(mutants, mutant)(), told, ROWS, ITEMS["float32"])
    assert told not in found.dialects
    # another dialect's own row may be what is left: pre_eps is all that tells liger's gates from deepseek-v4's
    assert said in [c for a in found.matches for c in a.candidate.changes]


def test_the_command_answers_and_its_status_says_whether_it_was_told_so():
    pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")
    command = [sys.executable, "-m", "conformance.cli", "identify", "--dialect", "paper", "--impl"]
    done = subprocess.run([*command, "torch"], capture_output=True, text=True)
    assert done.returncode == 0 and "torch, told paper, float32: computes paper" in done.stdout
    done = subprocess.run([*command, "conformance.power.mutants:Transposed", "-v"], capture_output=True, text=True)
    assert done.returncode == 1 and "differs from paper: H transposed" in done.stdout
    done = subprocess.run([*command, "conformance.tests.strangers:Honest"], capture_output=True, text=True)
    assert done.returncode == 2 and "none of the separating cases of paper" in done.stderr
