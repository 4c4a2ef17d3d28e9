"""`doctor` survives what is broken, and says it first: frameworks here are small modules that stand in their place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from conformance.implementations import registry
from conformance.report import examination

ROOT = Path(__file__).parents[3]
WORKING = {
    "torch.py": "class cuda:\n    is_available = staticmethod(lambda: True)\n"
    "    device_count = staticmethod(lambda: 2)\n"
    "    get_device_name = staticmethod(lambda k: f'Great GPU\\x1b[31m {k}')\n",
    "jax.py": "class Device:\n    platform, id, device_kind = 'tpu', 3, 'TPU v9'\ndevices = lambda: [Device]\n",
    "flax.py": "",
    "flint.py": "arb = int\n",
}


def doctor(folder: Path, files: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    for name, text in {**WORKING, **files}.items():
        (folder / name).write_text(text)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "conformance.cli", "doctor"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def test_what_is_here_is_listed(tmp_path):
    done = doctor(tmp_path, {}, NVIDIA_TF32_OVERRIDE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "nothing that is installed is broken"
    for said in (
        "torch sees CUDA GPU 1: Great GPU\\x1b[31m 1", "jax sees tpu 3: TPU v9", "cores", "golden files, corpus ",
        "NVIDIA_TF32_OVERRIDE=1 says whether CUDA's libraries round operands to TF32", "torch: runs",
    ):  # fmt: skip
        assert said in done.stdout
    assert all(f"\n  {name}: " in done.stdout for name in registry.registered())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"torch.py": "raise ImportError('libgreat.so:\\ncannot open')"}, "torch: ImportError"),
        ({"jax.py": "import os; os._exit(7)"}, "jax: importing it ended with status 7"),
        ({"flint.py": "import os; os.kill(os.getpid(), 11)"}, "flint: importing it died of"),
        ({"flax.py": "raise SystemExit('no')"}, "jax: importing it ended with status 1: no"),
    ],
)  # fmt: skip
def test_what_is_broken_comes_first_and_the_rest_is_still_told(tmp_path, files, said):
    done = doctor(tmp_path, files)
    assert done.returncode == 1 and done.stderr == "", done.stderr
    first, second, *rest = done.stdout.splitlines()
    framework, _, how = said.partition(": ")
    assert (
        first.startswith(f"broken: {framework} is installed and can't be used: {how}")
        and second == ""
        and "fixtures" in rest
    )


def test_a_framework_that_hangs_keeps_nobody_waiting(tmp_path):
    began = time.monotonic()
    done = doctor(tmp_path, {"torch.py": "import time; time.sleep(600)"})
    assert "torch: no answer within 7 s" in done.stdout and "jax sees tpu 3" in done.stdout
    assert time.monotonic() - began < 30 and done.returncode == 0


def test_an_altered_fixture_is_broken(monkeypatch):
    monkeypatch.setattr(examination.corpus, "verify", lambda: ["smoke-paper-2.safetensors: is altered"])
    monkeypatch.setattr(examination, "ASKED", {})
    found = examination.look()
    assert found.broken == ["fixtures: smoke-paper-2.safetensors: is altered"]
    assert "1 of them aren't as promised" in found.sections["fixtures"][0]


def test_a_missing_extra_has_the_line_that_brings_it(monkeypatch):
    monkeypatch.setattr(examination, "ASKED", {})
    monkeypatch.setattr(examination.registry, "installed", lambda module: module not in ("jax", "plotly"))
    lines = examination.look().sections["extras"]
    assert "jax: missing jax: pip install 'mhc-conformance[jax]'" in lines and "torch: complete" in lines
    assert "report: missing plotly: pip install 'mhc-conformance[report]'" in lines


def test_the_extras_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(examination.EXTRAS) == set(extras) - {"peers", "all"}
