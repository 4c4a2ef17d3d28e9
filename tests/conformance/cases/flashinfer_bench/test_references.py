"""The references of the exported Definitions against the golden values, by the suite's own bounds."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from conformance.cases.case import DTYPES
from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_names
from conformance.cases.flashinfer_bench.kernel import STAGES
from conformance.cases.flashinfer_bench.references import reference
from conformance.cases.flashinfer_bench.workloads import Call, calls
from conformance.judge.rule import Check, check_tensor

torch = pytest.importorskip("torch", reason="the references are PyTorch: install the extra torch")


@functools.cache
def corpus() -> list[Any]:
    return load_corpus()


def function_of(source: str) -> Any:
    module: dict[str, Any] = {}
    exec(compile(source, "reference", "exec"), module)
    return module["run"]


def checks(call: Call, run: Any) -> list[Check]:
    """A check for each result that the case has a true value for."""
    from conformance.adapters.torch_gradients import to_numpy, to_torch

    arguments = call.arguments()
    y_actual = run(*(to_torch(value) for value in arguments.values()))
    y_actual = y_actual if isinstance(y_actual, tuple) else (y_actual,)
    actual = dict(zip(call.kernel.results, y_actual, strict=True))
    return [
        check_tensor(
            name, to_numpy(actual[name]), expected, item.output_dtype(name), item.variant.contract,
            item.bounds[name].bound, None, arguments,
        )
        for name, (item, expected) in call.results().items()
    ]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dialect", dialect_names())
def test_a_reference_is_within_the_bounds_of_every_golden_case(dialect, stage):
    runs: dict[str, Any] = {}
    met = set()
    for call in calls(corpus(), [dialect], [stage], tuple(DTYPES)):
        name = call.kernel.name
        if name not in runs:
            runs[name] = function_of(reference(call.kernel))
        for check in checks(call, runs[name]):
            assert check.verdict in ("passed", "marginal"), f"{call.id} {check}"
            met.add((call.kernel.x, check.tensor))
    if not any(case.dialect == dialect and stage in case.stages and not case.overrides for case in corpus()):
        pytest.skip("the corpus has no case of it")
    assert {tensor for _, tensor in met} == set(call.kernel.results)
    narrow = {"bfloat16"} if stage in ("pre", "post") else set()
    assert {dtype for dtype, _ in met} >= {"float64", "float32", *narrow}


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("for _ in range(19)", "for _ in range(18)"),
        ("+ 1e-06).sqrt()", "+ 1e-05).sqrt()"),
        ("post = 2.0 * ", "post = 1.0 * "),
        ("P.sum(-2", "P.sum(-1"),
        ("u = (pre", "u = (post"),
    ],
)
def test_a_mistake_in_a_reference_is_found(right, wrong):
    failed = 0
    for call in calls(corpus(), ["deepseek-v4"], ["pre"], ["float32"]):
        source = reference(call.kernel)
        assert right in source
        failed += any(check.verdict == "failed" for check in checks(call, function_of(source.replace(right, wrong))))
    assert failed


def test_a_delayed_pre_reads_with_the_pre_that_it_is_handed():
    for call in calls(corpus(), ["deepseek-v4.1"], ["pre"], ["float32"]):
        assert call.kernel.op_type == "mhc_pre_delayed" and call.kernel.results == ("u", "pre", "post", "H")
        source = reference(call.kernel).replace("u = (carried", "u = (pre")
        assert any(check.verdict == "failed" and check.tensor == "u" for check in checks(call, function_of(source)))
        break


def test_a_reference_imports_nothing_but_torch_and_the_standard_library():
    for call in calls(corpus(), dialect_names(), STAGES, ["float32"]):
        imports = [line for line in reference(call.kernel).splitlines() if line.startswith(("import", "from"))]
        assert imports in (["import torch"], ["import itertools", "import torch"])
