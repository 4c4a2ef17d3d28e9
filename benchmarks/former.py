"""Times `mhc-conformance run` of this checkout beside that of an earlier commit, one after the other.

    python -m benchmarks.former [--commit COMMIT] [options of run]

This checkout runs twice: with an empty cache, and with what its first run kept. Prints the seconds and the items of
all three, and the ratios to the former. A commit before the adapters compiled cheaply by themselves
had XLA_FLAGS from tox, and gets them here.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEFORE_MODES = "9dbf42b"
QUICK_XLA = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
RAN = re.compile(r"(\d+) items ran")


def timed(tree: Path, options: list[str], cache: str, flags: str = "") -> tuple[float, int]:
    """Seconds of a run of a tree, and how many items it ran.

    Raises:
        SystemExit: the run failed, or said nothing of items.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": cache}
    environment.pop("XLA_FLAGS", None)
    if flags:
        environment["XLA_FLAGS"] = flags
    command = [sys.executable, "-m", "conformance.cli", "run", "--no-progress", *options]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    ran = RAN.search(done.stdout)
    if done.returncode or ran is None:
        raise SystemExit(f"{tree}: expected a run that passes, got status {done.returncode}: {done.stderr[-2000:]}")
    return seconds, int(ran[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=BEFORE_MODES, help="the earlier commit (default: before modes and sizes)")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        former = Path(folder) / "former"
        subprocess.run(["git", "worktree", "add", "--detach", str(former), arguments.commit], cwd=ROOT, check=True)
        try:
            was = timed(former, options, f"{folder}/was", QUICK_XLA)
            first = timed(ROOT, options, f"{folder}/now")
            second = timed(ROOT, options, f"{folder}/now")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(former)], cwd=ROOT, check=True)
    for name, (seconds, items) in (("former", was), ("now, nothing kept", first), ("now, once more", second)):
        print(f"{name}: {seconds:.0f} s, {items} items, {seconds / was[0]:.2f} of the former")


if __name__ == "__main__":
    main()
