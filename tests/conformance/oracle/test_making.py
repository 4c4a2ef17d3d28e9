"""Rows that the corpus has no cases of: their cases are made on the spot, and every command takes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flint", reason="python-flint, of the extra 'regenerate', is not installed")
pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")

from conformance.cases.case import DTYPES
from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_rows, parse, published, read
from conformance.implementations.wrapping import wrap
from conformance.interface import Capabilities, Result
from conformance.judge.item import refusal, run_item
from conformance.oracle import making
from conformance.oracle.build import PER_STREAM, stream_scales
from conformance.questions.compare import calls, compare
from conformance.selftest.plain import Plain
from conformance.stages import STAGES

CHANGED = "deepseek-v4,norm_eps=0.0001,iterations=7"
ROW = {**dialect_rows()["liger"], "iterations": 3, "post_eps": 0.01, "norm_weight": True}


@pytest.fixture
def mine(tmp_path):
    """The path of a file that holds a row of its own."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"parameters": ROW}))
    return path


def made(row, folder, **choice):
    choice = {"stages": STAGES, "dtypes": DTYPES, **choice}
    return making.make(making.chosen(row, **choice), folder, jobs=1)


class Claims:
    """An implementation that claims what it is told to, and computes nothing."""

    name = "claims"

    def __init__(self, *dialects: str, overrides: Any = frozenset()):
        self.capabilities = Capabilities(frozenset(STAGES), frozenset(dialects), overrides=overrides)

    def call(self, *_: Any) -> Result:
        raise NotImplementedError("it computes nothing")


def test_the_published_rows_cases_are_those_of_the_corpus(tmp_path):
    """The same wish, made on the spot and narrowed to everything, is the golden file to the bit."""
    golden = {case.id: case for case in load_corpus()}
    for case in made(published("liger"), tmp_path, families=("smoke", "eps-floor", "exact")).cases:
        assert case.path.read_bytes() == golden[case.id].path.read_bytes()


@pytest.mark.parametrize("text", [CHANGED, "mhc-lite,pre_eps=0.25", "hunyuan-v4,post_scale=1"])
def test_a_plain_implementation_passes_the_quick_cases_of_a_changed_row(tmp_path, text):
    row = parse(text)
    answer = made(row, tmp_path, quick=True)
    assert {case.family for case in answer.cases} == {"smoke", "generic", "closed-gate", "big-eps"}
    assert answer.left_out == []
    for case in answer.cases:
        assert case.dialect == row.base and set(row.overrides) <= set(case.overrides) and row.name in case.id
        assert all(case.parameters[k] == v for k, v in row.parameters.items() if k not in case.overrides)
        for item in case.items():
            outcome = run_item(wrap(Plain()), item)
            assert outcome.skipped or not outcome.failed, (case.id, item.stage, outcome.failed)


def test_a_changed_row_is_claimed_by_who_claims_its_base_and_the_changes(tmp_path):
    (case,) = made(parse(CHANGED), tmp_path, families=("smoke",)).cases
    item = case.items()[0]
    assert refusal(item, Claims("deepseek-v4", overrides=frozenset({"norm_eps", "iterations"})).capabilities) == ""
    assert refusal(item, Claims("deepseek-v4", overrides=None).capabilities) == ""
    assert "other values of iterations" in refusal(item, Claims("deepseek-v4", overrides={"norm_eps"}).capabilities)
    assert refusal(item, Claims("liger", overrides=None).capabilities) == "dialect deepseek-v4 not claimed"


def test_a_row_of_its_own_is_claimed_by_who_takes_any_parameter_or_its_name(tmp_path, mine):
    (case,) = made(read(mine), tmp_path, families=("smoke",)).cases
    item = case.items()[0]
    assert (case.dialect, case.overrides, item.config["dialect"]) == ("mine", {}, "mine")
    assert refusal(item, Claims("paper", overrides=None).capabilities) == ""
    assert refusal(item, Claims("mine").capabilities) == ""
    assert refusal(item, Claims("paper").capabilities) == "dialect mine not claimed"


def test_what_is_not_asked_for_is_not_made(tmp_path):
    answer = made(parse(CHANGED), tmp_path, stages=["post"], dtypes=["bfloat16"], families=("generic",))
    items = {(item.stage, item.variant.x) for case in answer.cases for item in case.items()}
    assert items == {("post", "bfloat16"), ("coefficients", "bfloat16")}, "post's inputs are the coefficients"
    assert making.chosen(parse(CHANGED), STAGES, DTYPES, patterns=["smoke-*", "zero-*"])[0].id == f"smoke-{CHANGED}"
    assert making.chosen(parse(CHANGED), ["stack"], ["float64"]) == [], "no family has a stack in float64"


