"""What an implementation lacks is named with the line that installs it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from conformance.implementations import registry

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
STATED = [line for lines in PYPROJECT["project"]["optional-dependencies"].values() for line in lines]


@pytest.mark.parametrize("module", sorted({module for modules in registry.MODULES.values() for module in modules}))
def test_a_module_is_brought_by_a_package_that_an_extra_names(module):
    package = registry.package_of(module).strip("'").partition("[")[0]
    assert package in {re.split(r"[\[<>=;]", line)[0] for line in STATED}


def test_what_is_missing_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(registry, "installed", lambda module: module == "torch")
    assert registry.unavailable("hyper-connections-log") == (
        "not installed: hyper_connections (pip install hyper-connections)"
    )
    assert registry.unavailable("mlx-mhc").endswith("mlx-mhc)")
    assert registry.unavailable("liger-kernel").endswith("(pip install triton liger-kernel)")
    assert registry.unavailable("torch") == ""


@pytest.mark.parametrize(
    ("reference", "processes"),
    [
        ("torch", 0), ("exec:./mine@data=2", 0), ("torch@tensor=2", 2), ("torch@data=2,tensor=2", 4),
        ("jax@data=2,fsdp=2,tensor=2", 1), ("jax@data=4/2", 2), ("mine:Mine@data=4/2", 2),
    ],
)  # fmt: skip
def test_the_processes_of_a_mesh_are_known_before_it_is_set_up(reference, processes):
    assert registry.processes_of(reference) == processes


def test_what_runs_on_request_is_registered_and_no_default():
    registered = {name for group in PYPROJECT["project"]["entry-points"].values() for name in group}
    assert set(registry.ON_REQUEST) <= registered
    assert not set(registry.ON_REQUEST) & set(registry.defaults()[0])
