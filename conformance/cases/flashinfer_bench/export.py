"""The folder that FlashInfer-Bench reads (`flashinfer_bench.TraceSet.from_path`)::

definitions/mhc_pre/NAME.json              what is computed, with its reference
workloads/mhc_pre/NAME.jsonl               the calls
blob/workloads/mhc_pre/NAME/CASE.safetensors
solutions/mhc_pre/NAME.json                torch_impl, where it is asked for
README.md                                  for whoever finds the folder
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from conformance.cases.case import Case
from conformance.cases.corpus import corpus_hash
from conformance.cases.flashinfer_bench import large
from conformance.cases.flashinfer_bench.kernel import TOKENS, Kernel
from conformance.cases.flashinfer_bench.records import Random, Safetensors, Trace, Workload, document, line
from conformance.cases.flashinfer_bench.solutions import torch_solution
from conformance.cases.flashinfer_bench.workloads import Call, calls
from conformance.files import atomic
from conformance.version import version

README = """# Manifold-constrained hyper-connections

`mhc-conformance fixtures export --to flashinfer-bench` wrote this folder. FlashInfer-Bench reads it:
`flashinfer_bench.TraceSet.from_path(".")`.

* mhc-conformance {version}, corpus {corpus}
* {definitions} Definitions, {workloads} Workloads, {solutions} Solutions

A file under `blob/` that is named after a case has the arguments of one call under their names, and under
`expected/NAME` the proved true value of a result in float64. Its metadata, `call`, is an object of JSON: the `item` of
the corpus and its `contract`, and in `bounds` how far each result may be off beyond the last rounding to its dtype
(fixtures/README.md, points 20 and 21). A file `weights.safetensors` has the weights of calls with random activations.
"""


class ExportError(ValueError):
    """Nothing can be exported as it was asked for: one line that says why."""


@dataclass(frozen=True)
class Wish:
    """What is to be exported.

    Attributes:
        dialects: names of rows.
        stages: some of `conformance.cases.flashinfer_bench.kernel.STAGES`.
        widths: those of models, which get calls with random numbers; none for golden cases alone.
        tokens: the numbers of tokens of these calls.
        solution: whether each Definition has a Solution that calls `torch_impl`.
    """

    dialects: Collection[str]
    stages: Collection[str]
    widths: Collection[int] = ()
    tokens: Collection[int] = large.TOKENS
    solution: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written, in numbers."""

    definitions: int
    workloads: int
    solutions: int


def export(folder: Path, cases: Iterable[Case], wish: Wish) -> Exported:
    """Writes the folder, all of it or nothing.

    Args:
        folder: is made; it may be there if it is empty. A link is followed.

    Raises:
        ExportError: the folder isn't empty, or there is no such case.
        OSError: it can't be written.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        came = "one with files in it" if folder.is_dir() else "a file"
        raise ExportError(f"{folder}: expected a new or an empty folder, got {came}; name another")
    kernels: dict[str, Kernel] = {}
    golden: dict[str, list[Call]] = {}
    for call in calls(cases, wish.dialects, wish.stages):
        kernels.setdefault(call.kernel.name, call.kernel)
        golden.setdefault(call.kernel.name, []).append(call)
    at_large = {kernel.name: kernel for kernel in large.kernels(wish.dialects, wish.stages, wish.widths) if wish.widths}
    kernels = {**at_large, **kernels}
    if not kernels:
        raise ExportError(f"the corpus has no case of {' or '.join(wish.stages)} under {' or '.join(wish.dialects)}")
    count = 0
    with atomic.whole(folder) as root:
        for name, kernel in sorted(kernels.items()):
            workloads = [_golden_workload(root, call) for call in golden.get(name, ())]
            workloads += _large_workloads(root, kernel, wish.tokens) if name in at_large else []
            _write(root, kernel, workloads, wish.solution)
            count += len(workloads)
        exported = Exported(len(kernels), count, len(kernels) if wish.solution else 0)
        text = README.format(version=version(), corpus=corpus_hash(), **vars(exported))
        (root / "README.md").write_text(text)
    return exported


def _write(root: Path, kernel: Kernel, workloads: Sequence[Workload], solution: bool) -> None:
    """A Definition, its calls, and a Solution if there is one."""
    files = {
        f"definitions/{kernel.op_type}/{kernel.name}.json": document(kernel.definition),
        f"workloads/{kernel.op_type}/{kernel.name}.jsonl": b"".join(line(Trace(kernel.name, w)) for w in workloads),
    }
    if solution:
        files[f"solutions/{kernel.op_type}/{kernel.name}.json"] = document(torch_solution(kernel))
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def _save(root: Path, kernel: Kernel, name: str, tensors: dict[str, np.ndarray], told: Mapping[str, Any]) -> str:
    """Writes the numbers of a call; returns their path from the root of the data set."""
    path = Path("blob", "workloads", kernel.op_type, kernel.name, f"{name}.safetensors")
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    # One key, since safetensors writes several in an order that changes from run to run.
    (root / path).write_bytes(save(tensors, {"call": json.dumps(told)}))
    return path.as_posix()


def _golden_workload(root: Path, call: Call) -> Workload:
    kernel, results = call.kernel, call.results()
    bounds = {name: item.bounds[name].bound for name, (item, _) in results.items()}
    expected = {f"expected/{name}": value for name, (_, value) in results.items()}
    told = {"item": call.id, "contract": call.items[0].variant.contract, "bounds": bounds}
    path = _save(root, kernel, call.case.id, {**call.arguments(), **expected}, told)
    return Workload({TOKENS: call.tokens}, {name: Safetensors(path, name) for name in kernel.arguments}, call.id)


def _large_workloads(root: Path, kernel: Kernel, tokens: Iterable[int]) -> list[Workload]:
    values = large.weights(kernel)
    path = _save(root, kernel, "weights", values, {"item": "random"}) if values else ""
    inputs = {name: Safetensors(path, name) if name in values else Random() for name in kernel.arguments}
    return [Workload({TOKENS: count}, inputs, f"{kernel.name}::random::{count}") for count in sorted(set(tokens))]
