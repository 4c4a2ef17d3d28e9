"""However a run ends, its program, what the program started and all temporary folders go with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """#!/bin/sh
read line
claims='{"stages":["residual_matrix"],"dialects":["paper"]}'
echo '{"protocol":"mhc-conformance-harness/1","name":"c","capabilities":'$claims'}'
read line
sleep 600 & a=$!
setsid sleep 601 & b=$!
echo $$ $a $b > pids.part && mv pids.part pids
sleep 602
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and setsid")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_of_a_run_that_is_ended(tmp_path, number):
    (tmp_path / "child.sh").write_text(PROGRAM)
    (tmp_path / "child.sh").chmod(0o755)
    folder = tmp_path / "temporary"
    folder.mkdir()
    line = [sys.executable, "-m", "conformance.cli", "run", "--impl", "exec:./child.sh", "--sizes", "none",
            "--case", "smoke-paper-2", "--jsonl", "run.jsonl"]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(folder)}
    environment.pop("MHC_CONFORMANCE_TEMPORARY", None)
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(text) for text in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3 and all(map(alive, pids)) and list(folder.iterdir())
    process.send_signal(number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while (any(map(alive, pids)) or list(folder.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids)) and list(folder.iterdir()) == []
    assert process.returncode == (130 if number == signal.SIGINT else -number)
