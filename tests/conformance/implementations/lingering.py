"""Implementations that hang, each after it has started a process that doesn't want to end.

Each says so by a file in the folder that the environment's MHC_TEST_FLAGS names.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conformance.implementations.mesh_strangers import Stranger
from tests.conformance.strangers import Honest

STUBBORN = """
import os, pathlib, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
os.setsid()
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


def linger(name: str) -> None:
    """Starts a process in a session of its own that ignores polite signals, and waits until it has come so far."""
    flag = Path(os.environ["MHC_TEST_FLAGS"]) / name
    subprocess.Popen([sys.executable, "-c", STUBBORN, str(flag)])
    while not flag.exists():
        time.sleep(0.01)
    flag.with_suffix(".hangs").touch()


def hang_in_native_code() -> None:
    """Holds the interpreter's lock, so that no thread of this process can do anything about it."""
    ctypes.PyDLL(None).sleep(600)


class Native(Honest):
    name = "native"

    def reduce(self, inputs: Any, config: Any, cotangents: Any) -> Any:
        linger("native")
        hang_in_native_code()


class Collective(Stranger):
    """A process that waits for another in native code, which waits for it."""

    def act(self) -> None:
        linger(f"rank-{self.rank}")
        hang_in_native_code()


def wait_long(_: int) -> None:
    """A task of a pool."""
    (Path(os.environ["MHC_TEST_FLAGS"]) / f"{os.getpid()}.hangs").touch()
    while True:
        sum(range(10000))


def program() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "protocol" not in request:
            linger("program")
            time.sleep(600)
        claims = {"stages": ["reduce"], "dialects": ["paper"]}
        print(json.dumps({"protocol": request["protocol"], "name": "program", "capabilities": claims}), flush=True)


if __name__ == "__main__":
    program()
