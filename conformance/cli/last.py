"""What failed in the last run from a folder, for ``run --failed``: a small file in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from conformance.files import atomic
from conformance.files.places import CaseError
from conformance.files.plain import plain
from conformance.files.reading import Reader

if TYPE_CHECKING:
    from conformance.judge.item import Outcome


class Last(Struct, frozen=True):
    """The options that selected the last run, and by reference the ids of the items that failed."""

    selection: dict[str, Any]
    failed: dict[str, tuple[str, ...]]


READER = Reader(Last, "the record of a run", CaseError)


def _path() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    here = hashlib.sha256(str(Path.cwd()).encode(errors="surrogateescape")).hexdigest()[:16]
    return cache / "mhc-conformance" / f"last-{here}.json"


def load() -> Last:
    """The last run from this folder.

    Raises:
        ValueError: none is known, or its record can't be read.
        OSError, RuntimeError: this folder is gone, or there is no home.
    """
    return READER.read(_path())


def save(selection: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Keeps what failed; where nothing can be kept, for instance without a home, the run goes on."""
    failed: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.failed:
            failed.setdefault(outcome.reference or outcome.implementation, []).append(outcome.asked)
    with contextlib.suppress(OSError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(plain({"selection": dict(selection), "failed": failed})))
