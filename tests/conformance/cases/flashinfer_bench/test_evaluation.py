"""The export in the hands of the installed FlashInfer-Bench: its schema, its loader, its evaluators, on a CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from conformance.cases.corpus import load_corpus
from conformance.cases.flashinfer_bench.export import Wish, export
from conformance.cases.flashinfer_bench.kernel import STAGES
from conformance.cases.flashinfer_bench.solutions import torch_solution
from conformance.cases.flashinfer_bench.workloads import calls

pytest.importorskip("torch", reason="FlashInfer-Bench stands on PyTorch: install the extra torch")
bench: Any = pytest.importorskip(
    "flashinfer_bench", reason="FlashInfer-Bench isn't installed: tox run -e flashinfer-bench has it"
)

ROWS = ("deepseek-v4", "deepseek-v4.1", "mhc-lite", "hunyuan-v4")
"""Together they have every operation and both kinds of weights; ``tox run -e flashinfer-bench`` takes all rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "mhc"
    export(path, load_corpus(), Wish(ROWS, STAGES, solution=True))
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """FlashInfer-Bench builds in this folder, and not in the user's."""
    monkeypatch.setitem(os.environ, "FIB_CACHE_PATH", str(tmp_path_factory.getbasetemp() / "cache"))


def test_every_key_is_one_of_the_packages_schema(folder):
    kinds = {"definitions": bench.Definition, "solutions": bench.Solution}
    read = 0
    for name, kind in kinds.items():
        for path in (folder / name).rglob("*.json"):
            record = kind.model_validate_json(path.read_text())
            assert json.loads(record.model_dump_json(exclude_unset=True)) == json.loads(path.read_text())
            read += 1
    for path in (folder / "workloads").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            trace = bench.Trace.model_validate_json(line)
            assert trace.is_workload_trace()
            assert json.loads(trace.model_dump_json(exclude_unset=True)) == json.loads(line)
            read += 1
    assert read > 400


def test_it_loads_as_a_data_set_with_every_operation(folder):
    loaded = bench.TraceSet.from_path(str(folder))
    assert {definition.op_type for definition in loaded.definitions.values()} == {
        "mhc_pre", "mhc_pre_delayed", "mhc_post", "mhc_sinkhorn", "mhc_permutations", "mhc_head",
    }  # fmt: skip
    assert set(loaded.workloads) == set(loaded.solutions) == set(loaded.definitions)
    for name, definition in loaded.definitions.items():
        uuids = [trace.workload.uuid for trace in loaded.workloads[name]]
        assert len(set(uuids)) == len(uuids)
        assert all(eval(rule, {}, definition.const_axes) for rule in definition.constraints)


def test_torch_impl_passes_every_workload(folder):
    from tests.conformance.cases.flashinfer_bench.on_cpu import evaluated

    traces = evaluated(folder, keep=True)
    wrong = [(trace.workload.uuid, trace.evaluation) for trace in traces if trace.evaluation.status.value != "PASSED"]
    assert not wrong
    assert len(traces) == sum(map(len, bench.TraceSet.from_path(str(folder)).traces.values())) > 300


def test_torch_impl_passes_at_the_width_of_a_model(tmp_path):
    from tests.conformance.cases.flashinfer_bench.on_cpu import evaluated

    rows = ["deepseek-v4", "deepseek-v4.1", "hunyuan-v4"]  # those that round no coefficient
    export(tmp_path / "mhc", [], Wish(rows, STAGES, widths=[512], tokens=[1, 7], solution=True))
    traces = evaluated(tmp_path / "mhc")
    # pre, post and head of two rows, pre and post of one, a residual matrix of two; with 1 and with 7 tokens
    assert len(traces) == 20
    assert {trace.evaluation.status.value for trace in traces} == {"PASSED"}


def test_a_wrong_solution_does_not_pass(folder, tmp_path):
    from tests.conformance.cases.flashinfer_bench.on_cpu import evaluated

    other = tmp_path / "wrong"
    export(other, load_corpus(), Wish(["deepseek-v4"], ["residual_matrix"], solution=True))
    for path in (other / "solutions").rglob("*.json"):
        path.write_text(
            path.read_text().replace("residual_matrix(logits, CONFIG)", "residual_matrix(logits, CONFIG).mT")
        )
    statuses = {trace.evaluation.status.value for trace in evaluated(other)}
    assert "INCORRECT_NUMERICAL" in statuses


def test_nineteen_iterations_pass_there_and_fail_here(tmp_path):
    """What docs/kernel-benchmarks.md, "What its verdict means", says."""
    from tests.conformance.cases.flashinfer_bench.on_cpu import evaluated
    from tests.conformance.cases.flashinfer_bench.test_references import checks, function_of

    right, wrong = "streams=", "iterations=19, streams="
    export(tmp_path / "mhc", load_corpus(), Wish(["deepseek-v4"], ["pre"], solution=True))
    for path in (tmp_path / "mhc" / "solutions").rglob("*.json"):
        path.write_text(path.read_text().replace(right, wrong))
    there = [trace.evaluation.status.value for trace in evaluated(tmp_path / "mhc")]
    assert there == ["PASSED"] * 67
    failed = 0
    for call in calls(load_corpus(), ["deepseek-v4"], ["pre"]):
        run = function_of(torch_solution(call.kernel).sources[0].content.replace(right, wrong))
        failed += any(check.verdict == "failed" for check in checks(call, run))
    assert 67 / 2 < failed < 67
