"""Temporary folders go with the process that made them, also with one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time
from conformance.files import temporary
if sys.argv[1] == "kept":
    temporary.keep(temporary.folder())
else:
    made = temporary.folder()
    (made / "file").write_text("x")
    inside = temporary.environment()[temporary.VARIABLE]
    with temporary.within() as folder:
        assert folder.is_dir()
    assert not folder.exists()
print("ready", flush=True)
if sys.argv[1] == "waits":
    time.sleep(60)
"""


def started(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("MHC_CONFORMANCE_TEMPORARY", None)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, how], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_leaves_no_folder(tmp_path, number):
    process = started(tmp_path, "waits")
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(number)
    process.communicate()
    deadline = time.monotonic() + 20
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_leaves_none_but_what_it_keeps(tmp_path):
    started(tmp_path, "ends").communicate()
    assert list(tmp_path.iterdir()) == []
    started(tmp_path, "kept").communicate()
    assert len(list(tmp_path.iterdir())) == 1
