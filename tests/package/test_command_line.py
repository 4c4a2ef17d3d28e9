"""The command's version, help and completion: all three answer without importing a framework."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

import conformance
from conformance.cli import app

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FRAMEWORKS = ("jax", "torch", "flint", "numpy", "mlx")
WATCHED = f"""
import atexit, sys
atexit.register(lambda: print([m for m in {FRAMEWORKS!r} if m in sys.modules], file=sys.stderr))
from conformance.cli import main
main()
"""
"""Runs the command and prints the frameworks that it imported, on standard error."""


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


def paths(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words that call each command and each group of commands."""
    return [path] + [p for name, sub in getattr(command, "commands", {}).items() for p in paths(sub, (*path, name))]


def test_the_version_is_that_of_the_tree():
    done = call("--version")
    assert (done.returncode, done.stdout) == (0, f"mhc-conformance {PROJECT['version']}\n")
    assert done.stderr.strip() == "[]"
    assert conformance.__version__ == PROJECT["version"]


def test_the_three_packages_read_their_version_in_the_same_way():
    """None imports another; each has its own copy of the file (tests/parity/test_packages.py tests what it does)."""
    texts = {(ROOT / package / "version.py").read_text() for package in ("conformance", "jax_impl", "torch_impl")}
    assert len(texts) == 1


@pytest.mark.parametrize("path", paths(typer.main.get_command(app)), ids=lambda path: "-".join(path) or "root")
def test_every_command_has_both_help_options(path):
    from typer.testing import CliRunner

    short, long = (CliRunner().invoke(app, [*path, option]) for option in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0, short.output
    assert short.output == long.output and short.output.startswith("Usage: ")


def test_help_imports_no_framework():
    done = call("-h")
    assert done.returncode == 0 and "Usage: mhc-conformance" in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_a_shell(shell):
    done = call("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_MHC_CONFORMANCE_COMPLETE=complete_" in done.stdout


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("mhc-conformance ver", {"verdicts"}), ("mhc-conformance fixtures r", {"regenerate"})],
)
def test_a_shell_gets_the_commands_that_fit(typed, expected):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = call(_MHC_CONFORMANCE_COMPLETE="complete_bash", **words)
    assert done.returncode == 0 and set(done.stdout.split()) == expected, done.stderr
    assert done.stderr.strip() == "[]"
