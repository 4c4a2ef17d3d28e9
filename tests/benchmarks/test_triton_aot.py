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


@pytest.mark.parametrize(("target", "site"), [("sm_90", "bfloat16"), ("sm_100", "bfloat16, 6 streams")])
def test_every_kernel_of_a_site_compiles_as_recorded(target: str, site: str):
    done = run("-m", "benchmarks.triton_aot", "--target", target, "--site", site, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len({row[2] for row in rows}) == 12


def test_a_spill_and_another_figure_are_told():
    done = run("-c", SPILLING)
    assert done.returncode == 1
    assert "it spills" in done.stderr and "has another figure, write it anew by --json" in done.stderr


def test_what_is_recorded_has_all_targets_and_streams_and_no_spill():
    rows = json.loads(RESULTS.read_text())["rows"]
    targets = {"sm_80", "sm_90", "sm_100", "gfx942"}
    streams = ("", ", 1 stream", *(f", {n} streams" for n in (2, 3, 5, 6, 7, 8)))
    sites = {f"{dtype}{n}{how}" for dtype in ("bfloat16", "float32") for n in streams for how in ("", ", single pass")}
    assert {(site, target) for site in sites for target in targets} <= {(row["site"], row["target"]) for row in rows}
    assert {row["target"] for row in rows} == targets
    assert not [row for row in rows if row["spilled"]]
