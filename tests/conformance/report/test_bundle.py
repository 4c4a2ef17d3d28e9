"""A bundle is the same for the same runs, and whatever is done to it is told in one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conformance.cases.corpus import corpus_hash
from conformance.cli.app import app
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report import bundle, read
from conformance.report.files import Lines, write_jsonl
from conformance.report.read import ReportError

ITEM = ("smoke-paper-2", "residual_matrix", "float32-float32", "float32", "paper")
OUTCOMES = (
    Outcome("mine", *ITEM, [Check("H", "passed", 0.25, 1e-9, 4e-9), Check("d/logits", "marginal", 0.75)]),
    Outcome("theirs", *ITEM, [Check("H", "failed", 3.0, 1e-9, 4e-9), Check("d/logits", "passed", 0.5)]),
)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, outcome in zip(paths, OUTCOMES, strict=True):
        write_jsonl(path, [outcome])
    return paths


@pytest.fixture
def made(runs: list[Path], tmp_path: Path) -> Path:
    path = tmp_path / "result.zip"
    path.write_bytes(bundle.bundle(read.merge(runs))[0])
    return path


def zipped(parts: dict[str, bytes], **changes: Any) -> bytes:
    """A zip file as a bundle's is, with other members; ``changes`` are attributes of the last one."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for k, (name, content) in enumerate(parts.items(), 1):
            info = bundle._info(name)
            for key, value in changes.items() if k == len(parts) else ():
                setattr(info, key, value)
            archive.writestr(info, content, compresslevel=9)
    return target.getvalue()


def parts_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_bundle_holds_the_runs_and_what_they_passed(made, runs):
    checked = bundle.verify(made)
    parts = parts_of(made)
    assert list(parts) == ["manifest.json", "run-1.jsonl", "run-2.jsonl"]
    assert [parts["run-1.jsonl"], parts["run-2.jsonl"]] == [run.read_bytes() for run in runs]
    manifest = json.loads(parts["manifest.json"])
    assert manifest["format"] == "mhc-conformance-bundle/1" and manifest["corpus"] == corpus_hash()
    assert [member["file"] for member in manifest["members"]] == ["a.jsonl", "b.jsonl"]
    assert manifest["members"][0]["sha256"] == hashlib.sha256(runs[0].read_bytes()).hexdigest()
    assert manifest["results"] == [
        {"implementation": "mine", "passed": 2, "failed": 0, "dialects": ["paper"]},
        {"implementation": "theirs", "passed": 1, "failed": 1, "dialects": ["paper"]},
    ]
    assert "numpy" in manifest["versions"][0] and manifest["part"] == ""
    assert checked.hash == hashlib.sha256(parts["manifest.json"]).hexdigest()


def test_a_bundle_of_a_part_says_so(tmp_path):
    run, path = tmp_path / "run.jsonl", tmp_path / "result.zip"
    with contextlib.closing(Lines(run, corpus_hash(), asked={"quick": True})) as lines:
        lines.add(OUTCOMES[0])
        lines.end([])
    path.write_bytes(bundle.bundle(read.merge([run]))[0])
    assert bundle.verify(path).manifest.part == "quick"
    done = CliRunner().invoke(app, ["report", "verify", str(path)])
    assert done.exit_code == 0 and "  of a part of what there is to ask: quick\n" in done.output


def test_the_same_runs_make_the_same_bundle(runs):
    first, second = (bundle.bundle(read.merge(runs)) for _ in range(2))
    assert first == second


def test_every_byte_that_is_changed_is_told(made):
    """But for the last bits of a compressed stream, which fill its last byte and stand for nothing."""
    content, parts = made.read_bytes(), parts_of(made)
    with zipfile.ZipFile(made) as archive:
        ends = {i.header_offset + 29 + len(i.filename) + i.compress_size for i in archive.infolist()}
    draws = random.Random(0)
    places = {*range(60), *range(len(content) - 400, len(content)), *draws.sample(range(len(content)), 300)}
    for place in sorted(places):
        made.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            bundle.verify(made)
        except ReportError as error:
            assert str(error).startswith(f"{made}: ") and "\n" not in str(error)
        else:
            assert place in ends and parts_of(made) == parts


