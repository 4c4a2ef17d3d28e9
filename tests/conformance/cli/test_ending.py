"""What is wrong for the user is one line on standard error, with the documented status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.cli import ending


def command(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "conformance.cli", *arguments]
    return subprocess.run(line, capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    "arguments, saying",
    [
        (("nope",), "unknown command 'nope'"),
        (("run", "--nope"), "No such option '--nope'"),
        (("run", "--jobs", "1000000000000"), "range 1<=x<=256"),
        (("run", "--time-limit", "inf"), "is not in the range"),
        (("run", "--repeats", "1000000000"), "is not in the range"),
        (("run", "--fresh", "9" * 40), "is not in the range"),
        (("port", "x", "--verify", "1000000000"), "range 1<=x<=4096"),
        (("compare", "torch", "torch", "--streams", "256", "--dim", "100000"), "33554432 elements"),
        (("run", "--dialect", "deepseek-v4,iterations=1000000000"), "at most 10000"),
        (("run", "--mesh", "data=1000000000"), "1 to 1024"),
        (("run", "--impl", "torch", "--case", "size-1x1-C8-n4-N999999999"), "10000 iterations"),
        (("report",), "Missing argument"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_usage_error_is_one_line(arguments, saying):
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == "" and saying in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        ("mhc-conformance: ", f"mhc-conformance {arguments[0]}: ")
    )


def test_a_full_standard_output_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "conformance.cli", "--version"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_name_that_the_terminal_has_no_characters_for_is_escaped(tmp_path, encoding):
    name = os.fsdecode("no-ü\udcff.jsonl".encode("utf-8", "surrogateescape"))
    done = command("report", name, env={**os.environ, "PYTHONIOENCODING": encoding}, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and r"\udcff" in done.stderr


def test_memory_that_is_not_there_is_one_line(capsys):
    def raises() -> None:
        raise MemoryError

    assert ending.ended(raises) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback():
    def raises() -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        ending.ended(raises)


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "{}"), ("run", "--known", "{}"), ("run", "--dialect", "{}.json"),
        ("run", "--case", "{}.safetensors"),
        ("inspect", "{}"), ("inspect", "{}.d"), ("status", "--rows", "{}"), ("status", "--write", "{}"),
        ("port", "{}.d", "x", "--to", "deepseek", "--config", "{}"),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, arguments):
    for suffix in ("", ".json", ".safetensors"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / "pipe.d").mkdir()
    os.mkfifo(tmp_path / "pipe.d" / "model.safetensors")
    filled = [argument.format(tmp_path / "pipe") for argument in arguments]
    done = command(*filled, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pipe" in done.stderr