@pytest.mark.parametrize("scale, narrow", [("1e3", []), ("1e5", ["float16"])])
def test_a_dtype_that_a_row_overflows_is_left_out_and_said(tmp_path, scale, narrow):
    row = parse(f"deepseek-v4,post_scale={scale}")
    answer = made(row, tmp_path, stages=["layer"], families=("generic",), patterns=["generic-n4-d*"])
    (case,) = answer.cases
    assert {item.variant.x for item in case.items()} == set(DTYPES) - set(narrow)
    assert [line.split(":")[0] for line in answer.left_out] == [f"{case.id} in {x}-float32" for x in narrow]
    assert all(run_item(wrap(Plain()), item).failed == [] for item in case.items())


def test_what_overflows_every_dtype_is_left_out(tmp_path):
    row = parse("deepseek-v4,post_scale=1e30")
    answer = made(row, tmp_path, families=("stack", "smoke"))
    assert [case.family for case in answer.cases] == ["smoke"]
    assert [line.split(":")[0].split(" in ")[0] for line in answer.left_out] == [f"stack-{row.name}"]


def command(*arguments, folder=None):
    return subprocess.run(
        [sys.executable, "-m", "conformance.cli", *arguments], capture_output=True, text=True, cwd=folder
    )


def test_run_makes_the_cases_and_says_so(mine):
    done = command("run", "--impl", "torch", "--dialect", CHANGED, "--dialect", str(mine), "--quick", "--stage", "pre")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^made \d cases of {re.escape(CHANGED)} in \d+ s$", done.stdout, re.M), done.stdout
    assert re.search(r"^made \d cases of mine in \d+ s$", done.stdout, re.M), done.stdout
    assert "0 failed" in done.stdout


def test_what_fails_stays_and_its_line_repeats_it():
    arguments = ("--dialect", "liger,iterations=7", "--case", "smoke-*", "--stage", "residual_matrix")
    done = command("run", "--impl", "conformance.selftest.mutants:Transposed", *arguments)
    assert done.returncode == 1 and "the cases that were made are in" in done.stdout, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "mhc-conformance run" in line)
    again = command(*line.split()[1:])
    assert again.returncode == 1 and "1 failed" in again.stdout
    folder = Path(done.stdout.split("the cases that were made are in ")[1].split()[0])
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_a_list_makes_nothing():
    done = command("run", "--dialect", CHANGED, "--dialect", "paper", "--case", "smoke-*", "--stage", "pre", "--list")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and f"smoke-{CHANGED}::pre::float32-float32" in lines and len(lines) == 2, lines


@pytest.mark.slow
def test_search_draws_cases_of_a_row_of_its_own(tmp_path, mine):
    done = command("search", "--impl", "torch", "--dialect", str(mine), "--seconds", "4", folder=tmp_path)
    assert done.returncode == 0 and "none fails" in done.stdout, done.stdout + done.stderr
    mutant = ("--impl", "conformance.selftest.mutants:PostScaleOne", "--dialect", str(mine), "--seconds", "60")
    done = command("search", *mutant, folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    again = command(*done.stdout.strip().splitlines()[-1].split()[1:], folder=tmp_path)
    assert again.returncode == 1 and "1 failed" in again.stdout, "a file's row needs no --dialect"


def test_identify_names_a_row_of_its_own_and_what_differs_from_it(mine):
    done = command("identify", "--impl", "torch", "--dialect", str(mine))
    assert done.returncode == 0 and "torch, told mine, float32: computes mine" in done.stdout, done.stdout + done.stderr
    done = command("identify", "--impl", "conformance.selftest.mutants:OneIterationLess", "--dialect", CHANGED)
    assert done.returncode == 1 and "6 iterations, not 7" in done.stdout, done.stdout + done.stderr


def test_compare_and_verdicts_take_rows(mine):
    done = command("compare", "torch", "conformance.selftest.plain:Plain", "--dialect", str(mine), "--streams", "3")
    assert done.returncode == 0 and "no difference in" in done.stdout, done.stdout + done.stderr
    done = command("verdicts", "liger", str(mine))
    assert done.returncode == 0 and "Sinkhorn's iterations 20 becomes 3" in done.stdout, done.stdout + done.stderr
    done = command("verdicts", "liger", "liger,iteration=3")
    assert done.returncode == 2 and "did you mean 'iterations'?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("streams", [8, 9, 16, 19])
def test_two_are_compared_with_any_number_of_streams(streams):
    scales = stream_scales(streams)
    assert tuple(scales[:8]) == PER_STREAM and len(scales) == streams and set(np.frexp(scales)[0]) == {0.5}
    for call in calls(published("deepseek-v4"), streams, 4, (1, 3), "float32", 0, 1.0):
        found = compare(wrap(Plain()), wrap(Plain()), call)
        assert not isinstance(found, str) and not any(row.largest for row in found), found


def test_compare_says_who_does_not_claim_a_row():
    call = next(iter(calls(parse(CHANGED), 2, 4, (1, 2), "float32", 0, 1.0)))
    assert (
        compare(wrap(Claims("deepseek-v4")), wrap(Plain()), call)
        == "other values of norm_eps, iterations not claimed by claims"
    )
