"""How long the truth of one size takes, and how much memory: ``python benchmarks/size_truth.py``.

Prints one line: the size, the stage, seconds of the truth with its tiles on ``--threads`` threads, and the rise of the
process's peak resident memory. The truth's own arrays are files, as in a run.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time

from conformance.cases.dialects import published
from conformance.questions.sizes.design import Size
from conformance.questions.sizes.store import stored
from conformance.questions.sizes.tensors import STAGES_OF_SIZES, Tensors


def peak() -> float:
    """GiB of the largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stage", choices=STAGES_OF_SIZES, default="layer")
    parser.add_argument("--dialect", default="deepseek-v4")
    options = parser.parse_args()
    size = Size(1, options.tokens, options.dim, options.streams)
    row = published(options.dialect).parameters
    tensors = Tensors(size, options.stage, {**row, "streams": size.streams, "dim": size.dim})
    before, started = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stored(tensors, folder, options.threads)
        seconds = time.perf_counter() - started
    print(f"{size.id}, {options.stage}: {seconds:.0f} s, {peak() - before:.1f} GiB, {options.threads} threads")


if __name__ == "__main__":
    main()
