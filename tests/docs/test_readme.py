"""The README's examples: short, and run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conformance.implementations.registry import missing_modules
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port

README = (Path(__file__).parents[2] / "README.md").read_text()


def examples(section: str) -> list[str]:
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(tmp_path: Path, section: str, framework: str, *command: str, **environment: str) -> str:
    (source,) = [text for text in examples(section) if f"from {framework}_impl" in text]
    assert len(source.strip().splitlines()) < 20
    script = tmp_path / "example.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, *command, str(script)], capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(bool(missing_modules("jax")), reason="jax or flax isn't installed")
def test_the_jax_example_runs_on_eight_devices(tmp_path):
    said = run(tmp_path, "Sharding", "jax", XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    assert re.match(r"\d\.\d+ NamedSharding", said) and "('tensor', 'fsdp')" in said, said


@pytest.mark.skipif(bool(missing_modules("torch")), reason="torch isn't installed")
def test_the_torch_example_runs_on_four_processes(tmp_path):
    import torch

    from torch_impl import ManifoldConstrainedHyperConnections, MHCConfig

    said = run(tmp_path, "Sharding", "torch", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    torch.manual_seed(1)
    layer: Any = ManifoldConstrainedHyperConnections(MHCConfig.from_dialect("deepseek-v4", streams=4, dim=64))
    x = torch.randn(8, 16, 4, 64)
    layer(lambda u: u, lambda inputs: inputs.tanh(), x, "mlp_dense")[0].square().mean().backward()
    assert layer.pre_alpha.grad is not None
    # Four processes print at once, so that their lines may mix: each number is one digit, a point and the rest.
    norms = [float(value) for value in re.findall(r"\d\.\d{4,18}", said)]
    assert len(norms) == 4 and norms == pytest.approx([float(layer.pre_alpha.grad.norm())] * 4, rel=1e-4), said
    assert said.count("torch.Size([4, 16, 4, 32])") == 4, said


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_single_pass_examples_run(tmp_path, framework):
    if missing_modules(framework):
        pytest.skip(f"{framework} isn't installed")
    shape = {"jax": "(2, 8, 64)", "torch": "torch.Size([2, 8, 64])"}[framework]
    assert run(tmp_path, "Single pass", framework, JAX_PLATFORMS="cpu").strip() == shape


def test_the_example_of_an_implementation_passes(tmp_path):
    (source,) = examples("Testing your own implementation")
    (tmp_path / "mine.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "conformance.cli", "run", "--impl", "mine:Mine", "--jobs", "1", "--no-progress"],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"[1-9]\d+ items ran, 0 failed", done.stdout), done.stdout[-500:]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_examples_of_whole_models_write_what_the_porter_takes(tmp_path, framework):
    if missing_modules(framework):
        pytest.skip(f"{framework} isn't installed")
    run(tmp_path, "Loading weights", framework)
    found = inspect(tmp_path / "model.safetensors")
    assert (found.layout, found.dialect, found.streams, found.dim) == ("canonical", "deepseek-v4", 4, 64)
    report = port(tmp_path / "model.safetensors", tmp_path / "ported.safetensors", Options(to="deepseek"))
    assert (report.verdict, report.sites, report.layers, report.head) == ("exact", 5, 2, True)
