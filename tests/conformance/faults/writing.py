"""Kills each writing command at each of its system calls, and fills the disk there; prints what is left.

``python -m tests.conformance.faults.writing --kills 60`` sweeps over regenerate, run, report and port. A command runs
in a fork of this process, which has everything imported: a fault takes some milliseconds. The library `injected.c` is
compiled by ``cc`` and preloaded; this program starts itself again with it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("injected.c")
PRELOADED = "MHC_FAULTS_PRELOADED"
LATE = 60.0
"""Seconds after which a command that neither ends nor dies counts as one that hangs."""


def compiled(folder: Path) -> Path:
    """The library.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails.
    """
    library = folder / "injected.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def start(arguments: list[str], folder: Path, captured: bool = False) -> subprocess.CompletedProcess[str]:
    """This program once more, with the library."""
    library = str(compiled(folder))
    few = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    environment = {**os.environ, **few, "LD_PRELOAD": library, PRELOADED: library}
    command = [sys.executable, "-m", "tests.conformance.faults.writing", *arguments]
    return subprocess.run(command, env=environment, capture_output=captured, text=True)


@dataclass
class Operation:
    """A writing command in a folder of its own.

    Attributes:
        prepare: makes the folder as it was before.
        run: the command; it raises where it fails.
        targets: names of what it replaces.
        others: names of what else lies there, which stays.
        streamed: whether targets are written as their content comes: a beginning of the new one may be left, with
            which a second run goes on.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path], object]
    targets: tuple[str, ...]
    others: tuple[str, ...] = ()
    streamed: bool = False

    def beginnings(self, folder: Path) -> dict[str, bytes]:
        """What there is of the targets that may be left half-written."""
        return {name: (folder / name).read_bytes() for name in self.targets} if self.streamed else {}


def digest(path: Path) -> str:
    """What is there; the order of a safetensors file's metadata says nothing."""
    if path.is_dir():
        return json.dumps({p.name: digest(p) for p in sorted(path.iterdir())})
    if not path.exists():
        return "nothing"
    content = path.read_bytes()
    if path.suffix == ".safetensors" and content[8:9] == b"{":
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        content = json.dumps(header, sort_keys=True).encode() + content[8 + size :]
    return hashlib.sha256(content).hexdigest()


@dataclass
class Ending:
    """How a command in a fork ended: its status or the signal, and the calls that it made."""

    status: int
    calls: int

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    @property
    def code(self) -> int:
        return os.waitstatus_to_exitcode(self.status)


def forked(action: Callable[[], object], at: int = 0, full: bool = False) -> Ending:
    """Runs an action in a fork, with a fault at its call number ``at`` (0: none). Status 2 stands for an OSError."""
    library = ctypes.CDLL(os.environ[PRELOADED])
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 0
        try:
            library.fault_arm(ctypes.c_long(at), int(full))
            action()
        except (OSError, SystemExit) as error:
            code = 2 if isinstance(error, OSError) or error.code == 2 else 1
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            code = 1
        os.write(writing, str(library.fault_seen()).encode())
        os._exit(code)
    os.close(writing)
    deadline = time.monotonic() + LATE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"call {at}: the command goes on after {LATE:g} s")
        time.sleep(0.001)
    calls = os.read(reading, 32)
    os.close(reading)
    return Ending(ended[1], int(calls or 0))


def sweep(name: str, operation: Operation, faults: int, full: bool, where: Path) -> str:
    """Puts a fault at each call in turn, at least so many altogether; a line about what was left."""
    folder = where / f"{name}-{'full' if full else 'kill'}"

    def anew() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        operation.prepare(folder)

    def found() -> dict[str, str]:
        return {target: digest(folder / target) for target in operation.targets}

    anew()
    old, kept = found(), {other: digest(folder / other) for other in operation.others}
    whole = forked(lambda: operation.run(folder))
    new, content = found(), operation.beginnings(folder)
    assert whole.code == 0 and new != old, f"{name}: without a fault it ends with {whole.code}, {old} to {new}"
    calls, left, hidden = whole.calls, Counter[str](), 0
    for number in range(max(faults, calls)):
        at = number % calls + 1
        anew()
        ending = forked(lambda: operation.run(folder), at, full)
        assert ending.killed if not full else ending.code in (0, 2), f"{name}, call {at} of {calls}: {ending}"
        after = found()
        for target, state in after.items():
            if state in (old[target], new[target]):
                left["old" if state == old[target] else "new"] += 1
                continue
            known = content.get(target, b"").startswith(operation.beginnings(folder).get(target, b"no beginning"))
            assert known, f"{name}, call {at} of {calls}: {target} is neither old nor new"
            left["begun"] += 1
        present = {path.name for path in folder.iterdir()}
        strange = present - {Path(known).parts[0] for known in (*operation.targets, *operation.others)}
        assert all(entry.startswith(".") for entry in strange), f"{name}, call {at}: {strange} are beside the target"
        assert not (full and strange), f"{name}, call {at}: a full disk leaves {strange}"
        hidden += bool(strange)
        assert {other: digest(folder / other) for other in operation.others} == kept
        again = forked(lambda: operation.run(folder))
        assert again.code == 0 and found() == new, f"{name}, call {at}: a second run ends with {again.code}"
    shutil.rmtree(folder)
    what = "full disks" if full else "kills"
    return (
        f"{name}: {max(faults, calls)} {what} over {calls} system calls; targets {dict(sorted(left.items()))}, "
        f"{hidden} left a hidden path; each second run succeeded"
    )


def operations() -> dict[str, Operation]:
    """The commands, with little to write."""
    from tests.conformance.faults import commands

    return commands.all_of_them()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=[])
    options: Any = parser.parse_args(arguments)
    if PRELOADED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(start(arguments, Path(folder)).returncode)
    with tempfile.TemporaryDirectory() as folder:
        for name, operation in operations().items():
            if not options.only or name in options.only:
                for full in (False, True):
                    print(sweep(name, operation, options.kills, full, Path(folder)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
