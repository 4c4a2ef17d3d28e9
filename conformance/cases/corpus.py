"""The golden corpus: where it is, what it must hold, and whether it still does."""

from __future__ import annotations

import hashlib
from pathlib import Path

from msgspec import Struct

from conformance.cases.case import Case, load_case
from conformance.cases.dialects import dialect_names
from conformance.files.places import CaseError, fixtures
from conformance.files.problems import shown, unknown
from conformance.files.reading import Reader, open_bytes, reason

MANIFEST_FORMAT = "mhc-conformance-manifest/1"
LONGEST_NAME = 255
"""Bytes of a file's name on the file systems in use."""
QUICK = (("smoke", ""), ("generic", "n4"), ("closed-gate", ""), ("closed-gate", "post-18"), ("big-eps", ""))
"""Families and labels that a quick run takes of a row that was named, be it published or a user's own."""


def quick_of_its_row(case: Case) -> bool:
    """Whether a case is one of those that a quick run takes where its row was named."""
    beginnings = ["-".join(filter(None, (family, label, case.dialect))) for family, label in QUICK]
    return any(case.id == beginning or case.id.rpartition("-")[0] == beginning for beginning in beginnings)


def is_golden(path: Path) -> bool:
    """Whether a file lies in the corpus."""
    return path.resolve().parent == fixtures() / "golden"


class Promised(Struct, frozen=True):
    """What a file of the corpus must be."""

    sha256: str
    bytes: int


class Manifest(Struct, frozen=True):
    """``MANIFEST.json`` (fixtures/README.md, "Manifest")."""

    count: int
    files: dict[str, Promised]


MANIFEST = Reader(Manifest, "a manifest", CaseError, MANIFEST_FORMAT)


def _path(golden: Path | None) -> Path:
    return (golden or fixtures() / "golden") / "MANIFEST.json"


def manifest(golden: Path | None = None) -> dict[str, Promised]:
    """The files that are promised, by name.

    Raises:
        CaseError: no manifest, another format, a count that its own list contradicts, or a name that no file has.
    """
    path = _path(golden)
    content = MANIFEST.read(path)
    if content.count != len(content.files):
        raise CaseError(f"{path}: expected as many files as its count, {content.count}, got {len(content.files)}")
    for name in content.files:
        if name in ("", ".", "..") or set(name) & set("/\\\0") or len(name.encode()) > LONGEST_NAME:
            raise CaseError(f"{path}: files: expected names of files in its folder, got {shown(name)}")
    return content.files


def corpus_hash(golden: Path | None = None) -> str:
    """One hash for the whole corpus: that of its manifest."""
    return hashlib.sha256(MANIFEST.content(_path(golden))).hexdigest()


def altered(path: Path, sha256: str) -> str:
    """A line where a file can't be read or hasn't this hash; empty otherwise."""
    try:
        with open_bytes(path) as file:
            found = hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        return f"altered  {path.name}: it can't be read ({reason(error)})"
    return "" if found == sha256 else f"altered  {path.name}: expected sha256 {sha256}, got {found}"


def verify(golden: Path | None = None, promised: dict[str, Promised] | None = None) -> list[str]:
    """A line for each file that is missing, extra or altered by even one bit; empty where all is well.

    Args:
        golden: the folder; the corpus's own where none is given.
        promised: what the manifest said; it is read where nothing is given.
    """
    golden = golden or fixtures() / "golden"
    promised = manifest(golden) if promised is None else promised
    try:
        present = {p.name for p in golden.iterdir()} - {"MANIFEST.json"}
    except OSError as error:
        raise CaseError(f"{golden}: can't be read ({reason(error)})") from error
    problems = [f"missing  {name}" for name in sorted(set(promised) - present)]
    problems += [f"extra    {name}" for name in sorted(present - set(promised))]
    lines = (altered(golden / name, promised[name].sha256) for name in sorted(present & set(promised)))
    return problems + [line for line in lines if line]


def load_corpus(golden: Path | None = None) -> list[Case]:
    """Every case that the manifest promises, in its order.

    Raises:
        CaseError: a promised file is missing, or not a case.
    """
    golden = golden or fixtures() / "golden"
    promised = manifest(golden)
    absent = [name for name in promised if not (golden / name).is_file()]
    if absent:
        raise CaseError(f"{golden}: expected {len(promised)} cases, {len(absent)} are missing: {', '.join(absent[:5])}")
    known = dialect_names()
    cases = [load_case(golden / name) for name in promised]
    for case in cases:
        if case.dialect not in known:
            raise CaseError(f"{case.path}: {unknown('dialect', case.dialect, known)}")
    return cases
