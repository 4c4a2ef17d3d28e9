"""The kernels compile for a GPU that isn't here, in a process without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton isn't installed: it compiles the kernels")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "triton-aot.json"
SPILLING = """
import sys
from benchmarks import triton_aot
from torch_impl.kernels import launching
launching.options_of = lambda columns, fused=False: {"num_warps": 4, "num_stages": 3}
sys.argv = ["triton_aot", "--target", "sm_80", "--site", "bfloat16, 8 streams", "--check"]
sys.exit(triton_aot.main())
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_every_kernel_of_a_site_compiles_as_recorded():
    done = run("-m", "benchmarks.triton_aot", "--target", "sm_90", "--site", "bfloat16", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len({row[2] for row in rows}) == 12


def test_a_spill_and_another_figure_are_told():
    done = run("-c", SPILLING)
    assert done.returncode == 1
    assert "it spills" in done.stderr and "has another figure, write it anew by --json" in done.stderr


def test_what_is_recorded_has_all_targets_and_no_spill():
    rows = json.loads(RESULTS.read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not any(row["spilled"] for row in rows)
