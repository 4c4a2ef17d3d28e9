"""Exit statuses, messages and files of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from conformance.cases.dialects import dialect_names
from conformance.cli.app import app
from conformance.stages import STAGES

HONEST = "tests.conformance.strangers:Honest"


def call(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "conformance.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_all_passed_is_0_and_the_files_are_whole(tmp_path):
    jsonl, junit = tmp_path / "run.jsonl", tmp_path / "run.xml"
    done = call("run", "--impl", HONEST, "--stage", "reduce", "--jsonl", str(jsonl), "--junit", str(junit))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert lines[0]["kind"] == "header" and len(lines[0]["corpus"]) == 64
    own = sum(line["kind"] not in ("header", "implementation", "footer") for line in lines)
    corpus = {"corpus": lines[0]["corpus"], "altered": []}
    assert lines[-1] == {"kind": "footer", "lines": own, "failed": 0, "interrupted": False, **corpus}
    assert ElementTree.parse(junit).getroot()[0].get("failures") == "0"


def test_a_failure_is_1_with_figures_and_a_line_that_repeats_it():
    done = call(
        "run", "--impl", "tests.conformance.strangers:SlightlyOff", "--case", "generic-n4-paper-2", "--stage", "reduce"
    )
    assert done.returncode == 1
    assert "x the bound" in done.stdout and "expected" in done.stdout
    repeat = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("mhc-conformance run")]
    again = call(*repeat[0][1:])
    assert again.returncode == 1 and "1 item ran, 1 failed" in again.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--dialect", "nobody"), "unknown dialect 'nobody', expected one of paper"),
        (("--dtype", "int8"), "unknown dtype 'int8', expected one of float64"),
        (("--stage", "middle"), "unknown stage 'middle', expected one of expand"),
        (("--case", "nothing-*"), "no case matches 'nothing-*'"),
        (("--case", "smoke-paper-2", "--dialect", "liger"), "nothing selected"),
        (("--stage", "head"), "nothing was checked for honest"),
    ],
)
def test_usage_is_2_in_one_line(arguments, said):
    done = call("run", "--impl", HONEST, *arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_an_implementation_that_cannot_be_set_up_is_3():
    done = call("run", "--impl", "conformance.nowhere:x", "--quick")
    assert done.returncode == 3 and "could not be set up" in done.stderr and "Traceback" not in done.stderr


def test_what_ran_before_a_setup_failed_is_written(tmp_path):
    jsonl = tmp_path / "run.jsonl"
    arguments = ("--impl", HONEST, "--impl", "conformance.nowhere:x", "--jobs", "1", "--stage", "reduce")
    done = call("run", *arguments, "--jsonl", str(jsonl))
    assert done.returncode == 3 and "the run ended there" in done.stderr
    assert json.loads(jsonl.read_text().splitlines()[-1])["lines"] > 0


def test_help_and_import_need_no_framework():
    program = (
        "import sys, conformance, conformance.cli; "
        "print([m for m in ('jax', 'torch', 'flint', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_verify_passes_on_the_committed_corpus():
    done = call("fixtures", "verify")
    assert done.returncode == 0 and "0 problems" in done.stdout


def test_list_prints_the_items_and_runs_nothing():
    done = call("run", "--impl", "conformance.nowhere:x", "--list", "--case", "generic-n4-paper-2", "--stage", "reduce")
    assert done.returncode == 0
    assert "generic-n4-paper-2::reduce::float32-float32" in done.stdout.splitlines()


def test_x_stops_at_the_first_failure():
    done = call("run", "--impl", "tests.conformance.strangers:SlightlyOff", "--stage", "reduce", "-x")
    assert done.returncode == 1 and " 1 failed;" in done.stdout


@pytest.mark.parametrize("dialect", dialect_names())
def test_a_quick_run_of_one_row_asks_for_every_stage_but_the_stack(dialect):
    """Of each row, those too that the quick subset of the whole corpus passes by."""
    options = ["--quick", "--dialect", dialect, "--impl", HONEST, "--sizes", "none", "--list"]
    done = CliRunner().invoke(app, ["run", *options])
    listed = {line.split("::")[1] for line in done.output.splitlines() if "::" in line}
    absent = {"stack"} | ({"head"} - listed) | ({"residual_matrix"} if dialect == "hunyuan-v4" else set())
    assert done.exit_code == 0 and listed == set(STAGES) - absent, done.output
    assert len(done.output.splitlines()) < 100
