"""The result as files: JSON lines for programs, JUnit for CI systems; whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from conformance.cases.corpus import corpus_hash
from conformance.files import atomic
from conformance.files.line import one_line
from conformance.files.plain import plain, text_of
from conformance.judge.item import Outcome
from conformance.judge.rule import GOOD
from conformance.report import borrowing

FORMAT = "mhc-conformance-report/1"
PACKAGES = ("mhc-conformance", "numpy", "jax", "jaxlib", "flax", "torch", "transformers", "safetensors", "ml_dtypes")
ENVIRONMENT = ("XLA_FLAGS", "JAX_PLATFORMS", "NVIDIA_TF32_OVERRIDE", "TRITON_INTERPRET")


def header(implementations: dict[str, dict[str, Any]], corpus: str, altered: Sequence[str]) -> dict[str, Any]:
    """What one must know to read the figures: corpus, versions, machine, and each implementation's own settings."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "kind": "header",
        "format": FORMAT,
        "corpus": corpus,
        **({"altered": list(altered)} if altered else {}),
        "versions": versions,
        "python": sys.version.split()[0],
        "implementations": implementations,
        "machine": platform.machine(),
        "system": platform.system(),
        "processors": os.cpu_count(),
        "environment": {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
    }


def write_jsonl(path: Path, outcomes: Sequence[Outcome], corpus: str = "", altered: Sequence[str] = ()) -> None:
    """Header, one line per check or skip, footer with the count: without it the file was cut off.

    Args:
        corpus: the corpus's hash, or what stands for it where a file isn't as promised; read here if none is given.
        altered: a line for each such file.
    """
    lines = [header(borrowing.settings(outcomes), corpus or corpus_hash(), altered)]
    for o in outcomes:
        shared = {"implementation": o.implementation, "case": o.case, "stage": o.stage, "variant": o.variant,
                  "x": o.x, "dialect": o.dialect, "seconds": round(o.seconds, 6)}  # fmt: skip
        if o.skipped:
            lines.append({"kind": "skip", **shared, "reason": o.skipped})
        for line in o.differences:
            lines.append({"kind": "difference", **shared, "message": line})
        for mode, reason in o.refused.items():
            lines.append({"kind": "refusal", **shared, "mode": mode, "reason": reason})
        for check in o.checks:
            found = check.as_dict()
            if check.verdict in GOOD:
                del found["histogram"], found["worst"]
            else:
                found["reproduce"] = o.reproduce
            lines.append({"kind": "check", **shared, **found})
    lines.append({"kind": "footer", "lines": len(lines) - 1, "failed": sum(bool(o.failed) for o in outcomes)})
    atomic.write(path, "".join(json.dumps(plain(line)) + "\n" for line in lines))


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
