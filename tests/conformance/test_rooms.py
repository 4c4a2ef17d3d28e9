"""The import graph of `conformance`: few rooms, in floors, with no circle and no arrow upwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 18
FLOORS = (
    ("stages", "files", "version", "witnesses"),
    ("interface",),
    ("mesh", "cases"),
    ("adapters", "oracle"),
    ("implementations", "porter"),
    ("judge",),
    ("questions", "report", "test_golden", "plugin"),
    ("selftest",),
    ("cli",),
)
"""A room imports from lower floors alone."""


def modules(package: Path) -> dict[str, Path]:
    """``{dotted name: file}`` of every module under a package."""
    names = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, also inside functions and for types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in known else node.module)
    return names & known.keys()


def room(module: str) -> str:
    """The package or module right below `conformance` that a module belongs to; empty for `conformance` itself."""
    return module.split(".")[1] if "." in module else ""


def arrows(package: Path) -> set[tuple[str, str]]:
    """Pairs (room, room that it imports from)."""
    known = modules(package)
    pairs = {(room(name), room(other)) for name, path in known.items() for other in imported(path, known)}
    return {(a, b) for a, b in pairs if a != b and b}


def upwards(found: set[tuple[str, str]]) -> list[str]:
    """Arrows that don't lead to a lower floor. Where there is none there is no circle."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    return sorted(f"{a} -> {b}" for a, b in found if a and floor.get(b, 99) >= floor.get(a, -1))


def test_every_import_leads_to_a_lower_floor():
    assert upwards(arrows(ROOT / "conformance")) == []


def test_there_are_few_rooms():
    rooms = {room(name) for name in modules(ROOT / "conformance")} - {""}
    assert rooms <= {name for names in FLOORS for name in names}
    assert len(rooms) <= MOST


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cases/case.py": "from conformance.stages import STAGES", "stages.py": ""}, []),
        ({"cases/case.py": "from conformance.judge import rule", "judge/rule.py": ""}, ["cases -> judge"]),
        ({"cases/case.py": "def f():\n    import conformance.cli.app", "cli/app.py": ""}, ["cases -> cli"]),
        ({"mesh.py": "from conformance.cases.case import Case", "cases/case.py": ""}, ["mesh -> cases"]),
    ],
)
def test_an_import_that_leads_upwards_is_told(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / "conformance" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert upwards(arrows(tmp_path / "conformance")) == expected


@pytest.mark.parametrize(("package", "other"), [("jax_impl", "torch"), ("torch_impl", "jax")])
def test_the_two_implementations_share_nothing(package, other):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            forbidden = {other, f"{other}_impl", "conformance", "flax" if other == "jax" else "torch"}
            assert not {name.split(".")[0] for name in names} & forbidden, path
