"""Benchmarks of a site beside other implementations of it.

python -m benchmarks run [--device cpu|cuda] [--quick] [--tokens T …]   # measures, and writes the results
python -m benchmarks table [--write docs/performance.md]               # the tables of all results
python -m benchmarks compare A.json B.json                             # where B is slower than A, status 1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHAPES = [(tokens, dim) for tokens in (64, 1024, 8192) for dim in (1280, 4096)]
DTYPES = ("float32", "bfloat16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--quick", action="store_true", help="64 and 1,024 tokens")
    run.add_argument("--tokens", type=int, nargs="+", help="these alone; what the file has of others stays")
    run.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    run.add_argument("--json", type=Path, help="default: benchmarks/results/site-DEVICE.json")
    table = commands.add_parser("table", help="print the tables")
    table.add_argument("--write", type=Path, help="put them between the markers of this page")
    compare = commands.add_parser("compare", help="two results of the same machine")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        return _run(arguments)
    from benchmarks.sites import tables

    if arguments.command == "compare":
        return tables.compare(arguments.before, arguments.after)
    return tables.show(RESULTS, arguments.write)


def _run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes a line at each start and stop
    import torch

    from benchmarks.sites.measuring import measured
    from benchmarks.sites.numbers import Shape
    from conformance.files import atomic

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: expected a CUDA device, PyTorch finds none", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    path = arguments.json or RESULTS / f"site-{arguments.device}.json"
    wanted = set(arguments.tokens or ([64, 1024] if arguments.quick else [t for t, _ in SHAPES]))
    shapes = [Shape(t, d, dtype) for t, d in SHAPES for dtype in DTYPES if t in wanted]
    rows: list[dict[str, Any]] = []
    if arguments.tokens and path.is_file():
        rows = [row for row in json.loads(path.read_text())["rows"] if row["tokens"] not in wanted]
    for shape in shapes:
        rows.append({**asdict(shape), **measured(shape, arguments.device), "jax": _in_jax(shape, arguments)})
        print(f"{shape.tokens} x {shape.dim}, {shape.dtype}: " + _told(rows[-1]["cells"]), flush=True)
        rows.sort(key=lambda row: (row["tokens"], row["dim"], row["dtype"] != "float32"))
        result = {"format": "mhc-benchmarks/1", "environment": _environment(arguments, torch), "rows": rows}
        atomic.write(path, json.dumps(result, indent=1) + "\n")
    return 0


def _in_jax(shape: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """JAX's part, in a process of its own: both frameworks have threads, and take each other's time."""
    environment = {**os.environ, "JAX_PLATFORMS": arguments.device, "OMP_NUM_THREADS": str(arguments.threads)}
    environment.pop("XLA_FLAGS", None)  # the suite's have programs compiled without optimisations
    command = [sys.executable, "-m", "benchmarks.sites.in_jax", json.dumps(asdict(shape))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"reason": done.stderr.strip().splitlines()[-1][:200] if done.stderr else f"status {done.returncode}"}
    return json.loads(done.stdout)


def _told(cells: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {cell['seconds']['both'][0] * 1e3:.2f} ms" if isinstance(cell, dict) else f"{name} {cell}"
        for name, cell in cells.items()
    )


def _environment(arguments: argparse.Namespace, torch: Any) -> dict[str, Any]:
    versions: dict[str, str] = {}
    for name in ("torch", "transformers", "liger-kernel", "hyper-connections", "tile-kernels", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    return {
        "device": device,
        "kind": arguments.device,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
