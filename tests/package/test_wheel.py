"""The wheel and the source distribution: what they hold, and what an index shows of them."""

from __future__ import annotations

import configparser
import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

pytest.importorskip("hatch_fancy_pypi_readme", reason="the build backend's plugin isn't installed")
pytest.importorskip("hatchling", reason="the build backend isn't installed")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("jax_impl", "torch_impl", "conformance")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of this tree, built by the backend alone."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def source(built: Path) -> set[str]:
    """Paths in the source distribution, from its own root."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def tracked() -> set[str]:
    """Files of this tree that git tracks; empty outside a checkout."""
    if not (ROOT / ".git").exists():
        return set()
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


def files(folder: str) -> set[str]:
    return {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in str(p)}


def test_the_wheel_holds_the_packages_and_the_fixtures_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {name for package in PACKAGES for name in files(package)}
    expected |= {name.replace("fixtures/", "mhc_fixtures/", 1) for name in files("fixtures")}
    assert names == expected


def test_the_wheel_holds_no_test_but_the_one_that_pytest_runs_by_name(wheel):
    tests = [name for name in wheel.namelist() if re.search(r"(^|/)(tests?/|test_|conftest)", name)]
    assert tests == ["conformance/test_golden.py"]


def test_a_golden_file_is_in_the_wheel_to_the_bit(wheel):
    name = "golden/smoke-paper-2.safetensors"
    assert wheel.read(f"mhc_fixtures/{name}") == (ROOT / "fixtures" / name).read_bytes()


def test_the_wheel_registers_the_command_the_plugin_and_the_implementations(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    points = configparser.ConfigParser(delimiters=("=",))
    points.read_string(wheel.read(name).decode())
    assert points["console_scripts"]["mhc-conformance"] == "conformance.cli:main"
    assert dict(points["pytest11"]) == {"mhc-conformance": "conformance.plugin"}
    assert {"jax", "torch"} <= set(points["mhc_conformance.implementations"])


def test_the_source_distribution_holds_everything_that_is_tracked(source):
    needed = {"tox.ini", "constraints.txt", "pyproject.toml", ".ci/run", "README.md", "LICENSE", "tests/conftest.py"}
    assert needed <= source
    assert (tracked() or needed) - source == set()


def test_the_source_distribution_holds_nothing_made_by_a_run(source):
    assert [name for name in source if "__pycache__" in name or name.startswith((".tox", ".git/", "dist"))] == []


def test_the_metadata_are_complete(metadata):
    assert metadata["Version"] == PROJECT["version"] and metadata["License-Expression"] == "MIT"
    assert metadata["Summary"] and metadata["Keywords"] and metadata.get_all("Project-URL")
    assert {"jax", "torch", "all"} <= set(metadata.get_all("Provides-Extra") or [])
    assert "Programming Language :: Python :: 3.11" in (metadata.get_all("Classifier") or [])
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_an_index_shows_the_readme_without_a_relative_link(metadata):
    shown = metadata.get_payload()
    assert isinstance(shown, str) and shown.startswith("# mhc-conformance")
    prose = re.sub(r"```.*?```", "", shown, flags=re.DOTALL)
    assert [link for link in re.findall(r"\]\(([^)]*)\)", prose) if not link.startswith(("https:", "#"))] == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("see [docs/porting.md](docs/porting.md).", "see `docs/porting.md`."),
        ("see [`docs/porting.md`](docs/porting.md).", "see `docs/porting.md`."),
        ("how to [port](docs/porting.md#verdicts) weights", "how to port (`docs/porting.md#verdicts`) weights"),
        ("the [paper](https://arxiv.org/abs/2512.24880)", "the [paper](https://arxiv.org/abs/2512.24880)"),
        ("above, [here](#sharding)", "above, [here](#sharding)"),
        ("![the layer](docs/layer.svg)\n", ""),
    ],
)
def test_relative_links_become_names_of_files(written, shown):
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    for rule in hooks["fancy-pypi-readme"]["substitutions"]:
        written = re.sub(rule["pattern"], rule["replacement"], written)
    assert written == shown
