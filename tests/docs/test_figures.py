"""Figures that the pages quote are those that the benchmarks recorded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.docs.blocks import ROOT, environment

RESULTS = ROOT / "benchmarks" / "results"
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
PRINT_KERNELS = """
import json
from benchmarks import triton_aot
print(triton_aot.table(json.loads(triton_aot.RESULTS.read_text())), end="")
"""
PRINT_TABLE = """
import json, sys
sys.path.insert(0, "benchmarks")
import tpu_aot
print(tpu_aot.{}(json.loads(tpu_aot.RESULTS.read_text())["programs"]), end="")
"""


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = PERFORMANCE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_the_memory_traffic_on_one_chip() -> None:
    programs = recorded("tpu-aot.json")["programs"]
    kinds = ("forward", "both", "stack")
    entries = [programs[f"v5e/1/deepseek-v4/4x4096x4x7168/{kind}"] for kind in kinds]
    expected = [[f"{entry['moved units']:.1f}", str(entry["floor units"])] for entry in entries]
    assert [row[1:] for row in rows("What `jax_impl` moves")] == expected


def test_the_memory_traffic_of_the_kernels() -> None:
    programs = recorded("tpu-aot.json")["programs"]
    kinds = ("forward", "both", "stack", "unrolled", "line", "line-inputs")
    entries = [programs[f"v5e/1/deepseek-v4/4x4096x4x7168/{kind}/pallas"] for kind in kinds]
    expected = [[f"{entry['moved units']:.1f}", str(entry["floor units"])] for entry in entries]
    assert [row[1:] for row in rows("What the kernels of `jax_impl` move")] == expected


def test_the_floor_is_the_sum_of_the_passes() -> None:
    *passes, together = [int(row[-1]) for row in rows("What a site has to move")]
    floor = recorded("tpu-aot.json")["programs"]["v5e/1/deepseek-v4/4x4096x4x7168/both"]["floor units"]
    assert sum(passes) == together == floor


def test_the_memory_that_initialisation_takes() -> None:
    held = recorded("sharded-init.json")
    expected = []
    for how in ("sharded", "at once", "whole", "processes"):
        rises = sorted({f"{rise / held['parameter bytes']:.1f}" for rise in held[how]["rise bytes"]})
        expected.append([f"{held[how]['devices a process']} of 8", " to ".join(rises)])
    assert [row[1:] for row in rows("Making a sharded model")] == expected
    assert f"{held['parameter bytes'] / 1e6:.1f} MB" in PERFORMANCE


@pytest.mark.parametrize(("name", "table"), [("tpu", "table"), ("tpu kernels", "kernel_table")])
def test_the_table_of_tpu_figures_is_the_recorded_one(name: str, table: str) -> None:
    pytest.importorskip("flax", reason="benchmarks/tpu_aot.py needs JAX and Flax")
    page = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name}: begin -->\n(.*)<!-- {name}: end -->", page, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", PRINT_TABLE.format(table)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    repair = "run: python benchmarks/tpu_aot.py --only 'v5e/1/*/forward' --write docs/tpu.md"
    assert shown and shown[1] == done.stdout, f"{repair}\n{done.stderr[-1000:]}"


def test_the_table_of_triton_figures_is_the_recorded_one() -> None:
    pytest.importorskip("triton", reason="benchmarks/triton_aot.py needs Triton")
    shown = re.search(r"<!-- triton: begin -->\n(.*)<!-- triton: end -->", PERFORMANCE, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", PRINT_KERNELS], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    repair = "run: python -m benchmarks.triton_aot --write docs/performance.md"
    assert shown and shown[1] == done.stdout, f"{repair}\n{done.stderr[-1000:]}"
