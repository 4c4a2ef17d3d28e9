"""An import of a package, in a process of its own: its requirements, its error without them, its version."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec

import pytest

from tests.parity.signatures import PACKAGES, ROOT

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import {package}
except ImportError as error:
    print(error)
"""
MISSING = [("jax_impl", "jax"), ("jax_impl", "flax"), ("torch_impl", "torch")]


def printed(code, **options):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **options).stdout


@pytest.mark.parametrize("package, module", MISSING)
def test_an_import_without_the_framework_names_the_extra(package, module):
    if module == "flax" and not find_spec("jax"):
        pytest.skip("JAX isn't installed, and is missed before Flax")
    said = printed(BLOCKED.format(package=package, module=module))
    needs = {"jax_impl": "JAX and Flax", "torch_impl": "PyTorch"}[package]
    extra = package.partition("_")[0]
    assert said == f"{package} needs {needs}, and {module} is missing: pip install 'mhc-conformance[{extra}]'\n"


def test_another_module_that_is_missing_is_named_itself(backend):
    name = backend.package.__name__
    assert printed(BLOCKED.format(package=name, module="safetensors")) == "No module named 'safetensors'\n"


def test_importing_one_needs_neither_the_other_nor_the_suite(backend):
    name = backend.package.__name__
    others = {"jax_impl": {"torch", "torch_impl"}, "torch_impl": {"jax", "flax", "jax_impl"}}[name] | {"conformance"}
    assert printed(f"import sys, {name}; print({others!r} & set(sys.modules))") == "set()\n"


def test_importing_one_loads_no_compiler(backend):
    """Dynamo takes seconds, and imports Triton, which reads then whether kernels are interpreted."""
    name = backend.package.__name__
    assert printed(f"import sys, {name}; print({{'triton', 'torch._dynamo'}} & set(sys.modules))") == "set()\n"


def test_the_version_is_that_of_the_checkout(backend):
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert backend.package.__version__ == stated


@pytest.mark.parametrize("package", PACKAGES)
def test_the_version_of_an_archive_comes_from_its_project_file(package, tmp_path):
    """A folder that was copied without one has the installed version, or none where nothing is installed."""
    (tmp_path / package).mkdir()
    shutil.copy(ROOT / package / "version.py", tmp_path / package / "version.py")
    (tmp_path / package / "__init__.py").touch()
    code = f"from {package}.version import version; print(version())"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mhc-conformance"\nversion = "7.8.9"\n')
    assert printed(code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}) == "7.8.9\n"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "7.8.9"\n')
    assert "7.8.9" not in printed(code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    alone = f"import sys; sys.path = [{str(tmp_path)!r}, *(p for p in sys.path if 'site-packages' not in p)]; {code}"
    assert printed(alone, cwd=tmp_path, env={"PYTHONPATH": ""}) == "0+unknown\n"
