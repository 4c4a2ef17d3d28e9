"""Two implementations are compared without the oracle; the first stage that differs is named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from conformance.cases.case import DTYPES
from conformance.cases.dialects import dialect_names, published
from conformance.implementations.wrapping import wrap
from conformance.interface import Capabilities
from conformance.questions.compare import ORDER, Shared, calls, compare, shared

pytest.importorskip("torch", reason="both implementations of these tests are in PyTorch, which is not installed")

from conformance.adapters import torch_adapter
from conformance.selftest import mutants
from conformance.selftest.plain import Plain

OURS, PLAIN = wrap(torch_adapter.eager()), wrap(Plain())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dialect", dialect_names())
def test_two_that_agree_don_t_differ(dialect, dtype):
    for call in calls(published(dialect), 3, 17, (2, 5), dtype, 1, 2.0):
        found = compare(OURS, PLAIN, call)
        assert not isinstance(found, str), found
        assert [row for row in found if row.apart(64.0)] == [], (call.stage, found)


@pytest.mark.parametrize(
    "mutant, first",
    [
        ("Transposed", "residual_matrix, H"),
        ("NormPerStream", "coefficients, pre"),
        ("ScaledBias", "coefficients, pre"),
        ("NotTransposedBack", "post, d/x"),
        ("MeanForSum", "reduce, out"),
    ],
)
def test_the_first_that_differs_is_named(mutant, first):
    other = getattr(mutants, mutant)()
    apart = []
    for call in calls(published("paper"), 4, 16, (2, 4), "float32", 0, 2.0):
        found = compare(OURS, wrap(other), call)
        apart += [f"{call.stage}, {row.tensor}" for row in found if not isinstance(row, str) and row.apart(64.0)]
    assert apart[0] == first


def test_stages_go_from_the_inside_out():
    assert [c.stage for c in calls(published("deepseek-v4"), 2, 4, (1, 2), "float32", 0, 1.0)] == list(ORDER)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "conformance.cli", "compare", *arguments], capture_output=True, text=True
    )


def test_the_command():
    same = run("torch", "conformance.selftest.plain:Plain", "--streams", "2", "--dim", "5")
    assert same.returncode == 0 and same.stdout.splitlines()[-1].startswith("no difference in"), (
        same.stdout + same.stderr
    )
    other = run("torch", "conformance.selftest.mutants:NoShift", "--deviation", "100", "--stage", "residual_matrix")
    assert other.returncode == 1 and "the first that differs: residual_matrix, H" in other.stdout
    refused = run("torch", "torch", "--dialect", "mhc-lite", "--streams", "6")
    assert refused.returncode == 2 and "at most 5 streams, got 6" in refused.stderr
    none = run("torch", "tests.conformance.strangers:Honest", "--dtype", "bfloat16")
    assert none.returncode == 2 and "none of these stages is claimed by both" in none.stderr
    unknown = run("torch", "nobody")
    assert unknown.returncode == 3 and "or a registered name" in unknown.stderr


def command(*arguments):
    line = [sys.executable, "-m", "conformance.cli", "compare", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


def test_sizes_are_compared_one_by_one():
    done = command("jax", "torch", "--dialect", "deepseek-v4", "--stage", "post", "--sizes", "short")
    assert done.returncode == 0 and done.stdout.count("size-") == 6 and "no difference in 6 stages" in done.stdout
    done = command("jax", "torch", "--sizes", "short", "--dtype", "float64")
    assert done.returncode == 2 and "--sizes takes --dtype float32, bfloat16, float16, got float64" in done.stderr


def test_arrays_may_be_views():
    reads_packed = "tests.conformance.strangers:ReadsPacked"
    for options, status in (((), 0), (("--layouts",), 1)):
        done = command(reads_packed, "torch", "--dialect", "paper", "--stage", "reduce", *options)
        assert done.returncode == status, done.stdout + done.stderr


def test_what_both_claim_is_taken_and_said():
    done = command("tests.conformance.strangers:Honest", "torch")
    first, second, third, *_ = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert first == "paper, float32, 4 streams: reduce" and second == "both also claim glm-5: --dialect names another"
    assert third.startswith("reduce")
    named = command("tests.conformance.strangers:Honest", "torch", "--dialect", "glm-5")
    assert named.stdout.splitlines()[0] == "glm-5, float32, 4 streams: reduce" and "also" not in named.stdout


def claims(**changes):
    return replace(Capabilities(frozenset({"pre", "post"}), frozenset({"liger", "paper"})), **changes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Shared(("pre", "post"), ("paper", "liger"), ("float32",), 4)),
        ({"stages": frozenset({"post", "stack"})}, Shared(("post",), ("paper", "liger"), ("float32",), 4)),
        ({"dialects": frozenset({"liger", "mine"})}, Shared(("pre", "post"), ("liger",), ("float32",), 4)),
        ({"dtypes": {"post": ["float32"]}}, Shared(("pre", "post"), ("paper", "liger"), ("float32",), 4)),
        ({"dtypes": {"post": ["bfloat16"]}}, Shared(("pre", "post"), ("paper", "liger"), (), 4)),
        ({"streams": frozenset({2, 8})}, Shared(("pre", "post"), ("paper", "liger"), ("float32",), 2)),
        ({"streams": frozenset({4, 2})}, Shared(("pre", "post"), ("paper", "liger"), ("float32",), 4)),
    ],
)
def test_what_two_share(change, expected):
    assert shared(claims(), claims(**change)) == shared(claims(**change), claims()) == expected
    assert ("dtype" in expected.missing) == (not expected.dtypes)


def test_two_that_share_nothing_are_told_what_each_claims():
    done = command("tests.conformance.strangers:Honest", "tests.conformance.strangers:ClaimsPost")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "honest and claims-post claim no stage together; honest has reduce, claims-post has post" in done.stderr
