"""A disk of 64 kB that is full: one line says so, nothing is left half-written, and what was there stays."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report import read
from conformance.report.files import write_jsonl
from tests.conformance.faults.disks import small_disk

SIZE = 64 << 10
HONEST = "tests.conformance.strangers:Honest"
RUN = ("run", "--impl", HONEST, "--stage", "reduce", "--sizes", "none")


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", SIZE) as path:
        yield path


@pytest.fixture
def report(tmp_path):
    """A run whose page, text and bundle don't fit."""
    path = tmp_path / "in.jsonl"
    check = Check("out", "failed", 2.0, 1.0, 0.5, "wrong")
    outcomes = [
        Outcome(f"of {k}", f"case-{k}", "reduce", "float32-float32", "float32", "paper", [check]) for k in range(3000)
    ]
    write_jsonl(path, outcomes)
    return path


def call(*arguments):
    command = [sys.executable, "-m", "conformance.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def fill(disk, target):
    """A former target, and no room for another."""
    target.write_text("old")
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))


def arguments_of(kind, target, report):
    if kind in ("--html", "--markdown", "--bundle"):
        return ("report", report, kind, target)
    if kind == "export":
        return ("fixtures", "export", target, "--to", "flashinfer-bench")
    if kind == "search":
        wrong = "tests.conformance.strangers:SlightlyOff"
        return ("search", "--impl", wrong, "--stage", "reduce", "--seconds", "30", "--found", target)
    return (*RUN, kind, target)


@pytest.mark.parametrize("kind", ["--junit", "--html", "--markdown", "--bundle", "search"])
def test_what_was_there_stays(kind, disk, report):
    target = disk / "target"
    fill(disk, target)
    before = sorted(disk.iterdir())
    done = call(*arguments_of(kind, target, report))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if "No space left" in line and str(target) in line]
    assert target.read_text() == "old" and sorted(disk.iterdir()) == before


def test_a_new_folder_is_not_left_half_written(disk, report):
    done = call(*arguments_of("export", disk / "target", report))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "No space left" in line and not list(disk.iterdir())


def test_the_lines_of_a_run_that_fit_stay_and_the_run_is_told_to_its_end(disk):
    target = disk / "run.jsonl"
    done = call(*RUN, "--jsonl", target)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "No space left" in done.stderr and str(target) in done.stderr
    assert "items ran, 0 failed" in done.stdout
    run = read.read_run(target)
    assert run.cut and run.items
