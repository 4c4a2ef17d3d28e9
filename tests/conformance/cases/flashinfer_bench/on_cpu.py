"""FlashInfer-Bench's own benchmark over an exported folder, without a GPU.

``python -m tests.conformance.cases.flashinfer_bench.on_cpu FOLDER [TOLERANCE]`` prints how many evaluations passed. The
package (flashinfer-bench 0.1.2) reads the data set, builds the Solutions, loads the arguments, runs the references and
compares the results, all in the order of its own `Benchmark.run_all`. Four things in it insist on CUDA, and get a
stand-in here:

* its runners, which have a process for each CUDA device: `RunnerOnCpu` calls the same evaluator in this process;
* ``torch.cuda.synchronize`` after each call, which has nothing to wait for;
* ``torch.cuda.Event``, which times a call: a clock does;
* the 256 MB that clear a GPU's cache between two calls: they are 4 bytes.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flashinfer_bench import Benchmark, BenchmarkConfig, TraceSet
from flashinfer_bench.bench import benchmark, timing
from flashinfer_bench.bench.evaluators import resolve_evaluator
from flashinfer_bench.bench.runner.runner import Runner
from flashinfer_bench.compile import BuilderRegistry

TOLERANCE = 1e-2
"""FlashInfer-Bench's own: an element must be off by more, and by more than this part of it, to be wrong."""


class RunnerOnCpu(Runner):
    """Builds and evaluates as the package's runners do, in this process."""

    def __init__(self, log_dir: str):
        del log_dir

    def run_workload(self, definition: Any, workload: Any, solutions: Any, config: Any, root: Path) -> dict[str, Any]:
        evaluator = resolve_evaluator(definition)
        baseline = evaluator.build_baseline(definition, workload, config, "cpu", root)
        evaluations = {}
        for solution in solutions:
            evaluations[solution.name] = evaluator.evaluate(
                definition=definition,
                sol_runnable=BuilderRegistry.get_instance().build(definition, solution),
                inputs=[[value.clone() for value in trial] for trial in baseline.inputs],
                ref_outputs=baseline.outputs,
                ref_mean_latency_ms=baseline.mean_latency_ms,
                cfg=config,
                log_path="",
                device="cpu",
            )
        return evaluations

    def close(self) -> None:
        pass


class Clock:
    """A `torch.cuda.Event` of a CPU."""

    def __init__(self, enable_timing: bool):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Clock) -> float:
        return 1e3 * (end.at - self.at)


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """What insists on CUDA has its stand-in."""
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (benchmark, "PersistentRunner", RunnerOnCpu),
            (torch.cuda, "synchronize", lambda device=None: None),
            (torch.cuda, "Event", Clock),
            (timing, "_get_empty_cache_for_benchmark", lambda device: torch.empty(1, dtype=torch.int32)),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def evaluated(folder: Path, tolerance: float = TOLERANCE, keep: bool = False) -> list[Any]:
    """The trace of every Solution on every Workload of a folder.

    Args:
        tolerance: absolute and relative.
        keep: whether the package writes them to the folder.
    """
    torch.set_num_threads(1)
    config = BenchmarkConfig(warmup_runs=0, iterations=1, num_trials=1, rtol=tolerance, atol=tolerance)
    with without_cuda():
        result = Benchmark(TraceSet.from_path(str(folder)), config).run_all(dump_traces=keep)
    return [trace for traces in result.traces.values() for trace in traces]


def main() -> None:
    begin = time.perf_counter()
    traces = evaluated(Path(sys.argv[1]), float(sys.argv[2]) if sys.argv[2:] else TOLERANCE)
    statuses = collections.Counter(trace.evaluation.status.value for trace in traces)
    for trace in traces:
        if trace.evaluation.status.value != "PASSED":
            print(trace.evaluation.status.value, trace.definition, trace.workload.uuid, trace.evaluation.correctness)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    print(f"{len(traces)} evaluations: {counts} ({time.perf_counter() - begin:.0f} s)")
    sys.exit(0 if set(statuses) == {"PASSED"} else 1)


if __name__ == "__main__":
    main()
