"""The locks of requirements/: exact versions with hashes, all that the extras need, and what constraints.txt says."""

from __future__ import annotations

import configparser
import itertools
import re
import shlex
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, GROUPS = PYPROJECT["project"], PYPROJECT["dependency-groups"]
UNLOCKED = {"torch"}
"""Builds of one version differ in their hashes and dependencies (pyproject.toml, "tool.uv")."""
Pins = dict[str, list[tuple[Requirement, set[str]]]]
"""``{name: [(requirement, hashes)]}``; a name has several where versions differ by marker."""


def read(path: Path) -> Pins:
    pins: Pins = {}
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*$", "", path.read_text()))
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement = Requirement(re.split(r"\s--hash", line)[0])
        pins.setdefault(canonicalize_name(requirement.name), []).append(
            (requirement, set(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)))
        )
    return pins


def tox() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    return parser


def sources() -> dict[str, tuple[list[str], list[str]]]:
    """For each lock, the extras and groups that `tox run -e lock` writes it from; extra "": the package's own needs."""
    table = {}
    for line in tox()["testenv:lock"]["commands"].strip().splitlines():
        words = shlex.split(line.partition("}")[2])
        options = [(a, b) for a, b in itertools.pairwise(words) if a.startswith("--")]
        lock = Path(dict(options)["--output-file"]).name
        extras = [b for a, b in options if a == "--extra"] + [""] * ("pyproject.toml" in words)
        table[lock] = extras, [b for a, b in options if a == "--group"]
    return table


def needed(extras: list[str], groups: list[str]) -> list[Requirement]:
    """Direct requirements of extras and groups; an extra that stands in another is followed."""
    texts = [text for group in groups for text in GROUPS[group]]
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    requirements = []
    for requirement in map(Requirement, texts):
        own = requirement.name == PROJECT["name"]
        requirements += needed(sorted(requirement.extras), []) if own else [requirement]
    return requirements


LOCKS = {path.name: read(path) for path in sorted(FOLDER.glob("*.txt"))}


def test_each_lock_is_one_that_the_command_writes():
    assert set(LOCKS) == set(sources())


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_an_exact_version_with_hashes(name):
    assert LOCKS[name]
    for pins in LOCKS[name].values():
        for requirement, hashes in pins:
            assert [s.operator for s in requirement.specifier] == ["=="] and hashes, requirement


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_what_its_extras_and_groups_ask_for(name):
    for requirement in needed(*sources()[name]):
        if requirement.name in UNLOCKED:
            continue
        pins = LOCKS[name].get(canonicalize_name(requirement.name), [])
        assert pins, f"{requirement} isn't in requirements/{name}: run tox run -e lock"
        for pin, _ in pins:
            (version,) = pin.specifier
            assert requirement.specifier.contains(version.version), f"{requirement}, but requirements/{name} has {pin}"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_agrees_with_the_constraints(name):
    constraints = {n: pins[0][0] for n, pins in read(ROOT / "constraints.txt").items()}
    for package, pins in LOCKS[name].items():
        if package in constraints:
            assert [str(pin.specifier) for pin, _ in pins] == [str(constraints[package].specifier)]


def test_two_locks_have_the_same_version_of_a_package():
    versions: dict[str, dict[str, str]] = {}
    for name, pins in LOCKS.items():
        for package, entries in pins.items():
            text = ", ".join(sorted(str(pin.specifier) for pin, _ in entries))
            versions.setdefault(package, {})[name] = text
    assert {p: v for p, v in versions.items() if len(set(v.values())) > 1} == {}


def test_constraints_say_nothing_that_no_lock_has():
    locked = {package for pins in LOCKS.values() for package in pins}
    assert set(read(ROOT / "constraints.txt")) - locked == UNLOCKED


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_what_its_packages_need(name):
    """Locks are installed without a look at dependencies; those of packages that are installed here are checked.

    Of a package that pyproject.toml has dependencies for (`tool.uv.dependency-metadata`), these count, as for uv.
    """
    pins = LOCKS[name]
    stated = {entry["name"]: entry["requires-dist"] for entry in PYPROJECT["tool"]["uv"]["dependency-metadata"]}
    for package, entries in pins.items():
        try:
            installed = distribution(package)
        except PackageNotFoundError:
            continue
        if Version(installed.version) not in {Version(next(iter(pin.specifier)).version) for pin, _ in entries}:
            continue
        for requirement in map(Requirement, stated.get(package, installed.requires or [])):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            assert canonicalize_name(requirement.name) in pins.keys() | UNLOCKED, f"{package} needs {requirement}"


def test_every_environment_installs_a_lock_that_has_its_extra():
    parser = tox()
    for section in (s for s in parser.sections() if s.startswith("testenv") and s not in ("testenv", "testenv:.pkg")):
        deps = parser[section].get("deps", parser["testenv"]["deps"])
        locks = re.findall(r"-r requirements/(\S+)", deps)
        assert locks and "--no-deps" in deps.split(), section
        extra = parser[section].get("extras", "")
        assert any(extra in sources()[lock][0] for lock in locks) or not extra, f"{section}: {extra} isn't in {locks}"
