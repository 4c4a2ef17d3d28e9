"""The folder that FlashInfer-Bench reads (`flashinfer_bench.TraceSet.from_path`)::

definitions/mhc_pre/NAME.json              what is computed, with its reference
workloads/mhc_pre/NAME.jsonl               the calls
blob/workloads/mhc_pre/NAME/CASE.safetensors
solutions/mhc_pre/NAME.json                torch_impl, where it is asked for
README.md                                  for whoever finds the folder
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import save

from conformance.cases.case import Case
from conformance.cases.corpus import corpus_hash
from conformance.cases.flashinfer_bench.kernel import TOKENS, Kernel
from conformance.cases.flashinfer_bench.records import Safetensors, Trace, Workload, document, line
from conformance.cases.flashinfer_bench.solutions import torch_solution
from conformance.cases.flashinfer_bench.workloads import Call, calls
from conformance.files import atomic
from conformance.version import version

README = """# Manifold-constrained hyper-connections

`mhc-conformance fixtures export --to flashinfer-bench` wrote this folder. FlashInfer-Bench reads it:
`flashinfer_bench.TraceSet.from_path(".")`.

* mhc-conformance {version}, corpus {corpus}
* {definitions} Definitions, {workloads} Workloads, {solutions} Solutions

A file under `blob/` has the arguments of one call under their names, and under `expected/NAME` the proved true value of
a result in float64. Its metadata, `call`, is an object of JSON: the `item` of the corpus and its `contract`, and in
`bounds` how far each result may be off beyond the last rounding to its dtype (fixtures/README.md, points 20 and 21).
"""


class ExportError(ValueError):
    """Nothing can be exported as it was asked for: one line that says why."""


@dataclass(frozen=True)
class Exported:
    """What was written, in numbers."""

    definitions: int
    workloads: int
    solutions: int


def export(
    folder: Path, cases: Iterable[Case], dialects: Collection[str], stages: Collection[str], solution: bool = False
) -> Exported:
    """Writes the folder, all of it or nothing.

    Args:
        folder: is made; it may be there if it is empty.
        solution: whether each Definition has a Solution that calls `torch_impl`.

    Raises:
        ExportError: the folder isn't empty, or there is no such case.
        OSError: it can't be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        came = "one with files in it" if folder.is_dir() else "a file"
        raise ExportError(f"{folder}: expected a new or an empty folder, got {came}; name another")
    by_name: dict[str, list[Call]] = {}
    for call in calls(cases, dialects, stages):
        by_name.setdefault(call.kernel.name, []).append(call)
    if not by_name:
        raise ExportError(f"the corpus has no case of {' or '.join(stages)} under {' or '.join(dialects)}")
    with atomic.whole(folder) as root:
        for name in sorted(by_name):
            _write(root, by_name[name][0].kernel, by_name[name], solution)
        exported = Exported(len(by_name), sum(map(len, by_name.values())), len(by_name) if solution else 0)
        text = README.format(version=version(), corpus=corpus_hash(), **vars(exported))
        (root / "README.md").write_text(text)
    return exported


def _write(root: Path, kernel: Kernel, of_kernel: list[Call], solution: bool) -> None:
    """A Definition with all that belongs to it."""
    definition = kernel.definition
    documents = {"definitions": document(definition)}
    if solution:
        documents["solutions"] = document(torch_solution(kernel))
    for folder, content in documents.items():
        path = root / folder / kernel.op_type / f"{kernel.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    lines = [line(Trace(kernel.name, _workload(root, call))) for call in of_kernel]
    path = root / "workloads" / kernel.op_type / f"{kernel.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))


def _workload(root: Path, call: Call) -> Workload:
    """Writes the numbers of a call, and says where they are."""
    kernel, arguments, results = call.kernel, call.arguments(), call.results()
    path = Path("blob", "workloads", kernel.op_type, kernel.name, f"{call.case.id}.safetensors")
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    bounds = {name: item.bounds[name].bound for name, (item, _) in results.items()}
    expected = {f"expected/{name}": value for name, (_, value) in results.items()}
    told = {"item": call.id, "contract": call.items[0].variant.contract, "bounds": bounds}
    # One key, since safetensors writes several in an order that changes from run to run.
    (root / path).write_bytes(save({**arguments, **expected}, {"call": json.dumps(told)}))
    inputs = {name: Safetensors(path.as_posix(), name) for name in kernel.arguments}
    return Workload({TOKENS: call.tokens}, inputs, call.id)
