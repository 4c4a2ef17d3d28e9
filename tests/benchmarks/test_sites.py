"""What `python -m benchmarks` measures, writes and compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks.sites import contenders, measuring, tables
from benchmarks.sites.numbers import Shape

ROOT = Path(__file__).parents[2]
NAMES = ["torch_impl", "torch_impl, plain", "written plainly", "transformers"]


@pytest.fixture
def few(monkeypatch):
    """The contenders that compile nothing, and few rounds."""
    monkeypatch.setattr("benchmarks.sites.numbers.LEAST_SECONDS", 0.0)
    chosen = [c for c in contenders.CONTENDERS if c.name in NAMES or c.missing("cpu")]
    monkeypatch.setattr(measuring, "CONTENDERS", tuple(chosen))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_computes_the_same_and_has_its_figures(few, dtype):
    result = measuring.measured(Shape(6, 16, dtype), "cpu")
    assert result["copy"] > 0
    for name in NAMES:
        cell = result["cells"][name]
        assert isinstance(cell, dict), cell
        assert all(low <= middle <= high for middle, low, high in cell["seconds"].values())
        assert 0 < cell["operators"]["forward"] < cell["operators"]["both"] and cell["peak"] > 0
    assert result["cells"]["torch_impl"]["saved"] < result["cells"]["written plainly"]["saved"]
    assert result["cells"]["liger-kernel"] == "not measured: doesn't run on cpu"
    assert result["cells"]["hyper-connections"] == "not measured: its layer is another function"


def test_the_references_of_tile_kernels_are_the_same_function(few, monkeypatch):
    (contender,) = (c for c in contenders.CONTENDERS if c.fetched)
    if contender.missing("cpu"):
        pytest.skip(contender.missing("cpu"))
    monkeypatch.setattr(measuring, "CONTENDERS", (*measuring.CONTENDERS[:2], contender))
    cells = [
        measuring.measured(Shape(6, 16, dtype), "cpu")["cells"][contender.name] for dtype in ("float32", "bfloat16")
    ]
    assert cells[0] == "not measured: NotImplementedError: its references mix in bfloat16 alone"
    assert isinstance(cells[1], dict), cells[1]


def test_one_that_computes_something_else_is_not_timed(few, monkeypatch):
    class Broken(contenders.Written):
        def forward(self, x):
            return super().forward(x) * 1.01

    broken = contenders.Contender("broken", Broken)
    monkeypatch.setattr(measuring, "CONTENDERS", (*measuring.CONTENDERS[:2], broken))
    cell = measuring.measured(Shape(6, 16, "float32"), "cpu")["cells"]["broken"]
    assert cell.startswith("not measured: its output is off by 0.0")


def written(path: Path, factor: float) -> Path:
    """A result of one shape, whose times are multiplied."""
    seconds = {kind: [factor * t for t in (0.010, 0.009, 0.011)] for kind in ("forward", "both")}
    cell = {"seconds": seconds, "saved": 2048, "peak": 4096, "operators": {"forward": 3, "both": 9}}
    row = {"tokens": 8, "dim": 16, "dtype": "float32", "copy": 0.001, "cells": {"torch_impl": cell}, "jax": {}}
    environment = {"device": "x86_64", "threads": 2, "python": "3.11", "versions": {"torch": "2", "triton": "absent"}}
    path.write_text(json.dumps({"environment": environment, "rows": [row]}))
    return path


def test_what_became_slower_is_named_and_the_status_says_so(tmp_path, capsys):
    before, same, slower = (written(tmp_path / f"{f}.json", f) for f in (1.0, 1.05, 1.5))
    assert tables.compare(before, same) == 0
    assert tables.compare(before, slower) == 1
    assert "torch_impl, 8 x 16, float32, forward: 1.50 times as long" in capsys.readouterr().out


def test_a_cell_without_a_figure_says_not_measured(tmp_path, capsys):
    written(tmp_path / "site-cpu.json", 1.0)
    assert tables.show(tmp_path, None) == 0
    out = capsys.readouterr().out
    assert "**cuda**: not measured (`python -m benchmarks run --device cuda`)" in out
    assert "| 8 x 16, float32 | 10.00 (9.00 to 11.00) |" in out and "not measured |" in out


def test_the_page_has_the_tables_of_the_results(capsys):
    tables.show(ROOT / "benchmarks" / "results", None)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert capsys.readouterr().out in page, "run: python -m benchmarks table --write docs/performance.md"


def test_a_device_that_is_not_there_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "--device", "cuda"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 0:
        pytest.skip("there is a CUDA device")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks: expected a CUDA device, PyTorch finds none\n"
