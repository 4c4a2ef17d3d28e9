"""The command's version, help and completion: all of them answer at once, without NumPy or a framework."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import conformance
from conformance.cases.case import DTYPES
from conformance.cases.dialects import dialect_names
from conformance.cli import app
from conformance.cli.app import RENAMED
from conformance.stages import DTYPES_OF_X, STAGES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("jax", "torch", "flint", "numpy", "mlx", "rich", "typer", "pydantic", "safetensors")
WATCHED = f"""
import atexit, sys
atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))
from conformance.cli import main
main()
"""
"""Runs the command and prints which of these modules it imported, on standard error."""
MOST = 0.6
"""Seconds of CPU time for --help; it takes 0.1 s where a bare interpreter takes 0.01 s."""


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


def paths(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words that call each command and each group of commands."""
    if not isinstance(command, click.Group):
        return [path]
    context = click.Context(command)
    subs = ((name, command.get_command(context, name)) for name in command.list_commands(context))
    return [path] + [p for name, sub in subs if sub is not None for p in paths(sub, (*path, name))]


PATHS = [pytest.param(path, id="-".join(path) or "root") for path in paths(app)]


def test_the_version_is_that_of_the_tree():
    done = call("--version")
    assert (done.returncode, done.stdout) == (0, f"mhc-conformance {PROJECT['version']}\n")
    assert done.stderr.strip() == "[]"
    assert conformance.__version__ == PROJECT["version"]


def test_the_three_packages_read_their_version_in_the_same_way():
    """None imports another; each has its own copy of the file (tests/parity/test_packages.py tests what it does)."""
    texts = {(ROOT / package / "version.py").read_text() for package in ("conformance", "jax_impl", "torch_impl")}
    assert len(texts) == 1


@pytest.mark.parametrize("path", PATHS)
def test_every_command_has_both_help_options(path):
    short, long = (CliRunner().invoke(app, [*path, option]) for option in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0, short.output
    assert short.output == long.output and short.output.startswith(" ".join(["Usage: mhc-conformance", *path]))


@pytest.mark.parametrize("path", PATHS)
def test_the_help_of_every_command_has_its_exit_statuses(path):
    said = " ".join(CliRunner().invoke(app, [*path, "--help"]).output.split())
    assert "Exit status" in said


@pytest.mark.parametrize("path", PATHS)
def test_every_option_and_argument_is_explained(path):
    command: click.Command | None = app
    for name in path:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), name)
    assert command is not None
    assert [p.name for p in command.params if not getattr(p, "help", None)] == []


@pytest.mark.parametrize("path", [(), ("run",), ("port",)])
def test_help_is_quick_and_imports_nothing_heavy(path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = call(*path, "-h")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "Usage: mhc-conformance" in done.stdout
    assert done.stderr.strip() == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST


def test_the_help_of_run_lists_the_names_that_its_options_take():
    done = CliRunner().invoke(app, ["run", "--help"], terminal_width=10_000, max_content_width=10_000)
    for names in (STAGES, DTYPES, dialect_names()):
        assert f"ne of {', '.join(names)}." in done.output
    assert list(DTYPES) == list(DTYPES_OF_X)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_a_shell(shell):
    done = call("--show-completion", shell)
    assert done.returncode == 0, done.stderr
    assert f"_MHC_CONFORMANCE_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_once_and_keeps_what_was_there(tmp_path, shell):
    start = tmp_path / {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}[shell]
    start.parent.mkdir(parents=True, exist_ok=True)
    start.write_text("before")
    for _ in range(2):
        done = call("--install-completion", shell, HOME=str(tmp_path))
        assert done.returncode == 0 and str(start) in done.stdout, done.stderr
    first, line = start.read_text().splitlines()
    assert first == "before" and f"mhc-conformance --show-completion {shell}" in line


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("mhc-conformance ver", {"verdicts"}),
        ("mhc-conformance fixtures r", {"regenerate"}),
        ("mhc-conformance run --stage re", {"reduce", "residual_matrix"}),
        ("mhc-conformance run --dtype b", {"bfloat16"}),
        ("mhc-conformance run --dialect deepseek-v4.", {"deepseek-v4.1"}),
        ("mhc-conformance verdicts hun", {"hunyuan-v4"}),
    ],
)
def test_a_shell_gets_what_fits(typed, expected):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = call(_MHC_CONFORMANCE_COMPLETE="bash_complete", **words)
    assert done.returncode == 0, done.stderr
    assert {line.partition(",")[2] for line in done.stdout.split()} == expected
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rnu",), "mhc-conformance: unknown command 'rnu', expected one of "),
        (("rnu",), "did you mean 'run'?"),
        (("fixtures", "verfy"), "mhc-conformance fixtures: No such command 'verfy'. Did you mean 'verify'?"),
        (("run", "--dtypes", "float32"), "'--dtype'"),
        (("run", "--stage", "redcue"), "did you mean 'reduce'?"),
        (("run", "--dtype", "bfloat"), "did you mean 'bfloat16'?"),
        (("run", "--dialect", "papers"), "did you mean 'paper'?"),
        (("run", "--sizes", "quik"), "did you mean 'quick'?"),
        (("run", "--impl", "torhc", "--quick"), "did you mean 'torch'?"),
        (("port",), "Missing argument"),
        (("run", "--jobs", "0"), "--jobs"),
        (("run", "--jobs", "many"), "--jobs"),
    ],
)
def test_a_slip_is_told_in_one_line(arguments, said):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == (3 if "--impl" in arguments else 2)
    assert said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("name", RENAMED)
def test_a_command_of_a_former_name_says_what_it_is_called_now(name):
    done = CliRunner().invoke(app, [name, "--whatever"])
    assert done.exit_code == 2 and f"{name} is called {RENAMED[name]} now" in done.stderr
