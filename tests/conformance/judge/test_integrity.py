"""A run on files that aren't as promised says so, and isn't green; so does one whose files change meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.cases import corpus
from conformance.judge import integrity
from conformance.report import markdown, read
from conformance.report.summary import summary
from tests.conformance.judge.test_cheats import CHEATS

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "fixtures" / "golden"
NAMES = ("smoke-paper-2.safetensors", "smoke-glm-5-2.safetensors", "smoke-megatron-dev.safetensors")


def promise(golden):
    """Writes a manifest of the files that lie in a folder."""
    contents = {path.name: path.read_bytes() for path in sorted(golden.glob("*.safetensors"))}
    promised = {k: {"sha256": hashlib.sha256(v).hexdigest(), "bytes": len(v)} for k, v in contents.items()}
    manifest = {"format": corpus.MANIFEST_FORMAT, "count": len(promised), "files": promised}
    (golden / "MANIFEST.json").write_text(json.dumps(manifest))


def flip(path):
    """Changes the last bit of a file: of a true value, by less than any bound."""
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


@pytest.fixture
def home(tmp_path):
    """A copy of the packages with a corpus of three files."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("conformance", "tests/conformance"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "tests" / "__init__.py").touch()
    golden = tmp_path / "fixtures" / "golden"
    golden.mkdir(parents=True)
    for name in ("dialects.json", "dialects.schema.json"):
        shutil.copy(ROOT / "fixtures" / name, golden.parent)
    for name in NAMES:
        shutil.copy(GOLDEN / name, golden)
    promise(golden)
    return tmp_path


def command(home, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "conformance.cli", *arguments],
        capture_output=True, text=True, cwd=home, env={**os.environ, "PYTHONPATH": str(home), "COLUMNS": "200"},
    )  # fmt: skip


def run(home, cheat):
    path = home / "run.jsonl"
    done = command(
        home, "run", "--impl", f"{CHEATS}:{cheat}", "--dtype", "float32", "--stage", "reduce", "--jsonl", str(path)
    )
    assert path.exists(), done.stderr
    return done, read.read_run(path)


def test_a_run_on_whole_files_carries_the_hash_of_the_corpus(home):
    done, written = run(home, "Honest")
    manifest = home / "fixtures" / "golden" / "MANIFEST.json"
    assert done.returncode == 0, done.stderr
    assert written.header.corpus == hashlib.sha256(manifest.read_bytes()).hexdigest() and written.header.altered == ()


def test_a_run_on_altered_files_says_so_in_place_of_the_hash(home):
    flip(home / "fixtures" / "golden" / NAMES[0])
    done, written = run(home, "Honest")
    assert done.returncode == 2 and "0 failed" in done.stdout
    assert "altered  smoke-paper-2.safetensors" in done.stderr and "fixtures verify" in done.stderr
    assert done.stderr.count("\n") == 1
    assert written.header.corpus.startswith("altered-") and len(written.header.altered) == 1
    content = summary([written], None)
    (warning,) = content["warnings"]
    assert warning.startswith("run.jsonl: altered  smoke-paper-2.safetensors: expected sha256 ")
    assert warning in markdown.markdown(content)


def test_a_file_that_is_written_while_the_run_goes_on_is_told(home):
    done, written = run(home, "WritesAnswers")
    assert done.returncode == 2 and "smoke-megatron-dev.safetensors" in done.stderr
    (line,) = written.header.altered
    assert line.startswith("altered  smoke-megatron-dev.safetensors") and line.endswith(integrity.DURING)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The folder of a corpus of three files that is this process's."""
    golden = tmp_path / "golden"
    golden.mkdir()
    for name in NAMES:
        shutil.copy(GOLDEN / name, golden)
    shutil.copy(ROOT / "fixtures" / "dialects.json", tmp_path)
    promise(golden)
    for module in (corpus, integrity):
        monkeypatch.setattr(module, "fixtures", lambda: tmp_path)
    return golden


def test_a_manifest_that_is_rewritten_with_its_file_does_not_help(small):
    looked = integrity.Corpus()
    before = looked.hash
    flip(small / NAMES[1])
    promise(small)
    looked.look_again()
    assert [line.split(":")[0].split(";")[0] for line in looked.problems] == [
        "altered  smoke-glm-5-2.safetensors", "altered  MANIFEST.json",
    ]  # fmt: skip
    assert all(line.endswith(integrity.DURING) for line in looked.problems)
    assert before == looked.hash.removeprefix(integrity.ALTERED) or looked.hash.startswith(integrity.ALTERED)


def test_what_was_wrong_before_the_run_is_told_once_and_every_alteration_has_its_own_text(small):
    flip(small / NAMES[0])
    (small / NAMES[2]).unlink()
    looked = integrity.Corpus()
    first = looked.hash
    looked.look_again()
    assert [line.split(":")[0] for line in looked.problems] == [f"missing  {NAMES[2]}", f"altered  {NAMES[0]}"]
    assert looked.hash == first
    (small / NAMES[1]).write_bytes(b"")
    looked.look_again()
    assert looked.hash not in (first, corpus.corpus_hash()) and looked.hash.startswith(integrity.ALTERED)


def test_a_manifest_that_is_gone_after_the_run_is_told(small):
    looked = integrity.Corpus()
    (small / "MANIFEST.json").unlink()
    looked.look_again()
    assert len(looked.problems) == 1 and looked.problems[0].startswith("missing  MANIFEST.json")


def test_a_message_names_three_files_and_counts_the_rest(small):
    looked = integrity.Corpus()
    looked.note(f"altered  {k}" for k in range(5))
    assert "altered  0; altered  1; altered  2; and 2 more" in looked.told()


@pytest.mark.parametrize("hashed", [True, False])
def test_dialects_that_are_not_those_of_the_corpus_are_told(hashed, small, monkeypatch, tmp_path):
    record = tmp_path / "made_with.json"
    content = (small.parent / "dialects.json").read_bytes()
    record.write_text(json.dumps({"dialects": hashlib.sha256(content).hexdigest()} if hashed else {}))
    monkeypatch.setattr(integrity, "RECORD", record)
    assert integrity.Corpus().problems == []
    (small.parent / "dialects.json").write_bytes(content + b"\n")
    told = [line.split(":")[0] for line in integrity.Corpus().problems]
    assert told == (["altered  dialects.json"] if hashed else [])


def test_a_file_is_hashed_when_it_is_read(small):
    promised = corpus.manifest(small)
    assert integrity.at_reading(small / NAMES[0], promised) == ""
    flip(small / NAMES[0])
    assert integrity.at_reading(small / NAMES[0], promised).startswith(f"altered  {NAMES[0]}: expected sha256 ")
    assert integrity.at_reading(small.parent / NAMES[0], promised) == ""


def test_the_header_says_which_modules_of_ours_were_imported():
    from conformance.judge.guard import BORROWED
    from conformance.judge.item import Outcome
    from conformance.report import borrowing

    made = [
        Outcome("mine", "a", "reduce", "float32-float32", "float32", "paper", about=about)
        for about in ({"device": "cpu"}, {BORROWED: ["torch_impl"]}, {"device": "gpu"})
    ]
    settings = borrowing.settings(made)
    assert settings == {"mine": {"device": "gpu", BORROWED: ["torch_impl"]}}
    assert borrowing.lines(settings) == ["mine imported torch_impl: its answers may be ours"]
