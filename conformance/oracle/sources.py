"""Whether what makes the corpus is what the whole of it was last made with."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from conformance.files import atomic
from conformance.files.places import fixtures

PACKAGE = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("made_with.json")
PACKAGES = ("ml_dtypes", "numpy", "python-flint")
SAMPLE = ("smoke", "slowest", "closed-gate", "shape", "branch", "head", "exact", "parameters")
"""Families that take an eighth of the time together, and have every row of parameters and every stage but the stack."""


def sources() -> list[Path]:
    """Files that the bytes of the corpus depend on."""
    code = [path for room in ("oracle", "cases") for path in sorted((PACKAGE / room).glob("*.py"))]
    return [*code, PACKAGE / "stages.py", PACKAGE / "oracle" / "slowest.json", fixtures() / "dialects.json"]


def made_with() -> dict[str, str]:
    """Hashes of the sources, of the dialects among them and of the corpus; versions of the packages that compute."""
    digest = hashlib.sha256()
    for path in sources():
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    manifest = (fixtures() / "golden" / "MANIFEST.json").read_bytes()
    return {
        "sources": digest.hexdigest(),
        "dialects": hashlib.sha256((fixtures() / "dialects.json").read_bytes()).hexdigest(),
        **{name: version(name) for name in PACKAGES},
        "manifest": hashlib.sha256(manifest).hexdigest(),
    }


def record() -> None:
    """Writes down that the whole corpus is what these sources make."""
    atomic.write(RECORD, (json.dumps(made_with(), indent=1) + "\n").encode())


def changed() -> list[str]:
    """What differs from the record; everything where there is none."""
    now = made_with()
    try:
        before = json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return list(now)
    return [name for name, value in now.items() if not isinstance(before, dict) or before.get(name) != value]
