"""Runs the judge's fast tests against a module of `conformance.judge` that was changed, each time in a new process.

A process of its own for each change is forked from one that has imported what the tests need, but no module of the
judge, so that a change to a constant reaches every module that imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import multiprocessing
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
"""The modules and the tests are those of mutmut."""


@dataclass(frozen=True)
class Plant:
    """One change to one module."""

    file: str
    """Relative to the root of the repository."""
    was: str
    becomes: str
    source: str
    """The whole module with the change."""

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").replace("/", ".")


def replaced(file: str, was: str, becomes: str) -> Plant:
    """A change of a text that occurs once.

    Raises:
        ValueError: it occurs never, or more than once.
    """
    source = (ROOT / file).read_text()
    if source.count(was) != 1:
        raise ValueError(f"{file}: expected {was!r} once, found it {source.count(was)} times")
    return Plant(file, was, becomes, source.replace(was, becomes))


class _Loader(importlib.machinery.SourceFileLoader):
    source = ""

    def get_code(self, fullname: str):  # never the bytecode of the module as it is on the disk
        return compile(self.source, self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, plant: Plant):
        self.plant = plant

    def find_spec(self, fullname, path, target=None):
        if fullname != self.plant.module:
            return None
        loader = _Loader(fullname, str(ROOT / self.plant.file))
        loader.source = self.plant.source
        return importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)


def _status(plant: Plant) -> int:
    """The exit status of pytest with the change; pytest stops at the first test that fails."""
    import pytest

    sys.meta_path.insert(0, _Finder(plant))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # which takes longer than all the tests
    arguments = [*SETTINGS["pytest_add_cli_args"], *SETTINGS["pytest_add_cli_args_test_selection"]]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return int(pytest.main([f"--rootdir={ROOT}", *(str(ROOT / a) if "/" in a else a for a in arguments)]))


def statuses(plants: Sequence[Plant], jobs: int = 2) -> Iterator[int]:
    """For each change 0 where every test passes, 1 where one fails, more where the tests can't even be collected."""
    import ml_dtypes  # noqa: F401  # what the tests need, imported once, before any process is forked
    import numpy as np  # noqa: F401
    import pytest  # noqa: F401
    import safetensors  # noqa: F401

    import conformance.cases.corpus  # noqa: F401

    imported = [name for name in sys.modules if name.startswith("conformance.judge")]
    if imported:
        raise RuntimeError(f"expected no module of the judge to be imported already, found {', '.join(imported)}")
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap(_status, plants, chunksize=1)


def main() -> None:
    """Reads plants as JSON from standard input, and prints their statuses."""
    print(json.dumps(list(statuses([Plant(**row) for row in json.load(sys.stdin)]))))


def as_json(plants: Sequence[Plant]) -> str:
    return json.dumps([asdict(plant) for plant in plants])


if __name__ == "__main__":
    main()
