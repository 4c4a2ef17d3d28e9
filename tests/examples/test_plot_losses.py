"""The plot of two loss curves: what it takes, what it refuses, and that it draws the same again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples.scripts import ROOT, script

RECORDED = ROOT / "docs" / "pictures" / "losses"


def write(path: Path, **changes: Any) -> Path:
    record = json.loads((RECORDED / f"{path.stem}.json").read_text()) | changes
    path.write_text(json.dumps(record))
    return path


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as raised:
        script("plot_losses").main(list(map(str, arguments)))
    assert raised.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch):
    """What is refused before anything is drawn is refused without matplotlib too."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_the_recorded_curves_lie_on_one_another_and_fall():
    plot = script("plot_losses")
    paths = [RECORDED / f"{name}.json" for name in ("torch", "jax")]
    records = [plot.read(path) for path in paths]
    plot.check_alike(paths, records)
    first, second = (np.array(record["losses"]) for record in records)
    assert len(first) == 400 and np.abs(first - second).max() < 2e-5
    assert first[0] > 4.5 and first[-20:].mean() < 2.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dialect": "paper"}, "dialect must be the same"),
        ({"start": "0123"}, "start must be the same"),
        ({"text": "0123"}, "text must be the same"),
        ({"losses": [4.0, 3.0]}, "both must have as many steps, they have 400 and 2"),
        ({"losses": [4.0]}, "must have two losses at least"),
    ],
)
def test_curves_of_two_tasks_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, anywhere: None, capsys: pytest.CaptureFixture
):
    paths = write(tmp_path / "torch.json"), write(tmp_path / "jax.json", **changes)
    assert said in refused(capsys, *paths, tmp_path / "plot.svg")
    assert not (tmp_path / "plot.svg").exists()


def test_values_of_their_own_are_refused(tmp_path: Path, anywhere: None, capsys: pytest.CaptureFixture):
    paths = [write(tmp_path / f"{name}.json", start="its own") for name in ("torch", "jax")]
    assert "run them with --weights" in refused(capsys, *paths, tmp_path / "plot.svg")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_other_files_are_refused(text: str, tmp_path: Path, anywhere: None, capsys: pytest.CaptureFixture):
    (tmp_path / "torch.json").write_text(text)
    said = refused(capsys, tmp_path / "torch.json", RECORDED / "jax.json", tmp_path / "plot.svg")
    assert "torch.json: " in said and "--losses" in said


def test_the_plot_is_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    for name in ("a.svg", "b.svg"):
        script("plot_losses").main([str(RECORDED / "torch.json"), str(RECORDED / "jax.json"), str(tmp_path / name)])
    assert "400 steps, at most 1.0e-05 apart: " in capsys.readouterr().out
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
