"""The golden corpus: where it is, what it must hold, and whether it still does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from conformance.cases.case import Case, CaseError, load_case
from conformance.cases.dialects import dialect_names
from conformance.files.places import fixtures

MANIFEST_FORMAT = "mhc-conformance-manifest/1"


def is_golden(path: Path) -> bool:
    """Whether a file lies in the corpus."""
    return path.resolve().parent == fixtures() / "golden"


def manifest(golden: Path | None = None) -> dict[str, dict[str, object]]:
    """``{file: {"sha256", "bytes"}}`` as promised.

    Raises:
        CaseError: no manifest, another format, or a count that its own list contradicts.
    """
    path = (golden or fixtures() / "golden") / "MANIFEST.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CaseError(f"{path}: expected a manifest, got {error}") from error
    if content.get("format") != MANIFEST_FORMAT or content.get("count") != len(content.get("files", {})):
        raise CaseError(f"{path}: expected format {MANIFEST_FORMAT} and as many files as its count")
    return content["files"]


def corpus_hash(golden: Path | None = None) -> str:
    """One hash for the whole corpus: that of its manifest."""
    return hashlib.sha256(((golden or fixtures() / "golden") / "MANIFEST.json").read_bytes()).hexdigest()


def verify(golden: Path | None = None) -> list[str]:
    """A line for each file that is missing, extra or altered by even one bit; empty where all is well."""
    golden = golden or fixtures() / "golden"
    promised = manifest(golden)
    present = {p.name for p in golden.iterdir()} - {"MANIFEST.json"}
    problems = [f"missing  {name}" for name in sorted(set(promised) - present)]
    problems += [f"extra    {name}" for name in sorted(present - set(promised))]
    for name in sorted(present & set(promised)):
        found = hashlib.sha256((golden / name).read_bytes()).hexdigest()
        if found != promised[name]["sha256"]:
            problems.append(f"altered  {name}: expected sha256 {promised[name]['sha256']}, got {found}")
    return problems


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
            raise CaseError(f"{case.path}: unknown dialect {case.dialect!r}, expected one of {', '.join(known)}")
    return cases
