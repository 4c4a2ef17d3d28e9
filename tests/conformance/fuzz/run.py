"""Reads inputs that are nearly right: ``python -m tests.conformance.fuzz.run --count 20000 --seed 1``.

Every input ends in a result or in the error that its reader documents, in one printable line, within 20 s and 2 GB. An
input is made from its kind, the seed and its number alone, so that one that fails can be made again.
"""

from __future__ import annotations

import argparse
import math
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.conformance.fuzz.kinds import KINDS, Kind, clean

LATE = 20
"""Seconds of the processor for one input: a machine that others use takes longer."""
MEMORY = 2 << 30
"""Bytes by which reading one input may raise the largest memory that this process had."""
LONGEST = 2100
"""Characters of a message."""


class Late(BaseException):
    """An input took longer than `LATE`."""


@dataclass
class Counts:
    """What came of the inputs, by kind."""

    read: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    slowest: float = 0.0
    where: str = ""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Late


def largest() -> int:
    """The largest memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(name: str, kind: Kind, number: int, seed: int, folder: Path, counts: Counts) -> None:
    """Makes an input and reads it."""
    clean(folder)
    label = f"{name} {number} (seed {seed})"
    path = kind.write(folder, random.Random(f"{seed} {name} {number}"))
    memory, began = largest(), time.perf_counter()
    signal.setitimer(signal.ITIMER_PROF, LATE)
    try:
        kind.read(path)
        counts.read[name] += 1
    except kind.errors as error:
        counts.refused[name] += 1
        text = str(error)
        if not text.isprintable() or not text or len(text) > LONGEST:
            counts.wrong.append(f"{label}: expected one line, got {text[:200]!r}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        counts.wrong.append(f"{label}: {type(error).__name__}: {str(error)[:200]!r} at {last.filename}:{last.lineno}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.perf_counter() - began
    if seconds > counts.slowest:
        counts.slowest, counts.where = seconds, label
    if largest() - memory > MEMORY:
        counts.wrong.append(f"{label}: took {(largest() - memory) >> 20} MiB")


def fuzz(count: int, seed: int, only: list[str] | None = None, first: int = 0, progress: bool = False) -> Counts:
    """Reads at least so many inputs of all kinds, by their shares."""
    counts = Counts()
    kinds = {name: kind for name, kind in KINDS.items() if not only or name in only}
    shares = sum(kind.share for kind in kinds.values())
    before = signal.signal(signal.SIGPROF, _alarm)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that spoilt files are made with
            for name, kind in kinds.items():
                if progress:
                    print(f"{name} …", flush=True)
                for number in range(first, first + math.ceil(count * kind.share / shares)):
                    one(name, kind, number, seed, Path(folder) / "in", counts)
    finally:
        signal.signal(signal.SIGPROF, before)
    return counts


STATUSES = {"run": (2, 3), "report": (2,), "inspect": (2, 3, 5, 7)}
"""As `docs/contract.md` and the commands' help document them."""
COMMANDS: dict[str, list[str]] = {
    "case": ["run", "--list", "--case"], "known": ["run", "--list", "--known"], "jsonl": ["report"],
    "checkpoint": ["inspect"], "dialect": ["run", "--list", "--impl", "torch", "--dialect"], "gguf": ["inspect"],
}  # fmt: skip
"""For some kinds the command that reads them."""


def by_command(count: int, seed: int) -> list[str]:
    """Hands inputs to the command line itself; a line for each that doesn't end as it must."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            name = list(COMMANDS)[number % len(COMMANDS)]
            clean(Path(folder) / "in")
            path = KINDS[name].write(Path(folder) / "in", random.Random(f"{seed} command {number}"))
            line = [sys.executable, "-m", "conformance.cli", *COMMANDS[name], str(path)]
            done = subprocess.run(line, capture_output=True, text=True, timeout=6 * LATE, errors="replace")
            good = done.returncode == 0 or (done.stderr.count("\n") == 1 and done.returncode in STATUSES[line[3]])
            if not good or "Traceback" in done.stderr or "\x1b" in done.stdout + done.stderr:
                wrong.append(f"{name}, number {number}: status {done.returncode}, {done.stderr[:300]!r}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--commands", type=int, default=0, help="inputs that the command line reads, beside the others")
    options: Any = parser.parse_args()
    began, counts = time.monotonic(), fuzz(options.count, options.seed, options.only, options.first, True)
    for name in KINDS:
        if counts.read[name] or counts.refused[name]:
            print(f"{name:12} {counts.read[name]:6} read {counts.refused[name]:6} refused")
    counts.wrong += by_command(options.commands, options.seed)
    for line in counts.wrong[:60]:
        print(line)
    total = counts.read.total() + counts.refused.total()
    print(
        f"{total} inputs in {time.monotonic() - began:.0f} s, {len(counts.wrong)} problems; the slowest took "
        f"{counts.slowest:.2f} s ({counts.where}), the largest memory was {largest() >> 20} MiB"
    )
    sys.exit(1 if counts.wrong else 0)


if __name__ == "__main__":
    main()
