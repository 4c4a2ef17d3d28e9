"""Parts of the corpus are checked alone, and all of it where what makes it has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("flint", reason="python-flint, of the extra 'regenerate', is not installed")

from click.testing import CliRunner

from conformance.cli import app
from conformance.files.places import fixtures
from conformance.oracle import generate, sources


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["fixtures", "regenerate", *arguments])
    return done.exit_code, done.output


@pytest.fixture
def made(monkeypatch):
    """The arguments of calls to `regenerate`, which makes nothing here and finds nothing changed."""
    calls: list[tuple[bool, list[str]]] = []

    def regenerate(target, jobs, check, progress, families):
        calls.append((check, list(families)))
        return []

    monkeypatch.setattr(generate, "regenerate", regenerate)
    return calls


def test_one_family_is_checked_alone(tmp_path):
    for path in (fixtures() / "golden").glob("head-*"):
        shutil.copy(path, tmp_path)
    assert generate.regenerate(tmp_path, 1, check=True, families=("head",)) == []
    changed = tmp_path / "head-paper-2.safetensors"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(bytes(content))
    (tmp_path / "head-liger.safetensors").unlink()
    lines = generate.regenerate(tmp_path, 1, check=True, families=("head",))
    assert [line.split()[:2] for line in lines] == [
        ["added", "head-liger.safetensors"],
        ["changed", "head-paper-2.safetensors:"],
    ]
    assert changed.read_bytes() == bytes(content)


def test_a_family_is_never_written_alone(tmp_path):
    with pytest.raises(ValueError, match="and check, got head"):
        generate.regenerate(tmp_path, 1, families=("head",))
    with pytest.raises(ValueError, match="got nobody"):
        generate.regenerate(tmp_path, 1, check=True, families=("nobody",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--family", "head"), "give one of them, with --check"),
        (("--sample",), "give one of them, with --check"),
        (("--check", "--sample", "--family", "head"), "give one of them, with --check"),
        (("--check", "--family", "nobody"), "unknown family 'nobody', expected one of smoke"),
    ],
)
def test_usage(arguments, said, made):
    status, output = call(*arguments)
    assert status == 2 and said in output and not made


def test_a_sample_where_the_oracle_is_the_recorded_one(made, monkeypatch):
    monkeypatch.setattr(sources, "changed", lambda: [])
    status, output = call("--check", "--sample")
    assert status == 0 and made == [(True, list(sources.SAMPLE))]
    assert "0 files would change (smoke, " in output
    assert set(sources.SAMPLE) < set(generate.family_names())


def test_everything_where_the_oracle_has_changed(made, monkeypatch):
    monkeypatch.setattr(sources, "changed", lambda: ["sources"])
    status, output = call("--check", "--sample")
    assert status == 0 and made == [(True, [])]
    assert "not what the corpus was made with: sources; all of it is made again" in output


def test_only_a_run_that_writes_everything_is_recorded(made, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "RECORD", tmp_path / "made_with.json")
    for arguments in (("--check",), ("--check", "--family", "head")):
        assert call(*arguments)[0] == 0 and not sources.RECORD.exists()
    assert call()[0] == 0
    assert json.loads(sources.RECORD.read_text()) == sources.made_with() and sources.changed() == []


@pytest.mark.parametrize("content", ["", "[]", "{}", "null"])
def test_a_record_that_says_nothing_is_a_change_of_everything(content, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "RECORD", tmp_path / "made_with.json")
    sources.RECORD.write_text(content)
    assert sources.changed() == list(sources.made_with())


def test_a_byte_of_a_source_is_a_change(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "RECORD", tmp_path / "made_with.json")
    copies = [Path(shutil.copy(path, tmp_path / f"{k}-{path.name}")) for k, path in enumerate(sources.sources())]
    monkeypatch.setattr(sources, "sources", lambda: copies)
    sources.record()
    assert sources.changed() == []
    copies[3].write_bytes(copies[3].read_bytes() + b"\n")
    assert sources.changed() == ["sources"]


def test_the_formulas_the_families_and_the_rows_are_sources():
    names = {path.name for path in sources.sources()}
    assert {"formulas.py", "families.py", "generate.py", "dialects.py", "stages.py", "dialects.json"} <= names
