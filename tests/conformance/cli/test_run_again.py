"""A run that was cut off goes on, what failed is repeated, and an interrupted run leaves whole files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from conformance.report.read import read_run

MINE = """
import os, time
import numpy as np
from conformance.interface import Capabilities

class Mine:
    name = "mine"
    capabilities = Capabilities(stages=frozenset({"expand"}), dialects=frozenset({"paper", "deepseek-v4"}),
                                dtypes=frozenset({"float32", "bfloat16"}), gradients=False)

    def expand(self, inputs, config, cotangents):
        with open("calls", "a") as file:
            file.write(".")
        time.sleep(float(os.environ.get("SLOW", "0")))
        wrong = 1 if os.environ.get("WRONG") == config["dialect"] else 0
        x = np.repeat(inputs["embedding"][..., None, :], config["streams"], -2)
        return {"out": (x + wrong).astype(x.dtype)}, {}
"""
OPTIONS = ("--impl", "mine:Mine", "--sizes", "none", "--no-modes", "--jobs", "1", "--jsonl", "run.jsonl")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def run(folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "conformance.cli", "run", *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **environment},
    )  # fmt: skip


def calls(folder):
    count = len((folder / "calls").read_text())
    (folder / "calls").unlink()
    return count


def test_a_run_that_was_cut_off_goes_on_and_ends_as_if_it_had_not_been(folder):
    done = run(folder, *OPTIONS, "--no-diagnose", WRONG="paper")  # a diagnosis calls it too
    assert done.returncode == 1, done.stderr
    whole, all_calls = (folder / "run.jsonl").read_bytes(), calls(folder)
    lines = whole.splitlines(keepends=True)
    for kept in (1, len(lines) // 2, len(lines) - 2):
        for piece in (b"", lines[kept][:20]):
            (folder / "run.jsonl").write_bytes(b"".join(lines[:kept]) + piece)
            before = len({c.item for c in read_run(folder / "run.jsonl").checks})
            done = run(folder, *OPTIONS, "--resume", "--no-diagnose", WRONG="paper")
            assert done.returncode == 1, done.stderr
            left = all_calls - before
            assert (calls(folder) if left else 0) == left
            again = read_run(folder / "run.jsonl")
            first = read_run(_written(folder / "whole.jsonl", whole))
            assert not again.cut and {(c.item, c.tensor, c.verdict) for c in again.checks} == {
                (c.item, c.tensor, c.verdict) for c in first.checks
            }
            assert len(again.items) == len(first.items)


def _written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--resume",), "--resume goes on with a file: name it by --jsonl FILE"),
        (("--resume", "--jsonl", "none.jsonl"), "--resume: none.jsonl: can't be read (No such file or directory)"),
        (("--resume", "--jsonl", "whole.jsonl"), "--resume: whole.jsonl is whole already: its run ended"),
        (
            ("--resume", "--jsonl", "cut.jsonl", "--dtype", "float32"),
            "cut.jsonl was run with impl mine:Mine",
        ),
        (("--resume", "--jsonl", "other.jsonl"), "--resume: other.jsonl is of another corpus"),
        (("--resume", "--jsonl", "older.jsonl"), "older.jsonl was run with other versions of numpy"),
    ],
)
def test_what_cannot_go_on_is_said_and_left_as_it_is(folder, options, said):
    run(folder, *OPTIONS)
    whole = (folder / "run.jsonl").read_bytes()
    _written(folder / "whole.jsonl", whole)
    cut = _written(folder / "cut.jsonl", b"".join(whole.splitlines(keepends=True)[:5])).read_bytes()
    _written(folder / "other.jsonl", cut.replace(read_run(folder / "cut.jsonl").header.corpus.encode(), b"0" * 64))
    numpy = read_run(folder / "cut.jsonl").header.versions["numpy"]
    _written(folder / "older.jsonl", cut.replace(f'"numpy": "{numpy}"'.encode(), b'"numpy": "1.0"'))
    before = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
    done = run(folder, "--impl", "mine:Mine", "--sizes", "none", "--no-modes", *options)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert {path: path.read_bytes() for path in folder.glob("*.jsonl")} == before


def test_what_failed_last_is_repeated_alone(folder):
    done = run(folder, "--failed")
    assert done.returncode == 2 and "none is known" in done.stderr
    run(folder, *OPTIONS, WRONG="paper")
    everything = calls(folder)
    failed = len({c.item for c in read_run(folder / "run.jsonl").checks if c.verdict == "failed"})
    assert 0 < failed < everything
    done = run(folder, "--failed", "--no-diagnose", WRONG="paper")
    assert done.returncode == 1 and calls(folder) == failed and f"{failed} items ran, {failed} failed" in done.stdout
    done = run(folder, "--failed")
    assert done.returncode == 0 and calls(folder) == failed and f"{failed} items ran, 0 failed" in done.stdout
    done = run(folder, "--failed")
    assert done.returncode == 0 and "nothing failed in the last run" in done.stdout


def test_an_interrupted_run_prints_what_it_has_and_leaves_whole_files(folder):
    command = [sys.executable, "-m", "conformance.cli", "run", *OPTIONS, "--junit", "run.xml"]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "SLOW": "0.3", "WRONG": "paper"},
    )  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until and not (folder / "calls").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, out + error
    assert "worst error as a fraction" in out and "items ran" in out
    assert error.splitlines()[-1].startswith("mhc-conformance: interrupted after ")
    found = read_run(folder / "run.jsonl")
    assert found.cut == f"interrupted after {len(found.items)} items" and any(c.verdict for c in found.checks)
    assert (folder / "run.xml").read_text().endswith("</testsuites>")
    done = run(folder, *OPTIONS, "--resume", WRONG="paper")
    assert done.returncode == 1 and not read_run(folder / "run.jsonl").cut, done.stderr


def test_ctrl_c_while_a_cause_is_looked_for_loses_nothing(folder, monkeypatch):
    from click.testing import CliRunner

    from conformance.cli import app
    from conformance.questions.diagnosis import diagnose

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnose, "diagnosed", interrupted)
    monkeypatch.setenv("WRONG", "paper")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    done = CliRunner().invoke(app, ["run", *OPTIONS, "--case", "smoke-*", "--junit", "run.xml"])
    assert done.exit_code == 1 and "the search for a cause was interrupted" in done.stdout, done.output
    assert " failed; checks: " in done.stdout and (folder / "run.xml").read_text().endswith("</testsuites>")
    found = read_run(folder / "run.jsonl")
    assert not found.cut and not found.diagnoses and any(c.verdict == "failed" for c in found.checks)


def test_a_run_that_is_killed_leaves_what_it_has_measured(folder):
    command = [sys.executable, "-m", "conformance.cli", "run", *OPTIONS]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "SLOW": "0.2"},
    )  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until and (not (folder / "calls").exists() or len((folder / "calls").read_text()) < 4):
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert read_run(folder / "run.jsonl").cut.startswith("cut off after ")
    assert len([c for c in read_run(folder / "run.jsonl").checks if c.verdict == "passed"]) >= 2
