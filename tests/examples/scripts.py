"""Runs the scripts of examples/ as a reader does, inside this process: their imports then count once."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str, folder: str = "examples") -> ModuleType:
    """The module of that script, which finds its neighbours as if it were started; skips where its framework lacks."""
    path = str(ROOT / folder)
    if path not in sys.path:
        sys.path.append(path)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name}.py needs the package {error.name}")


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Calls the script's `main` with these arguments of the command line."""
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *map(str, arguments)])
    module.main()