def test_what_stands_behind_a_compressed_member_is_told(made):
    content = made.read_bytes()
    with zipfile.ZipFile(made) as archive:
        last = archive.infolist()[-1]
        end, size = archive.start_dir, last.compress_size + 4
    changed = bytearray(content[:end] + b"more" + content[end:])
    changed[last.header_offset + 18 : last.header_offset + 22] = size.to_bytes(4, "little")
    entry = changed.rindex(b"PK\1\2")
    changed[entry + 20 : entry + 24] = size.to_bytes(4, "little")
    changed[-6:-2] = (end + 4).to_bytes(4, "little")
    made.write_bytes(changed)
    with pytest.raises(bundle.Broken, match=r"run-2\.jsonl: its header was changed, or more stands behind it"):
        bundle.verify(made)


def test_a_bundle_that_is_cut_off_is_told(made):
    content = made.read_bytes()
    for length in (0, 1, 21, 22, 100, len(content) // 2, len(content) - 1):
        made.write_bytes(content[:length])
        with pytest.raises(ReportError, match="expected a bundle, a whole zip file"):
            bundle.verify(made)


def changed_run(parts: dict[str, bytes]) -> dict[str, bytes]:
    return {**parts, "run-2.jsonl": parts["run-2.jsonl"].replace(b'"failed"', b'"passed"')}


def forged(parts: dict[str, bytes], **values: Any) -> dict[str, bytes]:
    """With a manifest that says something else; its members' hashes are made to fit."""
    manifest = json.loads(parts["manifest.json"]) | values
    for member in manifest["members"]:
        content = parts[member["name"]]
        member |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {**parts, "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_run, "run-2.jsonl isn't the file that the manifest names: it was changed"),
        (lambda parts: forged(changed_run(parts)), "the manifest has other results than the runs in it"),
        (lambda parts: forged(parts, versions=[{}, {}]), "the manifest has other versions than the runs in it"),
        (lambda parts: forged(parts, corpus="0" * 64), "the manifest has other corpus than the runs in it"),
        (lambda parts: {k: v for k, v in parts.items() if k != "run-1.jsonl"}, "expected the members"),
        (lambda parts: {**parts, "more.txt": b"x"}, "expected the members"),
        (lambda parts: {k: parts[k] for k in ("manifest.json", "run-2.jsonl", "run-1.jsonl")}, "expected the members"),
        (lambda parts: {"run-1.jsonl": b"", **parts}, "expected manifest.json and at most 64 runs"),
        (lambda parts: {**parts, "manifest.json": b"{"}, "manifest.json: expected a bundle's manifest"),
        (lambda parts: forged(parts, format="other/1"), "expected format 'mhc-conformance-bundle/1', got 'other/1'"),
        (lambda parts: forged(parts, more=1), "more"),
        (
            lambda parts: forged({**parts, "run-2.jsonl": parts["run-2.jsonl"].rsplit(b"\n", 2)[0] + b"\n"}),
            "run-2.jsonl: expected a whole run, it was cut off",
        ),
        (lambda parts: forged({**parts, "run-2.jsonl": b"x"}), "run-2.jsonl: line 1: expected"),
        (
            lambda parts: forged(
                {k: v.replace(corpus_hash().encode(), b"0" * 64) for k, v in parts.items()}, corpus="0" * 64
            ),
            f"of the corpus {'0' * 64}, and the one at hand is {corpus_hash()}",
        ),
    ],
)
def test_other_members_are_told(made, change, said):
    made.write_bytes(zipped(change(parts_of(made))))
    with pytest.raises(bundle.Broken) as caught:
        bundle.verify(made)
    assert str(caught.value).startswith(f"{made}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value) and tempfile.gettempdir() + "/tmp" not in str(caught.value)


def test_a_member_twice_and_what_stands_beside_members_is_told(made):
    parts, content = parts_of(made), made.read_bytes()
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(made, "a") as archive:
        archive.writestr("run-1.jsonl", b"other")
    for wrong in (made.read_bytes(), b"#!/bin/sh\n" + content, content + b"more",
                  zipped(parts, date_time=(2026, 1, 1, 0, 0, 0)), zipped(parts, external_attr=0o777 << 16),
                  zipped(parts, extra=b"\0\0\1\0x"), zipped(parts, comment=b"x"),
                  zipped(parts, compress_type=zipfile.ZIP_STORED)):  # fmt: skip
        made.write_bytes(wrong)
        with pytest.raises(ReportError):
            bundle.verify(made)
    made.write_bytes(zipped(parts))
    assert bundle.verify(made).manifest.results


def test_a_bomb_is_refused_before_it_is_unpacked(made, monkeypatch):
    monkeypatch.setattr(bundle, "LARGEST", 100_000)
    parts = parts_of(made)
    made.write_bytes(zipped({**parts, "run-2.jsonl": b"\n" * 200_000}))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(bundle.Broken, match="expected members of at most 100000 bytes together, got more"):
        bundle.verify(made)
    monkeypatch.setattr(bundle, "LARGEST_FILE", 100)
    with pytest.raises(ReportError, match="expected a bundle of at most 100 bytes, got more"):
        bundle.verify(made)


def test_a_member_that_is_larger_than_it_says_is_not_unpacked(made):
    """The directory says 10 bytes of a member that has 100 million; its own checksum is of the 10."""
    parts = parts_of(made)
    content = bytearray(zipped({**parts, "run-2.jsonl": b"\n" * 100_000_000}))
    for mark, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        place = content.rindex(mark) + offset
        content[place : place + 4] = (10).to_bytes(4, "little")
    made.write_bytes(content)
    with pytest.raises(bundle.Broken):
        bundle.verify(made)


@pytest.mark.parametrize("what", ["interrupted", "altered", "cut off", "nothing"])
def test_only_a_whole_run_is_bundled(tmp_path, what):
    path = tmp_path / "run.jsonl"
    lines = Lines(path, altered=["smoke.safetensors was altered"] if what == "altered" else [])
    if what != "nothing":
        lines.add(OUTCOMES[0])
    lines.close() if what == "cut off" else lines.end(interrupted=what == "interrupted")
    with pytest.raises(ReportError) as caught:
        bundle.bundle(read.merge([path]))
    assert str(path) in str(caught.value)
    assert what in str(caught.value) or what == "nothing"


def test_a_run_that_changed_since_it_was_read_is_not_bundled(runs):
    merged = read.merge(runs)
    shutil.copy(runs[0], runs[1])
    with pytest.raises(ReportError, match="the bundle of these runs: "):
        bundle.bundle(merged)


def test_the_command_makes_a_bundle_and_checks_it(runs, tmp_path):
    path = tmp_path / "result.zip"
    done = CliRunner().invoke(app, ["report", *map(str, runs), "--bundle", str(path)])
    hash_ = bundle.verify(path).hash
    assert (done.exit_code, done.output) == (0, f"{path}: hash {hash_}\n")
    done = CliRunner().invoke(app, ["report", "verify", str(path), "--sha256", hash_])
    assert done.exit_code == 0 and done.output.splitlines() == [
        f"{path}: whole, of corpus {corpus_hash()}; hash {hash_}",
        "  mine: passed 2 checks (paper)",
        "  theirs: 1 of 2 checks failed (paper)",
    ]
    done = CliRunner().invoke(app, ["report", "verify", str(path), "--sha256", "0" * 64])
    assert (done.exit_code, done.output) == (
        1, f"mhc-conformance: {path}: expected the hash {'0' * 64}, got {hash_}\n",
    )  # fmt: skip
    path.write_bytes(path.read_bytes()[:100])
    for arguments in (["verify", str(path)], ["verify", str(tmp_path / "none.zip")], ["verify"]):
        done = CliRunner().invoke(app, ["report", *arguments])
        assert done.exit_code == 2 and done.output.count("\n") == 1, done.output


def test_what_goes_wrong_leaves_every_file_as_it_was(runs, tmp_path):
    path, page = tmp_path / "result.zip", tmp_path / "report.md"
    path.write_text("before")
    runs[0].write_bytes(runs[0].read_bytes()[:-10])
    done = CliRunner().invoke(app, ["report", *map(str, runs), "--markdown", str(page), "--bundle", str(path)])
    assert done.exit_code == 2 and path.read_text() == "before" and not page.exists()
    assert done.output.startswith(f"mhc-conformance: {runs[0]}: expected a whole run, it was cut off")
