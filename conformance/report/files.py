"""The result as files: JSON lines for programs, written as they come; JUnit for CI systems, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from conformance.cases.corpus import corpus_hash
from conformance.files import atomic
from conformance.files.line import one_line
from conformance.files.plain import plain, text_of
from conformance.files.streaming import Stream
from conformance.judge.groups import Diagnosis
from conformance.judge.item import Outcome
from conformance.judge.rule import GOOD

FORMAT = "mhc-conformance-report/2"
PACKAGES = ("mhc-conformance", "numpy", "jax", "jaxlib", "flax", "torch", "transformers", "safetensors", "ml_dtypes")
ENVIRONMENT = ("XLA_FLAGS", "JAX_PLATFORMS", "NVIDIA_TF32_OVERRIDE", "TRITON_INTERPRET")


def versions() -> dict[str, str]:
    """The installed packages that figures depend on."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def header(corpus: str, altered: Sequence[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What one must know to read the figures: corpus, versions, machine, and what was asked."""
    return {
        "kind": "header",
        "format": FORMAT,
        "corpus": corpus,
        **({"altered": list(altered)} if altered else {}),
        "versions": versions(),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "system": platform.system(),
        "processors": os.cpu_count(),
        "environment": {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
        "asked": dict(asked),
    }


def lines_of(o: Outcome) -> list[dict[str, Any]]:
    """The lines of one item: its checks or the reason to skip it, then a line that says that this was all."""
    shared = {"implementation": o.implementation, "case": o.case, "stage": o.stage, "variant": o.variant,
              "x": o.x, "dialect": o.dialect, "seconds": round(o.seconds, 6), "family": o.family,
              "elements": o.elements}  # fmt: skip
    lines: list[dict[str, Any]] = []
    if o.skipped:
        lines.append({"kind": "skip", **shared, "reason": o.skipped})
    for line in o.differences:
        lines.append({"kind": "difference", **shared, "message": line})
    for mode, reason in o.refused.items():
        lines.append({"kind": "refusal", **shared, "mode": mode, "reason": reason})
    for check in o.checks:
        found = check.as_dict()
        if not check.map:
            del found["map"]
        if check.verdict in GOOD:
            del found["histogram"], found["worst"], found["trace"]
        else:
            found["reproduce"] = o.reproduce
        lines.append({"kind": "check", **shared, **found})
    item = {"reference": o.reference, "asked": o.asked, "file": o.file, "modes": list(o.modes), "repeats": o.repeats}
    return [*lines, {"kind": "item", **shared, **item, "lines": len(lines)}]


class Lines:
    """Writes a run to a file as it comes, so that what was measured is kept whatever happens to the run.

    A line that ends an item says how many lines it has; the footer counts all of them. A file without one is of a run
    that was cut off.

    Args:
        corpus: the corpus's hash, or what stands for it where a file isn't as promised.
        altered: a line for each such file.
        asked: the options that select what is measured.
        before: the outcomes that the file has already, where a run is resumed.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(
        self, path: Path, corpus: str = "", altered: Sequence[str] = (), asked: Mapping[str, Any] | None = None,
        before: Sequence[Outcome] = (),
    ):  # fmt: skip
        self._corpus, self._altered = corpus or corpus_hash(), list(altered)
        self._count = self._failed = 0
        self._settings: dict[str, dict[str, Any]] = {}
        first = [header(self._corpus, altered, asked or {})]
        if not before:
            self._file = Stream(path)
            self._write(first)
            return
        for outcome in before:
            first += self._lines_of(outcome)
        atomic.write(path, _text(first))  # what it had isn't lost if this process dies here
        self._file = Stream(path, more=True)

    def add(self, outcome: Outcome) -> None:
        """Adds one item, after its implementation's settings where these are new.

        Raises:
            OSError: it can't be written.
        """
        self._write(self._lines_of(outcome))

    def _lines_of(self, outcome: Outcome) -> list[dict[str, Any]]:
        own, lines = self._settings.setdefault(outcome.implementation, {}), list[dict[str, Any]]()
        if outcome.about and {**own, **outcome.about} != own:
            own.update(outcome.about)
            lines.append({"kind": "implementation", "name": outcome.implementation, "settings": dict(own)})
        of_item = lines_of(outcome)
        self._count, self._failed = self._count + len(of_item), self._failed + bool(outcome.failed)
        return lines + of_item

    def end(self, diagnoses: Iterable[Diagnosis] = (), corpus: str = "", altered: Sequence[str] = (),
            interrupted: bool = False) -> None:  # fmt: skip
        """Adds the diagnoses and the footer, and closes the file.

        Args:
            corpus, altered: as they are after the run.
            interrupted: whether the run was ended before it had asked for all of its items.

        Raises:
            OSError: it can't be written.
        """
        footer = {"kind": "footer", "lines": self._count, "failed": self._failed, "interrupted": interrupted,
                  "corpus": corpus or self._corpus, "altered": list(altered) or self._altered}  # fmt: skip
        self._write([*({"kind": "diagnosis", **asdict(diagnosis)} for diagnosis in diagnoses), footer])
        self.close()

    def close(self) -> None:
        self._file.close()

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Hands whole lines to the system, so that a process that dies leaves all but the last one whole."""
        self._file.write(_text(lines))


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(plain(line)) + "\n" for line in lines)


def write_jsonl(
    path: Path, outcomes: Sequence[Outcome], corpus: str = "", altered: Sequence[str] = (),
    diagnoses: Iterable[Diagnosis] = (),
) -> None:  # fmt: skip
    """A whole run at once.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    with atomic.whole(path) as temporary, contextlib.closing(Lines(temporary, corpus, altered)) as lines:
        for outcome in outcomes:
            lines.add(outcome)
        lines.end(diagnoses)


def _xml(text: str) -> str:
    """A text of one line, since XML has no place for control characters and halves of pairs."""
    return one_line(text_of(text))


def write_junit(path: Path, outcomes: Sequence[Outcome]) -> None:
    """One suite per implementation, one test case per item."""
    root = ElementTree.Element("testsuites")
    for name in dict.fromkeys(o.implementation for o in outcomes):
        mine = [o for o in outcomes if o.implementation == name]
        suite = ElementTree.SubElement(
            root, "testsuite", name=_xml(name), tests=str(len(mine)), failures=str(sum(bool(o.failed) for o in mine)),
            skipped=str(sum(bool(o.skipped) for o in mine)),
        )  # fmt: skip
        for o in mine:
            test = ElementTree.SubElement(
                suite,
                "testcase",
                classname=_xml(f"{name}.{o.stage}"),
                name=_xml(f"{o.case}[{o.variant}]"),
                time=f"{o.seconds:.4f}",
            )
            if o.skipped:
                ElementTree.SubElement(test, "skipped", message=_xml(o.skipped))
            for check in o.failed:
                mode = f" ({check.mode})" if check.mode else ""
                message = f"{check.tensor}: {check.verdict}{mode}, {check.ratio:.3g} of the bound. {check.message}"
                ElementTree.SubElement(test, "failure", message=_xml(message))
    atomic.write(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True))
