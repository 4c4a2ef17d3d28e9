"""A kill, or a full disk, at each system call of a writing command: the target is the old one or the new one.

The full sweep is ``python -m tests.conformance.faults.writing --kills 60``.
"""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.conformance.faults.writing import start

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler"
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("run", marks=pytest.mark.slow),
        "port",
        "run-resumed",
        pytest.param("upcycle", marks=pytest.mark.slow),
    ],
)
def test_a_target_is_whole_after_a_fault_at_any_call(tmp_path, name):
    done = start(["--kills", "1", "--only", name], tmp_path, captured=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and " kills over " in lines[0] and " full disks over " in lines[1]
    assert "'old'" in lines[0] and ("'new'" in lines[0] or "'begun'" in lines[0])
