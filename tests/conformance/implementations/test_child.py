"""A child says how it ended, and nothing of it is left: not when it is dropped, and not when the parent is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conformance.implementations.child import DIRTY, Child, Deadline, PythonChild
from conformance.implementations.wire import PIECE
from conformance.oracle.pool import processes
from tests.conformance.implementations.lingering import STUBBORN

LINGERING = "tests.conformance.implementations.lingering"
SECONDS = 5.0
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[bytes]:
    """A word in the environment of everything that a test starts; what is left of it is killed after the test."""
    word = f"MHC_TEST_MARK={uuid.uuid4()}"
    monkeypatch.setenv(*word.split("="))
    monkeypatch.setenv("MHC_TEST_FLAGS", str(tmp_path))
    # A shell's background job is started with SIGINT ignored, and hands that on to what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield word.encode()
    signal.signal(signal.SIGINT, before)
    for pid in marked(word.encode()):
        os.kill(pid, signal.SIGKILL)


def marked(word: bytes) -> dict[int, str]:
    """Processes that have the word in their environment, with their command lines."""
    commands = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and word in (entry / "environ").read_bytes():
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return commands


def comes(true: Callable[[], bool], seconds: float) -> bool:
    deadline = Deadline(seconds)
    while not true() and deadline.left:
        time.sleep(0.05)
    return true()


def stubborn(flag: Path, then: str) -> list[str]:
    """A command that starts a process which ignores signals, in a session of its own, and goes on as told."""
    start = f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}, {str(flag)!r}])"
    wait = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(flag)!r}), True)]"
    return [sys.executable, "-c", f"import os, subprocess, sys, time\n{start}\n{wait}\n{then}"]


@pytest.mark.parametrize(
    ("script", "kept", "notice"),
    [
        ("exit 0", "2", "ended with status 0"),
        ("echo noise >&2; echo no memory >&2; exit 3", "2", "ended with status 3: no memory"),
        ("echo result; echo no memory >&2; exit 3", "12", "ended with status 3: no memory"),
        ("echo last >&2; kill -SEGV $$", "2", "died of SIGSEGV: last"),
        ("kill -40 $$", "2", "died of signal 40"),
        (
            "head -c 300000 /dev/zero >&2; printf '\\nend\\n\\n' >&2; exit 1",
            "2",
            "ended with status 1: end",
        ),
    ],
)
def test_the_death_notice_says_how_it_ended_and_its_last_line(script, kept, notice):
    assert str(Child(["sh", "-c", script], kept=kept).death(10.0)) == notice


def test_it_is_not_dead_before_it_is_dead():
    child = Child(["sleep", "600"])
    started = time.monotonic()
    assert child.death(0.2) is None
    assert 0.2 <= time.monotonic() - started < 2
    os.kill(child.pid, signal.SIGTERM)
    assert str(child.death(10.0)) == "died of SIGTERM"


def test_a_deadline_may_come_sooner_but_not_later():
    deadline = Deadline(60.0)
    assert 59 < deadline.left <= 60
    deadline.advance(600.0)
    assert deadline.left <= 60
    deadline.advance(0.0)
    assert deadline.left == 0


@pytest.mark.parametrize(("command", "error"), [("/nowhere/at/all", FileNotFoundError), ("/", PermissionError)])
def test_what_cannot_be_started_is_an_error_with_its_name(command, error):
    with pytest.raises(error, match=command):
        Child([command])


def test_the_file_that_it_may_write_has_a_largest_size(tmp_path):
    child = Child(["sh", "-c", f"head -c 5000 /dev/zero > {tmp_path}/file"], largest=4096)
    assert child.death(10.0) is not None and (tmp_path / "file").stat().st_size == 4096


def test_ending_it_ends_what_it_started(mark, tmp_path):
    child = Child(stubborn(tmp_path / "flag", "time.sleep(600)"))
    assert comes((tmp_path / "flag").exists, 20) and len(marked(mark)) == 3
    child.end()
    assert marked(mark) == {}


def test_what_it_started_ends_with_it(mark, tmp_path):
    child = Child(stubborn(tmp_path / "flag", "sys.exit(4)"))
    assert str(child.death(20.0)) == "ended with status 4" and (tmp_path / "flag").exists()
    assert comes(lambda: marked(mark) == {}, SECONDS), marked(mark)


def test_a_dropped_child_is_ended(mark):
    child = Child(["sleep", "600"])
    assert len(marked(mark)) == 2
    del child
    assert marked(mark) == {}


def test_it_ends_with_its_supervisor(mark):
    child = Child(["sleep", "600"])
    os.kill(child._supervisor.pid, signal.SIGKILL)
    assert str(child.death(10.0)) == "died of SIGKILL"
    assert comes(lambda: marked(mark) == {}, SECONDS), marked(mark)


def test_a_copy_of_the_parent_does_not_keep_it(mark, tmp_path):
    """The copy has the parent's end of the socket, too, and sleeps on."""
    code = (
        "import os, time; from conformance.implementations.child import Child; child = Child(['sleep', '600'])\n"
        f"if os.fork(): open({str(tmp_path / 'flag')!r}, 'w').close()\ntime.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    assert comes((tmp_path / "flag").exists, 20)
    parent.kill()
    parent.wait()
    assert comes(lambda: len(marked(mark)) == 1, SECONDS), marked(mark)


def test_a_function_is_called_in_an_interpreter_with_the_same_path(monkeypatch, tmp_path):
    (tmp_path / "echo.py").write_text("def twice(connection):\n    connection.send(connection.recv() * 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    child = PythonChild("echo:twice")
    child.send("ab")
    assert child.receive() == "abab"
    with pytest.raises(EOFError):
        child.receive()
    assert str(child.death(10.0)) == "ended with status 0"


@pytest.mark.parametrize("size", [0, 1, PIECE - 200, PIECE, 3 * PIECE + 1])
def test_a_message_of_any_size_comes_back(size, monkeypatch, tmp_path):
    (tmp_path / "echo.py").write_text("def back(connection):\n    connection.send(connection.recv())\n")
    monkeypatch.syspath_prepend(tmp_path)
    child = PythonChild("echo:back")
    message = {"name": "x", "bytes": os.urandom(size)}
    child.send(message)
    assert child.receive() == message


def test_a_large_message_takes_no_time_that_grows_with_its_square(monkeypatch, tmp_path):
    """In memory that is filled: 134 MB took 24 s in one piece, 0.6 s in many."""
    (tmp_path / "echo.py").write_text("def length(connection):\n    connection.send(len(connection.recv()))\n")
    monkeypatch.syspath_prepend(tmp_path)
    child = PythonChild("echo:length", environment={**os.environ, **DIRTY})
    began = time.monotonic()
    child.send(bytes(1 << 27))
    assert child.receive() == 1 << 27
    assert time.monotonic() - began < 10


def test_a_process_that_dies_in_the_middle_of_a_message_is_known_to_be_dead(monkeypatch, tmp_path):
    (tmp_path / "half.py").write_text(
        "import os\n"
        "def says(connection):\n"
        "    connection.send_bytes((1 << 20).to_bytes(8, 'little'))\n"
        "    connection.send_bytes(bytes(1 << 10))\n"
        "    os._exit(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    child = PythonChild("half:says")
    with pytest.raises(EOFError):
        child.receive()
    assert str(child.death(10.0)) == "ended with status 3"


def test_what_libraries_say_when_an_interpreter_is_taken_apart_is_not_heard(monkeypatch, tmp_path):
    """As Triton's bindings do after torch.compile; what is registered with `atexit` is still called."""
    (tmp_path / "complains.py").write_text(
        "import atexit, pathlib, sys\n"
        "class Leak:\n"
        "    def __del__(self, write=sys.__stderr__.write): write('leaked 604 objects\\n')\n"
        "leak = Leak()\n"
        "def ends(connection):\n"
        f"    atexit.register(pathlib.Path({str(tmp_path / 'called')!r}).touch)\n"
        "    print('said while it ran', file=sys.stderr)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    child = PythonChild("complains:ends", kept="2")
    assert str(child.death(20.0)) == "ended with status 0: said while it ran"
    assert (tmp_path / "called").exists()


def test_one_that_hangs_up_and_lives_on_is_told_from_a_dead_one(monkeypatch, tmp_path):
    (tmp_path / "silent.py").write_text("import time\ndef ends(connection):\n    connection.close(); time.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    child = PythonChild("silent:ends")
    assert child.connection.poll(20.0)
    with pytest.raises(EOFError):
        child.receive()
    assert child.death(0.1) is None


def interrupt(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """As a terminal does it on Ctrl-C, for the whole group; other signals for the process alone."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


HANG = ("native.hangs", "program.hangs", "rank-0.hangs", "rank-1.hangs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_run_that_is_ended(number, mark, tmp_path):
    """While a program hangs, a worker hangs in native code, and a group waits for its members."""
    implementations = [f"{LINGERING}:Native", f"{LINGERING}:Collective@data=2", f"exec:{sys.executable} -m {LINGERING}"]
    report = tmp_path / "report.jsonl"
    run = subprocess.Popen(
        [sys.executable, "-m", "conformance.cli", "run", "--jobs", "3", "--case", "smoke-paper-2", "--dtype", "float32",
         *(f"--impl={name}" for name in implementations), "--jsonl", report],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert comes(lambda: all((tmp_path / name).exists() for name in HANG), 120), list(tmp_path.iterdir())
    assert len(marked(mark)) >= 1 + 3 * 2 + 3 * 2 + 4  # run, its workers, what they started, what that started
    interrupt(run, number)
    assert comes(lambda: marked(mark) == {}, SECONDS), marked(mark)
    said = run.communicate()[1]
    assert run.returncode == (130 if number == signal.SIGINT else -number)
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".hangs", ".jsonl"}  # what was measured is kept
    if number == signal.SIGINT:
        line = r"mhc-conformance: interrupted after \d+ of \d+ items; the files have what was measured\n"
        assert re.fullmatch(line, said), said


@pytest.mark.parametrize(
    "code",
    [
        "from conformance.questions.bitwise import measure_all\n"
        f"list(measure_all(['{LINGERING}:Native'] * 2, 60, 1, 2))",
        "from conformance.oracle.pool import processes\n"
        f"from {LINGERING} import wait_long\n"
        "with processes(2) as pool: pool.map(wait_long, range(2))",
    ],
    ids=["bitwise", "pool"],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(code, number, mark, tmp_path):
    command = [sys.executable, "-c", code]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert comes(lambda: len(list(tmp_path.glob("*.hangs"))) > 0, 60)
    assert len(marked(mark)) > 2
    interrupt(parent, number)
    assert comes(lambda: marked(mark) == {}, SECONDS), marked(mark)
    assert parent.communicate()[1].count("Traceback") == (1 if number == signal.SIGINT else 0)


def test_ctrl_c_does_not_reach_the_workers_of_a_pool():
    with processes(1) as pool:
        pid = pool.apply(os.getpid)
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        assert pool.apply(os.getpid) == pid  # another would have taken its place
