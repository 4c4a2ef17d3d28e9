"""The wheel runs away from the checkout, with the frameworks that are installed here.

Under ``tox run -e torch-only`` and ``-e jax-only`` that is one framework alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conformance.implementations.registry import missing_modules

pytest.importorskip("hatch_fancy_pypi_readme", reason="the build backend's plugin isn't installed")
pytest.importorskip("hatchling", reason="the build backend isn't installed")

ROOT = Path(__file__).parents[2]
OURS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(missing_modules(name)), reason=f"{name} isn't installed"))
    for name in ("jax", "torch")
]
WHERE = """
import json, sys
import conformance.cli, conformance.files.places, {framework}_impl as implementation
homes = [conformance.__file__, implementation.__file__, str(conformance.files.places.fixtures())]
other = {{"jax": "torch", "torch": "jax"}}["{framework}"]
print(json.dumps([homes, [m for m in sys.modules if m.partition(".")[0] == other]]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel of this tree."""
    folder = tmp_path_factory.mktemp("site")
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--find-links", str(wheels)]
    for command in (
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)],
        [*pip, "install", *offline, "--target", str(folder), "mhc-conformance"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder


def away(site: Path, folder: Path, *command: str) -> str:
    """Runs a module or a program of Python in an empty folder, with the installed wheel before everything else."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("framework", OURS)
def test_packages_and_fixtures_are_those_of_the_wheel(site, tmp_path, framework):
    homes, others = json.loads(away(site, tmp_path, "-c", WHERE.format(framework=framework)))
    assert all(Path(home).is_relative_to(site) for home in homes), homes
    assert not others


@pytest.mark.parametrize("framework", OURS)
def test_the_quick_suite_passes(site, tmp_path, framework):
    command = ("run", "--quick", "--impl", framework, "--no-progress", "--jsonl", "run.jsonl")
    away(site, tmp_path, "-m", "conformance.cli", *command)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert lines[-1]["failed"] == 0 and lines[-1]["lines"] > 100


@pytest.mark.parametrize("framework", OURS)
def test_the_golden_cases_run_by_name_in_pytest(site, tmp_path, framework):
    command = ("-p", "no:cacheprovider", "--pyargs", "conformance.test_golden", "--mhc-impl", framework, "-k", "smoke")
    said = away(site, tmp_path, "-m", "pytest", "-q", *command)
    assert " passed" in said and "failed" not in said


def test_the_version_is_that_of_the_wheel(site, tmp_path):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert away(site, tmp_path, "-m", "conformance.cli", "--version") == f"mhc-conformance {version}\n"


def test_the_fixtures_are_whole(site, tmp_path):
    assert ", 0 problems" in away(site, tmp_path, "-m", "conformance.cli", "fixtures", "verify")


@pytest.mark.parametrize("name", ["in_torch.py", "in_jax.py", "in_numpy.py", "in_c.c"])
def test_the_templates_of_new_are_in_the_wheel(site, tmp_path, name):
    framework = name.removeprefix("in_").partition(".")[0]
    mine = f"mine.{name.partition('.')[2]}"
    away(site, tmp_path, "-m", "conformance.cli", "new", mine, "--framework", framework, "--stages", "post")
    assert "deepseek-v4" in (tmp_path / mine).read_text()
