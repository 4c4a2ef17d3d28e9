"""Commands of the pages that no test of blocks runs: why, and what is checked of them instead."""

from __future__ import annotations

import configparser
import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rule:
    """Commands that match a pattern.

    Attributes:
        why: the reason that they aren't run.
        check: what is wrong with such a command in this checkout, in words; empty where nothing is.
    """

    pattern: str
    why: str
    check: Callable[[str, Path], str]


def rule(command: str) -> Rule | None:
    """The first rule for a command; None where it is to be run."""
    text = command.partition("  #")[0].strip()
    return next((known for known in RULES if fnmatch.fnmatchcase(text, known.pattern)), None)


def words(command: str) -> list[str]:
    """The words of a command line, without its comment and what it sets in the environment."""
    split = shlex.split(command, comments=True)
    while split and re.fullmatch(r"[A-Z_]+=.*", split[0]):
        split.pop(0)
    return split


def _installs(command: str, root: Path) -> str:
    """Whether the files that pip is told of are there, and the extras in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    arguments = words(command)
    for word in arguments[arguments.index("install") + 1 :]:
        extras = re.match(r"(?:\.|mhc-conformance)\[(.*)\]$", word)
        for extra in extras[1].split(",") if extras else ():
            if extra not in project["optional-dependencies"]:
                return f"pyproject.toml has no extra {extra!r}"
        if word.endswith(".txt") and not (root / word).is_file():
            return f"there is no file {word}"
    return ""


def _tox(command: str, root: Path) -> str:
    """Whether tox.ini has the environment, and its command the options behind ``--``."""
    before, _, behind = command.partition(" -- ")
    name = words(before)[-1]
    configuration = configparser.ConfigParser(interpolation=None)
    configuration.read(root / "tox.ini")
    if f"testenv:{name}" not in configuration:
        return f"tox.ini has no environment {name!r}"
    if not behind:
        return ""
    lines = configuration[f"testenv:{name}"]["commands"].splitlines()
    taking = next((line.split("{posargs")[0] for line in lines if "{posargs" in line), "")
    if not taking:
        return f"the environment {name} takes no arguments"
    return "" if taking.startswith("pytest") else _checked(f"{taking} {behind}", root)


def _checked(command: str, root: Path) -> str:
    return _script(command, root) if command.startswith("python ") else _options(command, root)


def _options(command: str, root: Path) -> str:
    """Whether ``mhc-conformance`` has the command and its options."""
    _, *arguments = words(command)
    names = [word for word in arguments[:2] if re.fullmatch(r"[a-z]+", word)]
    depth = 2 if names[:1] == ["fixtures"] else 1
    call = [sys.executable, "-m", "conformance.cli", *names[:depth], "--help"]
    done = subprocess.run(call, cwd=root, capture_output=True, text=True)
    if done.returncode:
        return f"mhc-conformance has no command {' '.join(names[:depth])}"
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout))
    options = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]
    unknown = [option for option in options if option not in known]
    return f"mhc-conformance {' '.join(names[:depth])} has no option {', '.join(unknown)}" if unknown else ""


def _script(command: str, root: Path) -> str:
    """Whether the script is there, and its source has the options."""
    _, script, *arguments = words(command)
    if not (root / script).is_file():
        return f"there is no file {script}"
    source = (root / script).read_text()
    unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in source]
    return f"{script} has no option {', '.join(unknown)}" if unknown else ""


def _example(command: str, root: Path) -> str:
    """Whether the example is there, and it or the module that reads its options has them."""
    sources = "".join(path.read_text() for path in sorted((root / "examples").glob("*.py")))
    _, script, *arguments = words(command)
    unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in sources]
    if not (root / script).is_file():
        return f"there is no file {script}"
    return f"{script} has no option {', '.join(unknown)}" if unknown else ""


def _paths(command: str, root: Path) -> str:
    """Whether the files and folders that the command names are there."""
    named = [word for word in words(command) if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", word)]
    absent = [word for word in named if not (root / word.split("::")[0]).exists()]
    return f"there is no {', '.join(absent)}" if absent else ""


def _module(command: str, root: Path) -> str:
    """Whether the module behind -m is a file of this checkout."""
    name = words(command)[words(command).index("-m") + 1]
    path = root.joinpath(*name.split(".")).with_suffix(".py")
    return "" if path.is_file() else f"there is no module {name}"


RULES = (
    Rule("pip install *", "it installs into an environment of the reader's own", _installs),
    Rule("python3 -m venv *", "it makes an environment of the reader's own", lambda command, root: ""),
    Rule("tox run -e *", "it installs an environment of its own, and most take minutes", _tox),
    Rule("mhc-conformance * --write *", "it rewrites a page of this checkout", _options),
    Rule("mhc-conformance run", "it takes ten minutes", _options),
    Rule("mhc-conformance run --mesh *", "it starts every implementation on the mesh, for minutes", _options),
    Rule("mhc-conformance run --impl jax *", "it takes minutes", _options),
    Rule("mhc-conformance selftest*", "it takes a minute or more", _options),
    Rule("mhc-conformance fixtures regenerate*", "it rewrites the corpus", _options),
    Rule("python -m tests.conformance.fuzz.run *", "it reads thousands of inputs, for minutes", _module),
    Rule("python -m tests.conformance.faults.writing *", "it is killed hundreds of times, for minutes", _module),
    Rule("python examples/train_*.py --weights * --losses *", "it takes a minute; tests/examples has less", _example),
    Rule("python examples/plot_losses.py *", "it needs matplotlib, which the documents' environment has", _example),
    Rule("python benchmarks/*", "it takes minutes, or needs libtpu", _script),
    Rule("pytest", "it is all tests, this one among them", lambda command, root: ""),
    Rule("pytest *", "it runs tests, which run on their own", _paths),
    Rule("git *", "it acts on a repository of the reader's own", lambda command, root: ""),
)
